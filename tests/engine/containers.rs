//! Tests each state in which the agent may find its tunnel container, and each manual change to that container.

use anyhow::{Context, Result, ensure};
use dockflare_dev_master::Protocol;
use serde_json::json;
use testkit::bollard::query_parameters::CreateContainerOptions;
use testkit::{Case, Signal, Spec, case, models, wait_until};

use crate::containers_scene::{Life, Story, Tunnel, on_both, ready_after, reported, setting, told, two_more_polls};
use crate::support::{SOON, Stage};

pub(crate) fn cases() -> Vec<Case> {
    let mut cases = testkit::cases![
        a_running_container_of_ours_with_the_right_spec_is_adopted_untouched,
        a_running_container_is_adopted_after_a_sigkill_though_the_tunnel_would_be_removed_on_exit,
        a_container_in_a_crash_loop_with_the_right_spec_is_left_to_docker_until_another_token_comes,
        a_container_that_crashes_once_is_restarted_by_docker_and_not_replaced,
        a_foreign_container_of_that_name_is_not_touched_and_the_tunnel_comes_when_it_is_gone,
    ];
    for state in [State::Exited, State::Created, State::Paused] {
        cases.push(case(
            format!("{}_container_of_ours_with_the_right_spec_is_made_anew", state.with_article()),
            move || ours_with_the_right_spec_is_made_anew(state),
        ));
    }
    for state in State::ALL {
        cases.push(case(
            format!("{}_container_of_ours_with_another_token_is_replaced", state.with_article()),
            move || ours_with_another_spec_is_replaced(state, Change::Token),
        ));
        cases.push(case(format!("{}_container_of_the_python_agent_is_taken_over", state.with_article()), move || {
            python_agents_container_is_taken_over(state)
        }));
    }
    for change in [Change::Image, Change::Network] {
        cases
            .push(case(format!("a_running_container_of_ours_with_another_{}_is_replaced", change.word()), move || {
                ours_with_another_spec_is_replaced(State::Running, change)
            }));
    }
    for (what, deed) in Deed::ALL {
        let answer = if deed.takes_the_network() { "connected_again" } else { "made_anew" };
        cases.push(case(format!("a_tunnel_{what}_while_the_agent_runs_is_{answer}"), move || {
            done_by_hand_is_put_right(deed)
        }));
    }
    cases.extend(on_both("adoption_is_reported_as_running", adoption_is_reported));
    cases
}

/// A state in which the agent may find a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Running,
    Exited,
    Created,
    Paused,
    Restarting,
}

impl State {
    const ALL: [Self; 5] = [Self::Running, Self::Exited, Self::Created, Self::Paused, Self::Restarting];

    fn word(self) -> String {
        format!("{self:?}").to_lowercase()
    }

    fn with_article(self) -> String {
        format!("{}_{}", if self == Self::Exited { "an" } else { "a" }, self.word())
    }

    /// Returns the stand-in's script for this state.
    fn words(self) -> &'static str {
        if self == Self::Restarting { "exit=7" } else { "" }
    }

    /// Brings the stage's started container into this state.
    async fn bring(self, stage: &Stage) -> Result<()> {
        let (scope, name) = (&stage.scope, &stage.tunnel);
        match self {
            Self::Running => {}
            Self::Exited => scope.stop(name, 0).await?,
            Self::Paused => scope.pause(name).await?,
            Self::Created => create_again_without_starting(stage).await?,
            Self::Restarting => {}
        }
        let status = self.word();
        wait_until(&format!("the container to be {status}"), SOON, async || {
            (scope.status(name).await.ok()? == status).then_some(())
        })
        .await
    }
}

/// Leaves the container as an agent does that is killed between creating and starting it.
async fn create_again_without_starting(stage: &Stage) -> Result<()> {
    let found = stage.scope.inspect(&stage.tunnel).await?;
    stage.scope.rm(&stage.tunnel).await?;
    let mut body = serde_json::to_value(found.config)?;
    body["HostConfig"] = serde_json::to_value(found.host_config)?;
    let body: models::ContainerCreateBody = serde_json::from_value(body)?;
    let options = CreateContainerOptions { name: Some(stage.tunnel.clone()), ..Default::default() };
    stage.scope.docker().create_container(Some(options), body).await?;
    Ok(())
}

async fn a_running_container_of_ours_with_the_right_spec_is_adopted_untouched() -> Result<()> {
    let mut stage = Stage::new(Protocol::V2).await?;
    stage.set("TUNNEL_ON_EXIT", "keep");
    let tunnel = Tunnel::new(&stage, "");
    let mut first = tunnel.agent_with_ready_tunnel(&stage).await?;
    let before = tunnel.container(&stage).await?;
    first.sigterm()?;
    assert_eq!(first.wait_exit(SOON).await?.code(), Some(0));
    let second = tunnel.agent(&stage)?;
    second.wait_for_log("tunnel ready", SOON).await?;
    assert_eq!(tunnel.container(&stage).await?, before);
    Ok(())
}

async fn a_running_container_is_adopted_after_a_sigkill_though_the_tunnel_would_be_removed_on_exit() -> Result<()> {
    let stage = Stage::new(Protocol::V1).await?;
    let tunnel = Tunnel::new(&stage, "");
    let mut first = tunnel.agent_with_ready_tunnel(&stage).await?;
    let before = tunnel.container(&stage).await?;
    first.sigkill()?;
    first.wait_exit(SOON).await?;
    let second = tunnel.agent(&stage)?;
    second.wait_for_log("tunnel ready", SOON).await?;
    two_more_polls(&stage).await?;
    assert_eq!(tunnel.container(&stage).await?, before);
    Ok(())
}

async fn adoption_is_reported(protocol: Protocol) -> Result<()> {
    let stage = Stage::new(protocol).await?;
    let tunnel = Tunnel::new(&stage, "");
    let mut first = tunnel.agent_with_ready_tunnel(&stage).await?;
    stage.tunnel_is("running").await?;
    let before = tunnel.container(&stage).await?;
    first.sigkill()?;
    first.wait_exit(SOON).await?;
    let seen = stage.master.requests().len();
    let _second = tunnel.agent(&stage)?;
    let what = "the adopted tunnel to be reported";
    let is_it = |known: &dockflare_dev_master::Snapshot| {
        let agent = known.only_agent().filter(|agent| agent.registrations == 2)?;
        let later = stage.master.requests().into_iter().skip(seen);
        let status = later.filter(|request| request.event() == Some("tunnel_status")).last()?;
        (status.body["status"] == "running" && status.body["version"] == "2025.9.0").then(|| agent.id.clone())
    };
    stage.master.wait_for(what, SOON, is_it).await?;
    assert_eq!(tunnel.container(&stage).await?, before);
    stage.assert_no_violations();
    Ok(())
}

async fn ours_with_the_right_spec_is_made_anew(state: State) -> Result<()> {
    let stage = Stage::new(Protocol::V2).await?;
    let tunnel = Tunnel::new(&stage, "");
    let mut first = tunnel.agent_with_ready_tunnel(&stage).await?;
    first.sigkill()?;
    first.wait_exit(SOON).await?;
    state.bring(&stage).await?;
    let before = Life::now(&stage).await?;
    let second = tunnel.agent(&stage)?;
    second.wait_for_log("tunnel ready", SOON).await?;
    assert_ne!(tunnel.container(&stage).await?.id, before.id);
    assert_eq!(stage.scope.status(&before.id).await?, "gone");
    Ok(())
}

/// The difference between two runs of the agent.
#[derive(Debug, Clone, Copy)]
enum Change {
    Token,
    Image,
    Network,
}

impl Change {
    fn word(self) -> String {
        format!("{self:?}").to_lowercase()
    }
}

async fn ours_with_another_spec_is_replaced(state: State, change: Change) -> Result<()> {
    let mut stage = Stage::new(Protocol::V2).await?;
    let mut tunnel = Tunnel::new(&stage, state.words());
    tunnel.store(&stage)?;
    let mut first = tunnel.agent(&stage)?;
    // A connector that crashes at once is never ready.
    first.wait_for_log(if state == State::Restarting { "starting the tunnel" } else { "tunnel ready" }, SOON).await?;
    if state == State::Restarting {
        state.bring(&stage).await?;
    }
    first.sigkill()?;
    first.wait_exit(SOON).await?;
    state.bring(&stage).await?;
    let before = Life::now(&stage).await?;
    let mut version = "2025.9.0";
    match change {
        Change::Token => {
            tunnel = Tunnel::new(&stage, "");
            tunnel.store(&stage)?;
        }
        Change::Image => {
            version = "2030.1.0";
            let words = [("STAND_IN_DRAIN", "300"), ("STAND_IN_VERSION", version)];
            stage.set("CLOUDFLARED_IMAGE", testkit::images().stand_in_with(&words).await?);
        }
        Change::Network => {
            let other = stage.scope.name("other");
            stage.scope.owns_network(&other);
            stage.set("CLOUDFLARED_NETWORK_NAME", other);
        }
    }
    let second = tunnel.agent(&stage)?;
    ready_after(&second, "replacing the tunnel container").await?;
    assert_ne!(tunnel.container(&stage).await?.id, before.id);
    assert_eq!(stage.scope.status(&before.id).await?, "gone");
    reported(&stage, "the new container's version", |agent| {
        let status = agent.tunnel_status.as_ref()?;
        (status.status == "running" && status.version.as_deref() == Some(version)).then_some(())
    })
    .await?;
    Ok(())
}

async fn python_agents_container_is_taken_over(state: State) -> Result<()> {
    let stage = Stage::new(Protocol::V1).await?;
    let old = Tunnel::new(&stage, state.words());
    let before = old.python_container(&stage).await?;
    if state != State::Created {
        stage.scope.start(&before).await?;
        state.bring(&stage).await?;
    }
    let tunnel = Tunnel::new(&stage, "");
    tunnel.store(&stage)?;
    let agent = tunnel.agent(&stage)?;
    ready_after(&agent, "taking over the tunnel container of the Python agent").await?;
    assert_ne!(tunnel.container(&stage).await?.id, before);
    assert_eq!(stage.scope.status(&before).await?, "gone");
    Ok(())
}

async fn a_container_in_a_crash_loop_with_the_right_spec_is_left_to_docker_until_another_token_comes() -> Result<()> {
    let stage = Stage::new(Protocol::V1).await?;
    let broken = Tunnel::new(&stage, "exit=7");
    broken.store(&stage)?;
    let mut first = broken.agent(&stage)?;
    told(&stage, "restarting", Some("crash_loop")).await?;
    first.wait_for_log("ends again and again: exit code 7", SOON).await?;
    let before = Life::now(&stage).await?;
    first.sigkill()?;
    first.wait_exit(SOON).await?;
    let second = broken.agent(&stage)?;
    second.wait_for_log("ends again and again: exit code 7", SOON).await?;
    two_more_polls(&stage).await?;
    assert_eq!(Life::now(&stage).await?.id, before.id, "Docker's restart policy is at work already");
    let tunnel = Tunnel::new(&stage, "");
    let known = told(&stage, "restarting", Some("crash_loop")).await?;
    stage.master.push_commands(&known.id, vec![tunnel.start()])?;
    second.wait_for_log("tunnel ready", SOON).await?;
    told(&stage, "running", None).await?;
    assert_ne!(tunnel.container(&stage).await?.id, before.id);
    Ok(())
}

async fn a_container_that_crashes_once_is_restarted_by_docker_and_not_replaced() -> Result<()> {
    let stage = Stage::new(Protocol::V2).await?;
    let tunnel = Tunnel::new(&stage, "");
    let agent = tunnel.agent_with_ready_tunnel(&stage).await?;
    let (before, mark) = (tunnel.container(&stage).await?, agent.mark());
    let story = Story::follow(&stage);
    stage.scope.tell_stand_in(&stage.tunnel, &json!({ "exit": 1 })).await?;
    agent.wait_for_log_after(mark, "tunnel ready", SOON).await?;
    let after = tunnel.container(&stage).await?;
    assert_eq!(after.id, before.id);
    assert_ne!(after.started_at, before.started_at);
    assert_eq!((story.exit_codes(), story.count("create")), (vec!["1".to_owned()], 0));
    Ok(())
}

/// A manual change to the container behind the agent's back.
#[derive(Debug, Clone, Copy)]
enum Deed {
    Removed,
    Stopped,
    Killed,
    Paused,
    CutOff,
    NetworkMadeAnew,
}

impl Deed {
    const ALL: [(&str, Self); 6] = [
        ("removed_by_hand", Self::Removed),
        ("stopped_by_hand", Self::Stopped),
        ("killed_by_hand", Self::Killed),
        ("paused_by_hand", Self::Paused),
        ("disconnected_from_its_network", Self::CutOff),
        ("whose_network_is_made_anew", Self::NetworkMadeAnew),
    ];

    /// Whether the container keeps running and only needs its network back.
    fn takes_the_network(self) -> bool {
        matches!(self, Self::CutOff | Self::NetworkMadeAnew)
    }

    async fn is_done(self, stage: &Stage) -> Result<()> {
        let (scope, name) = (&stage.scope, &stage.tunnel);
        match self {
            Self::Removed => scope.rm(name).await,
            Self::Stopped => scope.stop(name, 10).await,
            Self::Killed => scope.kill(name, "SIGKILL").await,
            Self::Paused => scope.pause(name).await,
            Self::CutOff => cut_off(stage).await,
            Self::NetworkMadeAnew => {
                cut_off(stage).await?;
                scope.remove_network(&stage.network).await?;
                scope.create_network(&stage.network).await.map(drop)
            }
        }
    }
}

async fn cut_off(stage: &Stage) -> Result<()> {
    let request = models::NetworkDisconnectRequest { container: stage.tunnel.clone(), force: Some(true) };
    Ok(stage.scope.docker().disconnect_network(&stage.network, request).await?)
}

async fn done_by_hand_is_put_right(deed: Deed) -> Result<()> {
    let stage = Stage::new(Protocol::V2).await?;
    let tunnel = Tunnel::new(&stage, "");
    let agent = tunnel.agent_with_ready_tunnel(&stage).await?;
    let (before, mark) = (tunnel.container(&stage).await?, agent.mark());
    // Stop the agent meanwhile, so that it does not react halfway through the change: Docker makes two networks of one
    // name if both ask for it.
    agent.signal(Signal::STOP)?;
    deed.is_done(&stage).await?;
    agent.signal(Signal::CONT)?;
    let answer = if deed.takes_the_network() { "is connected to it again container=" } else { "tunnel ready" };
    agent.wait_for_log_after(mark, answer, SOON).await?;
    let after = tunnel.container(&stage).await?;
    if deed.takes_the_network() {
        assert_eq!(after, before, "neither made anew nor restarted");
    } else {
        assert_ne!(after.id, before.id);
        assert_eq!(stage.scope.status(&before.id).await?, "gone");
    }
    let network = stage.scope.docker().inspect_network(&stage.network, None).await?;
    let members = network.containers.unwrap_or_default();
    assert!(members.contains_key(&after.id), "it is on the network as that is now: {members:#?}");
    told(&stage, "running", None).await?;
    two_more_polls(&stage).await?;
    assert_eq!(tunnel.container(&stage).await?, after, "put right once");
    stage.assert_no_violations();
    Ok(())
}

async fn a_foreign_container_of_that_name_is_not_touched_and_the_tunnel_comes_when_it_is_gone() -> Result<()> {
    let stage = Stage::new(Protocol::V2).await?;
    let workload = testkit::images().workload().await?;
    let foreign = stage.scope.run(Spec { image: &workload, name: &stage.tunnel, ..Spec::default() }).await?;
    let before = Life::now(&stage).await?;
    let tunnel = Tunnel::new(&stage, "");
    tunnel.store(&stage)?;
    let mut agent = tunnel.agent(&stage)?;
    let line = agent.wait_for_log("is not the agent's has the name", SOON).await?;
    ensure!(line.contains(&stage.tunnel) && line.contains("docker rm"), "{line}");
    told(&stage, "error", Some("name_taken")).await?;
    agent.sigterm()?;
    assert_eq!(agent.wait_exit(SOON).await?.code(), Some(0));
    assert_eq!(Life::now(&stage).await?, before, "not removed with the agent either");

    let agent = tunnel.agent(&stage)?;
    two_more_polls(&stage).await?;
    agent.wait_for_log("is not the agent's", SOON).await?;
    assert_eq!(Life::now(&stage).await?, before);
    stage.scope.rm(&foreign).await?;
    agent.wait_for_log("tunnel ready", SOON).await?;
    told(&stage, "running", None).await?;
    tunnel.container(&stage).await?;
    let said = agent.log().lines().filter(|line| line.contains("is not the agent's")).count();
    assert_eq!(said, 1, "a state that lasts is said once");
    let name = setting(&stage, "TUNNEL_CONTAINER_NAME");
    stage.scope.find(&name).await?.context("the tunnel's container")?;
    Ok(())
}
