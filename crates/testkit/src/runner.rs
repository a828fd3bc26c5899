//! Runs cases, each on its own thread and runtime with a time limit, and reports them as `cargo test` does.

use std::any::Any;
use std::cell::RefCell;
use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::process::ExitCode;
use std::sync::mpsc;
use std::time::Duration;

use anyhow::{Context, Result};
use libtest_mimic::{Arguments, Failed, Trial};

use crate::cleanup;
use crate::engine::{docker, in_ci};

/// The default time limit of a case: several times what the slowest case takes.
const TIME_LIMIT: Duration = Duration::from_secs(180);
/// How long a case that overran may take to clean up.
const GRACE: Duration = Duration::from_secs(60);
/// How many cases run at once. Cases mostly wait for Docker, so this may exceed the number of cores.
const THREADS: usize = 4;

/// The prefix of each line on standard error that names an object which a dead process left and the start of this run
/// removed.
pub const SWEPT: &str = "testkit: swept ";

type Body = Box<dyn FnOnce() -> Pin<Box<dyn Future<Output = Result<()>>>> + Send>;

/// One test.
pub struct Case {
    name: String,
    limit: Duration,
    missing: Option<String>,
    /// Whether a missing requirement fails the case with `CI=true`.
    required: bool,
    body: Body,
}

/// Makes a test named `name`. [`cases!`](crate::cases) makes tests from functions.
pub fn case<F, Fut>(name: impl Into<String>, body: F) -> Case
where
    F: FnOnce() -> Fut + Send + 'static,
    Fut: Future<Output = Result<()>> + 'static,
{
    Case {
        name: name.into(),
        limit: TIME_LIMIT,
        missing: None,
        required: true,
        body: Box::new(move || Box::pin(body())),
    }
}

impl Case {
    /// Sets another time limit than 180 s. The runner starts the cases with the longest limits first.
    #[must_use]
    pub fn limit(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// Names what is `missing` for the case to run, if anything. The case is then reported as if there were no engine.
    #[must_use]
    pub fn without(mut self, missing: Option<String>) -> Self {
        self.missing = missing;
        self
    }

    /// Like [`Case::without`], but ignored with `CI=true` too: not every machine can provide what is missing.
    #[must_use]
    pub fn where_there_is(mut self, missing: Option<String>) -> Self {
        (self.missing, self.required) = (missing, false);
        self
    }
}

/// Makes cases from functions of the form `async fn() -> anyhow::Result<()>`, named after the functions.
#[macro_export]
macro_rules! cases {
    ($($function:path),* $(,)?) => {
        vec![$($crate::case(stringify!($function), $function)),*]
    };
}

/// Runs the cases with libtest's options, and ends with libtest's last line.
///
/// Without an engine it ignores all cases; with `CI=true` they fail. Before the cases it sweeps what dead processes
/// left and builds the `cloudflared` stand-in. After them it removes this process's images.
#[must_use]
pub fn main(cases: Vec<Case>) -> ExitCode {
    let mut arguments = Arguments::from_args();
    arguments.test_threads.get_or_insert(THREADS);
    if arguments.list {
        let trials = cases.into_iter().map(|case| Trial::test(case.name, || Ok(()))).collect();
        return libtest_mimic::run(&arguments, trials).exit_code();
    }
    let engine = cleanup::block_on(prepare());
    if let Err(error) = &engine {
        eprintln!("testkit: no Docker Engine: {error:#}");
    }
    // Start the longest first: a long case that starts last would delay the end of the run.
    let mut cases = cases;
    cases.sort_by_key(|case| std::cmp::Reverse(case.limit));
    let trials = cases.into_iter().map(|case| trial(case, engine.as_ref().err())).collect();
    let conclusion = libtest_mimic::run(&arguments, trials);
    let cleaned = if engine.is_ok() { cleanup::clean_up() } else { Ok(()) };
    if let Err(error) = cleaned {
        eprintln!("testkit: may have left something behind: {error:#}");
        return ExitCode::FAILURE;
    }
    conclusion.exit_code()
}

/// Sweeps and builds the stand-in. Fails only if there is no engine.
async fn prepare() -> Result<()> {
    let docker = docker()?;
    tokio::time::timeout(Duration::from_secs(10), docker.ping()).await.context("it does not answer")??;
    match cleanup::sweep(&docker).await {
        // `cargo xtask test` searches for this prefix.
        Ok(swept) => swept.iter().for_each(|thing| eprintln!("{SWEPT}{thing}")),
        Err(error) => eprintln!("testkit: cannot sweep: {error:#}"),
    }
    // Build it here, so that a cold build does not count against a case. The case that needs it reports the error.
    drop(crate::binary("cloudflared"));
    Ok(())
}

fn trial(case: Case, no_engine: Option<&anyhow::Error>) -> Trial {
    let no_engine = no_engine.map(|error| format!("no Docker Engine: {error:#}"));
    let required = no_engine.is_some() || case.required;
    match no_engine.or_else(|| case.missing.clone()) {
        None => Trial::test(case.name.clone(), move || run(case)),
        Some(problem) => {
            let is_skipped = !in_ci() || !required;
            Trial::test(case.name, move || Err(Failed::from(problem))).with_ignored_flag(is_skipped)
        }
    }
}

/// Runs one case on its own thread, so that a case that blocks forever does not block the runner.
fn run(case: Case) -> Result<(), Failed> {
    let (report, reported) = mpsc::channel();
    let Case { name, limit, body, .. } = case;
    let thread = std::thread::Builder::new().name(name.clone());
    let spawned = thread.spawn(move || {
        NOTES.set(Some(Vec::new()));
        let result = catch_unwind(AssertUnwindSafe(|| attempt(limit, body)));
        let result = result.unwrap_or_else(|panic| Err(anyhow::anyhow!("panicked: {}", panic_text(&*panic))));
        let notes = NOTES.take().unwrap_or_default();
        // Ignore the error: without a receiver, the runner has given up on this case.
        drop(report.send(result.map_err(|error| format!("{error:?}\n{}", notes.concat()))));
    });
    spawned.map_err(|error| Failed::from(format!("no thread: {error}")))?;
    match reported.recv_timeout(limit + GRACE) {
        Ok(result) => result.map_err(Failed::from),
        Err(_) => Err(Failed::from(format!("{name} hangs: it blocks its thread beyond {limit:?}"))),
    }
}

fn attempt(limit: Duration, body: Body) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let result = tokio::time::timeout(limit, body()).await;
        result.with_context(|| format!("not done within {limit:?}"))?
    })
}

fn panic_text(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("with something else than text")
}

thread_local! {
    /// The notes to show if this thread's case fails; `None` outside of a case.
    static NOTES: RefCell<Option<Vec<String>>> = const { RefCell::new(None) };
}

/// Keeps a text to show only if the case on this thread fails. Outside of a case, prints it at once if the thread is
/// panicking.
pub fn note(title: &str, text: &str) {
    let note = format!("\n--- {title} ---\n{}\n", text.trim_end());
    let outside = NOTES.with_borrow_mut(|notes| match notes {
        Some(notes) => {
            notes.push(note.clone());
            false
        }
        None => true,
    });
    if outside && std::thread::panicking() {
        eprintln!("{note}");
    }
}

/// Whether a note on this thread can still be shown.
pub(crate) fn wants_notes() -> bool {
    std::thread::panicking() || NOTES.with_borrow(Option::is_some)
}
