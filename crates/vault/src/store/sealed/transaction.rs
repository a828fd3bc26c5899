//! One read or one change. A change is on disk with its new state or not at all, even if the disk fails in between.

use std::sync::{Arc, MutexGuard, PoisonError};

use redb::{Database, ReadTransaction, ReadableDatabase, WriteTransaction};
use zeroize::Zeroizing;

use super::SealedStore;
use super::layout::{Kind, META, open_record, ring_place, seal_record, state_place};
use super::problem::{damaged, refused};
use super::rotation::Cursor;
use super::state::{State, read_state};
use crate::seal::Key;
use crate::store::StoreError;
use crate::store::ring::Ring;

#[derive(Debug)]
pub(super) struct Inner {
    pub(super) master: Key,
    /// The state on disk.
    pub(super) state: State,
    /// Set when the disk failed in the middle of a commit: the keys that the commit would have put in force. Before any
    /// other change, the file is read to see whether the commit happened.
    pub(super) uncertain: Option<Keys>,
    /// Where a rotation continues; `None` for the beginning, as after a start.
    pub(super) cursor: Option<Cursor>,
}

/// Keys with which a transaction replaces the current ones.
#[derive(Debug, Clone, Default)]
pub(super) struct Keys {
    pub(super) ring: Option<Ring>,
    pub(super) master: Option<Key>,
}

impl SealedStore {
    pub(super) fn inner(&self) -> MutexGuard<'_, Inner> {
        // A poisoned lock is safe: the content changes only after a commit.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn ring(&self) -> Arc<Ring> {
        self.ring.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn replace(&self, ring: Ring) {
        *self.ring.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(ring);
    }

    /// Takes a snapshot of the file, with the keys that open it. Keys are replaced only after their commit, and the
    /// snapshot is taken under their lock, so the keys open every record in it.
    pub(super) fn read(&self) -> Result<(Arc<Ring>, ReadTransaction), StoreError> {
        let db = self.database()?;
        let ring = self.ring.lock().unwrap_or_else(PoisonError::into_inner);
        let txn = db.begin_read().map_err(|error| refused(&self.path, error))?;
        Ok((ring.clone(), txn))
    }

    pub(super) fn database(&self) -> Result<Arc<Database>, StoreError> {
        let mut db = self.db.lock().unwrap_or_else(PoisonError::into_inner);
        match &*db {
            Some(db) => Ok(db.clone()),
            None => Ok(db.insert(Arc::new((self.opener.0)()?)).clone()),
        }
    }

    /// Closes the database after a disk error: the library refuses everything until the file is reopened.
    pub(super) fn close(&self) {
        // It closes when the last read drops it, and the next caller reopens it.
        *self.db.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Takes the lock for a change, after making sure what the file holds.
    pub(super) fn settled(&self) -> Result<MutexGuard<'_, Inner>, StoreError> {
        let mut inner = self.inner();
        self.settle(&mut inner)?;
        Ok(inner)
    }

    /// Reads the state and the keys from the file after the disk failed in the middle of a commit: only the file knows
    /// which of them are in force.
    pub(super) fn settle(&self, inner: &mut Inner) -> Result<(), StoreError> {
        let Some(keys) = &inner.uncertain else { return Ok(()) };
        let txn = self.database()?.begin_read().map_err(|error| refused(&self.path, error))?;
        let meta = txn.open_table(META).map_err(|error| refused(&self.path, error))?;
        let wrapped = meta.get("ring").map_err(|error| refused(&self.path, error))?;
        let wrapped = wrapped.ok_or_else(|| damaged(&self.path, "its keys are missing"))?;
        let place = ring_place(&self.id);
        let opened = [Some(&inner.master), keys.master.as_ref()]
            .into_iter()
            .flatten()
            .find_map(|master| Some((master.clone(), Ring::parse(&master.open(&place, wrapped.value())?)?)));
        let (master, ring) = opened.ok_or_else(|| damaged(&self.path, "its keys were changed"))?;
        let state = read_state(&txn, &ring, &self.id, &self.path)?;
        (inner.master, inner.state, inner.uncertain, inner.cursor) = (master, state, None, None);
        self.replace(ring);
        Ok(())
    }

    /// Runs one transaction: commits all of it with the new state, on disk when this returns, or nothing. `keys` are in
    /// force from then on.
    pub(super) fn transact<T>(
        &self,
        inner: &mut Inner,
        keys: Keys,
        work: impl FnOnce(&mut State, &WriteTransaction, &Key) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let before = inner.state.change;
        let mut state = inner.state;
        let done = self.commit(&mut state, &inner.master, work);
        if let Err(error @ (StoreError::Io { .. } | StoreError::Damaged { .. })) = &done {
            self.close();
            inner.uncertain = Some(keys);
            let problem = error.to_string();
            return match self.settle(inner) {
                // The commit did not happen: report the plain error.
                Ok(()) if inner.state.change == before => done,
                settled => {
                    let is_in = settled.is_ok();
                    if is_in {
                        self.count(inner.state.change);
                    }
                    Err(StoreError::Uncertain { problem, is_in, master: inner.master.id() })
                }
            };
        }
        let result = done?;
        inner.state = state;
        if let Some(ring) = keys.ring {
            self.replace(ring);
        }
        if let Some(master) = keys.master {
            inner.master = master;
        }
        // Count after the commit, so that the counter is never ahead of the store. A counter that is behind only
        // detects less.
        self.count(state.change);
        Ok(result)
    }

    pub(super) fn count(&self, change: u64) {
        let Some(counter) = &self.counter else { return };
        let mut problem = self.counter_problem.lock().unwrap_or_else(PoisonError::into_inner);
        match counter.write(change) {
            Ok(()) => *problem = None,
            Err(error) => {
                let at = counter.path().display();
                let text = format!(
                    "the counter of changes {at} cannot be written: {error}; an older copy of the store may go unnoticed"
                );
                if problem.replace(text.clone()).is_none() {
                    tracing::error!("{text}; trying again");
                }
            }
        }
    }

    pub(super) fn commit<T>(
        &self,
        state: &mut State,
        master: &Key,
        work: impl FnOnce(&mut State, &WriteTransaction, &Key) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let db = self.database()?;
        let txn = db.begin_write().map_err(|error| refused(&self.path, error))?;
        let result = work(state, &txn, master)?;
        state.change += 1;
        let sealed = self.ring().state.seal(&state_place(&self.id), &state.to_bytes())?;
        let mut meta = txn.open_table(META).map_err(|error| refused(&self.path, error))?;
        meta.insert("state", &sealed[..]).map_err(|error| refused(&self.path, error))?;
        drop(meta);
        txn.commit().map_err(|error| refused(&self.path, error))?;
        Ok(result)
    }

    pub(super) fn write_ring(&self, txn: &WriteTransaction, ring: &Ring, master: &Key) -> Result<(), StoreError> {
        let sealed = master.seal(&ring_place(&self.id), &ring.to_bytes())?;
        let mut meta = txn.open_table(META).map_err(|error| refused(&self.path, error))?;
        for (key, value) in [("ring", &sealed[..]), ("master", master.id().as_bytes())] {
            meta.insert(key, value).map_err(|error| refused(&self.path, error))?;
        }
        Ok(())
    }

    pub(super) fn unseal(
        &self,
        ring: &Ring,
        kind: Kind,
        place: &[u8],
        record: &[u8],
    ) -> Result<Zeroizing<Vec<u8>>, StoreError> {
        open_record(ring, &self.id, kind, place, record)
            .ok_or_else(|| damaged(&self.path, "a record was changed or moved"))
    }

    /// Replaces or removes a record, and updates the sum.
    pub(super) fn put(
        &self,
        ring: &Ring,
        state: &mut State,
        txn: &WriteTransaction,
        kind: Kind,
        place: &[u8],
        text: Option<&[u8]>,
    ) -> Result<(), StoreError> {
        let mut table = txn.open_table(kind.table()).map_err(|error| refused(&self.path, error))?;
        let old = match text {
            Some(text) => {
                let record = seal_record(ring.current(), &self.id, kind, place, text)?;
                state.add(ring, kind, place, &record);
                table.insert(place, &record[..]).map_err(|error| refused(&self.path, error))?
            }
            None => table.remove(place).map_err(|error| refused(&self.path, error))?,
        };
        if let Some(old) = old {
            state.take(ring, kind, place, old.value());
        }
        Ok(())
    }
}
