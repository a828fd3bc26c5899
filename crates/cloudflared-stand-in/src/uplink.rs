//! The connections to a double of the edge: dials, answers requests, unregisters.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use crate::connector::Connector;
use crate::log::Level;
use crate::wire::{self, FromConnector, FromEdge, Lines, Loss, Registration, Verdict};

/// Limit of one attempt: an edge whose process is stopped may not even refuse.
const DIAL_LIMIT: Duration = Duration::from_secs(2);
/// Bound of the reports of ended connections; more than a connector ever has.
const ENDS: usize = 64;

/// All connections of a connector. Dropping this closes them.
#[derive(Debug)]
pub struct Uplinks {
    tasks: JoinSet<()>,
    draining: watch::Sender<Option<Option<u64>>>,
    ends: mpsc::Receiver<(usize, Loss)>,
    /// Each task clones this sender; keeping one here keeps `ends` open.
    tell: mpsc::Sender<(usize, Loss)>,
}

impl Uplinks {
    /// No connections yet.
    #[must_use]
    pub fn new() -> Self {
        let (tell, ends) = mpsc::channel(ENDS);
        Self { tasks: JoinSet::new(), draining: watch::Sender::new(None), ends, tell }
    }

    /// How many connections there are.
    pub fn len(&mut self) -> usize {
        while self.tasks.try_join_next().is_some() {}
        self.tasks.len()
    }

    /// Whether there are no connections.
    pub fn is_empty(&mut self) -> bool {
        self.len() == 0
    }

    /// Serves requests on this connection until it ends.
    pub fn open(&mut self, connector: &Arc<Connector>, uplink: Uplink, index: usize) {
        let (connector, mut draining, ends) = (connector.clone(), self.draining.subscribe(), self.tell.clone());
        self.tasks.spawn(async move {
            // Treat a connection that broke midway like an edge that vanished.
            let loss = uplink.serve(&connector, &mut draining).await.unwrap_or(Loss::Away);
            _ = ends.send((index, loss)).await;
        });
    }

    /// Waits for the next connection to end. Cancel-safe.
    pub async fn ended(&mut self) -> (usize, Loss) {
        match self.ends.recv().await {
            Some(end) => end,
            // Unreachable: `self` holds a sender.
            None => std::future::pending().await,
        }
    }

    /// Closes all connections, with the requests in flight.
    pub fn cut(&mut self) {
        self.tasks = JoinSet::new();
        while self.ends.try_recv().is_ok() {}
    }

    /// Tells the edge to send no more requests. Requests in flight, and those that the edge sent before it read this,
    /// still get an answer. The edge closes each connection `linger` ms after the last answer, or when it chooses.
    pub fn unregister(&self, linger: Option<u64>) {
        self.draining.send_replace(Some(linger));
    }
}

impl Default for Uplinks {
    fn default() -> Self {
        Self::new()
    }
}

/// A connection that the edge has registered.
#[derive(Debug)]
pub struct Uplink {
    lines: Lines<OwnedReadHalf>,
    write: OwnedWriteHalf,
}

/// Tries to register with the edge at `host:port`.
pub async fn dial(connector: &Connector, edge: &str) -> (Verdict, Option<Uplink>) {
    let attempt = async {
        let stream = TcpStream::connect(edge).await?;
        // Lines are short, and the other side waits for each.
        stream.set_nodelay(true)?;
        let (read, write) = stream.into_split();
        let mut uplink = Uplink { lines: Lines::new(read), write };
        let register = Registration {
            tunnel: connector.tunnel_id.clone(),
            connector: connector.id.to_string(),
            token: connector.token.clone(),
            protocol: connector.protocol(),
        };
        uplink.say(&FromConnector::Register { register }).await?;
        let answer = uplink.lines.next().await?;
        anyhow::Ok((answer, uplink))
    };
    match timeout(DIAL_LIMIT, attempt).await {
        Ok(Ok((Some(FromEdge::Verdict { verdict }), uplink))) => {
            let uplink = (verdict == Verdict::Registered).then_some(uplink);
            (verdict, uplink)
        }
        Ok(_) => (Verdict::Away, None),
        Err(_) => (Verdict::Swallowed, None),
    }
}

impl Uplink {
    async fn say(&mut self, message: &FromConnector) -> Result<()> {
        Ok(self.write.write_all(wire::line(message)?.as_bytes()).await?)
    }

    /// Answers each request, however long that one takes, until the connection ends.
    async fn serve(
        mut self,
        connector: &Arc<Connector>,
        draining: &mut watch::Receiver<Option<Option<u64>>>,
    ) -> Result<Loss> {
        let mut answers = JoinSet::new();
        let mut unregistered = false;
        loop {
            // All three are cancel-safe: a message that has begun to arrive is kept, and so is a ready answer.
            tokio::select! {
                message = self.lines.next() => match message? {
                    Some(FromEdge::Request { id, path }) => drop(answers.spawn(answer(connector.clone(), id, path))),
                    Some(FromEdge::Closing { closing }) => return Ok(closing),
                    Some(FromEdge::Verdict { .. }) => {}
                    None => return Ok(Loss::Away),
                },
                Some(answer) = answers.join_next() => self.say(&answer?).await?,
                linger = told(draining), if !unregistered => {
                    unregistered = true;
                    self.say(&FromConnector::Unregister { unregister: true, linger }).await?;
                }
            }
        }
    }
}

/// Waits until the drain begins.
async fn told(draining: &mut watch::Receiver<Option<Option<u64>>>) -> Option<u64> {
    let said = draining.wait_for(Option::is_some).await.ok().map(|linger| linger.flatten());
    match said {
        Some(linger) => linger,
        // `Uplinks` has been dropped, which also ends this task.
        None => std::future::pending().await,
    }
}

async fn answer(connector: Arc<Connector>, id: u64, path: String) -> FromConnector {
    connector.log.say(Level::Debug, format_args!("GET {path} HTTP/1.1"));
    connector.show(|shown| shown.in_flight += 1);
    sleep(slowness(&path)).await;
    // A hanging process answers nobody.
    connector.no_hang().await;
    let failed = connector.behaviour().origin_refuses;
    connector.show(|shown| {
        shown.in_flight -= 1;
        shown.served += 1;
        shown.failed += u64::from(failed);
    });
    let body = if failed { crate::player::origin_refused(&connector) } else { format!("hello from {}", connector.id) };
    FromConnector::Answer { id, body }
}

/// How long `/slow?ms=N` takes; anything else takes no time.
fn slowness(path: &str) -> Duration {
    let ms = path.strip_prefix("/slow?ms=").and_then(|ms| ms.parse().ok());
    Duration::from_millis(ms.unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_slow_path_takes_its_time() {
        assert_eq!(slowness("/slow?ms=250"), Duration::from_millis(250));
        for path in ["/", "/slow", "/slow?ms=", "/slow?ms=-1", "/fast?ms=9"] {
            assert_eq!(slowness(path), Duration::ZERO, "{path}");
        }
    }
}
