//! A table of things an agent should not send.

use serde_json::json;

use super::*;

fn object(value: Value) -> Map<String, Value> {
    value.as_object().cloned().unwrap()
}

const NOW: &str = "2025-06-01T12:00:00Z";

fn labels() -> Value {
    json!({ "dockflare.enable": "true", "cloudflare.tunnel.hostname": "a.example.com" })
}

fn first(kind: &str, more: Value) -> Map<String, Value> {
    let mut body = object(json!({ "type": kind, "timestamp": NOW }));
    body.extend(object(more));
    body
}

fn second(kind: &str, more: Value) -> Map<String, Value> {
    let sequence = if kind == "status_report" { "report_sequence" } else { "event_sequence" };
    let mut body = first(kind, json!({ "protocol_version": 2, "agent_session_id": "s", sequence: 1 }));
    body.extend(object(more));
    body
}

#[test]
fn well_formed_events_have_no_violation() {
    let container = json!({ "id": "c", "name": "web", "labels": labels() });
    let listed = json!([{ "id": "c", "name": "web", "labels": labels(), "status": "running" }]);
    for body in [
        first("container_start", json!({ "container": container })),
        first("container_stop", json!({ "container": container })),
        first("status_report", json!({ "container": { "containers": listed } })),
        first("status_report", json!({ "containers": [] })),
        first("heartbeat", json!({ "anything": "else" })),
        first("tunnel_status", json!({ "status": "running", "container": { "status": "running" } })),
        first("tunnel_status", json!({ "tunnel": { "status": "running" } })),
    ] {
        assert_eq!(event(&body, 1), Vec::<String>::new(), "{body:?}");
    }
    let complete = json!({ "inventory_complete": true, "inventory_scope": SCOPE, "containers": listed });
    for body in [
        second("container_start", json!({ "container": container })),
        second("status_report", complete),
        second("status_report", json!({ "inventory_complete": false })),
        second("hello", json!({})),
    ] {
        assert_eq!(event(&body, 2), Vec::<String>::new(), "{body:?}");
    }
}

#[test]
fn each_flaw_of_an_event_is_named() {
    let stop = |container: Value| first("container_stop", json!({ "container": container }));
    let report = |more: Value| second("status_report", more);
    let table = [
        (first("container_die", json!({})), 1, "unknown event type \"container_die\""),
        (first("heartbeat", json!({ "timestamp": "2025-06-01T12:00:00+02:00" })), 1, "not RFC 3339 in UTC"),
        (first("heartbeat", json!({ "timestamp": "2025-06-01 12:00:00Z" })), 1, "not RFC 3339 in UTC"),
        (first("heartbeat", json!({ "timestamp": 1_717_243_200 })), 1, "timestamp is missing"),
        (first("heartbeat", json!({ "event_sequence": 1 })), 1, "event_sequence sent to"),
        (first("status_report", json!({ "inventory_complete": false })), 1, "inventory_complete sent to"),
        (first("container_start", json!({})), 1, "no container"),
        (stop(json!({ "name": "n", "labels": {} })), 1, "without id"),
        (stop(json!({ "id": "c", "labels": {} })), 1, "without name"),
        (stop(json!({ "id": "c", "name": "n" })), 1, "without labels"),
        (stop(json!({ "id": "c", "name": "n", "labels": { "secret": "x" } })), 1, "the label secret is none"),
        (stop(json!({ "id": "c", "name": "n", "labels": { "dockflare.enable": true } })), 1, "not a string"),
        (first("container_start", json!({ "container": { "id": "c", "name": "n", "labels": {} } })), 1, "not enabled"),
        (first("status_report", json!({})), 1, "it has no list of containers"),
        (first("status_report", json!({ "containers": ["c"] })), 1, "no container"),
        (
            first("status_report", json!({ "containers": [{ "id": "c", "name": "n", "labels": labels() }] })),
            1,
            "without status",
        ),
        (first("tunnel_status", json!({ "container": { "status": "running" } })), 1, "only under container"),
        (first("tunnel_status", json!({})), 1, "no status"),
        (first("heartbeat", json!({})), 2, "protocol_version is not 2"),
        (first("heartbeat", json!({})), 2, "agent_session_id is missing"),
        (first("heartbeat", json!({})), 2, "event_sequence is not a number"),
        (second("heartbeat", json!({ "report_sequence": 1 })), 2, "belongs to the other stream"),
        (second("heartbeat", json!({ "event_sequence": 0 })), 2, "event_sequence is not a number from 1"),
        (report(json!({ "inventory_scope": SCOPE, "containers": [] })), 2, "neither true nor false"),
        (report(json!({ "inventory_complete": false, "containers": [] })), 2, "incomplete inventory with containers"),
        (report(json!({ "inventory_complete": true, "containers": [] })), 2, "inventory_scope is missing"),
        (
            report(json!({ "inventory_complete": true, "inventory_scope": "all", "containers": [] })),
            2,
            "inventory_scope is not",
        ),
        (report(json!({ "inventory_complete": true, "inventory_scope": SCOPE })), 2, "no list of containers"),
    ];
    for (body, speaks, flaw) in table {
        let found = event(&body, speaks);
        assert!(found.iter().any(|what| what.contains(flaw)), "{flaw}: {found:?} in {body:?}");
    }
}

#[test]
fn each_flaw_of_a_registration_is_named() {
    let good = json!({
        "display_name": "host", "version": "1", "agent_version": "1",
        "supported_protocol_versions": [2, 1], "capabilities": ["decommission.v1"],
    });
    assert_eq!(registration(&object(good.clone())), Vec::<String>::new());
    let table = [
        ("display_name", json!(null), "display_name is not"),
        ("version", json!(1), "version is not"),
        ("supported_protocol_versions", json!([]), "supported_protocol_versions is not"),
        ("capabilities", json!([1]), "capabilities is not"),
        ("agent_id", json!(null), "agent_id is sent but"),
        ("hostname", json!("h"), "unknown member hostname"),
    ];
    for (member, value, flaw) in table {
        let mut body = object(good.clone());
        body.insert(member.to_owned(), value);
        let found = registration(&body);
        assert!(found.len() == 1 && found[0].contains(flaw), "{flaw}: {found:?}");
    }
    for member in ["display_name", "version", "agent_version", "supported_protocol_versions", "capabilities"] {
        let mut body = object(good.clone());
        body.remove(member);
        assert_eq!(registration(&body), [format!("{member} is missing")]);
    }
}

#[test]
fn timestamps_in_utc_are_told_from_others() {
    for fine in ["2025-06-01T12:00:00Z", "2025-06-01T12:00:00.123456789Z", "2025-06-01T12:00:00+00:00"] {
        assert!(utc(fine), "{fine}");
    }
    for bad in ["", "now", "2025-06-01", "2025-06-01T12:00:00", "2025-13-01T12:00:00Z", "20250601T120000.000Z0000"] {
        assert!(!utc(bad), "{bad}");
    }
}
