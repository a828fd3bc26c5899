//! Requests to a master and its replies, as types. Unknown fields of replies are ignored.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::state::{AgentId, Phase, Token};

/// Protocols this agent speaks, the preferred one first.
pub(crate) const PROTOCOLS: [u32; 2] = [2, 1];
/// What this agent supports beyond the first protocol.
pub(crate) const CAPABILITIES: [&str; 3] = ["decommission.v1", "tunnel_stop.v1", "self_stop.v1"];

/// Body of `POST /register`.
#[derive(Debug, Serialize)]
pub(crate) struct Register<'a> {
    pub(crate) display_name: &'a str,
    pub(crate) version: &'a str,
    pub(crate) agent_version: &'a str,
    pub(crate) supported_protocol_versions: [u32; 2],
    pub(crate) capabilities: [&'a str; 3],
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) agent_id: Option<&'a AgentId>,
}

/// Reply to `POST /register`, of either protocol.
#[derive(Debug, Deserialize)]
pub(crate) struct Registered {
    pub(crate) agent_id: AgentId,
    #[serde(default)]
    pub(crate) protocol_version: Option<u32>,
    #[serde(default)]
    pub(crate) agent_session_id: Option<String>,
    /// v1 only.
    #[serde(default)]
    pub(crate) agent: Option<AgentRecord>,
}

/// What a v1 master says about the agent at registration.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct AgentRecord {
    pub(crate) assigned_tunnel_id: Option<String>,
    pub(crate) assigned_tunnel_name: Option<String>,
    assigned_tunnel_token: Option<String>,
}

impl AgentRecord {
    /// Whether it names a tunnel, with or without its token.
    pub(crate) fn has_tunnel(&self) -> bool {
        self.assigned_tunnel_id.as_ref().is_some_and(|id| !id.is_empty())
    }

    /// The assigned tunnel, if the reply has both its id and its token.
    pub(crate) fn assignment(self) -> Option<Assignment> {
        let given = |text: Option<String>| text.filter(|text| !text.is_empty());
        Some(Assignment {
            id: given(self.assigned_tunnel_id)?,
            token: Token::new(given(self.assigned_tunnel_token)?),
            name: given(self.assigned_tunnel_name),
        })
    }
}

/// The tunnel that a master assigned to this agent, as received.
#[derive(Debug, Clone, PartialEq)]
pub struct Assignment {
    /// The tunnel's id.
    pub id: String,
    /// The connector's token.
    pub token: Token,
    /// The tunnel's name, for people.
    pub name: Option<String>,
}

/// Reply to `GET /commands`. Commands are parsed one by one, so an invalid one does not affect the others.
#[derive(Debug, Deserialize)]
pub(crate) struct Commands {
    #[serde(default)]
    pub(crate) commands: Vec<Value>,
}

/// Body of a refusal: v2 sends a `code`, v1 a `message`, proxies neither.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Refusal {
    pub(crate) code: Option<String>,
    pub(crate) message: Option<String>,
    pub(crate) error: Option<Value>,
}

/// Protocol of a refusal: v2 sends `code`, v1 `status` and `message`; `None` for neither.
pub(crate) fn protocol_of_refusal(text: &[u8]) -> Option<u32> {
    let said: serde_json::Map<String, Value> = serde_json::from_slice(text).ok()?;
    let is_text = |key: &str| said.get(key).is_some_and(Value::is_string);
    if is_text("code") {
        Some(2)
    } else {
        (said.get("status").and_then(Value::as_str) == Some("error") && is_text("message")).then_some(1)
    }
}

/// Protocol of the reply to an accepted event: v2 sends `code`, v1 `status` without `code`; `None` for neither.
pub(crate) fn protocol_of_success(text: &[u8]) -> Option<u32> {
    let said: serde_json::Map<String, Value> = serde_json::from_slice(text).ok()?;
    if said.get("code").is_some_and(Value::is_string) {
        Some(2)
    } else {
        (said.get("status").and_then(Value::as_str) == Some("success")).then_some(1)
    }
}

/// Body of `POST /decommission/{operation}/ack`.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Ack {
    pub(crate) operation_id: String,
    pub(crate) command_id: String,
    pub(crate) phase: AckPhase,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) agent_session_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) tombstone_persisted: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) tunnel_container: Option<&'static str>,
    pub(crate) self_stop_capability: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) agent_image: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) cloudflared_image: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) error_code: Option<&'static str>,
}

/// Which of the two acknowledgements this is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum AckPhase {
    Prepared,
    ShutdownScheduled,
}

impl From<Phase> for AckPhase {
    fn from(phase: Phase) -> Self {
        match phase {
            Phase::Prepared => Self::Prepared,
            Phase::Finalized => Self::ShutdownScheduled,
        }
    }
}

/// A container as reported to the master. Only the labels meant for the master leave the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Container {
    pub(crate) id: String,
    pub(crate) name: String,
    pub(crate) labels: std::collections::BTreeMap<String, String>,
}

/// Reply to `GET /accounts`.
#[derive(Debug, Deserialize)]
pub(crate) struct Accounts {
    #[serde(default)]
    pub(crate) success: bool,
    #[serde(default)]
    pub(crate) result: Vec<Account>,
}

/// A Cloudflare account.
#[derive(Debug, Deserialize)]
pub(crate) struct Account {
    pub(crate) id: String,
}
