//! The command queue.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use dockflare_dev_master::{AgentStatus, tunnel_token};
use serde_json::{Value, json};

use crate::caller::*;

#[tokio::test]
async fn delivery_empties_the_queue_and_keeps_its_order() {
    for master in [v1().await, v2().await] {
        let caller = Caller::fresh(&master);
        let id = caller.joined().await;
        let start = master.enroll(&id, "edge").unwrap();
        master.redeploy(&id).unwrap();
        master.push_commands(&id, vec![json!({ "action": "stop_tunnel" })]).unwrap();
        assert_eq!(master.snapshot().agents[&id].queued, 3);
        let answer = caller.commands(&id).await;
        assert_eq!((answer.status, answer.text("status").as_str()), (200, "success"));
        let expected = json!([
            { "action": "start_tunnel", "tunnel_name": "edge", "tunnel_id": start.tunnel_id, "token": start.token },
            { "action": "restart_tunnel", "tunnel_name": "edge", "tunnel_id": start.tunnel_id, "tunnel_token": start.token },
            { "action": "stop_tunnel" },
        ]);
        assert_eq!(answer.body["commands"], expected);
        assert_eq!(caller.commands(&id).await.body["commands"], json!([]));
        assert_eq!(master.snapshot().agents[&id].polls, 2);
        clean(&master);
    }
}

#[tokio::test]
async fn refusals_have_no_code_on_either_version() {
    for master in [v1().await, v2().await] {
        let caller = Caller::fresh(&master);
        let id = caller.joined().await;
        let refused = [
            (caller.with_key("never-issued").commands(&id).await, 401),
            (Caller::fresh(&master).commands(&id).await, 403),
            (caller.commands("nobody").await, 404),
        ];
        for (answer, status) in refused {
            assert_eq!((answer.status, answer.code(), answer.text("status").as_str()), (status, "", "error"));
        }
    }
}

#[tokio::test]
async fn a_made_up_token_is_valid_and_its_tunnel_the_same_under_the_same_name() {
    let master = v2().await;
    let caller = Caller::fresh(&master);
    let id = caller.joined().await;
    let first = master.enroll(&id, "edge").unwrap();
    assert_eq!(master.enroll(&id, "edge").unwrap(), first);
    assert_ne!(master.enroll(&id, "other").unwrap().tunnel_id, first.tunnel_id);
    let token: Value = serde_json::from_slice(&STANDARD.decode(&first.token).unwrap()).unwrap();
    assert_eq!(token["t"], json!(first.tunnel_id));
    assert!(token["a"].is_string() && token["s"].is_string());
    assert!(!format!("{first:?}").contains(&first.token));
}

#[tokio::test]
async fn a_given_token_is_sent_as_it_is() {
    let master = v1().await;
    let caller = Caller::fresh(&master);
    let id = caller.joined().await;
    let token = tunnel_token("account", "some other tunnel", "secret");
    master.enroll_with(&id, "edge", "tunnel", &token).unwrap();
    let answer = caller.commands(&id).await;
    assert_eq!(answer.body["commands"][0]["token"], json!(token));
    assert_eq!(master.snapshot().agents[&id].tunnel.as_ref().unwrap().id, "tunnel");
}

#[tokio::test]
async fn a_rolled_key_replaces_the_old_one_at_once() {
    for master in [v1().await, v2().await] {
        let caller = Caller::fresh(&master);
        let id = caller.joined().await;
        let new = caller.with_key(&master.roll_key(&id).unwrap());
        assert_eq!(caller.commands(&id).await.status, 401);
        assert_eq!(new.commands(&id).await.status, 200);
        let again = new.register(&merged(&registration(), &json!({ "agent_id": id }))).await;
        assert_eq!((again.status, again.text("agent_id")), (200, id));
    }
}

#[tokio::test]
async fn v1_binds_the_agent_of_a_revoked_key_to_the_next_one() {
    let master = v1().await;
    let caller = Caller::fresh(&master);
    let id = caller.joined().await;
    master.enroll(&id, "edge").unwrap();
    assert_eq!(master.revoke_key(caller.key()).unwrap(), std::slice::from_ref(&id));
    assert_eq!(caller.commands(&id).await.status, 401);
    assert_eq!(master.snapshot().agents[&id].status, AgentStatus::Pending);
    let next = Caller::fresh(&master);
    assert_eq!(next.register(&merged(&registration(), &json!({ "agent_id": id }))).await.status, 200);
    assert_eq!(Caller::fresh(&master).commands(&id).await.status, 403);
}
