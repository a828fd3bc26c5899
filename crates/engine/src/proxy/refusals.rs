//! Logs one line for each refusal, with route and rule and nothing that the client sent. A flood is only counted.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use dockflare_host::retry::Trouble;
use tokio::time::Instant;
use tracing::warn;

use super::request::Refusal;
use crate::DockerError;

/// Lines per minute; further refusals are only counted.
const MOST_LINES: u32 = 30;
const WINDOW: Duration = Duration::from_secs(60);

/// Which refusals were logged, and how many were not.
#[derive(Debug)]
pub struct Refusals {
    // Std mutexes: no await happens under them.
    window: Mutex<Window>,
    docker: Mutex<Trouble>,
}

#[derive(Debug)]
struct Window {
    began: Instant,
    told: u32,
    untold: u64,
}

impl Default for Refusals {
    fn default() -> Self {
        let window = Window { began: Instant::now(), told: 0, untold: 0 };
        Self { window: Mutex::new(window), docker: Mutex::new(Trouble::new("Docker")) }
    }
}

impl Refusals {
    /// Logs or counts a refusal.
    pub fn tell(&self, refusal: Refusal) {
        self.turn();
        let mut window = self.window.lock().unwrap_or_else(PoisonError::into_inner);
        if window.told >= MOST_LINES {
            window.untold += 1;
            return;
        }
        window.told += 1;
        warn!(route = refusal.route, rule = refusal.rule, "refused a request");
        if window.told == MOST_LINES {
            warn!("many refusals: those of the rest of this minute are counted, not told one by one");
        }
    }

    /// Ends a window that is over, and logs how many refusals it left out. Called now and then.
    pub fn turn(&self) {
        let mut window = self.window.lock().unwrap_or_else(PoisonError::into_inner);
        if window.began.elapsed() < WINDOW {
            return;
        }
        if window.untold > 0 {
            warn!(count = window.untold, "refused as many requests besides");
        }
        *window = Window { began: Instant::now(), told: 0, untold: 0 };
    }

    /// Until when [`Refusals::turn`] has nothing to do.
    pub fn next_turn(&self) -> Instant {
        self.window.lock().unwrap_or_else(PoisonError::into_inner).began + WINDOW
    }

    /// Records that Docker did not answer, or answered with an error.
    pub fn docker_failed(&self, error: &DockerError) {
        if error.is_away() {
            self.docker.lock().unwrap_or_else(PoisonError::into_inner).failed(error, "trying again at the next call");
        } else {
            self.docker_answered();
        }
    }

    /// Records that Docker answered.
    pub fn docker_answered(&self) {
        self.docker.lock().unwrap_or_else(PoisonError::into_inner).ended();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_flood_is_counted_and_each_minute_begins_anew() {
        let refusals = Refusals::default();
        let untold = || refusals.window.lock().unwrap().untold;
        for _ in 0..MOST_LINES {
            refusals.tell(Refusal::http("method"));
        }
        assert_eq!(untold(), 0);
        for _ in 0..1000 {
            refusals.tell(Refusal::http("method"));
        }
        assert_eq!(untold(), 1000);
        tokio::time::sleep_until(refusals.next_turn()).await;
        refusals.turn();
        assert_eq!(untold(), 0);
        refusals.tell(Refusal::http("method"));
        assert_eq!((untold(), refusals.window.lock().unwrap().told), (0, 1));
    }
}
