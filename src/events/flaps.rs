//! Detects containers in a crash loop. No I/O.
//!
//! A container that crashes at its start and has a restart policy changes many times a minute, and nothing is news
//! after the third end. From then on the agent logs once that the container flaps, with its exit code, and logs no
//! further start or stop. The master gets the last state, at most every five seconds. A minute without a change ends
//! this.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use tokio::time::Instant;

use crate::channels::Change;

/// A container flaps when it ends this often within [`WITHIN`].
const ENDS: usize = 3;
const WITHIN: Duration = Duration::from_secs(30);
/// While a container flaps, send the master its changes at most this often.
const TOLD_EVERY: Duration = Duration::from_secs(5);
/// A container has come to rest after this long without a change.
const REST: Duration = Duration::from_secs(60);
/// Remember the ends of this many containers, those that ended last.
const REMEMBERED: usize = 1024;

#[derive(Debug, Default)]
pub(super) struct Flaps(BTreeMap<String, Flap>);

#[derive(Debug)]
struct Flap {
    ends: VecDeque<Instant>,
    changed: Instant,
    /// Set while it flaps.
    flapping: Option<Flapping>,
}

#[derive(Debug)]
struct Flapping {
    ends: u64,
    told: Instant,
    /// The last change, while it is held back.
    waits: Option<Change>,
    last: (String, bool),
}

/// What to log about a change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Said {
    /// The container started or stopped.
    Usual,
    /// The container flaps; logged once.
    Flaps {
        ends: usize,
        exit_code: Option<i64>,
    },
    Nothing,
}

/// A container that has come to rest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Rested {
    pub(super) name: String,
    pub(super) running: bool,
    pub(super) ends: u64,
}

impl Flaps {
    /// Takes a change. Returns what to log about it, and the change if the master should get it now.
    pub(super) fn changed(&mut self, change: Change, exit_code: Option<i64>, now: Instant) -> (Said, Option<Change>) {
        let id = change.container.id.clone();
        if !self.0.contains_key(&id) {
            // Do not remember a container for a start alone.
            if change.running {
                return (Said::Usual, Some(change));
            }
            self.make_room(now);
        }
        let flap = self.0.entry(id).or_insert_with(|| Flap { ends: VecDeque::new(), changed: now, flapping: None });
        flap.changed = now;
        if !change.running {
            flap.ends.retain(|at| now - *at < WITHIN);
            flap.ends.push_back(now);
            while flap.ends.len() > ENDS {
                flap.ends.pop_front();
            }
        }
        let last = (change.container.name.clone(), change.running);
        if let Some(flapping) = &mut flap.flapping {
            flapping.ends += u64::from(!change.running);
            flapping.last = last;
            if now - flapping.told >= TOLD_EVERY {
                flapping.waits = None;
                flapping.told = now;
                return (Said::Nothing, Some(change));
            }
            flapping.waits = Some(change);
            return (Said::Nothing, None);
        }
        if flap.ends.len() < ENDS {
            return (Said::Usual, Some(change));
        }
        let ends = flap.ends.len();
        flap.flapping = Some(Flapping { ends: ends as u64, told: now, waits: None, last });
        (Said::Flaps { ends, exit_code }, Some(change))
    }

    /// Returns when something is due next.
    pub(super) fn due(&self) -> Option<Instant> {
        let flapping = self.0.values().filter_map(|flap| Some((flap, flap.flapping.as_ref()?)));
        let times = flapping.map(|(flap, flapping)| match flapping.waits {
            Some(_) => flapping.told + TOLD_EVERY,
            None => flap.changed + REST,
        });
        times.min()
    }

    /// Returns the changes that are due now, and the containers that have come to rest.
    pub(super) fn take_due(&mut self, now: Instant) -> (Vec<Change>, Vec<Rested>) {
        let (mut changes, mut rested) = (Vec::new(), Vec::new());
        for flap in self.0.values_mut() {
            let Some(flapping) = &mut flap.flapping else { continue };
            if now - flapping.told >= TOLD_EVERY
                && let Some(change) = flapping.waits.take()
            {
                // Send it even if it repeats the last change sent: a report may have said otherwise in between.
                flapping.told = now;
                changes.push(change);
            }
            if now - flap.changed >= REST {
                let (name, running) = flapping.last.clone();
                rested.push(Rested { name, running, ends: flapping.ends });
                flap.flapping = None;
            }
        }
        self.0.retain(|_, flap| flap.flapping.is_some() || now - flap.changed < WITHIN);
        (changes, rested)
    }

    fn make_room(&mut self, now: Instant) {
        self.0.retain(|_, flap| flap.flapping.is_some() || now - flap.changed < WITHIN);
        if self.0.len() >= REMEMBERED {
            let oldest = self.0.iter().min_by_key(|(_, flap)| flap.changed).map(|(id, _)| id.clone());
            oldest.and_then(|id| self.0.remove(&id));
        }
    }
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;

    use super::*;
    use crate::docker::Container;

    fn change(id: &str, running: bool) -> Change {
        let container = Container {
            id: id.into(),
            name: format!("{id}-name"),
            labels: [].into(),
            status: "running".into(),
            image: "web:1".into(),
        };
        Change { at: Timestamp::UNIX_EPOCH, running, container }
    }

    const SECOND: Duration = Duration::from_secs(1);

    #[tokio::test(start_paused = true)]
    async fn a_container_that_crashes_for_an_hour_is_said_once_and_told_every_five_seconds() {
        let (mut flaps, began) = (Flaps::default(), Instant::now());
        let (mut lines, mut told, mut state) = (Vec::new(), Vec::new(), None);
        let mut now = began;
        // It runs for half a second and starts again half a second later.
        for step in 0..7200_u32 {
            now = began + SECOND / 2 * step;
            if flaps.due().is_some_and(|at| at <= now) {
                let (changes, rested) = flaps.take_due(now);
                assert_eq!(rested, []);
                told.extend(changes.into_iter().map(|change| (now, change.running)));
            }
            let (said, change) = flaps.changed(change("a", step % 2 == 0), Some(137), now);
            lines.push(said);
            told.extend(change.map(|change| (now, change.running)));
            state = told.last().map(|(_, running)| *running);
        }
        let said: Vec<_> = lines.iter().filter(|said| matches!(said, Said::Flaps { .. })).collect();
        assert_eq!(said, [&Said::Flaps { ends: 3, exit_code: Some(137) }]);
        assert_eq!(lines.iter().filter(|said| **said == Said::Usual).count(), 5, "before it was three");
        let later: Vec<_> = told.iter().filter(|(at, _)| *at > began + 3 * SECOND).collect();
        assert!(later.windows(2).all(|two| two[1].0 - two[0].0 >= TOLD_EVERY) && later.len() > 300, "{}", later.len());
        // It ended, and the last change must say so.
        while let Some(at) = flaps.due() {
            now = at;
            let (changes, rested) = flaps.take_due(at);
            state = changes.last().map(|change| change.running).or(state);
            if let Some(rest) = rested.first() {
                assert_eq!(rest, &Rested { name: "a-name".to_owned(), running: false, ends: 3600 });
            }
        }
        assert_eq!(state, Some(false));
        assert!(now < began + Duration::from_secs(3600 + 61) && flaps.0.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn a_few_restarts_by_hand_are_told_as_they_come_and_no_crowd_is_remembered() {
        let (mut flaps, began) = (Flaps::default(), Instant::now());
        for step in 0..40_u32 {
            let now = began + 16 * SECOND * step;
            for running in [false, true] {
                assert_eq!(
                    flaps.changed(change("a", running), Some(0), now),
                    (Said::Usual, Some(change("a", running)))
                );
            }
        }
        for number in 0..10 * REMEMBERED {
            let (said, told) = flaps.changed(change(&number.to_string(), false), None, began + 1000 * SECOND);
            assert!(said == Said::Usual && told.is_some());
        }
        assert_eq!(flaps.0.len(), REMEMBERED);
        assert_eq!(flaps.due(), None);
    }

    #[tokio::test(start_paused = true)]
    async fn the_last_state_is_told_also_when_it_is_the_one_that_was_told_before() {
        let (mut flaps, mut now) = (Flaps::default(), Instant::now());
        for running in [false, true, false, true, false] {
            flaps.changed(change("a", running), Some(1), now);
        }
        // The master got its stop. It starts and stops within the five seconds, and a report may have seen it run.
        flaps.changed(change("a", true), None, now);
        flaps.changed(change("a", false), Some(1), now);
        now += TOLD_EVERY;
        assert_eq!(flaps.take_due(now), (vec![change("a", false)], vec![]));
        now += TOLD_EVERY;
        assert_eq!(flaps.changed(change("a", true), None, now), (Said::Nothing, Some(change("a", true))));
        let at = flaps.due().unwrap();
        let (changes, rested) = flaps.take_due(at);
        assert_eq!((changes.len(), rested.len(), rested[0].running), (0, 1, true));
    }
}
