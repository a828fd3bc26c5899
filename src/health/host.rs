//! What the supervisor sees and touches: Docker, and cloudflared's own pages. The tests have a double of it, with
//! which half an hour passes in a moment and a crash may come between any two calls.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use std::collections::BTreeMap;

use super::probe::{Facts, Probe, Readiness};
use crate::channels::OwnContainer;
use crate::config::ImageRef;
use crate::docker::{Docker, DockerError, Inspected, Spec};

type Answer<T> = Result<T, DockerError>;

/// The calls; those of Docker are described at [`Docker`].
#[allow(missing_docs, reason = "each is the call of the same name")]
pub(crate) trait Host: Send + Sync + 'static {
    fn inspect(&self, name: &str) -> impl Future<Output = Answer<Option<Inspected>>> + Send;
    fn log_start(&self, name: &str, since: i64, lines: usize) -> impl Future<Output = Answer<Vec<String>>> + Send;
    fn log_tail(&self, name: &str, since: i64, lines: usize) -> impl Future<Output = Answer<Vec<String>>> + Send;
    fn has_network(&self, name: &str) -> impl Future<Output = Answer<bool>> + Send;
    fn create_network(&self, name: &str, labels: &BTreeMap<String, String>) -> impl Future<Output = Answer<()>> + Send;
    fn connect(&self, network: &str, container: &str) -> impl Future<Output = Answer<()>> + Send;
    fn has_image(&self, image: &ImageRef) -> impl Future<Output = Answer<bool>> + Send;
    fn pull(&self, image: &ImageRef, progress: impl FnMut(u64, u64) + Send) -> impl Future<Output = Answer<()>> + Send;
    fn create(&self, name: &str, spec: &Spec) -> impl Future<Output = Answer<()>> + Send;
    fn start(&self, name: &str) -> impl Future<Output = Answer<()>> + Send;
    fn stop(&self, name: &str, grace: Duration) -> impl Future<Output = Answer<()>> + Send;
    fn restart(&self, name: &str, grace: Duration) -> impl Future<Output = Answer<()>> + Send;
    fn rename(&self, name: &str, to: &str) -> impl Future<Output = Answer<()>> + Send;
    fn remove(&self, name: &str) -> impl Future<Output = Answer<()>> + Send;
    /// `GET /ready` of the cloudflared at this address.
    fn readiness(&self, address: &str) -> impl Future<Output = Readiness> + Send;
    /// What the other pages of the cloudflared at this address say.
    fn facts(&self, address: &str) -> impl Future<Output = Facts> + Send;
    /// The container in which the agent itself runs.
    fn own_container(&self, hostname: Option<&str>) -> impl Future<Output = Option<OwnContainer>> + Send;
}

/// The real one.
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
    async fn log_start(&self, name: &str, since: i64, lines: usize) -> Answer<Vec<String>> {
        self.docker.log_start(name, since, lines).await
    }
    async fn log_tail(&self, name: &str, since: i64, lines: usize) -> Answer<Vec<String>> {
        self.docker.log_tail(name, since, lines).await
    }
    async fn has_network(&self, name: &str) -> Answer<bool> {
        self.docker.has_network(name).await
    }
    async fn create_network(&self, name: &str, labels: &BTreeMap<String, String>) -> Answer<()> {
        self.docker.create_network(name, labels).await
    }
    async fn connect(&self, network: &str, container: &str) -> Answer<()> {
        self.docker.connect(network, container).await
    }
    async fn has_image(&self, image: &ImageRef) -> Answer<bool> {
        self.docker.has_image(image).await
    }
    async fn pull(&self, image: &ImageRef, progress: impl FnMut(u64, u64) + Send) -> Answer<()> {
        self.docker.pull(image, progress).await
    }
    async fn create(&self, name: &str, spec: &Spec) -> Answer<()> {
        self.docker.create(name, spec).await.map(drop)
    }
    async fn start(&self, name: &str) -> Answer<()> {
        self.docker.start(name).await
    }
    async fn stop(&self, name: &str, grace: Duration) -> Answer<()> {
        self.docker.stop(name, grace).await
    }
    async fn restart(&self, name: &str, grace: Duration) -> Answer<()> {
        self.docker.restart(name, grace).await
    }
    async fn rename(&self, name: &str, to: &str) -> Answer<()> {
        self.docker.rename(name, to).await
    }
    async fn remove(&self, name: &str) -> Answer<()> {
        self.docker.remove(name).await
    }
    async fn readiness(&self, address: &str) -> Readiness {
        self.probe.readiness(address).await
    }
    async fn facts(&self, address: &str) -> Facts {
        self.probe.facts(address).await
    }
    async fn own_container(&self, hostname: Option<&str>) -> Option<OwnContainer> {
        super::own_container(&self.docker, hostname).await
    }
}
