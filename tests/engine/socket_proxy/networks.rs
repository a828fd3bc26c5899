//! Tests the tunnel's network with the repository's compose file: whatever happens to the network, the agent starts,
//! joins it by itself, and leaves it.

use std::collections::HashMap;
use std::net::IpAddr;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use dockflare_dev_master::Protocol;
use serde_json::json;
use testkit::models::{EndpointSettings, NetworkCreateRequest};
use testkit::{Case, SocketProxy, Spec, case, images, wait_until};

use super::upgrades::{Deployment, project, with_each_generation};
use super::{line, post};
use crate::containers_scene::{Tunnel, registered, told};
use crate::support::{SOON, Stage, agent_binary};

/// The alias that marks each connection made by the agent.
const JOINED: &str = "dockflare-agent-joined";
const OWNER: &str = "com.dockflare.agent.owner";

pub(super) fn cases() -> Vec<Case> {
    let mut cases = with_each_generation(|version, program| {
        let begins = [
            Begins::Absent,
            Begins::MadeByHand,
            Begins::OfAnotherProject,
            Begins::OfFormerFile,
            Begins::Internal,
            Begins::InUse,
        ];
        let starts = begins.into_iter().map(|begins| {
            let program = program.clone();
            let name = format!("compose_{version}_starts_where_the_tunnels_network_is_{}", begins.name());
            case(name, move || starts(program, begins))
        });
        let (stopped, killed) = (program.clone(), program.clone());
        let more = [
            case(
                format!("compose_{version}_starts_again_when_the_network_went_while_the_agent_was_stopped"),
                move || starts_again(stopped),
            ),
            case(format!("compose_{version}_starts_again_with_force_recreate_when_it_went_after_a_kill"), move || {
                starts_after_a_kill(killed)
            }),
        ];
        starts.chain(more).collect()
    });
    cases.extend(testkit::cases![
        a_master_that_only_the_tunnels_network_knows_is_found_with_the_first_request,
        the_agents_own_container_and_no_other_joins_and_leaves_the_tunnels_networks,
        an_agent_in_the_network_of_another_container_connects_nobody_and_says_what_that_costs,
        an_agent_that_is_taken_from_the_network_is_on_it_again,
    ]);
    cases
}

/// The tunnel's network before the first `up`.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Begins {
    Absent,
    MadeByHand,
    OfAnotherProject,
    /// Declared by an earlier version's compose file, in the same project.
    OfFormerFile,
    Internal,
    InUse,
}

impl Begins {
    fn name(self) -> &'static str {
        match self {
            Self::Absent => "absent",
            Self::MadeByHand => "made_by_hand",
            Self::OfAnotherProject => "of_another_project",
            Self::OfFormerFile => "of_a_former_file",
            Self::Internal => "internal",
            Self::InUse => "in_use",
        }
    }

    async fn make(self, stage: &Stage) -> Result<()> {
        if self == Self::Absent {
            return Ok(());
        }
        let mut labels = stage.scope.labels();
        if matches!(self, Self::OfAnotherProject | Self::OfFormerFile) {
            let project = if self == Self::OfFormerFile { project(stage) } else { "another".to_owned() };
            labels.insert("com.docker.compose.network".to_owned(), "tunnel".to_owned());
            labels.insert("com.docker.compose.project".to_owned(), project);
        }
        let request = NetworkCreateRequest {
            name: stage.network.clone(),
            internal: Some(self == Self::Internal),
            labels: Some(labels),
            ..NetworkCreateRequest::default()
        };
        stage.scope.docker().create_network(request).await?;
        if self == Self::InUse {
            stage.scope.run_workload(&[], &[], Some(&stage.network), false).await?;
        }
        Ok(())
    }
}

/// Makes a deployment whose master is at an address of the host that each of this Docker's networks can reach.
async fn deployment(program: PathBuf) -> Result<Deployment> {
    let stage = Stage::new(Protocol::V2).await?;
    let home = stage.scope.name("home");
    stage.scope.create_network(&home).await?;
    let address = gateway(&stage, &home).await?;
    Deployment::with_master_at(stage, program, address).await
}

async fn gateway(stage: &Stage, network: &str) -> Result<IpAddr> {
    let found = stage.scope.docker().inspect_network(network, None).await?;
    let mut ranges = found.ipam.and_then(|ipam| ipam.config).into_iter().flatten();
    Ok(ranges.find_map(|range| range.gateway).context("the network has no gateway")?.parse()?)
}

/// Returns a container's networks, with its names in each.
async fn networks(stage: &Stage, container: &str) -> Result<HashMap<String, Vec<String>>> {
    let found = stage.scope.inspect(container).await?.network_settings.and_then(|settings| settings.networks);
    let names = |place: EndpointSettings| place.aliases.unwrap_or_default();
    Ok(found.unwrap_or_default().into_iter().map(|(name, place)| (name, names(place))).collect())
}

/// Whether the agent itself joined the tunnel's network.
async fn has_joined(stage: &Stage, agent: &str) -> Result<bool> {
    Ok(networks(stage, agent).await?.get(&stage.network).is_some_and(|names| names.iter().any(|name| name == JOINED)))
}

/// Runs `up`, enrolls the agent, and waits until the tunnel runs.
async fn up(deployed: &mut Deployment) -> Result<Tunnel> {
    deployed.compose(&["up", "-d", "--no-build"]).await?;
    let tunnel = Tunnel::new(&deployed.stage, "");
    let known = registered(&deployed.stage).await?;
    deployed.stage.master.enroll_with(&known.id, "edge", &tunnel.id, &tunnel.token)?;
    deployed.is_back().await?;
    ensure!(has_joined(&deployed.stage, &deployed.agent()).await?, "{:?}", deployed.networks_of_agent().await?);
    Ok(tunnel)
}

impl Deployment {
    async fn networks_of_agent(&self) -> Result<HashMap<String, Vec<String>>> {
        networks(&self.stage, &self.agent()).await
    }
}

async fn starts(program: PathBuf, begins: Begins) -> Result<()> {
    let mut deployed = deployment(program).await?;
    begins.make(&deployed.stage).await?;
    up(&mut deployed).await?;
    let stage = &deployed.stage;
    let made = stage.scope.docker().inspect_network(&stage.network, None).await?;
    let is_agents = made.labels.unwrap_or_default().contains_key(OWNER);
    ensure!(is_agents == (begins == Begins::Absent), "made by the agent: {is_agents}");
    // The master knows of the tunnel a moment before the log line appears.
    let log = wait_until("the line", SOON, async || {
        stage.scope.logs(&deployed.agent()).await.ok().filter(|log| log.contains("tunnel ready"))
    })
    .await?;
    let lines = ["joined the network", "registered at the master", "tunnel ready"];
    let at: Vec<_> = lines.iter().map(|words| log.find(words)).collect();
    ensure!(at.iter().all(Option::is_some) && at.is_sorted(), "{at:?}\n{log}");
    ensure!(!log.contains("WARN"), "{log}");
    // The agent asks the connector itself, over the network that they share.
    told(stage, "running", None).await?;
    let status = registered(stage).await?.tunnel_status.context("a status")?;
    ensure!(status.event["ready_connections"].is_number(), "{:#}", status.event);
    stage.assert_no_violations();

    deployed.compose(&["down"]).await?;
    ensure!(deployed.left().await?.is_empty(), "left: {:?}", deployed.left().await?);
    let after = deployed.stage.scope.docker().inspect_network(&deployed.stage.network, None).await?;
    ensure!(after.id == made.id, "the network is another one");
    Ok(())
}

/// Waits until Docker can remove the network, removes it, and makes another one of the same name.
async fn make_anew(stage: &Stage) -> Result<()> {
    wait_until("the network to be let go", SOON, async || {
        stage.scope.docker().remove_network(&stage.network).await.ok()
    })
    .await?;
    stage.scope.create_network(&stage.network).await.map(drop)
}

async fn starts_again(program: PathBuf) -> Result<()> {
    let mut deployed = deployment(program).await?;
    up(&mut deployed).await?;
    for command in [&["start"][..], &["up", "-d", "--no-build"]] {
        deployed.compose(&["stop"]).await?;
        let networks = deployed.networks_of_agent().await?;
        ensure!(!networks.contains_key(&deployed.stage.network), "it has not left: {networks:?}");
        let before = deployed.stage.scope.inspect(&deployed.agent()).await?.id;
        make_anew(&deployed.stage).await?;
        deployed.compose(command).await?;
        deployed.is_back().await?;
        ensure!(has_joined(&deployed.stage, &deployed.agent()).await?);
        ensure!(deployed.stage.scope.inspect(&deployed.agent()).await?.id == before, "the same container");
    }
    deployed.compose(&["down"]).await
}

async fn starts_after_a_kill(program: PathBuf) -> Result<()> {
    let mut deployed = deployment(program).await?;
    up(&mut deployed).await?;
    deployed.compose(&["kill"]).await?;
    ensure!(has_joined(&deployed.stage, &deployed.agent()).await?, "nobody was left to leave");
    deployed.stage.scope.rm(&deployed.stage.tunnel).await?;
    make_anew(&deployed.stage).await?;
    // Docker refuses to start it, as docs/operate.md says.
    let refused = deployed.compose(&["up", "-d", "--no-build"]).await;
    ensure!(refused.is_err(), "Docker starts it all the same: docs/operate.md need not name --force-recreate");
    deployed.compose(&["up", "-d", "--no-build", "--force-recreate"]).await?;
    deployed.is_back().await?;
    ensure!(has_joined(&deployed.stage, &deployed.agent()).await?);
    deployed.compose(&["down"]).await
}

/// Runs a container of the agent's image with direct access to Docker's socket.
async fn contained(stage: &mut Stage, host: testkit::models::HostConfig, network: Option<&str>) -> Result<String> {
    use std::os::unix::fs::MetadataExt;
    stage.set("DOCKFLARE_DATA_DIR", "");
    stage.set("HEALTH_CHECK_PORT", "");
    stage.set("DOCKER_HOST", "");
    let socket = testkit::socket_path();
    let image = images().agent(&agent_binary()).await?;
    let env: Vec<_> = stage.env.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
    let host = testkit::models::HostConfig {
        binds: Some(vec![format!("{socket}:/var/run/docker.sock")]),
        group_add: Some(vec![std::fs::metadata(&socket)?.gid().to_string()]),
        ..host
    };
    stage.scope.run(Spec { image: &image, env: &env, network, host, ..Spec::default() }).await
}

async fn a_master_that_only_the_tunnels_network_knows_is_found_with_the_first_request() -> Result<()> {
    let mut stage = Stage::new(Protocol::V2).await?;
    // The internal network has no route in or out, and only Docker's DNS knows the master's name.
    Begins::Internal.make(&stage).await?;
    let (master, apart) = (stage.scope.name("master"), stage.scope.name("apart"));
    stage.scope.create_network(&apart).await?;
    let image = images().dev_master().await?;
    let args = ["--master-key", "operator", "--key", "only-there:kitchen", "--enroll-new", "edge"];
    let network = Some(stage.network.as_str());
    stage.scope.run(Spec { image: &image, name: &master, args: &args, network, ..Spec::default() }).await?;
    stage.set("DOCKFLARE_MASTER_URL", format!("http://{master}:5000"));
    stage.set("DOCKFLARE_API_KEY", "only-there");
    let id = contained(&mut stage, testkit::models::HostConfig::default(), Some(&apart)).await?;
    wait_until("the tunnel to be ready", SOON, async || {
        stage.scope.logs(&id).await.ok()?.contains("tunnel ready").then_some(())
    })
    .await?;
    let log = stage.scope.logs(&id).await?;
    ensure!(!log.contains("the master cannot be reached"), "{log}");
    ensure!(networks(&stage, &id).await?.len() == 2);
    Ok(())
}

async fn the_agents_own_container_and_no_other_joins_and_leaves_the_tunnels_networks() -> Result<()> {
    let mut stage = Stage::new(Protocol::V2).await?;
    stage.set("AUTO_CONNECT_NETWORKS", "true");
    let (metrics, other) = (stage.scope.name("metrics"), stage.scope.name("other"));
    stage.set("CLOUDFLARED_METRICS_NETWORK", metrics.clone());
    // Before the agent makes it: what was there already is left alone.
    stage.scope.owns_network(&metrics);
    let tunnel = Tunnel::new(&stage, "");
    tunnel.agent_with_ready_tunnel(&stage).await?.sigkill()?;
    let scope = &stage.scope;
    scope.create_network(&other).await?;
    let proxy = SocketProxy::start(&agent_binary(), &stage.env)?;
    let path = proxy.path();
    let image = images().workload().await?;
    let run = async |labels: &[(&str, &str)]| {
        scope.run(Spec { image: &image, labels, network: Some(&other), ..Spec::default() }).await
    };
    let own = run(&[("com.docker.compose.service", "dockflare-agent")]).await?;
    let victim = run(&[("com.docker.compose.service", "web")]).await?;
    let ours = scope.inspect(&stage.tunnel).await?.id.context("an id")?;
    let ask = async |what: &str, network: &str, id: &str| {
        let body = match what {
            "connect" => json!({ "Container": id, "EndpointConfig": { "Aliases": [JOINED] } }),
            _ => json!({ "Container": id }),
        };
        post(&path, &format!("/networks/{network}/{what}"), &body).await
    };
    let refused = async |what: &str, network: &str, id: &str, rule: &str| -> Result<()> {
        let (status, said) = ask(what, network, id).await?;
        ensure!(status == 403 && said.contains(&format!(": {rule}\"")), "{what} {network}: {status} {said}");
        Ok(())
    };
    for network in [&stage.network, &metrics] {
        refused("connect", network, &victim, "owner").await?;
        refused("disconnect", network, &victim, "network_name").await?;
        refused("disconnect", network, &ours, "network_name").await?;
        ensure!(!networks(&stage, &own).await?.contains_key(network));
        let (status, said) = ask("connect", network, &own).await?;
        ensure!(status == 200, "{status} {said}");
        ensure!(networks(&stage, &own).await?[network].iter().any(|name| name == JOINED));
        // The agent sees this connection of its container, but not the container's other networks.
        let (_, seen) = line(&path, &format!("GET /containers/{own}/json")).await?;
        ensure!(seen.contains(network) && seen.contains(JOINED) && !seen.contains(&format!("\"{other}\":")), "{seen}");
        let (status, said) = ask("disconnect", network, &own).await?;
        ensure!(status == 200, "{status} {said}");
        ensure!(!networks(&stage, &own).await?.contains_key(network));
    }
    refused("connect", &metrics, &ours, "endpoint_aliases").await?;
    refused("connect", &other, &own, "network_name").await?;
    // A connection made by hand stays.
    let by_hand = testkit::models::NetworkConnectRequest { container: own.clone(), ..Default::default() };
    scope.docker().connect_network(&stage.network, by_hand).await?;
    refused("disconnect", &stage.network, &own, "network_not_joined").await
}

async fn an_agent_in_the_network_of_another_container_connects_nobody_and_says_what_that_costs() -> Result<()> {
    let mut stage = Stage::new(Protocol::V2).await?;
    let home = stage.scope.name("home");
    stage.scope.create_network(&home).await?;
    let listen = std::net::SocketAddr::new(gateway(&stage, &home).await?, 0);
    stage.master = dockflare_dev_master::DevMaster::builder().listen(listen).start().await?;
    stage.key = stage.master.generate_key("lent");
    stage.set("DOCKFLARE_MASTER_URL", stage.master.url());
    stage.set("DOCKFLARE_API_KEY", stage.key.clone());
    // The agent gets the other container's host name, and the files by which it would recognize its own container.
    let lender = stage.scope.run_workload(&[], &["sleep", "3600000"], Some(&home), false).await?;
    let mode = Some(format!("container:{lender}"));
    let host = testkit::models::HostConfig { network_mode: mode, ..Default::default() };
    let id = contained(&mut stage, host, None).await?;
    registered(&stage).await?;
    let log = stage.scope.logs(&id).await?;
    ensure!(log.contains("uses the network of another container") && log.contains("known there only"), "{log}");
    ensure!(networks(&stage, &lender).await?.len() == 1, "the other one was connected");
    Ok(())
}

async fn an_agent_that_is_taken_from_the_network_is_on_it_again() -> Result<()> {
    let mut stage = Stage::new(Protocol::V2).await?;
    let home = stage.scope.name("home");
    stage.scope.create_network(&home).await?;
    let listen = std::net::SocketAddr::new(gateway(&stage, &home).await?, 0);
    stage.master = dockflare_dev_master::DevMaster::builder().listen(listen).start().await?;
    stage.key = stage.master.generate_key("taken");
    stage.set("DOCKFLARE_MASTER_URL", stage.master.url());
    stage.set("DOCKFLARE_API_KEY", stage.key.clone());
    let id = contained(&mut stage, testkit::models::HostConfig::default(), Some(&home)).await?;
    registered(&stage).await?;
    ensure!(has_joined(&stage, &id).await?);
    let request = testkit::models::NetworkDisconnectRequest { container: id.clone(), force: Some(false) };
    stage.scope.docker().disconnect_network(&stage.network, request).await?;
    wait_until("the agent to be on the network again", 2 * SOON, async || {
        has_joined(&stage, &id).await.ok()?.then_some(())
    })
    .await?;
    stage.scope.stop(&id, 10).await?;
    ensure!(!has_joined(&stage, &id).await?, "it leaves when it is stopped");
    Ok(())
}
