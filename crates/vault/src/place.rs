//! Files of the vault's own are what they are called: a link in the place of one would let whoever laid it choose what
//! is read, written or locked.

#![expect(clippy::disallowed_methods, reason = "blocks on the disk; whoever serves calls it on a thread of its own")]

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// Opens a regular file, or makes one where `options` say so. A link at the end of the path is refused; links on the
/// way there are the operator's.
///
/// # Errors
/// What the system says; [`ErrorKind::InvalidInput`] for a link, and for what is no regular file.
pub(crate) fn plain(options: &mut OpenOptions, path: &Path) -> io::Result<File> {
    // Before it is opened: opening a pipe may take for ever.
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        meta => is_plain(&meta?)?,
    }
    let file = options.custom_flags(nix::fcntl::OFlag::O_NOFOLLOW.bits()).open(path)?;
    is_plain(&file.metadata()?)?;
    Ok(file)
}

/// Whether what is there may be used; what is not there may.
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
