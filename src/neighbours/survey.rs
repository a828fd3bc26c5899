//! One look at the ways to labelled containers: inspects them one after the other and has them judged.

use std::collections::{BTreeMap, BTreeSet};

use tracing::debug;

use super::Failures;
use super::way::{Lender, Scene, Way, Workload, networks_needed, services, way};
use crate::config::TunnelConfig;
use crate::docker::{Container, Docker, DockerError, RunState};
use crate::labels::COMPOSE_SERVICE;

/// What was found out of one container.
#[derive(Debug)]
pub(super) struct Judged {
    pub(super) id: String,
    pub(super) name: String,
    pub(super) way: Way,
    /// Networks that the tunnel container must be on for its sake, when it may be connected to any.
    pub(super) networks: BTreeSet<String>,
}

/// Looks at each labelled container from where the tunnel container is, and hands on what was judged as it comes.
/// Without a tunnel container that runs on its network nothing is judged.
///
/// # Errors
/// What ends the look; what is about one container only is noted in `failures`.
pub(super) async fn survey(
    docker: &Docker,
    config: &TunnelConfig,
    desktop: &mut Option<bool>,
    running: &[Container],
    labelled: &BTreeMap<String, Container>,
    failures: &mut Failures,
    mut judged: impl FnMut(Judged),
) -> Result<(), DockerError> {
    let network = &config.network;
    let tunnel = match failures.set_aside(docker.inspect(&config.container_name).await)? {
        // One that is not on its network is no container of the agent's, or about to be replaced.
        Some(Some(found)) if found.state == RunState::Running && found.networks.contains_key(network) => found,
        _ => return Ok(()),
    };
    if desktop.is_none() {
        // A proxy may refuse it; then what depends on it is not judged.
        let version = docker.version().await.inspect_err(|error| debug!("Docker {error}"));
        *desktop = version.ok().map(|version| version.is_desktop);
    }
    let others = names_of(running, |id| labelled.contains_key(id));
    let scene = Scene { tunnel: &tunnel, network, desktop: *desktop, others: &others };
    for (id, container) in labelled {
        let seen = match failures.set_aside(docker.inspect(id).await)? {
            Some(Some(seen)) if matches!(seen.state, RunState::Running | RunState::Paused) => seen,
            _ => continue,
        };
        let lender = match seen.network_mode.strip_prefix("container:") {
            None => None,
            Some(lender) => match failures.set_aside(docker.inspect(lender).await)? {
                Some(lender) => Some(lender.filter(|lender| !has_ended(lender.state))),
                None => continue,
            },
        };
        let lender = match &lender {
            None => Lender::Nobody,
            Some(Some(lender)) => Lender::Container(lender),
            Some(None) => Lender::Gone,
        };
        let workload = Workload { seen: &seen, lender, services: services(&container.labels) };
        let networks = if config.auto_connect { networks_needed(&scene, &workload) } else { BTreeSet::new() };
        judged(Judged { id: id.clone(), name: seen.name.clone(), way: way(&scene, &workload), networks });
    }
    Ok(())
}

/// The lower-case names of running containers, without those of the labelled. A label on one container may mean
/// another, as a proxy beside it; where it names another labelled one it is more likely a copy that was not adapted.
fn names_of(running: &[Container], without: impl Fn(&str) -> bool) -> BTreeSet<String> {
    let others = running.iter().filter(|container| !without(&container.id));
    let names = others.flat_map(|other| [Some(&other.name), other.labels.get(COMPOSE_SERVICE)]);
    names.flatten().map(|name| name.to_ascii_lowercase()).collect()
}

fn has_ended(state: RunState) -> bool {
    matches!(state, RunState::Exited | RunState::Created | RunState::Dead)
}
