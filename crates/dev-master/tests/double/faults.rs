//! Faults as a client sees them.

use std::time::Duration;

use dockflare_dev_master::{DevMaster, Fault, Route, Times};
use reqwest::Method;
use serde_json::json;
use tokio::time::Instant;

use crate::caller::*;

/// A registered agent with a queued tunnel command, on a master that has `fault` set for one commands request.
async fn faulty(fault: Fault) -> (DevMaster, Caller, String) {
    let master = v2().await;
    let caller = Caller::fresh(&master);
    let id = caller.joined().await;
    master.enroll(&id, "edge").unwrap();
    master.fault(Route::Commands, fault, 1);
    (master, caller, id)
}

/// Polls without a fault, and returns how many commands that delivers.
async fn left(caller: &Caller, id: &str) -> usize {
    caller.commands(id).await.body["commands"].as_array().unwrap().len()
}

fn path(id: &str) -> String {
    format!("/api/v2/agents/{id}/commands")
}

#[tokio::test]
async fn a_status_comes_with_html_or_a_code_and_has_no_effect() {
    let (master, caller, id) = faulty(Fault::status(503).retry_after("7")).await;
    let response = caller.raw(Method::GET, &path(&id), None).await.unwrap();
    assert_eq!(response.status(), 503);
    assert_eq!(response.headers()["retry-after"], "7");
    assert!(response.headers()["content-type"].to_str().unwrap().starts_with("text/html"));
    assert!(response.text().await.unwrap().contains("<html>"));
    assert_eq!(left(&caller, &id).await, 1);
    master.fault(Route::Register, Fault::code(503, "persistence_failed"), 1);
    caller.register(&registration()).await.is(503, "persistence_failed");
    let requests = master.requests();
    let last = requests.last().unwrap();
    assert_eq!((last.status, last.code.as_deref()), (Some(503), Some("persistence_failed")));
    assert_eq!(last.fault, Some(Fault::code(503, "persistence_failed")));
}

#[tokio::test]
async fn cut_before_has_no_effect() {
    let (master, caller, id) = faulty(Fault::CutBefore).await;
    let error = caller.raw(Method::GET, &path(&id), None).await.unwrap_err();
    assert!(error.status().is_none() && error.is_request(), "{error:?}");
    assert_eq!(master.requests().last().unwrap().status, None);
    assert_eq!(left(&caller, &id).await, 1);
}

#[tokio::test]
async fn a_lost_reply_has_its_effect() {
    let (master, caller, id) = faulty(Fault::LostReply).await;
    let error = caller.raw(Method::GET, &path(&id), None).await.unwrap_err();
    assert!(error.status().is_none() && error.is_request(), "{error:?}");
    assert_eq!(master.requests().last().unwrap().status, None);
    assert_eq!(left(&caller, &id).await, 0);
}

#[tokio::test]
async fn cut_halfway_shows_the_head_and_breaks_the_body() {
    let (_master, caller, id) = faulty(Fault::CutHalfway).await;
    let mut response = caller.raw(Method::GET, &path(&id), None).await.unwrap();
    assert_eq!(response.status(), 200);
    let announced = response.content_length().unwrap();
    let mut received = 0;
    let error = loop {
        match response.chunk().await {
            Ok(Some(chunk)) => received += chunk.len() as u64,
            Ok(None) => panic!("the body ended well after {received} of {announced}"),
            Err(error) => break error,
        }
    };
    assert!(error.is_body() || error.is_decode(), "{error:?}");
    assert_eq!(received, announced / 2);
    assert_eq!(left(&caller, &id).await, 0);
}

#[tokio::test]
async fn a_truncated_reply_arrives_well_but_is_not_json() {
    let (_master, caller, id) = faulty(Fault::Truncated).await;
    let response = caller.raw(Method::GET, &path(&id), None).await.unwrap();
    assert_eq!(response.status(), 200);
    let text = response.text().await.unwrap();
    assert!(text.starts_with('{') && serde_json::from_str::<serde_json::Value>(&text).is_err());
    assert_eq!(left(&caller, &id).await, 0);
}

#[tokio::test]
async fn other_peoples_pages_have_no_effect() {
    let (master, caller, id) = faulty(Fault::NotJson).await;
    let answer = caller.commands(&id).await;
    assert_eq!(answer.status, 200);
    assert!(answer.body.as_str().unwrap().contains("<html>"));
    master.fault(Route::Commands, Fault::LoginRedirect, 1);
    let response = caller.raw(Method::GET, &path(&id), None).await.unwrap();
    assert_eq!(response.status(), 302);
    assert!(response.headers()["location"].to_str().unwrap().starts_with("https://"));
    assert_eq!(left(&caller, &id).await, 1);
}

#[tokio::test(start_paused = true)]
async fn a_delay_delays() {
    let (_master, caller, id) = faulty(Fault::delay(Duration::from_secs(3600))).await;
    let before = Instant::now();
    assert_eq!(left(&caller, &id).await, 1);
    assert!(before.elapsed() >= Duration::from_secs(3600));
}

#[tokio::test]
async fn a_held_request_goes_on_when_the_faults_are_cleared() {
    let (master, caller, id) = faulty(Fault::Hold).await;
    let held = tokio::spawn({
        let (caller, id) = (caller.clone(), id.clone());
        async move { left(&caller, &id).await }
    });
    master.wait_for("the request to be held", LONG, |seen| (seen.faults == 0).then_some(())).await.unwrap();
    assert_eq!(master.snapshot().agents[&id].queued, 1);
    master.clear_faults();
    assert_eq!(held.await.unwrap(), 1);
}

#[tokio::test]
async fn a_client_that_hangs_up_on_a_held_request_leaves_no_effect() {
    let (master, caller, id) = faulty(Fault::Hold).await;
    let held = tokio::spawn({
        let (caller, id) = (caller.clone(), id.clone());
        async move { left(&caller, &id).await }
    });
    master.wait_for("the request to be held", LONG, |seen| (seen.faults == 0).then_some(())).await.unwrap();
    held.abort();
    let gone = |request: &dockflare_dev_master::Request| (request.fault == Some(Fault::Hold)).then_some(request.status);
    let status = master.wait_for_request("the loss to be noticed", LONG, gone).await.unwrap();
    assert_eq!(status, None);
    assert_eq!(left(&caller, &id).await, 1);
}

#[tokio::test]
async fn a_fault_acts_on_its_route_until_it_is_cleared() {
    let (master, caller, id) = faulty(Fault::status(500)).await;
    master.clear_faults();
    master.fault(Route::Any, Fault::status(502), Times::UntilCleared);
    for _ in 0..3 {
        assert_eq!(caller.commands(&id).await.status, 502);
        assert_eq!(caller.register(&registration()).await.status, 502);
    }
    master.clear_faults();
    master.fault(Route::Events, Fault::status(429), 2);
    assert_eq!(caller.commands(&id).await.status, 200);
    assert_eq!(caller.events(&id, &json!({})).await.status, 429);
    assert_eq!(caller.events(&id, &json!({})).await.status, 429);
    assert_eq!(caller.events(&id, &json!({})).await.status, 400);
}

#[tokio::test]
async fn requests_of_one_stream_that_overlap_are_a_violation() {
    let master = v2().await;
    let mut agent = Session::begin(Caller::fresh(&master)).await;
    master.fault(Route::Events, Fault::Hold, 2);
    let mut held = Vec::new();
    let report = json!({ "inventory_complete": false });
    for body in [agent.next("heartbeat", &json!({})), agent.next("status_report", &report)] {
        let (caller, id) = (agent.caller.clone(), agent.agent.clone());
        held.push(tokio::spawn(async move { caller.events(&id, &body).await.status }));
    }
    master.wait_for("both to be held", LONG, |seen| (seen.faults == 0).then_some(())).await.unwrap();
    // Send another request of one stream, and none of the other, while both are in flight.
    agent.events = 10;
    agent.send("heartbeat", &json!({})).await.is(202, "accepted_noop");
    clean(&master);
    master.clear_faults();
    for task in held {
        task.await.unwrap();
    }
    violated(&master, "another request of the stream of events");
    assert!(!master.violations().iter().any(|what| what.contains("stream of reports")));
}

#[tokio::test]
async fn a_retry_after_hanging_up_is_no_overlap() {
    let master = v2().await;
    let mut agent = Session::begin(Caller::fresh(&master)).await;
    master.fault(Route::Events, Fault::Hold, 1);
    let body = agent.next("heartbeat", &json!({}));
    let first = tokio::spawn({
        let (caller, id, body) = (agent.caller.clone(), agent.agent.clone(), body.clone());
        async move { caller.events(&id, &body).await.status }
    });
    master.wait_for("the first to be held", LONG, |seen| (seen.faults == 0).then_some(())).await.unwrap();
    first.abort();
    agent.caller.events(&agent.agent, &body).await.is(202, "accepted_noop");
    let lost = |request: &dockflare_dev_master::Request| request.fault.is_some().then_some(());
    master.wait_for_request("the loss to be noticed", LONG, lost).await.unwrap();
    clean(&master);
}
