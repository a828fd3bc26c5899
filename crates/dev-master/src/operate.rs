//! The operator's actions, shared by the library and the routes in `admin`.

use std::fmt;

use base64::Engine;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use jiff::Timestamp;
use serde_json::{Value, json};
use uuid::Uuid;

use crate::decommission;
use crate::snapshot::{AgentStatus, Tunnel};
use crate::state::{Key, KnownTunnel, Protocol, State};

/// Why an operator's action was refused.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Refusal {
    #[error("Agent not found.")]
    UnknownAgent,
    #[error("Key not found.")]
    UnknownKey,
    #[error("Agent not enrolled.")]
    NotEnrolled,
    #[error("Agent decommission is in progress.")]
    Leaving,
}

/// A tunnel command as queued for an agent. `Debug` hides its token.
#[derive(Clone, PartialEq, Eq)]
pub struct Command {
    /// `start_tunnel` or `restart_tunnel`.
    pub action: String,
    /// The tunnel's name.
    pub tunnel_name: String,
    /// The tunnel's id.
    pub tunnel_id: String,
    /// The tunnel's token.
    pub token: String,
}

impl Command {
    /// The command as sent. `restart_tunnel` carries the token under another name.
    pub fn to_json(&self) -> Value {
        let token = if self.action == "restart_tunnel" { "tunnel_token" } else { "token" };
        json!({
            "action": self.action,
            "tunnel_name": self.tunnel_name,
            "tunnel_id": self.tunnel_id,
            token: self.token,
        })
    }
}

impl fmt::Debug for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { action, tunnel_name, tunnel_id, token: _ } = self;
        write!(f, "Command({action} {tunnel_name} {tunnel_id}, token hidden)")
    }
}

/// Makes a tunnel token in Cloudflare's format: base64 of a JSON object with the account, the tunnel and
/// the secret.
pub fn tunnel_token(account: &str, tunnel_id: &str, secret: &str) -> String {
    STANDARD.encode(json!({ "a": account, "t": tunnel_id, "s": secret }).to_string())
}

/// `N` random bytes. They need not be secure, because the double's secrets protect nothing.
fn random<const N: usize>() -> [u8; N] {
    std::array::from_fn(|_| fastrand::u8(..))
}

pub(crate) fn generate_key(state: &mut State, owner: &str) -> String {
    let key = URL_SAFE_NO_PAD.encode(random::<32>());
    add_key(state, &key, owner);
    key
}

/// Adds a key. A key that is already known is reset to a new one.
pub(crate) fn add_key(state: &mut State, key: &str, owner: &str) {
    let fresh = Key { owner: owner.to_owned(), created_at: Timestamp::now(), revoked: false, agent: None };
    state.keys.insert(key.to_owned(), fresh);
}

/// Sets Cloudflare's status of a tunnel (`healthy`, `degraded`, `down`, `inactive`), or takes it off the list.
pub(crate) fn list(state: &mut State, tunnel: &str, status: Option<&str>) {
    match status {
        Some(status) => drop(state.listed.insert(tunnel.to_owned(), status.to_owned())),
        None => drop(state.listed.remove(tunnel)),
    }
}

/// Assigns the tunnel of this name, making it up on first use, and queues the command to start it.
pub(crate) fn enroll(state: &mut State, agent: &str, name: &str) -> Result<Command, Refusal> {
    let tunnel = state.tunnels.entry(name.to_owned()).or_insert_with(|| {
        let id = Uuid::new_v4().to_string();
        let token = tunnel_token(&Uuid::new_v4().simple().to_string(), &id, &STANDARD.encode(random::<32>()));
        KnownTunnel { id, token }
    });
    let tunnel = tunnel.clone();
    enroll_with(state, agent, name, &tunnel.id, &tunnel.token)
}

/// Assigns the tunnel exactly as given, valid or not, and queues the command to start it.
pub(crate) fn enroll_with(
    state: &mut State,
    agent: &str,
    name: &str,
    id: &str,
    token: &str,
) -> Result<Command, Refusal> {
    let record = state.records.get_mut(agent).ok_or(Refusal::UnknownAgent)?;
    if record.shown.decommission.is_some() {
        return Err(Refusal::Leaving);
    }
    let command = command("start_tunnel", name, id, token);
    record.shown.status = AgentStatus::Enrolled;
    record.shown.tunnel = Some(Tunnel { name: name.to_owned(), id: id.to_owned() });
    record.tunnel_token = Some(token.to_owned());
    record.commands.push(command.to_json());
    tracing::info!(agent, tunnel = name, "agent enrolled");
    Ok(command)
}

/// Queues the command to restart the container of the assigned tunnel.
pub(crate) fn redeploy(state: &mut State, agent: &str) -> Result<Command, Refusal> {
    let record = state.records.get_mut(agent).ok_or(Refusal::UnknownAgent)?;
    let tunnel = record.shown.tunnel.as_ref().ok_or(Refusal::NotEnrolled)?;
    let token = record.tunnel_token.as_deref().ok_or(Refusal::NotEnrolled)?;
    let command = command("restart_tunnel", &tunnel.name, &tunnel.id, token);
    record.commands.push(command.to_json());
    tracing::info!(agent, tunnel = tunnel.name, "tunnel redeploy queued");
    Ok(command)
}

fn command(action: &str, name: &str, id: &str, token: &str) -> Command {
    Command {
        action: action.to_owned(),
        tunnel_name: name.to_owned(),
        tunnel_id: id.to_owned(),
        token: token.to_owned(),
    }
}

/// Gives the agent a new key and revokes the old one at once.
pub(crate) fn roll_key(state: &mut State, agent: &str) -> Result<String, Refusal> {
    let record = state.records.get(agent).ok_or(Refusal::UnknownAgent)?;
    let old = record.key.clone();
    let owner =
        old.as_ref().and_then(|key| state.keys.get(key)).map_or_else(|| agent.to_owned(), |key| key.owner.clone());
    let new = generate_key(state, &owner);
    if let Some(old) = old.and_then(|key| state.keys.get_mut(&key)) {
        old.revoked = true;
    }
    if let Some(key) = state.keys.get_mut(&new) {
        key.agent = Some(agent.to_owned());
    }
    if let Some(record) = state.records.get_mut(agent) {
        record.key = Some(new.clone());
    }
    tracing::info!(agent, "agent key rolled");
    Ok(new)
}

/// Revokes a key and returns the agents that were bound to it. They become pending again and lose their
/// key; the next key used for one is bound to it.
pub(crate) fn revoke_key(state: &mut State, key: &str) -> Result<Vec<String>, Refusal> {
    state.keys.get_mut(key).ok_or(Refusal::UnknownKey)?.revoked = true;
    let mut affected = Vec::new();
    for (id, record) in &mut state.records {
        if record.key.as_deref() == Some(key) {
            record.key = None;
            record.shown.status = AgentStatus::Pending;
            affected.push(id.clone());
        }
    }
    tracing::info!(agents = ?affected, "agent key revoked");
    Ok(affected)
}

pub(crate) fn rename(state: &mut State, agent: &str, name: &str) -> Result<(), Refusal> {
    let record = state.records.get_mut(agent).ok_or(Refusal::UnknownAgent)?;
    name.clone_into(&mut record.shown.display_name);
    record.named = true;
    tracing::info!(agent, name, "agent renamed");
    Ok(())
}

/// Removes an agent as its master would. Version 2 begins to decommission it and returns the operation id.
/// Version 1 forgets it, and its key stays active.
pub(crate) fn remove(state: &mut State, agent: &str) -> Result<Option<String>, Refusal> {
    match state.rules.protocol {
        Protocol::V1 => forget(state, agent).map(|()| None),
        Protocol::V2 => decommission::begin(state, agent).map(Some).ok_or(Refusal::UnknownAgent),
    }
}

/// Forgets an agent without revoking its key. The key stays bound to it: version 1 takes the agent as new,
/// version 2 refuses the key for good.
pub(crate) fn forget(state: &mut State, agent: &str) -> Result<(), Refusal> {
    state.records.remove(agent).ok_or(Refusal::UnknownAgent)?;
    tracing::info!(agent, "agent forgotten");
    Ok(())
}

/// Ends the agent's session, so that a version 2 master asks the agent to register again.
pub(crate) fn end_session(state: &mut State, agent: &str) -> Result<(), Refusal> {
    state.records.get_mut(agent).ok_or(Refusal::UnknownAgent)?.shown.session = None;
    tracing::info!(agent, "session ended");
    Ok(())
}

pub(crate) fn push_commands(state: &mut State, agent: &str, commands: Vec<Value>) -> Result<(), Refusal> {
    state.records.get_mut(agent).ok_or(Refusal::UnknownAgent)?.commands.extend(commands);
    Ok(())
}
