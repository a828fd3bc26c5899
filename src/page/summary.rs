//! What the agent knows about itself, from what the tasks publish: for `/health`, `/live` and `/ready`.

use std::time::Duration;

use hyper::StatusCode;
use serde_json::{Map, Value, json};

use super::Sources;
use crate::cause::Status;
use crate::channels::{View, Ways};
use crate::pulse::Life;
use crate::retry::Lasts;
use crate::state::Phase;

/// A master counts an agent as online for this long.
const CONTACT_LIMIT: Duration = Duration::from_secs(60);

/// Maximum number of sentences for one kind of concern; `concerns` lists them all.
const MOST_SENTENCES: usize = 5;

/// State of the agent as a whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// All is well.
    Healthy,
    /// The agent works, but something around it does not: a restart would not help.
    Degraded,
    /// The agent itself does not work.
    Unhealthy,
}

impl Sources {
    /// What keeps the agent itself from working: a task that hangs, a folder that cannot be written.
    pub(super) async fn ailments(&self) -> Vec<String> {
        let mut ailments = Vec::new();
        for pulse in &self.tasks {
            match pulse.life() {
                Life::AtWork => {}
                Life::Ended => ailments.push(format!("the task {} has ended", pulse.name)),
                Life::Hangs(time) => ailments.push(format!("the task {} hangs for {}", pulse.name, Lasts(time))),
            }
        }
        // A failed save already shows it: do not test the disk as well.
        let unsaved = self.wanted.borrow().unsaved.clone();
        ailments.extend(match unsaved {
            Some(unsaved) => Some(unsaved),
            None => self.disk.problem().await,
        });
        ailments
    }

    /// `/health`: everything.
    pub(super) async fn health(&self) -> (StatusCode, Value) {
        let ailments = self.ailments().await;
        let session = self.session.borrow().clone();
        let (wanted, view) = (self.wanted.borrow(), self.view.borrow());
        let (inventory, ways) = (self.inventory.borrow(), self.ways.borrow());
        let since_contact = self.master.last_contact().map(|contact| contact.elapsed());
        let last_report = self.master.last_report().and_then(|at| jiff::Timestamp::try_from(at).ok());
        let mut problems = ailments.clone();
        if wanted.decommission == Some(Phase::Finalized) {
            problems.push("this agent was decommissioned and does nothing".to_owned());
        } else if *self.refused.borrow() {
            problems.push("the master refuses this agent".to_owned());
        } else if session.is_none() {
            problems.push("not registered at the master".to_owned());
        } else if let Some(time) = since_contact.filter(|time| *time > CONTACT_LIMIT) {
            problems.push(format!("no contact with the master for {}", Lasts(time)));
        }
        if !inventory.complete {
            problems.push("the containers are not known, Docker does not answer".to_owned());
        }
        if matches!(view.status, Status::Error | Status::Degraded | Status::Restarting) {
            problems.push(format!("the tunnel is {}: {}", view.status.as_str(), view.reason.unwrap_or("-")));
        }
        if wanted.unclaimed && wanted.token.is_some() {
            problems.push("the master no longer assigns this tunnel to this host".to_owned());
        }
        problems.extend(unreachable_sentence(&ways));
        let concerns = self.concerns.all();
        for of_a_kind in concerns.chunk_by(|one, other| one.id == other.id) {
            problems.extend(of_a_kind.iter().take(MOST_SENTENCES).map(|concern| concern.problem.clone()));
            let more = of_a_kind.len().saturating_sub(MOST_SENTENCES);
            problems.extend((more > 0).then(|| format!("{more} more of the kind {}", of_a_kind[0].id)));
        }
        let concerns = concerns.iter().map(|concern| {
            json!({ "id": concern.id, "about": concern.about, "problem": concern.problem, "remedy": concern.remedy })
        });
        let concerns: Vec<_> = concerns.collect();
        let state = match (ailments.is_empty(), problems.is_empty()) {
            (false, _) => State::Unhealthy,
            (true, false) => State::Degraded,
            (true, true) => State::Healthy,
        };
        let unreachable: Vec<_> = ways
            .unreachable
            .values()
            .map(
                |container| json!({ "name": container.name, "problem": container.problem, "remedy": container.remedy }),
            )
            .collect();
        let tasks = self.tasks.iter().map(|pulse| (pulse.name.to_owned(), json!(pulse.life() == Life::AtWork)));
        let summary = json!({
            "status": state.as_str(),
            "problems": problems,
            "agent_id": session.as_ref().map(|session| session.agent_id.as_str()),
            "version": env!("CARGO_PKG_VERSION"),
            "uptime_seconds": self.started.elapsed().as_secs(),
            "registered": self.is_registered(),
            "protocol": session.as_ref().map(|session| session.protocol.version()),
            "decommissioned": wanted.decommission.is_some(),
            "tunnel": {
                "state": view.status.as_str(),
                "desired_state": wanted.state,
                "ready": is_ready(&view),
                "reason": view.reason,
                "name": view.name,
                "id": view.tunnel_id,
                // Set while the connector runs another tunnel.
                "wanted": view.wanted.as_ref().map(|wanted| json!({ "name": wanted.name, "id": wanted.id })),
                "container_running": view.container_running,
                "since": view.since.map(|since| since.to_string()),
                "ready_connections": view.connections,
                "version": view.version,
                "connector_id": view.connector.id,
                "config_version": view.connector.config_version,
                "protocol": view.connector.protocol,
                "requests": view.connector.traffic.requests,
                "errors": view.connector.traffic.errors,
                "restarts": view.restarts,
            },
            "queue": self.metrics.waiting(),
            "inventory_complete": inventory.complete,
            "containers": inventory.complete.then_some(inventory.containers.len()),
            "unreachable_containers": unreachable,
            "other_connectors": ways.rivals,
            "concerns": concerns,
            "master_connection": {
                "url": self.master.url().as_str(),
                "last_successful_report": last_report.map(|at| at.to_string()),
                "seconds_since_contact": since_contact.map(|time| time.as_secs()),
            },
            "threads": tasks.collect::<Map<_, _>>(),
        });
        (if state == State::Unhealthy { StatusCode::SERVICE_UNAVAILABLE } else { StatusCode::OK }, summary)
    }

    /// Whether the master knows the agent, according to its last answer.
    pub(super) fn is_registered(&self) -> bool {
        self.session.borrow().is_some() && !*self.refused.borrow()
    }

    /// `/live`: whether the agent itself works.
    pub(super) async fn live(&self) -> (StatusCode, Value) {
        let ailments = self.ailments().await;
        if ailments.is_empty() {
            return (StatusCode::OK, json!({ "live": true }));
        }
        (StatusCode::SERVICE_UNAVAILABLE, json!({ "live": false, "problems": ailments }))
    }

    /// `/ready`: whether the tunnel can carry traffic.
    pub(super) fn ready(&self) -> (StatusCode, Value) {
        let view = self.view.borrow();
        let code = if is_ready(&view) { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
        let answer = json!({
            "ready": is_ready(&view),
            "state": view.status.as_str(),
            "reason": view.reason,
            "ready_connections": view.connections,
        });
        (code, answer)
    }
}

impl State {
    fn as_str(self) -> &'static str {
        match self {
            Self::Healthy => "healthy",
            Self::Degraded => "degraded",
            Self::Unhealthy => "unhealthy",
        }
    }
}

/// Whether visitors are served.
pub(super) fn is_ready(view: &View) -> bool {
    view.looked && view.serves
}

/// One sentence about all containers that the tunnel cannot reach.
fn unreachable_sentence(ways: &Ways) -> Option<String> {
    const MOST_NAMES: usize = 10;
    let count = ways.unreachable.len();
    let names: Vec<_> = ways.unreachable.values().take(MOST_NAMES).map(|container| container.name.as_str()).collect();
    let more = if count > MOST_NAMES { ", …" } else { "" };
    let containers = if count == 1 { "1 container".to_owned() } else { format!("{count} containers") };
    (count > 0).then(|| format!("{containers} cannot be reached by the tunnel: {}{more}", names.join(", ")))
}

#[cfg(test)]
mod tests {
    use std::future::pending;
    use std::sync::Arc;
    use std::time::Instant;

    use tokio::sync::watch;

    use super::*;
    use crate::channels::{Inventory, Unreachable, Wanted};
    use crate::config::{MasterConfig, Secret};
    use crate::logging::Ring;
    use crate::master::Master;
    use crate::metrics::Metrics;
    use crate::page::Disk;
    use crate::pulse::Pulse;
    use crate::state::Store;

    /// All is well, except for what a test changes.
    fn sources(dir: &std::path::Path) -> Sources {
        let config = MasterConfig {
            url: "http://127.0.0.1:9".parse().unwrap(),
            key: Secret { value: "key".into(), file: None },
            access: None,
        };
        let metrics = Metrics::default();
        let view = View { looked: true, status: Status::Running, serves: true, ..View::default() };
        Sources {
            master: Arc::new(Master::new(config, metrics.clone()).unwrap()),
            session: watch::channel(None).1,
            refused: watch::channel(false).1,
            wanted: watch::channel(Wanted::default()).1,
            view: watch::channel(view).1,
            inventory: watch::channel(Inventory { complete: true, ..Inventory::default() }).1,
            ways: watch::channel(Ways::default()).1,
            metrics,
            concerns: crate::concerns::Concerns::default(),
            log: Ring::default(),
            started: Instant::now(),
            tasks: Vec::new(),
            disk: Disk::new(Store::open(dir).unwrap()),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_task_that_hangs_or_ended_makes_it_unhealthy_and_a_master_that_is_away_does_not() {
        let dir = tempfile::tempdir().unwrap();
        let mut sources = sources(dir.path());
        let (code, health) = sources.health().await;
        assert_eq!((code, &health["status"]), (StatusCode::OK, &json!("degraded")), "{health}");
        assert_eq!(sources.live().await.0, StatusCode::OK);
        let pulse = Pulse::new("events", Duration::from_secs(180));
        let task = tokio::spawn(pulse.clone().watch(pending::<()>()));
        sources.tasks.push(pulse);
        for (seconds, is_alive) in [(120, true), (90, false)] {
            tokio::time::sleep(Duration::from_secs(seconds)).await;
            let (code, health) = sources.health().await;
            let expected =
                if is_alive { (StatusCode::OK, "degraded") } else { (StatusCode::SERVICE_UNAVAILABLE, "unhealthy") };
            assert_eq!((code, health["status"].as_str().unwrap()), expected, "{health}");
            assert_eq!(health["threads"], json!({ "events": is_alive }));
            assert_eq!(sources.live().await.0, expected.0);
        }
        let (_, live) = sources.live().await;
        assert_eq!(live["problems"], json!(["the task events hangs for 3m30s"]));
        task.abort();
        let _ = task.await;
        assert_eq!(sources.live().await.1["problems"], json!(["the task events has ended"]));
        assert!(sources.metrics().contains("dockflare_agent_task_up{task=\"events\"} 0\n"), "{}", sources.metrics());
    }

    #[tokio::test]
    async fn a_tunnel_that_the_master_no_longer_assigns_to_this_host_is_a_problem() {
        let dir = tempfile::tempdir().unwrap();
        let mut sources = sources(dir.path());
        let problem = "the master no longer assigns this tunnel to this host";
        for (unclaimed, has_token) in [(true, true), (true, false), (false, true)] {
            let token = has_token.then(|| crate::state::Token::new("t"));
            sources.wanted = watch::channel(Wanted { unclaimed, token, ..Wanted::default() }).1;
            let (_, health) = sources.health().await;
            let is_said = health["problems"].as_array().unwrap().iter().any(|said| said == problem);
            assert_eq!(is_said, unclaimed && has_token, "{health}");
        }
    }

    #[tokio::test]
    async fn what_cannot_be_stored_makes_it_unhealthy() {
        let dir = tempfile::tempdir().unwrap();
        let mut sources = sources(dir.path());
        let unsaved = Wanted { unsaved: Some("the disk is full".to_owned()), ..Wanted::default() };
        sources.wanted = watch::channel(unsaved).1;
        assert_eq!(sources.live().await.1["problems"], json!(["the disk is full"]));
        sources.wanted = watch::channel(Wanted::default()).1;
        assert_eq!(sources.live().await.0, StatusCode::OK);
    }

    #[tokio::test]
    async fn the_tunnel_is_ready_while_it_serves_and_somebody_has_looked_whatever_its_status_complains_of() {
        let dir = tempfile::tempdir().unwrap();
        let mut sources = sources(dir.path());
        for status in Status::ALL {
            for (looked, serves) in [(true, true), (true, false), (false, true), (false, false)] {
                sources.view = watch::channel(View { looked, status, serves, ..View::default() }).1;
                let is_ready = looked && serves;
                assert_eq!(sources.ready().0 == StatusCode::OK, is_ready, "{status:?} {looked}");
                let metrics = sources.metrics();
                assert!(metrics.contains(&format!("dockflare_agent_tunnel_ready {}\n", u8::from(is_ready))));
                let state =
                    format!("dockflare_agent_tunnel_state{{state=\"{}\"}} {}\n", status.as_str(), u8::from(looked));
                assert!(metrics.contains(&state), "{metrics}");
            }
        }
    }

    #[test]
    fn containers_that_cannot_be_reached_make_one_sentence() {
        let unreachable = |number: usize| Unreachable {
            name: format!("web{number}"),
            problem: "p".to_owned(),
            remedy: "r".to_owned(),
        };
        let sentence = |count: usize| {
            let all = (0..count).map(|number| (format!("{number:03}"), unreachable(number)));
            unreachable_sentence(&Ways { unreachable: all.collect(), ..Ways::default() })
        };
        assert_eq!(sentence(0), None);
        assert_eq!(sentence(1).as_deref(), Some("1 container cannot be reached by the tunnel: web0"));
        assert_eq!(sentence(2).as_deref(), Some("2 containers cannot be reached by the tunnel: web0, web1"));
        assert!(sentence(200).is_some_and(|sentence| sentence.ends_with("web9, …")));
    }
}
