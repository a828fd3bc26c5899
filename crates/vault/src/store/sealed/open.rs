//! Makes a store, checks the whole file, and opens it.

#![expect(clippy::disallowed_methods, reason = "blocks on the disk; whoever serves calls it on a thread of its own")]

use std::fmt;
use std::fs::File;
use std::io::ErrorKind;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use redb::{Builder, Database, ReadableDatabase, ReadableTable, StorageBackend};

use super::SealedStore;
use super::layout::{FORM, HEADS, Kind, META, VALUES, ring_place};
use super::problem::{damaged, io_error, refused};
use super::state::{State, read_state};
use super::transaction::{Inner, Keys};
use crate::place::plain;
use crate::seal::Key;
use crate::store::StoreError;
use crate::store::backend::Overlay;
use crate::store::counter::Counter;
use crate::store::ring::Ring;

/// Bytes of cache for `redb`: pages of the tree, for repeated reads.
const CACHE_BYTES: usize = 2 << 20;

/// Where a store is.
#[derive(Debug, Clone)]
pub struct Location {
    /// The database.
    pub file: PathBuf,
    /// The counter's file, which detects an older copy. Best on another volume.
    pub counter: Option<PathBuf>,
}

/// How to open a store.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// Accept a store that is older than its counter, or whose counter is missing.
    pub accept_rollback: bool,
    /// The current time in seconds since 1970.
    pub now: i64,
}

/// Reopens the database.
pub(super) struct Opener(pub(super) Box<dyn Fn() -> Result<Database, StoreError> + Send + Sync>);

impl fmt::Debug for Opener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Opener")
    }
}

/// What the check of a whole file found.
pub(super) struct Sound {
    pub(super) id: [u8; 16],
    pub(super) ring: Ring,
    pub(super) state: State,
}

impl SealedStore {
    /// Opens the store, or makes it if there is none. Checks the whole file first and changes nothing before it is
    /// found sound. The caller must hold a lock that keeps other processes out.
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
        let file = match plain(File::options().read(true).write(true), path) {
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
            // Commit once, so that the counter follows this store from here on.
            store.transact(&mut store.inner(), Keys::default(), |_, _, _| Ok(()))?;
        }
        Ok(store)
    }

    /// Makes an empty store under a temporary name and renames it when it is complete. Discards a half-made one that a
    /// crash left.
    fn make(path: &Path, master: &Key, options: Options) -> Result<Sound, StoreError> {
        let failed = |error| io_error(path, "made", error);
        let mut half = path.as_os_str().to_owned();
        half.push(".new");
        let half = PathBuf::from(half);
        match std::fs::remove_file(&half) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(failed(error)),
            _ => {}
        }
        // Create it with mode 0600, so that nobody else can read it at any instant.
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

    /// Commits the first transaction of a store.
    pub(super) fn begin(db: Database, path: &Path, master: &Key, options: Options) -> Result<Sound, StoreError> {
        let mut id = [0; 16];
        crate::seal::fill(&mut id)?;
        let sound = Sound { id, ring: Ring::new(options.now)?, state: State::default() };
        let opener = Opener(Box::new(|| {
            Err(io_error(Path::new("a store that is being made"), "opened", ErrorKind::NotFound.into()))
        }));
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

    pub(super) fn on(
        db: Database,
        opener: Opener,
        path: PathBuf,
        counter: Option<Counter>,
        mut sound: Sound,
        master: Key,
        seen: u64,
    ) -> Self {
        // Continue from the counter, so that an accepted older copy is ahead of it from its first change on.
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
}

/// Checks a whole file: its format version, its keys, its state, and that it holds exactly the records that the state
/// sums up.
pub(super) fn look(backend: impl StorageBackend, path: &Path, master: &Key) -> Result<Sound, StoreError> {
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

fn open_file(path: &Path) -> Result<Database, StoreError> {
    Builder::new().set_cache_size(CACHE_BYTES).create(path).map_err(|error| refused(path, error))
}
