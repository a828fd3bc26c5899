//! The log: one line for each record, times in the operator's zone, no colour codes outside a terminal.

use std::fmt;
use std::io::IsTerminal;

use jiff::Timestamp;
use jiff::tz::TimeZone;
use tracing_subscriber::field::MakeExt;
use tracing_subscriber::fmt::format::{Writer, debug_fn};
use tracing_subscriber::fmt::time::FormatTime;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::{SubscriberInitExt, TryInitError};
use tracing_subscriber::{Layer, registry};

use crate::RunError;
use crate::config::{LogConfig, LogFormat};

/// Starts logging to standard output, for the rest of the process.
///
/// The `log` facade is not connected: what the Docker client prints there at its lower levels holds request
/// bodies, the tunnel token in them.
///
/// # Errors
/// When something else in the process logs already.
pub fn start(config: &LogConfig) -> Result<(), TryInitError> {
    let clock = Clock(config.time_zone.clone());
    let lines = tracing_subscriber::fmt::layer().with_target(false).with_timer(clock);
    let layer = match config.format {
        LogFormat::Text => {
            let fields = debug_fn(|writer, field, value| write_field(writer, field.name(), value)).delimited(" ");
            lines.with_ansi(std::io::stdout().is_terminal()).fmt_fields(fields).boxed()
        }
        LogFormat::Json => lines.json().flatten_event(true).with_current_span(false).with_span_list(false).boxed(),
    };
    registry().with(layer.with_filter(config.filter.clone())).try_init()
}

/// Makes a panic anywhere the end of the process, said in one line, with the exit code for a task that ended.
///
/// A task that is gone while the others go on would be the worst of all states: nobody would notice.
pub fn end_on_panic() {
    std::panic::set_hook(Box::new(|panic| {
        let place = panic.location().map(ToString::to_string).unwrap_or_default();
        let text = panic.payload_as_str().unwrap_or("no message");
        tracing::error!(place, "{}: {text}", RunError::Task("that panicked"));
        std::process::exit(RunError::Task("").exit_code().into());
    }));
}

/// `key=value`; quoted only where it would not read as one word.
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
            super::end_on_panic();
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            let task = async { tokio::spawn(async { panic!("a mistake") }).await };
            // Tokio would catch it here, and the others would go on.
            let _ = runtime.block_on(task);
            return;
        }
        // Itself once more, in a process of its own.
        let test = ["--exact", "logging::tests::a_panic_in_a_task_ends_the_process_with_70"];
        let ended = Command::new(std::env::current_exe().unwrap()).args(test).env(ROLE, "1").output().unwrap();
        assert_eq!(ended.status.code(), Some(70), "{ended:?}");
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
