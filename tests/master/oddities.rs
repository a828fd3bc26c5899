//! A master with well-formed answers that no agent can use, a second agent with the same key, and a request that gets
//! lost on the way.

use std::time::Duration;

use dockflare_dev_master::{Fault, Protocol, Route, Times};
use futures_util::future::join_all;
use serde_json::{Value, json};
use testkit::{AgentProcess, http};
use tokio::time::Instant;

use crate::desk::{BOTH, Desk, stop};
use crate::program::free_port;
use crate::support::checked::Checked;
use crate::support::{SOON, agent_binary};

/// A desk whose agent serves its pages on the returned port.
async fn desk_with_pages(protocol: Protocol) -> (Desk, u16) {
    let mut desk = Desk::new(protocol).await.unwrap();
    let port = free_port();
    desk.set("HEALTH_CHECK_PORT", port.to_string());
    (desk, port)
}

/// The concerns that `/health` lists.
async fn concerns(port: u16) -> Vec<Value> {
    let Ok(answer) = http::get(&format!("127.0.0.1:{port}"), "/health").await else { return Vec::new() };
    let page: Value = serde_json::from_str(&answer.body).unwrap();
    page["concerns"].as_array().cloned().unwrap_or_default()
}

/// Waits for a concern with this id.
async fn concern(port: u16, id: &str) -> Value {
    let found = async || concerns(port).await.into_iter().find(|concern| concern["id"] == id);
    testkit::wait_until(id, 2 * SOON, found).await.unwrap()
}

#[tokio::test]
async fn a_registration_that_cannot_be_used_is_said_once_listed_and_tried_again() {
    let cases = [
        (json!({ "protocol_version": 7, "agent_session_id": "s" }), "agreed to protocol 7, which was not offered"),
        (json!({ "protocol_version": 2 }), "agreed to protocol 2 without naming a session"),
        (json!({ "protocol_version": 2, "agent_session_id": "" }), "agreed to protocol 2 without naming a session"),
    ];
    let rows = cases.map(async |(mut reply, words)| {
        let (desk, port) = desk_with_pages(Protocol::V2).await;
        (reply["code"], reply["agent_id"]) = (json!("registered"), json!("an-agent"));
        desk.master.fault(Route::Register, Fault::reply(201, reply), Times::UntilCleared);
        let mut agent = desk.agent().unwrap();
        let line = agent.wait_for_log(words, SOON).await.unwrap();
        assert!(line.contains("WARN registration: the master agreed") && line.contains("update the older"), "{line}");
        let listed = concern(port, "registration").await;
        assert!(listed["problem"].as_str().unwrap().contains(words), "{listed}");
        // The agent tries again, and does not log it again.
        let tries = async || {
            let asked = desk.master.requests();
            (asked.iter().filter(|request| request.route == Route::Register).count() > 3).then_some(())
        };
        testkit::wait_until("more tries", SOON, tries).await.unwrap();
        assert_eq!(agent.log().matches(words).count(), 1, "{}", agent.log());
        desk.master.clear_faults();
        agent.wait_for_log("registration: works again", SOON).await.unwrap();
        let gone = async || concerns(port).await.iter().all(|one| one["id"] != "registration").then_some(());
        testkit::wait_until("an end of it", SOON, gone).await.unwrap();
        stop(&mut agent).await.unwrap();
    });
    join_all(rows).await;
}

#[tokio::test]
async fn rules_for_which_the_master_names_no_account_are_kept_said_and_handed_on_later() {
    for (answer, words) in [
        (json!({ "success": true, "result": [] }), "names no Cloudflare account"),
        (json!({ "success": false, "result": [{ "id": "acc" }] }), "names no Cloudflare account"),
    ] {
        let (desk, port) = desk_with_pages(Protocol::V2).await;
        desk.master.set_account(Some("acc"));
        desk.master.fault(Route::Accounts, Fault::reply(200, answer), Times::UntilCleared);
        let mut agent = desk.agent().unwrap();
        let id = desk.registered(1).await.unwrap().id;
        desk.master.enroll(&id, "edge").unwrap();
        let rule = json!({ "hostname": "a.example.com", "service": "http://a", "status": "active" });
        desk.master
            .push_commands(&id, vec![json!({ "action": "update_tunnel_config", "rules": { "a": rule } })])
            .unwrap();
        let line = agent.wait_for_log(words, SOON).await.unwrap();
        assert!(line.contains("WARN handing on ingress rules:") && line.contains("the rules are kept"), "{line}");
        concern(port, "ingress").await;
        desk.master.clear_faults();
        agent.wait_for_log("ingress rules pushed", SOON).await.unwrap();
        assert!(concerns(port).await.iter().all(|one| one["id"] != "ingress"));
        assert_eq!(agent.log().matches(words).count(), 1);
        stop(&mut agent).await.unwrap();
    }
}

/// As on a host cloned with its `.env`.
#[tokio::test]
async fn another_agent_with_the_same_key_is_told_once_on_both_hosts() {
    let (desk, port) = desk_with_pages(Protocol::V2).await;
    let mut first = desk.agent().unwrap();
    desk.registered(1).await.unwrap();
    let data = tempfile::tempdir().unwrap();
    let mut env = desk.env.clone();
    let other_port = free_port();
    env.push(("DOCKFLARE_DATA_DIR".to_owned(), data.path().display().to_string()));
    env.push(("HEALTH_CHECK_PORT".to_owned(), other_port.to_string()));
    let mut second = AgentProcess::spawn(&agent_binary(), &env, data.path()).unwrap();
    let words = "another agent uses this key: each host needs its own";
    for (agent, port) in [(&first, port), (&second, other_port)] {
        let line = agent.wait_for_log(words, 4 * SOON).await.unwrap();
        assert!(line.contains("WARN") && line.contains("generate a key for each"), "{line}");
        let listed = concern(port, "same_key").await;
        assert_eq!(listed["problem"], words);
    }
    let checked = Checked::new(&desk.env, desk.data.path(), &[&desk.key]).await.unwrap();
    let told = checked.is("agent.same_key", "warn").unwrap();
    assert!(told.contains(words) && told.contains("generate a key for each"), "{told}");
    assert_eq!(first.log().matches(words).count(), 1, "{}", first.log());
    stop(&mut second).await.unwrap();
    stop(&mut first).await.unwrap();
}

#[tokio::test]
async fn a_master_that_is_restarted_and_forgets_its_sessions_is_no_other_agent() {
    let (desk, port) = desk_with_pages(Protocol::V2).await;
    let mut agent = desk.agent().unwrap();
    let id = desk.registered(1).await.unwrap().id;
    for time in 2..=6 {
        let mark = agent.mark();
        desk.master.pause().await.unwrap();
        agent.wait_for_log_after(mark, "the master cannot be reached", SOON).await.unwrap();
        desk.master.end_session(&id).unwrap();
        desk.master.resume().await.unwrap();
        desk.registered(time).await.unwrap();
        agent.wait_for_log_after(mark, "the master works again", SOON).await.unwrap();
    }
    assert!(!agent.log().contains("another agent"), "{}", agent.log());
    assert!(concerns(port).await.iter().all(|one| one["id"] != "same_key"));
    stop(&mut agent).await.unwrap();
}

/// The connection is open but dead, as after a short network outage: a request sent on it never gets an answer, but a
/// later request does.
#[tokio::test]
async fn a_request_that_is_never_answered_is_given_up_once_a_later_one_is() {
    let rows = BOTH.iter().flat_map(|&protocol| [(protocol, Route::Commands), (protocol, Route::Events)]);
    let rows = rows.map(async |(protocol, route)| {
        let desk = Desk::new(protocol).await.unwrap();
        let mut agent = desk.agent().unwrap();
        let id = desk.registered(1).await.unwrap().id;
        desk.answered(Route::Commands, 200).await.unwrap();
        desk.master.fault(route, Fault::Hold, 1);
        desk.master.wait_for("the request", SOON, |known| (known.faults == 0).then_some(())).await.unwrap();
        let began = Instant::now();
        // The double records the first request when its client hangs up.
        let given_up = desk.master.wait_for_request("the request to be given up", 3 * SOON, |request| {
            (request.route == route && matches!(request.fault, Some(Fault::Hold))).then(|| request.clone())
        });
        let given_up = given_up.await.unwrap();
        assert_eq!(given_up.status, None, "{protocol} {route}");
        let took = began.elapsed();
        println!("{protocol} {route}: given up after {took:.1?}");
        assert!((30..50).contains(&took.as_secs()), "{protocol} {route}: {took:?}");
        desk.master.enroll(&id, "edge").unwrap();
        agent.wait_for_log("command start_tunnel", SOON).await.unwrap();
        assert!(began.elapsed() < Duration::from_secs(60), "{protocol} {route}: {:?}", began.elapsed());
        stop(&mut agent).await.unwrap();
        desk.assert_no_violations();
    });
    join_all(rows).await;
}
