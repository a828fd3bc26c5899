//! The only way to Docker: every call that the agent makes to the Engine, and no others.
//!
//! Nothing else imports the client library. Each call has a time limit that covers its whole answer. Each failure is
//! sorted by what the caller does about it ([`DockerError`]); a refusal names the socket proxy's variable that would
//! allow the call. Each call opens a new connection: a proxy may have closed an old one, and some calls must not be
//! sent twice. The agent looks a container up by name and acts on the id that it saw, because another container may
//! have taken the name in between. Texts that people can make as long as they like, such as labels, are read in bounded
//! memory (`sieve`).

use std::collections::{BTreeMap, HashMap};
use std::sync::Mutex;
use std::time::Duration;

use bollard::models;
use bollard::query_parameters as query;
use dockflare_engine::{CHANGE_LIMIT, Client, READ_LIMIT, absent_is_none, limited};
pub use dockflare_engine::{Health, RunState};
use futures_util::{Stream, StreamExt, TryStreamExt};
use tokio::time::timeout;

use crate::config::{DockerHost, ImageRef, MOST_PATIENCE};
use crate::retry::Backoff;

mod dialect;
mod error;
mod goodbye;
#[cfg(test)]
mod hostile;
mod permissions;
mod spec;
mod types;
pub(crate) use dialect::EVENT_ACTIONS;
pub use error::DockerError;
#[cfg(test)]
pub(crate) use error::OWN_REFUSAL;
#[cfg(test)]
pub(crate) use error::Samples;
use error::*;
pub(crate) use error::{Remedy, silent};
pub(crate) use goodbye::Parting;
pub(crate) use permissions::{Engine, Gate, OWN_PROXY, Registry, Surplus};
pub(crate) use spec::{
    COMMAND, HOST_GATEWAY, IMAGE_LABEL, METRICS_LABEL, METRICS_VARIABLE, NAME_LABEL, OWNER_LABEL, REDEPLOY_LABEL,
    TUNNEL_LABEL, TUNNEL_NAME_LABEL, label_text, metrics_address, owner_labels,
};
pub use spec::{METRICS_PORT, MetricsPlace, SPEC_LABEL, Spec};
pub use types::{Action, Container, Endpoint, Event, Inspected, LastCheck, Version};
pub(crate) use types::{JOINED, Placed};

/// A Docker Engine, or the part of it that a socket proxy lets through.
#[derive(Debug)]
pub struct Docker {
    client: Client,
    /// Whether this project's own socket proxy answered last; `None` before the first answer. No await happens under
    /// the lock.
    own_proxy: Mutex<Option<bool>>,
    /// Held while a network is created.
    making_a_network: tokio::sync::Mutex<()>,
}

type Result<T> = std::result::Result<T, DockerError>;

/// Longest silence of a pull before it counts as stuck.
const PULL_SILENCE: Duration = Duration::from_secs(120);
/// The object types whose events the agent subscribes to.
pub(crate) const EVENT_TYPES: [&str; 2] = ["container", "network"];

impl Docker {
    /// Creates the client without calling Docker.
    pub fn new(host: DockerHost) -> Self {
        Self { client: Client::new(host), own_proxy: Mutex::new(None), making_a_network: tokio::sync::Mutex::default() }
    }

    /// The address, for the log.
    pub fn host(&self) -> &DockerHost {
        self.client.host()
    }

    /// Lists running containers that carry one of these label keys, whatever its value: the filter compares exactly.
    ///
    /// # Errors
    /// An incomplete answer is an error, never a short list.
    pub async fn list_with_label_keys(&self, keys: &[&str]) -> Result<Vec<Container>> {
        let mut found = BTreeMap::new();
        // Docker requires all filters of one kind to match, so each key needs its own listing.
        for key in keys {
            for container in self.client.listed(LIST, false, Some(key)).await? {
                let container = Container::from(container);
                found.insert(container.id.clone(), container);
            }
        }
        Ok(found.into_values().collect())
    }

    /// Lists the containers that agents have created, running or not, whatever their names are now.
    ///
    /// # Errors
    /// When the call fails.
    pub(crate) async fn list_made(&self) -> Result<Vec<Container>> {
        Ok(self.client.listed(LIST, true, Some(OWNER_LABEL.0)).await?.into_iter().map(Container::from).collect())
    }

    /// Lists all running containers, whoever made them.
    ///
    /// # Errors
    /// An incomplete answer is an error, never a short list.
    pub async fn list_running(&self) -> Result<Vec<Container>> {
        Ok(self.client.listed(LIST, false, None).await?.into_iter().map(Container::from).collect())
    }

    /// Lists the networks of running containers that carry one of these label keys.
    ///
    /// # Errors
    /// When the call fails.
    pub(crate) async fn placed_with_label_keys(&self, keys: &[&str]) -> Result<Vec<Placed>> {
        let mut found = Vec::new();
        for key in keys {
            found.extend(self.client.listed(LIST, false, Some(key)).await?.into_iter().map(Placed::from));
        }
        Ok(found)
    }

    /// Whether Docker answers.
    ///
    /// # Errors
    /// When it does not.
    pub async fn ping(&self) -> Result<()> {
        self.client.ping(PING).await
    }

    /// The Engine's version.
    ///
    /// # Errors
    /// When the call fails.
    pub async fn version(&self) -> Result<Version> {
        let docker = self.client.library(VERSION)?;
        limited(VERSION, READ_LIMIT, docker.version()).await.map(Version::from)
    }

    /// The host's name.
    ///
    /// # Errors
    /// When the call fails.
    pub(crate) async fn host_name(&self) -> Result<String> {
        self.client.host_name(INFO).await
    }

    /// Subscribes to the events of containers and networks from now on, or from `since` to bridge a gap (seconds and
    /// nanoseconds of the Engine's clock). The stream may be silent for hours. Its end and its errors mean "connect
    /// again".
    ///
    /// # Errors
    /// When the call cannot be made at all. Later errors come out of the stream.
    pub fn events(&self, since: Option<String>) -> Result<impl Stream<Item = Result<Event>> + use<>> {
        let told = self.client.told(EVENTS, since.as_deref(), &EVENT_TYPES, &EVENT_ACTIONS)?;
        Ok(told.map_ok(Event::from))
    }

    /// Inspects a container by name or id. `None` if there is none.
    ///
    /// # Errors
    /// When the call fails.
    pub async fn inspect(&self, name: &str) -> Result<Option<Inspected>> {
        Ok(absent_is_none(self.client.inspected(INSPECT, name).await)?.map(Inspected::from))
    }

    /// Reads the first lines that a container wrote since this Unix time in seconds: both streams, at most `lines`.
    ///
    /// # Errors
    /// When the call fails.
    pub async fn log_start(&self, id: &str, since: i64, lines: usize) -> Result<Vec<String>> {
        self.log(id, since, "all".to_owned(), lines).await
    }

    /// Reads the last of these lines, at most `lines`.
    ///
    /// # Errors
    /// When the call fails.
    pub async fn log_tail(&self, id: &str, since: i64, lines: usize) -> Result<Vec<String>> {
        self.log(id, since, lines.to_string(), lines).await
    }

    async fn log(&self, id: &str, since: i64, tail: String, most: usize) -> Result<Vec<String>> {
        let since = i32::try_from(since).unwrap_or_default();
        let options = query::LogsOptions { stdout: true, stderr: true, since, tail, ..Default::default() };
        let lines = self.client.library(LOGS)?.logs(id, Some(options)).take(most);
        let lines = lines.map_ok(|line| one_line(&String::from_utf8_lossy(&line.into_bytes())));
        limited(LOGS, READ_LIMIT, lines.try_collect()).await
    }

    /// Whether the network exists.
    ///
    /// # Errors
    /// When the call fails.
    pub async fn has_network(&self, name: &str) -> Result<bool> {
        let docker = self.client.library(NETWORK)?;
        let found = limited(NETWORK, READ_LIMIT, docker.inspect_network(name, None)).await;
        Ok(absent_is_none(found)?.is_some())
    }

    /// Creates a bridge network, internal or with a way out, unless one of that name exists. Up to Engine 24, Docker
    /// creates another network of the same name each time it is asked, and two tasks of this process may ask at the
    /// same time.
    ///
    /// # Errors
    /// When the call fails.
    pub(crate) async fn make_network(&self, name: &str, internal: bool) -> Result<bool> {
        let _alone = self.making_a_network.lock().await;
        if self.has_network(name).await? {
            return Ok(false);
        }
        self.create_network(name, internal, &owner_labels()).await.map(|()| true)
    }

    /// Creates a bridge network, internal or with a way out. Succeeds if Docker says that it already exists.
    ///
    /// # Errors
    /// When the call fails.
    pub async fn create_network(&self, name: &str, internal: bool, labels: &BTreeMap<String, String>) -> Result<()> {
        let docker = self.client.library(NEW_NETWORK)?;
        let request = models::NetworkCreateRequest {
            name: name.to_owned(),
            driver: Some("bridge".to_owned()),
            internal: internal.then_some(true),
            labels: Some(labels.clone().into_iter().collect()),
            ..Default::default()
        };
        match limited(NEW_NETWORK, CHANGE_LIMIT, docker.create_network(request)).await {
            Ok(_) | Err(DockerError::Conflict { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Whether the image is on this host.
    ///
    /// # Errors
    /// When the call fails.
    pub async fn has_image(&self, image: &ImageRef) -> Result<bool> {
        Ok(self.image_id(image).await?.is_some())
    }

    /// The id of the image that the reference names on this host. Empty if Docker does not tell it, `None` if there is
    /// no such image.
    ///
    /// # Errors
    /// When the call fails.
    pub(crate) async fn image_id(&self, image: &ImageRef) -> Result<Option<String>> {
        let docker = self.client.library(IMAGE)?;
        let found = limited(IMAGE, READ_LIMIT, docker.inspect_image(&image.to_string())).await;
        Ok(absent_is_none(found)?.map(|found| found.id.unwrap_or_default()))
    }

    /// Pulls an image. Reports to `progress` at each step the bytes received and the bytes known to be due.
    ///
    /// # Errors
    /// When the call fails; [`DockerError::TimedOut`] after two minutes without progress.
    pub async fn pull(&self, image: &ImageRef, mut progress: impl FnMut(u64, u64)) -> Result<()> {
        let docker = self.client.library(PULL)?;
        let options = query::CreateImageOptions {
            from_image: Some(image.repository().to_owned()),
            tag: Some(image.tag_or_digest().to_owned()),
            ..Default::default()
        };
        let mut layers = HashMap::<String, (u64, u64)>::new();
        let mut steps = std::pin::pin!(docker.create_image(Some(options), None, None));
        loop {
            let step = timeout(PULL_SILENCE, steps.next()).await;
            let step = step.map_err(|_| DockerError::TimedOut { call: PULL, limit: PULL_SILENCE })?;
            let Some(step) = step else { return Ok(()) };
            let step = step.map_err(|error| sort(PULL, error))?;
            if let (Some(layer), Some(detail), Some("Downloading")) =
                (step.id, step.progress_detail, step.status.as_deref())
            {
                let bytes = |number: Option<i64>| number.and_then(|n| u64::try_from(n).ok()).unwrap_or_default();
                layers.insert(layer, (bytes(detail.current), bytes(detail.total)));
            }
            let (come, due) = layers.values().fold((0, 0), |sum, layer| (sum.0 + layer.0, sum.1 + layer.1));
            progress(come, due);
        }
    }

    /// Creates a container without starting it. Returns its id.
    ///
    /// # Errors
    /// [`DockerError::Conflict`] when the name is taken, [`DockerError::NotFound`] when the image is missing.
    pub async fn create(&self, name: &str, spec: &Spec) -> Result<String> {
        let docker = self.client.library(CREATE)?;
        let options = query::CreateContainerOptions { name: Some(name.to_owned()), ..Default::default() };
        limited(CREATE, CHANGE_LIMIT, docker.create_container(Some(options), spec.body())).await.map(|made| made.id)
    }

    /// Starts a container. Succeeds if it already runs.
    ///
    /// # Errors
    /// [`DockerError::NotFound`] also when its network is gone.
    pub async fn start(&self, id: &str) -> Result<()> {
        self.client.start(START, id).await
    }

    /// Stops a container, with SIGKILL after `grace`. Succeeds if it is not running or does not exist.
    ///
    /// # Errors
    /// When the call fails.
    pub async fn stop(&self, id: &str, grace: Duration) -> Result<()> {
        self.client.stop(STOP, id, Some(grace), Duration::ZERO).await
    }

    /// Stops the agent's own container with the timeout it was created with. Rarely returns.
    ///
    /// # Errors
    /// When the call fails.
    pub async fn stop_self(&self, id: &str) -> Result<()> {
        self.client.stop(SELF_STOP, id, None, Duration::ZERO).await
    }

    /// Stops a container with the timeout it was created with, then with SIGKILL.
    ///
    /// # Errors
    /// When the call fails.
    pub(crate) async fn stop_as_made(&self, id: &str) -> Result<()> {
        self.client.stop(STOP, id, None, Duration::from_secs(MOST_PATIENCE)).await
    }

    /// Restarts a container, with SIGKILL after `grace`.
    ///
    /// # Errors
    /// When the call fails.
    pub async fn restart(&self, id: &str, grace: Duration) -> Result<()> {
        self.client.restart(RESTART, id, Some(grace), Duration::ZERO).await
    }

    /// Renames a container.
    ///
    /// # Errors
    /// [`DockerError::Conflict`] when the name is taken.
    pub async fn rename(&self, id: &str, to: &str) -> Result<()> {
        let docker = self.client.library(RENAME)?;
        let options = query::RenameContainerOptions { name: to.to_owned() };
        limited(RENAME, CHANGE_LIMIT, docker.rename_container(id, options)).await
    }

    /// Connects a container to another network, with an alias that shows that the agent did it (`Endpoint::is_joined`).
    /// Succeeds if the container is already connected, and leaves that connection to whoever made it.
    ///
    /// # Errors
    /// [`DockerError::NotFound`] when the container or the network is gone.
    pub async fn connect(&self, network: &str, id: &str) -> Result<()> {
        self.connect_as(JOINED, network, id).await
    }

    /// Connects a container that has not started yet to the network on which it will serve its metrics.
    ///
    /// # Errors
    /// As [`Docker::connect`].
    pub async fn place(&self, place: &MetricsPlace, id: &str) -> Result<()> {
        self.connect_as(&place.name, &place.network, id).await
    }

    async fn connect_as(&self, alias: &str, network: &str, id: &str) -> Result<()> {
        let docker = self.client.library(CONNECT)?;
        let endpoint = models::EndpointSettings { aliases: Some(vec![alias.to_owned()]), ..Default::default() };
        let request = models::NetworkConnectRequest { container: id.to_owned(), endpoint_config: Some(endpoint) };
        match limited(CONNECT, CHANGE_LIMIT, docker.connect_network(network, request)).await {
            // Docker itself also answers 403: "endpoint with name … already exists in network …".
            Err(DockerError::Forbidden { .. }) if self.is_on(id, network).await => Ok(()),
            connected => connected,
        }
    }

    /// Disconnects a container from a network. Succeeds if it is not connected, or if either does not exist.
    ///
    /// # Errors
    /// When the call fails.
    pub async fn disconnect(&self, network: &str, id: &str) -> Result<()> {
        let docker = self.client.library(DISCONNECT)?;
        let request = models::NetworkDisconnectRequest { container: id.to_owned(), ..Default::default() };
        match limited(DISCONNECT, CHANGE_LIMIT, docker.disconnect_network(network, request)).await {
            Ok(()) | Err(DockerError::NotFound { .. }) => Ok(()),
            Err(error) if error.is_away() || self.is_on(id, network).await => Err(error),
            Err(_) => Ok(()),
        }
    }

    async fn is_on(&self, id: &str, network: &str) -> bool {
        matches!(self.inspect(id).await, Ok(Some(found)) if found.networks.contains_key(network))
    }

    /// Removes a container, and kills it if it runs. Succeeds if it does not exist.
    ///
    /// # Errors
    /// When the call fails.
    pub async fn remove(&self, id: &str) -> Result<()> {
        let docker = self.client.library(REMOVE)?;
        let options = query::RemoveContainerOptions { force: true, ..Default::default() };
        absent_is_none(limited(REMOVE, CHANGE_LIMIT, docker.remove_container(id, Some(options))).await).map(drop)
    }
}

/// Back-off while Docker does not answer: short at first, because Docker may only have restarted.
pub(crate) fn reconnect_backoff() -> Backoff {
    Backoff::new(Duration::from_millis(500), Duration::from_secs(15))
}
