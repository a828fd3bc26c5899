//! `cargo xtask demo`: shows the agent's main job on this machine, for people without a DockFlare master.
//!
//! The agent, its image, the Docker Engine and everything that happens on it are real. The master is the development
//! master of this workspace, and a stand-in that connects to nothing replaces cloudflared. All images are made from
//! local files. [`scene`] sets everything up, [`story`] prints what happens as the agent's log and the [`master`] show
//! it, and [`down`] removes everything. [`vault`] does the same for the vault. There is one demo at a time, and a new
//! one replaces it.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;
use testkit::Docker;
use testkit::bollard::query_parameters::{ListContainersOptions, StopContainerOptions};

mod down;
mod master;
mod scene;
mod story;
mod vault;

use master::Master;
use scene::{AGENT, Scene, TUNNEL, WEB};
use story::Story;

/// `EX_UNAVAILABLE` of `sysexits.h`: a service is unavailable.
pub(crate) const UNAVAILABLE: u8 = 69;
/// How long an engine may take to answer.
const PING_LIMIT: Duration = Duration::from_secs(10);
/// The name of the agent's tunnel at the master.
const TUNNEL_NAME: &str = "demo";

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Remove the demo: every container, network, volume and image of it, nothing else
    #[arg(long, conflicts_with_all = ["protocol", "port", "socket"])]
    down: bool,
    /// Play the vault's part in place of the agent's: a credential in a container that knows nothing of it
    #[arg(long, conflicts_with_all = ["protocol", "port", "socket"])]
    vault: bool,
    /// Which protocol the master speaks
    #[arg(long, value_enum, default_value_t = Protocol::V2)]
    protocol: Protocol,
    /// Port of the master's page on 127.0.0.1; 0 is any free one
    #[arg(long, default_value_t = 0)]
    port: u16,
    /// Give the agent the Docker socket itself instead of the socket proxy
    #[arg(long)]
    socket: bool,
}

/// What masters speak.
#[derive(Clone, Copy, ValueEnum)]
enum Protocol {
    V1,
    V2,
}

impl Protocol {
    fn as_str(self) -> &'static str {
        match self {
            Self::V1 => "v1",
            Self::V2 => "v2",
        }
    }
}

/// Plays the demo, or removes it.
pub(crate) fn run(arguments: &Arguments) -> ExitCode {
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("no runtime: {error}");
            return ExitCode::FAILURE;
        }
    };
    runtime.block_on(async {
        let docker = match engine().await {
            Ok(docker) => docker,
            Err(error) => {
                eprintln!("the demo needs a Docker Engine on this machine: {error:#}");
                return ExitCode::from(UNAVAILABLE);
            }
        };
        let ended = match arguments {
            Arguments { down: true, .. } => remove(&docker).await,
            Arguments { vault: true, .. } => vault::play(&docker).await,
            _ => play(&docker, arguments).await,
        };
        match ended {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("\nfailed: {error:#}");
                ExitCode::FAILURE
            }
        }
    })
}

/// Connects to the engine behind a socket of this machine, if it answers.
pub(crate) async fn engine() -> Result<Docker> {
    if let Ok(host) = std::env::var("DOCKER_HOST") {
        let usable = host.is_empty() || host.starts_with("unix://");
        ensure!(usable, "DOCKER_HOST={host} cannot be mounted into a container; unset it, or use unix://<path>");
    }
    let docker = testkit::docker()?;
    tokio::time::timeout(PING_LIMIT, docker.ping()).await.context("it does not answer")??;
    Ok(docker)
}

async fn remove(docker: &Docker) -> Result<()> {
    let removed = down::down(docker).await?;
    removed.iter().for_each(|thing| println!("removed {thing}"));
    if removed.is_empty() {
        println!("nothing of the demo is here");
    }
    Ok(())
}

async fn play(docker: &Docker, arguments: &Arguments) -> Result<()> {
    println!(
        "A real agent and a real Docker Engine; but a development master instead of DockFlare, and a stand-in\n\
         for cloudflared that connects to nobody. Everything here is called dockflare-demo…\n"
    );
    let mut story = Story::begin(docker.clone());
    story.say("demo", "building the agent (release) and the development programs; the first time takes minutes");
    scene::build()?;
    let before = down::down(docker).await.context("cannot remove the previous demo")?;
    if !before.is_empty() {
        story.say("demo", format_args!("removed the previous demo, {} things", before.len()));
    }
    let told = tell(docker, &mut story, arguments).await;
    if told.is_err() {
        print_logs(docker).await;
        println!("\nAll is left as it is, to look at. Remove it: cargo xtask demo --down");
    }
    told
}

/// Plays the demo from the images to the end, and prints each step as it happens.
async fn tell(docker: &Docker, story: &mut Story, arguments: &Arguments) -> Result<()> {
    let scene = Scene::prepare(docker, story, arguments.socket).await?;
    let master = scene.start_master(arguments.protocol, arguments.port).await?;
    story.wait("the master to answer", async || master.snapshot().ok()).await?;
    story.say("master", format_args!("ready, speaks {}: {}", arguments.protocol.as_str(), master.url()));
    let key = master.generate_key()?;
    story.say("master", "made an agent key, as the operator would on its Agents page");

    scene.start_agent(&key).await?;
    let access = if scene.has_proxy() {
        "reaches Docker through its own socket proxy, which has no network"
    } else {
        "has the Docker socket"
    };
    story.say("docker", format_args!("{AGENT} started: uid 65532, read-only, no capabilities; {access}"));
    story.wait_for_agent("registered at the master").await?;
    let id = story.wait("the master to know the agent", async || master.only_agent().ok()?).await?;
    master.enroll(&id, TUNNEL_NAME)?;
    story.say("master", format_args!("enrolled agent {id} with the tunnel {TUNNEL_NAME:?}, as the operator would"));
    story.wait_for_agent("tunnel ready").await?;
    let told = story.wait("the master to be told that the tunnel runs", async || master.tunnel_runs(&id).ok()?).await?;
    story.say("master", format_args!("was told: {told}"));

    story.say("demo", format_args!("docker run {WEB}, with the labels {}", scene::web_labels()));
    let web = scene.start_web().await?;
    let mut seen = Seen { docker, story, master: &master, container: web };
    seen.start(1).await?;
    seen.story.say("demo", format_args!("docker stop {WEB}"));
    docker.stop_container(WEB, Some(StopContainerOptions { t: Some(5), ..Default::default() })).await?;
    seen.stop(1).await?;
    seen.story.say("demo", format_args!("docker start {WEB}"));
    docker.start_container(WEB, None).await?;
    seen.start(2).await?;
    seen.story.wait_for_agent("the tunnel can reach the container").await?;

    let before = connector(docker).await;
    master.redeploy(&id)?;
    story.say("master", "redeploys the tunnel, as the operator would");
    story.wait_for_agent("the new connector takes over").await?;
    let replaced = async || (connector(docker).await.filter(|id| before.as_ref() != Some(id))).map(drop);
    story.wait("the new connector under the tunnel's name", replaced).await?;
    story.say("docker", format_args!("{TUNNEL} is another container now, and one of the two served at any moment"));

    let (health, said) = story.wait("the agent's health check", async || checked(docker).await).await?;
    ensure!(health == "healthy", "the agent's health check fails: {said}");
    story.say("docker", format_args!("{AGENT} is {health}: {said}"));
    let violations = master.violations()?;
    ensure!(violations.is_empty(), "the agent broke the protocol: {}", violations.join("; "));
    story.say("master", "the agent broke no rule of the protocol");
    print_outlook(&master, &id);
    Ok(())
}

/// Follows one container's life as the master hears of it.
struct Seen<'a> {
    docker: &'a Docker,
    story: &'a mut Story,
    master: &'a Master,
    /// The container's id.
    container: String,
}

impl Seen<'_> {
    async fn start(&mut self, nth: usize) -> Result<()> {
        self.arrives("container_start", nth, "started").await
    }

    async fn stop(&mut self, nth: usize) -> Result<()> {
        self.arrives("container_stop", nth, "ended").await
    }

    /// Waits for the event at the master, and prints how long after the engine's event it arrived.
    async fn arrives(&mut self, event: &str, nth: usize, what: &str) -> Result<()> {
        let Self { master, container, .. } = self;
        let what_for = format!("{event} at the master");
        let arrived = self.story.wait(&what_for, async || master.arrival(event, container, nth).ok()?).await?;
        let state = self.docker.inspect_container(container, None).await?.state.context("no state")?;
        let at = if what == "started" { state.started_at } else { state.finished_at };
        let at: jiff::Timestamp = at.context("no time")?.parse().context("Docker's time")?;
        let late = arrived.duration_since(at).as_millis();
        self.story.say("master", format_args!("was told {event} {WEB}, {late} ms after it {what}"));
        Ok(())
    }
}

/// The id of the current tunnel container.
async fn connector(docker: &Docker) -> Option<String> {
    docker.inspect_container(TUNNEL, None).await.ok()?.id
}

/// Docker's health status of the agent and the last output of the health check, once Docker has a status that is not
/// older than the tunnel.
async fn checked(docker: &Docker) -> Option<(String, String)> {
    let health = docker.inspect_container(AGENT, None).await.ok()?.state?.health?;
    let said = health.log.unwrap_or_default().pop()?.output.unwrap_or_default();
    let status = health.status?.to_string();
    let current = status == "unhealthy" || (status == "healthy" && said.contains("tunnel running"));
    current.then(|| (status, said.trim().to_owned()))
}

fn print_outlook(master: &Master, id: &str) {
    let (url, key) = (master.url(), master::KEY);
    println!(
        "
Look further:
  docker logs -f {AGENT}
  docker logs -f {TUNNEL}
  docker inspect --format '{{{{json .State.Health}}}}' {AGENT}
  {url}    what the master knows, and its last requests
See it react:
  docker kill {TUNNEL}
  docker rm -f {TUNNEL}
  docker stop {WEB}; docker start {WEB}
  curl -X POST -H 'Authorization: Bearer {key}' {url}/api/v2/agents/{id}/redeploy-tunnel
Remove all of it:
  cargo xtask demo --down"
    );
}

/// Prints the end of each container's log after a failed demo.
async fn print_logs(docker: &Docker) {
    let filters = std::collections::HashMap::from([("label".to_owned(), vec![scene::label()])]);
    let options = ListContainersOptions { all: true, filters: Some(filters), ..Default::default() };
    for container in docker.list_containers(Some(options)).await.unwrap_or_default() {
        let (id, state) = (container.id.unwrap_or_default(), container.status.unwrap_or_default());
        let name = container.names.unwrap_or_default().join(" ");
        let log = testkit::logs(docker, &id, "100").await.unwrap_or_else(|error| error.to_string());
        println!("\n--- {} ({state}) ---\n{}", name.trim_start_matches('/'), log.trim_end());
    }
}
