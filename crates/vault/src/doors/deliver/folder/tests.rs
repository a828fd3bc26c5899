#![expect(clippy::disallowed_methods, reason = "a test may wait for its disk")]

use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::*;
use crate::config::Config;

/// A directory in memory.
fn memory() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").unwrap()
}

fn delivery(directory: &Path, more: &str) -> Delivery {
    let text = format!(
        "deliveries: [{{workload: app, directory: {}, {more} files: [{{name: a, secret: a}}]}}]",
        directory.display()
    );
    Config::parse(&text, &std::collections::BTreeMap::new()).unwrap().deliveries.remove(0)
}

fn files(pairs: &[(&str, &str)]) -> Files {
    let file = |text: &str| File { mode: 0o440, bytes: Zeroizing::new(text.as_bytes().to_vec()) };
    pairs.iter().map(|(name, text)| (name.parse().unwrap(), file(text))).collect()
}

fn open(delivery: &Delivery) -> Folder {
    Folder::open(delivery).unwrap().unwrap()
}

fn put(folder: &Folder, files: &Files) -> u64 {
    folder.put(&folder.look().unwrap(), files, 0).unwrap()
}

/// What a container sees: each name that does not begin with two dots, and what is in it.
fn seen(directory: &Path) -> Vec<(String, String)> {
    let mut seen = vec![];
    for entry in fs::read_dir(directory).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        if !name.starts_with("..") {
            let text = fs::read_to_string(directory.join(&name)).unwrap_or_else(|error| error.kind().to_string());
            seen.push((name, text));
        }
    }
    seen.sort();
    seen
}

fn pairs(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
    pairs.iter().map(|(name, text)| ((*name).to_owned(), (*text).to_owned())).collect()
}

#[test]
fn a_set_takes_the_place_of_another_one_and_names_that_are_no_more_go() {
    let dir = memory();
    let folder = open(&delivery(dir.path(), ""));
    assert_eq!(folder.look().unwrap(), Look::default());
    assert_eq!(put(&folder, &files(&[("a", "1"), ("b", "1")])), 1);
    assert_eq!(seen(dir.path()), pairs(&[("a", "1"), ("b", "1")]));
    assert_eq!(put(&folder, &files(&[("b", "2"), ("c", "2")])), 2);
    assert_eq!(seen(dir.path()), pairs(&[("b", "2"), ("c", "2")]));
    let look = folder.look().unwrap();
    assert_eq!((look.current, look.sets.len()), (Some(2), 2));
    assert!(look.since.is_some() && look.foreign.is_empty());
    folder.remove(1).unwrap();
    assert_eq!(folder.read(2), Some(files(&[("b", "2"), ("c", "2")])));
    assert_eq!(folder.read(1), None);
    let meta = fs::metadata(dir.path().join("b")).unwrap();
    assert_eq!((meta.mode() & 0o7777, meta.nlink()), (0o440, 1));
    assert!(Folder::is_tidy(&look, &files(&[("b", ""), ("c", "")])));
    assert!(!Folder::is_tidy(&look, &files(&[("b", "")])));
}

#[test]
fn a_reader_finds_one_version_or_the_other_whole_and_always() {
    let dir = memory();
    let folder = open(&delivery(dir.path(), ""));
    let text = |version: u64| format!("{version:08}").repeat(512);
    put(&folder, &files(&[("a", &text(0))]));
    let (is_over, reads) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let reader = {
        let (path, is_over, reads) = (dir.path().join("a"), is_over.clone(), reads.clone());
        std::thread::spawn(move || {
            let mut last = String::new();
            while !is_over.load(Ordering::Relaxed) {
                let text = fs::read_to_string(&path).unwrap();
                assert_eq!(text, text[..8].repeat(512));
                assert!(text >= last, "an older one after a newer one");
                last = text;
                reads.fetch_add(1, Ordering::Relaxed);
            }
        })
    };
    for version in 1..2000 {
        let number = put(&folder, &files(&[("a", &text(version))]));
        // Keep a set as long as the slowest reader needs.
        if number > 100 {
            folder.remove(number - 100).unwrap();
        }
    }
    is_over.store(true, Ordering::Relaxed);
    reader.join().unwrap();
    assert!(reads.load(Ordering::Relaxed) > 0);
}

#[test]
fn killed_at_any_step_the_files_are_those_before_or_after_and_the_next_one_finishes() {
    let (before, after) = (files(&[("a", "1"), ("b", "1")]), files(&[("b", "2"), ("c", "2")]));
    let mut ends = vec![];
    for step in 0.. {
        let dir = memory();
        let folder = open(&delivery(dir.path(), ""));
        put(&folder, &before);
        folder.settle(1).unwrap();
        folder.steps.set(Some(step));
        let killed = folder.put(&folder.look().unwrap(), &after, 0).is_err();
        // A new name leads nowhere before the switch, and an old one leads nowhere after it.
        let found: Vec<_> = seen(dir.path()).into_iter().filter(|(_, text)| text.len() == 1).collect();
        let is_new = found == pairs(&[("b", "2"), ("c", "2")]);
        assert!(is_new || found == pairs(&[("a", "1"), ("b", "1")]), "step {step}: {found:?}");
        ends.push(is_new);
        let again = open(&delivery(dir.path(), ""));
        let look = again.look().unwrap();
        assert_eq!(look.current, Some(if is_new { 2 } else { 1 }));
        // A set that was only about to be replaced is not taken for one that was put back.
        assert!(look.left.is_some() && (is_new || look.left >= look.since), "step {step}: {look:?}");
        let number = again.put(&look, &after, 0).unwrap();
        assert!(number > look.current.unwrap());
        assert_eq!(seen(dir.path()), pairs(&[("b", "2"), ("c", "2")]), "step {step}");
        if !killed {
            break;
        }
    }
    assert!(ends.len() > 10 && ends.is_sorted(), "{ends:?}");
}

/// Waits until the clock of the file system has moved on.
fn tick() {
    let dir = memory();
    let time = |name: &str| {
        let path = dir.path().join(name);
        std::fs::write(&path, name).unwrap();
        path.metadata().unwrap().modified().unwrap()
    };
    let began = time("began");
    while time("now") <= began {
        std::thread::yield_now();
    }
}

#[test]
fn killed_at_any_step_a_set_that_is_put_back_is_the_old_or_the_new_one() {
    for step in 0.. {
        let dir = memory();
        let folder = open(&delivery(dir.path(), ""));
        put(&folder, &files(&[("a", "1"), ("b", "1")]));
        folder.settle(1).unwrap();
        tick();
        put(&folder, &files(&[("a", "2")]));
        let left = folder.look().unwrap().left;
        tick();
        folder.steps.set(Some(step));
        let done = folder.put_back(&folder.look().unwrap(), "hash");
        let found: Vec<_> = seen(dir.path()).into_iter().filter(|(_, text)| text.len() == 1).collect();
        assert!(found == pairs(&[("a", "2")]) || found == pairs(&[("a", "1"), ("b", "1")]), "step {step}: {found:?}");
        if let Ok(number) = done {
            let look = folder.look().unwrap();
            assert_eq!((number, look.refused), (1, Some((2, "hash".to_owned()))));
            assert!(look.left == left && left < look.since, "{left:?} {:?}", look.since);
            // The number is not given twice.
            folder.steps.set(None);
            folder.remove(2).unwrap();
            assert_eq!(put(&folder, &files(&[("a", "3")])), 3);
            return;
        }
    }
}

#[test]
fn what_is_taken_away_is_gone_at_once_and_its_number_is_not_given_again() {
    let dir = memory();
    let folder = open(&delivery(dir.path(), ""));
    put(&folder, &files(&[("a", "1")]));
    put(&folder, &files(&[("a", "2"), ("b", "2")]));
    folder.withdraw(&folder.look().unwrap()).unwrap();
    assert_eq!(seen(dir.path()), []);
    let look = folder.look().unwrap();
    assert_eq!((look.current, look.sets.len(), look.links.len()), (None, 0, 0));
    folder.withdraw(&look).unwrap();
    assert_eq!(put(&folder, &files(&[("a", "3")])), 3);
}

#[test]
fn no_planted_link_is_followed_or_written_through() {
    let (dir, victim) = (memory(), memory());
    let target = victim.path().join("precious");
    fs::write(&target, "precious").unwrap();
    let folder = open(&delivery(dir.path(), ""));
    put(&folder, &files(&[("a", "1")]));
    let plant = |name: &str, to: &Path| {
        let _ = fs::remove_file(dir.path().join(name));
        let _ = fs::remove_dir_all(dir.path().join(name));
        symlink(to, dir.path().join(name)).unwrap();
    };
    for name in ["a", "..data", "..new", "..2", "..settled", "..refused", "other"] {
        plant(name, &target);
        let number = put(&folder, &files(&[("a", "2")]));
        assert_eq!(seen(dir.path()), pairs(&[("a", "2")]), "{name}");
        // Later calls go through the same names.
        folder.settle(number).unwrap();
        plant(name, victim.path());
        let number = put(&folder, &files(&[("a", "3")]));
        folder.mend(&folder.look().unwrap(), &files(&[("a", "3")])).unwrap();
        let _ = folder.remove(number - 1);
        assert_eq!(seen(dir.path()), pairs(&[("a", "3")]), "{name}");
        assert_eq!(fs::read_to_string(&target).unwrap(), "precious", "{name}");
        assert_eq!(fs::read_dir(victim.path()).unwrap().count(), 1, "{name}");
    }
    // Inside a set: it is no longer one of ours.
    let current = folder.look().unwrap().current.unwrap();
    let inner = dir.path().join(format!("..{current}"));
    symlink(&target, inner.join("b")).unwrap();
    assert_eq!(folder.read(current), None);
    fs::remove_file(inner.join("b")).unwrap();
    nix::unistd::mkfifo(&inner.join("b"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    assert_eq!(folder.read(current), None);
    let current = put(&folder, &files(&[("a", "4")]));
    folder.remove(current - 1).unwrap();
    assert!(!inner.exists());
    // The directory itself.
    let link = victim.path().join("link");
    symlink(dir.path(), &link).unwrap();
    let error = Folder::open(&delivery(&link, "")).unwrap_err().to_string();
    assert!(error.contains("is no directory but a symbolic link"), "{error}");
}

#[test]
fn a_directory_in_the_way_of_a_name_is_named_and_nothing_changes() {
    let dir = memory();
    let folder = open(&delivery(dir.path(), ""));
    put(&folder, &files(&[("a", "1")]));
    fs::create_dir_all(dir.path().join("b/deep")).unwrap();
    let error = folder.put(&folder.look().unwrap(), &files(&[("a", "2"), ("b", "2")]), 0).unwrap_err();
    assert!(error.to_string().contains("something of its own at \"b\""), "{error}");
    assert_eq!(fs::read_to_string(dir.path().join("a")).unwrap(), "1");
    fs::remove_dir(dir.path().join("b/deep")).unwrap();
    put(&folder, &files(&[("a", "3"), ("b", "3")]));
    assert_eq!(seen(dir.path()), pairs(&[("a", "3"), ("b", "3")]));
}

#[test]
fn a_directory_that_holds_something_else_is_refused_before_anything_is_written() {
    let dir = memory();
    fs::write(dir.path().join("notes.txt"), "mine").unwrap();
    let folder = open(&delivery(dir.path(), ""));
    let error = folder.put(&folder.look().unwrap(), &files(&[("a", "1")]), 0).unwrap_err().to_string();
    assert!(error.contains("holds \"notes.txt\", which is not the vault's"), "{error}");
    assert_eq!(seen(dir.path()), pairs(&[("notes.txt", "mine")]));
}

#[test]
fn a_directory_of_another_kind_owner_or_group_is_refused_with_the_option_to_set() {
    let disk = tempfile::tempdir_in("/var/tmp").unwrap();
    let dir = memory();
    let error = |delivery: &Delivery| Folder::open(delivery).unwrap_err().to_string();
    let found = error(&delivery(disk.path(), ""));
    assert!(found.contains("is no tmpfs") && found.contains("allow_disk: true"), "{found}");
    let folder = open(&delivery(disk.path(), "allow_disk: true,"));
    put(&folder, &files(&[("a", "1")]));
    assert_eq!(seen(disk.path()), pairs(&[("a", "1")]));
    let found = error(&delivery(dir.path(), "uid: 4242,"));
    assert!(found.contains("the option uid=4242"), "{found}");
    let found = error(&delivery(dir.path(), "gid: 4242,"));
    assert!(found.contains("the option gid=4242"), "{found}");
    let found = error(&delivery(&dir.path().join("x/y"), ""));
    assert!(found.contains("neither is the directory above it"), "{found}");
    fs::write(dir.path().join("file"), "").unwrap();
    let found = error(&delivery(&dir.path().join("file"), ""));
    assert!(found.contains("is no directory but a file"), "{found}");
}

#[test]
fn a_directory_that_is_not_there_is_made_with_its_files_in_it() {
    let dir = memory();
    let wanted = delivery(&dir.path().join("app"), "");
    assert!(Folder::open(&wanted).unwrap().is_none());
    // Left half made by a killed vault.
    fs::create_dir_all(dir.path().join("..app.new/..1")).unwrap();
    fs::write(dir.path().join("..app.new/..1/a"), "half").unwrap();
    assert_eq!(Folder::make(&wanted, &files(&[("a", "1")])).unwrap(), Some(1));
    assert_eq!(seen(&dir.path().join("app")), pairs(&[("a", "1")]));
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    let mode = fs::metadata(dir.path().join("app")).unwrap().permissions().mode();
    assert_eq!(mode & 0o7777, 0o2750);
    // Somebody else was faster and keeps what they have.
    assert_eq!(Folder::make(&wanted, &files(&[("a", "2")])).unwrap(), None);
    assert_eq!(seen(&dir.path().join("app")), pairs(&[("a", "1")]));
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
}
