//! DockFlare Agent: makes a Docker host reachable through Cloudflare Tunnel, and never loses it.
//!
//! Five tasks run side by side and talk only through channels. Four of them do the work:
//!
//! ```text
//!  master ──commands──> tunnels ──write, then publish──> [Wanted] ──> health ──plan, act──> Docker: the tunnel container
//!    ^                                                                  │
//!    │                                                               [View]
//!    │                                                                  v
//!    └──────────── one ordered sender ───────────────────────────── reports <──changes── events <──── Docker: events, listing
//! ```
//!
//! - [`tunnels`] polls commands and owns the tunnel spec and the file that stores it. It never touches Docker.
//! - [`reports`] sends everything to the master, and owns the order and the retries. It decides nothing.
//! - [`events`] owns the inventory of labelled containers. It never talks to the master.
//! - [`health`] owns the tunnel container and its status. It never reads a command.
//!
//! The fifth, [`neighbours`], watches the surroundings of the tunnel container: whether it can reach each labelled
//! container, and whether another connector serves the same tunnel. It reports and decides nothing. It publishes
//! [`channels::Ways`], which the page shows and which names the networks that the supervisor may connect.
//!
//! The tasks do not know each other. They know only what travels between them: [`channels`]. One table lists why a
//! tunnel can be down and what the agent does about it: [`cause`].
//!
//! Around the tasks:
//!
//! - [`config`] checks the environment as a whole.
//! - [`registration`] owns the agent's identity at its master.
//! - [`cloudflare`] turns the master's rules into ingress rules.
//! - [`page`] serves `GET /health`, `/metrics` and others.
//! - [`metrics`] counts, [`concerns`] lists the current problems, [`pulse`] watches that each task is alive.
//! - [`master`] is the only way to the master, [`docker`] the only way to Docker, [`state`] the only way to the data
//!   folder.
//! - All share `labels`, and the crate [`dockflare_host`], the base of every program of the project: log, signals,
//!   waits, pages, HTTP clients.
//!
//! [`socket_proxy`] is another program in the same binary. It holds the Docker socket in a container of its own, and
//! the agent reaches Docker through it. Of the above it knows only what the agent asks of Docker and reads in its
//! answers.
//!
//! `arrival` comes before the first request to the master. It joins the tunnel's network with the agent's own container
//! (`membership`), because the master may be known only there, and finds a name for the agent ([`introduction`]).
//! `pending` comes after that request and logs what to do until somebody has enrolled the agent.
//!
//! Two subcommands start none of this: [`check`] tries each thing that the agent needs and changes nothing, and
//! [`bundle`] gathers what helps to diagnose a problem.
//!
//! The agent may be killed at any instant. It writes the spec to disk before it acts on it, and finds out everything
//! else again by looking. Commands and events only change the spec or the observed status and wake a loop. The loop
//! compares the two and acts.

#![cfg_attr(
    test,
    allow(clippy::disallowed_methods, clippy::disallowed_types, clippy::disallowed_macros, reason = "tests may block")
)]

use std::error::Error;
use std::sync::Arc;
use std::time::{Duration, Instant};

use dockflare_host::{container, http, retry};
pub use dockflare_host::{error_chain, logging, pulse, signals};
use tokio::sync::{mpsc, watch};
use tokio::task::{JoinError, JoinHandle};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

mod arrival;
mod banner;
pub mod bundle;
pub mod cause;
pub mod channels;
pub mod check;
pub mod cloudflare;
pub mod concerns;
pub mod config;
pub mod docker;
pub mod events;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing;
pub mod health;
#[cfg(test)]
mod hostile;
pub mod introduction;
mod labels;
pub mod master;
mod membership;
pub mod metrics;
pub mod neighbours;
pub mod page;
mod pending;
pub mod registration;
pub mod reports;
pub mod socket_proxy;
pub mod state;
pub mod tunnels;

use channels::{Inventory, View, Wanted, Ways};
use concerns::Concerns;
use config::{Config, OnExit, TunnelConfig};
use logging::Ring;
use metrics::Metrics;
use pulse::Pulse;
use state::{DesiredState, Found, Phase, Store, TunnelState};

/// Why the agent could not start, or ended without being asked to.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The configuration is well-formed but cannot be used here.
    #[error("{0}")]
    Config(String),
    /// The data folder cannot be used, or another agent uses it.
    #[error(transparent)]
    DataFolder(#[from] state::StateError),
    /// A task ended that must never end: a bug in the agent.
    #[error(
        "the task {0} ended, which it must not: this is a mistake in the agent, please report it with the lines above"
    )]
    Task(&'static str),
    /// Docker has created a new socket, and the one that is mounted here is dead.
    #[error(
        "nobody listens any more on the Docker socket that is mounted here as {0}, since Docker has made a new one: ending, so that the restart policy mounts that; mount the socket's folder instead where that is possible"
    )]
    Orphaned(String),
}

impl RunError {
    /// Returns the exit code: 64 bad configuration, 73 data folder not usable or taken, 70 a task ended, 75 the mounted
    /// Docker socket is dead.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Config(_) => 64,
            Self::DataFolder(_) => 73,
            Self::Task(_) => 70,
            Self::Orphaned(_) => 75,
        }
    }
}

/// Capacity of the channel of container changes. The reporter drains it even while it waits for the master. A larger
/// burst makes the event task wait, and fills Docker's socket buffer.
const CHANGES: usize = 256;

/// Runs the agent until `shutdown`. After a decommission it stops its own container, or idles until `shutdown` if it
/// cannot. The page shows `log`.
///
/// # Errors
/// See [`RunError`]. The tunnel container then stays as it is.
pub async fn run(config: Config, log: Ring, shutdown: CancellationToken) -> Result<(), RunError> {
    let opened = tokio::select! {
        opened = Store::open_and_read(config.data_dir.clone()) => opened?,
        // Nothing runs yet that needs an orderly end.
        () = asked_for(shutdown.clone(), OPEN_LIMIT_AT_STOP) => return Ok(()),
    };
    let store = opened.store;
    if container::dies_with_container(store.dir()) {
        warn!(folder = %store.dir().display(), "{NO_VOLUME}");
    }
    let agent_id = taken(opened.agent_id);
    let tombstone = taken(opened.tombstone);
    let mut state: TunnelState = taken(opened.tunnel).unwrap_or_default();
    let known = state.clone();
    // The running tunnel belongs to this agent, even if the master gives the agent another id.
    if let Some(id) = agent_id.as_ref().filter(|id| state.token.is_some() && state.owners.last() != Some(id)) {
        state.be(id);
    }
    // Earlier versions kept the token for the next start command, which brings its own.
    if state.desired_state == DesiredState::Stopped && tombstone.is_none() {
        state.token = None;
    }
    if state != known
        && let Err(error) = store.save_tunnel(&state).await
    {
        warn!("{}; trying again with the next command", error_chain(&error));
    }
    let reported = taken(opened.reported);

    let (wanted_tx, wanted) = watch::channel(Wanted::new(&state, tombstone.as_ref()));
    let (view_tx, view) = watch::channel(View::default());
    let (inventory_tx, inventory) = watch::channel(Inventory::default());
    let (ways_tx, ways) = watch::channel(Ways::default());
    let (changes_tx, changes) = mpsc::channel(CHANGES);
    // One pending wake is as good as many.
    let (wake_tx, wake) = mpsc::channel(1);
    let (look_tx, look) = mpsc::channel(1);

    let (metrics, concerns) = (Metrics::default(), Concerns::default());
    let refused = |error: &dyn Error| RunError::Config(error_chain(error));
    let master = Arc::new(master::Master::new(config.master, metrics.clone()).map_err(|error| refused(&error))?);
    let docker = Arc::new(docker::Docker::new(config.docker_host));
    let known_id = agent_id.clone();
    let (introduction_tx, introduction) = watch::channel(None);
    let registrar =
        Arc::new(registration::Registrar::new(master.clone(), store.clone(), agent_id, introduction, concerns.clone()));
    let listener = match config.health_page {
        None => None,
        Some(address) => Some(page::bind(address).await.map_err(|error| {
            RunError::Config(format!("HEALTH_CHECK_PORT and HEALTH_CHECK_BIND: {address} cannot be listened on ({error}); use another port or address, or port 0 to switch the page off"))
        })?),
    };
    let mut sources = page::Sources {
        master: master.clone(),
        session: registrar.watch(),
        refused: registrar.watch_refused(),
        wanted: wanted.clone(),
        view: view.clone(),
        inventory: inventory.clone(),
        ways: ways.clone(),
        metrics: metrics.clone(),
        concerns: concerns.clone(),
        log,
        started: Instant::now(),
        tasks: Vec::new(),
        disk: page::Disk::new(store.clone()),
    };
    if let Some(stone) = tombstone.as_ref().filter(|stone| stone.phase == Phase::Finalized && stone.acknowledged) {
        warn!("{}", tunnels::epitaph(stone, store.dir()));
        let _page = listener.map(|listener| tokio::spawn(page::serve(listener, sources)));
        // The agent may have been killed between the last acknowledgement and the removal.
        let inputs = health::Inputs { wanted, ways, wake };
        let tunnel = health::Supervisor::new(docker, config.tunnel, config.hostname, inputs, view_tx, metrics);
        tunnel.map_err(|error| refused(&error))?.clear(shutdown.clone()).await;
        shutdown.cancelled().await;
        return Ok(());
    }
    let gone = CancellationToken::new();
    let arrived = tokio::spawn(arrival::arrive(
        docker.clone(),
        membership::Membership::new(docker.clone(), config.hostname.clone(), &config.tunnel),
        config.display_name,
        introduction_tx,
        gone.clone(),
    ));
    tokio::spawn(pending::remind(master.url().clone(), registrar.watch(), wanted.clone()));
    tokio::spawn(banner::show(
        docker.clone(),
        master.url().clone(),
        registrar.watch(),
        known_id,
        config.tunnel.clone(),
    ));

    let events = {
        let tunnel = &config.tunnel;
        let watched = [tunnel.container_name.clone(), tunnel.successor_name(), tunnel.network.clone()];
        let wakes = [wake_tx, look_tx];
        let stream = events::EventStream::new(
            docker.clone(),
            inventory_tx,
            changes_tx,
            wakes,
            watched,
            config.report_interval,
            (metrics.clone(), concerns.clone()),
        );
        // A listing may take 20 s.
        Task::spawn("events", 60, async move { match stream.run().await {} })
    };
    let neighbours = {
        let inputs =
            neighbours::Inputs { inventory: inventory.clone(), view: view.clone(), wanted: wanted.clone(), wake: look };
        let neighbours = neighbours::Neighbours::new(docker.clone(), config.tunnel.clone(), inputs, ways_tx);
        // Each inspection of a container may take 20 s.
        Task::spawn("neighbours", 60, async move { match neighbours.run().await {} })
    };
    let reports = {
        let announces_stop = stops_with_agent(&docker, &config.tunnel);
        let inputs = reports::Inputs {
            inventory: inventory.clone(),
            changes,
            tunnel: view.clone(),
            wanted: wanted.clone(),
            metrics: metrics.clone(),
            concerns: concerns.clone(),
            store: store.clone(),
            reported,
        };
        let reporter =
            reports::Reporter::new(master.clone(), registrar.clone(), inputs, config.report_interval, announces_stop);
        // A request to the master may take 90 s.
        Task::spawn("reports", 120, reporter.run(shutdown.clone()))
    };
    // The supervisor ends last: the reporter must send its last word on the tunnel first.
    let last = CancellationToken::new();
    let tunnel = {
        let (made_of, own_name) = (config.tunnel.clone(), config.hostname.clone());
        let inputs = health::Inputs { wanted: wanted.clone(), ways: ways.clone(), wake };
        let supervisor = health::Supervisor::new(docker.clone(), made_of, own_name, inputs, view_tx, metrics.clone())
            .map_err(|error| refused(&error))?;
        // A pull may stall for 120 s; a stop may take a minute longer than the drain.
        let deadline = 150.max(config.tunnel.patience().as_secs() + 90);
        Task::spawn("tunnel", deadline, supervisor.run(last.clone()))
    };
    let commands = {
        let disk = tunnels::OnDisk { store, state, tombstone };
        let (interval, image) = (config.poll_interval, config.tunnel.image.to_string());
        let links = tunnels::Links { wanted: wanted_tx, view: view.clone(), metrics, concerns };
        let poller = tunnels::Poller::new(master.clone(), registrar.clone(), disk, interval, image, links);
        // A request to the master may take 90 s, and a write to a slow disk comes on top.
        Task::spawn("commands", 150, poller.run(shutdown.clone()))
    };
    sources.tasks =
        [&commands.pulse, &reports.pulse, &events.pulse, &neighbours.pulse, &tunnel.pulse].map(Pulse::clone).to_vec();
    let mut page = listener.map(|listener| tokio::spawn(async move { match page::serve(listener, sources).await {} }));

    // No other task may end before the poller, which ends by a shutdown or by the master's last command.
    let Task { handle: mut commands, .. } = commands;
    let Task { handle: mut tunnel, .. } = tunnel;
    let Task { handle: mut events, .. } = events;
    let Task { handle: mut neighbours, .. } = neighbours;
    let Task { handle: mut reports, .. } = reports;
    let ended = tokio::select! {
        ended = &mut commands => joined("commands", ended)?,
        ended = &mut tunnel => return Err(broken("tunnel", ended)),
        ended = &mut events => return Err(broken("events", ended)),
        ended = &mut neighbours => return Err(broken("neighbours", ended)),
        path = dockflare_engine::orphaned(docker.host().clone()) => return Err(RunError::Orphaned(path)),
        ended = async { match &mut page { Some(page) => page.await, None => std::future::pending().await } } => {
            return Err(broken("page", ended));
        }
        ended = &mut reports, if !shutdown.is_cancelled() => match (ended, shutdown.is_cancelled()) {
            (Ok(()), true) => joined("commands", commands.await)?,
            (ended, _) => return Err(broken("reports", ended)),
        },
    };
    if ended == tunnels::Ended::Shutdown && !reports.is_finished() {
        joined("reports", reports.await)?;
    }
    // Once the event stream has ended, the socket proxy sees that this agent does not come back after its goodbye.
    events.abort();
    neighbours.abort();
    let _ = (events.await, neighbours.await);
    // The master has all reports by now, and the socket proxy answers until the goodbye.
    gone.cancel();
    if let Ok(membership) = arrived.await {
        membership.leave().await;
    }
    last.cancel();
    joined("tunnel", tunnel.await)?;
    if ended == tunnels::Ended::Decommissioned {
        stop_self(&docker, config.hostname.as_deref(), &shutdown).await;
    }
    info!("dockflare-agent stopped");
    Ok(())
}

/// Whether the tunnel goes down with the agent, as far as known: the agent's own socket proxy may keep it up.
fn stops_with_agent(docker: &Arc<docker::Docker>, tunnel: &TunnelConfig) -> watch::Receiver<bool> {
    let (stops, seen) = watch::channel(tunnel.on_exit == OnExit::Remove);
    let (docker, may_be_held) = (docker.clone(), !tunnel.lease.is_zero());
    tokio::spawn(async move {
        if docker.recognise().await && may_be_held {
            stops.send_replace(false);
        }
    });
    seen
}

/// Ends a decommission: Docker stops the agent's container, so that its restart policy does not start it again.
async fn stop_self(docker: &docker::Docker, hostname: Option<&str>, shutdown: &CancellationToken) {
    match health::own_container(docker, hostname).await {
        Some(own) => {
            info!("decommissioned; stopping the agent's own container");
            tokio::select! {
                // Docker answers only once the container is down, and then nobody is left to read the answer.
                () = shutdown.cancelled() => return,
                stopped = docker.stop_self(&own.id) => {
                    if let Err(error) = stopped {
                        warn!("decommissioned; the agent's own container cannot be stopped, since Docker {error}: stop it by hand");
                    }
                }
            }
        }
        None => info!("decommissioned; the agent cannot tell its own container for certain and idles: stop it by hand"),
    }
    shutdown.cancelled().await;
}

/// An agent that is asked to stop while it opens its data folder waits this long, to still end in order.
const OPEN_LIMIT_AT_STOP: Duration = Duration::from_secs(2);

async fn asked_for(shutdown: CancellationToken, grace: Duration) {
    shutdown.cancelled().await;
    tokio::time::sleep(grace).await;
}

/// The warning about a data folder that is part of the container.
pub(crate) const NO_VOLUME: &str = "the data folder is on no volume: who this agent is, and its tunnel, are lost when the container is made anew; mount a volume there, as with -v dockflare-agent-data:/app/data";

/// A task and the pulse that shows whether it is alive.
struct Task<T> {
    handle: JoinHandle<T>,
    pulse: Pulse,
}

impl<T: Send + 'static> Task<T> {
    /// `deadline` in seconds: the longest single wait of the task, plus room for a busy machine.
    fn spawn(name: &'static str, deadline: u64, work: impl Future<Output = T> + Send + 'static) -> Self {
        let pulse = Pulse::new(name, Duration::from_secs(deadline));
        Self { handle: tokio::spawn(pulse.clone().watch(work)), pulse }
    }
}

fn joined<T>(name: &'static str, ended: Result<T, JoinError>) -> Result<T, RunError> {
    ended.map_err(|error| broken(name, Err::<(), _>(error)))
}

fn broken<T>(name: &'static str, ended: Result<T, JoinError>) -> RunError {
    if let Err(error) = ended {
        error!(task = name, "{error}");
    }
    RunError::Task(name)
}

/// Returns the document that was found, and logs an error if its file was unusable and moved away.
fn taken<T>(found: Found<T>) -> Option<T> {
    if let Some(set_aside) = found.set_aside {
        error!(
            "{} {}; it was moved to {} and the agent goes on without it: mend it and put it back if what it says is still needed",
            set_aside.name,
            set_aside.problem,
            set_aside.to.display()
        );
    }
    found.document
}
