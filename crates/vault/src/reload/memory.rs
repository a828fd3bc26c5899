//! Remembers which containers ran when they were last seen, and which of them are waited for because their directory
//! was missing. Docker tells neither: it keeps no record of a refused start, and a container that was stopped by hand
//! looks the same. The vault notes this in a file beside the store before it makes the directories, so it survives a
//! kill.
//!
//! The file has the names from the configuration and nothing of a secret.

#![expect(clippy::disallowed_methods, reason = "called on threads that may block, or at the start")]

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::delivery::Delivery;

/// What the vault remembers of one container.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Known {
    /// It ran, and nobody has stopped it since.
    pub(super) is_wanted: bool,
    /// Its directory was missing: it could not start.
    pub(super) is_waited_for: bool,
}

/// The containers by name.
pub(super) type Containers = BTreeMap<String, Known>;

/// The file that stores them.
#[derive(Debug, Clone)]
pub struct Memory {
    file: PathBuf,
}

impl Memory {
    /// The file beside the store.
    pub fn beside(store: &Path) -> Self {
        Self { file: store.with_file_name("containers.json") }
    }

    /// Reads the file; empty where it is missing. A file that cannot be read counts as missing: at worst a container
    /// stays down.
    pub(super) fn read(&self) -> Containers {
        let read = dockflare_host::disk::read(&self.file, 4 << 20);
        match read.map(|bytes| serde_json::from_slice(&bytes)) {
            Ok(Ok(containers)) => containers,
            Ok(Err(error)) => {
                tracing::warn!("{} is not read: {error}; it is made anew", self.file.display());
                Containers::new()
            }
            Err(unread) if unread.is_missing() => Containers::new(),
            Err(unread) => {
                tracing::warn!("{} {unread}; it is made anew", self.file.display());
                Containers::new()
            }
        }
    }

    pub(super) fn write(&self, containers: &Containers) -> io::Result<()> {
        let new = self.file.with_extension("json.new");
        let mut file = fs::File::create(&new)?;
        file.write_all(&serde_json::to_vec(containers)?)?;
        file.sync_all()?;
        fs::rename(&new, &self.file)
    }

    /// Notes which containers are waited for: those that ran and whose directory is missing now. Call it before anybody
    /// makes the directories.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn note_missing(&self, deliveries: &[Delivery]) -> io::Result<()> {
        let mut containers = self.read();
        let before = containers.clone();
        for delivery in deliveries.iter().filter(|delivery| !delivery.directory.exists()) {
            for name in &delivery.containers {
                if let Some(known) = containers.get_mut(name.as_str()) {
                    known.is_waited_for |= known.is_wanted;
                }
            }
        }
        if containers == before { Ok(()) } else { self.write(&containers) }
    }
}
