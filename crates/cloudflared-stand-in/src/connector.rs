//! The state of the one tunnel that this process serves.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;
use uuid::Uuid;

use crate::log::Log;
use crate::recording::{Chosen, Version};
use crate::script::{Behaviour, Script};
use crate::transport::{Protocol, Transport};

const MIB: usize = 1024 * 1024;

/// The process's identity, its script, and what its metrics server shows.
#[derive(Debug)]
pub struct Connector {
    /// The log.
    pub log: Log,
    /// The tunnel's id, from the token.
    pub tunnel_id: String,
    /// The token's text, which an edge decides by. Never shown.
    pub(crate) token: String,
    /// The connector's id, new at each start.
    pub id: Uuid,
    /// What the user chose.
    pub chosen: Chosen,
    /// The behaviors in force. Tasks that act on them subscribe.
    pub script: watch::Sender<Script>,
    /// A std mutex: no await while it is held.
    shown: Mutex<Shown>,
    /// The memory that `eat` holds, in pieces of 1 MiB.
    eaten: Mutex<Vec<Vec<u8>>>,
}

/// The state that changes as connections come and go.
#[derive(Debug, Clone)]
pub struct Shown {
    /// The protocol of the current connections, or of the next ones.
    pub protocol: Protocol,
    /// The indexes that `/ready` counts.
    pub connections: BTreeSet<usize>,
    /// Whether there has ever been a connection.
    pub connected_once: bool,
    /// The series of `/metrics`, as recorded up to this point.
    pub series: BTreeMap<String, f64>,
    /// Whether the remote configuration has arrived.
    pub configured: bool,
    /// Requests from a double of the edge.
    pub served: u64,
    /// Those of them that the origin failed.
    pub failed: u64,
    /// Requests that are being answered.
    pub in_flight: u64,
}

impl Connector {
    /// A connector without connections.
    #[must_use]
    pub fn new(log: Log, tunnel_id: &str, token: &str, transport: Transport, script: Script) -> Self {
        Self {
            log,
            tunnel_id: tunnel_id.to_owned(),
            token: token.to_owned(),
            id: random_uuid(),
            chosen: transport.chosen,
            script: watch::Sender::new(script),
            shown: Mutex::new(Shown {
                protocol: transport.first(),
                connections: BTreeSet::new(),
                connected_once: false,
                series: BTreeMap::new(),
                configured: false,
                served: 0,
                failed: 0,
                in_flight: 0,
            }),
            eaten: Mutex::default(),
        }
    }

    /// The behavior at this moment.
    #[must_use]
    pub fn behaviour(&self) -> Behaviour {
        self.script.borrow().behaviour().clone()
    }

    /// The recorded version that it behaves as.
    #[must_use]
    pub fn version(&self) -> Version {
        Version::like(&self.behaviour().version)
    }

    /// What the metrics server shows at this moment.
    #[must_use]
    pub fn shown(&self) -> Shown {
        self.lock().clone()
    }

    /// Changes what is shown.
    pub fn show<T>(&self, change: impl FnOnce(&mut Shown) -> T) -> T {
        change(&mut self.lock())
    }

    /// How many connections there are.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.lock().connections.len()
    }

    /// The protocol of the current connections, or of the next ones.
    #[must_use]
    pub fn protocol(&self) -> Protocol {
        self.lock().protocol
    }

    /// Waits while the script says `hang`.
    pub async fn no_hang(&self) {
        let mut script = self.script.subscribe();
        // Cannot fail: `self` holds the sender.
        drop(script.wait_for(|script| !script.behaviour().hang).await);
    }

    /// Holds at least this much memory from now on; never frees any.
    pub fn eat(&self, mib: usize) {
        let mut eaten = lock(&self.eaten);
        if mib > eaten.len() {
            // Write the memory, not only reserve it: a limit counts touched pages. `black_box` keeps the compiler from
            // dropping memory that nobody reads.
            eaten.resize_with(mib, || std::hint::black_box(vec![0x5a; MIB]));
        }
    }

    /// The memory eaten so far, in MiB.
    #[must_use]
    pub fn eaten(&self) -> usize {
        lock(&self.eaten).len()
    }

    fn lock(&self) -> MutexGuard<'_, Shown> {
        lock(&self.shown)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing panics while holding a lock, and the content would still be usable.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A version 4 UUID; not for secrets.
pub(crate) fn random_uuid() -> Uuid {
    uuid::Builder::from_random_bytes(fastrand::u128(..).to_ne_bytes()).into_uuid()
}
