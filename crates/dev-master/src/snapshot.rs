//! The snapshot: what a master would believe at one moment, without secrets.

use std::collections::BTreeMap;
use std::fmt;

use jiff::Timestamp;
use serde::Serialize;
use serde_json::Value;

use crate::decommission::Decommission;
use crate::state::Protocol;

/// Everything the double knows at one instant, without keys or tokens.
#[derive(Clone, Debug, Serialize)]
pub struct Snapshot {
    /// The protocol the double speaks now.
    pub protocol: Protocol,
    /// The agents it knows, by id.
    pub agents: BTreeMap<String, Agent>,
    /// The decommissions begun, oldest first, including the finished ones.
    pub decommissions: Vec<Decommission>,
    /// The tunnel configurations pushed through `/accounts`, oldest first.
    pub pushed: Vec<PushedConfig>,
    /// How many registrations succeeded, of all agents.
    pub registrations: u64,
    /// How many faults are still set.
    pub faults: usize,
    /// Protocol violations so far.
    pub violations: Vec<String>,
}

/// What the double believes of one agent.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Agent {
    /// Its id.
    pub id: String,
    /// The name shown: the operator's choice, or else the agent's own.
    pub display_name: String,
    /// The version it registered with.
    pub version: Option<String>,
    /// The capabilities it registered with.
    pub capabilities: Vec<String>,
    /// Whether the agent has a tunnel.
    pub status: AgentStatus,
    /// The protocol version agreed at its last registration.
    pub protocol: u8,
    /// The current session, if `protocol` is 2 and nothing ended the session.
    pub session: Option<String>,
    /// The tunnel assigned to it.
    pub tunnel: Option<Tunnel>,
    /// Whether its last accepted request is less than 60 s old.
    pub online: bool,
    /// When the double accepted its last request.
    pub last_seen: Option<Timestamp>,
    /// The containers believed to run, by id.
    pub containers: BTreeMap<String, Container>,
    /// The last tunnel status, as a master reads it.
    pub tunnel_status: Option<TunnelStatus>,
    /// Cloudflare's status of its tunnel, which a version 1 master shows instead of the agent's.
    pub cloudflare_status: Option<String>,
    /// Commands waiting to be fetched.
    pub queued: usize,
    /// How many registrations succeeded.
    pub registrations: u64,
    /// How many times it fetched commands.
    pub polls: u64,
    /// Accepted `container_start` events, by container id.
    pub starts: BTreeMap<String, u64>,
    /// Accepted `container_stop` events, by container id.
    pub stops: BTreeMap<String, u64>,
    /// Reports that the double took as complete.
    pub complete_reports: u64,
    /// Reports that the double took as incomplete.
    pub incomplete_reports: u64,
    /// Accepted `heartbeat` events.
    pub heartbeats: u64,
    /// The containers missing from a complete report, whose rules the master would therefore remove. In order;
    /// a container may appear more than once.
    pub removals: Vec<String>,
    /// The id of the operation that decommissions it.
    pub decommission: Option<String>,
}

/// Whether an agent has a tunnel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum AgentStatus {
    /// Registered, waiting for the operator.
    #[default]
    Pending,
    /// A tunnel was assigned.
    Enrolled,
}

/// A tunnel, without its token.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Tunnel {
    /// Its name.
    pub name: String,
    /// Its id.
    pub id: String,
}

/// A container as an agent reported it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Container {
    /// Its name; `unknown` when the agent gave none.
    pub name: String,
    /// Its labels. A version 2 master keeps only those in DockFlare's namespaces.
    pub labels: BTreeMap<String, String>,
    /// Its status; `unknown` when the agent gave none.
    pub status: String,
}

/// A tunnel status.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TunnelStatus {
    /// `unknown` if the event has no status where a master reads it.
    pub status: String,
    /// The tunnel's name, if given.
    pub name: Option<String>,
    /// The version of cloudflared, if given.
    pub version: Option<String>,
    /// The event as sent.
    pub event: Value,
}

/// A tunnel configuration pushed through the master.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PushedConfig {
    /// The account in the path.
    pub account: String,
    /// The tunnel in the path.
    pub tunnel: String,
    /// The body's `config`.
    pub config: Value,
}

impl Agent {
    /// How many `container_start` events were accepted for `container`.
    pub fn starts_of(&self, container: &str) -> u64 {
        self.starts.get(container).copied().unwrap_or(0)
    }

    /// How many `container_stop` events were accepted for `container`.
    pub fn stops_of(&self, container: &str) -> u64 {
        self.stops.get(container).copied().unwrap_or(0)
    }

    /// The id of a container with this name, if the double believes one runs.
    pub fn container_named(&self, name: &str) -> Option<&str> {
        self.containers.iter().find(|(_, container)| container.name == name).map(|(id, _)| id.as_str())
    }

    /// The status in the last `tunnel_status` event.
    pub fn tunnel_state(&self) -> Option<&str> {
        self.tunnel_status.as_ref().map(|seen| seen.status.as_str())
    }

    /// The status that the Agents page shows for its tunnel.
    pub fn page_state(&self) -> Option<&str> {
        self.cloudflare_status.as_deref().or_else(|| self.tunnel_state())
    }
}

impl Snapshot {
    /// The agent with this id.
    pub fn agent(&self, id: &str) -> Option<&Agent> {
        self.agents.get(id)
    }

    /// The only agent; `None` if there are none or several.
    pub fn only_agent(&self) -> Option<&Agent> {
        if self.agents.len() == 1 { self.agents.values().next() } else { None }
    }
}

/// Formats a table of the agents, then what they run, for people.
impl fmt::Display for Snapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { protocol, registrations, faults, .. } = self;
        writeln!(f, "protocol {protocol}, {registrations} registration(s), {faults} fault(s) set")?;
        writeln!(
            f,
            "{:<36}  {:<20}  {:<5}  {:<8}  {:<7}  {:<20}  {:<14}  CONTAINERS",
            "AGENT", "NAME", "SPEAK", "STATUS", "ONLINE", "TUNNEL", "TUNNEL STATUS"
        )?;
        for (id, agent) in &self.agents {
            let tunnel = agent.tunnel.as_ref().map_or("-", |tunnel| &tunnel.name);
            let state = if agent.decommission.is_some() { "leaving" } else { agent.status.as_str() };
            writeln!(
                f,
                "{id:<36}  {:<20}  {:<5}  {state:<8}  {:<7}  {tunnel:<20}  {:<14}  {}",
                agent.display_name,
                agent.protocol,
                if agent.online { "online" } else { "offline" },
                agent.page_state().unwrap_or("-"),
                agent.containers.len(),
            )?;
        }
        for agent in self.agents.values() {
            write!(f, "{}: {} queued command(s), {} poll(s)", agent.id, agent.queued, agent.polls)?;
            writeln!(
                f,
                ", {} complete and {} incomplete report(s), removals {:?}, starts {:?}, stops {:?}",
                agent.complete_reports, agent.incomplete_reports, agent.removals, agent.starts, agent.stops
            )?;
            if let (Some(cloudflare), Some(own)) = (&agent.cloudflare_status, agent.tunnel_state()) {
                writeln!(
                    f,
                    "  tunnel: {cloudflare} is Cloudflare's word; the agent's is {own}, in /api/v2/agents alone"
                )?;
            }
            for (id, container) in &agent.containers {
                writeln!(f, "  {} ({id}) {} {:?}", container.name, container.status, container.labels)?;
            }
        }
        for operation in &self.decommissions {
            writeln!(f, "decommission {operation}")?;
        }
        for pushed in &self.pushed {
            writeln!(f, "pushed to tunnel {}: {}", pushed.tunnel, pushed.config)?;
        }
        for violation in &self.violations {
            writeln!(f, "violation: {violation}")?;
        }
        Ok(())
    }
}

impl AgentStatus {
    /// The word a master uses.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Enrolled => "enrolled",
        }
    }
}
