//! Runs the agent, or any other program of the workspace, as a process on this host.

use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout_at};

use crate::runner;

/// A running program, its log, and the secrets that must not appear in that log.
///
/// Dropping it kills the program and shows the log if the test fails. If the log holds a planted secret, the drop
/// panics and so fails the test.
pub struct AgentProcess {
    name: String,
    child: Child,
    log: Arc<Log>,
    /// Disconnects when standard output and standard error have both ended.
    reading: Receiver<()>,
    secrets: Vec<String>,
}

/// The lines of both outputs, in order of arrival.
struct Log {
    lines: Mutex<Vec<String>>,
    /// The number of lines; each new line wakes the waiting callers.
    count: watch::Sender<usize>,
}

impl AgentProcess {
    /// Starts `binary` in the folder `cwd` with exactly this environment, inheriting none of ours.
    ///
    /// # Errors
    /// When the program cannot be started.
    pub fn spawn(binary: &Path, env: &[(String, String)], cwd: &Path) -> Result<Self> {
        Self::spawn_with(binary, &[], env, cwd)
    }

    /// Like [`AgentProcess::spawn`], with arguments.
    ///
    /// # Errors
    /// When the program cannot be started.
    pub fn spawn_with(binary: &Path, args: &[&str], env: &[(String, String)], cwd: &Path) -> Result<Self> {
        let mut child = Command::new(binary)
            .args(args)
            .env_clear()
            .envs(env.iter().map(|(name, value)| (name, value)))
            .current_dir(cwd)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {}", binary.display()))?;
        let log = Arc::new(Log { lines: Mutex::default(), count: watch::Sender::new(0) });
        let (open, reading) = channel();
        if let (Some(stdout), Some(stderr)) = (child.stdout.take(), child.stderr.take()) {
            read_lines(stdout, log.clone(), open.clone());
            read_lines(stderr, log.clone(), open);
        }
        let name = format!("{} (pid {})", binary.file_name().unwrap_or_default().display(), child.id());
        Ok(Self { name, child, log, reading, secrets: Vec::new() })
    }

    /// Forbids `secret` anywhere in the log, in earlier lines too.
    pub fn plant(&mut self, secret: &str) {
        self.secrets.push(secret.to_owned());
    }

    /// Returns the process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Returns the log so far: standard output and error, in order of arrival.
    #[must_use]
    pub fn log(&self) -> String {
        self.log.lines().join("\n")
    }

    /// Returns the number of lines so far, as a mark for [`AgentProcess::wait_for_log_after`].
    #[must_use]
    pub fn mark(&self) -> usize {
        self.log.lines().len()
    }

    /// Waits for a line with this text and returns it. An earlier line counts.
    ///
    /// # Errors
    /// When `limit` passes or the program ends without such a line.
    pub async fn wait_for_log(&self, text: &str, limit: Duration) -> Result<String> {
        self.wait_for_log_after(0, text, limit).await
    }

    /// Like [`AgentProcess::wait_for_log`], but only lines after the mark count.
    ///
    /// # Errors
    /// As for [`AgentProcess::wait_for_log`].
    pub async fn wait_for_log_after(&self, mark: usize, text: &str, limit: Duration) -> Result<String> {
        let deadline = Instant::now() + limit;
        let mut count = self.log.count.subscribe();
        loop {
            count.mark_unchanged();
            // Check this before the log: the log is complete once the outputs have ended.
            let ended = self.reading.try_recv() == Err(std::sync::mpsc::TryRecvError::Disconnected);
            let found = self.log.lines().iter().skip(mark).find(|line| line.contains(text)).cloned();
            match found {
                Some(line) => return Ok(line),
                None if ended => bail!("{} ended without {text:?} in its log", self.name),
                None if Instant::now() >= deadline => bail!("{} logged no {text:?} within {limit:?}", self.name),
                // Wake on a new line, or to check whether the program has ended. The deadline is checked above.
                None => drop(timeout_at(deadline.min(Instant::now() + LOOK_EVERY), count.changed()).await),
            }
        }
    }

    /// Sends SIGTERM.
    ///
    /// # Errors
    /// When the program has ended and been waited for.
    pub fn sigterm(&self) -> Result<()> {
        self.signal(Signal::TERM)
    }

    /// Sends SIGKILL, which ends the program as abruptly as a crash of the host.
    ///
    /// # Errors
    /// When the program has ended and been waited for.
    pub fn sigkill(&self) -> Result<()> {
        self.signal(Signal::KILL)
    }

    /// Sends any signal.
    ///
    /// # Errors
    /// When the program has ended and been waited for.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw).context("no process id")?;
        kill_process(pid, signal).with_context(|| format!("cannot signal {}", self.name))
    }

    /// Whether the program is still running.
    ///
    /// # Errors
    /// When the system cannot tell.
    pub fn is_running(&mut self) -> Result<bool> {
        Ok(self.child.try_wait()?.is_none())
    }

    /// Waits for the program to end and for the rest of its log.
    ///
    /// # Errors
    /// When `limit` passes first.
    pub async fn wait_exit(&mut self, limit: Duration) -> Result<ExitStatus> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(status) = self.child.try_wait()? {
                self.finish_reading();
                return Ok(status);
            }
            if Instant::now() >= deadline {
                bail!("{} still runs after {limit:?}", self.name);
            }
            sleep(LOOK_EVERY).await;
        }
    }

    /// Waits at most 2 s for the rest of the log: a process that inherited the pipe could keep it open forever.
    fn finish_reading(&self) {
        let ended = self.reading.recv_timeout(Duration::from_secs(2));
        debug_assert!(matches!(ended, Err(RecvTimeoutError::Disconnected | RecvTimeoutError::Timeout)));
    }
}

/// The pause between two checks for what the system does not announce by itself.
const LOOK_EVERY: Duration = Duration::from_millis(20);

impl Log {
    fn lines(&self) -> std::sync::MutexGuard<'_, Vec<String>> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Reads `output` to its end on a separate thread, which then drops `open`.
fn read_lines(output: impl Read + Send + 'static, log: Arc<Log>, open: Sender<()>) {
    std::thread::spawn(move || {
        let mut output = BufReader::new(output);
        let mut line = Vec::new();
        // Not `lines()`: invalid UTF-8 would end the reading, and the full pipe would then block the program.
        while output.read_until(b'\n', &mut line).is_ok_and(|length| length > 0) {
            log.lines().push(String::from_utf8_lossy(&line).trim_end().to_owned());
            log.count.send_modify(|count| *count += 1);
            line.clear();
        }
        drop(open);
    });
}

impl Drop for AgentProcess {
    fn drop(&mut self) {
        // Ignore errors: the program may have ended already.
        drop(self.child.kill());
        drop(self.child.wait());
        self.finish_reading();
        let log = self.log();
        let told = told_secrets(&log, &self.secrets);
        runner::note(&self.name, &log);
        if !told.is_empty() && !std::thread::panicking() {
            panic!("{} wrote a secret to its log:\n{told}", self.name);
        }
    }
}

/// The start of every tunnel token: base64 of `{"`. It finds tokens that a master makes up without planting them.
const TOKEN_START: &str = "eyJ";

/// Returns the lines that hold a secret, with a placeholder instead of the secret.
fn told_secrets(log: &str, secrets: &[String]) -> String {
    let mut told = String::new();
    for line in log.lines() {
        let mut words = line.split(|c: char| !c.is_ascii_alphanumeric());
        if let Some(token) = words.find(|word| word.len() > 30 && word.starts_with(TOKEN_START)) {
            _ = writeln!(told, "{}", line.replace(token, "<A TOKEN>"));
        }
        if let Some(secret) = secrets.iter().find(|secret| !secret.is_empty() && line.contains(secret.as_str())) {
            // Writing to a `String` does not fail.
            _ = writeln!(told, "{}", line.replace(secret.as_str(), "<THE SECRET>"));
        }
    }
    told
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_secs(10);

    fn shell(script: &str) -> AgentProcess {
        let env = [("PATH".to_owned(), std::env::var("PATH").unwrap())];
        AgentProcess::spawn_with(Path::new("/bin/sh"), &["-c", script], &env, Path::new("/")).unwrap()
    }

    #[tokio::test]
    async fn gathers_both_outputs_and_the_exit_code() {
        let mut process = shell("echo out; echo err >&2; exit 3");
        assert_eq!(process.wait_exit(SOON).await.unwrap().code(), Some(3));
        assert!(process.log().contains("out") && process.log().contains("err"));
        assert_eq!(process.wait_for_log("err", SOON).await.unwrap(), "err");
        assert!(process.wait_for_log("never", SOON).await.is_err());
        assert!(process.wait_for_log_after(process.mark(), "out", SOON).await.is_err());
    }

    #[tokio::test]
    async fn has_only_the_environment_it_was_given() {
        let mut process = shell("env | cut -d= -f1 | sort | tr '\\n' ' '");
        process.wait_exit(SOON).await.unwrap();
        assert!(!process.log().contains("CARGO"), "{}", process.log());
    }

    #[tokio::test]
    async fn passes_signals_on() {
        let mut process = shell("trap 'echo asked; exit 7' TERM; echo ready; while :; do sleep 0.01; done");
        process.wait_for_log("ready", SOON).await.unwrap();
        assert!(process.is_running().unwrap());
        process.sigterm().unwrap();
        assert_eq!(process.wait_exit(SOON).await.unwrap().code(), Some(7));
    }

    #[test]
    #[should_panic(expected = "token=<THE SECRET>")]
    fn a_secret_in_the_log_fails_the_test_without_repeating_it() {
        let mut process = shell("echo token=hunter2; echo done");
        process.plant("hunter2");
        process.child.wait().unwrap();
        process.finish_reading();
    }

    #[test]
    fn a_tunnel_token_is_recognised_without_being_planted() {
        let token = crate::token("tunnel", "");
        for line in [format!("TUNNEL_TOKEN={token}"), format!("{{\"token\":\"{token}\"}}")] {
            let told = told_secrets(&line, &[]);
            assert!(told.contains("<A TOKEN>") && !told.contains(&token), "{told}");
        }
        assert_eq!(told_secrets("data=/tmp/.tmpeyJ0 master=http://127.0.0.1:1/ nothing to see in this line", &[]), "");
    }
}
