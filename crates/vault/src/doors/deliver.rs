//! The door through which workloads get their credentials: files in a directory that is shared with their containers,
//! all of them changed at once. It asks the vault as `workload:NAME` and decides nothing itself.
//!
//! What a workload has is level, not edge: whoever acts on changes ([`Desk`]) looks at what is there and compares it with
//! what was dealt with, and may be killed at any instant.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::Serialize;
use tokio::sync::{mpsc, oneshot, watch};

use crate::delivery::{Delivery, Workload};
use crate::vault::Vault;

/// Orders that wait for the task; whoever gives one more waits.
const MAX_ORDERS: usize = 64;

/// What each workload has.
pub type States = BTreeMap<Workload, State>;

/// What one workload has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct State {
    /// The number of the set of files that its containers see. It rises with each set, is never used twice while the
    /// directory lives, and begins anew with a directory that was made anew. `None`: there are no files.
    pub version: Option<u64>,
    /// The newest set that somebody who acts on changes has dealt with, see [`Desk::settle`]; kept in the directory, so
    /// that it outlives the vault. With `on_change: none` each set is settled at once. Other than `version`: there is
    /// something to do. The files of this one are kept until another one is settled.
    pub settled: Option<u64>,
    /// Seconds since 1970, when the set was put in place.
    pub since: Option<i64>,
    /// How it stands.
    #[serde(flatten)]
    pub condition: Condition,
}

/// How it stands with a workload's files.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "condition", rename_all = "snake_case")]
pub enum Condition {
    /// The files are what they are to be.
    Delivered,
    /// Nothing was looked at yet.
    Pending,
    /// These secrets are not there, or may not be read. Where there is a version, it is the last complete set, and older
    /// than what is wanted.
    Missing {
        /// What is missing, a line each, with the name of the secret and the remedy.
        missing: Vec<String>,
    },
    /// A secret was revoked, or the right to read it taken away: the files were removed.
    Revoked {
        /// Which one, a line each.
        revoked: Vec<String>,
    },
    /// What is wanted was put back, see [`Desk::put_back`]. It is delivered when a secret or the delivery changes.
    PutBack {
        /// The number that it had.
        refused: u64,
    },
    /// The directory cannot be used, or a file cannot be made.
    Failed {
        /// One line with the remedy.
        problem: String,
    },
}

impl State {
    const PENDING: Self = Self { version: None, settled: None, since: None, condition: Condition::Pending };

    /// Whether somebody who acts on changes has something to do.
    pub fn is_unsettled(&self) -> bool {
        self.version.is_some() && self.version != self.settled
    }
}

/// What others of this program may see of the deliveries and ask of them. Clones are as good as the first.
#[derive(Debug, Clone)]
pub struct Desk {
    states: watch::Receiver<States>,
    orders: mpsc::Sender<Order>,
}

/// The other side of a [`Desk`], for the task.
#[derive(Debug)]
pub struct Inside {
    states: watch::Sender<States>,
    orders: mpsc::Receiver<Order>,
}

/// What is asked of the task.
#[derive(Debug)]
struct Order {
    workload: Workload,
    version: u64,
    what: What,
    done: oneshot::Sender<Result<u64, String>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum What {
    Settle,
    PutBack,
}

/// A desk and the task's side of it.
pub fn desk() -> (Desk, Inside) {
    let (states, seen) = watch::channel(States::new());
    let (orders, taken) = mpsc::channel(MAX_ORDERS);
    (Desk { states: seen, orders }, Inside { states, orders: taken })
}

impl Desk {
    /// What each workload has, now and whenever it changes. Only the newest is kept.
    pub fn states(&self) -> watch::Receiver<States> {
        self.states.clone()
    }

    /// The containers of this workload have this version: it is settled, and the set before it goes. Returns the number
    /// that is in place, which is a later one when the files have changed meanwhile.
    ///
    /// # Errors
    /// A line, when there is no such workload or its directory cannot be used.
    pub async fn settle(&self, workload: &Workload, version: u64) -> Result<u64, String> {
        self.order(workload, version, What::Settle).await
    }

    /// The containers of this workload cannot live with this version: the settled one is put in its place, and what this
    /// version was made of is not delivered again before a secret or the delivery changes. Returns the number that is in
    /// place then; a version that is not in place any more is left as it is.
    ///
    /// # Errors
    /// A line, when there is no such workload, its directory cannot be used, or there is no settled set.
    pub async fn put_back(&self, workload: &Workload, version: u64) -> Result<u64, String> {
        self.order(workload, version, What::PutBack).await
    }

    async fn order(&self, workload: &Workload, version: u64, what: What) -> Result<u64, String> {
        let gone = || "the vault is about to end".to_owned();
        let (done, answer) = oneshot::channel();
        let order = Order { workload: workload.clone(), version, what, done };
        self.orders.send(order).await.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }
}

/// Delivers until it is dropped. `wanted` is replaced as a whole when the configuration changes.
pub async fn serve(_vault: Arc<Vault>, mut wanted: watch::Receiver<Arc<Vec<Delivery>>>, mut inside: Inside) {
    loop {
        let names: Vec<_> = wanted.borrow_and_update().iter().map(|delivery| delivery.workload.clone()).collect();
        inside.states.send_modify(|states| {
            states.retain(|name, _| names.contains(name));
            for name in names {
                states.entry(name).or_insert(State::PENDING);
            }
        });
        tokio::select! {
            changed = wanted.changed() => if changed.is_err() { return },
            order = inside.orders.recv() => match order {
                None => return,
                Some(order) => {
                    tracing::debug!(workload = %order.workload, version = order.version, what = ?order.what, "asked");
                    let _ = order.done.send(Err(format!("{} has no files yet", order.workload)));
                }
            },
        }
    }
}
