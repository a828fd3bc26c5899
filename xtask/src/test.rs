//! `cargo xtask test`: runs every check, one after the other. A failure does not stop the later ones.
//!
//! The last line is `N passed, N failed, N skipped`. It counts tests. A step that fails without a failed test
//! (formatting, lints, a test program that crashed, something left behind) counts as one failure, so that the
//! line tells a bad run from a good one.

use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use testkit::SWEPT;

mod tally;
use tally::Tally;

/// Longest wait for the engine's answer.
const PING_LIMIT: Duration = Duration::from_secs(10);

/// The results so far.
#[derive(Default)]
struct Report {
    tally: Tally,
    /// One sentence for each step that failed.
    problems: Vec<String>,
    /// The steps' names and durations.
    times: Vec<(&'static str, Duration)>,
}

/// Runs all checks, and prints the results.
pub(crate) fn run() -> ExitCode {
    let mut report = Report::default();
    report.step("Format", || done(testkit::cargo().args(["fmt", "--all", "--check"])));
    report.step("Lints", || {
        done(testkit::cargo().args(["clippy", "--workspace", "--all-targets", "--keep-going", "--", "-D", "warnings"]))
    });
    let engine = report.engine();
    let mut tally = Tally::default();
    let mut left = Vec::new();
    report.step("Tests", || {
        let run = tests(&mut tally, &mut left);
        // The totals already show failed tests.
        if tally.failed > 0 { Ok(()) } else { run }
    });
    report.tally = tally;
    if engine {
        report.step("Left behind", || leftovers(left));
    }
    report.step("Documentation", || {
        let mut doc = testkit::cargo();
        done(doc.args(["doc", "--workspace", "--no-deps", "--keep-going"]).env("RUSTDOCFLAGS", "-D warnings"))
    });
    report.print(engine)
}

impl Report {
    /// Runs one step under its heading.
    fn step(&mut self, name: &'static str, work: impl FnOnce() -> Result<()>) {
        println!("\n=== {name} ===");
        let began = Instant::now();
        if let Err(error) = work() {
            let problem = format!("{name}: {error:#}");
            println!("{problem}");
            self.problems.push(problem);
        }
        self.times.push((name, began.elapsed()));
    }

    /// Whether a Docker Engine answers. Removes what a killed run left, so that it does not count against
    /// this one.
    fn engine(&mut self) -> bool {
        let mut answers = true;
        self.step("Docker Engine", || {
            let found = on_engine(async |docker| {
                let version = docker.version().await?.version.unwrap_or_default();
                println!("Docker Engine {version} answers");
                for thing in testkit::sweep(&docker).await? {
                    println!("removed what an earlier run had left: {thing}");
                }
                Ok(())
            });
            answers = found.is_ok();
            match found {
                Err(error) if !testkit::in_ci() => println!("none answers, what needs one is skipped: {error:#}"),
                found => found.context("none answers, and CI=true says there must be one")?,
            }
            Ok(())
        });
        answers
    }

    /// Prints the summary, which ends with the line of totals.
    fn print(&mut self, engine: bool) -> ExitCode {
        println!("\n=== Summary ===");
        for (name, time) in &self.times {
            println!("{:6.1} s  {name}", time.as_secs_f64());
        }
        if !self.tally.skipped_names.is_empty() {
            let why = if engine { "" } else { " for want of a Docker Engine" };
            println!("skipped{why}:");
            self.tally.skipped_names.iter().for_each(|name| println!("  {name}"));
        }
        self.problems.iter().for_each(|problem| println!("FAILED  {problem}"));
        self.tally.failed += self.problems.len() as u64;
        println!("{}", self.tally);
        ExitCode::from(u8::from(self.tally.failed > 0))
    }
}

fn done(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("cannot run {command:?}"))?;
    ensure!(status.success(), "{status}");
    Ok(())
}

/// Runs unit tests, integration tests on the engine and documentation tests. Adds up their output while passing
/// it on. `left` collects what one test program found that another had left.
fn tests(tally: &mut Tally, left: &mut Vec<String>) -> Result<()> {
    let mut command = testkit::cargo();
    command.args(["test", "--workspace", "--no-fail-fast"]).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut cargo = command.spawn().context("cannot run cargo test")?;
    let (stdout, stderr) = (cargo.stdout.take(), cargo.stderr.take());
    std::thread::scope(|threads| {
        threads.spawn(|| pass_on(stderr, std::io::stderr(), |line| left.extend(swept(line))));
        pass_on(stdout, std::io::stdout(), |line| tally.read(line));
    });
    let status = cargo.wait()?;
    ensure!(status.success(), "cargo test: {status}");
    Ok(())
}

/// Copies line by line, and passes each line to `look`.
fn pass_on(from: Option<impl Read>, mut to: impl Write, mut look: impl FnMut(&str)) {
    let Some(from) = from else { return };
    let mut from = BufReader::new(from);
    let mut line = Vec::new();
    // Not `lines()`: invalid UTF-8 would end it, and then block cargo.
    while from.read_until(b'\n', &mut line).is_ok_and(|length| length > 0) {
        // The reader may be gone. The tests go on anyway.
        drop(to.write_all(&line).and_then(|()| to.flush()));
        look(String::from_utf8_lossy(&line).trim_end());
        line.clear();
    }
}

fn swept(line: &str) -> Option<String> {
    Some(line.strip_prefix(SWEPT)?.to_owned())
}

/// Fails if something with the tests' labels is left, because all test programs have ended. `left` was found earlier.
fn leftovers(mut left: Vec<String>) -> Result<()> {
    left.extend(on_engine(async |docker| testkit::sweep(&docker).await)?);
    ensure!(left.is_empty(), "the tests did not remove (it is removed now): {}", left.join(", "));
    println!("no container, network, volume or image");
    Ok(())
}

/// Runs `work` on the engine, if the engine answers.
fn on_engine<T>(work: impl AsyncFnOnce(testkit::Docker) -> Result<T>) -> Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let docker = testkit::docker()?;
        tokio::time::timeout(PING_LIMIT, docker.ping()).await.context("no answer to a ping")??;
        work(docker).await
    })
}
