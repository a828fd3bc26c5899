//! The door through which workloads get their credentials: files in a directory that is shared with their containers,
//! all of them changed at once. It asks the vault as `workload:NAME` and decides nothing itself.
//!
//! What a workload has is level, not edge: whoever acts on changes ([`Desk`]) looks at what is there and compares it with
//! what was dealt with, and may be killed at any instant.

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

/// Orders that wait for the task; whoever gives one more waits.
const MAX_ORDERS: usize = 64;
/// Passes at a time.
const MAX_PASSES: usize = 16;
/// A pass that takes longer leaves its place to others.
const PATIENCE: Duration = Duration::from_millis(250);
/// A pass that takes longer is told to hang.
const HANGS: Duration = Duration::from_secs(5);
/// How often a directory is looked at without anything having happened: one that was emptied by hand is filled again.
const RESYNC: Duration = Duration::from_secs(10);
/// After a first failure; twice as long after each further one, up to [`RESYNC`].
const FIRST_RETRY: Duration = Duration::from_millis(500);
/// Between two passes that only time has caused.
const SHORTEST: Duration = Duration::from_millis(20);

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
    /// When the set was put in place, by the host's clock and at most some milliseconds early; shown in seconds since 1970.
    #[serde(serialize_with = "seconds")]
    pub since: Option<Timestamp>,
    /// When a newer set took the place of the settled one; while that one is in place, when it was settled. Before `since`
    /// with the settled set in place: it was put back.
    #[serde(skip)]
    pub left: Option<Timestamp>,
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
    /// These secrets are not there. Where there is a version, it is the last complete set, and older
    /// than what is wanted.
    Missing {
        /// What is missing, a line each, with the name of the secret and the remedy.
        missing: Vec<String>,
    },
    /// A secret was revoked, or may not be read (any more): there are no files, and those that were there are gone.
    Denied {
        /// Which one, a line each, with the row that is missing.
        denied: Vec<String>,
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
    const PENDING: Self = Self { version: None, settled: None, since: None, left: None, condition: Condition::Pending };

    /// A word for what is wrong, and a sentence without the name of a secret; `None` where nothing is.
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

    /// Whether the settled set is in place again after a newer one.
    pub fn is_back(&self) -> bool {
        self.version.is_some() && self.version == self.settled && self.left < self.since
    }

    /// Whether somebody who acts on changes has something to do.
    pub fn is_unsettled(&self) -> bool {
        self.version.is_some() && self.version != self.settled
    }
}

#[expect(clippy::ref_option, reason = "as serde asks for it")]
fn seconds<S: Serializer>(at: &Option<Timestamp>, serializer: S) -> Result<S::Ok, S::Error> {
    at.map(Timestamp::as_second).serialize(serializer)
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

    /// All of it for the operator, the names of secrets included.
    pub(crate) fn show(&self) -> Json {
        let states = self.states.borrow();
        states
            .iter()
            .map(|(workload, state)| (workload.to_string(), json!(state)))
            .collect::<serde_json::Map<_, _>>()
            .into()
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

/// Whether the directory of a delivery can be used, for a check while no vault runs. Blocks.
///
/// # Errors
/// One line with the remedy.
pub fn try_directory(delivery: &Delivery) -> Result<(), String> {
    folder::Folder::open(delivery).map(|_| ()).map_err(|error| error.to_string())
}

/// What all workloads have in common.
#[derive(Debug)]
struct Shared {
    vault: Arc<Vault>,
    claims: Claims,
    /// Passes at a time: more of them would only wait for each other.
    places: Semaphore,
    states: watch::Sender<States>,
}

/// The task of one workload, as the others reach it. It lives as long as the door: one without a delivery waits for the
/// next one, so that no second one ever works on what a first one hangs at.
struct Tended {
    delivery: watch::Sender<Option<Arc<Delivery>>>,
    bell: Arc<Notify>,
    orders: mpsc::Sender<Order>,
}

/// Delivers until it is dropped. `wanted` is replaced as a whole when the configuration changes.
pub async fn serve(vault: Arc<Vault>, mut wanted: watch::Receiver<Arc<Vec<Delivery>>>, inside: Inside) {
    let Inside { states, mut orders } = inside;
    let places = Semaphore::new(MAX_PASSES);
    let shared = Arc::new(Shared { vault: vault.clone(), claims: Claims::default(), places, states });
    let mut tended: BTreeMap<Workload, Tended> = BTreeMap::new();
    // Dropped with this task, and they with it.
    let mut tasks = JoinSet::new();
    loop {
        let deliveries = wanted.borrow_and_update().clone();
        take(&shared, &deliveries, &mut tended, &mut tasks).await;
        loop {
            tokio::select! {
                // What is not wanted any more is not looked at for another reason first.
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

/// Gives each workload its delivery.
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
    // Before the first of them writes: two that have one directory are both told, whoever is faster. Whoever hangs here
    // is left behind.
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

/// Wakes those whose secrets have changed, or all of them.
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

/// Keeps the files of one workload as they are to be.
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
            // Whatever is wanted next is looked at afresh.
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
        // Who waits for a mount sees it soon; what stays wrong is looked at as seldom as what is right.
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

/// One pass on a thread of its own, however long it takes. While it hangs, whoever gives an order is told so.
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
        // It is never closed.
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
        // The others go on meanwhile.
        drop(place);
        let mut is_said = false;
        loop {
            tokio::select! {
                ended = aside.or_earlier(HANGS, || None) => match ended {
                    Some(Some(passed)) => return passed,
                    // It ended in between, and nobody has what came of it.
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

/// Tells what has changed, the log included.
fn publish(states: &watch::Sender<States>, delivery: &Delivery, state: State) {
    let workload = &delivery.workload;
    states.send_if_modified(|states| {
        // One that is not wanted any more is not told.
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
