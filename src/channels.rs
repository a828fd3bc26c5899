//! What the tasks tell each other, and nothing of how they find it out: one type for each channel.
//!
//! [`Wanted`] goes from the command poller to all others, [`View`] from the supervisor, [`Inventory`] and
//! [`Change`] from the event task, [`Ways`] from the one that looks at the neighbours. The tasks know these types and
//! not each other.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;
use serde_json::{Value, json};

use crate::docker::Container;
use crate::state::{DesiredState, Phase, Token, Tombstone, TunnelId, TunnelState};

/// What is wanted of the tunnel, as it is on disk.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Wanted {
    /// The connector's token.
    pub token: Option<Token>,
    /// The tunnel's id.
    pub id: Option<TunnelId>,
    /// The tunnel's name, for people.
    pub name: Option<String>,
    /// Whether it should run.
    pub state: DesiredState,
    /// How many times a new container was asked for.
    pub redeploys: u64,
    /// The last tunnel command, when it was not carried out.
    pub refusal: Option<Refusal>,
    /// Set from the first phase of a decommission on: no tunnel, no events.
    pub decommission: Option<Phase>,
    /// What was received and cannot be stored.
    pub unsaved: Option<String>,
}

impl Wanted {
    /// What the files of an earlier run say.
    pub fn new(state: &TunnelState, tombstone: Option<&Tombstone>) -> Self {
        Self {
            token: state.token.clone(),
            id: state.id.clone(),
            name: state.name.clone(),
            state: state.desired_state,
            redeploys: state.redeploys,
            decommission: tombstone.map(|tombstone| tombstone.phase),
            ..Self::default()
        }
    }
}

/// A command that is not carried out, and why. The text holds nothing secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// The tunnel it was about, as far as it said.
    pub name: Option<String>,
    /// Short and stable, for the master's page: `token_malformed`, `token_mismatch`.
    pub reason: &'static str,
    /// For people.
    pub problem: String,
}

/// Labelled, running containers by id.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Inventory {
    /// Whether the picture rests on a listing that succeeded and on every event since.
    pub complete: bool,
    /// Rises with what no [`Change`] tells: a picture that is complete again, another name.
    pub revision: u64,
    /// The containers, with only the labels that may leave the host.
    pub containers: BTreeMap<String, Container>,
}

/// A container that began or ceased to be in the inventory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// When, by Docker's clock where Docker told it.
    pub at: Timestamp,
    /// Whether it runs now.
    pub running: bool,
    /// Which one.
    pub container: Container,
}

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
    /// Whether the supervisor has looked yet; before that nothing here is known.
    pub looked: bool,
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

/// What is known of the ways from the tunnel container to the labelled containers.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ways {
    /// Labelled containers, by id, that visitors cannot be led to.
    pub unreachable: BTreeMap<String, Unreachable>,
    /// User-defined networks that the tunnel container should be on besides its own. Empty unless
    /// `AUTO_CONNECT_NETWORKS` is set.
    pub networks: BTreeSet<String>,
    /// Names of containers that run a connector of the same tunnel.
    pub rivals: Vec<String>,
}

/// A labelled container that the tunnel cannot reach.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unreachable {
    /// The container's name.
    pub name: String,
    /// What stands in the way.
    pub problem: String,
    /// The command, or the change of a label, that mends it.
    pub remedy: String,
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
