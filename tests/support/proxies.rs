//! What stands between an agent and Docker in all cases that do not say so themselves.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use testkit::AgentProcess;

use super::{SOON, agent_binary};

/// Chosen by `TEST_DOCKER_PROXY`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Between {
    /// The agent's own socket proxy, as in the compose file. The default.
    Own,
    /// A haproxy that behaves like the usual socket proxies: `haproxy`.
    Haproxy,
    /// Nothing: `none`.
    Nothing,
}

impl Between {
    pub(crate) fn chosen() -> Self {
        match std::env::var("TEST_DOCKER_PROXY").as_deref() {
            Ok("none") => Self::Nothing,
            Ok("haproxy") => Self::Haproxy,
            Ok("own") | Err(_) => Self::Own,
            Ok(other) => panic!("TEST_DOCKER_PROXY={other}: must be own, haproxy or none"),
        }
    }
}

/// The settings that its policy comes from.
const SETTINGS: [&str; 5] =
    ["CLOUDFLARED_IMAGE", "CLOUDFLARED_NETWORK_NAME", "TUNNEL_CONTAINER_NAME", "AUTO_CONNECT_NETWORKS", "LOG_LEVEL"];

type Settings = Vec<(String, String)>;

/// The agent's own socket proxies of a stage, one for each set of settings that an agent was started with.
#[derive(Default)]
pub(crate) struct Proxies(Mutex<Vec<(Settings, SocketProxy)>>);

/// A socket proxy as a process of this host.
pub(crate) struct SocketProxy {
    pub(crate) process: AgentProcess,
    folder: tempfile::TempDir,
}

impl Proxies {
    /// What an agent with these settings puts into `DOCKER_HOST`.
    pub(crate) fn for_agent(&self, env: &Settings, key: &str) -> Result<String> {
        let mut running = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let settings: Settings = env.iter().filter(|(name, _)| SETTINGS.contains(&name.as_str())).cloned().collect();
        if let Some((_, proxy)) = running.iter().find(|(known, _)| *known == settings) {
            return Ok(proxy.host_url());
        }
        let mut proxy = SocketProxy::start(&settings, &[])?;
        proxy.process.plant(key);
        let url = proxy.host_url();
        running.push((settings, proxy));
        Ok(url)
    }
}

/// What an agent asks for is let through; a refusal would be a mistake of one of the two.
impl Drop for Proxies {
    fn drop(&mut self) {
        let running = std::mem::take(self.0.get_mut().unwrap_or_else(PoisonError::into_inner));
        let refused: Vec<_> = running
            .iter()
            .flat_map(|(_, proxy)| proxy.process.log().lines().map(str::to_owned).collect::<Vec<_>>())
            .filter(|line| line.contains("refused a request"))
            .collect();
        drop(running);
        if !refused.is_empty() && !std::thread::panicking() {
            panic!("the socket proxy refused what the agent asked for: {refused:#?}");
        }
    }
}

impl SocketProxy {
    /// Starts one and waits until it listens.
    pub(crate) fn start(settings: &[(String, String)], more: &[(&str, &str)]) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let process = Self::spawn(settings, more, folder.path())?;
        let proxy = Self { process, folder };
        proxy.wait()?;
        Ok(proxy)
    }

    fn spawn(settings: &[(String, String)], more: &[(&str, &str)], folder: &Path) -> Result<AgentProcess> {
        let mut env: Settings =
            settings.iter().filter(|(name, _)| SETTINGS.contains(&name.as_str())).cloned().collect();
        env.push(("SOCKET_PROXY_LISTEN".to_owned(), format!("unix://{}", folder.join("docker.sock").display())));
        env.push(("SOCKET_PROXY_DOCKER_HOST".to_owned(), format!("unix://{}", testkit::socket_path())));
        env.extend(more.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())));
        AgentProcess::spawn_with(&agent_binary(), &["socket-proxy"], &env, folder)
    }

    /// Another one in its place, at the same address.
    pub(crate) fn again(&mut self, settings: &[(String, String)]) -> Result<()> {
        self.process = Self::spawn(settings, &[], self.folder.path())?;
        self.wait()
    }

    pub(crate) fn path(&self) -> std::path::PathBuf {
        self.folder.path().join("docker.sock")
    }

    pub(crate) fn host_url(&self) -> String {
        format!("unix://{}", self.path().display())
    }

    /// Blocks: it is another process that is waited for.
    fn wait(&self) -> Result<()> {
        let deadline = Instant::now() + SOON;
        while UnixStream::connect(self.path()).is_err() {
            ensure!(Instant::now() < deadline, "the socket proxy does not listen: {}", self.process.log());
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }
}
