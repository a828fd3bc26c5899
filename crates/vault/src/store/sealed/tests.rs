#![expect(clippy::disallowed_methods, reason = "a test may wait for its disk")]
use std::collections::BTreeMap;
use std::io::{self, ErrorKind};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use redb::{Builder, ReadableDatabase, StorageBackend};

use super::open::look;
use super::*;

const NOW: Options = Options { accept_rollback: false, now: 1000 };

pub(super) fn name(text: &str) -> SecretName {
    text.parse().unwrap()
}

pub(super) fn value(text: &str) -> Value {
    Value::new(text.as_bytes().to_vec()).unwrap()
}

pub(super) struct Scene {
    dir: tempfile::TempDir,
    master: Key,
}

impl Scene {
    pub(super) fn new() -> Self {
        // In memory if possible: some tests open and close thousands of stores.
        let dir = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
        Self { dir, master: Key::random().unwrap() }
    }

    fn location(&self) -> Location {
        Location { file: self.dir.path().join("vault.redb"), counter: Some(self.dir.path().join("change")) }
    }

    pub(super) fn open(&self) -> Result<SealedStore, StoreError> {
        SealedStore::open(&self.location(), self.master.clone(), NOW)
    }

    fn bytes(&self) -> Vec<u8> {
        std::fs::read(self.location().file).unwrap()
    }
}

pub(super) fn set(store: &SealedStore, of: &str, text: &str) -> u64 {
    store
        .set(&name(of), &value(text), &Change { now: 1000, ..Change::default() }, |_| Ok(AuditHead::default()))
        .unwrap()
}

pub(super) fn get(store: &SealedStore, of: &str) -> Option<String> {
    let found = store.get(&name(of), None, 1000).unwrap()?;
    Some(String::from_utf8(found.value.expose().to_vec()).unwrap())
}

fn rotate(store: &SealedStore) {
    store.rotate(1001, || Ok(AuditHead::default())).unwrap();
    while store.reseal().unwrap() {}
}

#[test]
fn what_was_set_is_there_after_a_start_and_neither_name_nor_value_stands_in_the_file() {
    let scene = Scene::new();
    let store = scene.open().unwrap();
    assert_eq!(set(&store, "app/PLANTEDNAME", "PLANTEDVALUE"), 1);
    assert_eq!(set(&store, "app/PLANTEDNAME", "PLANTEDVALUE2"), 2);
    drop(store);
    let store = scene.open().unwrap();
    assert_eq!(get(&store, "app/PLANTEDNAME").as_deref(), Some("PLANTEDVALUE2"));
    let first = store.get(&name("app/PLANTEDNAME"), Some(1), 1000).unwrap().unwrap();
    assert_eq!((first.value, first.info.version), (value("PLANTEDVALUE"), 1));
    assert_eq!(store.list(1000, |_| true).unwrap(), [name("app/PLANTEDNAME")]);
    drop(store);
    let bytes = scene.bytes();
    assert!(!bytes.windows(7).any(|window| window == b"PLANTED"));
    let mode =
        std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(scene.location().file).unwrap().permissions());
    assert_eq!(mode & 0o777, 0o600);
}

#[test]
fn a_version_number_is_never_given_twice_and_if_version_holds_or_nothing_changes() {
    let scene = Scene::new();
    let store = scene.open().unwrap();
    let at = |if_version| Change { now: 1000, if_version: Some(if_version), expires: None };
    let set_at = |text, if_version| store.set(&name("a"), &value(text), &at(if_version), |_| Ok(AuditHead::default()));
    assert_eq!(set_at("one", 0).unwrap(), 1);
    assert!(matches!(set_at("two", 0), Err(StoreError::Version { found: 1, wanted: 0, .. })));
    assert_eq!(set_at("two", 1).unwrap(), 2);
    assert_eq!(store.delete(&name("a"), 1001, false, |_| Ok(AuditHead::default())).unwrap(), Some(2));
    assert_eq!(store.delete(&name("a"), 1001, false, |_| Ok(AuditHead::default())).unwrap(), None);
    // A deleted secret can still be revoked, once, without lowering the count of secrets.
    assert_eq!(store.delete(&name("a"), 1002, true, |_| Ok(AuditHead::default())).unwrap(), Some(2));
    assert_eq!(store.delete(&name("a"), 1003, true, |_| Ok(AuditHead::default())).unwrap(), None);
    assert_eq!(get(&store, "a"), None);
    assert_eq!(store.get(&name("a"), Some(1), 1000).unwrap(), None);
    assert_eq!(store.list(1000, |_| true).unwrap(), []);
    assert_eq!(set_at("three", 0).unwrap(), 3);
    assert_eq!(store.status().secrets, 1);
}

#[test]
fn an_expired_version_is_as_if_it_were_not_there() {
    let scene = Scene::new();
    let store = scene.open().unwrap();
    let change = Change { now: 1000, expires: Some(1010), if_version: None };
    store.set(&name("a"), &value("x"), &change, |_| Ok(AuditHead::default())).unwrap();
    assert!(store.get(&name("a"), None, 1009).unwrap().is_some());
    assert!(store.get(&name("a"), None, 1010).unwrap().is_none());
    assert!(store.list(1010, |_| true).unwrap().is_empty());
}

#[test]
fn what_is_refused_before_the_commit_is_not_stored() {
    let scene = Scene::new();
    let store = scene.open().unwrap();
    set(&store, "a", "old");
    let refuse = |_| Err(StoreError::TooManyKeys);
    let change = Change { now: 1000, ..Change::default() };
    assert!(store.set(&name("a"), &value("new"), &change, refuse).is_err());
    assert!(store.delete(&name("a"), 1000, false, refuse).is_err());
    assert_eq!(get(&store, "a").as_deref(), Some("old"));
    drop(store);
    assert_eq!(get(&scene.open().unwrap(), "a").as_deref(), Some("old"));
}

#[test]
fn a_rotation_loses_nothing_over_restarts_and_forgets_the_older_keys() {
    let scene = Scene::new();
    let store = scene.open().unwrap();
    for number in 0..600 {
        set(&store, &format!("s/{number}"), &number.to_string());
    }
    store.rotate(1001, || Ok(AuditHead::default())).unwrap();
    assert!(store.reseal().unwrap());
    // A SIGKILL in the middle: the next start continues, and sets in the meantime are sealed with the new key.
    drop(store);
    let store = scene.open().unwrap();
    assert!(store.status().is_rotating);
    set(&store, "s/0", "again");
    while store.reseal().unwrap() {
        assert_eq!(get(&store, "s/599").as_deref(), Some("599"), "reads go on");
    }
    assert_eq!((store.status().is_rotating, store.status().data_key), (false, 2));
    rotate(&store);
    drop(store);
    let store = scene.open().unwrap();
    assert_eq!(get(&store, "s/0").as_deref(), Some("again"));
    assert!((1..600).all(|number| get(&store, &format!("s/{number}")) == Some(number.to_string())));
    assert_eq!(store.status().data_key, 3);
}

#[test]
fn after_a_change_of_the_master_key_the_new_one_opens_and_the_old_one_does_not() {
    let mut scene = Scene::new();
    let store = scene.open().unwrap();
    set(&store, "a", "x");
    let new = Key::random().unwrap();
    store.rotate_master(new.clone(), || Ok(AuditHead::default())).unwrap();
    set(&store, "b", "y");
    rotate(&store);
    drop(store);
    let before = scene.bytes();
    let error = scene.open().unwrap_err();
    assert!(
        matches!(&error, StoreError::WrongKey { given, wanted, .. } if *given == scene.master.id() && *wanted == new.id())
    );
    assert_eq!(error.exit_code(), 64);
    assert_eq!(scene.bytes(), before);
    scene.master = new;
    let store = scene.open().unwrap();
    assert_eq!((get(&store, "a").as_deref(), get(&store, "b").as_deref()), (Some("x"), Some("y")));
}

#[test]
fn an_older_copy_of_the_file_is_noticed_and_taken_only_when_that_was_said() {
    let scene = Scene::new();
    set(&scene.open().unwrap(), "a", "old");
    let copy = scene.bytes();
    set(&scene.open().unwrap(), "a", "new");
    std::fs::write(scene.location().file, &copy).unwrap();
    let error = scene.open().unwrap_err();
    assert!(matches!(error, StoreError::RolledBack { found: 3, seen: 4, .. }), "{error}");
    assert_eq!(scene.bytes(), copy);
    let accepted = Options { accept_rollback: true, ..NOW };
    let store = SealedStore::open(&scene.location(), scene.master.clone(), accepted).unwrap();
    assert_eq!(get(&store, "a").as_deref(), Some("old"));
    set(&store, "a", "newer");
    drop(store);
    assert_eq!(get(&scene.open().unwrap(), "a").as_deref(), Some("newer"));
    // A missing file counts as the oldest copy.
    std::fs::remove_file(scene.location().file).unwrap();
    assert!(matches!(scene.open().unwrap_err(), StoreError::RolledBack { found: 0, .. }));
}

#[test]
fn a_record_that_is_removed_moved_or_put_back_from_outside_is_noticed() {
    let scene = Scene::new();
    let store = scene.open().unwrap();
    set(&store, "a", "first");
    let tables = |db: &Database| -> BTreeMap<Vec<u8>, Vec<u8>> {
        let txn = db.begin_read().unwrap();
        let table = txn.open_table(VALUES).unwrap();
        table
            .iter()
            .unwrap()
            .map(|entry| entry.unwrap())
            .map(|(k, v)| (k.value().to_vec(), v.value().to_vec()))
            .collect()
    };
    let first = tables(&store.database().unwrap());
    drop(store);
    let original = scene.bytes();
    let store = scene.open().unwrap();
    set(&store, "b", "second");
    drop(store);
    let newer = scene.bytes();
    type Values<'t> = redb::Table<'t, &'static [u8], &'static [u8]>;
    let tamper = |change: &dyn Fn(&mut Values<'_>)| {
        std::fs::write(scene.location().file, &newer).unwrap();
        let db = Database::create(scene.location().file).unwrap();
        let txn = db.begin_write().unwrap();
        change(&mut txn.open_table(VALUES).unwrap());
        txn.commit().unwrap();
        drop(db);
        scene.open().unwrap_err()
    };
    let (place, record) = first.iter().next().unwrap();
    let removed = tamper(&|table| drop(table.remove(&place[..]).unwrap()));
    let added = tamper(&|table| drop(table.insert(&b"x"[..], &record[..]).unwrap()));
    let other = tamper(&|table| {
        let moved = table.iter().unwrap().map(|entry| entry.unwrap().0.value().to_vec()).find(|k| k != place).unwrap();
        drop(table.insert(&moved[..], &record[..]).unwrap());
    });
    for error in [removed, added, other] {
        assert!(matches!(error, StoreError::Damaged { .. }), "{error}");
    }
    // The older file as a whole is sound; only the counter detects it.
    std::fs::write(scene.location().file, original).unwrap();
    assert!(matches!(scene.open().unwrap_err(), StoreError::RolledBack { .. }));
}

/// Flips a bit in each of the first 512 bytes and about a thousand elsewhere, and cuts the file short. The store
/// refuses the file and leaves it untouched, or the change meant nothing. The right bytes open it again.
#[test]
fn a_file_that_was_changed_or_cut_anywhere_is_refused_untouched_or_reads_as_before() {
    let scene = Scene::new();
    let store = scene.open().unwrap();
    for number in 0..40 {
        set(&store, &format!("s/{number}"), &"x".repeat(number * 20));
    }
    drop(store);
    let sound = scene.bytes();
    // The header of a redb file has 320 bytes. The rest of its page is unused.
    let mut places: Vec<usize> = (0..512).collect();
    places.extend((512..sound.len()).step_by((sound.len() / 1000).max(1)));
    let (mut refused, mut read) = (0, 0);
    let mut attempt = |bytes: &[u8]| {
        std::fs::write(scene.location().file, bytes).unwrap();
        match scene.open() {
            Err(StoreError::Damaged { .. } | StoreError::Newer { .. } | StoreError::RolledBack { .. }) => {
                refused += 1;
                assert_eq!(scene.bytes(), bytes, "nothing is overwritten");
            }
            Err(other) => panic!("{other}"),
            Ok(store) => {
                read += 1;
                assert!((0..40).all(|n| get(&store, &format!("s/{n}")) == Some("x".repeat(n * 20))));
            }
        }
    };
    for place in &places {
        let mut bytes = sound.clone();
        bytes[*place] ^= 1 << (place % 8);
        attempt(&bytes);
    }
    for cut in (0..sound.len()).step_by(sound.len() / 100) {
        attempt(&sound[..cut]);
    }
    assert!(refused > 100 && read > 100, "{refused} {read}");
    std::fs::write(scene.location().file, &sound).unwrap();
    assert_eq!(get(&scene.open().unwrap(), "s/1"), Some("x".repeat(20)));
}

/// A disk that stops at the nth write or flush, like a SIGKILL or a loss of power between two of them.
#[derive(Debug, Clone)]
struct Disk(Arc<Mutex<Vec<u8>>>, Arc<AtomicU64>);

impl Disk {
    fn allow(&self, writes: u64) {
        self.1.store(writes, Ordering::SeqCst);
    }

    fn step(&self) -> io::Result<()> {
        let left = self.1.load(Ordering::SeqCst);
        if left == 0 {
            return Err(io::Error::other("gone"));
        }
        self.1.store(left - 1, Ordering::SeqCst);
        Ok(())
    }
}

impl StorageBackend for Disk {
    fn len(&self) -> io::Result<u64> {
        Ok(self.0.lock().unwrap().len() as u64)
    }
    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let bytes = self.0.lock().unwrap();
        out.copy_from_slice(bytes.get(offset as usize..offset as usize + out.len()).ok_or(ErrorKind::UnexpectedEof)?);
        Ok(())
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.step()?;
        self.0.lock().unwrap().resize(len as usize, 0);
        Ok(())
    }
    fn sync_data(&self) -> io::Result<()> {
        self.step()
    }
    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.step()?;
        self.0.lock().unwrap()[offset as usize..offset as usize + data.len()].copy_from_slice(data);
        Ok(())
    }
}

/// Opens a store on such a disk, after checking the whole file as a start does.
fn on_disk(disk: &Disk, master: &Key) -> Result<SealedStore, StoreError> {
    let path = PathBuf::from("disk");
    let copy = Disk(Arc::new(Mutex::new(disk.0.lock().unwrap().clone())), Arc::new(AtomicU64::new(u64::MAX)));
    let opener = {
        let disk = disk.clone();
        Opener(Box::new(move || {
            Builder::new().create_with_backend(disk.clone()).map_err(|error| refused(Path::new("disk"), error))
        }))
    };
    let sound = if copy.0.lock().unwrap().is_empty() {
        SealedStore::begin((opener.0)()?, &path, master, NOW)?
    } else {
        look(copy, &path, master)?
    };
    Ok(SealedStore::on((opener.0)()?, opener, path, None, sound, master.clone(), 0))
}

/// The disk fails at each place and for several lengths, and then works again. The same store continues. What it
/// acknowledged is there, what it refused may be there or not, and the next start finds a sound file.
#[test]
fn after_a_disk_that_refused_for_a_while_the_store_goes_on_with_what_is_there() {
    let (old, new) = (Key::random().unwrap(), Key::random().unwrap());
    for at in 0..60 {
        let disk = Disk(Arc::default(), Arc::new(AtomicU64::new(u64::MAX)));
        let store = on_disk(&disk, &old).unwrap();
        set(&store, "a", "0");
        let set_a = |text: &str| {
            let change = Change { now: 1, ..Change::default() };
            store.set(&name("a"), &value(text), &change, |_| Ok(AuditHead::default()))
        };
        let (mut known, mut maybe) = ("0".to_owned(), vec![]);
        disk.allow(at);
        let (mut rotated, mut turned) = (0, false);
        for step in 1..8 {
            let text = step.to_string();
            match set_a(&text) {
                Ok(_) => (known, maybe) = (text, vec![]),
                Err(_) => maybe.push(text),
            }
            rotated += u32::from(store.rotate(2, || Ok(AuditHead::default())).is_ok());
            if step == 4 {
                turned = store.rotate_master(new.clone(), || Ok(AuditHead::default())).is_ok();
            }
            if step == 5 {
                disk.allow(u64::MAX);
            }
        }
        assert!(rotated >= 2, "the disk has been well since the fifth step");
        let found = get(&store, "a").unwrap();
        assert!(found == known || maybe.contains(&found), "{at}: {found}, not {known} or {maybe:?}");
        while store.reseal().unwrap() {}
        assert_eq!(get(&store, "a").unwrap(), found);
        let key = store.status().master_key;
        assert!(!turned || key == new.id(), "{at}");
        drop(store);
        let opened = [&old, &new].map(|key| on_disk(&disk, key));
        assert_eq!(opened.iter().filter(|opened| opened.is_ok()).count(), 1, "{at}");
        let store = opened.iter().flatten().next().unwrap();
        assert_eq!((get(store, "a").unwrap(), store.status().master_key), (found, key), "{at}");
    }
}

/// Stops changes, a data key rotation and a master key rotation at each write to the disk. What was acknowledged is
/// there, the rest may be there or not, and exactly one master key opens the store.
#[test]
fn killed_at_any_write_every_secret_is_readable_under_exactly_one_key() {
    let (old, new) = (Key::random().unwrap(), Key::random().unwrap());
    let work = |disk: &Disk, said: &mut Vec<&'static str>| -> Result<(), StoreError> {
        let store = on_disk(disk, &old)?;
        let change = Change { now: 1, ..Change::default() };
        let set = |of, text| store.set(&name(of), &value(text), &change, |_| Ok(AuditHead::default()));
        set("a", "1")?;
        said.push("a=1");
        set("a", "2")?;
        said.push("a=2");
        set("b", "1")?;
        said.push("b=1");
        store.rotate(2, || Ok(AuditHead::default()))?;
        while store.reseal()? {}
        said.push("rotated");
        store.delete(&name("b"), 3, false, |_| Ok(AuditHead::default()))?;
        said.push("b gone");
        store.rotate_master(new.clone(), || Ok(AuditHead::default()))?;
        said.push("new master");
        set("c", "1")?;
        said.push("c=1");
        Ok(())
    };
    let mut at = 0;
    loop {
        let disk = Disk(Arc::default(), Arc::new(AtomicU64::new(u64::MAX)));
        drop(on_disk(&disk, &old).unwrap());
        disk.allow(at);
        let mut said = vec![];
        let is_whole = work(&disk, &mut said).is_ok();
        disk.allow(u64::MAX);
        let opened = [&old, &new].map(|key| on_disk(&disk, key));
        let stores: Vec<_> = opened.iter().filter_map(|opened| opened.as_ref().ok()).collect();
        let has = |what| said.contains(&what);
        {
            assert_eq!(stores.len(), 1, "write {at} after {said:?}: {opened:?}");
            let store = stores[0];
            while store.reseal().unwrap() {}
            let (a, b, c) = (get(store, "a"), get(store, "b"), get(store, "c"));
            match (has("a=1"), has("a=2"), a.as_deref()) {
                (_, true, Some("2")) | (true, false, Some("1" | "2")) | (false, false, None | Some("1")) => {}
                other => panic!("write {at} after {said:?}: {other:?}"),
            }
            assert!(!has("b=1") || has("rotated") || b.is_some(), "write {at} after {said:?}");
            assert!(!has("b gone") || b.is_none(), "write {at} after {said:?}");
            assert!(!has("c=1") || c.is_some(), "write {at} after {said:?}");
            assert!(!has("new master") || opened[1].is_ok(), "write {at} after {said:?}");
        }
        if is_whole {
            break;
        }
        at += 1;
    }
    assert!(at > 50, "{at}");
}

#[test]
fn a_counter_that_was_removed_is_noticed_and_one_that_is_new_is_not() {
    let scene = Scene::new();
    let without = Location { counter: None, ..scene.location() };
    let store = SealedStore::open(&without, scene.master.clone(), NOW).unwrap();
    set(&store, "a", "x");
    drop(store);
    // The counter follows the store from its first start with one.
    drop(scene.open().unwrap());
    let counter = scene.location().counter.unwrap();
    assert!(counter.exists());
    std::fs::remove_file(&counter).unwrap();
    assert!(matches!(scene.open().unwrap_err(), StoreError::CounterMissing { .. }));
    let accepted = Options { accept_rollback: true, ..NOW };
    drop(SealedStore::open(&scene.location(), scene.master.clone(), accepted).unwrap());
    assert_eq!(get(&scene.open().unwrap(), "a").as_deref(), Some("x"));
}

#[test]
fn a_counter_that_cannot_be_written_stops_nothing_and_is_told() {
    let scene = Scene::new();
    let store = scene.open().unwrap();
    let counter = scene.location().counter.unwrap();
    std::fs::remove_file(&counter).unwrap();
    std::fs::create_dir(&counter).unwrap();
    set(&store, "a", "x");
    assert!(store.counter_problem().unwrap().contains("older copy"));
    std::fs::remove_dir(&counter).unwrap();
    store.save_audit(store.audit()).unwrap();
    assert_eq!(store.counter_problem(), None);
    drop(store);
    assert_eq!(get(&scene.open().unwrap(), "a").as_deref(), Some("x"));
}

#[test]
fn a_store_that_was_half_made_is_made_anew() {
    let scene = Scene::new();
    let half = scene.dir.path().join("vault.redb.new");
    std::fs::write(&half, b"half").unwrap();
    set(&scene.open().unwrap(), "a", "x");
    assert!(!half.exists());
    assert_eq!(get(&scene.open().unwrap(), "a").as_deref(), Some("x"));
}

#[test]
fn so_many_rotations_that_none_has_a_place_are_refused_and_the_store_goes_on() {
    let scene = Scene::new();
    let store = scene.open().unwrap();
    for number in 0..300 {
        set(&store, &format!("s/{number}"), "x");
    }
    let ask = |store: &SealedStore| store.rotate(1001, || Ok(AuditHead::default()));
    for _ in 0..63 {
        ask(&store).unwrap();
    }
    for _ in 0..3 {
        let error = ask(&store).unwrap_err().to_string();
        assert!(error.contains("ask again") && error.contains("nothing was changed"), "{error}");
    }
    set(&store, "s/0", "y");
    drop(store);
    let store = scene.open().unwrap();
    assert!(ask(&store).is_err());
    while store.reseal().unwrap() {}
    assert_eq!(ask(&store).unwrap(), 65);
    assert!((1..300).all(|number| get(&store, &format!("s/{number}")).as_deref() == Some("x")));
}

#[test]
fn a_link_in_the_place_of_the_store_is_refused() {
    let scene = Scene::new();
    set(&scene.open().unwrap(), "a", "x");
    let moved = scene.dir.path().join("moved.redb");
    std::fs::rename(scene.location().file, &moved).unwrap();
    std::os::unix::fs::symlink(&moved, scene.location().file).unwrap();
    let error = scene.open().unwrap_err();
    assert!(error.to_string().contains("name the file itself"), "{error}");
    std::fs::remove_file(scene.location().file).unwrap();
    std::fs::rename(&moved, scene.location().file).unwrap();
    assert_eq!(get(&scene.open().unwrap(), "a").as_deref(), Some("x"));
}

#[test]
fn a_store_of_a_newer_version_is_refused_and_not_touched() {
    let scene = Scene::new();
    set(&scene.open().unwrap(), "a", "x");
    let db = Database::create(scene.location().file).unwrap();
    let txn = db.begin_write().unwrap();
    let newer = (layout::FORM + 1).to_be_bytes();
    txn.open_table(layout::META).unwrap().insert("form", &newer[..]).unwrap();
    txn.commit().unwrap();
    drop(db);
    let before = scene.bytes();
    let error = scene.open().unwrap_err();
    assert!(
        matches!(error, StoreError::Newer { .. }) && error.to_string().contains("use the newer program"),
        "{error}"
    );
    assert_eq!((error.exit_code(), scene.bytes()), (74, before));
}
