//! Tests trouble around the process: no way to the edge, no UDP, little memory.

use super::*;

const QUIC_FAILED: &str = "ERR Failed to dial a quic connection \
    error=\"failed to dial to edge with quic: timeout: no recent network activity\" connIndex=0 event=0 ip=";
const HTTP2_FAILED: &str =
    "ERR Unable to establish connection with Cloudflare edge error=\"DialContext error: dial tcp ";

#[tokio::test]
async fn cannot_reach_the_edge_until_told_otherwise() -> Result<()> {
    for (protocol, failed) in [("quic", QUIC_FAILED), ("http2", HTTP2_FAILED)] {
        let process = run("unreachable speed=50", &[("TUNNEL_TRANSPORT_PROTOCOL", protocol)]);
        let address = metrics_address(&process).await?;
        process.wait_for_log(failed, SOON).await?;
        process.wait_for_log("INF Retrying connection in up to 4s connIndex=0 event=0 ip=", SOON).await?;
        assert_eq!(get(&address, "/ready").await?.status, 503);
        post(&address, "/stand-in", &json!({"unreachable": false})).await?;
        wait_for_connections(&address, 4).await?;
        post(&address, "/stand-in", &json!({"unreachable": true})).await?;
        wait_for_connections(&address, 0).await?;
        let page = get(&address, "/metrics").await?.body;
        assert!(!page.contains("register_fail"), "nobody answered: {page}");
    }
    Ok(())
}

#[tokio::test]
async fn falls_back_to_http2_without_udp() -> Result<()> {
    for env in [&[][..], &[("TUNNEL_TRANSPORT_PROTOCOL", "auto")]] {
        let process = run("udp-blocked speed=200", env);
        let address = metrics_address(&process).await?;
        wait_for_connections(&address, 4).await?;
        let log = process.log();
        assert!(log.contains("INF Initial protocol quic"), "{log}");
        assert!(log.contains(QUIC_FAILED), "{log}");
        assert!(log.contains("INF Switching to fallback protocol http2 connIndex=0 event=0 ip="), "{log}");
        assert_eq!(log.matches("protocol=http2").count(), 4, "{log}");
        let diag: Value = serde_json::from_str(&get(&address, "/diag/tunnel").await?.body)?;
        assert_eq!(
            (&diag["connections"][0]["isConnected"], diag["connections"][0].get("protocol")),
            (&json!(true), None)
        );
    }
    Ok(())
}

#[tokio::test]
async fn has_no_fallback_where_quic_was_chosen() -> Result<()> {
    for env in [("TUNNEL_TRANSPORT_PROTOCOL", "quic"), ("TUNNEL_POST_QUANTUM", "true")] {
        let process = run("udp-blocked speed=200", &[env]);
        let enough = async || (process.log().matches("Retrying connection in up to 1m4s").count() > 9).then_some(());
        wait_until("longer than a fallback takes", SOON, enough).await?;
        let log = process.log();
        assert!(log.contains(QUIC_FAILED) && !log.contains("Switching"), "{log}");
        assert_eq!(get(&metrics_address(&process).await?, "/ready").await?.status, 503);
    }
    Ok(())
}

#[tokio::test]
async fn needs_no_udp_where_http2_was_chosen() -> Result<()> {
    let process = run("udp-blocked", &[("TUNNEL_TRANSPORT_PROTOCOL", "http2")]);
    wait_for_connections(&metrics_address(&process).await?, 4).await?;
    assert!(!process.log().contains("Failed to dial"));
    Ok(())
}

#[tokio::test]
async fn takes_the_memory_it_is_told_to() -> Result<()> {
    let resident = |process: &AgentProcess| -> Option<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", process.pid())).ok()?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
        line.split_whitespace().next()?.parse().ok()
    };
    let process = run("ready-after=1", &[]);
    let address = metrics_address(&process).await?;
    wait_for_connections(&address, 4).await?;
    assert!(resident(&process).context("VmRSS")? < 48 * 1024);
    post(&address, "/stand-in", &json!({"eat": 48})).await?;
    wait_until("memory", SOON, async || resident(&process).filter(|kib| *kib >= 48 * 1024)).await?;
    assert_eq!(wait_for_connections(&address, 4).await?.status, 200);
    Ok(())
}
