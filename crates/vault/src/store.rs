//! Where secrets live. One kind so far: `sealed`, a file of the vault's own.

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

/// Versions of a secret that are kept, the newest ones.
pub const KEPT_VERSIONS: usize = 10;

/// What goes wrong with a store.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Another process has the store.
    #[error("the store {} is in use by {holder}: ask that one, or end it first", path.display())]
    Taken {
        /// The database.
        path: PathBuf,
        /// What the other one wrote of itself.
        holder: String,
    },
    /// The store cannot be opened with this master key.
    #[error("the master key {given} does not open the store {}, which is sealed with the key {wanted}: give that one; nothing was changed", path.display())]
    WrongKey {
        /// The database.
        path: PathBuf,
        /// Id of the key that was given.
        given: String,
        /// Id of the key that it was sealed with last.
        wanted: String,
    },
    /// The file is not what was written.
    #[error("the store {} is damaged ({problem}): nothing was changed; put a backup in its place and start once with --accept-rollback", path.display())]
    Damaged {
        /// The database.
        path: PathBuf,
        /// What was found.
        problem: String,
    },
    /// A newer version of this program wrote it.
    #[error("the store {} has form {found}, and this program knows form {known}: use the newer program that wrote it; nothing was changed", path.display())]
    Newer {
        /// The database.
        path: PathBuf,
        /// Its form.
        found: u32,
        /// Ours.
        known: u32,
    },
    /// The file is older than what was seen.
    #[error("the store {} is older than it was: it is at change {found}, and {} has seen change {seen}: somebody put an older copy in its place; start once with --accept-rollback if that was you, otherwise look for the newer file", path.display(), counter.display())]
    RolledBack {
        /// The database.
        path: PathBuf,
        /// The counter's file.
        counter: PathBuf,
        /// Where the store is.
        found: u64,
        /// Where it was.
        seen: u64,
    },
    /// The counter's file is gone.
    #[error("the counter of changes {} is gone, which has followed the store {}: whoever removed it may have put an older copy of the store in its place; start once with --accept-rollback if it was you", counter.display(), path.display())]
    CounterMissing {
        /// The database.
        path: PathBuf,
        /// The counter's file.
        counter: PathBuf,
    },
    /// The disk refused in the middle of a commit.
    #[error("{problem}; {} the store opens with the master key {master}", if *is_in { "the change is in the store all the same, and lost if the power fails before the disk is well again: read it again;" } else { "whether the change is in the store is not certain yet: read it again;" })]
    Uncertain {
        /// What the disk said.
        problem: String,
        /// The file was read again and has the change.
        is_in: bool,
        /// Id of the master key that opens it, as far as is known.
        master: String,
    },
    /// `if_version` does not hold.
    #[error("{name} is at version {found}, not at {wanted}: read it again")]
    Version {
        /// Which secret.
        name: SecretName,
        /// The newest one; 0 where there was never any.
        found: u64,
        /// What the caller has seen.
        wanted: u64,
    },
    /// No further rotation can begin.
    #[error(
        "no further rotation can begin: 63 of them wait for the store to seal everything anew, which status shows as is_rotating; nothing was changed, ask again when it is done"
    )]
    TooManyKeys,
    /// No key can be made.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// The disk refuses.
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
    /// The audit could not be written before the change: nothing was changed.
    #[error(transparent)]
    Audit(#[from] AuditError),
}

impl StoreError {
    /// 64: a key that is wrong; 73: the place cannot be used; 74: the disk or what is on it.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::WrongKey { .. } => 64,
            Self::Taken { .. } => 73,
            _ => 74,
        }
    }
}

/// What helps against an error of the system.
pub(crate) fn advice(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => ": make room; nothing was lost",
        io::ErrorKind::ReadOnlyFilesystem => ": mount the volume read-write",
        io::ErrorKind::PermissionDenied => ": give the folder to the user that the vault runs as",
        io::ErrorKind::NotFound => ": make the folder",
        _ => "",
    }
}

/// Reads what may be in a record.
#[cfg(feature = "fuzzing")]
pub(crate) fn fuzz_record(bytes: &[u8]) {
    if let Some(versions) = record::Versions::parse(bytes) {
        assert_eq!(record::Versions::parse(&versions.to_bytes()), Some(versions));
    }
    sealed::fuzz(bytes);
}

/// Reads what may be a ring of keys.
#[cfg(feature = "fuzzing")]
pub(crate) fn fuzz_ring(bytes: &[u8]) {
    if let Some(ring) = ring::Ring::parse(bytes) {
        assert_eq!(ring.to_bytes().as_slice(), bytes);
    }
}
