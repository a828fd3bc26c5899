#![expect(clippy::disallowed_methods, reason = "a test may wait for its disk")]

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use super::*;
use crate::audit::AuditConfig;
use crate::config::Config;
use crate::principal::Principal;
use crate::seal::Key;
use crate::secret::Value;
use crate::store::{Change, Location, Options};
use crate::vault::now;

/// Generous limit for what takes milliseconds.
const SOON: Duration = Duration::from_secs(60);

struct Scene {
    memory: tempfile::TempDir,
    vault: Arc<Vault>,
    desk: Desk,
    wanted: watch::Sender<Arc<Vec<Delivery>>>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Scene {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// An empty vault that delivers what `text` says, where `DIR` is a directory in memory.
async fn scene(text: &str) -> Scene {
    let memory = tempfile::tempdir_in("/dev/shm").unwrap();
    let config = parse(&memory, text);
    let location = Location { file: memory.path().join("vault.redb"), counter: None };
    let audit = AuditConfig { file: memory.path().join("audit.log"), max_bytes: 1 << 20, keep: 2 };
    let options = Options { accept_rollback: false, now: now() };
    let vault = Vault::open(&location, Key::random().unwrap(), options, audit, config.grants).unwrap().0;
    let vault = Arc::new(vault);
    let (wanted, taken) = watch::channel(Arc::new(config.deliveries));
    let (desk, inside) = desk();
    let task = tokio::spawn(serve(vault.clone(), taken, inside));
    Scene { memory, vault, desk, wanted, task }
}

fn parse(memory: &tempfile::TempDir, text: &str) -> Config {
    Config::parse(&text.replace("DIR", &memory.path().display().to_string()), &BTreeMap::new()).unwrap()
}

impl Scene {
    fn path(&self, name: &str) -> PathBuf {
        self.memory.path().join(name)
    }

    fn read(&self, name: &str) -> Option<String> {
        fs::read_to_string(self.path(name)).ok()
    }

    fn set(&self, name: &str, value: &str) {
        let value = Value::new(value.as_bytes().to_vec()).unwrap();
        let change = Change { now: now(), ..Change::default() };
        self.vault.set(&Principal::Operator, &name.parse().unwrap(), &value, &change).unwrap();
    }

    fn delete(&self, name: &str, revoke: bool) {
        self.vault.delete(&Principal::Operator, &name.parse().unwrap(), revoke).unwrap();
    }

    fn configure(&self, text: &str) {
        let config = parse(&self.memory, text);
        self.wanted.send_replace(Arc::new(config.deliveries));
        self.vault.replace_grants(config.grants);
    }

    /// Replaces the present task with a new one, which knows nothing of what the old one did.
    async fn restart(&mut self, between: impl FnOnce(&Self)) {
        self.task.abort();
        let _ = (&mut self.task).await;
        between(self);
        let (desk, inside) = desk();
        self.desk = desk;
        self.task = tokio::spawn(serve(self.vault.clone(), self.wanted.subscribe(), inside));
    }

    /// Waits until the state of a workload is like this.
    async fn until(&self, workload: &str, like: impl Fn(&State) -> bool) -> State {
        let mut states = self.desk.states();
        let found = tokio::time::timeout(SOON, states.wait_for(|states| states.get(workload).is_some_and(&like))).await;
        match found {
            Ok(states) => states.unwrap()[workload].clone(),
            Err(_) => panic!("{:?}", self.desk.states().borrow()),
        }
    }

    async fn until_version(&self, workload: &str, version: u64) -> State {
        self.until(workload, |state| state.version == Some(version) && state.condition == Condition::Delivered).await
    }

    /// Counts the audit lines that have all of these words.
    fn lines(&self, words: &[&str]) -> usize {
        let log = fs::read_to_string(self.path("audit.log")).unwrap();
        log.lines().filter(|line| words.iter().all(|word| line.contains(word))).count()
    }
}

const ONE: &str = "grants: [{principal: workload:app, operations: [get], names: app}]
deliveries: [{workload: app, directory: DIR/app, files: [
  {name: key, secret: app/key}, {name: both, template: \"{{ a }}{{ b }}\", secrets: {a: app/key, b: app/other}}]}]";

#[tokio::test]
async fn a_workload_gets_its_files_when_all_its_secrets_are_there_and_each_change_of_them() {
    let scene = scene(ONE).await;
    fs::create_dir(scene.path("app")).unwrap();
    scene.set("app/key", "1");
    let missing = |state: &State| matches!(&state.condition, Condition::Missing { missing } if missing.len() == 1);
    assert_eq!(scene.until("app", missing).await.version, None);
    assert_eq!(fs::read_dir(scene.path("app")).unwrap().count(), 0, "nothing rather than half");
    scene.set("app/other", "x");
    let state = scene.until_version("app", 1).await;
    assert_eq!((state.settled, state.is_unsettled()), (Some(1), false), "with on_change: none");
    assert_eq!((scene.read("app/key"), scene.read("app/both")), (Some("1".to_owned()), Some("1x".to_owned())));
    scene.set("app/key", "2");
    scene.until_version("app", 2).await;
    assert_eq!((scene.read("app/key"), scene.read("app/both")), (Some("2".to_owned()), Some("2x".to_owned())));
    // The vault was asked as the workload.
    assert!(scene.lines(&["\"workload:app\"", "\"get\"", "\"app/key\"", "\"version\":2"]) == 1);
    // A secret that it does not use causes no look.
    let lines = scene.lines(&["\"workload:app\""]);
    scene.set("app/third", "3");
    scene.set("app/other", "y");
    scene.until_version("app", 3).await;
    assert_eq!(scene.lines(&["\"workload:app\""]), lines + 2);
}

#[tokio::test]
async fn a_secret_that_is_lost_leaves_the_last_files_and_one_that_is_revoked_takes_them_away() {
    let scene = scene(ONE).await;
    scene.set("app/key", "1");
    scene.set("app/other", "x");
    scene.until_version("app", 1).await;
    scene.delete("app/other", false);
    let state = scene.until("app", |state| matches!(state.condition, Condition::Missing { .. })).await;
    assert_eq!((state.version, scene.read("app/both")), (Some(1), Some("1x".to_owned())));
    scene.delete("app/other", true);
    let state = scene.until("app", |state| matches!(state.condition, Condition::Denied { .. })).await;
    assert_eq!((state.version, scene.read("app/both"), scene.read("app/key")), (None, None, None));
    scene.set("app/other", "y");
    // The number is not given twice.
    scene.until_version("app", 2).await;
    assert_eq!(scene.read("app/both"), Some("1y".to_owned()));
}

#[tokio::test]
async fn a_right_that_is_taken_away_takes_the_files_with_it_and_the_missing_row_is_named() {
    let scene = scene(ONE).await;
    scene.set("app/key", "1");
    scene.set("app/other", "x");
    scene.until_version("app", 1).await;
    scene.configure(&ONE.replace("names: app}", "names: app/key}"));
    let state = scene.until("app", |state| matches!(state.condition, Condition::Denied { .. })).await;
    let Condition::Denied { denied } = &state.condition else { return };
    assert!(denied[0].contains("no grant has principal=workload:app operation=get name=app/other"), "{denied:?}");
    assert_eq!((state.version, scene.read("app/key")), (None, None));
    assert_eq!(scene.lines(&["\"workload:app\"", "\"app/other\"", "missing"]), 1, "a denial leaves a line");
    scene.configure(ONE);
    scene.until_version("app", 2).await;
}

#[tokio::test(start_paused = true)]
async fn a_directory_that_is_emptied_or_changed_by_hand_is_filled_again() {
    let scene = scene(ONE).await;
    scene.set("app/key", "1");
    scene.set("app/other", "x");
    scene.until_version("app", 1).await;
    fs::remove_file(scene.path("app/..data")).unwrap();
    fs::remove_file(scene.path("app/key")).unwrap();
    fs::remove_dir_all(scene.path("app/..1")).unwrap();
    scene.until_version("app", 2).await;
    assert_eq!(scene.read("app/key"), Some("1".to_owned()));
    fs::remove_file(scene.path("app/..2/key")).unwrap();
    fs::write(scene.path("app/..2/key"), "other").unwrap();
    scene.until_version("app", 3).await;
    assert_eq!(scene.read("app/key"), Some("1".to_owned()));
    // The whole directory.
    fs::remove_dir_all(scene.path("app")).unwrap();
    scene.until_version("app", 1).await;
    assert_eq!(scene.read("app/key"), Some("1".to_owned()));
}

#[tokio::test]
async fn other_files_in_the_configuration_are_other_files_in_the_directory() {
    let scene = scene(ONE).await;
    scene.set("app/key", "1");
    scene.set("app/other", "x");
    scene.until_version("app", 1).await;
    scene.configure(&ONE.replace("name: both", "name: all").replace("{{ a }}{{ b }}", "{{ b }}-{{ a }}"));
    scene.until_version("app", 2).await;
    assert_eq!((scene.read("app/all"), scene.read("app/both")), (Some("x-1".to_owned()), None));
    scene.configure("grants: []");
    let mut states = scene.desk.states();
    tokio::time::timeout(SOON, states.wait_for(BTreeMap::is_empty)).await.unwrap().unwrap();
    assert_eq!(scene.read("app/all"), Some("x-1".to_owned()), "files stay where nobody delivers any more");
    scene.configure(ONE);
    scene.until_version("app", 3).await;
}

#[tokio::test]
async fn whoever_acts_on_changes_settles_a_version_or_has_it_put_back() {
    let text = ONE.replace("files: [\n", "on_change: restart, containers: [app], files: [\n");
    let scene = scene(&text).await;
    scene.set("app/key", "1");
    scene.set("app/other", "x");
    let app = "app".parse().unwrap();
    let state = scene.until_version("app", 1).await;
    assert!(state.is_unsettled() && state.settled.is_none());
    assert!(scene.desk.put_back(&app, 1).await.unwrap_err().contains("no set of files that could be put back"));
    assert_eq!(scene.desk.settle(&app, 1).await, Ok(1));
    scene.until("app", |state| state.settled == Some(1)).await;
    scene.set("app/key", "2");
    assert!(scene.until_version("app", 2).await.is_unsettled());
    assert_eq!(scene.desk.put_back(&app, 2).await, Ok(1));
    let state = scene.until("app", |state| state.condition == Condition::PutBack { refused: 2 }).await;
    assert_eq!((state.version, state.settled, scene.read("app/key")), (Some(1), Some(1), Some("1".to_owned())));
    // It is no longer in place.
    assert_eq!(scene.desk.put_back(&app, 2).await, Ok(1));
    scene.set("app/key", "3");
    scene.until_version("app", 3).await;
    assert_eq!((scene.read("app/key"), scene.desk.settle(&app, 3).await), (Some("3".to_owned()), Ok(3)));
    let other = "other".parse().unwrap();
    assert!(scene.desk.settle(&other, 1).await.unwrap_err().contains("there is no delivery for it"));
}

#[tokio::test]
async fn what_was_killed_in_the_middle_is_finished_by_the_next_start() {
    let text = ONE.replace("files: [\n", "on_change: restart, containers: [app], files: [\n");
    let mut scene = scene(&text).await;
    scene.set("app/key", "1");
    scene.set("app/other", "x");
    let app = "app".parse().unwrap();
    scene.until_version("app", 1).await;
    scene.desk.settle(&app, 1).await.unwrap();
    scene.set("app/key", "2");
    scene.until_version("app", 2).await;
    // Half a set, and a link that still has its temporary name.
    scene
        .restart(|scene| {
            fs::create_dir(scene.path("app/..3")).unwrap();
            fs::write(scene.path("app/..3/key"), "half").unwrap();
            symlink("..3", scene.path("app/..new")).unwrap();
        })
        .await;
    scene.until_version("app", 2).await;
    assert!(!scene.path("app/..3").exists() && fs::symlink_metadata(scene.path("app/..new")).is_err());
    // Killed when it was about to put 1 back.
    scene.restart(|scene| symlink("..2 0123", scene.path("app/..refused")).unwrap()).await;
    // The recorded hash is not that of set 2, so its files are delivered again.
    scene.until_version("app", 3).await;
    scene.desk.settle(&app, 3).await.unwrap();
    // Killed when it was about to remove all files. The grant is there, so they come again under another number.
    scene.restart(|scene| symlink("..3 -", scene.path("app/..refused")).unwrap()).await;
    scene.until_version("app", 4).await;
    assert_eq!(scene.read("app/key"), Some("2".to_owned()));
}

#[tokio::test]
async fn two_workloads_with_one_directory_under_two_names_are_both_refused_before_anything_is_written() {
    let scene = scene("grants: []").await;
    fs::create_dir_all(scene.path("real/app")).unwrap();
    symlink(scene.path("real"), scene.path("link")).unwrap();
    scene.set("app/key", "1");
    scene.configure(
        "grants: [{principal: workload:a, operations: [get]}, {principal: workload:b, operations: [get]}, {principal: workload:c, operations: [get]}]
deliveries: [{workload: a, directory: DIR/real/app, files: [{name: key, secret: app/key}]},
  {workload: b, directory: DIR/link/app, files: [{name: key, secret: app/key}]},
  {workload: c, directory: DIR/real/other, files: [{name: key, secret: app/key}]}]",
    );
    for (one, other) in [("a", "b"), ("b", "a")] {
        let state = scene.until(one, |state| matches!(state.condition, Condition::Failed { .. })).await;
        let Condition::Failed { problem } = state.condition else { return };
        assert!(problem.contains(&format!("is the directory of the workload {other} as well")), "{problem}");
    }
    assert_eq!(fs::read_dir(scene.path("real/app")).unwrap().count(), 0);
    // Nobody else is affected.
    scene.until_version("c", 1).await;
}

#[tokio::test]
async fn a_thousand_workloads_get_their_files() {
    let mut text = "grants:\n".to_owned();
    for number in 0..1000 {
        text += &format!("- {{principal: workload:w{number}, operations: [get], names: app}}\n");
    }
    text += "deliveries:\n";
    for number in 0..1000 {
        text +=
            &format!("- {{workload: w{number}, directory: DIR/w{number}, files: [{{name: key, secret: app/key}}]}}\n");
    }
    let scene = scene(&text).await;
    scene.set("app/key", "1");
    let mut states = scene.desk.states();
    let all =
        |states: &States| states.len() == 1000 && states.values().all(|state| state.condition == Condition::Delivered);
    tokio::time::timeout(SOON, states.wait_for(all)).await.unwrap().unwrap();
    assert_eq!(scene.read("w999/key"), Some("1".to_owned()));
}

/// A file system that never answers. Mounting it needs root.
struct Hung(PathBuf, #[expect(dead_code, reason = "the file system hangs as long as it is open")] fs::File);

impl Hung {
    fn mount(on: &Path) -> Self {
        use std::os::fd::AsRawFd;
        fs::create_dir(on).unwrap();
        let device = fs::File::options().read(true).write(true).open("/dev/fuse").unwrap();
        let options = format!("fd={},rootmode=40000,user_id=0,group_id=0", device.as_raw_fd());
        let flags = nix::mount::MsFlags::empty();
        nix::mount::mount(Some("hung"), on, Some("fuse"), flags, Some(options.as_str())).unwrap();
        Self(on.to_owned(), device)
    }
}

impl Drop for Hung {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(&self.0, nix::mount::MntFlags::MNT_DETACH);
    }
}

#[tokio::test]
async fn a_directory_that_hangs_is_told_and_holds_up_nobody_else() {
    if !nix::unistd::geteuid().is_root() || fs::File::open("/dev/fuse").is_err() {
        // Engine cases run as root; a person's own run of the unit tests may not.
        return testkit::skipped("takes root and /dev/fuse");
    }
    let scene = scene("grants: []").await;
    let hung = Hung::mount(&scene.path("hung"));
    let two = ONE.replace("deliveries: [", "deliveries: [{workload: slow, allow_disk: true, directory: DIR/hung/slow, files: [{name: key, secret: app/key}]}, ");
    scene.set("app/key", "1");
    scene.set("app/other", "x");
    scene.configure(&two);
    scene.until_version("app", 1).await;
    let state = scene.until("slow", |state| matches!(state.condition, Condition::Failed { .. })).await;
    assert!(format!("{state:?}").contains("does not answer"), "{state:?}");
    scene.set("app/key", "2");
    scene.until_version("app", 2).await;
    let slow = "slow".parse().unwrap();
    let app = "app".parse().unwrap();
    assert_eq!(scene.desk.settle(&app, 2).await, Ok(2));
    // Nobody waits for an answer that cannot come.
    let order = tokio::time::timeout(SOON, scene.desk.settle(&slow, 1)).await.expect("an answer");
    assert!(order.unwrap_err().contains("does not answer"));
    drop(hung);
}
