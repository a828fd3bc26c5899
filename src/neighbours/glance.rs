//! One look around the tunnel container from outside the task, for `dockflare-agent check`. Changes nothing and
//! remembers nothing.

use std::collections::BTreeMap;

use super::reach::Reach;
use super::rivals::{is_candidate, rivalry};
use super::survey::{Turn, survey};
use super::way::{Cause, Way};
use super::{Failures, slip};
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
    /// Containers that are nearly labelled: name, what is wrong with the label, what would do.
    pub(crate) nearly: Vec<(String, String, String)>,
    /// Why not all was seen.
    pub(crate) problem: Option<DockerError>,
}

/// Whether the tunnel reaches a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// It does; on which network, the label's value, and what may be wrong with it.
    Open { network: String, service: String, note: Option<String> },
    /// The label of this kind is missing, so that the master makes no rule.
    NoRule(&'static str),
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
    let nearly = running.iter().filter_map(|listed| Some((listed.name.clone(), slip(listed)?)));
    seen.nearly = nearly.map(|(name, (problem, remedy))| (name, problem, remedy)).collect();
    let (mut desktop, mut turn, mut all) = (None, Turn::default(), Vec::new());
    turn.all(labelled.len());
    let mut tunnel = None;
    while turn.goes_on() {
        let labelled = (labelled, &mut turn);
        let looked = survey(docker, config, &mut desktop, &running, labelled, &mut failures, |one| all.push(one)).await;
        match looked {
            Ok(address) => tunnel = address,
            Err(error) => {
                seen.problem = Some(error);
                break;
            }
        }
    }
    let mut reach = Reach::default();
    reach.try_out(&all, tunnel).await;
    for judged in all {
        // There is no second look that could find out whether it only starts.
        let way = reach.settle(&judged).or_else(|| Some(Way::Blocked(reach.refusal(&judged)?.clone())));
        let verdict = match way.unwrap_or(Way::Unjudged) {
            Way::Open { service, network, note } => Verdict::Open { network, service, note },
            Way::NoRule(kind) => Verdict::NoRule(kind),
            Way::Unjudged => Verdict::Unjudged,
            Way::Blocked(block) => Verdict::Blocked {
                connects: block.cause == Cause::NoNetwork && !judged.networks.is_empty(),
                problem: block.problem,
                remedy: block.remedy,
            },
        };
        seen.ways.insert(judged.name, verdict);
    }
    seen.problem = seen.problem.or(failures.first);
    Ok(seen)
}
