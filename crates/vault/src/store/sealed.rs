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

#![expect(clippy::disallowed_methods, reason = "blocks on the disk; whoever serves calls it on a thread of its own")]

use std::fmt;
use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use redb::{
    Builder, Database, ReadTransaction, ReadableDatabase, ReadableTable, ReadableTableMetadata, StorageBackend,
    TableDefinition, WriteTransaction,
};
use serde::Serialize;
use zeroize::Zeroizing;

use super::StoreError;
use super::backend::Overlay;
use super::counter::Counter;
use super::record::{VersionInfo, Versions};
use super::ring::{DataKey, Ring};
use crate::seal::{Key, KeyError};
use crate::secret::{SecretName, Value};

/// Of the file. A program that knows less than what it finds stops.
const FORM: u32 = 1;
/// What `redb` may keep in memory: pages of the tree, for reads that come again.
const CACHE_BYTES: usize = 2 << 20;
/// Records that one transaction of a rotation seals anew, and bytes of them: reads go on meanwhile, and a change waits
/// for one such transaction at most.
const ROTATION_RECORDS: usize = 256;
const ROTATION_BYTES: usize = 4 << 20;

const META: TableDefinition<&str, &[u8]> = TableDefinition::new("meta");
const HEADS: TableDefinition<&[u8], &[u8]> = TableDefinition::new("heads");
const VALUES: TableDefinition<&[u8], &[u8]> = TableDefinition::new("values");

/// Where a store is.
#[derive(Debug, Clone)]
pub struct Location {
    /// The database.
    pub file: PathBuf,
    /// The counter that notices an older copy, best on another volume.
    pub counter: Option<PathBuf>,
}

/// How it is opened.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// Go on with a store that is older than the counter.
    pub accept_rollback: bool,
    /// Seconds since 1970.
    pub now: i64,
}

/// The end of the audit, as the store remembers it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct AuditHead {
    /// Lines so far.
    pub lines: u64,
    /// Keyed hash of the newest one; zeros before the first.
    pub mac: [u8; 32],
    /// The newest line of those that retention has removed: number and keyed hash.
    pub removed: (u64, [u8; 32]),
}

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

#[derive(Debug)]
struct Inner {
    master: Key,
    /// As it is on disk.
    state: State,
    /// The disk refused in the middle of a commit that would have made this of the keys: before anything else the file
    /// says whether it did.
    uncertain: Option<Keys>,
    /// Where a rotation goes on; from the beginning after a start.
    cursor: Option<Cursor>,
}

/// Opens the database again.
struct Opener(Box<dyn Fn() -> Result<Database, StoreError> + Send + Sync>);

impl fmt::Debug for Opener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Opener")
    }
}

/// Keys that a transaction puts in the place of the present ones.
#[derive(Debug, Clone, Default)]
struct Keys {
    ring: Option<Ring>,
    master: Option<Key>,
}

#[derive(Debug, Clone)]
enum Cursor {
    Heads(Vec<u8>),
    Values(Vec<u8>),
}

/// What the file must come to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct State {
    change: u64,
    records: u64,
    secrets: u64,
    sum: [u8; 32],
    audit: AuditHead,
    /// A counter has followed this store: one that is missing was removed.
    counted: bool,
}

const STATE_BYTES: usize = 8 * 3 + 32 + 8 + 32 + 8 + 32 + 1;

impl State {
    fn to_bytes(self) -> Vec<u8> {
        let (lines, removed) = (self.audit.lines.to_be_bytes(), self.audit.removed.0.to_be_bytes());
        let counts = [self.change, self.records, self.secrets].map(u64::to_be_bytes).concat();
        [&counts[..], &self.sum, &lines, &self.audit.mac, &removed, &self.audit.removed.1, &[self.counted.into()]]
            .concat()
    }

    fn parse(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; STATE_BYTES] = bytes.try_into().ok()?;
        let mut rest = bytes.as_slice();
        let mut number = || {
            let (number, behind) = rest.split_first_chunk()?;
            rest = behind;
            Some(u64::from_be_bytes(*number))
        };
        let (change, records, secrets) = (number()?, number()?, number()?);
        let mut rest = &bytes[24..];
        let mut take = |length: usize| {
            let (taken, behind) = rest.split_at(length);
            rest = behind;
            taken
        };
        let sum = take(32).try_into().ok()?;
        let lines = u64::from_be_bytes(take(8).try_into().ok()?);
        let mac = take(32).try_into().ok()?;
        let removed = (u64::from_be_bytes(take(8).try_into().ok()?), take(32).try_into().ok()?);
        let counted = match take(1) {
            [0] => false,
            [1] => true,
            _ => return None,
        };
        Some(Self { change, records, secrets, sum, audit: AuditHead { lines, mac, removed }, counted })
    }
}

/// Which table, as it is bound to a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Head,
    Value,
}

impl Kind {
    fn tag(self) -> &'static [u8] {
        match self {
            Self::Head => b"head",
            Self::Value => b"value",
        }
    }
}

/// What a check of the whole file found.
struct Sound {
    id: [u8; 16],
    ring: Ring,
    state: State,
}

impl SealedStore {
    /// Opens the store, or makes it where there is none. The file is looked at as a whole first, and not changed
    /// before it was found sound. The caller keeps others out by a lock.
    ///
    /// # Errors
    /// [`StoreError::WrongKey`], [`StoreError::Damaged`], [`StoreError::Newer`], [`StoreError::RolledBack`],
    /// [`StoreError::Io`].
    pub fn open(location: &Location, master: Key, options: Options) -> Result<Self, StoreError> {
        let path = &location.file;
        let unreadable = |error| io_error(path, "opened", error);
        let counter = location.counter.clone().map(Counter::new);
        let seen = match &counter {
            None => None,
            Some(counter) => counter.read().map_err(|error| StoreError::Io {
                what: "the counter of changes",
                path: counter.path().to_owned(),
                verb: "read",
                error,
            })?,
        };
        let file = match File::options().read(true).write(true).open(path) {
            Err(error) if error.kind() == ErrorKind::NotFound => None,
            Ok(file) if file.metadata().map_err(unreadable)?.len() == 0 => None,
            file => Some(file.map_err(unreadable)?),
        };
        let found = match file {
            None => None,
            Some(file) => Some(look(Overlay::new(file).map_err(unreadable)?, path, &master)?),
        };
        let change = found.as_ref().map_or(0, |sound| sound.state.change);
        let was_counted = found.as_ref().is_some_and(|sound| sound.state.counted);
        let mut is_older = false;
        if let Some(counter) = &counter {
            let (path, counter) = (path.clone(), counter.path().to_owned());
            let refusal = match seen {
                Some(seen) if change < seen => Some(StoreError::RolledBack { path, counter, found: change, seen }),
                None if was_counted => Some(StoreError::CounterMissing { path, counter }),
                _ => None,
            };
            match refusal {
                Some(refusal) if !options.accept_rollback => return Err(refusal),
                Some(refusal) => {
                    tracing::warn!("going on as asked: {refusal}");
                    is_older = true;
                }
                None => {}
            }
        }
        let sound = match found {
            Some(sound) => sound,
            None => Self::make(path, &master, options)?,
        };
        let db = open_file(path)?;
        let opener = {
            let path = path.clone();
            Opener(Box::new(move || open_file(&path)))
        };
        let store = Self::on(db, opener, path.clone(), counter, sound, master, seen.unwrap_or(0));
        if is_older || store.counter.is_some() && !was_counted {
            // From here on the counter knows this one.
            store.transact(&mut store.inner(), Keys::default(), |_, _, _| Ok(()))?;
        }
        Ok(store)
    }

    /// Makes an empty store under another name and gives it its own when it is whole: one that a crash leaves half made
    /// is nobody's, and made anew.
    fn make(path: &Path, master: &Key, options: Options) -> Result<Sound, StoreError> {
        let failed = |error| io_error(path, "made", error);
        let mut half = path.as_os_str().to_owned();
        half.push(".new");
        let half = PathBuf::from(half);
        match std::fs::remove_file(&half) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(failed(error)),
            _ => {}
        }
        // Not readable by anybody else at any instant.
        File::options().write(true).create_new(true).mode(0o600).open(&half).map_err(failed)?;
        let sound = Self::begin(open_file(&half)?, path, master, options)?;
        std::fs::rename(&half, path).map_err(failed)?;
        match path.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => {
                File::open(folder).and_then(|folder| folder.sync_all()).map_err(failed)?;
            }
            _ => {}
        }
        Ok(sound)
    }

    /// The first transaction of a store.
    fn begin(db: Database, path: &Path, master: &Key, options: Options) -> Result<Sound, StoreError> {
        let mut id = [0; 16];
        crate::seal::fill(&mut id)?;
        let sound = Sound { id, ring: Ring::new(options.now)?, state: State::default() };
        let opener = Opener(Box::new(|| Err(StoreError::TooManyKeys)));
        let store = Self::on(db, opener, path.to_owned(), None, sound, master.clone(), 0);
        let (mut inner, ring) = (store.inner(), store.ring());
        store.transact(&mut inner, Keys::default(), |_, txn, master| {
            store.write_ring(txn, &ring, master)?;
            let mut meta = txn.open_table(META).map_err(|error| refused(path, error))?;
            for (key, value) in [("form", &FORM.to_be_bytes()[..]), ("store", &store.id)] {
                meta.insert(key, value).map_err(|error| refused(path, error))?;
            }
            drop(meta);
            txn.open_table(HEADS).map_err(|error| refused(path, error))?;
            txn.open_table(VALUES).map_err(|error| refused(path, error))?;
            Ok(())
        })?;
        Ok(Sound { id, ring: Ring::clone(&ring), state: inner.state })
    }

    fn on(
        db: Database,
        opener: Opener,
        path: PathBuf,
        counter: Option<Counter>,
        mut sound: Sound,
        master: Key,
        seen: u64,
    ) -> Self {
        // An older copy that was accepted is newer than what was seen from its first change on.
        sound.state.change = sound.state.change.max(seen);
        sound.state.counted |= counter.is_some();
        let inner = Inner { master, state: sound.state, uncertain: None, cursor: None };
        Self {
            db: Mutex::new(Some(Arc::new(db))),
            opener,
            path,
            counter,
            id: sound.id,
            ring: Mutex::new(Arc::new(sound.ring)),
            inner: Mutex::new(inner),
            audit: Mutex::new(sound.state.audit),
            counter_problem: Mutex::new(None),
        }
    }

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
            let mut versions = old.unwrap_or_else(|| Versions::new(name));
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
    /// the number of its last version stay, sealed.
    ///
    /// # Errors
    /// As for [`SealedStore::set`].
    pub fn delete(
        &self,
        name: &SecretName,
        now: i64,
        before_commit: impl FnOnce(u64) -> Result<AuditHead, StoreError>,
    ) -> Result<Option<u64>, StoreError> {
        let mut inner = self.settled()?;
        let (ring, txn) = self.read()?;
        let place = hashed(&ring, name);
        let is_there = |versions: &Versions| versions.newest().is_some();
        if !self.head(&ring, &txn, &place)?.as_ref().is_some_and(is_there) {
            return Ok(None);
        }
        self.transact(&mut inner, Keys::default(), |state, txn, _| {
            let Some(mut versions) = self.head_in(&ring, txn, &place)? else { return Ok(None) };
            for gone in versions.delete(now) {
                self.put(&ring, state, txn, Kind::Value, &value_place(&place, gone), None)?;
            }
            self.put(&ring, state, txn, Kind::Head, &place, Some(&versions.to_bytes()))?;
            state.secrets -= 1;
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

    /// Makes a new data key, which seals from now on, and returns its id. [`SealedStore::reseal`] does the rest.
    ///
    /// # Errors
    /// [`StoreError::TooManyKeys`], [`StoreError::Io`], and what `before_commit` says.
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

    /// Seals some more records with the newest data key; when none is left the older keys are forgotten. Returns
    /// whether there is more to do. Reads go on meanwhile.
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

    /// The keys wrapped anew for another master key, which alone opens the store from now on.
    ///
    /// # Errors
    /// [`StoreError::Io`], and what `before_commit` says.
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

    fn inner(&self) -> MutexGuard<'_, Inner> {
        // What is inside is replaced after a commit only.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ring(&self) -> Arc<Ring> {
        self.ring.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn replace(&self, ring: Ring) {
        *self.ring.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(ring);
    }

    /// A look at the file and the keys that open what is seen there: keys are replaced after their commit, so that they
    /// never are older than the look.
    fn read(&self) -> Result<(Arc<Ring>, ReadTransaction), StoreError> {
        let db = self.database()?;
        let ring = self.ring.lock().unwrap_or_else(PoisonError::into_inner);
        let txn = db.begin_read().map_err(|error| refused(&self.path, error))?;
        Ok((ring.clone(), txn))
    }

    fn database(&self) -> Result<Arc<Database>, StoreError> {
        let mut db = self.db.lock().unwrap_or_else(PoisonError::into_inner);
        match &*db {
            Some(db) => Ok(db.clone()),
            None => Ok(db.insert(Arc::new((self.opener.0)()?)).clone()),
        }
    }

    /// After an error of the disk the library refuses everything until the file was opened again.
    fn close(&self) {
        // Closed as soon as no read has it any more, and opened by the next one who asks.
        *self.db.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Held by whoever changes something, after it is certain what the file holds.
    fn settled(&self) -> Result<MutexGuard<'_, Inner>, StoreError> {
        let mut inner = self.inner();
        self.settle(&mut inner)?;
        Ok(inner)
    }

    /// After an error of the disk in the middle of a commit, the file alone knows which state and which keys count.
    fn settle(&self, inner: &mut Inner) -> Result<(), StoreError> {
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

    /// One transaction: all of it with the new state, on disk when it returns, or nothing; `keys` count from then on.
    fn transact<T>(
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
                // As if it had never been asked for.
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
        // After the store, so that it is never ahead of it. One that is behind only notices less.
        self.count(state.change);
        Ok(result)
    }

    fn count(&self, change: u64) {
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

    fn commit<T>(
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

    fn write_ring(&self, txn: &WriteTransaction, ring: &Ring, master: &Key) -> Result<(), StoreError> {
        let sealed = master.seal(&ring_place(&self.id), &ring.to_bytes())?;
        let mut meta = txn.open_table(META).map_err(|error| refused(&self.path, error))?;
        for (key, value) in [("ring", &sealed[..]), ("master", master.id().as_bytes())] {
            meta.insert(key, value).map_err(|error| refused(&self.path, error))?;
        }
        Ok(())
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

    fn unseal(&self, ring: &Ring, kind: Kind, place: &[u8], record: &[u8]) -> Result<Zeroizing<Vec<u8>>, StoreError> {
        open_record(ring, &self.id, kind, place, record)
            .ok_or_else(|| damaged(&self.path, "a record was changed or moved"))
    }

    /// Replaces a record, or removes it, and keeps the sum right.
    fn put(
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

    /// One transaction of a rotation, from a place on. Returns where the next one begins.
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

impl State {
    fn add(&mut self, ring: &Ring, kind: Kind, place: &[u8], record: &[u8]) {
        self.records += 1;
        self.fold(ring, kind, place, record);
    }

    fn take(&mut self, ring: &Ring, kind: Kind, place: &[u8], record: &[u8]) {
        self.records = self.records.wrapping_sub(1);
        self.fold(ring, kind, place, record);
    }

    /// The nonce and the tag stand for all of a record: it opens with no others.
    fn fold(&mut self, ring: &Ring, kind: Kind, place: &[u8], record: &[u8]) {
        let ends = [record.get(..KEY_ID_BYTES + 24).unwrap_or(record), record.last_chunk::<16>().map_or(record, |t| t)];
        let mac = ring.state.mac(b"record", &[kind.tag(), place, ends[0], ends[1]]);
        self.sum.iter_mut().zip(mac).for_each(|(sum, mac)| *sum ^= mac);
    }
}

impl Kind {
    fn table(self) -> TableDefinition<'static, &'static [u8], &'static [u8]> {
        match self {
            Self::Head => HEADS,
            Self::Value => VALUES,
        }
    }
}

/// Bytes of the data key's id at the beginning of a record.
const KEY_ID_BYTES: usize = 4;

fn key_id(record: &[u8]) -> Option<u32> {
    record.first_chunk().map(|id| u32::from_be_bytes(*id))
}

/// What is bound to a record: it opens nowhere else.
fn record_place(store: &[u8; 16], kind: Kind, place: &[u8], key: u32) -> Vec<u8> {
    [b"dockflare-vault ", kind.tag(), b" ", store, &key.to_be_bytes(), place].concat()
}

fn ring_place(store: &[u8; 16]) -> Vec<u8> {
    [&b"dockflare-vault ring "[..], store].concat()
}

fn state_place(store: &[u8; 16]) -> Vec<u8> {
    [&b"dockflare-vault state "[..], store].concat()
}

fn hashed(ring: &Ring, name: &SecretName) -> [u8; 32] {
    ring.names.mac(b"name", &[name.as_str().as_bytes()])
}

fn value_place(name: &[u8; 32], version: u64) -> [u8; 40] {
    let mut place = [0; 40];
    place[..32].copy_from_slice(name);
    place[32..].copy_from_slice(&version.to_be_bytes());
    place
}

fn seal_record(key: &DataKey, store: &[u8; 16], kind: Kind, place: &[u8], text: &[u8]) -> Result<Vec<u8>, KeyError> {
    let sealed = key.key.seal(&record_place(store, kind, place, key.id), text)?;
    Ok([&key.id.to_be_bytes()[..], &sealed].concat())
}

fn open_record(ring: &Ring, store: &[u8; 16], kind: Kind, place: &[u8], record: &[u8]) -> Option<Zeroizing<Vec<u8>>> {
    let (id, sealed) = record.split_first_chunk::<KEY_ID_BYTES>()?;
    let key = ring.find(u32::from_be_bytes(*id))?;
    key.key.open(&record_place(store, kind, place, key.id), sealed)
}

/// Looks at a whole file: its form, its keys, its state, and that exactly the records are there that the state sums
/// up.
fn look(backend: impl StorageBackend, path: &Path, master: &Key) -> Result<Sound, StoreError> {
    let db = Builder::new()
        .set_cache_size(CACHE_BYTES)
        .set_check_integrity_on_open(true)
        .create_with_backend(backend)
        .map_err(|error| refused(path, error))?;
    let txn = db.begin_read().map_err(|error| refused(path, error))?;
    let meta = txn.open_table(META).map_err(|error| refused(path, error))?;
    let read = |key: &'static str| -> Result<Vec<u8>, StoreError> {
        let value = meta.get(key).map_err(|error| refused(path, error))?;
        value.map(|value| value.value().to_vec()).ok_or_else(|| damaged(path, "a part of its head is missing"))
    };
    let form = read("form")?.as_slice().try_into().map(u32::from_be_bytes);
    let form = form.map_err(|_| damaged(path, "its form is no number"))?;
    if form != FORM {
        return Err(StoreError::Newer { path: path.to_owned(), found: form, known: FORM });
    }
    let id: [u8; 16] = read("store")?.try_into().map_err(|_| damaged(path, "its id has another length"))?;
    let wrapped = read("ring")?;
    let Some(ring) = master.open(&ring_place(&id), &wrapped) else {
        let wanted = String::from_utf8_lossy(&read("master")?).into_owned();
        let given = master.id();
        return Err(if wanted == given {
            damaged(path, "its keys were changed")
        } else {
            StoreError::WrongKey { path: path.to_owned(), given, wanted }
        });
    };
    let ring = Ring::parse(&ring).ok_or_else(|| damaged(path, "its keys have another form"))?;
    let state = read_state(&txn, &ring, &id, path)?;
    let mut sum = State { records: 0, sum: [0; 32], ..state };
    for kind in [Kind::Head, Kind::Value] {
        let table = txn.open_table(kind.table()).map_err(|error| refused(path, error))?;
        for entry in table.iter().map_err(|error| refused(path, error))? {
            let (place, record) = entry.map_err(|error| refused(path, error))?;
            sum.add(&ring, kind, place.value(), record.value());
        }
    }
    if sum != state {
        return Err(damaged(path, "records were removed, added or put back from an older copy"));
    }
    Ok(Sound { id, ring, state })
}

fn read_state(txn: &ReadTransaction, ring: &Ring, id: &[u8; 16], path: &Path) -> Result<State, StoreError> {
    let meta = txn.open_table(META).map_err(|error| refused(path, error))?;
    let sealed = meta.get("state").map_err(|error| refused(path, error))?;
    let sealed = sealed.ok_or_else(|| damaged(path, "its state is missing"))?;
    let state = ring.state.open(&state_place(id), sealed.value()).and_then(|text| State::parse(&text));
    state.ok_or_else(|| damaged(path, "its state was changed"))
}

fn open_file(path: &Path) -> Result<Database, StoreError> {
    Builder::new().set_cache_size(CACHE_BYTES).create(path).map_err(|error| refused(path, error))
}

fn damaged(path: &Path, problem: &str) -> StoreError {
    StoreError::Damaged { path: path.to_owned(), problem: problem.to_owned() }
}

fn io_error(path: &Path, verb: &'static str, error: io::Error) -> StoreError {
    StoreError::Io { what: "the store", path: path.to_owned(), verb, error }
}

/// What the library says: an error of the disk, or of what is on it.
fn refused(path: &Path, error: impl Into<redb::Error>) -> StoreError {
    match error.into() {
        redb::Error::Io(error)
            if error.kind() != ErrorKind::UnexpectedEof && error.kind() != ErrorKind::InvalidData =>
        {
            io_error(path, "read or written", error)
        }
        error @ (redb::Error::PreviousIo | redb::Error::DatabaseClosed) => {
            io_error(path, "read or written", io::Error::other(error.to_string()))
        }
        redb::Error::DatabaseAlreadyOpen => {
            StoreError::Taken { path: path.to_owned(), holder: "another process".to_owned() }
        }
        error => damaged(path, &error.to_string()),
    }
}

#[cfg(feature = "fuzzing")]
pub(super) fn fuzz(bytes: &[u8]) {
    if let Some(state) = State::parse(bytes) {
        assert_eq!(state.to_bytes(), bytes);
    }
}

#[cfg(test)]
mod tests;
