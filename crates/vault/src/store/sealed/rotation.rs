//! Key rotation: new data keys, with records resealed step by step while the store serves, and new master keys.

use redb::{ReadableTable, WriteTransaction};

use super::SealedStore;
use super::layout::{Kind, key_id};
use super::problem::refused;
use super::state::{AuditHead, State};
use super::transaction::Keys;
use crate::seal::Key;
use crate::store::StoreError;
use crate::store::ring::Ring;

/// Most records, and most bytes of them, that one transaction of a rotation reseals. Reads continue meanwhile, and a
/// change waits for one such transaction at most.
const ROTATION_RECORDS: usize = 256;
const ROTATION_BYTES: usize = 4 << 20;

#[derive(Debug, Clone)]
pub(super) enum Cursor {
    Heads(Vec<u8>),
    Values(Vec<u8>),
}

impl SealedStore {
    /// Makes a new data key, which seals from now on, and returns its id. [`SealedStore::reseal`] does the rest.
    ///
    /// # Errors
    /// [`StoreError::TooManyKeys`], [`StoreError::Io`], and the error of `before_commit`.
    pub fn rotate(
        &self,
        now: i64,
        before_commit: impl FnOnce() -> Result<AuditHead, StoreError>,
    ) -> Result<u32, StoreError> {
        let mut inner = self.settled()?;
        let mut ring = Ring::clone(&self.ring());
        let id = ring.add(now)?.ok_or(StoreError::TooManyKeys)?;
        let keys = Keys { ring: Some(ring.clone()), master: None };
        self.transact(&mut inner, keys, |state, txn, master| {
            self.write_ring(txn, &ring, master)?;
            state.audit = before_commit()?;
            Ok(())
        })?;
        inner.cursor = None;
        Ok(id)
    }

    /// Reseals some more records with the newest data key, and forgets the older keys when no record is left. Returns
    /// whether there is more to do. Reads continue meanwhile.
    ///
    /// # Errors
    /// [`StoreError::Io`], [`StoreError::Damaged`].
    pub fn reseal(&self) -> Result<bool, StoreError> {
        let mut inner = self.settled()?;
        let ring = self.ring();
        if !ring.is_rotating() {
            return Ok(false);
        }
        let from = inner.cursor.clone().unwrap_or(Cursor::Heads(vec![]));
        let next =
            self.transact(&mut inner, Keys::default(), |state, txn, _| self.reseal_from(&ring, state, txn, from))?;
        if next.is_none() {
            let mut rest = Ring::clone(&ring);
            rest.retain_current();
            let keys = Keys { ring: Some(rest.clone()), master: None };
            self.transact(&mut inner, keys, |_, txn, master| self.write_ring(txn, &rest, master))?;
        }
        let has_more = next.is_some();
        inner.cursor = next;
        Ok(has_more)
    }

    /// Rewraps the keys for another master key. Only that key opens the store from now on.
    ///
    /// # Errors
    /// [`StoreError::Io`], and the error of `before_commit`.
    pub fn rotate_master(
        &self,
        new: Key,
        before_commit: impl FnOnce() -> Result<AuditHead, StoreError>,
    ) -> Result<(), StoreError> {
        let mut inner = self.settled()?;
        let ring = self.ring();
        let keys = Keys { ring: None, master: Some(new.clone()) };
        self.transact(&mut inner, keys, |state, txn, _| {
            self.write_ring(txn, &ring, &new)?;
            state.audit = before_commit()?;
            Ok(())
        })
    }

    /// Does one transaction of a rotation, starting at a place. Returns where the next one starts.
    fn reseal_from(
        &self,
        ring: &Ring,
        state: &mut State,
        txn: &WriteTransaction,
        from: Cursor,
    ) -> Result<Option<Cursor>, StoreError> {
        let (kind, from) = match &from {
            Cursor::Heads(from) => (Kind::Head, from),
            Cursor::Values(from) => (Kind::Value, from),
        };
        let (mut old, mut bytes, mut last) = (vec![], 0, None);
        {
            let table = txn.open_table(kind.table()).map_err(|error| refused(&self.path, error))?;
            for entry in table.range(&from[..]..).map_err(|error| refused(&self.path, error))? {
                let (place, record) = entry.map_err(|error| refused(&self.path, error))?;
                if old.len() >= ROTATION_RECORDS || bytes >= ROTATION_BYTES {
                    last = Some(place.value().to_vec());
                    break;
                }
                if key_id(record.value()) != Some(ring.current().id) {
                    bytes += record.value().len();
                    old.push((place.value().to_vec(), self.unseal(ring, kind, place.value(), record.value())?));
                }
            }
        }
        for (place, text) in old {
            self.put(ring, state, txn, kind, &place, Some(&text))?;
        }
        Ok(match (kind, last) {
            (Kind::Head, Some(last)) => Some(Cursor::Heads(last)),
            (Kind::Head, None) => Some(Cursor::Values(vec![])),
            (Kind::Value, Some(last)) => Some(Cursor::Values(last)),
            (Kind::Value, None) => None,
        })
    }
}
