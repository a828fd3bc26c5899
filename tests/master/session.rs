//! A session that the master no longer knows, and what the master refuses in a session that it knows.

use dockflare_dev_master::{Fault, Protocol, Route};

use crate::desk::{BOTH, Desk, stop};
use crate::support::SOON;

#[tokio::test]
async fn an_agent_that_a_v1_master_forgot_registers_again_at_once_under_its_id() {
    let desk = Desk::new(Protocol::V1).await.unwrap();
    let agent = desk.agent().unwrap();
    let id = desk.registered(1).await.unwrap().id;
    agent.wait_for_log("registered at the master", SOON).await.unwrap();
    desk.master.forget(&id).unwrap();
    assert_eq!(desk.registered(1).await.unwrap().id, id);
    let asked = desk.master.requests();
    let refused = asked.iter().position(|request| request.status == Some(404)).unwrap();
    let again = asked[refused..].iter().find(|request| request.route == Route::Register).unwrap();
    let took = again.at.duration_since(asked[refused].at);
    assert!(took.as_secs() < 2, "{took:#}");
    desk.assert_no_violations();
}

#[tokio::test]
async fn an_ended_v2_session_is_followed_by_another_with_numbers_of_its_own_and_a_report() {
    let desk = Desk::new(Protocol::V2).await.unwrap();
    let agent = desk.agent().unwrap();
    let first = desk.registered(1).await.unwrap();
    desk.answered(Route::Events, 200).await.unwrap();
    let mark = desk.master.requests().len();
    desk.master.end_session(&first.id).unwrap();
    let second = desk.registered(2).await.unwrap();
    assert_eq!(first.id, second.id);
    assert_ne!(first.session, second.session);
    let session = second.session.unwrap();
    // There is no Docker, so the next report is incomplete.
    let what = "the first report and the first event of the session";
    let said = async |member: &'static str| {
        desk.master
            .wait_for_request(what, SOON, |request| {
                let is_it = request.body["agent_session_id"] == *session && request.body[member] == 1;
                (is_it && request.status.is_some_and(|status| status < 300)).then(|| request.body.clone())
            })
            .await
            .unwrap()
    };
    assert_eq!(said("event_sequence").await["type"], "tunnel_status");
    let report = said("report_sequence").await;
    assert_eq!(report["inventory_complete"], false);
    assert!(report.get("containers").is_none());
    let refused = desk.master.requests()[mark..].iter().filter(|request| request.status == Some(409)).count();
    assert_eq!(refused, 1, "what was refused is not sent again under the session that is no more");
    drop(agent);
    desk.assert_no_violations();
}

#[tokio::test]
async fn what_a_v2_master_refuses_of_an_event_is_handled_as_its_table_says() {
    // The reply, and how many registrations must have happened in the end.
    let table = [
        (409, "stale_sequence", 2),
        (409, "registration_required", 2),
        (413, "payload_too_large", 1),
        (400, "invalid_payload", 1),
    ];
    let rows = table.map(async |(status, code, registrations)| {
        let desk = Desk::new(Protocol::V2).await.unwrap();
        desk.master.fault(Route::Events, Fault::code(status, code), 1);
        let mut agent = desk.agent().unwrap();
        desk.registered(registrations).await.unwrap();
        // The agent goes on either way, and never resends the bytes that the master refused.
        desk.answered(Route::Events, 202).await.unwrap();
        stop(&mut agent).await.unwrap();
        assert_eq!(desk.master.snapshot().registrations, registrations, "{code}");
        let asked = desk.master.requests();
        let refused = asked.iter().find(|request| request.code.as_deref() == Some(code)).unwrap();
        assert_eq!(asked.iter().filter(|request| request.body == refused.body).count(), 1, "{code}");
        desk.assert_no_violations();
    });
    futures_util::future::join_all(rows).await;
}

#[tokio::test]
async fn an_idle_agent_is_heard_of_within_a_minute_whatever_its_intervals() {
    let rows = BOTH.map(async |protocol| {
        let mut desk = Desk::new(protocol).await.unwrap();
        desk.set("REPORT_INTERVAL_SECONDS", "3600");
        desk.set("COMMAND_POLL_INTERVAL_SECONDS", "3600");
        let _agent = desk.agent().unwrap();
        let heard = desk.master.wait_for("a heartbeat", 2 * SOON, |known| {
            known.only_agent().filter(|agent| agent.heartbeats > 0).map(|agent| agent.online)
        });
        assert!(heard.await.unwrap());
        let asked = desk.master.requests();
        let gaps = asked.windows(2).map(|two| two[1].at.duration_since(two[0].at).as_secs());
        assert!(gaps.max().is_some_and(|gap| gap < 45), "one may be lost");
        desk.assert_no_violations();
    });
    futures_util::future::join_all(rows).await;
}
