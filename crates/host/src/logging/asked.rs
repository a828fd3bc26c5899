//! The settings of the log: `LOG_LEVEL`, `LOG_FORMAT` and `TZ`, read the same way for every program.

use jiff::tz::TimeZone;
use tracing::level_filters::LevelFilter;
use tracing_subscriber::filter::Targets;

use super::{LogConfig, LogFormat};
use crate::words;

/// The three values from the environment, without surrounding white space. `None` if a variable is not set.
#[derive(Debug, Clone, Copy, Default)]
pub struct Asked<'a> {
    /// `LOG_LEVEL`.
    pub level: Option<&'a str>,
    /// `LOG_FORMAT`.
    pub format: Option<&'a str>,
    /// `TZ`.
    pub zone: Option<&'a str>,
}

/// Returns the effective settings, with the default in place of each wrong value, and one line for each problem.
/// `program` is the name of its crate, such as `dockflare_agent`.
pub fn read(asked: Asked<'_>, program: &str) -> (LogConfig, Vec<String>) {
    let mut problems = vec![];
    let filter = filter(asked.level.unwrap_or("INFO"), program, &mut problems);
    let format = match asked.format {
        None => LogFormat::Text,
        Some(word) if word.eq_ignore_ascii_case("text") => LogFormat::Text,
        Some(word) if word.eq_ignore_ascii_case("json") => LogFormat::Json,
        Some(word) => {
            problems.push(format!("LOG_FORMAT={word}: must be one of text, json"));
            LogFormat::Text
        }
    };
    let time_zone = match asked.zone {
        None => TimeZone::UTC,
        Some(name) => TimeZone::get(name.trim_start_matches(':')).unwrap_or_else(|_| {
            problems.push(format!("TZ={name}: is no IANA time zone; use a name like Europe/Berlin or UTC"));
            TimeZone::UTC
        }),
    };
    (LogConfig { filter, format, time_zone }, problems)
}

/// Reads Python's level names and numbers, for people who come from the Python agent, or `tracing` directives.
fn filter(value: &str, program: &str, problems: &mut Vec<String>) -> Targets {
    let mut asked = Targets::new().with_default(LevelFilter::INFO);
    for part in value.split(',').map(str::trim).filter(|part| !part.is_empty()) {
        let (target, level) = match part.split_once('=') {
            Some((target, level)) => (Some(target.trim()), level.trim()),
            None if is_target(part) => (Some(part), "TRACE"),
            None => (None, part),
        };
        match (target, level_of(level)) {
            (None, Some(level)) => asked = asked.with_default(level),
            (Some(target), Some(level)) if !target.is_empty() => asked = asked.with_target(target, level),
            _ => problems.push(format!(
                "LOG_LEVEL={value}: {level} is no level{}; use DEBUG, INFO, WARNING, ERROR or CRITICAL, or a list of directives like info,{program}=debug",
                meant(level).map(|level| format!(", do you mean {level}?")).unwrap_or_default()
            )),
        }
    }
    let is_loud = |target: &str| LOUD.iter().any(|loud| target == *loud || target.starts_with(&format!("{loud}::")));
    let mut filter = Targets::new();
    // The shared crate logs at the level of the program.
    let ours = asked.iter().find(|(target, _)| *target == program).map(|(_, level)| level);
    filter = filter.with_targets(ours.map(|level| ("dockflare_host", level)));
    if let Some(default) = asked.default_level() {
        filter = filter.with_default(default);
    }
    for (target, level) in asked.iter() {
        let level = if is_loud(target) { level.min(LevelFilter::INFO) } else { level };
        filter = filter.with_target(target, level);
    }
    for target in LOUD {
        if asked.iter().all(|(named, _)| named != target) {
            let level = asked.default_level().unwrap_or(LevelFilter::INFO).min(LevelFilter::INFO);
            filter = filter.with_target(target, level);
        }
    }
    filter
}

/// Whether a part of the list without a level names a log target: a module of ours, or a library.
fn is_target(part: &str) -> bool {
    part.contains("::") || part.starts_with("dockflare_") || LOUD.contains(&part)
}

/// Libraries that print addresses, headers and bodies at levels below `info`, secrets included.
const LOUD: [&str; 6] = ["bollard", "h2", "hyper", "hyper_util", "reqwest", "rustls"];

/// Level names of Python and `tracing`. Python shows records at or above a number; its levels are 10, 20 and so on.
const LEVELS: [(&str, LevelFilter); 11] = [
    ("DEBUG", LevelFilter::DEBUG),
    ("INFO", LevelFilter::INFO),
    ("WARNING", LevelFilter::WARN),
    ("ERROR", LevelFilter::ERROR),
    ("CRITICAL", LevelFilter::ERROR),
    ("WARN", LevelFilter::WARN),
    ("FATAL", LevelFilter::ERROR),
    ("TRACE", LevelFilter::TRACE),
    ("NOTSET", LevelFilter::TRACE),
    ("ALL", LevelFilter::TRACE),
    ("OFF", LevelFilter::OFF),
];

fn level_of(word: &str) -> Option<LevelFilter> {
    if let Ok(number) = word.parse::<u8>() {
        return match number {
            0..10 => Some(LevelFilter::TRACE),
            10 => Some(LevelFilter::DEBUG),
            11..=20 => Some(LevelFilter::INFO),
            21..=30 => Some(LevelFilter::WARN),
            31..=50 => Some(LevelFilter::ERROR),
            _ => None,
        };
    }
    LEVELS.iter().find(|(name, _)| name.eq_ignore_ascii_case(word)).map(|(_, level)| *level)
}

/// The level nearest to a misspelled word, or the one that the word means in other programs.
fn meant(word: &str) -> Option<&'static str> {
    const OTHERS: [(&str, &[&str]); 4] = [
        ("DEBUG", &["VERBOSE", "V", "VV", "FINE", "SILLY"]),
        ("INFO", &["NOTICE", "NORMAL", "DEFAULT", "INFORMATION", "INFORMATIONAL"]),
        ("ERROR", &["QUIET", "ERR", "SEVERE", "MINIMAL", "SILENT", "NONE"]),
        ("CRITICAL", &["PANIC", "ALERT", "EMERGENCY"]),
    ];
    let upper = word.to_ascii_uppercase();
    let other = OTHERS.into_iter().find(|(_, words)| words.contains(&upper.as_str())).map(|(level, _)| level);
    other.or_else(|| words::nearest(word, LEVELS.map(|(name, _)| name)))
}

#[cfg(test)]
mod tests {
    use tracing::Level;

    use super::*;

    #[test]
    fn a_word_that_is_no_level_is_refused_with_the_nearest_one_for_every_program() {
        for program in ["dockflare_agent", "dockflare_vault"] {
            for (word, meant) in
                [("inof", "INFO"), ("verbose", "DEBUG"), ("warnig", "WARNING"), ("info,x=debig", "DEBUG")]
            {
                let (_, problems) = read(Asked { level: Some(word), ..Asked::default() }, program);
                assert!(
                    problems[0].contains(&format!("do you mean {meant}?")) && problems[0].contains(program),
                    "{problems:?}"
                );
            }
            let all = Asked { level: Some("loud"), format: Some("xml"), zone: Some("Mars/Base") };
            assert_eq!(read(all, program).1.len(), 3);
        }
    }

    #[test]
    fn what_is_shared_logs_for_the_program_that_is_named() {
        let asked = Asked { level: Some("warn,dockflare_vault=debug"), ..Asked::default() };
        let (config, _) = read(asked, "dockflare_vault");
        assert!(config.filter.would_enable("dockflare_host::page", &Level::DEBUG));
        assert!(!config.filter.would_enable("dockflare_agent", &Level::INFO));
    }
}
