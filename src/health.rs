//! The tunnel supervisor: one container, kept as it is wanted, and what is known of it.
//!
//! Each pass looks (inspection), compares (`plan`), acts, asks cloudflared whether it is ready, and publishes a
//! [`View`]. Nothing is remembered that the next pass could not find out again, so the agent may be killed
//! between any two steps: whatever it left is one of the states the plan starts from. A pass is woken by the
//! desired state, by Docker's events, or by a timer; after a failed attempt further ones wait for a back-off.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::channels::{Status, View, Wanted};
use crate::config::{OnExit, TunnelConfig};
use crate::docker::{Docker, DockerError, Inspected, RunState, Spec};
use crate::retry::{Backoff, Trouble};
use crate::state::DesiredState;

mod act;
mod look;
mod own;
mod plan;
mod probe;
mod problem;
use act::{Came, owner_labels};
use look::{EAGER, Known};
pub(crate) use own::own_container;
use plan::{Goal, Owner};
use probe::{Probe, Readiness};
use problem::{Problem, reason_of};

/// Labels with what the container was made for.
const TUNNEL_LABEL: &str = "com.dockflare.agent.tunnel-id";
const REDEPLOY_LABEL: &str = "com.dockflare.agent.redeploy";

/// Between two passes while all is well; events wake it at once.
const CALM: Duration = Duration::from_secs(15);
/// What a shutdown allows a step that is under way, or a look, to Docker: it kills the agent itself after 10 s.
const LAST_STEP_LIMIT: Duration = Duration::from_secs(3);
/// The supervisor task.
#[derive(Debug)]
pub struct Supervisor {
    docker: Arc<Docker>,
    config: TunnelConfig,
    hostname: Option<String>,
    wanted: watch::Receiver<Wanted>,
    wake: mpsc::Receiver<()>,
    view: watch::Sender<View>,
    probe: Probe,
    known: Known,
    backoff: Backoff,
    /// No attempt before this; the last one failed.
    not_before: Option<Instant>,
    problem: Option<Problem>,
    /// Whether cloudflared is draining, which takes as long as it takes.
    draining: watch::Sender<bool>,
    attempts: Trouble,
    unready: Trouble,
}

impl Supervisor {
    /// `hostname` is the agent's own `HOSTNAME`; `wake` is rung by Docker's events.
    ///
    /// # Errors
    /// When no HTTP client can be set up.
    pub fn new(
        docker: Arc<Docker>,
        config: TunnelConfig,
        hostname: Option<String>,
        wanted: watch::Receiver<Wanted>,
        wake: mpsc::Receiver<()>,
        view: watch::Sender<View>,
    ) -> Result<Self, reqwest::Error> {
        Ok(Self {
            docker,
            config,
            hostname,
            wanted,
            wake,
            view,
            probe: Probe::new()?,
            known: Known::default(),
            backoff: Backoff::new(Duration::from_secs(1), Duration::from_secs(60)),
            not_before: None,
            problem: None,
            draining: watch::channel(false).0,
            attempts: Trouble::new("the tunnel:"),
            unready: Trouble::new("the tunnel"),
        })
    }

    /// Keeps the tunnel as it is wanted until `stop`, then leaves it as the configuration says.
    ///
    /// A step that is under way is finished, within seconds unless it is cloudflared's drain. One that is dropped
    /// has left a state that the next start begins with.
    pub async fn run(mut self, stop: CancellationToken) {
        let mut draining = self.draining.subscribe();
        while !stop.is_cancelled() {
            let overdue = async {
                stop.cancelled().await;
                sleep(LAST_STEP_LIMIT).await;
                // An error means that nobody drains any more.
                let _ = draining.wait_for(|draining| !draining).await;
            };
            let pause = tokio::select! {
                biased;
                pause = self.pass(&stop) => pause,
                () = overdue => break,
            };
            tokio::select! {
                biased;
                () = stop.cancelled() => break,
                Ok(()) = self.wanted.changed() => {
                    // New orders are not to wait for the failures of old ones.
                    self.not_before = None;
                    self.backoff.reset();
                }
                Some(()) = self.wake.recv() => {}
                () = sleep(pause) => {}
            }
        }
        self.leave().await;
    }

    /// Looks, acts where needed, and publishes. Returns how long nothing needs to be looked at.
    async fn pass(&mut self, stop: &CancellationToken) -> Duration {
        let wanted = self.wanted.borrow_and_update().clone();
        let goal = self.goal(&wanted);
        let name = self.config.container_name.clone();
        let mut found = self.docker.inspect(&name).await;
        if let (Ok(container), Ok(goal)) = (&found, &goal) {
            let steps = plan::plan(goal, container.as_ref());
            if steps.is_empty() {
                self.settled(container.as_ref(), goal);
            } else if self.not_before.is_none_or(|at| Instant::now() >= at) {
                // A further attempt after a failed one is no news: the status stays what it is until it succeeds.
                if self.problem.is_none() {
                    self.publish(&wanted, container.as_ref(), None, matches!(goal, Goal::Run { .. })).await;
                    self.announce(goal, container.as_ref());
                }
                let spec = self.spec(&wanted);
                match self.act(&steps, spec.as_ref(), stop).await {
                    Ok(Came::ToTheEnd) => self.settle(),
                    Ok(Came::Interrupted) => {}
                    Err(problem) => self.fail(problem),
                }
                found = self.docker.inspect(&name).await;
            }
        }
        match (found, goal) {
            (Err(error), _) => self.docker_is_silent(&wanted, &error).await,
            (Ok(container), Err(problem)) => {
                self.attempts.failed(&problem.text, problem.next);
                self.publish(&wanted, container.as_ref(), Some(&problem), false).await
            }
            (Ok(container), Ok(_)) => {
                let problem = self.problem.clone();
                self.publish(&wanted, container.as_ref(), problem.as_ref(), false).await
            }
        }
    }

    /// What the container should be. A token that cloudflared would not take is a problem, not a goal.
    fn goal(&self, wanted: &Wanted) -> Result<Goal, Problem> {
        if wanted.decommission.is_some() {
            return Ok(Goal::Stop);
        }
        match (wanted.state, &wanted.token) {
            (DesiredState::Unknown, _) => Ok(Goal::Leave),
            (DesiredState::Stopped, _) => Ok(Goal::Stop),
            (DesiredState::Running, None) => Err(Problem {
                reason: "token_missing".to_owned(),
                text: "should run and there is no token for it".to_owned(),
                next: "enrol the agent again on the master's page",
            }),
            (DesiredState::Running, Some(token)) => match (token.claims(), self.spec(wanted)) {
                (Ok(_), Some(spec)) => Ok(Goal::Run { hash: spec.hash(), network: self.config.network.clone() }),
                (problem, _) => Err(Problem {
                    reason: "token_malformed".to_owned(),
                    text: format!("cannot start: {}", problem.err().unwrap_or("the token cannot be used")),
                    next: "enrol the agent again on the master's page",
                }),
            },
        }
    }

    fn spec(&self, wanted: &Wanted) -> Option<Spec> {
        let mut labels = owner_labels();
        labels.insert(REDEPLOY_LABEL.to_owned(), wanted.redeploys.to_string());
        labels.extend(wanted.id.as_ref().map(|id| (TUNNEL_LABEL.to_owned(), id.to_string())));
        Some(Spec {
            image: self.config.image.to_string(),
            network: self.config.network.clone(),
            token: wanted.token.clone()?,
            options: self.config.options.clone(),
            labels,
        })
    }

    /// Nothing to do: either all is well or the container is not ours.
    fn settled(&mut self, found: Option<&Inspected>, goal: &Goal) {
        match found {
            Some(found) if plan::owner(found) == Owner::Foreign && matches!(goal, Goal::Run { .. }) => {
                let name = &self.config.container_name;
                let problem = Problem {
                    reason: "name_taken".to_owned(),
                    text: format!("a container that is not the agent's has the name {name}, it is not touched"),
                    next: "remove it with docker rm, or set TUNNEL_CONTAINER_NAME to another name",
                };
                self.attempts.failed(&problem.text, problem.next);
                self.problem = Some(problem);
            }
            _ => self.settle(),
        }
    }

    fn settle(&mut self) {
        self.attempts.ended();
        self.problem = None;
        self.not_before = None;
        self.backoff.reset();
    }

    fn fail(&mut self, problem: Problem) {
        self.attempts.failed(&problem.text, problem.next);
        self.not_before = Some(Instant::now() + self.backoff.next(None));
        self.problem = Some(problem);
    }

    /// Docker does not answer. The tunnel may run all the same, which cloudflared itself can tell.
    async fn docker_is_silent(&mut self, wanted: &Wanted, error: &DockerError) -> Duration {
        let mut view = self.view.borrow().clone();
        let readiness = match self.known.address.as_deref() {
            Some(address) if self.known.was_ready => self.probe.readiness(address).await,
            _ => Readiness::Silent,
        };
        if let Readiness::Ready(connections) = readiness {
            view.connections = Some(connections);
        } else {
            // That Docker is away is said once, by the event task.
            if !error.is_away() {
                self.attempts.failed(&format_args!("cannot be looked after: Docker {error}"), error.remedy());
            }
            view = View {
                looked: true,
                status: Status::Error,
                reason: Some(reason_of(error).to_owned()),
                name: wanted.name.clone(),
                tunnel_id: wanted.id.clone(),
                version: view.version,
                ..View::default()
            };
        }
        self.view.send_if_modified(|known| std::mem::replace(known, view.clone()) != view);
        self.backoff.next(None).clamp(EAGER, CALM)
    }

    /// The end of the agent: the container goes or stays as configured.
    async fn leave(&mut self) {
        let wanted = self.wanted.borrow().clone();
        let name = self.config.container_name.clone();
        let looked = timeout(LAST_STEP_LIMIT, self.docker.inspect(&name)).await;
        let found = match looked.unwrap_or_else(|_| Err(DockerError::silent())) {
            Ok(Some(found)) if plan::owner(&found) == Owner::Agent => found,
            Ok(_) => return,
            Err(error) => {
                warn!("the tunnel is left as it is, since Docker {error}; the next start puts it right");
                return;
            }
        };
        // The master wants to find the stopped container between the two phases.
        let prepared = wanted.decommission == Some(crate::state::Phase::Prepared);
        if self.config.on_exit == OnExit::Keep || prepared {
            info!(container = name, "leaving the tunnel container as it is");
            return;
        }
        let removed = async {
            if found.state == RunState::Running {
                self.drain(&name).await?;
            }
            self.docker.remove(&name).await
        };
        match removed.await {
            Ok(()) => info!(container = name, "tunnel stopped and removed"),
            Err(error) => warn!(
                container = name,
                "the tunnel could not be removed, since Docker {error}; the next start puts it right"
            ),
        }
    }
}
