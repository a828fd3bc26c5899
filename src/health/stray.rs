//! Strays: containers of this agent under another name than they should have. They were renamed by hand, or made while
//! `TUNNEL_CONTAINER_NAME` was another name. They still carry the agent's label, and their connector still serves.
//!
//! If the tunnel's name is free, a stray gets it back and nobody notices. Otherwise the agent drains and removes the
//! stray once the container with the name serves.

use std::collections::BTreeSet;
use std::time::Duration;

use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::host::Host;
use super::look::Sight;
use super::plan::{self, Goal, Owner, Slot, Whose};
use super::{LAST_STEP_LIMIT, Supervisor};
use crate::docker::{Container, DockerError, Inspected, OWNER_LABEL, RunState, SPEC_LABEL};
use crate::retry::Trouble;

/// How often to look for strays. With nothing under the tunnel's name, every pass looks.
const EVERY: Duration = Duration::from_secs(60);

/// What is known of strays.
#[derive(Debug)]
pub(super) struct Strays {
    looked: Option<Instant>,
    /// Ids of the strays that Docker refused to rename.
    fixed: BTreeSet<String>,
    trouble: Trouble,
}

impl Strays {
    pub(super) fn new() -> Self {
        Self { looked: None, fixed: BTreeSet::new(), trouble: Trouble::new("a tunnel container with another name:") }
    }
}

impl<H: Host> Supervisor<H> {
    /// Renames or removes strays. Returns whether it changed anything, so that the caller must look again.
    pub(super) async fn see_to_strays(&mut self, sight: &Sight, goal: &Goal, stop: &CancellationToken) -> bool {
        let due = sight.main.is_none() || self.strays.looked.is_none_or(|at| at.elapsed() >= EVERY);
        if *goal == Goal::Leave || stop.is_cancelled() || !due {
            return false;
        }
        self.strays.looked = Some(Instant::now());
        match self.put_right(sight, goal).await {
            Ok(done) => {
                self.strays.trouble.ended();
                done
            }
            // The look at the tunnel itself reports that Docker is away.
            Err((_, error)) if error.is_away() => false,
            Err((name, error)) => {
                let problem = format!("{name}: Docker {error}");
                self.strays.trouble.failed(&problem, "trying again; or remove it by hand with docker rm -f");
                false
            }
        }
    }

    async fn put_right(&mut self, sight: &Sight, goal: &Goal) -> Result<bool, (String, DockerError)> {
        let mut found = self.strays(sight.whose()).await.map_err(|error| ("-".to_owned(), error))?;
        let seen: BTreeSet<_> = found.iter().map(|stray| stray.id.clone()).collect();
        self.strays.fixed.retain(|id| seen.contains(id));
        // A running stray goes first: it is worth more than one that has ended.
        found.sort_by_key(|stray| stray.state != RunState::Running);
        let mut name_is_free = sight.main.is_none() && sight.next.is_none() && *goal != Goal::Remove;
        let mut done = false;
        for stray in found {
            let told = |error| (stray.name.clone(), error);
            if name_is_free && !self.strays.fixed.contains(&stray.id) {
                let name = self.name(Slot::Main);
                match self.host.rename(&stray.id, &name).await {
                    Ok(()) => {
                        info!(
                            container = stray.name,
                            name, "the tunnel container had another name and has its own again"
                        );
                        (name_is_free, done) = (false, true);
                        continue;
                    }
                    Err(error) if error.is_away() => return Err(told(error)),
                    Err(error) => {
                        warn!(
                            container = stray.name,
                            name, "Docker {error}; another tunnel container is made, and then this one is removed"
                        );
                        self.strays.fixed.insert(stray.id);
                        continue;
                    }
                }
            }
            let is_wanted = matches!(goal, Goal::Run { .. }) && !self.main.serves(Instant::now());
            if is_wanted && plan::is_alive(&stray) {
                continue;
            }
            info!(container = stray.name, "removing a tunnel container of this agent that has another name");
            self.end(&stray).await.map_err(told)?;
            done = true;
        }
        Ok(done)
    }

    pub(super) async fn end(&self, stray: &Inspected) -> Result<(), DockerError> {
        if plan::is_alive(stray) {
            self.drain(&stray.id).await?;
        }
        self.host.remove(&stray.id).await
    }

    /// Stops and removes the strays that are there when the agent leaves.
    pub(super) async fn leave_strays(&self, whose: Whose<'_>) {
        let Ok(Ok(strays)) = timeout(LAST_STEP_LIMIT, self.strays(whose)).await else { return };
        for stray in strays {
            match self.end(&stray).await {
                Ok(()) => info!(container = stray.name, "tunnel stopped and removed"),
                Err(error) => warn!(
                    container = stray.name,
                    "the tunnel could not be removed, since Docker {error}; the next start puts it right"
                ),
            }
        }
    }

    /// Lists this agent's strays. A container without an agent's id, as earlier versions made them, is never one:
    /// nobody can tell whose it is.
    pub(super) async fn strays(&self, whose: Whose<'_>) -> Result<Vec<Inspected>, DockerError> {
        let names = [self.name(Slot::Main), self.name(Slot::Next)];
        let is_stray = |name: &String, label: Option<&String>| {
            !names.contains(name) && label.is_some_and(|label| label != OWNER_LABEL.1)
        };
        let mut strays = Vec::new();
        for Container { id, name, labels, .. } in self.host.made().await? {
            if !is_stray(&name, labels.get(OWNER_LABEL.0)) || !labels.contains_key(SPEC_LABEL) {
                continue;
            }
            // It may have its name back by now, or be another agent's container with such a label.
            let seen = self.host.inspect(&id).await?.filter(|seen| {
                let label = seen.labels.get(OWNER_LABEL.0);
                seen.id == id && is_stray(&seen.name, label) && plan::owner(seen, whose) == Owner::Agent
            });
            strays.extend(seen);
        }
        Ok(strays)
    }
}
