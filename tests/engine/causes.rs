//! Tests each cause of a tunnel that is down: what the master and the log learn, and what the agent does about it.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use dockflare_dev_master::{Agent, Protocol};
use serde_json::{Value, json};
use testkit::{AgentProcess, Case, Whose, case, models, wait_until};

use crate::containers_scene::{Life, Story, Tunnel, on_both, registered, reported, told, two_more_polls};
use crate::shutdown_container::Contained;
use crate::support::{SOON, Stage, complaints};
use crate::visitors::{self, Visitors};

pub(crate) fn cases() -> Vec<Case> {
    let mut cases = testkit::cases![
        a_token_that_cloudflare_refuses_is_an_error_and_its_connector_is_not_restarted,
        without_dns_it_is_left_to_docker_and_the_remedy_is_told,
        one_that_has_lost_the_edge_is_followed_by_a_fresh_one_that_finds_it,
        where_only_quic_is_allowed_and_udp_is_blocked_the_remedy_is_told,
        where_udp_is_blocked_it_falls_back_and_the_protocol_is_told,
        one_that_hangs_is_restarted_exactly_once,
        one_that_the_kernel_ended_for_want_of_memory_is_told_so,
        the_options_of_the_connector_reach_it,
        a_status_tells_what_the_connector_says_of_itself_and_what_it_carried,
        a_refused_token_alone_and_an_unknown_agent_alone_change_nothing,
    ];
    let by_docker = "an_agent_that_cannot_ask_cloudflared_goes_by_dockers_check_and_restarts_what_hangs";
    cases.push(case(by_docker, by_dockers_check).limit(Duration::from_secs(900)));
    for way in &WAYS {
        let name = format!("{}_is_told_as_{}_and_never_as_anything_else", way.what, way.reason);
        cases.push(case(name, move || told_apart(way)));
    }
    for (protocol, reason) in [("quic", "registration_refused"), ("http2", "token_refused")] {
        let name =
            format!("an_edge_that_refuses_what_was_connected_over_{protocol}_is_told_as_{reason}_until_it_takes_it");
        cases.push(case(name, move || refused_later(protocol, reason)));
    }
    cases.extend(on_both("a_host_that_was_removed_does_not_linger", removed_host));
    cases
}

/// Longer than a connector's time to start, the time until the agent acts on a hang, and three failures of Docker's
/// health check. Docker starts each check 15 s after the end of the one before, which takes long on a busy machine.
const PATIENCE: Duration = Duration::from_secs(180);

/// Like [`told`], but waits longer.
async fn told_late(stage: &Stage, status: &str, reason: Option<&str>) -> Result<Agent> {
    let is_it = |agent: &&Agent| {
        let told = agent.tunnel_status.as_ref();
        told.is_some_and(|told| told.status == status && told.event["reason"].as_str() == reason)
    };
    let what = format!("the tunnel to be reported as {status} because of {reason:?}");
    stage.master.wait_for(&what, PATIENCE, |known| known.only_agent().filter(is_it).cloned()).await
}

/// A failure from the first start on, at the pace of a recording of the real cloudflared.
struct Way {
    what: &'static str,
    words: &'static str,
    protocol: &'static str,
    status: &'static str,
    reason: &'static str,
    /// What the log says about it, and the remedy that the log names.
    log: [&'static str; 2],
}

const WAYS: [Way; 7] = [
    Way {
        what: "a_refusal_over_quic",
        words: "unauthorized",
        protocol: "quic",
        status: "degraded",
        reason: "registration_refused",
        log: ["refuses its registration without a reason", "redeploy or enrol"],
    },
    Way {
        what: "a_refusal_over_quic_at_which_an_old_cloudflared_ends_in_a_loop",
        words: "unauthorized version=2025.4.0",
        protocol: "quic",
        status: "degraded",
        reason: "registration_refused",
        log: ["refuses its registration without a reason", "redeploy or enrol"],
    },
    Way {
        what: "an_error_of_the_edge",
        words: "edge-error",
        protocol: "http2",
        status: "degraded",
        reason: "edge_error",
        log: ["which cannot register it", "cloudflarestatus"],
    },
    Way {
        what: "an_edge_that_never_answers_a_registration",
        words: "unanswered",
        protocol: "quic",
        status: "degraded",
        reason: "edge_error",
        log: ["which cannot register it", "cloudflarestatus"],
    },
    Way {
        what: "a_certificate_that_is_not_valid",
        words: "clock-wrong",
        protocol: "auto",
        status: "error",
        reason: "edge_untrusted",
        log: ["does not trust the certificate", "clock of the host"],
    },
    Way {
        what: "a_token_file_that_is_not_there",
        words: "token-file-missing",
        protocol: "auto",
        status: "restarting",
        reason: "token_file",
        log: ["cannot read its token file", "docker logs"],
    },
    Way {
        what: "a_port_that_is_taken",
        words: "metrics-port-taken",
        protocol: "auto",
        status: "restarting",
        reason: "metrics_port_taken",
        log: ["port of its metrics is taken", "what else listens"],
    },
];

/// Turns on the agent's health page on a free port and returns its address.
fn with_page(stage: &mut Stage) -> Result<String> {
    let port = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
    stage.set("HEALTH_CHECK_PORT", port.to_string());
    stage.set("HEALTH_CHECK_BIND", "127.0.0.1");
    Ok(format!("127.0.0.1:{port}"))
}

/// Returns the acceptable reasons. Over QUIC the edge gives no reason for a refusal; a try over HTTP/2 confirms it.
fn names(reason: &str) -> Vec<&str> {
    let certain = (reason == "registration_refused").then_some("token_refused");
    [reason].into_iter().chain(certain).collect()
}

/// Waits until the health page shows this reason.
async fn shown(address: &str, reason: &str) -> Result<()> {
    let mut last = Value::Null;
    let shown = wait_until("the page", SOON, async || {
        last = serde_json::from_str(&testkit::http::get(address, "/health").await.ok()?.body).ok()?;
        names(reason).contains(&last["tunnel"]["reason"].as_str()?).then_some(())
    });
    let shown = shown.await;
    shown.with_context(|| format!("the page says {last:#}"))
}

/// Returns the reasons reported to the master, in order and without repetitions; `None` for a status without one.
fn reasons(stage: &Stage) -> Vec<Option<String>> {
    let requests = stage.master.requests();
    let statuses = requests.iter().filter(|request| request.event() == Some("tunnel_status"));
    let mut reasons: Vec<_> = statuses.map(|status| status.body["reason"].as_str().map(str::to_owned)).collect();
    reasons.dedup();
    reasons
}

/// Checks that the master received only that reason and that the log warns of nothing else.
fn nothing_else(stage: &Stage, agent: &AgentProcess, reason: &str, sentence: &str) -> Result<()> {
    let told = reasons(stage);
    let is_it = |told: &String| names(reason).contains(&told.as_str());
    ensure!(told.iter().flatten().all(is_it), "the master was told {told:?}\n{}", agent.log());
    ensure!(told.iter().flatten().next().is_some_and(|first| first == reason), "{told:?}");
    let warned = complaints(agent);
    let of_tunnel = |line: &&String| line.contains("the tunnel ");
    let is_certain = |line: &String| names(reason).len() > 1 && line.contains("the tunnel is refused by Cloudflare");
    let is_other = |line: &&String| !line.contains(sentence) && !is_certain(line);
    let other: Vec<_> = warned.iter().filter(of_tunnel).filter(is_other).collect();
    ensure!(other.is_empty(), "{other:#?}");
    Ok(())
}

async fn told_apart(way: &Way) -> Result<()> {
    let mut stage = Stage::new(Protocol::V2).await?;
    stage.set("CLOUDFLARED_PROTOCOL", way.protocol);
    let address = with_page(&mut stage)?;
    let tunnel = Tunnel::new(&stage, way.words);
    tunnel.store(&stage)?;
    let agent = tunnel.agent(&stage)?;
    told_late(&stage, way.status, Some(way.reason)).await?;
    shown(&address, way.reason).await?;
    let [sentence, remedy] = way.log;
    let line = agent.wait_for_log(sentence, SOON).await?;
    ensure!(line.contains("WARN") && line.contains(remedy), "{line}");
    two_more_polls(&stage).await?;
    nothing_else(&stage, &agent, way.reason, sentence)?;
    stage.assert_no_violations();
    Ok(())
}

async fn refused_later(protocol: &str, reason: &str) -> Result<()> {
    let mut stage = Stage::new(Protocol::V2).await?;
    stage.set("CLOUDFLARED_PROTOCOL", protocol);
    let address = with_page(&mut stage)?;
    let edge = visitors::edge(&stage).await?;
    let tunnel = visitors::tunnel(&stage, &edge, "");
    let agent = tunnel.agent_with_ready_tunnel(&stage).await?;
    let mut visitors = Visitors::come(&edge, &tunnel).await?;
    visitors.all_were_served().await?;
    drop(visitors);
    edge.refuse(Whose::Tunnel(tunnel.id.clone()));
    let status = if reason == "token_refused" { "error" } else { "degraded" };
    told_late(&stage, status, Some(reason)).await?;
    shown(&address, reason).await?;
    let told = reasons(&stage);
    let is_it = |told: &String| names(reason).contains(&told.as_str());
    ensure!(told.iter().flatten().all(is_it), "{told:?}\n{}", agent.log());
    // The edge accepts the token now; cloudflared notices at its next try.
    edge.accept(Whose::Tunnel(tunnel.id.clone()));
    stage.scope.tell_stand_in(&stage.tunnel, &json!({ "speed": 10 })).await?;
    told_late(&stage, "running", None).await?;
    Visitors::come(&edge, &tunnel).await?.all_were_served().await?;
    stage.assert_no_violations();
    Ok(())
}

async fn a_token_that_cloudflare_refuses_is_an_error_and_its_connector_is_not_restarted() -> Result<()> {
    let stage = Stage::new(Protocol::V2).await?;
    let tunnel = Tunnel::new(&stage, "unauthorized speed=20");
    tunnel.store(&stage)?;
    let agent = tunnel.agent(&stage)?;
    told_late(&stage, "error", Some("token_refused")).await?;
    let line = agent.wait_for_log("the tunnel is refused by Cloudflare", SOON).await?;
    ensure!(line.contains("WARN") && line.contains("redeploy or enrol"), "{line}");
    let before = Life::now(&stage).await?;
    two_more_polls(&stage).await?;
    assert_eq!(Life::now(&stage).await?, before);
    // Cloudflare accepts the token now.
    stage.scope.tell_stand_in(&stage.tunnel, &json!({ "unauthorized": null })).await?;
    told(&stage, "running", None).await?;
    assert_eq!(Life::now(&stage).await?, before);
    Ok(())
}

async fn without_dns_it_is_left_to_docker_and_the_remedy_is_told() -> Result<()> {
    let stage = Stage::new(Protocol::V1).await?;
    let tunnel = Tunnel::new(&stage, "no-dns speed=20");
    tunnel.store(&stage)?;
    let agent = tunnel.agent(&stage)?;
    told(&stage, "restarting", Some("no_dns")).await?;
    let line = agent.wait_for_log("cannot be looked up", SOON).await?;
    ensure!(line.contains("WARN") && line.contains("DNS servers"), "{line}");
    let before = Life::now(&stage).await?;
    two_more_polls(&stage).await?;
    assert_eq!(Life::now(&stage).await?.id, before.id, "Docker starts it again");
    Ok(())
}

async fn one_that_has_lost_the_edge_is_followed_by_a_fresh_one_that_finds_it() -> Result<()> {
    let stage = Stage::new(Protocol::V2).await?;
    let tunnel = Tunnel::new(&stage, "");
    let agent = tunnel.agent_with_ready_tunnel(&stage).await?;
    let before = tunnel.container(&stage).await?;
    // Only this connector loses the edge: any other one connects at once.
    stage.scope.tell_stand_in(&stage.tunnel, &json!({ "unreachable": true, "speed": 10 })).await?;
    let known = told(&stage, "degraded", Some("edge_unreachable")).await?;
    assert_eq!(known.tunnel_status.context("a status")?.event["ready_connections"], 0);
    let line = agent.wait_for_log("has no connection to Cloudflare", SOON).await?;
    ensure!(line.contains("WARN") && line.contains("port 7844"), "{line}");
    agent.wait_for_log("trying fresh connectors", SOON).await?;
    told(&stage, "running", None).await?;
    let after = tunnel.container(&stage).await?;
    ensure!(after.id != before.id, "it came back by itself");
    // One line each at the beginning and at the end.
    let count = |text: &str| agent.log().lines().filter(|line| line.contains(text)).count();
    assert_eq!((count("trying fresh connectors"), count("takes over"), count("works again")), (1, 1, 1));
    stage.assert_no_violations();
    Ok(())
}

async fn where_only_quic_is_allowed_and_udp_is_blocked_the_remedy_is_told() -> Result<()> {
    let mut stage = Stage::new(Protocol::V2).await?;
    stage.set("CLOUDFLARED_PROTOCOL", "quic");
    let tunnel = Tunnel::new(&stage, "udp-blocked");
    tunnel.store(&stage)?;
    let agent = tunnel.agent(&stage)?;
    told_late(&stage, "degraded", Some("udp_blocked")).await?;
    let line = agent.wait_for_log("over QUIC", SOON).await?;
    ensure!(line.contains("CLOUDFLARED_PROTOCOL=auto"), "{line}");
    Ok(())
}

async fn where_udp_is_blocked_it_falls_back_and_the_protocol_is_told() -> Result<()> {
    let stage = Stage::new(Protocol::V1).await?;
    // The recordings take more than two minutes at normal speed.
    let tunnel = Tunnel::new(&stage, "udp-blocked speed=50");
    let _agent = tunnel.agent_with_ready_tunnel(&stage).await?;
    let known = told(&stage, "running", None).await?;
    assert_eq!(known.tunnel_status.context("a status")?.event["protocol"], "http2");
    Ok(())
}

async fn one_that_hangs_is_restarted_exactly_once() -> Result<()> {
    let stage = Stage::new(Protocol::V2).await?;
    let tunnel = Tunnel::new(&stage, "");
    let agent = tunnel.agent_with_ready_tunnel(&stage).await?;
    let (before, story) = (tunnel.container(&stage).await?, Story::follow(&stage));
    // Set this at run time, so that the connector's next start does not hang.
    stage.scope.tell_stand_in(&stage.tunnel, &json!({ "hang": true })).await?;
    told(&stage, "degraded", Some("hung")).await?;
    let line = agent.wait_for_log("cloudflared does not answer any more", SOON).await?;
    ensure!(line.contains("WARN") && line.contains("it is restarted"), "{line}");
    let known = told_late(&stage, "running", None).await?;
    assert_eq!(known.tunnel_status.context("a status")?.event["restarts"], 1);
    two_more_polls(&stage).await?;
    let after = tunnel.container(&stage).await?;
    assert_eq!(after.id, before.id);
    assert_eq!((story.count("restart"), story.count("start"), story.count("create")), (1, 1, 0));
    stage.assert_no_violations();
    Ok(())
}

/// Returns an agent that cannot reach its cloudflared. Whenever Engine 20.10 makes a network, as parallel cases do, it
/// drops the isolation of its networks for a moment, and a request may get through. Hence the retries.
async fn unable_to_ask() -> Result<Contained> {
    for _ in 0..5 {
        let contained = Contained::apart_from_its_tunnel().await?;
        let status = registered(&contained.stage).await?.tunnel_status.context("a status")?;
        if status.event["ready_connections"].is_null() {
            return Ok(contained);
        }
    }
    bail!("it reaches cloudflared from another network, again and again")
}

async fn by_dockers_check() -> Result<()> {
    let contained = unable_to_ask().await?;
    let (stage, tunnel) = (&contained.stage, &contained.tunnel);
    let status = registered(stage).await?.tunnel_status.context("a status")?;
    assert_eq!((status.version.as_deref(), &status.event["ready_connections"]), (Some("2025.9.0"), &Value::Null));
    let before = tunnel.container(stage).await?;

    stage.scope.tell_stand_in(&stage.tunnel, &json!({ "unreachable": true })).await?;
    if let Err(error) = told_late(stage, "degraded", Some("edge_unreachable")).await {
        let health = stage.scope.inspect(&stage.tunnel).await?.state.and_then(|state| state.health);
        bail!("{error:#}\nDocker's own check: {health:#?}\n{}", stage.scope.logs(&contained.id).await?);
    }
    // Docker's health check has found a fresh connector ready, and that one took over.
    told_late(stage, "running", None).await?;
    let after = tunnel.container(stage).await?;
    ensure!(after.id != before.id, "it came back by itself");
    let (before, story) = (after, Story::follow(stage));

    stage.scope.tell_stand_in(&stage.tunnel, &json!({ "hang": true })).await?;
    wait_until("a restart", 2 * PATIENCE, async || (story.count("restart") == 1).then_some(())).await?;
    told_late(stage, "running", None).await?;
    assert_eq!(tunnel.container(stage).await?.id, before.id);
    assert_eq!((story.count("restart"), story.count("create")), (1, 0));
    let log = stage.scope.logs(&contained.id).await?;
    ensure!(log.contains("cloudflared does not answer any more"), "{log}");
    Ok(())
}

async fn one_that_the_kernel_ended_for_want_of_memory_is_told_so() -> Result<()> {
    let stage = Stage::new(Protocol::V2).await?;
    let tunnel = Tunnel::new(&stage, "");
    let agent = tunnel.agent_with_ready_tunnel(&stage).await?;
    let limit = 32 << 20;
    let body = models::ContainerUpdateBody { memory: Some(limit), memory_swap: Some(limit), ..Default::default() };
    stage.scope.docker().update_container(&stage.tunnel, body).await?;
    let before = tunnel.container(&stage).await?;
    // Make each start of the connector eat memory again, until the agent reports the reason.
    wait_until("the reason to be told", PATIENCE, async || {
        // The connector may be down at the moment.
        let _ = stage.scope.tell_stand_in(&stage.tunnel, &json!({ "eat": 256 })).await;
        let told = registered(&stage).await.ok()?.tunnel_status?;
        (told.event["reason"] == "out_of_memory").then_some(())
    })
    .await?;
    let line = agent.wait_for_log("ended by the kernel for want of memory", SOON).await?;
    ensure!(line.contains("WARN") && line.contains("more memory"), "{line}");
    told_late(&stage, "running", None).await?;
    assert_eq!(Life::now(&stage).await?.id, before.id, "Docker started it again");
    Ok(())
}

async fn the_options_of_the_connector_reach_it() -> Result<()> {
    let mut stage = Stage::new(Protocol::V2).await?;
    for (name, value) in [
        ("CLOUDFLARED_PROTOCOL", "quic"),
        ("CLOUDFLARED_REGION", "us"),
        ("CLOUDFLARED_EDGE_IP_VERSION", "6"),
        ("CLOUDFLARED_POST_QUANTUM", "true"),
        ("CLOUDFLARED_LOGLEVEL", "debug"),
        // Not one of our settings: it must not reach the connector.
        ("TUNNEL_EDGE", "attacker.example.com:7844"),
    ] {
        stage.set(name, value);
    }
    let tunnel = Tunnel::new(&stage, "");
    let _agent = tunnel.agent_with_ready_tunnel(&stage).await?;
    let config = stage.scope.inspect(&stage.tunnel).await?.config.context("config")?;
    let mut env = config.env.unwrap_or_default();
    env.retain(|entry| entry.starts_with("TUNNEL_") && !entry.starts_with("TUNNEL_TOKEN="));
    env.sort();
    let expected = [
        "TUNNEL_EDGE_IP_VERSION=6",
        "TUNNEL_LOGLEVEL=debug",
        "TUNNEL_METRICS=0.0.0.0:20241",
        "TUNNEL_POST_QUANTUM=true",
        "TUNNEL_REGION=us",
        "TUNNEL_TRANSPORT_PROTOCOL=quic",
    ];
    assert_eq!(env, expected);
    let log = stage.scope.logs(&stage.tunnel).await?;
    ensure!(log.contains("TUNNEL_REGION:us") && log.contains("TUNNEL_EDGE_IP_VERSION:6"), "{log}");
    Ok(())
}

/// Returns the last status that the master accepted.
async fn status(stage: &Stage) -> Result<Value> {
    Ok(registered(stage).await?.tunnel_status.context("no status")?.event)
}

async fn a_status_tells_what_the_connector_says_of_itself_and_what_it_carried() -> Result<()> {
    let stage = Stage::new(Protocol::V1).await?;
    let edge = visitors::edge(&stage).await?;
    let tunnel = visitors::tunnel(&stage, &edge, "config-version=7 connections=2 errors=3");
    let _agent = tunnel.agent_with_ready_tunnel(&stage).await?;
    told(&stage, "running", None).await?;
    let first = status(&stage).await?;
    assert_eq!(
        (&first["ready_connections"], &first["config_version"], &first["protocol"]),
        (&json!(2), &json!(7), &json!("quic"))
    );
    assert_eq!(
        (&first["restarts"], &first["version"], &first["name"]),
        (&json!(0), &json!("2025.9.0"), &json!("edge"))
    );
    ensure!(first["connector_id"].as_str().is_some_and(|id| id.len() == 36), "{first}");
    let since: jiff::Timestamp = first["since"].as_str().context("since")?.parse()?;
    ensure!(since <= jiff::Timestamp::now(), "{since}");

    // Each status counts from the previous one: add them up.
    let mut visitors = Visitors::come(&edge, &tunnel).await?;
    let carried = |name: &'static str| {
        let requests = stage.master.requests();
        let statuses = requests.iter().filter(|request| request.event() == Some("tunnel_status"));
        statuses.filter_map(|status| status.body[name].as_u64()).sum::<u64>()
    };
    visitors.all_were_served().await?;
    wait_until("a hundred requests to be told", 2 * SOON, async || (carried("requests") >= 100).then_some(())).await?;
    assert_eq!(carried("errors"), 3, "those before the first status, once");
    drop(visitors);
    let log = stage.scope.logs(&stage.tunnel).await?;
    ensure!(!log.is_empty(), "the stand-in says something");
    assert_eq!(status(&stage).await?["since"], first["since"], "it has been running all the while");
    stage.assert_no_violations();
    Ok(())
}

async fn removed_host(protocol: Protocol) -> Result<()> {
    let mut stage = Stage::new(protocol).await?;
    // Over QUIC the edge gives no reason for a refused registration.
    stage.set("CLOUDFLARED_PROTOCOL", "http2");
    let tunnel = Tunnel::new(&stage, "");
    let agent = tunnel.agent(&stage)?;
    let known = tunnel.enrol(&stage, &agent).await?;
    // An operator removes the host: deletes the tunnel at Cloudflare, and the agent at the master.
    stage.scope.tell_stand_in(&stage.tunnel, &json!({ "unauthorized": true, "speed": 10 })).await?;
    told_late(&stage, "error", Some("token_refused")).await?;
    stage.master.forget(&known.id)?;
    let line = agent.wait_for_log("so the host was removed", SOON).await?;
    ensure!(line.contains("WARN") && line.contains("enrol the agent"), "{line}");
    wait_until("the end of the container", SOON, async || {
        (stage.scope.status(&stage.tunnel).await.ok()? == "gone").then_some(())
    })
    .await?;
    let state: Value = serde_json::from_str(&stage.file("tunnel_state.json")?)?;
    assert_eq!(
        (&state["token"], &state["id"], &state["desired_state"]),
        (&json!(null), &json!(null), &json!("stopped"))
    );
    if protocol == Protocol::V1 {
        // A v1 master lets the same key enroll again.
        let again = reported(&stage, "another registration", |agent| Some(agent.clone())).await?;
        stage.master.enroll_with(&again.id, "edge", &tunnel.id, &tunnel.token)?;
        agent.wait_for_log("command start_tunnel", SOON).await?;
        told(&stage, "running", None).await?;
        tunnel.container(&stage).await?;
    }
    Ok(())
}

async fn a_refused_token_alone_and_an_unknown_agent_alone_change_nothing() -> Result<()> {
    let mut stage = Stage::new(Protocol::V1).await?;
    stage.set("CLOUDFLARED_PROTOCOL", "http2");
    let tunnel = Tunnel::new(&stage, "");
    let agent = tunnel.agent(&stage)?;
    let known = tunnel.enrol(&stage, &agent).await?;
    let before = tunnel.container(&stage).await?;
    stage.master.forget(&known.id)?;
    reported(&stage, "another registration", |agent| (agent.polls > 2).then_some(())).await?;
    assert_eq!(tunnel.container(&stage).await?, before, "the edge still takes it");
    told(&stage, "running", None).await?;

    // The master assigns the tunnel again and so knows the agent; now the edge refuses the token.
    let known = registered(&stage).await?;
    stage.master.enroll_with(&known.id, "edge", &tunnel.id, &tunnel.token)?;
    agent.wait_for_log("command start_tunnel", SOON).await?;
    two_more_polls(&stage).await?;
    stage.scope.tell_stand_in(&stage.tunnel, &json!({ "unauthorized": true, "speed": 10 })).await?;
    told_late(&stage, "error", Some("token_refused")).await?;
    two_more_polls(&stage).await?;
    assert_eq!(tunnel.container(&stage).await?, before, "the master still knows it");
    Ok(())
}
