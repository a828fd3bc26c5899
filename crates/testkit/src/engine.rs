//! The one Docker Engine of this machine.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use bollard::Docker;
use tokio::time::{Instant, sleep, timeout};

/// How often [`wait_until`] looks.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// A client of the engine at `DOCKER_HOST`, or of the usual socket. Nothing is sent yet.
///
/// A client belongs to the runtime it is first used in: make one per test.
///
/// # Errors
/// When `DOCKER_HOST` makes no sense.
pub fn docker() -> Result<Docker> {
    Docker::connect_with_defaults().context("cannot set up a Docker client: is DOCKER_HOST right?")
}

/// The engine, if one answers. For tests that do not run under [`main`](crate::main).
///
/// # Panics
/// With `CI=true`, when none answers: there a skipped test would pass unseen.
pub async fn engine() -> Option<Docker> {
    let docker = docker().ok();
    let answers = match &docker {
        Some(docker) => matches!(timeout(Duration::from_secs(10), docker.ping()).await, Ok(Ok(_))),
        None => false,
    };
    assert!(answers || !in_ci(), "no Docker Engine answers, and CI=true says there must be one");
    docker.filter(|_| answers)
}

/// Whether this run may not skip what needs an engine: `CI=true`.
#[must_use]
pub fn in_ci() -> bool {
    matches!(std::env::var("CI").as_deref(), Ok("true" | "1"))
}

/// The engine's socket, as a path on the engine's own host: for a mount.
#[must_use]
pub fn socket_path() -> String {
    let host = std::env::var("DOCKER_HOST").unwrap_or_default();
    host.strip_prefix("unix://").unwrap_or("/var/run/docker.sock").to_owned()
}

/// Asks `look` every 50 ms until it gives something.
///
/// # Errors
/// When `limit` is over first; the error names `what` was waited for.
pub async fn wait_until<T>(what: &str, limit: Duration, mut look: impl AsyncFnMut() -> Option<T>) -> Result<T> {
    let deadline = Instant::now() + limit;
    loop {
        // The look has the same end: one that hangs is not waited for.
        match tokio::time::timeout_at(deadline, look()).await {
            Ok(Some(found)) => return Ok(found),
            Ok(None) if Instant::now() < deadline => sleep(LOOK_EVERY).await,
            _ => bail!("waited {limit:?} in vain for {what}"),
        }
    }
}
