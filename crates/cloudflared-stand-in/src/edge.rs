//! A double of Cloudflare's edge, for tests: connectors dial it, and it sends visitors' requests over
//! their connections.
//!
//! As the real one it takes a while to use a new connection, stops using one that unregisters, and
//! does not try a request again that broke. It speaks JSON lines over TCP:
//!
//! | who | says | when |
//! |---|---|---|
//! | connector | `{"register":{"tunnel":…,"connector":…}}` | first |
//! | edge | `{"registered":true}` | then |
//! | edge | `{"id":1,"path":"/x"}` | for each request |
//! | connector | `{"id":1,"body":"…"}` | for each answer, in any order |
//! | connector | `{"unregister":true}` | when its drain begins |

use std::collections::{BTreeSet, HashMap};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use tokio::io::AsyncWriteExt;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, oneshot};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::Instant;

use crate::wire::{self, FromConnector, FromEdge, Lines, Registration};

/// So many requests wait for a connection that does not take them; then the visitors wait.
const QUEUE: usize = 64;

/// The edge. It lives on the runtime it was started on; dropping it closes every connection.
pub struct Edge {
    address: SocketAddr,
    links: Arc<Links>,
    requests: AtomicU64,
    accepting: JoinHandle<()>,
}

/// The connections that may be chosen once their time has come, by a number of their own. A std
/// mutex: no await happens under it.
#[derive(Default)]
struct Links(Mutex<HashMap<u64, Link>>);

struct Link {
    who: Registration,
    usable_from: Instant,
    queue: mpsc::Sender<Request>,
}

struct Request {
    id: u64,
    line: String,
    answer: oneshot::Sender<String>,
}

/// The requests that one connection has taken and not answered. Dropping one breaks it.
type Waiting = Mutex<HashMap<u64, oneshot::Sender<String>>>;

impl Edge {
    /// Listens on `address` (port 0: any) and uses a connection only when it has been registered for
    /// as long as it `takes`.
    ///
    /// # Errors
    /// When the address cannot be used.
    pub async fn start(address: SocketAddr, takes: Duration) -> Result<Self> {
        let listener = TcpListener::bind(address).await.with_context(|| format!("cannot listen on {address}"))?;
        let address = listener.local_addr()?;
        let links = Arc::new(Links::default());
        let accepting = tokio::spawn(accept(listener, links.clone(), takes));
        Ok(Self { address, links, requests: AtomicU64::new(1), accepting })
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// One visitor's request, over a usable connection of the tunnel chosen at random; gives the
    /// answer's body. There is no time limit: wrap it where one is wanted.
    ///
    /// # Errors
    /// When there is no usable connection, or it breaks with the request in flight. There is no second
    /// try: a real visitor sees a 530 or a 502.
    pub async fn ask(&self, tunnel: &str, path: &str) -> Result<String> {
        let id = self.requests.fetch_add(1, Ordering::Relaxed);
        let line = wire::line(&FromEdge::Request { id, path: path.to_owned() })?;
        let chosen = fastrand::choice(self.links.usable(tunnel));
        let (connector, queue) = chosen.with_context(|| format!("no usable connection of tunnel {tunnel}"))?;
        let broke = || format!("a connection of {connector} broke with request {id} in flight");
        let (answer, answered) = oneshot::channel();
        queue.send(Request { id, line, answer }).await.ok().with_context(broke)?;
        answered.await.ok().with_context(broke)
    }

    /// The ids of the tunnel's connectors that have a usable connection, each once, in order.
    #[must_use]
    pub fn connectors(&self, tunnel: &str) -> Vec<String> {
        let connectors: BTreeSet<_> = self.links.usable(tunnel).into_iter().map(|(connector, _)| connector).collect();
        connectors.into_iter().collect()
    }
}

impl Drop for Edge {
    fn drop(&mut self) {
        // The connections' tasks belong to this one.
        self.accepting.abort();
    }
}

impl Links {
    /// Each usable connection: its connector, and where to put a request.
    fn usable(&self, tunnel: &str) -> Vec<(String, mpsc::Sender<Request>)> {
        let now = Instant::now();
        let links = lock(&self.0);
        let usable = links.values().filter(|link| link.who.tunnel == tunnel && link.usable_from <= now);
        usable.map(|link| (link.who.connector.clone(), link.queue.clone())).collect()
    }
}

async fn accept(listener: TcpListener, links: Arc<Links>, takes: Duration) {
    let mut connections = JoinSet::new();
    let mut count = 0;
    loop {
        tokio::select! {
            // One that failed is the connector's loss: it dials again.
            accepted = listener.accept() => if let Ok((stream, _)) = accepted {
                count += 1;
                connections.spawn(serve(stream, count, links.clone(), takes));
            },
            Some(_) = connections.join_next() => {}
        }
    }
}

/// One connection, from its registration to its end.
async fn serve(stream: TcpStream, number: u64, links: Arc<Links>, takes: Duration) -> Result<()> {
    stream.set_nodelay(true)?;
    let (read, mut write) = stream.into_split();
    let mut lines = Lines::new(read);
    let Some(FromConnector::Register { register }) = lines.next().await? else { bail!("it did not register") };
    write.write_all(wire::line(&FromEdge::Registered { registered: true })?.as_bytes()).await?;
    let (queue, mut requests) = mpsc::channel(QUEUE);
    let waiting = Waiting::default();
    // Declared last and so dropped first: whoever sees a request break no longer finds the connection.
    let registered = Registered { links: &links, number };
    lock(&links.0).insert(number, Link { who: register, usable_from: Instant::now() + takes, queue });
    // Apart, so that a connector that is slow to read is still listened to.
    tokio::select! {
        sent = send(&mut requests, write, &waiting) => sent,
        received = receive(&mut lines, &waiting, &registered) => received,
    }
}

/// Takes its connection out of the choice.
struct Registered<'a> {
    links: &'a Links,
    number: u64,
}

impl Drop for Registered<'_> {
    fn drop(&mut self) {
        self.leave();
    }
}

impl Registered<'_> {
    fn leave(&self) {
        lock(&self.links.0).remove(&self.number);
    }
}

async fn send(requests: &mut mpsc::Receiver<Request>, mut write: OwnedWriteHalf, waiting: &Waiting) -> Result<()> {
    while let Some(Request { id, line, answer }) = requests.recv().await {
        lock(waiting).insert(id, answer);
        write.write_all(line.as_bytes()).await?;
    }
    // It has unregistered, and there is nothing more to send: the answers are still to come, and
    // closing this half would tell it that the edge has gone.
    std::future::pending().await
}

async fn receive(lines: &mut Lines<OwnedReadHalf>, waiting: &Waiting, registered: &Registered<'_>) -> Result<()> {
    while let Some(message) = lines.next().await? {
        match message {
            FromConnector::Answer { id, body } => {
                let answer = lock(waiting).remove(&id).with_context(|| format!("{id} was not asked"))?;
                // A visitor may have left before.
                drop(answer.send(body));
            }
            FromConnector::Unregister { .. } => registered.leave(),
            FromConnector::Register { .. } => bail!("it registered twice"),
        }
    }
    Ok(())
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing panics while holding one.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
