//! Acts on a workload's containers when its files have changed: does nothing, sends a signal, or restarts them. Also
//! starts containers that could not start while their files were missing.
//!
//! ```text
//!  doors/deliver ──[States]──> reload ──look, signal, restart──> the vault's socket proxy ──> Docker
//!        ^                       │
//!        └── settle, put back ───┘
//! ```
//!
//! A set of files that nobody has dealt with yet is unsettled ([`State::is_unsettled`]). Each workload with such a set
//! gets a job of its own (`Job`). The job restarts one container after the other, waits for the health of each, and
//! settles the set. If a container does not come up well, the job has the settled set put back, and restarts the
//! containers that started with the new one. A newer set ends the job for the older one.
//!
//! A killed vault goes on where it was, in both directions: the start times in Docker tell which containers were
//! restarted already. A start within `SLACK` after a switch of the files tells nothing. The vault itself restarts no
//! container in that time, so that it recognizes its own restarts. Somebody else's restart in that time is repeated.
//!
//! Names from the configuration are looked up once for each set; after that only ids count. If Docker does not answer
//! or the proxy refuses, the set stays unsettled and the job tries again.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use dockflare_engine::DockerError;
use dockflare_host::retry::{Backoff, Trouble};
use jiff::{SignedDuration, Timestamp};
use tokio::sync::watch;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{Instant, sleep};
use tracing::{debug, error, info, warn};

use crate::delivery::{Delivery, OnChange, Signal, Workload};
use crate::docker::{Containers, Health, RunState, Seen};
use crate::doors::deliver::{Condition, Desk, State, States};
use crate::pages;

mod gate;
mod memory;
pub use gate::gate;
pub use memory::Memory;

/// How often to look at a restarted container.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// A container without a health check is well after running this long.
const STEADY: Duration = Duration::from_secs(10);
/// A health check follows its own settings. One that reports nothing for this long has failed.
const MOST_WAIT: Duration = Duration::from_secs(600);

/// A container that starts this soon after a switch may have either set of files: Docker notes the start when the
/// program already runs, and file systems have a coarse clock.
const SLACK: Duration = Duration::from_secs(1);

/// Pause after failing to settle a set.
const NOTE_PAUSE: Duration = Duration::from_secs(60);

/// Holds the files: the delivery door, or a double of it.
pub trait Files: Clone + Send + Sync + 'static {
    /// The state of each workload.
    fn states(&self) -> watch::Receiver<States>;
    /// See [`Desk::settle`].
    fn settle(&self, workload: &Workload, version: u64) -> impl Future<Output = Result<u64, String>> + Send;
    /// See [`Desk::put_back`].
    fn put_back(&self, workload: &Workload, version: u64) -> impl Future<Output = Result<u64, String>> + Send;
}

impl Files for Desk {
    fn states(&self) -> watch::Receiver<States> {
        Desk::states(self)
    }

    async fn settle(&self, workload: &Workload, version: u64) -> Result<u64, String> {
        Desk::settle(self, workload, version).await
    }

    async fn put_back(&self, workload: &Workload, version: u64) -> Result<u64, String> {
        Desk::put_back(self, workload, version).await
    }
}

/// What all jobs share.
#[derive(Debug)]
struct Shared<C> {
    docker: Arc<C>,
    /// A std mutex: no await happens under it.
    trouble: Mutex<Trouble>,
    health: Arc<pages::Health>,
}

impl<C> Shared<C> {
    fn failed(&self, error: &DockerError) {
        self.health.docker_failed.store(true, Ordering::Relaxed);
        let remedy = "trying again; the files are delivered all the same; see to docker.host, to the vault's socket proxy and to its RELOAD_CONTAINERS";
        self.trouble.lock().unwrap_or_else(PoisonError::into_inner).failed(error, remedy);
    }

    fn answered(&self) {
        self.health.docker_failed.store(false, Ordering::Relaxed);
        self.trouble.lock().unwrap_or_else(PoisonError::into_inner).ended();
    }
}

/// The containers that a job has restarted, by id, with the version and whether they were well before.
type Restarted = Arc<Mutex<BTreeMap<String, (u64, bool)>>>;

/// Deals with each new set of files until it is dropped.
pub async fn serve<C: Containers + 'static>(
    docker: Arc<C>,
    files: impl Files,
    mut wanted: watch::Receiver<Arc<Vec<Delivery>>>,
    health: Arc<pages::Health>,
) {
    let shared = Arc::new(Shared { docker, trouble: Mutex::new(Trouble::new("Docker")), health });
    let mut states = files.states();
    let mut jobs = JoinSet::new();
    let mut present: BTreeMap<Workload, Present> = BTreeMap::new();
    // Containers restarted since the last settled set.
    let mut restarted: BTreeMap<Workload, Restarted> = BTreeMap::new();
    let mut mended = Vec::<Workload>::new();
    loop {
        let deliveries = wanted.borrow_and_update().clone();
        let now = states.borrow_and_update().clone();
        present.retain(|workload, job| {
            let is_wanted =
                deliveries.contains(&job.delivery) && now.get(workload).is_some_and(|state| job.is_for(state));
            if !is_wanted {
                job.handle.abort();
            }
            is_wanted && !job.handle.is_finished()
        });
        restarted.retain(|workload, _| deliveries.iter().any(|delivery| delivery.workload == *workload));
        for delivery in deliveries.iter().filter(|delivery| delivery.on_change != OnChange::None) {
            let workload = &delivery.workload;
            let Some(state) = now.get(workload) else { continue };
            let Some(version) = state.version else { continue };
            let is_first_look = !mended.contains(workload) && state.condition != Condition::Pending;
            if is_first_look {
                mended.push(workload.clone());
            }
            let recovers = is_first_look && state.is_back();
            if present.contains_key(workload) || !(state.is_unsettled() || recovers) {
                continue;
            }
            let job = Job {
                shared: shared.clone(),
                files: files.clone(),
                delivery: delivery.clone(),
                version,
                since: state.since,
                left: state.left,
                restarted: restarted.entry(workload.clone()).or_default().clone(),
                goes_back: Arc::default(),
            };
            let goes_back = job.goes_back.clone();
            let handle = jobs.spawn(if state.is_unsettled() { Work::Reload } else { Work::Recover }.on(job));
            present.insert(workload.clone(), Present { delivery: delivery.clone(), version, goes_back, handle });
        }
        tokio::select! {
            changed = states.changed() => if changed.is_err() { return },
            changed = wanted.changed() => if changed.is_err() { return },
            Some(_) = jobs.join_next() => {}
        }
    }
}

/// A running job.
struct Present {
    delivery: Delivery,
    version: u64,
    goes_back: Arc<AtomicBool>,
    handle: AbortHandle,
}

impl Present {
    /// Whether the job is still about the set in place: its own set or, on the way back, the previous one.
    fn is_for(&self, state: &State) -> bool {
        let is_before = || self.goes_back.load(Ordering::Relaxed) && state.version < Some(self.version);
        state.version == Some(self.version) || is_before()
    }
}

/// The purpose of a job.
enum Work {
    /// Deal with an unsettled set.
    Reload,
    /// Finish a put-back: the vault may have been killed during it.
    Recover,
}

impl Work {
    async fn on<C: Containers, F: Files>(self, job: Job<C, F>) {
        match self {
            Self::Reload => job.run().await,
            Self::Recover => job.recover().await,
        }
    }
}

/// The job for one set of files of one workload.
struct Job<C, F> {
    shared: Arc<Shared<C>>,
    files: F,
    delivery: Delivery,
    version: u64,
    /// When the set was put in place.
    since: Option<Timestamp>,
    /// When a newer set replaced the settled one.
    left: Option<Timestamp>,
    restarted: Restarted,
    /// Set before the files are put back, because the put-back would otherwise end the job.
    goes_back: Arc<AtomicBool>,
}

/// How a container runs with a set of files.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Verdict {
    Well,
    /// Somebody removed it. A container that takes its place starts with the files in place.
    Gone,
    /// Says why.
    Ill(String),
}

/// The container that a set failed with, and why.
struct Failed {
    id: String,
    name: String,
    why: String,
}

impl<C: Containers, F: Files> Job<C, F> {
    async fn run(&self) {
        let mut pauses = pauses();
        loop {
            let tried = match self.delivery.on_change {
                OnChange::None => return,
                OnChange::Signal(signal) => self.signal(signal).await.map(|()| None),
                OnChange::Restart => self.restart().await,
            };
            match tried {
                Ok(None) => {
                    self.shared.answered();
                    return self.settle().await;
                }
                Ok(Some(failed)) => {
                    self.shared.answered();
                    return self.go_back(failed).await;
                }
                Err(error) => self.shared.failed(&error),
            }
            sleep(pauses.next(None)).await;
        }
    }

    async fn settle(&self) {
        if let Err(problem) = self.files.settle(&self.delivery.workload, self.version).await {
            error!(workload = %self.delivery.workload, version = self.version, "the new files are in use, and this cannot be noted: {problem}; trying again");
            sleep(NOTE_PAUSE).await;
        }
        self.forget();
    }

    fn forget(&self) {
        self.restarted.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// The containers that exist.
    async fn containers(&self) -> Result<Vec<Seen>, DockerError> {
        let mut found = vec![];
        for name in &self.delivery.containers {
            match self.shared.docker.look(name.as_str()).await? {
                Some(seen) => found.push(seen),
                None => debug!(workload = %self.delivery.workload, container = %name, "there is no such container"),
            }
        }
        Ok(found)
    }

    async fn signal(&self, signal: Signal) -> Result<(), DockerError> {
        for seen in self.containers().await?.into_iter().filter(|seen| seen.state == RunState::Running) {
            match self.shared.docker.signal(&seen.id, signal).await {
                Ok(()) => {
                    info!(workload = %self.delivery.workload, version = self.version, container = seen.name, signal = signal.as_str(), "sent a signal, its files have changed");
                }
                // It has ended or was removed: the next start reads the new files.
                Err(DockerError::NotFound { .. } | DockerError::Conflict { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Restarts one container after the other, those in trouble first: while one is down, no other is taken down.
    async fn restart(&self) -> Result<Option<Failed>, DockerError> {
        self.slack().await;
        let mut containers = self.containers().await?;
        containers.sort_by_key(|seen| trouble(seen).is_none());
        for seen in containers {
            if let Some(failed) = self.restart_one(&seen).await? {
                return Ok(Some(failed));
            }
        }
        Ok(None)
    }

    async fn restart_one(&self, seen: &Seen) -> Result<Option<Failed>, DockerError> {
        let workload = &self.delivery.workload;
        let ill = |why: String| Some(Failed { id: seen.id.clone(), name: seen.name.clone(), why });
        let mut counts = self.was_well(&seen.id);
        if !self.is_fresh(seen) {
            if !matches!(seen.state, RunState::Running | RunState::Restarting) {
                debug!(%workload, container = seen.name, "does not run: it reads the new files when it is started");
                return Ok(None);
            }
            // A container that was not well with the old files proves nothing about the new ones.
            counts = counts.or(Some(trouble(seen).is_none()));
            self.note(&seen.id, counts.unwrap_or(true));
            info!(%workload, version = self.version, container = seen.name, "restarting, its files have changed");
            match self.shared.docker.restart(&seen.id).await {
                Ok(()) => {}
                Err(DockerError::NotFound { .. }) => return Ok(None),
                Err(error @ (DockerError::Conflict { .. } | DockerError::Failed { .. })) => {
                    return Ok(ill(format!("Docker {error}")));
                }
                Err(error) => {
                    // It may not have been restarted.
                    self.unnote(&seen.id);
                    return Err(error);
                }
            }
        }
        match self.verdict(&seen.id).await? {
            Verdict::Well | Verdict::Gone => Ok(None),
            Verdict::Ill(why) if counts == Some(false) => {
                warn!(%workload, version = self.version, container = seen.name, "is not well with the new files, as it was not with those before: {why}");
                Ok(None)
            }
            Verdict::Ill(why) => Ok(ill(why)),
        }
    }

    /// Whether the container started with these files.
    fn is_fresh(&self, seen: &Seen) -> bool {
        let noted = self.restarted.lock().unwrap_or_else(PoisonError::into_inner).get(&seen.id).copied();
        noted.is_some_and(|(version, _)| version == self.version)
            || seen.started.zip(self.since).is_some_and(|(began, since)| began.duration_since(since) >= slack())
    }

    /// Whether the container may have started with a set newer than the settled one.
    fn began_with_newer(&self, seen: &Seen) -> bool {
        seen.started.zip(self.left).is_some_and(|(began, left)| began >= left)
    }

    /// Waits until a start time tells which files a container has.
    async fn slack(&self) {
        let since = self.since.map_or(SLACK, |since| {
            // A change of the clock does not make the wait longer.
            (slack() - Timestamp::now().duration_since(since)).try_into().unwrap_or_default()
        });
        sleep(since.min(SLACK)).await;
    }

    /// Whether the container was well before its first restart since the last settled set; `None` if there was none.
    fn was_well(&self, id: &str) -> Option<bool> {
        self.restarted.lock().unwrap_or_else(PoisonError::into_inner).get(id).map(|(_, was_well)| *was_well)
    }

    fn note(&self, id: &str, was_well: bool) {
        let mut restarted = self.restarted.lock().unwrap_or_else(PoisonError::into_inner);
        restarted.insert(id.to_owned(), (self.version, was_well));
    }

    fn unnote(&self, id: &str) {
        if let Some((version, _)) = self.restarted.lock().unwrap_or_else(PoisonError::into_inner).get_mut(id) {
            *version = 0;
        }
    }

    /// Waits until it is clear whether a restarted container is well.
    async fn verdict(&self, id: &str) -> Result<Verdict, DockerError> {
        let began = Instant::now();
        let mut running_since = None;
        loop {
            let Some(seen) = self.shared.docker.look(id).await? else { return Ok(Verdict::Gone) };
            if let Some(why) = trouble(&seen) {
                return Ok(Verdict::Ill(why.to_owned()));
            }
            match (seen.state, seen.health) {
                (RunState::Running, Some(Health::Healthy)) => return Ok(Verdict::Well),
                (RunState::Running, None) => {
                    let since = *running_since.get_or_insert_with(Instant::now);
                    if since.elapsed() >= STEADY {
                        return Ok(Verdict::Well);
                    }
                }
                _ => running_since = None,
            }
            if began.elapsed() >= MOST_WAIT {
                return Ok(Verdict::Ill(format!("its health check has said nothing for {} s", MOST_WAIT.as_secs())));
            }
            sleep(LOOK_EVERY).await;
        }
    }

    /// Has the previous files put back, and restarts the containers that started with the new ones.
    async fn go_back(&self, failed: Failed) {
        let (workload, version) = (&self.delivery.workload, self.version);
        let Failed { id, name, why } = failed;
        // Containers that started with these files, or with files between the settled ones and these. This process
        // restarted them, or one that was killed, or somebody else.
        let mut began: BTreeSet<_> =
            self.restarted.lock().unwrap_or_else(PoisonError::into_inner).keys().cloned().collect();
        self.goes_back.store(true, Ordering::Relaxed);
        match self.files.put_back(workload, version).await {
            // A newer set is in place already.
            Ok(now) if now >= version => return,
            Ok(now) => {
                error!(%workload, refused = version, version = now, container = name, "does not come up well with the new files ({why}): the ones before are back until a secret changes; restarting with them");
            }
            Err(problem) => {
                error!(%workload, version, container = name, "does not come up well with the new files ({why}), and they stay: {problem}");
                return self.settle().await;
            }
        }
        sleep(SLACK).await;
        let mut pauses = pauses();
        // The container that failed serves nobody: restart it first.
        self.restart_back(&id, &mut pauses).await;
        began.extend(
            self.containers_at_last(&mut pauses)
                .await
                .into_iter()
                .filter_map(|seen| self.began_with_newer(&seen).then_some(seen.id)),
        );
        began.remove(&id);
        for id in began {
            self.restart_back(&id, &mut pauses).await;
        }
        self.forget();
    }

    /// The containers that exist. Asks until Docker answers.
    async fn containers_at_last(&self, pauses: &mut Backoff) -> Vec<Seen> {
        loop {
            match self.containers().await {
                Ok(containers) => return containers,
                Err(error) => self.shared.failed(&error),
            }
            sleep(pauses.next(None)).await;
        }
    }

    async fn restart_back(&self, id: &str, pauses: &mut Backoff) {
        let workload = &self.delivery.workload;
        loop {
            match self.shared.docker.restart(id).await {
                Ok(()) => break,
                Err(DockerError::NotFound { .. }) => return,
                Err(error @ (DockerError::Conflict { .. } | DockerError::Failed { .. })) => {
                    return error!(%workload, container = short(id), "cannot be restarted with the files before: Docker {error}");
                }
                Err(error) => self.shared.failed(&error),
            }
            sleep(pauses.next(None)).await;
        }
        match self.verdict(id).await {
            Ok(Verdict::Well) => info!(%workload, container = short(id), "is well with the files before"),
            Ok(Verdict::Gone) => {}
            Ok(Verdict::Ill(why)) => {
                error!(%workload, container = short(id), "is not well with the files before either ({why}): see its log");
            }
            Err(error) => self.shared.failed(&error),
        }
    }

    /// After a start of the vault that finds files put back: restarts the containers that started with the refused
    /// files and not since. If all are done, does nothing.
    async fn recover(&self) {
        self.slack().await;
        let mut pauses = pauses();
        let containers = self.containers_at_last(&mut pauses).await;
        self.shared.answered();
        let (back, mut refused): (Vec<_>, Vec<_>) =
            containers.into_iter().filter(|seen| self.began_with_newer(seen)).partition(|seen| self.is_fresh(seen));
        refused.sort_by_key(|seen| trouble(seen).is_none());
        // A container that was restarted just before the vault was killed may still be starting.
        for seen in back.iter().filter(|_| !refused.is_empty()) {
            if let Err(error) = self.verdict(&seen.id).await {
                self.shared.failed(&error);
            }
        }
        for seen in refused {
            info!(workload = %self.delivery.workload, container = seen.name, "restarting, it began with files that were put back");
            self.restart_back(&seen.id, &mut pauses).await;
        }
    }
}

fn slack() -> SignedDuration {
    SignedDuration::try_from(SLACK).unwrap_or_default()
}

/// What is wrong with a container; `None` if nothing is.
fn trouble(seen: &Seen) -> Option<&'static str> {
    match (seen.state, seen.health) {
        (RunState::Restarting, _) => Some("it ends and is started again"),
        (RunState::Exited | RunState::Dead | RunState::Created, _) => Some("it has ended"),
        (RunState::Running, Some(Health::Unhealthy)) => Some("its health check fails"),
        (RunState::Running, Some(Health::Healthy)) => None,
        (RunState::Running, _) if seen.restarts > 0 => Some("it ended and was started again"),
        (RunState::Running | RunState::Paused, _) => None,
    }
}

fn short(id: &str) -> &str {
    id.get(..12).unwrap_or(id)
}

/// Pauses between two tries of Docker.
fn pauses() -> Backoff {
    Backoff::new(Duration::from_secs(1), Duration::from_secs(60))
}

#[cfg(test)]
mod tests;
