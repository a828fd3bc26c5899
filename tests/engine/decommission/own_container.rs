//! Tests the agent in a container, which stops itself once its master has decommissioned it.

use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::MetadataExt;

use anyhow::{Context, Result};
use dockflare_dev_master::{DevMaster, Phase};
use testkit::models::{HostConfig, RestartPolicy, RestartPolicyNameEnum};
use testkit::{Case, Scope, Spec, images, wait_until};

use crate::support::{SOON, agent_binary};

pub(super) fn cases() -> Vec<Case> {
    testkit::cases![
        an_agent_that_is_its_compose_service_stops_its_own_container_for_good,
        an_agent_in_a_container_of_some_other_name_idles_and_says_so,
    ]
}

/// The label by which an agent recognizes its own container.
pub(crate) const AS_COMPOSE_SERVICE: &[(&str, &str)] = &[("com.docker.compose.service", "dockflare-agent")];

/// An agent in a container, with its master outside.
pub(crate) struct Contained {
    pub(crate) scope: Scope,
    pub(crate) master: DevMaster,
    id: String,
}

/// Returns this host's address on a network, which containers there can reach.
async fn host_address(scope: &Scope, network: &str) -> Result<IpAddr> {
    let found = scope.docker().inspect_network(network, None).await?;
    let configs = found.ipam.and_then(|ipam| ipam.config).unwrap_or_default();
    let gateway = configs.into_iter().find_map(|config| config.gateway).context("the network has no gateway")?;
    Ok(gateway.parse()?)
}

pub(crate) async fn contained(labels: &[(&str, &str)]) -> Result<Contained> {
    let scope = Scope::new(testkit::docker()?);
    let (tunnel, network) = (scope.name("tunnel"), scope.name("net"));
    scope.create_network(&network).await?;
    scope.owns_container(&tunnel);
    let address = SocketAddr::from((host_address(&scope, &network).await?, 0));
    let master = DevMaster::builder().listen(address).enroll_new("edge").start().await?;
    let image = images().agent(&agent_binary()).await?;
    let stand_in = images().stand_in_with(&[("STAND_IN_DRAIN", "300")]).await?;
    let (url, key) = (master.url(), master.generate_key("test"));
    let name = scope.name("dockflare-agent-like");
    const SOCKET: &str = "/var/run/docker.sock";
    let group = std::fs::metadata(SOCKET)?.gid();
    let id = scope
        .run(Spec {
            image: &image,
            name: &name,
            labels,
            env: &[
                ("DOCKFLARE_MASTER_URL", &url),
                ("DOCKFLARE_API_KEY", &key),
                ("CLOUDFLARED_IMAGE", &stand_in),
                ("CLOUDFLARED_NETWORK_NAME", &network),
                ("TUNNEL_CONTAINER_NAME", &tunnel),
                ("COMMAND_POLL_INTERVAL_SECONDS", "1"),
            ],
            network: Some(&network),
            host: HostConfig {
                binds: Some(vec![format!("{SOCKET}:{SOCKET}")]),
                group_add: Some(vec![group.to_string()]),
                restart_policy: Some(RestartPolicy {
                    name: Some(RestartPolicyNameEnum::UNLESS_STOPPED),
                    maximum_retry_count: None,
                }),
                ..HostConfig::default()
            },
            ..Spec::default()
        })
        .await?;
    Ok(Contained { scope, master, id })
}

impl Contained {
    /// Waits until the agent's tunnel runs, then decommissions the agent.
    pub(crate) async fn leaves(&self) -> Result<dockflare_dev_master::Decommission> {
        let master = &self.master;
        let agent = master.wait_for("the agent", SOON, |known| {
            known.only_agent().filter(|agent| agent.tunnel_state() == Some("running")).cloned()
        });
        let agent = agent.await?;
        master.remove(&agent.id)?;
        let what = "the end of the decommission";
        let done = master.wait_for(what, SOON, |known| {
            known.decommissions.first().filter(|operation| operation.phase == Phase::Completed).cloned()
        });
        done.await
    }
}

async fn an_agent_that_is_its_compose_service_stops_its_own_container_for_good() -> Result<()> {
    let contained = contained(AS_COMPOSE_SERVICE).await?;
    let done = contained.leaves().await?;
    let prepared = done.prepare_ack.context("no acknowledgement")?;
    assert_eq!(prepared["self_stop_capability"], "supported");
    assert!(prepared["agent_image"].is_string(), "{prepared}");
    let Contained { scope, master, id } = &contained;
    wait_until("the agent's container to be down", SOON, async || {
        (scope.status(id).await.ok()? == "exited").then_some(())
    })
    .await?;
    let log = scope.logs(id).await?;
    assert!(log.contains("stopping the agent's own container"), "{log}");
    let found = scope.inspect(id).await?;
    let state = found.state.unwrap_or_default();
    assert_eq!((state.exit_code, found.restart_count), (Some(0), Some(0)), "{log}");
    // Docker reports a container that it will start again as `restarting`, never as `exited`.
    assert_eq!(state.status.map(|status| status.to_string()).as_deref(), Some("exited"));
    assert_eq!(master.violations(), Vec::<String>::new());
    Ok(())
}

async fn an_agent_in_a_container_of_some_other_name_idles_and_says_so() -> Result<()> {
    let contained = contained(&[]).await?;
    let done = contained.leaves().await?;
    assert_eq!(done.prepare_ack.context("no acknowledgement")?["self_stop_capability"], "manual");
    let Contained { scope, master, id } = &contained;
    wait_until("the agent to say that it idles", SOON, async || {
        scope.logs(id).await.ok()?.contains("cannot tell its own container for certain and idles").then_some(())
    })
    .await?;
    assert_eq!(scope.status(id).await?, "running");
    scope.stop(id, 5).await?;
    let state = scope.inspect(id).await?.state.unwrap_or_default();
    assert_eq!(state.exit_code, Some(0));
    assert_eq!(master.violations(), Vec::<String>::new());
    Ok(())
}
