//! The start of containers that Docker refused while their files were not there, as after a reboot of the host: a bind
//! mount of a directory that is missing refuses the start, and no restart policy tries that again.
//!
//! Docker leaves no trace of such a refusal, and the exit code says nothing. So a container is started when it ran before
//! ([`Memory`]), is to be kept running by its restart policy, does not run, has a bind mount, its directory was missing,
//! and its files are there now. One that was stopped by hand while its files were there is not wanted any more.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use dockflare_host::retry::Backoff;
use tokio::sync::watch;
use tokio::task::spawn_blocking;
use tokio::time::{Instant, sleep, timeout};
use tracing::{debug, error, info, warn};

use super::Files;
use super::memory::{Containers as Known, Memory};
use crate::delivery::Delivery;
use crate::docker::{Containers, RunState, Seen};

/// Pause between two looks at all containers, unless a workload gets files.
const EVERY: Duration = Duration::from_secs(5);
/// Least pause, and as a multiple of what a look took, so that many containers are no load.
const LEAST: Duration = Duration::from_secs(1);
const SHARE: u32 = 20;
/// One that was stopped with everything else, as when the host goes down, is wanted; one that has been down for so long
/// beside its files is not.
const STOPPED_BY_HAND: Duration = Duration::from_secs(60);

/// Starts them until it is dropped.
pub async fn gate<C: Containers>(
    docker: Arc<C>,
    files: impl Files,
    mut wanted: watch::Receiver<Arc<Vec<Delivery>>>,
    memory: Memory,
) {
    let mut states = files.states();
    let mut gate = Gate { docker, known: Known::new(), down: BTreeMap::new(), failed: BTreeMap::new() };
    let reading = memory.clone();
    gate.known = spawn_blocking(move || reading.read()).await.unwrap_or_default();
    let mut is_written = true;
    loop {
        let began = Instant::now();
        let deliveries = wanted.borrow_and_update().clone();
        let now = states.borrow_and_update().clone();
        let before = gate.known.clone();
        for delivery in deliveries.iter() {
            let has_files = now.get(&delivery.workload).is_some_and(|state| state.version.is_some());
            for name in &delivery.containers {
                if gate.look(delivery, name.as_str(), has_files).await.is_err() {
                    // Whoever reloads says so; here it only means: later.
                    break;
                }
            }
        }
        let is_named =
            |name: &str| deliveries.iter().any(|one| one.containers.iter().any(|known| known.as_str() == name));
        gate.known.retain(|name, _| is_named(name));
        if gate.known != before || !is_written {
            let (memory, known) = (memory.clone(), gate.known.clone());
            let written = spawn_blocking(move || memory.write(&known)).await;
            let is_well = matches!(written, Ok(Ok(())));
            if let (Ok(Err(problem)), true) = (written, is_written) {
                error!(
                    "which containers run cannot be noted: {problem}; trying again; after a reboot they may have to be started by hand"
                );
            }
            is_written = is_well;
        }
        sleep(LEAST.max(began.elapsed() * SHARE)).await;
        let changed = async {
            tokio::select! {
                changed = states.changed() => changed,
                changed = wanted.changed() => changed,
            }
        };
        if matches!(timeout(EVERY, changed).await, Ok(Err(_))) {
            return;
        }
    }
}

struct Gate<C> {
    docker: Arc<C>,
    known: Known,
    /// Since when those that are wanted do not run.
    down: BTreeMap<String, Instant>,
    /// When a start that failed is tried again.
    failed: BTreeMap<String, (Instant, Backoff)>,
}

impl<C: Containers> Gate<C> {
    /// An error: Docker is away.
    async fn look(&mut self, delivery: &Delivery, name: &str, has_files: bool) -> Result<(), ()> {
        let seen = match self.docker.look(name).await {
            Ok(seen) => seen,
            Err(error) if error.is_away() => return Err(()),
            Err(error) => {
                debug!(container = name, "cannot be looked at: Docker {error}");
                return Ok(());
            }
        };
        let runs =
            matches!(&seen, Some(seen) if !matches!(seen.state, RunState::Created | RunState::Exited | RunState::Dead));
        if runs {
            self.down.remove(name);
            self.failed.remove(name);
            let known = self.known.entry(name.to_owned()).or_default();
            (known.is_wanted, known.is_waited_for) = (true, false);
            return Ok(());
        }
        let Some(known) = self.known.get_mut(name) else { return Ok(()) };
        if !has_files {
            return Ok(());
        }
        match seen {
            Some(seen) if known.is_waited_for && seen.is_kept && seen.has_bind => self.start(delivery, &seen).await,
            _ => {
                let since = *self.down.entry(name.to_owned()).or_insert_with(Instant::now);
                if since.elapsed() >= STOPPED_BY_HAND {
                    self.known.remove(name);
                    self.down.remove(name);
                }
            }
        }
        Ok(())
    }

    async fn start(&mut self, delivery: &Delivery, seen: &Seen) {
        if self.failed.get(&seen.name).is_some_and(|(again, _)| *again > Instant::now()) {
            return;
        }
        let workload = &delivery.workload;
        match self.docker.start(&seen.id).await {
            Ok(()) => {
                info!(%workload, container = seen.name, "started: Docker had refused that while its files were missing")
            }
            Err(error) => {
                let (again, pauses) = self.failed.entry(seen.name.clone()).or_insert_with(|| {
                    warn!(%workload, container = seen.name, "its files are there, and it cannot be started: Docker {error}; trying again; see that its bind mount is the directory of this workload");
                    (Instant::now(), Backoff::new(Duration::from_secs(10), Duration::from_secs(600)))
                });
                *again = Instant::now() + pauses.next_whole();
            }
        }
    }
}
