#![allow(clippy::disallowed_methods, clippy::disallowed_types, reason = "tests block as they like")]
#![allow(clippy::unwrap_used, reason = "a test ends where it cannot go on")]
//! The program as people run it: the real binary, its socket, its files, its exit codes, and SIGKILL.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

/// Longest wait for something that takes milliseconds on an idle machine.
const SOON: Duration = Duration::from_secs(30);

struct Scene {
    dir: tempfile::TempDir,
}

impl Scene {
    fn new() -> Self {
        let memory = Path::new("/dev/shm");
        let dir = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() }.unwrap();
        let scene = Self { dir };
        for folder in ["data", "run", "other"] {
            fs::create_dir(scene.path(folder)).unwrap();
        }
        scene.configure("");
        let made = scene.run(&["generate-key"], b"");
        assert_eq!(made.status.code(), Some(0));
        scene.write_key(&made.stdout);
        scene
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn write_key(&self, text: &[u8]) {
        fs::write(self.path("master.key"), text).unwrap();
        fs::set_permissions(self.path("master.key"), std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    }

    fn configure(&self, more: &str) {
        let dir = self.dir.path().display();
        let text = format!(
            "storage: {{file: {dir}/data/vault.redb, change_counter: {dir}/other/change}}\n\
             encryption: {{master_key: {dir}/master.key}}\naudit: {{file: {dir}/data/audit.log}}\n\
             admin: {{socket: {dir}/run/admin.sock}}\nhealth: {{port: 0}}\n{more}"
        );
        fs::write(self.path("config.yaml"), text).unwrap();
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_dockflare-vault"));
        command.arg("--config").arg(self.path("config.yaml")).args(arguments).env_clear();
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    fn run(&self, arguments: &[&str], input: &[u8]) -> Output {
        let mut child = self.command(arguments).spawn().unwrap();
        // One that does not read it may be gone.
        let _ = child.stdin.take().unwrap().write_all(input);
        child.wait_with_output().unwrap()
    }

    /// What it prints; it must end well.
    fn ok(&self, arguments: &[&str], input: &[u8]) -> Vec<u8> {
        let output = self.run(arguments, input);
        assert_eq!(output.status.code(), Some(0), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        output.stdout
    }

    /// What it says; it must end with this code.
    fn fails(&self, arguments: &[&str], input: &[u8], code: i32) -> String {
        let output = self.run(arguments, input);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {said}");
        said
    }

    fn start(&self) -> Server {
        let server = self.start_with(&[]);
        server.wait_for("dockflare-vault started");
        server
    }

    fn start_with(&self, variables: &[(&str, &str)]) -> Server {
        let mut child = self.command(&["run"]).envs(variables.iter().copied()).spawn().unwrap();
        let (lines, log) = channel();
        let output = child.stdout.take().unwrap();
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                let _ = lines.send(line);
            }
        });
        Server { child, log, seen: std::cell::RefCell::default() }
    }
}

struct Server {
    child: Child,
    log: Receiver<String>,
    seen: std::cell::RefCell<Vec<String>>,
}

impl Server {
    fn wait_for(&self, text: &str) {
        let mut seen = self.seen.borrow_mut();
        let until = Instant::now() + SOON;
        while let Some(left) = until.checked_duration_since(Instant::now()) {
            let Ok(line) = self.log.recv_timeout(left) else { break };
            let is_it = line.contains(text);
            seen.push(line);
            if is_it {
                return;
            }
        }
        panic!("{text:?} was never logged:\n{}", seen.join("\n"));
    }

    fn pid(&self) -> u32 {
        self.child.id()
    }

    fn signal(&self, signal: nix::sys::signal::Signal) {
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(self.pid() as i32), signal).unwrap();
    }

    /// Ends it as asked; its code and all that it logged.
    fn stop(mut self) -> (Option<i32>, String) {
        self.signal(nix::sys::signal::Signal::SIGTERM);
        let code = self.child.wait().unwrap().code();
        let mut seen = self.seen.take();
        seen.extend(self.log.iter());
        (code, seen.join("\n"))
    }

    fn kill(mut self) {
        self.signal(nix::sys::signal::Signal::SIGKILL);
        assert_eq!(self.child.wait().unwrap().signal(), Some(9));
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn from_a_new_key_to_a_value_that_is_read_byte_for_byte() {
    let scene = Scene::new();
    let value: Vec<u8> = (0..=255).chain(*b"\n").collect();
    // Without a server, with one, and again without: the same store and the same answers.
    assert_eq!(scene.ok(&["set", "app/db"], &value), b"version 1\n");
    let server = scene.start();
    assert_eq!(scene.ok(&["get", "app/db"], b""), value);
    assert_eq!(scene.ok(&["set", "app/db", "second", "--if-version", "1"], b""), b"version 2\n");
    assert!(
        scene.fails(&["set", "app/db", "third", "--if-version", "1"], b"", 1).contains("is at version 2, not at 1")
    );
    assert_eq!(scene.ok(&["get", "app/db", "--version", "1"], b""), value);
    assert_eq!(scene.ok(&["set", "other", "x", "--expires-in", "0"], b""), b"version 1\n");
    assert!(scene.fails(&["get", "other"], b"", 1).contains("other is not there"));
    assert_eq!(scene.ok(&["list"], b""), b"app/db\n");
    assert!(String::from_utf8(scene.ok(&["history", "app/db"], b"")).unwrap().contains("\"version\": 2"));
    assert_eq!(server.stop().0, Some(0));
    assert_eq!(scene.ok(&["get", "app/db"], b""), b"second");
    scene.ok(&["delete", "app/db"], b"");
    assert!(scene.fails(&["get", "app/db"], b"", 1).contains("is not there"));
    assert!(scene.ok(&["audit", "verify"], b"").ends_with(b"an unbroken chain\n"));
    scene.ok(&["check"], b"");
}

#[test]
fn rotations_of_both_kinds_and_restarts_lose_nothing() {
    let scene = Scene::new();
    let server = scene.start();
    for number in 0..20 {
        scene.ok(&["set", &format!("s/{number}")], number.to_string().as_bytes());
    }
    scene.ok(&["rotate"], b"");
    server.wait_for("the old one is gone");
    let new = scene.run(&["generate-key"], b"").stdout;
    fs::write(scene.path("new.key"), &new).unwrap();
    fs::set_permissions(scene.path("new.key"), std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    let said = scene.ok(&["rotate", "--master", scene.path("new.key").to_str().unwrap()], b"");
    assert!(String::from_utf8(said).unwrap().contains("before the next start"));
    assert!(!scene.run(&["check"], b"").status.success(), "the key file does not open the store any more");
    server.kill();
    let said = scene.fails(&["get", "s/7"], b"", 64);
    assert!(said.contains("does not open the store") && said.contains("nothing was changed"), "{said}");
    scene.write_key(&new);
    let server = scene.start();
    for number in 0..20 {
        assert_eq!(scene.ok(&["get", &format!("s/{number}")], b""), number.to_string().as_bytes());
    }
    assert_eq!(server.stop().0, Some(0));
}

#[test]
fn bad_input_is_named_and_nothing_is_lost() {
    let scene = Scene::new();
    scene.ok(&["set", "a"], b"x");
    for (arguments, text) in [
        (vec!["get", "../a"], "\"..\""),
        (vec!["get", "a//b"], "empty segment"),
        (vec!["frobnicate"], "unrecognized"),
        (vec!["set"], "required"),
    ] {
        assert!(scene.fails(&arguments, b"x", 64).contains(text), "{arguments:?}");
    }
    assert!(scene.fails(&["set", "big"], &vec![b'x'; (512 << 10) + 1], 64).contains("larger things are files"));
    assert_eq!(scene.ok(&["set", "big"], &vec![b'x'; 512 << 10]), b"version 1\n");

    let key = fs::read(scene.path("master.key")).unwrap();
    scene.write_key(b"too short");
    assert!(scene.fails(&["get", "a"], b"", 64).contains("it holds no key"));
    let other = scene.run(&["generate-key"], b"").stdout;
    scene.write_key(&other);
    assert!(scene.fails(&["get", "a"], b"", 64).contains("does not open the store"));
    assert!(scene.fails(&["run"], b"", 64).is_empty(), "the log has it");
    fs::remove_file(scene.path("master.key")).unwrap();
    assert!(scene.fails(&["get", "a"], b"", 64).contains("generate-key"));
    scene.write_key(&key);

    let sound = fs::read(scene.path("data/vault.redb")).unwrap();
    fs::write(scene.path("data/vault.redb"), &sound[..sound.len() / 2]).unwrap();
    assert!(scene.fails(&["get", "a"], b"", 74).contains("is damaged"));
    fs::write(scene.path("data/vault.redb"), &sound).unwrap();
    assert_eq!(scene.ok(&["get", "a"], b""), b"x");

    scene.configure("storge: {}\nacl:\n- subject: a..b\n  operations: [gte]\n");
    let said = scene.fails(&["run"], b"", 64);
    for problem in ["is storage meant?", "no NATS subject", "no operation"] {
        assert!(said.contains(problem), "{said}");
    }
}

#[test]
fn an_older_copy_of_the_store_is_taken_only_when_that_was_said() {
    let scene = Scene::new();
    scene.ok(&["set", "a"], b"old");
    let copy = fs::read(scene.path("data/vault.redb")).unwrap();
    scene.ok(&["set", "a"], b"new");
    fs::write(scene.path("data/vault.redb"), copy).unwrap();
    let said = scene.fails(&["get", "a"], b"", 74);
    assert!(said.contains("older than it was") && said.contains("--accept-rollback"), "{said}");
    let mut child = scene.command(&["run", "--accept-rollback"]).spawn().unwrap();
    let until = Instant::now() + SOON;
    while !scene.path("run/admin.sock").exists() {
        assert!(Instant::now() < until, "it does not start");
        std::thread::yield_now();
    }
    assert_eq!(scene.ok(&["get", "a"], b""), b"old");
    child.kill().unwrap();
    child.wait().unwrap();
    scene.ok(&["set", "a"], b"newer");
    assert_eq!(scene.ok(&["get", "a"], b""), b"newer");
}

#[test]
fn a_second_vault_on_one_store_ends_with_73_and_names_the_first() {
    let scene = Scene::new();
    let server = scene.start();
    let second = scene.start_with(&[("DOCKFLARE_VAULT_ADMIN_SOCKET", scene.path("run/second.sock").to_str().unwrap())]);
    second.wait_for(&format!("is in use by pid {}", server.pid()));
    let mut second = second;
    assert_eq!(second.child.wait().unwrap().code(), Some(73));
    scene.ok(&["status"], b"");
}

#[test]
fn another_table_of_grants_is_taken_whole_or_not_at_all() {
    let scene = Scene::new();
    let server = scene.start();
    scene.configure("acl:\n- subject: user.requests\n  operations: [get]\n");
    server.signal(nix::sys::signal::Signal::SIGHUP);
    server.wait_for("took the new table of grants grants=2");
    scene.configure("acl:\n- subject: user.requests\n  operations: [get, frob]\n");
    server.wait_for("\"frob\" is no operation");
    scene.configure("acl:\n- subject: user.requests\n  operations: [get, set]\n");
    server.wait_for("took the new table of grants grants=2");
    assert_eq!(server.stop().0, Some(0));
}

/// Sets and rotations, killed at random moments: whatever was acknowledged is there, the audit's chain holds, and no
/// secret is lost. `VAULT_KILLS` asks for another number of rounds.
#[test]
fn killed_at_random_what_was_acknowledged_is_there_and_the_chain_holds() {
    let rounds: u32 = std::env::var("VAULT_KILLS").ok().and_then(|text| text.parse().ok()).unwrap_or(40);
    let scene = Scene::new();
    // The last value that was acknowledged, and the one that was under way.
    let mut said: BTreeMap<String, (u32, u32)> = BTreeMap::new();
    let mut counter = 0;
    for round in 0..rounds {
        let server = scene.start();
        for (name, (known, tried)) in &mut said {
            let found: u32 = String::from_utf8(scene.ok(&["get", name], b"")).unwrap().parse().unwrap();
            assert!(found == *known || found == *tried, "round {round}: {name} is {found}, not {known} or {tried}");
            (*known, *tried) = (found, found);
        }
        assert!(scene.ok(&["audit", "verify"], b"").ends_with(b"an unbroken chain\n"), "round {round}");
        let delay = Duration::from_micros(u64::from(round * 7919 % 40) * 1000);
        let pid = nix::unistd::Pid::from_raw(server.pid() as i32);
        let killer = std::thread::spawn(move || {
            std::thread::sleep(delay);
            nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
        });
        // Without a server the command opens the store itself, and that is as good a witness.
        while !killer.is_finished() {
            counter += 1;
            if counter % 5 == 0 {
                scene.run(&["rotate"], b"");
                continue;
            }
            let name = format!("s/{}", counter % 7);
            let is_said = scene.run(&["set", &name], counter.to_string().as_bytes()).status.success();
            match (is_said, said.get_mut(&name)) {
                (true, _) => drop(said.insert(name, (counter, counter))),
                (false, Some(entry)) => entry.1 = counter,
                // Nothing was acknowledged of it yet.
                (false, None) => {}
            }
        }
        killer.join().unwrap();
        server.kill();
    }
}

/// A value is where it was put and nowhere else: not in a log at the lowest level, an error, a page, the bundle, a
/// process list, an environment, or a file in plain.
#[test]
fn a_planted_value_is_found_nowhere() {
    const PLANTED: &str = "PLANTED-7f3a9c";
    let scene = Scene::new();
    scene.configure("nats: {user: u, pass: PLANTED-7f3a9c}\n");
    let server = scene.start_with(&[("LOG_LEVEL", "trace")]);
    server.wait_for("dockflare-vault started");
    let mut said = vec![];
    let name = "app/db";
    for (arguments, input) in [
        (vec!["set", name], PLANTED),
        (vec!["set", name, "--if-version", "7"], PLANTED),
        (vec!["set", "bad//name"], PLANTED),
        (vec!["list"], ""),
        (vec!["history", name], ""),
        (vec!["status"], ""),
        (vec!["support-bundle"], ""),
        (vec!["check"], ""),
        (vec!["audit", "verify"], ""),
        (vec!["rotate"], ""),
    ] {
        let output = scene.run(&arguments, input.as_bytes());
        said.extend([output.stdout, output.stderr].concat());
    }
    assert_eq!(scene.ok(&["get", name], b""), PLANTED.as_bytes());
    server.wait_for("the old one is gone");
    for file in ["cmdline", "environ"] {
        said.extend(fs::read(format!("/proc/{}/{file}", server.pid())).unwrap());
    }
    let limits = fs::read_to_string(format!("/proc/{}/limits", server.pid())).unwrap();
    let cores = limits.lines().find(|line| line.starts_with("Max core file size")).unwrap();
    assert_eq!(cores.split_whitespace().nth(4), Some("0"), "{cores}");
    let (_, log) = server.stop();
    said.extend(log.into_bytes());
    for folder in ["data", "run", "other"] {
        for entry in fs::read_dir(scene.path(folder)).unwrap() {
            let path = entry.unwrap().path();
            if path.is_file() {
                fs::File::open(path).unwrap().read_to_end(&mut said).unwrap();
            }
        }
    }
    let planted = [PLANTED.to_owned(), base64::Engine::encode(&base64::engine::general_purpose::STANDARD, PLANTED)];
    for planted in planted {
        assert!(!said.windows(planted.len()).any(|window| window == planted.as_bytes()), "{planted} was found");
    }
}
