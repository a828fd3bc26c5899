//! `cargo xtask test`: every check, one after the other; a failure does not keep the later ones from running.
//!
//! The last line is `N passed, N failed, N skipped`. These are tests; a step that fails without a failed test
//! to show for it (formatting, lints, a test program that crashed, something left behind) counts as one failed,
//! so that the line tells a bad run from a good one.

use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use testkit::SWEPT;

mod tally;
use tally::Tally;

/// Longest wait for the engine's answer.
const PING_LIMIT: Duration = Duration::from_secs(10);

/// What has been found so far.
#[derive(Default)]
struct Report {
    tally: Tally,
    /// One sentence for each step that failed.
    problems: Vec<String>,
    /// The steps' names and how long they took.
    times: Vec<(&'static str, Duration)>,
}

/// Runs all, and prints what came of it.
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
        // The sum tells it already.
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

    /// Whether there is a Docker Engine. What a killed run left is removed, so that it does not count
    /// against this one.
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

    /// Ends with the line of sums.
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

/// Unit tests, integration tests on the engine, documentation tests. Adds up what they print while it is
/// printed; `left` is what one test program found that another had left.
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

/// Copies line by line, and shows each to `look`.
fn pass_on(from: Option<impl Read>, mut to: impl Write, mut look: impl FnMut(&str)) {
    let Some(from) = from else { return };
    let mut from = BufReader::new(from);
    let mut line = Vec::new();
    // Not `lines()`: what is no UTF-8 would end it, and then block cargo.
    while from.read_until(b'\n', &mut line).is_ok_and(|length| length > 0) {
        // Nobody may be listening any more; the tests run on all the same.
        drop(to.write_all(&line).and_then(|()| to.flush()));
        look(String::from_utf8_lossy(&line).trim_end());
        line.clear();
    }
}

fn swept(line: &str) -> Option<String> {
    Some(line.strip_prefix(SWEPT)?.to_owned())
}

/// All the test programs have ended: what is there with their labels should not be. `left` was found earlier.
fn leftovers(mut left: Vec<String>) -> Result<()> {
    left.extend(on_engine(async |docker| testkit::sweep(&docker).await)?);
    ensure!(left.is_empty(), "the tests did not remove (it is removed now): {}", left.join(", "));
    println!("no container, network, volume or image");
    Ok(())
}

/// Runs something on the engine, if it answers.
fn on_engine<T>(work: impl AsyncFnOnce(testkit::Docker) -> Result<T>) -> Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let docker = testkit::docker()?;
        tokio::time::timeout(PING_LIMIT, docker.ping()).await.context("no answer to a ping")??;
        work(docker).await
    })
}
