//! The proxy between an agent and Docker, in all cases that do not choose one themselves.

use std::sync::{Mutex, PoisonError};

use anyhow::Result;
use testkit::{Between, SocketProxy};

use super::agent_binary;

/// The choice from `TEST_DOCKER_PROXY`; by default the agent's own socket proxy.
pub(crate) fn chosen() -> Between {
    match std::env::var("TEST_DOCKER_PROXY") {
        Ok(word) => word.parse().unwrap_or_else(|error| panic!("TEST_DOCKER_PROXY: {error}")),
        Err(_) => Between::Own,
    }
}

/// The agent's own socket proxies of a stage, one for each set of settings that an agent was started with.
#[derive(Default)]
pub(crate) struct Proxies(Mutex<Vec<SocketProxy>>);

impl Proxies {
    /// The `DOCKER_HOST` for an agent with these settings.
    pub(crate) fn for_agent(&self, env: &[(String, String)], key: &str) -> Result<String> {
        let mut running = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(proxy) = running.iter().find(|proxy| proxy.serves(env)) {
            return Ok(proxy.host_url());
        }
        let mut proxy = SocketProxy::start(&agent_binary(), env)?;
        proxy.process_mut().plant(key);
        let url = proxy.host_url();
        running.push(proxy);
        Ok(url)
    }
}

/// Fails the case if a proxy refused a request: the agent must not need what the proxy forbids.
impl Drop for Proxies {
    fn drop(&mut self) {
        let running = std::mem::take(self.0.get_mut().unwrap_or_else(PoisonError::into_inner));
        let refused: Vec<_> = running.iter().flat_map(SocketProxy::refusals).collect();
        drop(running);
        if !refused.is_empty() && !std::thread::panicking() {
            panic!("the socket proxy refused what the agent asked for: {refused:#?}");
        }
    }
}
