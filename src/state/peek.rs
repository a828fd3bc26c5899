//! Reads the folder without opening it, beside the agent that owns it or before one starts. Writes nothing, sets
//! nothing aside, locks nothing.

#![expect(clippy::disallowed_methods, reason = "a look runs on a thread of its own")]

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use dockflare_host::aside::Aside;
use dockflare_host::container::dies_with_container;
use nix::sys::statvfs::statvfs;
use nix::unistd::{AccessFlags, access};

use super::{AGENT_ID, AgentId, TOMBSTONE, TUNNEL, Tombstone, TunnelState, Unread, document, lock, own_uid, remedy};
use super::{parse_id, parse_json, parse_tombstone};

/// What could be seen of the folder.
#[derive(Debug)]
pub(crate) struct Folder {
    /// Whether the folder answered at all: its disk or network file system may hang.
    pub(crate) answers: bool,
    /// Whether the folder is part of the container and is lost with it.
    pub(crate) is_lost: bool,
    /// Whether the folder exists; an agent creates it when it starts.
    pub(crate) exists: bool,
    /// Whether an agent running as this user could write there.
    pub(crate) writable: Result<(), Unusable>,
    /// Free bytes for this user, and whether another file could be created.
    pub(crate) free: Option<(u64, bool)>,
    /// What the agent that owns the folder wrote about itself. Its lock is visible from the same container or from the
    /// host, not from another container.
    pub(crate) holder: Option<String>,
    /// `agent_id.txt`, or what is wrong with it.
    pub(crate) agent_id: Result<Option<AgentId>, String>,
    /// `tunnel_state.json`, likewise.
    pub(crate) tunnel: Result<Option<TunnelState>, String>,
    /// `decommission.json`, likewise.
    pub(crate) tombstone: Result<Option<Tombstone>, String>,
}

/// Why the folder could not be used.
#[derive(Debug)]
pub(crate) struct Unusable {
    /// What is wrong.
    pub(crate) problem: String,
    /// The remedy for the operator.
    pub(crate) remedy: String,
}

/// A file of the folder, without its content.
#[derive(Debug, serde::Serialize)]
pub(crate) struct FileFacts {
    name: String,
    bytes: u64,
    /// Octal.
    mode: String,
    uid: u32,
    gid: u32,
    /// RFC 3339.
    modified: String,
}

/// Maximum number of files to list. The agent has far fewer.
const MOST_FILES: usize = 100;

/// Limit for one look. A healthy disk answers in moments.
const LIMIT: Duration = Duration::from_secs(5);

impl Folder {
    /// The result for a folder that does not answer.
    fn silent(dir: &Path) -> Self {
        let problem = format!("{} did not answer within {} s", dir.display(), LIMIT.as_secs());
        let remedy = "see to its disk or network file system: an agent that runs goes on without it and stores nothing";
        Self {
            answers: false,
            is_lost: false,
            exists: true,
            writable: Err(Unusable { problem: problem.clone(), remedy: remedy.to_owned() }),
            free: None,
            holder: None,
            agent_id: Err(problem.clone()),
            tunnel: Err(problem.clone()),
            tombstone: Err(problem),
        }
    }
}

/// Looks at the folder on a separate thread, for at most [`LIMIT`].
pub(crate) async fn peek_soon(dir: PathBuf) -> Folder {
    let folder = dir.clone();
    let seen = Aside::default().after_earlier(LIMIT, move || peek(&folder)).await;
    seen.unwrap_or_else(|| Folder::silent(&dir))
}

/// Lists the files of the folder, never their content. Waits at most [`LIMIT`].
///
/// # Errors
/// When the folder cannot be read.
pub(crate) async fn files(dir: PathBuf) -> io::Result<Vec<FileFacts>> {
    let seen = Aside::default().after_earlier(LIMIT, move || list(&dir)).await;
    seen.unwrap_or_else(|| Err(super::hangs()))
}

/// Looks at the folder. Blocks as long as the disk does.
pub(crate) fn peek(dir: &Path) -> Folder {
    let exists = dir.exists();
    // A missing folder would be created in its nearest existing ancestor.
    let place = dir.ancestors().find(|place| place.exists()).unwrap_or(dir);
    let free = statvfs(place).ok().map(|disk| {
        // These types differ between platforms.
        #[allow(clippy::useless_conversion, clippy::unnecessary_cast)]
        let bytes = (disk.blocks_available() as u64).saturating_mul(disk.fragment_size() as u64);
        (bytes, disk.files() == 0 || disk.files_available() > 0)
    });
    Folder {
        answers: true,
        is_lost: dies_with_container(dir),
        exists,
        writable: writable(place, dir),
        free,
        holder: lock::seen_holder(&dir.join(super::LOCK)),
        agent_id: read(dir, AGENT_ID, parse_id),
        tunnel: read(dir, TUNNEL, parse_json),
        tombstone: read(dir, TOMBSTONE, parse_tombstone),
    }
}

fn list(dir: &Path) -> io::Result<Vec<FileFacts>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir)?.take(MOST_FILES) {
        let entry = entry?;
        // For a link, the metadata of the link itself, which is enough.
        let Ok(facts) = entry.metadata() else { continue };
        let modified = jiff::Timestamp::from_second(facts.mtime()).map(|at| at.to_string()).unwrap_or_default();
        files.push(FileFacts {
            name: entry.file_name().to_string_lossy().into_owned(),
            bytes: facts.len(),
            mode: format!("{:04o}", facts.mode() & 0o7777),
            uid: facts.uid(),
            gid: facts.gid(),
            modified,
        });
    }
    files.sort_by(|one, other| one.name.cmp(&other.name));
    Ok(files)
}

fn writable(place: &Path, dir: &Path) -> Result<(), Unusable> {
    let asked = match fs::metadata(place) {
        Ok(facts) if !facts.is_dir() => Err(io::Error::from(io::ErrorKind::NotADirectory)),
        Ok(_) => access(place, AccessFlags::R_OK | AccessFlags::W_OK | AccessFlags::X_OK).map_err(io::Error::from),
        Err(error) => Err(error),
    };
    asked.map_err(|error| {
        let uid = own_uid();
        let owner = fs::metadata(place).map(|facts| format!(" (it belongs to uid {})", facts.uid()));
        Unusable {
            problem: format!("uid {uid} cannot write {}{}: {error}", place.display(), owner.unwrap_or_default()),
            remedy: remedy(&error, uid, dir),
        }
    })
}

fn read<T>(dir: &Path, name: &str, parse: impl FnOnce(Vec<u8>) -> Result<T, String>) -> Result<Option<T>, String> {
    document(&dir.join(name), parse).map_err(|unread| match unread {
        Unread::Io(error) => format!("{name} cannot be read: {error}"),
        Unread::Content(problem) => format!("{name} {problem}"),
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::state::Store;

    fn content(dir: &Path) -> BTreeMap<String, Vec<u8>> {
        let entries = fs::read_dir(dir).unwrap().map(Result::unwrap);
        entries.map(|e| (e.file_name().into_string().unwrap(), fs::read(e.path()).unwrap())).collect()
    }

    #[test]
    fn a_look_changes_nothing_and_tells_what_is_wrong_without_the_content() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(AGENT_ID), "agent-1\n").unwrap();
        fs::write(dir.path().join(TUNNEL), r#"{"token": "s3cret", "#).unwrap();
        fs::write(dir.path().join(TOMBSTONE), r#"{"schema_version": 7}"#).unwrap();
        let before = content(dir.path());
        let seen = peek(dir.path());
        assert_eq!(seen.agent_id.unwrap().unwrap().as_str(), "agent-1");
        let problem = seen.tunnel.unwrap_err();
        assert!(problem.starts_with("tunnel_state.json is not JSON") && !problem.contains("s3cret"), "{problem}");
        assert!(seen.tombstone.is_err());
        assert!(seen.exists && seen.writable.is_ok() && seen.free.is_some_and(|(bytes, _)| bytes > 0));
        assert_eq!(seen.holder, None);
        assert_eq!(content(dir.path()), before);
        assert_eq!(list(dir.path()).unwrap().len(), 3);
    }

    #[test]
    fn the_holder_is_told_and_is_not_disturbed() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let holder = peek(dir.path()).holder.unwrap();
        assert!(holder.starts_with(&format!("pid {} on host ", std::process::id())), "{holder}");
        drop(store);
        assert_eq!(peek(dir.path()).holder, None, "what it wrote is still there, its lock is not");
    }

    #[test]
    fn a_folder_that_is_missing_is_judged_by_where_it_would_be_made() {
        let dir = tempfile::tempdir().unwrap();
        let seen = peek(&dir.path().join("a/b"));
        assert!(!seen.exists && seen.writable.is_ok());
        fs::write(dir.path().join("file"), "").unwrap();
        let seen = peek(&dir.path().join("file/b"));
        let unusable = seen.writable.unwrap_err();
        assert!(unusable.problem.contains("file") && !unusable.remedy.is_empty(), "{unusable:?}");
        assert!(!dir.path().join("a").exists());
    }
}
