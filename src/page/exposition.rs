//! `/metrics`: the counters of the tasks, and values read from the channels at each request.

use std::sync::atomic::AtomicU64;

use prometheus_client::encoding::prometheus_text;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Registry;

use super::Sources;
use super::summary::is_ready;
use crate::cause::Status;
use crate::pulse::Life;
use crate::state::DesiredState;

type Real = Gauge<f64, AtomicU64>;

impl Sources {
    /// All metrics, in the text format of Prometheus.
    pub(super) fn metrics(&self) -> String {
        let mut registry = Registry::with_prefix("dockflare_agent");
        registry.register("build", "Version of the agent", Info::new([("version", env!("CARGO_PKG_VERSION"))]));
        self.metrics.register(&mut registry);
        self.register_master(&mut registry);
        self.register_tunnel(&mut registry);
        self.register_containers(&mut registry);
        let tasks = Family::<[(&str, &str); 1], Gauge>::default();
        for pulse in &self.tasks {
            tasks.get_or_create_owned(&[("task", pulse.name)]).set(i64::from(pulse.life() == Life::AtWork));
        }
        registry.register("task_up", "Whether each task of the agent does its work", tasks);
        registry.register(
            "uptime_seconds",
            "Time since the start of the agent",
            real(self.started.elapsed().as_secs_f64()),
        );
        let mut text = String::new();
        // Cannot fail: a `String` accepts every write.
        let _ = prometheus_text::encode(&mut text, &registry);
        text
    }

    fn register_master(&self, registry: &mut Registry) {
        let session = self.session.borrow().clone();
        registry.register("registered", "Whether the master knows the agent", number(self.is_registered()));
        let protocol = session.map_or(0, |session| session.protocol.version());
        registry.register("protocol", "Version of the protocol with the master; 0 before the first", number(protocol));
        // Before the first contact, count from the start: alerts then need no special case.
        let since = self.master.last_contact().map_or(self.started.elapsed(), |contact| contact.elapsed());
        registry.register(
            "master_contact_age_seconds",
            "Time since the master last answered, or since the start of the agent",
            real(since.as_secs_f64()),
        );
    }

    fn register_tunnel(&self, registry: &mut Registry) {
        let (wanted, view) = (self.wanted.borrow(), self.view.borrow());
        let is_wanted = wanted.state == DesiredState::Running && wanted.decommission.is_none();
        registry.register("tunnel_wanted", "Whether the tunnel should run", number(is_wanted));
        registry.register("tunnel_ready", "Whether the tunnel can carry traffic", number(is_ready(&view)));
        let states = Family::<[(&str, &str); 1], Gauge>::default();
        for status in Status::ALL {
            let is_it = view.looked && view.status == status;
            states.get_or_create_owned(&[("state", status.as_str())]).set(i64::from(is_it));
        }
        registry.register("tunnel_state", "1 for the state that the tunnel is in", states);
        let reasons = Family::<[(&str, &str); 1], Gauge>::default();
        if let Some(reason) = view.reason {
            reasons.get_or_create_owned(&[("reason", reason)]).set(1);
        }
        registry.register("tunnel_reason", "1 for the reason of that state; none while all is well", reasons);
        registry.register(
            "tunnel_connections",
            "Connections to Cloudflare's edge that are ready; 0 where that is not known",
            number(view.connections.unwrap_or_default()),
        );
        let traffic = view.connector.traffic;
        registry.register("connector_requests", "Requests that this connector has carried", count(traffic.requests));
        registry.register(
            "connector_errors",
            "Requests that this connector has carried and that its origin did not answer",
            count(traffic.errors),
        );
        registry.register(
            "connector_restarts",
            "Restarts of this connector by Docker or the agent; from 0 again after a replacement",
            count(view.restarts),
        );
    }

    fn register_containers(&self, registry: &mut Registry) {
        let (inventory, ways) = (self.inventory.borrow(), self.ways.borrow());
        registry.register(
            "inventory_complete",
            "Whether all labelled containers are known",
            number(inventory.complete),
        );
        registry.register(
            "inventory_containers",
            "Labelled containers that run, as far as they are known",
            number(u32::try_from(inventory.containers.len()).unwrap_or(u32::MAX)),
        );
        registry.register(
            "unreachable_containers",
            "Labelled containers that the tunnel cannot reach",
            number(u32::try_from(ways.unreachable.len()).unwrap_or(u32::MAX)),
        );
        registry.register(
            "other_connectors",
            "Containers beside the agent's that run a connector of the same tunnel",
            number(u32::try_from(ways.rivals.len()).unwrap_or(u32::MAX)),
        );
    }
}

fn number(value: impl Into<i64>) -> Gauge {
    let gauge = Gauge::default();
    gauge.set(value.into());
    gauge
}

fn real(value: f64) -> Real {
    let gauge = Real::default();
    gauge.set(value);
    gauge
}

fn count(value: u64) -> Counter {
    let counter = Counter::default();
    counter.inc_by(value);
    counter
}
