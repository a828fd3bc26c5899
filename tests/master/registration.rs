//! Tests each row of the registration table.

use std::os::unix::fs::PermissionsExt;

use dockflare_dev_master::{DevMaster, Fault, Protocol, Route};

use crate::desk::{BOTH, Desk, stop};
use crate::support::SOON;

const ID: &str = "agent_id.txt";

#[tokio::test]
async fn the_id_is_kept_for_the_owners_eyes_and_used_again() {
    for protocol in BOTH {
        let desk = Desk::new(protocol).await.unwrap();
        let mut agent = desk.agent().unwrap();
        agent.wait_for_log("registered at the master", SOON).await.unwrap();
        let first = desk.registered(1).await.unwrap();
        stop(&mut agent).await.unwrap();
        assert_eq!(desk.file(ID).unwrap(), first.id, "the id and nothing else");
        let mode = std::fs::metadata(desk.path(ID)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);

        let _agent = desk.agent().unwrap();
        let second = desk.registered(2).await.unwrap();
        assert_eq!(first.id, second.id);
        let asked = desk.master.requests();
        let asked: Vec<_> = asked.iter().filter(|request| request.route == Route::Register).collect();
        assert_eq!((asked[0].status, asked[1].status), (Some(201), Some(200)));
        assert!(asked[0].body.get("agent_id").is_none() && asked[1].body["agent_id"] == *first.id);
        assert!(asked.iter().all(|request| request.body["display_name"] == "kitchen"));
        desk.assert_no_violations();
    }
}

#[tokio::test]
async fn a_v2_master_that_agrees_to_protocol_1_is_spoken_to_in_protocol_1() {
    let desk = Desk::with(DevMaster::builder().highest_version(1)).await.unwrap();
    let agent = desk.agent().unwrap();
    let line = agent.wait_for_log("registered at the master", SOON).await.unwrap();
    assert!(line.contains("protocol=1"), "{line}");
    desk.answered(Route::Events, 200).await.unwrap();
    desk.assert_no_violations();
}

#[tokio::test]
async fn an_unknown_key_is_said_with_what_to_do_and_taken_once_the_master_knows_it() {
    for protocol in BOTH {
        let mut desk = Desk::new(protocol).await.unwrap();
        desk.key = "a-key-that-nobody-made".to_owned();
        desk.set("DOCKFLARE_API_KEY", desk.key.clone());
        let agent = desk.agent().unwrap();
        let line = agent.wait_for_log("refuses the agent key with 401", SOON).await.unwrap();
        assert!(line.contains("WARN") && line.contains("DOCKFLARE_API_KEY") && line.contains("tunnel is not touched"));
        desk.master.add_key(&desk.key, "late");
        desk.registered(1).await.unwrap();
        agent.wait_for_log("registration: works again", SOON).await.unwrap();
        desk.assert_no_violations();
    }
}

#[tokio::test]
async fn on_v1_an_id_of_another_key_is_said_with_both_ways_out_and_kept() {
    let mut desk = Desk::new(Protocol::V1).await.unwrap();
    let mut agent = desk.agent().unwrap();
    agent.wait_for_log("registered at the master", SOON).await.unwrap();
    stop(&mut agent).await.unwrap();
    let id = desk.file(ID).unwrap();
    desk.key = desk.master.generate_key("another");
    desk.set("DOCKFLARE_API_KEY", desk.key.clone());
    let mut agent = desk.agent().unwrap();
    let line = agent.wait_for_log("the stored id belongs to another key", SOON).await.unwrap();
    assert!(line.contains("set the key this agent enrolled with") && line.contains("delete agent_id.txt"), "{line}");
    desk.answered(Route::Register, 403).await.unwrap();
    assert!(agent.is_running().unwrap());
    assert_eq!(desk.file(ID).unwrap(), id);
    // The operator applies the second remedy.
    std::fs::remove_file(desk.path(ID)).unwrap();
    stop(&mut agent).await.unwrap();
    let _agent = desk.agent().unwrap();
    desk.master.wait_for("a second agent", SOON, |known| (known.agents.len() == 2).then_some(())).await.unwrap();
    desk.assert_no_violations();
}

#[tokio::test]
async fn on_v2_a_wrong_id_is_put_right_by_asking_without_one() {
    let desk = Desk::new(Protocol::V2).await.unwrap();
    let mut agent = desk.agent().unwrap();
    agent.wait_for_log("registered at the master", SOON).await.unwrap();
    let id = desk.registered(1).await.unwrap().id;
    stop(&mut agent).await.unwrap();
    std::fs::write(desk.path(ID), "somebody-else\n").unwrap();
    let mut agent = desk.agent().unwrap();
    let line = agent.wait_for_log("the master gave this agent another id", SOON).await.unwrap();
    assert!(line.contains("WARN") && line.contains("somebody-else") && line.contains(&id), "{line}");
    assert_eq!(desk.registered(2).await.unwrap().id, id);
    agent.wait_for_log("registered at the master", SOON).await.unwrap();
    stop(&mut agent).await.unwrap();
    assert_eq!(desk.file(ID).unwrap(), id);
    desk.assert_no_violations();
}

#[tokio::test]
async fn on_v2_a_key_that_was_never_used_brings_a_new_id_which_replaces_the_stored_one() {
    let desk = Desk::new(Protocol::V2).await.unwrap();
    std::fs::write(desk.path(ID), "of-an-earlier-master").unwrap();
    let agent = desk.agent().unwrap();
    let line = agent.wait_for_log("the master gave this agent another id", SOON).await.unwrap();
    let id = desk.registered(1).await.unwrap().id;
    assert!(line.contains("of-an-earlier-master") && line.contains(&id), "{line}");
    agent.wait_for_log("registered at the master", SOON).await.unwrap();
    assert_eq!(desk.file(ID).unwrap(), id);
    desk.assert_no_violations();
}

#[tokio::test]
async fn on_v2_the_key_of_a_removed_agent_is_said_to_be_of_no_use_any_more() {
    let desk = Desk::new(Protocol::V2).await.unwrap();
    let mut agent = desk.agent().unwrap();
    let known = desk.registered(1).await.unwrap();
    desk.master.forget(&known.id).unwrap();
    let line = agent.wait_for_log("this key belongs to an agent that was removed", SOON).await.unwrap();
    assert!(line.contains("WARN") && line.contains("generate a new key on the master's Agents page"), "{line}");
    let refused = desk.answered(Route::Register, 403).await.unwrap();
    assert_eq!(refused.code.as_deref(), Some("agent_key_mismatch"));
    assert!(agent.is_running().unwrap());
    assert_eq!(desk.file(ID).unwrap(), known.id);
    stop(&mut agent).await.unwrap();
    desk.assert_no_violations();
}

#[tokio::test]
async fn every_other_refusal_is_named_and_tried_again() {
    let table = [
        (503, "persistence_failed", "trying again"),
        (409, "unsupported_protocol", "update"),
        (413, "payload_too_large", "AGENT_DISPLAY_NAME"),
        (400, "invalid_payload", "DOCKFLARE_MASTER_URL"),
    ];
    let rows = table.map(async |(status, code, remedy)| {
        let desk = Desk::new(Protocol::V2).await.unwrap();
        desk.master.fault(Route::Register, Fault::code(status, code), 2);
        let mut agent = desk.agent().unwrap();
        let line = agent.wait_for_log(code, SOON).await.unwrap();
        assert!(line.contains("WARN") && line.contains(&status.to_string()), "{line}");
        desk.registered(1).await.unwrap();
        stop(&mut agent).await.unwrap();
        assert!(line.contains(remedy), "{code}: {line}");
        assert_eq!(agent.log().lines().filter(|line| line.contains(code)).count(), 1, "said once, not at each try");
        desk.assert_no_violations();
    });
    futures_util::future::join_all(rows).await;
}
