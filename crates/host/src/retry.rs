//! Waits before a retry, and logs a lasting failure once instead of at each try.

use std::fmt;
use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBackoff, ExponentialBuilder};
use jiff::Timestamp;
use tokio::time::Instant;
use tracing::{info, warn};

/// Exponential back-off with full jitter: each wait is drawn evenly between a floor and a bound that doubles.
///
/// Full jitter spreads a thousand agents over the whole interval when their master returns. The floor keeps
/// the luckiest of them from asking at once.
#[derive(Debug)]
pub struct Backoff {
    builder: ExponentialBuilder,
    bounds: ExponentialBackoff,
}

/// The shortest wait.
const FLOOR: Duration = Duration::from_millis(100);

impl Backoff {
    /// Waits of up to `first`, then up to twice that and so on, never above `cap`.
    pub fn new(first: Duration, cap: Duration) -> Self {
        let builder = ExponentialBuilder::new().with_min_delay(first).with_max_delay(cap).without_max_times();
        Self { bounds: builder.build(), builder }
    }

    /// The wait before the next try, at least as long as the other side asked for, up to an hour.
    pub fn next(&mut self, asked: Option<Duration>) -> Duration {
        let bound = self.bounds.next().unwrap_or(FLOOR).max(FLOOR);
        let jittered = FLOOR + (bound - FLOOR).mul_f64(fastrand::f64());
        // Cap what a master may ask for at one hour.
        let asked = asked.unwrap_or_default().min(Duration::from_secs(3600));
        asked + jittered
    }

    /// The bound without jitter, for tries that others do not make at the same moment.
    pub fn next_whole(&mut self) -> Duration {
        self.bounds.next().unwrap_or(FLOOR)
    }

    /// Starts over: the next wait is a short one again.
    pub fn reset(&mut self) {
        self.bounds = self.builder.build();
    }
}

/// Something that should work and does not.
///
/// Logs when it begins, at most every ten minutes while it lasts, and when it ends.
#[derive(Debug)]
pub struct Trouble {
    what: &'static str,
    since: Option<Lasting>,
}

#[derive(Debug)]
struct Lasting {
    began: Instant,
    /// The same in wall-clock time, for people.
    since: Timestamp,
    said: Instant,
    tries: u32,
    /// The causes that were logged; each is news once.
    told: Vec<String>,
}

/// How many causes of one trouble are logged as news, so that an error text that varies each time cannot fill the log.
const MOST_CAUSES: usize = 5;
/// How often the log repeats a lasting trouble.
const REPEAT: Duration = Duration::from_secs(600);

impl Trouble {
    /// Creates a trouble that has not occurred yet. `what` is the subject of the sentences: "the master", "Docker".
    pub fn new(what: &'static str) -> Self {
        Self { what, since: None }
    }

    /// Records a failure. `next` says what happens now and what the operator can do.
    pub fn failed(&mut self, error: &dyn fmt::Display, next: &str) {
        let (what, now, text) = (self.what, Instant::now(), error.to_string());
        match &mut self.since {
            None => {
                warn!("{what} {text}; {next}");
                let since = Timestamp::now();
                self.since = Some(Lasting { began: now, since, said: now, tries: 1, told: vec![text] });
            }
            Some(lasting) => {
                lasting.tries += 1;
                let (tries, lasts) = (lasting.tries, Lasts(now - lasting.began));
                let since = lasting.since.strftime("%Y-%m-%dT%H:%M:%SZ");
                if now - lasting.said >= REPEAT {
                    warn!(tries, %since, %lasts, "{what} still {text}; {next}");
                } else if lasting.told.len() < MOST_CAUSES && !lasting.told.contains(&text) {
                    warn!(tries, %since, %lasts, "{what} {text}; {next}");
                    lasting.told.push(text);
                } else {
                    return;
                }
                lasting.said = now;
            }
        }
    }

    /// Forgets the trouble without a log line: nobody needs the thing any more, so it does not work again.
    pub fn dropped(&mut self) {
        self.since = None;
    }

    /// Records that it works. Returns whether it did not before.
    pub fn ended(&mut self) -> bool {
        let Some(lasting) = self.since.take() else { return false };
        info!(tries = lasting.tries, after = %Lasts(lasting.began.elapsed()), "{} works again", self.what);
        true
    }
}

/// Formats a duration as people say it: `3.2s`, `4m10s`, `2h05m`.
#[derive(Debug, Clone, Copy)]
pub struct Lasts(
    /// How long.
    pub Duration,
);

impl fmt::Display for Lasts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = self.0.as_secs();
        match seconds {
            0..60 => write!(f, "{:.1}s", self.0.as_secs_f64()),
            60..3600 => write!(f, "{}m{:02}s", seconds / 60, seconds % 60),
            _ => write!(f, "{}h{:02}m", seconds / 3600, seconds / 60 % 60),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_are_jittered_between_the_floor_and_a_growing_bound() {
        let mut backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(8));
        for round in 0..50 {
            for bound in [1, 2, 4, 8, 8, 8] {
                let wait = backoff.next(None);
                assert!(wait >= FLOOR && wait <= Duration::from_secs(bound), "round {round}: {wait:?} over {bound}s");
            }
            backoff.reset();
        }
    }

    #[test]
    fn the_other_side_is_never_asked_sooner_than_it_said() {
        let longest = Duration::from_secs(60);
        let mut backoff = Backoff::new(Duration::from_secs(1), longest);
        // However short the requested wait is, the back-off comes on top.
        for asked in [1, 30].map(Duration::from_secs) {
            let waits: Vec<_> = (0..200).map(|_| backoff.next(Some(asked))).collect();
            assert!(waits.iter().all(|wait| *wait >= asked && *wait <= asked + longest), "{waits:?}");
            assert!(waits.iter().any(|wait| *wait > asked + longest / 2), "{waits:?}");
        }
        assert!(backoff.next(Some(Duration::from_secs(1 << 40))) <= Duration::from_secs(7200));
    }

    /// The moments of the retries during an outage of this length: the sum of the waits that poller, reporter and
    /// registrar draw.
    fn tries(first: Duration, cap: Duration, over: Duration) -> Vec<Duration> {
        let mut backoff = Backoff::new(first, cap);
        let mut at = Duration::ZERO;
        let next = std::iter::repeat_with(|| {
            at += backoff.next(None);
            at
        });
        next.take_while(|at| *at < over).collect()
    }

    #[test]
    fn a_master_that_is_away_for_a_day_is_asked_within_bounds_and_found_within_one_wait() {
        let day = Duration::from_secs(24 * 3600);
        // The waits of poller and registrar, and those of the reporter.
        for (first, cap) in [(1000, 60), (500, 30)] {
            let cap = Duration::from_secs(cap);
            let tries = tries(Duration::from_millis(first), cap, day);
            let mean = day.as_secs_f64() / tries.len() as f64;
            let half = cap.as_secs_f64() / 2.0;
            assert!((0.9 * half..1.1 * half).contains(&mean), "{} tries, one in {mean:.1} s", tries.len());
            let longest = tries.windows(2).map(|two| two[1] - two[0]).max().unwrap();
            assert!(longest <= cap, "{longest:?}: nobody waits longer for a master that is back");
            let hour = tries.iter().filter(|at| at.as_secs() < 3600).count();
            assert!(hour as f64 <= 3600.0 / half * 1.5, "{hour} tries in the first hour");
        }
    }

    #[test]
    fn a_thousand_agents_whose_master_was_away_for_an_hour_come_back_spread() {
        let (first, cap) = (Duration::from_secs(1), Duration::from_secs(60));
        let hour = Duration::from_secs(3600);
        let mut tenths = [0; 10];
        for _ in 0..1000 {
            // All agents lose the master at one instant, and it is back an hour later.
            let back = tries(first, cap, hour + 2 * cap).into_iter().find(|at| *at >= hour).unwrap() - hour;
            tenths[((back.as_secs_f64() / 6.0) as usize).min(9)] += 1;
        }
        // Evenly drawn waits leave remainders that are shorter rather than longer: a fifth in the first tenth.
        assert!(tenths.iter().all(|count| *count < 300), "{tenths:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn what_lasts_is_said_when_it_begins_every_ten_minutes_with_its_count_and_when_it_ends() {
        let ring = crate::logging::Ring::default();
        let kept = ring.clone();
        let log = tracing_subscriber::fmt().with_ansi(false).with_writer(move || kept.clone()).finish();
        let _log = tracing::subscriber::set_default(log);
        let mut trouble = Trouble::new("the master");
        for _ in 0..42 {
            trouble.failed(&"cannot be reached", "trying again");
            tokio::time::sleep(Duration::from_secs(15)).await;
        }
        assert!(trouble.ended());
        let lines = ring.lines();
        assert_eq!(lines.len(), 3, "{lines:#?}");
        assert!(lines[0].contains("WARN") && lines[0].ends_with("the master cannot be reached; trying again"));
        assert!(lines[1].contains("the master still cannot be reached; trying again tries=41 since=2"), "{}", lines[1]);
        assert!(lines[1].ends_with(" lasts=10m00s"), "{}", lines[1]);
        assert!(lines[2].contains("INFO") && lines[2].contains("the master works again tries=42"), "{}", lines[2]);
    }

    #[test]
    fn lengths_read_as_people_say_them() {
        let said = |seconds: f64| Lasts(Duration::from_secs_f64(seconds)).to_string();
        assert_eq!(said(3.24), "3.2s");
        assert_eq!(said(250.0), "4m10s");
        assert_eq!(said(7_500.0), "2h05m");
    }
}
