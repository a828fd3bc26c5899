//! The vault's own store: one `redb` file that holds no name and no value in plain text.
//!
//! | table | key | record |
//! |---|---|---|
//! | `meta` | `form`, `store`, `master` | format version, random id of the store, id of the master key |
//! | `meta` | `ring`, `state` | the wrapped keys, the sealed state |
//! | `heads` | keyed hash of the name | id of the data key, and sealed: the name and its versions |
//! | `values` | keyed hash of the name, version | id of the data key, and sealed: the value |
//!
//! A record is sealed for its place: store, table, name, version and data key are bound to it. The state holds a sum
//! over all records: the XOR of a keyed hash of each. The next start therefore notices a record that was removed, added
//! or put back from an older copy of the file. Changes that belong together are one transaction, on disk when it
//! returns. After a crash at any instant the file is as it was before a transaction or after it.
//!
//! | module | owns |
//! |---|---|
//! | `layout` | tables, places, what is bound to a record |
//! | `state` | counts, the sum, the end of the audit |
//! | `open` | making a store, checking the whole file, opening it |
//! | `transaction` | one read or one change, and recovery after a disk error |
//! | `rotation` | new keys |
//! | `sweep` | removal of expired values and old deleted names |

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use redb::{Database, ReadTransaction, ReadableTable, ReadableTableMetadata, WriteTransaction};
use serde::Serialize;

use super::StoreError;
use super::counter::Counter;
use super::record::{VersionInfo, Versions};
use super::ring::Ring;
use crate::seal::Key;
use crate::secret::{SecretName, Value};

mod layout;
mod open;
mod problem;
mod rotation;
mod state;
mod sweep;
mod transaction;

use layout::{HEADS, Kind, VALUES, hashed, value_place};
use open::Opener;
pub use open::{Location, Options};
use problem::{damaged, refused};
pub use state::AuditHead;
pub use sweep::{Removed, Sweep};
use transaction::{Inner, Keys};

/// A secret's value and its version.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// The bytes.
    pub value: Value,
    /// Number, times and size.
    pub info: VersionInfo,
}

/// What the store reports without naming a secret.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Status {
    /// Number of secrets that are not deleted.
    pub secrets: u64,
    /// Number of values kept.
    pub versions: u64,
    /// Number of transactions so far.
    pub change: u64,
    /// Id of the master key.
    pub master_key: String,
    /// Id of the data key that seals.
    pub data_key: u32,
    /// When that data key was made, in seconds since 1970.
    pub data_key_created: i64,
    /// Whether a rotation is resealing records.
    pub is_rotating: bool,
}

/// The store. All methods may block on the disk.
#[derive(Debug)]
pub struct SealedStore {
    /// `None` only after a disk error, until the next caller reopens it: the library refuses everything after one.
    db: Mutex<Option<Arc<Database>>>,
    opener: Opener,
    path: PathBuf,
    counter: Option<Counter>,
    id: [u8; 16],
    /// Replaced as a whole by a rotation.
    ring: Mutex<Arc<Ring>>,
    /// Locked by every change.
    inner: Mutex<Inner>,
    /// The end of the audit in its file, which may be ahead of the state. To take both locks, take `inner` first.
    audit: Mutex<AuditHead>,
    /// Why the counter is behind the store, if it is.
    counter_problem: Mutex<Option<String>>,
}

impl SealedStore {
    /// Returns the newest value of a name, or that of a kept version. `None` if there is none at `now`.
    ///
    /// # Errors
    /// [`StoreError::Io`], [`StoreError::Damaged`].
    pub fn get(&self, name: &SecretName, version: Option<u64>, now: i64) -> Result<Option<Found>, StoreError> {
        let (ring, txn) = self.read()?;
        let place = hashed(&ring, name);
        let Some(versions) = self.head(&ring, &txn, &place)? else { return Ok(None) };
        let info = match version {
            None => versions.newest(),
            Some(version) => versions.kept.iter().find(|info| info.version == version),
        };
        let Some(info) = info.filter(|info| !info.is_expired(now)) else { return Ok(None) };
        let values = txn.open_table(VALUES).map_err(|error| refused(&self.path, error))?;
        let at = value_place(&place, info.version);
        let record = values.get(&at[..]).map_err(|error| refused(&self.path, error))?;
        let record = record.ok_or_else(|| damaged(&self.path, "a value is missing"))?;
        let mut bytes = self.unseal(&ring, Kind::Value, &at, record.value())?;
        let value = Value::new(std::mem::take(&mut *bytes)).map_err(|_| damaged(&self.path, "a value is too large"))?;
        Ok(Some(Found { value, info: info.clone() }))
    }

    /// Stores a new version and returns its number. `if_version` is the newest version that the caller has seen, 0 for
    /// none. `before_commit` gets the number when everything is ready, and returns the end of the audit as it is on
    /// disk. If it fails, nothing is stored.
    ///
    /// # Errors
    /// [`StoreError::Version`], [`StoreError::Io`], [`StoreError::Damaged`], and the error of `before_commit`.
    pub fn set(
        &self,
        name: &SecretName,
        value: &Value,
        change: &Change,
        before_commit: impl FnOnce(u64) -> Result<AuditHead, StoreError>,
    ) -> Result<u64, StoreError> {
        let mut inner = self.settled()?;
        let ring = self.ring();
        let place = hashed(&ring, name);
        self.transact(&mut inner, Keys::default(), |state, txn, _| {
            let old = self.head_in(&ring, txn, &place)?;
            let was_there = old.as_ref().is_some_and(|old| old.newest().is_some());
            let mut versions = old.unwrap_or_else(|| Versions::new(name, state.floor));
            let found = versions.newest().filter(|newest| !newest.is_expired(change.now)).map_or(0, |n| n.version);
            if let Some(wanted) = change.if_version.filter(|wanted| *wanted != found) {
                return Err(StoreError::Version { name: name.clone(), found, wanted });
            }
            let bytes = u32::try_from(value.expose().len()).unwrap_or(u32::MAX);
            let gone = versions.add(change.now, change.expires, bytes);
            let version = versions.last;
            self.put(&ring, state, txn, Kind::Value, &value_place(&place, version), Some(value.expose()))?;
            for gone in gone {
                self.put(&ring, state, txn, Kind::Value, &value_place(&place, gone), None)?;
            }
            self.put(&ring, state, txn, Kind::Head, &place, Some(&versions.to_bytes()))?;
            state.secrets += u64::from(!was_there);
            state.audit = before_commit(version)?;
            Ok(version)
        })
    }

    /// Deletes a secret with all its values and returns its last version; `None` if there is nothing to delete. The
    /// name and the number of its last version stay, sealed, for a while: see [`SealedStore::sweep`]. With `revoke`, a
    /// secret that was deleted before counts too, unless it was already revoked.
    ///
    /// # Errors
    /// As for [`SealedStore::set`].
    pub fn delete(
        &self,
        name: &SecretName,
        now: i64,
        revoke: bool,
        before_commit: impl FnOnce(u64) -> Result<AuditHead, StoreError>,
    ) -> Result<Option<u64>, StoreError> {
        let mut inner = self.settled()?;
        let (ring, txn) = self.read()?;
        let place = hashed(&ring, name);
        let is_there = |versions: &Versions| versions.newest().is_some() || (revoke && !versions.revoked);
        if !self.head(&ring, &txn, &place)?.as_ref().is_some_and(is_there) {
            return Ok(None);
        }
        self.transact(&mut inner, Keys::default(), |state, txn, _| {
            let Some(mut versions) = self.head_in(&ring, txn, &place)? else { return Ok(None) };
            let was_there = versions.newest().is_some();
            for gone in versions.delete(now, revoke) {
                self.put(&ring, state, txn, Kind::Value, &value_place(&place, gone), None)?;
            }
            self.put(&ring, state, txn, Kind::Head, &place, Some(&versions.to_bytes()))?;
            state.secrets -= u64::from(was_there);
            state.audit = before_commit(versions.last)?;
            Ok(Some(versions.last))
        })
    }

    /// Returns the kept versions of a name, and whether it was deleted.
    ///
    /// # Errors
    /// [`StoreError::Io`], [`StoreError::Damaged`].
    pub fn history(&self, name: &SecretName) -> Result<Option<Versions>, StoreError> {
        let (ring, txn) = self.read()?;
        self.head(&ring, &txn, &hashed(&ring, name))
    }

    /// Lists the names that have a value at `now` and pass `shown`, sorted. Opens the head of every secret.
    ///
    /// # Errors
    /// [`StoreError::Io`], [`StoreError::Damaged`].
    pub fn list(&self, now: i64, shown: impl Fn(&SecretName) -> bool) -> Result<Vec<SecretName>, StoreError> {
        let (ring, txn) = self.read()?;
        let heads = txn.open_table(HEADS).map_err(|error| refused(&self.path, error))?;
        let mut names = vec![];
        for entry in heads.iter().map_err(|error| refused(&self.path, error))? {
            let (place, record) = entry.map_err(|error| refused(&self.path, error))?;
            let versions = self.parse_head(&ring, place.value(), record.value())?;
            let name = versions.newest().filter(|newest| !newest.is_expired(now)).and(versions.name().parse().ok());
            names.extend(name.filter(|name| shown(name)));
        }
        names.sort_unstable();
        Ok(names)
    }

    /// Returns counts and ages.
    pub fn status(&self) -> Status {
        let (inner, ring) = (self.inner(), self.ring());
        let state = &inner.state;
        let current = ring.current();
        Status {
            secrets: state.secrets,
            versions: self.versions().unwrap_or_default(),
            change: state.change,
            master_key: inner.master.id(),
            data_key: current.id,
            data_key_created: current.created,
            is_rotating: ring.is_rotating(),
        }
    }

    fn versions(&self) -> Result<u64, StoreError> {
        let (_, txn) = self.read()?;
        let values = txn.open_table(VALUES).map_err(|error| refused(&self.path, error))?;
        values.len().map_err(|error| refused(&self.path, error))
    }

    /// Where the audit ends. Lines that change nothing in the store move it too; see [`SealedStore::save_audit`].
    pub fn audit(&self) -> AuditHead {
        *self.audit.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets `write` add to the audit. The next change or [`SealedStore::save_audit`] puts the new head on disk.
    pub fn with_audit<T>(&self, write: impl FnOnce(&mut AuditHead) -> T) -> T {
        write(&mut self.audit.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Saves the end of the audit in the store if it has changed. The audit must be on disk up to `head`. Rewrites the
    /// counter if it is behind.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn save_audit(&self, head: AuditHead) -> Result<(), StoreError> {
        let mut inner = self.settled()?;
        if inner.state.audit != head {
            return self.transact(&mut inner, Keys::default(), |state, _, _| {
                state.audit = head;
                Ok(())
            });
        }
        if self.counter_problem().is_some() {
            self.count(inner.state.change);
        }
        Ok(())
    }

    /// Why the counter is behind the store, if it is.
    pub fn counter_problem(&self) -> Option<String> {
        self.counter_problem.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Returns the key that chains the audit.
    pub fn audit_key(&self) -> Key {
        self.ring().audit.clone()
    }

    fn head(&self, ring: &Ring, txn: &ReadTransaction, place: &[u8]) -> Result<Option<Versions>, StoreError> {
        let heads = txn.open_table(HEADS).map_err(|error| refused(&self.path, error))?;
        let record = heads.get(place).map_err(|error| refused(&self.path, error))?;
        record.map(|record| self.parse_head(ring, place, record.value())).transpose()
    }

    fn head_in(&self, ring: &Ring, txn: &WriteTransaction, place: &[u8]) -> Result<Option<Versions>, StoreError> {
        let heads = txn.open_table(HEADS).map_err(|error| refused(&self.path, error))?;
        let record = heads.get(place).map_err(|error| refused(&self.path, error))?;
        record.map(|record| self.parse_head(ring, place, record.value())).transpose()
    }

    fn parse_head(&self, ring: &Ring, place: &[u8], record: &[u8]) -> Result<Versions, StoreError> {
        let text = self.unseal(ring, Kind::Head, place, record)?;
        Versions::parse(&text).ok_or_else(|| damaged(&self.path, "a record is none of this program's"))
    }
}

/// A change to a secret.
#[derive(Debug, Clone, Copy, Default)]
pub struct Change {
    /// The current time in seconds since 1970.
    pub now: i64,
    /// When the version expires, in seconds since 1970.
    pub expires: Option<i64>,
    /// The newest version that the caller has seen, 0 for none.
    pub if_version: Option<u64>,
}

#[cfg(feature = "fuzzing")]
pub(super) fn fuzz(bytes: &[u8]) {
    if let Some(state) = state::State::parse(bytes) {
        assert_eq!(state.to_bytes(), bytes);
    }
}

#[cfg(test)]
mod tests;
