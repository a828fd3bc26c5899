//! Records which containers of this host the master accepted and which it refuses, and so whether a report may be
//! complete. No I/O: the test `a_master_of_any_bounds_ends_with_what_it_takes` is the specification.
//!
//! A master refuses a whole report for a single container beyond its limits, and the agent does not know the limits.
//! After such a refusal the agent reports each container with an event of its own, the largest first, and leaves out
//! the one whose event the master refuses. A bisection with partial reports is impossible: a v1 master takes each
//! report as complete and removes the rest, and v2 has no partial inventory.
//!
//! The master removes the rules of containers that are missing from a complete report. So the agent may leave out only
//! what the master never accepted. It knows that from an accepted report, from a registration that created this agent,
//! or from the file that it keeps while anything is left out. Otherwise it sends no complete report, but an event for
//! each container.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use tokio::time::Instant;

use crate::channels::Change;
use crate::docker::Container;

type Containers = BTreeMap<String, Container>;

/// Retry a report that was refused as a whole after this long: the limit may have been raised meanwhile.
const TRY_WHOLE_AFTER: Duration = Duration::from_secs(600);

/// Why the master does not accept a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Why {
    /// Status 413.
    TooLarge,
    /// Status 400.
    Invalid,
    /// Status 5xx each time, while the master accepts other messages.
    Failing,
}

/// A message about one container that no change of it caused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum One {
    Start(Container),
    /// An earlier run of this agent reported the container, and it no longer runs.
    Stop {
        id: String,
        name: String,
    },
}

/// See the module documentation.
#[derive(Debug, Default)]
pub(super) struct Ledger {
    /// What the master may believe to run here, by id with the name. `None` while unknown.
    believed: Option<BTreeMap<String, String>>,
    /// What the master accepted in this session, in a report or an event.
    told: BTreeSet<String>,
    left_out: BTreeMap<String, LeftOut>,
    /// Set while it is unknown why a report was refused.
    search: Option<Search>,
    whole: Option<Whole>,
    /// Another agent takes over this one's sessions, so the master's picture mixes two hosts.
    pub(super) is_contested: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct LeftOut {
    container: Container,
    /// Whether the master refused its own event in this session.
    is_tried: bool,
}

#[derive(Debug, Clone, Copy)]
struct Search {
    why: Why,
    size: usize,
    found: bool,
}

/// A report that the master refused although it accepted each container in it.
#[derive(Debug, Clone, Copy)]
struct Whole {
    size: usize,
    until: Instant,
}

/// The outcome of a search.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    /// The cause of the refusal was found. The next report leaves it out.
    Found,
    /// The master accepts each container by itself, but not all together.
    Whole {
        why: Why,
        containers: usize,
        /// The approximate size in bytes.
        size: usize,
    },
}

impl Ledger {
    /// Creates a ledger. `believed` is from the file of an earlier run.
    pub(super) fn new(believed: Option<BTreeMap<String, String>>) -> Self {
        Self { believed, ..Self::default() }
    }

    /// Begins a session: the master may have forgotten everything, or be another one. `is_first` says that it has just
    /// created this agent.
    pub(super) fn begin(&mut self, is_first: bool) {
        if is_first {
            self.believed = Some(BTreeMap::new());
        }
        // While two agents take over each other's sessions, the master forgets nothing. Do not repeat everything then.
        if !self.is_contested || is_first {
            self.told.clear();
        }
        (self.search, self.whole) = (None, None);
        self.left_out.values_mut().for_each(|left| left.is_tried = false);
    }

    /// Notes that the master accepted a complete report of these ids and names.
    pub(super) fn report_taken(&mut self, reported: BTreeMap<String, String>) {
        self.told = reported.keys().cloned().collect();
        self.believed = Some(reported);
        (self.search, self.whole) = (None, None);
    }

    /// Notes that the master accepted the start of this container.
    pub(super) fn start_taken(&mut self, container: &Container) {
        self.left_out.remove(&container.id);
        self.told.insert(container.id.clone());
        if let Some(believed) = &mut self.believed {
            believed.insert(container.id.clone(), container.name.clone());
        }
    }

    /// Notes that the master accepted the stop of this container.
    pub(super) fn stop_taken(&mut self, id: &str) {
        self.told.remove(id);
        self.left_out.remove(id);
        if let Some(believed) = &mut self.believed {
            believed.remove(id);
        }
    }

    /// Notes that the master refuses the start of this container. Returns whether that is news.
    pub(super) fn start_refused(&mut self, container: &Container) -> bool {
        self.told.remove(&container.id);
        if let Some(search) = &mut self.search {
            search.found = true;
        }
        let left = LeftOut { container: container.clone(), is_tried: true };
        let before = self.left_out.insert(container.id.clone(), left);
        before.is_none_or(|before| before.container.labels != container.labels)
    }

    /// Notes that the master refuses a complete report of this [`Ledger::size`].
    pub(super) fn report_refused(&mut self, size: usize, why: Why) {
        self.search = Some(Search { why, size, found: false });
    }

    /// Whether a report of these containers may be called complete and is worth a try.
    pub(super) fn can_report(&self, containers: &Containers, now: Instant) -> bool {
        let mut left_out = self.left_out.keys().filter(|id| containers.contains_key(*id));
        let fits = |whole: Whole| self.size(containers) < whole.size || now >= whole.until;
        !self.is_contested
            && left_out.all(|id| self.never_took(id))
            && self.whole.is_none_or(fits)
            // Once the search has found one container, try a report without it; it may find more.
            && self.search.is_none_or(|search| search.found)
    }

    /// Returns the next message about a single container while no report can be sent: of those not reported yet, the
    /// largest first.
    pub(super) fn next(&self, containers: &Containers, now: Instant) -> Option<One> {
        // A new session may be with a master that has other limits: try each container once.
        let again = self.left_out.values().find(|left| !left.is_tried && containers.contains_key(&left.container.id));
        if let Some(left) = again {
            return containers.get(&left.container.id).cloned().map(One::Start);
        }
        if self.can_report(containers, now) {
            return None;
        }
        let gone = self.believed.iter().flatten().find(|(id, _)| !containers.contains_key(*id));
        if let Some((id, name)) = gone.filter(|_| self.search.is_none()) {
            return Some(One::Stop { id: id.clone(), name: name.clone() });
        }
        let untold = containers.values().filter(|one| !self.told.contains(&one.id) && !self.is_left_out(&one.id));
        untold.max_by_key(|one| weight(one)).cloned().map(One::Start)
    }

    /// Ends the search once no message about a single container is left, and returns its outcome.
    pub(super) fn settle(&mut self, containers: &Containers, now: Instant) -> Option<Outcome> {
        let search = self.search?;
        if !search.found && self.next(containers, now).is_some() {
            return None;
        }
        self.search = None;
        if search.found {
            return Some(Outcome::Found);
        }
        self.whole = Some(Whole { size: search.size, until: now + TRY_WHOLE_AFTER });
        let containers = containers.keys().filter(|id| !self.is_left_out(id)).count();
        Some(Outcome::Whole { why: search.why, containers, size: search.size })
    }

    /// Whether reports leave out this container.
    pub(super) fn is_left_out(&self, id: &str) -> bool {
        self.left_out.contains_key(id)
    }

    /// Whether a change is pointless to send: a start that was refused in this session, or the stop of a container that
    /// the master never accepted.
    pub(super) fn is_idle_word(&self, change: &Change) -> bool {
        let container = &change.container;
        let Some(left) = self.left_out.get(&container.id) else { return false };
        if change.running {
            left.is_tried && left.container.labels == container.labels
        } else {
            self.never_took(&container.id)
        }
    }

    fn never_took(&self, id: &str) -> bool {
        self.believed.as_ref().is_some_and(|believed| !believed.contains_key(id))
    }

    /// Returns the names of running containers that are left out.
    pub(super) fn names(&self, containers: &Containers) -> BTreeSet<String> {
        let runs = self.left_out.iter().filter(|(id, _)| containers.contains_key(*id));
        runs.map(|(_, left)| left.container.name.clone()).collect()
    }

    /// Forgets containers that no longer run.
    pub(super) fn forget_gone(&mut self, containers: &Containers) {
        self.left_out.retain(|id, _| containers.contains_key(id));
        self.told.retain(|id| containers.contains_key(id));
    }

    /// Returns what the master believes, while the next start must know it: as long as containers may be missing from a
    /// report.
    pub(super) fn to_keep(&self) -> Option<&BTreeMap<String, String>> {
        let is_odd = !self.left_out.is_empty() || self.whole.is_some();
        self.believed.as_ref().filter(|_| is_odd)
    }

    /// Returns the approximate size of a report of these containers in bytes.
    pub(super) fn size(&self, containers: &Containers) -> usize {
        containers.values().filter(|one| !self.is_left_out(&one.id)).map(|one| weight(one).0).sum()
    }
}

/// Returns the approximate bytes that a container adds to a report, and the number of its labels.
fn weight(container: &Container) -> (usize, usize) {
    const MEMBERS: usize = 130;
    let labels: usize = container.labels.iter().map(|(key, value)| key.len() + value.len() + 6).sum();
    (MEMBERS + container.name.len() + labels, container.labels.len())
}

#[cfg(test)]
mod tests;
