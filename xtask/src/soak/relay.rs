//! The door between the agent and Docker, always at the same address: open, shut, or open and silent.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;

use anyhow::{Context, Result};
use tokio::io::{AsyncReadExt, copy_bidirectional};
use tokio::net::{TcpListener, TcpSocket, TcpStream, UnixStream};
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};

/// What is behind the door.
#[derive(Clone, Debug)]
pub(crate) enum Behind {
    /// The path of a socket: the Engine's, or that of the agent's own proxy.
    Unix(PathBuf),
    /// The `host:port` of another proxy.
    Tcp(String),
}

/// What a connecting client finds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Door {
    /// What stands behind the door.
    Open,
    /// A port on which nothing listens.
    Refused,
    /// A server that reads everything and never answers.
    Silent,
}

/// The relay. Dropping it cuts all connections.
pub(crate) struct Relay {
    address: SocketAddr,
    door: watch::Sender<Door>,
    server: JoinHandle<()>,
}

impl Relay {
    pub(crate) async fn start(behind: Behind) -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.context("no port for the relay")?;
        let address = listener.local_addr()?;
        let (door, doors) = watch::channel(Door::Open);
        let server = tokio::spawn(async move {
            if let Err(error) = run(listener, address, doors, behind).await {
                eprintln!("soak: the relay has ended: {error:#}");
            }
        });
        Ok(Self { address, door, server })
    }

    /// The agent's `DOCKER_HOST`.
    pub(crate) fn host_url(&self) -> String {
        format!("tcp://{}", self.address)
    }

    /// Cuts all connections. New ones find the door like this.
    pub(crate) fn turn(&self, door: Door) {
        self.door.send_replace(door);
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.server.abort();
    }
}

async fn run(
    listener: TcpListener,
    address: SocketAddr,
    mut doors: watch::Receiver<Door>,
    behind: Behind,
) -> Result<()> {
    let mut listener = listener;
    let mut connections = JoinSet::new();
    loop {
        if *doors.borrow_and_update() == Door::Refused {
            drop(listener);
            // Keep the port bound while nothing listens on it.
            let kept = TcpSocket::new_v4()?;
            kept.set_reuseaddr(true)?;
            kept.bind(address).context("cannot keep the port")?;
            while *doors.borrow_and_update() == Door::Refused {
                doors.changed().await?;
            }
            listener = kept.listen(1024)?;
        }
        // All arms are cancel-safe: a connection not yet accepted stays in the kernel's queue.
        tokio::select! {
            accepted = listener.accept() => {
                if let Ok((client, _)) = accepted {
                    connections.spawn(serve(client, doors.clone(), behind.clone()));
                }
            }
            changed = doors.changed() => changed?,
            Some(_) = connections.join_next() => {}
        }
    }
}

async fn serve(mut client: TcpStream, mut doors: watch::Receiver<Door>, behind: Behind) {
    let door = *doors.borrow_and_update();
    // Both arms may be dropped half-way, because that is how the door cuts a connection.
    tokio::select! {
        _ = doors.changed() => {}
        _ = forward(&mut client, door, behind) => {}
    }
}

async fn forward(client: &mut TcpStream, door: Door, behind: Behind) -> std::io::Result<()> {
    if door == Door::Silent {
        let mut ignored = [0; 4096];
        while client.read(&mut ignored).await? > 0 {}
        return Ok(());
    }
    match behind {
        Behind::Unix(path) => copy_bidirectional(client, &mut UnixStream::connect(path).await?).await?,
        Behind::Tcp(address) => copy_bidirectional(client, &mut TcpStream::connect(address).await?).await?,
    };
    Ok(())
}
