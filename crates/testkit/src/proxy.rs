//! Runs a Docker socket proxy in a container.

use std::collections::HashMap;
use std::net::{Ipv4Addr, TcpListener};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use bollard::models::{HostConfig, PortBinding};

use crate::containers::Spec;
use crate::engine::{socket_path, wait_until};
use crate::haproxy::PORT;
use crate::images::images;
use crate::scope::Scope;

/// A Docker socket proxy between a program and the engine, in one of the scope's containers.
pub struct Proxy<'a> {
    scope: &'a Scope,
    container: String,
    address: String,
}

/// The variables of the common socket proxies that open exactly what the agent needs.
pub const PROXY_OPENS: [(&str, &str); 7] = [
    ("CONTAINERS", "1"),
    ("EVENTS", "1"),
    ("NETWORKS", "1"),
    ("IMAGES", "1"),
    ("PING", "1"),
    ("VERSION", "1"),
    ("POST", "1"),
];

impl Scope {
    /// Starts a socket proxy with the variables `env` (`[("CONTAINERS", "1"), ("POST", "1")]`) and waits until it
    /// answers. Pings, the version and events are open by default.
    ///
    /// # Errors
    /// When HAProxy is not installed or the proxy does not come up.
    pub async fn socket_proxy(&self, env: &[(&str, &str)]) -> Result<Proxy<'_>> {
        self.socket_proxy_in(env, None).await
    }

    /// Like [`Scope::socket_proxy`], in this network instead of Docker's `bridge`.
    ///
    /// # Errors
    /// As for [`Scope::socket_proxy`].
    pub async fn socket_proxy_in(&self, env: &[(&str, &str)], network: Option<&str>) -> Result<Proxy<'_>> {
        let image = images().haproxy().await?;
        // Choose the port ourselves, because it must be the same after a restart. If another process takes it before
        // Docker does, try the next one.
        for _ in 0..5 {
            let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port();
            let container =
                self.create(Spec { image: &image, env, network, host: host(port), ..Spec::default() }).await?;
            match self.start(&container).await {
                Err(error) if format!("{error:#}").contains("already allocated") => self.rm(&container).await?,
                Err(error) => return Err(error),
                Ok(()) => {
                    let proxy = Proxy { scope: self, container, address: format!("127.0.0.1:{port}") };
                    proxy.wait_for_answer().await?;
                    return Ok(proxy);
                }
            }
        }
        bail!("no port could be had for the socket proxy")
    }
}

fn host(port: u16) -> HostConfig {
    let binding = PortBinding { host_ip: Some("127.0.0.1".into()), host_port: Some(port.to_string()) };
    HostConfig {
        binds: Some(vec![format!("{}:/var/run/docker.sock", socket_path())]),
        port_bindings: Some(HashMap::from([(format!("{PORT}/tcp"), Some(vec![binding]))])),
        ..HostConfig::default()
    }
}

impl Proxy<'_> {
    /// Returns the value of `DOCKER_HOST` for a program on this host: `tcp://127.0.0.1:port`.
    #[must_use]
    pub fn host_url(&self) -> String {
        format!("tcp://{}", self.address)
    }

    /// Returns `127.0.0.1:port`.
    #[must_use]
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Returns the container's id.
    #[must_use]
    pub fn container(&self) -> &str {
        &self.container
    }

    /// Attaches the proxy to a network of the scope. Returns the value of `DOCKER_HOST` for a container there.
    ///
    /// # Errors
    /// When the engine refuses.
    pub async fn join(&self, network: &str) -> Result<String> {
        self.scope.connect(network, &self.container).await?;
        // Docker resolves the short id as a host name in every network except its default one.
        let name = self.container.get(..12).unwrap_or(&self.container);
        Ok(format!("tcp://{name}:{PORT}"))
    }

    /// Kills the proxy, which cuts its connections. It refuses new ones from then on.
    ///
    /// # Errors
    /// When the engine refuses.
    pub async fn kill(&self) -> Result<()> {
        self.scope.kill(&self.container, "SIGKILL").await?;
        wait_until("the proxy's end", Duration::from_secs(10), async || {
            let status = self.scope.status(&self.container).await.ok()?;
            (status == "exited").then_some(())
        })
        .await
    }

    /// Restarts the proxy at the same address, whether it was killed or not, and waits until it answers.
    ///
    /// # Errors
    /// When the engine refuses or the proxy does not come up.
    pub async fn restart(&self) -> Result<()> {
        self.scope.restart(&self.container, 0).await?;
        self.wait_for_answer().await
    }

    async fn wait_for_answer(&self) -> Result<()> {
        let waited = wait_until("the socket proxy to answer", Duration::from_secs(20), async || {
            // Docker's port forwarder accepts connections before the proxy does, then cuts them: only an answer counts.
            let asked = tokio::time::timeout(Duration::from_secs(2), crate::http::get(&self.address, "/_ping"));
            asked.await.ok()?.ok().map(drop)
        });
        if let Err(error) = waited.await {
            let log = self.scope.logs(&self.container).await.unwrap_or_default();
            return Err(error).context(log);
        }
        Ok(())
    }
}
