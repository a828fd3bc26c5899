//! The state that the file must match: counts, the sum over all records, the end of the audit.

use std::path::Path;

use redb::ReadTransaction;

use super::layout::{KEY_ID_BYTES, Kind, META, state_place};
use super::problem::{damaged, refused};
use crate::store::StoreError;
use crate::store::ring::Ring;

/// The end of the audit, as the store remembers it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct AuditHead {
    /// Number of lines so far.
    pub lines: u64,
    /// Keyed hash of the newest line; zeros before the first.
    pub mac: [u8; 32],
    /// The newest line that retention has removed: number and keyed hash.
    pub removed: (u64, [u8; 32]),
}

/// The state that the file must match.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct State {
    pub(super) change: u64,
    pub(super) records: u64,
    pub(super) secrets: u64,
    /// The highest version number among forgotten names.
    pub(super) floor: u64,
    pub(super) sum: [u8; 32],
    pub(super) audit: AuditHead,
    /// A counter has followed this store. If the counter is missing, somebody removed it.
    pub(super) counted: bool,
}

const STATE_BYTES: usize = 8 * 4 + 32 + 8 + 32 + 8 + 32 + 1;

impl State {
    pub(super) fn to_bytes(self) -> Vec<u8> {
        let (lines, removed) = (self.audit.lines.to_be_bytes(), self.audit.removed.0.to_be_bytes());
        let counts = [self.change, self.records, self.secrets, self.floor].map(u64::to_be_bytes).concat();
        [&counts[..], &self.sum, &lines, &self.audit.mac, &removed, &self.audit.removed.1, &[self.counted.into()]]
            .concat()
    }

    pub(super) fn parse(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; STATE_BYTES] = bytes.try_into().ok()?;
        let mut rest = bytes.as_slice();
        let mut number = || {
            let (number, behind) = rest.split_first_chunk()?;
            rest = behind;
            Some(u64::from_be_bytes(*number))
        };
        let (change, records, secrets, floor) = (number()?, number()?, number()?, number()?);
        let mut rest = &bytes[32..];
        let mut take = |length: usize| {
            let (taken, behind) = rest.split_at(length);
            rest = behind;
            taken
        };
        let sum = take(32).try_into().ok()?;
        let lines = u64::from_be_bytes(take(8).try_into().ok()?);
        let mac = take(32).try_into().ok()?;
        let removed = (u64::from_be_bytes(take(8).try_into().ok()?), take(32).try_into().ok()?);
        let counted = match take(1) {
            [0] => false,
            [1] => true,
            _ => return None,
        };
        Some(Self { change, records, secrets, floor, sum, audit: AuditHead { lines, mac, removed }, counted })
    }

    pub(super) fn add(&mut self, ring: &Ring, kind: Kind, place: &[u8], record: &[u8]) {
        self.records += 1;
        self.fold(ring, kind, place, record);
    }

    pub(super) fn take(&mut self, ring: &Ring, kind: Kind, place: &[u8], record: &[u8]) {
        self.records = self.records.wrapping_sub(1);
        self.fold(ring, kind, place, record);
    }

    /// Hashes key id, nonce and tag instead of the whole record: the record opens with no others.
    pub(super) fn fold(&mut self, ring: &Ring, kind: Kind, place: &[u8], record: &[u8]) {
        let ends = [record.get(..KEY_ID_BYTES + 24).unwrap_or(record), record.last_chunk::<16>().map_or(record, |t| t)];
        let mac = ring.state.mac(b"record", &[kind.tag(), place, ends[0], ends[1]]);
        self.sum.iter_mut().zip(mac).for_each(|(sum, mac)| *sum ^= mac);
    }
}

pub(super) fn read_state(txn: &ReadTransaction, ring: &Ring, id: &[u8; 16], path: &Path) -> Result<State, StoreError> {
    let meta = txn.open_table(META).map_err(|error| refused(path, error))?;
    let sealed = meta.get("state").map_err(|error| refused(path, error))?;
    let sealed = sealed.ok_or_else(|| damaged(path, "its state is missing"))?;
    let state = ring.state.open(&state_place(id), sealed.value()).and_then(|text| State::parse(&text));
    state.ok_or_else(|| damaged(path, "its state was changed"))
}
