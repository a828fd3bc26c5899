//! The tunnel supervisor: keeps one connector as the master wants it, and reports its state.
//!
//! Each pass looks at the tunnel's container and at its successor, if there is one (`look`), classifies what it saw
//! ([`classify`]), weighs that against earlier looks (`course`), compares the result with the goal (`plan`), acts
//! (`act`), and publishes a [`View`]. Every fault has one name, [`Cause`], and gets the remedy that fits it: usually
//! waiting, a restart only when the connector hangs. The supervisor keeps nothing in memory that the next pass could
//! not find out again. The agent may therefore be killed between any two steps: the plan can start from every state
//! that this leaves. A change of the desired state, a Docker event or a timer starts a pass. After a failed attempt the
//! next one waits for a back-off.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;
use tracing::info;

use crate::cause::{Cause, Status};
use crate::channels::{View, Wanted, Ways};
use crate::config::TunnelConfig;
use crate::docker::{Docker, DockerError, RunState};
use crate::metrics::Metrics;
use crate::retry::{Backoff, Lasts, Trouble};

mod act;
pub mod classify;
mod course;
mod glance;
mod host;
mod leave;
pub mod log;
mod look;
mod outage;
mod own;
mod plan;
mod probe;
mod problem;
mod refresh;
mod scene;
mod stray;
mod trial;
use act::Came;
pub(crate) use glance::{Glance, glance};
use host::{Host, Machine};
use look::{EAGER, Known, Sight};
use outage::Outage;
pub(crate) use own::{is_own, own_container, this_container};
use plan::{Goal, Make, Progress, Slot, Step};
pub(crate) use plan::{Owner, Whose, another_agent, owner};
pub(crate) use probe::Readiness;
use problem::Problem;
use refresh::Refresh;
use stray::Strays;
use trial::Trial;

/// Pause between two passes while all is well. Events start one at once.
const CALM: Duration = Duration::from_secs(15);
/// How long a shutdown waits for Docker to finish a step or a look. Docker kills the agent itself after 10 s.
const LAST_STEP_LIMIT: Duration = Duration::from_secs(3);
/// Pauses between restarts of a connector that keeps hanging, and between replacements that fail.
const FIRST_PAUSE: Duration = Duration::from_secs(60);
const LONGEST_PAUSE: Duration = Duration::from_secs(1800);
/// A connector that was ready for this long without a break has recovered: the next hang counts as a new one.
const WELL_AFTER: Duration = Duration::from_secs(600);
/// Give a container that ended this long to come back: a manual `docker restart` ends it and starts it again.
const COMES_BACK: Duration = Duration::from_secs(2);

/// The supervisor task.
#[derive(Debug)]
pub(crate) struct Supervisor<H = Machine> {
    host: Arc<H>,
    config: TunnelConfig,
    hostname: Option<String>,
    inputs: Inputs,
    view: watch::Sender<View>,
    main: Known,
    next: Known,
    /// Id of the container under the tunnel's name.
    main_id: Option<String>,
    /// Back-off after a failed step, and when the current wait ends.
    backoff: Backoff,
    not_before: Option<Instant>,
    problem: Option<Problem>,
    /// Hash of the spec whose successor could not become ready because of its token. Only another token helps.
    given_up: Option<String>,
    /// This Engine cannot give the container a name for its host (`host-gateway`).
    no_host_gateway: bool,
    /// What Docker refused recently. Tried again for each new spec.
    refused: Refused,
    restarts: Restarts,
    strays: Strays,
    refresh: Refresh,
    /// Back-off after a successor did not become ready beside a connector that serves, and when the current wait ends.
    replacing: Backoff,
    rests_until: Option<Instant>,
    /// Set while the connector serves nobody.
    outage: Option<Outage>,
    /// What trials over HTTP/2 have shown.
    trial: Trial,
    /// Which start of the connector ended (container id and start time), and when the supervisor noticed.
    ended: Option<(String, Instant)>,
    /// Docker did not answer at the previous look.
    was_silent: bool,
    /// Whether cloudflared is draining. A shutdown does not cut a drain short.
    draining: watch::Sender<bool>,
    attempts: Trouble,
    replacements: Trouble,
    sick: Trouble,
    connecting: Trouble,
    leaving: Trouble,
    /// Networks that the agent connected the container to and no workload needs any more, and when to leave each.
    needless: BTreeMap<String, act::Leave>,
    metrics: Metrics,
}

/// What the supervisor reads.
#[derive(Debug)]
pub(crate) struct Inputs {
    /// The desired state.
    pub(crate) wanted: watch::Receiver<Wanted>,
    /// Networks that the container should be on besides its own.
    pub(crate) ways: watch::Receiver<Ways>,
    /// Docker's events ring it.
    pub(crate) wake: mpsc::Receiver<()>,
}

/// The ways of replacing a container that Docker refuses, and the spec it refused them for.
#[derive(Debug, Default)]
struct Refused {
    hash: String,
    second: bool,
    rename: bool,
}

/// Restarts of a connector that hangs.
#[derive(Debug)]
struct Restarts {
    pauses: Backoff,
    not_before: Option<Instant>,
    /// Id of the container, and how often it was restarted.
    done: (String, u64),
}

impl Supervisor {
    /// `hostname` is the agent's own `HOSTNAME`.
    ///
    /// # Errors
    /// When the HTTP client cannot be set up.
    pub(crate) fn new(
        docker: Arc<Docker>,
        config: TunnelConfig,
        hostname: Option<String>,
        inputs: Inputs,
        view: watch::Sender<View>,
        metrics: Metrics,
    ) -> Result<Self, reqwest::Error> {
        Ok(Self::on(Machine::new(docker)?, config, hostname, inputs, view, metrics))
    }
}

impl<H: Host> Supervisor<H> {
    fn on(
        host: H,
        config: TunnelConfig,
        hostname: Option<String>,
        inputs: Inputs,
        view: watch::Sender<View>,
        metrics: Metrics,
    ) -> Self {
        let pauses = || Backoff::new(FIRST_PAUSE, LONGEST_PAUSE);
        Self {
            host: Arc::new(host),
            config,
            hostname,
            inputs,
            view,
            main: Known::default(),
            next: Known::default(),
            main_id: None,
            backoff: Backoff::new(Duration::from_secs(1), Duration::from_secs(60)),
            not_before: None,
            problem: None,
            given_up: None,
            no_host_gateway: false,
            refused: Refused::default(),
            restarts: Restarts { pauses: pauses(), not_before: None, done: (String::new(), 0) },
            strays: Strays::new(),
            refresh: Refresh::new(),
            replacing: pauses(),
            rests_until: None,
            outage: None,
            trial: Trial::new(),
            ended: None,
            was_silent: false,
            draining: watch::channel(false).0,
            attempts: Trouble::new("the tunnel"),
            replacements: Trouble::new("the tunnel"),
            sick: Trouble::new("the tunnel"),
            connecting: Trouble::new("connecting the tunnel to a container's network:"),
            leaving: Trouble::new("disconnecting the tunnel from a network that nobody needs:"),
            needless: BTreeMap::new(),
            metrics,
        }
    }

    /// Keeps the tunnel as the master wants it until `stop`, then keeps or removes its containers as configured.
    ///
    /// On `stop`, a step that is under way gets a few seconds to finish; cloudflared's drain gets all the time it
    /// needs. The next start picks up from whatever a dropped step left.
    pub(crate) async fn run(mut self, stop: CancellationToken) {
        let mut draining = self.draining.subscribe();
        let pulled = self.refresh.done.clone();
        while !stop.is_cancelled() {
            let overdue = async {
                stop.cancelled().await;
                sleep(LAST_STEP_LIMIT).await;
                // An error means that nothing drains any more.
                let _ = draining.wait_for(|draining| !draining).await;
            };
            let pause = tokio::select! {
                biased;
                pause = self.pass(&stop) => pause,
                () = overdue => break,
            };
            let Inputs { wanted, ways, wake } = &mut self.inputs;
            tokio::select! {
                biased;
                () = stop.cancelled() => break,
                Ok(()) = wanted.changed() => {
                    self.begin_anew();
                }
                Ok(()) = ways.changed() => {}
                Some(()) = wake.recv() => {}
                () = pulled.notified() => {}
                () = sleep(pause) => {}
            }
        }
        self.leave().await;
    }

    /// Removes the containers that a crash left of a tunnel that no longer exists. Retries until Docker answers.
    pub(crate) async fn clear(mut self, stop: CancellationToken) {
        while let Err(error) = self.clear_once().await {
            self.attempts.failed(&format_args!("cannot be removed, since Docker {error}"), "trying again");
            tokio::select! {
                () = stop.cancelled() => return,
                () = sleep(self.backoff.next(None).max(EAGER)) => {}
            }
        }
    }

    /// Looks, acts if needed, and publishes. Returns how long to wait before the next look.
    async fn pass(&mut self, stop: &CancellationToken) -> Duration {
        let wanted = self.inputs.wanted.borrow_and_update().clone();
        self.freshen(&wanted).await;
        let goal = self.goal(&wanted);
        let mut sight = match self.look().await {
            Ok(sight) => sight,
            Err(error) => return self.docker_is_silent(&wanted, &error).await,
        };
        let goal = match goal {
            Ok(goal) => goal,
            Err(problem) => {
                self.attempts.failed(&problem, problem.cause.next());
                return self.publish(&wanted, &sight, Some(&problem), false).await;
            }
        };
        if self.see_to_strays(&sight, &goal, stop).await {
            sight = match self.look().await {
                Ok(sight) => sight,
                Err(error) => return self.docker_is_silent(&wanted, &error).await,
            };
        }
        if let Some(lost) = self.lost_network(&sight, &goal).filter(|_| self.problem.is_none() && sight.next.is_none())
        {
            self.publish(&wanted, &sight, Some(&lost), false).await;
            if self.reconnect(&sight, &goal).await {
                sight = match self.look().await {
                    Ok(sight) => sight,
                    Err(error) => return self.docker_is_silent(&wanted, &error).await,
                };
            }
        }
        let mut pause = CALM;
        self.take_note(&sight, &goal);
        let scene = self.scene(&sight, &goal);
        let steps = plan::plan(&goal, &scene);
        let is_round = scene.fresh.is_some_and(|make| steps.contains(&Step::Create(Slot::Next, make)));
        let waits = self.waits_for_image(&steps);
        if steps.is_empty() || waits {
            let is_replacing = waits || scene.next.is_some() || scene.given_up || scene.resting;
            self.settled(&sight, &goal, is_replacing).await;
        } else if self.not_before.is_none_or(|at| Instant::now() >= at) {
            // Another attempt after a failed one is no news: keep the status until one succeeds.
            let is_trial = steps.contains(&Step::Create(Slot::Next, Make::Trial));
            if is_trial && self.asks_why(&goal) {
                self.announce_trial();
            } else if is_round {
                self.announce_fresh();
            } else if self.problem.is_none() {
                let lost = self.lost_network(&sight, &goal);
                self.publish(&wanted, &sight, lost.as_ref(), matches!(goal, Goal::Run { .. })).await;
                self.announce(&goal, &sight, &steps);
            }
            // While the connector is made as it should be, discarding a fresh one beside it is not a failed
            // replacement.
            let is_other =
                sight.main.as_ref().is_some_and(|main| goal.order().is_none_or(|order| order.made(main).is_none()));
            let is_return = self.main.is_ready() && self.is_over_http2(&sight, &goal);
            let is_removed = steps.last() == Some(&Step::Remove(Slot::Next));
            let failed = (is_other || is_return) && is_removed && scene.progress == Progress::Failed;
            let failure = self.next_failure(&sight, &goal).filter(|_| failed);
            let spec = self.spec(&wanted);
            let came = self.act(&steps, &sight, spec.as_ref(), stop).await;
            if is_trial && let Some(order) = goal.order() {
                self.trial.asked(order.hash, Instant::now());
            }
            match came {
                _ if is_round => self.round_made(),
                Ok(Came::ToTheEnd) => match failure {
                    Some(cause) if is_return => self.return_failed(cause),
                    Some(cause) => self.successor_failed(cause, &goal),
                    None if is_takeover(&goal, &steps) => {
                        self.metrics.replacement(true);
                        self.settle();
                    }
                    // The successor has yet to become ready.
                    None if steps.last() == Some(&Step::Start(Slot::Next)) => {}
                    None if steps.last() == Some(&Step::Remove(Slot::Next)) => {}
                    None => self.settle(),
                },
                Ok(Came::Interrupted) => {}
                Ok(Came::Otherwise) => pause = EAGER,
                Err(problem) => self.fail(problem),
            }
            sight = match self.look().await {
                Ok(sight) => sight,
                Err(error) => return self.docker_is_silent(&wanted, &error).await,
            };
        }
        let problem = self.problem.clone();
        self.publish(&wanted, &sight, problem.as_ref(), false).await.min(pause)
    }

    /// Handles a pass without steps: all is well, something takes time, or the container is not ours.
    async fn settled(&mut self, sight: &Sight, goal: &Goal, is_replacing: bool) {
        let Goal::Run { .. } = goal else {
            // Nothing is meant to run, so drop the troubles without reporting a recovery.
            self.attempts.dropped();
            self.sick.dropped();
            return self.settle();
        };
        match &sight.main {
            Some(main) if plan::owner(main, sight.whose()) == Owner::Foreign => {
                let name = &self.config.container_name;
                let problem = Problem::new(
                    Cause::NameTaken,
                    match another_agent(main, sight.whose()) {
                        Some(id) => format!("{name} is the tunnel container of another agent, with the id {id}"),
                        None => name.clone(),
                    },
                );
                self.attempts.failed(&problem, problem.cause.next());
                self.problem = Some(problem);
            }
            // A successor is under way or was given up: what was reported about it still holds.
            Some(_) if is_replacing => {}
            Some(main) => {
                self.settle();
                if self.main.is_well(Instant::now()) {
                    self.restarts.not_before = None;
                    self.restarts.pauses.reset();
                    self.replacing.reset();
                }
                if main.state == RunState::Running {
                    self.join_networks(Slot::Main, &main.id, main.networks.keys().map(String::as_str)).await;
                    self.leave_networks(main).await;
                }
            }
            None => self.settle(),
        }
    }

    /// Returns the problem of a running container that is off its network: the network was removed, or the container
    /// was disconnected from it.
    fn lost_network(&self, sight: &Sight, goal: &Goal) -> Option<Problem> {
        let (Some(main), Some(order)) = (&sight.main, goal.order()) else { return None };
        let is_made = main.state == RunState::Running && order.made(main).is_some();
        let lost = is_made && !main.networks.contains_key(order.network);
        lost.then(|| Problem::new(Cause::NetworkReplaced, order.network))
    }

    fn settle(&mut self) {
        self.attempts.ended();
        // The replacement itself has been reported.
        self.replacements.dropped();
        self.problem = None;
        self.given_up = None;
        self.not_before = None;
        self.backoff.reset();
    }

    fn fail(&mut self, problem: Problem) {
        self.attempts.failed(&problem, problem.cause.next());
        self.not_before = Some(Instant::now() + self.backoff.next(None));
        self.problem = Some(problem);
    }

    /// A fresh connector was made beside one that serves nobody, or could not be made. Schedules the next one.
    fn round_made(&mut self) {
        if let Some(outage) = &mut self.outage {
            outage.made(Instant::now());
            self.metrics.fresh_connector();
        }
    }

    /// The tunnel serves over HTTP/2 and cannot go back to the wanted protocol yet.
    fn return_failed(&mut self, cause: Cause) {
        let pause = self.trial.returns_later(Instant::now());
        info!(reason = cause.reason(), next_try = %Lasts(pause), "the tunnel stays on HTTP/2");
    }

    /// A successor was removed again: the connector before it stays.
    fn successor_failed(&mut self, cause: Cause, goal: &Goal) {
        self.metrics.replacement(false);
        let next = match goal {
            Goal::Run { hash, .. } if matches!(cause, Cause::TokenMalformed | Cause::TokenRefused) => {
                self.given_up = Some(hash.clone());
                "it waits for another token; redeploy or enrol the agent on the master's Agents page"
            }
            _ => {
                self.rests_until = Some(Instant::now() + self.replacing.next_whole());
                "trying again, with growing pauses"
            }
        };
        self.replacements.failed(
            &format_args!(
                "is not replaced: the new connector {}; it was removed and the one before it stays",
                cause.what()
            ),
            next,
        );
        self.problem = Some(Problem::new(cause, ""));
    }

    /// Docker does not answer. The tunnel may still run, so ask cloudflared itself.
    async fn docker_is_silent(&mut self, wanted: &Wanted, error: &DockerError) -> Duration {
        self.was_silent = true;
        let mut view = self.view.borrow().clone();
        let readiness = match self.main.ask_at() {
            Some(address) => self.host.readiness(address).await,
            None => Readiness::Silent,
        };
        if let Readiness::Ready { connections, .. } = readiness {
            view.connections = Some(connections);
        } else {
            let problem = Problem::of(error);
            // The event task reports once that Docker is away.
            if !error.is_away() {
                self.attempts.failed(&problem, problem.cause.next());
            }
            view = View {
                looked: true,
                status: Status::Error,
                reason: Some(problem.cause.reason()),
                name: wanted.name.clone(),
                tunnel_id: wanted.id.clone(),
                version: view.version,
                since: view.since,
                ..View::default()
            };
        }
        self.tell(view);
        self.backoff.next(None).clamp(EAGER, CALM)
    }

    fn name(&self, slot: Slot) -> String {
        match slot {
            Slot::Main => self.config.container_name.clone(),
            Slot::Next => self.config.successor_name(),
        }
    }
}

/// Whether these steps complete a replacement: the successor takes the name, or the container was replaced in place.
fn is_takeover(goal: &Goal, steps: &[Step]) -> bool {
    let in_place = [Step::Stop(Slot::Main), Step::Start(Slot::Main)];
    matches!(goal, Goal::Run { .. })
        && (steps.contains(&Step::Rename) || in_place.iter().all(|step| steps.contains(step)))
}

#[cfg(test)]
mod double;
#[cfg(test)]
mod tests;
