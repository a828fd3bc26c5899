//! All access to the data folder goes through this module.
//!
//! Each document is one small file, mode 0600, replaced as a whole: the store writes a file beside it, fsyncs it,
//! renames it and fsyncs the folder. A crash leaves either the old text or the new one. Names and keys are the Python
//! agent's, so operators can switch agents and switch back. A file that does not parse is renamed and reported, never
//! silently ignored. One agent at a time owns the folder: see `lock`.

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

/// Name of the lock file, locked as long as the [`Store`] or a clone of it lives.
const LOCK: &str = "agent.lock";

/// Why the data folder cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The folder does not exist and cannot be created, or cannot be written.
    #[error("the data folder {} cannot be written by uid {uid}{}: {problem}; {}", .dir.display(),
        .owner.map(|owner| format!(" (it belongs to uid {owner})")).unwrap_or_default(), remedy(.problem, *.uid, .dir))]
    Folder {
        /// The folder.
        dir: PathBuf,
        /// The user that the agent runs as.
        uid: u32,
        /// The folder's owner, if the folder exists.
        owner: Option<u32>,
        /// The system's error.
        problem: io::Error,
    },
    /// The disk or network file system does not answer.
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
        /// What the other agent wrote about itself in the lock file.
        holder: String,
    },
    /// A file exists but cannot be read, replaced or set aside.
    #[error("{} cannot be {doing}", .path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// `read`, `replaced` or `set aside`.
        doing: &'static str,
        /// The system's error.
        source: io::Error,
    },
}

/// The user that this process runs as.
fn own_uid() -> u32 {
    nix::unistd::getuid().as_raw()
}

/// The remedy for a folder that cannot be written.
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

/// The data folder, owned by this agent as long as a clone of this lives. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Store {
    dir: Arc<Path>,
    writes: Arc<Aside<io::Result<()>>>,
    /// The last write failed and may have left a file behind.
    failed: Arc<AtomicBool>,
    /// Closing the lock file releases the folder.
    lock: Arc<Lock>,
}

/// A document that does not parse, and its new name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SetAside {
    /// Its former name.
    pub name: &'static str,
    /// Its present path.
    pub to: PathBuf,
    /// What is wrong with it, without its content.
    pub problem: String,
}

/// A document, if there is one, and the file that was set aside if it did not parse.
#[derive(Debug)]
pub struct Found<T> {
    /// The document, if there is one.
    pub document: Option<T>,
    /// The file that was set aside instead.
    pub set_aside: Option<SetAside>,
}

const AGENT_ID: &str = "agent_id.txt";
const TUNNEL: &str = "tunnel_state.json";
/// Name of the tombstone; an operator deletes it to enroll the agent again.
pub const TOMBSTONE: &str = "decommission.json";
const REPORTED: &str = "reported.json";
/// Written and removed to test whether the folder can be written.
const WRITABLE: &str = ".writable";

/// A write that takes longer counts as failed. Below the 10 s that Docker gives a container to stop.
const WRITE_LIMIT: Duration = Duration::from_secs(5);
/// Limit for opening the folder and reading its documents.
const OPEN_LIMIT: Duration = Duration::from_secs(30);

/// Maximum size of a document. No agent writes one anywhere near as large.
const MAX_DOCUMENT_BYTES: u64 = 1 << 20;

/// The folder's content at the start.
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

/// The error for a disk that does not answer.
fn hangs() -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, "the disk or the network file system does not answer")
}

impl Store {
    /// Opens the folder and reads all documents, on a separate thread.
    ///
    /// # Errors
    /// As [`Store::open`] and [`Store::agent_id`]; [`StateError::Hangs`] after 30 s.
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

    /// Opens the folder, and creates it if it is missing. Takes the lock, tests that the folder can be written, and
    /// removes what a crash during a write left behind.
    ///
    /// # Errors
    /// [`StateError::Folder`] names the user, the owner and the remedy. [`StateError::Taken`] names the agent that uses
    /// the folder.
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
        // A file system without locks keeps nobody out: another agent may be in the middle of a write.
        if lock.is_held() {
            leftovers::remove(dir);
        }
        let store = Self { dir: dir.into(), writes: Arc::default(), failed: Arc::default(), lock: Arc::new(lock) };
        let probe = dir.join(WRITABLE);
        store.replace(WRITABLE, b"").and_then(|()| fs::remove_file(probe)).map_err(unusable)?;
        Ok(store)
    }

    /// Path of the folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Reads `agent_id.txt`, which holds the id and nothing else.
    ///
    /// # Errors
    /// When the file exists but cannot be read or set aside.
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
    /// When the write fails; the old file is then still complete.
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

    /// Replaces `reported.json`, or removes it for `None`.
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

    /// Writes on a separate thread: a disk that hangs must not stop the events. After [`WRITE_LIMIT`] the write counts
    /// as failed. It may still complete, but never after a later one.
    async fn save(&self, name: &'static str, text: Vec<u8>) -> Result<(), StateError> {
        let store = self.clone();
        let written = self.writes.after_earlier(WRITE_LIMIT, move || store.replace(name, &text)).await;
        written.unwrap_or_else(|| Err(hangs())).map_err(|source| self.failed(name, "replaced", source))
    }

    /// Tests whether the folder can be written: creates a file and removes it, without fsync. Blocks as long as the
    /// disk does.
    ///
    /// # Errors
    /// The system's error and the remedy, as one sentence for the operator.
    pub fn try_out(&self) -> Result<(), String> {
        let path = self.dir.join(WRITABLE);
        fs::write(&path, b"?").and_then(|()| fs::remove_file(&path)).map_err(|problem| {
            let remedy = remedy(&problem, own_uid(), &self.dir);
            format!("the data folder {} cannot be written ({problem}): {remedy}", self.dir.display())
        })
    }

    /// Runs one at a time. A failed write may leave a file with a token in it, and a disk that keeps failing would fill
    /// up with such files. Remove them at once, or with the next write.
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

    /// A name that is not taken: setting aside twice keeps both files.
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

/// Why a document was not read.
enum Unread {
    /// The system cannot read it.
    Io(io::Error),
    /// It does not parse. Says what is wrong with it, without its content.
    Content(String),
}

/// Reads a document; `None` if the file does not exist.
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

/// Parses a document. The error gives the position and never the content.
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

    /// A token for this tunnel that cloudflared would accept.
    pub(crate) fn token(tunnel: &str) -> String {
        let json = serde_json::json!({ "a": "acc", "t": tunnel, "s": "c2VjcmV0" });
        base64::engine::general_purpose::STANDARD.encode(json.to_string())
    }
}

#[cfg(test)]
mod hostile;
#[cfg(test)]
mod tests;
