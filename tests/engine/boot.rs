//! Tests `systemctl restart docker` and a reboot, with the agent and its socket proxy in containers that Docker
//! restarts. Docker signals all containers at once, after its API is gone, and starts them in any order. Visitors must
//! lose no more than Docker's own outage. Each case runs its own Engine.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use dockflare_dev_master::{DevMaster, Protocol};
use testkit::{Case, Edge, SocketProxy, images, note, wait_until};
use tokio::time::Instant;

use crate::containers_scene::{Tunnel, registered, setting, told};
use crate::daemon::{self, Daemon};
use crate::support::{SOON, Stage, agent_binary};
use crate::visitors::{EDGE_TAKES, Visitors};

pub(crate) fn cases() -> Vec<Case> {
    let cases = testkit::cases![
        a_restart_of_docker_costs_its_own_outage_and_nothing_more,
        a_reboot_of_the_host_costs_its_own_outage_and_nothing_more,
    ];
    cases.into_iter().map(|case| case.limit(Duration::from_secs(400)).without(daemon::missing())).collect()
}

/// Shorter than each outage. A starting proxy still gives the agent 15 s from the moment Docker answers.
const LEASE: &str = "1";
const LEASE_IS_OVER: Duration = Duration::from_secs(20);
/// The limit from the connector's start to its first visitor on a busy machine, without the edge's own delay.
const CONNECTS_WITHIN: Duration = Duration::from_secs(10);

/// A host that runs only the compose file's two services and the tunnel.
struct Host {
    daemon: Daemon,
    stage: Stage,
    edge: Arc<Edge>,
    tunnel: Tunnel,
    registrations: u64,
}

/// The names of the two services.
const PROXY: &str = "socket-proxy";
const AGENT: &str = "agent";

impl Host {
    /// Starts the host, with visitors coming through its tunnel.
    async fn up() -> Result<(Self, Visitors)> {
        let mut stage = Stage::new(Protocol::V2).await?;
        let image = images().agent(&agent_binary()).await?;
        // Save the two images from the machine's Engine before leaving its network.
        let saved = tempfile::Builder::new().suffix(".tar").tempfile()?;
        let done = Command::new("docker")
            .args(["--host", &format!("unix://{}", testkit::socket_path()), "save", "--output"])
            .arg(saved.path())
            .args([image.as_str(), &setting(&stage, "CLOUDFLARED_IMAGE")])
            .stdin(Stdio::null())
            .output()?;
        ensure!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        daemon::leave_the_hosts_network()?;
        let mut daemon = Daemon::with_the_case()?;
        daemon.start().await?;
        daemon.docker(&["load", "--input", &saved.path().display().to_string()])?;
        daemon.docker(&["network", "create", &stage.network])?;
        let gateway = "{{(index .IPAM.Config 0).Gateway}}";
        let gateway = daemon.docker(&["network", "inspect", "--format", gateway, &stage.network])?;
        let listen = SocketAddr::new(gateway.parse()?, 0);
        stage.master = DevMaster::builder().protocol(Protocol::V2).listen(listen).start().await?;
        stage.key = stage.master.generate_key("rebooted");
        let edge = Arc::new(Edge::start(listen, EDGE_TAKES).await?);
        let tunnel = Tunnel::new(&stage, &format!("edge={} drain=1500", edge.address()));
        let (url, key) = (stage.master.url(), stage.key.clone());
        for (name, value) in [
            ("DOCKFLARE_MASTER_URL", url.as_str()),
            ("DOCKFLARE_API_KEY", &key),
            ("DOCKFLARE_DATA_DIR", ""),
            ("HEALTH_CHECK_PORT", ""),
            ("DOCKER_HOST", "unix:///run/dockflare/docker.sock"),
            ("TUNNEL_LEASE_SECONDS", LEASE),
        ] {
            stage.set(name, value);
        }
        let mut host = Self { daemon, stage, edge, tunnel, registrations: 0 };
        host.run_services(&image)?;
        let known = registered(&host.stage).await?;
        host.stage.master.enroll_with(&known.id, "edge", &host.tunnel.id, &host.tunnel.token)?;
        told(&host.stage, "running", None).await?;
        host.registrations = registered(&host.stage).await?.registrations;
        let visitors = Visitors::come(&host.edge, &host.tunnel).await?;
        Ok((host, visitors))
    }

    /// Runs the two services as the compose file does.
    fn run_services(&self, image: &str) -> Result<()> {
        let file = |name: &str, env: &[(String, String)]| -> Result<String> {
            let mut text = String::new();
            for (name, value) in env {
                writeln!(text, "{name}={value}")?;
            }
            let path = self.daemon.path(name);
            std::fs::write(&path, text)?;
            Ok(path.display().to_string())
        };
        let common =
            ["run", "-d", "--restart", "unless-stopped", "--stop-timeout", "90", "--read-only", "--cap-drop=ALL"];
        let proxy = file("proxy.env", &SocketProxy::settings(&self.stage.env))?;
        let socket = format!("{}:/var/run/docker.sock:ro", self.daemon.path("docker.sock").display());
        let own = ["--name", PROXY, "--user=0:0", "--network=none", "--env-file", &proxy, "-v", &socket];
        let with = ["-v", "docker-api:/run/dockflare", image, "socket-proxy"];
        self.daemon.docker(&[&common[..], &own, &with].concat())?;
        let agent = file("agent.env", &self.stage.env)?;
        let own = ["--name", AGENT, "--network", &self.stage.network, "--env-file", &agent, "-v", "data:/app/data"];
        self.daemon.docker(&[&common[..], &own, &["-v", "docker-api:/run/dockflare:ro", image]].concat()).map(drop)
    }

    /// Returns the tunnel container's id, start time and token.
    fn life(&self) -> Result<[String; 3]> {
        let told = "{{.Id}}|{{.State.StartedAt}}|{{range .Config.Env}}{{println .}}{{end}}";
        let told = self.daemon.docker(&["inspect", "--format", told, &self.stage.tunnel])?;
        let [id, started_at, env] = told.splitn(3, '|').collect::<Vec<_>>()[..] else { anyhow::bail!("{told}") };
        let token = env.lines().find(|entry| entry.starts_with("TUNNEL_TOKEN=")).context("no token")?;
        Ok([id, started_at, token].map(str::to_owned))
    }

    /// Waits until an agent that started since the last call has the tunnel and its master knows it.
    async fn is_back(&mut self) -> Result<()> {
        let before = self.registrations;
        let known = self.stage.master.wait_for("the agent to be back", 2 * SOON, |known| {
            let agent = known.only_agent().filter(|agent| agent.registrations > before)?;
            (agent.tunnel_state() == Some("running")).then_some(agent.registrations)
        });
        self.registrations = known.await?;
        Ok(())
    }

    /// Checks, after an outage that began at `began`, that the same container serves visitors in time, and that none of
    /// them fails once it does.
    async fn was_away(
        &mut self,
        what: &str,
        visitors: &mut Visitors,
        before: &[String; 3],
        began: jiff::Timestamp,
    ) -> Result<()> {
        let up = Instant::now();
        let first = self.life().with_context(|| self.logs())?;
        let visited = async || (!self.edge.connectors(&self.tunnel.id).is_empty()).then_some(());
        wait_until("a connector for visitors", 2 * SOON, visited).await?;
        let now = jiff::Timestamp::now();
        let (failed, served) = visitors.counted();
        let started: jiff::Timestamp = first[1].parse()?;
        let (away, dark) = (started.duration_since(began), now.duration_since(started));
        let text = format!(
            "{what}: the connector ran again after {:.1} s and was visited {:.1} s later; {failed} of {} requests failed so far",
            away.as_secs_f64(),
            dark.as_secs_f64(),
            failed + served
        );
        println!("measured: {text}");
        note("measured", &text);
        ensure!((&first[0], &first[2]) == (&before[0], &before[2]), "another container or another token");
        ensure!(dark.unsigned_abs() <= EDGE_TAKES + CONNECTS_WITHIN, "{dark:#}: {}", self.logs());
        self.is_back().await?;
        while up.elapsed() < LEASE_IS_OVER {
            visitors.all_were_served_but(failed).await.with_context(|| self.logs())?;
        }
        ensure!(self.life()? == first, "the same start of the same container: {}", self.logs());
        let all = self.daemon.docker(&["ps", "--all", "--format", "{{.Names}}"])?;
        let mut all: Vec<_> = all.lines().collect();
        all.sort_unstable();
        let mut expected = [AGENT, PROXY, self.stage.tunnel.as_str()];
        expected.sort_unstable();
        ensure!(all == expected, "{all:?}");
        self.stage.assert_no_violations();
        Ok(())
    }

    fn logs(&self) -> String {
        let log = |name: &str| self.daemon.docker_both(&["logs", "--tail", "60", name]).unwrap_or_default();
        format!("--- proxy\n{}\n--- agent\n{}", log(PROXY), log(AGENT))
    }
}

async fn a_restart_of_docker_costs_its_own_outage_and_nothing_more() -> Result<()> {
    let (mut host, mut visitors) = Host::up().await?;
    let before = host.life()?;
    // In the order that Docker chooses, and with one of the two so late that the other one notices.
    for late in [None, Some((PROXY, AGENT)), Some((AGENT, PROXY))] {
        if let Some((late, _)) = late {
            host.daemon.docker(&["update", "--restart=no", late])?;
        }
        let began = jiff::Timestamp::now();
        host.daemon.stop().await?;
        host.daemon.start().await?;
        if let Some((late, early)) = late {
            let runs = async || {
                let running = host.daemon.docker(&["inspect", "--format", "{{.State.Running}}", early]).ok()?;
                (running == "true").then_some(())
            };
            wait_until("the other one to run", SOON, runs).await?;
            host.daemon.docker(&["start", late])?;
            host.daemon.docker(&["update", "--restart=unless-stopped", late])?;
        }
        let what = format!("restart of Docker, late: {:?}", late.map(|(late, _)| late));
        host.was_away(&what, &mut visitors, &before, began).await?;
    }
    Ok(())
}

async fn a_reboot_of_the_host_costs_its_own_outage_and_nothing_more() -> Result<()> {
    let (mut host, mut visitors) = Host::up().await?;
    let before = host.life()?;
    for suddenly in [false, true] {
        let began = jiff::Timestamp::now();
        host.daemon.switch_off(suddenly).await?;
        host.daemon.start().await?;
        let what = if suddenly { "power cut" } else { "reboot" };
        host.was_away(what, &mut visitors, &before, began).await?;
    }
    Ok(())
}
