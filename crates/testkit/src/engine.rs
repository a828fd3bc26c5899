//! Reaches this machine's Docker Engine.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use bollard::Docker;
use tokio::time::{Instant, sleep, timeout};

/// The pause between two looks of [`wait_until`].
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// Returns a client of the engine at `DOCKER_HOST`, or at the default socket. Sends nothing yet.
///
/// A client belongs to the runtime it is first used in: make one per test.
///
/// # Errors
/// When `DOCKER_HOST` is invalid.
pub fn docker() -> Result<Docker> {
    Docker::connect_with_defaults().context("cannot set up a Docker client: is DOCKER_HOST right?")
}

/// Returns a client if an engine answers within 10 s. For tests that do not run under [`main`](crate::main).
///
/// # Panics
/// With `CI=true`, when no engine answers: a skipped test would go unnoticed there.
pub async fn engine() -> Option<Docker> {
    let docker = docker().ok();
    let answers = match &docker {
        Some(docker) => matches!(timeout(Duration::from_secs(10), docker.ping()).await, Ok(Ok(_))),
        None => false,
    };
    assert!(answers || !in_ci(), "no Docker Engine answers, and CI=true says there must be one");
    docker.filter(|_| answers)
}

/// Whether this run must not skip tests that need an engine: `CI` is `true` or `1`.
#[must_use]
pub fn in_ci() -> bool {
    matches!(std::env::var("CI").as_deref(), Ok("true" | "1"))
}

/// Says on standard error that the calling test skips, because libtest has no word for it.
///
/// # Panics
/// With `CI=true`, where all must run.
pub fn skipped(why: &str) {
    assert!(!in_ci(), "{why}");
    eprintln!("skipped: {why}");
}

/// Returns the number in the variable: the seed of a test, or how much of it to run. `otherwise` if it is not set.
///
/// # Panics
/// When the variable holds no number.
#[must_use]
pub fn number(variable: &str, otherwise: u64) -> u64 {
    match std::env::var(variable) {
        Ok(text) => text.parse().unwrap_or_else(|error| panic!("{variable}={text}: {error}")),
        Err(_) => otherwise,
    }
}

/// Returns the path of the engine's socket on the engine's host, for use as a mount.
#[must_use]
pub fn socket_path() -> String {
    let host = std::env::var("DOCKER_HOST").unwrap_or_default();
    host.strip_prefix("unix://").unwrap_or("/var/run/docker.sock").to_owned()
}

/// Calls `look` every 50 ms until it returns a value.
///
/// # Errors
/// When `limit` passes first; the error names `what` it waited for.
pub async fn wait_until<T>(what: &str, limit: Duration, mut look: impl AsyncFnMut() -> Option<T>) -> Result<T> {
    let deadline = Instant::now() + limit;
    loop {
        // The deadline also cuts off a look that hangs.
        match tokio::time::timeout_at(deadline, look()).await {
            Ok(Some(found)) => return Ok(found),
            Ok(None) if Instant::now() < deadline => sleep(LOOK_EVERY).await,
            _ => bail!("waited {limit:?} in vain for {what}"),
        }
    }
}
