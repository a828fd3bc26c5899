use proptest::prelude::*;

use super::*;

struct Scene {
    dir: tempfile::TempDir,
    key: Key,
    head: AuditHead,
}

impl Scene {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap(), key: Key::random().unwrap(), head: AuditHead::default() }
    }

    fn config(&self) -> AuditConfig {
        AuditConfig { file: self.dir.path().join("audit.log"), max_bytes: 2000, keep: 3 }
    }

    fn open(&mut self) -> (Audit, Vec<Broken>) {
        Audit::open(self.config(), self.key.clone(), &mut self.head).unwrap()
    }

    fn write(&mut self, count: usize) {
        let (audit, broken) = self.open();
        assert_eq!(broken, []);
        for _ in 0..count {
            write_one(&audit, &mut self.head).unwrap();
        }
    }

    fn file(&self) -> PathBuf {
        self.config().file
    }

    fn lines(&self) -> Vec<String> {
        fs::read_to_string(self.file()).unwrap().lines().map(str::to_owned).collect()
    }

    fn replace(&self, lines: &[String]) {
        fs::write(self.file(), lines.iter().map(|line| format!("{line}\n")).collect::<String>()).unwrap();
    }

    fn verify(&self) -> Verified {
        let (audit, _) = Audit::open(self.config(), self.key.clone(), &mut self.head.clone()).unwrap();
        audit.verify(audit.snapshot(&self.head).unwrap()).unwrap()
    }
}

fn write_one(audit: &Audit, head: &mut AuditHead) -> Result<(), AuditError> {
    let name = "app/x".parse().unwrap();
    let entry = Entry {
        principal: &Principal::Operator,
        operation: Operation::Get,
        name: Some(&name),
        version: Some(3),
        master_key: None,
        decision: &Decision::Allowed,
    };
    audit.record(head, &entry, false)
}

#[test]
fn a_line_tells_who_asked_for_what_and_what_was_decided() {
    let mut scene = Scene::new();
    scene.write(1);
    let line: serde_json::Value = serde_json::from_str(&scene.lines()[0]).unwrap();
    for (key, value) in [("principal", "operator"), ("operation", "get"), ("name", "app/x"), ("decision", "allowed")] {
        assert_eq!(line[key], value);
    }
    assert_eq!((line["line"].as_u64(), line["version"].as_u64()), (Some(1), Some(3)));
    assert_eq!(scene.verify(), Verified { lines: 1, files: 1, broken: vec![] });
}

#[test]
fn a_line_that_was_changed_removed_moved_put_in_or_cut_off_is_found() {
    let mut scene = Scene::new();
    scene.write(6);
    let sound = scene.lines();
    let broken_after = |change: &dyn Fn(&mut Vec<String>)| {
        let mut lines = sound.clone();
        change(&mut lines);
        scene.replace(&lines);
        scene.verify().broken
    };
    let at = |line| vec![Broken::Chain { file: "audit.log".into(), line }];
    assert_eq!(broken_after(&|_| {}), []);
    assert_eq!(broken_after(&|lines| lines[2] = lines[2].replace("get", "set")), at(3));
    assert_eq!(broken_after(&|lines| drop(lines.remove(2))), at(3));
    assert!(!broken_after(&|lines| lines.swap(2, 3)).is_empty());
    assert!(!broken_after(&|lines| lines.insert(2, lines[1].clone())).is_empty());
    assert!(!broken_after(&|lines| lines.insert(2, "{}".into())).is_empty());
    assert_eq!(broken_after(&|lines| lines.truncate(4)), [Broken::Cut { found: 4, known: 6 }]);
    assert_eq!(broken_after(&|lines| lines.clear()), [Broken::Cut { found: 0, known: 6 }]);
    fs::remove_file(scene.file()).unwrap();
    assert_eq!(scene.verify().broken, [Broken::Cut { found: 0, known: 6 }]);
}

/// Does what the vault does every second.
fn retire(scene: &mut Scene) {
    let (audit, broken) = scene.open();
    assert_eq!(broken, []);
    if let Some(end) = audit.surplus().unwrap() {
        scene.head.removed = end;
        audit.remove_surplus(&scene.head).unwrap();
    }
}

#[test]
fn full_files_are_kept_in_order_and_the_end_of_what_went_is_remembered() {
    let mut scene = Scene::new();
    scene.write(60);
    let all = scene.verify();
    assert_eq!((all.lines, &all.broken[..]), (60, &[][..]), "nothing goes before the store knows");
    // A SIGKILL between the two: the store knows, and the files are still there.
    let (audit, _) = scene.open();
    scene.head.removed = audit.surplus().unwrap().unwrap();
    assert_eq!(scene.verify().broken, []);
    retire(&mut scene);
    let verified = scene.verify();
    assert_eq!((verified.files, &verified.broken[..]), (4, &[][..]));
    assert_eq!(verified.lines + scene.head.removed.0, 60);
    scene.write(5);
    assert_eq!(scene.verify().broken, []);
    fs::remove_file(scene.config().file.with_extension("log.3")).unwrap();
    assert_ne!(scene.verify().broken, [], "nobody else may remove the oldest");
}

/// A SIGKILL after each renaming that makes room for a new file: nothing is missing, and the next one closes the gap.
#[test]
fn a_crash_while_files_are_renamed_leaves_a_gap_and_loses_nothing() {
    for done in 1..=3 {
        let mut scene = Scene::new();
        scene.write(35);
        let numbers = |scene: &mut Scene| scene.open().0.numbers().unwrap();
        assert_eq!(numbers(&mut scene), [0, 1, 2, 3]);
        let path = |number: usize| match number {
            0 => scene.file(),
            number => scene.file().with_extension(format!("log.{number}")),
        };
        for number in (0..=3).rev().take(done) {
            fs::rename(path(number), path(number + 1)).unwrap();
        }
        assert_eq!((scene.verify().lines, scene.verify().broken), (35, vec![]), "{done}");
        scene.write(10);
        assert_eq!((scene.verify().lines, scene.verify().broken), (45, vec![]), "{done}");
        assert_eq!(numbers(&mut scene), [0, 1, 2, 3, 4], "{done}");
    }
}

#[test]
fn what_is_followed_is_what_was_there_while_others_write_rotate_and_remove() {
    let mut scene = Scene::new();
    scene.write(35);
    let (audit, _) = scene.open();
    let snapshot = audit.snapshot(&scene.head).unwrap();
    scene.write(30);
    retire(&mut scene);
    let verified = audit.verify(snapshot).unwrap();
    assert_eq!((verified.lines, verified.broken), (35, vec![]));
}

#[test]
fn a_file_that_became_too_old_since_the_store_was_told_is_kept_until_it_is_told_again() {
    let mut scene = Scene::new();
    scene.write(45);
    let (audit, _) = scene.open();
    scene.head.removed = audit.surplus().unwrap().unwrap();
    let told = scene.head;
    scene.write(10);
    let removed = AuditHead { removed: told.removed, ..scene.head };
    audit.remove_surplus(&removed).unwrap();
    let verified = scene.verify();
    assert_eq!((verified.lines + scene.head.removed.0, verified.broken), (55, vec![]));
    retire(&mut scene);
    assert_eq!((scene.verify().files, scene.verify().broken), (4, vec![]));
}

#[test]
fn a_link_in_the_place_of_the_audit_is_refused_and_nothing_behind_it_is_touched() {
    let mut scene = Scene::new();
    let target = scene.file().with_extension("target");
    fs::write(&target, "whatever").unwrap();
    std::os::unix::fs::symlink(&target, scene.file()).unwrap();
    let error = Audit::open(scene.config(), scene.key.clone(), &mut scene.head).unwrap_err().to_string();
    assert!(error.contains("symbolic link"), "{error}");
    assert_eq!(fs::read(&target).unwrap(), b"whatever");
}

#[test]
fn a_longer_audit_that_forks_off_before_the_end_that_the_store_knows_is_not_taken() {
    let mut scene = Scene::new();
    scene.write(3);
    let (fork, third) = (fs::read(scene.file()).unwrap(), scene.head);
    scene.write(1);
    let known = scene.head;
    fs::write(scene.file(), fork).unwrap();
    scene.head = third;
    std::thread::sleep(std::time::Duration::from_millis(2));
    scene.write(3);
    scene.head = known;
    let (_, broken) = scene.open();
    assert_eq!(broken, [Broken::Chain { file: "audit.log".into(), line: 4 }]);
    assert_eq!(scene.head, known);
}

#[test]
fn that_it_can_be_written_again_is_known_before_anybody_asks() {
    let mut scene = Scene::new();
    let (audit, _) = scene.open();
    fs::create_dir(scene.file()).unwrap();
    assert!(write_one(&audit, &mut scene.head).is_err() && audit.problem().is_some());
    audit.probe();
    assert!(audit.problem().is_some());
    fs::remove_dir(scene.file()).unwrap();
    audit.probe();
    assert_eq!(audit.problem(), None);
    write_one(&audit, &mut scene.head).unwrap();
    assert_eq!(scene.verify().lines, 1);
}

#[test]
fn what_a_kill_left_ahead_of_the_store_is_taken_and_half_a_line_is_not() {
    let mut scene = Scene::new();
    scene.write(3);
    let saved = scene.head;
    scene.write(2);
    let torn = format!("{}{}", fs::read_to_string(scene.file()).unwrap(), "{\"time\":\"2026");
    fs::write(scene.file(), torn).unwrap();
    scene.head = saved;
    scene.write(1);
    assert_eq!((scene.head.lines, scene.verify()), (6, Verified { lines: 6, files: 1, broken: vec![] }));
}

#[test]
fn a_forged_line_ahead_of_the_store_is_said_and_what_follows_goes_on_from_the_store() {
    let mut scene = Scene::new();
    scene.write(3);
    let mut lines = scene.lines();
    lines.push(lines[2].replace("\"line\":3", "\"line\":4"));
    scene.replace(&lines);
    let (_, broken) = scene.open();
    assert_eq!(broken, [Broken::Chain { file: "audit.log".into(), line: 4 }]);
    assert_eq!(scene.head.lines, 3);
}

#[test]
fn what_cannot_be_written_is_an_error_and_the_next_one_continues_the_chain() {
    let mut scene = Scene::new();
    scene.write(1);
    let (audit, _) = scene.open();
    let away = scene.file().with_extension("away");
    fs::rename(scene.file(), &away).unwrap();
    fs::create_dir(scene.file()).unwrap();
    let mut head = scene.head;
    let error = write_one(&audit, &mut head).unwrap_err().to_string();
    assert!(error.contains("cannot be opened") && error.contains("nothing is answered"), "{error}");
    assert_eq!(head, scene.head);
    fs::remove_dir(scene.file()).unwrap();
    fs::rename(&away, scene.file()).unwrap();
    write_one(&audit, &mut scene.head).unwrap();
    assert_eq!(scene.verify().lines, 2);
}

proptest! {
    #[test]
    fn any_line_is_read_or_none(bytes in prop_oneof![
        prop::collection::vec(any::<u8>(), 0..200),
        "\\{\"line\":[0-9a-z]{0,5},\"mac\":\"[0-9a-zä]{60,66}\"\\}\n".prop_map(String::into_bytes),
    ]) {
        let _ = Parsed::read(&bytes);
    }
}
