//! What the vault keeps: a name and bytes. The bytes are wiped on drop, and `Debug` never shows them.

use std::fmt;
use std::str::FromStr;

use zeroize::{Zeroize, Zeroizing};

/// Longest name, in bytes.
pub const MAX_NAME_BYTES: usize = 255;
/// Largest value, in bytes: Docker Swarm's limit for a secret, rounded up to 512 KiB. Use a file for anything larger.
pub const MAX_VALUE_BYTES: usize = 512 << 10;

/// A name such as `app/db-password`: segments of `[A-Za-z0-9._-]` between single slashes, none of them `.` or `..`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SecretName(String);

/// Why a text is not a valid name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// It is empty.
    #[error("the name is empty")]
    Empty,
    /// It is longer than 255 bytes.
    #[error("the name has {0} bytes, and 255 are the most")]
    TooLong(usize),
    /// Two slashes in a row, or one at either end.
    #[error("the name {0:?} has an empty segment: write segments between single slashes, as in app/db-password")]
    EmptySegment(String),
    /// A segment that is a relative path (`.` or `..`), not a name.
    #[error("the name {0:?} has a segment \".\" or \"..\": name what is meant")]
    Dots(String),
    /// A character outside the allowed set.
    #[error("the name {name:?} has the character {character:?}: use letters, digits, '.', '_', '-' and '/'")]
    Character {
        /// The whole text.
        name: String,
        /// The first character that is not allowed.
        character: char,
    },
}

impl SecretName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for SecretName {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        if text.is_empty() {
            return Err(NameError::Empty);
        }
        if text.len() > MAX_NAME_BYTES {
            return Err(NameError::TooLong(text.len()));
        }
        let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-' | '/');
        if let Some(character) = text.chars().find(|c| !fits(*c)) {
            return Err(NameError::Character { name: text.to_owned(), character });
        }
        for segment in text.split('/') {
            match segment {
                "" => return Err(NameError::EmptySegment(text.to_owned())),
                "." | ".." => return Err(NameError::Dots(text.to_owned())),
                _ => {}
            }
        }
        Ok(Self(text.to_owned()))
    }
}

impl fmt::Display for SecretName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The bytes of a secret.
#[derive(Clone, PartialEq, Eq)]
pub struct Value(Zeroizing<Vec<u8>>);

/// A value beyond 512 KiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the value has {0} bytes, and {MAX_VALUE_BYTES} are the most: larger things are files")]
pub struct TooLarge(pub usize);

impl Value {
    /// Takes ownership of the bytes and wipes them on drop. Wipes them at once when there are too many.
    ///
    /// # Errors
    /// [`TooLarge`] beyond [`MAX_VALUE_BYTES`].
    pub fn new(mut bytes: Vec<u8>) -> Result<Self, TooLarge> {
        if bytes.len() > MAX_VALUE_BYTES {
            let length = bytes.len();
            bytes.zeroize();
            return Err(TooLarge(length));
        }
        Ok(Self(Zeroizing::new(bytes)))
    }

    /// The bytes themselves, for the door that hands them out.
    pub fn expose(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Value({} bytes)", self.0.len())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_name_is_made_of_plain_segments() {
        for good in ["a", "app/db-password", "A.b_c-9/x", "..a", "a..", "..."] {
            assert_eq!(good.parse::<SecretName>().unwrap().as_str(), good);
        }
        for (bad, why) in [
            ("", "is empty"),
            ("/a", "empty segment"),
            ("a/", "empty segment"),
            ("a//b", "empty segment"),
            ("a/../b", "\"..\""),
            (".", "\".\""),
            ("a b", "' '"),
            ("a\0b", "'\\0'"),
            ("ä", "'ä'"),
            ("a%2fb", "'%'"),
            ("a\\b", "'\\\\'"),
        ] {
            let error = bad.parse::<SecretName>().unwrap_err().to_string();
            assert!(error.contains(why), "{bad:?}: {error}");
        }
        assert!("a".repeat(255).parse::<SecretName>().is_ok());
        assert_eq!("a".repeat(256).parse::<SecretName>(), Err(NameError::TooLong(256)));
    }

    #[test]
    fn a_value_is_bounded_and_never_shown() {
        assert!(Value::new(vec![0; MAX_VALUE_BYTES]).is_ok());
        assert_eq!(Value::new(vec![0; MAX_VALUE_BYTES + 1]), Err(TooLarge(MAX_VALUE_BYTES + 1)));
        assert_eq!(format!("{:?}", Value::new(b"hunter2".to_vec()).unwrap()), "Value(7 bytes)");
    }

    proptest! {
        #[test]
        fn any_text_is_a_name_or_refused_and_a_name_stays_below_its_root(text in "\\PC{0,40}|[a./]{0,12}") {
            if let Ok(name) = text.parse::<SecretName>() {
                prop_assert!(std::path::Path::new(name.as_str()).components()
                    .all(|part| matches!(part, std::path::Component::Normal(_))));
            }
        }
    }
}
