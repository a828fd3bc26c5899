//! Reads the recordings of the real program, and finds where in them each behavior begins.
//!
//! `recordings/` has a file per version and protocol; its README says how to make and read them.

use std::collections::HashMap;
use std::sync::LazyLock;

use anyhow::{Context, Result, bail, ensure};

use crate::log::Level;
use crate::transport::Protocol;

/// One event.
#[derive(Debug, Clone, PartialEq)]
pub struct Entry {
    /// Seconds since the beginning of the recording.
    pub at: f64,
    /// The event.
    pub what: What,
}

/// An event in a recording.
#[derive(Debug, Clone, PartialEq)]
pub enum What {
    /// A line of the log, with placeholders in braces. Without a level, it is printed bare.
    Line(Option<Level>, String),
    /// A counter rose by this much.
    Add(String, f64),
    /// A gauge changed to this value.
    Set(String, f64),
    /// `/ready` now counts this many connections.
    Ready(usize),
    /// The program tries the connection with this index.
    Try(usize),
    /// The recorder did something to the program: `fault`, `back`, `stop`, `stop2`.
    Mark(String),
    /// The process ended.
    Exit(i32),
    /// The end of the recording, or of the part that was kept.
    End,
}

/// A recording: its events, in order.
#[derive(Debug)]
pub struct Recording {
    /// Its name, such as `03-connected-then-refused`.
    pub name: String,
    /// The events. The last one is always [`What::End`].
    pub entries: Vec<Entry>,
}

impl Recording {
    /// The first entry at or after `from` for which `is` holds.
    #[must_use]
    pub fn find(&self, from: usize, is: impl Fn(&What) -> bool) -> Option<usize> {
        (from..self.entries.len()).find(|i| is(&self.entries[*i].what))
    }

    /// The entry after the first try at or after `from`, where the verdict becomes visible.
    #[must_use]
    pub fn after_try(&self, from: usize) -> usize {
        self.find(from, |what| matches!(what, What::Try(_))).map_or(self.entries.len() - 1, |i| i + 1)
    }

    /// The position of this mark.
    #[must_use]
    pub fn mark(&self, name: &str) -> Option<usize> {
        self.find(0, |what| matches!(what, What::Mark(mark) if mark == name))
    }

    /// The position of the first line that contains these words.
    #[must_use]
    pub fn line(&self, words: &str) -> Option<usize> {
        self.find(0, |what| matches!(what, What::Line(_, text) if text.contains(words)))
    }
}

/// A recorded version.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Version {
    /// 2025.4.0: exits when it is refused over QUIC.
    V2025_4,
    /// 2025.9.0: keeps trying, and does not log why it is refused over QUIC.
    V2025_9,
    /// 2026.8.2: checks the ways to the edge at start.
    V2026_8,
}

impl Version {
    /// The recorded version that behaves like the claimed one. QUIC's refusals changed with 2025.8.1.
    #[must_use]
    pub fn like(claimed: &str) -> Self {
        let mut numbers = claimed.split('.').map(|part| part.parse::<u32>().unwrap_or(0));
        let number = [(); 3].map(|()| numbers.next().unwrap_or(0));
        match number {
            [..2025, ..] | [2025, ..8, _] | [2025, 8, 0] => Self::V2025_4,
            [2025, ..] => Self::V2025_9,
            _ => Self::V2026_8,
        }
    }
}

/// The choice of `TUNNEL_TRANSPORT_PROTOCOL`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Chosen {
    /// No protocol chosen: QUIC first.
    Auto,
    /// This protocol only.
    Only(Protocol),
}

macro_rules! files {
    ($($version:ident, $chosen:expr, $path:literal;)*) => {
        /// The text of the recordings of each version and protocol.
        const FILES: &[(Version, Chosen, &str)] =
            &[$((Version::$version, $chosen, include_str!(concat!("../recordings/", $path, ".txt"))),)*];
    };
}

files! {
    V2025_4, Chosen::Auto, "2025.4.0/auto";
    V2025_4, Chosen::Only(Protocol::Quic), "2025.4.0/quic";
    V2025_4, Chosen::Only(Protocol::Http2), "2025.4.0/http2";
    V2025_9, Chosen::Auto, "2025.9.0/auto";
    V2025_9, Chosen::Only(Protocol::Quic), "2025.9.0/quic";
    V2025_9, Chosen::Only(Protocol::Http2), "2025.9.0/http2";
    V2026_8, Chosen::Auto, "2026.8.2/auto";
    V2026_8, Chosen::Only(Protocol::Quic), "2026.8.2/quic";
    V2026_8, Chosen::Only(Protocol::Http2), "2026.8.2/http2";
}

type All = HashMap<(Version, Chosen), HashMap<String, Recording>>;

/// Parsed once. A file that does not parse is left out; a test makes sure that all of them do.
static ALL: LazyLock<All> = LazyLock::new(|| {
    let read = FILES.iter().map(|(version, chosen, text)| ((*version, *chosen), parse(text).unwrap_or_default()));
    read.collect()
});

/// The recording of that name. A case that does not depend on the protocol was recorded only for `auto`.
///
/// # Errors
/// When there is no such recording.
pub fn get(version: Version, chosen: Chosen, name: &str) -> Result<&'static Recording> {
    let found = [chosen, Chosen::Auto].into_iter().find_map(|chosen| ALL.get(&(version, chosen))?.get(name));
    found.with_context(|| format!("stand-in: no recording {name} of {version:?} over {chosen:?}"))
}

fn parse(text: &str) -> Result<HashMap<String, Recording>> {
    let mut names = Vec::new();
    let mut all: Vec<Recording> = Vec::new();
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        if let Some(series) = line.strip_prefix('@') {
            names.push(series.split_once(' ').context("a series without a name")?.1.to_owned());
        } else if let Some(name) = line.strip_prefix("== ") {
            all.push(Recording { name: name.to_owned(), entries: Vec::new() });
        } else {
            let entry = parse_entry(line, &names).with_context(|| line.to_owned())?;
            all.last_mut().context("an entry before the first recording")?.entries.push(entry);
        }
    }
    let ends = |one: &Recording| one.entries.last().is_some_and(|entry| entry.what == What::End);
    ensure!(all.iter().all(ends), "a recording has no end");
    Ok(all.into_iter().map(|recording| (recording.name.clone(), recording)).collect())
}

fn parse_entry(line: &str, names: &[String]) -> Result<Entry> {
    let (at, rest) = line.split_once(' ').context("no time")?;
    let at = at.parse()?;
    let (kind, rest) = rest.split_once(' ').unwrap_or((rest, ""));
    let series = || -> Result<(String, f64)> {
        let (value, name) = rest.split_once(" @").context("no series")?;
        Ok((names.get(name.parse::<usize>()?).context("an unknown series")?.clone(), value.parse()?))
    };
    let what = match kind {
        "DBG" => What::Line(Some(Level::Debug), rest.to_owned()),
        "INF" => What::Line(Some(Level::Info), rest.to_owned()),
        "WRN" => What::Line(Some(Level::Warn), rest.to_owned()),
        "ERR" => What::Line(Some(Level::Error), rest.to_owned()),
        "RAW" => What::Line(None, rest.to_owned()),
        "+" => series().map(|(name, value)| What::Add(name, value))?,
        "=" => series().map(|(name, value)| What::Set(name, value))?,
        "ready" => What::Ready(rest.parse()?),
        "try" => What::Try(rest.parse()?),
        "mark" => What::Mark(rest.to_owned()),
        "exit" => What::Exit(rest.parse()?),
        "end" => What::End,
        other => bail!("{other:?} is unknown"),
    };
    Ok(Entry { at, what })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_file_reads_and_times_never_run_backwards() {
        for (version, chosen, text) in FILES {
            let all = parse(text).expect("reads");
            assert!(all.len() >= 13, "{version:?} {chosen:?}: {}", all.len());
            for recording in all.values() {
                let ordered = recording.entries.is_sorted_by(|one, next| one.at <= next.at);
                assert!(ordered, "{version:?} {chosen:?} {}", recording.name);
            }
        }
    }

    #[test]
    fn no_recording_holds_an_address_or_an_id_of_the_machine_it_was_made_on() {
        for (version, chosen, text) in FILES {
            for line in text.lines() {
                assert!(!line.contains("172.28."), "{version:?} {chosen:?}: {line}");
                assert!(!line.contains("tunnelID=") || line.contains("tunnelID={tunnel}"), "{line}");
            }
        }
    }

    #[test]
    fn a_version_behaves_as_the_recorded_one_of_its_time() {
        for (claimed, like) in [
            ("2024.1.5", Version::V2025_4),
            ("2025.8.0", Version::V2025_4),
            ("2025.8.1", Version::V2025_9),
            ("2025.11.1", Version::V2025_9),
            ("2026.8.2", Version::V2026_8),
            ("2099.1.0", Version::V2026_8),
        ] {
            assert_eq!(Version::like(claimed), like, "{claimed}");
        }
    }
}
