//! Which recording plays, and from where: a table.

use anyhow::{Context, Result};

use crate::recording::{self, Chosen, Recording, Version, What};
use crate::transport::Protocol;
use crate::wire::Verdict;

/// A place in a recording.
#[derive(Debug, Clone)]
pub struct Scene {
    /// The recording.
    pub recording: &'static Recording,
    /// The entry that is next.
    pub next: usize,
    /// Where the scene ends.
    pub end: usize,
    /// What each of its tries comes to. Another verdict is another scene.
    pub expects: Verdict,
    /// Where it goes on after its end, for what lasts longer than it was recorded.
    pub again: Option<usize>,
}

impl Scene {
    /// After the try that worked, where the same recording has one.
    #[must_use]
    pub fn back(&self) -> Option<Self> {
        let back = self.recording.mark("back")?;
        let registered = |what: &What| matches!(what, What::Line(_, text) if text.starts_with("Registered tunnel"));
        self.recording.find(back, registered)?;
        Some(cut(self.recording, self.recording.after_try(back), &Verdict::Registered))
    }
}

/// What the choice depends on.
#[derive(Debug, Clone, Copy)]
pub struct Stand {
    /// The version that is claimed.
    pub version: Version,
    /// The protocol that was chosen.
    pub chosen: Chosen,
    /// The protocol in use.
    pub protocol: Protocol,
    /// Whether there has ever been a connection.
    pub connected_once: bool,
}

impl Stand {
    fn get(&self, name: &str) -> Result<&'static Recording> {
        // After the fallback it is as where http2 was chosen.
        let fell_back = self.chosen == Chosen::Auto && self.protocol == Protocol::Http2;
        let chosen = if fell_back { Chosen::Only(Protocol::Http2) } else { self.chosen };
        recording::get(self.version, chosen, name)
    }

    /// From the beginning of the process. What is known of the edge shows itself at the first try; only where names
    /// cannot be resolved does it not come to that.
    ///
    /// # Errors
    /// When that was not recorded.
    pub fn start(&self, dns: Option<Dns>) -> Result<Scene> {
        Ok(match dns {
            None => whole(self.get("01-healthy")?, Verdict::Registered),
            Some(Dns::Fails) => whole(self.get("10b-dns-servfail")?, Verdict::Unresolved),
            Some(Dns::Silent) => whole(self.get("10-no-dns")?, Verdict::Unresolved),
        })
    }

    /// From the moment after a try that came to this.
    ///
    /// # Errors
    /// When that was not recorded.
    pub fn after_try(&self, verdict: &Verdict) -> Result<Scene> {
        let (name, from) = match (verdict, self.connected_once) {
            (Verdict::Registered, false) => ("01-healthy", None),
            (Verdict::Registered, true) => ("07-connected-edge-away-refused", Some("back")),
            // At a first start an answered error was recorded only as a refusal; the lines differ in the edge's words.
            (Verdict::Refused(_) | Verdict::Failed(_), false) => ("02-refused-at-start", None),
            (Verdict::Refused(_), true) => ("03-connected-then-refused", None),
            (Verdict::Failed(_), true) => (self.edge_error(), None),
            (Verdict::Unanswered, _) => ("03c-registration-never-answered", None),
            (Verdict::Away, false) => ("05-edge-away-at-start-refused", None),
            // Names are not asked for again while addresses are known.
            (Verdict::Away | Verdict::Unresolved, _) => ("07-connected-edge-away-refused", None),
            (Verdict::Swallowed, false) => ("06-edge-away-at-start-swallowed", None),
            (Verdict::Swallowed, true) => (self.swallowed(), None),
            (Verdict::Untrusted, _) => ("21-clock-wrong", None),
        };
        let recording = self.get(name)?;
        let from = match from {
            Some(mark) => recording.mark(mark).with_context(|| format!("stand-in: no {mark} in {name}"))?,
            None => 0,
        };
        Ok(cut(recording, recording.after_try(from), verdict))
    }

    /// From the moment when what was connected is lost, and each try from then on comes to this.
    ///
    /// # Errors
    /// When that was not recorded.
    pub fn fault(&self, verdict: &Verdict) -> Result<Scene> {
        let name = match verdict {
            Verdict::Failed(_) => self.edge_error(),
            Verdict::Unanswered => "03c-registration-never-answered",
            Verdict::Away | Verdict::Unresolved => "07-connected-edge-away-refused",
            Verdict::Swallowed => self.swallowed(),
            // The edge closes everything; what comes of the tries they tell themselves.
            Verdict::Registered | Verdict::Refused(_) | Verdict::Untrusted => {
                let refused = Verdict::Refused(String::new());
                return Ok(cut(self.get("03-connected-then-refused")?, 0, &refused));
            }
        };
        Ok(cut(self.get(name)?, 0, verdict))
    }

    /// One of several connections is lost; the others serve on.
    ///
    /// # Errors
    /// When that was not recorded.
    pub fn lost_one(&self) -> Result<&'static Recording> {
        self.get("07c-one-connection-lost-and-back")
    }

    /// From SIGTERM on.
    ///
    /// # Errors
    /// When that was not recorded.
    pub fn stop(&self) -> Result<&'static Recording> {
        self.get("12a-sigterm-idle")
    }

    /// From its first line on, for what ends a process before it has tried anything.
    ///
    /// # Errors
    /// When that was not recorded.
    pub fn failed_start(&self, name: &str) -> Result<Scene> {
        Ok(whole(self.get(name)?, Verdict::Unresolved))
    }

    /// A line of that recording that holds these words.
    ///
    /// # Errors
    /// When there is none.
    pub fn line(&self, name: &str, words: &str) -> Result<&'static What> {
        let recording = self.get(name)?;
        let at = recording.line(words).with_context(|| format!("stand-in: no {words:?} in {name}"))?;
        Ok(&recording.entries[at].what)
    }

    fn edge_error(&self) -> &'static str {
        // Recorded over QUIC alone; http2 has the edge's own words in the place of those of a refusal.
        match self.protocol {
            Protocol::Quic => "03b-connected-then-edge-error",
            Protocol::Http2 => "03-connected-then-refused",
        }
    }

    fn swallowed(&self) -> &'static str {
        // http2 does not notice an outage of 90 s at all.
        match self.protocol {
            Protocol::Quic => "08-connected-edge-away-swallowed",
            Protocol::Http2 => "08b-connected-edge-away-swallowed-long",
        }
    }
}

/// How names are not resolved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dns {
    /// The server says that it failed.
    Fails,
    /// It says nothing.
    Silent,
}

fn whole(recording: &'static Recording, expects: Verdict) -> Scene {
    Scene { recording, next: 0, end: recording.entries.len() - 1, expects, again: None }
}

/// The recording from there on. What lasts is asked for again at the first try after what was recorded changed: until
/// then nobody noticed.
fn cut(recording: &'static Recording, next: usize, verdict: &Verdict) -> Scene {
    let last = recording.entries.len() - 1;
    let changed = recording.find(next, |what| matches!(what, What::Mark(mark) if mark == "back"));
    if *verdict == Verdict::Registered {
        return Scene { recording, next, end: last, expects: verdict.clone(), again: None };
    }
    let end = changed.and_then(|back| recording.find(back, |what| matches!(what, What::Try(_)))).unwrap_or(last);
    Scene { recording, next, end, expects: verdict.clone(), again: again(recording, end) }
}

/// The last try that leaves 40 s to play, for what lasts: by then the pauses have grown to their full length.
fn again(recording: &Recording, end: usize) -> Option<usize> {
    let latest = recording.entries[end].at - 40.0;
    let tries = (0..end).filter(|i| matches!(recording.entries[*i].what, What::Try(_)));
    let tries: Vec<_> = tries.collect();
    let long_enough = tries.iter().rev().find(|i| recording.entries[**i].at <= latest);
    long_enough.or(tries.first()).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    const VERSIONS: [Version; 3] = [Version::V2025_4, Version::V2025_9, Version::V2026_8];
    const CHOSEN: [Chosen; 3] = [Chosen::Auto, Chosen::Only(Protocol::Quic), Chosen::Only(Protocol::Http2)];

    fn verdicts() -> Vec<Verdict> {
        let words = String::from("words");
        vec![
            Verdict::Registered,
            Verdict::Refused(words.clone()),
            Verdict::Failed(words),
            Verdict::Unanswered,
            Verdict::Away,
            Verdict::Swallowed,
            Verdict::Untrusted,
            Verdict::Unresolved,
        ]
    }

    fn stands() -> Vec<Stand> {
        let mut stands = Vec::new();
        for version in VERSIONS {
            for chosen in CHOSEN {
                for connected_once in [false, true] {
                    let protocols = match chosen {
                        Chosen::Auto => vec![Protocol::Quic, Protocol::Http2],
                        Chosen::Only(protocol) => vec![protocol],
                    };
                    let stand = |protocol| Stand { version, chosen, protocol, connected_once };
                    stands.extend(protocols.into_iter().map(stand));
                }
            }
        }
        stands
    }

    #[test]
    fn whatever_happens_was_recorded() {
        for stand in stands() {
            for verdict in verdicts() {
                let scene = stand.after_try(&verdict).unwrap_or_else(|error| panic!("{stand:?} {verdict:?}: {error}"));
                assert!(scene.next < scene.end, "{stand:?} {verdict:?} {scene:?}");
                stand.fault(&verdict).unwrap_or_else(|error| panic!("{stand:?} {verdict:?}: {error}"));
            }
            stand.stop().expect("a stop");
            for dns in [None, Some(Dns::Fails), Some(Dns::Silent)] {
                stand.start(dns).expect("a start");
            }
        }
    }

    #[test]
    fn what_lasts_is_played_again_and_what_is_well_is_not() {
        for stand in stands() {
            let away = stand.after_try(&Verdict::Away).expect("away");
            let again = away.again.expect("it lasts");
            assert!(away.recording.entries[away.end].at - away.recording.entries[again].at >= 20.0, "{stand:?}");
            assert!(stand.after_try(&Verdict::Registered).expect("well").again.is_none());
        }
    }
}
