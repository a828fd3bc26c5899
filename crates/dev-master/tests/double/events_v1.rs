//! Events as version 1 takes them: it accepts nearly everything, and acts on it.

use reqwest::Method;
use serde_json::json;

use crate::caller::*;

#[tokio::test]
async fn the_probe_tells_a_good_key_from_a_bad_one_and_changes_nothing() {
    for master in [v1().await, v2().await] {
        let caller = Caller::fresh(&master);
        assert_eq!(caller.events("anybody", &json!({})).await.status, 400);
        assert_eq!(caller.with_key("never-issued").events("anybody", &json!({})).await.status, 401);
        let id = caller.joined().await;
        let before = master.snapshot().agents[&id].last_seen;
        assert_eq!(caller.events(&id, &json!({})).await.status, 400);
        assert_eq!(master.snapshot().agents[&id].last_seen, before);
        clean(&master);
    }
}

#[tokio::test]
async fn everything_from_a_known_agent_is_202() {
    let master = v1().await;
    let caller = Caller::fresh(&master);
    let id = caller.joined().await;
    for kind in ["heartbeat", "hello", "container_die", "anything"] {
        let answer = caller.events(&id, &event(kind)).await;
        assert_eq!((answer.status, answer.text("status").as_str(), answer.code()), (202, "success", ""));
    }
    assert_eq!(master.snapshot().agents[&id].heartbeats, 1);
    violated(&master, &format!("events {id}: unknown event type \"container_die\""));
}

#[tokio::test]
async fn the_refusals_of_version_1() {
    let master = v1().await;
    let caller = Caller::fresh(&master);
    let id = caller.joined().await;
    assert_eq!(caller.events("nobody", &event("heartbeat")).await.status, 404);
    assert_eq!(Caller::fresh(&master).events(&id, &event("heartbeat")).await.status, 403);
    let path = format!("/api/v2/agents/{id}/events");
    assert_eq!(caller.call(Method::POST, &path, Some(&json!([1]))).await.status, 400);
    let plain = client().post(format!("{}{path}", master.url())).bearer_auth(caller.key()).body("{}");
    assert_eq!(plain.send().await.unwrap().status(), 415);
}

#[tokio::test]
async fn starts_and_stops_make_the_picture() {
    let master = v1().await;
    let caller = Caller::fresh(&master);
    let id = caller.joined().await;
    for kind in ["container_start", "container_start", "container_stop", "container_start"] {
        caller.events(&id, &merged(&event(kind), &json!({ "container": container("c1") }))).await;
    }
    let agent = &master.snapshot().agents[&id];
    assert_eq!((agent.starts_of("c1"), agent.stops_of("c1"), agent.starts_of("c2")), (3, 1, 0));
    assert_eq!(agent.container_named("name-c1"), Some("c1"));
    assert_eq!(agent.containers["c1"].labels["dockflare.enable"], "true");
    clean(&master);
}

#[tokio::test]
async fn each_report_is_taken_as_complete() {
    let master = v1().await;
    let caller = Caller::fresh(&master);
    let id = caller.joined().await;
    let nested = json!({ "container": { "containers": [container("c1"), container("c2")] } });
    caller.events(&id, &merged(&event("status_report"), &nested)).await;
    let top = json!({ "containers": [container("c2")] });
    caller.events(&id, &merged(&event("status_report"), &top)).await;
    assert_eq!(master.snapshot().agents[&id].removals, ["c1"]);
    clean(&master);
    caller.events(&id, &event("status_report")).await;
    let agent = &master.snapshot().agents[&id];
    assert_eq!((agent.removals.len(), agent.containers.len(), agent.complete_reports), (2, 0, 3));
    violated(&master, "taken as complete, but it has no list of containers");
}

#[tokio::test]
async fn a_tunnel_status_is_read_under_tunnel_or_at_the_top_and_nowhere_else() {
    let master = v1().await;
    let caller = Caller::fresh(&master);
    let id = caller.joined().await;
    let table = [
        (json!({ "status": "running", "name": "edge", "version": "2025.6" }), "running", Some("edge")),
        (json!({ "tunnel": { "status": "error", "name": "edge" }, "status": "other" }), "error", Some("edge")),
        (json!({ "container": { "status": "running", "name": "edge" } }), "unknown", None),
    ];
    for (more, status, name) in table {
        caller.events(&id, &merged(&event("tunnel_status"), &more)).await;
        let seen = master.snapshot().agents[&id].tunnel_status.clone().unwrap();
        assert_eq!((seen.status.as_str(), seen.name.as_deref()), (status, name));
        assert_eq!(seen.event["type"], "tunnel_status");
    }
    violated(&master, "only under container");
    assert_eq!(master.violations().len(), 1);
}
