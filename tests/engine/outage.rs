//! What visitors wait for after an outage of the edge, what becomes of a host that was removed, and of a tunnel
//! container that somebody restarts by hand. The edge, and the connectors that play recordings of cloudflared, are
//! stand-ins.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use dockflare_dev_master::Protocol;
use serde_json::{Value, json};
use testkit::{Case, Edge, Whose, case, note, wait_until};

use crate::containers_scene::{Story, Tunnel, on_both, registered, told};
use crate::support::{SOON, Stage};
use crate::visitors::{self, Visitors};

pub(crate) fn cases() -> Vec<Case> {
    let mut cases = testkit::cases![a_restart_of_the_tunnel_container_by_hand_is_not_cut_in_the_middle,];
    for protocol in ["quic", "http2"] {
        let name = format!("after_an_outage_of_a_minute_over_{protocol}_it_serves_within_twenty_seconds");
        cases.push(case(name, move || after_an_outage(protocol, None)));
        let name = format!("another_tunnel_that_is_ordered_during_an_outage_serves_soon_after_it_over_{protocol}");
        cases.push(case(name, move || after_an_outage(protocol, Some("other"))));
    }
    cases.extend(on_both("a_host_that_was_removed_while_it_was_connected_over_quic_ends", removed_over_quic));
    cases
}

/// An outage that lasts until cloudflared's own pauses are long. Four minutes and more differ in nothing but the time
/// that they take; hours are in the unit tests.
const OUTAGE: Duration = Duration::from_secs(60);
/// From the edge's return to the first visitor.
const SERVED_WITHIN: Duration = Duration::from_secs(20);
/// What the double of the edge, on a machine that is busy with other cases, may add to that.
const BUSY: Duration = Duration::from_secs(10);

/// Shown with `--nocapture`, and if the case fails.
fn measured(text: &str) {
    println!("measured: {text}");
    note("measured", text);
}

/// How long it takes until visitors of this tunnel are led to a connector.
async fn until_visited(edge: &Edge, tunnel: &Tunnel) -> Result<Duration> {
    let began = Instant::now();
    let visited = async || (!edge.connectors(&tunnel.id).is_empty()).then_some(());
    wait_until("a connector for visitors", 3 * SOON, visited).await?;
    Ok(began.elapsed())
}

async fn after_an_outage(protocol: &'static str, order: Option<&str>) -> Result<()> {
    let mut stage = Stage::new(Protocol::V2).await?;
    stage.set("CLOUDFLARED_PROTOCOL", protocol);
    let edge = visitors::edge(&stage).await?;
    let first = visitors::tunnel(&stage, &edge, "");
    let mut agent = first.agent_with_ready_tunnel(&stage).await?;
    let known = registered(&stage).await?;
    edge.leave();
    let began = Instant::now();
    // Where only QUIC may be used, nothing tells the two apart.
    let reason = if protocol == "quic" { "udp_blocked" } else { "edge_unreachable" };
    told(&stage, "degraded", Some(reason)).await?;
    let wanted = match order {
        None => first.clone(),
        Some(name) => {
            let other = visitors::tunnel(&stage, &edge, "");
            agent.plant(&other.token);
            stage.master.enroll_with(&known.id, name, &other.id, &other.token)?;
            // It is carried out with no edge, and told as what runs.
            other.container(&stage).await?;
            other
        }
    };
    wait_until("the end of the outage", 2 * OUTAGE, async || (began.elapsed() >= OUTAGE).then_some(())).await?;
    edge.come_back();
    let took = until_visited(&edge, &wanted).await?;
    measured(&format!(
        "over {protocol}, {order:?}: visitors are led to it {:.1} s after the edge's return",
        took.as_secs_f64()
    ));
    ensure!(took <= SERVED_WITHIN + BUSY, "{took:?}");
    let status = told(&stage, "running", None).await?.tunnel_status.map(|status| status.event).unwrap_or_default();
    assert_eq!(status["tunnel_id"], json!(wanted.id));
    // Whichever was ready first stays, the other one goes.
    wait_until("one container", SOON, async || wanted.container(&stage).await.ok()).await?;
    let lines = agent.log();
    let fresh = lines.lines().filter(|line| line.contains("trying fresh connectors")).count();
    ensure!(fresh <= 2, "{fresh} lines: {lines}");
    stage.assert_no_violations();
    Ok(())
}

async fn removed_over_quic(protocol: Protocol) -> Result<()> {
    let stage = Stage::new(protocol).await?;
    let edge = visitors::edge(&stage).await?;
    let tunnel = visitors::tunnel(&stage, &edge, "");
    let agent = tunnel.agent(&stage)?;
    let known = tunnel.enrol(&stage, &agent).await?;
    // The tunnel is deleted at Cloudflare, and the agent at the master.
    let began = Instant::now();
    edge.refuse(Whose::Tunnel(tunnel.id.clone()));
    stage.master.forget(&known.id)?;
    wait_until("the end of the container", Duration::from_secs(180), async || {
        (stage.scope.status(&stage.tunnel).await.ok()? == "gone").then_some(())
    })
    .await?;
    measured(&format!("a removed host's connector is gone after {:.1} s", began.elapsed().as_secs_f64()));
    ensure!(began.elapsed() <= Duration::from_secs(90) + BUSY, "{:?}", began.elapsed());
    let line = agent.wait_for_log("so the host was removed", SOON).await?;
    ensure!(line.contains("WARN"), "{line}");
    ensure!(agent.log().contains("asking over HTTP/2 why"), "{}", agent.log());
    let state: Value = serde_json::from_str(&stage.file("tunnel_state.json")?)?;
    assert_eq!((&state["token"], &state["desired_state"]), (&json!(null), &json!("stopped")));
    Ok(())
}

async fn a_restart_of_the_tunnel_container_by_hand_is_not_cut_in_the_middle() -> Result<()> {
    let stage = Stage::new(Protocol::V2).await?;
    let edge = visitors::edge(&stage).await?;
    let tunnel = visitors::tunnel(&stage, &edge, "");
    let _agent = tunnel.agent_with_ready_tunnel(&stage).await?;
    let mut visitors = Visitors::come(&edge, &tunnel).await?;
    visitors.all_were_served().await?;
    let (before, story) = (tunnel.container(&stage).await?, Story::follow(&stage));
    stage.scope.restart(&stage.tunnel, 35).await?;
    told(&stage, "running", None).await?;
    visitors.until_connectors(1).await?;
    let after = tunnel.container(&stage).await?;
    ensure!(after.id == before.id && after.started_at != before.started_at, "{before:?} {after:?}");
    assert_eq!((story.count("create"), story.count("destroy")), (0, 0));
    let (failed, served) = visitors.counted();
    measured(&format!("docker restart by hand: {failed} of {} requests failed", failed + served));
    stage.assert_no_violations();
    Ok(())
}
