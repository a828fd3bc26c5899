//! Lists the agent's current problems. Each task adds what it retries, leaves out or waits for; `/health` and `check`
//! read the list.
//!
//! A task uses a `Retry` to wait before it asks a master again. `Retry` returns a wait only for a stated reason, so
//! nothing is retried forever without a line in the log and one on `/health`. Nothing is on disk.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::master::MasterError;
use crate::retry::{Backoff, Trouble};

/// List this many of one kind. More are in the log only: a list of thousands helps nobody.
const MOST_OF_A_KIND: usize = 100;

/// The list, shared by all clones.
#[derive(Debug, Clone, Default)]
pub struct Concerns(Arc<Mutex<BTreeMap<(&'static str, String), Words>>>);

#[derive(Debug, Clone, PartialEq, Eq)]
struct Words {
    problem: String,
    remedy: String,
}

/// One problem.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Concern {
    /// The kind of problem, short and stable.
    pub id: &'static str,
    /// What it is about, such as the name of a container. May be empty.
    pub about: String,
    /// The problem in one sentence.
    pub problem: String,
    /// What happens next and what to do.
    pub remedy: String,
}

impl Concerns {
    /// Adds a problem, or updates its text.
    pub fn raise(&self, id: &'static str, about: &str, problem: impl Into<String>, remedy: impl Into<String>) {
        let mut list = self.list();
        let key = (id, about.to_owned());
        if list.contains_key(&key) || list.keys().filter(|(kind, _)| *kind == id).count() < MOST_OF_A_KIND {
            list.insert(key, Words { problem: problem.into(), remedy: remedy.into() });
        }
    }

    /// Removes a problem.
    pub fn clear(&self, id: &'static str, about: &str) {
        self.list().remove(&(id, about.to_owned()));
    }

    /// Removes the problems of this kind, except those about what `stays`.
    pub fn retain(&self, id: &'static str, stays: impl Fn(&str) -> bool) {
        self.list().retain(|(kind, about), _| *kind != id || stays(about));
    }

    /// Returns all problems in a fixed order.
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

    /// Locks the list. No await happens under this lock, and no panic leaves it half-changed.
    fn list(&self) -> MutexGuard<'_, BTreeMap<(&'static str, String), Words>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Retries requests to a master: computes the wait and reports the reason. The caller decides whether to retry; the
/// kind of error does not matter here.
#[derive(Debug)]
pub(crate) struct Retry {
    id: &'static str,
    what: &'static str,
    backoff: Backoff,
    trouble: Trouble,
    concerns: Concerns,
}

impl Retry {
    /// Creates a retry. `id` identifies it in the list; `what` begins the line in the log: "registration:".
    pub(crate) fn new(
        id: &'static str,
        what: &'static str,
        first: Duration,
        longest: Duration,
        concerns: Concerns,
    ) -> Self {
        Self { id, what, backoff: Backoff::new(first, longest), trouble: Trouble::new(what), concerns }
    }

    /// Returns how long to wait, and reports why, unless the master is away: [`crate::master`] reports that for all.
    pub(crate) fn after(&mut self, error: &MasterError, next: &str) -> Duration {
        if !error.is_away() {
            self.trouble.failed(&format_args!("the master {error}"), next);
            self.concerns.raise(self.id, "", format!("{} the master {error}", self.what), next);
        }
        self.backoff.next(error.retry_after())
    }

    /// Returns how long to wait if the registration reports the problem.
    pub(crate) fn while_registering(&mut self, error: &MasterError) -> Duration {
        self.backoff.next(error.retry_after())
    }

    /// Notes that the request worked.
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
