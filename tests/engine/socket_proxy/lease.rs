//! Tests the lease on a tunnel after its agent stops: an agent that comes back takes the tunnel over. If none does, the
//! socket proxy removes it, whatever happens to the proxy in between.

use std::time::Duration;

use anyhow::{Result, ensure};
use dockflare_dev_master::Protocol;
use testkit::{AgentProcess, Case, SocketProxy, wait_until};
use tokio::time::Instant;

use super::line;
use crate::containers_scene::{Story, Tunnel, registered, told};
use crate::support::{SOON, Stage, agent_binary};
use crate::visitors::{self, Visitors};

pub(super) fn cases() -> Vec<Case> {
    testkit::cases![
        an_agent_that_comes_back_takes_the_tunnel_over_and_no_visitor_notices,
        a_tunnel_that_no_agent_comes_back_for_goes_with_its_drain_when_the_lease_ends,
        an_agent_that_is_killed_has_said_nothing_and_nothing_is_removed,
        a_proxy_that_is_killed_during_the_lease_is_followed_by_one_that_goes_on_with_it,
        a_proxy_that_is_asked_to_stop_after_the_agent_takes_the_tunnel_with_it,
        where_no_proxy_answers_the_agent_ends_soon_and_leaves_the_tunnel,
        a_lease_is_for_what_the_agent_made_and_nothing_else,
    ]
}

/// How long an agent may take to stop. For one second of that it stays connected.
const STOPS: Duration = Duration::from_secs(10);

/// Makes a stage with a lease of this many seconds, and a socket proxy for its agents.
async fn held(seconds: u64, words: &str) -> Result<(Stage, SocketProxy, Tunnel)> {
    let mut stage = Stage::new(Protocol::V2).await?;
    stage.set("TUNNEL_LEASE_SECONDS", seconds.to_string());
    let proxy = SocketProxy::start(&agent_binary(), &stage.env)?;
    stage.set("DOCKER_HOST", proxy.host_url());
    let tunnel = Tunnel::new(&stage, words);
    Ok((stage, proxy, tunnel))
}

/// Stops the agent with SIGTERM and waits for its end.
async fn stop(agent: &mut AgentProcess) -> Result<()> {
    agent.sigterm()?;
    ensure!(agent.wait_exit(STOPS).await?.code() == Some(0), "{}", agent.log());
    Ok(())
}

async fn gone(stage: &Stage) -> Result<()> {
    wait_until("the tunnel to be gone", SOON, async || {
        (stage.scope.status(&stage.tunnel).await.ok()? == "gone").then_some(())
    })
    .await
}

async fn an_agent_that_comes_back_takes_the_tunnel_over_and_no_visitor_notices() -> Result<()> {
    let (stage, proxy, _) = held(30, "").await?;
    let edge = visitors::edge(&stage).await?;
    let tunnel = visitors::tunnel(&stage, &edge, "");
    let mut agent = tunnel.agent_with_ready_tunnel(&stage).await?;
    let before = tunnel.container(&stage).await?;
    let mut visitors = Visitors::come(&edge, &tunnel).await?;
    for _ in 0..2 {
        told(&stage, "running", None).await?;
        stop(&mut agent).await?;
        ensure!(agent.log().contains("leaving the tunnel to the socket proxy"), "{}", agent.log());
        ensure!(proxy.path().with_extension("sock.lease").exists(), "it is on disk");
        // Requests by health checks and by people do not count as an agent.
        ensure!(line(&proxy.path(), "GET /_ping").await?.0 == 200);
        ensure!(line(&proxy.path(), "GET /containers/json").await?.0 == 200);
        ensure!(proxy.path().with_extension("sock.lease").exists(), "it lasts");
        visitors.all_were_served().await?;
        agent = tunnel.agent(&stage)?;
        agent.wait_for_log("tunnel ready", SOON).await?;
        ensure!(!proxy.path().with_extension("sock.lease").exists(), "it is over");
    }
    visitors.all_were_served().await?;
    assert_eq!(tunnel.container(&stage).await?, before, "the same start of the same container");
    proxy.process().wait_for_log("an agent is back and takes over the tunnel", SOON).await?;
    let known = registered(&stage).await?;
    ensure!(known.tunnel_state() == Some("running"), "the master is not told of a stop that was none");
    stage.assert_no_violations();
    Ok(())
}

async fn a_tunnel_that_no_agent_comes_back_for_goes_with_its_drain_when_the_lease_ends() -> Result<()> {
    let (stage, proxy, tunnel) = held(2, "drain=2500").await?;
    let mut agent = tunnel.agent_with_ready_tunnel(&stage).await?;
    let story = Story::follow(&stage);
    let asked = Instant::now();
    stop(&mut agent).await?;
    ensure!(asked.elapsed() >= Duration::from_secs(1), "it stays connected for a second");
    assert_eq!(stage.scope.status(&stage.tunnel).await?, "running");
    gone(&stage).await?;
    ensure!(asked.elapsed() >= Duration::from_millis(4500), "it was held and drained: {:?}", asked.elapsed());
    wait_until("the end of the container", SOON, async || (story.count("destroy") == 1).then_some(())).await?;
    assert_eq!(story.exit_codes(), ["0"], "not killed in the middle");
    proxy.process().wait_for_log("no agent came back within the lease", SOON).await?;
    proxy.process().wait_for_log("tunnel stopped and removed", SOON).await?;

    // The next agent makes everything anew.
    let agent = tunnel.agent(&stage)?;
    agent.wait_for_log("tunnel ready", SOON).await?;
    tunnel.container(&stage).await.map(drop)
}

async fn an_agent_that_is_killed_has_said_nothing_and_nothing_is_removed() -> Result<()> {
    let (stage, mut proxy, tunnel) = held(1, "").await?;
    let mut agent = tunnel.agent_with_ready_tunnel(&stage).await?;
    let before = tunnel.container(&stage).await?;
    agent.sigkill()?;
    agent.wait_exit(SOON).await?;
    ensure!(!proxy.path().with_extension("sock.lease").exists());
    proxy.process().sigterm()?;
    ensure!(proxy.process_mut().wait_exit(SOON).await?.code() == Some(0));
    assert_eq!(tunnel.container(&stage).await?, before);

    // A goodbye counts even if the agent is killed after it.
    proxy.restart()?;
    let agent = tunnel.agent(&stage)?;
    agent.wait_for_log("tunnel ready", SOON).await?;
    agent.sigterm()?;
    agent.wait_for_log("leaving the tunnel to the socket proxy", SOON).await?;
    agent.sigkill()?;
    gone(&stage).await
}

async fn a_proxy_that_is_killed_during_the_lease_is_followed_by_one_that_goes_on_with_it() -> Result<()> {
    let (stage, mut proxy, tunnel) = held(4, "drain=2000").await?;
    let mut agent = tunnel.agent_with_ready_tunnel(&stage).await?;
    let story = Story::follow(&stage);
    stop(&mut agent).await?;
    proxy.process().sigkill()?;
    proxy.process_mut().wait_exit(SOON).await?;
    proxy.restart()?;
    proxy.process().wait_for_log("an agent said goodbye before this start", SOON).await?;
    // Kill the proxy once more, during the drain.
    story.until("kill").await?;
    proxy.process().sigkill()?;
    proxy.process_mut().wait_exit(SOON).await?;
    proxy.restart()?;
    gone(&stage).await?;
    assert_eq!(story.exit_codes(), ["0"], "the drain was not cut short");
    wait_until("the lease to be over", SOON, async || {
        (!proxy.path().with_extension("sock.lease").exists()).then_some(())
    })
    .await
}

async fn a_proxy_that_is_asked_to_stop_after_the_agent_takes_the_tunnel_with_it() -> Result<()> {
    let (stage, mut proxy, tunnel) = held(600, "drain=2000").await?;
    let mut agent = tunnel.agent_with_ready_tunnel(&stage).await?;
    let before = tunnel.container(&stage).await?;
    // Agent and proxy stop at the same moment, in both orders: the tunnel must survive.
    for agent_first in [true, false] {
        if agent_first {
            agent.sigterm()?;
            agent.wait_for_log("leaving the tunnel", SOON).await?;
            proxy.process().sigterm()?;
        } else {
            proxy.process().sigterm()?;
            agent.sigterm()?;
        }
        ensure!(proxy.process_mut().wait_exit(SOON).await?.code() == Some(0));
        ensure!(agent.wait_exit(STOPS).await?.code() == Some(0));
        assert_eq!(tunnel.container(&stage).await?, before, "agent first: {agent_first}");
        proxy.restart()?;
        agent = tunnel.agent(&stage)?;
        agent.wait_for_log("tunnel ready", SOON).await?;
        assert_eq!(tunnel.container(&stage).await?, before, "agent first: {agent_first}");
    }
    // Only the proxy is recreated and the agent stays: the tunnel must survive.
    proxy.process().sigterm()?;
    ensure!(proxy.process_mut().wait_exit(SOON).await?.code() == Some(0));
    assert_eq!(tunnel.container(&stage).await?, before);
    proxy.restart()?;
    told(&stage, "running", None).await?;
    // The proxy stops after the agent has ended: the tunnel must end.
    let story = Story::follow(&stage);
    stop(&mut agent).await?;
    assert_eq!(tunnel.container(&stage).await?, before);
    proxy.process().sigterm()?;
    ensure!(proxy.process_mut().wait_exit(SOON).await?.code() == Some(0));
    assert_eq!(stage.scope.status(&stage.tunnel).await?, "gone");
    wait_until("the end of the container", SOON, async || (story.count("destroy") == 1).then_some(())).await?;
    assert_eq!(story.exit_codes(), ["0"], "not killed in the middle");
    ensure!(!proxy.path().with_extension("sock.lease").exists());
    Ok(())
}

async fn where_no_proxy_answers_the_agent_ends_soon_and_leaves_the_tunnel() -> Result<()> {
    let (stage, mut proxy, tunnel) = held(60, "").await?;
    let mut agent = tunnel.agent_with_ready_tunnel(&stage).await?;
    told(&stage, "running", None).await?;
    let before = tunnel.container(&stage).await?;
    proxy.process().sigkill()?;
    proxy.process_mut().wait_exit(SOON).await?;
    let asked = Instant::now();
    stop(&mut agent).await?;
    ensure!(asked.elapsed() < Duration::from_secs(2), "took {:?}", asked.elapsed());
    ensure!(agent.log().contains("the tunnel is left as it is"), "{}", agent.log());
    assert_eq!(tunnel.container(&stage).await?, before);
    Ok(())
}

async fn a_lease_is_for_what_the_agent_made_and_nothing_else() -> Result<()> {
    let (stage, mut proxy, _) = held(1, "").await?;
    let workload = testkit::images().workload().await?;
    let next = format!("{}-next", stage.tunnel);
    for name in [&stage.tunnel, &next] {
        stage.scope.run(testkit::Spec { image: &workload, name, ..Default::default() }).await?;
    }
    // Any client of the socket may say goodbye. The goodbye has its own endpoint and exactly one valid form.
    for (asked, status) in [
        ("POST /dockflare/goodbye", 403),
        ("POST /dockflare/goodbye?lease=0", 403),
        ("POST /dockflare/goodbye?lease=3601", 403),
        ("POST /dockflare/goodbye?lease=1&name=x", 403),
        ("GET /dockflare/goodbye?lease=1", 403),
    ] {
        assert_eq!(line(&proxy.path(), asked).await?.0, status, "{asked}");
    }
    ensure!(!proxy.path().with_extension("sock.lease").exists());
    let mut agent = stage.agent()?;
    registered(&stage).await?;
    stop(&mut agent).await?;
    proxy.process().wait_for_log("no agent came back within the lease", SOON).await?;
    wait_until("the lease to be over", SOON, async || {
        (!proxy.path().with_extension("sock.lease").exists()).then_some(())
    })
    .await?;
    proxy.process().sigterm()?;
    ensure!(proxy.process_mut().wait_exit(SOON).await?.code() == Some(0));
    for name in [&stage.tunnel, &next] {
        assert_eq!(stage.scope.status(name).await?, "running", "somebody else's");
    }
    Ok(())
}
