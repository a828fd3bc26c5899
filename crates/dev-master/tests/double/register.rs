//! Registration: which id an agent gets, and which protocol version it agrees on.

use dockflare_dev_master::{DevMaster, Limits};
use reqwest::Method;
use serde_json::{Value, json};

use crate::caller::*;

#[tokio::test]
async fn v1_takes_a_new_agent_and_shows_it_its_record() {
    let master = v1().await;
    let answer = Caller::fresh(&master).register(&registration()).await;
    assert_eq!((answer.status, answer.text("status").as_str()), (201, "success"));
    assert_eq!(answer.body["agent"]["status"], "pending");
    assert_eq!(answer.body["agent"]["assigned_tunnel_token"], Value::Null);
    assert!(answer.body.get("protocol_version").is_none());
    assert!(answer.body.get("code").is_none());
    clean(&master);
}

#[tokio::test]
async fn v1_gives_a_known_agent_its_tunnel_back() {
    let master = v1().await;
    let caller = Caller::fresh(&master);
    let id = caller.joined().await;
    let command = master.enroll(&id, "edge").unwrap();
    let answer = caller.register(&merged(&registration(), &json!({ "agent_id": id }))).await;
    assert_eq!((answer.status, answer.text("agent_id")), (200, id));
    let agent = &answer.body["agent"];
    assert_eq!(agent["status"], "enrolled");
    assert_eq!(agent["assigned_tunnel_id"], json!(command.tunnel_id));
    assert_eq!(agent["assigned_tunnel_name"], "edge");
    assert_eq!(agent["assigned_tunnel_token"], json!(command.token));
    clean(&master);
}

#[tokio::test]
async fn v1_lets_an_unknown_agent_keep_its_id() {
    let master = v1().await;
    let caller = Caller::fresh(&master);
    let id = caller.joined().await;
    master.forget(&id).unwrap();
    let answer = caller.register(&merged(&registration(), &json!({ "agent_id": id }))).await;
    assert_eq!((answer.status, answer.text("agent_id")), (201, id));
}

#[tokio::test]
async fn v1_refuses_without_a_code() {
    let master = v1().await;
    let caller = Caller::fresh(&master);
    let id = caller.joined().await;
    let stranger = caller.with_key("never-issued").register(&registration()).await;
    assert_eq!((stranger.status, stranger.text("status").as_str()), (401, "error"));
    assert!(stranger.body["message"].is_string() && stranger.body.get("code").is_none());

    let other = Caller::fresh(&master).register(&merged(&registration(), &json!({ "agent_id": id }))).await;
    assert_eq!(other.status, 403);

    master.revoke_key(caller.key()).unwrap();
    assert_eq!(caller.register(&registration()).await.status, 401);
    let unsent = client().post(format!("{}/api/v2/agents/register", master.url())).send().await.unwrap();
    assert_eq!(unsent.status(), 401);
}

#[tokio::test]
async fn v2_begins_a_session_with_each_registration() {
    let master = v2().await;
    let caller = Caller::fresh(&master);
    let first = caller.register(&registration()).await;
    first.is(201, "registered");
    assert_eq!(first.body["protocol_version"], 2);
    let again = caller.register(&merged(&registration(), &json!({ "agent_id": first.text("agent_id") }))).await;
    again.is(200, "registered");
    assert_eq!(again.text("agent_id"), first.text("agent_id"));
    assert!(!first.text("agent_session_id").is_empty());
    assert_ne!(again.text("agent_session_id"), first.text("agent_session_id"));
    assert_eq!(master.snapshot().registrations, 2);
    clean(&master);
}

#[tokio::test]
async fn v2_gives_an_unused_key_a_new_id_whatever_was_sent() {
    let master = v2().await;
    let answer = Caller::fresh(&master).register(&merged(&registration(), &json!({ "agent_id": "mine" }))).await;
    answer.is(201, "registered");
    assert_ne!(answer.text("agent_id"), "mine");
}

#[tokio::test]
async fn v2_key_mismatch_of_a_stored_id_is_solved_by_registering_without_one() {
    let master = v2().await;
    let caller = Caller::fresh(&master);
    let id = caller.joined().await;
    caller.register(&merged(&registration(), &json!({ "agent_id": "other" }))).await.is(403, "agent_key_mismatch");
    let answer = caller.register(&registration()).await;
    answer.is(200, "registered");
    assert_eq!(answer.text("agent_id"), id);
}

#[tokio::test]
async fn v2_key_of_a_removed_agent_is_refused_for_good() {
    let master = v2().await;
    let caller = Caller::fresh(&master);
    let id = caller.joined().await;
    master.forget(&id).unwrap();
    caller.register(&merged(&registration(), &json!({ "agent_id": id }))).await.is(403, "agent_key_mismatch");
    caller.register(&registration()).await.is(403, "agent_key_mismatch");
}

#[tokio::test]
async fn v2_refuses_with_a_code() {
    let limits = Limits { body_bytes: 400, ..Limits::default() };
    let master = start(DevMaster::builder().limits(limits)).await;
    let caller = Caller::fresh(&master);
    let offer = |versions: Value| merged(&registration(), &json!({ "supported_protocol_versions": versions }));
    caller.with_key("never-issued").register(&registration()).await.is(401, "unauthorized");
    caller
        .register(&merged(&registration(), &json!({ "display_name": "x".repeat(400) })))
        .await
        .is(413, "payload_too_large");
    caller.register(&json!([])).await.is(400, "invalid_payload");
    for wrong in [json!([]), json!("2"), json!([0]), json!(["2"])] {
        caller.register(&offer(wrong)).await.is(400, "invalid_payload");
    }
    caller.register(&offer(json!([3]))).await.is(409, "unsupported_protocol");
    assert_eq!(master.snapshot().agents.len(), 0);
    master.revoke_key(caller.key()).unwrap();
    caller.register(&registration()).await.is(401, "unauthorized");
}

#[tokio::test]
async fn v2_agrees_to_version_1_when_that_is_all_there_is() {
    let master = v2().await;
    let old = merged(&registration(), &json!({ "supported_protocol_versions": [1] }));
    let answer = Caller::fresh(&master).register(&old).await;
    answer.is(201, "registered");
    assert_eq!(answer.body["protocol_version"], 1);
    assert!(answer.body["agent_session_id"].is_null());

    master.set_highest_version(1);
    let answer = Caller::fresh(&master).register(&registration()).await;
    assert_eq!(answer.body["protocol_version"], 1);
    assert_eq!(master.snapshot().agent(&answer.text("agent_id")).unwrap().session, None);
}

#[tokio::test]
async fn a_name_given_by_the_operator_stays() {
    for master in [v1().await, v2().await] {
        let caller = Caller::fresh(&master);
        let id = caller.joined().await;
        assert_eq!(master.snapshot().agents[&id].display_name, "host");
        master.rename(&id, "kitchen").unwrap();
        caller.register(&merged(&registration(), &json!({ "agent_id": id }))).await;
        assert_eq!(master.snapshot().agents[&id].display_name, "kitchen");
    }
}

#[tokio::test]
async fn what_a_registration_lacks_is_a_violation_but_no_refusal() {
    let master = v2().await;
    let caller = Caller::fresh(&master);
    caller.register(&json!({ "supported_protocol_versions": [2], "hostname": "h" })).await.is(201, "registered");
    violated(&master, "register new: display_name is missing");
    violated(&master, "register new: unknown member hostname");
    let leak = merged(&registration(), &json!({ "display_name": caller.key() }));
    caller.register(&leak).await;
    violated(&master, "a key or token is in the body");
}

#[tokio::test]
async fn a_new_agent_may_get_its_tunnel_at_once() {
    let master = start(DevMaster::builder().enroll_new("edge")).await;
    let caller = Caller::fresh(&master);
    let id = caller.joined().await;
    let answer = caller.commands(&id).await;
    assert_eq!(answer.body["commands"][0]["action"], "start_tunnel");
    caller.register(&registration()).await;
    assert_eq!(caller.commands(&id).await.body["commands"], json!([]));
}

#[tokio::test]
async fn what_no_master_has_is_not_found() {
    let master = start(DevMaster::builder().prefix("/some/prefix/")).await;
    assert!(master.url().ends_with("/some/prefix"));
    let caller = Caller::fresh(&master);
    caller.joined().await;
    assert_eq!(caller.call(Method::GET, "/api/v2/agents/register", None).await.status, 404);
    violated(&master, "no master has GET /some/prefix/api/v2/agents/register");
    let outside = format!("http://{}/api/v2/agents/register", master.address());
    assert_eq!(client().post(outside).bearer_auth(caller.key()).send().await.unwrap().status(), 404);
}

#[tokio::test]
async fn behind_access_only_the_service_token_passes() {
    let master = start(DevMaster::builder().access("id.access", "access-secret")).await;
    let caller = Caller::fresh(&master);
    let refused = caller.raw(Method::POST, "/api/v2/agents/register", Some(&registration())).await.unwrap();
    assert_eq!(refused.status(), 302);
    assert!(refused.headers()["location"].to_str().unwrap().contains("login"));
    let passed = client().post(format!("{}/api/v2/agents/register", master.url())).bearer_auth(caller.key());
    let passed = passed.header("CF-Access-Client-Id", "id.access").header("CF-Access-Client-Secret", "access-secret");
    assert_eq!(passed.json(&registration()).send().await.unwrap().status(), 201);
    let requests = master.requests();
    assert_eq!(requests[1].access_client_id.as_deref(), Some("id.access"));
    assert!(requests[1].access_client_secret && !requests[0].access_client_secret);
}
