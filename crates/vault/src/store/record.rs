//! The record sealed for a name: the name itself and its versions, without the values.

use serde::{Deserialize, Serialize};

use super::KEPT_VERSIONS;
use crate::secret::SecretName;

/// What the store knows about one version.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VersionInfo {
    /// Number of the version: rises by one, never reused for a name.
    pub version: u64,
    /// When it was stored, in seconds since 1970.
    pub created: i64,
    /// When it expires, in seconds since 1970. From then on reads treat it as missing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires: Option<i64>,
    /// Size of the value in bytes.
    pub bytes: u32,
}

impl VersionInfo {
    /// Whether it has expired at `now`, in seconds since 1970.
    pub fn is_expired(&self, now: i64) -> bool {
        self.expires.is_some_and(|expires| expires <= now)
    }
}

/// The versions of one name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Versions {
    /// The plain name: the table holds only a keyed hash of it.
    name: String,
    /// The highest version number given so far, including versions that are gone.
    pub last: u64,
    /// When the secret was deleted, in seconds since 1970. A later version clears it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deleted: Option<i64>,
    /// Whether it was deleted as a credential that nobody may keep using.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub revoked: bool,
    /// Versions whose values are kept, oldest first. Empty after a deletion.
    pub kept: Vec<VersionInfo>,
}

impl Versions {
    /// `last`: the highest version number that may have been given before.
    pub(super) fn new(name: &SecretName, last: u64) -> Self {
        Self { name: name.to_string(), last, deleted: None, revoked: false, kept: vec![] }
    }

    /// The name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The newest kept version.
    pub fn newest(&self) -> Option<&VersionInfo> {
        self.kept.last()
    }

    /// Adds a version. Returns the versions whose values must go.
    pub(super) fn add(&mut self, created: i64, expires: Option<i64>, bytes: u32) -> Vec<u64> {
        self.last += 1;
        (self.deleted, self.revoked) = (None, false);
        self.kept.push(VersionInfo { version: self.last, created, expires, bytes });
        let gone = self.kept.len().saturating_sub(KEPT_VERSIONS);
        self.kept.drain(..gone).map(|info| info.version).collect()
    }

    /// Deletes the secret. Returns the versions whose values must go.
    pub(super) fn delete(&mut self, now: i64, revoke: bool) -> Vec<u64> {
        self.deleted.get_or_insert(now);
        self.revoked |= revoke;
        self.kept.drain(..).map(|info| info.version).collect()
    }

    /// Whether a version expired at `before` or earlier.
    pub(super) fn has_ended(&self, before: i64) -> bool {
        self.kept.iter().any(|info| info.is_expired(before))
    }

    /// Removes versions that expired at `before` or earlier. If the newest is one of them, deletes the whole secret, so
    /// that no older version comes back. Returns the versions whose values must go.
    pub(super) fn end(&mut self, before: i64, now: i64) -> Vec<u64> {
        if self.newest().is_some_and(|newest| newest.is_expired(before)) {
            return self.delete(now, false);
        }
        self.kept.extract_if(.., |info| info.is_expired(before)).map(|info| info.version).collect()
    }

    pub(super) fn to_bytes(&self) -> Vec<u8> {
        // Cannot fail: JSON can hold numbers and a name.
        serde_json::to_vec(self).unwrap_or_default()
    }

    /// Parses a record; `None` if the bytes are not a valid one.
    pub(super) fn parse(bytes: &[u8]) -> Option<Self> {
        let versions: Self = serde_json::from_slice(bytes).ok()?;
        versions.name.parse::<SecretName>().ok()?;
        let rises = versions.kept.windows(2).all(|pair| pair[0].version < pair[1].version);
        let fits = versions.newest().is_none_or(|newest| newest.version == versions.last);
        (rises && fits).then_some(versions)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_newest_ten_are_kept_and_no_number_is_given_twice() {
        let mut versions = Versions::new(&"a/b".parse().unwrap(), 0);
        for number in 1..=10 {
            assert!(versions.add(number, None, 1).is_empty());
        }
        assert_eq!(versions.add(11, Some(20), 1), [1]);
        assert_eq!(versions.newest().unwrap().version, 11);
        assert_eq!(
            (versions.newest().unwrap().is_expired(19), versions.newest().unwrap().is_expired(20)),
            (false, true)
        );
        assert_eq!(versions.delete(12, false), (2..=11).collect::<Vec<_>>());
        assert!(versions.delete(12, true).is_empty());
        assert!(Versions::parse(&versions.to_bytes()).unwrap().revoked);
        assert_eq!(Versions::parse(&versions.to_bytes()).unwrap(), versions);
        versions.add(13, None, 1);
        assert_eq!((versions.last, versions.deleted, versions.revoked, versions.kept.len()), (12, None, false, 1));
        assert_eq!(Versions::parse(&versions.to_bytes()).unwrap(), versions);
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_record_or_none(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = Versions::parse(&bytes);
        }
    }
}
