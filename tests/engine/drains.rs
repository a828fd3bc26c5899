//! Drains: as long as it is configured, and never cut by a second signal, whatever becomes of the agent meanwhile.

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
    ]
}

/// A stage whose connectors drain for as long as the agent tells them, with an edge.
async fn stage(grace: &str) -> Result<(Stage, Arc<Edge>, Tunnel)> {
    let mut stage = Stage::with_image(Protocol::V2, testkit::images().stand_in().await?).await?;
    stage.set("CLOUDFLARED_GRACE_PERIOD", grace);
    let edge = visitors::edge(&stage).await?;
    let tunnel = Tunnel::new(&stage, &format!("edge={}", edge.address()));
    Ok((stage, edge, tunnel))
}

/// A visitor who has just begun to wait for an answer that takes this long.
async fn download(edge: &Arc<Edge>, tunnel: &Tunnel, takes: Duration) -> Result<JoinHandle<Result<String>>> {
    wait_until("a connector", SOON, async || (!edge.connectors(&tunnel.id).is_empty()).then_some(())).await?;
    let (edge, id, path) = (edge.clone(), tunnel.id.clone(), format!("/slow?ms={}", takes.as_millis()));
    let asked = tokio::spawn(async move { edge.ask(&id, &path).await });
    // It is under way once the connector has it.
    tokio::time::sleep(Duration::from_millis(300)).await;
    Ok(asked)
}

/// Docker kills after 35 s where the drain is the usual 30 s.
async fn a_download_that_is_longer_than_dockers_usual_patience_survives_a_redeploy() -> Result<()> {
    let (stage, edge, tunnel) = stage("60").await?;
    let agent = tunnel.agent_with_ready_tunnel(&stage).await?;
    let config = stage.scope.inspect(&stage.tunnel).await?.config.context("no config")?;
    ensure!(config.stop_timeout == Some(65), "{:?}", config.stop_timeout);
    ensure!(config.env.unwrap_or_default().iter().any(|entry| entry == "TUNNEL_GRACE_PERIOD=60s"));
    let known = registered(&stage).await?;
    let asked = download(&edge, &tunnel, Duration::from_secs(44)).await?;
    stage.master.push_commands(&known.id, vec![tunnel.restart()])?;
    agent.wait_for_log("waiting for cloudflared to drain its requests", SOON).await?;
    let answer = tokio::time::timeout(3 * SOON, asked).await.context("no answer")??;
    ensure!(answer.is_ok(), "{answer:?}\n{}", agent.log());
    Ok(())
}

async fn a_download_that_is_longer_than_the_drain_does_not() -> Result<()> {
    let (stage, edge, tunnel) = stage("2").await?;
    let mut agent = tunnel.agent_with_ready_tunnel(&stage).await?;
    let asked = download(&edge, &tunnel, Duration::from_secs(20)).await?;
    let story = Story::follow(&stage);
    agent.sigterm()?;
    ensure!(asked.await?.is_err(), "the drain is over long before");
    ensure!(agent.wait_exit(SOON).await?.code() == Some(0));
    wait_until("the end of the container", SOON, async || (story.count("destroy") == 1).then_some(())).await?;
    assert_eq!(story.exit_codes(), ["0"], "and nobody killed it");
    Ok(())
}
