//! The operator's routes: a real master's and the double's own.

use dockflare_dev_master::{DevMaster, Protocol};
use reqwest::Method;
use serde_json::{Value, json};

use crate::caller::*;

#[tokio::test]
async fn all_but_the_page_want_the_master_key() {
    let master = v2().await;
    let nobody = Caller::fresh(&master);
    for (method, path) in [
        (Method::GET, "/api/v2/agents"),
        (Method::GET, "/api/v2/overview"),
        (Method::POST, "/api/v2/agents/generate-key"),
        (Method::POST, "/api/v2/agents/a/enroll"),
        (Method::GET, "/_dev/requests"),
        (Method::POST, "/_dev/faults"),
    ] {
        assert_eq!(nobody.call(method, path, None).await.status, 401, "{path}");
    }
    assert_eq!(nobody.get("/").await.status, 200);
    assert!(master.requests().is_empty());
}

#[tokio::test]
async fn an_agents_life_by_the_routes_of_a_master() {
    let master = v2().await;
    let operator = Caller::operator(&master);
    let agents = |rest: &str| format!("/api/v2/agents{rest}");
    let made = operator.post(&agents("/generate-key"), &json!({ "owner": "kitchen" })).await;
    assert_eq!((made.status, made.body["meta"]["owner"].as_str()), (201, Some("kitchen")));
    let caller = operator.with_key(&made.text("key"));
    let id = caller.joined().await;

    let enrolled = operator.post(&agents(&format!("/{id}/enroll")), &json!({ "tunnel_name": "edge" })).await;
    assert_eq!(enrolled.body["command"]["action"], "start_tunnel");
    assert_eq!(operator.call(Method::POST, &agents(&format!("/{id}/redeploy-tunnel")), None).await.status, 200);
    assert_eq!(caller.commands(&id).await.body["commands"][1]["action"], "restart_tunnel");
    let renamed = operator.post(&agents(&format!("/{id}/rename")), &json!({ "display_name": "oven" })).await;
    assert_eq!(renamed.status, 200);

    let listed = operator.get(&agents("")).await;
    let agent = &listed.body["agents"][&id];
    assert_eq!((agent["display_name"].as_str(), agent["online"].as_bool()), (Some("oven"), Some(true)));
    assert_eq!(listed.body["agent_keys"][0]["bound_agent_id"], json!(id));
    let token = enrolled.body["command"]["token"].as_str().unwrap();
    assert!(!listed.body.to_string().contains(token) && !listed.body.to_string().contains(caller.key()));

    let rolled = operator.call(Method::POST, &agents(&format!("/{id}/roll-key")), None).await;
    let caller = operator.with_key(&rolled.text("new_key"));
    assert_eq!(caller.commands(&id).await.status, 200);
    let removed = operator.call(Method::POST, &agents(&format!("/{id}/remove")), None).await;
    assert_eq!((removed.status, removed.text("status").as_str()), (202, "accepted"));
    let refused = operator.post(&agents(&format!("/{id}/enroll")), &json!({ "tunnel_name": "edge" })).await;
    assert_eq!(refused.status, 409);
    let revoked = operator.post(&agents("/revoke-key"), &json!({ "key": caller.key() })).await;
    assert_eq!(revoked.body["affected_agents"], json!([id]));
    assert_eq!(caller.commands(&id).await.status, 401);
}

#[tokio::test]
async fn wishes_that_make_no_sense_are_refused() {
    let master = v1().await;
    let operator = Caller::operator(&master);
    let id = Caller::fresh(&master).joined().await;
    let of = |agent: &str, act: &str| format!("/api/v2/agents/{agent}/{act}");
    for act in ["redeploy-tunnel", "roll-key", "remove"] {
        assert_eq!(operator.post(&of("nobody", act), &json!({})).await.status, 404, "{act}");
    }
    assert_eq!(operator.post(&of(&id, "redeploy-tunnel"), &json!({})).await.status, 400);
    assert_eq!(operator.post(&of(&id, "enroll"), &json!({})).await.status, 400);
    assert_eq!(operator.post("/api/v2/agents/revoke-key", &json!({ "key": "?" })).await.status, 404);
    assert_eq!(operator.post(&of(&id, "remove"), &json!({})).await.status, 200);
    assert!(master.snapshot().agents.is_empty());
}

#[tokio::test]
async fn the_doubles_own_routes() {
    let master = v2().await;
    let operator = Caller::operator(&master);
    let mut agent = Session::begin(Caller::fresh(&master)).await;
    let id = agent.agent.clone();

    let commands = json!({ "commands": [{ "action": "unheard_of" }] });
    assert_eq!(operator.post(&format!("/_dev/agents/{id}/commands"), &commands).await.status, 200);
    assert_eq!(agent.caller.commands(&id).await.body["commands"], commands["commands"]);

    let fault = json!({ "route": "events", "fault": { "kind": "status", "status": 503 }, "times": 1 });
    assert_eq!(operator.post("/_dev/faults", &fault).await.status, 200);
    assert_eq!(agent.send("heartbeat", &json!({})).await.status, 503);
    let fault = json!({ "route": "any", "fault": { "kind": "not_json" } });
    operator.post("/_dev/faults", &fault).await;
    assert_eq!(operator.call(Method::DELETE, "/_dev/faults", None).await.status, 200);

    operator.post(&format!("/_dev/agents/{id}/end-session"), &json!({})).await;
    agent.send("heartbeat", &json!({})).await.is(409, "registration_required");
    operator.post("/_dev/protocol", &json!({ "protocol": "v1" })).await;
    assert_eq!(agent.send("container_die", &json!({})).await.status, 202);
    let violations = operator.get("/_dev/violations").await;
    assert_eq!(violations.body["violations"].as_array().unwrap().len(), 1);
    let requests = operator.get("/_dev/requests").await;
    assert_eq!(requests.body["requests"].as_array().unwrap().len(), 5);
    assert_eq!(operator.get("/_dev/snapshot").await.body["protocol"], "v1");
    operator.post(&format!("/_dev/agents/{id}/forget"), &json!({})).await;
    assert_eq!(agent.caller.commands(&id).await.status, 404);
    assert_eq!(operator.get("/_dev/unheard-of").await.status, 404);
}

#[tokio::test]
async fn configurations_are_kept_when_the_routes_are_there() {
    let master = v2().await;
    let caller = Caller::fresh(&master);
    let path = "/accounts/acc/cfd_tunnel/tun/configurations";
    let put = |ingress: Value| {
        let caller = caller.clone();
        async move { caller.call(Method::PUT, path, Some(&json!({ "config": { "ingress": ingress } }))).await }
    };
    let rules = json!([{ "hostname": "a.example.com", "service": "http://web" }, { "service": "http_status:404" }]);
    assert_eq!(caller.get("/accounts").await.status, 404);
    assert_eq!(put(rules.clone()).await.status, 404);
    clean(&master);
    master.set_account(Some("acc"));
    assert_eq!(caller.get("/accounts").await.body["result"][0]["id"], "acc");
    assert_eq!(caller.with_key("never-issued").get("/accounts").await.status, 401);
    assert_eq!(put(rules.clone()).await.body["success"], true);
    assert_eq!(put(json!([{ "hostname": "a.example.com", "service": "http://web" }])).await.status, 400);
    violated(&master, "the last rule does not match everything");
    let pushed = master.snapshot().pushed;
    assert_eq!((pushed.len(), &pushed[0].config["ingress"]), (1, &rules));
}

#[tokio::test]
async fn version_1_shows_cloudflares_status_over_the_agents_once_it_has_it() {
    let master = v1().await;
    let caller = Caller::fresh(&master);
    let id = caller.joined().await;
    let tunnel = master.enroll(&id, "edge").unwrap().tunnel_id;
    let own = json!({ "status": "degraded", "name": "edge", "version": "2025.9.0", "reason": "edge_unreachable" });
    caller.events(&id, &merged(&event("tunnel_status"), &own)).await;
    let operator = Caller::operator(&master);
    let page = async || operator.get("/api/v2/overview").await.body["agents"][&id]["tunnel_status"].clone();
    assert_eq!(page().await, json!({ "status": "degraded", "name": "edge", "version": "2025.9.0" }));

    operator.post("/_dev/cloudflare", &json!({ "tunnel": tunnel, "status": "down" })).await;
    assert_eq!(page().await["status"], "down");
    let kept = operator.get("/api/v2/agents").await.body["agents"][&id]["tunnel_status"]["status"].clone();
    assert_eq!(kept, "degraded");
    let text = operator.get("/").await.body;
    let line = text.as_str().unwrap().lines().find(|line| line.starts_with(&id)).unwrap();
    assert!(line.contains(" down ") && text.as_str().unwrap().contains("the agent's is degraded"), "{text}");

    master.set_protocol(Protocol::V2);
    assert_eq!(page().await["status"], "degraded");
    master.set_protocol(Protocol::V1);
    master.cloudflare_says(&tunnel, None);
    assert_eq!(page().await["status"], "degraded");
}

#[tokio::test]
async fn the_page_shows_agents_and_no_secret() {
    let master: DevMaster = v2().await;
    let mut agent = Session::begin(Caller::fresh(&master)).await;
    let token = master.enroll(&agent.agent, "edge").unwrap().token;
    agent.send("container_start", &json!({ "container": container("c1") })).await;
    agent.send("tunnel_status", &json!({ "status": "running", "detail": token })).await;
    let page = Caller::fresh(&master).get("/").await.body;
    let page = page.as_str().unwrap();
    let line = page.lines().find(|line| line.starts_with(&agent.agent)).unwrap();
    assert!(line.contains("host") && line.contains("online") && line.contains("edge") && line.contains("running"));
    assert!(page.contains("name-c1"));
    assert!(page.contains("(hidden)") && !page.contains(&token) && !page.contains(agent.caller.key()));
}
