//! A separate vault in its own folder, and the program that runs in it.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

/// Longest wait for something that takes milliseconds on an idle machine.
pub(crate) const SOON: Duration = Duration::from_secs(30);

pub(crate) struct Scene {
    pub(crate) dir: tempfile::TempDir,
}

impl Scene {
    pub(crate) fn new() -> Self {
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

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn write_key(&self, text: &[u8]) {
        fs::write(self.path("master.key"), text).unwrap();
        fs::set_permissions(self.path("master.key"), std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    }

    pub(crate) fn configure(&self, more: &str) {
        self.configure_with("", "", more);
    }

    /// Writes the configuration with extra settings for the audit, for the encryption, and at the end.
    pub(crate) fn configure_with(&self, audit: &str, encryption: &str, more: &str) {
        let dir = self.dir.path().display();
        let text = format!(
            "storage: {{file: {dir}/data/vault.redb, change_counter: {dir}/other/change}}\n\
             encryption: {{master_key: {dir}/master.key, {encryption}}}\n\
             audit: {{file: {dir}/data/audit.log, {audit}}}\n\
             admin: {{socket: {dir}/run/admin.sock}}\n{more}"
        );
        let health = if more.contains("health:") { "" } else { "health: {port: 0}\n" };
        fs::write(self.path("config.yaml"), text + health).unwrap();
    }

    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_dockflare-vault"));
        command.arg("--config").arg(self.path("config.yaml")).args(arguments).env_clear();
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    pub(crate) fn run(&self, arguments: &[&str], input: &[u8]) -> Output {
        let mut child = self.command(arguments).spawn().unwrap();
        // A command that does not read it may have ended.
        let _ = child.stdin.take().unwrap().write_all(input);
        child.wait_with_output().unwrap()
    }

    /// Runs a command that must succeed. Returns its output.
    pub(crate) fn ok(&self, arguments: &[&str], input: &[u8]) -> Vec<u8> {
        let output = self.run(arguments, input);
        assert_eq!(output.status.code(), Some(0), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        output.stdout
    }

    /// Runs a command that must exit with this code. Returns its standard error.
    pub(crate) fn fails(&self, arguments: &[&str], input: &[u8], code: i32) -> String {
        let output = self.run(arguments, input);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {said}");
        said
    }

    pub(crate) fn start(&self) -> Server {
        let server = self.start_with(&[]);
        server.wait_for("dockflare-vault started");
        server
    }

    pub(crate) fn start_with(&self, variables: &[(&str, &str)]) -> Server {
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

pub(crate) struct Server {
    pub(crate) child: Child,
    pub(crate) log: Receiver<String>,
    pub(crate) seen: std::cell::RefCell<Vec<String>>,
}

impl Server {
    pub(crate) fn wait_for(&self, text: &str) {
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

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn signal(&self, signal: nix::sys::signal::Signal) {
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(self.pid() as i32), signal).unwrap();
    }

    /// Stops the vault with SIGTERM. Returns its exit code and its whole log.
    pub(crate) fn stop(mut self) -> (Option<i32>, String) {
        self.signal(nix::sys::signal::Signal::SIGTERM);
        let code = self.child.wait().unwrap().code();
        let mut seen = self.seen.take();
        seen.extend(self.log.iter());
        (code, seen.join("\n"))
    }

    pub(crate) fn kill(mut self) {
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
