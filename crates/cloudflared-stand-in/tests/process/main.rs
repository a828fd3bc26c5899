//! Tests the stand-in and the workload as processes: exit codes, signals, log and metrics server.

#![allow(clippy::disallowed_methods, clippy::disallowed_types, clippy::disallowed_macros, reason = "tests may block")]
#![allow(clippy::expect_used, reason = "tests; clippy spares only the test functions themselves")]

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use cloudflared_stand_in::http::{Answer, get, post};
use serde_json::{Value, json};
use testkit::{AgentProcess, token, wait_until};
use tokio::task::JoinSet;

mod contract;
mod edge;
mod environment;
mod outside;

const SOON: Duration = Duration::from_secs(10);

fn start(program: &str, args: &[&str], env: &[(&str, &str)]) -> AgentProcess {
    let env: Vec<_> = env.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    AgentProcess::spawn_with(Path::new(program), args, &env, Path::new("/")).expect("started")
}

fn cloudflared(args: &[&str], env: &[(&str, &str)]) -> AgentProcess {
    start(env!("CARGO_BIN_EXE_cloudflared"), args, env)
}

/// Starts `tunnel run` with a token of these words, on any port, and with extra environment variables.
fn run(words: &str, env: &[(&str, &str)]) -> AgentProcess {
    let token = token("tunnel-1", words);
    let mut all = vec![("TUNNEL_TOKEN", token.as_str()), ("TUNNEL_METRICS", "127.0.0.1:0")];
    all.extend(env);
    let mut process = cloudflared(&["--no-autoupdate", "tunnel", "--no-autoupdate", "run"], &all);
    process.plant(&token);
    process
}

async fn metrics_address(process: &AgentProcess) -> Result<String> {
    let line = process.wait_for_log("Starting metrics server on", SOON).await?;
    let address = line.split_whitespace().last().and_then(|word| word.strip_suffix("/metrics"));
    Ok(address.context(line.clone())?.to_owned())
}

async fn exit_code(mut process: AgentProcess) -> Option<i32> {
    process.wait_exit(SOON).await.expect("it ends").code()
}

/// Waits until `/ready` counts this many connections, and returns its answer.
async fn wait_for_connections(address: &str, count: u64) -> Result<Answer> {
    wait_until(&format!("{count} connections"), SOON, async || {
        let answer = get(address, "/ready").await.ok()?;
        let body: Value = serde_json::from_str(&answer.body).ok()?;
        (body["readyConnections"] == count && body["status"] == answer.status).then_some(answer)
    })
    .await
}

#[tokio::test]
async fn becomes_ready_and_says_so_everywhere() -> Result<()> {
    let process = run("connections=2", &[("STAND_IN_VERSION", "2024.1.5"), ("STAND_IN_CONNECTIONS", "3")]);
    let address = metrics_address(&process).await?;
    assert_eq!(wait_for_connections(&address, 2).await?.status, 200);
    assert_eq!(exit_code(cloudflared(&["tunnel", "--metrics", &address, "ready"], &[])).await, Some(0));
    let page = get(&address, "/metrics").await?.body;
    assert!(page.contains(r#"version="2024.1.5""#), "{page}");
    assert!(page.contains(r#"cloudflared_tunnel_tunnel_register_success{rpcName="registerConnection"} 2"#), "{page}");
    assert_eq!(get(&address, "/healthcheck").await?.body, "OK\n");
    let config: Value = serde_json::from_str(&get(&address, "/config").await?.body)?;
    assert_eq!(config["version"], 1);
    let diag: Value = serde_json::from_str(&get(&address, "/diag/tunnel").await?.body)?;
    assert_eq!((&diag["tunnelID"], diag["connections"].as_array().map(Vec::len)), (&json!("tunnel-1"), Some(2)));
    let log = process.log();
    assert!(log.contains(" INF Starting tunnel tunnelID=tunnel-1"), "{log}");
    assert!(log.contains(" INF Registered tunnel connection connIndex=1 connection="), "{log}");
    Ok(())
}

#[tokio::test]
async fn without_a_connection_only_ready_tells() -> Result<()> {
    let process = run("unready", &[]);
    let address = metrics_address(&process).await?;
    assert_eq!(wait_for_connections(&address, 0).await?.status, 503);
    assert_eq!(exit_code(cloudflared(&["tunnel", "ready"], &[("TUNNEL_METRICS", &address)])).await, Some(1));
    let page = get(&address, "/metrics").await?.body;
    assert!(page.contains("\ncloudflared_tunnel_ha_connections 0\n"), "{page}");
    assert!(page.contains("\ncloudflared_orchestration_config_version -1\n"), "{page}");
    assert!(!page.contains("register_success"), "{page}");
    Ok(())
}

#[tokio::test]
async fn changes_at_run_time_and_refuses_what_it_does_not_know() -> Result<()> {
    let process = run("ready-after=1", &[]);
    let address = metrics_address(&process).await?;
    wait_for_connections(&address, 4).await?;
    assert_eq!(post(&address, "/stand-in", &json!({"unready": true, "requests": 9, "errors": 2})).await?.status, 200);
    wait_for_connections(&address, 0).await?;
    let page = get(&address, "/metrics").await?.body;
    assert!(page.contains(r#"cloudflared_tunnel_response_by_code{status_code="200"} 7"#), "{page}");
    assert_eq!(post(&address, "/stand-in", &json!({"unredy": true})).await?.status, 400);
    assert_eq!(post(&address, "/stand-in", &json!({"unready": null})).await?.status, 200);
    wait_for_connections(&address, 4).await?;
    let words: Value = serde_json::from_str(&get(&address, "/stand-in").await?.body)?;
    assert_eq!(words, json!({"ready_after": "1", "requests": "9", "errors": "2"}));
    Ok(())
}

#[tokio::test]
async fn hangs_until_told_otherwise() -> Result<()> {
    let process = run("hang", &[]);
    let address = metrics_address(&process).await?;
    let held = get(&address, "/ready");
    tokio::pin!(held);
    // As long as a client might well wait; a server that answers does so within a millisecond.
    assert!(tokio::time::timeout(Duration::from_millis(300), &mut held).await.is_err());
    assert_eq!(post(&address, "/stand-in", &json!({"hang": false})).await?.status, 200);
    tokio::time::timeout(SOON, held).await??;
    Ok(())
}

#[tokio::test]
async fn crashes_as_told_in_each_place() -> Result<()> {
    assert_eq!(exit_code(run("exit=7", &[])).await, Some(7));
    assert_eq!(exit_code(run("exit-after=30", &[("STAND_IN_EXIT", "9")])).await, Some(9));
    let process = run("", &[]);
    post(&metrics_address(&process).await?, "/stand-in", &json!({"exit": 3, "exit_after": 10})).await?;
    assert_eq!(exit_code(process).await, Some(3));
    Ok(())
}

#[tokio::test]
async fn refuses_a_token_that_is_none() {
    for mut process in [
        run("invalid-token", &[]),
        run("", &[("STAND_IN_INVALID_TOKEN", "1")]),
        cloudflared(&["tunnel", "run", "--token", "hunter2"], &[]),
    ] {
        process.plant("hunter2");
        process.wait_for_log("Provided Tunnel token is not valid.", SOON).await.expect("said so");
        assert_eq!(exit_code(process).await, Some(255));
    }
}

#[tokio::test]
async fn reads_the_token_from_a_file() -> Result<()> {
    let missing = cloudflared(&["tunnel", "run"], &[("TUNNEL_TOKEN_FILE", "/no/such/file")]);
    missing.wait_for_log("Failed to read token file: ", SOON).await?;
    assert_eq!(exit_code(missing).await, Some(255));
    let file = std::env::temp_dir().join(format!("stand-in-token-{}", std::process::id()));
    std::fs::write(&file, token("tunnel-9", "exit=5 exit-after=1000") + "\n")?;
    let path = file.to_str().context("path")?;
    let process = cloudflared(&["tunnel", "run", "--token-file", path], &[("TUNNEL_METRICS", "127.0.0.1:0")]);
    process.wait_for_log("tunnelID=tunnel-9", SOON).await?;
    assert_eq!(exit_code(process).await, Some(5));
    Ok(std::fs::remove_file(file)?)
}

#[tokio::test]
async fn fails_without_dns_and_without_its_metrics_address() -> Result<()> {
    let process = run("no-dns speed=50", &[]);
    process
        .wait_for_log("ERR edge discovery: error looking up Cloudflare edge IPs: the DNS query failed", SOON)
        .await?;
    assert_eq!(exit_code(process).await, Some(1));
    let other = run("", &[]);
    let taken = metrics_address(&other).await?;
    let process = run("", &[("TUNNEL_METRICS", &taken)]);
    process.wait_for_log("ERR Error opening metrics server listener error=\"failed to bind", SOON).await?;
    assert_eq!(exit_code(process).await, Some(1));
    Ok(())
}

#[tokio::test]
async fn is_unauthorized_for_ever_and_says_why_over_http2_alone() -> Result<()> {
    let refusal = r#"ERR Register tunnel error from server side error="Unauthorized: Invalid tunnel secret""#;
    let failed = "cloudflared_tunnel_tunnel_register_fail{";
    for (protocol, line, words) in [
        ("http2", refusal, true),
        ("quic", "ERR Serve tunnel error error=\"control stream encountered a failure while serving\"", false),
    ] {
        let process = run("unauthorized speed=20", &[("TUNNEL_TRANSPORT_PROTOCOL", protocol)]);
        let address = metrics_address(&process).await?;
        wait_until("some tries", SOON, async || (process.log().matches(line).count() > 3).then_some(())).await?;
        assert_eq!(process.log().contains("Unauthorized"), words, "{protocol}: {}", process.log());
        assert_eq!(get(&address, "/ready").await?.status, 503);
        assert!(get(&address, "/metrics").await?.body.contains(failed));
    }
    // No protocol chosen: QUIC first, then HTTP/2 after enough refusals.
    run("unauthorized speed=50", &[]).wait_for_log(refusal, SOON).await?;
    // An old version exits instead.
    assert_eq!(exit_code(run("unauthorized version=2025.4.0", &[])).await, Some(1));
    Ok(())
}

#[tokio::test]
async fn drains_unready_and_a_second_signal_cuts_it_short() -> Result<()> {
    let mut process = run("drain=3600000", &[]);
    let address = metrics_address(&process).await?;
    wait_for_connections(&address, 4).await?;
    process.sigterm()?;
    process.wait_for_log("Initiating graceful shutdown due to signal terminated", SOON).await?;
    process.wait_for_log("Unregistered tunnel connection", SOON).await?;
    assert_eq!(wait_for_connections(&address, 0).await?.status, 503);
    assert!(process.is_running()?);
    process.sigterm()?;
    assert_eq!(exit_code(process).await, Some(143));
    Ok(())
}

#[tokio::test]
async fn ends_by_itself_after_its_drain() -> Result<()> {
    for (words, grace) in [("drain=10", "3m"), ("", "3m"), ("drain=3600000", "10ms")] {
        let process = run(words, &[("TUNNEL_GRACE_PERIOD", grace)]);
        wait_for_connections(&metrics_address(&process).await?, 4).await?;
        process.sigterm()?;
        assert_eq!(exit_code(process).await, Some(0), "{words} {grace}");
    }
    assert_eq!(exit_code(run("", &[("TUNNEL_GRACE_PERIOD", "4m")])).await, Some(1));
    Ok(())
}

#[tokio::test]
async fn has_nothing_to_drain_without_a_connection() -> Result<()> {
    let process = run("unready", &[]);
    metrics_address(&process).await?;
    process.sigterm()?;
    assert_eq!(exit_code(process).await, Some(0));
    Ok(())
}

#[tokio::test]
async fn ignores_sigterm_when_told() -> Result<()> {
    let mut process = run("ignore-sigterm", &[]);
    let address = metrics_address(&process).await?;
    wait_for_connections(&address, 4).await?;
    process.sigterm()?;
    assert_eq!(get(&address, "/ready").await?.status, 200);
    assert!(process.is_running()?);
    assert!(!process.log().contains("Initiating"), "{}", process.log());
    Ok(())
}

#[tokio::test]
async fn prints_its_version() {
    let process = cloudflared(&["--version"], &[("STAND_IN_VERSION", "2020.1.0")]);
    process.wait_for_log("cloudflared version 2020.1.0 (built ", SOON).await.expect("version");
    assert_eq!(exit_code(process).await, Some(0));
}

#[tokio::test]
async fn a_typing_mistake_is_not_a_healthy_tunnel() {
    assert_eq!(exit_code(run("unredy", &[])).await, Some(64));
    assert_eq!(exit_code(run("", &[("STAND_IN_UNREDY", "1")])).await, Some(1));
}

#[tokio::test]
async fn the_workload_serves_until_it_is_stopped() -> Result<()> {
    let process = start(env!("CARGO_BIN_EXE_workload"), &[], &[("PORT", "0")]);
    let line = process.wait_for_log("listening on", SOON).await?;
    let port = line.rsplit(':').next().context("port")?;
    let answer = get(&format!("127.0.0.1:{port}"), "/any/path").await?;
    assert!(answer.body.starts_with("hello from "), "{answer:?}");
    process.sigterm()?;
    assert_eq!(exit_code(process).await, Some(0));
    Ok(())
}

#[tokio::test]
async fn the_workload_ends_as_told() {
    let workload = |args: &[&str]| exit_code(start(env!("CARGO_BIN_EXE_workload"), args, &[]));
    assert_eq!(workload(&["exit", "42"]).await, Some(42));
    assert_eq!(workload(&["sleep", "10"]).await, Some(0));
    assert_eq!(workload(&["dance"]).await, Some(64));
}
