//! Finds out why the edge refuses a registration: over QUIC cloudflared never says. A trial, the same connector over
//! HTTP/2, says so in two seconds, or serves if only QUIC is at fault. This module decides when to try, and keeps what
//! trials have shown. No I/O; the caller passes the time.

use std::time::Duration;

use tokio::time::Instant;

use crate::retry::Backoff;

/// How long a trial gets to say why, or to become ready.
pub(super) const LIMIT: Duration = Duration::from_secs(15);
/// First pause between trials that gave no reason.
const FIRST_PAUSE: Duration = Duration::from_secs(30);
/// Longest such pause, and the pause after a trial that gave one: the reason may change.
const LONGEST_PAUSE: Duration = Duration::from_secs(600);
/// Pauses before checking whether a connector that serves over HTTP/2 can go back to the wanted spec.
const FIRST_RETURN: Duration = Duration::from_secs(30 * 60);
const LONGEST_RETURN: Duration = Duration::from_secs(6 * 3600);

/// What is known of the refusal of one spec.
#[derive(Debug)]
pub(super) struct Trial {
    /// Hash of that spec.
    about: Option<String>,
    /// The edge is known to refuse the token.
    certain: bool,
    ask_at: Option<Instant>,
    pauses: Backoff,
    /// When to go back from HTTP/2 to the wanted spec.
    back_at: Option<Instant>,
    returns: Backoff,
}

impl Trial {
    pub(super) fn new() -> Self {
        Self {
            about: None,
            certain: false,
            ask_at: None,
            pauses: Backoff::new(FIRST_PAUSE, LONGEST_PAUSE),
            back_at: None,
            returns: Backoff::new(FIRST_RETURN, LONGEST_RETURN),
        }
    }

    /// Whether the edge is known to refuse the token of this spec.
    pub(super) fn is_certain(&self, hash: &str) -> bool {
        self.certain && self.was_asked(hash)
    }

    /// Whether this spec has had a trial.
    pub(super) fn was_asked(&self, hash: &str) -> bool {
        self.about.as_deref() == Some(hash)
    }

    /// Whether this spec is due for a trial.
    pub(super) fn is_due(&self, hash: &str, now: Instant) -> bool {
        !self.was_asked(hash) || self.ask_at.is_none_or(|at| now >= at)
    }

    /// Notes that a trial was made.
    pub(super) fn asked(&mut self, hash: &str, now: Instant) {
        if !self.was_asked(hash) {
            self.forget();
        }
        self.about = Some(hash.to_owned());
        self.ask_at = Some(now + self.pauses.next_whole());
    }

    /// Notes whether the edge accepts the token, as shown by a connector of this spec or its trial.
    pub(super) fn told(&mut self, hash: &str, refused: bool, now: Instant) {
        if !self.was_asked(hash) {
            self.asked(hash, now);
        }
        if refused && !self.certain {
            self.ask_at = Some(now + LONGEST_PAUSE);
        }
        self.certain = refused;
    }

    /// Forgets the refusal: the connector is connected, or the order changed.
    pub(super) fn forget(&mut self) {
        (self.about, self.certain, self.ask_at) = (None, false, None);
        self.pauses.reset();
    }

    /// Notes that the connector serves over HTTP/2 instead of as the spec wants it.
    pub(super) fn serves_otherwise(&mut self, now: Instant) {
        if self.back_at.is_none() {
            self.returns_later(now);
        }
    }

    /// Schedules the next check whether it can go back, after a longer pause. Returns the pause.
    pub(super) fn returns_later(&mut self, now: Instant) -> Duration {
        let pause = self.returns.next_whole();
        self.back_at = Some(now + pause);
        pause
    }

    /// Notes that the connector runs as the spec wants it; `well` if it has for long.
    pub(super) fn is_back(&mut self, well: bool) {
        self.back_at = None;
        if well {
            self.returns.reset();
        }
    }

    /// Whether it is time to try going back.
    pub(super) fn may_return(&self, now: Instant) -> bool {
        self.back_at.is_some_and(|at| now >= at)
    }
}
