//! Tests how soon the master's picture is right again: after the way to Docker returns, and after a burst of events.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Result, ensure};
use dockflare_dev_master::{Agent, Protocol};
use futures_util::future::try_join_all;
use testkit::Case;
use tokio::time::Instant;

use super::gaps::says_that_it_does_not_know;
use super::{ENABLED, all_is_told, heard_of, watched, with_either_master};
use crate::support::Stage;
use crate::support::relay::{Relay, Way};

pub(super) fn cases() -> Vec<Case> {
    with_either_master![
        a_proxy_that_comes_back_costs_two_seconds_at_most,
        a_stream_that_was_cut_without_a_word_is_found_out_within_one_report_interval,
        ten_seconds_of_as_many_short_lives_as_docker_manages_leave_the_right_picture,
    ]
}

/// How long the master's picture may stay wrong after an outage ends.
const MOMENTS: Duration = Duration::from_secs(2);
/// The report interval that the stage sets.
const REPORT_INTERVAL: Duration = Duration::from_secs(5);

/// Waits until the master shows exactly the containers `run`, of those in `all`, as running. Returns how long that
/// took.
async fn picture(stage: &Stage, all: &[&String], run: &[&String], within: Duration) -> Result<Duration> {
    let began = Instant::now();
    let right = |agent: &Agent| all.iter().all(|id| agent.containers.contains_key(*id) == run.contains(id));
    let seen = |agent: &&Agent| right(agent);
    stage.master.wait_for("the right picture", within, |known| known.only_agent().filter(seen).map(drop)).await?;
    Ok(began.elapsed())
}

async fn a_proxy_that_comes_back_costs_two_seconds_at_most(protocol: Protocol) -> Result<()> {
    let mut stage = Stage::new(protocol).await?;
    // Use a separate scope: the proxy borrows the one that it is in.
    let scope = testkit::Scope::new(testkit::docker()?);
    let proxy = scope.socket_proxy(&testkit::PROXY_OPENS).await?;
    stage.set("DOCKER_HOST", proxy.host_url());
    let run = async || stage.scope.run_workload(ENABLED, &[], None, false).await;
    let (always, ends) = (run().await?, run().await?);
    let (_agent, _) = watched(&stage).await?;

    proxy.kill().await?;
    stage.scope.stop(&ends, 5).await?;
    let begins = run().await?;
    // Long enough for the back-off to grow.
    says_that_it_does_not_know(&stage).await?;
    proxy.restart().await?;
    let took = picture(&stage, &[&always, &ends, &begins], &[&always, &begins], MOMENTS).await?;

    // Restart once more, this time a running proxy.
    proxy.restart().await?;
    stage.scope.stop(&begins, 5).await?;
    picture(&stage, &[&always, &ends, &begins], &[&always], MOMENTS).await?;
    eprintln!("{protocol}: the picture right {took:.1?} after the proxy answered again");
    stage.assert_never_missed(&always)
}

async fn a_stream_that_was_cut_without_a_word_is_found_out_within_one_report_interval(
    protocol: Protocol,
) -> Result<()> {
    let mut stage = Stage::new(protocol).await?;
    let relay = Relay::start(Way::Engine).await?;
    stage.set("DOCKER_HOST", relay.host_url());
    let run = async || stage.scope.run_workload(ENABLED, &[], None, false).await;
    let (always, ends) = (run().await?, run().await?);
    let (agent, _) = watched(&stage).await?;
    // Wait until the initial listings are over: they would find whatever happens now.
    super::another_report(&stage).await?;

    relay.freeze();
    let mark = agent.mark();
    stage.scope.stop(&ends, 5).await?;
    let begins = run().await?;
    let all = [&always, &ends, &begins];
    let took = picture(&stage, &all, &[&always, &begins], REPORT_INTERVAL + MOMENTS).await?;
    agent.wait_for_log_after(mark, "cut without a word; opening it again", 2 * MOMENTS).await?;
    agent.wait_for_log_after(mark, "listening to Docker's events again", MOMENTS).await?;
    // From now on the agent receives events.
    stage.scope.stop(&begins, 5).await?;
    let heard = picture(&stage, &all, &[&always], MOMENTS).await?;
    eprintln!("{protocol}: known after {took:.1?}, and events again in {heard:.1?}");
    stage.assert_never_missed(&always)
}

async fn ten_seconds_of_as_many_short_lives_as_docker_manages_leave_the_right_picture(
    protocol: Protocol,
) -> Result<()> {
    const AT_ONCE: usize = 4;
    let stage = Stage::new(protocol).await?;
    let always = stage.scope.run_workload(ENABLED, &[], None, false).await?;
    let (_agent, _) = watched(&stage).await?;
    let end = Instant::now() + Duration::from_secs(10);
    let lives = (0..AT_ONCE).map(async |_| {
        let mut ids = Vec::new();
        while Instant::now() < end {
            ids.push(stage.scope.run_workload(ENABLED, &["sleep", "50"], None, true).await?);
        }
        anyhow::Ok(ids)
    });
    let ids: BTreeSet<String> = try_join_all(lives).await?.into_iter().flatten().collect();
    let stays = stage.scope.run_workload(ENABLED, &[], None, false).await?;
    // The agent reports the end of each container that a listing showed as running. Those that live 50 ms may still be
    // ending.
    let all: Vec<&String> = ids.iter().chain([&always, &stays]).collect();
    let took = picture(&stage, &all, &[&always, &stays], 2 * MOMENTS).await?;
    // An earlier report may have made the picture right while events are still on their way.
    for id in &ids {
        heard_of(&stage, id, 1, 1).await?;
    }
    let known = all_is_told(&stage).await?;
    let told = ids.iter().filter(|id| (known.starts_of(id), known.stops_of(id)) == (1, 1)).count();
    eprintln!(
        "{protocol}: {} lives of 50 ms in 10 s, {told} told in full, the picture right after {took:.1?}",
        ids.len()
    );
    ensure!(told == ids.len(), "while the master is there, each life is told");
    stage.assert_never_missed(&always)
}
