//! Finds what an agent should not send, whether or not a master would refuse it.
//!
//! Each check returns one sentence per problem. None means that the message keeps the contract.

use serde_json::{Map, Value};

/// The members of a registration. Only `agent_id` is optional.
const REGISTRATION: [&str; 6] =
    ["agent_id", "agent_version", "capabilities", "display_name", "supported_protocol_versions", "version"];

/// The event types that both protocols accept.
pub(crate) const EVENTS: [&str; 6] =
    ["container_start", "container_stop", "status_report", "heartbeat", "hello", "tunnel_status"];

/// The event members that only version 2 has.
const SECOND: [&str; 6] = [
    "protocol_version",
    "agent_session_id",
    "event_sequence",
    "report_sequence",
    "inventory_complete",
    "inventory_scope",
];

/// The only valid scope of an inventory.
pub(crate) const SCOPE: &str = "dockflare_enabled_running";

/// Whether an agent may report this label to a master.
pub(crate) fn reportable(label: &str) -> bool {
    label.starts_with("dockflare.") || label.starts_with("cloudflare.tunnel.")
}

/// Whether the labels enable a container.
fn enabled(labels: &Map<String, Value>) -> bool {
    ["dockflare.enable", "cloudflare.tunnel.enable"].iter().any(|&label| {
        let value = labels.get(label).and_then(Value::as_str).unwrap_or_default();
        ["true", "1", "t", "yes"].iter().any(|yes| value.eq_ignore_ascii_case(yes))
    })
}

/// Lists what is wrong with a registration.
pub(crate) fn registration(body: &Map<String, Value>) -> Vec<String> {
    let mut found = Vec::new();
    for member in ["display_name", "version", "agent_version"] {
        match body.get(member) {
            None => found.push(format!("{member} is missing")),
            Some(Value::String(text)) if !text.is_empty() => {}
            Some(_) => found.push(format!("{member} is not a non-empty string")),
        }
    }
    match body.get("supported_protocol_versions") {
        None => found.push("supported_protocol_versions is missing".to_owned()),
        Some(Value::Array(versions)) if !versions.is_empty() && versions.iter().all(Value::is_u64) => {}
        Some(_) => found.push("supported_protocol_versions is not a list of numbers".to_owned()),
    }
    match body.get("capabilities") {
        None => found.push("capabilities is missing".to_owned()),
        Some(Value::Array(names)) if names.iter().all(Value::is_string) => {}
        Some(_) => found.push("capabilities is not a list of strings".to_owned()),
    }
    if body.get("agent_id").is_some_and(|id| id.as_str().is_none_or(str::is_empty)) {
        found.push("agent_id is sent but is no id".to_owned());
    }
    let unknown = body.keys().filter(|member| !REGISTRATION.contains(&member.as_str()));
    found.extend(unknown.map(|member| format!("unknown member {member}")));
    found
}

/// Lists what is wrong with an event from an agent that speaks version `speaks`.
pub(crate) fn event(body: &Map<String, Value>, speaks: u8) -> Vec<String> {
    let mut found = Vec::new();
    let kind = body.get("type").and_then(Value::as_str).unwrap_or_default();
    if !EVENTS.contains(&kind) {
        found.push(format!("unknown event type {kind:?}"));
    }
    match body.get("timestamp").and_then(Value::as_str) {
        None => found.push(format!("{kind}: timestamp is missing")),
        Some(text) if !utc(text) => found.push(format!("{kind}: timestamp {text:?} is not RFC 3339 in UTC")),
        Some(_) => {}
    }
    if speaks == 2 {
        numbered(body, kind, &mut found);
    } else {
        let second = SECOND.iter().filter(|&&member| body.contains_key(member));
        found.extend(second.map(|member| format!("{kind}: {member} sent to an agent's version 1 master")));
    }
    match kind {
        "container_start" | "container_stop" => {
            container(body.get("container").unwrap_or(&Value::Null), kind, &mut found);
        }
        "status_report" => report(body, speaks, &mut found),
        "tunnel_status" => tunnel_status(body, &mut found),
        _ => {}
    }
    found
}

/// Checks the members that every version 2 event has.
fn numbered(body: &Map<String, Value>, kind: &str, found: &mut Vec<String>) {
    if body.get("protocol_version").and_then(Value::as_u64) != Some(2) {
        found.push(format!("{kind}: protocol_version is not 2"));
    }
    if body.get("agent_session_id").and_then(Value::as_str).is_none_or(str::is_empty) {
        found.push(format!("{kind}: agent_session_id is missing"));
    }
    let (right, wrong) = match kind {
        "status_report" => ("report_sequence", "event_sequence"),
        _ => ("event_sequence", "report_sequence"),
    };
    if body.get(right).and_then(Value::as_u64).is_none_or(|number| number == 0) {
        found.push(format!("{kind}: {right} is not a number from 1"));
    }
    if body.contains_key(wrong) {
        found.push(format!("{kind}: {wrong} belongs to the other stream"));
    }
}

fn report(body: &Map<String, Value>, speaks: u8, found: &mut Vec<String>) {
    let listed = if speaks == 2 {
        if body.get("inventory_scope").is_some_and(|scope| scope != SCOPE) {
            found.push(format!("status_report: inventory_scope is not {SCOPE}"));
        }
        match body.get("inventory_complete") {
            Some(Value::Bool(true)) => {}
            Some(Value::Bool(false)) => {
                if body.contains_key("containers") {
                    found.push("status_report: an incomplete inventory with containers".to_owned());
                }
                return;
            }
            _ => found.push("status_report: inventory_complete is neither true nor false".to_owned()),
        }
        if !body.contains_key("inventory_scope") {
            found.push("status_report: inventory_scope is missing".to_owned());
        }
        body.get("containers")
    } else {
        let nested = body.get("container").and_then(|container| container.get("containers"));
        nested.or_else(|| body.get("containers"))
    };
    let Some(Value::Array(listed)) = listed else {
        found.push("status_report: taken as complete, but it has no list of containers".to_owned());
        return;
    };
    for value in listed {
        container(value, "status_report", found);
        if value["status"].as_str().is_none_or(str::is_empty) {
            found.push("status_report: a container without status".to_owned());
        }
    }
}

/// Checks a container in a start, a stop or a report.
fn container(value: &Value, kind: &str, found: &mut Vec<String>) {
    let Value::Object(members) = value else {
        found.push(format!("{kind}: no container"));
        return;
    };
    for member in ["id", "name"] {
        if members.get(member).and_then(Value::as_str).is_none_or(str::is_empty) {
            found.push(format!("{kind}: a container without {member}"));
        }
    }
    let Some(Value::Object(labels)) = members.get("labels") else {
        found.push(format!("{kind}: a container without labels"));
        return;
    };
    if labels.values().any(|value| !value.is_string()) {
        found.push(format!("{kind}: a label whose value is not a string"));
    }
    let private = labels.keys().filter(|label| !reportable(label));
    found.extend(private.map(|label| format!("{kind}: the label {label} is none of the master's business")));
    if kind != "container_stop" && !enabled(labels) {
        found.push(format!("{kind}: a container that is not enabled"));
    }
}

fn tunnel_status(body: &Map<String, Value>, found: &mut Vec<String>) {
    let read = match body.get("tunnel") {
        Some(Value::Object(tunnel)) => tunnel,
        _ => body,
    };
    if read.get("status").and_then(Value::as_str).is_some_and(|status| !status.is_empty()) {
        return;
    }
    if body.get("container").and_then(|container| container.get("status")).is_some() {
        found.push("tunnel_status: the status is only under container, where no master reads it".to_owned());
    } else {
        found.push("tunnel_status: no status".to_owned());
    }
}

/// Whether `text` is an RFC 3339 timestamp in UTC.
fn utc(text: &str) -> bool {
    let shaped = text.len() >= 20
        && [(4, '-'), (7, '-'), (10, 'T'), (13, ':'), (16, ':')]
            .iter()
            .all(|&(at, sign)| text.as_bytes()[at] == sign as u8);
    shaped && (text.ends_with('Z') || text.ends_with("+00:00")) && text.parse::<jiff::Timestamp>().is_ok()
}

#[cfg(test)]
#[path = "check_tests.rs"]
mod tests;
