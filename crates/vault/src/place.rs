//! The vault's own files must be regular files. A link in the place of one would let whoever planted it choose what is
//! read, written or locked.

#![expect(clippy::disallowed_methods, reason = "blocks on the disk; whoever serves calls it on a thread of its own")]

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// Opens a regular file, or makes one if `options` say so. Refuses a link at the end of the path. Links earlier in the
/// path are the operator's.
///
/// # Errors
/// The system's error; [`ErrorKind::InvalidInput`] for a link and for anything that is no regular file.
pub(crate) fn plain(options: &mut OpenOptions, path: &Path) -> io::Result<File> {
    // Check before opening: opening a pipe may take forever.
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        meta => is_plain(&meta?)?,
    }
    let file = options.custom_flags(nix::fcntl::OFlag::O_NOFOLLOW.bits()).open(path)?;
    is_plain(&file.metadata()?)?;
    Ok(file)
}

/// Checks that what is at the path may be used. A missing file is fine.
///
/// # Errors
/// As for [`plain`].
pub(crate) fn look(path: &Path) -> io::Result<()> {
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        meta => is_plain(&meta?),
    }
}

fn is_plain(meta: &fs::Metadata) -> io::Result<()> {
    if meta.is_symlink() {
        return Err(io::Error::new(
            ErrorKind::InvalidInput,
            "it is a symbolic link, and whoever may change it could choose another file: name the file itself",
        ));
    }
    if !meta.is_file() {
        return Err(io::Error::new(ErrorKind::InvalidInput, "it is no regular file"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_and_what_is_no_file_are_refused_and_nothing_behind_them_is_made() {
        let dir = tempfile::tempdir().unwrap();
        let (target, link) = (dir.path().join("target"), dir.path().join("link"));
        std::os::unix::fs::symlink(&target, &link).unwrap();
        let open = |path: &Path| plain(File::options().create(true).append(true), path);
        assert!(open(&link).unwrap_err().to_string().contains("name the file itself"));
        assert!(look(&link).is_err() && !target.exists());
        assert!(open(dir.path()).unwrap_err().to_string().contains("no regular file"));
        let pipe = dir.path().join("pipe");
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert!(open(&pipe).is_err());
        open(&target).unwrap();
        assert!(look(&target).is_ok() && open(&link).is_err());
    }
}
