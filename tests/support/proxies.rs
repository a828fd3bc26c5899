//! What stands between an agent and Docker in all cases that do not say so themselves.

use std::sync::{Mutex, PoisonError};

use anyhow::Result;
use testkit::{Between, SocketProxy};

use super::agent_binary;

/// Chosen by `TEST_DOCKER_PROXY`; the agent's own if nothing is.
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
    /// What an agent with these settings puts into `DOCKER_HOST`.
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

/// What an agent asks for is let through; a refusal would be a mistake of one of the two.
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
