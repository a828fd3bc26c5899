//! The store of its own: one file of `redb`, in which neither a name nor a value stands in plain.
//!
//! | table | key | record |
//! |---|---|---|
//! | `meta` | `form`, `store`, `master`, `ring`, `state` | form of the file, its random id, id of the master key, the wrapped keys, the sealed state |
//! | `heads` | keyed hash of the name | id of the data key, and sealed: the name and its versions |
//! | `values` | keyed hash of the name, version | id of the data key, and sealed: the value |
//!
//! A record is sealed for its place: store, table, name, version and data key are bound to it. The state holds a sum
//! over all records (the XOR of a keyed hash of each), so that one which was removed, added or put back from an older
//! copy of the file is noticed at the next start. Everything that belongs together is one transaction, on disk when it
//! returns. After a crash at any instant the file is what it was before a transaction, or after it.
//!
//! | room | for |
//! |---|---|
//! | `layout` | tables, places, what is bound to a record |
//! | `state` | counts, the sum, the end of the audit |
//! | `open` | making a store, looking at it as a whole, opening it |
//! | `transaction` | one look or one change, and what an error of the disk left of it |
//! | `rotation` | new keys |
//! | `sweep` | what time ends |

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

/// A secret's value and which version it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// The bytes.
    pub value: Value,
    /// Number, times and size.
    pub info: VersionInfo,
}

/// What can be told of a store without a name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Status {
    /// Secrets that are not deleted.
    pub secrets: u64,
    /// Values that are kept.
    pub versions: u64,
    /// Transactions so far.
    pub change: u64,
    /// Id of the master key.
    pub master_key: String,
    /// Id of the data key that seals, and when it was made, in seconds since 1970.
    pub data_key: u32,
    /// See `data_key`.
    pub data_key_created: i64,
    /// Whether records are being sealed anew.
    pub is_rotating: bool,
}

/// The store. All methods may block on the disk.
#[derive(Debug)]
pub struct SealedStore {
    /// `None` only until it is opened again after an error of the disk, after which the library gives no more.
    db: Mutex<Option<Arc<Database>>>,
    opener: Opener,
    path: PathBuf,
    counter: Option<Counter>,
    id: [u8; 16],
    /// Replaced as a whole by a rotation.
    ring: Mutex<Arc<Ring>>,
    /// Held by whoever changes something.
    inner: Mutex<Inner>,
    /// The end of the audit as it is in its file, which may be ahead of the state. Locked after `inner` where both are.
    audit: Mutex<AuditHead>,
    /// Why the counter is behind the store, where it is.
    counter_problem: Mutex<Option<String>>,
}

impl SealedStore {
    /// The newest value of a name, or one of the versions that are kept. `None` where there is none at `now`.
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

    /// Stores a new version, and returns its number. `if_version` is the newest version that the caller has seen, 0 for
    /// none. `before_commit` gets the number when all is ready, and returns the end of the audit as it is on disk;
    /// what it refuses is not stored.
    ///
    /// # Errors
    /// [`StoreError::Version`], [`StoreError::Io`], [`StoreError::Damaged`], and what `before_commit` says.
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

    /// Deletes a secret with all its values, and returns its last version; `None` where there was nothing. The name and
    /// the number of its last version stay, sealed, for a while: see [`SealedStore::sweep`]. With `revoke` one that was
    /// deleted before is found, too, unless it was revoked already.
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

    /// The versions of a name that are kept, and whether it was deleted.
    ///
    /// # Errors
    /// [`StoreError::Io`], [`StoreError::Damaged`].
    pub fn history(&self, name: &SecretName) -> Result<Option<Versions>, StoreError> {
        let (ring, txn) = self.read()?;
        self.head(&ring, &txn, &hashed(&ring, name))
    }

    /// The names with a value at `now` that `shown` lets through, sorted. It opens the head of each secret.
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

    /// Counts and ages.
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

    /// Where the audit ends, for whoever writes a line that changes nothing here; see [`SealedStore::save_audit`].
    pub fn audit(&self) -> AuditHead {
        *self.audit.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets `write` add to the audit. What it makes of the head is put on disk by a change or [`SealedStore::save_audit`].
    pub fn with_audit<T>(&self, write: impl FnOnce(&mut AuditHead) -> T) -> T {
        write(&mut self.audit.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Puts the end of the audit into the store, if it is another than there; `head` is on disk as far as it says. A
    /// counter that is behind is written again.
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

    /// Why the counter is behind the store, where it is.
    pub fn counter_problem(&self) -> Option<String> {
        self.counter_problem.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The key that chains the audit.
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
    /// Seconds since 1970.
    pub now: i64,
    /// Seconds since 1970, when the version ends.
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
