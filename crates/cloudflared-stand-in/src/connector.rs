//! What is known of the one tunnel this process serves.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;
use uuid::Uuid;

use crate::log::{Level, Log};
use crate::script::{Behaviour, Script};
use crate::transport::{Protocol, Transport};

/// Where the edge seems to be.
const LOCATIONS: [&str; 4] = ["fra07", "cdg12", "fra16", "ams08"];

const MIB: usize = 1024 * 1024;

/// The process's identity, its script, and what its metrics server shows.
#[derive(Debug)]
pub struct Connector {
    /// The log.
    pub log: Log,
    /// From the token.
    pub tunnel_id: String,
    /// A new one at each start.
    pub id: Uuid,
    /// Whether http2 may take the place of quic.
    pub may_fall_back: bool,
    /// The behaviours in force; whoever acts on them subscribes.
    pub script: watch::Sender<Script>,
    /// A std mutex: no await happens under it.
    shown: Mutex<Shown>,
    /// Memory in pieces of a MiB, only to have it.
    eaten: Mutex<Vec<Vec<u8>>>,
}

/// What changes as connections come and go.
#[derive(Debug, Clone)]
pub struct Shown {
    /// Shown in the log and in `/diag/tunnel`.
    pub protocol: Protocol,
    /// The registered connections, by their index.
    pub connections: BTreeMap<usize, Connection>,
    /// Registrations that worked, ever.
    pub registered: u64,
    /// Registrations that the edge refused, ever.
    pub refused: u64,
    /// The remote configuration's version, -1 until it arrived.
    pub config_version: i64,
    /// Requests of a double of the edge that were answered, ever.
    pub served: u64,
}

/// One connection, to a double of the edge or to nothing; its address is made up.
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
    pub fn new(log: Log, tunnel_id: &str, transport: Transport, script: Script) -> Self {
        Self {
            log,
            tunnel_id: tunnel_id.to_owned(),
            id: random_uuid(),
            may_fall_back: transport.may_fall_back,
            script: watch::Sender::new(script),
            shown: Mutex::new(Shown {
                protocol: transport.first,
                connections: BTreeMap::new(),
                registered: 0,
                refused: 0,
                config_version: -1,
                served: 0,
            }),
            eaten: Mutex::default(),
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

    /// The protocol of the connections that are or will be.
    #[must_use]
    pub fn protocol(&self) -> Protocol {
        self.lock().protocol
    }

    /// Changes to http2 for good, as the original does.
    pub fn fall_back(&self) {
        self.lock().protocol = Protocol::Http2;
    }

    /// Registers the connection of that index.
    pub fn register(&self, index: usize) -> Connection {
        let connection = Connection {
            id: random_uuid(),
            ip: Ipv4Addr::new(198, 41, if index.is_multiple_of(2) { 192 } else { 200 }, fastrand::u8(1..=250)),
            location: LOCATIONS[index % LOCATIONS.len()],
        };
        let mut shown = self.lock();
        shown.connections.insert(index, connection.clone());
        shown.registered += 1;
        connection
    }

    /// Counts a registration that the edge refused.
    pub fn refuse(&self) {
        self.lock().refused += 1;
    }

    /// The remote configuration has arrived. True if it is another than before.
    pub fn configure(&self, version: i64) -> bool {
        std::mem::replace(&mut self.lock().config_version, version) != version
    }

    /// Takes one connection away. False if it was away already.
    pub fn lose(&self, index: usize) -> bool {
        self.lock().connections.remove(&index).is_some()
    }

    /// Takes all connections away and returns their indexes.
    pub fn disconnect(&self) -> Vec<usize> {
        std::mem::take(&mut self.lock().connections).into_keys().collect()
    }

    /// Counts a request that was answered.
    pub fn served(&self) {
        self.lock().served += 1;
    }

    /// Returns once the script does not say `hang`.
    pub async fn no_hang(&self) {
        let mut script = self.script.subscribe();
        // An error would mean that the sender is gone, and it lives here.
        drop(script.wait_for(|script| !script.behaviour().hang).await);
    }

    /// Has so much memory from now on. What it has it keeps.
    pub fn eat(&self, mib: usize) {
        let mut eaten = lock(&self.eaten);
        if mib > eaten.len() {
            self.log.say(Level::Info, format_args!("stand-in: eating {mib} MiB"));
            // Written and not only reserved: a limit counts what is touched. Hidden from the compiler,
            // which would leave out memory that nobody reads.
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
    // Nothing panics while holding one; and if it did, what is in it would still be of use.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A version 4 UUID; not for secrets.
fn random_uuid() -> Uuid {
    uuid::Builder::from_random_bytes(fastrand::u128(..).to_ne_bytes()).into_uuid()
}
