//! Nonsensical environments.

use proptest::prelude::*;

use super::*;
use crate::hostile::{SECRET, text};

const NAMES: [&str; 31] = [
    "DOCKFLARE_MASTER_URL",
    "DOCKFLARE_API_KEY",
    "DOCKFLARE_API_KEY_FILE",
    "CF_ACCESS_CLIENT_ID",
    "CF_ACCESS_CLIENT_SECRET",
    "CF_ACCESS_CLIENT_SECRET_FILE",
    "DOCKER_HOST",
    "CLOUDFLARED_IMAGE",
    "CLOUDFLARED_NETWORK_NAME",
    "CLOUDFLARED_METRICS_NETWORK",
    "TUNNEL_CONTAINER_NAME",
    "CLOUDFLARED_PULL",
    "TUNNEL_ON_EXIT",
    "AUTO_CONNECT_NETWORKS",
    "CLOUDFLARED_PROTOCOL",
    "CLOUDFLARED_REGION",
    "CLOUDFLARED_EDGE_IP_VERSION",
    "CLOUDFLARED_POST_QUANTUM",
    "CLOUDFLARED_LOGLEVEL",
    "CLOUDFLARED_GRACE_PERIOD",
    "CLOUDFLARED_HOST_GATEWAY",
    "REPORT_INTERVAL_SECONDS",
    "COMMAND_POLL_INTERVAL_SECONDS",
    "AGENT_DISPLAY_NAME",
    "LOG_LEVEL",
    "LOG_FORMAT",
    "TZ",
    "HEALTH_CHECK_PORT",
    "HEALTH_CHECK_BIND",
    "DOCKFLARE_DATA_DIR",
    "HOSTNAME",
];

/// Nearly valid values for one variable or another, among arbitrary ones.
fn value() -> impl Strategy<Value = String> {
    let known = proptest::sample::select(vec![
        "https://master.example.com",
        "http://[::1]:99999/",
        "https://",
        "unix://",
        "tcp://h:0",
        "tcp://[::",
        "repo@sha256:",
        "a/b:c@d:e",
        "0",
        "-1",
        "18446744073709551616",
        "=,=",
        "info,dockflare_agent=",
        "Europe/../../etc/passwd",
        ":/etc/shadow",
        "EST5EDT,M3.2.0,M11.1.0",
        "/dev/zero",
        "/proc/self/mem",
        "/",
    ]);
    prop_oneof![3 => text(), 2 => known.prop_map(str::to_owned), 1 => "[a-z]{2,6}://\\PC{0,20}"]
}

proptest! {
    #[test]
    fn any_environment_is_taken_or_refused_without_a_secret_in_the_text(
        vars in prop::collection::vec((proptest::sample::select(NAMES.to_vec()), value()), 0..12),
        other in prop::collection::vec((text(), text()), 0..3),
        key in text(),
        secret_in_an_address in prop_oneof![Just("http"), Just("ftp"), Just("tcp"), Just("unix"), Just("")],
        port in text(),
    ) {
        let vars = vars.into_iter().map(|(name, value)| (name.to_owned(), value)).chain(other);
        let mut vars: BTreeMap<String, String> = vars.collect();
        if key.len().is_multiple_of(3) {
            vars.insert("DOCKFLARE_API_KEY".into(), format!("{SECRET}{key}"));
        }
        if key.len().is_multiple_of(2) {
            vars.insert("CF_ACCESS_CLIENT_SECRET".into(), format!("{SECRET}{key}"));
        }
        for name in ["DOCKFLARE_MASTER_URL", "DOCKER_HOST"] {
            if port.len().is_multiple_of(3) {
                vars.insert(name.into(), format!("{secret_in_an_address}://user:{SECRET}@host:{port}"));
            } else if port.len().is_multiple_of(4) {
                vars.insert(name.into(), format!("{secret_in_an_address}://host/?key={SECRET}"));
            }
        }
        match Config::from_vars(vars) {
            Ok(loaded) => {
 let shown = format!("{loaded:?}");
 prop_assert!(!shown.contains(SECRET), "{}", shown);
}
            Err(errors) => {
                prop_assert!(!errors.0.is_empty());
                prop_assert!(!errors.to_string().contains(SECRET), "{}", errors);
            }
        }
    }

    #[test]
    fn any_reference_to_an_image_is_refused_or_comes_back_as_it_was(
        text in prop_oneof![
            text(),
            "[a-zA-Z0-9_.:/@-]{0,40}",
            "([a-z0-9.:-]{1,9}/)?[a-z0-9._-]{1,8}(:[a-zA-Z0-9._-]{0,9})?(@sha256:[a-f0-9]{64})?",
        ],
    ) {
        if let Ok(image) = text.parse::<ImageRef>() {
            let shown = image.to_string();
            prop_assert_eq!(&shown, &if image.tag_was_added() { format!("{text}:latest") } else { text.clone() });
            prop_assert!(shown.len() <= 262 && !shown.contains(char::is_whitespace));
            prop_assert!(!image.repository().is_empty() && !image.tag_or_digest().is_empty());
        }
    }
}

#[test]
fn a_secret_file_without_end_is_not_read_to_its_end() {
    for file in ["/dev/zero", "/proc/self/mem"] {
        assert!(read_secret_file(Path::new(file), disk::read_at_start).is_err(), "{file}");
    }
}
