//! A data folder: one agent at a time, and a disk that fills up or is read-only.

use std::path::Path;
use std::process::Command;

use dockflare_dev_master::Protocol;
use serde_json::json;
use testkit::AgentProcess;

use crate::desk::{Desk, stop};
use crate::program::free_port;
use crate::support::{SOON, agent_binary};

#[tokio::test]
async fn a_second_agent_on_the_folder_of_another_ends_with_73_and_names_it() {
    let desk = Desk::new(Protocol::V2).await.unwrap();
    let mut first = desk.agent().unwrap();
    desk.registered(1).await.unwrap();
    let mut second = desk.agent().unwrap();
    assert_eq!(second.wait_exit(SOON).await.unwrap().code(), Some(73));
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
    let said = second.log();
    let holder = format!("in use by another agent: pid {} on host {} since 2", first.pid(), host.trim());
    for part in [&*holder, &desk.data.path().display().to_string(), "stop that one", "DOCKFLARE_DATA_DIR"] {
        assert!(said.contains(part), "{part} is not in: {said}");
    }
    assert_eq!(said.lines().count(), 1, "one line and nothing else happened: {said}");
    assert_eq!(desk.master.snapshot().registrations, 1, "it has said nothing to the master");
    assert!(first.is_running().unwrap());
    stop(&mut first).await.unwrap();
    // A clean exit frees the folder as well.
    let mut third = desk.agent().unwrap();
    desk.registered(2).await.unwrap();
    stop(&mut third).await.unwrap();
}

#[tokio::test]
async fn a_killed_agent_frees_the_folder_at_once_and_its_old_text_refuses_nobody() {
    let desk = Desk::new(Protocol::V2).await.unwrap();
    for round in 1..=20 {
        let mut agent = desk.agent().unwrap();
        agent.wait_for_log("dockflare-agent runs", SOON).await.unwrap();
        let text = desk.file("agent.lock").unwrap();
        assert!(text.starts_with(&format!("pid {} on host ", agent.pid())), "round {round}: {text}");
        agent.sigkill().unwrap();
        agent.wait_exit(SOON).await.unwrap();
        assert_eq!(desk.file("agent.lock").unwrap(), text, "what the killed one wrote is still there");
    }
    assert_eq!(
        std::fs::read_dir(desk.data.path()).unwrap().flatten().filter(|file| is_hidden(&file.path())).count(),
        0
    );
}

#[tokio::test]
async fn the_health_check_asks_an_agent_whose_folder_is_taken() {
    let mut desk = Desk::new(Protocol::V2).await.unwrap();
    desk.set("HEALTH_CHECK_PORT", free_port().to_string());
    let mut agent = desk.agent().unwrap();
    desk.registered(1).await.unwrap();
    let mut check = AgentProcess::spawn_with(&agent_binary(), &["healthcheck"], &desk.env, desk.data.path()).unwrap();
    assert_eq!(check.wait_exit(SOON).await.unwrap().code(), Some(0), "{}", check.log());
    stop(&mut agent).await.unwrap();
}

fn is_hidden(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."))
}

/// A mount that is unmounted when dropped. `None` if this process may not mount.
struct Mount<'a>(&'a Path);

impl<'a> Mount<'a> {
    fn tmpfs(at: &'a Path, size: &str) -> Option<Self> {
        let options = format!("size={size},mode=0700");
        mount(&["-t", "tmpfs", "-o", &options, "dockflare-test", &at.display().to_string()]).then_some(Self(at))
    }

    /// Mounts the folder read-only over itself.
    fn read_only_over(at: &'a Path) -> Option<Self> {
        let path = at.display().to_string();
        let covered = mount(&["--bind", &path, &path]).then_some(Self(at))?;
        mount(&["-o", "remount,bind,ro", &path]).then_some(covered)
    }
}

impl Drop for Mount<'_> {
    fn drop(&mut self) {
        // Unmount lazily, because a process may still have a file open there.
        let unmounted = Command::new("umount").arg("-l").arg(self.0).status();
        assert!(std::thread::panicking() || unmounted.is_ok_and(|status| status.success()), "umount");
    }
}

fn mount(args: &[&str]) -> bool {
    let output = Command::new("mount").args(args).output();
    output.is_ok_and(|output| output.status.success())
}

#[tokio::test]
async fn a_command_that_a_full_disk_refuses_is_kept_told_and_stored_when_there_is_room() {
    let desk = Desk::new(Protocol::V2).await.unwrap();
    let Some(_mount) = Mount::tmpfs(desk.data.path(), "64k") else {
        return testkit::skipped("this process may not mount a tmpfs");
    };
    let mut agent = desk.agent().unwrap();
    let id = desk.registered(1).await.unwrap().id;
    desk.master.enroll(&id, "first").unwrap();
    let first = async || desk.file("tunnel_state.json").ok().filter(|text| text.contains("first"));
    let before = testkit::wait_until("the first tunnel on disk", SOON, first).await.unwrap();

    let filler = desk.path("filler");
    // Write until nothing more fits; the error is expected.
    let full = std::fs::write(&filler, vec![0; 1 << 20]);
    assert_eq!(full.unwrap_err().kind(), std::io::ErrorKind::StorageFull);
    desk.master.enroll(&id, "second").unwrap();
    let said = agent.wait_for_log("refuses a command that the master has sent", SOON).await.unwrap();
    assert!(said.contains("make room"), "{said}");
    let known = || desk.master.snapshot().agents[&id].clone();
    let (polls, reports) = (known().polls, known().incomplete_reports);
    desk.master.push_commands(&id, vec![json!({"action": "stop_tunnel"})]).unwrap();
    let again = agent.mark();
    // The agent reports once per five polls.
    let report = desk
        .master
        .wait_for("two reports", SOON, |now| (now.agents[&id].incomplete_reports >= reports + 2).then_some(()));
    report.await.unwrap();
    assert_eq!(known().polls, polls, "nothing more is fetched");
    assert_eq!(desk.file("tunnel_state.json").unwrap(), before, "the old file is whole");

    std::fs::remove_file(&filler).unwrap();
    agent.wait_for_log_after(again, "command stop_tunnel", SOON).await.unwrap();
    let stopped = async || desk.file("tunnel_state.json").ok().filter(|text| text.contains("\"stopped\""));
    let after = testkit::wait_until("both commands on disk", SOON, stopped).await.unwrap();
    assert!(after.contains("second"), "{after}");
    let left: Vec<_> =
        std::fs::read_dir(desk.data.path()).unwrap().flatten().filter(|file| is_hidden(&file.path())).collect();
    assert!(left.is_empty(), "a write that failed leaves nothing behind: {left:?}");
    stop(&mut agent).await.unwrap();
    desk.assert_no_violations();
}

#[tokio::test]
async fn a_start_on_a_full_disk_says_what_to_do() {
    let desk = Desk::new(Protocol::V2).await.unwrap();
    // One page for the folder and none for a file, so not even a name fits.
    let Some(_mount) = Mount::tmpfs(desk.data.path(), "8k,nr_inodes=2") else {
        return testkit::skipped("this process may not mount a tmpfs");
    };
    let _ = std::fs::write(desk.path("filler"), "");
    let mut agent = desk.agent().unwrap();
    assert_eq!(agent.wait_exit(SOON).await.unwrap().code(), Some(73));
    assert!(agent.log().contains("make room on its disk"), "{}", agent.log());
}

#[tokio::test]
async fn a_folder_that_becomes_read_only_keeps_the_command_in_memory_and_one_that_is_says_so_at_the_start() {
    let desk = Desk::new(Protocol::V2).await.unwrap();
    let mut agent = desk.agent().unwrap();
    let id = desk.registered(1).await.unwrap().id;
    desk.master.enroll(&id, "edge").unwrap();
    let stored = async || desk.file("tunnel_state.json").ok().filter(|text| text.contains("\"running\""));
    let before = testkit::wait_until("the tunnel on disk", SOON, stored).await.unwrap();
    let Some(covered) = Mount::read_only_over(desk.data.path()) else {
        return testkit::skipped("this process may not mount a folder read-only");
    };
    desk.master.push_commands(&id, vec![json!({"action": "stop_tunnel"})]).unwrap();
    let said = agent.wait_for_log("refuses a command that the master has sent", SOON).await.unwrap();
    assert!(said.contains("Read-only file system"), "{said}");
    assert_eq!(desk.file("tunnel_state.json").unwrap(), before);
    // Start an agent on the same folder.
    let mut other = desk.agent().unwrap();
    assert_eq!(other.wait_exit(SOON).await.unwrap().code(), Some(73));
    assert!(other.log().contains("mount a volume or a folder that can be written"), "{}", other.log());
    drop(covered);
    let stopped = async || desk.file("tunnel_state.json").ok().filter(|text| text.contains("\"stopped\""));
    testkit::wait_until("the stop on disk", SOON, stopped).await.unwrap();
    stop(&mut agent).await.unwrap();
    desk.assert_no_violations();
}
