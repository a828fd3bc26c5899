//! A relay in front of the Docker Engine, at a fixed address, that a test can redirect, cut, or make lie.

use std::net::{Ipv4Addr, SocketAddr};

use anyhow::Result;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};

/// Where a connection leads.
#[derive(Clone, Debug)]
pub(crate) enum Way {
    /// To the Engine itself.
    Engine,
    /// To a socket proxy at this `host:port`.
    Proxy(String),
    /// To the Engine. But the relay answers with `with` if the request's first line contains every part of `line`
    /// between its `*`.
    Answer { line: &'static str, with: &'static str },
    /// To the Engine, or to a socket proxy at this `host:port`. But containers can be connected to this network only.
    OneNetwork(String, Option<String>),
}

/// How a socket proxy answers a request that it refuses.
pub(crate) const REFUSAL: &str =
    "HTTP/1.0 403 Forbidden\r\nConnection: close\r\nContent-Type: text/html\r\n\r\n<html>403 Forbidden</html>\n";

/// The relay. Dropping it cuts all connections.
pub(crate) struct Relay {
    address: SocketAddr,
    way: watch::Sender<Way>,
    /// How often the open connections were frozen.
    frozen: watch::Sender<u64>,
    /// How many requests the relay answered itself.
    answered: watch::Receiver<u64>,
    server: JoinHandle<()>,
}

impl Relay {
    pub(crate) async fn start(way: Way) -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let address = listener.local_addr()?;
        let (way, ways) = watch::channel(way);
        let (count, answered) = watch::channel(0);
        let (frozen, freezes) = watch::channel(0);
        let server = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((client, _)) = listener.accept().await {
                connections.spawn(serve(client, ways.clone(), freezes.clone(), count.clone()));
            }
        });
        Ok(Self { address, way, frozen, answered, server })
    }

    /// Value for an agent's `DOCKER_HOST`.
    pub(crate) fn host_url(&self) -> String {
        format!("tcp://{}", self.address)
    }

    /// Cuts all connections; new ones go this way.
    pub(crate) fn switch(&self, way: Way) {
        self.way.send_replace(way);
    }

    /// Passes nothing more through the open connections, but keeps them open. New connections work.
    pub(crate) fn freeze(&self) {
        self.frozen.send_modify(|count| *count += 1);
    }

    /// Switches to this way and waits until the relay has answered a request.
    pub(crate) async fn answer_one(&mut self, way: Way) -> Result<()> {
        self.answered.mark_unchanged();
        self.switch(way);
        Ok(tokio::time::timeout(super::SOON, self.answered.changed()).await??)
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.server.abort();
    }
}

async fn serve(
    mut client: TcpStream,
    mut ways: watch::Receiver<Way>,
    mut freezes: watch::Receiver<u64>,
    answered: watch::Sender<u64>,
) {
    let way = ways.borrow_and_update().clone();
    freezes.mark_unchanged();
    // Dropping an arm halfway is the cut that a test asks for.
    tokio::select! {
        _ = ways.changed() => {}
        _ = freezes.changed() => drop(ways.changed().await),
        _ = forward(&mut client, way, &answered) => {}
    }
}

async fn forward(client: &mut TcpStream, way: Way, answered: &watch::Sender<u64>) -> Result<()> {
    match way {
        Way::Proxy(address) => join(client, TcpStream::connect(address).await?, &[]).await,
        Way::Engine => join(client, engine().await?, &[]).await,
        Way::Answer { line, with } => {
            let is_meant = |first: &str| line.split('*').all(|part| first.contains(part));
            answer(client, is_meant, with, answered, None).await
        }
        Way::OneNetwork(name, proxy) => {
            let is_meant = |first: &str| first.contains("/connect") && !first.contains(&name);
            answer(client, is_meant, REFUSAL, answered, proxy).await
        }
    }
}

/// Answers a request if `is_meant` accepts its first line, and forwards any other.
async fn answer(
    client: &mut TcpStream,
    is_meant: impl Fn(&str) -> bool,
    with: &str,
    answered: &watch::Sender<u64>,
    proxy: Option<String>,
) -> Result<()> {
    let mut head = Vec::new();
    while !head.windows(2).any(|two| two == b"\r\n") {
        if client.read_buf(&mut head).await? == 0 {
            return Ok(());
        }
    }
    let first = String::from_utf8_lossy(&head);
    if first.lines().next().is_some_and(is_meant) {
        client.write_all(with.as_bytes()).await?;
        client.shutdown().await?;
        answered.send_modify(|count| *count += 1);
        return Ok(());
    }
    match proxy {
        Some(address) => join(client, TcpStream::connect(address).await?, &head).await,
        None => join(client, engine().await?, &head).await,
    }
}

async fn join(client: &mut TcpStream, mut other: impl AsyncRead + AsyncWrite + Unpin, first: &[u8]) -> Result<()> {
    other.write_all(first).await?;
    copy_bidirectional(client, &mut other).await?;
    Ok(())
}

async fn engine() -> Result<UnixStream> {
    let host = std::env::var("DOCKER_HOST").unwrap_or_default();
    Ok(UnixStream::connect(host.strip_prefix("unix://").unwrap_or("/var/run/docker.sock")).await?)
}
