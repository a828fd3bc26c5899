//! Runs the agent's own socket proxy as a process on this host, and names the other ways from an agent to Docker.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::{Duration, Instant};

use anyhow::{Context, Error, Result, bail, ensure};

use crate::agent::AgentProcess;
use crate::engine::socket_path;

/// The way on which an agent under test reaches Docker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Between {
    /// Through the agent's own socket proxy, as in the compose file: `own`.
    Own,
    /// Through a HAProxy that behaves like the common socket proxies: `haproxy`.
    Haproxy,
    /// Directly: `none`.
    Nothing,
}

impl FromStr for Between {
    type Err = Error;

    fn from_str(word: &str) -> Result<Self> {
        match word {
            "own" => Ok(Self::Own),
            "haproxy" => Ok(Self::Haproxy),
            "none" => Ok(Self::Nothing),
            other => bail!("{other:?} is none of own, haproxy, none"),
        }
    }
}

/// The agent settings that determine its socket proxy's policy.
const SETTINGS: [&str; 6] = [
    "CLOUDFLARED_IMAGE",
    "CLOUDFLARED_NETWORK_NAME",
    "CLOUDFLARED_METRICS_NETWORK",
    "TUNNEL_CONTAINER_NAME",
    "AUTO_CONNECT_NETWORKS",
    "LOG_LEVEL",
];

/// How long a socket proxy may take until it listens.
const STARTED: Duration = Duration::from_secs(30);

/// A running `dockflare-agent socket-proxy` on its own unix socket. Dropping it kills the process.
pub struct SocketProxy {
    program: PathBuf,
    settings: Vec<(String, String)>,
    folder: tempfile::TempDir,
    process: AgentProcess,
}

impl SocketProxy {
    /// Starts `program` as the socket proxy of an agent with these settings, and waits until it listens.
    ///
    /// Blocks the thread while it waits for the other process.
    ///
    /// # Errors
    /// When the proxy cannot be started or does not listen within 30 s.
    pub fn start(program: &Path, agent_env: &[(String, String)]) -> Result<Self> {
        let (folder, settings) = (tempfile::tempdir()?, Self::settings(agent_env));
        let process = spawn(program, &settings, folder.path())?;
        let proxy = Self { program: program.to_owned(), settings, folder, process };
        proxy.wait()?;
        Ok(proxy)
    }

    /// Returns those of an agent's settings that concern its proxy.
    #[must_use]
    pub fn settings(agent_env: &[(String, String)]) -> Vec<(String, String)> {
        agent_env.iter().filter(|(name, _)| SETTINGS.contains(&name.as_str())).cloned().collect()
    }

    /// Whether this proxy fits an agent with these settings.
    #[must_use]
    pub fn serves(&self, agent_env: &[(String, String)]) -> bool {
        self.settings == Self::settings(agent_env)
    }

    /// Replaces the process by a fresh one at the same address. Blocks, as [`SocketProxy::start`] does.
    ///
    /// # Errors
    /// As for [`SocketProxy::start`].
    pub fn restart(&mut self) -> Result<()> {
        self.process = spawn(&self.program, &self.settings, self.folder.path())?;
        self.wait()
    }

    /// Returns the running process.
    #[must_use]
    pub fn process(&self) -> &AgentProcess {
        &self.process
    }

    /// Returns the running process mutably, to wait for it.
    pub fn process_mut(&mut self) -> &mut AgentProcess {
        &mut self.process
    }

    /// Returns the path of the proxy's socket.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        self.folder.path().join("docker.sock")
    }

    /// Returns the agent's value for `DOCKER_HOST`.
    #[must_use]
    pub fn host_url(&self) -> String {
        format!("unix://{}", self.path().display())
    }

    /// Returns the log lines of the current process that report refused requests.
    #[must_use]
    pub fn refusals(&self) -> Vec<String> {
        let log = self.process.log();
        log.lines().filter(|line| line.contains("refused a request")).map(str::to_owned).collect()
    }

    fn wait(&self) -> Result<()> {
        let deadline = Instant::now() + STARTED;
        while UnixStream::connect(self.path()).is_err() {
            ensure!(Instant::now() < deadline, "the socket proxy does not listen: {}", self.process.log());
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }
}

fn spawn(program: &Path, settings: &[(String, String)], folder: &Path) -> Result<AgentProcess> {
    let mut env = settings.to_vec();
    env.push(("SOCKET_PROXY_LISTEN".to_owned(), format!("unix://{}", folder.join("docker.sock").display())));
    env.push(("SOCKET_PROXY_DOCKER_HOST".to_owned(), format!("unix://{}", socket_path())));
    AgentProcess::spawn_with(program, &["socket-proxy"], &env, folder).context("the agent's own socket proxy")
}
