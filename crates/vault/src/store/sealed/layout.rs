//! The layout of the file, and what each record is bound to.

use redb::TableDefinition;
use zeroize::Zeroizing;

use crate::seal::KeyError;
use crate::secret::SecretName;
use crate::store::ring::{DataKey, Ring};

/// Format version of the file. A program that finds a version it does not know refuses to start.
pub(super) const FORM: u32 = 1;

pub(super) const META: TableDefinition<&str, &[u8]> = TableDefinition::new("meta");
pub(super) const HEADS: TableDefinition<&[u8], &[u8]> = TableDefinition::new("heads");
pub(super) const VALUES: TableDefinition<&[u8], &[u8]> = TableDefinition::new("values");

/// The table of a record, which is bound to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Head,
    Value,
}

impl Kind {
    pub(super) fn tag(self) -> &'static [u8] {
        match self {
            Self::Head => b"head",
            Self::Value => b"value",
        }
    }

    pub(super) fn table(self) -> TableDefinition<'static, &'static [u8], &'static [u8]> {
        match self {
            Self::Head => HEADS,
            Self::Value => VALUES,
        }
    }
}

/// Bytes of the data key's id at the beginning of a record.
pub(super) const KEY_ID_BYTES: usize = 4;

pub(super) fn key_id(record: &[u8]) -> Option<u32> {
    record.first_chunk().map(|id| u32::from_be_bytes(*id))
}

/// The place that is bound to a record. The record opens nowhere else.
pub(super) fn record_place(store: &[u8; 16], kind: Kind, place: &[u8], key: u32) -> Vec<u8> {
    [b"dockflare-vault ", kind.tag(), b" ", store, &key.to_be_bytes(), place].concat()
}

pub(super) fn ring_place(store: &[u8; 16]) -> Vec<u8> {
    [&b"dockflare-vault ring "[..], store].concat()
}

pub(super) fn state_place(store: &[u8; 16]) -> Vec<u8> {
    [&b"dockflare-vault state "[..], store].concat()
}

pub(super) fn hashed(ring: &Ring, name: &SecretName) -> [u8; 32] {
    ring.names.mac(b"name", &[name.as_str().as_bytes()])
}

pub(super) fn value_place(name: &[u8; 32], version: u64) -> [u8; 40] {
    let mut place = [0; 40];
    place[..32].copy_from_slice(name);
    place[32..].copy_from_slice(&version.to_be_bytes());
    place
}

pub(super) fn seal_record(
    key: &DataKey,
    store: &[u8; 16],
    kind: Kind,
    place: &[u8],
    text: &[u8],
) -> Result<Vec<u8>, KeyError> {
    let sealed = key.key.seal(&record_place(store, kind, place, key.id), text)?;
    Ok([&key.id.to_be_bytes()[..], &sealed].concat())
}

pub(super) fn open_record(
    ring: &Ring,
    store: &[u8; 16],
    kind: Kind,
    place: &[u8],
    record: &[u8],
) -> Option<Zeroizing<Vec<u8>>> {
    let (id, sealed) = record.split_first_chunk::<KEY_ID_BYTES>()?;
    let key = ring.find(u32::from_be_bytes(*id))?;
    key.key.open(&record_place(store, kind, place, key.id), sealed)
}
