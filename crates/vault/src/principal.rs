//! Who asks. Each variant says what proved the identity. Nothing that a caller can claim by itself is proof.

use std::fmt;
use std::str::FromStr;

use crate::delivery::{Workload, WorkloadError};

/// Longest identity after the colon, in bytes. A NATS subject or a fingerprint is far shorter.
const MAX_ID_BYTES: usize = 255;

/// A caller whose identity was proved at a door.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Principal {
    /// Anyone who can reach the admin socket, which lies in the vault's own private tmpfs.
    Operator,
    /// Anyone whom the NATS server lets publish to this subject.
    Nats(String),
    /// Anyone who holds the directory to which the workload's files are delivered. Anyone allowed to mount it could
    /// create containers anyway.
    Workload(Workload),
}

/// Which principals a grant is for.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PrincipalPattern {
    /// Exactly this principal.
    Exactly(Principal),
    /// Every NATS subject that the pattern covers, with NATS's own wildcards: `*` matches one token, a final `>`
    /// matches one or more.
    NatsSubjects(String),
}

/// Why a text does not name a principal.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PrincipalError {
    /// An unknown kind.
    #[error("{0:?} is no principal: write operator, nats:SUBJECT, or workload:NAME")]
    Kind(String),
    /// The text after `workload:` is not a workload name.
    #[error(transparent)]
    Workload(#[from] WorkloadError),
    /// A subject that a NATS server would reject.
    #[error(
        "{0:?} is no NATS subject: tokens between single dots, without white space; '*' and a last '>' stand alone"
    )]
    Subject(String),
}

impl Principal {
    /// The principal that publishes to this subject. The subject must not contain wildcards.
    ///
    /// # Errors
    /// [`PrincipalError::Subject`].
    pub fn nats(subject: &str) -> Result<Self, PrincipalError> {
        let plain = is_subject(subject) && !has_wildcard(subject);
        plain.then(|| Self::Nats(subject.to_owned())).ok_or_else(|| PrincipalError::Subject(subject.to_owned()))
    }
}

impl fmt::Display for Principal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Operator => f.write_str("operator"),
            Self::Nats(subject) => write!(f, "nats:{subject}"),
            Self::Workload(name) => write!(f, "workload:{name}"),
        }
    }
}

impl PrincipalPattern {
    /// Whether the pattern covers this principal.
    pub fn covers(&self, principal: &Principal) -> bool {
        match (self, principal) {
            (Self::Exactly(one), principal) => one == principal,
            (Self::NatsSubjects(pattern), Principal::Nats(subject)) => subject_covers(pattern, subject),
            (Self::NatsSubjects(_), Principal::Operator | Principal::Workload(_)) => false,
        }
    }

    /// The pattern for a NATS subject, with or without wildcards.
    ///
    /// # Errors
    /// [`PrincipalError::Subject`].
    pub fn nats(subject: &str) -> Result<Self, PrincipalError> {
        match Principal::nats(subject) {
            Ok(one) => Ok(Self::Exactly(one)),
            Err(_) if is_subject(subject) => Ok(Self::NatsSubjects(subject.to_owned())),
            Err(error) => Err(error),
        }
    }
}

impl FromStr for PrincipalPattern {
    type Err = PrincipalError;

    fn from_str(text: &str) -> Result<Self, PrincipalError> {
        match text.split_once(':') {
            None if text == "operator" => Ok(Self::Exactly(Principal::Operator)),
            Some(("nats", subject)) => Self::nats(subject),
            Some(("workload", name)) => Ok(Self::Exactly(Principal::Workload(name.parse()?))),
            _ => Err(PrincipalError::Kind(text.to_owned())),
        }
    }
}

impl fmt::Display for PrincipalPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exactly(one) => one.fmt(f),
            Self::NatsSubjects(pattern) => write!(f, "nats:{pattern}"),
        }
    }
}

/// Checks for tokens between single dots. A wildcard is a whole token, and `>` only the last one (NATS, "Subject-Based
/// Messaging").
fn is_subject(text: &str) -> bool {
    let tokens: Vec<_> = text.split('.').collect();
    let is_token = |(at, token): (usize, &&str)| match *token {
        "" => false,
        ">" => at + 1 == tokens.len(),
        "*" => true,
        word => !word.contains(['*', '>']) && word.chars().all(|c| !c.is_whitespace() && !c.is_control()),
    };
    text.len() <= MAX_ID_BYTES && !text.starts_with('$') && tokens.iter().enumerate().all(is_token)
}

fn has_wildcard(subject: &str) -> bool {
    subject.split('.').any(|token| matches!(token, "*" | ">"))
}

/// Whether the pattern covers the subject, by the rules of a NATS server.
fn subject_covers(pattern: &str, subject: &str) -> bool {
    let mut subject = subject.split('.');
    for token in pattern.split('.') {
        match (token, subject.next()) {
            (">", Some(_)) => return true,
            ("*", Some(_)) => {}
            (word, Some(other)) if word == other => {}
            _ => return false,
        }
    }
    subject.next().is_none()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pattern_covers_what_a_nats_server_would_deliver_to_it() {
        for (pattern, subject, covers) in [
            ("a.b", "a.b", true),
            ("a.b", "a.b.c", false),
            ("a.b", "a", false),
            ("a.*", "a.b", true),
            ("a.*", "a.b.c", false),
            ("*.b", "a.b", true),
            ("a.>", "a.b.c", true),
            ("a.>", "a", false),
            (">", "a", true),
            ("a", "A", false),
        ] {
            let pattern = PrincipalPattern::nats(pattern).unwrap();
            assert_eq!(pattern.covers(&Principal::nats(subject).unwrap()), covers, "{pattern} {subject}");
            assert!(!pattern.covers(&Principal::Operator));
        }
    }

    #[test]
    fn what_proves_nothing_is_no_principal() {
        for text in [
            "",
            "root",
            "nats",
            "ip:10.0.0.1",
            "label:app",
            "Operator",
            "operator ",
            "nats:$SYS.x",
            "workload:",
            "workload:*",
        ] {
            assert!(text.parse::<PrincipalPattern>().is_err(), "{text:?}");
        }
        for subject in ["", "a.", ".a", "a..b", "a b", "a.>.b", "a*", "a.b>", "$JS.API"] {
            assert!(PrincipalPattern::nats(subject).is_err(), "{subject:?}");
        }
        assert!(Principal::nats("a.*").is_err(), "nobody is everybody");
    }
}
