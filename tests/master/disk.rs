//! A disk that refuses writes, at each call that writes into the data folder, for a while or until somebody repairs it.
//! `strace` makes the calls of the real agent fail, with the errors that disks report.

use std::process::{Child, Command, Stdio};

use dockflare_dev_master::{Fault, Protocol, Route, Times};
use serde_json::{Value, json};
use testkit::{AgentProcess, skipped};

use crate::desk::{BOTH, Desk, stop};
use crate::support::SOON;

/// The calls that make up a write, in order. A point with `folder` applies only to calls that name the folder: creating
/// the hidden file, renaming it, and the last `fsync`. If that `fsync` fails, the new text is there although the write
/// counts as refused.
const POINTS: [Point; 4] = [
    Point { call: "openat", folder: true },
    Point { call: "fsync", folder: false },
    Point { call: "renameat", folder: true },
    Point { call: "fsync", folder: true },
];
const ERRORS: [(&str, &str); 4] = [
    ("ENOSPC", "No space left on device"),
    ("EIO", "Input/output error"),
    ("EROFS", "Read-only file system"),
    ("EDQUOT", "Disk quota exceeded"),
];

#[derive(Debug, Clone, Copy)]
struct Point {
    call: &'static str,
    folder: bool,
}

/// Refuses calls of a process until it is dropped.
struct Refusing(Child);

impl Refusing {
    /// `None` if this machine does not let `strace` attach to another process.
    async fn begin(agent: &AgentProcess, desk: &Desk, point: Point, error: &str) -> Option<Self> {
        let mut strace = Command::new("strace");
        strace.args(["-f", "-p", &agent.pid().to_string(), "-e", &format!("trace={}", point.call)]);
        strace.args(["-e", &format!("inject={}:error={error}", point.call)]);
        strace.args(["-o", "/dev/null"]);
        if point.folder {
            strace.arg("-P").arg(desk.data.path());
        }
        let child = strace.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().ok()?;
        let mut refusing = Self(child);
        let tracer = format!("TracerPid:\t{}\n", refusing.0.id());
        let threads = format!("/proc/{}/task", agent.pid());
        let is_traced = |thread: std::fs::DirEntry| {
            std::fs::read_to_string(thread.path().join("status")).is_ok_and(|status| status.contains(&tracer))
        };
        let begun = testkit::wait_until("strace", SOON, async || {
            let ended = refusing.0.try_wait().unwrap().is_some();
            let all = std::fs::read_dir(&threads).unwrap().flatten().all(is_traced);
            (ended || all).then_some(ended)
        });
        let ended = begun.await.unwrap();
        (!ended).then_some(refusing)
    }
}

impl Drop for Refusing {
    fn drop(&mut self) {
        // On SIGTERM, strace detaches from the process. A SIGKILL may leave a thread stopped.
        let pid = nix::unistd::Pid::from_raw(i32::try_from(self.0.id()).unwrap());
        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
        let _ = self.0.wait();
    }
}

/// The parts of the state and the tombstone that the orders here change. Fails the test if a file is not complete JSON.
fn told(desk: &Desk) -> (String, String, u64, String) {
    let parsed = |name: &str| -> Value {
        let Ok(text) = std::fs::read(desk.path(name)) else { return json!({}) };
        serde_json::from_slice(&text).unwrap_or_else(|error| panic!("{name} is torn ({error}): {text:?}"))
    };
    let (state, tombstone) = (parsed("tunnel_state.json"), parsed("decommission.json"));
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let redeploys = state["redeploys"].as_u64().unwrap_or_default();
    (text(&state["name"]), text(&state["desired_state"]), redeploys, text(&tombstone["operation_id"]))
}

const NO_STRACE: &str = "this machine has no strace, or lets nobody look into another process";

fn lines(agent: &AgentProcess, from: usize, text: &str) -> usize {
    agent.log().lines().skip(from).filter(|line| line.contains(text)).count()
}

#[tokio::test]
async fn what_the_disk_refuses_at_any_call_is_kept_said_once_and_stored_when_the_disk_is_back() {
    let seed = testkit::number("TEST_SEED", fastrand::u64(..));
    let mut random = fastrand::Rng::with_seed(seed);
    eprintln!("TEST_SEED={seed}");
    let mut rounds = 0;
    for protocol in BOTH {
        let desk = Desk::new(protocol).await.unwrap();
        let mut agent = desk.agent().unwrap();
        let id = desk.registered(1).await.unwrap().id;
        desk.master.enroll(&id, "edge-0").unwrap();
        let first = async || (told(&desk).0 == "edge-0").then_some(());
        testkit::wait_until("the first tunnel on disk", SOON, first).await.unwrap();
        // Each call with one of the errors, for the rounds asked for, and a tombstone last.
        let mut plan = Vec::new();
        for _ in 0..testkit::number("TEST_ROUNDS", 1) {
            let (mut points, mut errors) = (POINTS, ERRORS);
            random.shuffle(&mut points);
            random.shuffle(&mut errors);
            plan.extend(points.into_iter().zip(errors));
        }
        let last = plan.len() - 1;
        for (round, (point, (error, words))) in plan.into_iter().enumerate() {
            let before = told(&desk);
            let lasts = random.bool();
            let Some(refusing) = Refusing::begin(&agent, &desk, point, error).await else { return skipped(NO_STRACE) };
            let mark = agent.mark();
            let mut after = before.clone();
            match (round == last, random.u8(0..3)) {
                (true, _) => {
                    let name = "prepare_decommission";
                    let order = json!({"action": name, "operation_id": "op", "command_id": "op-prepare",
                        "requested_self_action": "stop"});
                    desk.master.push_commands(&id, vec![order]).unwrap();
                    (after.1, after.3) = ("stopped".to_owned(), "op".to_owned());
                }
                (_, 0) => {
                    after.0 = format!("edge-{}", round + 1);
                    after.1 = "running".to_owned();
                    desk.master.enroll(&id, &after.0).unwrap();
                }
                (_, 1) => {
                    desk.master.redeploy(&id).unwrap();
                    (after.1, after.2) = ("running".to_owned(), before.2 + 1);
                }
                _ => {
                    // Start a tunnel first, because a second stop in a row stores nothing.
                    after.0 = format!("edge-{}", round + 1);
                    after.1 = "stopped".to_owned();
                    desk.master.enroll(&id, &after.0).unwrap();
                    desk.master.push_commands(&id, vec![json!({"action": "stop_tunnel"})]).unwrap();
                }
            }
            let what = format!("{protocol:?} round {round}: {} {} {error}, lasting: {lasts}", point.call, point.folder);
            let said = agent.wait_for_log_after(mark, "refuses a command that the master has sent", SOON).await;
            let said = said.unwrap_or_else(|problem| panic!("{what}: {problem}"));
            assert!(said.contains(words) && said.contains("make room or mend"), "{what}: {said}");
            if lasts {
                let now = told(&desk);
                let renamed = point.call == "fsync" && point.folder;
                assert!(now == before || renamed, "{what}: {before:?} became {now:?}");
                let polls = desk.master.snapshot().agents[&id].polls;
                let mark = agent.mark();
                // Longer than the time between two polls: the agent sends a message every five seconds.
                let spoken = |route: Route| desk.master.requests().iter().filter(|seen| seen.route == route).count();
                let events = spoken(Route::Events);
                let more = async || (spoken(Route::Events) >= events + 2).then_some(());
                testkit::wait_until("two messages", SOON, more).await.unwrap();
                assert_eq!(desk.master.snapshot().agents[&id].polls, polls, "{what}: nothing more is fetched");
                assert_eq!(lines(&agent, mark, "refuses a command"), 0, "{what}: {}", agent.log());
            }
            drop(refusing);
            let stored = async || (told(&desk) == after).then_some(());
            let stored = testkit::wait_until("the command on disk", SOON, stored).await;
            stored.unwrap_or_else(|problem| panic!("{what}: {problem}, {:?} is not {after:?}", told(&desk)));
            let again = agent.wait_for_log_after(mark, "the data folder works again", SOON).await;
            again.unwrap_or_else(|problem| panic!("{what}: {problem}"));
            assert_eq!(lines(&agent, mark, "refuses a command"), 1, "{what}: {}", agent.log());
            rounds += 1;
        }
        let hidden = |entry: &std::fs::DirEntry| entry.file_name().as_encoded_bytes().starts_with(b".");
        let left: Vec<_> = std::fs::read_dir(desk.data.path()).unwrap().flatten().filter(hidden).collect();
        assert!(left.is_empty(), "writes that failed leave nothing behind: {left:?}");
        stop(&mut agent).await.unwrap();
        desk.assert_no_violations();
    }
    eprintln!("{rounds} faults of the disk");
}

#[tokio::test]
async fn an_id_that_the_disk_refuses_is_not_used_before_it_is_stored_and_there_is_no_second_agent() {
    for (point, (error, words)) in POINTS.into_iter().zip(ERRORS) {
        let desk = Desk::new(Protocol::V2).await.unwrap();
        let away = Fault::Status { status: 503, code: None, retry_after: None };
        desk.master.fault(Route::Register, away, Times::UntilCleared);
        let mut agent = desk.agent().unwrap();
        desk.answered(Route::Register, 503).await.unwrap();
        let Some(refusing) = Refusing::begin(&agent, &desk, point, error).await else { return skipped(NO_STRACE) };
        desk.master.clear_faults();
        let said = agent.wait_for_log("cannot be stored", SOON).await.unwrap();
        assert!(said.contains(words) && said.contains("nothing is reported until then"), "{said}");
        assert!(desk.master.requests().iter().all(|request| request.route == Route::Register), "nothing is said");
        drop(refusing);
        let agents = desk.registered(1).await.unwrap();
        let stored = async || (desk.file("agent_id.txt").ok()? == agents.id).then_some(());
        testkit::wait_until("the id on disk", SOON, stored).await.unwrap();
        desk.answered(Route::Events, 200).await.unwrap();
        assert_eq!(desk.master.snapshot().registrations, 1, "{}", desk.master.report());
        assert_eq!(lines(&agent, 0, "cannot be stored"), 1, "{}", agent.log());
        stop(&mut agent).await.unwrap();
        desk.assert_no_violations();
    }
}
