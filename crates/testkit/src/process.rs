//! Tells which test process owns a Docker object: this one, another one, or a dead one.

use std::collections::HashMap;
use std::fmt;
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use jiff::Timestamp;

/// The label on everything this crate makes.
pub(crate) const MARK: &str = "dockflare-test";
const PID: &str = "dockflare-test.pid";
/// Host name and the process's start time: the kernel reuses process ids.
const STARTED: &str = "dockflare-test.started";
/// The scope's suffix.
pub(crate) const SCOPE: &str = "dockflare-test.scope";

/// This process, as its labels identify it.
pub(crate) struct Me {
    pid: u32,
    started: String,
    /// The random part in the names of objects that belong to the process, not to a scope.
    pub(crate) suffix: String,
}

/// Returns this process's identity.
pub(crate) fn me() -> &'static Me {
    static ME: OnceLock<Me> = OnceLock::new();
    ME.get_or_init(|| {
        let pid = std::process::id();
        Me { pid, started: started(pid).unwrap_or_default(), suffix: random_suffix() }
    })
}

/// Returns eight random letters that are valid in any name.
pub(crate) fn random_suffix() -> String {
    (0..8).map(|_| fastrand::char('a'..='z')).collect()
}

impl Me {
    /// Returns the labels that mark an object as this process's own.
    pub(crate) fn labels(&self) -> HashMap<String, String> {
        HashMap::from([
            (MARK.to_owned(), "1".to_owned()),
            (PID.to_owned(), self.pid.to_string()),
            (STARTED.to_owned(), self.started.clone()),
        ])
    }

    /// Whether an object with these labels is this process's own.
    pub(crate) fn owns(&self, labels: &HashMap<String, String>) -> bool {
        labels.get(PID) == Some(&self.pid.to_string()) && labels.get(STARTED) == Some(&self.started)
    }
}

/// Whether a dead process of this machine left the object with these labels.
pub(crate) fn is_orphan(labels: &HashMap<String, String>) -> bool {
    let (Some(pid), Some(started)) = (labels.get(PID), labels.get(STARTED)) else { return false };
    pid.parse().is_ok_and(|pid| is_dead(pid, started))
}

/// True only if the process ran on this host and is certainly gone.
fn is_dead(pid: u32, was_started: &str) -> bool {
    was_started.starts_with(&format!("{}@", hostname())) && started(pid).as_deref() != Some(was_started)
}

/// Returns `host@ticks`, with the ticks from boot to the process's start; `None` if there is no such process.
fn started(pid: u32) -> Option<String> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field is the process name in parentheses and may hold anything: count from its end.
    let ticks = stat.rsplit_once(')')?.1.split_whitespace().nth(19)?;
    Some(format!("{}@{ticks}", hostname()))
}

fn hostname() -> String {
    fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default().trim().to_owned()
}

/// An unlabelled object that the program under test makes and a scope must remove by name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Owned {
    pub(crate) kind: Kind,
    pub(crate) name: String,
    /// Time of registration in Unix milliseconds. An older object predates the test and is not ours to remove.
    pub(crate) since: i64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Container,
    Network,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Container => "container",
            Self::Network => "network",
        })
    }
}

impl Owned {
    pub(crate) fn now(kind: Kind, name: &str) -> Self {
        Self { kind, name: name.to_owned(), since: Timestamp::now().as_millisecond() }
    }

    fn line(&self) -> String {
        format!("{} {} {}\n", self.kind, self.since, self.name)
    }

    fn parse(line: &str) -> Option<Self> {
        let mut words = line.splitn(3, ' ');
        let kind = match words.next()? {
            "container" => Kind::Container,
            "network" => Kind::Network,
            _ => return None,
        };
        Some(Self { kind, since: words.next()?.parse().ok()?, name: words.next()?.to_owned() })
    }
}

/// The folder where each process records the names it registered. The sweep reads it if the process is killed.
fn ledgers() -> PathBuf {
    std::env::temp_dir().join("dockflare-testkit")
}

/// Records a registered name. A failed write only prints a warning: it is not worth failing a test.
pub(crate) fn write_down(owned: &Owned) {
    let me = me();
    let write = || -> std::io::Result<()> {
        fs::create_dir_all(ledgers())?;
        let path = ledgers().join(format!("{} {}", me.pid, me.started));
        fs::OpenOptions::new().create(true).append(true).open(path)?.write_all(owned.line().as_bytes())
    };
    if let Err(error) = write() {
        eprintln!("testkit: cannot write down that {:?} is ours: {error}", owned.name);
    }
}

/// Returns the ledgers of dead processes, each with the objects it names.
pub(crate) fn orphaned_ledgers() -> Vec<(PathBuf, Vec<Owned>)> {
    let files = fs::read_dir(ledgers()).into_iter().flatten().flatten().map(|entry| entry.path());
    files.filter(|path| is_orphaned_ledger(path)).map(|path| (path.clone(), read_ledger(&path))).collect()
}

/// Deletes this process's ledger, once everything it names has been removed.
pub(crate) fn close_ledger() {
    let me = me();
    // The file does not exist if this process never registered a name.
    drop(fs::remove_file(ledgers().join(format!("{} {}", me.pid, me.started))));
}

fn is_orphaned_ledger(path: &Path) -> bool {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    name.split_once(' ').and_then(|(pid, started)| Some(is_dead(pid.parse().ok()?, started))).unwrap_or(false)
}

fn read_ledger(path: &Path) -> Vec<Owned> {
    fs::read_to_string(path).unwrap_or_default().lines().filter_map(Owned::parse).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_is_alive_and_its_things_are_no_orphans() {
        assert!(me().owns(&me().labels()));
        assert!(!is_orphan(&me().labels()));
    }

    #[test]
    fn a_dead_process_is_told_from_one_that_took_its_number() {
        let mut labels = me().labels();
        labels.insert(STARTED.into(), format!("{}@1", hostname()));
        assert!(is_orphan(&labels), "same number, another start");
        assert!(!me().owns(&labels));
        labels.insert(STARTED.into(), "elsewhere@1".into());
        assert!(!is_orphan(&labels), "another host's processes cannot be judged from here");
        assert!(!is_orphan(&HashMap::from([(MARK.into(), "1".into())])), "not labelled by this crate");
    }

    #[test]
    fn a_ledger_line_is_read_back() {
        let owned = Owned::now(Kind::Network, "dockflare-edge-abc");
        assert_eq!(Owned::parse(owned.line().trim_end()), Some(owned));
        assert_eq!(Owned::parse("volume 1 x"), None);
    }
}
