#![allow(clippy::disallowed_methods, clippy::disallowed_macros, clippy::disallowed_types, reason = "a bench, alone")]
#![allow(clippy::expect_used, reason = "a figure that could not be taken is none")]
//! Measures the time from a change of a secret until its reader sees the new file: `cargo bench -p dockflare-vault
//! --bench deliver`. It runs the real program on this machine with one workload and with a thousand, on a tmpfs. The
//! clock starts before the request at the admin socket.
//!
//! With `BAO=/path/to/bao`, an OpenBao server and its agent do the same work, rendering templates as often as the agent
//! can be set to. Prints figures and asserts nothing.

use std::fmt::Write as _;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

/// How many changes of one secret to measure.
const CHANGES: usize = 200;
/// The same for OpenBao, which takes seconds per change.
const SLOW_CHANGES: usize = 12;

fn main() {
    if !std::env::args().any(|argument| argument == "--bench") {
        return;
    }
    println!(
        "| | workloads | one change: median | 95 % | largest | median until the store has it | one secret of all: until the last has it | resident |"
    );
    println!("|---|---|---|---|---|---|---|---|");
    for workloads in [1, 1000] {
        ours(workloads);
    }
    if let Ok(bao) = std::env::var("BAO") {
        for workloads in [1, 1000] {
            theirs(&bao, workloads);
        }
    }
}

/// A child process, killed on drop.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Running {
    /// Resident memory in kB.
    fn resident(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.0.id())).expect("a status");
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("a size");
        line.trim().trim_end_matches(" kB").parse().expect("a number")
    }
}

/// Waits in a busy loop until the file holds this value.
fn seen(file: &Path, value: &str) {
    let began = Instant::now();
    while fs::read_to_string(file).ok().as_deref() != Some(value) {
        assert!(began.elapsed() < Duration::from_secs(300), "{} never came", file.display());
        std::hint::spin_loop();
    }
}

fn row(who: &str, workloads: usize, mut times: Vec<Duration>, mut stored: Vec<Duration>, all: Duration, resident: u64) {
    times.sort();
    stored.sort();
    let ms = |time: Duration| format!("{:.2} ms", time.as_secs_f64() * 1000.0);
    let (median, high) = (times[times.len() / 2], times[times.len() * 95 / 100]);
    let largest = times[times.len() - 1];
    println!(
        "| {who} | {workloads} | {} | {} | {} | {} | {} | {} MB |",
        ms(median),
        ms(high),
        ms(largest),
        ms(stored[stored.len() / 2]),
        ms(all),
        resident / 1024
    );
}

fn memory() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").expect("memory")
}

/// Reads the answer.
fn done(mut stream: UnixStream) {
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("an answer");
    assert!(answer.contains("success"), "{answer}");
}

fn ours(workloads: usize) {
    // Put the store on a disk, as in production, and the files in memory.
    let (dir, files) = (tempfile::tempdir().expect("a folder"), memory());
    let (dir, files) = (dir.path(), files.path());
    let program = env!("CARGO_BIN_EXE_dockflare-vault");
    let key = Command::new(program).arg("generate-key").output().expect("a key").stdout;
    fs::write(dir.join("key"), key).expect("a key");
    fs::set_permissions(dir.join("key"), std::os::unix::fs::PermissionsExt::from_mode(0o600)).expect("a mode");
    let mut config = format!(
        "storage: {{file: {0}/store}}\nencryption: {{master_key: {0}/key}}\naudit: {{file: {0}/audit}}\n\
         admin: {{socket: {0}/socket}}\nhealth: {{port: 0}}\ngrants:\n",
        dir.display()
    );
    for number in 0..workloads {
        let _ = writeln!(config, "- {{principal: workload:w{number}, operations: [get]}}");
    }
    config += "deliveries:\n";
    for number in 0..workloads {
        let _ = writeln!(
            config,
            "- {{workload: w{number}, directory: {}/w{number}, files: [{{name: own, secret: own/{number}}}, {{name: all, secret: all}}]}}",
            files.display()
        );
    }
    fs::write(dir.join("config"), config).expect("a configuration");
    let mut command = Command::new(program);
    command.arg("--config").arg(dir.join("config")).stdout(Stdio::piped()).env_clear();
    let mut child = Running(command.spawn().expect("the vault"));
    let log = BufReader::new(child.0.stdout.take().expect("a log"));
    let mut lines = log.lines().map_while(Result::ok);
    assert!(lines.any(|line| line.contains("dockflare-vault started")), "it did not start");
    std::thread::spawn(move || lines.for_each(drop));

    let socket = dir.join("socket");
    let set = |name: &str, value: &str| {
        let value = STANDARD.encode(value);
        let request = format!("{{\"operation\":\"set\",\"name\":\"{name}\",\"value_base64\":\"{value}\"}}\n");
        let mut stream = UnixStream::connect(&socket).expect("the socket");
        stream.write_all(request.as_bytes()).expect("a request");
        // Leave the answer unread: the caller waits for the file meanwhile.
        stream
    };
    for number in 0..workloads {
        done(set(&format!("own/{number}"), "first"));
    }
    done(set("all", "first"));
    for number in 0..workloads {
        seen(&files.join(format!("w{number}/all")), "first");
    }
    let (mut times, mut stored) = (vec![], vec![]);
    for change in 0..CHANGES {
        let number = change * 7919 % workloads;
        let (value, began) = (format!("change {change}"), Instant::now());
        let stream = set(&format!("own/{number}"), &value);
        // Read the answer on its own thread, so that neither wait delays the other.
        let answer = std::thread::spawn(move || {
            done(stream);
            began.elapsed()
        });
        seen(&files.join(format!("w{number}/own")), &value);
        times.push(began.elapsed());
        stored.push(answer.join().expect("an answer"));
    }
    let began = Instant::now();
    let stream = set("all", "second");
    for number in 0..workloads {
        seen(&files.join(format!("w{number}/all")), "second");
    }
    let all = began.elapsed();
    done(stream);
    row("dockflare-vault", workloads, times, stored, all, child.resident());
}

const PORT: u16 = 18_231;

/// Sends one request to the server, which answers with 200 or 204.
fn put(path: &str, body: &str) {
    let mut stream = TcpStream::connect(("127.0.0.1", PORT)).expect("the server");
    let request = format!(
        "POST /v1/{path} HTTP/1.1\r\nHost: localhost\r\nX-Vault-Token: root\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(request.as_bytes()).expect("a request");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("an answer");
    assert!(answer.starts_with("HTTP/1.1 20"), "{answer}");
}

fn theirs(bao: &str, workloads: usize) {
    let (dir, files) = (tempfile::tempdir().expect("a folder"), memory());
    let (dir, files) = (dir.path(), files.path());
    let quiet = |command: &mut Command| {
        command.stdout(Stdio::null()).stderr(Stdio::null()).env("HOME", dir);
        Running(command.spawn().expect("the program"))
    };
    let address = format!("127.0.0.1:{PORT}");
    let server = quiet(
        Command::new(bao)
            .args(["server", "-dev", "-dev-root-token-id=root"])
            .arg(format!("-dev-listen-address={address}")),
    );
    let began = Instant::now();
    while TcpStream::connect(&address).is_err() {
        assert!(began.elapsed() < Duration::from_secs(60), "no server");
        std::thread::sleep(Duration::from_millis(50));
    }
    std::thread::sleep(Duration::from_secs(2));
    let set = |name: &str, value: &str| {
        put(&format!("secret/data/{name}"), &format!("{{\"data\":{{\"value\":\"{value}\"}}}}"))
    };
    for number in 0..workloads {
        set(&format!("own/{number}"), "first");
    }
    set("all", "first");
    fs::write(dir.join("token"), "root").expect("a token");
    let mut config = format!(
        "vault {{\n  address = \"http://{address}\"\n}}\n\
         auto_auth {{\n  method \"token_file\" {{\n    config = {{\n      token_file_path = \"{}/token\"\n    }}\n  }}\n}}\n\
         template_config {{\n  static_secret_render_interval = \"1s\"\n}}\n",
        dir.display()
    );
    for number in 0..workloads {
        fs::create_dir(files.join(format!("w{number}"))).expect("a folder");
        for (file, secret) in [("own", format!("own/{number}")), ("all", "all".to_owned())] {
            let _ = writeln!(
                config,
                "template {{\n  contents = \"{{{{ with secret \\\"secret/data/{secret}\\\" }}}}{{{{ .Data.data.value }}}}{{{{ end }}}}\"\n  destination = \"{}/w{number}/{file}\"\n}}",
                files.display()
            );
        }
    }
    fs::write(dir.join("agent.hcl"), config).expect("a configuration");
    let agent = quiet(Command::new(bao).arg("agent").arg(format!("-config={}/agent.hcl", dir.display())));
    for number in 0..workloads {
        seen(&files.join(format!("w{number}/all")), "first");
        seen(&files.join(format!("w{number}/own")), "first");
    }
    let (mut times, mut stored) = (vec![], vec![]);
    for change in 0..SLOW_CHANGES {
        let number = change * 7919 % workloads;
        let (value, began) = (format!("change {change}"), Instant::now());
        set(&format!("own/{number}"), &value);
        stored.push(began.elapsed());
        seen(&files.join(format!("w{number}/own")), &value);
        times.push(began.elapsed());
    }
    let began = Instant::now();
    set("all", "second");
    for number in 0..workloads {
        seen(&files.join(format!("w{number}/all")), "second");
    }
    row("OpenBao agent", workloads, times, stored, began.elapsed(), agent.resident());
    println!("| (its server) | | | | | | | {} MB |", server.resident() / 1024);
}
