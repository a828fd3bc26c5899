//! Output that nobody reads: a pipe whose reader hangs, as a stuck log collector's does.

use std::fs::File;
use std::io::{BufRead, BufReader, PipeReader, Write};
use std::os::fd::OwnedFd;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use dockflare_dev_master::Protocol;
use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::desk::Desk;
use crate::program::free_port;
use crate::support::{SOON, agent_binary};

/// A pipe with no room for another byte.
fn full_pipe() -> (PipeReader, File) {
    let (reader, writer) = std::io::pipe().unwrap();
    let room = fcntl(&writer, FcntlArg::F_SETPIPE_SZ(4096)).unwrap();
    let mut writer = File::from(OwnedFd::from(writer));
    writer.write_all(&vec![b'\n'; usize::try_from(room).unwrap()]).unwrap();
    (reader, writer)
}

/// A program whose standard output and error nobody reads. Dropping this kills it.
struct Unread(Child);

impl Unread {
    fn spawn(args: &[&str], env: &[(String, String)], output: &File) -> Self {
        let output = || Stdio::from(output.try_clone().unwrap());
        let mut program = Command::new(agent_binary());
        program.args(args).env_clear().envs(env.iter().cloned()).stdin(Stdio::null());
        Self(program.stdout(output()).stderr(output()).spawn().unwrap())
    }

    /// Sends SIGTERM, and returns the exit status and how long the program took to end.
    async fn stop(&mut self) -> (ExitStatus, Duration) {
        let began = Instant::now();
        kill(Pid::from_raw(self.0.id().try_into().unwrap()), Signal::SIGTERM).unwrap();
        loop {
            if let Some(ended) = self.0.try_wait().unwrap() {
                return (ended, began.elapsed());
            }
            assert!(began.elapsed() < SOON, "it did not end");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

impl Drop for Unread {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

async fn get(port: u16, path: &str) -> String {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
    stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: a\r\n\r\n").as_bytes()).await.unwrap();
    let mut answer = String::new();
    tokio::time::timeout(SOON, stream.read_to_string(&mut answer)).await.unwrap().unwrap();
    answer
}

#[tokio::test]
async fn an_agent_whose_log_nobody_reads_does_its_work_and_says_later_how_many_lines_are_missing() {
    for reads_again in [true, false] {
        let mut desk = Desk::new(Protocol::V2).await.unwrap();
        let port = free_port();
        desk.set("HEALTH_CHECK_PORT", port.to_string());
        let (reader, output) = full_pipe();
        let mut agent = Unread::spawn(&[], &desk.env, &output);
        drop(output);
        let id = desk.registered(1).await.unwrap().id;
        // Each command makes a log line; together they exceed what can be queued.
        let unknown = |number: usize| json!({ "id": format!("{number}"), "action": format!("{number:0150}") });
        for part in 0..6 {
            let commands = (0..500).map(|number| unknown(part * 500 + number)).collect();
            desk.master.push_commands(&id, commands).unwrap();
            let polls = desk.master.snapshot().agents[&id].polls;
            let goes_on = |agent: &dockflare_dev_master::Agent| agent.polls > polls + 1;
            let known = desk.master.wait_for("two more polls", SOON, |known| {
                known.agents.get(&id).filter(|agent| goes_on(agent)).map(drop)
            });
            known.await.unwrap();
        }
        assert!(get(port, "/live").await.starts_with("HTTP/1.1 200 "));
        assert!(get(port, "/log").await.contains("skipping"), "what was dropped is still kept for a while");
        if reads_again {
            let lines = tokio::task::spawn_blocking(move || {
                let lines = BufReader::new(reader).lines().map(Result::unwrap);
                let mut seen = Vec::new();
                for line in lines {
                    let is_last = line.contains("log lines were dropped");
                    seen.push(line);
                    if is_last {
                        break;
                    }
                }
                seen
            });
            let lines = tokio::time::timeout(SOON, lines).await.unwrap().unwrap();
            let last = lines.last().unwrap();
            let count = last.rsplit_once("lines=").and_then(|(_, count)| count.parse::<usize>().ok());
            assert!(count.is_some_and(|count| count > 500) && last.contains("ERROR"), "{last}");
            assert!(lines.iter().any(|line| line.contains("registered at the master")));
        }
        let (ended, after) = agent.stop().await;
        assert!(ended.code() == Some(0) && after < Duration::from_secs(10), "{ended} after {after:?}");
    }
}

#[tokio::test]
async fn a_socket_proxy_whose_log_nobody_reads_answers_and_stops() {
    let folder = tempfile::tempdir().unwrap();
    let listen = format!("unix://{}/docker.sock", folder.path().display());
    let env = [("SOCKET_PROXY_LISTEN", listen), ("SOCKET_PROXY_DOCKER_HOST", "unix:///nowhere/docker.sock".to_owned())];
    let env = env.map(|(name, value)| (name.to_owned(), value));
    let (_reader, output) = full_pipe();
    let mut proxy = Unread::spawn(&["socket-proxy"], &env, &output);
    let began = Instant::now();
    while !folder.path().join("docker.sock").exists() {
        assert!(began.elapsed() < SOON);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let env: Vec<_> = env.iter().map(|(name, value)| (&**name, &**value)).collect();
    let (code, text) = crate::program::run(&["socket-proxy", "--check"], &env).await;
    assert!(code == Some(1) && text.contains("does not reach Docker"), "{code:?} {text}");
    let (ended, after) = proxy.stop().await;
    assert!(ended.code() == Some(0) && after < Duration::from_secs(10), "{ended} after {after:?}");
}

#[tokio::test]
async fn a_check_whose_output_nobody_reads_ends_when_asked_and_an_error_does_not_wait_for_long() {
    let env = [("DOCKFLARE_MASTER_URL".to_owned(), "ftp://m".to_owned())];
    for args in [&["check"][..], &["check", "--json"], &["support-bundle"], &["--help"]] {
        let (reader, output) = full_pipe();
        let mut check = Unread::spawn(args, &env, &output);
        // When the program waits for the reader, it has produced all its output and has installed its signal handlers.
        let status = format!("/proc/{}/status", check.0.id());
        let asked = || {
            std::fs::read_to_string(&status).unwrap().lines().any(|line| {
                line.strip_prefix("SigCgt:")
                    .is_some_and(|mask| u64::from_str_radix(mask.trim(), 16).unwrap() & 1 << 14 != 0)
            })
        };
        let began = Instant::now();
        while !asked() {
            assert!(began.elapsed() < SOON);
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let (ended, after) = check.stop().await;
        assert!(ended.code().is_some() && after < Duration::from_secs(10), "{args:?} {ended} after {after:?}");
        drop(reader);
    }
    let (_reader, output) = full_pipe();
    let mut agent = Unread::spawn(&[], &env, &output);
    let code = tokio::task::spawn_blocking(move || agent.0.wait().unwrap().code());
    assert_eq!(tokio::time::timeout(SOON, code).await.unwrap().unwrap(), Some(64));
}
