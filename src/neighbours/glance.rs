//! Looks around the tunnel container once, outside of the task, for `dockflare-agent check`. Changes and remembers
//! nothing.

use std::collections::BTreeMap;

use super::reach::Reach;
use super::rivals::{is_candidate, rivalry};
use super::survey::{Turn, survey};
use super::way::{Cause, Way};
use super::{Failures, slip};
use crate::config::TunnelConfig;
use crate::docker::{Container, Docker, DockerError};
use crate::state::TunnelId;

/// The result of the look.
#[derive(Debug, Default)]
pub(crate) struct Glance {
    /// The verdicts on the labelled containers that could be inspected, by name.
    pub(crate) ways: BTreeMap<String, Verdict>,
    /// Names of other containers that run a connector of the same tunnel.
    pub(crate) rivals: Vec<String>,
    /// Containers whose labels nearly enable them: name, problem, remedy.
    pub(crate) nearly: Vec<(String, String, String)>,
    /// Why the look is incomplete.
    pub(crate) problem: Option<DockerError>,
}

/// Whether the tunnel reaches a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Reached on this network, by the label's value, with a note on what may be wrong with it.
    Open { network: String, service: String, note: Option<String> },
    /// The label of this kind is missing, so the master creates no rule.
    NoRule(&'static str),
    /// Cannot be judged.
    Unjudged,
    /// Not reached.
    Blocked { problem: String, remedy: String, connects: bool },
}

/// Looks at the running containers of the host. `tunnel` is the id and name of the tunnel in the spec, to find rivals.
///
/// # Errors
/// When Docker does not list the containers.
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
            // A container that is gone by now is no rival.
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
        // No second look follows that could tell whether the program is only starting.
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
