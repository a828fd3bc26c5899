//! A master, a data folder and the settings for an agent between them, without Docker.

use std::path::PathBuf;

use anyhow::Result;
use dockflare_dev_master::{Agent, Builder, DevMaster, Protocol, Request, Route};
use testkit::AgentProcess;

use crate::support::{SOON, agent_binary};

pub(crate) const BOTH: [Protocol; 2] = [Protocol::V1, Protocol::V2];

pub(crate) struct Desk {
    pub(crate) master: DevMaster,
    pub(crate) data: tempfile::TempDir,
    pub(crate) key: String,
    pub(crate) env: Vec<(String, String)>,
}

impl Desk {
    pub(crate) async fn new(protocol: Protocol) -> Result<Self> {
        Self::with(DevMaster::builder().protocol(protocol)).await
    }

    pub(crate) async fn with(master: Builder) -> Result<Self> {
        let master = master.start().await?;
        let key = master.generate_key("test");
        let data = tempfile::tempdir()?;
        let env = [
            ("DOCKFLARE_MASTER_URL", master.url()),
            ("DOCKFLARE_API_KEY", key.clone()),
            ("DOCKFLARE_DATA_DIR", data.path().display().to_string()),
            ("DOCKER_HOST", "unix:///nowhere/docker.sock".to_owned()),
            ("COMMAND_POLL_INTERVAL_SECONDS", "1".to_owned()),
            ("REPORT_INTERVAL_SECONDS", "5".to_owned()),
            ("HEALTH_CHECK_PORT", "0".to_owned()),
            ("LOG_LEVEL", "DEBUG".to_owned()),
            // A fixed name, whatever the host is called.
            ("AGENT_DISPLAY_NAME", "kitchen".to_owned()),
        ];
        let env = env.map(|(name, value)| (name.to_owned(), value)).to_vec();
        Ok(Self { master, data, key, env })
    }

    /// Sets a variable for agents started from now on. An empty value unsets it.
    pub(crate) fn set(&mut self, name: &str, value: impl Into<String>) {
        self.env.retain(|(known, _)| known != name);
        self.env.push((name.to_owned(), value.into()));
    }

    /// Starts an agent on the data folder. Its log must not show its key.
    pub(crate) fn agent(&self) -> Result<AgentProcess> {
        let mut agent = AgentProcess::spawn(&agent_binary(), &self.env, self.data.path())?;
        agent.plant(&self.key);
        Ok(agent)
    }

    /// Waits until the master has accepted this many registrations of its only agent.
    pub(crate) async fn registered(&self, times: u64) -> Result<Agent> {
        let what = format!("registration {times}");
        let enough = |agent: &&Agent| agent.registrations >= times;
        self.master.wait_for(&what, SOON, |known| known.only_agent().filter(enough).cloned()).await
    }

    /// Waits for a request on this route that the master answered with this status.
    pub(crate) async fn answered(&self, route: Route, status: u16) -> Result<Request> {
        let what = format!("{route} answered {status}");
        let is_it = |request: &Request| request.route == route && request.status == Some(status);
        self.master.wait_for_request(&what, SOON, |request| is_it(request).then(|| request.clone())).await
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.data.path().join(name)
    }

    pub(crate) fn file(&self, name: &str) -> Result<String> {
        Ok(std::fs::read_to_string(self.path(name))?)
    }

    pub(crate) fn assert_no_violations(&self) {
        let violations = self.master.violations();
        assert!(violations.is_empty(), "protocol violations: {violations:#?}");
    }
}

/// Sends SIGTERM to an agent, which must exit with 0.
pub(crate) async fn stop(agent: &mut AgentProcess) -> Result<()> {
    agent.sigterm()?;
    let code = agent.wait_exit(SOON).await?.code();
    anyhow::ensure!(code == Some(0), "it ended with {code:?}");
    Ok(())
}
