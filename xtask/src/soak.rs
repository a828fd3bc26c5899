//! `cargo xtask soak`: runs the agent for minutes or hours with a fault every few seconds. Nothing may be lost.
//!
//! The agent's process, its socket proxy, the Docker Engine and all containers are real. The development master runs
//! in this process, and the tunnel is the stand-in for cloudflared. [`scene`] holds everything, and [`fault`] deals the
//! faults. [`relay`] is the door to Docker, and [`proxy`] is what stands behind it. [`disk`] is the data folder, and
//! [`measure`] looks at the processes. Each minute ends with a calm in which everything must recover. Everything has
//! the test kit's labels, and the soak removes it at the end, also on Ctrl-C.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use dockflare_dev_master::Protocol;
use fastrand::Rng;
use testkit::{Between, Scope};
use tokio::signal::unix::{SignalKind, signal};

use crate::demo::{UNAVAILABLE, engine};

mod disk;
mod fault;
mod measure;
mod proxy;
mod relay;
mod scene;

use fault::{Faults, Kind};
use measure::Watched;
use scene::Scene;

/// Interval between two checks of the invariants.
const TICK: Duration = Duration::from_secs(1);
/// The part of each minute without faults.
const CALM: Duration = Duration::from_secs(10);
/// How long full recovery may take. The longest wait between two tries is a minute, and the agent retries a disturbed
/// new connector after one more.
const SETTLE_LIMIT: Duration = Duration::from_secs(180);
/// How long everything must stay right before it counts as settled.
const SETTLED: Duration = Duration::from_secs(5);
/// The most log lines that the agent may write per minute, with a fault every three seconds.
const MOST_LINES_A_MINUTE: usize = 400;
/// In a soak of at least this many minutes, no fault ends the agent in the middle third, so that one process lives
/// long.
const LONG_SOAK: u64 = 9;

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// How long; each minute ends with a calm in which all must come right again
    #[arg(long, value_name = "N", default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..))]
    minutes: u64,
    /// Deals the faults of an earlier soak in the same order; any number otherwise
    #[arg(long, value_name = "S")]
    seed: Option<u64>,
    /// Which protocol the master speaks: v1 or v2
    #[arg(long, default_value = "v2")]
    protocol: Protocol,
    /// What the agent reaches Docker through: own, its own socket proxy; haproxy, one like the usual ones; or none
    #[arg(long, value_name = "PROXY", default_value = "own")]
    docker_proxy: Between,
}

/// Runs the soak, and removes everything it made.
pub(crate) fn run(arguments: &Arguments) -> ExitCode {
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("no runtime: {error}");
            return ExitCode::FAILURE;
        }
    };
    let seed = arguments.seed.unwrap_or_else(|| fastrand::u64(..));
    let ended = runtime.block_on(async {
        let docker = match engine().await {
            Ok(docker) => docker,
            Err(error) => {
                eprintln!("the soak needs a Docker Engine on this machine: {error:#}");
                return None;
            }
        };
        if let Err(error) = testkit::sweep(&docker).await {
            eprintln!("what a killed process left cannot be removed: {error:#}");
        }
        // A soak that is dropped half-way also removes what it made.
        Some(tokio::select! {
            ended = soak(arguments, seed) => ended,
            asked = asked_to_stop() => asked,
        })
    });
    drop(runtime);
    let Some(ended) = ended else { return ExitCode::from(UNAVAILABLE) };
    let ended = ended.and_then(|summary| testkit::clean_up().map(|()| summary));
    match ended {
        Ok(summary) => {
            println!("{summary}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            drop(testkit::clean_up());
            println!("soak: FAILED with --seed {seed}: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Waits for SIGINT (Ctrl-C) or SIGTERM.
async fn asked_to_stop() -> Result<String> {
    let mut terminate = signal(SignalKind::terminate())?;
    tokio::select! {
        pressed = tokio::signal::ctrl_c() => pressed?,
        _ = terminate.recv() => {}
    }
    Err(anyhow!("interrupted; all of it is removed"))
}

async fn soak(arguments: &Arguments, seed: u64) -> Result<String> {
    println!("soak: {} minute(s) with --seed {seed}, master {}; building first", arguments.minutes, arguments.protocol);
    let scope = Scope::new(testkit::docker()?);
    let scene = Scene::new(&scope, arguments.protocol, arguments.docker_proxy).await?;
    let mut soak = Soak {
        scene,
        faults: Faults::new(seed),
        rng: Rng::with_seed(seed ^ 1),
        began: Instant::now(),
        agent: Watched::default(),
        proxy: Watched::default(),
        slowest: Duration::ZERO,
        most_lines: 0,
        calms: 0,
    };
    let ended = soak.all(arguments.minutes).await;
    if ended.is_err() {
        println!("\n--- the last lines of the agent's log ---\n{}", soak.scene.last_lines().join("\n"));
        println!("\n--- the master's picture ---\n{}", soak.scene.master.snapshot());
    }
    ended
}

/// A soak in progress, with what it has measured so far.
struct Soak<'a> {
    scene: Scene<'a>,
    faults: Faults,
    /// Random numbers for everything except faults.
    rng: Rng,
    began: Instant,
    agent: Watched,
    /// The agent's own socket proxy, if there is one.
    proxy: Watched,
    /// The longest time until everything was right again.
    slowest: Duration,
    most_lines: usize,
    calms: u32,
}

impl Soak<'_> {
    async fn all(&mut self, minutes: u64) -> Result<String> {
        self.settle().await.context("at the start")?;
        let began = Instant::now();
        for minute in 0..minutes {
            let lines = self.scene.lines();
            let since = Instant::now();
            // A longer calm shortens the next minute, and does not lengthen the whole soak.
            let until = (began + Duration::from_secs(60 * (minute + 1))).max(since + 3 * CALM) - CALM;
            let third = minute * 3 / minutes;
            self.trouble(until, minutes < LONG_SOAK || third != 1).await?;
            self.faults.end_all(&mut self.scene).await?;
            self.settle().await?;
            self.stay_calm().await?;
            let took = since.elapsed().as_secs_f64() / 60.0;
            let lines = ((self.scene.lines() - lines) as f64 / took) as usize;
            self.most_lines = self.most_lines.max(lines);
            ensure!(lines <= MOST_LINES_A_MINUTE, "the agent wrote {lines} lines in a minute");
        }
        let (memory, descriptors) = measure::flat(&self.agent.samples).context("the agent")?;
        let proxy = match self.proxy.samples.as_slice() {
            [] => String::new(),
            samples => {
                let (memory, descriptors) = measure::flat(samples).context("the socket proxy")?;
                let (first, last) = (memory.first / 1024.0, memory.last / 1024.0);
                let (few, many) = (descriptors.first, descriptors.last);
                format!(", its socket proxy {first:.1} then {last:.1} MiB and {few} then {many}")
            }
        };
        self.scene.stop_agent().await.context("at the end")?;
        let missing = self.faults.missing();
        if !missing.is_empty() {
            println!("these kinds of faults did not come: {missing:?}");
        }
        Ok(format!(
            "soak: {minutes} minutes, {} faults, {} kills, {} stops, {} calms (the slowest after {:.1} s), \
             memory {:.1} then {:.1} MiB, descriptors {} then {}{proxy}, at most {} lines a minute, ok",
            self.faults.total(),
            self.faults.of(Kind::AgentKilled),
            self.faults.of(Kind::AgentStopped),
            self.calms,
            self.slowest.as_secs_f64(),
            memory.first / 1024.0,
            memory.last / 1024.0,
            descriptors.first,
            descriptors.last,
            self.most_lines,
        ))
    }

    /// Begins one fault after another, and makes containers come and go.
    async fn trouble(&mut self, until: Instant, may_end_the_agent: bool) -> Result<()> {
        let mut next_fault = Instant::now();
        while Instant::now() < until {
            self.look(false).await?;
            self.faults.relent(&mut self.scene).await?;
            self.scene.enrol_pending()?;
            if self.rng.u8(..3) == 0 {
                self.scene.move_workload(&mut self.rng).await.context("a workload")?;
            }
            if Instant::now() >= next_fault {
                self.faults.strike(&mut self.scene, may_end_the_agent).await?;
                next_fault = Instant::now() + Duration::from_millis(self.rng.u64(1000..=4000));
            }
            tokio::time::sleep(TICK).await;
        }
        Ok(())
    }

    /// Waits until everything has been right for [`SETTLED`]. A shorter time would miss an order that is still on its
    /// way.
    async fn settle(&mut self) -> Result<()> {
        let began = Instant::now();
        let mut right_since = None;
        self.scene.repeat_what_may_be_lost()?;
        let since = loop {
            self.scene.enrol_pending()?;
            self.look(false).await?;
            match self.scene.is_well().await {
                Ok(()) => {
                    let since = *right_since.get_or_insert_with(Instant::now);
                    if since.elapsed() >= SETTLED {
                        break since;
                    }
                }
                Err(error) if began.elapsed() > SETTLE_LIMIT => {
                    return Err(error.context(format!("{SETTLE_LIMIT:?} without a fault were not enough")));
                }
                Err(_) => right_since = None,
            }
            tokio::time::sleep(TICK / 4).await;
        };
        let took = since - began;
        self.slowest = self.slowest.max(took);
        self.calms += 1;
        self.scene.settled = true;
        self.scene.say("soak", format_args!("all is right again after {:.1} s", took.as_secs_f64()));
        Ok(())
    }

    /// Checks that everything stays right while nothing happens.
    async fn stay_calm(&mut self) -> Result<()> {
        let until = Instant::now() + CALM;
        while Instant::now() < until {
            self.look(true).await?;
            self.scene.is_well().await.context("it was right, and then, without a fault")?;
            tokio::time::sleep(TICK).await;
        }
        Ok(())
    }

    /// Checks what must hold at any time.
    async fn look(&mut self, calm: bool) -> Result<()> {
        self.scene.agent_runs()?;
        self.scene.at_most_two_connectors().await?;
        let violations = self.scene.master.violations();
        ensure!(violations.is_empty(), "the agent broke the protocol: {}", violations.join("; "));
        let pid = self.scene.pid()?;
        let children = measure::children(pid);
        ensure!(children.is_empty(), "the agent has child processes: {}", children.join("; "));
        let at = self.began.elapsed();
        self.agent.look(pid, at, calm).context("the agent")?;
        self.scene.proxy.refuses_nothing()?;
        if let Some(pid) = self.scene.proxy.pid() {
            self.proxy.look(pid, at, calm).context("the socket proxy")?;
        }
        Ok(())
    }
}
