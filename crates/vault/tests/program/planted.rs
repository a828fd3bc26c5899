//! Checks that a value is where it was put and nowhere else.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::FileExt;
use std::time::Instant;

use crate::scene::{SOON, Scene};

/// Its length is a multiple of three bytes, so its base64 is the same at each repetition.
const PLANTED: &str = "PLANTED-7f3a9c-a-value-of-some-length-that-is-nowhere-else42";

fn in_base64() -> String {
    base64::Engine::encode(&base64::engine::general_purpose::STANDARD, PLANTED)
}

fn count(planted: &[u8], text: &[u8]) -> usize {
    text.windows(planted.len()).filter(|window| *window == planted).count()
}

fn assert_none(what: &str, text: &[u8]) {
    for planted in [PLANTED, &in_base64()] {
        assert_eq!(count(planted.as_bytes(), text), 0, "{what} has {planted}");
    }
}

fn page(port: u16, path: &str) -> Vec<u8> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    write!(stream, "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
    let mut text = vec![];
    stream.read_to_end(&mut text).unwrap();
    assert!(text.starts_with(b"HTTP/1.1 200"), "{path}: {}", String::from_utf8_lossy(&text));
    text
}

/// What the kernel shows of a process to anyone who may look.
fn shown(pid: u32) -> Vec<u8> {
    ["cmdline", "environ"].iter().flat_map(|file| fs::read(format!("/proc/{pid}/{file}")).unwrap()).collect()
}

/// The value is in no log at the lowest level, no error, page or bundle, no process list or environment, and in no file
/// in plain text.
#[test]
fn a_planted_value_is_found_nowhere() {
    let scene = Scene::new();
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let pass = scene.path("pass");
    fs::write(&pass, PLANTED).unwrap();
    scene.configure(&format!("nats: {{user: u, pass: {PLANTED}}}\nhealth: {{port: {port}}}\n"));
    let server = scene.start_with(&[("LOG_LEVEL", "trace"), ("LOG_FORMAT", "json")]);
    server.wait_for("dockflare-vault started");
    let name = "app/db";

    // The command while it reads the value: not on its command line, not in its environment.
    let mut child = scene.command(&["set", name]).spawn().unwrap();
    let mut input = child.stdin.take().unwrap();
    input.write_all(&PLANTED.as_bytes()[..20]).unwrap();
    assert_none("the command", &shown(child.id()));
    input.write_all(&PLANTED.as_bytes()[20..]).unwrap();
    drop(input);
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success());
    assert_none("set", &[output.stdout, output.stderr].concat());

    for (arguments, input) in [
        (vec!["set", name, "--if-version", "7"], PLANTED),
        (vec!["set", name, "--expires-in", "x"], PLANTED),
        (vec!["set", "bad//name"], PLANTED),
        (vec!["list"], ""),
        (vec!["history", name], ""),
        (vec!["status"], ""),
        (vec!["support-bundle"], ""),
        (vec!["check"], ""),
        (vec!["audit", "verify"], ""),
        (vec!["healthcheck"], ""),
        (vec!["rotate"], ""),
    ] {
        let output = scene.run(&arguments, input.as_bytes());
        assert_none(arguments[0], &[output.stdout, output.stderr].concat());
    }
    // A value in the argument list is visible there. The vault warns of it, and the value gets no further.
    let output = scene.run(&["set", "argument", PLANTED], b"");
    assert!(String::from_utf8_lossy(&output.stderr).contains("stood in the process list"));
    assert_none("set", &[output.stdout, output.stderr].concat());
    // Send the socket lines that are not requests.
    for line in [
        format!("{{\"operation\":\"set\",\"name\":\"a\",\"value\":\"{PLANTED}\"}}\n"),
        format!("{PLANTED}\n"),
        PLANTED.to_owned(),
    ] {
        let mut stream = std::os::unix::net::UnixStream::connect(scene.path("run/admin.sock")).unwrap();
        stream.write_all(line.as_bytes()).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut answer = vec![];
        stream.read_to_end(&mut answer).unwrap();
        assert!(!answer.is_empty());
        assert_none("the answer", &answer);
    }
    assert_eq!(scene.ok(&["get", name], b""), PLANTED.as_bytes());
    server.wait_for("the old one is gone");
    for path in ["/live", "/ready", "/health", "/metrics"] {
        assert_none(path, &page(port, path));
    }
    assert_none("the server", &shown(server.pid()));
    let (_, log) = server.stop();
    assert!(log.contains("dockflare-vault stopped"), "{log}");
    assert_none("the log", log.as_bytes());
    for folder in ["data", "run", "other"] {
        for entry in fs::read_dir(scene.path(folder)).unwrap() {
            let path = entry.unwrap().path();
            if path.is_file() {
                assert_none(&path.display().to_string(), &fs::read(&path).unwrap());
            }
        }
    }
}

/// How often the value is in a process's memory; `None` if this user may not read it.
fn in_memory(pid: u32) -> Option<usize> {
    let memory = File::open(format!("/proc/{pid}/mem")).ok()?;
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    let mut found = 0;
    for line in maps.lines().filter(|line| line.split_whitespace().nth(1).is_some_and(|mode| mode.starts_with("rw"))) {
        let (from, to) = line.split_whitespace().next().unwrap().split_once('-').unwrap();
        let [from, to] = [from, to].map(|text| u64::from_str_radix(text, 16).unwrap());
        let mut bytes = vec![0; (to - from) as usize];
        if memory.read_exact_at(&mut bytes, from).is_ok() {
            found += count(PLANTED.as_bytes(), &bytes) + count(in_base64().as_bytes(), &bytes);
        }
    }
    Some(found)
}

/// There is no core dump and no debugger of the same user. Even root finds no value that was answered and freed.
#[test]
fn a_value_that_was_let_go_of_is_in_no_core_dump_and_not_in_memory() {
    let scene = Scene::new();
    let server = scene.start();
    let limits = fs::read_to_string(format!("/proc/{}/limits", server.pid())).unwrap();
    let cores = limits.lines().find(|line| line.starts_with("Max core file size")).unwrap();
    let words: Vec<_> = cores.split_whitespace().collect();
    assert_eq!((words[4], words[5]), ("0", "0"), "{cores}");
    // Use several sizes, since other data reuses memory that was freed.
    for number in 0..20 {
        let value = PLANTED.repeat(1 + number * number * 10);
        scene.ok(&["set", &format!("s/{number}")], value.as_bytes());
        assert_eq!(scene.ok(&["get", &format!("s/{number}")], b""), value.as_bytes());
    }
    scene.ok(&["rotate"], b"");
    server.wait_for("the old one is gone");
    // Earlier work is done once this is answered.
    scene.ok(&["status"], b"");
    match in_memory(server.pid()) {
        Some(found) => assert_eq!(found, 0, "values stay in memory"),
        // The process is not dumpable, so only root may read its memory.
        None => assert!(!nix::unistd::geteuid().is_root()),
    }
    // Make sure that the search finds the value in a process that holds it.
    let mut holder = scene.command(&["set", "held"]).spawn().unwrap();
    let mut input = holder.stdin.take().unwrap();
    input.write_all(PLANTED.as_bytes()).unwrap();
    let until = Instant::now() + SOON;
    while in_memory(holder.id()) == Some(0) {
        assert!(Instant::now() < until, "the search finds nothing where there is something");
    }
    drop(input);
    assert!(holder.wait().unwrap().success());
    // A signal that would otherwise dump core: no core file.
    server.signal(nix::sys::signal::Signal::SIGABRT);
    let mut server = server;
    let status = server.child.wait().unwrap();
    assert!(!std::os::unix::process::ExitStatusExt::core_dumped(&status), "{status}");
}
