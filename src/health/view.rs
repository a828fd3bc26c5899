//! What is known of the tunnel, for the master, the health page and the acknowledgement of a decommission.

use serde_json::{Value, json};

use crate::state::TunnelId;

/// How the tunnel is, in the master's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Status {
    /// Runs and carries traffic.
    Running,
    /// Being made, or made and not ready yet.
    Starting,
    /// Runs and carries no traffic.
    Degraded,
    /// Ends again and again; Docker restarts it.
    Restarting,
    /// Not running, as wanted.
    #[default]
    Stopped,
    /// Not running as wanted; the reason says why.
    Error,
}

impl Status {
    /// The word on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Starting => "starting",
            Self::Degraded => "degraded",
            Self::Restarting => "restarting",
            Self::Stopped => "stopped",
            Self::Error => "error",
        }
    }
}

/// What is known of the tunnel. Two views that are equal need no second message.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct View {
    /// How it is.
    pub status: Status,
    /// Why, short and stable; absent while all is well.
    pub reason: Option<String>,
    /// The tunnel's name, for people.
    pub name: Option<String>,
    /// The tunnel's id.
    pub tunnel_id: Option<TunnelId>,
    /// cloudflared's version, once it is known.
    pub version: Option<String>,
    /// Connections to the edge that are ready; `None` where that cannot be read.
    pub connections: Option<u32>,
    /// Whether the container runs, ready or not.
    pub container_running: bool,
    /// Set while the agent is being decommissioned, once it is known what became of the container.
    pub departure: Option<Departure>,
}

/// What the acknowledgement of a decommission says of this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Departure {
    /// `stopped`, `absent` or `failed`.
    pub container: &'static str,
    /// The agent's own container, where it is known without doubt.
    pub own: Option<OwnContainer>,
}

impl Default for Departure {
    fn default() -> Self {
        Self { container: "failed", own: None }
    }
}

/// The container in which the agent itself runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OwnContainer {
    /// Full id.
    pub id: String,
    /// Reference of its image.
    pub image: String,
}

impl View {
    /// The fields of a `tunnel_status`; both kinds of master read them at the top level.
    pub fn fields(&self) -> Value {
        let mut fields = json!({
            "status": self.status.as_str(),
            "name": self.name,
            "version": self.version,
            "tunnel_id": self.tunnel_id,
        });
        if let Some(reason) = &self.reason {
            fields["reason"] = json!(reason);
        }
        if let Some(connections) = self.connections {
            fields["ready_connections"] = json!(connections);
        }
        fields
    }

    /// The last word of an agent that takes its tunnel down with it.
    pub fn stopped_with_agent(&self) -> Self {
        Self {
            status: Status::Stopped,
            reason: Some("agent_stopped".to_owned()),
            connections: None,
            container_running: false,
            ..self.clone()
        }
    }
}
