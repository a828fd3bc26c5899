//! The lease: for how long the tunnel stays when its agent has said goodbye, and what ends that.
//!
//! ```text
//!              goodbye            its connection closes             the lease ends
//!   no lease ──────────> parting ───────────────────────> held ───────────────────────> removed, no lease
//!      ^                    └─── an agent is connected then ──┴── an agent connects ──┐
//!      └──────────────────────────────────────────────────────────────────────────────┘
//! ```
//!
//! An agent is connected while it listens to events: that call only an agent that runs makes, `check` and Docker's
//! own checks do not. Without a goodbye, as after a crash or a kill, nothing is ever removed.
//!
//! A proxy that is asked to stop has to tell an upgrade from the end of all. Compose stops the agent first only on
//! `down`, so there its connection has closed by then; on `restart` and `up` both are asked at the same moment, and the
//! agent stays connected for a second after its goodbye. So the tunnel goes when a goodbye was said and the connection
//! has closed, and stays otherwise.
//!
//! The lease is also on disk, beside the socket, before the goodbye is answered: a proxy that was killed goes on with
//! it. Its time is that of the host's uptime, which nobody sets. After a reboot, when nobody knows how long it took,
//! it begins anew, and in any case the agent gets [`LEAST_LEFT`] to connect to a proxy that has just started. While
//! Docker does not answer, as when it starts its containers before its API, no agent can come back: that time counts
//! from its first answer.

#![expect(clippy::disallowed_methods, reason = "a file is read once at the start, and written by `Aside`")]

use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use dockflare_host::aside::Aside;
use serde::{Deserialize, Serialize};
use tokio::sync::{Mutex as AsyncMutex, Notify};
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::config::successor_of;
use crate::docker::{Docker, DockerError, RunState};
use crate::health::{Owner, Whose, owner};
use crate::retry::{Backoff, Trouble};
use crate::state::AgentId;

/// The longest that an agent may ask for, in seconds.
pub(super) const LONGEST: u64 = 3600;
/// What a proxy that has just started leaves of a lease, at least: an agent that starts with it needs a moment.
const LEAST_LEFT: Duration = Duration::from_secs(15);
/// How often a Docker that does not answer is asked again, and what it gets for its answer.
const ASK_EVERY: Duration = Duration::from_secs(1);
const ANSWERS_WITHIN: Duration = Duration::from_secs(2);
/// The goodbye is to be answered by then.
const WRITE_LIMIT: Duration = Duration::from_secs(1);
/// What a proxy that is asked to stop allows itself to notice which connections have closed before.
const SETTLE: Duration = Duration::from_millis(100);
/// Names in a file; there are two when the tunnel container was given another name.
const MOST_NAMES: usize = 8;
/// As many names with as many ids of the greatest length are no more.
const MOST_BYTES: u64 = 64 << 10;

/// The ids of an agent that are known to have been its own.
pub(super) const MOST_AGENTS: usize = 32;

/// The tunnel containers that a lease is about: of this name, and of another one when the setting was changed since.
/// With each the ids of the agents that may have made it; another agent's is never touched.
type Containers = BTreeMap<String, Vec<AgentId>>;

/// What is known of the agent and its goodbye. Pure; the tables of tests are the specification.
#[derive(Debug, Default)]
struct Standing {
    lease: Option<Lease>,
    /// Connections on which a goodbye was said and that are still open.
    parting: usize,
    /// Agents that are connected.
    agents: usize,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Lease {
    containers: Containers,
    seconds: u64,
    ends: Instant,
}

/// What becomes of the tunnel.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    /// It stays: nobody has said goodbye, or an agent is there.
    Stays,
    /// It stays until then, or until something happens.
    Held(Option<Instant>),
    /// Of these names, with their successors.
    Goes(Containers),
}

impl Standing {
    fn goodbye(&mut self, own: &str, seconds: u64, agents: Vec<AgentId>, now: Instant) {
        let mut containers = self.lease.take().map(|lease| lease.containers).unwrap_or_default();
        containers.insert(own.to_owned(), agents);
        self.lease = Some(Lease { containers, seconds, ends: now + Duration::from_secs(seconds) });
        self.parting += 1;
    }

    /// Docker answers again: an agent gets a moment to come back through this proxy, however long that took.
    fn docker_is_back(&mut self, now: Instant) {
        if let Some(lease) = &mut self.lease {
            lease.ends = lease.ends.max(now + LEAST_LEFT);
        }
    }

    /// After each change: an agent that is connected when none is parting has taken over the container of this name.
    /// Whether it has just done so.
    fn settle(&mut self, own: &str) -> bool {
        self.parting == 0 && self.agents > 0 && self.ended(own)
    }

    /// The container of this name is not to be removed any more. Whether it was.
    fn ended(&mut self, name: &str) -> bool {
        let Some(lease) = &mut self.lease else { return false };
        let was_held = lease.containers.remove(name).is_some();
        if lease.containers.is_empty() {
            self.lease = None;
        }
        was_held
    }

    fn verdict(&self, now: Instant) -> Verdict {
        match &self.lease {
            None => Verdict::Stays,
            Some(_) if self.parting > 0 => Verdict::Held(None),
            Some(lease) if now < lease.ends => Verdict::Held(Some(lease.ends)),
            Some(lease) => Verdict::Goes(lease.containers.clone()),
        }
    }

    /// When the proxy is asked to stop.
    fn last_verdict(&self) -> Verdict {
        match &self.lease {
            Some(lease) if self.parting == 0 && self.agents == 0 => Verdict::Goes(lease.containers.clone()),
            Some(_) => Verdict::Held(None),
            None => Verdict::Stays,
        }
    }
}

/// What the lease does to containers. The tests have a double of it.
pub(super) trait Hands: Sync {
    /// Whether Docker answers.
    fn answers(&self) -> impl Future<Output = bool>;

    /// Stops and removes, with the drain, what one of these agents made under this name.
    fn remove(
        &self,
        name: &str,
        agents: &[AgentId],
        is_back: &dyn Fn() -> bool,
    ) -> impl Future<Output = Result<(), DockerError>>;
}

impl Hands for Docker {
    async fn answers(&self) -> bool {
        timeout(ANSWERS_WITHIN, self.ping()).await.is_ok_and(|answer| answer.is_ok())
    }

    async fn remove(&self, name: &str, agents: &[AgentId], is_back: &dyn Fn() -> bool) -> Result<(), DockerError> {
        // Docker also finds a container by the start of its id.
        let found = self.inspect(name).await?.filter(|seen| seen.name == name);
        let Some(found) = found.filter(|seen| owner(seen, Whose::Of(agents)) == Owner::Agent) else { return Ok(()) };
        if found.state == RunState::Running {
            info!(container = name, "stopping the tunnel");
            self.stop_as_made(&found.id).await?;
        }
        // It has seen by now that the tunnel is down, and makes it anew.
        if is_back() {
            return Ok(());
        }
        Docker::remove(self, &found.id).await?;
        info!(container = name, "tunnel stopped and removed");
        Ok(())
    }
}

/// Keeps the lease.
#[derive(Debug)]
pub(super) struct Leases {
    /// Name of the tunnel container.
    own: String,
    /// A lease was there at the start.
    resumed: bool,
    /// A std mutex: no await happens under it.
    standing: Mutex<Standing>,
    changed: Notify,
    file: AsyncMutex<File>,
}

/// Where the lease is kept. Nowhere for a proxy that has no folder of its own.
#[derive(Debug)]
struct File {
    path: Option<PathBuf>,
    /// What it says there; `None` for what a proxy before this one has written.
    written: Option<Option<Lease>>,
    aside: Aside<io::Result<()>>,
}

/// Somebody is there for as long as this lives.
#[derive(Debug)]
pub(super) struct Presence {
    leases: Arc<Leases>,
    is_parting: bool,
}

impl Drop for Presence {
    fn drop(&mut self) {
        self.leases.change(|standing, _| match self.is_parting {
            true => standing.parting -= 1,
            false => standing.agents -= 1,
        });
    }
}

impl Leases {
    /// `path`: where a lease is kept. One that is there already goes on.
    pub(super) fn open(own: &str, path: Option<PathBuf>) -> Arc<Self> {
        let found = path.as_deref().map(|path| read(path, &Uptime::now())).unwrap_or(Ok(None));
        let lease = found.unwrap_or_else(|problem| {
            warn!("the lease of the tunnel {problem}; it is dropped and the tunnel stays as it is, remove it with docker rm -f if it is not wanted any more");
            // What cannot be read now will not be read later.
            let _ = path.as_deref().map(std::fs::remove_file);
            None
        });
        if let Some(lease) = &lease {
            let left = lease.ends.saturating_duration_since(Instant::now()).as_secs();
            info!(
                seconds = left,
                "an agent said goodbye before this start; the tunnel is held for one that comes back"
            );
        }
        // What is there is written again: its time may have begun anew.
        let written = if lease.is_some() { None } else { Some(None) };
        Arc::new(Self {
            own: own.to_owned(),
            resumed: lease.is_some(),
            standing: Mutex::new(Standing { lease, ..Standing::default() }),
            changed: Notify::new(),
            file: AsyncMutex::new(File { path, written, aside: Aside::default() }),
        })
    }

    /// An agent says goodbye: the tunnel is held for so many seconds once it has gone. On disk when this returns.
    pub(super) async fn goodbye(self: &Arc<Self>, seconds: u64, agents: Vec<AgentId>) -> Presence {
        self.change(|standing, own| standing.goodbye(own, seconds, agents, Instant::now()));
        let presence = Presence { leases: self.clone(), is_parting: true };
        info!(seconds, "the agent says goodbye; the tunnel is held for one that comes back");
        self.persist().await;
        presence
    }

    /// An agent is connected.
    pub(super) async fn agent(self: &Arc<Self>) -> Presence {
        let was_held = self.standing().lease.is_some();
        self.change(|standing, _| standing.agents += 1);
        let presence = Presence { leases: self.clone(), is_parting: false };
        if was_held {
            self.persist().await;
        }
        presence
    }

    fn standing(&self) -> MutexGuard<'_, Standing> {
        self.standing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut Standing, &str)) {
        let mut standing = self.standing();
        change(&mut standing, &self.own);
        if standing.settle(&self.own) {
            info!("an agent is back and takes over the tunnel");
        }
        drop(standing);
        self.changed.notify_one();
    }

    /// Brings the file in line with what is known.
    async fn persist(&self) {
        let mut file = self.file.lock().await;
        let lease = self.standing().lease.clone();
        let Some(path) = file.path.clone().filter(|_| file.written.as_ref() != Some(&lease)) else { return };
        let due = lease.clone();
        // A disk that hangs must keep neither an agent that is back from Docker, nor one that stops.
        let written = file.aside.after_earlier(WRITE_LIMIT, move || write(&path, due.as_ref(), &Uptime::now())).await;
        let problem = match written {
            Some(Ok(())) => {
                file.written = Some(lease);
                return;
            }
            Some(Err(error)) => error.to_string(),
            None => "its disk does not answer".to_owned(),
        };
        file.written = None;
        warn!(
            "the lease of the tunnel cannot be written ({problem}); a socket proxy that is killed now forgets it, and the tunnel stays"
        );
    }

    /// Carries out what the lease says, until `stop`, and then what the last verdict is.
    pub(super) async fn keep(&self, hands: &impl Hands, stop: &CancellationToken) {
        let mut pauses = Backoff::new(Duration::from_secs(1), Duration::from_secs(60));
        let mut trouble = Trouble::new("the tunnel that no agent came back for");
        // Whoever comes to a lease that is there already has just started, perhaps with Docker itself.
        let mut is_away = self.resumed;
        loop {
            let changed = self.changed.notified();
            self.persist().await;
            if stop.is_cancelled() {
                break;
            }
            if is_away {
                tokio::select! {
                    () = stop.cancelled() => break,
                    answers = hands.answers() => is_away = !answers,
                }
                if !is_away {
                    self.standing().docker_is_back(Instant::now());
                    self.persist().await;
                }
            }
            let verdict = self.standing().verdict(Instant::now());
            let until = match verdict {
                Verdict::Stays => None,
                _ if is_away => Some(Instant::now() + ASK_EVERY),
                Verdict::Held(until) => until,
                Verdict::Goes(containers) => {
                    info!("no agent came back within the lease; removing the tunnel");
                    match self.carry_out(hands, &containers).await {
                        Ok(()) => {
                            trouble.ended();
                            pauses.reset();
                            continue;
                        }
                        Err(error) => {
                            is_away = error.is_away();
                            trouble.failed(&Unremoved(error), "trying again, unless an agent comes back");
                            Some(Instant::now() + pauses.next(None))
                        }
                    }
                }
            };
            let passes = async {
                match until {
                    Some(until) => sleep_until(until).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = stop.cancelled() => {}
                () = changed => {}
                () = passes => {}
            }
        }
        self.end(hands).await;
    }

    /// The proxy is asked to stop.
    async fn end(&self, hands: &impl Hands) {
        sleep(SETTLE).await;
        let verdict = self.standing().last_verdict();
        match verdict {
            Verdict::Stays => {}
            Verdict::Held(_) => {
                info!(
                    "asked to stop while an agent is connected; the tunnel stays, an agent that starts takes it over"
                );
            }
            Verdict::Goes(containers) => {
                info!("asked to stop after the agent; removing the tunnel");
                if let Err(error) = self.carry_out(hands, &containers).await {
                    warn!(
                        "the tunnel could not be removed, since Docker {error}; the next start of the socket proxy does it unless an agent comes back, or remove it with docker rm -f"
                    );
                }
            }
        }
        self.persist().await;
    }

    /// Removes the containers of these names and their successors. What was removed is no lease any more.
    async fn carry_out(&self, hands: &impl Hands, containers: &Containers) -> Result<(), DockerError> {
        for (name, agents) in containers {
            // Another goodbye begins another lease, of another container.
            let ends = self.standing().lease.as_ref().map(|lease| lease.ends);
            let still = |standing: &Standing| {
                standing
                    .lease
                    .as_ref()
                    .is_some_and(|lease| Some(lease.ends) == ends && lease.containers.contains_key(name))
            };
            let is_back = || !still(&self.standing());
            let next = successor_of(name);
            // Side by side: each may drain for half a minute.
            let (main, next) =
                tokio::join!(hands.remove(name, agents, &is_back), hands.remove(&next, agents, &is_back));
            main.and(next)?;
            let mut standing = self.standing();
            if still(&standing) {
                standing.ended(name);
            }
        }
        self.persist().await;
        Ok(())
    }
}

struct Unremoved(DockerError);

impl fmt::Display for Unremoved {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cannot be removed, since Docker {}", self.0)
    }
}

/// The host's own clock: since when it runs, and in which of its lives.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Uptime {
    boot: String,
    millis: u64,
}

impl Uptime {
    /// Where the system does not tell, each look is in a life of its own, and a lease begins anew.
    fn now() -> Self {
        let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        let uptime = std::fs::read_to_string("/proc/uptime").unwrap_or_default();
        let seconds = uptime.split(' ').next().and_then(|text| text.parse::<f64>().ok()).unwrap_or_default();
        Self { boot: boot.trim().to_owned(), millis: (seconds * 1000.0) as u64 }
    }
}

/// The lease as it is on disk.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    containers: BTreeMap<String, Vec<String>>,
    seconds: u64,
    /// In which life of the host, and when in it, the lease ends: milliseconds since its start.
    boot: String,
    ends: u64,
}

/// Writes the file, or removes it.
fn write(path: &Path, lease: Option<&Lease>, now: &Uptime) -> io::Result<()> {
    let Some(lease) = lease else {
        return match std::fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        };
    };
    let left = lease.ends.saturating_duration_since(Instant::now()).as_millis() as u64;
    let document = Document {
        containers: lease.containers.iter().map(|(name, agents)| (name.clone(), texts(agents))).collect(),
        seconds: lease.seconds,
        boot: now.boot.clone(),
        ends: now.millis + left,
    };
    let text = serde_json::to_vec(&document).map_err(io::Error::other)?;
    // Under one name, so that a kill in the middle leaves nothing that adds up. What a power cut loses is no loss: the
    // tunnel stays then.
    let new = path.with_extension("new");
    let mut file = std::fs::File::create(&new)?;
    file.write_all(&text)?;
    file.sync_data()?;
    std::fs::rename(&new, path)
}

/// Reads the file. One that cannot be read is an error, for people.
fn read(path: &Path, now: &Uptime) -> Result<Option<Lease>, String> {
    let file = match std::fs::File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        opened => opened,
    };
    let mut text = Vec::new();
    let read = file.and_then(|file| file.take(MOST_BYTES).read_to_end(&mut text));
    read.map_err(|error| format!("in {} cannot be read: {error}", path.display()))?;
    let understood = serde_json::from_slice::<Document>(&text).ok().and_then(|document| {
        let fits = document.seconds <= LONGEST && (1..=MOST_NAMES).contains(&document.containers.len());
        let containers = fits.then(|| containers(&document)).flatten()?;
        Some((document, containers))
    });
    let Some((document, containers)) = understood else { return Err(format!("in {} is no lease", path.display())) };
    let whole = Duration::from_secs(document.seconds);
    let left = if !now.boot.is_empty() && document.boot == now.boot {
        Duration::from_millis(document.ends.saturating_sub(now.millis)).min(whole)
    } else {
        whole
    };
    let left = left.max(LEAST_LEFT);
    Ok(Some(Lease { containers, seconds: document.seconds, ends: Instant::now() + left }))
}

fn texts(agents: &[AgentId]) -> Vec<String> {
    agents.iter().map(|id| id.as_str().to_owned()).collect()
}

/// None when a name or an id in it is none.
fn containers(document: &Document) -> Option<Containers> {
    let is_name = |name: &str| {
        let fits = |byte: u8| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte);
        (1..=128).contains(&name.len()) && name.bytes().all(fits)
    };
    let one = |(name, agents): (&String, &Vec<String>)| {
        let ids: Option<_> = agents.iter().map(|id| AgentId::try_from(id.clone()).ok()).collect();
        Some((name.clone(), ids?)).filter(|(name, _)| is_name(name))
    };
    document.containers.iter().map(one).collect()
}

#[cfg(test)]
mod tests;
