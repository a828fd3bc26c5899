//! Detects another agent that uses this one's key, such as a copy of the host or of its `.env`. No I/O.
//!
//! A v2 master keeps one session per key, so each of the two agents ends the other's session when it registers. A
//! restarted master forgets its sessions and looks the same, but it was away for a moment.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::time::Instant;

/// This many sessions lost within [`WITHIN`] are no accident. A session that lasts for [`WITHIN`] ends the contest.
const LOST: usize = 3;
const WITHIN: Duration = Duration::from_secs(600);

#[derive(Debug, Default)]
pub(super) struct Rivalry {
    losses: VecDeque<Instant>,
    /// How many requests had failed by the last loss, because the master was away.
    failures: u64,
    since: Option<Instant>,
    is_contested: bool,
}

impl Rivalry {
    /// Notes that the master no longer knows the session. Returns whether that proves another agent for the first time.
    pub(super) fn lost(&mut self, failures: u64, now: Instant) -> bool {
        if std::mem::replace(&mut self.failures, failures) != failures {
            self.losses.clear();
        }
        self.losses.retain(|at| now - *at < WITHIN);
        self.losses.push_back(now);
        if self.losses.len() < LOST {
            return false;
        }
        self.losses.pop_front();
        !std::mem::replace(&mut self.is_contested, true)
    }

    /// Notes that a session has begun.
    pub(super) fn begun(&mut self, now: Instant) {
        self.since = Some(now);
    }

    /// Whether another agent was detected and no session has lasted since.
    pub(super) fn is_contested(&self) -> bool {
        self.is_contested
    }

    /// Returns when the contest will be over if this session lasts.
    pub(super) fn over_at(&self) -> Option<Instant> {
        self.since.filter(|_| self.is_contested).map(|since| since + WITHIN)
    }

    /// Returns whether the contest has just ended.
    pub(super) fn is_over(&mut self, now: Instant) -> bool {
        let is_over = self.over_at().is_some_and(|at| now >= at);
        if is_over {
            self.is_contested = false;
            self.losses.clear();
        }
        is_over
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINUTE: Duration = Duration::from_secs(60);

    #[tokio::test(start_paused = true)]
    async fn three_sessions_lost_in_ten_minutes_are_another_agent_until_one_has_lasted_ten_minutes() {
        let (mut rivalry, began) = (Rivalry::default(), Instant::now());
        assert!(!rivalry.lost(0, began) && !rivalry.lost(0, began + 4 * MINUTE));
        assert!(rivalry.lost(0, began + 9 * MINUTE), "the third");
        rivalry.begun(began + 9 * MINUTE);
        assert!(!rivalry.lost(0, began + 10 * MINUTE), "no news");
        rivalry.begun(began + 10 * MINUTE);
        assert!(!rivalry.is_over(began + 19 * MINUTE) && rivalry.is_contested());
        assert!(rivalry.is_over(began + 20 * MINUTE) && !rivalry.is_contested());
        assert!(!rivalry.lost(0, began + 21 * MINUTE), "it takes three again");
    }

    #[tokio::test(start_paused = true)]
    async fn sessions_lost_over_a_longer_time_or_with_a_master_that_was_away_are_none() {
        let (mut rivalry, began) = (Rivalry::default(), Instant::now());
        assert!((0..20).all(|hour| !rivalry.lost(0, began + hour * 60 * MINUTE)));
        // A master that restarts again and again.
        assert!((0..20).all(|time| !rivalry.lost(u64::from(time) + 1, began + 1300 * MINUTE + time * MINUTE)));
        assert!(!rivalry.is_contested());
    }
}
