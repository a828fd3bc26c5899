//! An outage: the connector runs but has had no connection for some seconds. cloudflared waits ever longer between its
//! tries; a fresh connector beside it tries at once. This module decides when to make one, and from which spec. No I/O;
//! the caller passes the time.

use std::time::Duration;

use tokio::time::Instant;

use super::plan::Make;
use crate::cause::Cause;

/// A lost connection is often back by itself within moments.
const FIRST_AFTER: Duration = Duration::from_secs(10);
/// A connector that was stopped by hand, for example by `docker restart`, has ended by then unless a slow request is
/// open.
const TOLD_TO_END: Duration = Duration::from_secs(4);
/// A connector that was never connected gets longer for its first connection.
const NEVER_READY: Duration = Duration::from_secs(20);
/// Time between two fresh connectors, at the beginning and later on. Each time is 20 % more or less.
const EVERY: Duration = Duration::from_secs(10);
const EVERY_LATER: Duration = Duration::from_secs(30);
/// How long the beginning lasts.
const BEGINNING: Duration = Duration::from_secs(600);
/// How often to look at the two meanwhile, at the beginning and later on.
const LOOK_EVERY: Duration = Duration::from_millis(250);
const LOOK_EVERY_LATER: Duration = Duration::from_secs(1);
/// A connector that is due is made within this time, or not at all.
const OVERDUE: Duration = Duration::from_secs(5);
/// Every third one tries another protocol: UDP may be blocked where TCP is not.
const OTHER_EVERY: u32 = 3;

/// How the connector came to have no connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Dark {
    /// It was told to stop, by hand: it drains, and takes no new requests however long that lasts.
    ToldToEnd,
    /// It lost its connection.
    Lost,
    /// It had no connection in this start.
    NeverReady,
}

/// One outage, from its beginning to the first connection.
#[derive(Debug)]
pub(super) struct Outage {
    began: Instant,
    next: Instant,
    /// How many fresh connectors were made so far.
    pub(super) made: u32,
}

impl Outage {
    /// `dark_since` is when the last connection was found lost.
    pub(super) fn new(dark_since: Instant, why: Dark) -> Self {
        let first = match why {
            Dark::ToldToEnd => TOLD_TO_END,
            Dark::Lost => FIRST_AFTER,
            Dark::NeverReady => NEVER_READY,
        };
        Self { began: dark_since, next: dark_since + jittered(first), made: 0 }
    }

    /// Whether it is time for a fresh connector.
    pub(super) fn is_due(&self, now: Instant) -> bool {
        now >= self.next
    }

    /// Notes that one was made.
    pub(super) fn made(&mut self, now: Instant) {
        self.made = self.made.saturating_add(1);
        self.next = now + jittered(if now - self.began < BEGINNING { EVERY } else { EVERY_LATER });
    }

    /// The spec of the next one: that of the connector that is down, and every third time the other one.
    pub(super) fn make(&self, main: Make, may_differ: bool) -> Make {
        let differs = may_differ && (self.made + 1).is_multiple_of(OTHER_EVERY);
        match (main, differs) {
            (Make::Wanted, false) | (Make::Trial, true) => Make::Wanted,
            (Make::Wanted, true) | (Make::Trial, false) => Make::Trial,
        }
    }

    /// How long until the next look: short while the fresh connector may become ready, and no later than the next one
    /// is due. If one is due but would not help, none is made; that may last for days.
    pub(super) fn look_again(&self, now: Instant) -> Duration {
        let pause = if now - self.began < BEGINNING { LOOK_EVERY } else { LOOK_EVERY_LATER };
        match self.next.checked_duration_since(now) {
            Some(left) if !left.is_zero() => pause.min(left),
            _ if now - self.next < OVERDUE => pause,
            _ => LOOK_EVERY_LATER,
        }
    }
}

/// Many hosts lose the edge at the same moment and should not all return at once.
fn jittered(time: Duration) -> Duration {
    time.mul_f64(0.8 + 0.4 * fastrand::f64())
}

/// Whether a fresh connector may get further than the present one. It cannot if Docker itself cannot resolve a name, or
/// if the edge would refuse the same token again. [`cannot_route`](super::classify::cannot_route) covers a host without
/// a route.
pub(super) fn may_help(cause: Option<Cause>) -> bool {
    match cause {
        None
        | Some(
            Cause::EdgeUnreachable
            | Cause::UdpBlocked
            | Cause::EdgeError
            | Cause::EdgeUntrusted
            | Cause::RegistrationRefused,
        ) => true,
        Some(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINUTE: Duration = Duration::from_secs(60);

    #[tokio::test(start_paused = true)]
    async fn fresh_ones_come_each_ten_seconds_for_ten_minutes_and_each_thirty_for_hours() {
        let began = Instant::now();
        let mut outage = Outage::new(began, Dark::Lost);
        let (mut now, mut last) = (began, began);
        while now - began < Duration::from_secs(4 * 3600) {
            now += Duration::from_millis(100);
            if !outage.is_due(now) {
                continue;
            }
            let gap = (now - last).as_secs_f64();
            let expected = if last - began < BEGINNING { 8.0..12.2 } else { 24.0..36.2 };
            assert!(expected.contains(&gap), "{gap} after {:?}", last - began);
            last = now;
            outage.made(now);
        }
        assert!((500..620).contains(&outage.made), "{}", outage.made);
        // One is due but not made: there is no need to look four times a second.
        let outage = Outage::new(began, Dark::Lost);
        assert!(outage.look_again(began) == LOOK_EVERY && outage.look_again(began + MINUTE) == LOOK_EVERY_LATER);
    }

    #[tokio::test(start_paused = true)]
    async fn two_of_three_are_like_the_one_that_is_down_and_all_where_nothing_else_is_allowed() {
        let mut outage = Outage::new(Instant::now(), Dark::Lost);
        let (mut trials, mut returns) = (0, 0);
        for _ in 0..30 {
            assert_eq!(outage.make(Make::Wanted, false), Make::Wanted);
            trials += u32::from(outage.make(Make::Wanted, true) == Make::Trial);
            returns += u32::from(outage.make(Make::Trial, true) == Make::Wanted);
            outage.made(Instant::now());
        }
        assert_eq!((trials, returns), (10, 10));
    }
}
