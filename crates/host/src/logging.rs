//! The log: one line for each record, with times in the operator's zone, and colors only on a terminal. The last lines
//! also stay in memory ([`Ring`]), for anyone who asks the running program for them.
//!
//! Logging never waits for the reader of the log. A full pipe drops lines and counts them, and the log reports the
//! count once somebody reads again.

use std::collections::VecDeque;
use std::fmt;
use std::io::{self, IsTerminal};
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use jiff::tz::TimeZone;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::timeout;
use tracing_subscriber::field::MakeExt;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::fmt::format::{Writer, debug_fn};
use tracing_subscriber::fmt::time::FormatTime;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, Registry, registry};

use crate::outlet::{self, Outlet};

mod asked;

pub use asked::{Asked, read};

/// What to log, in which format and time zone.
#[derive(Debug, Clone)]
pub struct LogConfig {
    /// Levels by target. Libraries that print request bodies stay at `info` or less verbose, whatever the setting says.
    pub filter: Targets,
    /// One line of text or one JSON object for each record.
    pub format: LogFormat,
    /// Time zone of the log. Times on the wire are always UTC.
    pub time_zone: TimeZone,
}

/// Format of a log record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// `2026-01-31T10:00:00+01:00  INFO sentence key=value`.
    Text,
    /// One JSON object per line.
    Json,
}

/// Lines kept in memory.
const KEPT_LINES: usize = 200;
/// Longest kept line in bytes; the rest is cut off. Most lines have a tenth of that.
const KEPT_BYTES: usize = 2000;

/// The last 200 lines of the log, shared by all clones.
#[derive(Debug, Clone, Default)]
pub struct Ring(Arc<Mutex<VecDeque<String>>>);

impl Ring {
    /// The lines, oldest first, each cut to 2000 bytes.
    pub fn lines(&self) -> Vec<String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).iter().cloned().collect()
    }
}

impl io::Write for Ring {
    /// Takes whole lines: each call writes one record.
    fn write(&mut self, record: &[u8]) -> io::Result<usize> {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for line in String::from_utf8_lossy(record).lines() {
            if kept.len() == KEPT_LINES {
                kept.pop_front();
            }
            kept.push_back(line[..line.floor_char_boundary(KEPT_BYTES)].to_owned());
        }
        Ok(record.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The outlet to standard output, for [`flush`].
static OUTLET: OnceLock<Outlet> = OnceLock::new();
/// How long a program that ends waits for the reader of the log.
const FLUSH_LIMIT: Duration = Duration::from_secs(1);
/// How long to wait for a reader of standard error. The text fits into any pipe that is being read.
const ERROR_LIMIT: Duration = Duration::from_secs(5);

/// Starts logging to standard output and into the ring, for the rest of the process.
///
/// The `log` facade is not connected: at its lower levels, the Docker client prints request bodies there, and with them
/// the tunnel token.
///
/// # Errors
/// When something else in the process already logs, or the system starts no thread.
pub fn start(config: &LogConfig) -> io::Result<Ring> {
    let ring = Ring::default();
    let kept = ring.clone();
    // Bypasses the standard library's buffer, which two writers would share under a lock.
    let stdout = std::fs::File::from(io::stdout().as_fd().try_clone_to_owned()?);
    let outlet = Outlet::start(stdout, |lines| {
        tracing::error!(lines, "log lines were dropped here, since nobody read the log in time");
    })?;
    let to = OUTLET.get_or_init(|| outlet);
    let layers =
        vec![layer(config, io::stdout().is_terminal(), || to.clone()), layer(config, false, move || kept.clone())];
    registry().with(layers.with_filter(config.filter.clone())).try_init().map_err(io::Error::other)?;
    Ok(ring)
}

/// Waits until the log is written, for 1 s at most. Call it before the process ends.
pub fn flush() {
    if let Some(outlet) = OUTLET.get() {
        outlet.flush(FLUSH_LIMIT);
    }
}

/// Prints the output of a subcommand, and waits for its reader until asked to stop.
pub async fn print(text: &str) {
    let written = outlet::hand_over(io::stdout, text);
    match (signal(SignalKind::terminate()), signal(SignalKind::interrupt())) {
        (Ok(mut term), Ok(mut int)) => {
            tokio::select! { _ = written => {}, _ = term.recv() => {}, _ = int.recv() => {} }
        }
        _ => drop(written.await),
    }
}

/// Prints on standard error why a program ends, and waits for its reader for 5 s at most.
pub async fn print_error(text: &str) {
    let _ = timeout(ERROR_LIMIT, outlet::hand_over(io::stderr, text)).await;
}

type AnyLayer = Box<dyn Layer<Registry> + Send + Sync>;

fn layer(config: &LogConfig, colours: bool, to: impl for<'w> MakeWriter<'w> + Send + Sync + 'static) -> AnyLayer {
    let clock = Clock(config.time_zone.clone());
    let lines = tracing_subscriber::fmt::layer().with_target(false).with_timer(clock).with_writer(to);
    match config.format {
        LogFormat::Text => {
            let fields = debug_fn(|writer, field, value| write_field(writer, field.name(), value)).delimited(" ");
            lines.with_ansi(colours).fmt_fields(fields).boxed()
        }
        LogFormat::Json => lines.json().flatten_event(true).with_current_span(false).with_span_list(false).boxed(),
    }
}

/// Makes any panic end the process with this exit code, after one log line that begins with `what`.
///
/// A task that dies while the others go on would be the worst case: nobody would notice.
pub fn end_on_panic(what: String, exit_code: u8) {
    std::panic::set_hook(Box::new(move |panic| {
        let place = panic.location().map(ToString::to_string).unwrap_or_default();
        let text = panic.payload_as_str().unwrap_or("no message");
        // The runtime's message when the system refuses a thread.
        if text.contains("can't spawn worker thread") {
            tracing::error!("{NO_THREAD} ({text})");
        } else {
            tracing::error!(place, "{what}: {text}");
        }
        flush();
        std::process::exit(exit_code.into());
    }));
}

/// The remedy when the system starts no thread. `nproc` counts everything that a user runs on the host, in all
/// containers.
pub const NO_THREAD: &str = "the system starts no further thread: raise the limit on processes of this container (--ulimit nproc, --pids-limit), or run it as a user of its own";

/// Writes `key=value`, quoted only where it would not read as one word.
fn write_field(writer: &mut Writer<'_>, name: &str, value: &dyn fmt::Debug) -> fmt::Result {
    if name == "message" {
        return write!(writer, "{value:?}");
    }
    let text = format!("{value:?}");
    let word = text.strip_prefix('"').and_then(|text| text.strip_suffix('"'));
    match word.filter(|word| !word.is_empty() && !word.contains([' ', '"', '=', '\\'])) {
        Some(word) => write!(writer, "{name}={word}"),
        None => write!(writer, "{name}={text}"),
    }
}

/// RFC 3339 with milliseconds and the zone's offset.
struct Clock(TimeZone);

impl FormatTime for Clock {
    fn format_time(&self, writer: &mut Writer<'_>) -> fmt::Result {
        let now = Timestamp::now().to_zoned(self.0.clone());
        write!(writer, "{}", now.strftime("%Y-%m-%dT%H:%M:%S%.3f%:z"))
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    #[test]
    fn a_panic_in_a_task_ends_the_process_with_70() {
        const ROLE: &str = "DOCKFLARE_TEST_PANICS";
        if std::env::var_os(ROLE).is_some() {
            super::end_on_panic("a task panicked".to_owned(), 70);
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            let task = async { tokio::spawn(async { panic!("a mistake") }).await };
            // Tokio would catch it here, and the others would go on.
            let _ = runtime.block_on(task);
            return;
        }
        // Runs this test again in its own process.
        let test = ["--exact", "logging::tests::a_panic_in_a_task_ends_the_process_with_70"];
        let ended = Command::new(std::env::current_exe().unwrap()).args(test).env(ROLE, "1").output().unwrap();
        assert_eq!(ended.status.code(), Some(70), "{ended:?}");
    }

    #[test]
    fn the_ring_keeps_the_last_lines_and_not_all_of_a_long_one() {
        use std::io::Write;
        let mut ring = super::Ring::default();
        for number in 0..250 {
            ring.write_all(format!("line {number}\n").as_bytes()).unwrap();
        }
        let lines = ring.lines();
        assert_eq!((lines.len(), lines[0].as_str(), lines[199].as_str()), (200, "line 50", "line 249"));
        ring.write_all("ä".repeat(5000).as_bytes()).unwrap();
        assert_eq!(ring.lines()[199].len(), super::KEPT_BYTES);
    }

    #[test]
    fn words_are_not_quoted_and_everything_else_is() {
        let written = |value: &dyn std::fmt::Debug| {
            let mut text = String::new();
            let mut writer = tracing_subscriber::fmt::format::Writer::new(&mut text);
            super::write_field(&mut writer, "name", value).unwrap();
            text
        };
        assert_eq!(written(&"edge-1"), "name=edge-1");
        assert_eq!(written(&4), "name=4");
        assert_eq!(written(&"two words"), "name=\"two words\"");
        assert_eq!(written(&"line\nbreak"), "name=\"line\\nbreak\"");
        assert_eq!(written(&""), "name=\"\"");
    }
}
