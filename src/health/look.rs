//! Looking at the container and at cloudflared in it, and saying what was seen.

use std::time::Duration;

use jiff::Timestamp;
use tokio::time::Instant;
use tracing::info;

use super::plan::{self, Owner};
use super::probe::{self, Readiness};
use super::problem::Problem;
use super::{CALM, Supervisor, own_container};
use crate::channels::{Departure, Status, View, Wanted};
use crate::docker::{Health, Inspected, RunState};
use crate::retry::Lasts;
use crate::state::{DesiredState, Token};

/// While cloudflared is expected to become ready within seconds.
pub(super) const EAGER: Duration = Duration::from_millis(250);
/// While it has not for longer.
const PATIENT: Duration = Duration::from_secs(5);
/// A connector that is not ready after this has a problem.
const START_LIMIT: Duration = Duration::from_secs(30);
/// Lines in which cloudflared has told its version.
const START_LINES: usize = 50;

/// What is known of one start of one container.
#[derive(Debug, Default)]
pub(super) struct Known {
    /// Container and start time: another start is another life.
    life: (String, String),
    began: Option<Instant>,
    pub(super) address: Option<String>,
    pub(super) was_ready: bool,
    /// It can be asked from here: it has answered.
    answers: bool,
    /// How often in a row it did not.
    silences: u32,
    version: Option<String>,
}

impl Supervisor {
    /// Publishes what is known. `acting`: a container is about to be made.
    pub(super) async fn publish(
        &mut self,
        wanted: &Wanted,
        found: Option<&Inspected>,
        problem: Option<&Problem>,
        acting: bool,
    ) -> Duration {
        let found = found.filter(|found| plan::owner(found) != Owner::Foreign);
        let mut view = View {
            looked: true,
            name: wanted.name.clone(),
            tunnel_id: wanted.id.clone(),
            container_running: found.is_some_and(|found| found.state == RunState::Running),
            ..View::default()
        };
        let mut pause = CALM;
        match found {
            Some(found) if found.state == RunState::Running => {
                let readiness = self.ask(found).await;
                pause = self.judge(&mut view, found, readiness);
                if self.known.version.is_none() && view.status == Status::Running {
                    self.known.version = self.version_from_log(found).await;
                }
            }
            Some(found) if found.state == RunState::Restarting => {
                view.status = Status::Restarting;
                view.reason = Some(format!("exit_{}", found.exit_code));
                let said = self.last_words(wanted.token.as_ref()).await;
                let text = format!("ends with exit code {} again and again, its last words: {said}", found.exit_code);
                self.unready
                    .failed(&text, "Docker starts it again, with growing pauses; visitors see errors until it stays");
                pause = PATIENT;
            }
            _ if acting => view.status = Status::Starting,
            _ => {}
        }
        view.version.clone_from(&self.known.version);
        if let Some(problem) = problem {
            // What still runs goes on running: the status tells of the traffic, the reason of what failed.
            if !view.container_running {
                view.status = Status::Error;
            }
            view.reason = Some(problem.reason.clone());
            pause = pause.min(self.not_before.map_or(PATIENT, |at| at.saturating_duration_since(Instant::now())));
        } else if found.is_none() && wanted.state == DesiredState::Unknown {
            view.reason = Some("no_tunnel_assigned".to_owned());
        }
        if let Some(refusal) = &wanted.refusal {
            view.status = Status::Error;
            view.reason = Some(refusal.reason.to_owned());
            view.name = refusal.name.clone().or(view.name);
        }
        if wanted.decommission.is_some() {
            view.departure = self.departure(found, problem).await;
        }
        self.view.send_if_modified(|known| std::mem::replace(known, view.clone()) != view);
        // Never zero: a pass that changes nothing must not follow itself at once.
        pause.max(EAGER)
    }

    /// Asks a running container, and notes when another life of it begins.
    async fn ask(&mut self, found: &Inspected) -> Readiness {
        let life = (found.id.clone(), found.started_at.clone());
        if self.known.life != life {
            let age = found.started_at.parse::<Timestamp>().ok().map(|at| at.duration_until(Timestamp::now()));
            let age = age.and_then(|age| Duration::try_from(age).ok()).unwrap_or_default();
            let now = Instant::now();
            self.known = Known { life, began: Some(now.checked_sub(age).unwrap_or(now)), ..Known::default() };
        }
        let place = found.networks.get(&self.config.network);
        let address = place.map(|place| &place.address).filter(|address| !address.is_empty());
        self.known.address = address.cloned();
        let Some(address) = address else { return Readiness::Silent };
        let readiness = self.probe.readiness(address).await;
        match readiness {
            Readiness::Silent => self.known.silences += 1,
            _ => (self.known.answers, self.known.silences) = (true, 0),
        }
        if self.known.version.is_none() && readiness != Readiness::Silent {
            self.known.version = self.probe.version(address).await;
        }
        readiness
    }

    /// Turns what cloudflared says into a status, and says so when it changes. Returns when to ask again.
    fn judge(&mut self, view: &mut View, found: &Inspected, readiness: Readiness) -> Duration {
        let age = self.known.began.map(|began| began.elapsed()).unwrap_or_default();
        let waiting = if age < START_LIMIT { EAGER } else { PATIENT };
        let (status, pause) = match (readiness, found.health) {
            (Readiness::Ready(connections), _) => {
                view.connections = Some(connections);
                (Status::Running, CALM)
            }
            // Once is a busy machine; twice in a row is one that hangs.
            (Readiness::Silent, _) if self.known.was_ready && self.known.answers && self.known.silences < 2 => {
                (Status::Running, EAGER)
            }
            // It cannot be asked from here, so Docker's own check has the word.
            (Readiness::Silent, Some(Health::Healthy)) if !self.known.answers => (Status::Running, CALM),
            (Readiness::Silent, Some(Health::Unhealthy)) => (Status::Degraded, PATIENT),
            _ if !self.known.was_ready && age < START_LIMIT => (Status::Starting, waiting),
            (Readiness::NotReady, _) => {
                view.connections = Some(0);
                (Status::Degraded, PATIENT)
            }
            (Readiness::Silent, _) => (Status::Degraded, PATIENT),
        };
        view.status = status;
        match status {
            Status::Running => {
                self.unready.ended();
                if !std::mem::replace(&mut self.known.was_ready, true) {
                    let name = view.name.as_deref().unwrap_or("-");
                    let after = Lasts(age);
                    match view.connections {
                        Some(connections) => info!(name, connections, %after, "tunnel ready"),
                        None => info!(name, %after, "tunnel ready"),
                    }
                }
            }
            Status::Degraded => {
                let (reason, text) = match readiness {
                    Readiness::NotReady => ("not_ready", "runs but has no connection to Cloudflare"),
                    _ => ("not_answering", "runs but does not answer when asked whether it is ready"),
                };
                view.reason = Some(reason.to_owned());
                self.unready.failed(&text, "visitors see errors until it has; cloudflared keeps trying, see docker logs of the tunnel container");
            }
            _ => {}
        }
        pause
    }

    /// The version where the metrics page cannot be read: cloudflared writes it when it starts.
    async fn version_from_log(&self, found: &Inspected) -> Option<String> {
        let began = found.started_at.parse::<Timestamp>().ok()?.as_second();
        let lines = self.docker.log_since(&self.config.container_name, began, START_LINES).await.ok()?;
        probe::version_in_log(&lines)
    }

    /// The last line that the container wrote, without the token, should a version of cloudflared print it.
    async fn last_words(&self, token: Option<&Token>) -> String {
        let lines = self.docker.log_tail(&self.config.container_name, 1).await.unwrap_or_default();
        let last = lines.last().map(String::as_str).unwrap_or("(none)");
        // The time at its beginning would make each line another one.
        let last = match last.split_once(' ') {
            Some((time, rest)) if time.parse::<Timestamp>().is_ok() => rest,
            _ => last,
        };
        match token {
            Some(token) => last.replace(token.expose(), "<token>"),
            None => last.to_owned(),
        }
    }

    /// What the acknowledgement of a decommission can say by now.
    async fn departure(&self, found: Option<&Inspected>, problem: Option<&Problem>) -> Option<Departure> {
        let container = match (found, problem) {
            (None, _) => "absent",
            (Some(found), _) if matches!(found.state, RunState::Exited | RunState::Created | RunState::Dead) => {
                "stopped"
            }
            (Some(_), Some(_)) => "failed",
            // Still stopping.
            (Some(_), None) => return None,
        };
        Some(Departure { container, own: own_container(&self.docker, self.hostname.as_deref()).await })
    }
}
