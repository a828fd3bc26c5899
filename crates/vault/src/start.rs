//! Opens the vault before it serves anything: the lock, the master key, the store, the audit.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::audit::Broken;
use crate::config::Config;
use crate::keyfile::{self, KeyFileError};
use crate::seal::Key;
use crate::store::{Options, StoreError};
use crate::vault::{Refusal, Vault, now};

/// Pause between two tries for a lock that another process holds.
pub(crate) const PAUSE: Duration = Duration::from_millis(20);

/// An open vault, and the lock that keeps other processes out.
#[derive(Debug)]
pub struct Opened {
    /// The vault.
    pub vault: Vault,
    /// What is wrong with its audit.
    pub broken: Vec<Broken>,
    /// The store's lock, released last.
    pub lock: dockflare_host::lock::Lock,
}

/// Why the vault cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The master key cannot be used.
    #[error(transparent)]
    Key(#[from] KeyFileError),
    /// The store or the audit cannot be opened.
    #[error(transparent)]
    Store(#[from] Refusal),
}

impl StartError {
    /// Whether another process holds the store.
    pub fn is_taken(&self) -> bool {
        matches!(self, Self::Store(Refusal::Store(StoreError::Taken { .. })))
    }

    /// 64 for a key or a setting, 73 for a store in use, 74 for the disk.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Key(_) => 64,
            Self::Store(refusal) => refusal.exit_code(),
        }
    }
}

/// Opens what the configuration names. Waits up to `patience` for another process that holds the store: a command
/// holds it only for a moment.
///
/// # Errors
/// [`StartError`]; nothing has changed then.
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

/// Returns the next master key if the store is already sealed with it and nobody has replaced the old key file yet.
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

/// Takes the store's lock, in a separate file beside the store.
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
