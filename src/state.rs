//! The one place that touches the data folder.
//!
//! Each document is one small file, mode 0600, replaced as a whole: written beside, fsynced, renamed, and the
//! folder fsynced, so that a crash leaves the old or the new text and nothing between. The names and keys are
//! those of the Python agent, so that people can switch and switch back. A file that cannot be understood is
//! set aside under another name and said so; it is never treated as if it had not been there without a word.
//! The folder is one agent's at a time: see `lock`.

#![expect(clippy::disallowed_methods, reason = "what is not async here runs on threads of its own, by `Aside`")]

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use atomic_write_file::unix::OpenOptionsExt as _;
use dockflare_host::aside::Aside;
use dockflare_host::disk;
use serde::{Deserialize, Serialize};

mod documents;
mod leftovers;
mod peek;
use dockflare_host::lock::{self, Lock, Refused};
pub use documents::{AgentId, DesiredState, Phase, Reported, Token, TokenClaims, Tombstone, TunnelId, TunnelState};
#[cfg(test)]
pub(crate) use peek::peek;
pub(crate) use peek::{Folder, files, peek_soon};

/// Name of the file that is locked for as long as the [`Store`] and its clones live.
const LOCK: &str = "agent.lock";

/// Why the data folder cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The folder does not exist and cannot be made, or cannot be written.
    #[error("the data folder {} cannot be written by uid {uid}{}: {problem}; {}", .dir.display(),
        .owner.map(|owner| format!(" (it belongs to uid {owner})")).unwrap_or_default(), remedy(.problem, *.uid, .dir))]
    Folder {
        /// The folder.
        dir: PathBuf,
        /// Who the agent runs as.
        uid: u32,
        /// Whose folder it is, where it exists.
        owner: Option<u32>,
        /// What the system said.
        problem: io::Error,
    },
    /// Its disk, or a network file system, does not answer.
    #[error("the data folder {} does not answer: see to the disk or the network file system", .dir.display())]
    Hangs {
        /// The folder.
        dir: PathBuf,
    },
    /// Another agent uses the folder.
    #[error("the data folder {} is in use by another agent: {holder}; stop that one, or give this one a folder or volume of its own (DOCKFLARE_DATA_DIR)",
        .dir.display())]
    Taken {
        /// The folder.
        dir: PathBuf,
        /// What the other one wrote of itself.
        holder: String,
    },
    /// A file is there but cannot be read, or could not be replaced.
    #[error("{} cannot be {doing}", .path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// `read`, `replaced` or `set aside`.
        doing: &'static str,
        /// What the system said.
        source: io::Error,
    },
}

/// The user this runs as.
fn own_uid() -> u32 {
    nix::unistd::getuid().as_raw()
}

/// What an operator can do about a folder that cannot be written.
fn remedy(problem: &io::Error, uid: u32, dir: &Path) -> String {
    use nix::libc;
    let owner = fs::metadata(dir).ok().map(|folder| folder.uid());
    let dir = dir.display();
    match (problem.kind(), problem.raw_os_error()) {
        (io::ErrorKind::ReadOnlyFilesystem, _) => format!("mount a volume or a folder that can be written at {dir}"),
        (io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded, _) => "make room on its disk".to_owned(),
        (io::ErrorKind::TimedOut, _) => "see to the disk or the network file system".to_owned(),
        (io::ErrorKind::NotADirectory | io::ErrorKind::AlreadyExists, _) => {
            "a file is in the way: set DOCKFLARE_DATA_DIR to a folder".to_owned()
        }
        (io::ErrorKind::NotFound, _) => {
            "nothing can be made there: set DOCKFLARE_DATA_DIR to a folder on a volume".to_owned()
        }
        (io::ErrorKind::PermissionDenied, _) if owner == Some(uid) => format!(
            "the folder belongs to this user already: run chmod 700 {dir}, and with SELinux mount it with :z or :Z"
        ),
        (io::ErrorKind::PermissionDenied, _) => {
            format!("run: chown -R {uid} {dir} (on the host, on the folder or volume mounted there)")
        }
        (_, Some(libc::EMFILE | libc::ENFILE)) => {
            "too many files are open: raise the limit of this container (--ulimit nofile) or of the host".to_owned()
        }
        (_, Some(libc::EIO)) => {
            "the disk reports errors: see dmesg on the host, and have a copy of the folder before it is gone".to_owned()
        }
        (_, Some(libc::ESTALE | libc::ENOTCONN | libc::ENODEV)) => {
            "the file system behind it is gone: mount it again, then start the agent anew".to_owned()
        }
        _ => "see what the system says, and the host's dmesg".to_owned(),
    }
}

/// The data folder, which is this agent's as long as a clone of this lives. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Store {
    dir: Arc<Path>,
    writes: Arc<Aside<io::Result<()>>>,
    /// A write failed, and what it left may be there.
    failed: Arc<AtomicBool>,
    /// Closing its file gives the folder back.
    lock: Arc<Lock>,
}

/// A document that could not be understood and where it was put.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SetAside {
    /// The name it had.
    pub name: &'static str,
    /// Where it is now.
    pub to: PathBuf,
    /// What is wrong with it; none of its content.
    pub problem: String,
}

/// A document, or nothing, and what had to be set aside to say so.
#[derive(Debug)]
pub struct Found<T> {
    /// The document, when there is one.
    pub document: Option<T>,
    /// What was there instead.
    pub set_aside: Option<SetAside>,
}

const AGENT_ID: &str = "agent_id.txt";
const TUNNEL: &str = "tunnel_state.json";
/// Name of the tombstone; an operator deletes it to enrol the agent again.
pub const TOMBSTONE: &str = "decommission.json";
const REPORTED: &str = "reported.json";
/// Written and removed, to see whether the folder can be written.
const WRITABLE: &str = ".writable";

/// A write that takes longer counts as refused. Below the time that Docker leaves a container to stop, 10 s.
const WRITE_LIMIT: Duration = Duration::from_secs(5);
/// For opening the folder and reading its documents.
const OPEN_LIMIT: Duration = Duration::from_secs(30);

/// No document comes near this; whatever is larger was not written by an agent.
const MAX_DOCUMENT_BYTES: u64 = 1 << 20;

/// What the folder holds at the start.
#[derive(Debug)]
pub struct Opened {
    /// The folder.
    pub store: Store,
    /// `agent_id.txt`.
    pub agent_id: Found<AgentId>,
    /// `decommission.json`.
    pub tombstone: Found<Tombstone>,
    /// `tunnel_state.json`.
    pub tunnel: Found<TunnelState>,
    /// `reported.json`.
    pub reported: Found<Reported>,
}

/// What the system would say of a disk that does not answer.
fn hangs() -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, "the disk or the network file system does not answer")
}

impl Store {
    /// Opens the folder and reads all of it, on a thread of its own.
    ///
    /// # Errors
    /// As [`Store::open`] and [`Store::agent_id`]; [`StateError::Hangs`] when that takes half a minute.
    pub async fn open_and_read(dir: PathBuf) -> Result<Opened, StateError> {
        let folder = dir.clone();
        let aside = Aside::default();
        let opened = aside.after_earlier(OPEN_LIMIT, move || {
            let store = Self::open(&folder)?;
            let (agent_id, tombstone, tunnel) = (store.agent_id()?, store.tombstone()?, store.tunnel()?);
            let reported = store.reported()?;
            Ok(Opened { store, agent_id, tombstone, tunnel, reported })
        });
        opened.await.unwrap_or(Err(StateError::Hangs { dir }))
    }

    /// Opens the folder, making it when it is missing: takes its lock, proves that it can be written, and removes
    /// what a crash in the middle of a write has left.
    ///
    /// # Errors
    /// [`StateError::Folder`] names the user, the owner and the command that mends it; [`StateError::Taken`] the
    /// agent that uses the folder.
    pub fn open(dir: &Path) -> Result<Self, StateError> {
        let unusable = |problem| StateError::Folder {
            dir: dir.to_owned(),
            uid: own_uid(),
            owner: fs::metadata(dir).ok().map(|folder| folder.uid()),
            problem,
        };
        fs::create_dir_all(dir).map_err(unusable)?;
        let lock = lock::take(&dir.join(LOCK)).map_err(|refused| match refused {
            Refused::Taken(holder) => StateError::Taken { dir: dir.to_owned(), holder },
            Refused::Io(problem) => unusable(problem),
        })?;
        // Another one may be in the middle of writing where nobody can be kept out.
        if lock.is_held() {
            leftovers::remove(dir);
        }
        let store = Self { dir: dir.into(), writes: Arc::default(), failed: Arc::default(), lock: Arc::new(lock) };
        let probe = dir.join(WRITABLE);
        store.replace(WRITABLE, b"").and_then(|()| fs::remove_file(probe)).map_err(unusable)?;
        Ok(store)
    }

    /// Where the folder is.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Reads `agent_id.txt`: the id, nothing else.
    ///
    /// # Errors
    /// When the file is there and cannot be read or set aside.
    pub fn agent_id(&self) -> Result<Found<AgentId>, StateError> {
        self.read(AGENT_ID, parse_id)
    }

    /// Reads `tunnel_state.json`.
    ///
    /// # Errors
    /// As [`Store::agent_id`].
    pub fn tunnel(&self) -> Result<Found<TunnelState>, StateError> {
        self.read(TUNNEL, parse_json)
    }

    /// Reads `decommission.json`.
    ///
    /// # Errors
    /// As [`Store::agent_id`].
    pub fn tombstone(&self) -> Result<Found<Tombstone>, StateError> {
        self.read(TOMBSTONE, parse_tombstone)
    }

    /// Reads `reported.json`.
    ///
    /// # Errors
    /// As [`Store::agent_id`].
    pub fn reported(&self) -> Result<Found<Reported>, StateError> {
        self.read(REPORTED, parse_json)
    }

    /// Replaces `agent_id.txt`.
    ///
    /// # Errors
    /// When the disk refuses; the old file is then still whole.
    pub async fn save_agent_id(&self, id: &AgentId) -> Result<(), StateError> {
        self.save(AGENT_ID, id.as_str().as_bytes().to_vec()).await
    }

    /// Replaces `tunnel_state.json`.
    ///
    /// # Errors
    /// As [`Store::save_agent_id`].
    pub async fn save_tunnel(&self, state: &TunnelState) -> Result<(), StateError> {
        self.save_json(TUNNEL, state).await
    }

    /// Replaces `decommission.json`.
    ///
    /// # Errors
    /// As [`Store::save_agent_id`].
    pub async fn save_tombstone(&self, tombstone: &Tombstone) -> Result<(), StateError> {
        self.save_json(TOMBSTONE, tombstone).await
    }

    /// Replaces `reported.json`, or removes it.
    ///
    /// # Errors
    /// As [`Store::save_agent_id`].
    pub async fn save_reported(&self, reported: Option<&Reported>) -> Result<(), StateError> {
        if let Some(reported) = reported {
            return self.save_json(REPORTED, reported).await;
        }
        let path = self.dir.join(REPORTED);
        let removed = self.writes.after_earlier(WRITE_LIMIT, move || fs::remove_file(path)).await;
        match removed.unwrap_or_else(|| Err(hangs())) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(self.failed(REPORTED, "removed", error)),
            _ => Ok(()),
        }
    }

    async fn save_json(&self, name: &'static str, document: &impl Serialize) -> Result<(), StateError> {
        let text = serde_json::to_vec_pretty(document).map_err(|error| self.failed(name, "replaced", error.into()))?;
        self.save(name, text).await
    }

    /// Writes on a thread of its own: a disk that hangs must not stop the events. After a while it counts as refused;
    /// it may still be done, but never after a later one.
    async fn save(&self, name: &'static str, text: Vec<u8>) -> Result<(), StateError> {
        let store = self.clone();
        let written = self.writes.after_earlier(WRITE_LIMIT, move || store.replace(name, &text)).await;
        written.unwrap_or_else(|| Err(hangs())).map_err(|source| self.failed(name, "replaced", source))
    }

    /// Sees whether the folder can be written: makes a file and removes it, without waiting for the disk itself.
    /// Blocks as long as that takes.
    ///
    /// # Errors
    /// What the system says, with the remedy, for people.
    pub fn try_out(&self) -> Result<(), String> {
        let path = self.dir.join(WRITABLE);
        fs::write(&path, b"?").and_then(|()| fs::remove_file(&path)).map_err(|problem| {
            let remedy = remedy(&problem, own_uid(), &self.dir);
            format!("the data folder {} cannot be written ({problem}): {remedy}", self.dir.display())
        })
    }

    /// One at a time. What a write leaves that failed has a token in it, and a disk that refuses for long would be
    /// filled with it: it is removed at once, or with the next write.
    fn replace(&self, name: &str, text: &[u8]) -> io::Result<()> {
        let written = self.write(name, text);
        let failed_before = self.failed.swap(written.is_err(), Ordering::Relaxed);
        if (written.is_err() || failed_before) && self.lock.is_held() {
            leftovers::remove(&self.dir);
        }
        written
    }

    fn write(&self, name: &str, text: &[u8]) -> io::Result<()> {
        let mut file = atomic_write_file::OpenOptions::new()
            .mode(0o600)
            .preserve_mode(false)
            .try_preserve_owner(true)
            .open(self.dir.join(name))?;
        file.write_all(text)?;
        file.commit()
    }

    fn read<T>(
        &self,
        name: &'static str,
        parse: impl FnOnce(Vec<u8>) -> Result<T, String>,
    ) -> Result<Found<T>, StateError> {
        let path = self.dir.join(name);
        match document(&path, parse) {
            Ok(document) => Ok(Found { document, set_aside: None }),
            Err(Unread::Io(error)) => Err(self.failed(name, "read", error)),
            Err(Unread::Content(problem)) => {
                let to = self.free_name(name);
                fs::rename(&path, &to).map_err(|error| self.failed(name, "set aside", error))?;
                Ok(Found { document: None, set_aside: Some(SetAside { name, to, problem }) })
            }
        }
    }

    /// A name that is not taken, so that setting aside twice keeps both.
    fn free_name(&self, name: &str) -> PathBuf {
        let day = jiff::Timestamp::now().strftime("%Y%m%dT%H%M%SZ");
        let base = format!("{name}.unreadable-{day}");
        let names = std::iter::once(base.clone()).chain((1..).map(|n| format!("{base}.{n}")));
        names.map(|name| self.dir.join(name)).find(|path| !path.exists()).unwrap_or_else(|| self.dir.join(base))
    }

    fn failed(&self, name: &str, doing: &'static str, source: io::Error) -> StateError {
        StateError::File { path: self.dir.join(name), doing, source }
    }
}

/// Why a document is not known.
enum Unread {
    /// The system does not give it.
    Io(io::Error),
    /// It cannot be understood; what is wrong with it, and none of its content.
    Content(String),
}

/// Reads a document, or that there is none.
fn document<T>(path: &Path, parse: impl FnOnce(Vec<u8>) -> Result<T, String>) -> Result<Option<T>, Unread> {
    match disk::read(path, MAX_DOCUMENT_BYTES) {
        Ok(bytes) => parse(bytes).map(Some).map_err(Unread::Content),
        Err(unread) if unread.is_missing() => Ok(None),
        Err(disk::Unread::Io(error)) => Err(Unread::Io(error)),
        Err(other) => Err(Unread::Content(other.to_string())),
    }
}

fn parse_id(text: Vec<u8>) -> Result<AgentId, String> {
    let text = String::from_utf8(text).map_err(|_| "is not UTF-8".to_owned())?;
    AgentId::try_from(text.trim().to_owned()).map_err(str::to_owned)
}

fn parse_tombstone(text: Vec<u8>) -> Result<Tombstone, String> {
    let tombstone: Tombstone = parse_json(text)?;
    if tombstone.schema_version != 1 {
        return Err(format!("has schema_version {}, this agent knows 1", tombstone.schema_version));
    }
    Ok(tombstone)
}

/// Parses a document; the message of a failure tells the place and never the content.
fn parse_json<T: for<'de> Deserialize<'de>>(text: Vec<u8>) -> Result<T, String> {
    serde_json::from_slice(&text).map_err(|error| match error.classify() {
        serde_json::error::Category::Data => {
            format!("has a wrong value at line {} column {}", error.line(), error.column())
        }
        _ => format!("is not JSON at line {} column {}", error.line(), error.column()),
    })
}

#[cfg(test)]
pub(crate) mod testing {
    use base64::Engine as _;

    /// A token that cloudflared would take, for this tunnel.
    pub(crate) fn token(tunnel: &str) -> String {
        let json = serde_json::json!({ "a": "acc", "t": tunnel, "s": "c2VjcmV0" });
        base64::engine::general_purpose::STANDARD.encode(json.to_string())
    }
}

#[cfg(test)]
mod hostile;
#[cfg(test)]
mod tests;
