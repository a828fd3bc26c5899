//! Tests the stand-in with connections to a double of the edge in this process.

use std::net::Ipv4Addr;

use cloudflared_stand_in::edge::{Edge, Whose};
use cloudflared_stand_in::transport::Protocol;
use cloudflared_stand_in::wire::Verdict;

use super::*;

const TUNNEL: &str = "tunnel-1";

async fn edge(takes: Duration) -> Edge {
    Edge::start((Ipv4Addr::LOCALHOST, 0).into(), takes).await.expect("edge")
}

/// A connector of this edge, with more words, that logs each request.
fn connector(edge: &Edge, words: &str) -> AgentProcess {
    connector_with(edge, words, &[("TUNNEL_LOGLEVEL", "debug")])
}

fn connector_with(edge: &Edge, words: &str, env: &[(&str, &str)]) -> AgentProcess {
    let mut all = vec![("TUNNEL_LOGLEVEL", "debug")];
    all.extend(env);
    run(&format!("edge={} {words}", edge.address()), &all)
}

async fn wait_for_connectors(edge: &Edge, count: usize) -> Vec<String> {
    let connectors = async || Some(edge.connectors(TUNNEL)).filter(|connectors| connectors.len() == count);
    wait_until(&format!("{count} connectors"), SOON, connectors).await.expect("connectors")
}

async fn connector_id(process: &AgentProcess) -> Result<String> {
    let line = process.wait_for_log("Generated Connector ID: ", SOON).await?;
    Ok(line.rsplit(' ').next().context("id")?.to_owned())
}

/// Starts slow requests and returns once the connector has all of them.
async fn slow_requests(
    edge: &Arc<Edge>,
    process: &AgentProcess,
    ms: u64,
    count: usize,
) -> Result<JoinSet<Result<String>>> {
    let mut requests = JoinSet::new();
    for _ in 0..count {
        let edge = edge.clone();
        requests.spawn(async move { edge.ask(TUNNEL, &format!("/slow?ms={ms}")).await });
    }
    let asked = format!("GET /slow?ms={ms} ");
    wait_until("all requests", SOON, async || (process.log().matches(&asked).count() == count).then_some(())).await?;
    Ok(requests)
}

#[tokio::test]
async fn requests_are_answered_and_counted() -> Result<()> {
    let edge = edge(Duration::ZERO).await;
    let process = connector(&edge, "connections=3 requests=100");
    let address = metrics_address(&process).await?;
    wait_for_connections(&address, 3).await?;
    let id = connector_id(&process).await?;
    assert_eq!(wait_for_connectors(&edge, 1).await, std::slice::from_ref(&id));
    for path in ["/", "/any", "/slow?ms=5"] {
        assert_eq!(edge.ask(TUNNEL, path).await?, format!("hello from {id}"));
    }
    assert!(edge.ask("another-tunnel", "/").await.is_err());
    let page = get(&address, "/metrics").await?.body;
    assert!(page.contains("\ncloudflared_tunnel_total_requests 103\n"), "{page}");
    assert!(page.contains(r#"cloudflared_tunnel_response_by_code{status_code="200"} 103"#), "{page}");
    let log = process.log();
    assert!(log.contains(" INF Registered tunnel connection connIndex=2 connection="), "{log}");
    assert_eq!(log.matches("Updated to new configuration").count(), 1, "{log}");
    Ok(())
}

#[tokio::test]
async fn a_connection_is_used_only_when_the_edge_has_taken_its_time() -> Result<()> {
    let takes = Duration::from_secs(1);
    let edge = edge(takes).await;
    let before = Instant::now();
    let process = connector(&edge, "");
    wait_for_connections(&metrics_address(&process).await?, 4).await?;
    wait_for_connectors(&edge, 1).await;
    assert!(before.elapsed() >= takes);
    edge.ask(TUNNEL, "/").await?;
    Ok(())
}

#[tokio::test]
async fn a_drain_loses_nothing_that_is_in_flight() -> Result<()> {
    let edge = Arc::new(edge(Duration::ZERO).await);
    let process = connector(&edge, "drain=2000");
    let address = metrics_address(&process).await?;
    wait_for_connections(&address, 4).await?;
    wait_for_connectors(&edge, 1).await;
    let requests = slow_requests(&edge, &process, 700, 20).await?;
    process.sigterm()?;
    process.wait_for_log("Unregistered tunnel connection connIndex=3", SOON).await?;
    wait_for_connectors(&edge, 0).await;
    assert!(edge.ask(TUNNEL, "/").await.is_err(), "no new request");
    assert_eq!(wait_for_connections(&address, 0).await?.status, 503);
    for answer in requests.join_all().await {
        assert!(answer?.starts_with("hello from "));
    }
    let log = process.log();
    assert!(!log.contains("accept QUIC stream"), "{log}");
    assert_eq!(exit_code(process).await, Some(0));
    Ok(())
}

#[tokio::test]
async fn visitors_notice_nothing_when_one_takes_the_place_of_another() -> Result<()> {
    let edge = edge(Duration::from_millis(100)).await;
    let old = connector(&edge, "drain=500");
    wait_for_connectors(&edge, 1).await;
    let _new = connector(&edge, "");
    wait_for_connectors(&edge, 2).await;
    old.sigterm()?;
    let ended = exit_code(old);
    tokio::pin!(ended);
    let mut requests = 0;
    loop {
        tokio::select! {
            code = &mut ended => {
                assert_eq!(code, Some(0));
                break;
            }
            answer = edge.ask(TUNNEL, "/slow?ms=1") => drop(answer?),
        }
        requests += 1;
    }
    assert!(requests > 0);
    Ok(())
}

#[tokio::test]
async fn what_takes_longer_than_the_grace_period_is_cut() -> Result<()> {
    let edge = Arc::new(edge(Duration::ZERO).await);
    let process = connector_with(&edge, "", &[("TUNNEL_GRACE_PERIOD", "200ms")]);
    wait_for_connectors(&edge, 1).await;
    let requests = slow_requests(&edge, &process, 3_600_000, 3).await?;
    process.sigterm()?;
    assert_eq!(exit_code(process).await, Some(0));
    assert!(requests.join_all().await.iter().all(Result::is_err));
    Ok(())
}

#[tokio::test]
async fn an_edge_that_keeps_drained_connections_makes_a_stop_take_the_whole_grace_period() -> Result<()> {
    let edge = Arc::new(edge(Duration::ZERO).await);
    edge.keep_drained(true);
    let process = connector_with(&edge, "", &[("TUNNEL_GRACE_PERIOD", "2s")]);
    wait_for_connections(&metrics_address(&process).await?, 4).await?;
    let before = Instant::now();
    process.sigterm()?;
    assert_eq!(exit_code(process).await, Some(0));
    assert!(before.elapsed() >= Duration::from_secs(2));
    Ok(())
}

#[tokio::test]
async fn a_second_signal_cuts_what_is_in_flight() -> Result<()> {
    let edge = Arc::new(edge(Duration::ZERO).await);
    let process = connector(&edge, "");
    wait_for_connectors(&edge, 1).await;
    let requests = slow_requests(&edge, &process, 3_600_000, 3).await?;
    process.sigterm()?;
    process.wait_for_log("Unregistered tunnel connection", SOON).await?;
    process.sigterm()?;
    assert_eq!(exit_code(process).await, Some(143));
    assert!(requests.join_all().await.iter().all(Result::is_err));
    Ok(())
}

#[tokio::test]
async fn a_killed_connector_fails_what_is_in_flight_and_gets_no_more() -> Result<()> {
    let edge = Arc::new(edge(Duration::ZERO).await);
    let doomed = connector(&edge, "");
    wait_for_connectors(&edge, 1).await;
    let requests = slow_requests(&edge, &doomed, 3_600_000, 12).await?;
    let other = connector(&edge, "");
    wait_for_connectors(&edge, 2).await;
    doomed.sigkill()?;
    assert!(requests.join_all().await.iter().all(Result::is_err));
    let id = connector_id(&other).await?;
    assert_eq!(wait_for_connectors(&edge, 1).await, std::slice::from_ref(&id));
    for _ in 0..50 {
        assert_eq!(edge.ask(TUNNEL, "/").await?, format!("hello from {id}"));
    }
    Ok(())
}

#[tokio::test]
async fn comes_back_at_its_next_recorded_try_when_the_edge_was_away() -> Result<()> {
    let first = edge(Duration::ZERO).await;
    let address = first.address();
    let process = connector(&first, "connections=2 speed=10");
    let metrics = metrics_address(&process).await?;
    wait_for_connections(&metrics, 2).await?;
    drop(first);
    process.wait_for_log("ERR failed to accept incoming stream requests error=\"failed to accept QUIC", SOON).await?;
    process.wait_for_log("ERR Failed to dial a quic connection error=", SOON).await?;
    process.wait_for_log("INF Retrying connection in up to 4s connIndex=0 event=0 ip=", SOON).await?;
    assert_eq!(wait_for_connections(&metrics, 0).await?.status, 503);
    let second = Edge::start(address, Duration::ZERO).await?;
    wait_for_connections(&metrics, 2).await?;
    wait_for_connectors(&second, 1).await;
    second.ask(TUNNEL, "/").await?;
    Ok(())
}

#[tokio::test]
async fn an_edge_that_refuses_shows_itself_in_words_over_http2_and_in_counters_over_quic() -> Result<()> {
    let edge = edge(Duration::ZERO).await;
    let over = |protocol| connector_with(&edge, "speed=20", &[("TUNNEL_TRANSPORT_PROTOCOL", protocol)]);
    let (quic, http2) = (over("quic"), over("http2"));
    let (by_quic, by_http2) = (metrics_address(&quic).await?, metrics_address(&http2).await?);
    for address in [&by_quic, &by_http2] {
        wait_for_connections(address, 4).await?;
    }
    wait_for_connectors(&edge, 2).await;
    // Refuse it while it is connected, then accept it again.
    edge.refuse(Whose::Tunnel(TUNNEL.into()));
    let words = "ERR Register tunnel error from server side error=\"Unauthorized: Invalid tunnel secret\"";
    http2.wait_for_log(words, SOON).await?;
    quic.wait_for_log("ERR Serve tunnel error error=\"control stream encountered a failure", SOON).await?;
    for address in [&by_quic, &by_http2] {
        assert_eq!(wait_for_connections(address, 0).await?.status, 503);
        assert!(get(address, "/metrics").await?.body.contains("cloudflared_tunnel_tunnel_register_fail{"));
    }
    assert!(!quic.log().contains("Unauthorized"), "{}", quic.log());
    assert!(edge.ask(TUNNEL, "/").await.is_err());
    edge.accept(Whose::Tunnel(TUNNEL.into()));
    wait_for_connectors(&edge, 2).await;
    for address in [&by_quic, &by_http2] {
        wait_for_connections(address, 4).await?;
    }
    Ok(())
}

#[tokio::test]
async fn a_token_may_be_refused_where_another_of_the_same_tunnel_is_served() -> Result<()> {
    let edge = edge(Duration::ZERO).await;
    let words = format!("edge={} speed=20", edge.address());
    let (good, bad) = (token(TUNNEL, &words), token(TUNNEL, &words));
    edge.refuse(Whose::Token(bad.clone()));
    let over = |token| run("", &[("TUNNEL_TOKEN", token), ("TUNNEL_TRANSPORT_PROTOCOL", "http2")]);
    let (good, bad) = (over(&good), over(&bad));
    wait_for_connections(&metrics_address(&good).await?, 4).await?;
    bad.wait_for_log("error=\"Unauthorized: ", SOON).await?;
    wait_for_connectors(&edge, 1).await;
    assert!(edge.tries().iter().any(|attempt| matches!(attempt.verdict, Verdict::Refused(_))));
    Ok(())
}

#[tokio::test]
async fn where_only_quic_finds_nobody_http2_serves() -> Result<()> {
    let edge = edge(Duration::ZERO).await;
    edge.block(Protocol::Quic);
    let over = |protocol| connector_with(&edge, "speed=200", &[("TUNNEL_TRANSPORT_PROTOCOL", protocol)]);
    let quic = over("quic");
    wait_for_connections(&metrics_address(&over("http2")).await?, 4).await?;
    wait_for_connections(&metrics_address(&over("auto")).await?, 4).await?;
    quic.wait_for_log("failed to dial to edge with quic", SOON).await?;
    assert_eq!(get(&metrics_address(&quic).await?, "/ready").await?.status, 503);
    // A connector that was connected over QUIC loses the connections and gets them back.
    edge.unblock(Protocol::Quic);
    wait_for_connections(&metrics_address(&quic).await?, 4).await?;
    edge.block(Protocol::Quic);
    wait_for_connections(&metrics_address(&quic).await?, 0).await?;
    Ok(())
}

#[tokio::test]
async fn after_an_outage_a_fresh_connector_is_there_long_before_the_old_one() -> Result<()> {
    let edge = edge(Duration::ZERO).await;
    let old = connector_with(&edge, "", &[("TUNNEL_TRANSPORT_PROTOCOL", "http2")]);
    let address = metrics_address(&old).await?;
    wait_for_connections(&address, 4).await?;
    edge.leave();
    wait_for_connections(&address, 0).await?;
    edge.come_back();
    // The old connector's next try comes 17 s after the loss.
    let fresh = connector_with(&edge, "", &[("TUNNEL_TRANSPORT_PROTOCOL", "http2")]);
    let before = Instant::now();
    wait_until("one connection", SOON, async || (edge.connectors(TUNNEL).len() == 1).then_some(())).await?;
    assert!(before.elapsed() < Duration::from_secs(5));
    assert_eq!(edge.connectors(TUNNEL), [connector_id(&fresh).await?]);
    assert_eq!(get(&address, "/ready").await?.status, 503);
    Ok(())
}

#[tokio::test]
async fn has_nothing_to_drain_while_the_edge_refuses() -> Result<()> {
    let edge = edge(Duration::ZERO).await;
    edge.refuse(Whose::All);
    let process = connector(&edge, "");
    process.wait_for_log("ERR Serve tunnel error error=\"control stream", SOON).await?;
    process.sigterm()?;
    assert_eq!(exit_code(process).await, Some(0));
    Ok(())
}

#[tokio::test]
async fn unready_closes_the_connections_and_another_word_does_not() -> Result<()> {
    let edge = edge(Duration::ZERO).await;
    let process = connector(&edge, "");
    let address = metrics_address(&process).await?;
    wait_for_connections(&address, 4).await?;
    wait_for_connectors(&edge, 1).await;
    post(&address, "/stand-in", &json!({"requests": 5})).await?;
    edge.ask(TUNNEL, "/").await?;
    assert_eq!(process.log().matches("Registered tunnel connection").count(), 4);
    post(&address, "/stand-in", &json!({"unready": true})).await?;
    wait_for_connectors(&edge, 0).await;
    post(&address, "/stand-in", &json!({"unready": false})).await?;
    wait_for_connectors(&edge, 1).await;
    Ok(())
}

#[tokio::test]
async fn answers_nobody_while_it_hangs() -> Result<()> {
    let edge = edge(Duration::ZERO).await;
    let process = connector(&edge, "hang");
    let address = metrics_address(&process).await?;
    wait_for_connectors(&edge, 1).await;
    let held = edge.ask(TUNNEL, "/");
    tokio::pin!(held);
    assert!(tokio::time::timeout(Duration::from_millis(300), &mut held).await.is_err());
    post(&address, "/stand-in", &json!({"hang": false})).await?;
    tokio::time::timeout(SOON, held).await??;
    Ok(())
}

#[tokio::test]
async fn a_crash_fails_what_is_in_flight() -> Result<()> {
    let edge = Arc::new(edge(Duration::ZERO).await);
    let process = connector(&edge, "");
    let address = metrics_address(&process).await?;
    wait_for_connectors(&edge, 1).await;
    let requests = slow_requests(&edge, &process, 3_600_000, 2).await?;
    post(&address, "/stand-in", &json!({"exit": 9, "exit_after": 10})).await?;
    assert_eq!(exit_code(process).await, Some(9));
    assert!(requests.join_all().await.iter().all(Result::is_err));
    Ok(())
}
