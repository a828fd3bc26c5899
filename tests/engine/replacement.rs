//! Tests that the agent replaces a connector without a gap, whatever changes, whatever Docker or the edge refuses, and
//! whenever the agent is killed.

use anyhow::{Result, ensure};
use dockflare_dev_master::Protocol;
use testkit::{AgentProcess, Case, case, wait_until};

use crate::containers_scene::{Story, Tunnel, on_both, registered, reported, told, two_more_polls};
use crate::support::relay::{REFUSAL, Relay, Way};
use crate::support::{SOON, Stage, complaints};
use crate::visitors::{self, Visitors};

pub(crate) fn cases() -> Vec<Case> {
    let mut cases = testkit::cases![
        a_successor_whose_token_is_refused_is_removed_and_the_one_before_it_stays,
        after_a_replacement_that_failed_a_stop_says_of_nothing_that_it_works_again,
        a_proxy_that_refuses_a_second_container_has_it_replaced_in_place_and_it_is_said,
        a_proxy_that_refuses_to_rename_costs_no_request_either,
        a_stop_in_the_middle_of_a_replacement_leaves_no_container,
        a_shutdown_in_the_middle_of_a_replacement_leaves_no_container,
        a_stranger_under_the_second_name_is_not_touched,
    ];
    cases.extend(on_both("a_redeploy_loses_no_request", a_redeploy));
    cases.extend(on_both("another_token_loses_no_request", another_token));
    for change in [Change::Image, Change::Network, Change::Option] {
        let name = format!("another_{}_loses_no_request", format!("{change:?}").to_lowercase());
        cases.push(case(name, move || another_setting(change)));
    }
    for moment in Moment::ALL {
        let name = format!("an_agent_killed_{}_loses_no_request_and_the_next_one_finishes", moment.words());
        cases.push(case(name, move || killed(moment)));
    }
    cases
}

fn successor(stage: &Stage) -> String {
    format!("{}-next", stage.tunnel)
}

/// Starts an agent with a tunnel, and visitors that come through it.
async fn visited(stage: &Stage) -> Result<(AgentProcess, Tunnel, Visitors)> {
    let edge = visitors::edge(stage).await?;
    let tunnel = visitors::tunnel(stage, &edge, "");
    let agent = tunnel.enrolled_agent(stage).await?;
    let visitors = Visitors::come(&edge, &tunnel).await?;
    Ok((agent, tunnel, visitors))
}

/// Waits until the tunnel has a new container, the only one, and the agent reports it as running.
pub(crate) async fn replaced(stage: &Stage, tunnel: &Tunnel, before: &str) -> Result<()> {
    wait_until("the replacement", 2 * SOON, async || {
        let now = stage.scope.find(&stage.tunnel).await.ok()??.id?;
        (now != before && stage.scope.status(&successor(stage)).await.ok()? == "gone").then_some(())
    })
    .await?;
    tunnel.container(stage).await?;
    told(stage, "running", None).await.map(drop)
}

async fn a_redeploy(protocol: Protocol) -> Result<()> {
    let stage = Stage::new(protocol).await?;
    let (agent, tunnel, mut visitors) = visited(&stage).await?;
    let (before, known) = (tunnel.container(&stage).await?, registered(&stage).await?);
    let story = Story::follow(&stage);
    stage.master.push_commands(&known.id, vec![tunnel.restart()])?;
    replaced(&stage, &tunnel, &before.id).await?;
    visitors.all_were_served().await?;
    visitors.until_connectors(1).await?;
    assert_eq!(story.exit_codes(), ["0"], "the old one drained");
    // Between the two connectors the agent reported nothing but `running`.
    let requests = stage.master.requests();
    let statuses = requests.iter().filter(|request| request.event() == Some("tunnel_status"));
    let statuses = statuses.skip_while(|status| status.body["status"] != "running");
    let other: Vec<_> = statuses.filter(|status| status.body["status"] != "running").collect();
    assert!(other.is_empty(), "{other:?}");
    assert_eq!(complaints(&agent), Vec::<String>::new(), "{}", agent.log());
    stage.assert_no_violations();
    Ok(())
}

async fn another_token(protocol: Protocol) -> Result<()> {
    let stage = Stage::new(protocol).await?;
    let edge = visitors::edge(&stage).await?;
    let (old, new) = (visitors::tunnel(&stage, &edge, ""), visitors::tunnel(&stage, &edge, "ready-after=1500"));
    let mut agent = old.agent_with_ready_tunnel(&stage).await?;
    agent.plant(&new.token);
    let mut visitors = Visitors::come(&edge, &old).await?;
    let (before, known) = (old.container(&stage).await?, registered(&stage).await?);
    stage.master.enroll_with(&known.id, "edge", &new.id, &new.token)?;
    replaced(&stage, &new, &before.id).await?;
    visitors.all_were_served().await?;
    stage.assert_no_violations();
    Ok(())
}

/// A setting that differs between two runs of the agent.
#[derive(Debug, Clone, Copy)]
enum Change {
    Image,
    Network,
    Option,
}

async fn another_setting(change: Change) -> Result<()> {
    let mut stage = Stage::new(Protocol::V2).await?;
    let (mut first, tunnel, mut visitors) = visited(&stage).await?;
    let before = tunnel.container(&stage).await?;
    first.sigkill()?;
    first.wait_exit(SOON).await?;
    match change {
        Change::Image => {
            let words = [("STAND_IN_VERSION", "2030.1.0")];
            stage.set("CLOUDFLARED_IMAGE", testkit::images().stand_in_with(&words).await?);
        }
        Change::Network => {
            let other = stage.scope.name("other");
            stage.scope.owns_network(&other);
            stage.set("CLOUDFLARED_NETWORK_NAME", other);
        }
        Change::Option => stage.set("CLOUDFLARED_PROTOCOL", "http2"),
    }
    let _second = tunnel.agent(&stage)?;
    replaced(&stage, &tunnel, &before.id).await?;
    visitors.all_were_served().await?;
    Ok(())
}

/// The moment of the agent's death, by Docker's events of the two containers.
#[derive(Debug, Clone, Copy)]
enum Moment {
    Created,
    Started,
    Serving,
    Draining,
    Ended,
    Removed,
    Renamed,
}

impl Moment {
    const ALL: [Self; 7] =
        [Self::Created, Self::Started, Self::Serving, Self::Draining, Self::Ended, Self::Removed, Self::Renamed];

    fn words(self) -> &'static str {
        match self {
            Self::Created => "when_the_successor_is_created",
            Self::Started => "when_the_successor_is_started",
            Self::Serving => "when_both_serve",
            Self::Draining => "while_the_old_one_drains",
            Self::Ended => "when_the_old_one_has_ended",
            Self::Removed => "when_the_old_one_is_removed",
            Self::Renamed => "when_the_successor_has_its_name",
        }
    }

    async fn comes(self, main: &Story, next: &Story, visitors: &Visitors) -> Result<()> {
        let (story, action) = match self {
            Self::Created => (next, "create"),
            Self::Started => (next, "start"),
            Self::Serving => return visitors.until_connectors(2).await,
            Self::Draining => (main, "kill"),
            Self::Ended => (main, "die"),
            Self::Removed => (main, "destroy"),
            Self::Renamed => (main, "rename"),
        };
        story.until(action).await
    }
}

async fn killed(moment: Moment) -> Result<()> {
    let stage = Stage::new(Protocol::V2).await?;
    let (mut first, tunnel, mut visitors) = visited(&stage).await?;
    let (before, known) = (tunnel.container(&stage).await?, registered(&stage).await?);
    let (main, next) = (Story::follow(&stage), Story::follow_named(&stage, &successor(&stage)));
    stage.master.push_commands(&known.id, vec![tunnel.restart()])?;
    moment.comes(&main, &next, &visitors).await?;
    first.sigkill()?;
    first.wait_exit(SOON).await?;
    // Visitors are served without an agent, and after the next one has finished the replacement.
    visitors.all_were_served().await?;
    let _second = tunnel.agent(&stage)?;
    replaced(&stage, &tunnel, &before.id).await?;
    visitors.all_were_served().await?;
    let after = tunnel.container(&stage).await?;
    two_more_polls(&stage).await?;
    assert_eq!(tunnel.container(&stage).await?, after, "done once");
    stage.assert_no_violations();
    Ok(())
}

async fn a_successor_whose_token_is_refused_is_removed_and_the_one_before_it_stays() -> Result<()> {
    let stage = Stage::new(Protocol::V2).await?;
    let (mut agent, tunnel, mut visitors) = visited(&stage).await?;
    let (before, known) = (tunnel.container(&stage).await?, registered(&stage).await?);
    let bad = Tunnel::new(&stage, "unauthorized speed=20");
    agent.plant(&bad.token);
    stage.master.enroll_with(&known.id, "edge", &bad.id, &bad.token)?;
    told(&stage, "running", Some("token_refused")).await?;
    let line = agent.wait_for_log("is not replaced", SOON).await?;
    ensure!(line.contains("WARN") && line.contains("is refused by Cloudflare") && line.contains("stays"), "{line}");
    assert_eq!(stage.scope.status(&successor(&stage)).await?, "gone");
    visitors.all_were_served().await?;
    assert_eq!(tunnel.container(&stage).await?, before);

    // The agent waits for another token, and accepts this one at once.
    stage.master.enroll_with(&known.id, "edge", &tunnel.id, &tunnel.token)?;
    told(&stage, "running", None).await?;
    assert_eq!(tunnel.container(&stage).await?, before);
    visitors.all_were_served().await?;
    stage.assert_no_violations();
    Ok(())
}

async fn after_a_replacement_that_failed_a_stop_says_of_nothing_that_it_works_again() -> Result<()> {
    let mut stage = Stage::new(Protocol::V2).await?;
    let edge = visitors::edge(&stage).await?;
    let tunnel = visitors::tunnel(&stage, &edge, "");
    let mut agent = tunnel.enrolled_agent(&stage).await?;
    let known = registered(&stage).await?;
    let bad = Tunnel::new(&stage, "unauthorized speed=20");
    agent.plant(&bad.token);
    stage.master.enroll_with(&known.id, "edge", &bad.id, &bad.token)?;
    agent.wait_for_log("is not replaced", SOON).await?;
    let stop = async |stage: &Stage| -> Result<()> {
        stage.master.push_commands(&known.id, vec![serde_json::json!({ "action": "stop_tunnel" })])?;
        told(stage, "stopped", None).await?;
        wait_until("the end of the container", SOON, async || {
            (stage.scope.status(&stage.tunnel).await.ok()? == "gone").then_some(())
        })
        .await?;
        two_more_polls(stage).await
    };
    let start = async |stage: &Stage, agent: &AgentProcess| -> Result<()> {
        let mark = agent.mark();
        stage.master.enroll_with(&known.id, "edge", &tunnel.id, &tunnel.token)?;
        agent.wait_for_log_after(mark, "tunnel ready", 2 * SOON).await.map(drop)
    };
    stop(&stage).await?;
    // Nor after a start of a tunnel that had lost the edge.
    start(&stage, &agent).await?;
    edge.leave();
    agent.wait_for_log("has no connection to Cloudflare", 2 * SOON).await?;
    stop(&stage).await?;
    edge.come_back();
    start(&stage, &agent).await?;
    ensure!(!agent.log().contains("works again"), "{}", agent.log());

    // Nor after Docker refused the replacement.
    agent.sigkill()?;
    agent.wait_exit(SOON).await?;
    let relay = Relay::start(Way::Answer { line: "/create?", with: REFUSAL }).await?;
    stage.set("DOCKER_HOST", relay.host_url());
    let agent = tunnel.agent(&stage)?;
    agent.wait_for_log("tunnel ready", SOON).await?;
    stage.master.push_commands(&known.id, vec![tunnel.restart()])?;
    told(&stage, "running", Some("docker_refuses")).await?;
    stop(&stage).await?;
    ensure!(!agent.log().contains("works again"), "{}", agent.log());
    stage.assert_no_violations();
    Ok(())
}

async fn a_proxy_that_refuses_a_second_container_has_it_replaced_in_place_and_it_is_said() -> Result<()> {
    let mut stage = Stage::new(Protocol::V2).await?;
    let relay = Relay::start(Way::Answer { line: "/create?*-next", with: REFUSAL }).await?;
    stage.set("DOCKER_HOST", relay.host_url());
    let tunnel = Tunnel::new(&stage, "");
    let agent = tunnel.agent_with_ready_tunnel(&stage).await?;
    let (before, known) = (tunnel.container(&stage).await?, registered(&stage).await?);
    stage.master.push_commands(&known.id, vec![tunnel.restart()])?;
    let line = agent.wait_for_log("replaced in place", SOON).await?;
    ensure!(line.contains("WARN") && line.contains(&successor(&stage)), "{line}");
    ensure!(line.contains("after an outage they fail until cloudflared itself tries again"), "{line}");
    replaced(&stage, &tunnel, &before.id).await?;
    stage.assert_no_violations();
    Ok(())
}

async fn a_proxy_that_refuses_to_rename_costs_no_request_either() -> Result<()> {
    let mut stage = Stage::new(Protocol::V1).await?;
    let relay = Relay::start(Way::Answer { line: "/rename?", with: REFUSAL }).await?;
    stage.set("DOCKER_HOST", relay.host_url());
    let (agent, tunnel, mut visitors) = visited(&stage).await?;
    let (before, known) = (tunnel.container(&stage).await?, registered(&stage).await?);
    stage.master.push_commands(&known.id, vec![tunnel.restart()])?;
    let line = agent.wait_for_log("refuses to rename", SOON).await?;
    ensure!(line.contains("WARN") && line.contains("one more connector"), "{line}");
    replaced(&stage, &tunnel, &before.id).await?;
    visitors.all_were_served().await?;
    stage.assert_no_violations();
    Ok(())
}

async fn a_stop_in_the_middle_of_a_replacement_leaves_no_container() -> Result<()> {
    let stage = Stage::new(Protocol::V2).await?;
    let (_agent, tunnel, visitors) = visited(&stage).await?;
    let known = registered(&stage).await?;
    stage.master.push_commands(&known.id, vec![tunnel.restart()])?;
    visitors.until_connectors(2).await?;
    stage.master.push_commands(&known.id, vec![serde_json::json!({ "action": "stop_tunnel" })])?;
    reported(&stage, "the stop", |agent| (agent.tunnel_state() == Some("stopped")).then_some(())).await?;
    wait_until("the end of both", SOON, async || {
        let gone = stage.scope.status(&stage.tunnel).await.ok()? == "gone";
        (gone && stage.scope.status(&successor(&stage)).await.ok()? == "gone").then_some(())
    })
    .await?;
    ensure!(tunnel_containers(&stage, &tunnel).await? == 0);
    Ok(())
}

async fn tunnel_containers(stage: &Stage, tunnel: &Tunnel) -> Result<usize> {
    let options = testkit::bollard::query_parameters::ListContainersOptions { all: true, ..Default::default() };
    let all = stage.scope.docker().list_containers(Some(options)).await?;
    let is_one = |labels: &std::collections::HashMap<String, String>| labels.values().any(|value| *value == tunnel.id);
    Ok(all.into_iter().filter(|container| container.labels.as_ref().is_some_and(is_one)).count())
}

async fn a_shutdown_in_the_middle_of_a_replacement_leaves_no_container() -> Result<()> {
    let mut stage = Stage::new(Protocol::V2).await?;
    stage.set("TUNNEL_LEASE_SECONDS", "0");
    let (mut agent, tunnel, visitors) = visited(&stage).await?;
    let known = registered(&stage).await?;
    stage.master.push_commands(&known.id, vec![tunnel.restart()])?;
    visitors.until_connectors(2).await?;
    agent.sigterm()?;
    assert_eq!(agent.wait_exit(SOON).await?.code(), Some(0));
    assert_eq!(tunnel_containers(&stage, &tunnel).await?, 0);
    Ok(())
}

async fn a_stranger_under_the_second_name_is_not_touched() -> Result<()> {
    let stage = Stage::new(Protocol::V1).await?;
    let workload = testkit::images().workload().await?;
    let name = successor(&stage);
    let stranger = stage.scope.run(testkit::Spec { image: &workload, name: &name, ..Default::default() }).await?;
    let tunnel = Tunnel::new(&stage, "");
    let mut agent = tunnel.agent_with_ready_tunnel(&stage).await?;
    let (before, known) = (tunnel.container(&stage).await?, registered(&stage).await?);
    stage.master.push_commands(&known.id, vec![tunnel.restart()])?;
    wait_until("the replacement in place", 2 * SOON, async || {
        (stage.scope.find(&stage.tunnel).await.ok()??.id? != before.id).then_some(())
    })
    .await?;
    tunnel.container(&stage).await?;
    agent.sigterm()?;
    agent.wait_exit(SOON).await?;
    assert_eq!(stage.scope.status(&stranger).await?, "running");
    Ok(())
}
