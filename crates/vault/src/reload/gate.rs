//! Starts containers that Docker refused to start while their files were missing, as after a reboot of the host. Docker
//! refuses a start while the directory of a bind mount is missing, and no restart policy tries again.
//!
//! Docker leaves no trace of such a refusal, and the exit code says nothing. So the vault starts a container if all of
//! this holds: it ran before ([`Memory`]), its restart policy keeps it running, it does not run, it has a bind mount,
//! its directory was missing, and its files are in place now. A container that was stopped by hand while its files were
//! in place is no longer wanted.

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

/// Longest pause between two looks at all containers. A change of the deliveries or of their files ends it early.
const EVERY: Duration = Duration::from_secs(5);
/// Shortest pause. It is also a multiple of the time a look took, so that many containers are no load.
const LEAST: Duration = Duration::from_secs(1);
const SHARE: u32 = 20;
/// A container that stopped with everything else, as when the host goes down, is wanted. One that stays down this long
/// while its files are in place was stopped by hand.
const STOPPED_BY_HAND: Duration = Duration::from_secs(60);

/// Starts such containers until it is dropped.
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
                    // The reload job reports this. Here, just try again later.
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
    /// Since when a wanted container has been down.
    down: BTreeMap<String, Instant>,
    /// When to retry a failed start.
    failed: BTreeMap<String, (Instant, Backoff)>,
}

impl<C: Containers> Gate<C> {
    /// Looks at one container. An error means that Docker is away.
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
