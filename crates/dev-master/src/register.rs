//! `POST /register`: identifies an agent, and agrees with it on a protocol version.

use std::collections::BTreeSet;

use hyper::StatusCode;
use jiff::Timestamp;
use serde_json::{Map, Value, json};
use uuid::Uuid;

use crate::check;
use crate::operate;
use crate::reply::{Reply, outcome};
use crate::request::{Call, Payload, Route};
use crate::state::{Protocol, Record, State};

/// Registers the sender of `call`, or refuses it.
pub(crate) fn register(state: &mut State, call: &Call) -> Reply {
    let reply = match state.rules.protocol {
        Protocol::V1 => first(state, call),
        Protocol::V2 => second(state, call),
    };
    reply.unwrap_or_else(|refusal| refusal)
}

/// Version 1: the agent may choose its id. A known agent must use the key it is bound to.
fn first(state: &mut State, call: &Call) -> Result<Reply, Reply> {
    let key = state.active_key(call).ok_or_else(unauthorized_first)?;
    let body = json_object(state, call)?;
    let sent = text(&body, "agent_id");
    note(state, sent.as_deref().unwrap_or("new"), &body);
    let id = sent.unwrap_or_else(|| Uuid::new_v4().to_string());
    let known = state.records.contains_key(&id);
    if known && !state.may_act(&id, &key) {
        return Err(Reply::message(StatusCode::FORBIDDEN, "API key mismatch for agent."));
    }
    let record = state.records.entry(id.clone()).or_default();
    if !known {
        record.key = Some(key.clone());
    }
    introduce(record, &id, &body);
    record.shown.protocol = 1;
    record.shown.session = None;
    settle(state, &id, &key, known);
    let agent = state.records.get(&id).map(described).unwrap_or_default();
    let status = if known { StatusCode::OK } else { StatusCode::CREATED };
    Ok(Reply::json(status, &json!({ "status": "success", "agent_id": id, "agent": agent })))
}

/// Version 2: the id follows the key, and each registration begins a session.
fn second(state: &mut State, call: &Call) -> Result<Reply, Reply> {
    let unauthorized = || Reply::code(StatusCode::UNAUTHORIZED, "unauthorized");
    let key = state.active_key(call).ok_or_else(unauthorized)?;
    if call.length > state.rules.limits.body_bytes {
        return Err(Reply::code(StatusCode::PAYLOAD_TOO_LARGE, "payload_too_large"));
    }
    let Some(body) = call.object() else {
        state.journal.violation(Route::Register, "new", "the body is not a JSON object");
        return Err(Reply::code(StatusCode::BAD_REQUEST, "invalid_payload"));
    };
    let sent = text(body, "agent_id");
    let bound = state.keys.get(&key).and_then(|known| known.agent.clone());
    note(state, bound.as_deref().or(sent.as_deref()).unwrap_or("new"), body);
    let mismatch = || Reply::code(StatusCode::FORBIDDEN, "agent_key_mismatch");
    if bound.is_some() && sent.is_some() && sent != bound {
        return Err(mismatch());
    }
    let known = bound.as_ref().is_some_and(|id| state.records.contains_key(id));
    if bound.is_some() && !known {
        return Err(mismatch());
    }
    let version = agree(body, state.rules.at_most)?;

    let id = bound.unwrap_or_else(|| Uuid::new_v4().to_string());
    let session = (version == 2).then(|| Uuid::new_v4().to_string());
    let record = state.records.entry(id.clone()).or_default();
    record.key = Some(key.clone());
    introduce(record, &id, body);
    record.shown.protocol = version;
    record.shown.session.clone_from(&session);
    record.last_event = None;
    record.last_report = None;
    settle(state, &id, &key, known);
    let status = if known { StatusCode::OK } else { StatusCode::CREATED };
    let reply = json!({
        "status": outcome(status),
        "code": "registered",
        "agent_id": id,
        "protocol_version": version,
        "agent_session_id": session,
    });
    Ok(Reply::json(status, &reply))
}

/// Picks the highest version that both sides speak. An agent that offers none speaks version 1.
fn agree(body: &Map<String, Value>, at_most: u8) -> Result<u8, Reply> {
    let Some(offer) = body.get("supported_protocol_versions") else { return Ok(1) };
    let invalid = || Reply::code(StatusCode::BAD_REQUEST, "invalid_payload");
    let offer: Option<BTreeSet<u64>> = offer.as_array().and_then(|list| list.iter().map(Value::as_u64).collect());
    let offer = offer.filter(|versions| !versions.is_empty() && !versions.contains(&0)).ok_or_else(invalid)?;
    let agreed = (1..=at_most).rev().find(|&version| offer.contains(&u64::from(version)));
    agreed.ok_or_else(|| Reply::code(StatusCode::CONFLICT, "unsupported_protocol"))
}

/// Stores what the agent says about itself, but keeps a name that the operator chose.
fn introduce(record: &mut Record, id: &str, body: &Map<String, Value>) {
    id.clone_into(&mut record.shown.id);
    if !record.named {
        let own = text(body, "display_name");
        record.shown.display_name = own.unwrap_or_else(|| format!("agent-{}", id.get(..8).unwrap_or(id)));
    }
    record.shown.version = text(body, "agent_version").or_else(|| text(body, "version"));
    let capabilities = body.get("capabilities").and_then(Value::as_array).into_iter().flatten();
    record.shown.capabilities = capabilities.filter_map(Value::as_str).map(str::to_owned).collect();
    record.shown.registrations += 1;
    record.touch();
}

/// Completes a registration: binds the key to the agent, and enrolls a new agent if the rules say so.
fn settle(state: &mut State, id: &str, key: &str, known: bool) {
    state.registrations += 1;
    if let Some(used) = state.keys.get_mut(key) {
        used.agent = Some(id.to_owned());
    }
    if let Some(record) = state.records.get(id) {
        let (name, speaks) = (&record.shown.display_name, record.shown.protocol);
        let what = if known { "again" } else { "for the first time" };
        tracing::info!(agent = id, name, speaks, "agent registered {what}");
    }
    if known {
        return;
    }
    if let Some(tunnel) = state.rules.enroll_new.clone()
        && let Err(error) = operate::enroll(state, id, &tunnel)
    {
        tracing::warn!(agent = id, "the new agent was not enrolled: {error}");
    }
}

/// Describes the agent as version 1 does. An agent that lost the command for its tunnel recovers the tunnel from this.
fn described(record: &Record) -> Value {
    let shown = &record.shown;
    json!({
        "id": shown.id,
        "display_name": shown.display_name,
        "version": shown.version,
        "status": shown.status,
        "last_seen": shown.last_seen.unwrap_or_else(Timestamp::now).to_string(),
        "assigned_tunnel_id": shown.tunnel.as_ref().map(|tunnel| &tunnel.id),
        "assigned_tunnel_name": shown.tunnel.as_ref().map(|tunnel| &tunnel.name),
        "assigned_tunnel_token": record.tunnel_token,
        "commands": [],
        "meta": {},
    })
}

fn note(state: &mut State, agent: &str, body: &Map<String, Value>) {
    let mut found = check::registration(body);
    if state.has_secret(&Value::Object(body.clone()).to_string()) {
        found.push("a key or token is in the body".to_owned());
    }
    state.violations(Route::Register, agent, found);
}

/// Version 1's refusal of a key.
pub(crate) fn unauthorized_first() -> Reply {
    Reply::message(StatusCode::UNAUTHORIZED, "Missing or invalid Authorization header.")
}

/// Reads the body as version 1 does. A body that is not JSON gets an HTML answer, because it never reaches
/// the master's own code.
pub(crate) fn json_object(state: &mut State, call: &Call) -> Result<Map<String, Value>, Reply> {
    if let Some(body) = call.object() {
        return Ok(body.clone());
    }
    let agent = call.target.agent().unwrap_or("new");
    state.journal.violation(call.target.route(), agent, "the body is not a JSON object");
    Err(match call.payload {
        Payload::WrongType => Reply::html(StatusCode::UNSUPPORTED_MEDIA_TYPE),
        Payload::Empty | Payload::Broken | Payload::Json(_) => Reply::html(StatusCode::BAD_REQUEST),
    })
}

/// Returns a member that is a non-empty string.
pub(crate) fn text(body: &Map<String, Value>, member: &str) -> Option<String> {
    body.get(member).and_then(Value::as_str).filter(|text| !text.is_empty()).map(str::to_owned)
}
