//! The agent's own pages, and `healthcheck`, which reads them.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

use dockflare_dev_master::{Fault, Protocol, Route, Times};
use serde_json::{Value, json};
use testkit::http;

use crate::desk::{Desk, stop};
use crate::program::{free_port, run};
use crate::support::SOON;

/// How many connections the agent serves at once from elsewhere, and as many again from this machine.
const PLACES: usize = 8;

/// A desk whose agent serves its pages on the returned port.
async fn desk_with_pages() -> (Desk, u16) {
    let mut desk = Desk::new(Protocol::V2).await.unwrap();
    let port = free_port();
    desk.set("HEALTH_CHECK_PORT", port.to_string());
    (desk, port)
}

/// Sends a request without the test kit's client, so that the test also sees malformed answers.
fn raw(at: (IpAddr, u16), request: &[u8]) -> std::io::Result<String> {
    let mut stream = TcpStream::connect(at)?;
    stream.set_read_timeout(Some(SOON))?;
    stream.write_all(request)?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

/// An address of this machine that others could reach too. Finding it sends nothing.
fn own_address() -> IpAddr {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
    if socket.connect(("192.0.2.1", 9)).is_ok() {
        return socket.local_addr().unwrap().ip();
    }
    // Without a route out, a bridge still has an address. The table lists each local address on the line before its
    // kind.
    let table = std::fs::read_to_string("/proc/net/fib_trie").unwrap();
    let mut before = "";
    let own = table.lines().find_map(|line| {
        let address = std::mem::replace(&mut before, line).trim_start_matches([' ', '|', '-', '+']);
        let address = address.parse::<Ipv4Addr>().ok().filter(|_| line.contains("host LOCAL"));
        address.filter(|address| !address.is_loopback())
    });
    own.unwrap().into()
}

async fn json_of(port: u16, path: &str) -> (u16, Value) {
    let answer = http::get(&format!("127.0.0.1:{port}"), path).await.unwrap();
    (answer.status, serde_json::from_str(&answer.body).unwrap())
}

async fn check(port: &str) -> (Option<i32>, String) {
    run(&["healthcheck"], &[("HEALTH_CHECK_PORT", port)]).await
}

#[tokio::test]
async fn the_health_page_tells_what_is_and_the_check_asks_it() {
    let (desk, port) = desk_with_pages().await;
    assert_eq!(check(&port.to_string()).await.0, Some(1), "nobody listens");
    assert_eq!(check("no port").await.0, Some(1));
    assert_eq!(check("0").await.0, Some(0), "switched off");

    let mut agent = desk.agent().unwrap();
    let known = desk.registered(1).await.unwrap();
    desk.master.enroll(&known.id, "edge").unwrap();
    agent.wait_for_log("command start_tunnel", SOON).await.unwrap();
    // The state is on disk and published by the second look at the latest.
    let seen = testkit::wait_until("the wish for a tunnel", SOON, async || {
        let (code, page) = json_of(port, "/health").await;
        assert_eq!(code, 200);
        Some(page).filter(|page| page["tunnel"]["desired_state"] == "running")
    });
    let seen = seen.await.unwrap();
    let expected = json!({
        "status": "degraded", "agent_id": known.id, "version": env!("CARGO_PKG_VERSION"),
        "registered": true, "protocol": 2, "decommissioned": false, "queue": 0,
        "inventory_complete": false, "containers": null, "unreachable_containers": [], "other_connectors": [],
        "threads": {"commands": true, "reports": true, "events": true, "neighbours": true, "tunnel": true},
    });
    for (key, value) in expected.as_object().unwrap() {
        assert_eq!(&seen[key], value, "{key} of {seen:#}");
    }
    assert!(seen["problems"].as_array().is_some_and(|problems| !problems.is_empty()), "{seen:#}");
    assert!(seen["uptime_seconds"].is_u64(), "{seen:#}");
    assert_eq!(seen["master_connection"]["url"], format!("{}/", desk.master.url()));
    assert!(seen["master_connection"]["seconds_since_contact"].is_u64(), "{seen:#}");
    let tunnel = seen["tunnel"].as_object().unwrap();
    for key in ["state", "reason", "name", "id", "container_running", "ready", "ready_connections", "version"] {
        assert!(tunnel.contains_key(key), "{key} is not in {seen:#}");
    }

    let address = format!("127.0.0.1:{port}");
    assert_eq!(http::get(&address, "/other").await.unwrap().status, 404);
    assert_eq!(http::post(&address, "/health", &json!({})).await.unwrap().status, 405);
    let (code, text) = check(&port.to_string()).await;
    assert!(code == Some(0) && text.contains("degraded") && text.contains("Docker does not answer"), "{text}");
    stop(&mut agent).await.unwrap();
    assert_eq!(check(&port.to_string()).await.0, Some(1), "nobody listens any more");
}

#[tokio::test]
async fn an_agent_whose_master_is_away_is_alive() {
    let (desk, port) = desk_with_pages().await;
    desk.master.fault(Route::Any, Fault::status(503), Times::UntilCleared);
    let mut agent = desk.agent().unwrap();
    agent.wait_for_log("answered 503", SOON).await.unwrap();
    assert_eq!(json_of(port, "/live").await, (200, json!({ "live": true })));
    let (code, text) = check(&port.to_string()).await;
    assert!(code == Some(0) && text.starts_with("degraded: not registered at the master"), "{code:?} {text}");
    stop(&mut agent).await.unwrap();
}

#[tokio::test]
async fn a_data_folder_that_is_gone_makes_the_agent_unhealthy_until_it_is_back() {
    let (mut desk, port) = desk_with_pages().await;
    let (data, aside) = (desk.path("state"), desk.path("aside"));
    desk.set("DOCKFLARE_DATA_DIR", data.display().to_string());
    let mut agent = desk.agent().unwrap();
    desk.registered(1).await.unwrap();
    testkit::wait_until("the stored id", SOON, async || data.join("agent_id.txt").exists().then_some(()))
        .await
        .unwrap();
    std::fs::rename(&data, &aside).unwrap();
    let (code, live) = json_of(port, "/live").await;
    assert!(code == 503 && live["problems"][0].as_str().unwrap().contains("cannot be written"), "{live}");
    let (code, health) = json_of(port, "/health").await;
    assert_eq!((code, &health["status"]), (503, &json!("unhealthy")), "{health}");
    let (code, text) = check(&port.to_string()).await;
    assert!(code == Some(1) && text.starts_with("unhealthy: ") && text.contains("cannot be written"), "{text}");
    std::fs::rename(&aside, &data).unwrap();
    assert_eq!(check(&port.to_string()).await.0, Some(0));
    stop(&mut agent).await.unwrap();
}

#[tokio::test]
async fn ready_says_whether_the_tunnel_carries_traffic_and_why_not() {
    let (desk, port) = desk_with_pages().await;
    let mut agent = desk.agent().unwrap();
    agent.wait_for_log("registered", SOON).await.unwrap();
    let ready = testkit::wait_until("the supervisor's first look", SOON, async || {
        Some(json_of(port, "/ready").await).filter(|(_, ready)| ready["state"] == "error")
    });
    let expected = json!({
        "ready": false, "state": "error", "reason": "docker_unreachable", "ready_connections": null,
    });
    assert_eq!(ready.await.unwrap(), (503, expected));
    stop(&mut agent).await.unwrap();
}

#[tokio::test]
async fn metrics_are_what_the_documentation_says_and_hold_nothing_secret() {
    let (desk, port) = desk_with_pages().await;
    let mut agent = desk.agent().unwrap();
    let known = desk.registered(1).await.unwrap();
    desk.master.enroll(&known.id, "edge").unwrap();
    agent.wait_for_log("command start_tunnel", SOON).await.unwrap();
    let at = (Ipv4Addr::LOCALHOST.into(), port);
    let answer = raw(at, b"GET /metrics HTTP/1.1\r\nHost: agent\r\n\r\n").unwrap();
    let (head, text) = answer.split_once("\r\n\r\n").unwrap();
    let is_text = head.to_ascii_lowercase().contains("content-type: text/plain; version=0.0.4");
    assert!(head.starts_with("HTTP/1.1 200") && is_text, "{head}");
    for line in [
        concat!("dockflare_agent_build_info{version=\"", env!("CARGO_PKG_VERSION"), "\"} 1"),
        "dockflare_agent_registered 1",
        "dockflare_agent_protocol 2",
        "dockflare_agent_tunnel_ready 0",
        "dockflare_agent_commands_total{action=\"start_tunnel\",outcome=\"carried_out\"} 1",
        "dockflare_agent_master_requests_total{route=\"register\",code=\"201\"} 1",
        "dockflare_agent_task_up{task=\"tunnel\"} 1",
    ] {
        assert!(text.lines().any(|known| known == line), "{line} is not in {text}");
    }
    let said: Vec<_> = text.lines().filter_map(|line| line.strip_prefix("# TYPE ")).collect();
    let documented = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/monitoring.md")).unwrap();
    let rows = documented.lines().filter_map(|line| line.strip_prefix("| `dockflare_agent_"));
    let rows: Vec<_> = rows
        .map(|row| {
            let mut cells = row.split(" | ");
            let name = cells.next().unwrap().trim_end_matches('`');
            format!("dockflare_agent_{name} {}", cells.next().unwrap())
        })
        .collect();
    let sorted = |mut lines: Vec<String>| {
        lines.sort();
        lines
    };
    assert_eq!(sorted(said.iter().map(ToString::to_string).collect()), sorted(rows), "docs/monitoring.md");
    let token = &desk.file("tunnel_state.json").unwrap();
    let token = serde_json::from_str::<Value>(token).unwrap()["token"].as_str().unwrap().to_owned();
    for secret in [&desk.key, &token] {
        assert!(!answer.contains(secret.as_str()));
    }
    stop(&mut agent).await.unwrap();
}

#[tokio::test]
async fn an_agent_whose_key_was_revoked_is_not_called_registered() {
    let (desk, port) = desk_with_pages().await;
    let mut agent = desk.agent().unwrap();
    desk.registered(1).await.unwrap();
    let is_registered = async |expected: bool| {
        testkit::wait_until("the page to say so", SOON, async || {
            let (_, page) = json_of(port, "/health").await;
            (page["registered"] == expected).then_some(page)
        })
        .await
        .unwrap()
    };
    is_registered(true).await;
    desk.master.revoke_key(&desk.key).unwrap();
    let page = is_registered(false).await;
    let problems = page["problems"].to_string();
    assert!(page["status"] == "degraded" && problems.contains("the master refuses this agent"), "{page:#}");
    let metrics = http::get(&format!("127.0.0.1:{port}"), "/metrics").await.unwrap().body;
    assert!(metrics.contains("dockflare_agent_registered 0\n"), "{metrics}");
    stop(&mut agent).await.unwrap();
}

#[tokio::test]
async fn those_who_dawdle_or_ask_too_much_keep_nobody_else_from_an_answer() {
    let (desk, port) = desk_with_pages().await;
    let mut agent = desk.agent().unwrap();
    agent.wait_for_log("registered", SOON).await.unwrap();
    let far = (own_address(), port);
    let mut dawdlers: Vec<_> = (0..3 * PLACES).map(|_| TcpStream::connect(far).unwrap()).collect();
    for dawdler in &mut dawdlers {
        // The agent closes connections beyond its limit, so this write may fail.
        let _ = dawdler.write_all(b"GET /health HTTP/1.1\r\nHost: ");
        dawdler.set_read_timeout(Some(SOON)).unwrap();
    }
    assert_eq!(check(&port.to_string()).await.0, Some(0), "one from this machine has a place");
    let closed = |dawdler: &mut TcpStream| matches!(dawdler.read(&mut [0; 64]), Ok(0) | Err(_));
    assert!(dawdlers[PLACES..].iter_mut().all(closed), "who finds no place is closed");
    // By then the other connections time out too, and there are free places again.
    let answer = testkit::wait_until("a place", SOON, async || {
        raw(far, b"GET /live HTTP/1.1\r\nHost: agent\r\n\r\n").ok().filter(|answer| answer.contains("200 OK"))
    });
    answer.await.unwrap();

    let long = format!("GET /health HTTP/1.1\r\nHost: agent\r\nX: {}\r\n\r\n", "x".repeat(1 << 20));
    let refused = raw(far, long.as_bytes());
    assert!(refused.as_ref().map_or(true, |answer| !answer.contains("200 OK")), "{refused:?}");
    let with_body = b"GET /live HTTP/1.1\r\nHost: agent\r\nContent-Length: 999999999\r\n\r\nx";
    let answered = raw(far, with_body);
    assert!(answered.is_ok_and(|answer| answer.contains("200 OK")), "a body is not waited for");
    assert_eq!(check(&port.to_string()).await.0, Some(0));
    stop(&mut agent).await.unwrap();
}

#[tokio::test]
async fn the_log_is_shown_to_this_machine_only() {
    let (desk, port) = desk_with_pages().await;
    let mut agent = desk.agent().unwrap();
    agent.wait_for_log("dockflare-agent runs", SOON).await.unwrap();
    let (code, log) = json_of(port, "/log").await;
    let lines: Vec<_> = log["lines"].as_array().unwrap().iter().map(|line| line.as_str().unwrap()).collect();
    assert!(code == 200 && lines.iter().any(|line| line.contains("dockflare-agent runs version=")), "{log}");
    let far = raw((own_address(), port), b"GET /log HTTP/1.1\r\nHost: agent\r\n\r\n").unwrap();
    assert!(far.starts_with("HTTP/1.1 404"), "{far}");
    stop(&mut agent).await.unwrap();
}

#[tokio::test]
async fn the_pages_can_be_kept_to_one_address() {
    let (mut desk, port) = desk_with_pages().await;
    desk.set("HEALTH_CHECK_BIND", "127.0.0.1");
    let mut agent = desk.agent().unwrap();
    agent.wait_for_log("registered", SOON).await.unwrap();
    assert_eq!(json_of(port, "/live").await.0, 200);
    TcpStream::connect_timeout(&(own_address(), port).into(), Duration::from_secs(5)).unwrap_err();
    stop(&mut agent).await.unwrap();
}

#[tokio::test]
async fn a_port_that_is_taken_is_a_bad_configuration() {
    let mut desk = Desk::new(Protocol::V2).await.unwrap();
    let taken = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
    desk.set("HEALTH_CHECK_PORT", taken.local_addr().unwrap().port().to_string());
    let mut agent = desk.agent().unwrap();
    assert_eq!(agent.wait_exit(SOON).await.unwrap().code(), Some(64));
    assert!(agent.log().contains("HEALTH_CHECK_PORT"));
}
