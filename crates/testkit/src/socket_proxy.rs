//! What stands between an agent and Docker: above all the agent's own socket proxy, as a process of this host.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::{Duration, Instant};

use anyhow::{Context, Error, Result, bail, ensure};

use crate::agent::AgentProcess;
use crate::engine::socket_path;

/// What an agent under test reaches Docker through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Between {
    /// Its own socket proxy, as in the compose file: `own`.
    Own,
    /// A haproxy that behaves like the usual socket proxies: `haproxy`.
    Haproxy,
    /// Nothing: `none`.
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

/// The settings of an agent that the policy of its socket proxy comes from.
const SETTINGS: [&str; 6] = [
    "CLOUDFLARED_IMAGE",
    "CLOUDFLARED_NETWORK_NAME",
    "CLOUDFLARED_METRICS_NETWORK",
    "TUNNEL_CONTAINER_NAME",
    "AUTO_CONNECT_NETWORKS",
    "LOG_LEVEL",
];

/// How long one may take until it listens.
const STARTED: Duration = Duration::from_secs(30);

/// A running `dockflare-agent socket-proxy` on a unix socket of its own. Dropping it kills it.
pub struct SocketProxy {
    program: PathBuf,
    settings: Vec<(String, String)>,
    folder: tempfile::TempDir,
    process: AgentProcess,
}

impl SocketProxy {
    /// Starts one of this program, for an agent with these settings, and waits until it listens.
    ///
    /// Blocks: it is another process that is waited for.
    ///
    /// # Errors
    /// When it cannot be started or does not listen.
    pub fn start(program: &Path, agent_env: &[(String, String)]) -> Result<Self> {
        let (folder, settings) = (tempfile::tempdir()?, Self::settings(agent_env));
        let process = spawn(program, &settings, folder.path())?;
        let proxy = Self { program: program.to_owned(), settings, folder, process };
        proxy.wait()?;
        Ok(proxy)
    }

    /// What of an agent's settings concerns its proxy.
    #[must_use]
    pub fn settings(agent_env: &[(String, String)]) -> Vec<(String, String)> {
        agent_env.iter().filter(|(name, _)| SETTINGS.contains(&name.as_str())).cloned().collect()
    }

    /// Whether it serves an agent with these settings.
    #[must_use]
    pub fn serves(&self, agent_env: &[(String, String)]) -> bool {
        self.settings == Self::settings(agent_env)
    }

    /// Another one in its place, at the same address. Blocks, as [`SocketProxy::start`] does.
    ///
    /// # Errors
    /// As there.
    pub fn restart(&mut self) -> Result<()> {
        self.process = spawn(&self.program, &self.settings, self.folder.path())?;
        self.wait()
    }

    /// The running program.
    #[must_use]
    pub fn process(&self) -> &AgentProcess {
        &self.process
    }

    /// The running program, to be waited for.
    pub fn process_mut(&mut self) -> &mut AgentProcess {
        &mut self.process
    }

    /// Where it listens.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        self.folder.path().join("docker.sock")
    }

    /// What an agent puts into `DOCKER_HOST`.
    #[must_use]
    pub fn host_url(&self) -> String {
        format!("unix://{}", self.path().display())
    }

    /// The lines in which it says what it refused, of the process that runs now.
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
