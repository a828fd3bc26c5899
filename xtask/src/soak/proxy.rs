//! What stands behind the door, between the agent and Docker: a socket proxy that can be killed, or the Engine itself.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use testkit::{Between, Scope, SocketProxy};

use super::relay::Behind;

const KILLED: Duration = Duration::from_secs(10);

pub(crate) enum Proxy<'a> {
    /// The agent's own proxy, and whether it runs.
    Own(SocketProxy, bool),
    Haproxy(testkit::Proxy<'a>),
    None,
}

impl<'a> Proxy<'a> {
    /// Starts the requested proxy, for an agent with these settings.
    pub(crate) async fn start(
        between: Between,
        scope: &'a Scope,
        program: &Path,
        env: &[(String, String)],
    ) -> Result<Self> {
        Ok(match between {
            Between::Own => Self::Own(SocketProxy::start(program, env)?, true),
            Between::Haproxy => {
                let network = scope.name("soak-proxy");
                scope.create_network(&network).await?;
                Self::Haproxy(scope.socket_proxy_in(&testkit::PROXY_OPENS, Some(&network)).await?)
            }
            Between::Nothing => Self::None,
        })
    }

    pub(crate) fn behind(&self) -> Behind {
        match self {
            Self::Own(proxy, _) => Behind::Unix(proxy.path()),
            Self::Haproxy(proxy) => Behind::Tcp(proxy.address().to_owned()),
            Self::None => Behind::Unix(testkit::socket_path().into()),
        }
    }

    pub(crate) fn can_be_killed(&self) -> bool {
        !matches!(self, Self::None)
    }

    pub(crate) async fn kill(&mut self) -> Result<()> {
        match self {
            Self::Own(proxy, runs) => {
                *runs = false;
                proxy.process().sigkill()?;
                proxy.process_mut().wait_exit(KILLED).await?;
                Ok(())
            }
            Self::Haproxy(proxy) => proxy.kill().await,
            Self::None => Ok(()),
        }
    }

    pub(crate) async fn restart(&mut self) -> Result<()> {
        self.refuses_nothing()?;
        match self {
            Self::Own(proxy, runs) => {
                proxy.restart()?;
                *runs = true;
                Ok(())
            }
            Self::Haproxy(proxy) => proxy.restart().await,
            Self::None => Ok(()),
        }
    }

    /// The process id of the agent's own proxy, while it runs.
    pub(crate) fn pid(&self) -> Option<u32> {
        match self {
            Self::Own(proxy, true) => Some(proxy.process().pid()),
            _ => None,
        }
    }

    /// Checks that the agent's own proxy allows everything the agent asks for, and ends only when killed.
    pub(crate) fn refuses_nothing(&mut self) -> Result<()> {
        let Self::Own(proxy, runs) = self else { return Ok(()) };
        let refusals = proxy.refusals();
        ensure!(refusals.is_empty(), "the socket proxy refused what the agent asked for: {}", refusals.join("; "));
        let ended = *runs && !proxy.process_mut().is_running().context("the socket proxy")?;
        ensure!(!ended, "the socket proxy has ended by itself: {}", proxy.process().log());
        Ok(())
    }
}
