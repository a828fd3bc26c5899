//! The start of containers that Docker refused while their files were not there: a bind mount of a directory that is
//! missing refuses the start, and no restart policy tries that again. It acts on what Docker says of the last start, not on
//! an exit code, which such a refusal leaves as it was.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use dockflare_host::retry::Backoff;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};
use tracing::{info, warn};

use super::Files;
use crate::delivery::Delivery;
use crate::docker::{Containers, RunState, Seen};

/// Pause between two looks at all containers, unless a workload gets files.
const EVERY: Duration = Duration::from_secs(5);
/// Least pause, and as a multiple of what a look took, so that many containers are no load.
const LEAST: Duration = Duration::from_secs(1);
const SHARE: u32 = 20;

/// Whether a container is to be started once its files are there.
pub(super) fn is_refused(seen: &Seen) -> bool {
    seen.is_kept
        && seen.lacks_bind_source
        && matches!(seen.state, RunState::Created | RunState::Exited | RunState::Dead)
}

/// Starts them until it is dropped.
pub async fn gate<C: Containers>(docker: Arc<C>, files: impl Files, mut wanted: watch::Receiver<Arc<Vec<Delivery>>>) {
    let mut states = files.states();
    // By id: when a start that failed is tried again.
    let mut failed: BTreeMap<String, (Instant, Backoff)> = BTreeMap::new();
    loop {
        let began = Instant::now();
        let deliveries = wanted.borrow_and_update().clone();
        let now = states.borrow_and_update().clone();
        let has_files = |delivery: &&Delivery| now.get(&delivery.workload).is_some_and(|state| state.version.is_some());
        let mut refused = vec![];
        'looks: for delivery in deliveries.iter().filter(has_files) {
            for name in &delivery.containers {
                match docker.look(name.as_str()).await {
                    Ok(Some(seen)) if is_refused(&seen) => refused.push((delivery.workload.clone(), seen)),
                    Ok(_) => {}
                    // Whoever reloads says it, with its count; here it only means: later.
                    Err(error) if error.is_away() => break 'looks,
                    Err(error) => tracing::debug!(container = %name, "cannot be looked at: Docker {error}"),
                }
            }
        }
        failed.retain(|id, _| refused.iter().any(|(_, seen)| seen.id == *id));
        for (workload, seen) in refused {
            if failed.get(&seen.id).is_some_and(|(again, _)| *again > Instant::now()) {
                continue;
            }
            match docker.start(&seen.id).await {
                Ok(()) => {
                    info!(%workload, container = seen.name, "started, its files are there");
                    failed.remove(&seen.id);
                }
                Err(error) => {
                    let (again, pauses) = failed.entry(seen.id).or_insert_with(|| {
                        warn!(%workload, container = seen.name, "its files are there, and it cannot be started: Docker {error}; trying again; see that its bind mount is the directory of this workload");
                        (began, Backoff::new(Duration::from_secs(10), Duration::from_secs(600)))
                    });
                    *again = Instant::now() + pauses.next_whole();
                }
            }
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
