//! Counts the store's changes in a file on another volume. An older copy of the database is behind the counter, and so
//! is noticed.

#![expect(clippy::disallowed_methods, reason = "blocks on the disk; whoever serves calls it on a thread of its own")]

use std::fs::{self, File};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// Enough for the digits and a line ending. A longer file is not a counter.
const MAX_BYTES: u64 = 32;

/// The counter's file.
#[derive(Debug, Clone)]
pub(super) struct Counter(PathBuf);

impl Counter {
    pub(super) fn new(path: PathBuf) -> Self {
        Self(path)
    }

    pub(super) fn path(&self) -> &Path {
        &self.0
    }

    /// Reads the highest change number seen; `None` if there is no file.
    pub(super) fn read(&self) -> io::Result<Option<u64>> {
        match fs::symlink_metadata(&self.0) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
            Ok(meta) if meta.is_symlink() => crate::place::look(&self.0)?,
            Ok(meta) if !meta.is_file() || meta.len() > MAX_BYTES => return Err(io::Error::other("it is no counter")),
            Ok(_) => {}
        }
        let text = fs::read_to_string(&self.0)?;
        text.trim().parse().map(Some).map_err(|_| io::Error::other("it holds no number"))
    }

    /// Replaces the file as a whole. It is on disk when this returns.
    pub(super) fn write(&self, change: u64) -> io::Result<()> {
        let mut temporary = self.0.clone().into_os_string();
        temporary.push(".new");
        let temporary = PathBuf::from(temporary);
        // Remove it first, so that nothing is written through a link planted there.
        match fs::remove_file(&temporary) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut file = File::options().create_new(true).write(true).mode(0o600).open(&temporary)?;
        writeln!(file, "{change}")?;
        file.sync_data()?;
        fs::rename(&temporary, &self.0)?;
        match self.0.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => File::open(parent)?.sync_all(),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_read_as_it_was_written_and_nothing_else_is_a_counter() {
        let dir = tempfile::tempdir().unwrap();
        let counter = Counter::new(dir.path().join("change"));
        assert_eq!(counter.read().unwrap(), None);
        counter.write(u64::MAX).unwrap();
        assert_eq!(counter.read().unwrap(), Some(u64::MAX));
        for text in ["", "-1", "one", "1 2", &"9".repeat(40)] {
            fs::write(counter.path(), text).unwrap();
            assert!(counter.read().is_err(), "{text:?}");
        }
    }
}
