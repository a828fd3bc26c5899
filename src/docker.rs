//! The one door to Docker: every call the agent makes of the Engine, and no others.
//!
//! Nothing else imports the client library. Each call has a time limit that covers its whole answer, and each
//! failure is sorted into what a caller does about it ([`DockerError`]); a refusal names the socket proxy's
//! variable that would allow the call. No connection is kept for a second call, so that one that a proxy closed
//! in the meantime is never used for a call that must not be made twice. A container is looked for by its name and
//! acted upon by the id that was seen: somebody else's may have taken the name in between. What people can write into
//! without end, as labels, is read into little memory (`sieve`).

use std::collections::{BTreeMap, HashMap};
use std::sync::Mutex;
use std::time::Duration;

use bollard::models;
use bollard::query_parameters as query;
use dockflare_engine::{CHANGE_LIMIT, Client, READ_LIMIT, absent_is_none, limited};
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
pub use types::{Action, Container, Endpoint, Event, Health, Inspected, LastCheck, RunState, Version};
pub(crate) use types::{JOINED, Placed};

/// A Docker Engine, or the part of it that a socket proxy lets through.
#[derive(Debug)]
pub struct Docker {
    client: Client,
    /// Whether this project's own socket proxy answered last, where that was seen. No await happens under it.
    own_proxy: Mutex<Option<bool>>,
    /// Held by whoever makes a network.
    making_a_network: tokio::sync::Mutex<()>,
}

type Result<T> = std::result::Result<T, DockerError>;

/// Longest silence of a pull before it counts as stuck.
const PULL_SILENCE: Duration = Duration::from_secs(120);
/// The kinds of things whose events are asked for.
pub(crate) const EVENT_TYPES: [&str; 2] = ["container", "network"];

impl Docker {
    /// Nothing is asked of Docker yet.
    pub fn new(host: DockerHost) -> Self {
        Self { client: Client::new(host), own_proxy: Mutex::new(None), making_a_network: tokio::sync::Mutex::default() }
    }

    /// The address, for the log.
    pub fn host(&self) -> &DockerHost {
        self.client.host()
    }

    /// Running containers that carry one of the two keys, whatever its value: the filter compares exactly.
    ///
    /// # Errors
    /// An answer that is not whole is an error, never a short list.
    pub async fn list_with_label_keys(&self, keys: &[&str]) -> Result<Vec<Container>> {
        let mut found = BTreeMap::new();
        // Filters of one kind must all hold, so each key is a listing of its own.
        for key in keys {
            for container in self.client.listed(LIST, false, Some(key)).await? {
                let container = Container::from(container);
                found.insert(container.id.clone(), container);
            }
        }
        Ok(found.into_values().collect())
    }

    /// Containers that agents have made, running or not, whatever they are called by now.
    ///
    /// # Errors
    /// As all calls.
    pub(crate) async fn list_made(&self) -> Result<Vec<Container>> {
        Ok(self.client.listed(LIST, true, Some(OWNER_LABEL.0)).await?.into_iter().map(Container::from).collect())
    }

    /// All running containers, whosever they are.
    ///
    /// # Errors
    /// An answer that is not whole is an error, never a short list.
    pub async fn list_running(&self) -> Result<Vec<Container>> {
        Ok(self.client.listed(LIST, false, None).await?.into_iter().map(Container::from).collect())
    }

    /// Where the running containers are that carry one of the two keys.
    ///
    /// # Errors
    /// As all calls.
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

    /// What Engine this is.
    ///
    /// # Errors
    /// As all calls.
    pub async fn version(&self) -> Result<Version> {
        let docker = self.client.library(VERSION)?;
        limited(VERSION, READ_LIMIT, docker.version()).await.map(Version::from)
    }

    /// What the host is called.
    ///
    /// # Errors
    /// As all calls.
    pub(crate) async fn host_name(&self) -> Result<String> {
        self.client.host_name(INFO).await
    }

    /// Events of containers and networks from now on, or from `since` (seconds and nanoseconds of the Engine's
    /// clock) to bridge a gap. The stream may be silent for hours; its end and its errors mean "connect again".
    ///
    /// # Errors
    /// When Docker cannot be called at all; what happens to the stream comes out of the stream.
    pub fn events(&self, since: Option<String>) -> Result<impl Stream<Item = Result<Event>> + use<>> {
        let told = self.client.told(EVENTS, since.as_deref(), &EVENT_TYPES, &EVENT_ACTIONS)?;
        Ok(told.map_ok(Event::from))
    }

    /// A container by name or id; `None` when there is none.
    ///
    /// # Errors
    /// As all calls.
    pub async fn inspect(&self, name: &str) -> Result<Option<Inspected>> {
        Ok(absent_is_none(self.client.inspected(INSPECT, name).await)?.map(Inspected::from))
    }

    /// The first lines that a container wrote from this second of 1970 on, both streams, at most `lines`.
    ///
    /// # Errors
    /// As all calls.
    pub async fn log_start(&self, id: &str, since: i64, lines: usize) -> Result<Vec<String>> {
        self.log(id, since, "all".to_owned(), lines).await
    }

    /// The last of them, at most `lines`.
    ///
    /// # Errors
    /// As all calls.
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
    /// As all calls.
    pub async fn has_network(&self, name: &str) -> Result<bool> {
        let docker = self.client.library(NETWORK)?;
        let found = limited(NETWORK, READ_LIMIT, docker.inspect_network(name, None)).await;
        Ok(absent_is_none(found)?.is_some())
    }

    /// Creates a bridge network, one with a way out or an internal one, unless there is one of that name by now: up to
    /// Engine 24 Docker makes as many of a name as it is asked for, and two of this process may ask at the same time.
    ///
    /// # Errors
    /// As all calls.
    pub(crate) async fn make_network(&self, name: &str, internal: bool) -> Result<bool> {
        let _alone = self.making_a_network.lock().await;
        if self.has_network(name).await? {
            return Ok(false);
        }
        self.create_network(name, internal, &owner_labels()).await.map(|()| true)
    }

    /// Creates a bridge network, one with a way out or an internal one. Its being there already is a success.
    ///
    /// # Errors
    /// As all calls.
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
    /// As all calls.
    pub async fn has_image(&self, image: &ImageRef) -> Result<bool> {
        Ok(self.image_id(image).await?.is_some())
    }

    /// What the reference means on this host: the image's id, empty where that is not told, `None` where there is none.
    ///
    /// # Errors
    /// As all calls.
    pub(crate) async fn image_id(&self, image: &ImageRef) -> Result<Option<String>> {
        let docker = self.client.library(IMAGE)?;
        let found = limited(IMAGE, READ_LIMIT, docker.inspect_image(&image.to_string())).await;
        Ok(absent_is_none(found)?.map(|found| found.id.unwrap_or_default()))
    }

    /// Pulls an image, telling `progress` at each step the bytes that came and the bytes that are known to be due.
    ///
    /// # Errors
    /// As all calls; [`DockerError::TimedOut`] when nothing moves for two minutes.
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

    /// Creates a container, without starting it. Gives its id.
    ///
    /// # Errors
    /// [`DockerError::Conflict`] when the name is taken, [`DockerError::NotFound`] when the image is missing.
    pub async fn create(&self, name: &str, spec: &Spec) -> Result<String> {
        let docker = self.client.library(CREATE)?;
        let options = query::CreateContainerOptions { name: Some(name.to_owned()), ..Default::default() };
        limited(CREATE, CHANGE_LIMIT, docker.create_container(Some(options), spec.body())).await.map(|made| made.id)
    }

    /// Starts a container; its running already is a success.
    ///
    /// # Errors
    /// [`DockerError::NotFound`] also when its network is gone.
    pub async fn start(&self, id: &str) -> Result<()> {
        self.client.start(START, id).await
    }

    /// Stops a container, with SIGKILL after `grace`; its not running is a success, as is its not being there.
    ///
    /// # Errors
    /// As all calls.
    pub async fn stop(&self, id: &str, grace: Duration) -> Result<()> {
        self.client.stop(STOP, id, Some(grace), Duration::ZERO).await
    }

    /// Stops the agent's own container with the time-out it was created with. Rarely returns.
    ///
    /// # Errors
    /// As all calls.
    pub async fn stop_self(&self, id: &str) -> Result<()> {
        self.client.stop(SELF_STOP, id, None, Duration::ZERO).await
    }

    /// Stops a container as it was made to be stopped: with SIGKILL after its own time-out.
    ///
    /// # Errors
    /// As all calls.
    pub(crate) async fn stop_as_made(&self, id: &str) -> Result<()> {
        self.client.stop(STOP, id, None, Duration::from_secs(MOST_PATIENCE)).await
    }

    /// Restarts a container, with SIGKILL after `grace`.
    ///
    /// # Errors
    /// As all calls.
    pub async fn restart(&self, id: &str, grace: Duration) -> Result<()> {
        self.client.restart(RESTART, id, Some(grace), Duration::ZERO).await
    }

    /// Gives a container another name.
    ///
    /// # Errors
    /// [`DockerError::Conflict`] when the name is taken.
    pub async fn rename(&self, id: &str, to: &str) -> Result<()> {
        let docker = self.client.library(RENAME)?;
        let options = query::RenameContainerOptions { name: to.to_owned() };
        limited(RENAME, CHANGE_LIMIT, docker.rename_container(id, options)).await
    }

    /// Connects a container to one more network, so that it can be told that it was the agent who did
    /// (`Endpoint::is_joined`); its being there already is a success, and stays whose it is.
    ///
    /// # Errors
    /// [`DockerError::NotFound`] when one of the two is gone.
    pub async fn connect(&self, network: &str, id: &str) -> Result<()> {
        self.connect_as(JOINED, network, id).await
    }

    /// Connects a container that has not started yet to the network where its metrics are served.
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
            // Docker itself says 403 as well: "endpoint with name … already exists in network …".
            Err(DockerError::Forbidden { .. }) if self.is_on(id, network).await => Ok(()),
            connected => connected,
        }
    }

    /// Disconnects a container from a network; its not being there, or the network's, is a success.
    ///
    /// # Errors
    /// As all calls.
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

    /// Removes a container, killing it when it runs; its not being there is a success.
    ///
    /// # Errors
    /// As all calls.
    pub async fn remove(&self, id: &str) -> Result<()> {
        let docker = self.client.library(REMOVE)?;
        let options = query::RemoveContainerOptions { force: true, ..Default::default() };
        absent_is_none(limited(REMOVE, CHANGE_LIMIT, docker.remove_container(id, Some(options))).await).map(drop)
    }
}

/// Waits for Docker to answer again: quick at first, since it may only have been restarted.
pub(crate) fn reconnect_backoff() -> Backoff {
    Backoff::new(Duration::from_millis(500), Duration::from_secs(15))
}
