//! The lease: how long the tunnel stays after its agent has said goodbye, and what ends that.
//!
//! ```text
//!              goodbye            its connection closes             the lease ends
//!   no lease ──────────> parting ───────────────────────> held ───────────────────────> removed, no lease
//!      ^                    └─── an agent is connected then ──┴── an agent connects ──┐
//!      └──────────────────────────────────────────────────────────────────────────────┘
//! ```
//!
//! An agent counts as connected while it listens to events. Only a running agent makes that call; `check` and Docker's
//! health checks do not. Without a goodbye, as after a crash or a kill, the proxy never removes anything.
//!
//! A proxy that is asked to stop must tell an upgrade from a final shutdown. Compose stops the agent first only on
//! `down`, so the agent's connection has closed by then. On `restart` and `up`, Compose asks both at the same moment,
//! and the agent stays connected for a second after its goodbye. So the proxy removes the tunnel if a goodbye was said
//! and the connection has closed, and keeps it otherwise.
//!
//! The proxy also writes the lease to disk, beside the socket, before it answers the goodbye. After a SIGKILL, the next
//! proxy goes on with it. The lease is timed by the host's uptime, which nobody can set. After a reboot of unknown
//! length, the lease begins anew. In any case, the agent gets [`LEAST_LEFT`] to connect to a proxy that has just
//! started. While Docker does not answer, no agent can come back, for example when Docker starts its containers before
//! its API. Then [`LEAST_LEFT`] counts from Docker's first answer.

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

/// The longest lease that an agent may ask for, in seconds.
pub(super) const LONGEST: u64 = 3600;
/// The least time that a proxy leaves of a lease when it starts: an agent that starts with it needs a moment.
const LEAST_LEFT: Duration = Duration::from_secs(15);
/// How often to ask Docker while it does not answer. [`ANSWERS_WITHIN`] is the time limit for its answer.
const ASK_EVERY: Duration = Duration::from_secs(1);
const ANSWERS_WITHIN: Duration = Duration::from_secs(2);
/// Time limit for the write, because the goodbye waits for it.
const WRITE_LIMIT: Duration = Duration::from_secs(1);
/// How long a proxy that is asked to stop waits to notice connections that have already closed.
const SETTLE: Duration = Duration::from_millis(100);
/// Most names in a file. There are two after the tunnel container's name has changed in the settings.
const MOST_NAMES: usize = 8;
/// Most bytes of a file: enough for the most names with the most ids, each of the greatest length.
const MOST_BYTES: u64 = 64 << 10;

/// Most ids of one agent that are known to have been its own.
pub(super) const MOST_AGENTS: usize = 32;

/// The tunnel containers of a lease, by name: the current name, and another one if the setting has changed since. Each
/// has the ids of the agents that may have created it; the proxy never touches another agent's container.
type Containers = BTreeMap<String, Vec<AgentId>>;

/// The state of the agent and its goodbye. Pure; the tables in the tests are the specification.
#[derive(Debug, Default)]
struct Standing {
    lease: Option<Lease>,
    /// Open connections on which an agent has said goodbye.
    parting: usize,
    /// Connected agents.
    agents: usize,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Lease {
    containers: Containers,
    seconds: u64,
    ends: Instant,
}

/// What to do with the tunnel.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    /// Keep it: nobody has said goodbye, or an agent is connected.
    Stays,
    /// Keep it until this instant, or until something changes.
    Held(Option<Instant>),
    /// Remove the containers of these names, and their successors.
    Goes(Containers),
}

impl Standing {
    fn goodbye(&mut self, own: &str, seconds: u64, agents: Vec<AgentId>, now: Instant) {
        let mut containers = self.lease.take().map(|lease| lease.containers).unwrap_or_default();
        containers.insert(own.to_owned(), agents);
        self.lease = Some(Lease { containers, seconds, ends: now + Duration::from_secs(seconds) });
        self.parting += 1;
    }

    /// Docker answers again: give an agent time to come back through this proxy, however long the outage was.
    fn docker_is_back(&mut self, now: Instant) {
        if let Some(lease) = &mut self.lease {
            lease.ends = lease.ends.max(now + LEAST_LEFT);
        }
    }

    /// Called after each change. An agent that is connected while none is parting takes over the container of this
    /// name. Returns whether it has just done so.
    fn settle(&mut self, own: &str) -> bool {
        self.parting == 0 && self.agents > 0 && self.ended(own)
    }

    /// Drops the container of this name from the lease. Returns whether the lease held it.
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

    /// The verdict when the proxy is asked to stop.
    fn last_verdict(&self) -> Verdict {
        match &self.lease {
            Some(lease) if self.parting == 0 && self.agents == 0 => Verdict::Goes(lease.containers.clone()),
            Some(_) => Verdict::Held(None),
            None => Verdict::Stays,
        }
    }
}

/// The lease's actions on containers. Tests use a double.
pub(super) trait Hands: Sync {
    /// Whether Docker answers.
    fn answers(&self) -> impl Future<Output = bool>;

    /// Stops the container of this name, with its drain, and removes it, if one of these agents created it.
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
        // Docker also finds a container by a prefix of its id.
        let found = self.inspect(name).await?.filter(|seen| seen.name == name);
        let Some(found) = found.filter(|seen| owner(seen, Whose::Of(agents)) == Owner::Agent) else { return Ok(()) };
        if found.state == RunState::Running {
            info!(container = name, "stopping the tunnel");
            self.stop_as_made(&found.id).await?;
        }
        // An agent that is back has seen that the tunnel is down, and creates it again.
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
    /// Whether a lease existed at the start.
    resumed: bool,
    /// A std mutex: no await happens under it.
    standing: Mutex<Standing>,
    changed: Notify,
    file: AsyncMutex<File>,
}

/// The file that stores the lease. None for a proxy without a folder of its own.
#[derive(Debug)]
struct File {
    path: Option<PathBuf>,
    /// The lease in the file; `None` if unknown, because an earlier proxy or a failed write left it.
    written: Option<Option<Lease>>,
    aside: Aside<io::Result<()>>,
}

/// An agent's connection; the agent counts as present while this lives.
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
    /// Opens the lease file at `path`, if there is one. An existing lease goes on.
    pub(super) fn open(own: &str, path: Option<PathBuf>) -> Arc<Self> {
        let found = path.as_deref().map(|path| read(path, &Uptime::now())).unwrap_or(Ok(None));
        let lease = found.unwrap_or_else(|problem| {
            warn!("the lease of the tunnel {problem}; it is dropped and the tunnel stays as it is, remove it with docker rm -f if it is not wanted any more");
            // A file that cannot be read now will not be readable later.
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
        // Write an existing lease again: its time may have begun anew.
        let written = if lease.is_some() { None } else { Some(None) };
        Arc::new(Self {
            own: own.to_owned(),
            resumed: lease.is_some(),
            standing: Mutex::new(Standing { lease, ..Standing::default() }),
            changed: Notify::new(),
            file: AsyncMutex::new(File { path, written, aside: Aside::default() }),
        })
    }

    /// An agent says goodbye: hold the tunnel for this many seconds after the agent has gone. The lease is on disk when
    /// this returns, unless its disk refuses or hangs.
    pub(super) async fn goodbye(self: &Arc<Self>, seconds: u64, agents: Vec<AgentId>) -> Presence {
        self.change(|standing, own| standing.goodbye(own, seconds, agents, Instant::now()));
        let presence = Presence { leases: self.clone(), is_parting: true };
        info!(seconds, "the agent says goodbye; the tunnel is held for one that comes back");
        self.persist().await;
        presence
    }

    /// An agent connects.
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

    /// Writes the current lease to the file, or removes the file.
    async fn persist(&self) {
        let mut file = self.file.lock().await;
        let lease = self.standing().lease.clone();
        let Some(path) = file.path.clone().filter(|_| file.written.as_ref() != Some(&lease)) else { return };
        let due = lease.clone();
        // A disk that hangs must delay neither an agent that comes back, nor one that stops.
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

    /// Carries out the lease until `stop`, and then the last verdict.
    pub(super) async fn keep(&self, hands: &impl Hands, stop: &CancellationToken) {
        let mut pauses = Backoff::new(Duration::from_secs(1), Duration::from_secs(60));
        let mut trouble = Trouble::new("the tunnel that no agent came back for");
        // A proxy that finds a lease has just started, perhaps together with Docker.
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

    /// Carries out the last verdict when the proxy is asked to stop.
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

    /// Removes the containers of these names and their successors, and takes what was removed off the lease.
    async fn carry_out(&self, hands: &impl Hands, containers: &Containers) -> Result<(), DockerError> {
        for (name, agents) in containers {
            // Another goodbye begins another lease, for another container.
            let ends = self.standing().lease.as_ref().map(|lease| lease.ends);
            let still = |standing: &Standing| {
                standing
                    .lease
                    .as_ref()
                    .is_some_and(|lease| Some(lease.ends) == ends && lease.containers.contains_key(name))
            };
            let is_back = || !still(&self.standing());
            let next = successor_of(name);
            // In parallel: each may drain for 30 s.
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

/// The host's own clock: the current boot, and the time since it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Uptime {
    boot: String,
    millis: u64,
}

impl Uptime {
    /// If the system does not report its boot, no two boots count as the same, and a lease begins anew.
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
    /// The boot during which the lease ends, and when: milliseconds since that boot.
    boot: String,
    ends: u64,
}

/// Writes the file, or removes it if there is no lease.
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
    // Writes a new file and renames it, so that a kill in between never leaves half a lease. A power cut may lose the
    // file, which does no harm: the tunnel stays then.
    let new = path.with_extension("new");
    let mut file = std::fs::File::create(&new)?;
    file.write_all(&text)?;
    file.sync_data()?;
    std::fs::rename(&new, path)
}

/// Reads the file. An unreadable file is an error, worded for people.
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

/// `None` if one of its names or ids is invalid.
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
