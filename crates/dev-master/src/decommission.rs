//! Decommissioning in two phases. The operator removes an agent; the agent prepares and acknowledges. The
//! master then sends the finalize command; the agent acknowledges that too, and the master forgets the agent.
//!
//! Only a version 2 master does this. It sends each command with every poll until the agent acknowledges it.
//! The agent may repeat an acknowledgement whenever the reply is lost, even after its key is revoked.

use std::fmt;

use hyper::StatusCode;
use serde::Serialize;
use serde_json::{Map, Value, json};
use uuid::Uuid;

use crate::reply::Reply;
use crate::request::{Call, Route};
use crate::state::{Protocol, State};

/// A decommission, in progress or completed.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Decommission {
    /// Its id.
    pub operation_id: String,
    /// The agent being decommissioned.
    pub agent_id: String,
    /// Its current phase.
    pub phase: Phase,
    /// The acknowledgement that ended the first phase.
    pub prepare_ack: Option<Value>,
    /// The acknowledgement that ended the second phase.
    pub finalize_ack: Option<Value>,
    /// The `error_code` of the last acknowledgement that reported a failure.
    pub failure: Option<String>,
}

/// The phase of a decommission.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// The master sends `prepare_decommission` with each poll.
    WaitingForPrepare,
    /// The agent reported that it cannot prepare. The master keeps sending the command, in case it can later.
    PrepareFailed,
    /// The master sends `finalize_decommission` with each poll.
    WaitingForFinalize,
    /// The key is revoked and the agent forgotten.
    Completed,
}

impl fmt::Display for Decommission {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { operation_id, agent_id, phase, failure, .. } = self;
        write!(f, "{operation_id} of agent {agent_id}: {phase:?}")?;
        failure.as_ref().map_or(Ok(()), |code| write!(f, " ({code})"))
    }
}

/// A decommission, with the details that only the master needs.
pub(crate) struct Operation {
    pub(crate) shown: Decommission,
    prepare_id: String,
    finalize_id: String,
    expected_tunnel_id: Option<String>,
    /// The agent's last key, which may repeat the acknowledgement even after it is revoked.
    key: Option<String>,
}

/// Begins to decommission `agent`, or returns the operation already in progress. `None` if the agent is
/// unknown.
pub(crate) fn begin(state: &mut State, agent: &str) -> Option<String> {
    let record = state.records.get_mut(agent)?;
    if let Some(begun) = &record.shown.decommission {
        return Some(begun.clone());
    }
    let operation_id = Uuid::new_v4().to_string();
    record.shown.decommission = Some(operation_id.clone());
    state.operations.push(Operation {
        shown: Decommission {
            operation_id: operation_id.clone(),
            agent_id: agent.to_owned(),
            phase: Phase::WaitingForPrepare,
            prepare_ack: None,
            finalize_ack: None,
            failure: None,
        },
        prepare_id: Uuid::new_v4().to_string(),
        finalize_id: Uuid::new_v4().to_string(),
        expected_tunnel_id: record.shown.tunnel.as_ref().map(|tunnel| tunnel.id.clone()),
        key: record.key.clone(),
    });
    tracing::info!(agent, operation = operation_id, "decommission begun");
    Some(operation_id)
}

/// The command of `agent`'s decommission that the agent has not acknowledged yet.
pub(crate) fn pending_command(state: &State, agent: &str) -> Option<Value> {
    let begun = state.records.get(agent)?.shown.decommission.as_ref()?;
    let operation = state.operations.iter().find(|operation| operation.shown.operation_id == *begun)?;
    let mut command = json!({
        "operation_id": operation.shown.operation_id,
        "requested_self_action": "stop",
        // Masters number the format of this command itself. No agent needs the number.
        "protocol_version": 1,
    });
    match operation.shown.phase {
        Phase::WaitingForPrepare | Phase::PrepareFailed => {
            command["action"] = json!("prepare_decommission");
            command["command_id"] = json!(operation.prepare_id);
            command["expected_tunnel_id"] = json!(operation.expected_tunnel_id);
        }
        Phase::WaitingForFinalize => {
            command["action"] = json!("finalize_decommission");
            command["command_id"] = json!(operation.finalize_id);
        }
        Phase::Completed => return None,
    }
    Some(command)
}

/// `POST /{agent_id}/decommission/{operation_id}/ack`.
pub(crate) fn acknowledge(state: &mut State, call: &Call, agent: &str, operation: &str) -> Reply {
    judge(state, call, agent, operation).unwrap_or_else(|refusal| refusal)
}

fn judge(state: &mut State, call: &Call, agent: &str, operation_id: &str) -> Result<Reply, Reply> {
    if state.rules.protocol == Protocol::V1 {
        state.journal.violation(Route::Ack, agent, "a version 1 master has no decommission");
        return Err(Reply::html(StatusCode::NOT_FOUND));
    }
    let refuse = |status, code: &str| Err(Reply::code(status, code));
    // This is the only route that still recognizes a revoked key.
    let Some(key) = call.key.clone().filter(|key| state.keys.contains_key(key)) else {
        return refuse(StatusCode::UNAUTHORIZED, "unauthorized");
    };
    if call.length > state.rules.limits.body_bytes {
        return refuse(StatusCode::PAYLOAD_TOO_LARGE, "payload_too_large");
    }
    let Some(body) = call.object() else {
        state.journal.violation(Route::Ack, agent, "the body is not a JSON object");
        return refuse(StatusCode::BAD_REQUEST, "invalid_payload");
    };
    let command = body.get("command_id").and_then(Value::as_str).unwrap_or_default();
    let found = state.operations.iter().position(|operation| operation.shown.operation_id == operation_id);

    let Some(record) = state.records.get(agent) else {
        let again = found.map(|at| &state.operations[at]).is_some_and(|operation| {
            operation.shown.agent_id == agent
                && operation.key.as_deref() == Some(key.as_str())
                && operation.acknowledged(command).is_some()
        });
        return match found {
            Some(at) if again => Ok(repeated(state, at, agent, body)),
            _ => refuse(StatusCode::FORBIDDEN, "agent_key_mismatch"),
        };
    };
    let speaks = record.shown.protocol;
    let session = record.shown.session.clone();
    if state.active_key(call).is_none() || !state.may_act(agent, &key) {
        return refuse(StatusCode::FORBIDDEN, "agent_key_mismatch");
    }
    let problems = check(body, speaks);
    state.violations(Route::Ack, agent, problems);
    let sent = body.get("agent_session_id").and_then(Value::as_str);
    if speaks == 2 && (session.is_none() || sent != session.as_deref()) {
        return refuse(StatusCode::CONFLICT, "registration_required");
    }
    let Some(at) = found else { return refuse(StatusCode::NOT_FOUND, "operation_not_found") };
    if command.is_empty() {
        return refuse(StatusCode::BAD_REQUEST, "invalid_payload");
    }
    let operation = &state.operations[at];
    if operation.acknowledged(command).is_some() {
        return Ok(repeated(state, at, agent, body));
    }
    if operation.shown.agent_id != agent {
        return refuse(StatusCode::FORBIDDEN, "operation_agent_mismatch");
    }
    if operation.current_command() != Some(command) {
        return refuse(StatusCode::CONFLICT, "stale_command");
    }
    if body.get("operation_id").and_then(Value::as_str) != Some(operation_id) {
        return refuse(StatusCode::CONFLICT, "stale_operation");
    }
    if let Some(record) = state.records.get_mut(agent) {
        record.touch();
    }
    match (body.get("phase").and_then(Value::as_str), state.operations[at].shown.phase) {
        (Some("prepared"), Phase::WaitingForPrepare | Phase::PrepareFailed) => prepared(state, at, agent, body),
        (Some("shutdown_scheduled"), Phase::WaitingForFinalize) => Ok(finalized(state, at, agent, body)),
        (Some("prepared" | "shutdown_scheduled"), _) => refuse(StatusCode::CONFLICT, "invalid_operation_state"),
        _ => refuse(StatusCode::BAD_REQUEST, "invalid_ack_phase"),
    }
}

impl Operation {
    /// The acknowledgement of this command, if there is one.
    fn acknowledged(&self, command: &str) -> Option<&Value> {
        let prepare = self.shown.prepare_ack.as_ref().filter(|_| command == self.prepare_id);
        prepare.or_else(|| self.shown.finalize_ack.as_ref().filter(|_| command == self.finalize_id))
    }

    fn current_command(&self) -> Option<&str> {
        match self.shown.phase {
            Phase::WaitingForPrepare | Phase::PrepareFailed => Some(&self.prepare_id),
            Phase::WaitingForFinalize => Some(&self.finalize_id),
            Phase::Completed => None,
        }
    }

    fn acknowledgement(&self) -> Reply {
        let operation = json!({ "operation_id": self.shown.operation_id, "state": self.shown.phase });
        let reply = json!({ "status": "success", "code": "acknowledged", "operation": operation });
        Reply::json(StatusCode::OK, &reply)
    }
}

/// Replies to a repeated acknowledgement. It may come in another session, but its content should be the same.
fn repeated(state: &mut State, at: usize, agent: &str, body: &Map<String, Value>) -> Reply {
    let operation = &state.operations[at];
    let command = body.get("command_id").and_then(Value::as_str).unwrap_or_default();
    let before = operation.acknowledged(command).and_then(Value::as_object).cloned().unwrap_or_default();
    let reply = operation.acknowledgement();
    let said = |body: &Map<String, Value>| {
        let mut body = body.clone();
        body.remove("agent_session_id");
        body
    };
    if said(&before) != said(body) {
        state.journal.violation(Route::Ack, agent, "a command was acknowledged again with other content");
    }
    reply
}

/// Ends the first phase. That takes a tombstone on disk and a tunnel that no longer runs.
fn prepared(state: &mut State, at: usize, agent: &str, body: &Map<String, Value>) -> Result<Reply, Reply> {
    let shown = &mut state.operations[at].shown;
    let tunnel = body.get("tunnel_container").and_then(Value::as_str);
    if body.get("tombstone_persisted") != Some(&Value::Bool(true)) || !matches!(tunnel, Some("stopped" | "absent")) {
        let code =
            body.get("error_code").and_then(Value::as_str).filter(|code| !code.is_empty()).unwrap_or("prepare_failed");
        shown.phase = Phase::PrepareFailed;
        shown.failure = Some(code.to_owned());
        tracing::warn!(agent, code, "the agent could not prepare its decommission; it is asked again");
        return Err(Reply::code(StatusCode::CONFLICT, code));
    }
    let supported = body.get("self_stop_capability").and_then(Value::as_str) == Some("supported");
    if !image(body.get("cloudflared_image")) || (supported && !image(body.get("agent_image"))) {
        return Err(Reply::code(StatusCode::BAD_REQUEST, "invalid_image_reference"));
    }
    shown.phase = Phase::WaitingForFinalize;
    shown.failure = None;
    shown.prepare_ack = Some(Value::Object(body.clone()));
    tracing::info!(agent, tunnel, "the agent prepared its decommission");
    Ok(state.operations[at].acknowledgement())
}

/// Ends the second phase: revokes the key and forgets the agent.
fn finalized(state: &mut State, at: usize, agent: &str, body: &Map<String, Value>) -> Reply {
    let key = state.records.remove(agent).and_then(|record| record.key);
    if let Some(known) = key.as_ref().and_then(|key| state.keys.get_mut(key)) {
        known.revoked = true;
    }
    let operation = &mut state.operations[at];
    operation.key = key;
    operation.shown.phase = Phase::Completed;
    operation.shown.finalize_ack = Some(Value::Object(body.clone()));
    tracing::info!(agent, "the agent is decommissioned and its key revoked");
    operation.acknowledgement()
}

/// Lists what is wrong with an acknowledgement from an agent that speaks version `speaks`.
fn check(body: &Map<String, Value>, speaks: u8) -> Vec<String> {
    let mut found = Vec::new();
    let mut expect = |fine: bool, what: &str| {
        if !fine {
            found.push(what.to_owned());
        }
    };
    let text = |member: &str| body.get(member).and_then(Value::as_str).filter(|text| !text.is_empty());
    for member in ["operation_id", "command_id", "phase"] {
        expect(text(member).is_some(), &format!("{member} is missing"));
    }
    expect(speaks != 2 || text("agent_session_id").is_some(), "agent_session_id is missing");
    let capability = text("self_stop_capability");
    expect(matches!(capability, Some("supported" | "manual")), "self_stop_capability is neither supported nor manual");
    if text("phase") == Some("shutdown_scheduled") {
        return found;
    }
    expect(
        body.get("tombstone_persisted").is_some_and(Value::is_boolean),
        "tombstone_persisted is neither true nor false",
    );
    let tunnel = text("tunnel_container");
    expect(
        matches!(tunnel, Some("stopped" | "absent" | "failed")),
        "tunnel_container is none of stopped, absent, failed",
    );
    let failed = tunnel == Some("failed") || body.get("tombstone_persisted") != Some(&Value::Bool(true));
    expect(!failed || text("error_code").is_some(), "a failure without error_code");
    for member in ["agent_image", "cloudflared_image"] {
        let sent = body.get(member).filter(|value| !value.is_null());
        expect(sent.is_none() || image(sent), &format!("{member} is not an image reference"));
    }
    expect(capability != Some("supported") || image(body.get("agent_image")), "agent_image is missing");
    found
}

/// Whether a master accepts this image reference: `^[A-Za-z0-9][A-Za-z0-9._:/@-]{0,254}$`.
fn image(value: Option<&Value>) -> bool {
    let Some(text) = value.and_then(Value::as_str) else { return false };
    let rest = |byte: u8| byte.is_ascii_alphanumeric() || b"._:/@-".contains(&byte);
    text.len() <= 255 && text.bytes().next().is_some_and(|byte| byte.is_ascii_alphanumeric()) && text.bytes().all(rest)
}
