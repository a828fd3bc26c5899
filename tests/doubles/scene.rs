//! A double of Docker, a double of a master, and an agent between them that tests can kill and start again.

use std::collections::BTreeMap;
use std::future::Future;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use dockflare_agent::RunError;
use dockflare_agent::config::Config;
use dockflare_dev_master::{Agent, DevMaster, Protocol, Request};
use testkit::FakeDocker;
use tokio_util::sync::CancellationToken;

/// Longest wait for anything that should take moments. A busy machine may need it.
pub(crate) const SOON: Duration = Duration::from_secs(30);

pub(crate) struct Scene {
    pub(crate) master: DevMaster,
    pub(crate) docker: FakeDocker,
    config: Config,
    data: tempfile::TempDir,
    life: Option<Life>,
}

/// One run of the agent, on its own thread and runtime as in the program. Dropping the runtime ends all of the agent's
/// tasks wherever they are, as a SIGKILL would.
struct Life {
    killed: CancellationToken,
    thread: JoinHandle<Option<Result<(), RunError>>>,
}

impl Scene {
    /// Sets the scene without starting an agent. The agent will report and look every `interval`, which may be shorter
    /// than an operator may set.
    pub(crate) async fn new(protocol: Protocol, interval: Duration) -> Result<Self> {
        let master = DevMaster::builder().protocol(protocol).start().await?;
        let (docker, data) = (FakeDocker::start()?, tempfile::tempdir()?);
        let vars = [
            ("DOCKFLARE_MASTER_URL", master.url()),
            ("DOCKFLARE_API_KEY", master.generate_key("test")),
            ("DOCKFLARE_DATA_DIR", data.path().display().to_string()),
            ("DOCKER_HOST", docker.host_url()),
            ("HEALTH_CHECK_PORT", "0".to_owned()),
        ];
        let mut config = Config::from_vars(vars.map(|(name, value)| (name.to_owned(), value)))?.config;
        config.report_interval = interval;
        config.poll_interval = Duration::from_secs(1);
        Ok(Self { master, docker, config, data, life: None })
    }

    pub(crate) fn start(&mut self) -> Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (config, killed) = (self.config.clone(), CancellationToken::new());
        let end = killed.clone();
        let run = async move {
            end.run_until_cancelled(dockflare_agent::run(
                config,
                dockflare_agent::logging::Ring::default(),
                CancellationToken::new(),
            ))
            .await
        };
        self.life = Some(Life { killed, thread: std::thread::spawn(move || runtime.block_on(run)) });
        Ok(())
    }

    /// Ends the agent without warning.
    pub(crate) async fn kill(&mut self) -> Result<()> {
        let life = self.life.take().context("no agent runs")?;
        life.killed.cancel();
        // The agent may be in the middle of a blocking step. Join on another thread, so that this runtime goes on.
        let ended = tokio::task::spawn_blocking(move || life.thread.join()).await?;
        match ended {
            Ok(None) => Ok(()),
            Ok(Some(ended)) => bail!("the agent has ended by itself: {ended:?}"),
            Err(_) => bail!("the agent has panicked"),
        }
    }

    /// What the master believes about the agent that runs here. A v1 master may know other agents too: it makes one
    /// for each registration whose answer got lost.
    pub(crate) fn known(&self) -> Option<Agent> {
        let id = std::fs::read_to_string(self.data.path().join("agent_id.txt")).ok()?;
        self.master.snapshot().agent(id.trim()).cloned()
    }

    /// The containers that the master believes run, as id and name.
    fn believed(&self) -> BTreeMap<String, String> {
        let containers = self.known().map(|agent| agent.containers).unwrap_or_default();
        containers.into_iter().map(|(id, container)| (id, container.name)).collect()
    }

    /// Waits until the master believes what Docker runs, and returns how long that took.
    pub(crate) async fn agreed(&self, within: Duration) -> Result<Duration> {
        let began = Instant::now();
        let agree = |()| (self.believed() == self.docker.running()).then_some(());
        let seen = self.master.wait_for("the master's picture to be Docker's", within, |_| agree(())).await;
        seen.with_context(|| {
            format!("Docker runs {:?}\nthe master believes {:?}", self.docker.running(), self.believed())
        })?;
        Ok(began.elapsed())
    }

    /// Waits until the agent listens to Docker's events.
    pub(crate) async fn listens(&self) -> Result<()> {
        testkit::wait_until("the agent to listen", SOON, async || (self.docker.listeners() > 0).then_some(())).await
    }

    /// Waits for this many more complete reports.
    pub(crate) async fn more_reports(&self, more: u64) -> Result<()> {
        let count = || self.known().map_or(0, |agent| agent.complete_reports);
        let enough = count() + more;
        self.master.wait_for("complete reports", SOON, |_| (count() >= enough).then_some(())).await
    }

    /// Asserts that every complete report has the containers that ran all the time, and that no event said they
    /// stopped. Asserts also that the master recorded no violation, and that the agent did not end by itself.
    pub(crate) fn assert_never_missed(&self, always: &[String]) -> Result<()> {
        for request in self.master.requests() {
            let names = |id: &String| request.body.to_string().contains(id.as_str());
            match request.event() {
                Some("container_stop") => ensure!(!always.iter().any(names), "a stop that never was: {request}"),
                Some("status_report") if is_complete(&request) => {
                    ensure!(always.iter().all(names), "a report without what runs: {request} {}", request.body);
                }
                _ => {}
            }
        }
        let violations = self.master.violations();
        ensure!(violations.is_empty(), "{violations:#?}");
        let ended = self.life.as_ref().is_some_and(|life| life.thread.is_finished());
        ensure!(!ended, "the agent has ended by itself");
        Ok(())
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        if let Some(life) = self.life.take() {
            life.killed.cancel();
        }
    }
}

fn is_complete(request: &Request) -> bool {
    request.body["inventory_complete"] == true || request.body.get("inventory_complete").is_none()
}

/// Runs a test with each kind of master, both at once.
pub(crate) async fn with_both<F: Future<Output = Result<()>>>(test: impl Fn(Protocol) -> F) {
    let run = async |protocol| test(protocol).await.unwrap_or_else(|error| panic!("{protocol}: {error:#}"));
    futures_util::future::join(run(Protocol::V1), run(Protocol::V2)).await;
}
