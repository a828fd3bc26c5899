//! Delivers credentials to workloads as files in a directory that is shared with their containers. All files change at
//! once. This door asks the vault as `workload:NAME` and decides nothing itself.
//!
//! Deliveries are level-triggered: whoever acts on changes ([`Desk`]) compares the set in place with the settled one,
//! and may be killed at any instant.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use dockflare_host::aside::Aside;
use jiff::Timestamp;
use serde::{Serialize, Serializer};
use serde_json::{Value as Json, json};
use tokio::sync::{Notify, Semaphore, mpsc, oneshot, watch};
use tokio::task::{JoinSet, spawn_blocking};
use tokio::time::{sleep, timeout};

use crate::delivery::{Delivery, Workload};
use crate::secret::SecretName;
use crate::vault::Vault;

mod folder;
mod pass;
mod plan;

use pass::{Claims, Memory, Passed};

/// Most orders that wait for the task; the sender of one more waits.
const MAX_ORDERS: usize = 64;
/// Most passes at a time.
const MAX_PASSES: usize = 16;
/// A pass that takes longer frees its place for others.
const PATIENCE: Duration = Duration::from_millis(250);
/// A pass that takes longer is reported as hanging.
const HANGS: Duration = Duration::from_secs(5);
/// How often to check a directory when nothing has happened, for example to refill one that was emptied by hand.
const RESYNC: Duration = Duration::from_secs(10);
/// Pause after the first failure. It doubles with each further one, up to [`RESYNC`].
const FIRST_RETRY: Duration = Duration::from_millis(500);
/// Shortest pause between two passes that only time has caused.
const SHORTEST: Duration = Duration::from_millis(20);

/// The state of each workload.
pub type States = BTreeMap<Workload, State>;

/// The state of one workload's files.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct State {
    /// Number of the set of files that the containers see; `None` means no files. It rises with each set and is never
    /// used twice while the directory lives. A new directory starts over.
    pub version: Option<u64>,
    /// The newest settled set, see [`Desk::settle`]. It is kept in the directory, so that it outlives the vault. With
    /// `on_change: none` each set is settled at once. A number other than `version` means that there is something to
    /// do. The files of the settled set are kept until another set is settled.
    pub settled: Option<u64>,
    /// When the set was put in place, by the host's clock and at most some milliseconds early. Shown in seconds since
    /// 1970.
    #[serde(serialize_with = "seconds")]
    pub since: Option<Timestamp>,
    /// When a newer set replaced the settled one. While the settled set is in place: when it was settled. If this is
    /// before `since` and the settled set is in place, that set was put back.
    #[serde(skip)]
    pub left: Option<Timestamp>,
    /// Whether the files are current, and if not, why.
    #[serde(flatten)]
    pub condition: Condition,
}

/// The condition of a workload's files.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "condition", rename_all = "snake_case")]
pub enum Condition {
    /// The files are in place and current.
    Delivered,
    /// Not checked yet.
    Pending,
    /// Secrets are missing. Where there is a version, it is the last complete set, and out of date.
    Missing {
        /// One line for each missing secret, with its name and the remedy.
        missing: Vec<String>,
    },
    /// A secret was revoked, or the workload may not read it (any more). All files were removed.
    Denied {
        /// One line for each such secret, with the grant row that is missing.
        denied: Vec<String>,
    },
    /// The newest set was put back, see [`Desk::put_back`]. The vault delivers again when a secret or the delivery
    /// changes.
    PutBack {
        /// The number of the set that was put back.
        refused: u64,
    },
    /// The directory cannot be used, or a file cannot be made.
    Failed {
        /// One line with the remedy.
        problem: String,
    },
}

impl State {
    const PENDING: Self = Self { version: None, settled: None, since: None, left: None, condition: Condition::Pending };

    /// A code for the problem, and a sentence that names no secret; `None` if nothing is wrong.
    pub fn problem(&self) -> Option<(&'static str, String)> {
        let stays = match self.version {
            Some(version) => format!("version {version} of its files stays in place"),
            None => "it has no files".to_owned(),
        };
        Some(match &self.condition {
            Condition::Delivered | Condition::Pending => return None,
            Condition::Missing { missing } => {
                ("delivery_missing", format!("{} of its secrets are not there; {stays}", missing.len()))
            }
            Condition::Denied { denied } => {
                ("delivery_denied", format!("{} of its secrets were revoked or may not be read; {stays}", denied.len()))
            }
            Condition::PutBack { refused } => {
                ("delivery_put_back", format!("version {refused} of its files was put back; {stays}"))
            }
            Condition::Failed { .. } => {
                ("delivery_failed", format!("its files cannot be made or its directory cannot be used; {stays}"))
            }
        })
    }

    /// Whether the settled set is back in place after a newer one.
    pub fn is_back(&self) -> bool {
        self.version.is_some() && self.version == self.settled && self.left < self.since
    }

    /// Whether the set in place still has to be settled.
    pub fn is_unsettled(&self) -> bool {
        self.version.is_some() && self.version != self.settled
    }
}

#[expect(clippy::ref_option, reason = "as serde asks for it")]
fn seconds<S: Serializer>(at: &Option<Timestamp>, serializer: S) -> Result<S::Ok, S::Error> {
    at.map(Timestamp::as_second).serialize(serializer)
}

/// Gives other parts of this program the state of the deliveries, and takes their orders. All clones are equal.
#[derive(Debug, Clone)]
pub struct Desk {
    states: watch::Receiver<States>,
    orders: mpsc::Sender<Order>,
}

/// The task's side of a [`Desk`].
#[derive(Debug)]
pub struct Inside {
    states: watch::Sender<States>,
    orders: mpsc::Receiver<Order>,
}

/// An order for the task.
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

/// Makes a desk and the task's side of it.
pub fn desk() -> (Desk, Inside) {
    let (states, seen) = watch::channel(States::new());
    let (orders, taken) = mpsc::channel(MAX_ORDERS);
    (Desk { states: seen, orders }, Inside { states, orders: taken })
}

impl Desk {
    /// The state of each workload, now and at each change. Only the newest is kept.
    pub fn states(&self) -> watch::Receiver<States> {
        self.states.clone()
    }

    /// All states for the operator, including the names of secrets.
    pub(crate) fn show(&self) -> Json {
        let states = self.states.borrow();
        states
            .iter()
            .map(|(workload, state)| (workload.to_string(), json!(state)))
            .collect::<serde_json::Map<_, _>>()
            .into()
    }

    /// Settles a version: the containers of this workload use it, and the set before it can go. Returns the number of
    /// the set in place, which is later than `version` if the files have changed meanwhile.
    ///
    /// # Errors
    /// One line, when there is no such workload or its directory cannot be used.
    pub async fn settle(&self, workload: &Workload, version: u64) -> Result<u64, String> {
        self.order(workload, version, What::Settle).await
    }

    /// Refuses a version that the containers of this workload cannot run with, and puts the settled set back in its
    /// place. The same files are not delivered again until a secret or the delivery changes. Returns the number of the
    /// set then in place. If `version` is no longer in place, this changes nothing.
    ///
    /// # Errors
    /// One line, when there is no such workload, its directory cannot be used, or there is no settled set.
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

/// Checks that the directory of a delivery can be used, while no vault runs. Blocks.
///
/// # Errors
/// One line with the remedy.
pub fn try_directory(delivery: &Delivery) -> Result<(), String> {
    folder::Folder::open(delivery).map(|_| ()).map_err(|error| error.to_string())
}

/// What the tasks of all workloads share.
#[derive(Debug)]
struct Shared {
    vault: Arc<Vault>,
    claims: Claims,
    /// Limits concurrent passes: more of them would only wait for each other.
    places: Semaphore,
    states: watch::Sender<States>,
}

/// Handle to the task of one workload. The task lives as long as the door. Without a delivery it waits for the next
/// one, so that no second task ever works on a directory where the first one hangs.
struct Tended {
    delivery: watch::Sender<Option<Arc<Delivery>>>,
    bell: Arc<Notify>,
    orders: mpsc::Sender<Order>,
}

/// Delivers until it is dropped. A new configuration replaces `wanted` as a whole.
pub async fn serve(vault: Arc<Vault>, mut wanted: watch::Receiver<Arc<Vec<Delivery>>>, inside: Inside) {
    let Inside { states, mut orders } = inside;
    let places = Semaphore::new(MAX_PASSES);
    let shared = Arc::new(Shared { vault: vault.clone(), claims: Claims::default(), places, states });
    let mut tended: BTreeMap<Workload, Tended> = BTreeMap::new();
    // Dropping this future drops the set, and that ends the tasks.
    let mut tasks = JoinSet::new();
    loop {
        let deliveries = wanted.borrow_and_update().clone();
        take(&shared, &deliveries, &mut tended, &mut tasks).await;
        loop {
            tokio::select! {
                // Take a new configuration first: a removed delivery must not be checked for another reason.
                biased;
                changed = wanted.changed() => match changed {
                    Ok(()) => break,
                    Err(_) => return,
                },
                names = vault.changes().next() => ring(&tended, names.as_ref()),
                order = orders.recv() => match order {
                    None => return,
                    Some(order) => pass_on(&tended, order),
                },
                Some(_) = tasks.join_next() => return,
            }
        }
    }
}

/// Hands each workload its delivery, and starts the tasks that are missing.
async fn take(
    shared: &Arc<Shared>,
    deliveries: &Arc<Vec<Delivery>>,
    tended: &mut BTreeMap<Workload, Tended>,
    tasks: &mut JoinSet<()>,
) {
    let wanted: BTreeMap<&Workload, &Delivery> = deliveries.iter().map(|one| (&one.workload, one)).collect();
    for (name, one) in tended.iter().filter(|(name, _)| !wanted.contains_key(name)) {
        if one.delivery.send_replace(None).is_some() {
            shared.claims.release(name);
            tracing::info!(workload = %name, "is not delivered to any more; its files stay where they are");
        }
    }
    shared.states.send_modify(|states| {
        states.retain(|name, _| wanted.contains_key(name));
        for name in wanted.keys() {
            states.entry((*name).clone()).or_insert(State::PENDING);
        }
    });
    // Claim before any task writes: if two workloads share a directory, both get the error, whichever is faster. Do not
    // wait for a directory that hangs.
    let (all, inside) = (deliveries.clone(), shared.clone());
    let claimed = spawn_blocking(move || all.iter().for_each(|delivery| pass::claim(delivery, &inside.claims)));
    let _ = timeout(PATIENCE, claimed).await;
    for (name, delivery) in wanted {
        let fresh = Some(Arc::new(delivery.clone()));
        match tended.get(name) {
            Some(one) => {
                one.delivery.send_if_modified(|present| {
                    let is_other = *present != fresh;
                    *present = fresh;
                    is_other
                });
            }
            None => {
                let (delivery, taken) = watch::channel(fresh);
                let (orders, given) = mpsc::channel(MAX_ORDERS);
                let bell = Arc::new(Notify::new());
                tasks.spawn(tend(shared.clone(), taken, bell.clone(), given));
                tended.insert(name.clone(), Tended { delivery, bell, orders });
            }
        }
    }
}

/// Wakes the tasks whose secrets have changed, or all of them for `None`.
fn ring(tended: &BTreeMap<Workload, Tended>, names: Option<&BTreeSet<SecretName>>) {
    for one in tended.values() {
        let delivery = one.delivery.borrow();
        let is_meant = delivery.as_ref().is_some_and(|delivery| {
            names.is_none_or(|names| delivery.secrets().into_iter().any(|name| names.contains(name)))
        });
        if is_meant {
            one.bell.notify_one();
        }
    }
}

fn pass_on(tended: &BTreeMap<Workload, Tended>, order: Order) {
    let refused = match tended.get(&order.workload).filter(|one| one.delivery.borrow().is_some()) {
        None => Some((order, "there is no delivery for it")),
        Some(one) => {
            one.orders.try_send(order).err().map(|error| (error.into_inner(), "its directory does not answer"))
        }
    };
    if let Some((order, why)) = refused {
        let _ = order.done.send(Err(format!("{}: {why}", order.workload)));
    }
}

/// Keeps the files of one workload current.
async fn tend(
    shared: Arc<Shared>,
    mut taken: watch::Receiver<Option<Arc<Delivery>>>,
    bell: Arc<Notify>,
    mut orders: mpsc::Receiver<Order>,
) {
    let aside = Aside::<Option<Passed>>::default();
    let mut memory = Arc::new(Mutex::new(Memory::default()));
    let mut failures = 0;
    let mut last = None;
    let mut order: Option<Order> = None;
    loop {
        let Some(delivery) = taken.borrow_and_update().clone() else {
            // Check the next delivery from scratch.
            last = None;
            if taken.changed().await.is_err() {
                return;
            }
            continue;
        };
        if last.replace(delivery.clone()).as_ref() != Some(&delivery) {
            memory = Arc::default();
        }
        let passed = one_pass(&shared, &aside, &delivery, &memory, &mut order, &mut orders).await;
        let Passed { state, next, answer } = passed;
        if let (Some(order), Some(answer)) = (order.take(), answer) {
            let _ = order.done.send(answer);
        }
        failures = if matches!(state.condition, Condition::Failed { .. }) { failures + 1 } else { 0 };
        publish(&shared.states, &delivery, state);
        // Retry soon at first: the volume may be mounted any moment. A lasting failure is checked as seldom as a
        // success.
        let pause = if failures == 0 { RESYNC } else { RESYNC.min(FIRST_RETRY * 2_u32.pow(failures.min(8) - 1)) };
        tokio::select! {
            biased;
            changed = taken.changed() => if changed.is_err() { return },
            given = orders.recv() => match given {
                None => return,
                given => order = given,
            },
            () = bell.notified() => {}
            () = sleep(next.map_or(pause, |next| next.min(pause).max(SHORTEST))) => {}
        }
    }
}

/// Runs one pass on a thread of its own, however long it takes. While the pass hangs, answers each order with an error.
async fn one_pass(
    shared: &Arc<Shared>,
    aside: &Aside<Option<Passed>>,
    delivery: &Arc<Delivery>,
    memory: &Arc<Mutex<Memory>>,
    order: &mut Option<Order>,
    orders: &mut mpsc::Receiver<Order>,
) -> Passed {
    let problem = format!("{} does not answer: its file system hangs; waiting for it", delivery.directory.display());
    loop {
        // The semaphore is never closed.
        let place = shared.places.acquire().await.ok();
        let work = {
            let (shared, delivery, memory) = (shared.clone(), delivery.clone(), memory.clone());
            let order = order.as_ref().map(|order| (order.version, order.what));
            move || {
                let mut memory = memory.lock().unwrap_or_else(PoisonError::into_inner);
                Some(pass::pass(&shared.vault, &delivery, &shared.claims, &mut memory, order))
            }
        };
        if let Some(Some(passed)) = aside.after_earlier(PATIENCE, work).await {
            return passed;
        }
        // Let the passes of other workloads go on meanwhile.
        drop(place);
        let mut is_said = false;
        loop {
            tokio::select! {
                ended = aside.or_earlier(HANGS, || None) => match ended {
                    Some(Some(passed)) => return passed,
                    // The pass ended in between and its result is lost: start another one.
                    Some(None) => break,
                    None => {
                        is_said = true;
                        let before = shared.states.borrow().get(&delivery.workload).cloned().unwrap_or(State::PENDING);
                        publish(&shared.states, delivery, State { condition: Condition::Failed { problem: problem.clone() }, ..before });
                    }
                },
                Some(given) = orders.recv(), if is_said => *order = Some(given),
            }
            if is_said && let Some(order) = order.take() {
                let _ = order.done.send(Err(problem.clone()));
            }
        }
    }
}

/// Publishes a changed state and logs it.
fn publish(states: &watch::Sender<States>, delivery: &Delivery, state: State) {
    let workload = &delivery.workload;
    states.send_if_modified(|states| {
        // Drop the state of a workload that is no longer configured.
        let Some(before) = states.get_mut(workload) else { return false };
        if *before == state {
            return false;
        }
        say(workload, before, &state);
        *before = state;
        true
    });
}

fn say(workload: &Workload, before: &State, state: &State) {
    let is_new = state.version.is_some() && state.version != before.version;
    if is_new && let Some(version) = state.version {
        tracing::info!(%workload, version, "its files are in place");
    }
    if before.condition == state.condition {
        return;
    }
    let stays = match state.version {
        Some(version) => format!("version {version} of its files stays in place"),
        None => "it has no files".to_owned(),
    };
    match &state.condition {
        Condition::Delivered if is_new || before.condition == Condition::Pending => {}
        Condition::Delivered => tracing::info!(%workload, "its files are as they are to be again"),
        Condition::Pending => {}
        Condition::Missing { missing } => tracing::warn!(%workload, "{stays}: {}", missing.join("; ")),
        Condition::Denied { denied } => tracing::warn!(%workload, "its files are taken away: {}", denied.join("; ")),
        Condition::PutBack { refused } => {
            tracing::warn!(%workload, refused, "{stays}: version {refused} was put back; it waits for a change of its secrets");
        }
        Condition::Failed { problem } => tracing::error!(%workload, "{stays}: {problem}; trying again"),
    }
}

#[cfg(test)]
mod tests;
