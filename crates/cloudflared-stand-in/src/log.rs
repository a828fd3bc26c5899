//! Lines in cloudflared's format, on standard error.

use std::fmt;

use jiff::Timestamp;

/// How bad it is.
#[derive(Debug, Clone, Copy)]
pub enum Level {
    /// `INF`
    Info,
    /// `WRN`
    Warn,
    /// `ERR`
    Error,
}

/// The log. Never given a token, and so never shows one.
#[derive(Debug, Clone, Copy, Default)]
pub struct Log {
    json: bool,
}

impl Log {
    /// A log in text (`2025-09-01T10:00:00Z INF message key=value`) or in JSON.
    #[must_use]
    pub fn new(json: bool) -> Self {
        Self { json }
    }

    /// One line with a message alone.
    pub fn say(self, level: Level, message: impl fmt::Display) {
        self.line(level, message, &[]);
    }

    /// One line with fields after the message.
    pub fn line(self, level: Level, message: impl fmt::Display, fields: &[(&str, &dyn fmt::Display)]) {
        let time = Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
        let line = if self.json { json(level, &time, &message, fields) } else { text(level, &time, &message, fields) };
        eprintln!("{line}");
    }
}

fn text(level: Level, time: &str, message: &dyn fmt::Display, fields: &[(&str, &dyn fmt::Display)]) -> String {
    let level = match level {
        Level::Info => "INF",
        Level::Warn => "WRN",
        Level::Error => "ERR",
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
        Level::Info => "info",
        Level::Warn => "warn",
        Level::Error => "error",
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
    fn json_lines_carry_the_same_facts() {
        let line = json(Level::Info, "2025-09-01T10:00:00Z", &"Starting tunnel", &[("tunnelID", &"t-1")]);
        let line: serde_json::Value = serde_json::from_str(&line).expect("json");
        assert_eq!(line["level"], "info");
        assert_eq!(line["message"], "Starting tunnel");
        assert_eq!(line["tunnelID"], "t-1");
    }
}
