//! Joins and leaves the networks of the agent's own container: the tunnel's, and the metrics network if there is one.
//!
//! Nobody has to declare them for the agent's container. The agent creates missing networks and joins them before its
//! first request to the master, which may be reachable only there. It leaves them at an orderly end, because a
//! container cannot start again if its network was removed and created again meanwhile. Networks that somebody else
//! connected stay connected. The agent stores nothing: Docker records which connections are the agent's own, as for the
//! tunnel container.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::timeout;
use tracing::{debug, info};

use crate::config::TunnelConfig;
use crate::docker::{Docker, DockerError, Endpoint, Inspected, silent};
use crate::health::{is_own, this_container};
use crate::retry::Trouble;

/// Time limit for leaving the networks when the agent ends.
const LEAVE_LIMIT: Duration = Duration::from_secs(3);

/// Why the agent is not on its networks, or does not know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Apart {
    /// The agent has no container that could join; the text says what that means.
    Outside(&'static str),
    /// The agent could be on them and is not; the text says why, as a sentence without its subject.
    Barred(String),
}

const NO_CONTAINER: &str = "the agent runs in no container of this Docker, so it joins no network: names that only containers know lead nowhere here, a master's among them";
const HOST_NETWORK: &str = "the agent uses the host's network, so it joins none: names that only containers know lead nowhere here, a master's among them";
const NOT_SHOWN: &str = "the agent's own container is not shown to it, so it joins no network: unless it is on the tunnel's already, a master that is known there only is not found, whether the tunnel is ready is told late, and no port of a container is tried; call the container dockflare-agent, as docker-compose.yml does";
const LENT: &str = "the agent uses the network of another container, so it joins none itself: unless that one is on the tunnel's, a master that is known there only is not found, whether the tunnel is ready is told late, and no port of a container is tried";

/// What an agent lacks outside of the tunnel's network.
pub(crate) const COST: &str = "a master that is known there only is not found, whether the tunnel is ready is told by Docker's own check alone, up to half a minute late, and no port of a container is tried";

/// See the module documentation.
#[derive(Debug)]
pub(crate) struct Membership {
    docker: Arc<Docker>,
    hostname: Option<String>,
    networks: Vec<Network>,
    trouble: Trouble,
    said: bool,
}

/// A network, and whether to create it as internal, without a way out.
#[derive(Debug)]
struct Network {
    name: String,
    internal: bool,
}

impl Membership {
    /// Creates the membership and does not call Docker yet. `hostname` is the agent's own `HOSTNAME`.
    pub(crate) fn new(docker: Arc<Docker>, hostname: Option<String>, config: &TunnelConfig) -> Self {
        let own = Network { name: config.network.clone(), internal: false };
        let metrics = config.metrics_network.iter().map(|name| Network { name: name.clone(), internal: true });
        let networks = [own].into_iter().chain(metrics).collect();
        Self { docker, hostname, networks, trouble: Trouble::new("the agent"), said: false }
    }

    /// Joins the networks that the agent is not on yet. Logs what prevents it, and the consequences. Cancel-safe: the
    /// next try finds and completes what is half-done.
    ///
    /// # Errors
    /// When Docker is away and nothing is known.
    pub(crate) async fn join(&mut self) -> Result<(), DockerError> {
        let seen = match own(&self.docker, self.hostname.as_deref()).await? {
            Ok(seen) => seen,
            Err(Apart::Outside(sentence)) => {
                if !std::mem::replace(&mut self.said, true) {
                    info!("{sentence}");
                }
                return Ok(());
            }
            Err(Apart::Barred(problem)) => {
                self.trouble.failed(&problem, &format!("going on without: {COST}"));
                return Ok(());
            }
        };
        for network in self.networks.iter().filter(|network| !seen.networks.contains_key(&network.name)) {
            let name = &network.name;
            match self.join_one(&seen, network).await {
                Ok(()) => info!(network = name, "joined the network with the agent's own container"),
                Err(error) if error.is_away() => return Err(error),
                Err(error) => {
                    let problem = format!("is not on the network {name}, since Docker {error}");
                    let next = format!("going on without: {COST}; or run: docker network connect {name} {}", seen.name);
                    self.trouble.failed(&problem, &next);
                    return Ok(());
                }
            }
        }
        self.trouble.ended();
        Ok(())
    }

    async fn join_one(&self, seen: &Inspected, network: &Network) -> Result<(), DockerError> {
        let name = &network.name;
        if self.docker.make_network(name, network.internal).await? {
            info!(network = name, "created the {} network", if network.internal { "metrics" } else { "tunnel" });
        }
        self.docker.connect(name, &seen.id).await
    }

    /// Leaves the networks that the agent has joined, so that its container can start again whatever happens to them.
    pub(crate) async fn leave(self) {
        let left = timeout(LEAVE_LIMIT, self.leave_all()).await.unwrap_or_else(|_| Err(silent()));
        if let Err(error) = left {
            debug!("the agent's container stays on its networks, since Docker {error}");
        }
    }

    async fn leave_all(&self) -> Result<(), DockerError> {
        let Ok(seen) = own(&self.docker, self.hostname.as_deref()).await? else { return Ok(()) };
        for Network { name, .. } in &self.networks {
            if seen.networks.get(name).is_some_and(Endpoint::is_joined) {
                self.docker.disconnect(name, &seen.id).await?;
                info!(network = name, "left the network with the agent's own container");
            }
        }
        Ok(())
    }
}

/// Returns the agent's own container, if it can be connected to a network.
///
/// # Errors
/// When Docker is away.
pub(crate) async fn own(docker: &Docker, hostname: Option<&str>) -> Result<Result<Inspected, Apart>, DockerError> {
    let seen = match this_container(docker, hostname).await {
        Ok(seen) => seen,
        Err(error) if error.is_away() => return Err(error),
        Err(DockerError::Forbidden { .. }) => return Ok(Err(Apart::Outside(NOT_SHOWN))),
        Err(error) => {
            let problem = format!("joins no network, since Docker {error}");
            return Ok(Err(Apart::Barred(problem)));
        }
    };
    Ok(connectable(seen))
}

/// Checks that the container is the agent's and has networks of its own.
fn connectable(seen: Option<Inspected>) -> Result<Inspected, Apart> {
    let seen = seen.ok_or(Apart::Outside(NO_CONTAINER))?;
    match seen.network_mode.as_str() {
        "host" => Err(Apart::Outside(HOST_NETWORK)),
        "none" => Err(Apart::Barred("has no network (network_mode: none) and joins none".to_owned())),
        // A container that uses another's network has that one's host name and files.
        _ if seen.network_mode.starts_with("container:") || !runs_this(&seen) => Err(Apart::Outside(LENT)),
        _ => Ok(seen),
    }
}

/// Whether the container runs this program. The agent's own socket proxy hides the command; then the name decides.
fn runs_this(seen: &Inspected) -> bool {
    let program = seen.command.first().and_then(|word| word.rsplit('/').next());
    is_own(seen) || program == Some(env!("CARGO_PKG_NAME"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_agents_own_container_with_networks_of_its_own_is_connected() {
        let seen = |name: &str, command: &str, mode: &str| Inspected {
            name: name.to_owned(),
            command: vec![command.to_owned()],
            network_mode: mode.to_owned(),
            ..Inspected::blank()
        };
        let outside = |sentence| Some(Apart::Outside(sentence));
        for (seen, expected) in [
            (Some(seen("dockflare-agent", "", "app_default")), None),
            (Some(seen("mine", "/dockflare-agent", "bridge")), None),
            (Some(seen("vpn", "/gluetun-entrypoint", "bridge")), outside(LENT)),
            (Some(seen("dockflare-agent", "", "container:0123")), outside(LENT)),
            (Some(seen("dockflare-agent", "", "host")), outside(HOST_NETWORK)),
            (None, outside(NO_CONTAINER)),
        ] {
            let found = connectable(seen.clone());
            assert_eq!(found.as_ref().err(), expected.as_ref(), "{seen:?}");
        }
        assert!(matches!(connectable(Some(seen("dockflare-agent", "", "none"))), Err(Apart::Barred(_))));
    }
}
