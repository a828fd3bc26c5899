//! The core: a principal asks for an operation on a secret, the table of grants decides, the store does it, and the
//! audit records it in one line. Every door ends here, and none has a way around it.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};

use jiff::Timestamp;
use serde::Serialize;
use tokio::sync::Notify;

use crate::audit::{Audit, AuditConfig, AuditError, Broken, Entry, Verified};
use crate::grant::{Decision, Grants, Operation, authorize};
use crate::principal::Principal;
use crate::seal::Key;
use crate::secret::{SecretName, Value};
use crate::store::{AuditHead, Change, Found, Location, Options, SealedStore, Status, StoreError, Sweep, Versions};

/// Store, grants and audit. The methods block on the disk: call them where blocking is allowed.
#[derive(Debug)]
pub struct Vault {
    store: SealedStore,
    audit: Audit,
    /// Replaced as a whole when the configuration changes.
    grants: Mutex<Arc<Grants>>,
    changes: Changes,
}

/// Most changed names that wait for the reader. Beyond that, the reader must assume that any name has changed.
const MAX_CHANGES: usize = 10_000;

/// What has changed, for the one task that acts on it.
#[derive(Debug, Default)]
pub struct Changes {
    bell: Notify,
    /// `None`: any name may have changed.
    names: Mutex<Option<BTreeSet<SecretName>>>,
}

impl Changes {
    fn add(&self, name: Option<&SecretName>) {
        let mut names = self.names.lock().unwrap_or_else(PoisonError::into_inner);
        let few = names.take().filter(|names| names.len() < MAX_CHANGES).zip(name);
        *names = few.map(|(mut names, name)| {
            names.insert(name.clone());
            names
        });
        self.bell.notify_one();
    }

    /// Waits until a secret or a grant has changed. Returns the names of the secrets, `None` for any. Cancel-safe.
    pub async fn next(&self) -> Option<BTreeSet<SecretName>> {
        self.bell.notified().await;
        self.names.lock().unwrap_or_else(PoisonError::into_inner).replace(BTreeSet::new())
    }
}

/// What a principal would find if it read a secret, without the value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Standing {
    /// No grant allows the read. Carries the missing row.
    Denied(String),
    /// The secret does not exist, was deleted, or has expired.
    Absent,
    /// The secret was revoked: deleted as a credential that nobody may keep using.
    Revoked,
    /// The secret has a value.
    Here {
        /// Its newest version.
        version: u64,
        /// Seconds since 1970.
        expires: Option<i64>,
    },
}

/// Why the vault refuses a request.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// No row of the table allows it.
    #[error("access denied: no grant has {missing}")]
    Denied {
        /// The row that is missing.
        missing: String,
    },
    /// The secret, or that version of it, does not exist.
    #[error("{0} is not there")]
    NotFound(SecretName),
    /// The store failed or refused.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The audit failed. The vault answers nothing without it.
    #[error(transparent)]
    Audit(#[from] AuditError),
}

impl Refusal {
    /// A short, stable code for programs.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Denied { .. } => "denied",
            Self::NotFound(_) => "not_found",
            Self::Store(StoreError::Version { .. }) => "version_mismatch",
            Self::Store(StoreError::TooManyKeys) => "too_many_rotations",
            Self::Store(StoreError::Audit(_)) => "audit_unavailable",
            Self::Store(_) => "store_unavailable",
            Self::Audit(_) => "audit_unavailable",
        }
    }

    /// The exit code for the command line: 1 for denied, not found, version mismatch or too many rotations, 74 for the
    /// audit, otherwise the store's code.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Denied { .. }
            | Self::NotFound(_)
            | Self::Store(StoreError::Version { .. } | StoreError::TooManyKeys) => 1,
            Self::Store(error) => error.exit_code(),
            Self::Audit(_) => 74,
        }
    }
}

/// The versions of a secret, as shown to a caller.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct History {
    /// The secret.
    pub name: String,
    /// When the secret was deleted, in seconds since 1970. `None` if it was set again or never deleted.
    pub deleted: Option<i64>,
    /// Whether the deletion revoked it.
    pub revoked: bool,
    /// Oldest first.
    pub versions: Vec<crate::store::VersionInfo>,
}

impl From<Versions> for History {
    fn from(versions: Versions) -> Self {
        let (name, deleted, revoked) = (versions.name().to_owned(), versions.deleted, versions.revoked);
        Self { name, deleted, revoked, versions: versions.kept }
    }
}

/// The current time in seconds since 1970.
pub fn now() -> i64 {
    Timestamp::now().as_second()
}

impl Vault {
    /// Opens store and audit. Returns what is wrong with the audit instead of failing: a broken audit is no reason to
    /// withhold secrets from those who need them.
    ///
    /// # Errors
    /// [`StoreError`], [`AuditError`].
    pub fn open(
        location: &Location,
        master: Key,
        options: Options,
        audit: AuditConfig,
        grants: Grants,
    ) -> Result<(Self, Vec<Broken>), Refusal> {
        let store = SealedStore::open(location, master, options)?;
        let (audit, broken) = store.with_audit(|head| Audit::open(audit, store.audit_key(), head))?;
        let grants = Mutex::new(Arc::new(grants));
        Ok((Self { store, audit, grants, changes: Changes::default() }, broken))
    }

    /// The table in force.
    pub fn grants(&self) -> Arc<Grants> {
        self.grants.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Replaces the table, from the next request on.
    pub fn replace_grants(&self, grants: Grants) {
        *self.grants.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(grants);
        self.changes.add(None);
    }

    /// What has changed since the last call of [`Changes::next`], for one task.
    pub fn changes(&self) -> &Changes {
        &self.changes
    }

    /// Tells what [`Vault::get`] would find, for a task that only checks for changes. Writes no audit line, because it
    /// hands out no value.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn standing(&self, who: &Principal, name: &SecretName) -> Result<Standing, StoreError> {
        if let Decision::Denied { missing } = authorize(&self.grants(), who, Operation::Get, Some(name)) {
            return Ok(Standing::Denied(missing));
        }
        let Some(versions) = self.store.history(name)? else { return Ok(Standing::Absent) };
        Ok(match versions.newest().filter(|newest| !newest.is_expired(now())) {
            Some(newest) => Standing::Here { version: newest.version, expires: newest.expires },
            None if versions.revoked => Standing::Revoked,
            None => Standing::Absent,
        })
    }

    /// A keyed hash of what was handed out. It reveals nothing about the content and changes with every byte of it.
    pub fn fingerprint(&self, parts: &[&[u8]]) -> [u8; 32] {
        self.store.audit_key().mac(b"dockflare-vault delivered", parts)
    }

    /// Returns the newest value, or that of a version that is still kept.
    ///
    /// # Errors
    /// [`Refusal`].
    pub fn get(&self, who: &Principal, name: &SecretName, version: Option<u64>) -> Result<Found, Refusal> {
        self.allow(who, Operation::Get, Some(name))?;
        let found = self.store.get(name, version, now())?;
        self.note(who, Operation::Get, Some(name), found.as_ref().map(|found| found.info.version))?;
        found.ok_or_else(|| Refusal::NotFound(name.clone()))
    }

    /// Stores a new version and returns its number.
    ///
    /// # Errors
    /// [`Refusal`].
    pub fn set(&self, who: &Principal, name: &SecretName, value: &Value, change: &Change) -> Result<u64, Refusal> {
        self.allow(who, Operation::Set, Some(name))?;
        let write = |version| self.write(who, Operation::Set, Some(name), Some(version), None);
        let set = self.store.set(name, value, change, write);
        if let Err(StoreError::Version { .. }) = &set {
            self.note(who, Operation::Set, Some(name), None)?;
        }
        // Also after an error: the change may be in the store even though the disk failed.
        self.changes.add(Some(name));
        Ok(set?)
    }

    /// Deletes a secret and returns the number of its last version. With `revoke`, nobody keeps the copies that they
    /// were given, even if the secret was deleted before.
    ///
    /// # Errors
    /// [`Refusal`].
    pub fn delete(&self, who: &Principal, name: &SecretName, revoke: bool) -> Result<u64, Refusal> {
        self.allow(who, Operation::Delete, Some(name))?;
        let write = |version| self.write(who, Operation::Delete, Some(name), Some(version), None);
        let deleted = self.store.delete(name, now(), revoke, write);
        self.changes.add(Some(name));
        match deleted? {
            Some(version) => Ok(version),
            None => {
                self.note(who, Operation::Delete, Some(name), None)?;
                Err(Refusal::NotFound(name.clone()))
            }
        }
    }

    /// Lists the names that the principal may see, below `prefix` if there is one.
    ///
    /// # Errors
    /// [`Refusal`].
    pub fn list(&self, who: &Principal, prefix: Option<&SecretName>) -> Result<Vec<SecretName>, Refusal> {
        self.allow(who, Operation::List, None)?;
        let grants = self.grants();
        let below = |name: &SecretName| {
            prefix.is_none_or(|prefix| {
                name.as_str().strip_prefix(prefix.as_str()).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
            })
        };
        let may = |name: &SecretName| authorize(&grants, who, Operation::List, Some(name)) == Decision::Allowed;
        let names = self.store.list(now(), |name| below(name) && may(name))?;
        self.note(who, Operation::List, prefix, None)?;
        Ok(names)
    }

    /// Lists the versions of a secret, without values.
    ///
    /// # Errors
    /// [`Refusal`].
    pub fn history(&self, who: &Principal, name: &SecretName) -> Result<History, Refusal> {
        self.allow(who, Operation::History, Some(name))?;
        let versions = self.store.history(name)?;
        self.note(who, Operation::History, Some(name), None)?;
        versions.map(History::from).ok_or_else(|| Refusal::NotFound(name.clone()))
    }

    /// Returns counts and ages, without names.
    ///
    /// # Errors
    /// [`Refusal`].
    pub fn status(&self, who: &Principal) -> Result<Status, Refusal> {
        self.allow(who, Operation::Status, None)?;
        self.note(who, Operation::Status, None, None)?;
        Ok(self.store.status())
    }

    /// Returns the same for the vault's own pages, without a grant or an audit line: no principal asks.
    pub fn peek(&self) -> Status {
        self.store.status()
    }

    /// Why the newest audit line could not be written, if it failed.
    pub fn audit_problem(&self) -> Option<String> {
        self.audit.problem()
    }

    /// Makes a new data key and returns its id. [`Vault::reseal`] does the rest.
    ///
    /// # Errors
    /// [`Refusal`].
    pub fn rotate(&self, who: &Principal) -> Result<u32, Refusal> {
        self.allow(who, Operation::Rotate, None)?;
        let rotated = self.store.rotate(now(), || self.write(who, Operation::Rotate, None, None, None));
        if let Err(StoreError::TooManyKeys) = &rotated {
            self.note(who, Operation::Rotate, None, None)?;
        }
        Ok(rotated?)
    }

    /// Rewraps all keys for another master key and returns its id.
    ///
    /// # Errors
    /// [`Refusal`].
    pub fn rotate_master(&self, who: &Principal, new: Key) -> Result<String, Refusal> {
        self.allow(who, Operation::Rotate, None)?;
        let id = new.id();
        self.store.rotate_master(new, || self.write(who, Operation::Rotate, None, None, Some(&id)))?;
        Ok(id)
    }

    /// Does one step of a running rotation. Returns whether there is more to do.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn reseal(&self) -> Result<bool, StoreError> {
        self.store.reseal()
    }

    /// Saves the end of the audit in the store, so that lines of reads cannot be cut off unnoticed either. Then removes
    /// the audit files beyond the number to keep.
    ///
    /// # Errors
    /// [`Refusal`].
    pub fn save(&self) -> Result<(), Refusal> {
        self.audit.probe();
        let head = self.store.with_audit(|head| self.audit.sync(head))?;
        self.store.save_audit(head)?;
        // Read the end of a file under the audit lock, so that nobody renames it meanwhile.
        let surplus = self.store.with_audit(|head| {
            let Some(end) = self.audit.surplus()? else { return Ok(None) };
            head.removed = end;
            self.audit.sync(head).map(Some)
        });
        if let Some(head) = surplus.map_err(Refusal::Audit)? {
            self.store.save_audit(head)?;
            // Use the head that the store has saved: the current one may be ahead of it.
            self.store.with_audit(|_| self.audit.remove_surplus(&head))?;
        }
        Ok(())
    }

    /// Verifies the chain of the whole audit that is kept.
    ///
    /// # Errors
    /// [`Refusal`].
    pub fn verify_audit(&self, who: &Principal) -> Result<Verified, Refusal> {
        self.allow(who, Operation::Audit, None)?;
        self.note(who, Operation::Audit, None, None)?;
        // Open the files under the audit lock, but read them without it.
        let snapshot = self.store.with_audit(|head| self.audit.snapshot(head))?;
        Ok(self.audit.verify(snapshot)?)
    }

    /// Does one step of a pass that removes expired values and old deleted names. Returns whether there is more to do.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn sweep(&self, sweep: &mut Sweep) -> Result<bool, StoreError> {
        self.store.sweep(sweep, now())
    }

    /// Why the counter of changes is behind the store, if it is.
    pub fn counter_problem(&self) -> Option<String> {
        self.store.counter_problem()
    }

    /// Asks the table. Writes an audit line for a denial, so that the attempt is on record although nothing was read.
    fn allow(&self, who: &Principal, operation: Operation, name: Option<&SecretName>) -> Result<(), Refusal> {
        let decision = authorize(&self.grants(), who, operation, name);
        let Decision::Denied { missing } = &decision else { return Ok(()) };
        let missing = missing.clone();
        let entry = Entry { principal: who, operation, name, version: None, master_key: None, decision: &decision };
        self.store.with_audit(|head| self.audit.record(head, &entry, false))?;
        Err(Refusal::Denied { missing })
    }

    /// Writes the line of an operation that changes nothing.
    fn note(
        &self,
        who: &Principal,
        operation: Operation,
        name: Option<&SecretName>,
        version: Option<u64>,
    ) -> Result<(), AuditError> {
        let entry = Entry { principal: who, operation, name, version, master_key: None, decision: &Decision::Allowed };
        self.store.with_audit(|head| self.audit.record(head, &entry, false))
    }

    /// Writes the line of a change to disk before the change. Returns the end of the audit after it.
    fn write(
        &self,
        who: &Principal,
        operation: Operation,
        name: Option<&SecretName>,
        version: Option<u64>,
        master_key: Option<&str>,
    ) -> Result<AuditHead, StoreError> {
        let entry = Entry { principal: who, operation, name, version, master_key, decision: &Decision::Allowed };
        Ok(self.store.with_audit(|head| self.audit.record(head, &entry, true).map(|()| *head))?)
    }
}

impl Drop for Vault {
    fn drop(&mut self) {
        if let Err(error) = self.save() {
            tracing::error!("the end of the audit cannot be kept: {error}");
        }
    }
}

#[cfg(test)]
#[expect(clippy::disallowed_methods, reason = "a test may wait for its disk")]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::grant::Grant;

    fn open(dir: &Path, master: &Key, grants: Vec<Grant>) -> (Vault, Vec<Broken>) {
        let location = Location { file: dir.join("vault.redb"), counter: None };
        let audit = AuditConfig { file: dir.join("audit.log"), max_bytes: 1 << 20, keep: 2 };
        let options = Options { accept_rollback: false, now: now() };
        Vault::open(&location, master.clone(), options, audit, Grants::new(grants)).unwrap()
    }

    fn grants() -> Vec<Grant> {
        let user = Grant {
            principal: "nats:user.requests".parse().unwrap(),
            operations: vec![Operation::Get, Operation::List],
            names: "app".parse().unwrap(),
        };
        vec![Grant::operator(), user]
    }

    fn value(text: &str) -> Value {
        Value::new(text.as_bytes().to_vec()).unwrap()
    }

    #[test]
    fn who_may_not_learns_nothing_and_every_question_leaves_a_line() {
        let (dir, master) = (tempfile::tempdir().unwrap(), Key::random().unwrap());
        let (vault, broken) = open(dir.path(), &master, grants());
        assert_eq!(broken, []);
        let (operator, user) = (Principal::Operator, Principal::nats("user.requests").unwrap());
        let stranger = Principal::nats("admin.requests").unwrap();
        let (app, other) = ("app/password".parse().unwrap(), "other".parse().unwrap());
        let change = Change { now: now(), ..Change::default() };
        assert_eq!(vault.set(&operator, &app, &value("x"), &change).unwrap(), 1);
        assert_eq!(vault.set(&operator, &other, &value("y"), &change).unwrap(), 1);
        assert_eq!(vault.get(&user, &app, None).unwrap().value, value("x"));
        // A missing secret and a forbidden one look the same to a principal that may read neither.
        for name in [&other, &"nothing".parse().unwrap()] {
            assert_eq!(vault.get(&user, name, None).unwrap_err().code(), "denied");
        }
        assert_eq!(vault.list(&user, None).unwrap(), std::slice::from_ref(&app));
        assert_eq!(vault.list(&operator, None).unwrap().len(), 2);
        for refusal in [
            vault.set(&user, &app, &value("z"), &change).unwrap_err(),
            vault.delete(&user, &app, false).unwrap_err(),
            vault.status(&user).unwrap_err(),
            vault.rotate(&stranger).unwrap_err(),
            vault.history(&stranger, &app).unwrap_err(),
            vault.list(&stranger, None).unwrap_err(),
        ] {
            assert_eq!((refusal.code(), refusal.exit_code()), ("denied", 1), "{refusal}");
        }
        assert_eq!(vault.get(&user, &"app/none".parse().unwrap(), None).unwrap_err().code(), "not_found");
        assert_eq!(vault.verify_audit(&user).unwrap_err().code(), "denied");
        let verified = vault.verify_audit(&operator).unwrap();
        assert_eq!((verified.lines, verified.broken.len()), (16, 0));
        drop(vault);
        let log = std::fs::read_to_string(dir.path().join("audit.log")).unwrap();
        assert!(
            !log.contains("\"x\"") && log.contains("principal=nats:user.requests operation=get name=other"),
            "{log}"
        );
        let (vault, broken) = open(dir.path(), &master, grants());
        assert_eq!((broken, vault.verify_audit(&operator).unwrap().lines), (vec![], 17));
    }

    #[test]
    fn nothing_is_answered_while_the_audit_cannot_be_written() {
        let (dir, master) = (tempfile::tempdir().unwrap(), Key::random().unwrap());
        let (operator, name) = (Principal::Operator, "app/password".parse().unwrap());
        let change = Change { now: now(), ..Change::default() };
        let (vault, _) = open(dir.path(), &master, grants());
        // The vault opens the audit file with its first line.
        let file = dir.path().join("audit.log");
        std::fs::create_dir(&file).unwrap();
        assert_eq!(vault.set(&operator, &name, &value("x"), &change).unwrap_err().code(), "audit_unavailable");
        assert_eq!(vault.get(&operator, &name, None).unwrap_err().code(), "audit_unavailable");
        assert_eq!(vault.list(&operator, None).unwrap_err().code(), "audit_unavailable");
        assert_eq!(vault.rotate(&operator).unwrap_err().code(), "audit_unavailable");
        drop(vault);
        std::fs::remove_dir(&file).unwrap();
        let (vault, _) = open(dir.path(), &master, grants());
        assert_eq!(vault.get(&operator, &name, None).unwrap_err().code(), "not_found");
        assert_eq!(vault.store.status().data_key, 1);
    }

    #[test]
    fn a_rotation_for_which_there_is_no_place_is_refused_with_1_and_leaves_its_line() {
        let (dir, master) = (tempfile::tempdir().unwrap(), Key::random().unwrap());
        let (vault, _) = open(dir.path(), &master, grants());
        let operator = Principal::Operator;
        for _ in 0..63 {
            vault.rotate(&operator).unwrap();
        }
        let refusal = vault.rotate(&operator).unwrap_err();
        assert_eq!((refusal.code(), refusal.exit_code()), ("too_many_rotations", 1));
        assert_eq!(vault.verify_audit(&operator).unwrap().lines, 65);
        while vault.reseal().unwrap() {}
        vault.rotate(&operator).unwrap();
    }
}
