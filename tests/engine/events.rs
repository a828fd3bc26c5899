//! Tests what the master receives of Docker's events for labelled containers.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use dockflare_dev_master::{Agent, Protocol, Snapshot};
use futures_util::future::try_join_all;
use testkit::bollard::query_parameters::RenameContainerOptions;
use testkit::{AgentProcess, Case};

use crate::support::{SOON, Stage};

mod gaps;
mod outages;

/// Makes each case once for either kind of master.
macro_rules! with_either_master {
    ($($function:path),* $(,)?) => {
        vec![$(
            testkit::case(concat!("v1_master_", stringify!($function)), || $function(Protocol::V1)),
            testkit::case(concat!("v2_master_", stringify!($function)), || $function(Protocol::V2)),
        )*]
    };
}
use with_either_master;

pub(crate) fn cases() -> Vec<Case> {
    let mut cases = with_either_master![
        each_way_to_end_is_one_start_and_one_stop,
        a_restart_is_one_stop_and_one_start_more,
        a_pause_changes_nothing,
        a_rename_shows_in_the_next_report_and_is_no_start,
        only_labels_meant_for_the_master_leave_the_host,
        enable_is_read_in_all_spellings_and_under_both_prefixes,
        a_burst_of_short_lived_containers_is_told_in_full,
        a_start_reaches_the_master_in_moments,
    ];
    cases.extend(gaps::cases());
    cases.extend(outages::cases());
    cases
}

const ENABLED: &[(&str, &str)] = &[("dockflare.enable", "true")];

/// Starts an agent and waits for its first complete report. Returns it with what the master knows of it.
async fn watched(stage: &Stage) -> Result<(AgentProcess, Agent)> {
    let process = stage.agent()?;
    let agent = complete_reports(stage, 1).await?;
    Ok((process, agent))
}

/// Waits until the master has this many complete reports.
async fn complete_reports(stage: &Stage, count: u64) -> Result<Agent> {
    let what = format!("{count} complete report(s)");
    let enough = |agent: &&Agent| agent.complete_reports >= count;
    stage.master.wait_for(&what, SOON, |known| known.only_agent().filter(enough).cloned()).await
}

/// Waits for one more complete report.
async fn another_report(stage: &Stage) -> Result<Agent> {
    let before = stage.master.snapshot().only_agent().context("no agent")?.complete_reports;
    complete_reports(stage, before + 1).await
}

/// Waits until the master has at least this many starts and stops of the container.
async fn heard_of(stage: &Stage, id: &str, starts: u64, stops: u64) -> Result<Agent> {
    let what = format!("{starts} start(s) and {stops} stop(s) of {id}");
    let enough = |agent: &&Agent| agent.starts_of(id) >= starts && agent.stops_of(id) >= stops;
    stage.master.wait_for(&what, SOON, |known| known.only_agent().filter(enough).cloned()).await
}

/// Waits until the master has all of Docker's earlier events: it waits for a later one, and events come in order.
async fn all_is_told(stage: &Stage) -> Result<Agent> {
    let marker = stage.scope.run_workload(ENABLED, &[], None, false).await?;
    heard_of(stage, &marker, 1, 0).await
}

async fn each_way_to_end_is_one_start_and_one_stop(protocol: Protocol) -> Result<()> {
    let stage = Stage::new(protocol).await?;
    let (_agent, _) = watched(&stage).await?;
    let scope = &stage.scope;
    let run = async |args: &'static [&'static str], rm| scope.run_workload(ENABLED, args, None, rm).await;

    let by_itself = [
        ("ends with 0", run(&["sleep", "200"], false).await?),
        ("fails at once", run(&["exit", "3"], false).await?),
        ("--rm ends", run(&["sleep", "200"], true).await?),
        ("--rm fails at once", run(&["exit", "1"], true).await?),
    ];
    let stopped = run(&[], false).await?;
    scope.stop(&stopped, 5).await?;
    let killed = run(&[], false).await?;
    scope.kill(&killed, "SIGKILL").await?;
    let asked = run(&[], false).await?;
    scope.kill(&asked, "SIGTERM").await?;
    let removed = run(&[], false).await?;
    scope.rm(&removed).await?;
    let stopped_rm = run(&[], true).await?;
    scope.stop(&stopped_rm, 5).await?;
    let by_hand = [
        ("stopped", stopped),
        ("killed", killed),
        ("told to end", asked),
        ("removed by force", removed),
        ("--rm stopped", stopped_rm),
    ];

    let all: Vec<_> = by_itself.into_iter().chain(by_hand).collect();
    for (_, id) in &all {
        heard_of(&stage, id, 1, 1).await?;
    }
    let known = all_is_told(&stage).await?;
    for (way, id) in &all {
        assert_eq!((known.starts_of(id), known.stops_of(id)), (1, 1), "{way}");
        assert!(!known.containers.contains_key(id), "{way}");
    }
    stage.assert_no_violations();
    Ok(())
}

async fn a_restart_is_one_stop_and_one_start_more(protocol: Protocol) -> Result<()> {
    let stage = Stage::new(protocol).await?;
    let (_agent, _) = watched(&stage).await?;
    let id = stage.scope.run_workload(ENABLED, &[], None, false).await?;
    for times in 1..=2 {
        stage.scope.restart(&id, 5).await?;
        heard_of(&stage, &id, 1 + times, times).await?;
        let known = all_is_told(&stage).await?;
        assert_eq!((known.starts_of(&id), known.stops_of(&id)), (1 + times, times));
        assert!(known.containers.contains_key(&id));
    }
    stage.assert_no_violations();
    Ok(())
}

async fn a_pause_changes_nothing(protocol: Protocol) -> Result<()> {
    let stage = Stage::new(protocol).await?;
    let (_agent, _) = watched(&stage).await?;
    let id = stage.scope.run_workload(ENABLED, &[], None, false).await?;
    heard_of(&stage, &id, 1, 0).await?;
    stage.scope.pause(&id).await?;
    let paused = another_report(&stage).await?;
    stage.scope.unpause(&id).await?;
    let thawed = all_is_told(&stage).await?;
    for known in [paused, thawed] {
        assert_eq!((known.starts_of(&id), known.stops_of(&id)), (1, 0));
        assert!(known.containers.contains_key(&id) && !known.removals.contains(&id));
    }
    stage.assert_no_violations();
    Ok(())
}

async fn a_rename_shows_in_the_next_report_and_is_no_start(protocol: Protocol) -> Result<()> {
    let stage = Stage::new(protocol).await?;
    let (_agent, _) = watched(&stage).await?;
    let id = stage.scope.run_workload(ENABLED, &[], None, false).await?;
    heard_of(&stage, &id, 1, 0).await?;
    let new = stage.scope.name("renamed");
    stage.scope.docker().rename_container(&id, RenameContainerOptions { name: new.clone() }).await?;
    let named = |agent: &&Agent| agent.container_named(&new) == Some(id.as_str());
    let known = stage.master.wait_for("the new name", SOON, |known| known.only_agent().filter(named).cloned()).await?;
    assert_eq!((known.starts_of(&id), known.stops_of(&id)), (1, 0));
    stage.assert_no_violations();
    Ok(())
}

async fn only_labels_meant_for_the_master_leave_the_host(protocol: Protocol) -> Result<()> {
    let stage = Stage::new(protocol).await?;
    let (_agent, _) = watched(&stage).await?;
    let ours = [
        ("dockflare.enable", "true"),
        ("dockflare.hostname", "app.example.com"),
        ("dockflare.0.service", "http://app:80"),
        ("cloudflare.tunnel.zonename", "example.com"),
        ("dockflare.empty", ""),
        ("dockflare.unicode", "grüße ✓ \"quoted\""),
    ];
    let others = [
        ("com.example.password", "hush-hush"),
        ("dockflare", "hush-hush"),
        ("dockflare-x.enable", "hush-hush"),
        ("cloudflare.tunnelx", "hush-hush"),
        ("xdockflare.enable", "hush-hush"),
    ];
    let labels = [&ours[..], &others].concat();
    let id = stage.scope.run_workload(&labels, &[], None, false).await?;
    let told = heard_of(&stage, &id, 1, 0).await?;
    let reported = another_report(&stage).await?;
    let expected: BTreeMap<_, _> = ours.map(|(key, value)| (key.to_owned(), value.to_owned())).into();
    for known in [told, reported] {
        assert_eq!(known.containers.get(&id).map(|container| &container.labels), Some(&expected));
    }
    // Nor did the agent send them in a field that the master ignores.
    for request in stage.master.requests() {
        assert!(!request.body.to_string().contains("hush-hush"), "{request}");
    }
    stage.assert_no_violations();
    Ok(())
}

async fn enable_is_read_in_all_spellings_and_under_both_prefixes(protocol: Protocol) -> Result<()> {
    const NEW: &str = "dockflare.enable";
    const OLD: &str = "cloudflare.tunnel.enable";
    let table: [(&[(&str, &str)], bool); 19] = [
        (&[(NEW, "true")], true),
        (&[(NEW, "TRUE")], true),
        (&[(NEW, "1")], true),
        (&[(NEW, "t")], true),
        (&[(NEW, "Yes")], true),
        (&[(OLD, "true")], true),
        (&[(OLD, "True")], true),
        (&[(OLD, "T")], true),
        (&[(OLD, "yes")], true),
        (&[(NEW, "false"), (OLD, "true")], true),
        (&[(NEW, "true"), (OLD, "false")], true),
        (&[(NEW, "false")], false),
        (&[(NEW, "0")], false),
        (&[(NEW, "on")], false),
        (&[(NEW, "")], false),
        (&[(OLD, "no")], false),
        (&[(OLD, "")], false),
        (&[(NEW, "truely"), (OLD, "2")], false),
        (&[("dockflare.enabled", "true")], false),
    ];
    let stage = Stage::new(protocol).await?;
    let (_agent, _) = watched(&stage).await?;
    let mut rows = Vec::new();
    for (labels, counts) in table {
        rows.push((stage.scope.run_workload(labels, &[], None, false).await?, labels, counts));
    }
    let told = all_is_told(&stage).await?;
    let reported = another_report(&stage).await?;
    for (id, labels, counts) in &rows {
        assert_eq!(told.starts_of(id), u64::from(*counts), "{labels:?}");
        for known in [&told, &reported] {
            assert_eq!(known.containers.contains_key(id), *counts, "{labels:?}");
        }
    }
    stage.assert_no_violations();
    Ok(())
}

/// Waits until the agent reports a short-lived container. Docker answers a subscription before it takes effect, long
/// before on a busy machine. A container that starts and ends in between appears in no event and no listing.
async fn listens(stage: &Stage) -> Result<()> {
    for _ in 0..10 {
        let id = stage.scope.run_workload(ENABLED, &["sleep", "30"], None, true).await?;
        let told = |known: &Snapshot| {
            known.only_agent().filter(|agent| agent.starts_of(&id) > 0 && agent.stops_of(&id) > 0).map(drop)
        };
        if stage.master.wait_for("one of a moment", Duration::from_secs(5), told).await.is_ok() {
            return Ok(());
        }
    }
    bail!("none of ten containers that lived for a moment was told")
}

async fn a_burst_of_short_lived_containers_is_told_in_full(protocol: Protocol) -> Result<()> {
    // Fifty containers with v2; twenty with v1, whose events have no numbers.
    const AT_ONCE: usize = 10;
    let rounds = if protocol == Protocol::V2 { 5 } else { 2 };
    let stage = Stage::new(protocol).await?;
    let (_agent, _) = watched(&stage).await?;
    listens(&stage).await?;
    let mut ids = Vec::new();
    for _ in 0..rounds {
        let burst = (0..AT_ONCE).map(|_| stage.scope.run_workload(ENABLED, &["sleep", "30"], None, true));
        ids.extend(try_join_all(burst).await?);
    }
    for id in &ids {
        heard_of(&stage, id, 1, 1).await?;
    }
    let known = all_is_told(&stage).await?;
    for id in &ids {
        assert_eq!((known.starts_of(id), known.stops_of(id)), (1, 1));
        assert!(!known.containers.contains_key(id));
    }
    stage.assert_no_violations();
    Ok(())
}

async fn a_start_reaches_the_master_in_moments(protocol: Protocol) -> Result<()> {
    let stage = Stage::new(protocol).await?;
    let (_agent, _) = watched(&stage).await?;
    let mut late = Vec::new();
    for _ in 0..5 {
        let id = stage.scope.run_workload(ENABLED, &[], None, false).await?;
        let told = stage.master.wait_for_request("the start", SOON, |request| {
            let is_it = request.event() == Some("container_start") && request.body["container"]["id"] == *id;
            is_it.then(|| (request.at, request.body["timestamp"].as_str().map(str::to_owned)))
        });
        let (heard, happened) = told.await?;
        // Docker's own timestamp of the event, a moment after the process began.
        let happened: jiff::Timestamp = happened.context("no timestamp")?.parse()?;
        let state = stage.scope.inspect(&id).await?.state.unwrap_or_default();
        let began: jiff::Timestamp = state.started_at.context("not started")?.parse()?;
        ensure!(happened >= began, "the event is told to be of {happened}, the process began at {began}");
        late.push((heard - happened).total(jiff::Unit::Millisecond)?);
    }
    late.sort_by(f64::total_cmp);
    eprintln!("{protocol}: container_start at the master after {late:.1?} ms by Docker's clock");
    // Far below any of the agent's intervals, far above what a busy machine needs.
    assert!(late[0] < 1000.0, "{late:?} ms");
    Ok(())
}
