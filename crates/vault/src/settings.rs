//! How the vault logs: `LOG_LEVEL`, `LOG_FORMAT` and `TZ`, as for the agent.

use std::collections::BTreeMap;

use dockflare_host::logging::{LogConfig, LogFormat};
use jiff::tz::TimeZone;
use tracing_subscriber::filter::Targets;

/// Reads them.
///
/// # Errors
/// A line for each that is wrong.
pub fn log(env: &BTreeMap<String, String>) -> Result<LogConfig, Vec<String>> {
    let mut problems = vec![];
    let given = |name: &str| env.get(name).map(|value| value.trim()).filter(|value| !value.is_empty());
    let level = given("LOG_LEVEL").unwrap_or("info");
    let filter = match level.to_ascii_lowercase().as_str() {
        "warning" => "warn".parse(),
        "critical" => "error".parse(),
        word if ["trace", "debug", "info", "warn", "error", "off"].contains(&word) || word.contains('=') => {
            level.parse::<Targets>()
        }
        _ => "=".parse(),
    };
    let filter = filter.unwrap_or_else(|_| {
        problems.push(format!("LOG_LEVEL={level:?} is no level: use DEBUG, INFO, WARNING or ERROR"));
        Targets::new()
    });
    let format = match given("LOG_FORMAT").unwrap_or("text").to_ascii_lowercase().as_str() {
        "text" => LogFormat::Text,
        "json" => LogFormat::Json,
        other => {
            problems.push(format!("LOG_FORMAT={other:?} is neither text nor json"));
            LogFormat::Text
        }
    };
    let zone = given("TZ").unwrap_or("UTC");
    let time_zone = TimeZone::get(zone).unwrap_or_else(|_| {
        problems.push(format!("TZ={zone:?} is no time zone: write one such as Europe/Berlin"));
        TimeZone::UTC
    });
    if problems.is_empty() { Ok(LogConfig { filter, format, time_zone }) } else { Err(problems) }
}
