//! Plays random schedules of changes, faults and kills. After each, with all faults cleared, the master must believe
//! what Docker runs. At no time may the agent report that a container stopped if it did not.
//!
//! The test keeps the seed of a failed schedule in `model.regressions` beside this file, and tries it first in later
//! runs.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::Result;
use dockflare_dev_master::{Fault, Protocol, Route};
use proptest::prelude::{Just, Strategy, any};
use proptest::prop_oneof;
use proptest::test_runner::{Config, FileFailurePersistence, TestCaseError, TestRunner};
use testkit::Listing;
use tokio::time::sleep;

use crate::scene::Scene;

/// Schedules per test, unless `PROPTEST_CASES` says otherwise. The tests run side by side.
const SCHEDULES: u32 = 10;
const STEPS: std::ops::Range<usize> = 10..20;
/// Interval of the agent's reports and of its looks at Docker.
const INTERVAL: Duration = Duration::from_millis(500);
/// Covers the reporter's longest pause after a few failures, plus a look.
const AGREED_WITHIN: Duration = Duration::from_secs(20);

#[derive(Clone, Debug)]
enum Step {
    Start,
    Stop(usize),
    Rename(usize),
    Restart(usize),
    Burst(u8),
    Cut,
    EndStreams,
    Deafen,
    Mute(bool),
    Listings(Listing),
    Slow(u64),
    Lag(u64),
    HealDocker,
    DockerDown,
    DockerUp,
    Faults(Route, Fault, u32),
    EndSession,
    Forget,
    Pause,
    Resume,
    Kill,
    Wait(u64),
}

fn fault() -> impl Strategy<Value = Fault> {
    prop_oneof![
        proptest::sample::select(vec![429, 500, 502, 503]).prop_map(Fault::status),
        Just(Fault::delay(Duration::from_millis(300))),
        Just(Fault::Hold),
        Just(Fault::CutBefore),
        Just(Fault::CutHalfway),
        Just(Fault::LostReply),
        Just(Fault::Truncated),
        Just(Fault::NotJson),
        Just(Fault::LoginRedirect),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    let listing = vec![Listing::Truncated, Listing::Status(403), Listing::Status(500), Listing::Status(503)];
    let route = vec![Route::Any, Route::Events, Route::Events, Route::Events, Route::Register, Route::Commands];
    prop_oneof![
        6 => Just(Step::Start),
        4 => any::<usize>().prop_map(Step::Stop),
        2 => any::<usize>().prop_map(Step::Rename),
        3 => any::<usize>().prop_map(Step::Restart),
        2 => (1..60_u8).prop_map(Step::Burst),
        2 => Just(Step::Cut),
        1 => Just(Step::EndStreams),
        2 => Just(Step::Deafen),
        1 => any::<bool>().prop_map(Step::Mute),
        2 => proptest::sample::select(listing).prop_map(Step::Listings),
        1 => (50..1000_u64).prop_map(Step::Slow),
        1 => (5..300_u64).prop_map(Step::Lag),
        1 => Just(Step::HealDocker),
        1 => Just(Step::DockerDown),
        2 => Just(Step::DockerUp),
        4 => (proptest::sample::select(route), fault(), 1..4_u32).prop_map(|(route, fault, times)| Step::Faults(route, fault, times)),
        1 => Just(Step::EndSession),
        1 => Just(Step::Forget),
        1 => Just(Step::Pause),
        2 => Just(Step::Resume),
        2 => Just(Step::Kill),
        5 => (1..400_u64).prop_map(Step::Wait),
    ]
}

async fn carry_out(scene: &mut Scene, protocol: Protocol, always: &[String], step: Step) -> Result<()> {
    let docker = &scene.docker;
    let others: Vec<String> = docker.running().into_keys().filter(|id| !always.contains(id)).collect();
    let other = |at: usize| others.get(at % others.len().max(1));
    match step {
        Step::Start => drop(docker.run("web")),
        Step::Stop(at) => other(at).into_iter().for_each(|id| docker.stop(id)),
        // A rename may also hit a container that runs all the time.
        Step::Rename(at) => docker.rename(other(at).unwrap_or(&always[0]), &format!("renamed-{}", at % 5)),
        Step::Restart(at) => other(at).into_iter().for_each(|id| {
            docker.stop(id);
            docker.begin(id);
        }),
        Step::Burst(count) => (0..count).for_each(|at| {
            let id = docker.run("short");
            if at % 8 != 0 {
                docker.stop(&id);
            }
        }),
        Step::Cut => docker.cut(),
        Step::EndStreams => docker.end_streams(),
        Step::Deafen => docker.deafen(),
        Step::Mute(is_mute) => docker.mute(is_mute),
        Step::Listings(listing) => docker.answer_listings(listing),
        Step::Slow(millis) => docker.slow_down(Duration::from_millis(millis)),
        Step::Lag(millis) => docker.lag(Duration::from_millis(millis)),
        Step::HealDocker => docker.heal(),
        Step::DockerDown => docker.down(),
        Step::DockerUp => docker.up()?,
        Step::Faults(route, fault, times) => scene.master.fault(route, fault, times),
        Step::EndSession => scene.known().into_iter().try_for_each(|agent| scene.master.end_session(&agent.id))?,
        // A v2 master then refuses the key for good, and no agent can change that.
        Step::Forget if protocol == Protocol::V1 => {
            scene.known().into_iter().try_for_each(|agent| scene.master.forget(&agent.id))?;
        }
        Step::Forget => {}
        Step::Pause => scene.master.pause().await?,
        Step::Resume => scene.master.resume().await?,
        Step::Kill => {
            scene.kill().await?;
            scene.start()?;
        }
        Step::Wait(millis) => sleep(Duration::from_millis(millis)).await,
    }
    Ok(())
}

/// The longest time until the master agreed with Docker, for the log.
static LONGEST: Mutex<Duration> = Mutex::new(Duration::ZERO);

async fn play(protocol: Protocol, steps: Vec<Step>) -> Result<()> {
    let mut scene = Scene::new(protocol, INTERVAL).await?;
    let always = [scene.docker.run("always"), scene.docker.run("ever")];
    scene.start()?;
    scene.agreed(AGREED_WITHIN).await?;
    for step in steps {
        carry_out(&mut scene, protocol, &always, step).await?;
        // Longer than a message takes, and shorter than most faults last.
        sleep(Duration::from_millis(fastrand::u64(0..30))).await;
    }
    scene.docker.heal();
    scene.docker.up()?;
    scene.master.resume().await?;
    scene.master.clear_faults();
    // Only a new event shows whether the agent still listens.
    let _last = scene.docker.run("last");
    let began = Instant::now();
    loop {
        scene.agreed(AGREED_WITHIN).await?;
        let took = began.elapsed();
        // The agreement may be a coincidence while the agent works through unreported changes. Then it does not last.
        scene.more_reports(2).await?;
        match scene.agreed(Duration::ZERO).await {
            Ok(_) => {
                let mut longest = LONGEST.lock().unwrap();
                *longest = took.max(*longest);
                break;
            }
            Err(error) if began.elapsed() > AGREED_WITHIN => return Err(error),
            Err(_) => {}
        }
    }
    scene.assert_never_missed(&always)
}

fn schedules_end_in_agreement(protocol: Protocol) {
    let regressions = FileFailurePersistence::Direct("tests/doubles/model.regressions");
    let usual = Config::default();
    let config = Config {
        cases: if std::env::var_os("PROPTEST_CASES").is_some() { usual.cases } else { SCHEDULES },
        failure_persistence: Some(Box::new(regressions)),
        // Limit the shrinking, because each try takes seconds.
        max_shrink_iters: 30,
        ..usual
    };
    let schedules = config.cases;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let schedule = proptest::collection::vec(step(), STEPS);
    let played = TestRunner::new(config).run(&schedule, |steps| {
        runtime.block_on(play(protocol, steps)).map_err(|error| TestCaseError::fail(format!("{error:#}")))
    });
    eprintln!("{protocol}: {schedules} schedules, the longest agreement took {:.1?}", LONGEST.lock().unwrap());
    played.unwrap_or_else(|error| panic!("{protocol}: {error}"));
}

#[test]
fn whatever_happens_a_v1_master_ends_with_dockers_picture() {
    schedules_end_in_agreement(Protocol::V1);
}

#[test]
fn whatever_happens_a_v2_master_ends_with_dockers_picture() {
    schedules_end_in_agreement(Protocol::V2);
}

#[test]
fn whatever_else_happens_a_v1_master_ends_with_dockers_picture() {
    schedules_end_in_agreement(Protocol::V1);
}

#[test]
fn whatever_else_happens_a_v2_master_ends_with_dockers_picture() {
    schedules_end_in_agreement(Protocol::V2);
}
