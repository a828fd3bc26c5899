//! Waits for what the double sees, and pauses the double for a while.

use std::time::Duration;

use dockflare_dev_master::Fault;
use dockflare_dev_master::Route;
use serde_json::json;

use crate::caller::*;

#[tokio::test]
async fn a_wait_is_woken_by_the_change_it_waits_for() {
    let master = v2().await;
    let mut agent = Session::begin(Caller::fresh(&master)).await;
    let id = agent.agent.clone();
    let running = master.wait_for("the tunnel to run", LONG, |seen| {
        let status = seen.only_agent()?.tunnel_state()?;
        (status == "running").then(|| seen.agents[&id].polls)
    });
    let work = async {
        agent.send("tunnel_status", &json!({ "status": "starting" })).await;
        agent.caller.commands(&agent.agent.clone()).await;
        agent.send("tunnel_status", &json!({ "status": "running" })).await;
    };
    assert_eq!(tokio::join!(running, work).0.unwrap(), 1);
}

#[tokio::test]
async fn a_wait_in_vain_tells_what_was_seen_without_secrets() {
    let master = v2().await;
    let caller = Caller::fresh(&master);
    let id = caller.joined().await;
    let token = master.enroll(&id, "edge").unwrap().token;
    caller.events(&id, &merged(&event("heartbeat"), &json!({ "note": token }))).await;
    let error = master.wait_for("pigs to fly", Duration::ZERO, |_| None::<()>).await.unwrap_err().to_string();
    for part in ["pigs to fly", &id, "POST /api/v2/agents/register -> 201 registered", "violation: ", "(hidden)"] {
        assert!(error.contains(part), "{part} in {error}");
    }
    assert!(!error.contains(caller.key()) && !error.contains(&token));
}

#[tokio::test(start_paused = true)]
async fn an_agent_is_offline_60_seconds_after_its_last_request() {
    let master = v2().await;
    let caller = Caller::fresh(&master);
    let id = caller.joined().await;
    caller.commands(&id).await;
    assert!(master.snapshot().agents[&id].online);
    let before = tokio::time::Instant::now();
    master
        .wait_for("the agent to go offline", LONG * 10, |seen| (!seen.agents[&id].online).then_some(()))
        .await
        .unwrap();
    assert!(before.elapsed() >= Duration::from_secs(59) && before.elapsed() <= Duration::from_secs(61));
}

#[tokio::test]
async fn a_paused_master_refuses_connections_and_comes_back_on_its_port() {
    let master = v2().await;
    let caller = Caller::fresh(&master);
    let id = caller.joined().await;
    let url = master.url();
    master.pause().await.unwrap();
    master.pause().await.unwrap();
    let refused = client().get(&url).send().await.unwrap_err();
    assert!(refused.is_connect(), "{refused:?}");
    let pooled = caller.raw(reqwest::Method::GET, "/", None).await.unwrap_err();
    assert!(pooled.is_connect() || pooled.is_request(), "{pooled:?}");
    master.resume().await.unwrap();
    master.resume().await.unwrap();
    assert_eq!(master.url(), url);
    assert_eq!(caller.commands(&id).await.status, 200);
    let inside = master.while_paused(async { client().get(&url).send().await.is_err() }).await.unwrap();
    assert!(inside);
    assert_eq!(caller.commands(&id).await.status, 200);
}

#[tokio::test]
async fn a_pause_cuts_what_is_under_way() {
    let master = v2().await;
    let caller = Caller::fresh(&master);
    let id = caller.joined().await;
    master.fault(Route::Commands, Fault::Hold, 1);
    let held = tokio::spawn(async move {
        caller.raw(reqwest::Method::GET, &format!("/api/v2/agents/{id}/commands"), None).await.is_err()
    });
    master.wait_for("the request to be held", LONG, |seen| (seen.faults == 0).then_some(())).await.unwrap();
    master.pause().await.unwrap();
    assert!(held.await.unwrap());
}

#[tokio::test]
async fn a_dropped_master_is_gone() {
    let master = v2().await;
    let caller = Caller::fresh(&master);
    caller.joined().await;
    let address = master.address();
    drop(master);
    // The abort takes effect when the runtime next runs. Each try yields to let it.
    while tokio::net::TcpStream::connect(address).await.is_ok() {
        tokio::task::yield_now().await;
    }
}
