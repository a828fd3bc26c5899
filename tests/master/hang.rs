//! A disk that really hangs: a FUSE file system whose server never answers, mounted for the agent alone. Every call
//! to it waits forever.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};

use dockflare_dev_master::{Protocol, Route};
use testkit::AgentProcess;

use crate::desk::Desk;
use crate::program::free_port;
use crate::support::{SOON, agent_binary};

/// Runs the program in its own mount namespace, and mounts a file system that hangs at `$HANGS` once `$HANGS.now`
/// exists. The program inherits the only server end of the file system, so everything goes away when it ends.
const SCRIPT: &str = r#"
mount --make-rprivate / || exit 99
exec 9<>/dev/fuse || exit 99
hang() { mount -i -t fuse -o fd=9,rootmode=40000,user_id=0,group_id=0 hangs "$HANGS"; }
if [ -e "$HANGS.now" ]; then hang || exit 99
else (until [ -e "$HANGS.now" ]; do sleep 0.05; done; hang; : > "$HANGS.done") 9<&9 & fi
exec "$@"
"#;

/// Whether this test may mount on this machine.
fn is_possible() -> bool {
    let is_root = std::fs::metadata("/proc/self").is_ok_and(|own| own.uid() == 0);
    is_root && Path::new("/dev/fuse").exists()
}

fn spawn(desk: &Desk, hangs: &Path, args: &[&str]) -> AgentProcess {
    let mut env = desk.env.clone();
    env.push(("HANGS".to_owned(), hangs.display().to_string()));
    env.push(("PATH".to_owned(), std::env::var("PATH").unwrap()));
    let binary = agent_binary().display().to_string();
    let program = ["-m", "sh", "-c", SCRIPT, "sh", &binary].into_iter().chain(args.iter().copied());
    let program = program.collect::<Vec<_>>();
    AgentProcess::spawn_with(Path::new("/usr/bin/unshare"), &program, &env, desk.data.path()).unwrap()
}

async fn status(port: u16, path: &str) -> u16 {
    let client = dockflare_host::http::neighbour(Duration::from_secs(8)).unwrap();
    client.get(format!("http://127.0.0.1:{port}{path}")).send().await.unwrap().status().as_u16()
}

async fn made(path: &Path) {
    let there = testkit::wait_until("the file system to hang", SOON, async || path.exists().then_some(()));
    there.await.unwrap();
}

async fn ends_soon(agent: &mut AgentProcess) {
    let began = Instant::now();
    agent.sigterm().unwrap();
    let code = agent.wait_exit(SOON).await.unwrap().code();
    assert!(code == Some(0) && began.elapsed() < Duration::from_secs(10), "{code:?} after {:?}", began.elapsed());
}

#[tokio::test]
async fn a_key_file_whose_disk_hangs_stops_neither_the_pages_nor_the_end() {
    if !is_possible() {
        return;
    }
    let mut desk = Desk::new(Protocol::V2).await.unwrap();
    let port = free_port();
    let folder = desk.path("keys");
    std::fs::create_dir(&folder).unwrap();
    std::fs::write(folder.join("key"), &desk.key).unwrap();
    desk.set("HEALTH_CHECK_PORT", port.to_string());
    desk.set("DOCKFLARE_API_KEY", "");
    desk.set("DOCKFLARE_API_KEY_FILE", folder.join("key").display().to_string());
    let mut agent = spawn(&desk, &folder, &[]);
    let id = desk.registered(1).await.unwrap().id;
    std::fs::write(desk.path("keys.now"), "").unwrap();
    made(&desk.path("keys.done")).await;
    desk.master.roll_key(&id).unwrap();
    desk.answered(Route::Commands, 401).await.unwrap();
    for _ in 0..3 {
        assert_eq!(status(port, "/live").await, 200);
        assert_eq!(status(port, "/health").await, 200);
    }
    let line = agent.wait_for_log("the key file did not answer within", SOON).await.unwrap();
    assert!(line.contains("WARN") && line.contains("network file system"), "{line}");
    assert_eq!(status(port, "/live").await, 200);
    // However many calls the agent wants to make, only one thread waits.
    desk.answered(Route::Register, 401).await.unwrap();
    let threads = std::fs::read_dir(format!("/proc/{}/task", agent.pid())).unwrap().count();
    assert!(threads <= 4, "{threads} threads");
    ends_soon(&mut agent).await;
}

#[tokio::test]
async fn a_data_folder_that_hangs_is_said_by_the_pages_and_does_not_hold_up_the_end() {
    if !is_possible() {
        return;
    }
    for with_command in [false, true] {
        let mut desk = Desk::new(Protocol::V2).await.unwrap();
        let port = free_port();
        let folder = desk.path("data");
        desk.set("HEALTH_CHECK_PORT", port.to_string());
        desk.set("DOCKFLARE_DATA_DIR", folder.display().to_string());
        let mut agent = spawn(&desk, &folder, &[]);
        let id = desk.registered(1).await.unwrap().id;
        std::fs::write(desk.path("data.now"), "").unwrap();
        made(&desk.path("data.done")).await;
        if with_command {
            desk.master.enroll(&id, "hung").unwrap();
            let line = agent.wait_for_log("the data folder refuses a command", SOON).await.unwrap();
            assert!(line.contains("does not answer"), "{line}");
        }
        for path in ["/live", "/health"] {
            assert_eq!(status(port, path).await, 503, "{path}");
        }
        ends_soon(&mut agent).await;
    }
}

#[tokio::test]
async fn an_agent_whose_data_folder_hangs_at_the_start_can_be_stopped_and_a_check_says_so() {
    if !is_possible() {
        return;
    }
    let mut desk = Desk::new(Protocol::V2).await.unwrap();
    let folder = desk.path("data");
    std::fs::create_dir(&folder).unwrap();
    std::fs::write(desk.path("data.now"), "").unwrap();
    desk.set("DOCKFLARE_DATA_DIR", folder.display().to_string());
    let mut agent = spawn(&desk, &folder, &[]);
    let status = format!("/proc/{}/status", agent.pid());
    let catches = || {
        let status = std::fs::read_to_string(&status).unwrap();
        let mask = status.lines().find_map(|line| line.strip_prefix("SigCgt:")).unwrap().trim().to_owned();
        (status.contains("Name:\tdockflare-agent") && u64::from_str_radix(&mask, 16).unwrap() & 1 << 14 != 0)
            .then_some(())
    };
    testkit::wait_until("the agent to listen to signals", SOON, async || catches()).await.unwrap();
    ends_soon(&mut agent).await;

    let began = Instant::now();
    let mut check = spawn(&desk, &folder, &["check"]);
    let code = check.wait_exit(SOON).await.unwrap().code();
    let text = check.log();
    assert_eq!(code, Some(1), "{text}");
    assert!(text.contains("FAIL") && text.contains("data did not answer within 5 s"), "{text}");
    assert!(text.contains("key accepted"), "the rest is tried all the same: {text}");
    assert!(began.elapsed() < Duration::from_secs(25), "{:?}", began.elapsed());
}

#[tokio::test]
async fn a_key_file_that_is_no_file_is_refused_at_the_start_and_passed_over_later() {
    let mut desk = Desk::new(Protocol::V2).await.unwrap();
    let key = desk.path("key");
    desk.set("DOCKFLARE_API_KEY", "");
    desk.set("DOCKFLARE_API_KEY_FILE", key.display().to_string());
    let fifo = || nix::unistd::mkfifo(&key, nix::sys::stat::Mode::S_IRWXU).unwrap();
    fifo();
    let mut agent = desk.agent().unwrap();
    assert_eq!(agent.wait_exit(SOON).await.unwrap().code(), Some(64));
    assert!(agent.log().contains("is a FIFO; a file is needed"), "{}", agent.log());
    std::fs::remove_file(&key).unwrap();
    std::fs::write(&key, &desk.key).unwrap();
    let mut agent = desk.agent().unwrap();
    let id = desk.registered(1).await.unwrap().id;
    std::fs::remove_file(&key).unwrap();
    fifo();
    let new = desk.master.roll_key(&id).unwrap();
    agent.plant(&new);
    agent.wait_for_log("the key file is a FIFO", SOON).await.unwrap();
    std::fs::remove_file(&key).unwrap();
    std::fs::write(&key, &new).unwrap();
    agent.wait_for_log("the key file holds a new agent key", SOON).await.unwrap();
    ends_soon(&mut agent).await;
}
