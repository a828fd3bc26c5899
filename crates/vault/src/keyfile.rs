//! The file that holds the master key: made once, read at every start, kept outside the data folder.

#![allow(clippy::disallowed_methods, reason = "it is read at a start, before anything is served, or by a command")]

use std::fs::{self, File};
use std::io::{self, ErrorKind, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use zeroize::Zeroizing;

use crate::seal::{Key, KeyError};

/// Most bytes of a key file. A normal one has 45, and an editor may have added some.
const MAX_BYTES: u64 = 4096;

/// Why the master key cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KeyFileError {
    /// The file does not exist.
    #[error("the master key {} is not there: make one with dockflare-vault generate-key > {}, keep a copy elsewhere, and mount it", .0.display(), .0.display())]
    Missing(PathBuf),
    /// This user may not read the file.
    #[error("the master key {} cannot be read by this user: sudo install -o {uid} -m 600 {} NEW_PLACE, and mount that", path.display(), path.display())]
    NotReadable {
        /// The file.
        path: PathBuf,
        /// The user that this process runs as.
        uid: u32,
    },
    /// Other users may write the file.
    #[error("the master key {} may be changed by others (mode {mode:04o}): chmod 600 {}", path.display(), path.display())]
    Writable {
        /// The file.
        path: PathBuf,
        /// Its permissions.
        mode: u32,
    },
    /// Other users may read the file.
    #[error("the master key {} may be read by others (mode {mode:04o}): chmod 600 {}", path.display(), path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// Its permissions.
        mode: u32,
    },
    /// The file does not hold a key.
    #[error("the master key {}: {error}", path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// What is wrong with the content.
        error: KeyError,
    },
    /// Not a regular file, or larger than 4096 bytes.
    #[error("the master key {} is no regular file of at most 4096 bytes", .0.display())]
    Kind(PathBuf),
    /// The system refused the read.
    #[error("the master key {} cannot be read: {error}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system says.
        error: io::Error,
    },
}

/// Reads the key. `is_alone` means that no other user is in this container. A file that everybody may read, as Docker
/// mounts its secrets, is then acceptable.
///
/// # Errors
/// [`KeyFileError`], which never contains the file's content.
pub fn read(path: &Path, is_alone: bool) -> Result<Key, KeyFileError> {
    let named = || path.to_owned();
    let io_error = |error: io::Error| match error.kind() {
        ErrorKind::NotFound => KeyFileError::Missing(named()),
        ErrorKind::PermissionDenied => {
            KeyFileError::NotReadable { path: named(), uid: nix::unistd::geteuid().as_raw() }
        }
        _ => KeyFileError::Io { path: named(), error },
    };
    // Check before opening: opening a pipe may block forever.
    let meta = fs::metadata(path).map_err(io_error)?;
    if !meta.is_file() || meta.len() > MAX_BYTES {
        return Err(KeyFileError::Kind(named()));
    }
    let mode = meta.mode() & 0o777;
    if mode & 0o022 != 0 {
        return Err(KeyFileError::Writable { path: named(), mode });
    }
    if mode & 0o077 != 0 && !is_alone {
        return Err(KeyFileError::Open { path: named(), mode });
    }
    let mut bytes = Zeroizing::new(Vec::with_capacity(MAX_BYTES as usize));
    File::open(path).and_then(|file| file.take(MAX_BYTES).read_to_end(&mut bytes)).map_err(io_error)?;
    Key::read(&bytes).map_err(|error| KeyFileError::Content { path: named(), error })
}

/// Whether this is a container without other users: all visible processes belong to this user or to root, who could
/// read the file anyway.
pub fn is_alone() -> bool {
    // The marker files of Docker and Podman. Outside a container other users come and go.
    let is_container = ["/.dockerenv", "/run/.containerenv"].iter().any(|mark| Path::new(mark).exists());
    is_container && users(Path::new("/proc")).is_ok_and(|users| are_alone(&users, nix::unistd::geteuid().as_raw()))
}

fn are_alone(users: &[u32], own: u32) -> bool {
    !users.is_empty() && users.iter().all(|user| *user == own || *user == 0)
}

/// Returns the users of all processes. Reads `status` because the folder of a process that nobody may inspect, such as
/// ours, belongs to root.
fn users(proc: &Path) -> io::Result<Vec<u32>> {
    let mut users = vec![];
    for entry in fs::read_dir(proc)? {
        let entry = entry?;
        if !entry.file_name().as_encoded_bytes().iter().all(u8::is_ascii_digit) {
            continue;
        }
        // Skip a process that has ended meanwhile.
        let Ok(status) = fs::read_to_string(entry.path().join("status")) else { continue };
        let of = status.lines().find_map(|line| line.strip_prefix("Uid:"));
        users.extend(of.into_iter().flat_map(str::split_whitespace).filter_map(|id| id.parse::<u32>().ok()));
    }
    Ok(users)
}

/// Sets the mode of standard output to 0600 if it is a regular file, for `generate-key > master.key`.
///
/// # Errors
/// When the mode cannot be read or set.
pub fn close_output() -> io::Result<()> {
    let output = io::stdout();
    let stat = nix::sys::stat::fstat(&output)?;
    if nix::sys::stat::SFlag::from_bits_truncate(stat.st_mode) & nix::sys::stat::SFlag::S_IFMT
        == nix::sys::stat::SFlag::S_IFREG
    {
        nix::sys::stat::fchmod(&output, nix::sys::stat::Mode::from_bits_truncate(0o600))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn who_shares_its_container_with_another_user_is_not_alone() {
        assert!(are_alone(&[65431, 65431, 0], 65431));
        assert!(!are_alone(&[65431, 1000], 65431) && !are_alone(&[], 65431));
        assert!(users(Path::new("/proc")).unwrap().contains(&nix::unistd::geteuid().as_raw()));
    }

    #[test]
    fn a_key_file_is_read_and_each_fault_is_named_without_its_content() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("master.key");
        let with = |content: &[u8], mode| {
            let _ = fs::remove_file(&path);
            fs::write(&path, content).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            read(&path, false)
        };
        let key = Key::random().unwrap();
        assert_eq!(with(key.to_text().as_bytes(), 0o600).unwrap(), key);
        assert!(matches!(with(key.to_text().as_bytes(), 0o444), Err(KeyFileError::Open { mode: 0o444, .. })));
        assert_eq!(read(&path, true).unwrap(), key, "a Docker secret");
        for mode in [0o666, 0o620, 0o602] {
            with(key.to_text().as_bytes(), mode).unwrap_err();
            assert!(matches!(read(&path, true), Err(KeyFileError::Writable { .. })), "{mode:o}");
        }
        let short = with(b"PLANTED", 0o600).unwrap_err();
        assert!(matches!(short, KeyFileError::Content { .. }) && !format!("{short} {short:?}").contains("PLANTED"));
        assert!(matches!(with(&[b'a'; 5000], 0o600), Err(KeyFileError::Kind(_))));
        assert!(matches!(read(dir.path(), true), Err(KeyFileError::Kind(_))));
        assert!(matches!(read(&dir.path().join("none"), true), Err(KeyFileError::Missing(_))));
        nix::unistd::mkfifo(&dir.path().join("pipe"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert!(matches!(read(&dir.path().join("pipe"), true), Err(KeyFileError::Kind(_))));
    }
}
