//! Messages that a master answers with 500 each time, while it takes others. No I/O.
//!
//! Most of what answers so is a master in trouble, which is waited for. But one message that the master cannot digest
//! must not hold up all that come after it: after three tries, and once another message was taken meanwhile, it is set
//! aside, and tried again after pauses that grow.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::time::Instant;

use crate::retry::Backoff;

const TRIES: u32 = 3;
const FIRST_REST: Duration = Duration::from_secs(60);
const LONGEST_REST: Duration = Duration::from_secs(1800);
/// Kinds of messages that are remembered: a master that fails everybody is not remembered for each.
const REMEMBERED: usize = 256;

#[derive(Debug, Default)]
pub(super) struct Stubborn(BTreeMap<String, Tries>);

#[derive(Debug)]
struct Tries {
    count: u32,
    /// Another message was taken since the first of them.
    other_taken: bool,
    rests: Backoff,
    until: Option<Instant>,
}

impl Stubborn {
    /// A message of this kind was answered with 500. Returns whether it is to be set aside.
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

    /// A message of this kind was taken, or will never be tried again. Returns whether it had been set aside.
    pub(super) fn over(&mut self, kind: &str) -> bool {
        self.0.remove(kind).is_some_and(|tries| tries.until.is_some())
    }

    /// A message of this kind was taken.
    pub(super) fn taken(&mut self, kind: &str) -> bool {
        self.0.iter_mut().filter(|(other, _)| *other != kind).for_each(|(_, tries)| tries.other_taken = true);
        self.over(kind)
    }

    /// Whether a message of this kind was set aside and is not to be tried yet.
    pub(super) fn rests(&self, kind: &str, now: Instant) -> bool {
        self.0.get(kind).is_some_and(|tries| tries.until.is_some_and(|until| now < until))
    }

    /// How often a message of this kind was answered so in a row.
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
