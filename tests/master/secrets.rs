//! What must never appear in a log or on the health page, at any level and in any format.

use std::net::{Ipv4Addr, TcpListener};

use dockflare_dev_master::{DevMaster, Fault, Protocol, Route};
use serde_json::json;

use crate::desk::{Desk, stop};
use crate::support::SOON;

#[tokio::test]
async fn no_secret_is_in_the_log_or_on_the_health_page() {
    for (format, protocol) in [("text", Protocol::V1), ("json", Protocol::V2)] {
        let (id, secret) = ("4cc355-id.access", "s3cret-of-access");
        let desk = DevMaster::builder().protocol(protocol).access(id, secret).account("acc");
        let mut desk = Desk::with(desk).await.unwrap();
        let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port();
        for (name, value) in [
            ("CF_ACCESS_CLIENT_ID", id),
            ("CF_ACCESS_CLIENT_SECRET", secret),
            ("LOG_LEVEL", "TRACE"),
            ("LOG_FORMAT", format),
            ("HEALTH_CHECK_PORT", &port.to_string()),
        ] {
            desk.set(name, value);
        }
        let mut agent = desk.agent().unwrap();
        let known = desk.registered(1).await.unwrap();
        let good = desk.master.enroll(&known.id, "edge").unwrap();
        agent.wait_for_log("command start_tunnel", SOON).await.unwrap();
        // Secrets slip out when something goes wrong: an invalid token, a broken reply, a refused key.
        let bad = "n0t-a-token-but-secret-all-the-same";
        desk.master.enroll_with(&known.id, "bad", "some-tunnel", bad).unwrap();
        agent.wait_for_log("refusing a tunnel command", SOON).await.unwrap();
        let rules = json!({"action": "update_tunnel_config", "rules": {"r": {"hostname": "a.example", "service": "http://a", "status": "active"}}});
        desk.master.push_commands(&known.id, vec![rules, json!({"action": "explode", "token": bad})]).unwrap();
        agent.wait_for_log("explode", SOON).await.unwrap();
        desk.master.fault(Route::Commands, Fault::Truncated, 2);
        desk.master.redeploy(&known.id).unwrap();
        agent.wait_for_log("the master works again", SOON).await.unwrap();
        desk.master.revoke_key(&desk.key).unwrap();
        agent.wait_for_log("refuses the agent key with 401", SOON).await.unwrap();

        let page = testkit::http::get(&format!("127.0.0.1:{port}"), "/health").await.unwrap().body;
        stop(&mut agent).await.unwrap();
        let log = agent.log();
        let claims = good.token.clone();
        for (what, hidden) in
            [("key", &*desk.key), ("Access id", id), ("Access secret", secret), ("token", &claims), ("bad token", bad)]
        {
            agent.plant(hidden);
            assert!(!log.contains(hidden), "{what} is in the log");
            assert!(!page.contains(hidden), "{what} is on the page");
        }
        assert!(format == "text" || log.lines().all(|line| line.starts_with('{') && line.ends_with('}')), "{log}");
        desk.assert_no_violations();
    }
}
