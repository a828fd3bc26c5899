//! Plans a workload's files: a pure function of its delivery and of how its secrets stand. Its tests are the
//! specification.

use std::collections::BTreeMap;
use std::fmt;

use zeroize::Zeroizing;

use crate::delivery::{Content, Delivery, FileName};
use crate::secret::{SecretName, Value};

/// How a secret stands for the workload.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Standing {
    /// It exists and may be read.
    Here(Value),
    /// It does not exist: never set, deleted, or expired.
    Absent,
    /// It was revoked when it was deleted.
    Revoked,
    /// No grant lets the workload read it. Holds the missing row.
    Denied(String),
}

/// A file to deliver.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct File {
    /// Permissions.
    pub(super) mode: u32,
    /// Wiped when it is dropped.
    pub(super) bytes: Zeroizing<Vec<u8>>,
}

impl fmt::Debug for File {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "File({:o}, {} bytes)", self.mode, self.bytes.len())
    }
}

/// All files of a workload.
pub(super) type Files = BTreeMap<FileName, File>;

/// What to do.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Plan {
    /// Deliver these files, all of them and no others.
    Deliver(Files),
    /// Change nothing: files in place stay, and where there are none, none appear. One line for each missing secret.
    Keep(Vec<String>),
    /// Remove all files. One line for each secret that was revoked or may not be read.
    Withdraw(Vec<String>),
    /// Change nothing, because a file cannot be made. Says why.
    Wrong(String),
}

/// Plans a delivery. `secrets` says how each of its secrets stands; a secret that it lacks counts as absent.
pub(super) fn plan(delivery: &Delivery, secrets: &BTreeMap<SecretName, Standing>) -> Plan {
    let workload = &delivery.workload;
    let (mut withdrawn, mut missing) = (vec![], vec![]);
    for name in delivery.secrets() {
        match secrets.get(name).unwrap_or(&Standing::Absent) {
            Standing::Here(_) => {}
            Standing::Absent => missing.push(format!("{name} is not there: dockflare-vault set {name}")),
            Standing::Revoked => withdrawn.push(format!("{name} was revoked")),
            Standing::Denied(row) => {
                withdrawn.push(format!("workload:{workload} may not read {name}: no grant has {row}"))
            }
        }
    }
    // Remove what may no longer be read, whatever else is missing.
    if !withdrawn.is_empty() {
        return Plan::Withdraw(withdrawn);
    }
    if !missing.is_empty() {
        return Plan::Keep(missing);
    }
    let mut files = Files::new();
    for (name, spec) in &delivery.files {
        match bytes(&spec.content, secrets) {
            Ok(bytes) => {
                files.insert(name.clone(), File { mode: spec.mode, bytes });
            }
            Err(problem) => return Plan::Wrong(format!("the file {name} cannot be made: {problem}")),
        }
    }
    Plan::Deliver(files)
}

fn bytes(content: &Content, secrets: &BTreeMap<SecretName, Standing>) -> Result<Zeroizing<Vec<u8>>, String> {
    let value = |name: &SecretName| match secrets.get(name) {
        Some(Standing::Here(value)) => Ok(value.expose()),
        _ => Err(format!("{name} is not there")),
    };
    match content {
        Content::Secret(name) => Ok(Zeroizing::new(value(name)?.to_vec())),
        Content::Template { template, secrets } => {
            let mut words = BTreeMap::new();
            for (word, name) in secrets {
                let text = std::str::from_utf8(value(name)?);
                let text = text.map_err(|_| {
                    format!(
                        "the secret behind {word:?} is no text, which a template takes only: give it a file of its own"
                    )
                })?;
                words.insert(word.as_str(), text);
            }
            template.render(&words).map_err(|error| error.to_string())
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::config::Config;

    fn delivery() -> Delivery {
        let text = "deliveries: [{workload: app, directory: /run/app, files: [\
                    {name: key, secret: app/key, mode: \"0400\"}, \
                    {name: db.ini, template: \"{{ user }}:{{ key }}\\n\", secrets: {user: app/user, key: app/key}}]}]";
        Config::parse(text, &BTreeMap::new()).unwrap().deliveries.remove(0)
    }

    fn here(bytes: &[u8]) -> Standing {
        Standing::Here(Value::new(bytes.to_vec()).unwrap())
    }

    fn secrets(key: Standing, user: Standing) -> BTreeMap<SecretName, Standing> {
        BTreeMap::from([("app/key".parse().unwrap(), key), ("app/user".parse().unwrap(), user)])
    }

    #[test]
    fn all_files_are_made_when_all_secrets_are_there() {
        let Plan::Deliver(files) = plan(&delivery(), &secrets(here(b"k\n\0"), here(b"u"))) else { panic!("no plan") };
        assert_eq!((files["key"].mode, files["key"].bytes.as_slice()), (0o400, b"k\n\0".as_slice()));
        assert_eq!((files["db.ini"].mode, files["db.ini"].bytes.as_slice()), (0o440, b"u:k\n\0\n".as_slice()));
        assert!(!format!("{files:?}").contains("107"), "bytes are shown");
    }

    #[test]
    fn one_secret_that_is_missing_keeps_all_files_back_and_is_named_with_what_to_do() {
        let missing = plan(&delivery(), &secrets(here(b"k"), Standing::Absent));
        assert_eq!(missing, Plan::Keep(vec!["app/user is not there: dockflare-vault set app/user".to_owned()]));
        let Plan::Keep(lines) = plan(&delivery(), &BTreeMap::new()) else { panic!("no plan") };
        assert_eq!(lines.len(), 2);
    }

    #[test]
    fn what_was_revoked_or_may_not_be_read_takes_all_files_away_whatever_else_is_missing() {
        let revoked = plan(&delivery(), &secrets(Standing::Revoked, Standing::Absent));
        assert_eq!(revoked, Plan::Withdraw(vec!["app/key was revoked".to_owned()]));
        let Plan::Withdraw(lines) = plan(&delivery(), &secrets(Standing::Denied("the row".to_owned()), here(b"u")))
        else {
            panic!("no plan")
        };
        assert_eq!(lines, ["workload:app may not read app/key: no grant has the row"]);
    }

    #[test]
    fn a_file_that_cannot_be_made_is_named_and_shows_no_value() {
        let Plan::Wrong(line) = plan(&delivery(), &secrets(here(b"hunter2\xff"), here(b"u"))) else {
            panic!("no plan")
        };
        assert!(
            line.contains("db.ini")
                && line.contains("the secret behind \"key\" is no text")
                && !line.contains("hunter2"),
            "{line}"
        );
    }

    proptest! {
        #[test]
        fn never_some_of_the_files(states in prop::collection::vec(0..4, 2)) {
            let standing = |state| match state {
                0 => here(b"x"),
                1 => Standing::Absent,
                2 => Standing::Revoked,
                _ => Standing::Denied("row".to_owned()),
            };
            let delivery = delivery();
            match plan(&delivery, &secrets(standing(states[0]), standing(states[1]))) {
                Plan::Deliver(files) => {
                    prop_assert!(states.iter().all(|state| *state == 0));
                    prop_assert!(files.keys().eq(delivery.files.keys()));
                }
                Plan::Keep(_) => prop_assert!(states.contains(&1) && states.iter().all(|state| *state < 2)),
                Plan::Withdraw(_) => prop_assert!(states.iter().any(|state| *state >= 2)),
                Plan::Wrong(_) => prop_assert!(false),
            }
        }
    }
}
