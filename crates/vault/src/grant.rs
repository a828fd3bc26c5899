//! Who may do what to which names: one table, one function. Anything that no row allows is denied.

use std::fmt;
use std::str::FromStr;

use crate::principal::{Principal, PrincipalPattern};
use crate::secret::SecretName;

/// What a principal can ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Operation {
    /// Read the newest value.
    Get,
    /// Store a new version.
    Set,
    /// Delete a secret and all its values.
    Delete,
    /// List the names that the principal may see.
    List,
    /// List the versions of a secret, without values.
    History,
    /// Make a new data key, or change the master key.
    Rotate,
    /// Show counts and ages, without names.
    Status,
    /// Verify the audit's chain.
    Audit,
}

/// All operations, in the order of the documentation.
pub const OPERATIONS: [Operation; 8] = [
    Operation::Get,
    Operation::Set,
    Operation::Delete,
    Operation::List,
    Operation::History,
    Operation::Rotate,
    Operation::Status,
    Operation::Audit,
];

impl Operation {
    /// The word used on the wire, in the configuration and in the audit.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Get => "get",
            Self::Set => "set",
            Self::Delete => "delete",
            Self::List => "list",
            Self::History => "history",
            Self::Rotate => "rotate",
            Self::Status => "status",
            Self::Audit => "audit",
        }
    }
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Operation {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        OPERATIONS
            .into_iter()
            .find(|operation| operation.as_str() == text)
            .ok_or_else(|| format!("{text:?} is no operation: use {}", OPERATIONS.map(Operation::as_str).join(", ")))
    }
}

/// Which names a grant is for.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum NamePattern {
    /// Every name.
    Any,
    /// The name itself and every name below it: `app` covers `app` and `app/x`, but not `apple`.
    Below(SecretName),
}

impl NamePattern {
    fn covers(&self, name: &SecretName) -> bool {
        match self {
            Self::Any => true,
            Self::Below(prefix) => {
                name.as_str().strip_prefix(prefix.as_str()).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
            }
        }
    }
}

impl FromStr for NamePattern {
    type Err = String;

    /// Accepts `*`, or a name with or without `/` or `/*` at its end.
    fn from_str(text: &str) -> Result<Self, String> {
        if text == "*" {
            return Ok(Self::Any);
        }
        let name = text.strip_suffix("/*").or_else(|| text.strip_suffix('/')).unwrap_or(text);
        name.parse().map(Self::Below).map_err(|error| format!("{error}; or write * for every name"))
    }
}

impl fmt::Display for NamePattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Any => f.write_str("*"),
            Self::Below(prefix) => write!(f, "{prefix}"),
        }
    }
}

/// One row of the table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Grant {
    /// Who may.
    pub principal: PrincipalPattern,
    /// What they may do.
    pub operations: Vec<Operation>,
    /// To which names. Ignored for `rotate`, `status` and `audit`, which have no name.
    pub names: NamePattern,
}

impl Grant {
    /// The operator's row, which is always present: anyone who reaches the admin socket could read the master key too.
    pub fn operator() -> Self {
        let principal = PrincipalPattern::Exactly(Principal::Operator);
        Self { principal, operations: OPERATIONS.to_vec(), names: NamePattern::Any }
    }

    fn allows(&self, principal: &Principal, operation: Operation, name: Option<&SecretName>) -> bool {
        self.operations.contains(&operation)
            && self.principal.covers(principal)
            && name.is_none_or(|name| self.names.covers(name))
    }
}

/// The table.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Grants(Vec<Grant>);

/// Whether the table allows an operation and, if not, which row is missing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    /// A row allows it.
    Allowed,
    /// No row allows it.
    Denied {
        /// The row that would allow it: `principal=… operation=… name=…`
        missing: String,
    },
}

impl Grants {
    /// A table with exactly these rows.
    pub fn new(rows: Vec<Grant>) -> Self {
        Self(rows)
    }

    /// The rows.
    pub fn rows(&self) -> &[Grant] {
        &self.0
    }
}

/// Decides, and is the only place that does. Pure: the same question gets the same answer until the table changes.
/// `name` is `None` for an operation that has none, and for `list`, which filters its answer name by name.
pub fn authorize(grants: &Grants, principal: &Principal, operation: Operation, name: Option<&SecretName>) -> Decision {
    if grants.0.iter().any(|row| row.allows(principal, operation, name)) {
        return Decision::Allowed;
    }
    let of = name.map(|name| format!(" name={name}")).unwrap_or_default();
    Decision::Denied { missing: format!("principal={principal} operation={operation}{of}") }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn row(principal: &str, operations: &[Operation], names: &str) -> Grant {
        Grant { principal: principal.parse().unwrap(), operations: operations.to_vec(), names: names.parse().unwrap() }
    }

    #[test]
    fn what_no_row_allows_is_denied_and_the_missing_row_is_named() {
        let grants = Grants::new(vec![row("nats:user.requests", &[Operation::Get], "app")]);
        let user = Principal::nats("user.requests").unwrap();
        let ask = |operation, name: &str| authorize(&grants, &user, operation, Some(&name.parse().unwrap()));
        assert_eq!(ask(Operation::Get, "app/password"), Decision::Allowed);
        assert_eq!(ask(Operation::Get, "app"), Decision::Allowed);
        let missing = "principal=nats:user.requests operation=get name=apple".to_owned();
        assert_eq!(ask(Operation::Get, "apple"), Decision::Denied { missing });
        assert!(matches!(ask(Operation::Set, "app"), Decision::Denied { .. }));
        let nobody = authorize(&Grants::default(), &Principal::Operator, Operation::Status, None);
        assert!(matches!(nobody, Decision::Denied { .. }));
    }

    /// The slow and obvious answer: writes each row out into everything that it allows.
    fn model(rows: &[(String, Vec<Operation>, String)], principal: &str, operation: Operation, name: &str) -> bool {
        let covers_subject = |pattern: &str, subject: &str| {
            let (pattern, subject): (Vec<_>, Vec<_>) = (pattern.split('.').collect(), subject.split('.').collect());
            match pattern.last() {
                Some(&">") => {
                    let head = &pattern[..pattern.len() - 1];
                    subject.len() > head.len() && head.iter().zip(&subject).all(|(p, s)| p == s || *p == "*")
                }
                _ => pattern.len() == subject.len() && pattern.iter().zip(&subject).all(|(p, s)| p == s || *p == "*"),
            }
        };
        for (who, operations, prefix) in rows {
            let is_who = match (who.strip_prefix("nats:"), principal.strip_prefix("nats:")) {
                (Some(pattern), Some(subject)) => covers_subject(pattern, subject),
                (None, None) => who == principal,
                _ => false,
            };
            let mut below = vec![];
            let mut path = String::new();
            for segment in name.split('/') {
                path = if path.is_empty() { segment.to_owned() } else { format!("{path}/{segment}") };
                below.push(path.clone());
            }
            if is_who && operations.contains(&operation) && (prefix == "*" || below.contains(prefix)) {
                return true;
            }
        }
        false
    }

    proptest! {
        #[test]
        fn the_answer_is_that_of_a_slow_and_obvious_model(
            rows in prop::collection::vec((
                prop_oneof![
                    Just("operator".to_owned()),
                    "nats:[ab*](\\.[ab*]){0,2}(\\.>)?",
                ],
                prop::collection::vec(prop::sample::select(OPERATIONS.to_vec()), 0..4),
                prop_oneof![Just("*".to_owned()), "[ab]{1,2}(/[ab]{1,2}){0,2}"],
            ), 0..6),
            who in prop_oneof![Just("operator".to_owned()), "nats:[ab](\\.[ab]){0,3}"],
            operation in prop::sample::select(OPERATIONS.to_vec()),
            name in "[ab]{1,2}(/[ab]{1,2}){0,2}",
        ) {
            let grants = Grants::new(rows.iter().map(|(who, what, names)| row(who, what, names)).collect());
            let principal = match who.strip_prefix("nats:") {
                Some(subject) => Principal::nats(subject).unwrap(),
                None => Principal::Operator,
            };
            let answer = authorize(&grants, &principal, operation, Some(&name.parse().unwrap()));
            prop_assert_eq!(answer == Decision::Allowed, model(&rows, &who, operation, &name));
        }
    }
}
