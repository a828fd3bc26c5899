//! Makes and controls a scope's containers, networks and volumes.

use std::collections::HashMap;
use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bollard::Docker;
use bollard::errors::Error;
use bollard::models::{
    ContainerCreateBody, ContainerInspectResponse, HealthConfig, HostConfig, Mount, MountType, MountVolumeOptions,
    NetworkConnectRequest, NetworkCreateRequest, VolumeCreateRequest,
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

/// The default port of the stand-in's metrics server.
const METRICS_PORT: u16 = 20241;

/// The description of a container to make. Only the image is required.
#[derive(Debug, Clone, Default)]
pub struct Spec<'a> {
    /// The image.
    pub image: &'a str,
    /// The full name; [`Scope::name`] returns a free one. Empty for a random name.
    pub name: &'a str,
    /// Labels in addition to the scope's.
    pub labels: &'a [(&'a str, &'a str)],
    /// Environment variables.
    pub env: &'a [(&'a str, &'a str)],
    /// Arguments to the image's entry point. Empty for the image's own.
    pub args: &'a [&'a str],
    /// The network in which the container starts; Docker's `bridge` if `None`.
    pub network: Option<&'a str>,
    /// Whether Docker removes the container when it ends, as `--rm` does.
    pub auto_remove: bool,
    /// All other settings: mounts, ports, capabilities, a read-only root …
    pub host: HostConfig,
    /// A health check.
    pub health: Option<HealthConfig>,
}

impl Scope {
    /// Creates and starts a container. Returns its id.
    ///
    /// # Errors
    /// When the engine refuses.
    pub async fn run(&self, spec: Spec<'_>) -> Result<String> {
        let id = self.create(spec).await?;
        self.start(&id).await?;
        Ok(id)
    }

    /// Creates a container without starting it. Returns its id.
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

    /// Starts a container of the `workload` image. Without `args` it serves; with `["exit", "3"]` or `["sleep", "500"]`
    /// it ends. Returns its id.
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

    /// Stops a container: SIGTERM, then SIGKILL after `seconds`.
    ///
    /// # Errors
    /// When the engine refuses.
    pub async fn stop(&self, container: &str, seconds: i32) -> Result<()> {
        let options = StopContainerOptions { t: Some(seconds), ..Default::default() };
        Ok(self.docker().stop_container(container, Some(options)).await?)
    }

    /// Restarts a container, which has `seconds` to stop.
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

    /// Pauses a container.
    ///
    /// # Errors
    /// When the engine refuses.
    pub async fn pause(&self, container: &str) -> Result<()> {
        Ok(self.docker().pause_container(container).await?)
    }

    /// Resumes a paused container.
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

    /// Returns the full inspection of a container.
    ///
    /// # Errors
    /// When there is no such container.
    pub async fn inspect(&self, container: &str) -> Result<ContainerInspectResponse> {
        let found = self.docker().inspect_container(container, None).await;
        found.with_context(|| format!("cannot inspect {container}"))
    }

    /// Returns the full inspection of a container; `None` if there is no such container.
    ///
    /// # Errors
    /// When the engine cannot tell.
    pub async fn find(&self, container: &str) -> Result<Option<ContainerInspectResponse>> {
        match self.docker().inspect_container(container, None).await {
            Ok(found) => Ok(Some(found)),
            Err(Error::DockerResponseServerError { status_code: 404, .. }) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Returns a container's status in one word (`running`, `exited`, …); `gone` if there is no such container.
    ///
    /// # Errors
    /// When the engine cannot tell.
    pub async fn status(&self, container: &str) -> Result<String> {
        let Some(found) = self.find(container).await? else { return Ok("gone".into()) };
        Ok(found.state.and_then(|state| state.status).map(|status| status.to_string()).unwrap_or_default())
    }

    /// Returns a container's health in one word (`starting`, `healthy`, …); empty without a health check.
    ///
    /// # Errors
    /// When there is no such container.
    pub async fn health(&self, container: &str) -> Result<String> {
        let health = self.inspect(container).await?.state.and_then(|state| state.health);
        Ok(health.and_then(|health| health.status).map(|status| status.to_string()).unwrap_or_default())
    }

    /// Returns a container's log: standard output and error, in order of arrival.
    ///
    /// # Errors
    /// When there is no such container.
    pub async fn logs(&self, container: &str) -> Result<String> {
        logs(self.docker(), container, "all").await
    }

    /// Returns a running container's first address, which this host can reach.
    ///
    /// # Errors
    /// When the container has no address (yet).
    pub async fn ip(&self, container: &str) -> Result<IpAddr> {
        let networks = self.inspect(container).await?.network_settings.and_then(|settings| settings.networks);
        let mut addresses = networks.into_iter().flatten().filter_map(|(_, endpoint)| endpoint.ip_address);
        let address = addresses.find_map(|address| address.parse().ok());
        address.with_context(|| format!("{container} has no address"))
    }

    /// Changes a running stand-in's behavior: `{"unready": true}`, `{"exit": 1}` (see the stand-in's table).
    /// `container` may be any container with the stand-in's metrics server on port 20241, also one that the agent made.
    ///
    /// # Errors
    /// When the stand-in does not answer or refuses the words.
    pub async fn tell_stand_in(&self, container: &str, words: &Value) -> Result<()> {
        let address = format!("{}:{METRICS_PORT}", self.ip(container).await?);
        let request = crate::http::post(&address, "/stand-in", words);
        let answer = tokio::time::timeout(Duration::from_secs(10), request).await.context("no answer")??;
        ensure!(answer.status == 200, "the stand-in says {}: {}", answer.status, answer.body);
        Ok(())
    }

    /// Makes a bridge network of this name; [`Scope::name`] returns a free one. Returns the network's id.
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

    /// Removes a network. Detach or remove its containers first.
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
        self.make_volume(name, &[]).await
    }

    /// Makes a volume of this name in memory, with these options of its mount, for example `size=1m,mode=2750`.
    ///
    /// # Errors
    /// When the engine refuses.
    pub async fn create_memory_volume(&self, name: &str, options: &str) -> Result<()> {
        self.make_volume(name, &[("type", "tmpfs"), ("device", "tmpfs"), ("o", options)]).await
    }

    async fn make_volume(&self, name: &str, options: &[(&str, &str)]) -> Result<()> {
        let options: HashMap<_, _> =
            options.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        let request = VolumeCreateRequest {
            name: Some(name.to_owned()),
            driver_opts: (!options.is_empty()).then_some(options),
            labels: Some(self.labels()),
            ..VolumeCreateRequest::default()
        };
        self.docker().create_volume(request).await?;
        Ok(())
    }

    /// Returns the mount of the scope's volume with this [`name`](Self::name). Docker makes the volume, with the
    /// scope's labels, when a container needs it and it is not there.
    #[must_use]
    pub fn mount(&self, name: &str, target: &str) -> Mount {
        Mount {
            typ: Some(MountType::VOLUME),
            source: Some(self.name(name)),
            target: Some(target.to_owned()),
            volume_options: Some(MountVolumeOptions { labels: Some(self.labels()), ..MountVolumeOptions::default() }),
            ..Mount::default()
        }
    }
}

/// Returns the last `tail` lines of a container's log; `all` for the whole log.
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
