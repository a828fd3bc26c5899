//! The connections to a double of the edge: dial, register, answer, unregister, dial again.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use crate::connector::Connector;
use crate::events;
use crate::log::Level;
use crate::wire::{self, FromConnector, FromEdge, Lines, Registration};

/// Between two attempts.
const PAUSE: Duration = Duration::from_secs(1);
/// For one attempt: an edge that is away may not even refuse.
const DIAL_LIMIT: Duration = Duration::from_secs(5);

/// All of a connector's. Dropping it closes them.
#[derive(Debug)]
pub struct Uplinks {
    tasks: JoinSet<()>,
    draining: watch::Sender<bool>,
}

impl Uplinks {
    /// None yet.
    #[must_use]
    pub fn new() -> Self {
        Self { tasks: JoinSet::new(), draining: watch::Sender::new(false) }
    }

    /// Whether there is none, not even one that is being tried.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.tasks.is_empty()
    }

    /// One more, to the edge at `host:port`; tried until it is there, and again when it breaks.
    pub fn open(&mut self, connector: &Arc<Connector>, edge: &str, index: usize) {
        self.tasks.spawn(keep(connector.clone(), edge.to_owned(), index, self.draining.subscribe()));
    }

    /// Closes all, with whatever is in flight.
    pub fn cut(&mut self) {
        self.tasks = JoinSet::new();
    }

    /// Tells the edge to send no more requests. What is in flight, and what the edge sent before it
    /// knew, is still answered; nothing is dialled any more.
    pub fn unregister(&self) {
        self.draining.send_replace(true);
    }
}

impl Default for Uplinks {
    fn default() -> Self {
        Self::new()
    }
}

async fn keep(connector: Arc<Connector>, edge: String, index: usize, mut draining: watch::Receiver<bool>) {
    loop {
        tokio::select! {
            () = told(&mut draining) => return,
            dialled = dial(&connector, &edge) => match dialled {
                Ok(uplink) => {
                    events::registered(&connector, index);
                    events::configured(&connector);
                    let ended = uplink.serve(&connector, &mut draining).await;
                    connector.log.line(Level::Debug, "stand-in: the edge has gone", &[("reason", &why(&ended))]);
                    // Taken away already where the drain has begun: then it ends as it should.
                    if connector.lose(index) {
                        events::closed(&connector, index);
                    }
                }
                Err(error) => {
                    let fields: [(&str, &dyn std::fmt::Display); 1] = [("error", &format!("{error:#}"))];
                    connector.log.line(Level::Debug, "stand-in: cannot use the edge", &fields);
                    events::dial_failed(&connector, index);
                }
            },
        }
        if !*draining.borrow() {
            events::retrying(&connector, index, events::UNREACHED, PAUSE);
        }
        tokio::select! { () = told(&mut draining) => return, () = sleep(PAUSE) => {} }
    }
}

fn why(ended: &Result<()>) -> String {
    ended.as_ref().map_or_else(|error| format!("{error:#}"), |()| "it closed the connection".into())
}

/// Returns once the drain has begun.
async fn told(draining: &mut watch::Receiver<bool>) {
    // An error would mean that the `Uplinks` are gone, and these tasks with them.
    drop(draining.wait_for(|draining| *draining).await);
}

struct Uplink {
    lines: Lines<OwnedReadHalf>,
    write: OwnedWriteHalf,
}

async fn dial(connector: &Connector, edge: &str) -> Result<Uplink> {
    let attempt = async {
        let stream = TcpStream::connect(edge).await.with_context(|| format!("cannot connect to {edge}"))?;
        // Lines are short and somebody waits for each.
        stream.set_nodelay(true)?;
        let (read, write) = stream.into_split();
        let mut uplink = Uplink { lines: Lines::new(read), write };
        let register = Registration { tunnel: connector.tunnel_id.clone(), connector: connector.id.to_string() };
        uplink.say(&FromConnector::Register { register }).await?;
        let answer = uplink.lines.next().await?;
        ensure!(answer == Some(FromEdge::Registered { registered: true }), "the edge did not register us");
        Ok(uplink)
    };
    timeout(DIAL_LIMIT, attempt).await.with_context(|| format!("no answer from {edge}"))?
}

impl Uplink {
    async fn say(&mut self, message: &FromConnector) -> Result<()> {
        Ok(self.write.write_all(wire::line(message)?.as_bytes()).await?)
    }

    /// Answers, each request in its time, until the connection ends.
    async fn serve(mut self, connector: &Arc<Connector>, draining: &mut watch::Receiver<bool>) -> Result<()> {
        let mut answers = JoinSet::new();
        let mut unregistered = false;
        loop {
            // Cancel-safe, all three: a message that is begun is kept, and so is an answer that is ready.
            tokio::select! {
                message = self.lines.next() => match message? {
                    Some(FromEdge::Request { id, path }) => drop(answers.spawn(answer(connector.clone(), id, path))),
                    Some(FromEdge::Registered { .. }) => {}
                    None => return Ok(()),
                },
                Some(answer) = answers.join_next() => self.say(&answer?).await?,
                () = told(draining), if !unregistered => {
                    unregistered = true;
                    self.say(&FromConnector::Unregister { unregister: true }).await?;
                }
            }
        }
    }
}

async fn answer(connector: Arc<Connector>, id: u64, path: String) -> FromConnector {
    connector.log.say(Level::Debug, format_args!("GET {path} HTTP/1.1"));
    sleep(slowness(&path)).await;
    // A process that hangs answers nobody.
    connector.no_hang().await;
    connector.served();
    FromConnector::Answer { id, body: format!("hello from {}", connector.id) }
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
