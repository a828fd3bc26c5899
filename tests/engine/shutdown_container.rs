//! Tests the agent in the image that people run, as PID 1 with only the rights that the compose file gives it.

use std::net::SocketAddr;
use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use dockflare_dev_master::{DevMaster, Protocol};
use testkit::models::{HealthConfig, HostConfig, Mount, MountType, MountVolumeOptions};
use testkit::{Case, Spec, images, wait_until};
use tokio::time::Instant;

use crate::containers_scene::{Story, Tunnel, registered, told};
use crate::support::{SOON, Stage, agent_binary};

pub(crate) fn cases() -> Vec<Case> {
    testkit::cases![
        docker_stop_ends_the_agent_with_0_and_takes_the_tunnel_with_it,
        docker_stop_leaves_the_tunnel_where_it_shall_be_kept,
        docker_stop_waits_for_the_drain_within_dockers_patience,
        an_interrupt_ends_the_agent_in_its_container_as_well,
        a_volume_of_another_owner_is_exit_73_with_the_command_that_mends_it,
        an_invalid_configuration_is_exit_64_in_a_container_as_well,
    ]
}

const SOCKET: &str = "/var/run/docker.sock";
const DATA: &str = "/app/data";

/// An agent in a container with its data in a volume, and a master on this host.
pub(crate) struct Contained {
    pub(crate) stage: Stage,
    pub(crate) tunnel: Tunnel,
    /// The id of the agent's container.
    pub(crate) id: String,
}

impl Contained {
    /// Starts the agent and waits until it reports its tunnel as running.
    async fn with_ready_tunnel(words: &str, settings: &[(&str, &str)]) -> Result<Self> {
        let mut stage = Stage::new(Protocol::V2).await?;
        settings.iter().for_each(|(name, value)| stage.set(name, *value));
        let tunnel = Tunnel::new(&stage, words);
        Self::enrolled(stage, tunnel, None).await
    }

    /// Like [`Contained::with_ready_tunnel`], but in the network namespace of another container on a separate network.
    /// The agent joins no network, and cannot ask cloudflared anything.
    pub(crate) async fn apart_from_its_tunnel() -> Result<Self> {
        let stage = Stage::new(Protocol::V2).await?;
        let (network, tunnel) = (stage.scope.name("apart"), Tunnel::new(&stage, ""));
        stage.scope.create_network(&network).await?;
        Self::enrolled(stage, tunnel, Some(&network)).await
    }

    async fn enrolled(mut stage: Stage, tunnel: Tunnel, apart: Option<&str>) -> Result<Self> {
        let data = volume(&stage, false);
        let id = start(&mut stage, data, apart).await?;
        let contained = Self { stage, tunnel, id };
        let known = registered(&contained.stage).await?;
        let Self { stage, tunnel, .. } = &contained;
        stage.master.enroll_with(&known.id, "edge", &tunnel.id, &tunnel.token)?;
        told(stage, "running", None).await?;
        Ok(contained)
    }

    /// Returns the agent's exit code, and checks that it logged no secret.
    async fn exit_code(&self) -> Result<i64> {
        let log = self.stage.scope.logs(&self.id).await?;
        ensure!(!log.contains(&self.tunnel.token) && !log.contains(&self.stage.key), "the log holds a secret");
        self.stage.scope.inspect(&self.id).await?.state.and_then(|state| state.exit_code).context("no exit code")
    }

    /// Runs `docker stop`, which must end before Docker's time limit.
    async fn stop(&self) -> Result<()> {
        let asked = Instant::now();
        self.stage.scope.stop(&self.id, 10).await?;
        ensure!(asked.elapsed() < Duration::from_secs(10), "Docker had to kill it");
        assert_eq!(self.exit_code().await?, 0);
        Ok(())
    }
}

/// Returns a mount of the stage's data volume. Docker gives a new volume the owner of the image's folder, unless
/// `as_it_is` is set.
fn volume(stage: &Stage, as_it_is: bool) -> Mount {
    Mount {
        target: Some(DATA.to_owned()),
        source: Some(stage.scope.name("data")),
        typ: Some(MountType::VOLUME),
        volume_options: Some(MountVolumeOptions { no_copy: Some(as_it_is), ..Default::default() }),
        ..Default::default()
    }
}

/// Runs the stage's agent in a container on the tunnel's network, or apart on another one. The master listens at the
/// host's address on the tunnel's network.
async fn start(stage: &mut Stage, data: Mount, apart: Option<&str>) -> Result<String> {
    stage.scope.create_network(&stage.network).await?;
    stage.scope.create_volume(&stage.scope.name("data")).await?;
    let network = stage.scope.docker().inspect_network(&stage.network, None).await?;
    let mut ranges = network.ipam.and_then(|ipam| ipam.config).into_iter().flatten();
    let address = ranges.find_map(|range| range.gateway).context("the network has no gateway")?;
    stage.master =
        DevMaster::builder().protocol(Protocol::V2).listen(SocketAddr::new(address.parse()?, 0)).start().await?;
    stage.key = stage.master.generate_key("contained");
    stage.set("DOCKFLARE_MASTER_URL", stage.master.url());
    stage.set("DOCKFLARE_API_KEY", stage.key.clone());
    stage.set("DOCKFLARE_DATA_DIR", "");
    stage.set("HEALTH_CHECK_PORT", "");
    // The container mounts Docker's socket; an address from this host would not work in there.
    stage.set("DOCKER_HOST", "");
    let lender = match apart {
        Some(network) => Some(stage.scope.run_workload(&[], &["sleep", "3600000"], Some(network), false).await?),
        None => None,
    };
    let image = images().agent(&agent_binary()).await?;
    let env: Vec<_> = stage.env.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
    let spec = Spec {
        image: &image,
        env: &env,
        network: lender.is_none().then_some(&stage.network),
        health: Some(HealthConfig { interval: Some(1_000_000_000), ..Default::default() }),
        host: HostConfig {
            network_mode: lender.map(|lender| format!("container:{lender}")),
            binds: Some(vec![format!("{SOCKET}:{SOCKET}")]),
            group_add: Some(vec![std::fs::metadata(SOCKET)?.gid().to_string()]),
            mounts: Some(vec![data]),
            readonly_rootfs: Some(true),
            cap_drop: Some(vec!["ALL".to_owned()]),
            security_opt: Some(vec!["no-new-privileges:true".to_owned()]),
            ..Default::default()
        },
        ..Spec::default()
    };
    stage.scope.run(spec).await
}

async fn docker_stop_ends_the_agent_with_0_and_takes_the_tunnel_with_it() -> Result<()> {
    let contained = Contained::with_ready_tunnel("", &[]).await?;
    let Contained { stage, tunnel, id } = &contained;
    let found = stage.scope.inspect(id).await?;
    assert_eq!(found.config.and_then(|config| config.user).as_deref(), Some("65532:65532"));
    wait_until("Docker to call the agent healthy", SOON, async || {
        (stage.scope.health(id).await.ok()? == "healthy").then_some(())
    })
    .await?;
    contained.stop().await?;
    assert_eq!(stage.scope.status(&stage.tunnel).await?, "gone");
    let before = told(stage, "stopped", Some("agent_stopped")).await?;

    // The volume holds whatever the agent needs to come back.
    stage.scope.start(id).await?;
    let after = told(stage, "running", None).await?;
    assert_eq!((after.id, after.registrations), (before.id, before.registrations + 1));
    tunnel.container(stage).await?;
    contained.stop().await?;
    assert_eq!(stage.scope.status(&stage.tunnel).await?, "gone");
    stage.assert_no_violations();
    Ok(())
}

async fn docker_stop_leaves_the_tunnel_where_it_shall_be_kept() -> Result<()> {
    let contained = Contained::with_ready_tunnel("", &[("TUNNEL_ON_EXIT", "keep")]).await?;
    let Contained { stage, tunnel, id } = &contained;
    let before = tunnel.container(stage).await?;
    contained.stop().await?;
    assert_eq!(tunnel.container(stage).await?, before);
    stage.scope.start(id).await?;
    let what = "the agent to be back";
    stage.master.wait_for(what, SOON, |known| known.only_agent().filter(|a| a.registrations == 2).map(drop)).await?;
    told(stage, "running", None).await?;
    assert_eq!(tunnel.container(stage).await?, before);
    Ok(())
}

async fn docker_stop_waits_for_the_drain_within_dockers_patience() -> Result<()> {
    let contained = Contained::with_ready_tunnel("drain=4000", &[]).await?;
    let Contained { stage, id, .. } = &contained;
    let story = Story::follow(stage);
    contained.stop().await?;
    assert_eq!(stage.scope.status(&stage.tunnel).await?, "gone");
    wait_until("the end of the tunnel", SOON, async || (story.count("destroy") == 1).then_some(())).await?;
    assert_eq!(story.exit_codes(), ["0"], "not killed in the middle");
    ensure!(stage.scope.logs(id).await?.contains("waiting for cloudflared to drain its requests"));
    Ok(())
}

async fn an_interrupt_ends_the_agent_in_its_container_as_well() -> Result<()> {
    let contained = Contained::with_ready_tunnel("", &[]).await?;
    let Contained { stage, id, .. } = &contained;
    stage.scope.kill(id, "SIGINT").await?;
    wait_until("the agent's end", SOON, async || (stage.scope.status(id).await.ok()? == "exited").then_some(()))
        .await?;
    assert_eq!(contained.exit_code().await?, 0);
    assert_eq!(stage.scope.status(&stage.tunnel).await?, "gone");
    Ok(())
}

/// Waits for an agent to end by itself. Returns its exit code and its log.
async fn ended(stage: &Stage, id: &str) -> Result<(i64, String)> {
    let code = wait_until("the agent to end by itself", SOON, async || {
        let state = stage.scope.inspect(id).await.ok()?.state?;
        state.exit_code.filter(|_| state.running == Some(false))
    });
    Ok((code.await?, stage.scope.logs(id).await?))
}

async fn a_volume_of_another_owner_is_exit_73_with_the_command_that_mends_it() -> Result<()> {
    let mut stage = Stage::new(Protocol::V2).await?;
    let data = volume(&stage, true);
    let id = start(&mut stage, data, None).await?;
    let (code, log) = ended(&stage, &id).await?;
    assert_eq!(code, 73, "{log}");
    for said in [DATA, "by uid 65532", "belongs to uid 0", "chown -R 65532"] {
        ensure!(log.contains(said), "nothing is said of {said:?}: {log}");
    }
    assert!(stage.master.requests().is_empty(), "no agent without a memory");
    assert_eq!(stage.scope.status(&stage.tunnel).await?, "gone");
    Ok(())
}

async fn an_invalid_configuration_is_exit_64_in_a_container_as_well() -> Result<()> {
    let mut stage = Stage::new(Protocol::V2).await?;
    stage.set("REPORT_INTERVAL_SECONDS", "1");
    stage.set("TZ", "Mars/Olympus");
    let data = volume(&stage, false);
    let id = start(&mut stage, data, None).await?;
    let (code, log) = ended(&stage, &id).await?;
    assert_eq!(code, 64, "{log}");
    ensure!(log.contains("REPORT_INTERVAL_SECONDS") && log.contains("TZ") && !log.contains(&stage.key), "{log}");
    Ok(())
}
