//! Shared by the integration tests: a host with an agent on it, and a master for the agent.
#![allow(dead_code, reason = "each test target uses its own part")]

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use dockflare_dev_master::{Agent, DevMaster, Protocol};
use testkit::{AgentProcess, Between, Scope};

pub(crate) mod checked;
pub(crate) mod proxies;
pub(crate) mod relay;

/// Longest wait for anything that should take moments; the machine may be busy.
pub(crate) const SOON: Duration = Duration::from_secs(30);

/// One master, one data folder, one scope of containers, and the settings of an agent for them.
pub(crate) struct Stage {
    pub(crate) master: DevMaster,
    pub(crate) scope: Scope,
    pub(crate) data: tempfile::TempDir,
    pub(crate) key: String,
    pub(crate) env: Vec<(String, String)>,
    /// Name of the tunnel container, with a random suffix.
    pub(crate) tunnel: String,
    pub(crate) network: String,
    proxies: proxies::Proxies,
}

impl Stage {
    pub(crate) async fn new(protocol: Protocol) -> Result<Self> {
        // Long enough to be seen as a drain, short enough for a test.
        Self::with_image(protocol, testkit::images().stand_in_with(&[("STAND_IN_DRAIN", "300")]).await?).await
    }

    /// As [`Stage::new`], but the tunnel container runs `image`.
    pub(crate) async fn with_image(protocol: Protocol, image: String) -> Result<Self> {
        let master = DevMaster::builder().protocol(protocol).start().await?;
        let scope = Scope::new(testkit::docker()?);
        let key = master.generate_key("test");
        let data = tempfile::tempdir()?;
        let (tunnel, network) = (scope.name("tunnel"), scope.name("net"));
        scope.owns_container(&tunnel);
        scope.owns_container(&format!("{tunnel}-next"));
        scope.owns_network(&network);
        let env = [
            ("DOCKFLARE_MASTER_URL", master.url()),
            ("DOCKFLARE_API_KEY", key.clone()),
            ("DOCKFLARE_DATA_DIR", data.path().display().to_string()),
            ("CLOUDFLARED_IMAGE", image),
            ("CLOUDFLARED_NETWORK_NAME", network.clone()),
            ("TUNNEL_CONTAINER_NAME", tunnel.clone()),
            ("COMMAND_POLL_INTERVAL_SECONDS", "1".to_owned()),
            ("REPORT_INTERVAL_SECONDS", "5".to_owned()),
            ("HEALTH_CHECK_PORT", "0".to_owned()),
            ("LOG_LEVEL", "DEBUG".to_owned()),
            // Independent of this host's name: with a name that many hosts have, the agent registers a second time.
            ("AGENT_DISPLAY_NAME", "kitchen".to_owned()),
        ];
        let mut env = env.map(|(name, value)| (name.to_owned(), value)).to_vec();
        if proxies::chosen() == Between::Haproxy {
            let proxy = scope.socket_proxy(&testkit::PROXY_OPENS).await?;
            env.push(("DOCKER_HOST".to_owned(), proxy.host_url()));
        }
        Ok(Self { master, scope, data, key, env, tunnel, network, proxies: proxies::Proxies::default() })
    }

    /// Sets a variable of the agents started from now on; an empty value unsets it.
    pub(crate) fn set(&mut self, name: &str, value: impl Into<String>) {
        self.env.retain(|(known, _)| known != name);
        self.env.push((name.to_owned(), value.into()));
    }

    /// Starts an agent whose log must not show the agent key or a tunnel token at any level. It reaches Docker as
    /// [`proxies::chosen`] says, unless the case has set `DOCKER_HOST`.
    pub(crate) fn agent(&self) -> Result<AgentProcess> {
        let mut env = self.env.clone();
        if proxies::chosen() == Between::Own && !env.iter().any(|(name, _)| name == "DOCKER_HOST") {
            env.push(("DOCKER_HOST".to_owned(), self.proxies.for_agent(&self.env, &self.key)?));
        }
        let mut agent = AgentProcess::spawn(&agent_binary(), &env, self.data.path())?;
        agent.plant(&self.key);
        Ok(agent)
    }

    /// Waits until an agent registers, assigns it a tunnel, and returns it.
    pub(crate) async fn enrolled_agent(&self, tunnel_name: &str) -> Result<Agent> {
        let agent = self.master.wait_for("an agent to register", SOON, |known| known.only_agent().cloned()).await?;
        self.master.enroll(&agent.id, tunnel_name)?;
        Ok(agent)
    }

    /// Waits until the agent reports this status of the tunnel.
    pub(crate) async fn tunnel_is(&self, status: &str) -> Result<Agent> {
        let what = format!("the tunnel to be reported as {status}");
        self.master
            .wait_for(&what, SOON, |known| {
                known.only_agent().filter(|agent| agent.tunnel_state() == Some(status)).cloned()
            })
            .await
    }

    /// A file of the agent's data folder, as text.
    pub(crate) fn file(&self, name: &str) -> Result<String> {
        Ok(std::fs::read_to_string(self.data.path().join(name))?)
    }

    /// Asserts that no agent reported this container as stopped or left it out of a report.
    pub(crate) fn assert_never_missed(&self, id: &str) -> Result<()> {
        let snapshot = self.master.snapshot();
        let known = snapshot.only_agent().context("no agent")?;
        ensure!(known.stops_of(id) == 0 && !known.removals.iter().any(|gone| gone == id), "{}", self.master.report());
        self.assert_no_violations();
        Ok(())
    }

    /// Asserts that the master saw no protocol violation.
    pub(crate) fn assert_no_violations(&self) {
        let violations = self.master.violations();
        assert!(violations.is_empty(), "protocol violations: {violations:#?}");
    }
}

/// The agent's warnings. Leaves out those about labelled containers of other cases, which come and go on the same
/// Engine: that the tunnel cannot reach one, or that its labels nearly enable it.
pub(crate) fn complaints(agent: &AgentProcess) -> Vec<String> {
    let log = agent.log();
    let of_others = ["cannot reach the container", "the container is not enabled"];
    let is_own = |line: &&str| !of_others.iter().any(|sentence| line.contains(sentence));
    let warned = log.lines().filter(|line| line.contains("WARN")).filter(is_own);
    warned.map(str::to_owned).collect()
}

pub(crate) fn agent_binary() -> PathBuf {
    Path::new(env!("CARGO_BIN_EXE_dockflare-agent")).to_owned()
}
