//! Feeds the agent events, listings and inspections that no Engine sends, as far as the client library's models accept
//! them.

use bollard::models;
use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::hostile::{SECRET, near};

proptest! {
    #[test]
    fn any_event_is_read(value in near(json!({
        "Type": "container", "Action": "start", "scope": "local", "time": 1_700_000_000_i64,
        "timeNano": 1_700_000_000_000_000_000_i64,
        "Actor": {"ID": "c1", "Attributes": {"name": "/web", "image": "web:1", "dockflare.enable": "true"}},
    }))) {
        if let Ok(message) = serde_json::from_value::<models::EventMessage>(value) {
            let event = Event::from(message);
            prop_assert!(!event.attributes.contains_key("name"));
        }
    }

    #[test]
    fn any_listing_is_read(value in near(json!({
        "Id": "c1", "Names": ["/web", "/other/web"], "Image": "web:1", "State": "running",
        "Labels": {"dockflare.enable": "true"},
    }))) {
        if let Ok(summary) = serde_json::from_value::<models::ContainerSummary>(value) {
            let container = Container::from(summary);
            prop_assert!(!container.name.contains('/'));
        }
    }

    #[test]
    fn any_inspection_is_read_and_values_of_variables_are_not_kept(value in near(json!({
        "Id": "c1", "Name": "/web", "RestartCount": 3,
        "State": {
            "Status": "running", "StartedAt": "2026-01-31T10:00:00Z", "ExitCode": 0, "OOMKilled": false, "Error": "",
            "Health": {"Status": "healthy", "Log": [{"ExitCode": 1, "Output": "exceeded timeout"}]},
        },
        "Config": {
            "Image": "web:1", "Entrypoint": ["cloudflared"], "Cmd": ["tunnel", "run", "--token", "x"],
            "Env": [format!("TUNNEL_TOKEN={SECRET}"), "PATH=/bin"], "Labels": {"a": "b"},
            "ExposedPorts": {"80/tcp": {}, "53/udp": {}, "99999/tcp": {}},
        },
        "HostConfig": {"NetworkMode": "net"},
        "NetworkSettings": {"Networks": {"net": {
            "IPAddress": "172.18.0.3", "Gateway": "172.18.0.1", "Aliases": ["web"], "DNSNames": ["web"],
        }}},
    }))) {
        if let Ok(response) = serde_json::from_value::<models::ContainerInspectResponse>(value) {
            let seen = Inspected::from(response);
            prop_assert!(!format!("{seen:?}").contains(SECRET), "{:?}", seen);
        }
    }
}
