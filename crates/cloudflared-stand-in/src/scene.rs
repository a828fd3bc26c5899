//! The table of which recording plays, and from where.

use anyhow::{Context, Result};

use crate::recording::{self, Chosen, Recording, Version, What};
use crate::transport::Protocol;
use crate::wire::Verdict;

/// A place in a recording.
#[derive(Debug, Clone)]
pub struct Scene {
    /// The recording.
    pub recording: &'static Recording,
    /// The next entry to play.
    pub next: usize,
    /// Where the scene ends.
    pub end: usize,
    /// The verdict that each of its tries gets. Another verdict starts another scene.
    pub expects: Verdict,
    /// Where to continue after the end, for a state that lasts longer than it was recorded.
    pub again: Option<usize>,
}

impl Scene {
    /// The scene after the try that worked, if the same recording has one.
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
    /// The claimed version.
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
        // After the fallback, play what was recorded with HTTP/2 chosen.
        let fell_back = self.chosen == Chosen::Auto && self.protocol == Protocol::Http2;
        let chosen = if fell_back { Chosen::Only(Protocol::Http2) } else { self.chosen };
        recording::get(self.version, chosen, name)
    }

    /// From the start of the process. The first try shows how the edge behaves; there is no try only when names do not
    /// resolve.
    ///
    /// # Errors
    /// When no recording shows it.
    pub fn start(&self, dns: Option<Dns>) -> Result<Scene> {
        Ok(match dns {
            None => whole(self.get("01-healthy")?, Verdict::Registered),
            Some(Dns::Fails) => whole(self.get("10b-dns-servfail")?, Verdict::Unresolved),
            Some(Dns::Silent) => whole(self.get("10-no-dns")?, Verdict::Unresolved),
        })
    }

    /// From just after a try that got this verdict.
    ///
    /// # Errors
    /// When no recording shows it.
    pub fn after_try(&self, verdict: &Verdict) -> Result<Scene> {
        let (name, from) = match (verdict, self.connected_once) {
            (Verdict::Registered, false) => ("01-healthy", None),
            (Verdict::Registered, true) => ("07-connected-edge-away-refused", Some("back")),
            // At a first start, only a refusal was recorded as an answered error. The lines differ in the edge's words.
            (Verdict::Refused(_) | Verdict::Failed(_), false) => ("02-refused-at-start", None),
            (Verdict::Refused(_), true) => ("03-connected-then-refused", None),
            (Verdict::Failed(_), true) => (self.edge_error(), None),
            (Verdict::Unanswered, _) => ("03c-registration-never-answered", None),
            (Verdict::Away, false) => ("05-edge-away-at-start-refused", None),
            // cloudflared does not resolve names again while it knows addresses.
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

    /// From the moment when all connections are lost. Each try from then on gets this verdict.
    ///
    /// # Errors
    /// When no recording shows it.
    pub fn fault(&self, verdict: &Verdict) -> Result<Scene> {
        let name = match verdict {
            Verdict::Failed(_) => self.edge_error(),
            Verdict::Unanswered => "03c-registration-never-answered",
            Verdict::Away | Verdict::Unresolved => "07-connected-edge-away-refused",
            Verdict::Swallowed => self.swallowed(),
            // The edge closes all connections; the tries that follow tell the rest.
            Verdict::Registered | Verdict::Refused(_) | Verdict::Untrusted => {
                let refused = Verdict::Refused(String::new());
                return Ok(cut(self.get("03-connected-then-refused")?, 0, &refused));
            }
        };
        Ok(cut(self.get(name)?, 0, verdict))
    }

    /// The recording in which one of several connections is lost while the others serve on.
    ///
    /// # Errors
    /// When no recording shows it.
    pub fn lost_one(&self) -> Result<&'static Recording> {
        self.get("07c-one-connection-lost-and-back")
    }

    /// The recording that plays from SIGTERM on.
    ///
    /// # Errors
    /// When no recording shows it.
    pub fn stop(&self) -> Result<&'static Recording> {
        self.get("12a-sigterm-idle")
    }

    /// From its first line, for a process that ends before its first try.
    ///
    /// # Errors
    /// When no recording shows it.
    pub fn failed_start(&self, name: &str) -> Result<Scene> {
        Ok(whole(self.get(name)?, Verdict::Unresolved))
    }

    /// The first line of that recording that contains these words.
    ///
    /// # Errors
    /// When there is none.
    pub fn line(&self, name: &str, words: &str) -> Result<&'static What> {
        let recording = self.get(name)?;
        let at = recording.line(words).with_context(|| format!("stand-in: no {words:?} in {name}"))?;
        Ok(&recording.entries[at].what)
    }

    fn edge_error(&self) -> &'static str {
        // Recorded over QUIC only. Over HTTP/2 the lines are a refusal's, with the edge's own words in it.
        match self.protocol {
            Protocol::Quic => "03b-connected-then-edge-error",
            Protocol::Http2 => "03-connected-then-refused",
        }
    }

    fn swallowed(&self) -> &'static str {
        // Over HTTP/2 an outage of 90 s goes unnoticed.
        match self.protocol {
            Protocol::Quic => "08-connected-edge-away-swallowed",
            Protocol::Http2 => "08b-connected-edge-away-swallowed-long",
        }
    }
}

/// How name resolution fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dns {
    /// The DNS server reports a failure.
    Fails,
    /// The DNS server does not answer.
    Silent,
}

fn whole(recording: &'static Recording, expects: Verdict) -> Scene {
    Scene { recording, next: 0, end: recording.entries.len() - 1, expects, again: None }
}

/// The recording from `next` on. A lasting state ends at the first try after the recorded change (`back`): until then
/// the program did not notice the change.
fn cut(recording: &'static Recording, next: usize, verdict: &Verdict) -> Scene {
    let last = recording.entries.len() - 1;
    let changed = recording.find(next, |what| matches!(what, What::Mark(mark) if mark == "back"));
    if *verdict == Verdict::Registered {
        return Scene { recording, next, end: last, expects: verdict.clone(), again: None };
    }
    let end = changed.and_then(|back| recording.find(back, |what| matches!(what, What::Try(_)))).unwrap_or(last);
    Scene { recording, next, end, expects: verdict.clone(), again: again(recording, end) }
}

/// The last try with 40 s left to play, for a state that lasts: by then the pauses have grown to their full length.
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
