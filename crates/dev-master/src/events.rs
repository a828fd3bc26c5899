//! `POST /{agent_id}/events`: what happens on the agent's host.

use std::collections::BTreeMap;

use hyper::StatusCode;
use serde_json::{Map, Value, json};

use crate::check;
use crate::register::{json_object, unauthorized_first};
use crate::reply::Reply;
use crate::request::{Call, Route};
use crate::snapshot::{Container, TunnelStatus};
use crate::state::{Limits, Protocol, Record, State};

/// Accepts or refuses one event.
pub(crate) fn events(state: &mut State, call: &Call, agent: &str) -> Reply {
    let reply = match state.rules.protocol {
        Protocol::V1 => first(state, call, agent),
        Protocol::V2 => second(state, call, agent),
    };
    reply.unwrap_or_else(|refusal| refusal)
}

/// Version 1 accepts anything from a known agent, and ignores types it does not know.
fn first(state: &mut State, call: &Call, agent: &str) -> Result<Reply, Reply> {
    let key = state.active_key(call).ok_or_else(unauthorized_first)?;
    let body = json_object(state, call)?;
    if body.is_empty() {
        return Err(Reply::message(StatusCode::BAD_REQUEST, "Empty payload."));
    }
    if !state.records.contains_key(agent) {
        return Err(Reply::message(StatusCode::NOT_FOUND, "Agent not found."));
    }
    if !state.may_act(agent, &key) {
        return Err(Reply::message(StatusCode::FORBIDDEN, "API key mismatch for agent."));
    }
    note(state, agent, &body);
    let Some(record) = state.records.get_mut(agent) else {
        return Err(Reply::message(StatusCode::NOT_FOUND, "Agent not found."));
    };
    record.touch();
    let kind = body.get("type").and_then(Value::as_str).unwrap_or_default();
    // Version 1 reads a missing list as an empty one, and so does the double.
    let (containers, _) = read_all(listed(&body, kind, 1).unwrap_or_default(), None).unwrap_or_default();
    take(record, kind, &body, containers, true);
    let reply = json!({ "status": "success", "message": "Event received and processed." });
    Ok(Reply::json(StatusCode::ACCEPTED, &reply))
}

/// Version 2 checks in this order: key, size, shape, agent, decommission, session, sequence, content.
fn second(state: &mut State, call: &Call, agent: &str) -> Result<Reply, Reply> {
    let key = state.active_key(call).ok_or_else(|| Reply::code(StatusCode::UNAUTHORIZED, "unauthorized"))?;
    let limits = state.rules.limits;
    let too_large = || Reply::code(StatusCode::PAYLOAD_TOO_LARGE, "payload_too_large");
    let invalid = || Reply::code(StatusCode::BAD_REQUEST, "invalid_payload");
    if call.length > limits.body_bytes {
        return Err(too_large());
    }
    let Some(body) = call.object() else {
        state.journal.violation(Route::Events, agent, "the body is not a JSON object");
        return Err(invalid());
    };
    let kind = body.get("type").and_then(Value::as_str).unwrap_or_default();
    if !check::EVENTS.contains(&kind) {
        // An empty body is the probe that both protocols refuse after they check the key.
        if !body.is_empty() {
            note(state, agent, body);
        }
        return Err(invalid());
    }
    if !state.may_act(agent, &key) {
        return Err(Reply::code(StatusCode::FORBIDDEN, "agent_key_mismatch"));
    }
    note(state, agent, body);
    decommissioning(state, agent)?;

    let required = || Reply::code(StatusCode::CONFLICT, "registration_required");
    let record = state.records.get_mut(agent).ok_or_else(required)?;
    let numbered = record.shown.protocol == 2;
    let report = kind == "status_report";
    let sequence = if numbered {
        let session = body.get("agent_session_id").and_then(Value::as_str);
        if body.get("protocol_version") != Some(&json!(2))
            || session.is_none()
            || session != record.shown.session.as_deref()
        {
            return Err(required());
        }
        let member = if report { "report_sequence" } else { "event_sequence" };
        let sequence = body.get(member).and_then(Value::as_u64).filter(|&number| number > 0).ok_or_else(invalid)?;
        let last = if report { &record.last_report } else { &record.last_event };
        if let Some((last, content)) = last {
            if sequence == *last {
                if content.as_object() != Some(body) {
                    let what = format!("{kind}: {member} {sequence} was sent again with other content");
                    state.journal.violation(Route::Events, agent, &what);
                }
                return Ok(Reply::code(StatusCode::OK, "duplicate_sequence"));
            }
            if sequence < *last {
                let what = format!("{kind}: {member} {sequence} came after {last}");
                state.journal.violation(Route::Events, agent, &what);
                return Err(Reply::code(StatusCode::CONFLICT, "stale_sequence"));
            }
        }
        Some(sequence)
    } else {
        None
    };

    let complete = numbered
        && body.get("inventory_complete") == Some(&Value::Bool(true))
        && body.get("inventory_scope").and_then(Value::as_str) == Some(check::SCOPE);
    let listed = match listed(body, kind, record.shown.protocol) {
        Some(listed) => listed,
        None if report
            && numbered
            && body.get("inventory_complete") == Some(&Value::Bool(false))
            && !body.contains_key("containers") =>
        {
            Vec::new()
        }
        None if report => return Err(invalid()),
        None => Vec::new(),
    };
    let (containers, malformed) = read_all(listed, Some(&limits)).ok_or_else(too_large)?;
    if malformed && !report {
        return Err(invalid());
    }
    record.touch();
    if let Some(sequence) = sequence {
        let last = if report { &mut record.last_report } else { &mut record.last_event };
        *last = Some((sequence, Value::Object(body.clone())));
    }
    take(record, kind, body, containers, complete && !malformed);
    Ok(match kind {
        "status_report" if !complete || malformed => Reply::code(StatusCode::ACCEPTED, "inventory_incomplete"),
        "heartbeat" | "hello" => Reply::code(StatusCode::ACCEPTED, "accepted_noop"),
        _ => Reply::code(StatusCode::OK, "accepted"),
    })
}

/// Refuses events of an agent that is being decommissioned. Once the agent has acknowledged the
/// decommission, an event is also a violation.
fn decommissioning(state: &mut State, agent: &str) -> Result<(), Reply> {
    let Some(id) = state.records.get(agent).and_then(|record| record.shown.decommission.clone()) else { return Ok(()) };
    let acknowledged = state
        .operations
        .iter()
        .any(|operation| operation.shown.operation_id == id && operation.shown.prepare_ack.is_some());
    if acknowledged {
        state.journal.violation(Route::Events, agent, "an event after the decommission was acknowledged");
    }
    Err(Reply::code(StatusCode::CONFLICT, "agent_decommissioning"))
}

/// Records the violations in an event.
fn note(state: &mut State, agent: &str, body: &Map<String, Value>) {
    let speaks = state.records.get(agent).map_or(1, |record| record.shown.protocol);
    let mut found = check::event(body, speaks);
    if state.has_secret(&Value::Object(body.clone()).to_string()) {
        found.push("a key or token is in the body".to_owned());
    }
    state.violations(Route::Events, agent, found);
}

/// The containers in an event; `None` if a report has no list where a master looks for it.
fn listed<'a>(body: &'a Map<String, Value>, kind: &str, speaks: u8) -> Option<Vec<&'a Value>> {
    match kind {
        "container_start" | "container_stop" => Some(vec![body.get("container").unwrap_or(&Value::Null)]),
        "status_report" => {
            let top = body.get("containers").and_then(Value::as_array);
            let nested = || body.get("container").and_then(|outer| outer.get("containers")).and_then(Value::as_array);
            let list = if speaks == 2 { top } else { top.or_else(nested) };
            list.map(|list| list.iter().collect())
        }
        _ => Some(Vec::new()),
    }
}

/// Reads containers and says whether it left out any malformed one. With `limits`, reads them as version 2
/// does. `None` if a limit is exceeded.
fn read_all(values: Vec<&Value>, limits: Option<&Limits>) -> Option<(Vec<(String, Container)>, bool)> {
    if limits.is_some_and(|limits| values.len() > limits.containers) {
        return None;
    }
    let mut containers = Vec::new();
    let mut malformed = false;
    for value in values {
        if limits.is_some_and(|limits| exceeds(value, limits)) {
            return None;
        }
        match read(value, limits.is_some()) {
            Some(container) => containers.push(container),
            None => malformed = true,
        }
    }
    Some((containers, malformed))
}

/// Whether a container's labels exceed the limits of a version 2 master.
fn exceeds(value: &Value, limits: &Limits) -> bool {
    value["labels"].as_object().is_some_and(|labels| {
        let long = |(key, value): (&String, &Value)| {
            key.len() > limits.label_key_bytes || value.as_str().unwrap_or_default().len() > limits.label_value_bytes
        };
        labels.len() > limits.labels || labels.iter().any(long)
    })
}

/// Reads one container. `None` if it has no id or, when `strict`, if its name or a label has the wrong type.
fn read(value: &Value, strict: bool) -> Option<(String, Container)> {
    let members = value.as_object()?;
    let id = members.get("id")?.as_str().filter(|id| !id.is_empty())?;
    let name = match members.get("name") {
        Some(Value::String(name)) => name.as_str(),
        Some(_) if strict => return None,
        _ => "unknown",
    };
    let mut labels = BTreeMap::new();
    match members.get("labels") {
        Some(Value::Object(sent)) => {
            for (label, value) in sent {
                match value.as_str() {
                    Some(_) if strict && !check::reportable(label) => {}
                    Some(text) => drop(labels.insert(label.clone(), text.to_owned())),
                    None if strict => return None,
                    None => {}
                }
            }
        }
        Some(_) if strict => return None,
        _ => {}
    }
    let status = members.get("status").and_then(Value::as_str).unwrap_or("unknown");
    Some((id.to_owned(), Container { name: name.to_owned(), labels, status: status.to_owned() }))
}

/// Applies an accepted event.
fn take(
    record: &mut Record,
    kind: &str,
    body: &Map<String, Value>,
    containers: Vec<(String, Container)>,
    complete: bool,
) {
    let agent = record.shown.display_name.clone();
    let shown = &mut record.shown;
    match kind {
        "container_start" => {
            for (id, container) in containers {
                tracing::info!(agent, container = container.name, id, "container started");
                *shown.starts.entry(id.clone()).or_default() += 1;
                shown.containers.insert(id, container);
            }
        }
        "container_stop" => {
            for (id, container) in containers {
                tracing::info!(agent, container = container.name, id, "container stopped");
                *shown.stops.entry(id.clone()).or_default() += 1;
                shown.containers.remove(&id);
            }
        }
        "status_report" => {
            let reported: BTreeMap<String, Container> = containers.into_iter().collect();
            for (id, container) in &reported {
                if !shown.containers.contains_key(id) {
                    tracing::info!(agent, container = container.name, id, "container reported");
                }
            }
            if complete {
                shown.complete_reports += 1;
                for (id, container) in std::mem::take(&mut shown.containers) {
                    if !reported.contains_key(&id) {
                        tracing::info!(
                            agent,
                            container = container.name,
                            id,
                            "missing from a complete report: its rules are to be removed"
                        );
                        shown.removals.push(id);
                    }
                }
            } else {
                shown.incomplete_reports += 1;
            }
            shown.containers.extend(reported);
        }
        "heartbeat" => shown.heartbeats += 1,
        "tunnel_status" => {
            let now = tunnel_status(body);
            if shown.tunnel_status.as_ref().is_none_or(|before| before.status != now.status) {
                tracing::info!(agent, tunnel = now.name, version = now.version, "tunnel is {}", now.status);
            }
            shown.tunnel_status = Some(now);
        }
        _ => {}
    }
}

/// Reads a tunnel status as masters do: under `tunnel` or else at the top level, never under `container`.
fn tunnel_status(body: &Map<String, Value>) -> TunnelStatus {
    let read = match body.get("tunnel") {
        Some(Value::Object(tunnel)) => tunnel,
        _ => body,
    };
    let member = |name: &str| read.get(name).and_then(Value::as_str).filter(|text| !text.is_empty()).map(str::to_owned);
    TunnelStatus {
        status: member("status").or_else(|| member("state")).unwrap_or_else(|| "unknown".to_owned()),
        name: member("name"),
        version: member("version"),
        event: Value::Object(body.clone()),
    }
}
