//! Where secrets live. One kind of store so far: `sealed`, the vault's own file.

use std::io;
use std::path::PathBuf;

use crate::audit::AuditError;
use crate::seal::KeyError;
use crate::secret::SecretName;

mod backend;
mod counter;
mod record;
mod ring;
mod sealed;

pub use record::{VersionInfo, Versions};
pub use sealed::{AuditHead, Change, Found, Location, Options, Removed, SealedStore, Status, Sweep};

/// Number of versions kept per secret, the newest ones.
pub const KEPT_VERSIONS: usize = 10;

/// Why a store operation failed.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Another process holds the store.
    #[error("the store {} is in use by {holder}: ask that one, or end it first", path.display())]
    Taken {
        /// The database.
        path: PathBuf,
        /// What the other process wrote about itself.
        holder: String,
    },
    /// The store cannot be opened with this master key.
    #[error("the master key {given} does not open the store {}, which is sealed with the key {wanted}: give that one; nothing was changed", path.display())]
    WrongKey {
        /// The database.
        path: PathBuf,
        /// Id of the given key.
        given: String,
        /// Id of the key with which the store was last sealed.
        wanted: String,
    },
    /// The file does not hold what was written.
    #[error("the store {} is damaged ({problem}): nothing was changed; put a backup in its place and start once with --accept-rollback", path.display())]
    Damaged {
        /// The database.
        path: PathBuf,
        /// What was found.
        problem: String,
    },
    /// A newer version of this program wrote the file.
    #[error("the store {} has form {found}, and this program knows form {known}: use the newer program that wrote it; nothing was changed", path.display())]
    Newer {
        /// The database.
        path: PathBuf,
        /// The file's format version.
        found: u32,
        /// The format version that this program knows.
        known: u32,
    },
    /// The file is older than the counter of changes.
    #[error("the store {} is older than it was: it is at change {found}, and {} has seen change {seen}: somebody put an older copy in its place; start once with --accept-rollback if that was you, otherwise look for the newer file", path.display(), counter.display())]
    RolledBack {
        /// The database.
        path: PathBuf,
        /// The counter's file.
        counter: PathBuf,
        /// The store's change number.
        found: u64,
        /// The highest change number that the counter has seen.
        seen: u64,
    },
    /// The counter's file is missing.
    #[error("the counter of changes {} is gone, which has followed the store {}: whoever removed it may have put an older copy of the store in its place; start once with --accept-rollback if it was you", counter.display(), path.display())]
    CounterMissing {
        /// The database.
        path: PathBuf,
        /// The counter's file.
        counter: PathBuf,
    },
    /// The disk failed in the middle of a commit.
    #[error("{problem}; {} the store opens with the master key {master}", if *is_in { "the change is in the store all the same, and lost if the power fails before the disk is well again: read it again;" } else { "whether the change is in the store is not certain yet: read it again;" })]
    Uncertain {
        /// What the disk said.
        problem: String,
        /// The file was read again and holds the change.
        is_in: bool,
        /// Id of the master key that opens the store, as far as known.
        master: String,
    },
    /// `if_version` does not hold.
    #[error("{name} is at version {found}, not at {wanted}: read it again")]
    Version {
        /// Which secret.
        name: SecretName,
        /// The newest version; 0 if the secret has none.
        found: u64,
        /// The version that the caller has seen.
        wanted: u64,
    },
    /// Too many rotations are unfinished to begin another.
    #[error(
        "no further rotation can begin: 63 of them wait for the store to seal everything anew, which status shows as is_rotating; nothing was changed, ask again when it is done"
    )]
    TooManyKeys,
    /// A key cannot be made.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// The disk failed.
    #[error("{what} {} cannot be {verb}: {error}{}", path.display(), advice(error))]
    Io {
        /// `the store`, `the audit`, ...
        what: &'static str,
        /// Which file.
        path: PathBuf,
        /// `read`, `written`, ...
        verb: &'static str,
        /// What the system says.
        error: io::Error,
    },
    /// The audit could not be written before the change. Nothing was changed.
    #[error(transparent)]
    Audit(#[from] AuditError),
}

impl StoreError {
    /// 64: wrong key. 73: the place cannot be used. 74: the disk or its content.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::WrongKey { .. } => 64,
            Self::Taken { .. } => 73,
            _ => 74,
        }
    }
}

/// The remedy for a system error.
pub(crate) fn advice(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => ": make room; nothing was lost",
        io::ErrorKind::ReadOnlyFilesystem => ": mount the volume read-write",
        io::ErrorKind::PermissionDenied => ": give the folder to the user that the vault runs as",
        io::ErrorKind::NotFound => ": make the folder",
        _ => "",
    }
}

/// Parses arbitrary bytes as a record.
#[cfg(feature = "fuzzing")]
pub(crate) fn fuzz_record(bytes: &[u8]) {
    if let Some(versions) = record::Versions::parse(bytes) {
        assert_eq!(record::Versions::parse(&versions.to_bytes()), Some(versions));
    }
    sealed::fuzz(bytes);
}

/// Parses arbitrary bytes as a key ring.
#[cfg(feature = "fuzzing")]
pub(crate) fn fuzz_ring(bytes: &[u8]) {
    if let Some(ring) = ring::Ring::parse(bytes) {
        assert_eq!(ring.to_bytes().as_slice(), bytes);
    }
}
