//! Does one look at the labelled containers: inspects them one by one and has them judged.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use tracing::debug;

use super::Failures;
use super::way::{Judgement, Lender, Scene, Try, Way, Workload, hostnames, networks_needed, services, way};
use crate::config::TunnelConfig;
use crate::docker::{Container, Docker, DockerError, Inspected, METRICS_PORT, RunState};
use crate::labels::COMPOSE_SERVICE;

/// The verdict on one container.
#[derive(Debug)]
pub(super) struct Judged {
    pub(super) id: String,
    pub(super) name: String,
    /// Changes with each start of the container, or of the one whose network it uses.
    pub(super) life: String,
    pub(super) way: Way,
    /// Connections that test the verdict.
    pub(super) tries: Vec<Try>,
    /// Networks that the tunnel container must be on to reach it. Empty if the agent may not connect it to any.
    pub(super) networks: BTreeSet<String>,
}

/// Picks the containers for a look, a limited number in turn.
#[derive(Debug, Default)]
pub(super) struct Turn {
    /// The id that was looked at last. Turns follow the order of the ids.
    last: Option<String>,
    /// How many are left since a look at all was last requested.
    left: usize,
}

/// Containers in one look. More would delay the verdicts.
const MOST_IN_A_LOOK: usize = 200;

impl Turn {
    /// Gives each of `of` containers a turn again.
    pub(super) fn all(&mut self, of: usize) {
        self.left = of;
    }

    /// Whether some containers are left.
    pub(super) fn goes_on(&self) -> bool {
        self.left > 0
    }

    /// Returns the next containers, starting after the last.
    fn next<'a>(&mut self, labelled: &'a BTreeMap<String, Container>) -> Vec<(&'a String, &'a Container)> {
        self.left = self.left.min(labelled.len());
        let is_behind = |id: &String| self.last.as_ref().is_none_or(|last| id > last);
        let (behind, before): (Vec<_>, Vec<_>) = labelled.iter().partition(|(id, _)| is_behind(id));
        behind.into_iter().chain(before).take(self.left.min(MOST_IN_A_LOOK)).collect()
    }

    /// Notes that this container has its turn.
    fn take(&mut self, id: &str) {
        self.last = Some(id.to_owned());
        self.left = self.left.saturating_sub(1);
    }
}

/// Judges whether the tunnel container reaches the labelled containers whose turn it is, and passes each verdict to
/// `judged` at once. Returns the address of cloudflared's own port on the tunnel's network. Judges nothing unless the
/// tunnel container runs on its network. A container that ends the look does not come first in the next, so the others
/// get their turn.
///
/// # Errors
/// The failure that ends the look. Failures that concern one container only are noted in `failures`.
pub(super) async fn survey(
    docker: &Docker,
    config: &TunnelConfig,
    desktop: &mut Option<bool>,
    running: &[Container],
    (labelled, turn): (&BTreeMap<String, Container>, &mut Turn),
    failures: &mut Failures,
    mut judged: impl FnMut(Judged),
) -> Result<Option<SocketAddr>, DockerError> {
    let network = &config.network;
    let tunnel = match failures.set_aside(docker.inspect(&config.container_name).await)? {
        // A container that is not on the tunnel's network is not the agent's, or is about to be replaced.
        Some(Some(found)) if found.state == RunState::Running && found.networks.contains_key(network) => found,
        _ => {
            turn.all(0);
            return Ok(None);
        }
    };
    if desktop.is_none() {
        // A proxy may refuse the call. What depends on the answer is not judged then.
        let version = docker.version().await.inspect_err(|error| debug!("Docker {error}"));
        *desktop = version.ok().map(|version| version.is_desktop);
    }
    let others = names_of(running, |id| labelled.contains_key(id));
    let scene = Scene { tunnel: &tunnel, network, desktop: *desktop, others: &others };
    for (id, container) in turn.next(labelled) {
        turn.take(id);
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
        let life = match lender {
            Lender::Container(lender) => format!("{} {}", seen.started_at, lender.started_at),
            Lender::Nobody | Lender::Gone => seen.started_at.clone(),
        };
        let has_hostname = !hostnames(&container.labels).is_empty();
        let workload = Workload { seen: &seen, lender, services: services(&container.labels), has_hostname };
        let networks = if config.auto_connect { networks_needed(&scene, &workload) } else { BTreeSet::new() };
        let Judgement { way, tries } = way(&scene, &workload);
        judged(Judged { id: id.clone(), name: seen.name.clone(), life, way, tries, networks });
    }
    Ok(own_port(&tunnel, network))
}

fn own_port(tunnel: &Inspected, network: &str) -> Option<SocketAddr> {
    let address = tunnel.networks.get(network)?.address.parse().ok()?;
    Some(SocketAddr::new(address, METRICS_PORT))
}

/// Returns the lower-case names of the running containers that are not labelled. A label may name another container on
/// purpose, such as a proxy. If it names another labelled one, it is more likely a copy that was not adapted.
fn names_of(running: &[Container], without: impl Fn(&str) -> bool) -> BTreeSet<String> {
    let others = running.iter().filter(|container| !without(&container.id));
    let names = others.flat_map(|other| [Some(&other.name), other.labels.get(COMPOSE_SERVICE)]);
    names.flatten().map(|name| name.to_ascii_lowercase()).collect()
}

fn has_ended(state: RunState) -> bool {
    matches!(state, RunState::Exited | RunState::Created | RunState::Dead)
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;
    use std::time::Duration;

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpListener;

    use super::*;
    use crate::config::{DockerHost, OnExit, Pull};

    fn labelled(count: usize) -> BTreeMap<String, Container> {
        let container = |id: String| Container {
            name: id.clone(),
            id,
            labels: BTreeMap::new(),
            status: "running".into(),
            image: String::new(),
        };
        (0..count).map(|number| format!("{number:04}")).map(|id| (id.clone(), container(id))).collect()
    }

    #[test]
    fn many_containers_are_all_looked_at_in_turn_and_one_that_ends_a_look_keeps_no_other_from_it() {
        let all = labelled(450);
        let mut turn = Turn::default();
        turn.all(all.len());
        let mut looked_at = Vec::new();
        let mut looks = 0;
        while turn.goes_on() {
            looks += 1;
            // The first two looks end early, as when Docker does not answer.
            for (number, (id, _)) in turn.next(&all).into_iter().enumerate() {
                turn.take(id);
                looked_at.push(id.clone());
                if looks < 3 && number == 2 {
                    break;
                }
            }
        }
        assert_eq!((looks, looked_at.len()), (5, 450));
        assert_eq!(looked_at.iter().collect::<BTreeSet<_>>().len(), 450, "none twice");
        // Requested again in the middle: from there, all get a turn again.
        turn.all(all.len());
        assert_eq!(turn.next(&all)[0].0, "0000");
        turn.take("0199");
        turn.all(all.len());
        let next = turn.next(&all);
        assert_eq!((next.len(), next[0].0.as_str()), (200, "0200"));
        // Containers that are gone get no turn.
        let few = labelled(3);
        assert_eq!(turn.next(&few).len(), 3);
        turn.all(0);
        assert!(!turn.goes_on());
    }

    /// Whatever is inspected runs on `net`.
    async fn docker() -> Docker {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let host = DockerHost::Http(listener.local_addr().unwrap().to_string());
        let networks = r#"{"Networks": {"net": {"IPAddress": "10.0.0.2"}}}"#;
        let body = format!(r#"{{"Name": "/x", "State": {{"Status": "running"}}, "NetworkSettings": {networks}}}"#);
        let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}", body.len());
        tokio::spawn(async move {
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                let _ = stream.read(&mut [0; 4096]).await.unwrap();
                stream.write_all(answer.as_bytes()).await.unwrap();
            }
        });
        Docker::new(host)
    }

    #[tokio::test]
    async fn a_look_inspects_those_whose_turn_it_is_and_the_next_one_the_others() {
        let config = TunnelConfig {
            image: "cloudflare/cloudflared:1".parse().unwrap(),
            pull: Pull::Missing,
            network: "net".to_owned(),
            metrics_network: None,
            container_name: "tunnel".to_owned(),
            on_exit: OnExit::Remove,
            lease: Duration::ZERO,
            options: [].into(),
            host_gateway: true,
            auto_connect: true,
        };
        let (docker, all, mut turn) = (docker().await, labelled(203), Turn::default());
        turn.all(all.len());
        let mut looks = Vec::new();
        while turn.goes_on() && looks.len() < 3 {
            let (mut ids, mut failures) = (Vec::new(), Failures::default());
            let labelled = (&all, &mut turn);
            let judged = |judged: Judged| ids.push(judged.id);
            survey(&docker, &config, &mut Some(false), &[], labelled, &mut failures, judged).await.unwrap().unwrap();
            assert_eq!(failures.first, None);
            looks.push(ids);
        }
        assert_eq!(looks.iter().map(Vec::len).collect::<Vec<_>>(), [200, 3]);
        assert!(looks.into_iter().flatten().eq(all.into_keys()), "each has had its turn, once");
    }
}
