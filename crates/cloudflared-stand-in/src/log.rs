//! Lines in cloudflared's format, on standard error.

use std::fmt;

use anyhow::{Result, bail};
use jiff::Timestamp;

/// How bad it is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// `DBG`
    Debug,
    /// `INF`
    #[default]
    Info,
    /// `WRN`
    Warn,
    /// `ERR`
    Error,
    /// `FTL`: never said here, but a log may show nothing less.
    Fatal,
}

impl Level {
    /// What `TUNNEL_LOGLEVEL` says.
    ///
    /// # Errors
    /// When it is none of the original's levels.
    pub fn parse(text: &str) -> Result<Self> {
        Ok(match text {
            "debug" => Self::Debug,
            "info" => Self::Info,
            "warn" => Self::Warn,
            "error" => Self::Error,
            "fatal" => Self::Fatal,
            other => bail!("not a valid log level: {other:?}"),
        })
    }
}

/// The log. Never given a token, and so never shows one.
#[derive(Debug, Clone, Copy, Default)]
pub struct Log {
    json: bool,
    least: Level,
}

impl Log {
    /// A log in text (`2025-09-01T10:00:00Z INF message key=value`) or in JSON, without the lines that
    /// are less than `least`.
    #[must_use]
    pub fn new(json: bool, least: Level) -> Self {
        Self { json, least }
    }

    /// One line with a message alone.
    pub fn say(self, level: Level, message: impl fmt::Display) {
        self.line(level, message, &[]);
    }

    /// One line with fields after the message.
    pub fn line(self, level: Level, message: impl fmt::Display, fields: &[(&str, &dyn fmt::Display)]) {
        if level < self.least {
            return;
        }
        let time = Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
        let line = if self.json { json(level, &time, &message, fields) } else { text(level, &time, &message, fields) };
        eprintln!("{line}");
    }
}

fn text(level: Level, time: &str, message: &dyn fmt::Display, fields: &[(&str, &dyn fmt::Display)]) -> String {
    let level = match level {
        Level::Debug => "DBG",
        Level::Info => "INF",
        Level::Warn => "WRN",
        Level::Error => "ERR",
        Level::Fatal => "FTL",
    };
    let mut line = format!("{time} {level} {message}");
    for (name, value) in fields {
        let value = value.to_string();
        if value.contains([' ', '"', '=']) {
            line.push_str(&format!(" {name}={value:?}"));
        } else {
            line.push_str(&format!(" {name}={value}"));
        }
    }
    line
}

fn json(level: Level, time: &str, message: &dyn fmt::Display, fields: &[(&str, &dyn fmt::Display)]) -> String {
    let level = match level {
        Level::Debug => "debug",
        Level::Info => "info",
        Level::Warn => "warn",
        Level::Error => "error",
        Level::Fatal => "fatal",
    };
    let mut line = serde_json::Map::new();
    line.insert("level".into(), level.into());
    for (name, value) in fields {
        line.insert((*name).into(), value.to_string().into());
    }
    line.insert("time".into(), time.into());
    line.insert("message".into(), message.to_string().into());
    serde_json::Value::Object(line).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quotes_a_value_only_where_it_has_to() {
        let fields: [(&str, &dyn fmt::Display); 2] = [("connIndex", &0), ("error", &"Unauthorized: Tunnel not found")];
        let line = text(Level::Error, "2025-09-01T10:00:00Z", &"Register tunnel error", &fields);
        assert_eq!(
            line,
            r#"2025-09-01T10:00:00Z ERR Register tunnel error connIndex=0 error="Unauthorized: Tunnel not found""#
        );
    }

    #[test]
    fn a_level_shows_itself_and_what_is_worse() {
        assert!(Level::parse("debug").expect("debug") < Level::default());
        assert_eq!(Level::parse("info").expect("info"), Level::default());
        assert!(Level::Warn < Level::Error && Level::Error < Level::parse("fatal").expect("fatal"));
        assert!(Level::parse("loud").is_err());
    }

    #[test]
    fn json_lines_carry_the_same_facts() {
        let line = json(Level::Info, "2025-09-01T10:00:00Z", &"Starting tunnel", &[("tunnelID", &"t-1")]);
        let line: serde_json::Value = serde_json::from_str(&line).expect("json");
        assert_eq!(line["level"], "info");
        assert_eq!(line["message"], "Starting tunnel");
        assert_eq!(line["tunnelID"], "t-1");
    }
}
