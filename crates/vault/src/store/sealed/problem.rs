//! Turns problems with the file into the store's errors.

use std::io::{self, ErrorKind};
use std::path::Path;

use crate::store::StoreError;

pub(super) fn damaged(path: &Path, problem: &str) -> StoreError {
    StoreError::Damaged { path: path.to_owned(), problem: problem.to_owned() }
}

pub(super) fn io_error(path: &Path, verb: &'static str, error: io::Error) -> StoreError {
    StoreError::Io { what: "the store", path: path.to_owned(), verb, error }
}

/// Turns an error of the library into a disk error or damaged content.
pub(super) fn refused(path: &Path, error: impl Into<redb::Error>) -> StoreError {
    match error.into() {
        redb::Error::Io(error)
            if error.kind() != ErrorKind::UnexpectedEof && error.kind() != ErrorKind::InvalidData =>
        {
            io_error(path, "read or written", error)
        }
        error @ (redb::Error::PreviousIo | redb::Error::DatabaseClosed) => {
            io_error(path, "read or written", io::Error::other(error.to_string()))
        }
        redb::Error::DatabaseAlreadyOpen => {
            StoreError::Taken { path: path.to_owned(), holder: "another process".to_owned() }
        }
        error => damaged(path, &error.to_string()),
    }
}
