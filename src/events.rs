//! Keeps the inventory of labelled containers up to date with Docker's events.
//!
//! Subscribe, then list: the task opens the stream first, then a listing replaces the inventory, and later events
//! update it. Only the result of an event counts. The start of a container that is already in the inventory, or the
//! end of one that is not, changes nothing and sends nothing, so replays and repeated events (`die`, `stop`, `destroy`
//! of one end) are harmless. A cut stream is routine: the inventory counts as incomplete until the next listing has
//! succeeded. Nothing is on disk: after a crash the task starts with a listing.
//!
//! A stream may also go deaf: cut somewhere on the way, while the connection stays open. So the task regularly compares
//! the inventory with a listing and corrects it. If no event follows that explains the difference, it opens a new
//! stream.
//!
//! The reporter reads the inventory and receives each change. Everything that happens to the tunnel container and its
//! network wakes the supervisor. Everything that may open or close a way to a container wakes the neighbours' task.

use std::collections::{BTreeMap, VecDeque};
use std::convert::Infallible;
use std::future::pending;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use jiff::Timestamp;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tracing::{debug, info, warn};

use crate::channels::{Change, Inventory};
use crate::concerns::Concerns;
use crate::docker::Remedy as _;
use crate::docker::{self, Action, Container, Docker, DockerError, Event};
use crate::labels::{self, ENABLE_KEYS, Excess, REPORT_BYTES, is_enabled, may_leave};
use crate::metrics::Metrics;
use crate::retry::Trouble;

/// Reopen a stream that is silent for this long, before something on the way drops it as idle. That costs three small
/// requests, and no event is late.
const IDLE_LIMIT: Duration = Duration::from_secs(300);
/// Docker answers the subscription a moment before it takes effect. A second listing after this long finds what
/// happened in between.
const SECOND_LOOK: Duration = Duration::from_secs(1);
/// Longest time between two listings, however rare the reports are.
const LONGEST_UNSEEN: Duration = Duration::from_secs(30);
/// Longest wait while Docker is away: it may be back at any moment, and a try costs one refused connection.
const AWAY_WAIT: Duration = Duration::from_secs(1);
/// Docker, or a proxy, refuses a subscription within this time.
const REFUSAL_LIMIT: Duration = Duration::from_millis(100);
/// Docker may list a container as it was before its last event. Believe the event for this long.
const EVENTS_WIN: Duration = Duration::from_secs(2);
/// Remember this many events to recognize a replay, which repeats those of one instant.
const REMEMBERED: usize = 256;

mod flaps;
use flaps::{Flaps, Said};

/// The event task.
#[derive(Debug)]
pub struct EventStream {
    docker: Arc<Docker>,
    inventory: watch::Sender<Inventory>,
    changes: mpsc::Sender<Change>,
    wake_supervisor: mpsc::Sender<()>,
    wake_neighbours: mpsc::Sender<()>,
    /// Names of the tunnel container, its successor and its network, whose events wake the supervisor.
    watched: [String; 3],
    seen: Seen,
    /// When each container last started, ended or was renamed, while that overrides a listing.
    fresh: BTreeMap<String, Instant>,
    /// When the pending listing was requested. Later events override it, however long it takes.
    asked: Option<Instant>,
    look_every: Duration,
    trouble: Trouble,
    metrics: Metrics,
    concerns: Concerns,
    /// Containers in a crash loop.
    flaps: Flaps,
    /// Containers with labels that are left out, by id, and the warning that was logged.
    excess: BTreeMap<String, Excess>,
}

impl EventStream {
    /// Creates the task. `wakes` go to the supervisor and the neighbours' task; each holds one message, so several
    /// wakes are one. `watched` are the names of the tunnel container, its successor and its network. The task compares
    /// the inventory with a listing as often as the agent reports it, and at least twice a minute.
    pub fn new(
        docker: Arc<Docker>,
        inventory: watch::Sender<Inventory>,
        changes: mpsc::Sender<Change>,
        wakes: [mpsc::Sender<()>; 2],
        watched: [String; 3],
        report_interval: Duration,
        (metrics, concerns): (Metrics, Concerns),
    ) -> Self {
        let trouble = Trouble::new("Docker");
        let [wake_supervisor, wake_neighbours] = wakes;
        Self {
            docker,
            inventory,
            changes,
            wake_supervisor,
            wake_neighbours,
            watched,
            seen: Seen::default(),
            fresh: BTreeMap::new(),
            asked: None,
            look_every: report_interval.min(LONGEST_UNSEEN),
            trouble,
            metrics,
            concerns,
            flaps: Flaps::default(),
            excess: BTreeMap::new(),
        }
    }

    /// Follows Docker forever. Cancel-safe: dropped at any await, nothing is half-done.
    pub async fn run(mut self) -> Infallible {
        let mut backoff = docker::reconnect_backoff();
        loop {
            let began = Instant::now();
            let ended = self.follow().await;
            // The inventory is incomplete until a listing succeeds again.
            self.inventory.send_if_modified(|inventory| std::mem::take(&mut inventory.complete));
            match &ended {
                Ended::Idle | Ended::Closed => debug!(?ended, "event stream ended, opening it again"),
                Ended::Deaf => self.trouble.failed(&DEAF, DEAF_REMEDY),
                Ended::Failed(error) => self.trouble.failed(error, error.remedy()),
            }
            if began.elapsed() > Duration::from_secs(10) {
                backoff.reset();
            }
            match &ended {
                Ended::Idle | Ended::Deaf => {}
                Ended::Failed(error) if !error.is_away() => sleep(backoff.next(None)).await,
                Ended::Closed | Ended::Failed(_) => sleep(backoff.next(None).min(AWAY_WAIT)).await,
            }
        }
    }

    /// Follows one stream until it ends.
    async fn follow(&mut self) -> Ended {
        let docker = self.docker.clone();
        let mut stream = match docker.events(self.seen.since()) {
            Ok(stream) => pin!(stream),
            Err(error) => return Ended::Failed(error),
        };
        // The last stream may have ended in the middle of a listing.
        self.asked = None;
        let asked = Instant::now();
        let mut listing = Box::pin(docker.list_with_label_keys(&ENABLE_KEYS));
        let mut early = VecDeque::new();
        // Polling the stream first sends the subscription. Its events wait for the listing.
        let listed = loop {
            tokio::select! {
                biased;
                event = stream.next() => match event {
                    Some(Ok(event)) => early.push_back(event),
                    Some(Err(error)) => return Ended::Failed(error),
                    None => return Ended::Closed,
                },
                listed = &mut listing => break listed,
            }
        };
        // Docker may refuse the subscription after it has answered the listing. The inventory is not complete then.
        if listed.is_ok() {
            match timeout(REFUSAL_LIMIT, stream.next()).await {
                Ok(Some(Ok(event))) => early.push_back(event),
                Ok(Some(Err(error))) => return Ended::Failed(error),
                Ok(None) => return Ended::Closed,
                Err(_) => {}
            }
        }
        match listed {
            // `Found` does not matter here: the second listing comes anyway.
            Ok(containers) => {
                self.replace(containers, asked).await;
            }
            Err(error) => return Ended::Failed(error),
        }
        if self.trouble.ended() {
            info!(containers = self.inventory.borrow().containers.len(), "listening to Docker's events again");
        }
        self.wake();
        for event in early {
            self.take(event).await;
        }
        let (mut heard, mut next_look) = (Instant::now(), Instant::now() + SECOND_LOOK);
        // What the second listing finds happened before the subscription took effect. What a later one finds must also
        // come as an event, or the stream is deaf.
        let (mut is_second, mut deaf_at) = (true, None);
        // Keep reading the stream during a listing: a slow listing must not delay an event.
        let mut listing = None;
        loop {
            tokio::select! {
                event = stream.next() => match event {
                    Some(Ok(event)) => {
                        (heard, deaf_at) = (Instant::now(), None);
                        self.take(event).await;
                    }
                    Some(Err(error)) => return Ended::Failed(error),
                    None => return Ended::Closed,
                },
                () = sleep_until(next_look), if listing.is_none() => {
                    self.asked = Some(Instant::now());
                    listing = Some(Box::pin(docker.list_with_label_keys(&ENABLE_KEYS)));
                }
                listed = when_there(&mut listing) => {
                    listing = None;
                    let asked = self.asked.take().unwrap_or_else(Instant::now);
                    let found = match listed {
                        Ok(containers) => self.replace(containers, asked).await,
                        Err(error) => return Ended::Failed(error),
                    };
                    let is_second = std::mem::take(&mut is_second);
                    if found.news && !is_second && deaf_at.is_none() {
                        deaf_at = Some(Instant::now() + EVENTS_WIN);
                    }
                    next_look = Instant::now() + if found.agreed { self.look_every } else { EVENTS_WIN };
                }
                () = until(self.flaps.due()) => self.tell_due().await,
                () = until(deaf_at) => return Ended::Deaf,
                () = sleep_until(heard + IDLE_LIMIT) => return Ended::Idle,
            }
        }
    }

    /// Replaces the inventory with a listing and sends the differences as changes. The first listing sends every
    /// container, for a master that takes nothing from reports, such as one that agreed to a lower protocol.
    ///
    /// `asked` is when the listing was requested.
    async fn replace(&mut self, listed: Vec<Container>, asked: Instant) -> Found {
        let now = Timestamp::now();
        self.fresh.retain(|_, at| asked - *at < EVENTS_WIN);
        // Docker also lists a container between two runs. Its next start is an event.
        let running = listed.into_iter().filter(|container| container.status != "restarting");
        let counted: BTreeMap<_, _> =
            running.filter_map(counted_with).map(|(one, excess)| (one.id.clone(), (one, excess))).collect();
        let (mut room, mut after) = (REPORT_BYTES, BTreeMap::new());
        for (id, (mut container, excess)) in counted {
            let beyond = labels::bound(&mut container.labels, room);
            room = room.saturating_sub(container.labels.iter().map(|(key, value)| key.len() + value.len()).sum());
            self.say_excess(&container, excess.or(beyond));
            after.insert(id, container);
        }
        let (fresh, mut agreed, mut changes) = (&self.fresh, true, Vec::new());
        self.inventory.send_if_modified(|inventory| {
            for id in fresh.keys() {
                let known = inventory.containers.get(id);
                if known.map(|known| &known.name) == after.get(id).map(|listed| &listed.name) {
                    continue;
                }
                agreed = false;
                match known {
                    Some(container) => drop(after.insert(id.clone(), container.clone())),
                    None => drop(after.remove(id)),
                }
            }
            let before = std::mem::replace(&mut inventory.containers, after);
            let after = &inventory.containers;
            let gone = before.iter().filter(|(id, _)| !after.contains_key(*id)).map(|(_, c)| (false, c.clone()));
            let new = after.iter().filter(|(id, _)| !before.contains_key(*id)).map(|(_, c)| (true, c.clone()));
            changes.extend(gone.chain(new).map(|(running, container)| Change { at: now, running, container }));
            let is_renamed = |(id, c): (&String, &Container)| before.get(id).is_some_and(|known| known.name != c.name);
            let renamed = after.iter().any(is_renamed);
            let again = !std::mem::replace(&mut inventory.complete, true);
            inventory.revision += u64::from(again || renamed);
            again || before != inventory.containers
        });
        let news = !changes.is_empty();
        for change in changes {
            self.tell(change, None).await;
        }
        self.forget_excess();
        Found { agreed, news }
    }

    /// Applies one event.
    async fn take(&mut self, event: Event) {
        if !self.seen.is_new(&event) {
            return;
        }
        self.metrics.docker_event(event.action.name());
        if self.watched.contains(&event.name) || event.action == Action::Rename {
            self.wake();
        }
        if concerns_neighbours(&event) {
            // If full, a wake is already pending.
            let _ = self.wake_neighbours.try_send(());
        }
        if matches!(event.action, Action::Start | Action::End | Action::Rename) {
            let now = Instant::now();
            let judged_at = self.asked.unwrap_or(now);
            self.fresh.retain(|_, at| judged_at - *at < EVENTS_WIN);
            self.fresh.insert(event.id.clone(), now);
        }
        let exit_code = exit_code(&event);
        let at = Timestamp::from_nanosecond(event.at.into()).unwrap_or_else(|_| Timestamp::now());
        let change = match event.action {
            Action::Start => {
                let image = event.attributes.get("image").cloned().unwrap_or_default();
                let container = Container {
                    id: event.id,
                    name: event.name,
                    labels: event.attributes,
                    status: "running".to_owned(),
                    image,
                };
                let Some((container, excess)) = counted_with(container) else { return };
                self.say_excess(&container, excess);
                let mut is_new = false;
                self.inventory.send_if_modified(|inventory| {
                    is_new = inventory.containers.insert(container.id.clone(), container.clone()).is_none();
                    is_new
                });
                is_new.then_some(Change { at, running: true, container })
            }
            Action::End => {
                let mut gone = None;
                self.inventory.send_if_modified(|inventory| {
                    gone = inventory.containers.remove(&event.id);
                    gone.is_some()
                });
                gone.map(|container| Change { at, running: false, container })
            }
            Action::Rename => {
                self.inventory.send_if_modified(|inventory| match inventory.containers.get_mut(&event.id) {
                    Some(container) if container.name != event.name => {
                        container.name = event.name;
                        inventory.revision += 1;
                        true
                    }
                    _ => false,
                });
                None
            }
            Action::Container | Action::Network => None,
        };
        if let Some(change) = change {
            self.tell(change, exit_code).await;
        }
    }

    /// Sends a change, or holds it back for a moment if the container is in a crash loop.
    async fn tell(&mut self, change: Change, exit_code: Option<i64>) {
        let (name, running) = (change.container.name.clone(), change.running);
        let (said, change) = self.flaps.changed(change, exit_code, Instant::now());
        match said {
            Said::Usual if running => info!(name, "container started"),
            Said::Usual => info!(name, "container stopped"),
            Said::Flaps { ends, exit_code } => {
                let code = exit_code.map_or_else(|| "unknown".to_owned(), |code| code.to_string());
                let remedy =
                    format!("see docker logs {name}; the master is told its last state, at most every five seconds");
                warn!(name, exit_code = code, ends, "the container ends again and again; {remedy}");
                let problem = format!("the container {name} ends again and again, last with exit code {code}");
                self.concerns.raise("flapping", &name, problem, remedy);
            }
            Said::Nothing => {}
        }
        if let Some(change) = change {
            self.send(change).await;
        }
    }

    /// Sends the changes that were held back, and logs which containers have come to rest.
    async fn tell_due(&mut self) {
        let (changes, rested) = self.flaps.take_due(Instant::now());
        for rest in rested {
            let sentence = if rest.running { "the container runs again" } else { "the container has stopped for good" };
            info!(name = rest.name, ends = rest.ends, "{sentence}");
            self.concerns.clear("flapping", &rest.name);
        }
        for change in changes {
            self.send(change).await;
        }
    }

    async fn send(&self, change: Change) {
        // The reporter outlives this task, except during a shutdown, when nobody listens any more.
        let _ = self.changes.send(change).await;
    }

    /// Logs once per container that labels of it are left out.
    fn say_excess(&mut self, container: &Container, excess: Option<Excess>) {
        let Some(excess) = excess else { return };
        let (name, sentence) = (&container.name, excess.sentence());
        if self.excess.get(&container.id) != Some(&excess) && self.excess.len() < MOST_EXCESS {
            warn!(name, "{sentence}; {}", Excess::REMEDY);
            self.concerns.raise("labels", name, format!("{name}: {sentence}"), Excess::REMEDY);
            self.excess.insert(container.id.clone(), excess);
        }
    }

    /// Forgets the warnings about containers that are gone.
    fn forget_excess(&mut self) {
        if !self.excess.is_empty() {
            let inventory = self.inventory.borrow();
            self.excess.retain(|id, _| inventory.containers.contains_key(id));
            let of = |id| inventory.containers.get(id).map(|container| container.name.as_str());
            let names: Vec<_> = self.excess.keys().filter_map(of).collect();
            self.concerns.retain("labels", |about| names.contains(&about));
        }
    }

    fn wake(&self) {
        // If full, a wake is already pending.
        let _ = self.wake_supervisor.try_send(());
    }
}

/// Why a stream ended.
#[derive(Debug)]
enum Ended {
    /// Silent for so long that something on the way may cut it.
    Idle,
    /// A listing showed a change without an event.
    Deaf,
    /// Closed by the other side, for example on a restart of Docker or a proxy.
    Closed,
    /// Not opened, cut, or a listing failed.
    Failed(DockerError),
}

/// The problem of a deaf stream, which the log shows after "Docker", and the remedy.
const DEAF: &str = "did not tell a change that its listing shows: the stream of its events is cut without a word";
const DEAF_REMEDY: &str =
    "opening it again; if this comes back, let what is between agent and Docker keep idle connections";

/// What a listing showed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Found {
    /// False if the listing contradicted a fresh event, which then won. The task lists again soon.
    agreed: bool,
    /// Whether the listing changed which containers are known to run.
    news: bool,
}

/// Returns the result of the pending work. Waits forever if there is none.
async fn when_there<T>(work: &mut Option<impl Future<Output = T> + Unpin>) -> T {
    match work {
        Some(work) => work.await,
        None => pending().await,
    }
}

/// Waits until this time, or forever without one.
async fn until(at: Option<Instant>) {
    match at {
        Some(at) => sleep_until(at).await,
        None => pending().await,
    }
}

/// Whether the event may open or close a way without a change of the inventory: a network, a name, a connector. A
/// look also finds connectors by other images; this only saves the wait.
fn concerns_neighbours(event: &Event) -> bool {
    match event.action {
        Action::Network | Action::Rename => true,
        Action::Start | Action::End => {
            event.attributes.get("image").is_some_and(|image| image.to_ascii_lowercase().contains("cloudflared"))
        }
        Action::Container => false,
    }
}

/// Returns the container, if it is enabled, with only the labels that may leave the host, and the labels beyond the
/// limits that are left out.
pub(crate) fn counted_with(mut container: Container) -> Option<(Container, Option<Excess>)> {
    if !is_enabled(&container.labels) {
        return None;
    }
    container.labels.retain(|key, _| may_leave(key));
    let excess = labels::bound(&mut container.labels, usize::MAX);
    Some((container, excess))
}

/// Returns the exit code of a container, under Docker's or Podman's name for it.
fn exit_code(event: &Event) -> Option<i64> {
    let code = ["exitCode", "containerExitCode"].iter().find_map(|key| event.attributes.get(*key))?;
    code.parse().ok()
}

/// Remember this many containers with labels that are left out.
const MOST_EXCESS: usize = 1000;

/// Recognizes events that were already applied: `since` repeats those of its own instant.
#[derive(Debug, Default)]
struct Seen {
    latest: i64,
    recent: VecDeque<(i64, String, Action)>,
}

impl Seen {
    fn is_new(&mut self, event: &Event) -> bool {
        self.latest = self.latest.max(event.at);
        let key = (event.at, event.id.clone(), event.action.clone());
        // Events without a time cannot be told apart.
        if event.at != 0 && self.recent.contains(&key) {
            return false;
        }
        self.recent.push_back(key);
        if self.recent.len() > REMEMBERED {
            self.recent.pop_front();
        }
        true
    }

    /// Returns where to resume a cut stream: seconds and nanoseconds of the Engine's clock.
    fn since(&self) -> Option<String> {
        (self.latest > 0).then(|| format!("{}.{:09}", self.latest / 1_000_000_000, self.latest % 1_000_000_000))
    }
}

#[cfg(test)]
mod tests;
