//! Writes recorded lines to standard error, with this process's own values in place of the recorded ones.

use std::fmt;

use anyhow::{Result, bail};
use jiff::Timestamp;

/// The level of a line.
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
    /// `FTL`: never logged here, but `TUNNEL_LOGLEVEL` may ask for nothing below it.
    Fatal,
}

impl Level {
    /// Parses the value of `TUNNEL_LOGLEVEL`.
    ///
    /// # Errors
    /// When it is not one of the original's levels.
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

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Debug => "DBG",
            Self::Info => "INF",
            Self::Warn => "WRN",
            Self::Error => "ERR",
            Self::Fatal => "FTL",
        })
    }
}

/// The log. It is never given a token, so it cannot show one.
#[derive(Debug, Clone, Copy, Default)]
pub struct Log {
    least: Level,
}

impl Log {
    /// A log that drops lines below `least`.
    #[must_use]
    pub fn new(least: Level) -> Self {
        Self { least }
    }

    /// Writes one line.
    pub fn say(self, level: Level, message: impl fmt::Display) {
        if level >= self.least {
            eprintln!("{} {level} {message}", Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ"));
        }
    }

    /// Writes a line without time and level, like the original's last words.
    pub fn bare(self, message: impl fmt::Display) {
        eprintln!("{message}");
    }
}

/// Replaces each `{name}` in the text by its value. Braces around other names stay.
#[must_use]
pub fn fill(text: &str, values: &[(&str, &str)]) -> String {
    let mut filled = text.to_owned();
    for (name, value) in values {
        filled = filled.replace(&format!("{{{name}}}"), value);
    }
    filled
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fills_in_what_it_knows_and_leaves_other_braces() {
        let text = r#"Updated config="{\"a\": 1}" version={config} ip={edge1}"#;
        let filled = fill(text, &[("config", "7"), ("edge1", "198.41.192.7")]);
        assert_eq!(filled, r#"Updated config="{\"a\": 1}" version=7 ip=198.41.192.7"#);
    }

    #[test]
    fn a_level_shows_itself_and_what_is_worse() {
        assert!(Level::parse("debug").expect("debug") < Level::default());
        assert_eq!(Level::parse("info").expect("info"), Level::default());
        assert!(Level::Warn < Level::Error && Level::Error < Level::parse("fatal").expect("fatal"));
        assert!(Level::parse("loud").is_err());
    }
}
