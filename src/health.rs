//! The tunnel supervisor: one container, kept as it is wanted, and what is known of it.
//!
//! Each pass looks (inspection), compares ([`plan`]), acts, asks cloudflared whether it is ready, and publishes a
//! [`View`]. Nothing is remembered that the next pass could not find out again, so the agent may be killed
//! between any two steps: whatever it left is one of the states the plan starts from. A pass is woken by the
//! desired state, by Docker's events, or by a timer; after a failed attempt further ones wait for a back-off.

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep, sleep_until};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::channels::{Departure, OwnContainer, Status, View, Wanted};
use crate::config::{OnExit, TunnelConfig};
use crate::docker::{Docker, DockerError, Health, Inspected, RunState, STOP_GRACE_SECONDS, Spec};
use crate::retry::{Backoff, Lasts, Trouble};
use crate::state::{DesiredState, Token};

mod plan;
mod probe;
use plan::{Action, Goal, Owner};
use probe::{Probe, Readiness};

/// Label that says whose the container and the network are.
const OWNER_LABEL: (&str, &str) = ("com.dockflare.agent.owner", "dockflare-agent");
/// Labels with what the container was made for.
const TUNNEL_LABEL: &str = "com.dockflare.agent.tunnel-id";
const REDEPLOY_LABEL: &str = "com.dockflare.agent.redeploy";

/// Between two passes while all is well; events wake it at once.
const CALM: Duration = Duration::from_secs(15);
/// While cloudflared is expected to become ready within seconds.
const EAGER: Duration = Duration::from_millis(250);
/// While it has not for longer.
const PATIENT: Duration = Duration::from_secs(5);
/// A connector that is not ready after this has a problem.
const START_LIMIT: Duration = Duration::from_secs(30);
/// How long a container may take to appear that was asked for when the shutdown came.
const LATE_LIMIT: Duration = Duration::from_secs(3);
/// Lines in which cloudflared has told its version.
const START_LINES: usize = 50;

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
    /// What Docker was asked for and has not answered. A shutdown may end the pass that waits; Docker goes on.
    asked: Option<Action>,
    attempts: Trouble,
    unready: Trouble,
}

/// What is known of one start of one container.
#[derive(Debug, Default)]
struct Known {
    /// Container and start time: another start is another life.
    life: (String, String),
    began: Option<Instant>,
    address: Option<String>,
    was_ready: bool,
    version: Option<String>,
}

/// Why the tunnel is not as it is wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Problem {
    /// Short and stable, for the master's page.
    reason: String,
    /// For people.
    text: String,
    /// What happens next and what they can do.
    next: &'static str,
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
            asked: None,
            attempts: Trouble::new("the tunnel:"),
            unready: Trouble::new("the tunnel"),
        })
    }

    /// Keeps the tunnel as it is wanted until `stop`, then leaves it as the configuration says.
    ///
    /// Cancel-safe: a pass that is dropped half-way has left a state that the next one starts from.
    pub async fn run(mut self, stop: CancellationToken) {
        loop {
            let pause = tokio::select! {
                biased;
                () = stop.cancelled() => break,
                pause = self.pass() => pause,
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
    async fn pass(&mut self) -> Duration {
        let wanted = self.wanted.borrow_and_update().clone();
        let goal = self.goal(&wanted);
        let name = self.config.container_name.clone();
        let mut found = self.docker.inspect(&name).await;
        if let (Ok(container), Ok(goal)) = (&found, &goal) {
            let steps = plan::plan(goal, container.as_ref());
            if steps.is_empty() {
                self.settled(container.as_ref(), goal);
            } else if self.not_before.is_none_or(|at| Instant::now() >= at) {
                self.publish(&wanted, container.as_ref(), None, matches!(goal, Goal::Run { .. })).await;
                self.announce(goal, container.as_ref());
                let spec = self.spec(&wanted);
                match self.act(&steps, spec.as_ref()).await {
                    Ok(()) => self.settle(),
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
            labels,
        })
    }

    /// Carries out a plan, up to the first failure.
    async fn act(&mut self, steps: &[Action], spec: Option<&Spec>) -> Result<(), Problem> {
        let name = &self.config.container_name;
        for step in steps {
            self.asked = Some(*step);
            let done = match (step, spec) {
                (Action::Prepare, _) => {
                    self.see_to_network().await?;
                    self.see_to_image().await?;
                    Ok(())
                }
                (Action::Stop, _) => {
                    let grace = Duration::from_secs(STOP_GRACE_SECONDS.into());
                    said_while_long("waiting for cloudflared to drain its requests", self.docker.stop(name, grace))
                        .await
                }
                (Action::Remove, _) => self.docker.remove(name).await,
                (Action::Create, Some(spec)) => self.docker.create(name, spec).await,
                (Action::Create, None) => Ok(()),
                (Action::Start, _) => self.docker.start(name).await,
            };
            self.asked = None;
            if let Err(error) = done {
                return Err(self.why_not(*step, &error).await);
            }
        }
        Ok(())
    }

    /// As [`problem_of`]; that an image is missing which nobody may look for is said with what would allow it.
    async fn why_not(&self, step: Action, error: &DockerError) -> Problem {
        let image = &self.config.image;
        if let (Action::Create, DockerError::NotFound { .. }) = (step, error)
            && let Err(refusal @ DockerError::Forbidden { .. }) = self.docker.has_image(image).await
        {
            return Problem {
                reason: "image_unavailable".to_owned(),
                text: format!("the image {image} is not on this host and Docker {refusal}"),
                next: refusal.remedy(),
            };
        }
        problem_of(step, error)
    }

    async fn see_to_network(&self) -> Result<(), Problem> {
        let network = &self.config.network;
        let found = self.docker.has_network(network).await;
        if found.map_err(|error| problem_of(Action::Prepare, &error))? {
            return Ok(());
        }
        match self.docker.create_network(network, &owner_labels()).await {
            Ok(()) => {
                info!(network, "created the tunnel network");
                Ok(())
            }
            Err(error @ DockerError::Forbidden { .. }) => Err(Problem {
                reason: "network_missing".to_owned(),
                text: format!(
                    "the network {network} does not exist and Docker {error}; or run: docker network create {network}"
                ),
                next: "trying again",
            }),
            Err(error) => Err(Problem { reason: "network_missing".to_owned(), ..problem_of(Action::Prepare, &error) }),
        }
    }

    async fn see_to_image(&self) -> Result<(), Problem> {
        let image = &self.config.image;
        match self.docker.has_image(image).await {
            Ok(true) => return Ok(()),
            Ok(false) => {}
            // Not allowed to look: creating the container tells as well.
            Err(DockerError::Forbidden { .. }) => return Ok(()),
            Err(error) => return Err(problem_of(Action::Prepare, &error)),
        }
        info!(image = %image, "pulling the cloudflared image");
        let (began, mut said) = (Instant::now(), 0);
        let pulled = self.docker.pull(image, |come, due| {
            // A quarter at a time; the sum grows while layers are found, so it may also fall back.
            let quarter = (come * 4).checked_div(due).unwrap_or_default().min(4);
            if quarter > said {
                said = quarter;
                info!(percent = quarter * 25, megabytes = come / 1_000_000, "pulling the cloudflared image");
            }
        });
        match pulled.await {
            Ok(()) => {
                info!(after = %Lasts(began.elapsed()), "pulled the cloudflared image");
                Ok(())
            }
            // It may have been loaded by hand in the meantime.
            Err(_) if self.docker.has_image(image).await == Ok(true) => Ok(()),
            Err(error) => Err(Problem {
                reason: "image_unavailable".to_owned(),
                text: format!("the image {image} is not on this host and Docker {error}"),
                next: "trying again; check CLOUDFLARED_IMAGE and the host's way to the registry, or load the image with: docker load",
            }),
        }
    }

    /// Says what is about to happen, and why.
    fn announce(&self, goal: &Goal, found: Option<&Inspected>) {
        let container = &self.config.container_name;
        match (goal, found) {
            (Goal::Run { .. }, None) => info!(container, "starting the tunnel"),
            (Goal::Run { .. }, Some(found)) if plan::owner(found) == Owner::PythonAgent => {
                info!(container, "taking over the tunnel container of the Python agent");
            }
            (Goal::Run { .. }, Some(found)) => {
                let state = format!("{:?}", found.state).to_lowercase();
                info!(container, state, "replacing the tunnel container");
            }
            _ => info!(container, "stopping the tunnel"),
        }
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

    /// Publishes what is known. `acting`: a container is about to be made.
    async fn publish(
        &mut self,
        wanted: &Wanted,
        found: Option<&Inspected>,
        problem: Option<&Problem>,
        acting: bool,
    ) -> Duration {
        let found = found.filter(|found| plan::owner(found) != Owner::Foreign);
        let mut view = View {
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
        let address = found.networks.get(&self.config.network).filter(|address| !address.is_empty());
        self.known.address = address.cloned();
        let Some(address) = address else { return Readiness::Silent };
        let readiness = self.probe.readiness(address).await;
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
            // It cannot be asked from here, so Docker's own check has the word.
            (Readiness::Silent, Some(Health::Healthy)) => (Status::Running, CALM),
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
        match token {
            Some(token) => last.replace(token.expose(), "<token>"),
            None => last.to_owned(),
        }
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

    /// The container, also one that Docker is still making.
    async fn last_look(&self, name: &str) -> Result<Option<Inspected>, DockerError> {
        let deadline = Instant::now() + LATE_LIMIT;
        loop {
            let found = self.docker.inspect(name).await?;
            if found.is_some() || self.asked != Some(Action::Create) || Instant::now() >= deadline {
                return Ok(found);
            }
            sleep(EAGER).await;
        }
    }

    /// Waits for the end of a container that was asked to stop, up to `limit`.
    async fn see_it_end(&self, name: &str, limit: Duration) -> Result<(), DockerError> {
        let deadline = Instant::now() + limit;
        while Instant::now() < deadline {
            match self.docker.inspect(name).await? {
                Some(found) if found.state == RunState::Running => sleep(EAGER).await,
                _ => break,
            }
        }
        Ok(())
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

    /// The end of the agent: the container goes or stays as configured.
    async fn leave(&mut self) {
        let wanted = self.wanted.borrow().clone();
        let name = self.config.container_name.clone();
        let found = match self.last_look(&name).await {
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
        let grace = Duration::from_secs(STOP_GRACE_SECONDS.into());
        let removed = async {
            if found.state == RunState::Running {
                let stopped = async {
                    match self.asked {
                        // A second signal would cut the drain short.
                        Some(Action::Stop) => self.see_it_end(&name, grace).await,
                        _ => self.docker.stop(&name, grace).await,
                    }
                };
                said_while_long("waiting for cloudflared to drain its requests", stopped).await?;
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

/// Finds the agent's own container: `HOSTNAME` is the start of its id, and it is the compose service or carries
/// the name `dockflare-agent`. Anything less certain is nothing.
pub(crate) async fn own_container(docker: &Docker, hostname: Option<&str>) -> Option<OwnContainer> {
    const NAME: &str = "dockflare-agent";
    let hostname = hostname?;
    let is_id = (12..=64).contains(&hostname.len()) && hostname.chars().all(|c| matches!(c, '0'..='9' | 'a'..='f'));
    let found = if is_id { docker.inspect(hostname).await.ok().flatten()? } else { return None };
    let service = found.labels.get("com.docker.compose.service").map(String::as_str);
    let is_own = found.id.starts_with(hostname) && (service == Some(NAME) || found.name == NAME);
    is_own.then_some(OwnContainer { id: found.id, image: found.image })
}

/// Waits for `work`, saying after two seconds what for.
async fn said_while_long<T>(what: &str, work: impl Future<Output = T>) -> T {
    let mut work = std::pin::pin!(work);
    tokio::select! {
        done = &mut work => return done,
        () = sleep_until(Instant::now() + Duration::from_secs(2)) => {}
    }
    info!(at_most = %Lasts(Duration::from_secs(STOP_GRACE_SECONDS.into())), "{what}");
    work.await
}

fn owner_labels() -> BTreeMap<String, String> {
    BTreeMap::from([(OWNER_LABEL.0.to_owned(), OWNER_LABEL.1.to_owned())])
}

fn problem_of(step: Action, error: &DockerError) -> Problem {
    let reason = match (step, error) {
        (Action::Start, DockerError::NotFound { .. }) => "network_missing",
        (Action::Create, DockerError::NotFound { .. }) => "image_unavailable",
        (Action::Create, DockerError::Conflict { .. }) => "name_taken",
        _ => reason_of(error),
    };
    Problem { reason: reason.to_owned(), text: format!("Docker {error}"), next: error.remedy() }
}

fn reason_of(error: &DockerError) -> &'static str {
    match error {
        DockerError::Unreachable { .. } | DockerError::TimedOut { .. } => "docker_unreachable",
        DockerError::Forbidden { .. } => "docker_refuses",
        _ => "docker_failed",
    }
}
