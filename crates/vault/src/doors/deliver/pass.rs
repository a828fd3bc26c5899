//! One pass over a workload: look at its directory and its secrets, and do what follows. All of it blocks, so each pass
//! runs on a thread of its own. A workload has one pass at a time.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::folder::{Folder, FolderError, Look};
use super::plan::{Files, Plan, Standing, plan};
use super::{Condition, State, What};
use crate::delivery::{Delivery, OnChange, Workload};
use crate::principal::Principal;
use crate::secret::{SecretName, Value};
use crate::vault::{self, Refusal, Vault, now};

/// How long a replaced set stays for readers that are following the links: far longer than any of them takes.
const GRACE: Duration = Duration::from_secs(2);

/// Which directory each workload uses, to notice two paths that lead to the same one.
#[derive(Debug, Default)]
pub(super) struct Claims(Mutex<BTreeMap<(u64, u64), BTreeSet<Workload>>>);

impl Claims {
    /// Records that the workload uses this directory, and returns another workload that does, too.
    fn claim(&self, workload: &Workload, identity: (u64, u64)) -> Option<Workload> {
        let mut claims = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        claims.retain(|place, names| {
            if *place != identity {
                names.remove(workload);
            }
            !names.is_empty()
        });
        let names = claims.entry(identity).or_default();
        names.insert(workload.clone());
        names.iter().find(|name| *name != workload).cloned()
    }

    /// Drops the claim of a workload that no longer has a directory or a delivery.
    pub(super) fn release(&self, workload: &Workload) {
        let mut claims = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        claims.retain(|_, names| {
            names.remove(workload);
            !names.is_empty()
        });
    }
}

/// What the passes of a workload remember. Losing it costs a read of each secret.
#[derive(Debug, Default)]
pub(super) struct Memory {
    /// How the secrets stood at the last plan, without values, and the outcome of that plan.
    seen: Option<(BTreeMap<SecretName, vault::Standing>, Outcome)>,
    /// The highest set number so far.
    highest: u64,
    /// Sets that no link leads to any more, and since when.
    retired: BTreeMap<u64, Instant>,
    /// Whether this process has tidied the directory before. The first pass did not see when a set was replaced, so it
    /// assumes just now.
    is_settled_in: bool,
}

/// The outcome of a plan, without values.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Outcome {
    /// Deliver the files that have this hash.
    Deliver([u8; 32]),
    Keep(Vec<String>),
    Withdraw(Vec<String>),
    Wrong(String),
}

/// The result of a pass.
#[derive(Debug)]
pub(super) struct Passed {
    pub(super) state: State,
    /// When the next pass is due even if nothing happens.
    pub(super) next: Option<Duration>,
    /// The answer to an order: the number of the set in place.
    pub(super) answer: Option<Result<u64, String>>,
}

/// Claims the directory and does nothing else.
pub(super) fn claim(delivery: &Delivery, claims: &Claims) {
    if let Ok(Some(folder)) = Folder::open(delivery) {
        claims.claim(&delivery.workload, folder.identity());
    }
}

/// Brings the directory to what the delivery says, as far as possible.
pub(super) fn pass(
    vault: &Vault,
    delivery: &Delivery,
    claims: &Claims,
    memory: &mut Memory,
    order: Option<(u64, What)>,
) -> Passed {
    let mut pass = Pass { vault, delivery, claims, memory, look: Look::default(), answer: None, expires: None };
    let condition = pass.run(order).unwrap_or_else(|problem| Condition::Failed { problem });
    let Pass { memory, look, answer, expires, .. } = pass;
    let grace = memory.retired.values().map(|since| GRACE.saturating_sub(since.elapsed())).min();
    let expiry = expires.map(|at| Duration::from_secs(u64::try_from(at - now()).unwrap_or(0)));
    let state = State { version: look.current, settled: look.settled, since: look.since, left: look.left, condition };
    let answer = match (order, answer, &state.condition) {
        (None, ..) => None,
        (_, Some(answer), _) => Some(answer),
        (_, None, Condition::Failed { problem }) => Some(Err(problem.clone())),
        (_, None, _) => Some(state.version.ok_or_else(|| format!("{} has no files", delivery.workload))),
    };
    Passed { state, next: [grace, expiry].into_iter().flatten().min(), answer }
}

struct Pass<'a> {
    vault: &'a Vault,
    delivery: &'a Delivery,
    claims: &'a Claims,
    memory: &'a mut Memory,
    look: Look,
    answer: Option<Result<u64, String>>,
    /// When the first of the secrets expires.
    expires: Option<i64>,
}

impl Pass<'_> {
    fn run(&mut self, order: Option<(u64, What)>) -> Result<Condition, String> {
        let text = |error: FolderError| error.to_string();
        let folder = Folder::open(self.delivery).map_err(text)?;
        match &folder {
            Some(folder) => {
                if let Some(other) = self.claims.claim(&self.delivery.workload, folder.identity()) {
                    return Err(format!(
                        "{} is the directory of the workload {other} as well: give each a directory of its own",
                        self.delivery.directory.display()
                    ));
                }
                self.look = folder.look().map_err(text)?;
                self.finish(folder).map_err(text)?;
                if let Some((version, what)) = order {
                    let done = self.obey(folder, version, what);
                    self.look = folder.look().map_err(text)?;
                    self.answer = Some(done.map_err(text));
                }
                self.tidy(folder).map_err(text)?;
            }
            None => self.claims.release(&self.delivery.workload),
        }
        let result = self.secrets(folder.as_ref());
        if let Some(folder) = folder.or_else(|| Folder::open(self.delivery).ok().flatten()) {
            // Also after a failure: report what is there.
            self.look = folder.look().map_err(text)?;
            self.memory.highest = self.memory.highest.max(self.look.current.unwrap_or(0));
            if self.delivery.on_change == OnChange::None
                && let Some(current) = self.look.current.filter(|current| Some(*current) != self.look.settled)
            {
                folder.settle(current).map_err(text)?;
                self.look.settled = Some(current);
            }
            self.retire();
        }
        result
    }

    /// Finishes what a kill has interrupted.
    fn finish(&mut self, folder: &Folder) -> Result<(), FolderError> {
        let Some((number, hash)) = self.look.refused.clone() else { return Ok(()) };
        if self.look.current.is_some_and(|current| current > number) {
            folder.forget_refused()?;
        } else if self.look.current == Some(number) {
            let settled = self.look.settled.filter(|settled| *settled != number && hash != "-");
            match settled.and_then(|settled| Some((settled, folder.read(settled)?))) {
                Some((settled, files)) => folder.go_back(&self.look, settled, &files)?,
                None if hash == "-" => folder.withdraw(&self.look)?,
                None => folder.forget_refused()?,
            }
        } else {
            return Ok(());
        }
        self.look = folder.look()?;
        Ok(())
    }

    fn obey(&mut self, folder: &Folder, version: u64, what: What) -> Result<u64, FolderError> {
        let current = self.look.current.unwrap_or(0);
        match what {
            What::Settle => {
                let is_newer = self.look.settled.is_none_or(|settled| settled < version);
                if is_newer && (current == version || self.look.sets.contains(&version)) {
                    folder.settle(version)?;
                }
                Ok(current)
            }
            What::PutBack if current == version => {
                let hash = folder.read(version).map_or_else(|| "-".to_owned(), |files| hex(&self.hash(&files)));
                folder.put_back(&self.look, &hash)
            }
            What::PutBack => Ok(current),
        }
    }

    /// Removes half-made sets, and sets that nobody reads any more.
    fn tidy(&mut self, folder: &Folder) -> Result<(), FolderError> {
        let current = self.look.current.unwrap_or(0);
        let is_first = !std::mem::replace(&mut self.memory.is_settled_in, true);
        for set in self.idle() {
            // A number above the present one that this process has not made: half made. A lower one may have been the
            // present one a moment ago.
            let since = self.memory.retired.get(&set);
            let is_over = since.map_or(set > current, |since| since.elapsed() >= GRACE);
            if is_over {
                folder.remove(set)?;
                self.memory.retired.remove(&set);
                self.look.sets.remove(&set);
            } else if is_first {
                self.memory.retired.entry(set).or_insert_with(Instant::now);
            }
        }
        Ok(())
    }

    /// Sets that no link leads to.
    fn idle(&self) -> Vec<u64> {
        let kept = [self.look.current, self.look.settled];
        self.look.sets.iter().copied().filter(|set| !kept.contains(&Some(*set))).collect()
    }

    fn retire(&mut self) {
        let idle = self.idle();
        self.memory.retired.retain(|set, _| idle.contains(set));
        for set in idle {
            self.memory.retired.entry(set).or_insert_with(Instant::now);
        }
    }

    /// Compares the secrets and the files in place with the last plan, and stops if nothing is to be done. Otherwise
    /// reads the values, plans anew and acts.
    fn secrets(&mut self, folder: Option<&Folder>) -> Result<Condition, String> {
        let who = Principal::Workload(self.delivery.workload.clone());
        let mut standing = BTreeMap::new();
        for name in self.delivery.secrets() {
            let found = self.vault.standing(&who, name).map_err(|error| error.to_string())?;
            standing.insert(name.clone(), found);
        }
        let present = self.look.current.and_then(|current| folder?.read(current));
        let present_hash = present.as_ref().map(|files| self.hash(files));
        if let Some((seen, outcome)) = &self.memory.seen
            && *seen == standing
        {
            let outcome = outcome.clone();
            let is_done = match &outcome {
                Outcome::Deliver(hash) => {
                    self.is_refused(hash)
                        || present_hash == Some(*hash)
                            && present.as_ref().is_some_and(|files| Folder::is_tidy(&self.look, files))
                }
                Outcome::Withdraw(_) => self.look.current.is_none(),
                Outcome::Keep(_) | Outcome::Wrong(_) => true,
            };
            if is_done {
                self.expires = earliest(&standing);
                return Ok(self.condition(&outcome));
            }
        }
        let all_here = standing.values().all(|standing| matches!(standing, vault::Standing::Here { .. }));
        let mut values = BTreeMap::new();
        for (name, standing) in &mut standing {
            values.insert(name.clone(), self.value(&who, name, standing, all_here)?);
        }
        self.expires = earliest(&standing);
        let planned = plan(self.delivery, &values);
        drop(values);
        let outcome = match &planned {
            Plan::Deliver(files) => Outcome::Deliver(self.hash(files)),
            Plan::Keep(lines) => Outcome::Keep(lines.clone()),
            Plan::Withdraw(lines) => Outcome::Withdraw(lines.clone()),
            Plan::Wrong(line) => Outcome::Wrong(line.clone()),
        };
        self.memory.seen = Some((standing, outcome.clone()));
        let done = match (&planned, &outcome) {
            (Plan::Deliver(files), Outcome::Deliver(hash)) => match folder {
                _ if self.is_refused(hash) => Ok(()),
                Some(folder) if present_hash == Some(*hash) => folder.mend(&self.look, files),
                Some(folder) => self.put(folder, files),
                None => self.make(files),
            },
            (Plan::Withdraw(_), _) => folder.map_or(Ok(()), |folder| folder.withdraw(&self.look)),
            _ => Ok(()),
        };
        done.map_err(|error| error.to_string())?;
        Ok(self.condition(&outcome))
    }

    /// Reads a secret as the workload, which writes an audit line. Sets `standing` to what it was at the read. If
    /// `all_here` is false, the workload gets nothing, so no value is read.
    fn value(
        &self,
        who: &Principal,
        name: &SecretName,
        standing: &mut vault::Standing,
        all_here: bool,
    ) -> Result<Standing, String> {
        match standing {
            vault::Standing::Revoked => return Ok(Standing::Revoked),
            vault::Standing::Absent => return Ok(Standing::Absent),
            vault::Standing::Here { .. } if !all_here => {
                return Value::new(vec![]).map(Standing::Here).map_err(|error| error.to_string());
            }
            // A denied read writes an audit line, too.
            vault::Standing::Here { .. } | vault::Standing::Denied(_) => {}
        }
        match self.vault.get(who, name, None) {
            Ok(found) => {
                *standing = vault::Standing::Here { version: found.info.version, expires: found.info.expires };
                Ok(Standing::Here(found.value))
            }
            Err(Refusal::Denied { missing }) => {
                *standing = vault::Standing::Denied(missing.clone());
                Ok(Standing::Denied(missing))
            }
            Err(Refusal::NotFound(_)) => {
                // If it was revoked in between, the next look finds that. It follows at once.
                *standing = vault::Standing::Absent;
                Ok(Standing::Absent)
            }
            Err(error) => Err(error.to_string()),
        }
    }

    fn make(&self, files: &Files) -> Result<(), FolderError> {
        if Folder::make(self.delivery, files)?.is_some() {
            return Ok(());
        }
        // Somebody else has just made it.
        let folder =
            Folder::open(self.delivery)?.ok_or_else(|| FolderError::Parent(self.delivery.directory.clone()))?;
        folder.put(&folder.look()?, files, self.memory.highest).map(|_| ())
    }

    fn put(&self, folder: &Folder, files: &Files) -> Result<(), FolderError> {
        let put = folder.put(&self.look, files, self.memory.highest);
        let put = match put {
            // Remove replaced sets early: better that a reader reads again than that all of them keep an old password.
            Err(FolderError::Full(_)) if !self.memory.retired.is_empty() => {
                for set in self.memory.retired.keys() {
                    folder.remove(*set)?;
                }
                folder.put(&folder.look()?, files, self.memory.highest)
            }
            put => put,
        };
        put.map(|_| ())
    }

    fn is_refused(&self, hash: &[u8; 32]) -> bool {
        self.look.refused.as_ref().is_some_and(|(_, refused)| *refused == hex(hash))
    }

    fn condition(&self, outcome: &Outcome) -> Condition {
        match outcome {
            Outcome::Deliver(hash) => match &self.look.refused {
                Some((refused, of)) if *of == hex(hash) => Condition::PutBack { refused: *refused },
                _ => Condition::Delivered,
            },
            Outcome::Keep(missing) => Condition::Missing { missing: missing.clone() },
            Outcome::Withdraw(denied) => Condition::Denied { denied: denied.clone() },
            Outcome::Wrong(problem) => Condition::Failed { problem: problem.clone() },
        }
    }

    fn hash(&self, files: &Files) -> [u8; 32] {
        let modes: Vec<_> = files.values().map(|file| file.mode.to_be_bytes()).collect();
        let parts: Vec<&[u8]> = files
            .iter()
            .zip(&modes)
            .flat_map(|((name, file), mode)| [name.as_str().as_bytes(), mode.as_slice(), file.bytes.as_slice()])
            .collect();
        self.vault.fingerprint(&parts)
    }
}

fn earliest(standing: &BTreeMap<SecretName, vault::Standing>) -> Option<i64> {
    let end = |standing: &vault::Standing| match standing {
        vault::Standing::Here { expires, .. } => *expires,
        _ => None,
    };
    standing.values().filter_map(end).min()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
