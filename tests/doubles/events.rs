//! Each way to lose sight of Docker, one at a time. Within two seconds of its return, the master must know what runs.

use std::time::Duration;

use anyhow::Result;
use dockflare_dev_master::{Agent, Protocol};
use tokio::time::{Instant, sleep_until};

use crate::scene::{SOON, Scene, with_both};

/// How long the master may still be wrong after an outage ends.
const MOMENTS: Duration = Duration::from_secs(2);
/// Interval of the agent's reports and of its looks at Docker.
const INTERVAL: Duration = Duration::from_secs(1);

/// A scene whose agent has reported a container that runs throughout the test.
async fn scene(protocol: Protocol) -> Result<(Scene, [String; 1])> {
    let mut scene = Scene::new(protocol, INTERVAL).await?;
    let always = [scene.docker.run("always")];
    scene.start()?;
    scene.agreed(SOON).await?;
    // Wait until the looks at startup are over, because they would find any change made now.
    scene.more_reports(2).await?;
    Ok((scene, always))
}

#[tokio::test]
async fn a_stream_that_was_cut_without_a_word_is_found_out_within_one_report_interval() {
    with_both(async |protocol| {
        let (scene, always) = scene(protocol).await?;
        let ends = scene.docker.run("ends");
        scene.agreed(SOON).await?;
        scene.docker.deafen();
        let _begins = scene.docker.run("begins");
        scene.docker.stop(&ends);
        let took = scene.agreed(INTERVAL + MOMENTS).await?;
        // The agent listens again, and hears of a change without a look.
        scene.listens().await?;
        let _heard = scene.docker.run("heard");
        let heard = scene.agreed(MOMENTS).await?;
        eprintln!("{protocol}: known after {took:.1?}, and events again in {heard:.1?}");
        scene.assert_never_missed(&always)
    })
    .await;
}

#[tokio::test]
async fn events_that_got_lost_on_a_stream_that_lives_are_made_up_for_by_the_next_listing() {
    with_both(async |protocol| {
        let (scene, always) = scene(protocol).await?;
        let ends = scene.docker.run("ends");
        scene.agreed(SOON).await?;
        scene.docker.mute(true);
        let _begins = scene.docker.run("begins");
        scene.docker.rename(&ends, "renamed");
        scene.docker.mute(false);
        scene.agreed(INTERVAL + MOMENTS).await?;
        scene.docker.mute(true);
        scene.docker.stop(&ends);
        scene.docker.mute(false);
        scene.agreed(INTERVAL + MOMENTS).await?;
        scene.assert_never_missed(&always)
    })
    .await;
}

#[tokio::test]
async fn what_came_and_went_while_the_stream_was_cut_is_told() {
    with_both(async |protocol| {
        let (scene, always) = scene(protocol).await?;
        // This event tells the agent from what time on to ask for events.
        let before = scene.docker.run("before");
        scene.agreed(SOON).await?;
        scene.docker.cut();
        let brief = scene.docker.run("brief");
        scene.docker.stop(&brief);
        scene.docker.stop(&before);
        scene.agreed(SOON).await?;
        let told = |known: &Agent| (known.starts_of(&brief), known.stops_of(&brief)) == (1, 1);
        let seen = scene
            .master
            .wait_for("start and stop of what came and went", SOON, |_| scene.known().filter(told).map(drop));
        seen.await?;
        scene.assert_never_missed(&always)
    })
    .await;
}

#[tokio::test]
async fn while_docker_is_away_nothing_is_reported_as_complete() {
    with_both(async |protocol| {
        let (scene, always) = scene(protocol).await?;
        scene.docker.down();
        let says = |agent: &Agent| agent.heartbeats + agent.incomplete_reports;
        // A report may be in flight at this moment.
        let before = scene
            .master
            .wait_for("a word that it does not know", SOON, |_| scene.known().filter(|agent| says(agent) > 0));
        let before = before.await?;
        let more = scene
            .master
            .wait_for("two more of them", SOON, |_| scene.known().filter(|agent| says(agent) >= says(&before) + 2));
        let after = more.await?;
        anyhow::ensure!(
            after.complete_reports == before.complete_reports,
            "what is not known was reported as complete"
        );
        scene.docker.up()?;
        scene.more_reports(1).await?;
        scene.assert_never_missed(&always)
    })
    .await;
}

#[tokio::test]
async fn a_docker_that_comes_later_or_comes_back_is_known_in_moments() {
    with_both(async |protocol| {
        let mut scene = Scene::new(protocol, INTERVAL).await?;
        scene.docker.down();
        let always = [scene.docker.run("always")];
        scene.start()?;
        // Long enough for the back-off to grow.
        let outage = Duration::from_secs(6);
        sleep_until(Instant::now() + outage).await;
        anyhow::ensure!(scene.known().is_some_and(|agent| agent.complete_reports == 0), "it cannot know that");
        scene.docker.up()?;
        let came = scene.agreed(MOMENTS).await?;
        let ends = scene.docker.run("ends");
        scene.agreed(MOMENTS).await?;
        scene.docker.down();
        scene.docker.stop(&ends);
        let _begins = scene.docker.run("begins");
        sleep_until(Instant::now() + outage).await;
        scene.docker.up()?;
        let back = scene.agreed(MOMENTS).await?;
        eprintln!("{protocol}: known {came:.1?} after it came, and {back:.1?} after it came back");
        scene.assert_never_missed(&always)
    })
    .await;
}

#[tokio::test]
async fn a_burst_of_two_thousand_starts_and_stops_leaves_the_right_picture() {
    with_both(async |protocol| {
        let (scene, always) = scene(protocol).await?;
        let (began, every) = (Instant::now(), Duration::from_millis(5));
        for count in 0..2000_u32 {
            let id = scene.docker.run(&format!("burst-{count}"));
            // One container in a hundred keeps running.
            if count % 100 != 0 {
                scene.docker.stop(&id);
            }
            sleep_until(began + every * count).await;
        }
        let within = began.elapsed();
        // The agent sends events one by one. On a busy machine, up to 1024 of them are still queued.
        let took = scene.agreed(5 * MOMENTS).await?;
        let known = scene.known().unwrap_or_default();
        let told: u64 = known.starts.values().sum();
        eprintln!("{protocol}: 2,000 in {within:.1?}, the picture right {took:.1?} later, {told} starts told");
        anyhow::ensure!(known.containers.len() == 21);
        scene.assert_never_missed(&always)
    })
    .await;
}

#[tokio::test]
async fn an_engine_that_insists_on_a_new_api_is_spoken_to() {
    with_both(async |protocol| {
        let mut scene = Scene::new(protocol, INTERVAL).await?;
        scene.docker.insist_on(44);
        let always = [scene.docker.run("always")];
        scene.start()?;
        scene.agreed(SOON).await?;
        let _later = scene.docker.run("later");
        scene.agreed(MOMENTS).await?;
        scene.assert_never_missed(&always)
    })
    .await;
}

#[tokio::test]
async fn a_slow_docker_makes_no_event_late_and_undoes_none() {
    with_both(async |protocol| {
        let (scene, always) = scene(protocol).await?;
        let ends = scene.docker.run("ends");
        scene.agreed(SOON).await?;
        scene.docker.slow_down(Duration::from_secs(4));
        // A look is in progress by now, or begins in a moment.
        scene.more_reports(2).await?;
        let began = Instant::now();
        let _begins = scene.docker.run("begins");
        scene.docker.stop(&ends);
        let took = scene.agreed(MOMENTS).await?;
        // The listing that the agent asked for earlier arrives, and must change nothing.
        while began.elapsed() < Duration::from_secs(5) {
            scene.more_reports(1).await?;
            scene.agreed(Duration::ZERO).await?;
        }
        eprintln!("{protocol}: told after {took:.1?} while listings take 4 s");
        scene.assert_never_missed(&always)
    })
    .await;
}
