//! What the master has taken of this host's containers and what it refuses, and so whether a report may be complete.
//! No I/O: `a_master_of_any_bounds_ends_with_what_it_takes` of its tests is its specification.
//!
//! A master refuses a whole report for one container in it that is beyond its bounds, which nobody knows. So after such
//! a refusal each container is told by an event of its own, the largest first: the one whose event is refused is the
//! one, and is left out. Half a report would find it as well, but there is no such thing: a v1 master takes each for
//! the whole and removes the rest, and v2 knows no part of an inventory.
//!
//! From what is missing in a complete report the master removes the rules. So what is left out must be what the master
//! never took; which is known from one report that it did take, from a registration that made this agent, or from the
//! file that is kept while anything is left out. Where it is not known, or not so, nothing is called complete and each
//! container is told for itself.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use tokio::time::Instant;

use crate::channels::Change;
use crate::docker::Container;

type Containers = BTreeMap<String, Container>;

/// A report that was refused as a whole is tried again after this time: whoever bounds it may have been told to allow
/// more.
const TRY_WHOLE_AFTER: Duration = Duration::from_secs(600);

/// Why a message is not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Why {
    /// 413.
    TooLarge,
    /// 400.
    Invalid,
    /// 5xx each time, while others are taken.
    Failing,
}

/// A message about one container, besides those that its changes make.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum One {
    Start(Container),
    /// The master was told of it once, by an earlier life of this agent, and it runs no more.
    Stop {
        id: String,
        name: String,
    },
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Ledger {
    /// What the master may believe to run here, by id with the name; `None` while that is not known.
    believed: Option<BTreeMap<String, String>>,
    /// What was told in this session, by a report or an event, and taken.
    told: BTreeSet<String>,
    left_out: BTreeMap<String, LeftOut>,
    /// A report was refused, and it is not known for what.
    search: Option<Search>,
    whole: Option<Whole>,
    /// Another agent takes this one's sessions: the master's picture is of two hosts.
    pub(super) is_contested: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct LeftOut {
    container: Container,
    /// Whether its own event was refused in this session.
    is_tried: bool,
}

#[derive(Debug, Clone, Copy)]
struct Search {
    why: Why,
    size: usize,
    found: bool,
}

/// A report that was refused though each container in it was taken.
#[derive(Debug, Clone, Copy)]
struct Whole {
    size: usize,
    until: Instant,
}

/// How a search came out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    /// What the report was refused for is left out of the next one.
    Found,
    /// Each container is taken for itself, and together they are not.
    Whole {
        why: Why,
        containers: usize,
        /// About so many bytes.
        size: usize,
    },
}

impl Ledger {
    /// `believed` is what the file of an earlier life says.
    pub(super) fn new(believed: Option<BTreeMap<String, String>>) -> Self {
        Self { believed, ..Self::default() }
    }

    /// A new session: a master that forgot, or another one. `is_first`: it has just made this agent.
    pub(super) fn begin(&mut self, is_first: bool) {
        if is_first {
            self.believed = Some(BTreeMap::new());
        }
        // While two agents take each other's sessions the master has forgotten nothing, and is not told all each time.
        if !self.is_contested || is_first {
            self.told.clear();
        }
        (self.search, self.whole) = (None, None);
        self.left_out.values_mut().for_each(|left| left.is_tried = false);
    }

    /// The master took a complete report of these, ids and names.
    pub(super) fn report_taken(&mut self, reported: BTreeMap<String, String>) {
        self.told = reported.keys().cloned().collect();
        self.believed = Some(reported);
        (self.search, self.whole) = (None, None);
    }

    /// The master took the start of this one.
    pub(super) fn start_taken(&mut self, container: &Container) {
        self.left_out.remove(&container.id);
        self.told.insert(container.id.clone());
        if let Some(believed) = &mut self.believed {
            believed.insert(container.id.clone(), container.name.clone());
        }
    }

    /// The master took the stop of this one.
    pub(super) fn stop_taken(&mut self, id: &str) {
        self.told.remove(id);
        self.left_out.remove(id);
        if let Some(believed) = &mut self.believed {
            believed.remove(id);
        }
    }

    /// The master refuses the start of this one. Returns whether that is news.
    pub(super) fn start_refused(&mut self, container: &Container) -> bool {
        self.told.remove(&container.id);
        if let Some(search) = &mut self.search {
            search.found = true;
        }
        let left = LeftOut { container: container.clone(), is_tried: true };
        let before = self.left_out.insert(container.id.clone(), left);
        before.is_none_or(|before| before.container.labels != container.labels)
    }

    /// The master refuses a complete report of this [`Ledger::size`].
    pub(super) fn report_refused(&mut self, size: usize, why: Why) {
        self.search = Some(Search { why, size, found: false });
    }

    /// Whether a report of these may be called complete, and is worth a try.
    pub(super) fn can_report(&self, containers: &Containers, now: Instant) -> bool {
        let mut left_out = self.left_out.keys().filter(|id| containers.contains_key(*id));
        let fits = |whole: Whole| self.size(containers) < whole.size || now >= whole.until;
        !self.is_contested
            && left_out.all(|id| self.never_took(id))
            && self.whole.is_none_or(fits)
            // What is looked for may be left out as soon as it is found, and there may be more of it.
            && self.search.is_none_or(|search| search.found)
    }

    /// What is to be said of single containers, while no report says it: of what was not told yet, the largest first.
    pub(super) fn next(&self, containers: &Containers, now: Instant) -> Option<One> {
        // A new session may be with a master of other bounds: one try each.
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

    /// How the search came out, once there is nothing more to be told of single containers.
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

    /// Whether reports go without this one.
    pub(super) fn is_left_out(&self, id: &str) -> bool {
        self.left_out.contains_key(id)
    }

    /// Whether there is no use in telling this: a start that was refused in this session, or the end of what the
    /// master never took.
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

    /// Names of what is left out and runs.
    pub(super) fn names(&self, containers: &Containers) -> BTreeSet<String> {
        let runs = self.left_out.iter().filter(|(id, _)| containers.contains_key(*id));
        runs.map(|(_, left)| left.container.name.clone()).collect()
    }

    /// Forgets what is left out and runs no more.
    pub(super) fn forget_gone(&mut self, containers: &Containers) {
        self.left_out.retain(|id, _| containers.contains_key(id));
        self.told.retain(|id| containers.contains_key(id));
    }

    /// What must be known after a restart, while it must: what the master believes, as long as a report may go
    /// without something.
    pub(super) fn to_keep(&self) -> Option<&BTreeMap<String, String>> {
        let is_odd = !self.left_out.is_empty() || self.whole.is_some();
        self.believed.as_ref().filter(|_| is_odd)
    }

    /// About how many bytes a report of these has.
    pub(super) fn size(&self, containers: &Containers) -> usize {
        containers.values().filter(|one| !self.is_left_out(&one.id)).map(|one| weight(one).0).sum()
    }
}

/// About what a container adds to a report in bytes, its longest label, and how many there are.
fn weight(container: &Container) -> (usize, usize) {
    const MEMBERS: usize = 130;
    let labels: usize = container.labels.iter().map(|(key, value)| key.len() + value.len() + 6).sum();
    (MEMBERS + container.name.len() + labels, container.labels.len())
}

#[cfg(test)]
mod tests;
