//! Tests decommissioning: both phases, and restarts in between.

use anyhow::{Context, Result};
use dockflare_dev_master::{Decommission, Fault, Phase, Protocol, Route, Times};
use serde_json::{Value, json};
use testkit::{AgentProcess, Case, wait_until};

use crate::support::{SOON, Stage};

pub(crate) mod own_container;

pub(crate) fn cases() -> Vec<Case> {
    let mut cases = testkit::cases![
        both_phases_with_a_crash_in_between_end_in_an_agent_that_does_nothing,
        other_tunnel_commands_are_ignored_between_the_phases,
        lost_replies_to_acknowledgements_do_not_keep_the_agent_from_leaving,
        an_answer_that_is_not_the_masters_is_no_acknowledgement,
        an_agent_without_a_tunnel_leaves_as_well,
        a_crash_before_the_last_acknowledgement_is_made_up_for,
        a_crash_after_the_last_acknowledgement_was_taken_is_noticed,
        a_crash_between_the_last_tombstone_and_the_state_forgets_the_tunnel_all_the_same,
        another_operation_than_the_tombstones_is_refused_and_acknowledged_as_failed,
    ];
    cases.extend(own_container::cases());
    cases
}

/// The agent's files that these tests read.
const TOMBSTONE: &str = "decommission.json";
const STATE: &str = "tunnel_state.json";

fn file(stage: &Stage, name: &str) -> Result<Value> {
    Ok(serde_json::from_str(&stage.file(name)?)?)
}

async fn with_tunnel() -> Result<(Stage, AgentProcess, String)> {
    let stage = Stage::new(Protocol::V2).await?;
    let agent = stage.agent()?;
    let id = stage.enrolled_agent("edge").await?.id;
    stage.tunnel_is("running").await?;
    Ok((stage, agent, id))
}

async fn phase_is(stage: &Stage, phase: Phase) -> Result<Decommission> {
    let what = format!("the decommission to be at {phase:?}");
    let there = |operation: &&Decommission| operation.phase == phase;
    stage.master.wait_for(&what, SOON, |known| known.decommissions.last().filter(there).cloned()).await
}

/// Returns an agent that has acknowledged the first phase. The master's commands fail, so the second has not arrived.
async fn prepared() -> Result<(Stage, AgentProcess, String, Decommission)> {
    let (stage, agent, id) = with_tunnel().await?;
    // Delay the acknowledgement, so that there is time to break the other route first.
    stage.master.fault(Route::Ack, Fault::Delay { millis: 1000 }, 1);
    stage.master.remove(&id)?;
    wait_until("the tombstone", SOON, async || file(&stage, TOMBSTONE).ok()).await?;
    stage.master.fault(Route::Commands, Fault::status(503), Times::UntilCleared);
    let operation = phase_is(&stage, Phase::WaitingForFinalize).await?;
    Ok((stage, agent, id, operation))
}

/// Returns the number of event requests that reached the master, whatever it answered.
fn events(stage: &Stage) -> usize {
    stage.master.requests().iter().filter(|request| request.route == Route::Events).count()
}

/// Asserts that the agent's files hold nothing of the tunnel, and that the master has decommissioned the agent.
fn assert_gone(stage: &Stage) -> Result<Value> {
    let (state, tombstone) = (file(stage, STATE)?, file(stage, TOMBSTONE)?);
    for key in ["token", "id", "name"] {
        assert!(state[key].is_null(), "{key} is still there");
    }
    assert_eq!(state["desired_state"], "stopped");
    assert_eq!((&tombstone["phase"], &tombstone["acknowledged"]), (&json!("finalized"), &json!(true)));
    assert!(tombstone["finalized_at"].is_string() && tombstone["prepared_at"].is_string());
    let known = stage.master.snapshot();
    assert!(known.agents.is_empty(), "{known}");
    stage.assert_no_violations();
    Ok(tombstone)
}

/// Asserts that a restarted agent logs why it idles, sends no requests, and stops on a signal.
async fn assert_does_nothing(stage: &Stage, tombstone: &Value) -> Result<()> {
    let before = stage.master.requests().len();
    let mut again = stage.agent()?;
    let line = again.wait_for_log("was decommissioned", SOON).await?;
    let path = stage.data.path().join(TOMBSTONE).display().to_string();
    for part in [&tombstone["operation_id"], &tombstone["finalized_at"], &json!(path)] {
        assert!(line.contains(part.as_str().context("not a text")?), "{part} is not in: {line}");
    }
    again.sigterm()?;
    assert_eq!(again.wait_exit(SOON).await?.code(), Some(0));
    assert_eq!(stage.master.requests().len(), before);
    Ok(())
}

/// Waits until the agent idles, and checks that it still stops on SIGTERM.
async fn idles_and_stops(agent: &mut AgentProcess) -> Result<()> {
    agent.wait_for_log("cannot tell its own container for certain and idles", SOON).await?;
    assert!(agent.is_running()?);
    agent.sigterm()?;
    assert_eq!(agent.wait_exit(SOON).await?.code(), Some(0));
    Ok(())
}

async fn both_phases_with_a_crash_in_between_end_in_an_agent_that_does_nothing() -> Result<()> {
    let (stage, mut agent, id, operation) = prepared().await?;
    let tunnel = stage.scope.inspect(&stage.tunnel).await?.id;
    assert_eq!(stage.scope.status(&stage.tunnel).await?, "exited", "stopped and not removed");
    let said = operation.prepare_ack.context("no acknowledgement")?;
    let expected = json!({
        "phase": "prepared", "tombstone_persisted": true, "tunnel_container": "stopped",
        "self_stop_capability": "manual", "operation_id": operation.operation_id,
    });
    for (key, value) in expected.as_object().context("no object")? {
        assert_eq!(&said[key], value, "{key} in {said}");
    }
    assert!(said["cloudflared_image"].is_string() && said.get("error_code").is_none(), "{said}");
    let (state, tombstone) = (file(&stage, STATE)?, file(&stage, TOMBSTONE)?);
    assert_eq!(state["desired_state"], "stopped");
    assert!(state["token"].is_string(), "the first phase can be taken back by hand");
    assert_eq!((&tombstone["schema_version"], &tombstone["agent_id"]), (&json!(1), &json!(id)));
    assert_eq!((&tombstone["phase"], &tombstone["finalized_at"]), (&json!("prepared"), &Value::Null));
    assert_eq!(tombstone["requested_self_action"], "stop");

    let told = events(&stage);
    agent.sigkill()?;
    agent.wait_exit(SOON).await?;
    let mut agent = stage.agent()?;
    // The agent registers and polls, but no longer reports what happens on the host.
    let polls = "a poll of the second life";
    stage.master.wait_for(polls, SOON, |known| (known.registrations == 2).then_some(())).await?;
    let workload = stage.scope.run_workload(&[("dockflare.enable", "true")], &[], None, false).await?;
    agent.wait_for_log(&name_of(&stage, &workload).await?, SOON).await?;
    assert_eq!(stage.scope.inspect(&stage.tunnel).await?.id, tunnel);
    assert_eq!(stage.scope.status(&stage.tunnel).await?, "exited");

    stage.master.clear_faults();
    let done = phase_is(&stage, Phase::Completed).await?;
    let said = done.finalize_ack.context("no acknowledgement")?;
    assert_eq!((&said["phase"], &said["self_stop_capability"]), (&json!("shutdown_scheduled"), &json!("manual")));
    idles_and_stops(&mut agent).await?;
    assert_eq!(events(&stage), told, "nothing was told after the first phase");
    let tombstone = assert_gone(&stage)?;
    assert_does_nothing(&stage, &tombstone).await
}

async fn name_of(stage: &Stage, container: &str) -> Result<String> {
    let name = stage.scope.inspect(container).await?.name.context("no name")?;
    Ok(name.trim_start_matches('/').to_owned())
}

async fn other_tunnel_commands_are_ignored_between_the_phases() -> Result<()> {
    let (stage, mut agent, id) = with_tunnel().await?;
    // The master rejects the acknowledgement of the first phase, so it keeps repeating it, after other commands.
    stage.master.fault(Route::Ack, Fault::code(503, "persistence_failed"), Times::UntilCleared);
    stage.master.remove(&id)?;
    wait_until("the tunnel's end", SOON, async || {
        (stage.scope.status(&stage.tunnel).await.ok()? == "exited").then_some(())
    })
    .await?;
    let (tunnel, state) = (stage.scope.inspect(&stage.tunnel).await?.id, stage.file(STATE)?);
    let token = testkit::token("another", "");
    let orders = vec![
        json!({"action": "start_tunnel", "tunnel_name": "x", "tunnel_id": "another", "token": token}),
        json!({"action": "restart_tunnel", "tunnel_name": "x", "tunnel_id": "another", "tunnel_token": token}),
        json!({"action": "update_tunnel_config", "rules": {}}),
        json!({"action": "stop_tunnel"}),
    ];
    stage.master.push_commands(&id, orders)?;
    for order in ["start_tunnel", "restart_tunnel", "update_tunnel_config", "stop_tunnel"] {
        agent.wait_for_log(&format!("ignoring {order}"), SOON).await?;
    }
    assert_eq!(stage.scope.inspect(&stage.tunnel).await?.id, tunnel);
    assert_eq!(stage.scope.status(&stage.tunnel).await?, "exited");
    assert_eq!(stage.file(STATE)?, state);
    stage.master.clear_faults();
    phase_is(&stage, Phase::Completed).await?;
    idles_and_stops(&mut agent).await?;
    assert_gone(&stage)?;
    Ok(())
}

async fn lost_replies_to_acknowledgements_do_not_keep_the_agent_from_leaving() -> Result<()> {
    let (stage, mut agent, id) = with_tunnel().await?;
    // Each acknowledgement arrives, but no answer to one ever does.
    stage.master.fault(Route::Ack, Fault::LostReply, Times::UntilCleared);
    stage.master.remove(&id)?;
    phase_is(&stage, Phase::Completed).await?;
    idles_and_stops(&mut agent).await?;
    let tombstone = assert_gone(&stage)?;
    assert_does_nothing(&stage, &tombstone).await
}

async fn an_answer_that_is_not_the_masters_is_no_acknowledgement() -> Result<()> {
    let stage = killed_between().await?;
    // A middlebox answers 200 with an HTML page: the master has received nothing.
    stage.master.fault(Route::Ack, Fault::NotJson, 2);
    // Nor does a 404 page mean that the master has decommissioned the agent.
    stage.master.fault(Route::Ack, Fault::status(404), 2);
    ends_as_it_should(&stage).await
}

async fn an_agent_without_a_tunnel_leaves_as_well() -> Result<()> {
    let stage = Stage::new(Protocol::V2).await?;
    let mut agent = stage.agent()?;
    let id = stage.master.wait_for("the agent", SOON, |known| Some(known.only_agent()?.id.clone())).await?;
    stage.master.remove(&id)?;
    let done = phase_is(&stage, Phase::Completed).await?;
    assert_eq!(done.prepare_ack.context("no acknowledgement")?["tunnel_container"], "absent");
    idles_and_stops(&mut agent).await?;
    assert_gone(&stage)?;
    Ok(())
}

/// Kills an agent after the first phase, with a master that will send the second one.
async fn killed_between() -> Result<Stage> {
    let (stage, mut agent, _, _) = prepared().await?;
    agent.sigkill()?;
    agent.wait_exit(SOON).await?;
    stage.master.clear_faults();
    Ok(stage)
}

/// Runs an agent until the second phase is on disk, then kills it.
async fn killed_after_the_last_tombstone(stage: &Stage) -> Result<()> {
    let mut agent = stage.agent()?;
    let last = async || (file(stage, TOMBSTONE).ok()?["phase"] == "finalized").then_some(());
    wait_until("the last tombstone", SOON, last).await?;
    agent.sigkill()?;
    agent.wait_exit(SOON).await?;
    assert_eq!(file(stage, TOMBSTONE)?["acknowledged"], false);
    Ok(())
}

/// Checks that the next start ends as if nothing had happened.
async fn ends_as_it_should(stage: &Stage) -> Result<()> {
    let told = events(stage);
    let mut agent = stage.agent()?;
    idles_and_stops(&mut agent).await?;
    phase_is(stage, Phase::Completed).await?;
    assert_eq!(events(stage), told);
    let tombstone = assert_gone(stage)?;
    assert_does_nothing(stage, &tombstone).await
}

async fn a_crash_before_the_last_acknowledgement_is_made_up_for() -> Result<()> {
    let stage = killed_between().await?;
    stage.master.fault(Route::Ack, Fault::Hold, Times::UntilCleared);
    killed_after_the_last_tombstone(&stage).await?;
    stage.master.clear_faults();
    ends_as_it_should(&stage).await
}

async fn a_crash_after_the_last_acknowledgement_was_taken_is_noticed() -> Result<()> {
    let stage = killed_between().await?;
    // The master accepts it, but the agent is killed before it learns that: every answer is lost, every poll fails.
    stage.master.fault(Route::Ack, Fault::LostReply, Times::UntilCleared);
    stage.master.fault(Route::Commands, Fault::Delay { millis: 0 }, 1);
    stage.master.fault(Route::Commands, Fault::status(503), Times::UntilCleared);
    let mut agent = stage.agent()?;
    phase_is(&stage, Phase::Completed).await?;
    agent.sigkill()?;
    agent.wait_exit(SOON).await?;
    assert_eq!(file(&stage, TOMBSTONE)?["acknowledged"], false);
    stage.master.clear_faults();
    ends_as_it_should(&stage).await
}

async fn a_crash_between_the_last_tombstone_and_the_state_forgets_the_tunnel_all_the_same() -> Result<()> {
    let stage = killed_between().await?;
    let state = stage.file(STATE)?;
    stage.master.fault(Route::Ack, Fault::Hold, Times::UntilCleared);
    killed_after_the_last_tombstone(&stage).await?;
    stage.master.clear_faults();
    // The files as a crash after writing the first of the two would leave them.
    std::fs::write(stage.data.path().join(STATE), state)?;
    ends_as_it_should(&stage).await
}

async fn another_operation_than_the_tombstones_is_refused_and_acknowledged_as_failed() -> Result<()> {
    let stage = Stage::new(Protocol::V2).await?;
    let mut agent = stage.agent()?;
    let id = stage.master.wait_for("the agent", SOON, |known| Some(known.only_agent()?.id.clone())).await?;
    agent.sigkill()?;
    agent.wait_exit(SOON).await?;
    let other = json!({
        "schema_version": 1, "operation_id": "an-earlier-one", "agent_id": id, "phase": "prepared",
        "requested_self_action": "stop", "prepared_at": "2026-01-31T10:00:00Z", "finalized_at": null,
    });
    std::fs::write(stage.data.path().join(TOMBSTONE), other.to_string())?;
    let agent = stage.agent()?;
    stage.master.wait_for("the second life", SOON, |known| (known.registrations == 2).then_some(())).await?;
    stage.master.remove(&id)?;
    let refused = phase_is(&stage, Phase::PrepareFailed).await?;
    assert_eq!(refused.failure.as_deref(), Some("tombstone_conflict"));
    let line = agent.wait_for_log("tombstone_conflict", SOON).await?;
    assert!(line.contains(&refused.operation_id), "{line}");
    assert_eq!(file(&stage, TOMBSTONE)?, other);
    stage.assert_no_violations();
    Ok(())
}
