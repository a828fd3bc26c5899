//! Carries out a plan: the steps, what each needs first, and the way around a step that Docker refuses.

use std::collections::BTreeSet;
use std::future::Future;
use std::time::Duration;

use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use super::host::Host;
use super::log::{Line, Said};
use super::look::{Sight, started};
use super::plan::{self, Goal, Make, Owner, Slot, Step};
use super::problem::Problem;
use super::{Refused, Supervisor};
use crate::cause::Cause;
use crate::docker::{DockerError, Inspected, RunState, Spec};
use crate::retry::Lasts;

/// How long a hung connector gets to end by itself. Its own drain would be no use.
const HANG_GRACE: Duration = Duration::from_secs(10);

/// Log lines to search for the start of a drain, and how often to check whether the drain is over.
const DRAIN_LINES: usize = 200;
const DRAIN_LOOK: Duration = Duration::from_millis(500);

/// Pause between the removal of one container and the renaming of another on its network. Without it Engine 20.10
/// miscounts the containers on that network in one of a hundred cases, and nobody can remove the network until dockerd
/// restarts.
const RELEASE_TIME: Duration = Duration::from_secs(1);

/// Leave a network that no workload has needed for this long.
const LEAVE_AFTER: Duration = Duration::from_secs(10);
/// Try again this long after Docker, or a proxy in front of it, refused that.
const LEAVE_AGAIN: Duration = Duration::from_secs(3600);

/// How far a plan was carried out without a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Came {
    ToTheEnd,
    /// A shutdown or new orders came: the next pass looks and plans anew.
    Interrupted,
    /// The containers changed since the look, or Docker refuses this way; the next pass takes another.
    Otherwise,
}

/// The containers in the two slots, by id.
struct Ids {
    main: Option<String>,
    next: Option<String>,
}

impl Ids {
    fn get(&self, slot: Slot) -> Option<String> {
        if slot == Slot::Main { self.main.clone() } else { self.next.clone() }
    }

    fn set(&mut self, slot: Slot, id: Option<String>) {
        *(if slot == Slot::Main { &mut self.main } else { &mut self.next }) = id;
    }
}

/// A network that no labelled container needs.
#[derive(Debug)]
pub(super) struct Leave {
    /// Earliest time to leave it.
    at: Instant,
    /// Docker refused the last attempt.
    refused: bool,
}

impl<H: Host> Supervisor<H> {
    /// Logs what is about to happen, and why.
    pub(super) fn announce(&self, goal: &Goal, sight: &Sight, steps: &[Step]) {
        let container = &self.config.container_name;
        let main = sight.main.as_ref();
        let state = || main.map(|main| format!("{:?}", main.state).to_lowercase()).unwrap_or_default();
        let is_made = steps.iter().any(|step| matches!(step, Step::Create(..)));
        match (goal, main) {
            (Goal::Run { .. }, None) if is_made => info!(container, "starting the tunnel"),
            (Goal::Run { .. }, Some(main)) if is_made && plan::owner(main, sight.whose()) == Owner::PythonAgent => {
                info!(container, "taking over the tunnel container of the Python agent");
            }
            (Goal::Run { .. }, Some(_)) if is_made => {
                if let Some(lost) = self.lost_network(sight, goal) {
                    warn!("the tunnel {lost}; {}", lost.cause.next());
                }
                info!(container, state = state(), "replacing the tunnel container");
            }
            (Goal::Run { .. }, _) if steps.contains(&Step::Restart) => info!(container, "restarting the tunnel"),
            (Goal::Run { .. }, _) if steps.contains(&Step::Rename) => {
                info!(container, "the new connector takes over");
            }
            (Goal::Run { .. }, _) if steps.contains(&Step::Stop(Slot::Main)) => info!(container, "stopping the tunnel"),
            (Goal::Run { .. }, _) => info!(container, "removing the connector beside the tunnel's"),
            (Goal::Remove, _) => info!(container, "removing the tunnel"),
            (Goal::Stop | Goal::Leave, _) => info!(container, "stopping the tunnel"),
        }
    }

    /// Logs once per outage that fresh connectors are tried.
    pub(super) fn announce_fresh(&self) {
        if self.outage.as_ref().is_some_and(|outage| outage.made == 0) {
            let container = &self.config.container_name;
            info!(container, "trying fresh connectors beside the tunnel's, which has no connection");
        }
    }

    /// Logs that a trial asks why the edge refuses a registration.
    pub(super) fn announce_trial(&self) {
        let container = &self.config.container_name;
        info!(container, "asking over HTTP/2 why Cloudflare refuses the registration");
    }

    /// Carries out a plan until the first failure, a shutdown or new orders. The next pass plans anew.
    pub(super) async fn act(
        &mut self,
        steps: &[Step],
        sight: &Sight,
        spec: Option<&Spec>,
        stop: &CancellationToken,
    ) -> Result<Came, Problem> {
        // Act on the containers that were seen, whichever container has the name by then.
        let mut ids = Ids { main: sight.id(Slot::Main), next: sight.id(Slot::Next) };
        // This clone counts the order that this pass read as seen.
        let mut orders = self.inputs.wanted.clone();
        for step in steps {
            if stop.is_cancelled() || orders.has_changed().unwrap_or(false) {
                return Ok(Came::Interrupted);
            }
            let done = match (step, spec) {
                (Step::Prepare, _) => tokio::select! {
                    // A pull may take minutes, and its order may be out of date by then.
                    () = stop.cancelled() => return Ok(Came::Interrupted),
                    Ok(()) = orders.changed() => return Ok(Came::Interrupted),
                    prepared = self.prepare(steps.contains(&Step::Stop(Slot::Main))) => {
                        prepared?;
                        // The image was just pulled: the spec must carry its id, so plan again.
                        if self.refresh.id().is_none() && self.read_image_id().await {
                            return Ok(Came::Otherwise);
                        }
                        Ok(())
                    }
                },
                (Step::Create(slot, make), Some(spec)) => {
                    let trial = if *make == Make::Trial { spec.over_http2() } else { None };
                    let spec = trial.as_ref().unwrap_or(spec);
                    match self.host.create(&self.name(*slot), spec).await {
                        Ok(id) => {
                            self.settle_in(*slot, &id, spec).await?;
                            ids.set(*slot, Some(id));
                            Ok(())
                        }
                        Err(error) => Err(error),
                    }
                }
                (Step::Create(..), None) => Ok(()),
                (Step::Stop(slot) | Step::Remove(slot) | Step::Start(slot), _) => {
                    let Some(id) = ids.get(*slot) else { return Ok(Came::Otherwise) };
                    match step {
                        Step::Stop(_) => match self.drained(&id).await {
                            Ok(false) => return Ok(Came::Otherwise),
                            drained => drained.map(drop),
                        },
                        Step::Remove(_) => self.host.remove(&id).await.map(|()| ids.set(*slot, None)),
                        _ => self.host.start(&id).await,
                    }
                }
                (Step::Restart, _) => {
                    let Some(id) = ids.get(Slot::Main) else { return Ok(Came::Otherwise) };
                    self.restart(&id).await
                }
                (Step::Rename, _) => {
                    let Some(id) = ids.get(Slot::Next) else { return Ok(Came::Otherwise) };
                    if steps.contains(&Step::Remove(Slot::Main)) {
                        sleep(RELEASE_TIME).await;
                    }
                    self.host.rename(&id, &self.name(Slot::Main)).await
                }
            };
            if let Err(error) = done {
                if let Some(spec) = spec
                    && self.is_refused(*step, &error, spec).await
                {
                    return Ok(Came::Otherwise);
                }
                return Err(self.why_not(*step, &error).await);
            }
        }
        Ok(Came::ToTheEnd)
    }

    /// `replaces`: a running container must not be given up for an image that cannot be had.
    async fn prepare(&self, replaces: bool) -> Result<(), Problem> {
        self.see_to_networks().await?;
        self.see_to_image(replaces).await
    }

    /// Connects a new container to its further networks before it serves, so that it reaches all that the one before it
    /// could and serves its metrics where it should. Removes the container if the metrics network fails.
    async fn settle_in(&mut self, slot: Slot, id: &str, spec: &Spec) -> Result<(), Problem> {
        if let Some(place) = &spec.metrics
            && let Err(error) = self.host.place(place, id).await
        {
            if let Err(left) = self.host.remove(id).await {
                debug!("cannot remove the container that was made in vain: Docker {left}");
            }
            let network = &place.network;
            return Err(match error {
                error if error.is_away() => Problem::of(&error),
                error => Problem::new(
                    Cause::NetworkMissing,
                    format!("cannot be connected to {network} (CLOUDFLARED_METRICS_NETWORK): Docker {error}"),
                ),
            });
        }
        let metrics = spec.metrics.iter().map(|place| place.network.as_str());
        self.join_networks(slot, id, metrics.chain([spec.network.as_str()])).await;
        Ok(())
    }

    /// Reconnects a tunnel container that lost its network, for example by `docker network disconnect`. Returns whether
    /// it did; if the network is gone or Docker refuses, the container is replaced.
    pub(super) async fn reconnect(&self, sight: &Sight, goal: &Goal) -> bool {
        let Some(main) =
            sight.main.as_ref().filter(|_| sight.next.is_none() && self.lost_network(sight, goal).is_some())
        else {
            return false;
        };
        let (container, network) = (&main.name, &self.config.network);
        match self.host.connect(network, &main.id).await {
            Ok(()) => {
                info!(container, network, "the tunnel container had lost its network and is connected to it again");
                true
            }
            Err(error) => {
                debug!(container, network, "cannot connect the tunnel container again: Docker {error}");
                false
            }
        }
    }

    /// Connects a container to the workloads' networks that it is not on yet. Retries later what fails.
    pub(super) async fn join_networks<'a>(&mut self, slot: Slot, id: &str, on: impl Iterator<Item = &'a str>) {
        let mut missing = self.inputs.ways.borrow().networks.clone();
        for network in on {
            missing.remove(network);
        }
        let name = self.name(slot);
        let mut failed = false;
        for network in missing {
            match self.host.connect(&network, id).await {
                // One of many fresh connectors: not worth a log line.
                Ok(()) if slot == Slot::Next && self.outage.is_some() => {}
                Ok(()) => info!(container = name, network, "connected the tunnel to a container's network"),
                Err(error) => {
                    failed = true;
                    let problem = format!("{network}: Docker {error}");
                    self.connecting.failed(&problem, "trying again, the tunnel itself is not affected");
                }
            }
        }
        if !failed {
            self.connecting.ended();
        }
    }

    /// Disconnects the container from networks that the agent connected it to and no labelled container needs any more.
    /// Keeps networks that were connected by hand, and all of them until every container has been looked at.
    pub(super) async fn leave_networks(&mut self, main: &Inspected) {
        let own = &self.config.network;
        let needless: BTreeSet<String> = {
            let ways = self.inputs.ways.borrow();
            let is_needless = |network: &str| network != own && !ways.networks.contains(network);
            let joined = main.networks.iter().filter(|(_, place)| place.is_joined()).map(|(network, _)| network);
            let knows = ways.all_known && self.config.auto_connect;
            joined.filter(|network| knows && is_needless(network)).cloned().collect()
        };
        // Remember a refusal even if the network was needed again in between.
        let refuses = |leave: &Leave| leave.refused && Instant::now() < leave.at;
        self.needless.retain(|network, leave| needless.contains(network) || refuses(leave));
        let (mut failed, mut left) = (false, false);
        for network in needless {
            let now = Instant::now();
            // A container that is being restarted or replaced is about to need it again.
            let leave = self.needless.entry(network.clone()).or_insert(Leave { at: now + LEAVE_AFTER, refused: false });
            if now < leave.at {
                failed |= leave.refused;
                continue;
            }
            match self.host.disconnect(&network, &main.id).await {
                Ok(()) => {
                    left = true;
                    self.needless.remove(&network);
                    info!(
                        container = main.name,
                        network, "disconnected the tunnel from a network that no labelled container needs"
                    );
                }
                Err(error) => {
                    failed = true;
                    let (container, mut next) = (&main.name, "trying again".to_owned());
                    // Docker will refuse again until somebody changes the permission.
                    if matches!(error, DockerError::Forbidden { .. }) {
                        *leave = Leave { at: now + LEAVE_AGAIN, refused: true };
                        next =
                            format!("docker network disconnect {network} {container} does it; trying again in an hour");
                    }
                    let problem = format!("{network}: Docker {error}");
                    self.leaving.failed(&problem, &format!("{next}, the tunnel itself is not affected"));
                }
            }
        }
        match (failed, left) {
            (true, _) => {}
            (false, true) => drop(self.leaving.ended()),
            // Disconnected by hand, or needed again.
            (false, false) => self.leaving.dropped(),
        }
    }

    /// Stops the container and waits for cloudflared's drain. A shutdown must not cut this short: a second signal would
    /// end cloudflared at once.
    pub(super) async fn drain(&self, id: &str) -> Result<(), DockerError> {
        let grace = self.config.patience();
        self.draining.send_replace(true);
        let work = async {
            self.let_drain(id, grace).await;
            // Docker sends no signal to a container that has ended by now.
            self.host.stop(id, grace).await
        };
        let stopped = said_while_long("waiting for cloudflared to drain its requests", grace, work).await;
        self.draining.send_replace(false);
        stopped
    }

    /// Waits for a drain that is already under way, begun by an agent that was killed in the middle of it, or by hand.
    /// cloudflared's log shows such a drain, unless its log level lets through only errors.
    async fn let_drain(&self, id: &str, most: Duration) {
        let Ok(Some(seen)) = self.host.inspect(id).await else { return };
        if seen.state != RunState::Running {
            return;
        }
        let lines = self.host.log_tail(id, started(&seen), DRAIN_LINES).await.unwrap_or_default();
        if !lines.iter().any(|line| Line::parse(line).said == Said::ShuttingDown) {
            return;
        }
        debug!(container = seen.name, "cloudflared drains already, so it is sent no second signal");
        let until = Instant::now() + most;
        while Instant::now() < until {
            sleep(DRAIN_LOOK).await;
            match self.host.inspect(id).await {
                Ok(Some(now)) if now.state == RunState::Running && now.started_at == seen.started_at => {}
                Ok(_) => return,
                // cloudflared goes on draining while Docker is away.
                Err(_) => {}
            }
        }
    }

    /// Drains, which may take half a minute, and looks again. Returns false if the container runs all the same, for
    /// example because somebody started it.
    async fn drained(&self, id: &str) -> Result<bool, DockerError> {
        self.drain(id).await?;
        Ok(self.host.inspect(id).await?.is_none_or(|seen| !plan::is_alive(&seen)))
    }

    /// Restarts a hung connector. The next restart waits for a growing pause, whether this one helps or not.
    async fn restart(&mut self, id: &str) -> Result<(), DockerError> {
        self.restarts.not_before = Some(Instant::now() + self.restarts.pauses.next_whole());
        if let Some(id) = self.main.container() {
            let (container, count) = &mut self.restarts.done;
            if *container != id {
                (*container, *count) = (id, 0);
            }
            *count += 1;
        }
        self.metrics.restart();
        self.host.restart(id, HANG_GRACE).await
    }

    /// Whether Docker refuses this step and there is another way. Remembers and logs that.
    async fn is_refused(&mut self, step: Step, error: &DockerError, spec: &Spec) -> bool {
        let hash = spec.hash();
        if self.refused.hash != hash {
            self.refused = Refused { hash, ..Refused::default() };
        }
        match step {
            Step::Create(..) | Step::Start(_) if spec.host_gateway && is_about_the_host(error) => {
                warn!(
                    "Docker {error}; so the tunnel container does not know this host as host.docker.internal, which needs Engine 20.10 or newer; use the host's address in service labels, or set CLOUDFLARED_HOST_GATEWAY=false"
                );
                self.no_host_gateway = true;
                true
            }
            // Refusals only. On a full disk, for example, a replacement in place would fail as well and leave nothing
            // running.
            Step::Create(Slot::Next, _)
                if matches!(error, DockerError::Forbidden { .. } | DockerError::Conflict { .. }) =>
            {
                // Before giving up the running container, try to create one under the taken name: a conflict shows that
                // Docker would allow it.
                let own = self.host.create(&self.name(Slot::Main), spec).await;
                let may = matches!(own, Err(DockerError::Conflict { .. }));
                if may {
                    warn!(
                        "Docker {error}; so the tunnel is replaced in place and requests fail for some seconds, after an outage they fail until cloudflared itself tries again, a minute at most, and over QUIC nobody learns why a registration is refused; let the socket proxy pass the name {} to avoid that",
                        self.name(Slot::Next)
                    );
                    self.refused.second = true;
                }
                may
            }
            Step::Rename if !error.is_away() && !matches!(error, DockerError::Conflict { .. }) => {
                warn!(
                    "Docker {error}; so one more connector is made under the right name and takes over, let the socket proxy pass rename to avoid that"
                );
                self.refused.rename = true;
                true
            }
            _ => false,
        }
    }

    /// As [`Problem::at`]. If the image is missing and Docker refuses to look it up, the problem names that refusal.
    async fn why_not(&self, step: Step, error: &DockerError) -> Problem {
        let image = &self.config.image;
        if let (Step::Create(..), DockerError::NotFound { .. }) = (step, error)
            && let Err(refusal @ DockerError::Forbidden { .. }) = self.host.has_image(image).await
        {
            let detail = format!("the image {image} is not on this host and Docker {refusal}");
            return Problem::new(Cause::ImageUnavailable, detail);
        }
        Problem::at(step, error)
    }

    async fn see_to_networks(&self) -> Result<(), Problem> {
        self.see_to_network(&self.config.network, false).await?;
        match &self.config.metrics_network {
            // Internal: nothing has to leave by it, so the tunnel's own network stays the way out.
            Some(network) => self.see_to_network(network, true).await,
            None => Ok(()),
        }
    }

    async fn see_to_network(&self, network: &str, internal: bool) -> Result<(), Problem> {
        if self.host.has_network(network).await.map_err(|error| Problem::of(&error))? {
            return Ok(());
        }
        match self.host.create_network(network, internal).await {
            Ok(false) => Ok(()),
            Ok(true) => {
                info!(network, "created the {} network", if internal { "metrics" } else { "tunnel" });
                Ok(())
            }
            Err(error) if error.is_away() => Err(Problem::of(&error)),
            Err(error) => {
                let detail = format!(
                    "the network {network} does not exist and Docker {error}; or run: docker network create {network}"
                );
                Err(Problem::new(Cause::NetworkMissing, detail))
            }
        }
    }

    async fn see_to_image(&self, replaces: bool) -> Result<(), Problem> {
        let image = &self.config.image;
        match self.host.has_image(image).await {
            Ok(true) => return Ok(()),
            Ok(false) => {}
            // Docker refuses the look; creating the container will tell as well.
            Err(DockerError::Forbidden { .. }) if !replaces => return Ok(()),
            Err(error) => return Err(Problem::of(&error)),
        }
        info!(image = %image, "pulling the cloudflared image");
        let (began, mut said) = (Instant::now(), 0);
        let pulled = self.host.pull(image, |come, due| {
            // One line per quarter. The total grows while Docker discovers layers, so the share may also fall.
            let quarter = (come * 4).checked_div(due).unwrap_or_default().min(4);
            if quarter > said {
                said = quarter;
                info!(percent = quarter * 25, megabytes = come / 1_000_000, "pulling the cloudflared image");
            }
        });
        match pulled.await {
            Ok(()) => {
                info!(after = %Lasts(began.elapsed()), "pulled the cloudflared image");
                Ok(())
            }
            // Somebody may have loaded it by hand in the meantime.
            Err(_) if self.host.has_image(image).await == Ok(true) => Ok(()),
            Err(error) => {
                let detail = format!("the image {image} is not on this host and Docker {error}");
                Err(Problem::new(Cause::ImageUnavailable, detail))
            }
        }
    }
}

/// Whether the Engine says that it cannot fill in the host's address. Engines up to 19.03 say so when the container is
/// created. Later ones, and those without a default bridge, say so when it is started.
fn is_about_the_host(error: &DockerError) -> bool {
    matches!(error, DockerError::Failed { message, .. } if message.contains("host-gateway") || message.contains("add-host"))
}

/// Waits for `work`, and logs after two seconds what it waits for.
async fn said_while_long<T>(what: &str, at_most: Duration, work: impl Future<Output = T>) -> T {
    let mut work = std::pin::pin!(work);
    tokio::select! {
        done = &mut work => return done,
        () = sleep(Duration::from_secs(2)) => {}
    }
    info!(at_most = %Lasts(at_most), "{what}");
    work.await
}
