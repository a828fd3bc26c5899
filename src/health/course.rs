//! From single looks at one container to what is the matter with it. No I/O; time is handed in.
//!
//! A look is a moment and may deceive: a machine is busy, a connection is lost and back within the second, a
//! container that crashes is seen just after its restart. So what a look suggests is a suspicion first, becomes the
//! verdict when it has lasted, and acts later still. Nothing here is kept over a crash of the agent: the next one
//! looks for itself.

use std::time::Duration;

use tokio::time::Instant;

pub(super) use super::classify::Verdict;
use super::classify::{self, Page};
use super::probe::Readiness;
use crate::cause::{Action, Cause};
use crate::docker::{Health, Inspected, LastCheck, RunState};

/// A connector that is not ready this long after its start has a problem, though nothing else tells of one.
pub(super) const START_LIMIT: Duration = Duration::from_secs(classify::START_LIMIT as u64);
/// How long a look must be confirmed before it is believed: two time-outs of the probe.
const LASTS: Duration = Duration::from_secs(2);
/// The edge may refuse a token that is seconds old: so long a successor is not given up for it.
const REFUSAL_LASTS: Duration = Duration::from_secs(10);
/// A connector that crashed again and again is well again when it has been ready for so long.
const RECOVERED: Duration = Duration::from_secs(5);
/// A hang is answered when it has lasted so long: Docker's own check, each 15 s with 5 s to answer, has then had its
/// say as well.
const HANG_LASTS: Duration = Duration::from_secs(25);
/// A successor that crashes is given up after this.
const CRASH_LIMIT: Duration = Duration::from_secs(15);
/// What a successor gets to become ready: cloudflared needs about a minute to find out that QUIC does not pass and
/// to fall back to HTTP/2.
const READY_LIMIT: Duration = Duration::from_secs(90);
/// After a connector is ready, the edge takes some seconds to lead visitors to it.
const EDGE_DELAY: Duration = Duration::from_secs(5);

/// What one look has seen.
#[derive(Debug)]
pub(super) struct Look<'a> {
    pub(super) container: &'a Inspected,
    pub(super) readiness: &'a Readiness,
    /// What the rules make of it.
    pub(super) verdict: Verdict,
}

/// What `/ready` says, or what Docker's own check was told by it where it cannot be asked from here.
pub(super) fn page(container: &Inspected, readiness: &Readiness) -> Page {
    match (readiness, container.health, container.last_check) {
        (Readiness::Ready { .. }, ..) => Page::Ready,
        (Readiness::NotReady, ..) => Page::NotReady,
        (Readiness::Silent, Some(Health::Unhealthy), Some(LastCheck::NotReady)) => Page::NotReady,
        (Readiness::Silent, ..) => Page::Silent,
    }
}

/// The course of one container, over its starts.
#[derive(Debug)]
pub(super) struct Course {
    container: String,
    started_at: String,
    /// When this start was.
    began: Instant,
    /// When it was first seen.
    first_seen: Instant,
    pub(super) verdict: Verdict,
    /// What another look must confirm, and since when it is seen.
    suspicion: Option<(Verdict, Instant)>,
    /// Its verdict is what it ended of, and it has not been well since.
    has_ended: bool,
    /// Since when it is ready without a break.
    ready_since: Option<Instant>,
    /// Ready at some time of this start.
    was_ready: bool,
    /// It has answered in this start, so it can be asked from here.
    pub(super) answered: bool,
}

impl Course {
    /// `age` is how long ago the container was started.
    pub(super) fn new(container: &Inspected, age: Duration, now: Instant) -> Self {
        Self {
            container: container.id.clone(),
            started_at: container.started_at.clone(),
            began: now.checked_sub(age).unwrap_or(now),
            first_seen: now,
            verdict: Verdict::Starting,
            suspicion: None,
            has_ended: false,
            ready_since: None,
            was_ready: false,
            answered: false,
        }
    }

    /// Whether it is this start of this container.
    pub(super) fn is_of(&self, container: &Inspected) -> bool {
        self.container == container.id && self.started_at == container.started_at
    }

    /// The same container was started again: what it crashed of stays suspected until it is ready.
    pub(super) fn next_start(&mut self, container: &Inspected, age: Duration, now: Instant) {
        let next = Self::new(container, age, now);
        if self.container != container.id {
            *self = next;
            return;
        }
        *self = match self.has_ended {
            true => Self {
                first_seen: self.first_seen,
                suspicion: self.suspicion,
                verdict: self.verdict,
                has_ended: true,
                ..next
            },
            false => Self { first_seen: self.first_seen, ..next },
        };
    }

    /// Takes a look into account.
    pub(super) fn take(&mut self, look: &Look<'_>, now: Instant) {
        if matches!(look.readiness, Readiness::Ready { .. } | Readiness::NotReady) {
            self.answered = true;
        }
        match self.symptom(look, now) {
            Verdict::Ready => {
                // On Docker's word alone: from here it cannot be asked any more.
                self.answered &= *look.readiness != Readiness::Silent;
                let since = *self.ready_since.get_or_insert(now);
                self.was_ready = true;
                if !self.has_ended || now - since >= RECOVERED {
                    self.suspicion = None;
                    self.verdict = Verdict::Ready;
                    self.has_ended = false;
                }
            }
            Verdict::Starting => self.ready_since = None,
            symptom => {
                let since = match self.suspicion {
                    Some((suspected, since)) if suspected == symptom => since,
                    _ => now,
                };
                self.suspicion = Some((symptom, since));
                self.has_ended |= look.container.state != RunState::Running && matches!(symptom, Verdict::Sick(_));
                if now - since >= lasts(symptom) {
                    self.verdict = symptom;
                    self.ready_since = None;
                }
            }
        }
    }

    /// What this look suggests on its own.
    fn symptom(&self, look: &Look<'_>, now: Instant) -> Verdict {
        let container = look.container;
        let is_new = !self.was_ready && self.age(now) < START_LIMIT;
        match (look.readiness, container.health, container.last_check) {
            _ if container.state != RunState::Running || look.verdict == Verdict::Stopped => look.verdict,
            // Nobody can ask it, and why is seen.
            _ if look.verdict == Verdict::Sick(Cause::NetworkReplaced) => look.verdict,
            (Readiness::Ready { .. } | Readiness::NotReady, ..) => look.verdict,
            // The way from here is cut, not cloudflared: Docker asks it from within and gets an answer.
            (Readiness::Silent, Some(Health::Healthy), Some(LastCheck::Ready))
                if !self.answered || self.suspects(Cause::Hung, now) >= Some(HANG_LASTS) =>
            {
                Verdict::Ready
            }
            (Readiness::Silent, ..) if self.answered => Verdict::Sick(Cause::Hung),
            (Readiness::Silent, Some(Health::Unhealthy), Some(LastCheck::TimedOut)) => Verdict::Sick(Cause::Hung),
            // Its log can be read.
            (Readiness::Silent, ..) if matches!(look.verdict, Verdict::Sick(_)) => look.verdict,
            (Readiness::Silent, Some(Health::Unhealthy), Some(LastCheck::NotReady)) => look.verdict,
            (Readiness::Silent, ..) if is_new => Verdict::Starting,
            (Readiness::Silent, ..) => Verdict::Sick(Cause::NotAnswering),
        }
    }

    /// Time since this start.
    pub(super) fn age(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.began)
    }

    /// Whether something is not certain yet, so that it should be looked at again soon.
    pub(super) fn is_unsettled(&self, now: Instant) -> bool {
        match (self.verdict, self.suspicion) {
            (Verdict::Starting, _) => self.age(now) < START_LIMIT,
            (Verdict::Ready, suspicion) => suspicion.is_some(),
            (verdict, suspicion) => {
                self.ready_since.is_some() || suspicion.is_some_and(|(suspected, _)| suspected != verdict)
            }
        }
    }

    /// Whether a restart is the answer, and due.
    pub(super) fn needs_restart(&self, now: Instant) -> bool {
        let lasts = |cause| self.suspects(cause, now) >= Some(HANG_LASTS);
        matches!(self.verdict, Verdict::Sick(cause) if cause.action() == Action::Restart && lasts(cause))
    }

    /// Whether it is ready and nothing speaks against it.
    pub(super) fn is_surely_ready(&self) -> bool {
        self.verdict == Verdict::Ready && self.suspicion.is_none()
    }

    /// For how long it has been ready without a break.
    pub(super) fn ready_for(&self, now: Instant) -> Option<Duration> {
        self.ready_since.filter(|_| self.is_surely_ready()).map(|since| now - since)
    }

    /// Whether visitors are led to it.
    pub(super) fn serves(&self, now: Instant) -> bool {
        self.ready_for(now) >= Some(EDGE_DELAY)
    }

    /// Why it does not become ready, or not in time.
    pub(super) fn failure(&self, now: Instant) -> Option<Cause> {
        let seen = now - self.first_seen;
        match self.verdict {
            Verdict::Sick(Cause::TokenMalformed) => Some(Cause::TokenMalformed),
            Verdict::Sick(Cause::TokenRefused) if self.suspects(Cause::TokenRefused, now) >= Some(REFUSAL_LASTS) => {
                Some(Cause::TokenRefused)
            }
            Verdict::Sick(cause) if self.has_ended && seen >= CRASH_LIMIT => Some(cause),
            Verdict::Sick(cause) if seen >= READY_LIMIT => Some(cause),
            Verdict::Starting | Verdict::Unknown | Verdict::Stopped if seen >= READY_LIMIT => {
                Some(Cause::EdgeUnreachable)
            }
            _ => None,
        }
    }

    fn suspects(&self, cause: Cause, now: Instant) -> Option<Duration> {
        self.suspicion.filter(|(suspected, _)| *suspected == Verdict::Sick(cause)).map(|(_, since)| now - since)
    }
}

/// How long the looks must agree.
fn lasts(verdict: Verdict) -> Duration {
    match verdict {
        // cloudflared has said so itself, or Docker.
        Verdict::Sick(Cause::TokenMalformed | Cause::TokenRefused | Cause::NetworkReplaced) => Duration::ZERO,
        _ => LASTS,
    }
}
