//! Turns single looks at one container into its verdict. No I/O; the caller passes the time.
//!
//! A look is a moment and may mislead: the machine is busy, a connection is lost and back within the second, or a
//! container that crashes is seen just after its restart. A look therefore raises a suspicion first. The suspicion
//! becomes the verdict once it has lasted, and the supervisor acts later still. Nothing here survives a crash of the
//! agent: the next one looks for itself.

use std::time::Duration;

use tokio::time::Instant;

pub(super) use super::classify::Verdict;
use super::classify::{self, Page};
use super::probe::Readiness;
use crate::cause::{Action, Cause};
use crate::docker::{Health, Inspected, LastCheck, RunState};

/// A connector that is not ready this long after its start has a problem, even if nothing else shows one.
pub(super) const START_LIMIT: Duration = Duration::from_secs(classify::START_LIMIT as u64);
/// How long looks must agree before they count: two timeouts of the probe.
const LASTS: Duration = Duration::from_secs(2);
/// The edge may refuse a token that is seconds old. Give up a successor for its token only after this long.
const REFUSAL_LASTS: Duration = Duration::from_secs(10);
/// A connector that kept crashing has recovered once it has been ready for this long.
const RECOVERED: Duration = Duration::from_secs(5);
/// Act on a hang once it has lasted this long. Docker's health check, every 15 s with 5 s to answer, has failed by
/// then.
const HANG_LASTS: Duration = Duration::from_secs(25);
/// Give up a successor that crashes after this long.
const CRASH_LIMIT: Duration = Duration::from_secs(15);
/// How long a successor gets to become ready. cloudflared needs about a minute to find out that QUIC is blocked and to
/// fall back to HTTP/2.
const READY_LIMIT: Duration = Duration::from_secs(90);
/// The edge needs some seconds to send visitors to a connector that is ready.
const EDGE_DELAY: Duration = Duration::from_secs(5);

/// What one look saw.
#[derive(Debug)]
pub(super) struct Look<'a> {
    pub(super) container: &'a Inspected,
    pub(super) readiness: &'a Readiness,
    /// The verdict of the rules on this look.
    pub(super) verdict: Verdict,
}

/// What `/ready` answers. If the agent cannot ask, what it answered to Docker's health check.
pub(super) fn page(container: &Inspected, readiness: &Readiness) -> Page {
    match (readiness, container.health, container.last_check) {
        (Readiness::Ready { .. }, ..) => Page::Ready,
        (Readiness::NotReady, ..) => Page::NotReady,
        (Readiness::Silent, Some(Health::Unhealthy), Some(LastCheck::NotReady)) => Page::NotReady,
        (Readiness::Silent, ..) => Page::Silent,
    }
}

/// The course of one container, across its starts.
#[derive(Debug)]
pub(super) struct Course {
    container: String,
    started_at: String,
    /// When this start began.
    began: Instant,
    /// When the container was first seen.
    first_seen: Instant,
    pub(super) verdict: Verdict,
    /// A suspicion that later looks must confirm, and since when it has lasted.
    suspicion: Option<(Verdict, Instant)>,
    /// The container has ended of a fault and has not recovered since.
    has_ended: bool,
    /// Since when it has been ready without a break.
    ready_since: Option<Instant>,
    /// It was ready at some time in this start.
    was_ready: bool,
    /// It has answered in this start, so the agent can reach it.
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

    /// Whether this is the course of this start of this container.
    pub(super) fn is_of(&self, container: &Inspected) -> bool {
        self.container == container.id && self.started_at == container.started_at
    }

    /// Begins another start. For the same container, the fault that ended it stays suspected until it is ready.
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

    /// Adds a look.
    pub(super) fn take(&mut self, look: &Look<'_>, now: Instant) {
        if matches!(look.readiness, Readiness::Ready { .. } | Readiness::NotReady) {
            self.answered = true;
        }
        match self.symptom(look, now) {
            Verdict::Ready => {
                // Ready on Docker's word alone: the agent cannot reach it any more.
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

    /// What this look alone suggests.
    fn symptom(&self, look: &Look<'_>, now: Instant) -> Verdict {
        let container = look.container;
        let is_new = !self.was_ready && self.age(now) < START_LIMIT;
        match (look.readiness, container.health, container.last_check) {
            _ if container.state != RunState::Running || look.verdict == Verdict::Stopped => look.verdict,
            // Off its network: nobody can ask it, and the reason is known.
            _ if look.verdict == Verdict::Sick(Cause::NetworkReplaced) => look.verdict,
            (Readiness::Ready { .. } | Readiness::NotReady, ..) => look.verdict,
            // The path from the agent is cut, not cloudflared: Docker asks from inside the container and gets an
            // answer.
            (Readiness::Silent, Some(Health::Healthy), Some(LastCheck::Ready))
                if !self.answered || self.suspects(Cause::Hung, now) >= Some(HANG_LASTS) =>
            {
                Verdict::Ready
            }
            (Readiness::Silent, ..) if self.answered => Verdict::Sick(Cause::Hung),
            (Readiness::Silent, Some(Health::Unhealthy), Some(LastCheck::TimedOut)) => Verdict::Sick(Cause::Hung),
            // Its log can still be read.
            (Readiness::Silent, ..) if matches!(look.verdict, Verdict::Sick(_)) => look.verdict,
            (Readiness::Silent, Some(Health::Unhealthy), Some(LastCheck::NotReady)) => look.verdict,
            (Readiness::Silent, ..) if is_new => Verdict::Starting,
            (Readiness::Silent, ..) => Verdict::Sick(Cause::NotAnswering),
        }
    }

    /// Time since this start began.
    pub(super) fn age(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.began)
    }

    /// Whether something is still uncertain, so that the next look should come soon.
    pub(super) fn is_unsettled(&self, now: Instant) -> bool {
        match (self.verdict, self.suspicion) {
            (Verdict::Starting, _) => self.age(now) < START_LIMIT,
            (Verdict::Ready, suspicion) => suspicion.is_some(),
            (verdict, suspicion) => {
                self.ready_since.is_some() || suspicion.is_some_and(|(suspected, _)| suspected != verdict)
            }
        }
    }

    /// Whether a restart is the remedy, and due.
    pub(super) fn needs_restart(&self, now: Instant) -> bool {
        let lasts = |cause| self.suspects(cause, now) >= Some(HANG_LASTS);
        matches!(self.verdict, Verdict::Sick(cause) if cause.action() == Action::Restart && lasts(cause))
    }

    /// Whether it is ready and no look suggests otherwise.
    pub(super) fn is_surely_ready(&self) -> bool {
        self.verdict == Verdict::Ready && self.suspicion.is_none()
    }

    /// How long it has been ready without a break.
    pub(super) fn ready_for(&self, now: Instant) -> Option<Duration> {
        self.ready_since.filter(|_| self.is_surely_ready()).map(|since| now - since)
    }

    /// Whether Cloudflare sends visitors to it.
    pub(super) fn serves(&self, now: Instant) -> bool {
        self.ready_for(now) >= Some(EDGE_DELAY)
    }

    /// Why it cannot become ready, or did not in time.
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

/// How long looks must agree on this verdict.
fn lasts(verdict: Verdict) -> Duration {
    match verdict {
        // cloudflared or Docker said so itself.
        Verdict::Sick(Cause::TokenMalformed | Cause::TokenRefused | Cause::NetworkReplaced) => Duration::ZERO,
        _ => LASTS,
    }
}
