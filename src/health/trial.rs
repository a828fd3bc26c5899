//! A registration that is refused without a word: over QUIC cloudflared never says why. A trial, the same connector
//! over HTTP/2, says so in two seconds, or serves where only QUIC is at fault. When to ask, and what is known since.
//! No I/O; time is handed in.

use std::time::Duration;

use tokio::time::Instant;

use crate::retry::Backoff;

/// What a trial gets to say why, or to be ready.
pub(super) const LIMIT: Duration = Duration::from_secs(15);
/// Pauses between trials that did not tell.
const FIRST_PAUSE: Duration = Duration::from_secs(30);
/// And after one that did: what is certain may change.
const LONGEST_PAUSE: Duration = Duration::from_secs(600);
/// Pauses before it is seen whether one that serves over HTTP/2 can do so as it is wanted.
const FIRST_RETURN: Duration = Duration::from_secs(30 * 60);
const LONGEST_RETURN: Duration = Duration::from_secs(6 * 3600);

/// What is known of the refusal of one spec.
#[derive(Debug)]
pub(super) struct Trial {
    /// Its hash.
    about: Option<String>,
    /// The edge does not take the token.
    certain: bool,
    ask_at: Option<Instant>,
    pauses: Backoff,
    /// When to go back from HTTP/2 to what is wanted.
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

    /// Whether the edge is known not to take the token of this spec.
    pub(super) fn is_certain(&self, hash: &str) -> bool {
        self.certain && self.was_asked(hash)
    }

    /// Whether there was a trial of this spec.
    pub(super) fn was_asked(&self, hash: &str) -> bool {
        self.about.as_deref() == Some(hash)
    }

    /// Whether it is time for a trial of this spec.
    pub(super) fn is_due(&self, hash: &str, now: Instant) -> bool {
        !self.was_asked(hash) || self.ask_at.is_none_or(|at| now >= at)
    }

    /// A trial was made.
    pub(super) fn asked(&mut self, hash: &str, now: Instant) {
        if !self.was_asked(hash) {
            self.forget();
        }
        self.about = Some(hash.to_owned());
        self.ask_at = Some(now + self.pauses.next_whole());
    }

    /// A connector made from this spec, or its trial, has said whether the edge takes the token.
    pub(super) fn told(&mut self, hash: &str, refused: bool, now: Instant) {
        if !self.was_asked(hash) {
            self.asked(hash, now);
        }
        if refused && !self.certain {
            self.ask_at = Some(now + LONGEST_PAUSE);
        }
        self.certain = refused;
    }

    /// It is connected, or something else is wanted.
    pub(super) fn forget(&mut self) {
        (self.about, self.certain, self.ask_at) = (None, false, None);
        self.pauses.reset();
    }

    /// What runs serves over HTTP/2 instead of as it is wanted.
    pub(super) fn serves_otherwise(&mut self, now: Instant) {
        if self.back_at.is_none() {
            self.returns_later(now);
        }
    }

    /// The next look whether it can go back comes after a longer pause.
    pub(super) fn returns_later(&mut self, now: Instant) -> Duration {
        let pause = self.returns.next_whole();
        self.back_at = Some(now + pause);
        pause
    }

    /// What runs is what is wanted; `well` when for long.
    pub(super) fn is_back(&mut self, well: bool) {
        self.back_at = None;
        if well {
            self.returns.reset();
        }
    }

    /// Whether it is time to go back.
    pub(super) fn may_return(&self, now: Instant) -> bool {
        self.back_at.is_some_and(|at| now >= at)
    }
}
