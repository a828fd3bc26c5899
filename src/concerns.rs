//! What is wrong around the agent at this moment: one list, to which each task adds what it tries again, leaves out or
//! waits for, and from which `/health` and `check` read.
//!
//! A `Retry` is how a task waits before it asks a master again. It gives the wait only to whoever says why, so that
//! nothing is tried for ever without a line in the log and one on `/health`. Nothing is on disk.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::master::MasterError;
use crate::retry::{Backoff, Trouble};

/// More of one kind are counted in the log only: a list of thousands helps nobody.
const MOST_OF_A_KIND: usize = 100;

/// The list, shared by all clones.
#[derive(Debug, Clone, Default)]
pub struct Concerns(Arc<Mutex<BTreeMap<(&'static str, String), Words>>>);

#[derive(Debug, Clone, PartialEq, Eq)]
struct Words {
    problem: String,
    remedy: String,
}

/// One thing that is wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Concern {
    /// What kind of thing, short and stable.
    pub id: &'static str,
    /// Which one of its kind, such as the name of a container; may be empty.
    pub about: String,
    /// One sentence.
    pub problem: String,
    /// What happens next, and what to do.
    pub remedy: String,
}

impl Concerns {
    /// Adds something, or puts it into other words.
    pub fn raise(&self, id: &'static str, about: &str, problem: impl Into<String>, remedy: impl Into<String>) {
        let mut list = self.list();
        let key = (id, about.to_owned());
        if list.contains_key(&key) || list.keys().filter(|(kind, _)| *kind == id).count() < MOST_OF_A_KIND {
            list.insert(key, Words { problem: problem.into(), remedy: remedy.into() });
        }
    }

    /// Takes something from the list.
    pub fn clear(&self, id: &'static str, about: &str) {
        self.list().remove(&(id, about.to_owned()));
    }

    /// Takes from the list what is of this kind and about nothing that `stays`.
    pub fn retain(&self, id: &'static str, stays: impl Fn(&str) -> bool) {
        self.list().retain(|(kind, about), _| *kind != id || stays(about));
    }

    /// All of it, in a fixed order.
    pub fn all(&self) -> Vec<Concern> {
        let list = self.list();
        let concern = |((id, about), words): (&(&'static str, String), &Words)| Concern {
            id,
            about: about.clone(),
            problem: words.problem.clone(),
            remedy: words.remedy.clone(),
        };
        list.iter().map(concern).collect()
    }

    /// No await happens under this lock, and no panic leaves it half-changed.
    fn list(&self) -> MutexGuard<'_, BTreeMap<(&'static str, String), Words>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Asking a master again: how long to wait, and saying so. What kind of error it was decides nothing here; whoever
/// calls has decided to try again.
#[derive(Debug)]
pub(crate) struct Retry {
    id: &'static str,
    what: &'static str,
    backoff: Backoff,
    trouble: Trouble,
    concerns: Concerns,
}

impl Retry {
    /// `id` names it in the list, `what` begins the line in the log: "registration:".
    pub(crate) fn new(
        id: &'static str,
        what: &'static str,
        first: Duration,
        longest: Duration,
        concerns: Concerns,
    ) -> Self {
        Self { id, what, backoff: Backoff::new(first, longest), trouble: Trouble::new(what), concerns }
    }

    /// How long to wait. Says why, unless the door to the master has said for all that it is away.
    pub(crate) fn after(&mut self, error: &MasterError, next: &str) -> Duration {
        if !error.is_away() {
            self.trouble.failed(&format_args!("the master {error}"), next);
            self.concerns.raise(self.id, "", format!("{} the master {error}", self.what), next);
        }
        self.backoff.next(error.retry_after())
    }

    /// How long to wait, where another task says what is wrong: whoever registers.
    pub(crate) fn while_registering(&mut self, error: &MasterError) -> Duration {
        self.backoff.next(error.retry_after())
    }

    /// It worked.
    pub(crate) fn worked(&mut self) {
        self.backoff.reset();
        if self.trouble.ended() {
            self.concerns.clear(self.id, "");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_that_is_filled_by_containers_without_end_stays_short() {
        let concerns = Concerns::default();
        for number in 0..10 * MOST_OF_A_KIND {
            concerns.raise("label", &number.to_string(), "too long", "shorten it");
        }
        concerns.raise("other", "", "problem", "remedy");
        assert_eq!(concerns.all().len(), MOST_OF_A_KIND + 1);
        concerns.retain("label", |about| about == "7");
        assert_eq!(concerns.all().iter().map(|one| one.about.as_str()).collect::<Vec<_>>(), ["7", ""]);
    }

    #[test]
    fn a_wait_is_given_to_whoever_says_why_and_what_is_away_was_said_by_the_door() {
        let concerns = Concerns::default();
        let mut retry = Retry::new(
            "registration",
            "registration:",
            Duration::from_secs(1),
            Duration::from_secs(60),
            concerns.clone(),
        );
        let away = MasterError::Away { problem: "cannot be reached".into(), retry_after: None };
        assert!(retry.after(&away, "next") <= Duration::from_secs(1));
        assert_eq!(concerns.all(), []);
        let _ = retry.after(&MasterError::Unusable { problem: "agreed to protocol 7".into() }, "update it");
        let listed = concerns.all();
        assert_eq!(listed[0].problem, "registration: the master agreed to protocol 7");
        assert_eq!(listed[0].remedy, "update it");
        retry.worked();
        assert_eq!(concerns.all(), []);
    }
}
