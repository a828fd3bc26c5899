//! The state of the double: one value behind one lock. One request changes it at a time.

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

/// A master counts an agent as online for this long after its last request.
pub(crate) const ONLINE_FOR: Duration = Duration::from_secs(60);

/// Which kind of master the double is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// Masters 3.0 to 3.1.2.
    V1,
    /// Masters with sessions, sequences and decommissioning.
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

/// The limits of a version 2 master. It answers 413 beyond them.
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

/// How the double behaves. The operator may change these rules at any time.
#[derive(Debug, Clone)]
pub(crate) struct Rules {
    pub(crate) protocol: Protocol,
    /// The highest version a version 2 double agrees to: 2, or 1 to test an agent's fallback.
    pub(crate) at_most: u8,
    pub(crate) limits: Limits,
    /// The proxy in front of the master answers 413 to larger bodies, in either version.
    pub(crate) front_bytes: usize,
    /// The name of the tunnel that each new agent gets as soon as it registers.
    pub(crate) enroll_new: Option<String>,
    /// The account behind `/accounts`; without one, those routes answer 404.
    pub(crate) account: Option<String>,
}

/// An agent key. The bearer text is the key of the map that holds it.
#[derive(Clone, Debug)]
pub(crate) struct Key {
    pub(crate) owner: String,
    pub(crate) created_at: Timestamp,
    pub(crate) revoked: bool,
    /// The agent it is bound to. A version 2 master refuses it for any other agent.
    pub(crate) agent: Option<String>,
}

/// An agent: what the snapshot shows, and what it does not.
#[derive(Default)]
pub(crate) struct Record {
    pub(crate) shown: Agent,
    /// The key it is bound to; none from the time that key is revoked until another key is used.
    pub(crate) key: Option<String>,
    /// Whether the operator chose its name.
    pub(crate) named: bool,
    pub(crate) tunnel_token: Option<String>,
    pub(crate) commands: Vec<Value>,
    /// The last accepted event and report of this session, each as its number and content.
    pub(crate) last_event: Option<(u64, Value)>,
    pub(crate) last_report: Option<(u64, Value)>,
    seen: Option<Instant>,
}

impl Record {
    /// Records that the agent was just seen.
    pub(crate) fn touch(&mut self) {
        self.seen = Some(Instant::now());
        self.shown.last_seen = Some(Timestamp::now());
    }

    /// When the agent counts as offline unless it sends another request.
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

/// A tunnel of the imaginary account. The same name always means the same tunnel, as at Cloudflare.
#[derive(Clone)]
pub(crate) struct KnownTunnel {
    pub(crate) id: String,
    pub(crate) token: String,
}

/// An events request in flight.
struct Flight {
    id: u64,
    agent: String,
    stream: &'static str,
    /// Another request of the same stream arrived meanwhile.
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
    /// The master's list of the account's tunnels: Cloudflare's status by tunnel id.
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

    /// Returns the request's key if it is known and not revoked.
    pub(crate) fn active_key(&self, call: &Call) -> Option<String> {
        let key = call.key.as_ref()?;
        self.keys.get(key).is_some_and(|known| !known.revoked).then(|| key.clone())
    }

    /// Whether `key` may act for this agent. As a real master does, binds a known agent whose key was revoked
    /// to the next key that asks.
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

    /// Records the violations of one request.
    pub(crate) fn violations(&mut self, route: Route, agent: &str, found: Vec<String>) {
        for what in found {
            self.journal.violation(route, agent, &what);
        }
    }

    /// Records that an events request begins, and marks the requests of its stream that are still in flight as
    /// overlapped.
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

    /// Records that an events request ends. Only an answered request counts as overlapped: after a client hangs
    /// up, the double may read its next request before it notices the loss of the first.
    pub(crate) fn land(&mut self, id: u64, answered: bool) {
        let Some(at) = self.flights.iter().position(|flight| flight.id == id) else { return };
        let flight = self.flights.remove(at);
        if flight.overlapped && answered {
            let what =
                format!("another request of the stream of {} was sent before this one was answered", flight.stream);
            self.journal.violation(Route::Events, &flight.agent, &what);
        }
    }

    /// Takes a snapshot.
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

    /// The agent as shown. Once a version 1 master has Cloudflare's status of the tunnel, its page shows that instead
    /// of the agent's own. What a version 2 master does is not known; a version 2 double shows the agent's own.
    fn view(&self, record: &Record, now: Instant) -> Agent {
        let mut shown = record.view(now);
        let listed = shown.tunnel.as_ref().and_then(|tunnel| self.listed.get(&tunnel.id));
        shown.cloudflare_status = listed.filter(|_| self.rules.protocol == Protocol::V1).cloned();
        shown
    }

    /// When the next agent goes offline if no agent sends anything.
    pub(crate) fn next_offline(&self) -> Option<Instant> {
        let now = Instant::now();
        self.records.values().filter_map(Record::offline_at).filter(|&at| at > now).min()
    }

    /// Hides every key and tunnel token in `text`.
    pub(crate) fn redact(&self, mut text: String) -> String {
        for secret in self.secrets() {
            if text.contains(secret) {
                text = text.replace(secret, "(hidden)");
            }
        }
        text
    }

    /// Whether `text` contains one of the double's secrets.
    pub(crate) fn has_secret(&self, text: &str) -> bool {
        self.secrets().any(|secret| text.contains(secret))
    }

    fn secrets(&self) -> impl Iterator<Item = &str> {
        let tokens = self.records.values().filter_map(|record| record.tunnel_token.as_deref());
        let known = self.tunnels.values().map(|tunnel| tunnel.token.as_str());
        // Shorter ones are placeholders that would match in any text.
        self.keys.keys().map(String::as_str).chain(tokens).chain(known).filter(|secret| secret.len() >= 8)
    }
}

/// The state, its lock, and the channel that announces changes.
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
    /// The service token. Agent requests without it are redirected to the login page.
    pub(crate) access: Option<(String, String)>,
}

impl Shared {
    pub(crate) fn new(state: State, settings: Settings) -> Self {
        Self { state: Mutex::new(state), changes: watch::Sender::new(0), settings }
    }

    /// Locks the state. A std mutex will do, because nothing awaits while holding it.
    pub(crate) fn look(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the state and wakes the waiters.
    pub(crate) fn change<T>(&self, act: impl FnOnce(&mut State) -> T) -> T {
        let result = act(&mut self.look());
        self.changes.send_modify(|version| *version = version.wrapping_add(1));
        result
    }

    /// Announces each change from now on.
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
