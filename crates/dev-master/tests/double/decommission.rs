//! Decommissioning, in both phases, and everything that can go wrong in them.

use dockflare_dev_master::{DevMaster, Phase};
use serde_json::{Value, json};

use crate::caller::*;

/// A version 2 agent whose decommission has begun.
struct Leaving {
    agent: Session,
    operation: String,
}

impl Leaving {
    async fn begin(master: &DevMaster) -> Self {
        let agent = Session::begin(Caller::fresh(master)).await;
        let operation = master.remove(&agent.agent).unwrap().unwrap();
        Self { agent, operation }
    }

    async fn command(&self) -> Value {
        let commands = self.agent.caller.commands(&self.agent.agent).await.body["commands"].clone();
        assert_eq!(commands.as_array().unwrap().len(), 1, "{commands}");
        commands[0].clone()
    }

    fn ack_of(&self, command: &Value, more: &Value) -> Value {
        let own = json!({
            "operation_id": self.operation,
            "command_id": command["command_id"],
            "agent_session_id": self.agent.session,
            "self_stop_capability": "supported",
        });
        merged(&own, more)
    }

    fn prepared(&self, command: &Value, more: &Value) -> Value {
        let fine = json!({
            "phase": "prepared",
            "tombstone_persisted": true,
            "tunnel_container": "stopped",
            "agent_image": "example/agent:1.0",
            "cloudflared_image": "cloudflare/cloudflared:2025.6.0",
        });
        self.ack_of(command, &merged(&fine, more))
    }

    fn finalized(&self, command: &Value) -> Value {
        self.ack_of(command, &json!({ "phase": "shutdown_scheduled" }))
    }

    async fn ack(&self, body: &Value) -> Answer {
        self.agent.caller.ack(&self.agent.agent, &self.operation, body).await
    }
}

#[tokio::test]
async fn both_phases_end_with_the_agent_forgotten_and_its_key_revoked() {
    let master = v2().await;
    let leaving = Leaving::begin(&master).await;
    let (id, caller) = (leaving.agent.agent.clone(), leaving.agent.caller.clone());
    assert_eq!(master.remove(&id).unwrap(), Some(leaving.operation.clone()));

    let prepare = leaving.command().await;
    assert_eq!(prepare["action"], "prepare_decommission");
    assert_eq!(prepare["requested_self_action"], "stop");
    assert_eq!(leaving.command().await, prepare, "repeated until acknowledged");
    let prepared = leaving.prepared(&prepare, &json!({}));
    leaving.ack(&prepared).await.is(200, "acknowledged");
    leaving.ack(&prepared).await.is(200, "acknowledged");

    let finalize = leaving.command().await;
    assert_eq!(finalize["action"], "finalize_decommission");
    assert_eq!(leaving.command().await, finalize, "repeated until acknowledged");
    let finalized = leaving.finalized(&finalize);
    leaving.ack(&finalized).await.is(200, "acknowledged");
    leaving.ack(&finalized).await.is(200, "acknowledged");
    leaving.ack(&prepared).await.is(200, "acknowledged");

    assert_eq!(caller.commands(&id).await.status, 401);
    caller.register(&registration()).await.is(401, "unauthorized");
    let seen = master.snapshot();
    assert!(seen.agents.is_empty());
    assert_eq!(seen.decommissions[0].phase, Phase::Completed);
    assert_eq!(seen.decommissions[0].finalize_ack, Some(finalized));
    clean(&master);
}

#[tokio::test]
async fn tunnel_commands_queued_before_are_still_delivered_with_it() {
    let master = v2().await;
    let agent = Session::begin(Caller::fresh(&master)).await;
    let tunnel = master.enroll(&agent.agent, "edge").unwrap();
    master.remove(&agent.agent).unwrap();
    let commands = agent.caller.commands(&agent.agent).await.body["commands"].clone();
    assert_eq!(commands[0]["action"], "start_tunnel");
    assert_eq!(commands[1]["expected_tunnel_id"], json!(tunnel.tunnel_id));
    assert!(master.enroll(&agent.agent, "edge").is_err());
}

#[tokio::test]
async fn events_are_refused_and_after_the_acknowledgement_a_violation() {
    let master = v2().await;
    let mut leaving = Leaving::begin(&master).await;
    leaving.agent.send("heartbeat", &json!({})).await.is(409, "agent_decommissioning");
    clean(&master);
    let prepare = leaving.command().await;
    leaving.ack(&leaving.prepared(&prepare, &json!({}))).await.is(200, "acknowledged");
    leaving.agent.send("heartbeat", &json!({})).await.is(409, "agent_decommissioning");
    violated(&master, "an event after the decommission was acknowledged");
}

#[tokio::test]
async fn an_agent_may_start_again_in_between_and_acknowledge_in_its_new_session() {
    let master = v2().await;
    let mut leaving = Leaving::begin(&master).await;
    let prepare = leaving.command().await;
    leaving.ack(&leaving.prepared(&prepare, &json!({}))).await.is(200, "acknowledged");
    let old = leaving.agent.session.clone();
    leaving.agent = Session::begin(leaving.agent.caller.clone()).await;
    leaving.ack(&leaving.prepared(&prepare, &json!({}))).await.is(200, "acknowledged");
    let finalize = leaving.command().await;
    let late = merged(&leaving.finalized(&finalize), &json!({ "agent_session_id": old }));
    leaving.ack(&late).await.is(409, "registration_required");
    leaving.ack(&leaving.finalized(&finalize)).await.is(200, "acknowledged");
    clean(&master);
}

#[tokio::test]
async fn each_wrong_acknowledgement_has_its_refusal() {
    let master = v2().await;
    let leaving = Leaving::begin(&master).await;
    let prepare = leaving.command().await;
    for (more, status, code) in [
        (json!({ "agent_session_id": "other" }), 409, "registration_required"),
        (json!({ "command_id": "" }), 400, "invalid_payload"),
        (json!({ "command_id": "other" }), 409, "stale_command"),
        (json!({ "operation_id": "other" }), 409, "stale_operation"),
        (json!({ "phase": "done" }), 400, "invalid_ack_phase"),
        (json!({ "phase": "shutdown_scheduled" }), 409, "invalid_operation_state"),
        (json!({ "cloudflared_image": "bad image" }), 400, "invalid_image_reference"),
        (json!({ "cloudflared_image": null }), 400, "invalid_image_reference"),
        (json!({ "agent_image": null }), 400, "invalid_image_reference"),
        (json!({ "agent_image": "-starts-badly" }), 400, "invalid_image_reference"),
        (json!({ "tombstone_persisted": false, "error_code": "disk_full" }), 409, "disk_full"),
        (json!({ "tunnel_container": "failed", "error_code": "docker_down" }), 409, "docker_down"),
        (json!({ "tunnel_container": "running" }), 409, "prepare_failed"),
    ] {
        leaving.ack(&leaving.prepared(&prepare, &more)).await.is(status, code);
        assert_eq!(leaving.command().await, prepare, "still asked for");
    }
    let caller = &leaving.agent.caller;
    let body = leaving.prepared(&prepare, &json!({}));
    caller.ack(&leaving.agent.agent, "other", &body).await.is(404, "operation_not_found");
    caller.ack("nobody", &leaving.operation, &body).await.is(403, "agent_key_mismatch");
    caller.with_key("never-issued").ack(&leaving.agent.agent, &leaving.operation, &body).await.is(401, "unauthorized");
    let manual = json!({ "self_stop_capability": "manual", "agent_image": null, "tunnel_container": "absent" });
    leaving.ack(&leaving.prepared(&prepare, &manual)).await.is(200, "acknowledged");
    assert_eq!(master.snapshot().decommissions[0].phase, Phase::WaitingForFinalize);
}

#[tokio::test]
async fn what_an_acknowledgement_lacks_is_a_violation() {
    let master = v2().await;
    let leaving = Leaving::begin(&master).await;
    let prepare = leaving.command().await;
    let poor = leaving.prepared(&prepare, &json!({ "self_stop_capability": null, "agent_image": null }));
    leaving.ack(&poor).await.is(200, "acknowledged");
    violated(&master, "self_stop_capability is neither supported nor manual");
    leaving.ack(&merged(&poor, &json!({ "tunnel_container": "absent" }))).await.is(200, "acknowledged");
    violated(&master, "acknowledged again with other content");
}

#[tokio::test]
async fn the_repeated_last_acknowledgement_must_come_with_the_agents_own_key() {
    let master = v2().await;
    let leaving = Leaving::begin(&master).await;
    let prepare = leaving.command().await;
    leaving.ack(&leaving.prepared(&prepare, &json!({}))).await;
    let finalized = leaving.finalized(&leaving.command().await);
    leaving.ack(&finalized).await.is(200, "acknowledged");
    let other = Caller::fresh(&master);
    other.ack(&leaving.agent.agent, &leaving.operation, &finalized).await.is(403, "agent_key_mismatch");
    let altered = merged(&finalized, &json!({ "command_id": "other" }));
    leaving.ack(&altered).await.is(403, "agent_key_mismatch");
}

#[tokio::test]
async fn version_1_simply_forgets() {
    let master = v1().await;
    let caller = Caller::fresh(&master);
    let id = caller.joined().await;
    assert_eq!(master.remove(&id).unwrap(), None);
    assert_eq!(caller.commands(&id).await.status, 404);
    assert_eq!(caller.ack(&id, "operation", &json!({})).await.status, 404);
    violated(&master, "a version 1 master has no decommission");
    assert_eq!(caller.register(&merged(&registration(), &json!({ "agent_id": id }))).await.status, 201);
}
