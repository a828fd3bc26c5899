//! Removes expired values, and names that were deleted long ago.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use redb::WriteTransaction;

use super::SealedStore;
use super::layout::{HEADS, Kind, value_place};
use super::problem::refused;
use super::state::State;
use super::transaction::Keys;
use crate::store::StoreError;
use crate::store::record::Versions;
use crate::store::ring::Ring;

/// Seconds that an expired value stays on disk, unreadable. A clock that is wrong by less than this loses no value.
const GRACE: i64 = 24 * 60 * 60;
/// Seconds to remember a deleted name.
const REMEMBERED: i64 = 90 * 24 * 60 * 60;
/// Most deleted names to remember, the newest ones.
const MAX_DELETED: usize = 10_000;
/// Most names that one step looks at, and most that it changes. Another change waits for one step at most.
const LOOKS: usize = 1024;
const CHANGES: usize = 128;

/// Progress of a pass over all names.
#[derive(Debug, Default)]
pub struct Sweep {
    /// Where the pass continues; empty for the beginning.
    from: Vec<u8>,
    /// Deletion times of the newest deleted names in this pass, the oldest on top.
    newest: BinaryHeap<Reverse<i64>>,
    /// The newest deletion time that did not fit into `newest`.
    beyond: Option<i64>,
    /// `beyond` of the previous pass. This pass forgets names deleted then or earlier.
    forget: Option<i64>,
    /// Most deleted names to remember, in place of the default.
    most: Option<usize>,
    /// What this pass has removed.
    pub removed: Removed,
}

/// What a pass has removed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Removed {
    /// Number of expired values.
    pub values: u64,
    /// Number of names that were deleted long ago.
    pub names: u64,
}

impl Sweep {
    fn note(&mut self, deleted: i64) {
        self.newest.push(Reverse(deleted));
        if self.newest.len() > self.most.unwrap_or(MAX_DELETED) {
            self.beyond = self.newest.pop().map(|Reverse(oldest)| oldest).max(self.beyond);
        }
    }

    fn is_forgotten(&self, deleted: i64, now: i64) -> bool {
        deleted.saturating_add(REMEMBERED) <= now || self.forget.is_some_and(|newest| deleted <= newest)
    }

    /// Whether the pass must change this name.
    fn concerns(&self, versions: &Versions, now: i64) -> bool {
        match versions.deleted {
            Some(deleted) => self.is_forgotten(deleted, now),
            None => versions.has_ended(now.saturating_sub(GRACE)),
        }
    }
}

impl SealedStore {
    /// Does one step of a pass over all names. Removes values that expired a day ago, and names that were deleted 90
    /// days ago or have 10,000 newer deleted ones. Returns whether the pass has more to do. When it has not, `sweep` is
    /// ready for the next pass, and `sweep.removed` counts what this one removed.
    ///
    /// # Errors
    /// [`StoreError::Io`], [`StoreError::Damaged`].
    pub fn sweep(&self, sweep: &mut Sweep, now: i64) -> Result<bool, StoreError> {
        if sweep.from.is_empty() {
            sweep.removed = Removed::default();
        }
        let (mut found, mut next, mut looks) = (vec![], None, 0);
        {
            let (ring, txn) = self.read()?;
            let heads = txn.open_table(HEADS).map_err(|error| refused(&self.path, error))?;
            for entry in heads.range(&sweep.from[..]..).map_err(|error| refused(&self.path, error))? {
                let (place, record) = entry.map_err(|error| refused(&self.path, error))?;
                if looks == LOOKS || found.len() == CHANGES {
                    next = Some(place.value().to_vec());
                    break;
                }
                looks += 1;
                let versions = self.parse_head(&ring, place.value(), record.value())?;
                if sweep.concerns(&versions, now) {
                    found.push(place.value().to_vec());
                } else if let Some(deleted) = versions.deleted {
                    sweep.note(deleted);
                }
            }
        }
        if !found.is_empty() {
            let mut inner = self.settled()?;
            let ring = self.ring();
            let done = self.transact(&mut inner, Keys::default(), |state, txn, _| {
                let mut done = Removed::default();
                for place in &found {
                    self.sweep_one(&ring, state, txn, place, sweep, now, &mut done)?;
                }
                Ok(done)
            })?;
            sweep.removed.values += done.values;
            sweep.removed.names += done.names;
        }
        let has_more = next.is_some();
        match next {
            Some(next) => sweep.from = next,
            None => {
                let removed = sweep.removed;
                *sweep = Sweep { forget: sweep.beyond, most: sweep.most, removed, ..Sweep::default() };
            }
        }
        Ok(has_more)
    }

    /// Checks a name again, now that nobody else can change it, and removes what must go.
    #[expect(clippy::too_many_arguments, reason = "what a transaction has, and what the sweep knows")]
    fn sweep_one(
        &self,
        ring: &Ring,
        state: &mut State,
        txn: &WriteTransaction,
        place: &[u8],
        sweep: &Sweep,
        now: i64,
        done: &mut Removed,
    ) -> Result<(), StoreError> {
        let Some(mut versions) = self.head_in(ring, txn, place)?.filter(|versions| sweep.concerns(versions, now))
        else {
            return Ok(());
        };
        let Ok(name) = place.try_into() else { return Ok(()) };
        if versions.deleted.is_some() {
            self.put(ring, state, txn, Kind::Head, place, None)?;
            // Raise the floor, so that no version number of this name is reused.
            state.floor = state.floor.max(versions.last);
            done.names += 1;
            return Ok(());
        }
        let gone = versions.end(now.saturating_sub(GRACE), now);
        state.secrets -= u64::from(versions.deleted.is_some());
        done.values += gone.len() as u64;
        for version in gone {
            self.put(ring, state, txn, Kind::Value, &value_place(name, version), None)?;
        }
        self.put(ring, state, txn, Kind::Head, place, Some(&versions.to_bytes()))
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{Scene, get, name, set, value};
    use super::*;
    use crate::store::{AuditHead, Change};

    fn pass(store: &SealedStore, sweep: &mut Sweep, now: i64) -> Removed {
        while store.sweep(sweep, now).unwrap() {}
        sweep.removed
    }

    fn set_until(store: &SealedStore, of: &str, expires: Option<i64>) -> u64 {
        let change = Change { now: 1000, expires, if_version: None };
        store.set(&name(of), &value("x"), &change, |_| Ok(AuditHead::default())).unwrap()
    }

    fn delete(store: &SealedStore, of: &str, now: i64) {
        store.delete(&name(of), now, false, |_| Ok(AuditHead::default())).unwrap().unwrap();
    }

    #[test]
    fn what_was_over_for_a_day_is_removed_and_nothing_older_comes_back_for_it() {
        let scene = Scene::new();
        let store = scene.open().unwrap();
        set(&store, "stays", "x");
        set(&store, "whole", "x");
        set_until(&store, "whole", Some(1010));
        set_until(&store, "part", Some(1010));
        set(&store, "part", "newer");
        let mut sweep = Sweep::default();
        assert_eq!(pass(&store, &mut sweep, 1010 + GRACE - 1), Removed::default());
        assert_eq!(pass(&store, &mut sweep, 1010 + GRACE), Removed { values: 3, names: 0 });
        assert_eq!(pass(&store, &mut sweep, 1010 + GRACE), Removed::default());
        assert!(store.get(&name("whole"), None, 2000).unwrap().is_none());
        assert!(store.get(&name("whole"), Some(1), 2000).unwrap().is_none());
        assert_eq!((get(&store, "part").as_deref(), get(&store, "stays").as_deref()), (Some("newer"), Some("x")));
        assert_eq!((store.status().secrets, store.status().versions), (2, 2));
        // Opening checks that the sum matches the records.
        drop(store);
        let store = scene.open().unwrap();
        assert_eq!(set(&store, "whole", "again"), 3);
    }

    #[test]
    fn a_deleted_name_is_forgotten_in_time_or_for_newer_ones_and_its_numbers_are_not_given_again() {
        let scene = Scene::new();
        let store = scene.open().unwrap();
        for number in 0..10 {
            set(&store, &format!("s/{number}"), "x");
            set(&store, &format!("s/{number}"), "x");
            delete(&store, &format!("s/{number}"), 1000 + number);
        }
        let mut sweep = Sweep { most: Some(4), ..Sweep::default() };
        assert_eq!(pass(&store, &mut sweep, 2000), Removed::default(), "it counts first");
        assert_eq!(pass(&store, &mut sweep, 2000).names, 6);
        assert_eq!(pass(&store, &mut sweep, 2000).names, 0);
        let is_known = |number: u32| store.history(&name(&format!("s/{number}"))).unwrap().is_some();
        assert_eq!((0..10).filter(|number| is_known(*number)).collect::<Vec<_>>(), [6, 7, 8, 9]);
        assert_eq!(pass(&store, &mut sweep, 1007 + REMEMBERED).names, 2);
        drop(store);
        let store = scene.open().unwrap();
        assert_eq!(set(&store, "s/0", "again"), 3);
        assert_eq!(set(&store, "s/9", "again"), 3, "it is remembered itself");
    }

    #[test]
    fn a_pass_is_many_small_steps_and_what_is_set_in_between_stays() {
        let scene = Scene::new();
        let store = scene.open().unwrap();
        for number in 0..CHANGES + 10 {
            set_until(&store, &format!("s/{number}"), Some(1010));
        }
        let now = 1010 + GRACE;
        let mut sweep = Sweep::default();
        assert!(store.sweep(&mut sweep, now).unwrap());
        assert_eq!(sweep.removed.values, CHANGES as u64);
        set(&store, "s/7", "again");
        assert_eq!(pass(&store, &mut sweep, now).values, CHANGES as u64 + 10 - u64::from(!is_gone(&store)));
        assert_eq!(get(&store, "s/7").as_deref(), Some("again"));
    }

    /// Whether the first value of `s/7` was removed before the second was set.
    fn is_gone(store: &SealedStore) -> bool {
        store.get(&name("s/7"), Some(1), 1000).unwrap().is_none()
    }
}
