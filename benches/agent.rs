//! Measures the cost and speed of the agent and its socket proxy on a real Docker Engine: `cargo bench --bench agent`.
//!
//! Prints figures and asserts none: they depend on the machine.

#![allow(clippy::disallowed_methods, clippy::disallowed_types, clippy::disallowed_macros, reason = "for development")]

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use dockflare_dev_master::{DevMaster, Protocol, Request};
use testkit::bollard::API_DEFAULT_VERSION;
use testkit::bollard::query_parameters::ListContainersOptions;
use testkit::{AgentProcess, Docker, Scope, SocketProxy};

const SOON: Duration = Duration::from_secs(60);
/// Number of starts and stops to time.
const ROUNDS: usize = 40;
/// How long to watch the idle agent.
const IDLE: Duration = Duration::from_secs(30);
/// Number of containers in a listing, and of listings to time with the socket proxy and without.
const LISTED: usize = 200;
const LISTINGS: usize = 300;

fn main() -> Result<()> {
    // `cargo test --all-targets` builds and runs this too, and must not take a minute for figures that nobody reads.
    if !std::env::args().any(|argument| argument == "--bench") {
        return Ok(());
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let measured = runtime.block_on(async {
        match testkit::engine().await {
            Some(_) => measure().await,
            None => {
                println!("skipped: no Docker Engine answers");
                Ok(())
            }
        }
    });
    drop(runtime);
    testkit::clean_up()?;
    measured
}

async fn measure() -> Result<()> {
    let master = DevMaster::builder().protocol(Protocol::V2).start().await?;
    let scope = Scope::new(testkit::docker()?);
    let data = tempfile::tempdir()?;
    let (tunnel, network) = (scope.name("tunnel"), scope.name("net"));
    scope.owns_container(&tunnel);
    scope.owns_network(&network);
    let program = Path::new(env!("CARGO_BIN_EXE_dockflare-agent"));
    let mut env = [
        ("DOCKFLARE_MASTER_URL", master.url()),
        ("DOCKFLARE_API_KEY", master.generate_key("bench")),
        ("DOCKFLARE_DATA_DIR", data.path().display().to_string()),
        ("CLOUDFLARED_IMAGE", testkit::images().stand_in_with(&[("STAND_IN_DRAIN", "100")]).await?),
        ("CLOUDFLARED_NETWORK_NAME", network),
        ("TUNNEL_CONTAINER_NAME", tunnel),
        ("HEALTH_CHECK_PORT", "0".to_owned()),
    ]
    .map(|(name, value)| (name.to_owned(), value))
    .to_vec();
    let proxy = SocketProxy::start(program, &env)?;
    env.push(("DOCKER_HOST".to_owned(), proxy.host_url()));
    let began = Instant::now();
    let agent = AgentProcess::spawn(program, &env, data.path())?;
    let id = master.wait_for("registration", SOON, |known| Some(known.only_agent()?.id.clone())).await?;
    println!("start to registered         {:>8.1} ms", began.elapsed().as_secs_f64() * 1e3);
    master.enroll(&id, "bench")?;
    agent.wait_for_log("tunnel ready", SOON).await?;

    let mut delays = Vec::new();
    let container = scope.run_workload(&[("dockflare.enable", "true")], &[], None, false).await?;
    for _ in 0..ROUNDS {
        delays.push(delay(&master, "container_start", &container, delays.len()).await?);
        scope.stop(&container, 0).await?;
        delays.push(delay(&master, "container_stop", &container, delays.len()).await?);
        scope.start(&container).await?;
    }
    println!("Docker's event to the master {}", spread(delays));

    let pids = [("agent", agent.pid()), ("socket proxy", proxy.process().pid())];
    let mut before = Vec::new();
    for (_, pid) in pids {
        before.push(cpu_seconds(pid)?);
    }
    tokio::time::sleep(IDLE).await;
    for ((name, pid), before) in pids.into_iter().zip(before) {
        let share = (cpu_seconds(pid)? - before) / IDLE.as_secs_f64() * 100.0;
        println!("{name:<12} idle           {share:>8.2} % of one core over {} s", IDLE.as_secs());
        print_memory(name, pid)?;
    }
    println!("program                     {:>8.1} MB", std::fs::metadata(program)?.len() as f64 / 1e6);
    listings(&scope, &proxy).await
}

/// Times one listing through the proxy and one past it, in turn.
async fn listings(scope: &Scope, proxy: &SocketProxy) -> Result<()> {
    for _ in 0..LISTED {
        scope.run_workload(&[("dockflare.enable", "true")], &[], Some("none"), false).await?;
    }
    let through = proxy.path().display().to_string();
    let past = testkit::socket_path();
    let connect = |path: &str| Docker::connect_with_unix(path, SOON.as_secs(), API_DEFAULT_VERSION);
    let ways = [connect(&past)?.negotiate_version().await?, connect(&through)?.negotiate_version().await?];
    let mut took = [Vec::new(), Vec::new()];
    for _ in 0..LISTINGS {
        for (docker, took) in ways.iter().zip(&mut took) {
            let began = Instant::now();
            let listed = docker.list_containers(Some(ListContainersOptions::default())).await?;
            took.push(began.elapsed().as_secs_f64() * 1e3);
            ensure!(listed.len() >= LISTED, "{} containers are listed", listed.len());
        }
    }
    let [past, through] = took;
    println!("a listing of {LISTED}: Docker    {}", spread(past));
    println!("through the socket proxy    {}", spread(through));
    print_memory("socket proxy", proxy.process().pid())
}

fn spread(mut milliseconds: Vec<f64>) -> String {
    milliseconds.sort_by(f64::total_cmp);
    let at = |share: f64| milliseconds[((milliseconds.len() - 1) as f64 * share) as usize];
    format!("{:>8.1} ms median, {:.1} ms at 95 %, of {}", at(0.5), at(0.95), milliseconds.len())
}

fn print_memory(name: &str, pid: u32) -> Result<()> {
    let (all, own) = (status(pid, "VmRSS:")? / 1024.0, status(pid, "RssAnon:")? / 1024.0);
    println!("{name:<12} resident       {all:>8.1} MB, of it its own {own:.1} MB");
    Ok(())
}

/// Milliseconds from Docker's own timestamp of the event, which the message carries, to its arrival at the master.
async fn delay(master: &DevMaster, kind: &str, container: &str, known: usize) -> Result<f64> {
    let is_ours = |request: &Request| request.event() == Some(kind) && request.body["container"]["id"] == container;
    let seen = known / 2;
    let request = master
        .wait_for("the event", SOON, |_| {
            master.requests().iter().filter(|request| is_ours(request) && request.status.is_some()).nth(seen).cloned()
        })
        .await?;
    let event: jiff::Timestamp = request.body["timestamp"].as_str().context("no timestamp")?.parse()?;
    Ok(event.duration_until(request.at).as_secs_f64() * 1e3)
}

/// User and system time, which Linux counts in hundredths of a second on every platform.
fn cpu_seconds(pid: u32) -> Result<f64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let after_name = text.rsplit_once(')').context("odd stat")?.1;
    let ticks: Vec<f64> = after_name.split_whitespace().skip(11).take(2).filter_map(|n| n.parse().ok()).collect();
    Ok(ticks.iter().sum::<f64>() / 100.0)
}

/// The value of a line in `/proc/<pid>/status`, in kB.
fn status(pid: u32, key: &str) -> Result<f64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = text.lines().find_map(|line| line.strip_prefix(key)).context("odd status")?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}
