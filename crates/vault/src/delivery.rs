//! What a workload gets: which files, made of which secrets, in which directory, and what happens to its containers
//! when the files change. Nothing here reads a secret or touches a directory; [`crate::doors::deliver`] does.

use std::borrow::Borrow;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use crate::secret::SecretName;

pub(crate) mod template;
pub use template::{Template, TemplateError};

/// Longest name of a workload, in bytes: the limit of a label in a host name.
const MAX_WORKLOAD_BYTES: usize = 63;
/// Longest name of a file, in bytes: the limit of Linux.
const MAX_FILE_BYTES: usize = 255;
/// Default permissions of a file: the vault and the group of the directory may read it.
pub const DEFAULT_MODE: u32 = 0o440;

/// The name of a workload such as `shop-api`: letters, digits, `.`, `_` and `-`, the first one a letter or digit.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Workload(String);

/// A name that no workload can have.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is no name of a workload: letters, digits, '.', '_' and '-', at most {MAX_WORKLOAD_BYTES}, the first one a letter or digit"
)]
pub struct WorkloadError(String);

impl Workload {
    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Workload {
    type Err = WorkloadError;

    fn from_str(text: &str) -> Result<Self, WorkloadError> {
        let fits = text.len() <= MAX_WORKLOAD_BYTES && is_plain(text);
        fits.then(|| Self(text.to_owned())).ok_or_else(|| WorkloadError(text.to_owned()))
    }
}

impl fmt::Display for Workload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Borrow<str> for Workload {
    fn borrow(&self) -> &str {
        &self.0
    }
}

/// The name of a container as Docker takes it, without the slash that the API puts before it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ContainerName(String);

impl ContainerName {
    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for ContainerName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        // Docker wants at least two characters and sets no upper limit; ours is that of a host name.
        let fits = (2..=255).contains(&text.len()) && is_plain(text);
        fits.then(|| Self(text.to_owned())).ok_or_else(|| {
            format!("{text:?} is no name of a container: write it as docker ps shows it, without a slash")
        })
    }
}

impl fmt::Display for ContainerName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Letters, digits, `.`, `_` and `-`, the first one a letter or digit.
fn is_plain(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_alphanumeric())
        && text.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-'))
}

/// The name of a file in a workload's directory: one path segment. It must not begin with two dots, as the names of the
/// vault's own entries do.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FileName(String);

impl FileName {
    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for FileName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let fits = !text.is_empty()
            && text.len() <= MAX_FILE_BYTES
            && text != "."
            && !text.starts_with("..")
            && text.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-'));
        fits.then(|| Self(text.to_owned())).ok_or_else(|| {
            format!(
                "{text:?} is no name of a file: letters, digits, '.', '_' and '-', no slash, and not two dots at the beginning"
            )
        })
    }
}

impl fmt::Display for FileName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Borrow<str> for FileName {
    fn borrow(&self) -> &str {
        &self.0
    }
}

/// Everything that one workload gets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Delivery {
    /// The workload. The vault is asked as the principal `workload:NAME`.
    pub workload: Workload,
    /// The directory shared with the containers, as the vault sees it. Absolute and without `.` or `..`.
    pub directory: PathBuf,
    /// Deliver even if the directory lies on a disk.
    pub allow_disk: bool,
    /// The required owner of the directory.
    pub uid: Option<u32>,
    /// The required group of the directory, and so of its files.
    pub gid: Option<u32>,
    /// The files; at least one.
    pub files: BTreeMap<FileName, FileSpec>,
    /// What happens to the containers when the files have changed.
    pub on_change: OnChange,
    /// The workload's containers, in the order in which they are handled.
    pub containers: Vec<ContainerName>,
}

impl Delivery {
    /// All secrets that its files are made of.
    pub fn secrets(&self) -> BTreeSet<&SecretName> {
        self.files.values().flat_map(|file| file.content.secrets()).collect()
    }
}

/// One file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileSpec {
    /// Permissions, such as 0o440: the owner reads, and nobody else writes.
    pub mode: u32,
    /// Its content.
    pub content: Content,
}

/// What a file is made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Content {
    /// The value of one secret, byte for byte.
    Secret(SecretName),
    /// A text with the values of several secrets.
    Template {
        /// The text.
        template: Template,
        /// The secret for each word of the text.
        secrets: BTreeMap<String, SecretName>,
    },
}

impl Content {
    /// All secrets that it is made of.
    pub fn secrets(&self) -> impl Iterator<Item = &SecretName> {
        let (one, several) = match self {
            Self::Secret(name) => (Some(name), None),
            Self::Template { secrets, .. } => (None, Some(secrets.values())),
        };
        one.into_iter().chain(several.into_iter().flatten())
    }
}

/// What happens to a workload's containers when its files have changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnChange {
    /// Nothing: the program watches its files itself.
    None,
    /// The first process of each container gets a signal.
    Signal(Signal),
    /// Each container is restarted.
    Restart,
}

/// Signals that make programs reread their settings. None of them ends a program that handles it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Signal {
    /// `SIGHUP`
    Hup,
    /// `SIGUSR1`
    Usr1,
    /// `SIGUSR2`
    Usr2,
}

/// All of them.
pub const SIGNALS: [Signal; 3] = [Signal::Hup, Signal::Usr1, Signal::Usr2];

impl Signal {
    /// As Docker takes it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Hup => "SIGHUP",
            Self::Usr1 => "SIGUSR1",
            Self::Usr2 => "SIGUSR2",
        }
    }
}

impl FromStr for Signal {
    type Err = String;

    /// Reads the name with or without `SIG` before it.
    fn from_str(text: &str) -> Result<Self, String> {
        let is_it = |signal: &Signal| signal.as_str().strip_prefix("SIG") == Some(text) || signal.as_str() == text;
        SIGNALS.into_iter().find(is_it).ok_or_else(|| {
            format!("{text:?} is no signal that can be sent: use HUP, USR1 or USR2, or on_change: restart")
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_files_stay_in_their_directory_and_away_from_the_entries_of_the_vault() {
        for good in ["db_password", ".pgpass", "a.b-c", "x"] {
            assert_eq!(good.parse::<FileName>().unwrap().as_str(), good);
        }
        for bad in ["", ".", "..", "..data", "..1", "a/b", "/a", "a b", "a\0", "ä", &"a".repeat(256)] {
            assert!(bad.parse::<FileName>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn names_of_workloads_and_containers_are_plain() {
        for good in ["a", "shop-api", "A.b_c-9"] {
            assert_eq!(good.parse::<Workload>().unwrap().as_str(), good);
        }
        for bad in ["", "-a", ".a", "a/b", "a b", "a:b", "*", &"a".repeat(64)] {
            assert!(bad.parse::<Workload>().is_err(), "{bad:?}");
        }
        assert!("shop_api_1".parse::<ContainerName>().is_ok());
        for bad in ["", "a", "/shop", "shop api", "*"] {
            assert!(bad.parse::<ContainerName>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn only_signals_that_end_nothing_can_be_sent() {
        assert_eq!("HUP".parse(), Ok(Signal::Hup));
        assert_eq!("SIGUSR2".parse(), Ok(Signal::Usr2));
        for bad in ["KILL", "SIGTERM", "9", "hup", ""] {
            assert!(bad.parse::<Signal>().is_err(), "{bad:?}");
        }
    }
}
