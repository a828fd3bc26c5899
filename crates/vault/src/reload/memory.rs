//! Which containers ran when they were last seen, and which of them are waited for because their directory was missing.
//! Docker tells neither: it keeps no word of a start that it refused, and a container that was stopped by hand looks the
//! same. So it is noted in a file beside the store, before the directories are made, and survives a kill.
//!
//! The names are those of the configuration; there is nothing of a secret in it.

#![expect(clippy::disallowed_methods, reason = "called on threads that may block, or at the start")]

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::delivery::Delivery;

/// What is known of one container.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Known {
    /// It ran, and nobody has stopped it since.
    pub(super) is_wanted: bool,
    /// Its directory was missing: it could not start.
    pub(super) is_waited_for: bool,
}

/// By name.
pub(super) type Containers = BTreeMap<String, Known>;

/// The file.
#[derive(Debug, Clone)]
pub struct Memory {
    file: PathBuf,
}

impl Memory {
    /// The file beside the store.
    pub fn beside(store: &Path) -> Self {
        Self { file: store.with_file_name("containers.json") }
    }

    /// What it holds; nothing where it is missing. One that cannot be read is as good as none: at worst a container stays
    /// as it is.
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

    /// Notes which containers are waited for: those that ran, and whose directory is missing now. To be called before
    /// anybody makes the directories.
    ///
    /// # Errors
    /// When it cannot be written.
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
