//! Sets aside messages that a master answers with 500 each time while it accepts others. No I/O.
//!
//! Usually such an answer means a master in trouble, and the agent waits. But a single message that the master cannot
//! process must not hold up all later ones. After three tries, and once the master has accepted another message
//! meanwhile, the agent sets it aside and retries it after growing pauses.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::time::Instant;

use crate::retry::Backoff;

const TRIES: u32 = 3;
const FIRST_REST: Duration = Duration::from_secs(60);
const LONGEST_REST: Duration = Duration::from_secs(1800);
/// Remember this many kinds of messages, so that a master that fails at everything does not fill the memory.
const REMEMBERED: usize = 256;

#[derive(Debug, Default)]
pub(super) struct Stubborn(BTreeMap<String, Tries>);

#[derive(Debug)]
struct Tries {
    count: u32,
    /// The master accepted another message since the first try.
    other_taken: bool,
    rests: Backoff,
    until: Option<Instant>,
}

impl Stubborn {
    /// Notes that the master answered a message of this kind with 500. Returns whether to set it aside.
    pub(super) fn failed(&mut self, kind: &str, now: Instant) -> bool {
        if !self.0.contains_key(kind) && self.0.len() >= REMEMBERED {
            self.0.pop_first();
        }
        let tries = self.0.entry(kind.to_owned()).or_insert_with(|| Tries {
            count: 0,
            other_taken: false,
            rests: Backoff::new(FIRST_REST, LONGEST_REST),
            until: None,
        });
        tries.count += 1;
        let is_set_aside = tries.count >= TRIES && tries.other_taken;
        if is_set_aside {
            tries.until = Some(now + tries.rests.next_whole());
        }
        is_set_aside
    }

    /// Notes that a message of this kind was accepted or is never retried. Returns whether it had been set aside.
    pub(super) fn over(&mut self, kind: &str) -> bool {
        self.0.remove(kind).is_some_and(|tries| tries.until.is_some())
    }

    /// Notes that the master accepted a message of this kind. Returns whether it had been set aside.
    pub(super) fn taken(&mut self, kind: &str) -> bool {
        self.0.iter_mut().filter(|(other, _)| *other != kind).for_each(|(_, tries)| tries.other_taken = true);
        self.over(kind)
    }

    /// Whether a message of this kind is set aside and not due for a retry yet.
    pub(super) fn rests(&self, kind: &str, now: Instant) -> bool {
        self.0.get(kind).is_some_and(|tries| tries.until.is_some_and(|until| now < until))
    }

    /// Returns how often in a row the master answered a message of this kind with 500.
    pub(super) fn count(&self, kind: &str) -> u32 {
        self.0.get(kind).map_or(0, |tries| tries.count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_message_is_set_aside_only_when_another_was_taken_and_ever_longer() {
        let (mut stubborn, now) = (Stubborn::default(), Instant::now());
        assert!((0..10).all(|_| !stubborn.failed("status", now)), "the master may be in trouble as a whole");
        assert!(!stubborn.taken("report"));
        assert!(stubborn.failed("status", now));
        assert!(stubborn.rests("status", now + FIRST_REST / 2) && !stubborn.rests("status", now + FIRST_REST));
        assert!(stubborn.failed("status", now + FIRST_REST));
        assert!(stubborn.rests("status", now + 2 * FIRST_REST), "twice as long");
        assert!(stubborn.taken("status"));
        assert!(!stubborn.failed("status", now));
    }

    #[tokio::test(start_paused = true)]
    async fn what_fails_of_any_number_of_containers_is_not_remembered_without_end() {
        let mut stubborn = Stubborn::default();
        for number in 0..10 * REMEMBERED {
            stubborn.failed(&number.to_string(), Instant::now());
        }
        assert_eq!(stubborn.0.len(), REMEMBERED);
    }
}
