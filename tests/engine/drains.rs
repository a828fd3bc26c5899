//! Tests that a drain lasts as long as configured and that no second signal cuts it, whatever happens to the agent.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use dockflare_dev_master::Protocol;
use testkit::{Case, Edge, wait_until};
use tokio::task::JoinHandle;

use crate::containers_scene::{Story, Tunnel, registered};
use crate::support::{SOON, Stage};
use crate::visitors;

pub(crate) fn cases() -> Vec<Case> {
    testkit::cases![
        a_download_that_is_longer_than_dockers_usual_patience_survives_a_redeploy,
        a_download_that_is_longer_than_the_drain_does_not,
        a_drain_that_an_agent_was_killed_in_is_not_cut_by_the_next_one_while_its_successor_serves,
        a_drain_that_an_agent_was_killed_in_is_not_cut_by_the_end_of_the_next_one,
        a_decommission_that_was_killed_after_its_last_acknowledgement_is_finished_by_the_next_start,
    ]
}

/// Makes a stage with an edge, whose connectors drain for as long as the agent configures.
async fn stage(grace: &str) -> Result<(Stage, Arc<Edge>, Tunnel)> {
    let mut stage = Stage::with_image(Protocol::V2, testkit::images().stand_in().await?).await?;
    stage.set("CLOUDFLARED_GRACE_PERIOD", grace);
    // The tunnel ends with its agent: these tests look at that drain.
    stage.set("TUNNEL_LEASE_SECONDS", "0");
    let edge = visitors::edge(&stage).await?;
    let tunnel = Tunnel::new(&stage, &format!("edge={}", edge.address()));
    Ok((stage, edge, tunnel))
}

/// Starts a visitor's request whose answer takes this long, and returns once the connector has the request.
async fn download(
    stage: &Stage,
    edge: &Arc<Edge>,
    tunnel: &Tunnel,
    takes: Duration,
) -> Result<JoinHandle<Result<String>>> {
    wait_until("a connector", SOON, async || (!edge.connectors(&tunnel.id).is_empty()).then_some(())).await?;
    let (edge, id, path) = (edge.clone(), tunnel.id.clone(), format!("/slow?ms={}", takes.as_millis()));
    let asked = tokio::spawn(async move { edge.ask(&id, &path).await });
    // The request is under way once the connector counts it.
    let address = format!("{}:20241", stage.scope.ip(&stage.tunnel).await?);
    wait_until("the connector to have the request", SOON, async || {
        let page = testkit::http::get(&address, "/metrics").await.ok()?.body;
        page.lines().any(|line| line == "cloudflared_tunnel_concurrent_requests_per_tunnel 1").then_some(())
    })
    .await?;
    Ok(asked)
}

/// With the default drain of 30 s, Docker would kill the connector after 35 s.
async fn a_download_that_is_longer_than_dockers_usual_patience_survives_a_redeploy() -> Result<()> {
    let (stage, edge, tunnel) = stage("90").await?;
    let agent = tunnel.agent_with_ready_tunnel(&stage).await?;
    let config = stage.scope.inspect(&stage.tunnel).await?.config.context("no config")?;
    ensure!(config.stop_timeout == Some(95), "{:?}", config.stop_timeout);
    ensure!(config.env.unwrap_or_default().iter().any(|entry| entry == "TUNNEL_GRACE_PERIOD=90s"));
    let known = registered(&stage).await?;
    let asked = download(&stage, &edge, &tunnel, Duration::from_secs(60)).await?;
    stage.master.push_commands(&known.id, vec![tunnel.restart()])?;
    agent.wait_for_log("waiting for cloudflared to drain its requests", SOON).await?;
    let answer = tokio::time::timeout(3 * SOON, asked).await.context("no answer")??;
    ensure!(answer.is_ok(), "{answer:?}\n{}", agent.log());
    Ok(())
}

async fn a_download_that_is_longer_than_the_drain_does_not() -> Result<()> {
    let (stage, edge, tunnel) = stage("2").await?;
    let mut agent = tunnel.agent_with_ready_tunnel(&stage).await?;
    let asked = download(&stage, &edge, &tunnel, Duration::from_secs(20)).await?;
    let story = Story::follow(&stage);
    agent.sigterm()?;
    ensure!(asked.await?.is_err(), "the drain is over long before");
    ensure!(agent.wait_exit(SOON).await?.code() == Some(0));
    wait_until("the end of the container", SOON, async || (story.count("destroy") == 1).then_some(())).await?;
    assert_eq!(story.exit_codes(), ["0"], "and nobody killed it");
    Ok(())
}

/// Kills an agent while it waits for a drain, with a visitor's request still open. The stand-in's script sets the
/// length of the drain.
async fn killed_in_a_drain() -> Result<(Stage, Arc<Edge>, Tunnel, JoinHandle<Result<String>>, Story, String)> {
    let mut stage = Stage::with_image(Protocol::V2, testkit::images().stand_in().await?).await?;
    stage.set("TUNNEL_LEASE_SECONDS", "0");
    let edge = visitors::edge(&stage).await?;
    let tunnel = Tunnel::new(&stage, &format!("edge={} drain=14000", edge.address()));
    let mut agent = tunnel.agent_with_ready_tunnel(&stage).await?;
    let before = tunnel.container(&stage).await?.id;
    let asked = download(&stage, &edge, &tunnel, Duration::from_secs(12)).await?;
    let story = Story::follow(&stage);
    agent.sigterm()?;
    story.until("kill").await?;
    agent.sigkill()?;
    agent.wait_exit(SOON).await?;
    ensure!(stage.scope.status(&before).await? == "running", "it drains");
    Ok((stage, edge, tunnel, asked, story, before))
}

async fn a_drain_that_an_agent_was_killed_in_is_not_cut_by_the_next_one_while_its_successor_serves() -> Result<()> {
    let (stage, edge, tunnel, asked, story, before) = killed_in_a_drain().await?;
    let agent = tunnel.agent(&stage)?;
    // Visitors have a new connector while the old one still drains.
    wait_until("a connector", SOON, async || (!edge.connectors(&tunnel.id).is_empty()).then_some(())).await?;
    ensure!(stage.scope.status(&before).await? == "running", "it still drains");
    ensure!(edge.ask(&tunnel.id, "/").await.is_ok(), "and the other one serves");
    let answer = tokio::time::timeout(SOON, asked).await.context("no answer")??;
    ensure!(answer.is_ok(), "{answer:?}\n{}", agent.log());
    wait_until("the end of the first one", SOON, async || {
        let now = stage.scope.find(&stage.tunnel).await.ok()??.id?;
        (now != before && stage.scope.status(&before).await.ok()? == "gone").then_some(())
    })
    .await?;
    assert_eq!((story.count("kill"), story.exit_codes()), (1, vec!["0".to_owned()]), "one signal and no more");
    tunnel.container(&stage).await?;
    Ok(())
}

async fn a_drain_that_an_agent_was_killed_in_is_not_cut_by_the_end_of_the_next_one() -> Result<()> {
    let (stage, _edge, tunnel, asked, story, before) = killed_in_a_drain().await?;
    let mut agent = tunnel.agent(&stage)?;
    agent.wait_for_log("registered at the master", SOON).await?;
    agent.sigterm()?;
    let answer = tokio::time::timeout(SOON, asked).await.context("no answer")??;
    ensure!(answer.is_ok(), "{answer:?}\n{}", agent.log());
    assert_eq!(agent.wait_exit(SOON).await?.code(), Some(0));
    assert_eq!(stage.scope.status(&before).await?, "gone");
    let codes = story.exit_codes();
    ensure!(codes.first().is_some_and(|code| code == "0"), "{codes:?}");
    Ok(())
}

async fn a_decommission_that_was_killed_after_its_last_acknowledgement_is_finished_by_the_next_start() -> Result<()> {
    let stage = Stage::new(Protocol::V2).await?;
    let tunnel = Tunnel::new(&stage, "");
    let mut agent = tunnel.agent(&stage)?;
    let known = tunnel.enrol(&stage, &agent).await?;
    agent.sigkill()?;
    agent.wait_exit(SOON).await?;
    // Set up the disk and the Engine as they are after the master has accepted the last acknowledgement.
    stage.scope.stop(&stage.tunnel, 10).await?;
    let state: serde_json::Value = serde_json::from_str(&stage.file("tunnel_state.json")?)?;
    let forgotten = serde_json::json!({
        "token": null, "id": null, "name": null, "desired_state": "stopped", "redeploys": 0, "owners": state["owners"],
    });
    std::fs::write(stage.data.path().join("tunnel_state.json"), forgotten.to_string())?;
    let tombstone = serde_json::json!({
        "schema_version": 1, "operation_id": "o1", "agent_id": known.id, "phase": "finalized",
        "requested_self_action": "stop", "prepared_at": "2026-01-31T10:00:00Z",
        "finalized_at": "2026-01-31T10:00:01Z", "acknowledged": true,
    });
    std::fs::write(stage.data.path().join("decommission.json"), tombstone.to_string())?;
    let mut agent = tunnel.agent(&stage)?;
    agent.wait_for_log("was decommissioned", SOON).await?;
    wait_until("the end of the container", SOON, async || {
        (stage.scope.status(&stage.tunnel).await.ok()? == "gone").then_some(())
    })
    .await?;
    agent.sigterm()?;
    assert_eq!(agent.wait_exit(SOON).await?.code(), Some(0));
    Ok(())
}
