//! The tunnel supervisor: one connector, kept as it is wanted, and what is known of it.
//!
//! Each pass looks at the tunnel's container and at its successor, where there is one (`look`), tells what that means
//! ([`classify`]) and what all looks so far mean (`course`), compares with what is wanted (`plan`), acts (`act`), and
//! publishes a [`View`]. What is wrong has one name each, [`Cause`], and is answered by what helps against it: mostly
//! by waiting, by a restart only where it hangs. Nothing is remembered that the next pass could not find out again, so
//! the agent may be killed between any two steps: whatever it left is one of the states the plan starts from. A pass is
//! woken by the desired state, by Docker's events, or by a timer; after a failed attempt further ones wait for a
//! back-off.

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

/// Between two passes while all is well; events wake it at once.
const CALM: Duration = Duration::from_secs(15);
/// What a shutdown allows a step that is under way, or a look, to Docker: it kills the agent itself after 10 s.
const LAST_STEP_LIMIT: Duration = Duration::from_secs(3);
/// Pauses between restarts of a connector that hangs again, and between replacements that fail.
const FIRST_PAUSE: Duration = Duration::from_secs(60);
const LONGEST_PAUSE: Duration = Duration::from_secs(1800);
/// A connector that was ready for this long without a break is well: the next hang is a new one.
const WELL_AFTER: Duration = Duration::from_secs(600);
/// A container that ended gets this long to come back: `docker restart` by hand ends it and starts it again.
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
    /// Waits after a step that failed, and the end of the present one.
    backoff: Backoff,
    not_before: Option<Instant>,
    problem: Option<Problem>,
    /// Hash of the spec whose successor could not become ready because of its token: another token must come.
    given_up: Option<String>,
    /// This Engine cannot give the container a name for its host.
    no_host_gateway: bool,
    /// What Docker refused lately. Asked again for each replacement.
    refused: Refused,
    restarts: Restarts,
    strays: Strays,
    refresh: Refresh,
    /// Waits after a successor that did not become ready beside one that serves, and the end of the present one.
    replacing: Backoff,
    rests_until: Option<Instant>,
    /// While the connector serves nobody.
    outage: Option<Outage>,
    /// What trials over HTTP/2 have told.
    trial: Trial,
    /// The start of the connector that ended, and when that was seen.
    ended: Option<(String, Instant)>,
    /// Docker did not answer at the last look.
    was_silent: bool,
    /// Whether cloudflared is draining, which takes as long as it takes.
    draining: watch::Sender<bool>,
    attempts: Trouble,
    replacements: Trouble,
    sick: Trouble,
    connecting: Trouble,
    leaving: Trouble,
    /// Networks that the agent has connected the container to and nobody needs any more, since when.
    needless: BTreeMap<String, act::Leave>,
    metrics: Metrics,
}

/// What the supervisor reads.
#[derive(Debug)]
pub(crate) struct Inputs {
    /// What is wanted.
    pub(crate) wanted: watch::Receiver<Wanted>,
    /// Networks that the container should be on besides its own.
    pub(crate) ways: watch::Receiver<Ways>,
    /// Rung by Docker's events.
    pub(crate) wake: mpsc::Receiver<()>,
}

/// The ways of replacing that Docker refuses, and for which spec that was found out.
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
    /// Which container, and how often.
    done: (String, u64),
}

impl Supervisor {
    /// `hostname` is the agent's own `HOSTNAME`.
    ///
    /// # Errors
    /// When no HTTP client can be set up.
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

    /// Keeps the tunnel as it is wanted until `stop`, then leaves it as the configuration says.
    ///
    /// A step that is under way is finished, within seconds unless it is cloudflared's drain. One that is dropped
    /// has left a state that the next start begins with.
    pub(crate) async fn run(mut self, stop: CancellationToken) {
        let mut draining = self.draining.subscribe();
        let pulled = self.refresh.done.clone();
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

    /// Removes what a crash has left of a tunnel that is no more. Tried until Docker answers.
    pub(crate) async fn clear(mut self, stop: CancellationToken) {
        while let Err(error) = self.clear_once().await {
            self.attempts.failed(&format_args!("cannot be removed, since Docker {error}"), "trying again");
            tokio::select! {
                () = stop.cancelled() => return,
                () = sleep(self.backoff.next(None).max(EAGER)) => {}
            }
        }
    }

    /// Looks, acts where needed, and publishes. Returns how long nothing needs to be looked at.
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
            // A further attempt after a failed one is no news: the status stays what it is until it succeeds.
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
            // Beside one that is made as it should be, a fresh one that is thrown away has failed nobody.
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
                    // Whether it becomes ready is still to be seen.
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

    /// Nothing to do: all is well, it takes time, or the container is not ours.
    async fn settled(&mut self, sight: &Sight, goal: &Goal, is_replacing: bool) {
        let Goal::Run { .. } = goal else {
            // Nothing works again where nothing is to run.
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
            // A successor is under way, or was given up: what was said of that stays true.
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

    /// A container that runs and is not on its network, which was removed, or from which it was taken.
    fn lost_network(&self, sight: &Sight, goal: &Goal) -> Option<Problem> {
        let (Some(main), Some(order)) = (&sight.main, goal.order()) else { return None };
        let is_made = main.state == RunState::Running && order.made(main).is_some();
        let lost = is_made && !main.networks.contains_key(order.network);
        lost.then(|| Problem::new(Cause::NetworkReplaced, order.network))
    }

    fn settle(&mut self) {
        self.attempts.ended();
        // That it is replaced was said.
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

    /// A fresh connector was made beside one that serves nobody, or could not be: the next one comes in its time.
    fn round_made(&mut self) {
        if let Some(outage) = &mut self.outage {
            outage.made(Instant::now());
            self.metrics.fresh_connector();
        }
    }

    /// It serves over HTTP/2 and cannot do so yet as it is wanted.
    fn return_failed(&mut self, cause: Cause) {
        let pause = self.trial.returns_later(Instant::now());
        info!(reason = cause.reason(), next_try = %Lasts(pause), "the tunnel stays on HTTP/2");
    }

    /// A successor was taken back: the one before it stays.
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

    /// Docker does not answer. The tunnel may run all the same, which cloudflared itself can tell.
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
            // That Docker is away is said once, by the event task.
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

/// Whether these steps end a replacement: the successor has the name, or it was made in place.
fn is_takeover(goal: &Goal, steps: &[Step]) -> bool {
    let in_place = [Step::Stop(Slot::Main), Step::Start(Slot::Main)];
    matches!(goal, Goal::Run { .. })
        && (steps.contains(&Step::Rename) || in_place.iter().all(|step| steps.contains(step)))
}

#[cfg(test)]
mod double;
#[cfg(test)]
mod tests;
