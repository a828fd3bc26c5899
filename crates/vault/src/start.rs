//! What comes before anything is served or asked: the lock, the master key, the store, the audit.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::audit::Broken;
use crate::config::Config;
use crate::keyfile::{self, KeyFileError};
use crate::seal::Key;
use crate::store::{Options, StoreError};
use crate::vault::{Refusal, Vault, now};

/// Between two tries for a lock that somebody has.
pub(crate) const PAUSE: Duration = Duration::from_millis(20);

/// A vault, and the lock that keeps others from it.
#[derive(Debug)]
pub struct Opened {
    /// The vault.
    pub vault: Vault,
    /// What is wrong with its audit.
    pub broken: Vec<Broken>,
    /// Let go of last.
    pub lock: dockflare_host::lock::Lock,
}

/// Why it cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The master key.
    #[error(transparent)]
    Key(#[from] KeyFileError),
    /// Store or audit.
    #[error(transparent)]
    Store(#[from] Refusal),
}

impl StartError {
    /// Whether another process has the store.
    pub fn is_taken(&self) -> bool {
        matches!(self, Self::Store(Refusal::Store(StoreError::Taken { .. })))
    }

    /// 64 for a key or a setting, 73 for a place that is taken, 74 for the disk.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Key(_) => 64,
            Self::Store(refusal) => refusal.exit_code(),
        }
    }
}

/// Opens what the configuration names. Another process that has the store is waited for as long as `patience`: a
/// command has it for a moment only.
///
/// # Errors
/// [`StartError`]; nothing was changed then.
pub fn open(config: &Config, accept_rollback: bool, patience: Duration) -> Result<Opened, StartError> {
    let file = &config.storage.file;
    let lock = lock_within(file, patience)?;
    let key = keyfile::read(&config.master_key_file, keyfile::is_alone())?;
    let options = Options { accept_rollback, now: now() };
    let opened = |key| Vault::open(&config.storage, key, options, config.audit.clone(), config.grants.clone());
    let (vault, broken) = match opened(key) {
        Err(Refusal::Store(StoreError::WrongKey { path, given, wanted })) => match next_key(config, &wanted) {
            Some(next) => opened(next)?,
            None => return Err(Refusal::Store(StoreError::WrongKey { path, given, wanted }).into()),
        },
        opened => opened?,
    };
    Ok(Opened { vault, broken, lock })
}

/// The next master key, where the store was sealed with it already and nobody has put it in the place of the old one.
fn next_key(config: &Config, wanted: &str) -> Option<Key> {
    let file = config.next_master_key_file.as_ref()?;
    let next = keyfile::read(file, keyfile::is_alone()).ok().filter(|next| next.id() == wanted)?;
    tracing::warn!(
        "the store opens with the master key {wanted} of encryption.next_master_key_file: put {} in the place of {}",
        file.display(),
        config.master_key_file.display()
    );
    Some(next)
}

#[expect(clippy::disallowed_methods, reason = "on a thread that may block")]
fn lock_within(file: &Path, patience: Duration) -> Result<dockflare_host::lock::Lock, StartError> {
    let until = Instant::now() + patience;
    loop {
        match lock(file) {
            Err(error) if error.is_taken() && Instant::now() < until => std::thread::sleep(PAUSE),
            taken => return taken,
        }
    }
}

/// The store's lock, in a file of its own beside it.
fn lock(file: &Path) -> Result<dockflare_host::lock::Lock, StartError> {
    use dockflare_host::lock::Refused;
    let mut path = file.as_os_str().to_owned();
    path.push(".lock");
    let path = PathBuf::from(path);
    let refuse = |error| StoreError::Io { what: "the lock of the store", path: path.clone(), verb: "taken", error };
    crate::place::look(&path).map_err(|error| StartError::Store(Refusal::Store(refuse(error))))?;
    dockflare_host::lock::take(&path).map_err(|refused| {
        let path = file.to_owned();
        StartError::Store(Refusal::Store(match refused {
            Refused::Taken(holder) => StoreError::Taken { path, holder },
            Refused::Io(error) => StoreError::Io { what: "the lock of the store", path, verb: "taken", error },
        }))
    })
}
