//! What is sealed for a name: the name itself and its versions, apart from the values.

use serde::{Deserialize, Serialize};

use super::KEPT_VERSIONS;
use crate::secret::SecretName;

/// What is known of one version.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VersionInfo {
    /// Rising by one, never used twice for a name.
    pub version: u64,
    /// Seconds since 1970.
    pub created: i64,
    /// Seconds since 1970; from then on it is as if it were not there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires: Option<i64>,
    /// Size of the value in bytes.
    pub bytes: u32,
}

impl VersionInfo {
    /// Whether it is over at `now`, in seconds since 1970.
    pub fn is_expired(&self, now: i64) -> bool {
        self.expires.is_some_and(|expires| expires <= now)
    }
}

/// The versions of one name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Versions {
    /// The name in plain: the table knows only a keyed hash of it.
    name: String,
    /// The highest number that was given, also to versions that are gone.
    pub last: u64,
    /// Seconds since 1970, when it was deleted; a later version takes that back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deleted: Option<i64>,
    /// It was deleted as a credential that nobody may go on using.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub revoked: bool,
    /// Those whose values are kept, oldest first; none when it is deleted.
    pub kept: Vec<VersionInfo>,
}

impl Versions {
    /// `last`: the highest number that may have been given before.
    pub(super) fn new(name: &SecretName, last: u64) -> Self {
        Self { name: name.to_string(), last, deleted: None, revoked: false, kept: vec![] }
    }

    /// The name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The newest one that counts.
    pub fn newest(&self) -> Option<&VersionInfo> {
        self.kept.last()
    }

    /// Adds a version. Returns those whose values go.
    pub(super) fn add(&mut self, created: i64, expires: Option<i64>, bytes: u32) -> Vec<u64> {
        self.last += 1;
        (self.deleted, self.revoked) = (None, false);
        self.kept.push(VersionInfo { version: self.last, created, expires, bytes });
        let gone = self.kept.len().saturating_sub(KEPT_VERSIONS);
        self.kept.drain(..gone).map(|info| info.version).collect()
    }

    /// Deletes the secret. Returns the versions whose values go.
    pub(super) fn delete(&mut self, now: i64, revoke: bool) -> Vec<u64> {
        self.deleted.get_or_insert(now);
        self.revoked |= revoke;
        self.kept.drain(..).map(|info| info.version).collect()
    }

    /// Whether a version ended at `before` or earlier.
    pub(super) fn has_ended(&self, before: i64) -> bool {
        self.kept.iter().any(|info| info.is_expired(before))
    }

    /// Takes out what ended at `before` or earlier: with the newest version the whole secret ends, so that no older one
    /// comes back. Returns the versions whose values go.
    pub(super) fn end(&mut self, before: i64, now: i64) -> Vec<u64> {
        if self.newest().is_some_and(|newest| newest.is_expired(before)) {
            return self.delete(now, false);
        }
        self.kept.extract_if(.., |info| info.is_expired(before)).map(|info| info.version).collect()
    }

    pub(super) fn to_bytes(&self) -> Vec<u8> {
        // Numbers and a name: there is nothing that JSON cannot hold.
        serde_json::to_vec(self).unwrap_or_default()
    }

    /// `None` for what is no record of that name.
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
