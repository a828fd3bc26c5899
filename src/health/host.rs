//! What the supervisor sees and touches: Docker, and cloudflared's own pages. The tests use a double of it, in which
//! half an hour passes in a moment and the agent may crash between any two calls.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use super::probe::{Facts, Probe, Readiness};
use crate::channels::OwnContainer;
use crate::config::ImageRef;
use crate::docker::{Container, Docker, DockerError, Inspected, MetricsPlace, Parting, Spec};
use crate::state::AgentId;

type Answer<T> = Result<T, DockerError>;

/// The supervisor's calls; [`Docker`] describes its own. A call that changes something takes an id that was inspected,
/// never a name.
#[allow(missing_docs, reason = "each is the call of the same name")]
pub(crate) trait Host: Send + Sync + 'static {
    fn inspect(&self, name: &str) -> impl Future<Output = Answer<Option<Inspected>>> + Send;
    fn made(&self) -> impl Future<Output = Answer<Vec<Container>>> + Send;
    fn log_start(&self, id: &str, since: i64, lines: usize) -> impl Future<Output = Answer<Vec<String>>> + Send;
    fn log_tail(&self, id: &str, since: i64, lines: usize) -> impl Future<Output = Answer<Vec<String>>> + Send;
    fn has_network(&self, name: &str) -> impl Future<Output = Answer<bool>> + Send;
    /// Returns whether the network is new.
    fn create_network(&self, name: &str, internal: bool) -> impl Future<Output = Answer<bool>> + Send;
    fn connect(&self, network: &str, id: &str) -> impl Future<Output = Answer<()>> + Send;
    fn place(&self, place: &MetricsPlace, id: &str) -> impl Future<Output = Answer<()>> + Send;
    fn disconnect(&self, network: &str, id: &str) -> impl Future<Output = Answer<()>> + Send;
    fn has_image(&self, image: &ImageRef) -> impl Future<Output = Answer<bool>> + Send;
    fn image_id(&self, image: &ImageRef) -> impl Future<Output = Answer<Option<String>>> + Send;
    fn pull(&self, image: &ImageRef, progress: impl FnMut(u64, u64) + Send) -> impl Future<Output = Answer<()>> + Send;
    fn create(&self, name: &str, spec: &Spec) -> impl Future<Output = Answer<String>> + Send;
    fn start(&self, id: &str) -> impl Future<Output = Answer<()>> + Send;
    fn stop(&self, id: &str, grace: Duration) -> impl Future<Output = Answer<()>> + Send;
    fn restart(&self, id: &str, grace: Duration) -> impl Future<Output = Answer<()>> + Send;
    fn rename(&self, id: &str, to: &str) -> impl Future<Output = Answer<()>> + Send;
    fn remove(&self, id: &str) -> impl Future<Output = Answer<()>> + Send;
    /// `GET /ready` of the cloudflared at this address.
    fn readiness(&self, address: &str) -> impl Future<Output = Readiness> + Send;
    /// The facts from `/metrics` of the cloudflared at this address; `None` if it does not answer.
    fn facts(&self, address: &str) -> impl Future<Output = Option<Facts>> + Send;
    /// The protocol of the connections of the cloudflared at this address. cloudflared logs each such request.
    fn protocol(&self, address: &str) -> impl Future<Output = Option<&'static str>> + Send;
    /// Says goodbye to the agent's own socket proxy. The proxy is to keep for this long what agents with these ids
    /// made.
    fn goodbye(&self, lease: Duration, agents: &[AgentId]) -> impl Future<Output = Parting> + Send;
    /// The container that the agent itself runs in.
    fn own_container(&self, hostname: Option<&str>) -> impl Future<Output = Option<OwnContainer>> + Send;
}

/// The real Docker and cloudflared.
#[derive(Debug)]
pub(crate) struct Machine {
    docker: Arc<Docker>,
    probe: Probe,
}

impl Machine {
    pub(super) fn new(docker: Arc<Docker>) -> Result<Self, reqwest::Error> {
        Ok(Self { docker, probe: Probe::new()? })
    }
}

impl Host for Machine {
    async fn inspect(&self, name: &str) -> Answer<Option<Inspected>> {
        self.docker.inspect(name).await
    }
    async fn made(&self) -> Answer<Vec<Container>> {
        self.docker.list_made().await
    }
    async fn log_start(&self, id: &str, since: i64, lines: usize) -> Answer<Vec<String>> {
        self.docker.log_start(id, since, lines).await
    }
    async fn log_tail(&self, id: &str, since: i64, lines: usize) -> Answer<Vec<String>> {
        self.docker.log_tail(id, since, lines).await
    }
    async fn has_network(&self, name: &str) -> Answer<bool> {
        self.docker.has_network(name).await
    }
    async fn create_network(&self, name: &str, internal: bool) -> Answer<bool> {
        self.docker.make_network(name, internal).await
    }
    async fn connect(&self, network: &str, id: &str) -> Answer<()> {
        self.docker.connect(network, id).await
    }
    async fn place(&self, place: &MetricsPlace, id: &str) -> Answer<()> {
        self.docker.place(place, id).await
    }
    async fn disconnect(&self, network: &str, id: &str) -> Answer<()> {
        self.docker.disconnect(network, id).await
    }
    async fn has_image(&self, image: &ImageRef) -> Answer<bool> {
        self.docker.has_image(image).await
    }
    async fn image_id(&self, image: &ImageRef) -> Answer<Option<String>> {
        self.docker.image_id(image).await
    }
    async fn pull(&self, image: &ImageRef, progress: impl FnMut(u64, u64) + Send) -> Answer<()> {
        self.docker.pull(image, progress).await
    }
    async fn create(&self, name: &str, spec: &Spec) -> Answer<String> {
        self.docker.create(name, spec).await
    }
    async fn start(&self, id: &str) -> Answer<()> {
        self.docker.start(id).await
    }
    async fn stop(&self, id: &str, grace: Duration) -> Answer<()> {
        self.docker.stop(id, grace).await
    }
    async fn restart(&self, id: &str, grace: Duration) -> Answer<()> {
        self.docker.restart(id, grace).await
    }
    async fn rename(&self, id: &str, to: &str) -> Answer<()> {
        self.docker.rename(id, to).await
    }
    async fn remove(&self, id: &str) -> Answer<()> {
        self.docker.remove(id).await
    }
    async fn readiness(&self, address: &str) -> Readiness {
        self.probe.readiness(address).await
    }
    async fn facts(&self, address: &str) -> Option<Facts> {
        self.probe.facts(address).await
    }
    async fn protocol(&self, address: &str) -> Option<&'static str> {
        self.probe.protocol(address).await
    }
    async fn goodbye(&self, lease: Duration, agents: &[AgentId]) -> Parting {
        self.docker.goodbye(lease, agents).await
    }
    async fn own_container(&self, hostname: Option<&str>) -> Option<OwnContainer> {
        super::own_container(&self.docker, hostname).await
    }
}
