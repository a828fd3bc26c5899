//! What the agent costs and how fast it is, on a real Docker Engine: `cargo bench --bench agent`.
//!
//! Prints figures and asserts none, since they belong to the machine they were taken on.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use dockflare_dev_master::{DevMaster, Protocol, Request};
use testkit::{AgentProcess, Scope};

const SOON: Duration = Duration::from_secs(60);
/// Starts and stops that are timed.
const ROUNDS: usize = 40;
/// How long the idle agent is watched.
const IDLE: Duration = Duration::from_secs(30);

fn main() -> Result<()> {
    // Built for `cargo test --all-targets` as well, which must not take a minute for figures nobody reads.
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
    let env = [
        ("DOCKFLARE_MASTER_URL", master.url()),
        ("DOCKFLARE_API_KEY", master.generate_key("bench")),
        ("DOCKFLARE_DATA_DIR", data.path().display().to_string()),
        ("CLOUDFLARED_IMAGE", testkit::images().stand_in_with(&[("STAND_IN_DRAIN", "100")]).await?),
        ("CLOUDFLARED_NETWORK_NAME", network),
        ("TUNNEL_CONTAINER_NAME", tunnel),
        ("HEALTH_CHECK_PORT", "0".to_owned()),
    ];
    let began = Instant::now();
    let agent = AgentProcess::spawn(program, &env.map(|(name, value)| (name.to_owned(), value)), data.path())?;
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
    delays.sort_by(f64::total_cmp);
    let at = |share: f64| delays[((delays.len() - 1) as f64 * share) as usize];
    println!(
        "Docker's event to the master {:>7.1} ms median, {:.1} ms at 95 %, of {}",
        at(0.5),
        at(0.95),
        delays.len()
    );

    let before = cpu_seconds(agent.pid())?;
    tokio::time::sleep(IDLE).await;
    let spent = cpu_seconds(agent.pid())? - before;
    println!(
        "idle                        {:>8.2} % of one core over {} s",
        spent / IDLE.as_secs_f64() * 100.0,
        IDLE.as_secs()
    );
    println!("resident memory             {:>8.1} MB", status(agent.pid(), "VmRSS:")? / 1024.0);
    println!("of it the program's own     {:>8.1} MB", status(agent.pid(), "RssAnon:")? / 1024.0);
    println!("program                     {:>8.1} MB", std::fs::metadata(program)?.len() as f64 / 1e6);
    Ok(())
}

/// Milliseconds from the time that Docker gave the event, which the message carries, to its arrival at the master.
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

/// User and system time, in hundredths of a second: what Linux counts in on all its machines.
fn cpu_seconds(pid: u32) -> Result<f64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let after_name = text.rsplit_once(')').context("odd stat")?.1;
    let ticks: Vec<f64> = after_name.split_whitespace().skip(11).take(2).filter_map(|n| n.parse().ok()).collect();
    Ok(ticks.iter().sum::<f64>() / 100.0)
}

/// A line of `/proc/<pid>/status`, in kB.
fn status(pid: u32, key: &str) -> Result<f64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = text.lines().find_map(|line| line.strip_prefix(key)).context("odd status")?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}
