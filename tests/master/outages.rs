//! A master that is away, answers nonsense, or whose answers get lost.

use dockflare_dev_master::{Fault, Protocol, Route};
use futures_util::future::join_all;

use crate::desk::{BOTH, Desk, stop};
use crate::support::SOON;

/// Checks that the agent survives `fault`, at its start and later, and that a command sent after the fault arrives.
async fn gets_through(protocol: Protocol, fault: Fault) {
    let desk = Desk::new(protocol).await.unwrap();
    desk.master.fault(Route::Any, fault.clone(), 2);
    let mut agent = desk.agent().unwrap();
    agent.wait_for_log("registered at the master", SOON).await.unwrap();
    desk.master.fault(Route::Any, fault.clone(), 3);
    desk.master.wait_for("the faults to be over", SOON, |known| (known.faults == 0).then_some(())).await.unwrap();
    // There may be other agents: a v1 master makes another one for each registration whose answer was lost.
    let id = desk.file("agent_id.txt").unwrap();
    desk.master.enroll(&id, "edge").unwrap();
    agent.wait_for_log("command start_tunnel", SOON).await.unwrap();
    // The agent logs an outage when it begins, when it changes and when it ends, never at each try.
    let log = agent.log();
    let warned = log.lines().filter(|line| line.contains("WARN the master ")).count();
    assert!(
        log.contains("WARN the master ") && log.contains("the master works again") && warned <= 5,
        "{fault:?}:\n{log}"
    );
    stop(&mut agent).await.unwrap();
    desk.assert_no_violations();
}

#[tokio::test]
async fn the_agent_gets_through_every_way_in_which_a_master_fails() {
    let faults = [
        Fault::status(502),
        Fault::code(503, "persistence_failed"),
        Fault::code(429, "rate_limited").retry_after("1"),
        Fault::CutBefore,
        Fault::CutHalfway,
        Fault::Truncated,
        Fault::LostReply,
        Fault::NotJson,
        Fault::LoginRedirect,
    ];
    join_all(BOTH.iter().flat_map(|&protocol| faults.iter().map(move |fault| gets_through(protocol, fault.clone()))))
        .await;
}

#[tokio::test]
async fn a_master_that_is_away_is_said_once_and_waited_for() {
    let rows = BOTH.map(async |protocol| {
        let desk = Desk::new(protocol).await.unwrap();
        desk.master.pause().await.unwrap();
        let mut agent = desk.agent().unwrap();
        let line = agent.wait_for_log("the master cannot be reached", SOON).await.unwrap();
        assert!(line.contains("WARN") && line.contains("the tunnel is not touched"), "{line}");
        desk.master.resume().await.unwrap();
        let id = desk.registered(1).await.unwrap().id;
        agent.wait_for_log("the master works again", SOON).await.unwrap();

        let mark = agent.mark();
        desk.master.pause().await.unwrap();
        agent.wait_for_log_after(mark, "the master cannot be reached", SOON).await.unwrap();
        desk.master.resume().await.unwrap();
        agent.wait_for_log_after(mark, "the master works again", SOON).await.unwrap();
        desk.master.enroll(&id, "edge").unwrap();
        agent.wait_for_log("command start_tunnel", SOON).await.unwrap();
        stop(&mut agent).await.unwrap();
        desk.assert_no_violations();
    });
    join_all(rows).await;
}

#[tokio::test]
async fn an_event_that_was_not_answered_by_the_master_is_sent_again_to_the_letter() {
    let faults = [
        Fault::status(502),
        Fault::code(429, "rate_limited"),
        Fault::CutBefore,
        Fault::CutHalfway,
        Fault::Truncated,
        Fault::LostReply,
        Fault::NotJson,
    ];
    let rows = faults.map(async |fault| {
        let desk = Desk::new(Protocol::V2).await.unwrap();
        desk.master.fault(Route::Events, fault.clone(), 1);
        let _agent = desk.agent().unwrap();
        let is_event = |request: &&std::sync::Arc<dockflare_dev_master::Request>| request.route == Route::Events;
        let twice = async || {
            let asked = desk.master.requests();
            let mut events = asked.iter().filter(is_event);
            Some((events.next()?.body.clone(), events.next()?.body.clone()))
        };
        let (first, second) = testkit::wait_until("two events", SOON, twice).await.unwrap();
        assert_eq!(first, second, "{fault:?}");
        desk.assert_no_violations();
    });
    join_all(rows).await;
}

#[tokio::test]
async fn retry_after_is_honoured_on_every_route() {
    let routes = [Route::Register, Route::Commands, Route::Events];
    let rows = routes.map(async |route| {
        let desk = Desk::new(Protocol::V2).await.unwrap();
        desk.master.fault(route, Fault::code(429, "rate_limited").retry_after("3"), 1);
        let mut agent = desk.agent().unwrap();
        let again = desk.master.wait_for_request("the same route again", SOON, |request| {
            (request.route == route && request.status.is_some_and(|status| status < 300)).then_some(request.at)
        });
        let again = again.await.unwrap();
        let asked = desk.master.requests();
        let refused = asked.iter().find(|request| request.status == Some(429)).unwrap();
        let waited = again.duration_since(refused.at).as_millis();
        assert!((3000..8000).contains(&waited), "{route}: {waited} ms");
        let between = asked.iter().filter(|r| r.route == route && r.at > refused.at && r.at < again).count();
        assert_eq!(between, 0, "{route}");
        stop(&mut agent).await.unwrap();
        desk.assert_no_violations();
    });
    join_all(rows).await;
}

#[tokio::test]
async fn on_v1_an_enrolment_that_was_lost_with_its_reply_is_found_again() {
    let ways = [Fault::LostReply, Fault::CutHalfway, Fault::Truncated];
    let rows = ways.map(async |fault| {
        let desk = Desk::new(Protocol::V1).await.unwrap();
        let agent = desk.agent().unwrap();
        let id = desk.registered(1).await.unwrap().id;
        // Set both at one instant, so that the damaged poll is the one with the command.
        desk.master.fault(Route::Commands, fault.clone(), 1);
        desk.master.enroll(&id, "edge").unwrap();
        let line = agent.wait_for_log("the master has a tunnel for this agent", SOON).await.unwrap();
        assert!(line.contains("edge"), "{fault:?}: {line}");
        let kept = async || desk.file("tunnel_state.json").ok().filter(|state| state.contains("\"running\""));
        testkit::wait_until("the state on disk", SOON, kept).await.unwrap();
        assert!(!agent.log().contains("command start_tunnel"), "{fault:?}");
        desk.assert_no_violations();
    });
    join_all(rows).await;
}
