//! Remembers the verdict on each container and what was logged, so that each change is logged once.
//!
//! Owned by the task; pure except for the clock. After a crash it is empty, and the task logs its findings once more.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use tokio::time::Instant;

use super::way::{Block, Cause, Way};
use crate::channels::{Unreachable, Ways};

/// Remember a container that is gone for this long, so that a restart or a crash loop is not logged as news.
pub(super) const REMEMBERED: Duration = Duration::from_secs(600);
/// The supervisor has this many looks to connect the tunnel container, including the look that requests it.
const PATIENCE: u32 = 2;

/// Everything that the task remembers.
#[derive(Debug, Default)]
pub(super) struct Memory {
    containers: BTreeMap<String, Entry>,
    /// Whether each labelled container was looked at.
    all_known: bool,
    /// Names of rivals by container id.
    rivals: BTreeMap<String, String>,
}

#[derive(Debug)]
struct Entry {
    name: String,
    /// The current verdict. `None` while the container is gone or the verdict is pending.
    now: Option<Way>,
    /// The verdict that was logged last.
    told: Option<Way>,
    /// Networks that the tunnel container should be on to reach this one.
    networks: BTreeSet<String>,
    /// How many looks have waited for such a network.
    waited: u32,
    seen: Instant,
}

/// A change to log.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum News {
    Open {
        service: String,
        network: String,
        note: Option<String>,
    },
    /// The label of this kind is missing.
    NoRule(&'static str),
    Blocked(Block),
    /// It was blocked, and no block is known any more.
    Unblocked,
}

impl Memory {
    /// Notes a verdict (`None` while it is pending) and the networks to request. Returns what is new.
    pub(super) fn learn(&mut self, id: &str, name: &str, way: Option<Way>, networks: BTreeSet<String>) -> Option<News> {
        let (name, seen) = (name.to_owned(), Instant::now());
        let entry = self.containers.entry(id.to_owned()).or_insert_with(|| Entry {
            name: String::new(),
            now: None,
            told: None,
            networks: BTreeSet::new(),
            waited: 0,
            seen,
        });
        (entry.name, entry.networks, entry.seen) = (name, networks, seen);
        let Some(way) = way else {
            (entry.now, entry.waited) = (None, 0);
            return None;
        };
        let lacks_network = matches!(&way, Way::Blocked(block) if block.cause == Cause::NoNetwork);
        if !lacks_network {
            entry.waited = 0;
        } else if !entry.networks.is_empty() && entry.waited < PATIENCE {
            entry.waited += 1;
            entry.now = None;
            return None;
        }
        entry.now = Some(way.clone());
        let before = entry.told.replace(way.clone());
        match (before, way) {
            (Some(Way::Open { service: before, note: noted, .. }), Way::Open { service, note, .. })
                if before == service && (noted == note || note.is_none()) =>
            {
                None
            }
            (Some(Way::NoRule(before)), Way::NoRule(kind)) if before == kind => None,
            (Some(Way::Blocked(before)), Way::Blocked(block)) if before == block => None,
            (_, Way::Open { service, network, note }) => Some(News::Open { service, network, note }),
            (_, Way::NoRule(kind)) => Some(News::NoRule(kind)),
            (_, Way::Blocked(block)) => Some(News::Blocked(block)),
            (Some(Way::Blocked(_)), Way::Unjudged) => Some(News::Unblocked),
            (_, Way::Unjudged) => None,
        }
    }

    /// Whether a network was requested that the tunnel container is not on yet.
    pub(super) fn waits(&self) -> bool {
        self.containers.values().any(|entry| entry.waited > 0 && entry.now.is_none())
    }

    /// Clears the verdict on containers that no longer run, and drops them after [`REMEMBERED`].
    pub(super) fn forget_all_but(&mut self, runs: impl Fn(&str) -> bool) {
        self.containers.retain(|id, entry| {
            if runs(id) {
                return true;
            }
            (entry.now, entry.waited) = (None, 0);
            entry.networks.clear();
            entry.seen.elapsed() < REMEMBERED
        });
    }

    /// Replaces the known rivals with these names by container id. Returns the ids of the new ones.
    pub(super) fn learn_rivals(&mut self, rivals: BTreeMap<String, String>) -> BTreeSet<String> {
        let before = std::mem::replace(&mut self.rivals, rivals);
        self.rivals.keys().filter(|id| !before.contains_key(*id)).cloned().collect()
    }

    /// The name of a rival that an earlier look found.
    pub(super) fn rival(&self, id: &str) -> Option<&String> {
        self.rivals.get(id)
    }

    /// Notes that each labelled container has been looked at.
    pub(super) fn know_all(&mut self) {
        self.all_known = true;
    }

    /// Everything that the other tasks may read.
    pub(super) fn ways(&self) -> Ways {
        let unreachable = self.containers.iter().filter_map(|(id, entry)| {
            let Some(Way::Blocked(block)) = &entry.now else { return None };
            let (name, problem, remedy) = (entry.name.clone(), block.problem.clone(), block.remedy.clone());
            Some((id.clone(), Unreachable { name, problem, remedy }))
        });
        Ways {
            unreachable: unreachable.collect(),
            networks: self.containers.values().flat_map(|entry| entry.networks.iter().cloned()).collect(),
            all_known: self.all_known,
            rivals: self.rivals.values().cloned().collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(network: &str) -> Way {
        Way::Open { service: "http://web".into(), network: network.into(), note: None }
    }

    fn block(cause: Cause) -> Block {
        Block { cause, problem: "p".into(), remedy: format!("{cause:?}") }
    }

    fn set(names: &[&str]) -> BTreeSet<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn each_change_is_told_once_and_another_network_is_none() {
        let mut memory = Memory::default();
        let mut learn = |way: Way| memory.learn("id", "web", Some(way), BTreeSet::new());
        assert!(matches!(learn(open("a")), Some(News::Open { network, .. }) if network == "a"));
        assert_eq!(learn(open("a")), None);
        assert_eq!(learn(open("b")), None);
        assert_eq!(learn(Way::Unjudged), None);
        assert_eq!(learn(Way::Blocked(block(Cause::NoNetwork))), Some(News::Blocked(block(Cause::NoNetwork))));
        assert_eq!(learn(Way::Blocked(block(Cause::NoNetwork))), None);
        assert_eq!(learn(Way::Blocked(block(Cause::Settings))), Some(News::Blocked(block(Cause::Settings))));
        assert_eq!(learn(Way::Unjudged), Some(News::Unblocked));
        assert!(learn(open("a")).is_some());
        assert_eq!(learn(Way::NoRule("service")), Some(News::NoRule("service")));
        assert_eq!(learn(Way::NoRule("service")), None);
        assert!(memory.ways().unreachable.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn a_judgement_that_is_not_made_yet_is_no_news_and_no_problem() {
        let mut memory = Memory::default();
        let mut learn = |way: Option<Way>| memory.learn("id", "web", way, BTreeSet::new());
        assert_eq!(learn(None), None);
        assert!(learn(Some(open("a"))).is_some());
        assert_eq!((learn(None), learn(Some(open("a")))), (None, None), "a restart");
        assert!(learn(Some(Way::Blocked(block(Cause::Refused)))).is_some());
        assert_eq!(learn(None), None);
        assert!(memory.ways().unreachable.is_empty() && !memory.waits());
    }

    #[tokio::test(start_paused = true)]
    async fn a_restart_is_no_news_and_a_return_after_a_long_time_is() {
        let mut memory = Memory::default();
        let blocked = || Way::Blocked(block(Cause::Settings));
        assert!(memory.learn("id", "web", Some(blocked()), BTreeSet::new()).is_some());
        assert_eq!(memory.ways().unreachable["id"].remedy, "Settings");
        memory.forget_all_but(|_| false);
        assert!(memory.ways().unreachable.is_empty(), "what is gone is no problem");
        assert_eq!(memory.learn("id", "web", Some(blocked()), BTreeSet::new()), None);
        assert_eq!(memory.ways().unreachable.len(), 1);
        tokio::time::advance(REMEMBERED + Duration::from_secs(1)).await;
        memory.forget_all_but(|_| false);
        assert!(memory.learn("id", "web", Some(blocked()), BTreeSet::new()).is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn what_waits_for_a_network_is_told_two_looks_after_it_was_asked_for() {
        let mut memory = Memory::default();
        let lacking = || Some(Way::Blocked(block(Cause::NoNetwork)));
        for look in 0..2 {
            assert_eq!(memory.learn("id", "web", lacking(), set(&["x"])), None, "look {look}");
            assert!(memory.waits());
            assert_eq!((memory.ways().networks, memory.ways().unreachable.len()), (set(&["x"]), 0), "look {look}");
        }
        assert!(matches!(memory.learn("id", "web", lacking(), set(&["x"])), Some(News::Blocked(_))));
        assert_eq!((memory.waits(), memory.ways().unreachable.len()), (false, 1));
        // Connected, and still requested.
        assert!(matches!(memory.learn("id", "web", Some(open("x")), set(&["x"])), Some(News::Open { .. })));
        assert_eq!((memory.ways().networks, memory.ways().unreachable.len()), (set(&["x"]), 0));
        // The next time it waits as long again.
        assert_eq!(memory.learn("id", "web", lacking(), set(&["x"])), None);
        memory.forget_all_but(|_| false);
        assert_eq!((memory.ways().networks, memory.waits()), (set(&[]), false));
    }

    #[test]
    fn where_no_network_can_be_asked_for_nothing_is_waited_for() {
        let mut memory = Memory::default();
        let lacking = Way::Blocked(block(Cause::NoNetwork));
        assert!(memory.learn("id", "web", Some(lacking), BTreeSet::new()).is_some());
        assert!(!memory.waits());
    }

    #[test]
    fn a_rival_is_new_once_while_it_runs_and_again_when_it_comes_back() {
        let mut memory = Memory::default();
        let rivals = |ids: &[&str]| ids.iter().map(|id| ((*id).to_owned(), format!("{id}-name"))).collect();
        assert_eq!(memory.learn_rivals(rivals(&["a", "b"])), set(&["a", "b"]));
        assert_eq!(memory.learn_rivals(rivals(&["a"])), set(&[]));
        assert_eq!(memory.ways().rivals, ["a-name"]);
        assert_eq!(memory.learn_rivals(rivals(&["a", "b"])), set(&["b"]));
    }
}
