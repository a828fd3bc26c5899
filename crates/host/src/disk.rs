//! Reads small files that others write, such as keys and settings. It reads regular files only, up to a size limit, and
//! gives up on a disk that hangs.

use std::fmt;
use std::fs::{File, FileType, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::sync::mpsc::channel;
use std::thread;
use std::time::Duration;

/// Time limit: if a file of some kilobytes takes longer, its disk hangs.
pub const LIMIT: Duration = Duration::from_secs(5);

/// Why a file could not be read.
#[derive(Debug)]
pub enum Unread {
    /// The system refused.
    Io(io::Error),
    /// It is not a regular file.
    NoFile(&'static str),
    /// It is longer than this many bytes.
    TooLong(u64),
    /// It was not read within [`LIMIT`].
    Hangs,
    /// The system refused a thread to read it.
    NoThread,
}

impl fmt::Display for Unread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Io(error) => write!(f, "cannot be read: {error}"),
            Self::NoFile(kind) => write!(f, "is {kind}; a file is needed"),
            Self::TooLong(most) => write!(f, "is longer than {most} bytes"),
            Self::NoThread => write!(f, "cannot be read: {}", crate::logging::NO_THREAD),
            Self::Hangs => {
                write!(f, "did not answer within {} s; see to its disk or network file system", LIMIT.as_secs())
            }
        }
    }
}

impl Unread {
    /// Whether no file of that name exists.
    pub fn is_missing(&self) -> bool {
        matches!(self, Self::Io(error) if error.kind() == io::ErrorKind::NotFound)
    }
}

/// Reads a whole file. Blocks for as long as its disk does, so only call it on threads that may block.
///
/// # Errors
/// When it is not a regular file, is longer than `most` bytes, or cannot be read.
#[expect(clippy::disallowed_methods, reason = "the callers run it on threads that may block")]
pub fn read(path: &Path, most: u64) -> Result<Vec<u8>, Unread> {
    // Check before opening: a FIFO would wait for a writer, and a device may do anything.
    regular(std::fs::metadata(path).map_err(Unread::Io)?.file_type())?;
    let file = OpenOptions::new().read(true).custom_flags(nix::libc::O_NONBLOCK).open(path).map_err(Unread::Io)?;
    // Another file may have replaced it in between.
    regular(file.metadata().map_err(Unread::Io)?.file_type())?;
    take(file, most)
}

fn take(file: File, most: u64) -> Result<Vec<u8>, Unread> {
    let mut bytes = Vec::new();
    let length = file.take(most + 1).read_to_end(&mut bytes).map_err(Unread::Io)?;
    if length as u64 > most { Err(Unread::TooLong(most)) } else { Ok(bytes) }
}

/// Like [`read()`], for the start of a program, when there is nothing else to do. Waits for [`LIMIT`] at most.
///
/// # Errors
/// Those of [`read()`], [`Unread::Hangs`] and [`Unread::NoThread`].
#[expect(clippy::disallowed_methods, reason = "nothing runs yet that would be blocked, and the wait has a limit")]
pub fn read_at_start(path: &Path, most: u64) -> Result<Vec<u8>, Unread> {
    let (done, read_it) = channel();
    let path = path.to_owned();
    thread::Builder::new().spawn(move || drop(done.send(read(&path, most)))).map_err(|_| Unread::NoThread)?;
    read_it.recv_timeout(LIMIT).unwrap_or(Err(Unread::Hangs))
}

fn regular(kind: FileType) -> Result<(), Unread> {
    Err(Unread::NoFile(match kind {
        kind if kind.is_file() => return Ok(()),
        kind if kind.is_dir() => {
            "a folder (Docker makes one where the file that is to be mounted does not exist on the host)"
        }
        kind if kind.is_fifo() => "a FIFO",
        kind if kind.is_socket() => "a socket",
        _ => "a device",
    }))
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[test]
    fn only_files_are_read_and_nothing_is_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        std::fs::write(path("file"), "text").unwrap();
        nix::unistd::mkfifo(&path("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        std::os::unix::fs::symlink(path("fifo"), path("link")).unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(path("socket")).unwrap();
        let began = Instant::now();
        assert_eq!(read_at_start(&path("file"), 4).unwrap(), b"text");
        for (name, words) in [
            ("fifo", "is a FIFO; a file is needed"),
            ("link", "is a FIFO"),
            ("socket", "is a socket"),
            ("", "does not exist on the host"),
            ("file", "is longer than 3 bytes"),
            ("missing", "cannot be read: No such file"),
        ] {
            let unread = read_at_start(&path(name), 3).unwrap_err();
            assert!(unread.to_string().contains(words), "{name}: {unread}");
            assert_eq!(unread.is_missing(), name == "missing");
        }
        let device = read_at_start(Path::new("/dev/zero"), 3).unwrap_err();
        assert!(device.to_string().contains("a device"), "{device}");
        assert!(began.elapsed() < LIMIT);
    }
}
