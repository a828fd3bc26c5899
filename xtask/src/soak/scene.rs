//! Everything in a soak: the agent's process, its master and Docker, the tunnel's container and others that come and
//! go. Also the operator, who acts as a real one would.

use std::collections::{BTreeSet, HashMap};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use dockflare_dev_master::{Agent, AgentStatus, DevMaster, Protocol};
use fastrand::Rng;
use serde_json::{Value, json};
use testkit::bollard::query_parameters::ListContainersOptions;
use testkit::{AgentProcess, Between, Scope};

use super::disk::Disk;
use super::proxy::Proxy;
use super::relay::Relay;

/// The label that marks the agent's own containers.
const SPEC_LABEL: &str = "com.dockflare.agent.spec";
const WORKLOAD_LABELS: [(&str, &str); 2] =
    [("dockflare.enable", "true"), ("dockflare.service", "http://workload:8080")];
/// The most other containers at a time.
const MOST_WORKLOADS: usize = 6;
/// How long a stop may take; Docker may be silent at the time.
const STOP_LIMIT: Duration = Duration::from_secs(60);
/// How long a command may take from the master to the agent's disk, through the faults in between.
const ON_ITS_WAY: Duration = Duration::from_secs(15);
/// How many of the last log lines a failure shows.
const LAST_LINES: usize = 100;

pub(crate) struct Scene<'a> {
    began: Instant,
    pub(crate) scope: &'a Scope,
    pub(crate) master: DevMaster,
    pub(crate) proxy: Proxy<'a>,
    pub(crate) relay: Relay,
    pub(crate) disk: Disk,
    /// The running agent; `None` only between two agents.
    agent: Option<AgentProcess>,
    /// How many lines the earlier agents wrote.
    lines_before: usize,
    /// The end of the previous agent's log.
    earlier: Vec<String>,
    binary: PathBuf,
    env: Vec<(String, String)>,
    /// Holds the file with the agent key, which is not on the refusing disk.
    desk: tempfile::TempDir,
    keys: Vec<String>,
    /// The name of the tunnel's container.
    pub(crate) tunnel: String,
    tunnel_id: String,
    token: String,
    /// Whether a command may have been lost with a reply. No master notices that; only its operator does.
    pub(crate) may_be_lost: bool,
    /// When the operator gave the last command, and whether everything has been right since.
    ordered: Instant,
    pub(crate) settled: bool,
    /// Every other container that the soak ever made, and those that exist now.
    made: BTreeSet<String>,
    present: Vec<String>,
}

impl<'a> Scene<'a> {
    pub(crate) async fn new(scope: &'a Scope, protocol: Protocol, between: Between) -> Result<Self> {
        let image = testkit::images().stand_in_with(&[("STAND_IN_DRAIN", "300")]).await?;
        let binary = testkit::binary("dockflare-agent")?;
        testkit::images().workload().await?;
        let master = DevMaster::builder().protocol(protocol).account("soak-account").start().await?;
        let (disk, desk) = (Disk::new()?, tempfile::tempdir()?);
        let (tunnel, network) = (scope.name("soak-tunnel"), scope.name("soak-net"));
        scope.owns_container(&tunnel);
        scope.owns_container(&format!("{tunnel}-next"));
        scope.owns_network(&network);
        let env = [
            ("DOCKFLARE_MASTER_URL", master.url()),
            ("DOCKFLARE_API_KEY_FILE", desk.path().join("key").display().to_string()),
            ("DOCKFLARE_DATA_DIR", disk.path().display().to_string()),
            ("CLOUDFLARED_IMAGE", image),
            ("CLOUDFLARED_NETWORK_NAME", network),
            ("TUNNEL_CONTAINER_NAME", tunnel.clone()),
            ("COMMAND_POLL_INTERVAL_SECONDS", "1".to_owned()),
            ("REPORT_INTERVAL_SECONDS", "5".to_owned()),
            ("HEALTH_CHECK_PORT", "0".to_owned()),
        ];
        let mut env = env.map(|(name, value)| (name.to_owned(), value)).to_vec();
        let proxy = Proxy::start(between, scope, &binary, &env).await?;
        let relay = Relay::start(proxy.behind()).await?;
        env.push(("DOCKER_HOST".to_owned(), relay.host_url()));
        let tunnel_id = scope.name("soak");
        let token = testkit::token(&tunnel_id, "");
        let mut scene = Self {
            began: Instant::now(),
            scope,
            master,
            proxy,
            relay,
            disk,
            agent: None,
            lines_before: 0,
            earlier: Vec::new(),
            binary,
            env,
            desk,
            keys: Vec::new(),
            tunnel,
            tunnel_id,
            token,
            may_be_lost: false,
            ordered: Instant::now(),
            settled: false,
            made: BTreeSet::new(),
            present: Vec::new(),
        };
        let key = scene.master.generate_key("soak");
        scene.hand_over(&key)?;
        scene.start_agent("remove")?;
        Ok(scene)
    }

    /// Prints a line about what happens.
    pub(crate) fn say(&self, who: &str, what: impl std::fmt::Display) {
        println!("{:7.1} s  {who:<8} {what}", self.began.elapsed().as_secs_f64());
    }

    // The agent.

    pub(crate) fn start_agent(&mut self, on_exit: &str) -> Result<()> {
        let mut env = self.env.clone();
        env.push(("TUNNEL_ON_EXIT".to_owned(), on_exit.to_owned()));
        let mut agent = AgentProcess::spawn(&self.binary, &env, self.desk.path())?;
        self.keys.iter().for_each(|key| agent.plant(key));
        self.agent = Some(agent);
        Ok(())
    }

    fn agent(&self) -> Result<&AgentProcess> {
        self.agent.as_ref().context("there is no agent")
    }

    pub(crate) fn pid(&self) -> Result<u32> {
        Ok(self.agent()?.pid())
    }

    /// Checks that the agent still runs, because it may end only on request.
    pub(crate) fn agent_runs(&mut self) -> Result<()> {
        let agent = self.agent.as_mut().context("there is no agent")?;
        ensure!(agent.is_running()?, "the agent has ended by itself");
        Ok(())
    }

    /// Kills the agent without warning.
    pub(crate) async fn kill_agent(&mut self) -> Result<()> {
        let agent = self.agent.as_mut().context("there is no agent")?;
        agent.sigkill()?;
        agent.wait_exit(STOP_LIMIT).await?;
        self.bury()
    }

    /// Sends SIGTERM to the agent, which must exit with 0.
    pub(crate) async fn stop_agent(&mut self) -> Result<Duration> {
        let began = Instant::now();
        let agent = self.agent.as_mut().context("there is no agent")?;
        agent.sigterm()?;
        let code = agent.wait_exit(STOP_LIMIT).await?.code();
        ensure!(code == Some(0), "the agent was asked to stop and ended with {code:?}");
        self.bury()?;
        Ok(began.elapsed())
    }

    /// Drops an ended agent, and checks that it wrote no secret to its log.
    pub(crate) fn bury(&mut self) -> Result<()> {
        let Some(agent) = self.agent.take() else { return Ok(()) };
        let log = agent.log();
        self.lines_before += self.count(&log);
        let lines: Vec<_> = log.lines().map(str::to_owned).collect();
        self.earlier = lines.iter().skip(lines.len().saturating_sub(LAST_LINES)).cloned().collect();
        let clean = catch_unwind(AssertUnwindSafe(|| drop(agent)));
        ensure!(clean.is_ok(), "the agent wrote a secret to its log");
        Ok(())
    }

    /// How many lines the agents have written, except those about other people's containers.
    pub(crate) fn lines(&self) -> usize {
        self.lines_before + self.agent.as_ref().map_or(0, |agent| self.count(&agent.log()))
    }

    fn count(&self, log: &str) -> usize {
        const OF_CONTAINERS: [&str; 4] =
            ["container started", "container stopped", "the tunnel can", "nothing is known any more that keeps"];
        let is_of_others =
            |line: &&str| !line.contains(self.scope.suffix()) && OF_CONTAINERS.iter().any(|begin| line.contains(begin));
        log.lines().filter(|line| !is_of_others(line)).count()
    }

    /// The last lines of the agents' logs.
    pub(crate) fn last_lines(&self) -> Vec<String> {
        let mut lines = self.earlier.clone();
        if let Some(agent) = &self.agent {
            lines.push(format!("--- pid {} ---", agent.pid()));
            lines.extend(agent.log().lines().map(str::to_owned));
        }
        lines.split_off(lines.len().saturating_sub(LAST_LINES))
    }

    // The operator.

    /// Writes a key into the agent's key file.
    pub(crate) fn hand_over(&mut self, key: &str) -> Result<()> {
        std::fs::write(self.desk.path().join("key"), format!("{key}\n"))?;
        self.keys.push(key.to_owned());
        if let Some(agent) = &mut self.agent {
            agent.plant(key);
        }
        Ok(())
    }

    /// The agent as its master knows it; `None` while the master does not know it.
    pub(crate) fn known(&self) -> Option<Agent> {
        let known = self.master.snapshot();
        let stored = std::fs::read_to_string(self.disk.path().join("agent_id.txt")).unwrap_or_default();
        known.agent(stored.trim()).or_else(|| known.only_agent()).cloned()
    }

    /// Enrolls the agent if it is pending.
    pub(crate) fn enrol_pending(&mut self) -> Result<()> {
        if let Some(agent) = self.known().filter(|agent| agent.status == AgentStatus::Pending) {
            self.say("operator", format_args!("enrols the agent {}", agent.id));
            self.order_start(&agent.id)?;
        }
        Ok(())
    }

    /// Enrolls again if a command may be lost, as an operator would on seeing that the tunnel is not right.
    pub(crate) fn repeat_what_may_be_lost(&mut self) -> Result<()> {
        if std::mem::take(&mut self.may_be_lost)
            && let Some(agent) = self.known()
        {
            self.say("operator", "enrols again, since a command may have been lost with a reply");
            self.order_start(&agent.id)?;
        }
        Ok(())
    }

    pub(crate) fn order_start(&mut self, agent: &str) -> Result<()> {
        self.note_order();
        self.master.enroll_with(agent, "soak", &self.tunnel_id, &self.token)?;
        Ok(())
    }

    pub(crate) fn order(&mut self, agent: &str, command: Value) -> Result<()> {
        self.note_order();
        self.master.push_commands(agent, vec![command])
    }

    pub(crate) fn note_order(&mut self) {
        self.ordered = Instant::now();
        self.settled = false;
    }

    /// Whether the last command must have reached the agent's disk.
    pub(crate) fn has_arrived(&self) -> bool {
        !self.may_be_lost && (self.settled || self.ordered.elapsed() > ON_ITS_WAY)
    }

    /// Checks that the last token given to the agent is on its disk.
    pub(crate) fn is_kept(&self) -> Result<()> {
        let state = std::fs::read_to_string(self.disk.path().join("tunnel_state.json")).unwrap_or_default();
        ensure!(state.contains(&self.token), "the agent has ended, and the token it was given last is not on its disk");
        Ok(())
    }

    pub(crate) fn new_token(&mut self) {
        self.token = testkit::token(&self.tunnel_id, "");
    }

    pub(crate) fn ingress(number: u32) -> Value {
        let hostname = format!("soak-{number}.example.com");
        let rule = json!({ "hostname": hostname, "service": "http://workload:8080", "status": "active" });
        json!({ "action": "update_tunnel_config", "rules": { hostname: rule } })
    }

    // The containers.

    /// Adds another container, or makes one go or come back.
    pub(crate) async fn move_workload(&mut self, rng: &mut Rng) -> Result<()> {
        if self.present.is_empty() || (self.present.len() < MOST_WORKLOADS && rng.bool()) {
            // Some containers end by themselves. None needs a network for the agent to report it.
            let args: &[&str] = if rng.u8(..4) == 0 { &["sleep", "1500"] } else { &[] };
            let id = self.scope.run_workload(&WORKLOAD_LABELS, args, Some("none"), false).await?;
            self.made.insert(id.clone());
            self.present.push(id);
            return Ok(());
        }
        let at = rng.usize(..self.present.len());
        let id = self.present[at].clone();
        match rng.u8(..4) {
            // Docker refuses a change that has already happened.
            0 => drop(self.scope.stop(&id, 1).await),
            1 => drop(self.scope.kill(&id, "SIGKILL").await),
            2 => drop(self.scope.start(&id).await),
            _ => {
                self.scope.rm(&id).await?;
                self.present.swap_remove(at);
            }
        }
        Ok(())
    }

    async fn list(&self, all: bool, filter: (&str, String)) -> Result<Vec<testkit::models::ContainerSummary>> {
        let filters = Some(HashMap::from([(filter.0.to_owned(), vec![filter.1])]));
        let options = ListContainersOptions { all, filters, ..Default::default() };
        Ok(self.scope.docker().list_containers(Some(options)).await?)
    }

    /// The containers that the agent has made for the tunnel, running or not.
    pub(crate) async fn connectors(&self) -> Result<Vec<String>> {
        let found = self.list(true, ("label", SPEC_LABEL.to_owned())).await?;
        let names = found.into_iter().filter_map(|container| container.names?.pop());
        let names = names.map(|name| name.trim_start_matches('/').to_owned());
        // Skip those of other agents on this machine.
        Ok(names.filter(|name| name.contains(self.scope.suffix())).collect())
    }

    /// Checks that there are at most the two connectors of a replacement.
    pub(crate) async fn at_most_two_connectors(&self) -> Result<()> {
        let names = self.connectors().await?;
        let next = format!("{}-next", self.tunnel);
        let known = names.iter().all(|name| *name == self.tunnel || *name == next);
        ensure!(known && names.len() <= 2, "the tunnel has these containers: {}", names.join(", "));
        Ok(())
    }

    /// Checks that everything is right. The error says what is not.
    pub(crate) async fn is_well(&self) -> Result<()> {
        let agent = self.known().context("the master does not know the agent")?;
        ensure!(agent.online, "the master has not heard of the agent for a minute");
        ensure!(agent.queued == 0, "{} command(s) are not fetched", agent.queued);
        let state = agent.tunnel_state().unwrap_or("unknown");
        ensure!(state == "running", "the master has the tunnel as {state}");
        // A reason means that the running connector does not match the spec yet.
        let reason = agent.tunnel_status.as_ref().and_then(|status| status.event["reason"].as_str());
        ensure!(reason.is_none(), "the master has the tunnel as running, but {}", reason.unwrap_or_default());
        let connectors = self.connectors().await?;
        ensure!(connectors == [self.tunnel.as_str()], "the tunnel has these containers: {}", connectors.join(", "));
        let config = self.scope.inspect(&self.tunnel).await?.config.and_then(|config| config.env);
        let wanted = format!("TUNNEL_TOKEN={}", self.token);
        ensure!(config.is_some_and(|env| env.contains(&wanted)), "the tunnel container has an older token");
        let label = format!("{}={}", "dockflare-test.scope", self.scope.suffix());
        let running = self.list(false, ("label", label)).await?.into_iter().filter_map(|container| container.id);
        let running: BTreeSet<_> = running.filter(|id| self.made.contains(id)).collect();
        // The agent also reports containers of other tests on this machine.
        let told: BTreeSet<_> = agent.containers.keys().filter(|id| self.made.contains(*id)).cloned().collect();
        if running != told {
            let (missing, stale) = (running.difference(&told).count(), told.difference(&running).count());
            bail!("of {} running containers the master misses {missing}, and has {stale} that are gone", running.len());
        }
        Ok(())
    }
}
