//! What is known of the one tunnel this process serves.

use std::net::Ipv4Addr;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;
use uuid::Uuid;

use crate::log::Log;
use crate::script::{Behaviour, Script};

/// Where the edge seems to be.
const LOCATIONS: [&str; 4] = ["fra07", "cdg12", "fra16", "ams08"];

/// The process's identity, its script, and what its metrics server shows.
#[derive(Debug)]
pub struct Connector {
    /// The log.
    pub log: Log,
    /// From the token.
    pub tunnel_id: String,
    /// A new one at each start.
    pub id: Uuid,
    /// Shown in the log and in `/diag/tunnel`.
    pub protocol: String,
    /// The behaviours in force; whoever acts on them subscribes.
    pub script: watch::Sender<Script>,
    /// A std mutex: no await happens under it.
    shown: Mutex<Shown>,
}

/// What changes as connections come and go.
#[derive(Debug, Clone)]
pub struct Shown {
    /// The registered connections.
    pub connections: Vec<Connection>,
    /// Registrations that worked, ever.
    pub registered: u64,
    /// Registrations that the edge refused, ever.
    pub refused: u64,
    /// The remote configuration's version, -1 until it arrived.
    pub config_version: i64,
}

/// One connection to an edge that is not there.
#[derive(Debug, Clone)]
pub struct Connection {
    /// Its UUID.
    pub id: Uuid,
    /// The edge's address.
    pub ip: Ipv4Addr,
    /// The edge's airport code and number.
    pub location: &'static str,
}

impl Connector {
    /// A connector without connections.
    #[must_use]
    pub fn new(log: Log, tunnel_id: &str, protocol: &str, script: Script) -> Self {
        Self {
            log,
            tunnel_id: tunnel_id.to_owned(),
            id: random_uuid(),
            protocol: protocol.to_owned(),
            script: watch::Sender::new(script),
            shown: Mutex::new(Shown { connections: Vec::new(), registered: 0, refused: 0, config_version: -1 }),
        }
    }

    /// The behaviour at this moment.
    #[must_use]
    pub fn behaviour(&self) -> Behaviour {
        self.script.borrow().behaviour().clone()
    }

    /// What the metrics server shows at this moment.
    #[must_use]
    pub fn shown(&self) -> Shown {
        self.lock().clone()
    }

    /// How many connections there are.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.lock().connections.len()
    }

    /// Registers one more connection and returns its index and itself.
    pub fn register(&self) -> (usize, Connection) {
        let mut shown = self.lock();
        let index = shown.connections.len();
        let connection = Connection {
            id: random_uuid(),
            ip: Ipv4Addr::new(198, 41, if index.is_multiple_of(2) { 192 } else { 200 }, fastrand::u8(1..=250)),
            location: LOCATIONS[index % LOCATIONS.len()],
        };
        shown.connections.push(connection.clone());
        shown.registered += 1;
        (index, connection)
    }

    /// Counts a registration that the edge refused.
    pub fn refuse(&self) {
        self.lock().refused += 1;
    }

    /// The remote configuration has arrived. True if it is another than before.
    pub fn configure(&self, version: i64) -> bool {
        std::mem::replace(&mut self.lock().config_version, version) != version
    }

    /// Takes all connections away and returns how many there were.
    pub fn disconnect(&self) -> usize {
        std::mem::take(&mut self.lock().connections).len()
    }

    fn lock(&self) -> MutexGuard<'_, Shown> {
        // Nothing panics while holding it; and if it did, what is shown would still be of use.
        self.shown.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A version 4 UUID; not for secrets.
fn random_uuid() -> Uuid {
    uuid::Builder::from_random_bytes(fastrand::u128(..).to_ne_bytes()).into_uuid()
}
