//! What the tasks tell each other, and nothing of how they find it out: one type for each channel.
//!
//! [`Wanted`] goes from the command poller to all others, [`View`] from the supervisor, [`Inventory`] and
//! [`Change`] from the event task, [`Ways`] from the one that looks at the neighbours. The tasks know these types and
//! not each other.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;
use serde_json::{Value, json};

use crate::cause::{Cause, Status};
use crate::docker::Container;
use crate::state::{AgentId, DesiredState, Phase, Token, Tombstone, TunnelId, TunnelState};

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
    /// The ids that this agent has had, the present one last: its containers carry one of them.
    pub owners: Vec<AgentId>,
    /// The master does not assign this tunnel to this host any more, as far as it has said.
    pub unclaimed: bool,
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
            owners: state.owners.clone(),
            unclaimed: state.unclaimed,
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
    /// Why, for the master's page.
    pub cause: Cause,
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

/// What cloudflared says of itself.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Connector {
    /// Its connector id, another one after each start.
    pub id: Option<String>,
    /// Version of the remote configuration; -1 until it has arrived.
    pub config_version: Option<i64>,
    /// How it is connected: `quic` or `http2`.
    pub protocol: Option<&'static str>,
    /// What it has carried since it was started.
    pub traffic: Traffic,
}

/// Requests that a connector has carried since it was started.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Traffic {
    /// All of them.
    pub requests: u64,
    /// Those that its origin did not answer.
    pub errors: u64,
}

/// What is known of the tunnel. Two views between which there is no [`View::is_news`] need no second message.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct View {
    /// Whether the supervisor has looked yet; before that nothing here is known.
    pub looked: bool,
    /// How it is.
    pub status: Status,
    /// When this status began.
    pub since: Option<Timestamp>,
    /// Why, short and stable: one of [`Cause`], `no_tunnel_assigned` or `agent_stopped`; absent while all is well.
    pub reason: Option<&'static str>,
    /// Name, for people, of the tunnel whose connector is there, or else of the one that is wanted.
    pub name: Option<String>,
    /// The same tunnel's id.
    pub tunnel_id: Option<TunnelId>,
    /// The tunnel that is wanted, while the connector is another one's.
    pub wanted: Option<WantedTunnel>,
    /// cloudflared's version, once it is known.
    pub version: Option<String>,
    /// Connections to the edge that are ready; `None` where that cannot be read.
    pub connections: Option<u32>,
    /// What else cloudflared says of itself, where it can be asked.
    pub connector: Connector,
    /// How often the connector was started again, by Docker's restart policy or the agent, since it was made.
    pub restarts: u64,
    /// Whether it carries traffic: also while the status tells of a command that was refused, which touches nothing.
    pub serves: bool,
    /// Whether the container runs, ready or not.
    pub container_running: bool,
    /// Set while the agent is being decommissioned, once it is known what became of the container.
    pub departure: Option<Departure>,
}

/// A tunnel that is wanted and whose connector does not run yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WantedTunnel {
    /// Its id.
    pub id: TunnelId,
    /// Its name, for people.
    pub name: Option<String>,
}

/// What is known of the ways from the tunnel container to the labelled containers.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ways {
    /// Labelled containers, by id, that visitors cannot be led to.
    pub unreachable: BTreeMap<String, Unreachable>,
    /// User-defined networks that the tunnel container should be on besides its own. Empty unless
    /// `AUTO_CONNECT_NETWORKS` is set.
    pub networks: BTreeSet<String>,
    /// Whether all labelled containers have been looked at since the start, so that a network that is not among these
    /// is needed by none.
    pub all_known: bool,
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

impl Connector {
    /// What was carried since `before`. A connector with another id began to count anew.
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
    /// Whether it says anything that `before` did not and that should be told at once. What was counted in the
    /// meantime is told with the next message, or when it is time for one.
    pub fn is_news(&self, before: &Self) -> bool {
        let quiet = |view: &Self| {
            let connector = Connector { traffic: Traffic::default(), ..view.connector.clone() };
            Self { connector, restarts: 0, ..view.clone() }
        };
        quiet(self) != quiet(before)
    }

    /// The fields of a `tunnel_status`; both kinds of master read them at the top level. `carried` is the traffic
    /// since the last one.
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
            // None would overwrite the one that the master knows.
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

    /// The last word of an agent that takes its tunnel down with it.
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
