//! Defines what travels between the tasks: one type per channel.
//!
//! The command poller publishes [`Wanted`], the supervisor [`View`], the event task [`Inventory`] and [`Change`], and
//! the neighbours' task [`Ways`]. The tasks know these types and not each other.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;
use serde_json::{Value, json};

use crate::cause::{Cause, Status};
use crate::docker::Container;
use crate::state::{AgentId, DesiredState, Phase, Token, Tombstone, TunnelId, TunnelState};

/// The tunnel spec, as it is on disk.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Wanted {
    /// The connector's token.
    pub token: Option<Token>,
    /// The tunnel's id.
    pub id: Option<TunnelId>,
    /// The tunnel's name, for people.
    pub name: Option<String>,
    /// Whether the tunnel should run.
    pub state: DesiredState,
    /// How many times a new container was requested.
    pub redeploys: u64,
    /// The ids that this agent has had, the current one last. Its containers carry one of them.
    pub owners: Vec<AgentId>,
    /// The master no longer assigns this tunnel to this host, as far as it has said.
    pub unclaimed: bool,
    /// The last tunnel command, if it was refused.
    pub refusal: Option<Refusal>,
    /// Set from the first phase of a decommission on. Then no tunnel runs and no events are sent.
    pub decommission: Option<Phase>,
    /// What was received and cannot be saved.
    pub unsaved: Option<String>,
}

impl Wanted {
    /// Builds the spec from the files of an earlier run.
    pub fn new(state: &TunnelState, tombstone: Option<&Tombstone>) -> Self {
        Self {
            token: state.token.clone(),
            id: state.id.clone(),
            name: state.name.clone(),
            state: state.desired_state,
            redeploys: state.redeploys,
            owners: state.owners.clone(),
            unclaimed: state.unclaimed,
            decommission: tombstone.map(|tombstone| tombstone.phase),
            ..Self::default()
        }
    }
}

/// A refused command, and why. The text holds nothing secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// The name of the tunnel in the command, if any.
    pub name: Option<String>,
    /// Why, for the master's page.
    pub cause: Cause,
    /// The problem, for people.
    pub problem: String,
}

/// Labelled, running containers by id.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Inventory {
    /// Whether the inventory rests on a successful listing and every event since.
    pub complete: bool,
    /// Rises with what no [`Change`] carries: a new name, or that the inventory is complete again.
    pub revision: u64,
    /// The containers, with only the labels that may leave the host.
    pub containers: BTreeMap<String, Container>,
}

/// A container that entered or left the inventory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// When, by Docker's clock if Docker reported the time.
    pub at: Timestamp,
    /// Whether it runs now.
    pub running: bool,
    /// The container.
    pub container: Container,
}

/// What cloudflared reports about itself.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Connector {
    /// The connector id. It changes with each start.
    pub id: Option<String>,
    /// The version of the remote configuration; -1 until it has arrived.
    pub config_version: Option<i64>,
    /// The protocol to the edge: `quic` or `http2`.
    pub protocol: Option<&'static str>,
    /// The traffic since its start.
    pub traffic: Traffic,
}

/// Requests that a connector has carried since its start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Traffic {
    /// All requests.
    pub requests: u64,
    /// Requests that the origin did not answer.
    pub errors: u64,
}

/// The observed status of the tunnel. A view that is no news ([`View::is_news`]) needs no message.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct View {
    /// Whether the supervisor has looked yet. Before that, nothing here is known.
    pub looked: bool,
    /// The status.
    pub status: Status,
    /// When this status began.
    pub since: Option<Timestamp>,
    /// Why, short and stable: that of a [`Cause`], `no_tunnel_assigned` or `agent_stopped`. Absent while all is well.
    pub reason: Option<&'static str>,
    /// The name, for people, of the tunnel whose connector exists, or else of the tunnel in the spec.
    pub name: Option<String>,
    /// The id of the same tunnel.
    pub tunnel_id: Option<TunnelId>,
    /// The tunnel in the spec, while the connector belongs to another tunnel.
    pub wanted: Option<WantedTunnel>,
    /// cloudflared's version, once known.
    pub version: Option<String>,
    /// The number of ready connections to the edge. `None` if it cannot be read.
    pub connections: Option<u32>,
    /// What else cloudflared reports about itself, if it can be queried.
    pub connector: Connector,
    /// How often Docker's restart policy or the agent has restarted the connector since it was created.
    pub restarts: u64,
    /// Whether the connector carries traffic, even while the status shows a refused command, which changes nothing.
    pub serves: bool,
    /// Whether the container runs, ready or not.
    pub container_running: bool,
    /// Set during a decommission, once the fate of the container is known.
    pub departure: Option<Departure>,
}

/// A tunnel in the spec whose connector does not run yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WantedTunnel {
    /// Its id.
    pub id: TunnelId,
    /// Its name, for people.
    pub name: Option<String>,
}

/// Whether the tunnel container reaches the labelled containers, and what else the neighbours' task found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ways {
    /// Labelled containers, by id, that visitors cannot reach.
    pub unreachable: BTreeMap<String, Unreachable>,
    /// User-defined networks that the tunnel container should be on besides its own. Empty unless
    /// `AUTO_CONNECT_NETWORKS` is set.
    pub networks: BTreeSet<String>,
    /// Whether all labelled containers have been looked at since the start. Then no container needs a network that is
    /// not listed here.
    pub all_known: bool,
    /// Names of containers that run a connector of the same tunnel.
    pub rivals: Vec<String>,
}

/// A labelled container that the tunnel cannot reach.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unreachable {
    /// The container's name.
    pub name: String,
    /// The problem.
    pub problem: String,
    /// The command or label change that fixes it.
    pub remedy: String,
}

/// What the acknowledgement of a decommission says about this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Departure {
    /// `stopped`, `absent` or `failed`.
    pub container: &'static str,
    /// The agent's own container, if it is known for certain.
    pub own: Option<OwnContainer>,
}

impl Default for Departure {
    fn default() -> Self {
        Self { container: "failed", own: None }
    }
}

/// The container that the agent runs in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OwnContainer {
    /// The full id.
    pub id: String,
    /// The reference of its image.
    pub image: String,
}

impl Connector {
    /// Returns the traffic since `before`. A connector with another id has started its counts at zero.
    pub fn carried_since(&self, before: &Self) -> Traffic {
        let (now, then) = (self.traffic, before.traffic);
        let is_same = self.id == before.id && now.requests >= then.requests && now.errors >= then.errors;
        if !is_same {
            return now;
        }
        Traffic { requests: now.requests - then.requests, errors: now.errors - then.errors }
    }
}

impl View {
    /// Whether it differs from `before` in anything that should be sent at once. Traffic counts go out with the next
    /// message, or when one is due.
    pub fn is_news(&self, before: &Self) -> bool {
        let quiet = |view: &Self| {
            let connector = Connector { traffic: Traffic::default(), ..view.connector.clone() };
            Self { connector, restarts: 0, ..view.clone() }
        };
        quiet(self) != quiet(before)
    }

    /// Returns the fields of a `tunnel_status`. Both kinds of master read them at the top level. `carried` is the
    /// traffic since the last status.
    pub fn fields(&self, carried: Traffic) -> Value {
        let mut fields = json!({
            "status": self.status.as_str(),
            "name": self.name,
            "tunnel_id": self.tunnel_id,
            "restarts": self.restarts,
        });
        let since = self.since.map(|since| since.to_string());
        let connector = &self.connector;
        let known = [
            ("since", since.map(Value::from)),
            // Omit an unknown version: null would overwrite the one that the master knows.
            ("version", self.version.clone().map(Value::from)),
            ("reason", self.reason.map(Value::from)),
            ("wanted_tunnel_id", self.wanted.as_ref().map(|wanted| wanted.id.to_string().into())),
            ("wanted_name", self.wanted.as_ref().and_then(|wanted| wanted.name.clone()).map(Value::from)),
            ("ready_connections", self.connections.map(Value::from)),
            ("connector_id", connector.id.clone().map(Value::from)),
            ("config_version", connector.config_version.map(Value::from)),
            ("protocol", connector.protocol.map(Value::from)),
            // Without a connector there is nothing to count.
            ("requests", connector.id.as_ref().map(|_| carried.requests.into())),
            ("errors", connector.id.as_ref().map(|_| carried.errors.into())),
        ];
        for (name, value) in known {
            if let Some(value) = value {
                fields[name] = value;
            }
        }
        fields
    }

    /// Returns the last status of an agent that takes its tunnel down with it.
    pub fn stopped_with_agent(&self) -> Self {
        Self {
            status: Status::Stopped,
            since: Some(Timestamp::now()),
            reason: Some("agent_stopped"),
            connections: None,
            connector: Connector::default(),
            serves: false,
            container_running: false,
            ..self.clone()
        }
    }
}
