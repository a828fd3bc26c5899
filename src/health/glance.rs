//! Looks once at the tunnel container from outside the supervisor, for `dockflare-agent check`: whose it is, and
//! whether its cloudflared is connected. Changes nothing and remembers nothing.

use jiff::Timestamp;

use super::classify::{self, Memory, Seen};
use super::course::{self, Verdict};
use super::log::Line;
use super::look::{LAST_LINES, START_LINES, started};
use super::plan::{self, Owner, Whose};
use super::probe::{self, Probe, Readiness};
use crate::cause::Cause;
use crate::config::TunnelConfig;
use crate::docker::{Docker, DockerError, Health, RunState};

/// What the look saw.
#[derive(Debug)]
pub(crate) struct Glance {
    /// The container's name: the tunnel's, or the successor's during a takeover.
    pub(crate) name: String,
    /// Whether it is somebody else's.
    pub(crate) foreign: bool,
    /// The id of the other agent that made it.
    pub(crate) another: Option<String>,
    /// Its state.
    pub(crate) state: RunState,
    /// The exit code of its last end.
    pub(crate) exit_code: i64,
    /// Whether it is on the tunnel's network.
    pub(crate) on_network: bool,
    /// The image it was created from.
    pub(crate) image: String,
    /// What cloudflared answers.
    pub(crate) readiness: Readiness,
    /// The result of Docker's health check.
    pub(crate) health: Option<Health>,
    /// cloudflared's version, if known.
    pub(crate) version: Option<String>,
    /// Why it is not ready, if that can be seen.
    pub(crate) clue: Option<Cause>,
    /// What the log adds to that cause.
    pub(crate) detail: Option<&'static str>,
}

/// Looks at the container with the tunnel's name, or else at the successor's.
///
/// # Errors
/// When Docker does not answer for the container. Anything else that cannot be found out is left out.
pub(crate) async fn glance(
    docker: &Docker,
    config: &TunnelConfig,
    whose: Whose<'_>,
) -> Result<Option<Glance>, DockerError> {
    let main = docker.inspect(&config.container_name).await?;
    let found = match main {
        Some(found) => found,
        None => match docker.inspect(&config.successor_name()).await? {
            Some(found) if plan::owner(&found, whose) != Owner::Foreign => found,
            _ => return Ok(None),
        },
    };
    let foreign = plan::owner(&found, whose) == Owner::Foreign;
    let another = plan::another_agent(&found, whose).map(str::to_owned);
    let place = super::look::asked_at(&found, &config.network);
    let address = place.map(|place| place.address.as_str());
    let address = address.filter(|address| !foreign && found.state == RunState::Running && !address.is_empty());
    let (mut readiness, mut version, mut tries) = (Readiness::Silent, None, None);
    let (mut clue, mut detail) = (None, None);
    if let (Some(address), Ok(probe)) = (address, Probe::new()) {
        readiness = probe.readiness(address).await;
        if readiness != Readiness::Silent {
            let facts = probe.facts(address).await;
            tries = facts.as_ref().map(|facts| facts.tries);
            version = facts.and_then(|facts| facts.version);
        }
    }
    if !foreign && !matches!(readiness, Readiness::Ready { .. }) {
        let lines = docker.log_tail(&found.id, started(&found), LAST_LINES).await.unwrap_or_default();
        let log: Vec<_> = lines.iter().map(|line| Line::parse(line)).collect();
        let verdict = Memory::default().classify(&Seen {
            now: Timestamp::now().as_second() as f64,
            state: found.state,
            exit_code: Some(found.exit_code),
            out_of_memory: found.out_of_memory,
            started_at: classify::seconds(&found.started_at).unwrap_or_default(),
            page: course::page(&found, &readiness),
            tries,
            log: &log,
            only_quic: config.only_quic(),
        });
        if let Verdict::Sick(cause) = verdict {
            (clue, detail) = (Some(cause), classify::detail(cause, &log));
        }
    }
    if !foreign && version.is_none() {
        let lines = docker.log_start(&found.id, started(&found), START_LINES).await.unwrap_or_default();
        version = probe::version_in_log(&lines);
    }
    Ok(Some(Glance {
        foreign,
        another,
        state: found.state,
        exit_code: found.exit_code,
        on_network: found.networks.contains_key(&config.network),
        readiness,
        health: found.health,
        version,
        clue,
        detail,
        name: found.name,
        image: found.image,
    }))
}
