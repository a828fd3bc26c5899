//! Tests how long visitors wait after an outage of the edge, and what happens to a removed host and to a tunnel
//! container that somebody restarts by hand. The edge and the connectors, which play recordings of cloudflared, are
//! stand-ins.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use dockflare_dev_master::{Agent, Protocol};
use serde_json::{Value, json};
use testkit::{Case, Edge, Via, Whose, case, note, wait_until};

use crate::containers_scene::{Story, Tunnel, on_both, registered, told};
use crate::support::{SOON, Stage};
use crate::visitors::{self, Visitors};

pub(crate) fn cases() -> Vec<Case> {
    let mut cases = testkit::cases![
        a_restart_of_the_tunnel_container_by_hand_is_not_cut_in_the_middle,
        while_one_that_was_told_to_end_by_hand_drains_a_fresh_one_serves,
    ];
    let four_minutes = "after_an_outage_of_four_minutes_it_serves_within_twenty_seconds_also_another_tunnel";
    cases.push(case(four_minutes, after_four_minutes).limit(Duration::from_secs(600)));
    for protocol in ["quic", "http2"] {
        let name = format!("another_tunnel_that_is_ordered_during_an_outage_serves_soon_after_it_over_{protocol}");
        cases.push(case(name, move || after_an_outage(protocol, Some("other"), MINUTE)));
    }
    for (protocol, fault) in [("auto", Fault::Refused), ("quic", Fault::Refused), ("auto", Fault::Blocked)] {
        let name = format!("where_only_quic_is_{fault:?}_under_{protocol}_it_serves_over_http2_and_goes_back");
        cases.push(case(name.to_lowercase(), move || only_quic(protocol, fault)).limit(Duration::from_secs(300)));
    }
    cases.extend(on_both("a_host_that_was_removed_while_it_was_connected_over_quic_ends", removed_over_quic));
    cases
}

/// Outages long enough for cloudflared's back-off to grow. The unit tests cover hours.
const MINUTE: Duration = Duration::from_secs(60);
const FOUR_MINUTES: Duration = Duration::from_secs(240);
/// The limit from the edge's return to the first visitor.
const SERVED_WITHIN: Duration = Duration::from_secs(20);
/// What the stand-in for the edge may add to that on a machine busy with other cases.
const BUSY: Duration = Duration::from_secs(10);

/// Prints a measurement with `--nocapture`, and if the case fails.
fn measured(text: &str) {
    println!("measured: {text}");
    note("measured", text);
}

/// Waits until the edge sends this tunnel's visitors to a connector, and returns how long that took.
async fn until_visited(edge: &Edge, tunnel: &Tunnel) -> Result<Duration> {
    let began = Instant::now();
    let visited = async || (!edge.connectors(&tunnel.id).is_empty()).then_some(());
    wait_until("a connector for visitors", 3 * SOON, visited).await?;
    Ok(began.elapsed())
}

/// Runs the outages in parallel: nearly all of their time is waiting.
async fn after_four_minutes() -> Result<()> {
    let outages = [("quic", None), ("http2", None), ("quic", Some("other"))];
    let outages = outages.map(async |(protocol, order)| {
        after_an_outage(protocol, order, FOUR_MINUTES).await.with_context(|| format!("over {protocol}, {order:?}"))
    });
    futures_util::future::try_join_all(outages).await.map(drop)
}

async fn after_an_outage(protocol: &'static str, order: Option<&str>, length: Duration) -> Result<()> {
    let mut stage = Stage::new(Protocol::V2).await?;
    stage.set("CLOUDFLARED_PROTOCOL", protocol);
    let edge = visitors::edge(&stage).await?;
    let first = visitors::tunnel(&stage, &edge, "");
    let mut agent = first.agent_with_ready_tunnel(&stage).await?;
    let known = registered(&stage).await?;
    edge.leave();
    let began = Instant::now();
    // With QUIC alone the agent cannot tell the two reasons apart.
    let reason = if protocol == "quic" { "udp_blocked" } else { "edge_unreachable" };
    told(&stage, "degraded", Some(reason)).await?;
    let wanted = match order {
        None => first.clone(),
        Some(name) => {
            let other = visitors::tunnel(&stage, &edge, "");
            agent.plant(&other.token);
            stage.master.enroll_with(&known.id, name, &other.id, &other.token)?;
            // The agent carries out the command without an edge, and reports the new tunnel as running.
            other.container(&stage).await?;
            other
        }
    };
    wait_until("the end of the outage", 2 * length, async || (began.elapsed() >= length).then_some(())).await?;
    edge.come_back();
    let took = until_visited(&edge, &wanted).await?;
    measured(&format!(
        "over {protocol}, {order:?}, {} s: visitors are led to it {:.1} s after the edge's return",
        length.as_secs(),
        took.as_secs_f64()
    ));
    ensure!(took <= SERVED_WITHIN + BUSY, "{took:?}");
    let status = told(&stage, "running", None).await?.tunnel_status.map(|status| status.event).unwrap_or_default();
    assert_eq!(status["tunnel_id"], json!(wanted.id));
    // The connector that was ready first stays; the other one goes.
    wait_until("one container", SOON, async || wanted.container(&stage).await.ok()).await?;
    let lines = agent.log();
    let fresh = lines.lines().filter(|line| line.contains("trying fresh connectors")).count();
    ensure!(fresh <= 2, "{fresh} lines: {lines}");
    stage.assert_no_violations();
    Ok(())
}

/// A fault that affects only QUIC.
#[derive(Debug, Clone, Copy)]
enum Fault {
    /// The edge answers, and refuses without a reason.
    Refused,
    /// Nobody answers.
    Blocked,
}

async fn only_quic(protocol: &'static str, fault: Fault) -> Result<()> {
    let mut stage = Stage::new(Protocol::V2).await?;
    stage.set("CLOUDFLARED_PROTOCOL", protocol);
    let edge = visitors::edge(&stage).await?;
    let tunnel = visitors::tunnel(&stage, &edge, "");
    let agent = tunnel.agent(&stage)?;
    let known = tunnel.enrol(&stage, &agent).await?;
    until_visited(&edge, &tunnel).await?;
    let began = Instant::now();
    match fault {
        Fault::Refused => edge.refuse(Whose::Over(Via::Quic)),
        Fault::Blocked => edge.block(Via::Quic),
    }
    let over = |protocol: &'static str| {
        let is_it = move |agent: &Agent| {
            let told = agent.tunnel_status.as_ref()?;
            (told.status == "running" && told.event["protocol"] == protocol).then_some(())
        };
        stage.master.wait_for("the tunnel to run over another protocol", 6 * SOON, move |known| {
            known.only_agent().and_then(is_it)
        })
    };
    if let Fault::Refused = fault {
        told(&stage, "degraded", Some("registration_refused")).await?;
        agent.wait_for_log("asking over HTTP/2 why", SOON).await?;
    }
    over("http2").await?;
    until_visited(&edge, &tunnel).await?;
    measured(&format!(
        "only QUIC {fault:?}, {protocol}: served over HTTP/2 after {:.1} s",
        began.elapsed().as_secs_f64()
    ));
    ensure!(!agent.log().contains("token_refused"), "{}", agent.log());
    let env = async || -> Result<String> {
        let config = stage.scope.inspect(&stage.tunnel).await?.config.context("no config")?;
        let set =
            config.env.unwrap_or_default().into_iter().find(|entry| entry.starts_with("TUNNEL_TRANSPORT_PROTOCOL="));
        Ok(set.unwrap_or_default())
    };
    tunnel.container(&stage).await?;
    assert_eq!(env().await?, "TUNNEL_TRANSPORT_PROTOCOL=http2");

    // A new command starts with the configured protocol. Without one the agent retries QUIC only after half an hour.
    match fault {
        Fault::Refused => edge.accept(Whose::Over(Via::Quic)),
        Fault::Blocked => edge.unblock(Via::Quic),
    }
    let mut visitors = Visitors::come(&edge, &tunnel).await?;
    stage.master.push_commands(&known.id, vec![tunnel.restart()])?;
    over("quic").await?;
    visitors.all_were_served().await?;
    tunnel.container(&stage).await?;
    ensure!(env().await? != "TUNNEL_TRANSPORT_PROTOCOL=http2");
    stage.assert_no_violations();
    Ok(())
}

async fn removed_over_quic(protocol: Protocol) -> Result<()> {
    let stage = Stage::new(protocol).await?;
    let edge = visitors::edge(&stage).await?;
    let tunnel = visitors::tunnel(&stage, &edge, "");
    let agent = tunnel.agent(&stage)?;
    let known = tunnel.enrol(&stage, &agent).await?;
    // An operator deletes the tunnel at Cloudflare, and the agent at the master.
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

/// Docker waits for the drain before it restarts the container. Meanwhile cloudflared accepts no new requests.
async fn while_one_that_was_told_to_end_by_hand_drains_a_fresh_one_serves() -> Result<()> {
    let stage = Stage::new(Protocol::V2).await?;
    let edge = visitors::edge(&stage).await?;
    let tunnel = Tunnel::new(&stage, &format!("edge={}", edge.address()));
    let agent = tunnel.agent_with_ready_tunnel(&stage).await?;
    let mut visitors = Visitors::come(&edge, &tunnel).await?;
    visitors.all_were_served().await?;
    let story = Story::follow(&stage);
    // A visitor waits for a long answer.
    let asked = {
        let (edge, id) = (edge.clone(), tunnel.id.clone());
        tokio::spawn(async move { edge.ask(&id, "/slow?ms=20000").await })
    };
    visitors.all_were_served().await?;
    let (began, before) = (Instant::now(), visitors.counted().0);
    let restarting = stage.scope.restart(&stage.tunnel, 35);
    let served = async {
        visitors.until_connectors(0).await?;
        until_visited(&edge, &tunnel).await?;
        anyhow::Ok((began.elapsed(), visitors.counted()))
    };
    let (restarted, served) = tokio::join!(restarting, served);
    let (took, (failed, _)) = served?;
    measured(&format!(
        "docker restart by hand with a drain of 20 s: served again after {:.1} s, {} requests failed",
        took.as_secs_f64(),
        failed - before
    ));
    // The fresh connector serves without waiting for the old one's drain.
    ensure!(took < Duration::from_secs(15), "{took:?}: {}", agent.log());
    let answer = tokio::time::timeout(SOON, asked).await.context("no answer")??;
    ensure!(answer.is_ok(), "the drain was not cut: {answer:?}");
    // Ignore the result: whether Docker still finds the container to restart depends on who was first.
    drop(restarted);
    told(&stage, "running", None).await?;
    wait_until("one container", 2 * SOON, async || tunnel.container(&stage).await.ok()).await?;
    let after = visitors.counted().0;
    ensure!(after == failed, "{} more failed: {}", after - failed, agent.log());
    ensure!(story.exit_codes().first().is_some_and(|code| code == "0"), "{:?}", story.exit_codes());
    stage.assert_no_violations();
    Ok(())
}
