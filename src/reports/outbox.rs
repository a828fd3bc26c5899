//! Holds what is due for the master, in order. No I/O: the table of its tests is its manual.
//!
//! While the master accepts messages, every change goes out, oldest first. While the master is away, the outbox keeps
//! only the newest change of each container, and at most [`MAX_BACKLOG`] stops in all. When the master is back, a
//! complete report goes first.

use std::collections::{HashSet, VecDeque};
use std::mem;

use crate::channels::Change;

/// Longest queue while the master is slow but reachable. Beyond it, newer changes replace older ones of the same
/// container as if the master were away, and then a report replaces the oldest stops. A change is a few hundred bytes.
const MAX_BACKLOG: usize = 1024;

/// A message to the master.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Message {
    /// The complete inventory.
    Report,
    /// The inventory is unknown (v2), or only a heartbeat (v1).
    Unknown,
    /// The status of the tunnel.
    Status,
    /// The change of one container.
    Change(Box<Change>),
    /// A heartbeat, when nothing else is due.
    Heartbeat,
}

/// When a report goes out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
enum Due {
    #[default]
    No,
    /// As soon as the inventory is complete.
    WhenComplete,
    /// At once, or a message that the inventory is not complete.
    Now,
}

#[derive(Debug, Default)]
pub(super) struct Outbox {
    /// The message that was sent and not answered. It goes out again before anything new of its stream.
    retry: Option<Message>,
    changes: VecDeque<Change>,
    report: Due,
    status: bool,
    away: bool,
    /// Changes that newer ones replaced and that were not counted yet.
    coalesced: usize,
}

impl Outbox {
    /// Adds a change of a container.
    pub(super) fn push(&mut self, change: Change) {
        self.changes.push_back(change);
        if self.away || self.changes.len() > MAX_BACKLOG {
            self.coalesce();
        }
    }

    /// Makes a report due as soon as the inventory is complete.
    pub(super) fn report_when_complete(&mut self) {
        self.report = self.report.max(Due::WhenComplete);
    }

    /// Makes a report due at the end of an interval, or else the message that there is none.
    pub(super) fn report_now(&mut self) {
        self.report = Due::Now;
    }

    /// Makes the tunnel's status due.
    pub(super) fn status(&mut self) {
        self.status = true;
    }

    /// Takes the next message out. [`Outbox::put_back`] returns it.
    pub(super) fn next(&mut self, complete: bool, heartbeat_due: bool) -> Option<Message> {
        if self.away {
            // One message probes the master; the rest waits until the master accepts it.
            self.report = Due::No;
            return Some(if complete { Message::Report } else { Message::Unknown });
        }
        match self.report {
            Due::WhenComplete | Due::Now if complete => {
                self.report = Due::No;
                return Some(Message::Report);
            }
            Due::Now => {
                // The report itself stays due until the inventory is complete.
                self.report = Due::WhenComplete;
                return Some(Message::Unknown);
            }
            Due::WhenComplete | Due::No => {}
        }
        if let Some(message) = self.retry.take() {
            return Some(message);
        }
        if mem::take(&mut self.status) {
            return Some(Message::Status);
        }
        if let Some(change) = self.changes.pop_front() {
            return Some(Message::Change(Box::new(change)));
        }
        heartbeat_due.then_some(Message::Heartbeat)
    }

    /// Returns a message that could not be delivered and is still due.
    pub(super) fn put_back(&mut self, message: Message) {
        match message {
            Message::Report | Message::Unknown => self.report_when_complete(),
            Message::Status | Message::Change(_) => {
                self.retry = Some(message);
                if self.away {
                    self.coalesce();
                }
            }
            // The next heartbeat becomes due by itself.
            Message::Heartbeat => {}
        }
    }

    /// Notes that the master has been away for more than a moment.
    pub(super) fn went_away(&mut self) {
        self.away = true;
        self.coalesce();
    }

    /// Whether one message probes the master and the rest waits.
    pub(super) fn is_away(&self) -> bool {
        self.away
    }

    /// Notes that the master accepted `message`.
    pub(super) fn delivered(&mut self, message: &Message) {
        if mem::take(&mut self.away) && *message != Message::Report {
            self.report_when_complete();
        }
    }

    /// Drops everything: none of it may be sent any more.
    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }

    /// Returns the number of pending changes, including one that is retried.
    pub(super) fn len(&self) -> usize {
        self.changes.len() + usize::from(matches!(self.retry, Some(Message::Change(_))))
    }

    /// Returns how many changes newer ones replaced since the last call.
    pub(super) fn take_coalesced(&mut self) -> usize {
        mem::take(&mut self.coalesced)
    }

    /// Keeps the newest change of each container, in order of arrival.
    fn coalesce(&mut self) {
        let before = self.len();
        let mut newest = HashSet::new();
        let mut kept = VecDeque::with_capacity(self.changes.len());
        for change in mem::take(&mut self.changes).into_iter().rev() {
            if newest.insert(change.container.id.clone()) {
                kept.push_front(change);
            }
        }
        // The number of running containers is limited by the host; that of containers that are gone is not.
        for stop in (0..kept.len()).rev().filter(|at| !kept[*at].running).skip(MAX_BACKLOG).collect::<Vec<_>>() {
            kept.remove(stop);
            self.report_when_complete();
        }
        self.changes = kept;
        self.retry
            .take_if(|message| matches!(message, Message::Change(change) if newest.contains(&change.container.id)));
        self.coalesced += before - self.len();
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
            name: id.into(),
            labels: [].into(),
            status: "running".into(),
            image: "web:1".into(),
        };
        Change { at: Timestamp::UNIX_EPOCH, running, container }
    }

    /// Empties the outbox and returns its messages as words.
    fn said(outbox: &mut Outbox, complete: bool) -> Vec<String> {
        let mut words = Vec::new();
        while let Some(message) = outbox.next(complete, false) {
            words.push(match &message {
                Message::Change(change) => {
                    format!("{}{}", if change.running { '+' } else { '-' }, change.container.id)
                }
                other => format!("{other:?}"),
            });
            outbox.delivered(&message);
        }
        words
    }

    #[test]
    fn while_the_master_is_there_every_change_goes_out_in_order() {
        let mut outbox = Outbox::default();
        for running in [true, false, true] {
            outbox.push(change("a", running));
        }
        assert_eq!(said(&mut outbox, true), ["+a", "-a", "+a"]);
    }

    #[test]
    fn after_an_outage_a_report_comes_first_and_only_the_newest_of_each_container() {
        let mut outbox = Outbox::default();
        outbox.push(change("a", true));
        let first = outbox.next(true, false).unwrap();
        outbox.put_back(first);
        outbox.went_away();
        for (id, running) in [("b", true), ("a", false), ("b", false), ("c", true)] {
            outbox.push(change(id, running));
        }
        assert_eq!(outbox.len(), 3);
        assert_eq!(said(&mut outbox, true), ["Report", "-a", "-b", "+c"]);
    }

    #[test]
    fn an_outage_that_ends_before_docker_is_known_is_followed_by_the_report() {
        let mut outbox = Outbox::default();
        outbox.went_away();
        let probe = outbox.next(false, false).unwrap();
        assert_eq!(probe, Message::Unknown);
        outbox.delivered(&probe);
        assert_eq!(outbox.next(false, false), None);
        assert_eq!(said(&mut outbox, true), ["Report"]);
    }

    #[test]
    fn a_retry_comes_before_anything_new() {
        let mut outbox = Outbox::default();
        outbox.push(change("a", true));
        outbox.push(change("a", false));
        let first = outbox.next(true, false).unwrap();
        outbox.put_back(first);
        outbox.status();
        assert_eq!(said(&mut outbox, true), ["+a", "Status", "-a"]);
    }

    #[test]
    fn an_incomplete_inventory_is_never_reported_and_said_once_an_interval() {
        let mut outbox = Outbox::default();
        outbox.report_when_complete();
        assert_eq!(said(&mut outbox, false), Vec::<String>::new(), "the report waits for the listing");
        outbox.report_now();
        assert_eq!(said(&mut outbox, false), ["Unknown"]);
        assert_eq!(said(&mut outbox, true), ["Report"], "and comes when the listing does");
    }

    #[test]
    fn a_slow_master_cannot_make_the_queue_grow_without_bound() {
        let mut outbox = Outbox::default();
        for number in 0..10 * MAX_BACKLOG {
            outbox.push(change(&format!("{}", number % 50), number % 2 == 0));
        }
        assert!(outbox.len() <= MAX_BACKLOG);
    }

    #[test]
    fn nor_can_containers_that_come_and_go_while_the_master_is_away() {
        let mut outbox = Outbox::default();
        outbox.went_away();
        for number in 0..3 * MAX_BACKLOG {
            outbox.push(change(&number.to_string(), true));
            outbox.push(change(&number.to_string(), false));
        }
        outbox.push(change("there", true));
        assert_eq!(outbox.len(), MAX_BACKLOG + 1);
        let probe = outbox.next(true, false).unwrap();
        outbox.delivered(&probe);
        assert_eq!(probe, Message::Report, "which tells that the others are gone");
        let said = said(&mut outbox, true);
        assert_eq!(said.last().map(String::as_str), Some("+there"));
        let newest = format!("-{}", 3 * MAX_BACKLOG - 1);
        assert!(said.contains(&newest) && !said.contains(&"-0".to_owned()), "the oldest gave way");
    }

    #[test]
    fn ten_thousand_changes_of_fifty_containers_while_the_master_is_away_are_fifty() {
        let mut outbox = Outbox::default();
        outbox.went_away();
        for number in 0..10_000 {
            outbox.push(change(&(number % 50).to_string(), number % 100 < 50));
            assert!(outbox.len() <= 50);
        }
        assert_eq!(outbox.take_coalesced(), 9_950);
        assert_eq!(outbox.take_coalesced(), 0, "each is counted once");
        let probe = outbox.next(true, false).unwrap();
        outbox.delivered(&probe);
        let said = said(&mut outbox, true);
        assert_eq!((probe, said.len()), (Message::Report, 50));
        assert!(said.iter().all(|word| word.starts_with('-')), "the newest of each: {said:?}");
    }

    #[test]
    fn a_heartbeat_is_said_only_when_nothing_else_is() {
        let mut outbox = Outbox::default();
        outbox.push(change("a", true));
        assert!(matches!(outbox.next(true, true), Some(Message::Change(_))));
        assert_eq!(outbox.next(true, true), Some(Message::Heartbeat));
        assert_eq!(outbox.next(true, false), None);
    }
}
