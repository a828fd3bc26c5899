//! The store's own keys, wrapped as a whole by the master key.

use zeroize::Zeroizing;

use crate::seal::{KEY_BYTES, Key, KeyError};

/// Most data keys at a time: the one that seals, and the one before it during a rotation. Each rotation requested
/// during another one adds a key.
const MAX_DATA_KEYS: usize = 64;
/// First byte of a ring: its format version.
const FORM: u8 = 1;
const DATA_KEY_BYTES: usize = 4 + 8 + KEY_BYTES;

/// A key that seals records.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct DataKey {
    /// Rises by one with each rotation. 0 is not a valid id.
    pub(super) id: u32,
    /// Seconds since 1970.
    pub(super) created: i64,
    pub(super) key: Key,
}

/// All keys of a store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Ring {
    /// Hashes a name into its key in the tables.
    pub(super) names: Key,
    /// Seals the state of the store and keys the sum over its records.
    pub(super) state: Key,
    /// Chains the audit lines.
    pub(super) audit: Key,
    /// Oldest first, at least one. The last one seals.
    data: Vec<DataKey>,
}

impl Ring {
    /// Makes the keys of a new store.
    pub(super) fn new(now: i64) -> Result<Self, KeyError> {
        let first = DataKey { id: 1, created: now, key: Key::random()? };
        Ok(Self { names: Key::random()?, state: Key::random()?, audit: Key::random()?, data: vec![first] })
    }

    /// The data key that seals.
    pub(super) fn current(&self) -> &DataKey {
        // `new`, `parse` and `retain_current` leave at least one.
        &self.data[self.data.len() - 1]
    }

    pub(super) fn find(&self, id: u32) -> Option<&DataKey> {
        self.data.iter().find(|key| key.id == id)
    }

    /// Whether records sealed with an older key may be left.
    pub(super) fn is_rotating(&self) -> bool {
        self.data.len() > 1
    }

    /// Adds a data key, which seals from now on. `None` while too many rotations are unfinished to fit another key.
    pub(super) fn add(&mut self, now: i64) -> Result<Option<u32>, KeyError> {
        let next = self.current().id.checked_add(1).filter(|_| self.data.len() < MAX_DATA_KEYS);
        let Some(id) = next else { return Ok(None) };
        self.data.push(DataKey { id, created: now, key: Key::random()? });
        Ok(Some(id))
    }

    /// Forgets all data keys except the one that seals.
    pub(super) fn retain_current(&mut self) {
        self.data.drain(..self.data.len() - 1);
    }

    pub(super) fn to_bytes(&self) -> Zeroizing<Vec<u8>> {
        // Reserve all the room at once: a buffer that grows leaves copies of keys behind.
        let mut bytes = Zeroizing::new(Vec::with_capacity(1 + 3 * KEY_BYTES + self.data.len() * DATA_KEY_BYTES));
        bytes.push(FORM);
        for key in [&self.names, &self.state, &self.audit] {
            bytes.extend_from_slice(key.bytes());
        }
        for data in &self.data {
            bytes.extend_from_slice(&data.id.to_be_bytes());
            bytes.extend_from_slice(&data.created.to_be_bytes());
            bytes.extend_from_slice(data.key.bytes());
        }
        bytes
    }

    /// Parses a ring; `None` for anything that `to_bytes` does not produce.
    pub(super) fn parse(bytes: &[u8]) -> Option<Self> {
        let rest = bytes.strip_prefix(&[FORM])?;
        let (named, data) = rest.split_at_checked(3 * KEY_BYTES)?;
        let mut named = named.chunks_exact(KEY_BYTES).map(Key::from_bytes);
        let data_key = |bytes: &[u8]| {
            let (id, rest) = bytes.split_first_chunk()?;
            let (created, key) = rest.split_first_chunk()?;
            let (id, created) = (u32::from_be_bytes(*id), i64::from_be_bytes(*created));
            Some(DataKey { id, created, key: Key::from_bytes(key)? })
        };
        let keys = data.chunks(DATA_KEY_BYTES).map(data_key).collect::<Option<Vec<_>>>()?;
        let rises = keys.windows(2).all(|pair| pair[0].id < pair[1].id);
        let is_sound = rises && (1..=MAX_DATA_KEYS).contains(&keys.len()) && keys[0].id > 0;
        is_sound.then_some(())?;
        Some(Self { names: named.next()??, state: named.next()??, audit: named.next()??, data: keys })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_ring_is_read_as_it_was_written_and_grows_and_shrinks() {
        let mut ring = Ring::new(7).unwrap();
        assert!(!ring.is_rotating());
        assert_eq!(ring.add(8).unwrap(), Some(2));
        assert_eq!(Ring::parse(&ring.to_bytes()).unwrap(), ring);
        assert_eq!((ring.current().id, ring.is_rotating()), (2, true));
        ring.retain_current();
        assert_eq!(Ring::parse(&ring.to_bytes()).unwrap(), ring);
        assert!(ring.find(1).is_none());
        while ring.add(9).unwrap().is_some() {}
        assert_eq!(ring.data.len(), MAX_DATA_KEYS);
        assert_eq!(Ring::parse(&ring.to_bytes()).unwrap(), ring);
    }

    #[test]
    fn a_ring_that_is_cut_or_longer_is_none() {
        let bytes = Ring::new(7).unwrap().to_bytes();
        for length in 0..bytes.len() {
            assert!(Ring::parse(&bytes[..length]).is_none(), "{length}");
        }
        assert!(Ring::parse(&[bytes.as_slice(), &[0]].concat()).is_none());
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_ring_or_none(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            if let Some(ring) = Ring::parse(&bytes) {
                let written = ring.to_bytes();
                prop_assert_eq!(written.as_slice(), bytes.as_slice());
            }
        }
    }
}
