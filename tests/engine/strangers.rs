//! Tests that the agent never touches a stranger's container, even if it takes the tunnel's name in the middle of an
//! operation, on each way to Docker.

use anyhow::{Result, ensure};
use dockflare_dev_master::{DevMaster, Protocol};
use testkit::bollard::query_parameters::RenameContainerOptions;
use testkit::{AgentProcess, Between, Case, PROXY_OPENS, SocketProxy, Spec, case, images, wait_until};

use crate::containers_scene::{Story, Tunnel, registered};
use crate::support::{SOON, Stage, agent_binary};
use crate::visitors::{self, Visitors};

/// The ways to Docker.
const WAYS: [(&str, Between); 3] =
    [("directly", Between::Nothing), ("behind_its_own_proxy", Between::Own), ("behind_a_haproxy", Between::Haproxy)];

pub(crate) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for (way, between) in WAYS {
        let name = |what: &str| format!("{what}_{way}");
        cases.push(case(name("a_stranger_that_takes_the_name_while_the_agent_leaves_is_not_touched"), move || {
            taken_at_the_end(between)
        }));
        cases.push(case(name("a_stranger_that_takes_the_name_during_a_replacement_is_not_touched"), move || {
            taken_during_a_replacement(between)
        }));
        cases.push(case(name("a_tunnel_container_that_was_renamed_by_hand_gets_its_name_back"), move || {
            renamed_by_hand(between)
        }));
        cases.push(case(
            name("one_that_was_renamed_while_another_took_its_name_goes_when_that_one_is_gone"),
            move || renamed_and_replaced(between),
        ));
        cases.push(case(name("a_tunnel_that_was_taken_from_its_network_is_connected_again_at_once"), move || {
            disconnected(between)
        }));
        cases.push(case(name("two_agents_with_one_container_name_do_not_take_it_from_each_other"), move || {
            two_agents(between)
        }));
    }
    cases.extend(testkit::cases![
        a_container_of_an_earlier_version_is_adopted_and_its_successor_says_whose_it_is,
        an_agent_that_is_given_another_id_goes_on_with_its_container,
    ]);
    cases
}

/// Keeps whatever is between an agent and Docker alive.
pub(crate) enum Way {
    None,
    Own(Box<SocketProxy>),
    /// A HAProxy, which lives as long as the scope.
    Haproxy,
}

impl Way {
    /// Makes this stage's agents reach Docker in this way from now on.
    pub(crate) async fn set(stage: &mut Stage, between: Between) -> Result<Self> {
        let (way, url) = match between {
            Between::Nothing => (Self::None, format!("unix://{}", testkit::socket_path())),
            Between::Own => {
                let proxy = SocketProxy::start(&agent_binary(), &stage.env)?;
                let url = proxy.host_url();
                (Self::Own(Box::new(proxy)), url)
            }
            Between::Haproxy => {
                let url = stage.scope.socket_proxy(&PROXY_OPENS).await?.host_url();
                (Self::Haproxy, url)
            }
        };
        stage.set("DOCKER_HOST", url);
        // A stopping agent removes its tunnel, whatever the proxy.
        stage.set("TUNNEL_LEASE_SECONDS", "0");
        Ok(way)
    }

    /// Checks that the agent's own proxy refused none of its requests.
    pub(crate) fn refused_nothing(&self) -> Result<()> {
        if let Self::Own(proxy) = self {
            ensure!(proxy.refusals().is_empty(), "{:#?}", proxy.refusals());
        }
        Ok(())
    }
}

/// Starts an agent with a tunnel that drains for three seconds.
async fn at_work(between: Between) -> Result<(Stage, Way, Tunnel, AgentProcess, String)> {
    let mut stage = Stage::new(Protocol::V2).await?;
    let way = Way::set(&mut stage, between).await?;
    let tunnel = Tunnel::new(&stage, "drain=3000");
    // Not from a state file: the container must carry the agent's id.
    let agent = tunnel.agent(&stage)?;
    tunnel.enrol(&stage, &agent).await?;
    let ours = tunnel.container(&stage).await?.id;
    Ok((stage, way, tunnel, agent, ours))
}

/// Waits for the drain, moves our container out of the way, and starts a stranger under its name. Returns the
/// stranger's id.
async fn takes_the_name(stage: &Stage, story: &Story, ours: &str) -> Result<String> {
    story.until("kill").await?;
    rename(stage, ours, "aside").await?;
    let image = images().workload().await?;
    stage.scope.run(Spec { image: &image, name: &stage.tunnel, ..Spec::default() }).await
}

/// Renames a container to a name of this stage, as `docker rename` does. Returns the new name.
async fn rename(stage: &Stage, container: &str, to: &str) -> Result<String> {
    let name = stage.scope.name(to);
    stage.scope.owns_container(&name);
    let options = RenameContainerOptions { name: name.clone() };
    stage.scope.docker().rename_container(container, options).await?;
    Ok(name)
}

/// Checks that the stranger runs and has never restarted.
async fn is_untouched(stage: &Stage, stranger: &str) -> Result<()> {
    let found = stage.scope.inspect(stranger).await?;
    ensure!(found.name.as_deref() == Some(&format!("/{}", stage.tunnel)), "{:?}", found.name);
    let state = found.state.unwrap_or_default();
    ensure!(state.running == Some(true) && found.restart_count == Some(0), "{state:?}");
    Ok(())
}

async fn taken_at_the_end(between: Between) -> Result<()> {
    let (stage, way, _, mut agent, ours) = at_work(between).await?;
    let story = Story::follow(&stage);
    agent.sigterm()?;
    let stranger = takes_the_name(&stage, &story, &ours).await?;
    assert_eq!(agent.wait_exit(SOON).await?.code(), Some(0));
    is_untouched(&stage, &stranger).await?;
    assert_eq!(stage.scope.status(&ours).await?, "gone", "{}", agent.log());
    way.refused_nothing()
}

async fn taken_during_a_replacement(between: Between) -> Result<()> {
    let (stage, way, tunnel, mut agent, ours) = at_work(between).await?;
    let known = registered(&stage).await?;
    let story = Story::follow(&stage);
    stage.master.push_commands(&known.id, vec![tunnel.restart()])?;
    let stranger = takes_the_name(&stage, &story, &ours).await?;
    agent.wait_for_log("has the name", SOON).await?;
    wait_until("the end of ours", SOON, async || (stage.scope.status(&ours).await.ok()? == "gone").then_some(()))
        .await?;
    is_untouched(&stage, &stranger).await?;
    let next = format!("{}-next", stage.tunnel);
    assert_eq!(stage.scope.status(&next).await?, "running", "the new one serves under the second name");
    agent.sigterm()?;
    assert_eq!(agent.wait_exit(SOON).await?.code(), Some(0));
    is_untouched(&stage, &stranger).await?;
    way.refused_nothing()
}

async fn renamed_by_hand(between: Between) -> Result<()> {
    let mut stage = Stage::new(Protocol::V2).await?;
    let way = Way::set(&mut stage, between).await?;
    let edge = visitors::edge(&stage).await?;
    let tunnel = visitors::tunnel(&stage, &edge, "");
    let agent = tunnel.agent(&stage)?;
    tunnel.enrol(&stage, &agent).await?;
    let mut visitors = Visitors::come(&edge, &tunnel).await?;
    let before = tunnel.container(&stage).await?;
    rename(&stage, &stage.tunnel, "aside").await?;
    agent.wait_for_log("has its own again", SOON).await?;
    assert_eq!(tunnel.container(&stage).await?, before);
    visitors.all_were_served().await?;
    way.refused_nothing()
}

/// While no agent runs, somebody renames our container, starts another one under its name, and removes it later.
async fn renamed_and_replaced(between: Between) -> Result<()> {
    let (stage, way, tunnel, mut agent, ours) = at_work(between).await?;
    agent.sigkill()?;
    agent.wait_exit(SOON).await?;
    let aside = rename(&stage, &ours, "aside").await?;
    let image = images().workload().await?;
    let stranger = stage.scope.run(Spec { image: &image, name: &stage.tunnel, ..Spec::default() }).await?;
    let mut agent = tunnel.agent(&stage)?;
    agent.wait_for_log("has the name", SOON).await?;
    is_untouched(&stage, &stranger).await?;
    assert_eq!(stage.scope.status(&aside).await?, "running", "the only one that serves");
    stage.scope.rm(&stranger).await?;
    wait_until("our container under its name", SOON, async || {
        let found = stage.scope.find(&stage.tunnel).await.ok()??;
        (found.id.as_deref() == Some(&ours)).then_some(())
    })
    .await?;
    tunnel.container(&stage).await?;
    // A container that has another name when the agent stops goes with the agent.
    agent.wait_for_log("has its own again", SOON).await?;
    agent.sigterm()?;
    rename(&stage, &ours, "aside").await?;
    assert_eq!(agent.wait_exit(SOON).await?.code(), Some(0));
    assert_eq!(stage.scope.status(&ours).await?, "gone", "{}", agent.log());
    way.refused_nothing()
}

async fn two_agents(between: Between) -> Result<()> {
    let mut stage = Stage::new(Protocol::V2).await?;
    let way = Way::set(&mut stage, between).await?;
    let tunnel = Tunnel::new(&stage, "");
    let first = tunnel.agent(&stage)?;
    let known = tunnel.enrol(&stage, &first).await?;
    let before = tunnel.container(&stage).await?;

    // Another master, key, folder and tunnel, but the same name.
    let master = DevMaster::builder().protocol(Protocol::V1).start().await?;
    let (key, folder) = (master.generate_key("other"), tempfile::tempdir()?);
    let mut env = stage.env.clone();
    env.retain(|(name, _)| {
        !["DOCKFLARE_MASTER_URL", "DOCKFLARE_API_KEY", "DOCKFLARE_DATA_DIR"].contains(&name.as_str())
    });
    env.push(("DOCKFLARE_MASTER_URL".to_owned(), master.url()));
    env.push(("DOCKFLARE_API_KEY".to_owned(), key));
    env.push(("DOCKFLARE_DATA_DIR".to_owned(), folder.path().display().to_string()));
    let mut second = AgentProcess::spawn(&agent_binary(), &env, folder.path())?;
    let id = master.wait_for("the second agent", SOON, |seen| seen.only_agent().map(|agent| agent.id.clone())).await?;
    let (name, mark) = (stage.scope.name("id-2"), first.mark());
    master.enroll_with(&id, "other", &name, &testkit::token(&name, ""))?;
    let line = second.wait_for_log("has the name", SOON).await?;
    ensure!(line.contains("another agent") && line.contains(&known.id), "it says whose it is: {line}");
    let told = |agent: &dockflare_dev_master::Agent| {
        let status = agent.tunnel_status.as_ref()?;
        (status.status == "error" && status.event["reason"] == "name_taken").then_some(())
    };
    master.wait_for("the second master to be told", SOON, |seen| seen.only_agent().and_then(told)).await?;
    second.sigterm()?;
    assert_eq!(second.wait_exit(SOON).await?.code(), Some(0));
    assert_eq!(tunnel.container(&stage).await?, before, "{}", second.log());
    let log: Vec<_> = first.log().lines().skip(mark).map(str::to_owned).collect();
    ensure!(!log.iter().any(|line| line.contains("replacing")), "{log:#?}");
    stage.tunnel_is("running").await?;
    way.refused_nothing()
}

async fn a_container_of_an_earlier_version_is_adopted_and_its_successor_says_whose_it_is() -> Result<()> {
    let stage = Stage::new(Protocol::V2).await?;
    let tunnel = Tunnel::new(&stage, "");
    // Without an id in its folder, the agent labels its container as earlier versions did.
    let first = tunnel.agent_with_ready_tunnel(&stage).await?;
    let known = registered(&stage).await?;
    let before = tunnel.container(&stage).await?;
    let owner = async || -> Result<Option<String>> {
        let labels = stage.scope.inspect(&stage.tunnel).await?.config.and_then(|config| config.labels);
        Ok(labels.unwrap_or_default().remove("com.dockflare.agent.owner"))
    };
    assert_eq!(owner().await?.as_deref(), Some("dockflare-agent"));
    first.sigkill()?;
    drop(first);
    let second = tunnel.agent(&stage)?;
    second.wait_for_log("tunnel ready", SOON).await?;
    assert_eq!(tunnel.container(&stage).await?, before, "adopted without a touch");
    let mark = second.mark();
    stage.master.push_commands(&known.id, vec![tunnel.restart()])?;
    second.wait_for_log_after(mark, "tunnel ready", SOON).await?;
    tunnel.container(&stage).await?;
    assert_eq!(owner().await?, Some(known.id));
    Ok(())
}

async fn an_agent_that_is_given_another_id_goes_on_with_its_container() -> Result<()> {
    let mut stage = Stage::new(Protocol::V1).await?;
    let tunnel = Tunnel::new(&stage, "");
    let agent = tunnel.agent(&stage)?;
    let known = tunnel.enrol(&stage, &agent).await?;
    let before = tunnel.container(&stage).await?;
    agent.sigkill()?;
    drop(agent);
    // As after a new enrollment: another key, and no id.
    std::fs::remove_file(stage.data.path().join("agent_id.txt"))?;
    let key = stage.master.generate_key("another");
    stage.set("DOCKFLARE_API_KEY", key);
    let second = tunnel.agent(&stage)?;
    second.wait_for_log("registered at the master", SOON).await?;
    second.wait_for_log("tunnel ready", SOON).await?;
    assert_eq!(tunnel.container(&stage).await?, before);
    let id = stage.file("agent_id.txt")?;
    ensure!(id != known.id, "another one");
    let mark = second.mark();
    stage.master.enroll_with(&id, "edge", &tunnel.id, &tunnel.token)?;
    stage.master.push_commands(&id, vec![tunnel.restart()])?;
    second.wait_for_log_after(mark, "tunnel ready", SOON).await?;
    assert_ne!(tunnel.container(&stage).await?, before, "its own is replaced, and no name is taken");
    Ok(())
}

/// Somebody runs `docker network disconnect` on the tunnel container.
async fn disconnected(between: Between) -> Result<()> {
    let mut stage = Stage::new(Protocol::V2).await?;
    let way = Way::set(&mut stage, between).await?;
    let edge = visitors::edge(&stage).await?;
    let tunnel = visitors::tunnel(&stage, &edge, "");
    let agent = tunnel.agent_with_ready_tunnel(&stage).await?;
    let visitors = Visitors::come(&edge, &tunnel).await?;
    stage.tunnel_is("running").await?;
    let before = tunnel.container(&stage).await?;
    let request = testkit::models::NetworkDisconnectRequest { container: before.id.clone(), force: Some(true) };
    let began = std::time::Instant::now();
    stage.scope.docker().disconnect_network(&stage.network, request).await?;
    agent.wait_for_log("had lost its network and is connected to it again", SOON).await?;
    eprintln!("connected again after {:.1?}", began.elapsed());
    assert_eq!(tunnel.container(&stage).await?.id, before.id);
    // If the connections did not survive, this is an outage of the edge like any other.
    visitors.until_connectors(1).await?;
    stage.tunnel_is("running").await?;
    eprintln!("visitors are served after {:.1?}", began.elapsed());
    let requests = stage.master.requests();
    let reasons: Vec<_> = requests.iter().filter_map(|request| request.body["reason"].as_str()).collect();
    ensure!(reasons.contains(&"network_replaced") && !reasons.contains(&"hung"), "{reasons:?}");
    way.refused_nothing()
}
