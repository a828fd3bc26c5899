//! Tests cloudflared's metrics on a separate network, where the agent can read them and workloads cannot.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use dockflare_dev_master::Protocol;
use testkit::{Case, SocketProxy, Spec, case, images, wait_until};

use crate::containers_scene::registered;
use crate::replacement::replaced;
use crate::support::{SOON, Stage, agent_binary};
use crate::visitors::{self, Visitors};

pub(crate) fn cases() -> Vec<Case> {
    [(false, "directly"), (true, "behind_the_own_socket_proxy")]
        .map(|(behind, how)| {
            let name = format!("metrics_on_a_network_of_their_own_are_read_by_the_agent_and_no_workload_{how}");
            case(name, move || read_by_the_agent_alone(behind)).limit(Duration::from_secs(180))
        })
        .into()
}

/// Returns the tunnel container's address on a network.
async fn address(stage: &Stage, network: &str) -> Result<String> {
    let seen = stage.scope.inspect(&stage.tunnel).await?;
    let mut networks = seen.network_settings.and_then(|settings| settings.networks).unwrap_or_default();
    let place = networks.remove(network).with_context(|| format!("it is not on {network}"))?;
    place.ip_address.filter(|address| !address.is_empty()).context("no address")
}

/// Whether a workload on the tunnel's network gets an answer from the metrics port at this address. The workload runs
/// the health check's command, which exits with 0 if the tunnel is ready.
async fn is_read_by_a_workload(stage: &Stage, address: &str) -> Result<bool> {
    let (image, metrics) = (images().stand_in().await?, format!("{address}:20241"));
    let args = ["tunnel", "--metrics", &metrics, "ready"];
    let asking = stage.scope.run(Spec { image: &image, args: &args, network: Some(&stage.network), ..Spec::default() });
    let asking = asking.await?;
    // Docker drops requests between isolated networks, so the command would wait for minutes.
    let ended = wait_until("an answer", Duration::from_secs(5), async || {
        let state = stage.scope.inspect(&asking).await.ok()?.state?;
        (state.running == Some(false)).then_some(state.exit_code)
    });
    let code = ended.await.ok().flatten();
    stage.scope.rm(&asking).await?;
    Ok(code == Some(0))
}

/// Checks that no workload can read the metrics at any address, and that Docker's health check and the agent can.
async fn is_private(stage: &Stage, metrics: &str) -> Result<()> {
    for network in [stage.network.as_str(), metrics] {
        let address = address(stage, network).await?;
        ensure!(!is_read_by_a_workload(stage, &address).await?, "{address} on {network} answers a workload");
    }
    let at = format!("{}:20241", address(stage, metrics).await?);
    let page = testkit::http::get(&at, "/ready").await?;
    ensure!(page.status == 200, "{}", page.body);
    wait_until("the health check to be content", 2 * SOON, async || {
        (stage.scope.health(&stage.tunnel).await.ok()? == "healthy").then_some(())
    })
    .await
}

async fn read_by_the_agent_alone(behind: bool) -> Result<()> {
    let mut stage = Stage::new(Protocol::V2).await?;
    let metrics = stage.scope.name("metrics");
    stage.scope.owns_network(&metrics);
    stage.set("DOCKER_HOST", format!("unix://{}", testkit::socket_path()));
    let edge = visitors::edge(&stage).await?;
    let tunnel = visitors::tunnel(&stage, &edge, "");
    let mut first = tunnel.agent_with_ready_tunnel(&stage).await?;
    let mut visitors = Visitors::come(&edge, &tunnel).await?;
    let before = tunnel.container(&stage).await?;
    let open = address(&stage, &stage.network).await?;
    ensure!(is_read_by_a_workload(&stage, &open).await?, "without the setting each workload reads them");
    first.sigkill()?;
    first.wait_exit(SOON).await?;

    stage.set("CLOUDFLARED_METRICS_NETWORK", &metrics);
    let proxy = if behind { Some(SocketProxy::start(&agent_binary(), &stage.env)?) } else { None };
    if let Some(proxy) = &proxy {
        stage.set("DOCKER_HOST", proxy.host_url());
    }
    let agent = tunnel.agent(&stage)?;
    replaced(&stage, &tunnel, &before.id).await?;
    visitors.all_were_served().await?;
    is_private(&stage, &metrics).await?;
    let made = stage.scope.docker().inspect_network(&metrics, None).await?;
    ensure!(made.internal == Some(true), "the agent makes it, and nothing leaves by it");
    // Only the metrics tell how many connections are ready; Docker's health check does not.
    let known = registered(&stage).await?;
    wait_until("the agent to read the page", SOON, async || {
        let told = stage.master.snapshot().only_agent()?.tunnel_status.clone()?;
        (told.event["ready_connections"].as_u64()? > 0 && told.version.as_deref() == Some("2025.9.0")).then_some(())
    })
    .await?;

    // A successor joins the same network, under its own name.
    let second = tunnel.container(&stage).await?;
    stage.master.push_commands(&known.id, vec![tunnel.restart()])?;
    replaced(&stage, &tunnel, &second.id).await?;
    visitors.all_were_served().await?;
    is_private(&stage, &metrics).await?;

    // Off that network, the agent cannot ask the connector any more, and replaces it.
    let third = tunnel.container(&stage).await?;
    let request = testkit::models::NetworkDisconnectRequest { container: third.id.clone(), ..Default::default() };
    stage.scope.docker().disconnect_network(&metrics, request).await?;
    replaced(&stage, &tunnel, &third.id).await?;
    visitors.all_were_served().await?;
    drop(visitors);

    // After a restart Docker may give the connector another address there, and the agent must find it again.
    stage.scope.restart(&stage.tunnel, 10).await?;
    is_private(&stage, &metrics).await?;
    if let Some(proxy) = &proxy {
        ensure!(proxy.refusals().is_empty(), "{:#?}", proxy.refusals());
    }
    ensure!(!agent.log().contains("cannot be connected to"), "{}", agent.log());
    stage.assert_no_violations();
    Ok(())
}
