//! The state of the double: one value behind one lock, changed by one request at a time.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::decommission::Operation;
use crate::fault::Faults;
use crate::journal::Journal;
use crate::request::{Call, Route};
use crate::snapshot::{Agent, PushedConfig, Snapshot};

/// A master counts an agent online this long after its last request.
pub(crate) const ONLINE_FOR: Duration = Duration::from_secs(60);

/// Which kind of master the double is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// The masters 3.0 to 3.1.2.
    V1,
    /// The masters with sessions, sequences and decommissioning.
    #[default]
    V2,
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V1 => "v1",
            Self::V2 => "v2",
        })
    }
}

impl FromStr for Protocol {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "v1" | "1" => Ok(Self::V1),
            "v2" | "2" => Ok(Self::V2),
            _ => Err("not a protocol: v1 or v2"),
        }
    }
}

/// What a version 2 master takes at most; beyond it answers 413.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of a request body.
    pub body_bytes: usize,
    /// Containers in one report.
    pub containers: usize,
    /// Labels of one container.
    pub labels: usize,
    /// Bytes of a label's key.
    pub label_key_bytes: usize,
    /// Bytes of a label's value.
    pub label_value_bytes: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { body_bytes: 1 << 20, containers: 500, labels: 128, label_key_bytes: 256, label_value_bytes: 4096 }
    }
}

/// How the double behaves; the operator may change it at any time.
#[derive(Debug, Clone)]
pub(crate) struct Rules {
    pub(crate) protocol: Protocol,
    /// The highest version a version 2 double agrees to: 2, or 1 to try an agent's way back.
    pub(crate) at_most: u8,
    pub(crate) limits: Limits,
    /// What stands before the master answers 413 to larger bodies, in either version.
    pub(crate) front_bytes: usize,
    /// The name of the tunnel each new agent gets at once.
    pub(crate) enroll_new: Option<String>,
    /// The account behind `/accounts`; without it those routes are 404.
    pub(crate) account: Option<String>,
}

/// An agent key. Its bearer form is the map key it is stored under.
#[derive(Clone, Debug)]
pub(crate) struct Key {
    pub(crate) owner: String,
    pub(crate) created_at: Timestamp,
    pub(crate) revoked: bool,
    /// The agent it was first used by, which a version 2 master holds it to.
    pub(crate) agent: Option<String>,
}

/// An agent: what is shown of it, and what is not.
#[derive(Default)]
pub(crate) struct Record {
    pub(crate) shown: Agent,
    /// The key it is bound to; none after that one was revoked, until the next one is used.
    pub(crate) key: Option<String>,
    /// Whether the operator named it.
    pub(crate) named: bool,
    pub(crate) tunnel_token: Option<String>,
    pub(crate) commands: Vec<Value>,
    /// The last accepted event and report of this session: number and content.
    pub(crate) last_event: Option<(u64, Value)>,
    pub(crate) last_report: Option<(u64, Value)>,
    seen: Option<Instant>,
}

impl Record {
    /// Notes that the agent is there.
    pub(crate) fn touch(&mut self) {
        self.seen = Some(Instant::now());
        self.shown.last_seen = Some(Timestamp::now());
    }

    /// When the agent will count as offline unless it is heard of again.
    fn offline_at(&self) -> Option<Instant> {
        self.seen.map(|seen| seen + ONLINE_FOR)
    }

    fn view(&self, now: Instant) -> Agent {
        Agent {
            online: self.offline_at().is_some_and(|at| now < at),
            queued: self.commands.len(),
            ..self.shown.clone()
        }
    }
}

/// A tunnel of the imaginary account: a name stands for the same tunnel each time, as at Cloudflare.
#[derive(Clone)]
pub(crate) struct KnownTunnel {
    pub(crate) id: String,
    pub(crate) token: String,
}

/// An events request under way.
struct Flight {
    id: u64,
    agent: String,
    stream: &'static str,
    /// Another of the same stream arrived meanwhile.
    overlapped: bool,
}

/// See the module.
pub(crate) struct State {
    pub(crate) rules: Rules,
    pub(crate) keys: BTreeMap<String, Key>,
    pub(crate) records: BTreeMap<String, Record>,
    /// Decommissions, oldest first.
    pub(crate) operations: Vec<Operation>,
    /// Tunnels by name.
    pub(crate) tunnels: BTreeMap<String, KnownTunnel>,
    /// The list that the master has of the account's tunnels, by id: what Cloudflare itself says of each.
    pub(crate) listed: BTreeMap<String, String>,
    pub(crate) pushed: Vec<PushedConfig>,
    pub(crate) registrations: u64,
    pub(crate) faults: Faults,
    pub(crate) journal: Journal,
    flights: Vec<Flight>,
    next_flight: u64,
}

impl State {
    pub(crate) fn new(rules: Rules) -> Self {
        Self {
            rules,
            keys: BTreeMap::new(),
            records: BTreeMap::new(),
            operations: Vec::new(),
            tunnels: BTreeMap::new(),
            listed: BTreeMap::new(),
            pushed: Vec::new(),
            registrations: 0,
            faults: Faults::default(),
            journal: Journal::default(),
            flights: Vec::new(),
            next_flight: 0,
        }
    }

    /// The request's key, if it is known and not revoked.
    pub(crate) fn active_key(&self, call: &Call) -> Option<String> {
        let key = call.key.as_ref()?;
        self.keys.get(key).is_some_and(|known| !known.revoked).then(|| key.clone())
    }

    /// Whether `key` may act for this agent. A known agent whose key was revoked is bound to the next
    /// key that asks, as a master does it.
    pub(crate) fn may_act(&mut self, agent: &str, key: &str) -> bool {
        let Some(record) = self.records.get_mut(agent) else { return false };
        if record.key.is_none() {
            record.key = Some(key.to_owned());
            if let Some(known) = self.keys.get_mut(key) {
                known.agent = Some(agent.to_owned());
            }
        }
        record.key.as_deref() == Some(key)
    }

    /// Notes violations of one request.
    pub(crate) fn violations(&mut self, route: Route, agent: &str, found: Vec<String>) {
        for what in found {
            self.journal.violation(route, agent, &what);
        }
    }

    /// Notes that an events request begins, and with it that the ones of its stream that are still
    /// under way are overlapped.
    pub(crate) fn take_off(&mut self, agent: &str, event: &str) -> u64 {
        let numbered = self.rules.protocol == Protocol::V2
            && self.records.get(agent).is_some_and(|record| record.shown.protocol == 2);
        let stream = match event {
            "status_report" if numbered => "reports",
            _ => "events",
        };
        for other in &mut self.flights {
            other.overlapped |= other.agent == agent && other.stream == stream;
        }
        self.next_flight += 1;
        self.flights.push(Flight { id: self.next_flight, agent: agent.to_owned(), stream, overlapped: false });
        self.next_flight
    }

    /// Notes that an events request ends. Only one that was answered can have been overlapped: after
    /// a client has hung up, its next request may well be read before the loss of the first is noticed.
    pub(crate) fn land(&mut self, id: u64, answered: bool) {
        let Some(at) = self.flights.iter().position(|flight| flight.id == id) else { return };
        let flight = self.flights.remove(at);
        if flight.overlapped && answered {
            let what =
                format!("another request of the stream of {} was sent before this one was answered", flight.stream);
            self.journal.violation(Route::Events, &flight.agent, &what);
        }
    }

    /// The picture now.
    pub(crate) fn snapshot(&self) -> Snapshot {
        let now = Instant::now();
        Snapshot {
            protocol: self.rules.protocol,
            agents: self.records.iter().map(|(id, record)| (id.clone(), self.view(record, now))).collect(),
            decommissions: self.operations.iter().map(|operation| operation.shown.clone()).collect(),
            pushed: self.pushed.clone(),
            registrations: self.registrations,
            faults: self.faults.len(),
            violations: self.journal.violations(),
        }
    }

    /// The agent as it is shown. Masters of version 1 put Cloudflare's status of its tunnel over the agent's own on
    /// their page, once they have it; what a version 2 master does is not known, and here it does not.
    fn view(&self, record: &Record, now: Instant) -> Agent {
        let mut shown = record.view(now);
        let listed = shown.tunnel.as_ref().and_then(|tunnel| self.listed.get(&tunnel.id));
        shown.cloudflare_status = listed.filter(|_| self.rules.protocol == Protocol::V1).cloned();
        shown
    }

    /// When the next agent will go offline by itself.
    pub(crate) fn next_offline(&self) -> Option<Instant> {
        let now = Instant::now();
        self.records.values().filter_map(Record::offline_at).filter(|&at| at > now).min()
    }

    /// `text` without any key, token or tunnel secret.
    pub(crate) fn redact(&self, mut text: String) -> String {
        for secret in self.secrets() {
            if text.contains(secret) {
                text = text.replace(secret, "(hidden)");
            }
        }
        text
    }

    /// Whether one of the double's secrets appears in `text`.
    pub(crate) fn has_secret(&self, text: &str) -> bool {
        self.secrets().any(|secret| text.contains(secret))
    }

    fn secrets(&self) -> impl Iterator<Item = &str> {
        let tokens = self.records.values().filter_map(|record| record.tunnel_token.as_deref());
        let known = self.tunnels.values().map(|tunnel| tunnel.token.as_str());
        // Shorter ones are somebody's placeholder and would be found in any text.
        self.keys.keys().map(String::as_str).chain(tokens).chain(known).filter(|secret| secret.len() >= 8)
    }
}

/// The state, its lock, and the news of its changes.
pub(crate) struct Shared {
    state: Mutex<State>,
    changes: watch::Sender<u64>,
    pub(crate) settings: Settings,
}

/// What never changes while the double lives.
pub(crate) struct Settings {
    /// Either empty or a path that begins with a slash and does not end with one.
    pub(crate) prefix: String,
    pub(crate) master_key: String,
    /// The service token without which every request is sent to the login page.
    pub(crate) access: Option<(String, String)>,
}

impl Shared {
    pub(crate) fn new(state: State, settings: Settings) -> Self {
        Self { state: Mutex::new(state), changes: watch::Sender::new(0), settings }
    }

    /// Looks at the state. A std mutex, because no wait ever happens under it.
    pub(crate) fn look(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the state and tells those who wait.
    pub(crate) fn change<T>(&self, act: impl FnOnce(&mut State) -> T) -> T {
        let result = act(&mut self.look());
        self.changes.send_modify(|version| *version = version.wrapping_add(1));
        result
    }

    /// News of each change from now on.
    pub(crate) fn subscribe(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state() -> State {
        let limits = Limits::default();
        State::new(Rules {
            protocol: Protocol::V1,
            at_most: 2,
            limits,
            front_bytes: usize::MAX,
            enroll_new: None,
            account: None,
        })
    }

    #[test]
    fn two_answered_requests_that_overlapped_are_a_violation() {
        let mut state = state();
        let first = state.take_off("a", "heartbeat");
        let other = state.take_off("b", "heartbeat");
        let second = state.take_off("a", "status_report");
        for id in [second, other, first] {
            state.land(id, true);
        }
        assert_eq!(state.journal.violations().len(), 1);
        let third = state.take_off("a", "heartbeat");
        state.land(third, true);
        assert_eq!(state.journal.violations().len(), 1);
    }

    #[test]
    fn a_request_whose_client_hung_up_was_not_overlapped_by_the_next() {
        let mut state = state();
        let lost = state.take_off("a", "heartbeat");
        let retry = state.take_off("a", "heartbeat");
        state.land(retry, true);
        state.land(lost, false);
        assert_eq!(state.journal.violations(), Vec::<String>::new());
    }
}
