//! Counts events for `GET /metrics`.
//!
//! The tasks count into one [`Metrics`], shared by its clones. The page reads gauges of the current state from the
//! channels on each request. Counts begin at zero with each start of the agent. Apart from the status codes of a
//! master, no label has a value from outside.

use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

/// Upper bounds in seconds. A request takes milliseconds in a local network and times out after 90 s.
const LATENCIES: [f64; 10] = [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 15.0, 60.0];

/// The counters, shared by all clones.
#[derive(Debug, Clone)]
pub struct Metrics {
    requests: Family<Request, Counter>,
    latencies: Family<Route, Histogram, fn() -> Histogram>,
    docker_events: Family<Action, Counter>,
    coalesced: Counter,
    queue: Gauge,
    messages: Family<Message, Counter>,
    commands: Family<Order, Counter>,
    last_command: Gauge,
    restarts: Counter,
    replacements: Family<Replacement, Counter>,
    fresh_connectors: Counter,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Request {
    route: &'static str,
    code: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Route {
    route: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Action {
    action: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Message {
    r#type: &'static str,
    outcome: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Order {
    action: &'static str,
    outcome: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Replacement {
    outcome: &'static str,
}

impl Default for Metrics {
    fn default() -> Self {
        let metrics = Self {
            requests: Family::default(),
            latencies: Family::new_with_constructor(|| Histogram::new(LATENCIES)),
            docker_events: Family::default(),
            coalesced: Counter::default(),
            queue: Gauge::default(),
            messages: Family::default(),
            commands: Family::default(),
            last_command: Gauge::default(),
            restarts: Counter::default(),
            replacements: Family::default(),
            fresh_connectors: Counter::default(),
        };
        // Create each counter at zero. An alert cannot see the first event of a counter that appears only with it.
        for outcome in [CARRIED_OUT, REFUSED, IGNORED, NOT_UNDERSTOOD] {
            for action in ACTIONS {
                metrics.commands.get_or_create_owned(&Order { action, outcome });
            }
        }
        metrics.commands.get_or_create_owned(&Order { action: UNKNOWN, outcome: NOT_UNDERSTOOD });
        for action in ["start", "end", "rename", "network", "other"] {
            metrics.docker_events.get_or_create_owned(&Action { action });
        }
        for r#type in TYPES {
            for outcome in [ACCEPTED, DROPPED] {
                metrics.messages.get_or_create_owned(&Message { r#type, outcome });
            }
        }
        for outcome in [COMPLETED, TAKEN_BACK] {
            metrics.replacements.get_or_create_owned(&Replacement { outcome });
        }
        metrics
    }
}

/// The outcome of a command.
pub(crate) const CARRIED_OUT: &str = "carried_out";
pub(crate) const REFUSED: &str = "refused";
pub(crate) const IGNORED: &str = "ignored";
pub(crate) const NOT_UNDERSTOOD: &str = "not_understood";
/// The label of an unknown action.
const UNKNOWN: &str = "unknown";
const ACTIONS: [&str; 6] = [
    "start_tunnel",
    "restart_tunnel",
    "stop_tunnel",
    "update_tunnel_config",
    "prepare_decommission",
    "finalize_decommission",
];

const TYPES: [&str; 5] = ["container_start", "container_stop", "status_report", "tunnel_status", "heartbeat"];

/// The outcome of a message to the master: accepted, or dropped because it never would be. A retry is neither.
pub(crate) const ACCEPTED: &str = "accepted";
pub(crate) const DROPPED: &str = "dropped";

/// The outcome of a replacement.
const COMPLETED: &str = "completed";
const TAKEN_BACK: &str = "taken_back";

impl Metrics {
    /// Counts a request that the master answered with this status, or not at all.
    pub(crate) fn request(&self, route: &'static str, status: Option<u16>, took: Duration) {
        let code = status.map_or_else(|| "none".to_owned(), |status| status.to_string());
        self.requests.get_or_create_owned(&Request { route, code }).inc();
        self.latencies.get_or_create_owned(&Route { route }).observe(took.as_secs_f64());
    }

    /// Counts a new event from Docker.
    pub(crate) fn docker_event(&self, action: &'static str) {
        self.docker_events.get_or_create_owned(&Action { action }).inc();
    }

    /// Sets the number of pending changes, and counts those that newer ones of their container have replaced.
    pub(crate) fn queue(&self, waiting: usize, coalesced: usize) {
        self.queue.set(i64::try_from(waiting).unwrap_or(i64::MAX));
        self.coalesced.inc_by(coalesced as u64);
    }

    /// Returns the number of changes that wait for the master.
    pub(crate) fn waiting(&self) -> i64 {
        self.queue.get()
    }

    /// Counts a message to the master with its outcome.
    pub(crate) fn message(&self, kind: &str, outcome: &'static str) {
        let Some(r#type) = TYPES.into_iter().find(|known| *known == kind) else { return };
        self.messages.get_or_create_owned(&Message { r#type, outcome }).inc();
    }

    /// Counts a command from the master. An unknown action counts as `unknown`.
    pub(crate) fn command(&self, action: &str, outcome: &'static str) {
        let action = ACTIONS.into_iter().find(|known| *known == action).unwrap_or(UNKNOWN);
        self.commands.get_or_create_owned(&Order { action, outcome }).inc();
        self.last_command.set(jiff::Timestamp::now().as_second());
    }

    /// Counts a restart of a hung connector.
    pub(crate) fn restart(&self) {
        self.restarts.inc();
    }

    /// Counts a replaced connector, or a replacement that was rolled back.
    pub(crate) fn replacement(&self, completed: bool) {
        let outcome = if completed { COMPLETED } else { TAKEN_BACK };
        self.replacements.get_or_create_owned(&Replacement { outcome }).inc();
    }

    /// Counts a fresh connector that was tried beside the one that is down during an outage.
    pub(crate) fn fresh_connector(&self) {
        self.fresh_connectors.inc();
    }

    /// Registers all metrics, under the names in [the documentation](../docs/monitoring.md).
    pub(crate) fn register(&self, registry: &mut Registry) {
        registry.register(
            "master_requests",
            "Requests to the master by route and status code; none where there was no answer",
            self.requests.clone(),
        );
        registry.register(
            "master_request_duration_seconds",
            "Time from a request to the end of its answer, or to its failure",
            self.latencies.clone(),
        );
        registry.register(
            "docker_events",
            "Events that Docker told, by what happened; replays are not counted",
            self.docker_events.clone(),
        );
        registry.register(
            "changes_coalesced",
            "Container changes that gave way to a newer one of the same container before they were sent",
            self.coalesced.clone(),
        );
        registry.register("queue_depth", "Container changes that wait to be sent to the master", self.queue.clone());
        registry.register(
            "messages",
            "Messages to the master by type, and whether it took them or they were dropped",
            self.messages.clone(),
        );
        registry.register("commands", "Commands of the master, and what became of them", self.commands.clone());
        registry.register(
            "last_command_timestamp_seconds",
            "When the last command came, in seconds since 1970; 0 while none has come",
            self.last_command.clone(),
        );
        registry.register("tunnel_restarts", "Restarts of a connector that hung", self.restarts.clone());
        registry.register(
            "tunnel_replacements",
            "Replacements of a connector by a successor: completed, or taken back since it did not become ready",
            self.replacements.clone(),
        );
        registry.register(
            "tunnel_fresh_connectors",
            "Fresh connectors that were tried beside one without a connection",
            self.fresh_connectors.clone(),
        );
    }
}

#[cfg(test)]
impl Metrics {
    /// Returns the lines of the exposition that begin with one of these names, without the prefix, in order.
    pub(crate) fn lines(&self, names: &[&str]) -> Vec<String> {
        let mut registry = Registry::default();
        self.register(&mut registry);
        let mut text = String::new();
        prometheus_client::encoding::prometheus_text::encode(&mut text, &registry).unwrap();
        let mut lines: Vec<_> =
            text.lines().filter(|line| names.iter().any(|name| line.starts_with(name))).map(str::to_owned).collect();
        lines.sort();
        lines
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clones_count_into_the_same() {
        let metrics = Metrics::default();
        let other = metrics.clone();
        metrics.request("events", Some(202), Duration::from_millis(20));
        other.request("events", Some(202), Duration::from_millis(2));
        other.request("events", None, Duration::from_secs(90));
        metrics.queue(3, 2);
        other.queue(1, 1);
        assert_eq!(
            metrics.lines(&["master_requests_total", "queue_depth", "changes_coalesced_total"]),
            [
                "changes_coalesced_total 3",
                "master_requests_total{route=\"events\",code=\"202\"} 2",
                "master_requests_total{route=\"events\",code=\"none\"} 1",
                "queue_depth 1",
            ]
        );
        let buckets = metrics.lines(&["master_request_duration_seconds_bucket"]);
        assert!(buckets.iter().any(|line| line.contains("le=\"0.01\"") && line.ends_with(" 1")), "{buckets:#?}");
        assert!(buckets.iter().any(|line| line.contains("le=\"60\"") && line.ends_with(" 2")), "{buckets:#?}");
    }

    #[test]
    fn what_is_alerted_on_is_there_from_the_start() {
        let metrics = Metrics::default();
        let refused = "commands_total{action=\"start_tunnel\",outcome=\"refused\"}";
        assert_eq!(metrics.lines(&[refused]), [format!("{refused} 0")]);
        assert_eq!(metrics.lines(&["commands_total"]).len(), 25, "of 6 actions 4 outcomes each, and the unknown");
        assert_eq!(metrics.lines(&["tunnel_replacements_total", "tunnel_restarts_total"]).len(), 3);
        metrics.command("start_tunnel", REFUSED);
        metrics.command("self\n_destruct", NOT_UNDERSTOOD);
        assert_eq!(metrics.lines(&[refused]), [format!("{refused} 1")]);
        assert_eq!(metrics.lines(&["commands_total"]).len(), 25, "no label from outside");
        assert!(metrics.lines(&["last_command_timestamp_seconds"])[0].starts_with("last_command_timestamp_seconds 1"));
    }
}
