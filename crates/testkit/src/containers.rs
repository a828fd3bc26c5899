//! Containers and networks of a scope.

use std::collections::HashMap;
use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bollard::Docker;
use bollard::errors::Error;
use bollard::models::{
    ContainerCreateBody, ContainerInspectResponse, HealthConfig, HostConfig, NetworkConnectRequest,
    NetworkCreateRequest, VolumeCreateRequest,
};
use bollard::query_parameters::{
    CreateContainerOptions, KillContainerOptions, LogsOptions, RemoveContainerOptions, RestartContainerOptions,
    StopContainerOptions,
};
use futures_util::StreamExt;
use serde_json::Value;

use crate::images::images;
use crate::process;
use crate::scope::Scope;

/// Where the stand-in's metrics server listens by default.
const METRICS_PORT: u16 = 20241;

/// A container to be made. All but the image may be left out.
#[derive(Debug, Clone, Default)]
pub struct Spec<'a> {
    /// The image.
    pub image: &'a str,
    /// The name in full, [`Scope::name`] gives a free one; a random one if empty.
    pub name: &'a str,
    /// Labels, besides the scope's.
    pub labels: &'a [(&'a str, &'a str)],
    /// Environment.
    pub env: &'a [(&'a str, &'a str)],
    /// Arguments to the image's entry point; its own if empty.
    pub args: &'a [&'a str],
    /// The network it starts in, Docker's `bridge` if none.
    pub network: Option<&'a str>,
    /// `--rm`.
    pub auto_remove: bool,
    /// All else: mounts, ports, capabilities, a read-only root …
    pub host: HostConfig,
    /// A health check.
    pub health: Option<HealthConfig>,
}

impl Scope {
    /// Creates and starts a container; gives its id.
    ///
    /// # Errors
    /// When the engine refuses.
    pub async fn run(&self, spec: Spec<'_>) -> Result<String> {
        let id = self.create(spec).await?;
        self.start(&id).await?;
        Ok(id)
    }

    /// Creates a container without starting it; gives its id.
    ///
    /// # Errors
    /// When the engine refuses.
    pub async fn create(&self, spec: Spec<'_>) -> Result<String> {
        let name = if spec.name.is_empty() { self.name(&process::random_suffix()) } else { spec.name.to_owned() };
        let mut labels = self.labels();
        labels.extend(spec.labels.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())));
        let args: Vec<String> = spec.args.iter().map(|arg| (*arg).to_owned()).collect();
        let body = ContainerCreateBody {
            image: Some(spec.image.to_owned()),
            labels: Some(labels),
            env: Some(spec.env.iter().map(|(key, value)| format!("{key}={value}")).collect()),
            cmd: Some(args).filter(|args| !args.is_empty()),
            healthcheck: spec.health,
            host_config: Some(HostConfig {
                network_mode: spec.network.map(str::to_owned).or(spec.host.network_mode.clone()),
                auto_remove: Some(spec.auto_remove),
                ..spec.host
            }),
            ..ContainerCreateBody::default()
        };
        let options = CreateContainerOptions { name: Some(name.clone()), ..Default::default() };
        let created = self.docker().create_container(Some(options), body).await;
        Ok(created.with_context(|| format!("cannot create container {name}"))?.id)
    }

    /// A container of the `workload` image, started. Without `args` it serves; `["exit", "3"]` and
    /// `["sleep", "500"]` end. Gives its id.
    ///
    /// # Errors
    /// When the engine refuses, or the image cannot be made.
    pub async fn run_workload(
        &self,
        labels: &[(&str, &str)],
        args: &[&str],
        network: Option<&str>,
        auto_remove: bool,
    ) -> Result<String> {
        let image = images().workload().await?;
        self.run(Spec { image: &image, labels, args, network, auto_remove, ..Spec::default() }).await
    }

    /// Starts a container.
    ///
    /// # Errors
    /// When the engine refuses.
    pub async fn start(&self, container: &str) -> Result<()> {
        self.docker().start_container(container, None).await.with_context(|| format!("cannot start {container}"))
    }

    /// Stops a container: SIGTERM, and SIGKILL after so many seconds.
    ///
    /// # Errors
    /// When the engine refuses.
    pub async fn stop(&self, container: &str, seconds: i32) -> Result<()> {
        let options = StopContainerOptions { t: Some(seconds), ..Default::default() };
        Ok(self.docker().stop_container(container, Some(options)).await?)
    }

    /// Restarts a container, with so many seconds to stop.
    ///
    /// # Errors
    /// When the engine refuses.
    pub async fn restart(&self, container: &str, seconds: i32) -> Result<()> {
        let options = RestartContainerOptions { t: Some(seconds), ..Default::default() };
        Ok(self.docker().restart_container(container, Some(options)).await?)
    }

    /// Sends a signal to a container, such as `SIGKILL`.
    ///
    /// # Errors
    /// When the engine refuses.
    pub async fn kill(&self, container: &str, signal: &str) -> Result<()> {
        let options = KillContainerOptions { signal: signal.to_owned() };
        Ok(self.docker().kill_container(container, Some(options)).await?)
    }

    /// Freezes a container.
    ///
    /// # Errors
    /// When the engine refuses.
    pub async fn pause(&self, container: &str) -> Result<()> {
        Ok(self.docker().pause_container(container).await?)
    }

    /// Thaws a container.
    ///
    /// # Errors
    /// When the engine refuses.
    pub async fn unpause(&self, container: &str) -> Result<()> {
        Ok(self.docker().unpause_container(container).await?)
    }

    /// Removes a container by force.
    ///
    /// # Errors
    /// When the engine refuses.
    pub async fn rm(&self, container: &str) -> Result<()> {
        let options = RemoveContainerOptions { force: true, v: true, ..Default::default() };
        Ok(self.docker().remove_container(container, Some(options)).await?)
    }

    /// A container's state in full.
    ///
    /// # Errors
    /// When there is no such container.
    pub async fn inspect(&self, container: &str) -> Result<ContainerInspectResponse> {
        let found = self.docker().inspect_container(container, None).await;
        found.with_context(|| format!("cannot inspect {container}"))
    }

    /// A container's state in full; none if there is no such container.
    ///
    /// # Errors
    /// When the engine cannot say.
    pub async fn find(&self, container: &str) -> Result<Option<ContainerInspectResponse>> {
        match self.docker().inspect_container(container, None).await {
            Ok(found) => Ok(Some(found)),
            Err(Error::DockerResponseServerError { status_code: 404, .. }) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// A container's status in one word (`running`, `exited`, …); `gone` if there is no such container.
    ///
    /// # Errors
    /// When the engine cannot say.
    pub async fn status(&self, container: &str) -> Result<String> {
        let Some(found) = self.find(container).await? else { return Ok("gone".into()) };
        Ok(found.state.and_then(|state| state.status).map(|status| status.to_string()).unwrap_or_default())
    }

    /// A container's health in one word (`starting`, `healthy`, …); empty without a health check.
    ///
    /// # Errors
    /// When there is no such container.
    pub async fn health(&self, container: &str) -> Result<String> {
        let health = self.inspect(container).await?.state.and_then(|state| state.health);
        Ok(health.and_then(|health| health.status).map(|status| status.to_string()).unwrap_or_default())
    }

    /// What a container has written, standard output and error as they came.
    ///
    /// # Errors
    /// When there is no such container.
    pub async fn logs(&self, container: &str) -> Result<String> {
        logs(self.docker(), container, "all").await
    }

    /// A running container's first address, which this host can reach.
    ///
    /// # Errors
    /// When it has none (yet).
    pub async fn ip(&self, container: &str) -> Result<IpAddr> {
        let networks = self.inspect(container).await?.network_settings.and_then(|settings| settings.networks);
        let mut addresses = networks.into_iter().flatten().filter_map(|(_, endpoint)| endpoint.ip_address);
        let address = addresses.find_map(|address| address.parse().ok());
        address.with_context(|| format!("{container} has no address"))
    }

    /// Changes a running stand-in's behaviour: `{"unready": true}`, `{"exit": 1}` (see the stand-in's
    /// table). It may be any container, the agent's too, with its metrics server on port 20241.
    ///
    /// # Errors
    /// When it does not answer, or refuses the words.
    pub async fn tell_stand_in(&self, container: &str, words: &Value) -> Result<()> {
        let address = format!("{}:{METRICS_PORT}", self.ip(container).await?);
        let request = crate::http::post(&address, "/stand-in", words);
        let answer = tokio::time::timeout(Duration::from_secs(10), request).await.context("no answer")??;
        ensure!(answer.status == 200, "the stand-in says {}: {}", answer.status, answer.body);
        Ok(())
    }

    /// Makes a bridge network of this name, [`Scope::name`] gives a free one. Gives its id.
    ///
    /// # Errors
    /// When the engine refuses.
    pub async fn create_network(&self, name: &str) -> Result<String> {
        let request = NetworkCreateRequest {
            name: name.to_owned(),
            labels: Some(self.labels()),
            ..NetworkCreateRequest::default()
        };
        Ok(self.docker().create_network(request).await.with_context(|| format!("cannot create {name}"))?.id)
    }

    /// Removes a network. What is attached has to be gone before.
    ///
    /// # Errors
    /// When the engine refuses.
    pub async fn remove_network(&self, network: &str) -> Result<()> {
        Ok(self.docker().remove_network(network).await?)
    }

    /// Attaches a container to one more network.
    ///
    /// # Errors
    /// When the engine refuses.
    pub async fn connect(&self, network: &str, container: &str) -> Result<()> {
        let request = NetworkConnectRequest { container: container.to_owned(), ..Default::default() };
        Ok(self.docker().connect_network(network, request).await?)
    }

    /// Makes a volume of this name.
    ///
    /// # Errors
    /// When the engine refuses.
    pub async fn create_volume(&self, name: &str) -> Result<()> {
        let labels: HashMap<_, _> = self.labels();
        let request = VolumeCreateRequest { name: Some(name.to_owned()), labels: Some(labels), ..Default::default() };
        self.docker().create_volume(request).await?;
        Ok(())
    }
}

/// The last `tail` lines of a container's log, or `all`.
///
/// # Errors
/// When there is no such container.
pub async fn logs(docker: &Docker, container: &str, tail: &str) -> Result<String> {
    let options = LogsOptions { stdout: true, stderr: true, tail: tail.to_owned(), ..Default::default() };
    let mut chunks = docker.logs(container, Some(options));
    let mut log = Vec::new();
    while let Some(chunk) = chunks.next().await {
        log.extend_from_slice(&chunk?.into_bytes());
    }
    Ok(String::from_utf8_lossy(&log).into_owned())
}
