//! Limits a folder or file to one process, with a lock on a file beside it that is held as long as the [`Lock`] lives.
//!
//! The lock is in the kernel and does not depend on whether the file exists. It is free as soon as its holder is gone,
//! for whatever reason, and it works between containers that share the folder. The text in the file is for people only:
//! it names the holder in the message to the next process.

#![expect(
    clippy::disallowed_methods,
    reason = "called by the store as it opens, and by looks at the folder, each on a thread of its own"
)]

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use tracing::warn;

/// Most bytes read of the holder's text. An honest line is far shorter.
const MAX_TEXT_BYTES: u64 = 300;

/// The lock: the open file that holds it, or `None` if the file system has no locks and cannot keep anyone out.
#[derive(Debug)]
pub struct Lock(Option<File>);

impl Lock {
    /// Whether it keeps other processes out.
    pub fn is_held(&self) -> bool {
        self.0.is_some()
    }
}

/// Why the lock was not granted.
#[derive(Debug)]
pub enum Refused {
    /// Another process holds the lock; its own description of itself.
    Taken(String),
    /// The file cannot be made or opened.
    Io(io::Error),
}

/// Takes the lock on this file. Creates the file if it does not exist, and never removes it: only the lock in the
/// kernel counts. If the lock is taken, says who holds it.
///
/// # Errors
/// [`Refused`].
pub fn take(path: &Path) -> Result<Lock, Refused> {
    let file = OpenOptions::new().create(true).truncate(false).read(true).write(true).mode(0o600).open(path);
    let mut file = file.map_err(Refused::Io)?;
    let asked = file.try_lock();
    match asked {
        Ok(()) => {
            // A full disk must not prevent a start. The next process then learns less about the holder.
            let _ = file.set_len(0).and_then(|()| file.write_all(own_line().as_bytes()));
            Ok(Lock(Some(file)))
        }
        Err(TryLockError::WouldBlock) => Err(Refused::Taken(holder(&mut file))),
        Err(TryLockError::Error(problem)) => Ok(without_locks(path, &problem)),
    }
}

/// Network file systems may have no locks. An unprotected program is better than none.
fn without_locks(path: &Path, problem: &io::Error) -> Lock {
    let folder = path.parent().unwrap_or(path).display();
    warn!(
        "the data folder {folder} is on a file system without locks ({problem}): going on; make sure that no second process uses it"
    );
    Lock(None)
}

/// `pid 7 on host 0f9c3a21b4d5 since 2026-01-31T10:00:00Z`. Inside a container, the host name is the start of its id.
fn own_line() -> String {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let now = jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ");
    format!("pid {} on host {} since {now}\n", std::process::id(), host.trim())
}

/// The first line of the holder's text. The holder may be writing it, and the file may hold anything.
fn holder(file: &mut File) -> String {
    let mut text = Vec::new();
    // An unreadable text counts as none.
    let _ = file.take(MAX_TEXT_BYTES).read_to_end(&mut text);
    let text = String::from_utf8_lossy(&text);
    let line: String = text.lines().next().unwrap_or_default().chars().filter(|c| !c.is_control()).collect();
    if line.trim().is_empty() { "one that has not said which".to_owned() } else { line.trim().to_owned() }
}

/// Who holds the lock on this file. Does not try to take the lock: that would refuse an agent that starts at this
/// moment. The kernel lists the locks of the processes that are visible from here (proc(5), `/proc/locks`).
pub fn seen_holder(path: &Path) -> Option<String> {
    let mut file = File::open(path).ok()?;
    let inode = file.metadata().ok()?.ino();
    let locks = std::fs::read_to_string("/proc/locks").ok()?;
    locks.lines().any(|line| is_lock_of(line, inode)).then(|| holder(&mut file))
}

/// `1: FLOCK  ADVISORY  WRITE 708 fe:01:1048581 0 EOF`. Ignores the device, since some file systems report another one
/// for a file than for its locks.
fn is_lock_of(line: &str, inode: u64) -> bool {
    let mut words = line.split_whitespace();
    let is_flock = words.nth(1) == Some("FLOCK") && words.nth(1) == Some("WRITE");
    let of = words.nth(1).and_then(|place| place.rsplit_once(':')?.1.parse().ok());
    is_flock && of == Some(inode)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOCK: &str = "agent.lock";

    /// The lock, or the description of its holder.
    fn asked(dir: &Path) -> Result<Lock, String> {
        take(&dir.join(LOCK)).map_err(|refused| match refused {
            Refused::Taken(holder) => holder,
            Refused::Io(error) => panic!("{error}"),
        })
    }

    #[test]
    fn a_folder_has_one_holder_and_the_next_one_is_told_who() {
        let dir = tempfile::tempdir().unwrap();
        let first = asked(dir.path()).unwrap();
        let told = asked(dir.path()).unwrap_err();
        let is_ours = told.starts_with(&format!("pid {} on host ", std::process::id()));
        assert!(is_ours && told.contains(" since 2"), "{told}");
        drop(first);
        assert!(asked(dir.path()).unwrap().is_held());
    }

    #[test]
    fn an_old_text_in_the_file_refuses_nobody_and_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(LOCK), "pid 1 on host gone since 1999-01-01T00:00:00Z\n".repeat(50)).unwrap();
        let _first = asked(dir.path()).unwrap();
        let text = std::fs::read_to_string(dir.path().join(LOCK)).unwrap();
        assert_eq!(text, own_line_of(&text), "nothing of the old text is left");
    }

    /// The line as it would be now, with the time that `text` has.
    fn own_line_of(text: &str) -> String {
        let time = text.trim_end().rsplit_once(' ').map(|(_, time)| time).unwrap_or_default();
        let line = own_line();
        format!("{} {time}\n", line.trim_end().rsplit_once(' ').map(|(line, _)| line).unwrap_or_default())
    }

    #[test]
    fn what_the_holder_wrote_cannot_forge_log_lines_or_fill_the_log() {
        let dir = tempfile::tempdir().unwrap();
        let _first = asked(dir.path()).unwrap();
        for (text, expected) in [
            (&b""[..], "one that has not said which"),
            (b"\n\nERROR forged", "one that has not said which"),
            (b"pid 7\x1b[31m\r\nERROR forged", "pid 7[31m"),
        ] {
            std::fs::write(dir.path().join(LOCK), text).unwrap();
            assert_eq!(asked(dir.path()).unwrap_err(), expected);
        }
        std::fs::write(dir.path().join(LOCK), vec![0xff; 100_000]).unwrap();
        assert!(asked(dir.path()).unwrap_err().len() <= 3 * MAX_TEXT_BYTES as usize);
    }

    #[test]
    fn the_kernels_list_of_locks_is_read() {
        let line = "12: FLOCK  ADVISORY  WRITE 708 fe:01:1048581 0 EOF";
        assert!(is_lock_of(line, 1_048_581));
        assert!(!is_lock_of(line, 1_048_582));
        for other in
            ["", "1:", "1: POSIX  ADVISORY  WRITE 708 fe:01:1048581 0 EOF", "1: -> FLOCK  ADVISORY  WRITE 7 a:1 0"]
        {
            assert!(!is_lock_of(other, 1_048_581), "{other}");
        }
    }

    #[test]
    fn a_file_system_without_locks_is_gone_on_with() {
        for errno in [37 /* ENOLCK */, 38 /* ENOSYS */, 95 /* EOPNOTSUPP */] {
            let lock = without_locks(Path::new("/app/data"), &io::Error::from_raw_os_error(errno));
            assert!(!lock.is_held());
        }
    }
}
