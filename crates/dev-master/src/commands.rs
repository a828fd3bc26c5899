//! `GET /{agent_id}/commands`: delivery empties the queue. Only a decommission command is sent again.

use hyper::StatusCode;
use serde_json::json;

use crate::decommission;
use crate::register::unauthorized_first;
use crate::reply::Reply;
use crate::request::Call;
use crate::state::State;

/// Delivers the queue of `agent` and empties it. Both versions refuse here with a message and no code.
pub(crate) fn commands(state: &mut State, call: &Call, agent: &str) -> Reply {
    let Some(key) = state.active_key(call) else { return unauthorized_first() };
    if !state.records.contains_key(agent) {
        return Reply::message(StatusCode::NOT_FOUND, "Agent not found.");
    }
    if !state.may_act(agent, &key) {
        return Reply::message(StatusCode::FORBIDDEN, "API key mismatch for agent.");
    }
    let repeated = decommission::pending_command(state, agent);
    let Some(record) = state.records.get_mut(agent) else {
        return Reply::message(StatusCode::NOT_FOUND, "Agent not found.");
    };
    record.touch();
    record.shown.polls += 1;
    let mut commands = std::mem::take(&mut record.commands);
    commands.extend(repeated);
    for command in &commands {
        tracing::info!(agent, "delivered the command {}", command["action"].as_str().unwrap_or("without action"));
    }
    Reply::json(StatusCode::OK, &json!({ "status": "success", "commands": commands }))
}
