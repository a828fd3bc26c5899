//! One look around the tunnel container from outside the task, for `dockflare-agent check`. Changes nothing and
//! remembers nothing.

use std::collections::BTreeMap;

use super::Failures;
use super::rivals::{is_candidate, rivalry};
use super::survey::survey;
use super::way::{Cause, Way};
use crate::config::TunnelConfig;
use crate::docker::{Container, Docker, DockerError};
use crate::state::TunnelId;

/// What was seen.
#[derive(Debug, Default)]
pub(crate) struct Glance {
    /// The labelled containers that could be looked at, by name.
    pub(crate) ways: BTreeMap<String, Verdict>,
    /// Names of other containers that run a connector of the same tunnel.
    pub(crate) rivals: Vec<String>,
    /// Why not all was seen.
    pub(crate) problem: Option<DockerError>,
}

/// Whether the tunnel reaches a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// It does; on which network, and the label's value where there is one.
    Open { network: String, service: Option<String> },
    /// Nothing can be said of it.
    Unjudged,
    /// It does not.
    Blocked { problem: String, remedy: String, connects: bool },
}

/// Looks at the running containers of the host. `tunnel`: id and name of the one that is wanted, for its rivals.
///
/// # Errors
/// When Docker does not list them.
pub(crate) async fn glance(
    docker: &Docker,
    config: &TunnelConfig,
    labelled: &BTreeMap<String, Container>,
    tunnel: Option<(&TunnelId, Option<&str>)>,
) -> Result<Glance, DockerError> {
    let running = docker.list_running().await?;
    let (mut seen, mut failures) = (Glance::default(), Failures::default());
    let own = [config.container_name.clone(), config.successor_name()];
    if let Some((id, name)) = tunnel {
        for candidate in running.iter().filter(|listed| is_candidate(listed, &own)) {
            // One that is gone by now is none.
            let found = docker.inspect(&candidate.id).await.ok().flatten();
            seen.rivals.extend(found.filter(|found| rivalry(found, &own, id, name).is_some()).map(|found| found.name));
        }
    }
    let ways = &mut seen.ways;
    let mut desktop = None;
    let looked = survey(docker, config, &mut desktop, &running, labelled, &mut failures, |judged| {
        let verdict = match judged.way {
            Way::Open { service, network } => Verdict::Open { network, service },
            Way::Unjudged => Verdict::Unjudged,
            Way::Blocked(block) => Verdict::Blocked {
                connects: block.cause == Cause::NoNetwork && !judged.networks.is_empty(),
                problem: block.problem,
                remedy: block.remedy,
            },
        };
        ways.insert(judged.name, verdict);
    });
    seen.problem = looked.await.err().or(failures.first);
    Ok(seen)
}
