//! Reloads in simulated time, on a Docker that is a table of containers: which of them are well with which files, what
//! was done, and what happens when the vault is killed at any of its calls.

use dockflare_engine::Call;
use tokio::time::timeout;

use super::*;
use crate::docker::Containers;

const CALL: Call = Call { doing: "do that", grant: "", own_grant: "" };
/// How long a restart takes, and how long until a health check reports.
const RESTART: Duration = Duration::from_millis(1200);
const CHECKED: Duration = Duration::from_secs(3);
const BEGAN: i64 = 1_800_000_000;

fn at(after: Duration) -> Timestamp {
    Timestamp::from_second(BEGAN).unwrap() + after
}

#[derive(Debug, Clone)]
struct One {
    id: String,
    name: &'static str,
    state: RunState,
    started: Duration,
    /// The files that it started with.
    with: Option<u64>,
    has_check: bool,
    is_kept: bool,
    has_bind: bool,
    /// Unhealthy with any files.
    is_sick: bool,
    /// From the call that restarts it until it is well.
    is_away: bool,
    /// Docker is restarting it.
    is_down: bool,
}

#[derive(Debug)]
struct World {
    began: Instant,
    containers: Mutex<Vec<One>>,
    /// The calls that were made, with ids.
    done: Mutex<Vec<String>>,
    /// Sets of files that no container runs with.
    bad: BTreeSet<u64>,
    /// If set, the only container that does not run with them.
    picky: Option<&'static str>,
    states: watch::Sender<States>,
    /// Calls until the vault is killed, and whether Docker is away.
    calls: Mutex<(usize, bool)>,
    killed: tokio_util::sync::CancellationToken,
    most_away: Mutex<usize>,
}

fn app() -> Workload {
    "app".parse().unwrap()
}

fn delivery(on_change: OnChange, containers: &[&str]) -> Delivery {
    Delivery {
        workload: app(),
        directory: "/run/deliver/app".into(),
        allow_disk: false,
        uid: None,
        gid: None,
        files: BTreeMap::new(),
        on_change,
        containers: containers.iter().map(|name| name.parse().unwrap()).collect(),
    }
}

fn one(name: &'static str) -> One {
    One {
        id: format!("id-of-{name}"),
        name,
        state: RunState::Running,
        started: Duration::ZERO,
        with: Some(1),
        has_check: true,
        is_kept: true,
        has_bind: false,
        is_sick: false,
        is_away: false,
        is_down: false,
    }
}

impl World {
    /// The first set is settled, and the second has not come yet.
    fn new(containers: Vec<One>) -> Self {
        let state = State {
            version: Some(1),
            settled: Some(1),
            since: Some(at(Duration::ZERO)),
            left: Some(at(Duration::ZERO)),
            condition: Condition::Delivered,
        };
        Self {
            began: Instant::now(),
            containers: Mutex::new(containers),
            done: Mutex::default(),
            bad: BTreeSet::new(),
            picky: None,
            states: watch::channel(BTreeMap::from([(app(), state)])).0,
            calls: Mutex::new((usize::MAX, false)),
            killed: tokio_util::sync::CancellationToken::new(),
            most_away: Mutex::default(),
        }
    }

    fn now(&self) -> Duration {
        self.began.elapsed() + Duration::from_secs(10)
    }

    fn state(&self) -> State {
        self.states.borrow()[&app()].clone()
    }

    fn change(&self, by: impl FnOnce(&mut State)) {
        self.states.send_modify(|states| by(states.get_mut(&app()).unwrap()));
    }

    /// Puts a set of files in place.
    fn deliver(&self, version: u64) {
        let since = Some(at(self.now()));
        self.change(|state| {
            if state.version == state.settled && state.version.is_some_and(|present| present < version) {
                state.left = since;
            }
            (state.version, state.since, state.condition) = (Some(version), since, Condition::Delivered)
        });
    }

    fn done(&self) -> Vec<String> {
        self.done.lock().unwrap().clone()
    }

    fn with(&self) -> Vec<Option<u64>> {
        self.containers.lock().unwrap().iter().map(|one| one.with).collect()
    }

    fn change_one(&self, id: &str, by: impl FnOnce(&mut One)) {
        by(self.containers.lock().unwrap().iter_mut().find(|one| one.id == id).unwrap());
    }

    fn is_well(&self, one: &One) -> bool {
        one.state == RunState::Running
            && !one.is_down
            && !one.is_sick
            && (self.picky.is_some_and(|name| name != one.name)
                || one.with.is_none_or(|version| !self.bad.contains(&version)))
    }

    /// Counts the containers that serve nobody.
    fn count(&self) {
        let mut containers = self.containers.lock().unwrap();
        for one in containers.iter_mut() {
            if one.is_away && self.is_well(one) && self.now() >= one.started + CHECKED {
                one.is_away = false;
            }
        }
        let away = containers.iter().filter(|one| one.is_away).count();
        let mut most = self.most_away.lock().unwrap();
        *most = away.max(*most);
    }

    async fn called(&self) -> Result<(), DockerError> {
        let is_away = {
            let mut calls = self.calls.lock().unwrap();
            calls.0 = calls.0.saturating_sub(1);
            if calls.0 == 0 {
                self.killed.cancel();
            }
            calls.1
        };
        self.count();
        // Let a killed vault end here.
        tokio::task::yield_now().await;
        if is_away { Err(DockerError::TimedOut { call: CALL, limit: CHECKED }) } else { Ok(()) }
    }
}

#[derive(Clone)]
struct Double(Arc<World>);

impl Containers for Double {
    async fn look(&self, name: &str) -> Result<Option<Seen>, DockerError> {
        self.0.called().await?;
        let world = &self.0;
        let containers = world.containers.lock().unwrap();
        Ok(containers.iter().find(|one| one.name == name || one.id == name).map(|one| {
            let is_checked = world.now() >= one.started + CHECKED;
            let health = match (is_checked, world.is_well(one)) {
                (false, _) => Health::Starting,
                (true, true) => Health::Healthy,
                (true, false) => Health::Unhealthy,
            };
            let crashes = !one.has_check && is_checked && !world.is_well(one);
            Seen {
                id: one.id.clone(),
                name: one.name.to_owned(),
                state: one.state,
                started: Some(at(one.started)),
                health: one.has_check.then_some(health),
                restarts: i64::from(crashes),
                is_kept: one.is_kept,
                has_bind: one.has_bind,
            }
        }))
    }

    async fn signal(&self, id: &str, signal: Signal) -> Result<(), DockerError> {
        self.0.called().await?;
        self.0.done.lock().unwrap().push(format!("{} {id}", signal.as_str()));
        Ok(())
    }

    /// Like Docker, finishes a restart that has begun even if the caller goes away.
    async fn restart(&self, id: &str) -> Result<(), DockerError> {
        let (world, id) = (self.0.clone(), id.to_owned());
        world.called().await?;
        if !world.containers.lock().unwrap().iter().any(|one| one.id == id) {
            return Err(DockerError::NotFound { call: CALL, message: "no such container".to_owned() });
        }
        let done = tokio::spawn(async move {
            world.done.lock().unwrap().push(format!("restart {id}"));
            world.change_one(&id, |one| (one.is_away, one.is_down) = (true, true));
            world.count();
            sleep(RESTART).await;
            let (now, version) = (world.now(), world.state().version);
            world.change_one(&id, |one| {
                (one.state, one.started, one.with, one.is_down) = (RunState::Running, now, version, false);
            });
        });
        done.await.unwrap();
        Ok(())
    }

    async fn start(&self, id: &str) -> Result<(), DockerError> {
        self.0.called().await?;
        self.0.done.lock().unwrap().push(format!("start {id}"));
        let is_right = self.0.state().version.is_some();
        if !is_right {
            return Err(DockerError::Failed { call: CALL, message: "400 bind source path does not exist".to_owned() });
        }
        self.0.change_one(id, |one| one.state = RunState::Running);
        Ok(())
    }
}

impl Files for Double {
    fn states(&self) -> watch::Receiver<States> {
        self.0.states.subscribe()
    }

    async fn settle(&self, _: &Workload, version: u64) -> Result<u64, String> {
        let now = Some(at(self.0.now()));
        self.0.change(|state| (state.settled, state.left) = (Some(version), now));
        Ok(version)
    }

    async fn put_back(&self, _: &Workload, version: u64) -> Result<u64, String> {
        let state = self.0.state();
        let Some(settled) = state.settled else { return Err("there is no settled set".to_owned()) };
        if state.version != Some(version) {
            return Ok(state.version.unwrap());
        }
        self.0.deliver(settled);
        self.0.change(|state| state.condition = Condition::PutBack { refused: version });
        // The caller hears of it after everybody else.
        sleep(Duration::from_millis(10)).await;
        Ok(settled)
    }
}

/// Runs a vault for this much simulated time, or until it is killed.
async fn run(world: &Arc<World>, delivery: &Delivery, limit: Duration) {
    let double = Double(world.clone());
    let (_keep, wanted) = watch::channel(Arc::new(vec![delivery.clone()]));
    let serving = serve(Arc::new(double.clone()), double.clone(), wanted, Arc::default());
    tokio::select! {
        ended = timeout(limit, serving) => assert!(ended.is_err(), "the task ended"),
        () = world.killed.cancelled() => {}
    }
}

const LONG: Duration = Duration::from_secs(300);

#[tokio::test(start_paused = true)]
async fn each_is_restarted_once_one_at_a_time_and_then_the_set_is_settled() {
    for has_check in [true, false] {
        let names = ["one", "two", "three"];
        let world = Arc::new(World::new(names.iter().map(|name| One { has_check, ..one(name) }).collect()));
        let delivery = delivery(OnChange::Restart, &["two", "one", "three", "absent"]);
        tokio::join!(run(&world, &delivery, LONG), async {
            sleep(CHECKED).await;
            world.deliver(2);
        });
        assert_eq!(world.done(), ["restart id-of-two", "restart id-of-one", "restart id-of-three"]);
        assert_eq!((world.state().settled, world.with()), (Some(2), vec![Some(2); 3]));
        assert_eq!(*world.most_away.lock().unwrap(), 1);
    }
}

#[tokio::test(start_paused = true)]
async fn a_set_that_nobody_lives_with_takes_away_one_container_and_the_one_before_is_put_back() {
    for has_check in [true, false] {
        let containers = ["one", "two", "three"].map(|name| One { has_check, ..one(name) });
        let world = World { bad: BTreeSet::from([2]), ..World::new(containers.to_vec()) };
        let world = Arc::new(world);
        let delivery = delivery(OnChange::Restart, &["one", "two", "three"]);
        tokio::join!(run(&world, &delivery, LONG), async {
            sleep(CHECKED).await;
            world.deliver(2);
        });
        assert_eq!(world.done(), ["restart id-of-one", "restart id-of-one"], "{has_check}");
        assert_eq!(world.with(), [Some(1); 3]);
        assert_eq!(world.state().condition, Condition::PutBack { refused: 2 });
        assert_eq!(*world.most_away.lock().unwrap(), 1);
    }
}

#[tokio::test(start_paused = true)]
async fn those_that_had_begun_with_a_set_that_is_put_back_begin_again_with_the_one_before() {
    let world = Arc::new(World::new(vec![one("one"), one("two")]));
    let delivery = delivery(OnChange::Restart, &["one", "two"]);
    tokio::join!(run(&world, &delivery, LONG), async {
        sleep(CHECKED).await;
        world.deliver(2);
        // The first container runs with it. The second one will not.
        while world.done() != ["restart id-of-one", "restart id-of-two"] {
            sleep(Duration::from_millis(100)).await;
        }
        world.change_one("id-of-two", |two| two.is_sick = true);
        while world.state().condition == Condition::Delivered {
            sleep(Duration::from_millis(1)).await;
        }
        world.change_one("id-of-two", |two| two.is_sick = false);
    });
    let restarts = ["one", "two", "two", "one"].map(|name| format!("restart id-of-{name}"));
    assert_eq!((world.done(), world.with()), (restarts.to_vec(), vec![Some(1); 2]));
}

#[tokio::test(start_paused = true)]
async fn one_that_was_ill_before_or_does_not_run_says_nothing_about_the_new_files() {
    let stopped = One { state: RunState::Exited, ..one("stopped") };
    let world = World::new(vec![one("one"), One { is_sick: true, ..one("sick") }, stopped]);
    let world = Arc::new(world);
    let delivery = delivery(OnChange::Restart, &["one", "sick", "stopped"]);
    tokio::join!(run(&world, &delivery, LONG), async {
        sleep(CHECKED).await;
        world.deliver(2);
    });
    assert_eq!(world.done(), ["restart id-of-sick", "restart id-of-one"], "the sick one first");
    assert_eq!((world.state().settled, world.with()), (Some(2), vec![Some(2), Some(2), Some(1)]));
}

#[tokio::test(start_paused = true)]
async fn a_newer_set_ends_the_work_on_the_older_one_and_all_end_with_the_newest() {
    let world = Arc::new(World { bad: BTreeSet::from([2]), ..World::new(vec![one("one"), one("two")]) });
    let delivery = delivery(OnChange::Restart, &["one", "two"]);
    tokio::join!(run(&world, &delivery, LONG), async {
        sleep(CHECKED).await;
        world.deliver(2);
        sleep(RESTART + Duration::from_secs(1)).await;
        world.deliver(3);
    });
    assert_eq!((world.state().version, world.state().settled, world.with()), (Some(3), Some(3), vec![Some(3); 2]));
}

#[tokio::test(start_paused = true)]
async fn one_that_had_begun_with_a_set_between_goes_back_to_the_settled_one_as_well() {
    let world = Arc::new(World { bad: BTreeSet::from([3]), ..World::new(vec![one("one"), one("two")]) });
    let delivery = delivery(OnChange::Restart, &["one", "two"]);
    tokio::join!(run(&world, &delivery, LONG), async {
        sleep(CHECKED).await;
        world.deliver(2);
        // Both have set 2, and the second container is not known to be well.
        while world.with() != [Some(2); 2] {
            sleep(Duration::from_millis(100)).await;
        }
        world.deliver(3);
    });
    assert_eq!((world.state().version, world.with()), (Some(1), vec![Some(1); 2]), "{:?}", world.done());
}

#[tokio::test(start_paused = true)]
async fn a_signal_goes_to_those_that_run_by_id() {
    let stopped = One { state: RunState::Exited, ..one("stopped") };
    let world = Arc::new(World::new(vec![one("one"), stopped, one("two")]));
    let delivery = delivery(OnChange::Signal(Signal::Hup), &["one", "stopped", "two"]);
    tokio::join!(run(&world, &delivery, LONG), async { world.deliver(2) });
    assert_eq!(world.done(), ["SIGHUP id-of-one", "SIGHUP id-of-two"]);
    assert_eq!(world.state().settled, Some(2));
}

#[tokio::test(start_paused = true)]
async fn docker_that_does_not_answer_delays_and_changes_nothing() {
    let world = Arc::new(World::new(vec![one("one")]));
    let delivery = delivery(OnChange::Restart, &["one"]);
    tokio::join!(run(&world, &delivery, 4 * LONG), async {
        sleep(CHECKED).await;
        world.calls.lock().unwrap().1 = true;
        world.deliver(2);
        sleep(LONG).await;
        assert!(world.done().is_empty() && world.state().is_unsettled());
        world.calls.lock().unwrap().1 = false;
    });
    assert_eq!((world.done().len(), world.state().settled), (1, Some(2)));
}

/// Whatever call the vault is killed at, the next vault ends in the same state. No container is restarted twice with
/// one set, and no more than one container is away at a time.
#[tokio::test(start_paused = true)]
async fn a_vault_that_is_killed_anywhere_is_followed_by_one_that_goes_on() {
    let mut calls = 0;
    // Who does not run with the new files, and how many restarts that takes. In the last case all three have started
    // with them, and all three go back.
    for (picky, restarts) in [(None, 3), (Some("one"), 2), (Some("two"), 4), (Some("three"), 6)] {
        for at in 1.. {
            let bad = picky.map(|_| 2).into_iter().collect();
            let mut world = World { bad, picky, ..World::new(vec![one("one"), one("two"), one("three")]) };
            let delivery = delivery(OnChange::Restart, &["one", "two", "three"]);
            sleep(CHECKED).await;
            world.deliver(2);
            *world.calls.get_mut().unwrap() = (at, false);
            let world = Arc::new(world);
            run(&world, &delivery, LONG).await;
            let was_killed = world.killed.is_cancelled();
            // Docker finishes what it has begun.
            sleep(RESTART).await;
            let second = World {
                began: world.began,
                containers: Mutex::new(world.containers.lock().unwrap().clone()),
                done: Mutex::new(world.done()),
                bad: world.bad.clone(),
                picky,
                states: watch::channel(world.states.borrow().clone()).0,
                calls: Mutex::new((usize::MAX, false)),
                killed: tokio_util::sync::CancellationToken::new(),
                most_away: Mutex::new(*world.most_away.lock().unwrap()),
            };
            let second = Arc::new(second);
            run(&second, &delivery, LONG).await;
            let (done, state) = (second.done(), second.state());
            let place = format!("killed at call {at}, for {picky:?}: {done:?} {state:?} {:?}", second.with());
            let expected = if picky.is_some() { 1 } else { 2 };
            assert_eq!(second.with(), [Some(expected); 3], "{place}");
            assert!(!state.is_unsettled() && state.version == Some(expected), "{place}");
            assert_eq!(done.len(), restarts, "{place}");
            assert_eq!(*second.most_away.lock().unwrap(), 1, "{place}");
            // A third run finds nothing to do.
            run(&second, &delivery, LONG).await;
            assert_eq!(second.done(), done, "{place}");
            if !was_killed {
                calls += at;
                break;
            }
        }
    }
    assert!(calls > 100, "{calls} calls were tried");
}

#[tokio::test(start_paused = true)]
async fn a_start_by_somebody_else_in_the_moment_of_the_switch_is_not_taken_for_one_with_the_new_files() {
    let world = Arc::new(World::new(vec![one("before"), one("after")]));
    let delivery = delivery(OnChange::Restart, &["before", "after"]);
    sleep(CHECKED).await;
    world.deliver(2);
    let now = world.now();
    world.change_one("id-of-before", |one| one.started = now + Duration::from_millis(20));
    world.change_one("id-of-after", |one| (one.started, one.with) = (now + SLACK, Some(2)));
    run(&world, &delivery, LONG).await;
    assert_eq!((world.done(), world.with()), (vec!["restart id-of-before".to_owned()], vec![Some(2); 2]));
}

/// Runs a gate for this much simulated time.
async fn gates(world: &Arc<World>, delivery: &Delivery, memory: &Memory, limit: Duration) {
    let (_keep, wanted) = watch::channel(Arc::new(vec![delivery.clone()]));
    let double = Double(world.clone());
    let ended = timeout(limit, gate(Arc::new(double.clone()), double, wanted, memory.clone())).await;
    assert!(ended.is_err(), "the task ended");
}

/// Takes the host down and up: nothing runs, and the directory in memory is gone.
fn reboots(world: &World, delivery: &Delivery, memory: &Memory) {
    for one in world.containers.lock().unwrap().iter_mut() {
        one.state = RunState::Exited;
    }
    world.change(|state| (state.version, state.settled) = (None, None));
    std::fs::remove_dir_all(&delivery.directory).unwrap();
    memory.note_missing(std::slice::from_ref(delivery)).unwrap();
    std::fs::create_dir(&delivery.directory).unwrap();
}

#[tokio::test(start_paused = true)]
async fn the_gate_starts_what_ran_and_was_refused_for_want_of_its_directory_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let memory = Memory::beside(&dir.path().join("vault.redb"));
    let bound = |name| One { has_bind: true, ..one(name) };
    let containers = vec![
        bound("bound"),
        bound("second"),
        One { is_kept: false, ..bound("unkept") },
        one("volume"),
        bound("stopped"),
        One { state: RunState::Exited, ..bound("never") },
    ];
    let world = Arc::new(World::new(containers));
    let names = ["bound", "second", "unkept", "volume", "stopped", "never"];
    let delivery = Delivery { directory: dir.path().join("app"), ..delivery(OnChange::None, &names) };
    std::fs::create_dir(&delivery.directory).unwrap();
    memory.note_missing(std::slice::from_ref(&delivery)).unwrap();
    tokio::join!(gates(&world, &delivery, &memory, LONG), async {
        sleep(Duration::from_secs(30)).await;
        // Stopped by hand while the files are in place.
        world.change_one("id-of-stopped", |one| one.state = RunState::Exited);
    });
    reboots(&world, &delivery, &memory);
    // One vault is killed before it has done anything, and another follows.
    gates(&world, &delivery, &memory, Duration::from_secs(20)).await;
    memory.note_missing(std::slice::from_ref(&delivery)).unwrap();
    assert!(world.done().is_empty(), "there are no files yet");
    tokio::join!(gates(&world, &delivery, &memory, LONG), async {
        sleep(Duration::from_secs(20)).await;
        world.deliver(1);
    });
    assert_eq!(world.done(), ["start id-of-bound", "start id-of-second"]);
    // Starting them once is enough: whoever stops one now means it.
    world.change_one("id-of-bound", |one| one.state = RunState::Exited);
    gates(&world, &delivery, &memory, LONG).await;
    assert_eq!(world.done().len(), 2);
}

#[tokio::test(start_paused = true)]
async fn what_goes_down_with_the_vault_is_wanted_when_both_come_back() {
    let dir = tempfile::tempdir().unwrap();
    let memory = Memory::beside(&dir.path().join("vault.redb"));
    let world = Arc::new(World::new(vec![One { has_bind: true, ..one("bound") }]));
    let delivery = Delivery { directory: dir.path().join("app"), ..delivery(OnChange::None, &["bound"]) };
    std::fs::create_dir(&delivery.directory).unwrap();
    tokio::join!(gates(&world, &delivery, &memory, Duration::from_secs(40)), async {
        sleep(Duration::from_secs(20)).await;
        world.change_one("id-of-bound", |one| one.state = RunState::Exited);
    });
    reboots(&world, &delivery, &memory);
    world.deliver(1);
    gates(&world, &delivery, &memory, Duration::from_secs(20)).await;
    assert_eq!(world.done(), ["start id-of-bound"]);
}
