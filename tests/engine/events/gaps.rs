//! Tests what happens unseen by the agent: before its start, while it is down, and while Docker cannot be reached.

use anyhow::{Context, Result};
use dockflare_dev_master::{Agent, Fault, Protocol, Route};
use testkit::{AgentProcess, Case, wait_until};

use super::{ENABLED, all_is_told, another_report, heard_of, watched, with_either_master};
use crate::support::relay::{REFUSAL, Relay, Way};
use crate::support::{SOON, Stage};

pub(super) fn cases() -> Vec<Case> {
    let mut cases = with_either_master![
        what_runs_at_the_start_is_in_the_first_complete_report,
        what_ended_while_the_agent_was_down_disappears_with_the_first_complete_report,
        a_listing_that_fails_is_never_reported_as_complete,
        a_cut_stream_leaves_the_masters_picture_right,
        what_happened_while_the_master_was_away_is_right_when_it_is_back,
    ];
    cases.extend(testkit::cases![v2_master_an_event_of_an_ended_session_is_sent_again_under_the_next]);
    cases
}

async fn what_runs_at_the_start_is_in_the_first_complete_report(protocol: Protocol) -> Result<()> {
    let stage = Stage::new(protocol).await?;
    let running = stage.scope.run_workload(ENABLED, &[], None, false).await?;
    let legacy = stage.scope.run_workload(&[("cloudflare.tunnel.enable", "1")], &[], None, false).await?;
    let paused = stage.scope.run_workload(ENABLED, &[], None, false).await?;
    stage.scope.pause(&paused).await?;
    let ended = stage.scope.run_workload(ENABLED, &["exit", "0"], None, false).await?;
    let has_ended = async || (stage.scope.status(&ended).await.ok()? == "exited").then_some(());
    wait_until("its end", SOON, has_ended).await?;
    let plain = stage.scope.run_workload(&[], &[], None, false).await?;
    let (_agent, known) = watched(&stage).await?;
    assert_eq!(known.complete_reports, 1);
    let reported = |id| known.containers.contains_key(id);
    assert!(reported(&running) && reported(&legacy) && reported(&paused));
    assert!(!reported(&ended) && !reported(&plain));
    stage.assert_no_violations();
    Ok(())
}

async fn what_ended_while_the_agent_was_down_disappears_with_the_first_complete_report(
    protocol: Protocol,
) -> Result<()> {
    let stage = Stage::new(protocol).await?;
    let ends = stage.scope.run_workload(ENABLED, &[], None, false).await?;
    let stays = stage.scope.run_workload(ENABLED, &[], None, false).await?;
    let (mut agent, known) = watched(&stage).await?;
    assert!(known.containers.contains_key(&ends) && known.containers.contains_key(&stays));
    agent.sigkill()?;
    agent.wait_exit(SOON).await?;
    stage.scope.stop(&ends, 5).await?;
    let before = stage.master.snapshot().only_agent().context("no agent")?.complete_reports;
    let _again = stage.agent()?;
    let known = super::complete_reports(&stage, before + 1).await?;
    assert!(known.removals.contains(&ends) && !known.containers.contains_key(&ends));
    assert!(!known.removals.contains(&stays) && known.containers.contains_key(&stays));
    assert_eq!((known.registrations, known.stops_of(&ends), known.stops_of(&stays)), (2, 0, 0));
    stage.assert_no_violations();
    Ok(())
}

/// Waits until an agent that cannot list its containers has reported that once more.
pub(super) async fn says_that_it_does_not_know(stage: &Stage) -> Result<Agent> {
    let said = |agent: &Agent| match agent.protocol {
        1 => agent.heartbeats,
        _ => agent.incomplete_reports,
    };
    let before = said(stage.master.snapshot().only_agent().context("no agent")?);
    let more = |agent: &&Agent| said(agent) > before;
    let what = "the agent to say that it does not know";
    stage.master.wait_for(what, SOON, |known| known.only_agent().filter(more).cloned()).await
}

async fn a_listing_that_fails_is_never_reported_as_complete(protocol: Protocol) -> Result<()> {
    const LIST: &str = "/containers/json";
    const CUT_SHORT: &str = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 4096\r\n\
        Connection: close\r\n\r\n[{\"Id\":\"0123\",\"Names\":[\"/x\"]";
    const HALF: &str = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 12\r\n\
        Connection: close\r\n\r\n[{\"Id\":\"0123";
    const NOTHING: &str = "HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
    let mut stage = Stage::new(protocol).await?;
    let mut relay = Relay::start(Way::Engine).await?;
    stage.set("DOCKER_HOST", relay.host_url());
    let id = stage.scope.run_workload(ENABLED, &[], None, false).await?;
    let (agent, known) = watched(&stage).await?;
    assert!(known.containers.contains_key(&id));
    relay.answer_one(Way::Answer { line: LIST, with: CUT_SHORT }).await?;
    let unsure = says_that_it_does_not_know(&stage).await?;
    for with in [HALF, NOTHING, REFUSAL] {
        relay.answer_one(Way::Answer { line: LIST, with }).await?;
    }
    let still = says_that_it_does_not_know(&stage).await?;
    assert_eq!(unsure.complete_reports, still.complete_reports);
    let mark = agent.mark();
    relay.switch(Way::Engine);
    let known = another_report(&stage).await?;
    agent.wait_for_log_after(mark, "listening to Docker's events again", SOON).await?;
    for known in [still, known] {
        assert!(known.containers.contains_key(&id) && !known.removals.contains(&id));
        assert_eq!(known.stops_of(&id), 0);
    }
    stage.assert_no_violations();
    Ok(())
}

async fn a_cut_stream_leaves_the_masters_picture_right(protocol: Protocol) -> Result<()> {
    let mut stage = Stage::new(protocol).await?;
    // Use a separate scope: the proxy borrows the one that it is in.
    let scope = testkit::Scope::new(testkit::docker()?);
    let proxy = scope.socket_proxy(&testkit::PROXY_OPENS).await?;
    stage.set("DOCKER_HOST", proxy.host_url());
    let run = async || stage.scope.run_workload(ENABLED, &[], None, false).await;
    let (stays, ends, restarts) = (run().await?, run().await?, run().await?);
    let (_agent, known) = watched(&stage).await?;
    assert!([&stays, &ends, &restarts].iter().all(|id| known.containers.contains_key(*id)));

    proxy.kill().await?;
    stage.scope.stop(&ends, 5).await?;
    stage.scope.restart(&restarts, 5).await?;
    let begins = run().await?;
    let passes = run().await?;
    stage.scope.rm(&passes).await?;
    proxy.restart().await?;

    heard_of(&stage, &begins, 1, 0).await?;
    heard_of(&stage, &ends, 0, 1).await?;
    all_is_told(&stage).await?;
    let known = another_report(&stage).await?;
    for id in [&stays, &restarts, &begins] {
        assert!(known.containers.contains_key(id) && !known.removals.contains(id));
    }
    for id in [&ends, &passes] {
        assert!(!known.containers.contains_key(id));
    }
    assert_eq!((known.stops_of(&stays), known.stops_of(&ends)), (0, 1));
    assert_eq!((known.starts_of(&begins), known.stops_of(&begins)), (1, 0));
    // The agent sees a restart in the gap either in full or not at all. The same holds for a short life.
    let restarted = (known.starts_of(&restarts), known.stops_of(&restarts));
    assert!(restarted.0 >= restarted.1, "{restarted:?}");
    assert_eq!(known.starts_of(&passes), known.stops_of(&passes));
    stage.assert_no_violations();
    Ok(())
}

async fn what_happened_while_the_master_was_away_is_right_when_it_is_back(protocol: Protocol) -> Result<()> {
    let stage = Stage::new(protocol).await?;
    let run = async || stage.scope.run_workload(ENABLED, &[], None, false).await;
    let (ends, restarts) = (run().await?, run().await?);
    let (agent, _) = watched(&stage).await?;
    stage.master.pause().await?;
    agent.wait_for_log("the master cannot be reached", SOON).await?;
    stage.scope.stop(&ends, 5).await?;
    stage.scope.restart(&restarts, 5).await?;
    let begins = run().await?;
    let passes = run().await?;
    stage.scope.rm(&passes).await?;
    let offline = stage.master.requests().len();
    stage.master.resume().await?;

    let right = |agent: &&Agent| {
        let has = |id| agent.containers.contains_key(id);
        has(&begins) && has(&restarts) && !has(&ends) && !has(&passes)
    };
    let what = "the right picture";
    stage.master.wait_for(what, SOON, |known| known.only_agent().filter(right).cloned()).await?;
    // The first message is a full report, so that the master need not guess from later events.
    let after = &stage.master.requests()[offline..];
    let first = after.iter().find(|request| request.event().is_some() && request.status.is_some());
    assert_eq!(first.and_then(|request| request.event()), Some("status_report"));
    let known = all_is_told(&stage).await?;
    assert!(right(&&known), "{}", stage.master.report());
    stage.assert_no_violations();
    Ok(())
}

async fn v2_master_an_event_of_an_ended_session_is_sent_again_under_the_next() -> Result<()> {
    let stage = Stage::new(Protocol::V2).await?;
    let (_agent, known): (AgentProcess, Agent) = watched(&stage).await?;
    // Hold the commands, so that the event is the first request to see the ended session.
    stage.master.fault(Route::Commands, Fault::Hold, dockflare_dev_master::Times::UntilCleared);
    stage.master.end_session(&known.id)?;
    let id = stage.scope.run_workload(ENABLED, &[], None, false).await?;
    let refused = stage
        .master
        .wait_for_request("the refusal", SOON, |request| {
            let refused = request.code.as_deref() == Some("registration_required");
            refused.then(|| request.body["agent_session_id"].clone())
        })
        .await?;
    let accepted = stage
        .master
        .wait_for_request("the same event under another session", SOON, |request| {
            let is_it = request.event() == Some("container_start") && request.body["container"]["id"] == *id;
            (is_it && request.status == Some(200)).then(|| request.body["agent_session_id"].clone())
        })
        .await?;
    assert_ne!(refused, accepted);
    let known = another_report(&stage).await?;
    assert_eq!((known.registrations, known.starts_of(&id)), (2, 1));
    assert!(known.containers.contains_key(&id));
    assert_eq!(Some(accepted), known.session.map(Into::into));
    stage.assert_no_violations();
    Ok(())
}
