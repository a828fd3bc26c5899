//! Carrying out a plan: the steps themselves, and what each needs before it.

use std::collections::BTreeMap;
use std::future::Future;
use std::time::Duration;

use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;
use tracing::info;

use super::Supervisor;
use super::plan::{self, Action, Goal, Owner};
use super::problem::{Problem, problem_of};
use crate::docker::{DockerError, Inspected, STOP_GRACE_SECONDS, Spec};
use crate::retry::Lasts;

/// Label that says whose the container and the network are.
const OWNER_LABEL: (&str, &str) = ("com.dockflare.agent.owner", "dockflare-agent");

/// How far a plan was carried out without a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Came {
    ToTheEnd,
    /// By a shutdown or new orders: the next pass looks and plans anew.
    Interrupted,
}

impl Supervisor {
    /// Says what is about to happen, and why.
    pub(super) fn announce(&self, goal: &Goal, found: Option<&Inspected>) {
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

    /// Carries out a plan, up to the first failure, a shutdown or new orders: the next pass plans anew.
    pub(super) async fn act(
        &mut self,
        steps: &[Action],
        spec: Option<&Spec>,
        stop: &CancellationToken,
    ) -> Result<Came, Problem> {
        let name = self.config.container_name.clone();
        // Has seen what this pass has seen.
        let mut orders = self.wanted.clone();
        for step in steps {
            if stop.is_cancelled() || orders.has_changed().unwrap_or(false) {
                return Ok(Came::Interrupted);
            }
            let done = match (step, spec) {
                (Action::Prepare, _) => tokio::select! {
                    // A pull may take minutes, and what it is for may no longer be wanted.
                    () = stop.cancelled() => return Ok(Came::Interrupted),
                    Ok(()) = orders.changed() => return Ok(Came::Interrupted),
                    prepared = self.prepare(steps.contains(&Action::Stop)) => {
                        prepared?;
                        Ok(())
                    }
                },
                (Action::Stop, _) => self.drain(&name).await,
                (Action::Remove, _) => self.docker.remove(&name).await,
                (Action::Create, Some(spec)) => self.docker.create(&name, spec).await,
                (Action::Create, None) => Ok(()),
                (Action::Start, _) => self.docker.start(&name).await,
            };
            if let Err(error) = done {
                return Err(self.why_not(*step, &error).await);
            }
        }
        Ok(Came::ToTheEnd)
    }

    /// `replaces`: something runs that must not be given up for what cannot be had.
    async fn prepare(&self, replaces: bool) -> Result<(), Problem> {
        self.see_to_network().await?;
        self.see_to_image(replaces).await
    }

    /// Stops the container and waits for cloudflared's drain, which a shutdown must not cut short: a second signal
    /// would end it at once.
    pub(super) async fn drain(&self, name: &str) -> Result<(), DockerError> {
        let grace = Duration::from_secs(STOP_GRACE_SECONDS.into());
        self.draining.send_replace(true);
        let stopped =
            said_while_long("waiting for cloudflared to drain its requests", self.docker.stop(name, grace)).await;
        self.draining.send_replace(false);
        stopped
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

    async fn see_to_image(&self, replaces: bool) -> Result<(), Problem> {
        let image = &self.config.image;
        match self.docker.has_image(image).await {
            Ok(true) => return Ok(()),
            Ok(false) => {}
            // Not allowed to look: creating the container tells as well.
            Err(DockerError::Forbidden { .. }) if !replaces => return Ok(()),
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
}

/// Waits for `work`, saying after two seconds what for.
async fn said_while_long<T>(what: &str, work: impl Future<Output = T>) -> T {
    let mut work = std::pin::pin!(work);
    tokio::select! {
        done = &mut work => return done,
        () = sleep(Duration::from_secs(2)) => {}
    }
    info!(at_most = %Lasts(Duration::from_secs(STOP_GRACE_SECONDS.into())), "{what}");
    work.await
}

/// What everything that the agent makes is marked with.
pub(super) fn owner_labels() -> BTreeMap<String, String> {
    BTreeMap::from([(OWNER_LABEL.0.to_owned(), OWNER_LABEL.1.to_owned())])
}
