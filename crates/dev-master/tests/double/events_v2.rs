//! Events as version 2 takes them: numbered, within a session, and within limits.

use dockflare_dev_master::{DevMaster, Limits, Protocol};
use serde_json::{Value, json};

use crate::caller::*;

fn complete(containers: &[Value]) -> Value {
    json!({ "inventory_complete": true, "inventory_scope": SCOPE, "containers": containers })
}

#[tokio::test]
async fn what_is_fine_is_accepted() {
    let master = v2().await;
    let mut agent = Session::begin(Caller::fresh(&master)).await;
    let c1 = json!({ "container": container("c1") });
    agent.send("container_start", &c1).await.is(200, "accepted");
    agent.send("container_stop", &c1).await.is(200, "accepted");
    agent.send("tunnel_status", &json!({ "status": "running" })).await.is(200, "accepted");
    agent.send("heartbeat", &json!({})).await.is(202, "accepted_noop");
    agent.send("hello", &json!({})).await.is(202, "accepted_noop");
    agent.send("status_report", &complete(&[container("c1")])).await.is(200, "accepted");
    agent.send("status_report", &json!({ "inventory_complete": false })).await.is(202, "inventory_incomplete");
    let seen = &master.snapshot().agents[&agent.agent];
    assert_eq!((seen.complete_reports, seen.incomplete_reports, seen.heartbeats), (1, 1, 1));
    assert_eq!((seen.starts_of("c1"), seen.stops_of("c1"), seen.containers.len()), (1, 1, 1));
    clean(&master);
}

#[tokio::test]
async fn only_a_complete_report_removes_anything() {
    let master = v2().await;
    let mut agent = Session::begin(Caller::fresh(&master)).await;
    agent.send("status_report", &complete(&[container("c1"), container("c2")])).await;
    let missing_id = json!([{ "name": "n", "labels": { "dockflare.enable": "true" }, "status": "running" }]);
    for harmless in [
        json!({ "inventory_complete": false }),
        json!({ "inventory_complete": false, "containers": [] }),
        json!({ "inventory_complete": true, "inventory_scope": "all", "containers": [] }),
        json!({ "inventory_complete": true, "inventory_scope": SCOPE, "containers": missing_id }),
    ] {
        agent.send("status_report", &harmless).await.is(202, "inventory_incomplete");
        assert_eq!(master.snapshot().agents[&agent.agent].containers.len(), 2, "{harmless}");
    }
    agent.send("status_report", &complete(&[container("c2")])).await.is(200, "accepted");
    assert_eq!(master.snapshot().agents[&agent.agent].removals, ["c1"]);
    violated(&master, "an incomplete inventory with containers");
    violated(&master, "a container without id");
}

#[tokio::test]
async fn the_last_number_again_is_a_duplicate_and_an_older_one_stale() {
    let master = v2().await;
    let mut agent = Session::begin(Caller::fresh(&master)).await;
    let first = agent.next("container_start", &json!({ "container": container("c1") }));
    let (id, caller) = (agent.agent.clone(), agent.caller.clone());
    caller.events(&id, &first).await.is(200, "accepted");
    caller.events(&id, &first).await.is(200, "duplicate_sequence");
    assert_eq!(master.snapshot().agents[&id].starts_of("c1"), 1);
    clean(&master);
    agent.events = 5;
    agent.send("heartbeat", &json!({})).await.is(202, "accepted_noop");
    agent.send("status_report", &complete(&[])).await.is(200, "accepted");
    clean(&master);
    caller.events(&id, &first).await.is(409, "stale_sequence");
    violated(&master, "event_sequence 1 came after 6");
    agent.events = 5;
    agent.send("hello", &json!({})).await.is(200, "duplicate_sequence");
    violated(&master, "event_sequence 6 was sent again with other content");
}

#[tokio::test]
async fn a_registration_restarts_both_numbers_and_ends_the_old_session() {
    let master = v2().await;
    let mut agent = Session::begin(Caller::fresh(&master)).await;
    agent.send("heartbeat", &json!({})).await;
    let mut next = Session::begin(agent.caller.clone()).await;
    agent.send("heartbeat", &json!({})).await.is(409, "registration_required");
    next.send("heartbeat", &json!({})).await.is(202, "accepted_noop");
    master.end_session(&next.agent).unwrap();
    next.send("heartbeat", &json!({})).await.is(409, "registration_required");
    next.session = "unheard of".to_owned();
    next.send("heartbeat", &json!({})).await.is(409, "registration_required");
    clean(&master);
}

#[tokio::test]
async fn wrong_shapes_are_refused_and_do_not_use_their_number() {
    let master = v2().await;
    let mut agent = Session::begin(Caller::fresh(&master)).await;
    for (kind, more, status, code) in [
        ("container_die", json!({}), 400, "invalid_payload"),
        ("container_start", json!({}), 400, "invalid_payload"),
        ("container_start", json!({ "container": { "name": "n" } }), 400, "invalid_payload"),
        (
            "container_start",
            json!({ "container": { "id": "c", "labels": { "dockflare.x": 1 } } }),
            400,
            "invalid_payload",
        ),
        ("heartbeat", json!({ "event_sequence": "1" }), 400, "invalid_payload"),
        ("heartbeat", json!({ "event_sequence": 0 }), 400, "invalid_payload"),
        ("heartbeat", json!({ "protocol_version": 1 }), 409, "registration_required"),
        ("heartbeat", json!({ "agent_session_id": null }), 409, "registration_required"),
        ("status_report", json!({ "inventory_complete": true, "inventory_scope": SCOPE }), 400, "invalid_payload"),
    ] {
        agent.send(kind, &more).await.is(status, code);
    }
    agent.events = 0;
    agent.reports = 0;
    agent.send("heartbeat", &json!({})).await.is(202, "accepted_noop");
    agent.send("status_report", &complete(&[])).await.is(200, "accepted");
    violated(&master, "unknown event type");
}

#[tokio::test]
async fn what_a_master_lets_pass_is_a_violation() {
    let master = v2().await;
    let mut agent = Session::begin(Caller::fresh(&master)).await;
    let private = json!({ "id": "c", "name": "n", "labels": { "dockflare.enable": "1", "secret": "x" } });
    agent.send("container_start", &json!({ "container": private })).await.is(200, "accepted");
    violated(&master, "the label secret is none of the master's business");
    assert_eq!(master.snapshot().agents[&agent.agent].containers["c"].labels.len(), 1);
    agent.send("container_stop", &json!({ "container": { "id": "c" } })).await.is(200, "accepted");
    violated(&master, "a container without name");
    violated(&master, "a container without labels");
    let token = master.enroll(&agent.agent, "edge").unwrap().token;
    agent.send("tunnel_status", &json!({ "status": "error", "detail": token })).await.is(200, "accepted");
    violated(&master, "a key or token is in the body");
}

#[tokio::test]
async fn what_is_too_large_is_413() {
    let limits = Limits { body_bytes: 1500, containers: 2, labels: 2, label_key_bytes: 20, label_value_bytes: 10 };
    let master = start(DevMaster::builder().limits(limits)).await;
    let mut agent = Session::begin(Caller::fresh(&master)).await;
    let labelled = |labels: Value| merged(&container("c"), &json!({ "labels": labels }));
    let enable = ("dockflare.enable".to_owned(), json!("true"));
    let with = |more: &[(&str, &str)]| {
        let more = more.iter().map(|(key, value)| ((*key).to_owned(), json!(value)));
        labelled(Value::Object([enable.clone()].into_iter().chain(more).collect()))
    };
    let fine = with(&[("dockflare.12345678-0", "1234567890")]);
    agent.send("container_start", &json!({ "container": fine })).await.is(200, "accepted");
    for large in [
        with(&[("dockflare.a", ""), ("dockflare.b", "")]),
        with(&[("dockflare.12345678-01", "")]),
        with(&[("dockflare.a", "12345678901")]),
    ] {
        agent.send("container_start", &json!({ "container": large })).await.is(413, "payload_too_large");
        agent.send("status_report", &complete(&[large])).await.is(413, "payload_too_large");
    }
    let three: Vec<Value> = ["a", "b", "c"].map(container).into();
    agent.send("status_report", &complete(&three)).await.is(413, "payload_too_large");
    agent.send("heartbeat", &json!({ "extra": "x".repeat(1500) })).await.is(413, "payload_too_large");
    clean(&master);
}

#[tokio::test]
async fn an_event_for_an_agent_the_key_is_not_bound_to_is_a_mismatch() {
    let master = v2().await;
    let caller = Caller::fresh(&master);
    let id = caller.joined().await;
    caller.events("nobody", &event("heartbeat")).await.is(403, "agent_key_mismatch");
    Caller::fresh(&master).events(&id, &event("heartbeat")).await.is(403, "agent_key_mismatch");
    caller.with_key("never-issued").events(&id, &event("heartbeat")).await.is(401, "unauthorized");
}

#[tokio::test]
async fn an_agent_that_speaks_version_1_is_read_as_such_and_loses_nothing() {
    let master = start(DevMaster::builder().highest_version(1)).await;
    let caller = Caller::fresh(&master);
    let id = caller.joined().await;
    let report =
        |containers: Value| merged(&event("status_report"), &json!({ "container": { "containers": containers } }));
    caller.events(&id, &report(json!([container("c1")]))).await.is(202, "inventory_incomplete");
    caller.events(&id, &report(json!([]))).await.is(202, "inventory_incomplete");
    assert_eq!(master.snapshot().agents[&id].containers.len(), 1);
    caller.events(&id, &event("container_die")).await.is(400, "invalid_payload");
    assert_eq!(master.violations().len(), 1);
}

#[tokio::test]
async fn a_master_may_be_upgraded_and_downgraded_while_agents_know_it() {
    let master = v1().await;
    let caller = Caller::fresh(&master);
    let id = caller.joined().await;
    master.set_protocol(Protocol::V2);
    caller.events(&id, &event("heartbeat")).await.is(202, "accepted_noop");
    let mut agent = Session::begin(caller).await;
    assert_eq!(agent.agent, id);
    agent.send("heartbeat", &json!({})).await.is(202, "accepted_noop");
    master.set_protocol(Protocol::V1);
    assert_eq!(agent.send("heartbeat", &json!({})).await.status, 202);
    clean(&master);
}

#[tokio::test]
async fn accepted_events_and_polls_keep_an_agent_online_and_refused_ones_do_not() {
    for master in [v1().await, v2().await] {
        let mut agent = Session::begin(Caller::fresh(&master)).await;
        let seen = || master.snapshot().agents[&agent.agent].last_seen;
        let registered = seen();
        let caller = agent.caller.clone();
        caller.events(&agent.agent, &json!({})).await;
        caller.with_key("never-issued").commands(&agent.agent).await;
        assert_eq!(seen(), registered);
        caller.commands(&agent.agent).await;
        let polled = seen();
        assert!(polled > registered);
        let id = agent.agent.clone();
        let body = agent.next("heartbeat", &json!({}));
        caller.events(&id, &body).await;
        assert!(master.snapshot().agents[&id].last_seen > polled);
    }
}
