//! A double of Cloudflare's edge, for tests: connectors dial it, and it sends visitors' requests over their
//! connections.
//!
//! Like the real edge, it needs a while to use a new connection, stops using one that unregisters, closes it a second
//! after its last answer, and does not retry a request whose connection broke. Tests control it with these calls:
//!
//! | call | what connectors meet |
//! |---|---|
//! | [`Edge::refuse`], [`Edge::fail`], [`Edge::leave_unanswered`] | each registration of [`Whose`] gets that verdict, and existing connections are dropped |
//! | [`Edge::accept`] | registers them again |
//! | [`Edge::block`], [`Edge::unblock`] | one protocol finds nothing listening; the other works |
//! | [`Edge::leave`], [`Edge::swallow`], [`Edge::come_back`] | the edge is away: nothing listens, or packets get no answer |
//! | [`Edge::keep_drained`] | drained connections are not closed: a stop takes its whole grace period |
//!
//! It speaks JSON lines over TCP. A verdict also reports what a real network would show as silence or as a reset, so
//! the connector knows at once which recording to play:
//!
//! | who | says | when |
//! |---|---|---|
//! | connector | `{"register":{"tunnel":…,"connector":…,"token":…,"protocol":"quic"}}` | first |
//! | edge | `{"verdict":"registered"}`, or `{"verdict":{"refused":"Unauthorized: …"}}` and so on | then |
//! | edge | `{"id":1,"path":"/x"}` | for each request |
//! | connector | `{"id":1,"body":"…"}` | for each answer, in any order |
//! | connector | `{"unregister":true}` | when its drain begins |
//! | edge | `{"closing":"dropped"}` | before it closes a connection on purpose |

use std::collections::{BTreeSet, HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use tokio::io::AsyncWriteExt;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{Instant, sleep};

use crate::transport::Protocol;
use crate::wire::{self, FromConnector, FromEdge, Lines, Loss, Registration, Verdict};

/// Requests that may wait for a slow connection; beyond that, [`Edge::ask`] waits.
const QUEUE: usize = 64;
/// How long after its last answer the edge closes a drained connection, as in the recordings.
const LINGER: Duration = Duration::from_secs(1);

/// The edge. It runs on the runtime that started it; dropping it closes every connection.
pub struct Edge {
    address: SocketAddr,
    shared: Arc<Shared>,
    requests: AtomicU64,
    accepting: JoinHandle<()>,
}

/// Whom a verdict is for.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Whose {
    /// All connectors.
    All,
    /// Connectors of the tunnel with this id.
    Tunnel(String),
    /// Connectors with this token.
    Token(String),
    /// Connections over this protocol.
    Over(Protocol),
}

impl Whose {
    fn includes(&self, who: &Registration) -> bool {
        match self {
            Self::All => true,
            Self::Tunnel(tunnel) => *tunnel == who.tunnel,
            Self::Token(token) => token.trim() == who.token.trim(),
            Self::Over(protocol) => *protocol == who.protocol,
        }
    }
}

/// The state that the calls change. Std mutexes: no await while one is held.
struct Shared {
    takes: Duration,
    links: Mutex<HashMap<u64, Link>>,
    rules: Mutex<Rules>,
    /// Every registration so far, for tests that count tries.
    tries: Mutex<Vec<Try>>,
}

#[derive(Default)]
struct Rules {
    verdicts: Vec<(Whose, Verdict)>,
    blocked: HashSet<Protocol>,
    away: Option<Loss>,
    keeps_drained: bool,
}

/// A registration that a connector asked for, and its verdict.
#[derive(Debug, Clone)]
pub struct Try {
    /// The connector's id.
    pub connector: String,
    /// The protocol.
    pub protocol: Protocol,
    /// The edge's answer.
    pub verdict: Verdict,
    /// When.
    pub at: Instant,
}

/// A registered connection, keyed by a number of its own. The edge may use it from `usable_from` on.
struct Link {
    who: Registration,
    usable_from: Instant,
    queue: mpsc::Sender<Request>,
    close: watch::Sender<Option<Loss>>,
    drained: bool,
}

struct Request {
    id: u64,
    line: String,
    answer: oneshot::Sender<String>,
}

/// Requests that one connection has taken and not answered. Dropping a sender fails its request.
type Waiting = Mutex<HashMap<u64, oneshot::Sender<String>>>;

impl Edge {
    /// Listens on `address` (port 0: any free port). Uses a connection only once it has been registered for `takes`.
    ///
    /// # Errors
    /// When the address cannot be used.
    pub async fn start(address: SocketAddr, takes: Duration) -> Result<Self> {
        let listener = TcpListener::bind(address).await.with_context(|| format!("cannot listen on {address}"))?;
        let address = listener.local_addr()?;
        let shared =
            Arc::new(Shared { takes, links: Mutex::default(), rules: Mutex::default(), tries: Mutex::default() });
        let accepting = tokio::spawn(accept(listener, shared.clone()));
        Ok(Self { address, shared, requests: AtomicU64::new(1), accepting })
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Sends one visitor's request over a random usable connection of the tunnel, and returns the answer's body. It has
    /// no time limit: wrap it if you need one.
    ///
    /// # Errors
    /// When there is no usable connection, or it breaks with the request in flight. The edge does not retry: a real
    /// visitor sees a 530 or a 502.
    pub async fn ask(&self, tunnel: &str, path: &str) -> Result<String> {
        let id = self.requests.fetch_add(1, Ordering::Relaxed);
        let line = wire::line(&FromEdge::Request { id, path: path.to_owned() })?;
        let chosen = fastrand::choice(self.shared.usable(tunnel));
        let (connector, queue) = chosen.with_context(|| format!("no usable connection of tunnel {tunnel}"))?;
        let broke = || format!("a connection of {connector} broke with request {id} in flight");
        let (answer, answered) = oneshot::channel();
        queue.send(Request { id, line, answer }).await.ok().with_context(broke)?;
        answered.await.ok().with_context(broke)
    }

    /// The ids of the tunnel's connectors with a usable connection, sorted, each once.
    #[must_use]
    pub fn connectors(&self, tunnel: &str) -> Vec<String> {
        let connectors: BTreeSet<_> = self.shared.usable(tunnel).into_iter().map(|(connector, _)| connector).collect();
        connectors.into_iter().collect()
    }

    /// Every registration so far, in order.
    #[must_use]
    pub fn tries(&self) -> Vec<Try> {
        lock(&self.shared.tries).clone()
    }

    /// Refuses these connectors from now on with `Unauthorized: Invalid tunnel secret`, and drops their connections.
    pub fn refuse(&self, whose: Whose) {
        self.decide(whose, Some(Verdict::Refused(crate::script::REFUSAL.to_owned())));
    }

    /// Answers these connectors with an internal error from now on, and drops their connections.
    pub fn fail(&self, whose: Whose) {
        self.decide(whose, Some(Verdict::Failed(crate::script::ERROR.to_owned())));
    }

    /// Accepts these connectors' dials from now on but never answers a registration, and drops their connections.
    pub fn leave_unanswered(&self, whose: Whose) {
        self.decide(whose, Some(Verdict::Unanswered));
    }

    /// Registers these connectors again at their next try.
    pub fn accept(&self, whose: Whose) {
        self.decide(whose, None);
    }

    fn decide(&self, whose: Whose, verdict: Option<Verdict>) {
        let dropped = verdict.is_some();
        let mut rules = lock(&self.shared.rules);
        rules.verdicts.retain(|(of, _)| *of != whose && whose != Whose::All);
        rules.verdicts.extend(verdict.map(|verdict| (whose.clone(), verdict)));
        drop(rules);
        if dropped {
            self.close(Loss::Dropped, |who| whose.includes(who));
        }
    }

    /// Closes these connectors' connections; they may come back at once.
    pub fn drop_connections(&self, whose: &Whose) {
        self.close(Loss::Dropped, |who| whose.includes(who));
    }

    /// Makes this protocol find nothing listening, as where a firewall drops UDP.
    pub fn block(&self, protocol: Protocol) {
        lock(&self.shared.rules).blocked.insert(protocol);
        self.close(Loss::Away, |who| who.protocol == protocol);
    }

    /// Serves this protocol again.
    pub fn unblock(&self, protocol: Protocol) {
        lock(&self.shared.rules).blocked.remove(&protocol);
    }

    /// Makes the edge go away until [`Edge::come_back`]: its connections break and nothing listens.
    pub fn leave(&self) {
        self.go(Loss::Away);
    }

    /// Makes the edge go away until [`Edge::come_back`]: packets get no answer.
    pub fn swallow(&self) {
        self.go(Loss::Swallowed);
    }

    fn go(&self, how: Loss) {
        lock(&self.shared.rules).away = Some(how);
        self.close(how, |_| true);
    }

    /// Brings the edge back.
    pub fn come_back(&self) {
        lock(&self.shared.rules).away = None;
    }

    /// Sets whether drained connections stay open, so that a stop takes the connector's whole grace period.
    pub fn keep_drained(&self, keeps: bool) {
        lock(&self.shared.rules).keeps_drained = keeps;
    }

    fn close(&self, how: Loss, whose: impl Fn(&Registration) -> bool) {
        // Remove the link at once, so that no request goes to a closed connection.
        let mut links = lock(&self.shared.links);
        let chosen: Vec<_> = links.iter().filter(|(_, link)| whose(&link.who)).map(|(number, _)| *number).collect();
        for number in chosen {
            if let Some(link) = links.remove(&number) {
                link.close.send_replace(Some(how));
            }
        }
    }
}

impl Drop for Edge {
    fn drop(&mut self) {
        // This task owns the connections' tasks.
        self.accepting.abort();
    }
}

impl Shared {
    /// Each usable connection: its connector's id and its request queue.
    fn usable(&self, tunnel: &str) -> Vec<(String, mpsc::Sender<Request>)> {
        let now = Instant::now();
        let links = lock(&self.links);
        let usable =
            links.values().filter(|link| link.who.tunnel == tunnel && link.usable_from <= now && !link.drained);
        usable.map(|link| (link.who.connector.clone(), link.queue.clone())).collect()
    }

    fn verdict(&self, who: &Registration) -> Verdict {
        let rules = lock(&self.rules);
        let found = rules.verdicts.iter().find(|(whose, _)| whose.includes(who));
        match rules.away {
            Some(Loss::Swallowed) => Verdict::Swallowed,
            Some(_) => Verdict::Away,
            None if rules.blocked.contains(&who.protocol) => Verdict::Away,
            None => found.map_or(Verdict::Registered, |(_, verdict)| verdict.clone()),
        }
    }
}

async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    let mut connections = JoinSet::new();
    let mut count = 0;
    loop {
        tokio::select! {
            // Ignore a failed accept: the connector dials again.
            accepted = listener.accept() => if let Ok((stream, _)) = accepted {
                count += 1;
                connections.spawn(serve(stream, count, shared.clone()));
            },
            Some(_) = connections.join_next() => {}
        }
    }
}

/// Serves one connection, from registration to end.
async fn serve(stream: TcpStream, number: u64, shared: Arc<Shared>) -> Result<()> {
    stream.set_nodelay(true)?;
    let (read, mut write) = stream.into_split();
    let mut lines = Lines::new(read);
    let Some(FromConnector::Register { register }) = lines.next().await? else { bail!("it did not register") };
    let verdict = shared.verdict(&register);
    let (connector, protocol) = (register.connector.clone(), register.protocol);
    lock(&shared.tries).push(Try { connector, protocol, verdict: verdict.clone(), at: Instant::now() });
    let registered = verdict == Verdict::Registered;
    write.write_all(wire::line(&FromEdge::Verdict { verdict })?.as_bytes()).await?;
    if !registered {
        return Ok(());
    }
    let (queue, mut requests) = mpsc::channel(QUEUE);
    let (close, mut closed) = watch::channel(None);
    let waiting = Waiting::default();
    // Declared last, so dropped first: when a request fails, the edge no longer offers its connection.
    let registered = Registered { shared: &shared, number };
    let usable_from = Instant::now() + shared.takes;
    lock(&shared.links).insert(number, Link { who: register, usable_from, queue, close, drained: false });
    let how = {
        // Send and receive concurrently, so that the edge still hears a connector that is slow to read.
        tokio::select! {
            sent = send(&mut requests, &mut write, &waiting) => return sent,
            received = receive(&mut lines, &waiting, &registered) => return received,
            how = closed.wait_for(Option::is_some) => how.ok().and_then(|how| *how),
        }
    };
    // An edge that vanishes sends nothing.
    if let Some(how @ (Loss::Dropped | Loss::Swallowed)) = how {
        write.write_all(wire::line(&FromEdge::Closing { closing: how })?.as_bytes()).await?;
    }
    Ok(())
}

/// Removes its connection from the usable ones when dropped.
struct Registered<'a> {
    shared: &'a Shared,
    number: u64,
}

impl Drop for Registered<'_> {
    fn drop(&mut self) {
        lock(&self.shared.links).remove(&self.number);
    }
}

impl Registered<'_> {
    /// Sends no more requests; the connection may still be closed.
    fn drain(&self) {
        if let Some(link) = lock(&self.shared.links).get_mut(&self.number) {
            link.drained = true;
        }
    }
}

async fn send(requests: &mut mpsc::Receiver<Request>, write: &mut OwnedWriteHalf, waiting: &Waiting) -> Result<()> {
    while let Some(Request { id, line, answer }) = requests.recv().await {
        lock(waiting).insert(id, answer);
        write.write_all(line.as_bytes()).await?;
    }
    // A call closed the link. The caller of `send` waits for that as well.
    std::future::pending().await
}

async fn receive(lines: &mut Lines<OwnedReadHalf>, waiting: &Waiting, registered: &Registered<'_>) -> Result<()> {
    let mut linger = None;
    loop {
        let keeps = lock(&registered.shared.rules).keeps_drained;
        let done = linger.filter(|_| !keeps && lock(waiting).is_empty());
        let message = tokio::select! {
            message = lines.next() => message?,
            () = sleep(done.unwrap_or_default()), if done.is_some() => return Ok(()),
        };
        match message {
            Some(FromConnector::Answer { id, body }) => {
                let answer = lock(waiting).remove(&id).with_context(|| format!("{id} was not asked"))?;
                // The visitor may have left already.
                drop(answer.send(body));
            }
            Some(FromConnector::Unregister { linger: wanted, .. }) => {
                registered.drain();
                linger = Some(wanted.map_or(LINGER, Duration::from_millis));
            }
            Some(FromConnector::Register { .. }) => bail!("it registered twice"),
            None => return Ok(()),
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing panics while holding a lock.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
