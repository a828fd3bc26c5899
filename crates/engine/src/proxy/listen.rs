//! Listens for a socket proxy's clients and serves their connections.

use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::Path;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use dockflare_host::places::{Place, Places};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::task::JoinSet;
use tokio::time::{sleep, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use tracing::warn;

use super::{Proxy, Refusal, Service};

/// Where the socket proxy listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Listen {
    /// Path of a unix socket that the proxy creates.
    Unix(String),
    /// An address of this host, plain HTTP.
    Tcp(SocketAddr),
}

impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix://{path}"),
            Self::Tcp(address) => write!(f, "tcp://{address}"),
        }
    }
}

/// Most connections at a time; a program needs six at most. On a unix socket, which only the program reaches, further
/// connections wait.
pub const MOST_CONNECTIONS: usize = 64;
/// Most connections of one peer on a network: a program's, those of a `check` beside it, and some that are closing. The
/// proxy closes further ones at once, so that slow clients delay nobody else.
pub const MOST_OF_ONE_PEER: usize = 16;
/// Pause after the system could not accept a connection, usually for lack of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Serves until `shutdown`, or until Docker's socket is dead for good. Returns the connections that are still open, and
/// the path of a dead socket.
pub async fn accept_all<P: Proxy + 'static>(
    listener: &Listener,
    service: &Arc<Service<P>>,
    orphaned: impl Future<Output = String>,
    shutdown: &CancellationToken,
) -> (JoinSet<()>, Option<String>) {
    let mut orphaned = pin!(orphaned);
    let mut connections = JoinSet::new();
    let places = Places::new(MOST_CONNECTIONS, MOST_OF_ONE_PEER);
    loop {
        tokio::select! {
            () = shutdown.cancelled() => return (connections, None),
            path = &mut orphaned => return (connections, Some(path)),
            () = sleep_until(service.refusals.next_turn()) => service.refusals.turn(),
            Some(_) = connections.join_next() => {}
            accepted = listener.accept(), if listener.may_accept(connections.len()) => match accepted {
                Ok(Connection::Unix(stream)) => serve(&mut connections, service, stream, None),
                Ok(Connection::Tcp(stream, peer)) => match places.take(peer) {
                    Some(place) => serve(&mut connections, service, stream, Some(place)),
                    None => service.refusals.tell(Refusal::http("connections")),
                },
                Err(error) => {
                    warn!("cannot accept a connection: {error}; trying again");
                    sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }
}

/// Removes the socket. The next proxy would replace it, but without it clients see at once that nothing listens.
#[expect(clippy::disallowed_methods, reason = "the last thing that it does")]
pub fn leave(path: &str) {
    let _ = std::fs::remove_file(path);
}

fn serve<P, S>(connections: &mut JoinSet<()>, service: &Arc<Service<P>>, stream: S, place: Option<Place>)
where
    P: Proxy + 'static,
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Send + 'static,
{
    let service = service.clone();
    connections.spawn(async move {
        // A client that disconnects is nothing to report.
        drop(service.serve(stream).await);
        drop(place);
    });
}

/// A socket that listens.
pub enum Listener {
    /// A unix socket.
    Unix(UnixListener),
    /// A port.
    Tcp(TcpListener),
}

enum Connection {
    Unix(UnixStream),
    /// With the peer's address.
    Tcp(TcpStream, IpAddr),
}

impl Listener {
    /// Starts listening. `setting` names the setting that holds the address.
    ///
    /// # Errors
    /// A sentence that names the setting.
    #[expect(clippy::disallowed_methods, reason = "at the start, when nothing runs yet, in the volume of the socket")]
    pub async fn bind(setting: &str, listen: &Listen) -> Result<Self, String> {
        let said = |problem: &dyn std::fmt::Display, remedy: &str| {
            format!("{setting}={listen}: cannot be listened on ({problem}); {remedy}")
        };
        match listen {
            Listen::Unix(path) => {
                const REMEDY: &str = "its folder must exist and belong to the user that the socket proxy runs as";
                replace_stale(Path::new(path)).await.map_err(|error| said(&error, REMEDY))?;
                let listener = UnixListener::bind(path).map_err(|error| said(&error, REMEDY))?;
                // The folder keeps others out: it is shared with the agent alone, whichever user that runs as.
                std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o666))
                    .map_err(|error| said(&error, REMEDY))?;
                Ok(Self::Unix(listener))
            }
            Listen::Tcp(address) => {
                const REMEDY: &str = "use an address of this container and a free port";
                TcpListener::bind(address).await.map(Self::Tcp).map_err(|error| said(&error, REMEDY))
            }
        }
    }

    /// Whether to accept another connection while `served` are open.
    fn may_accept(&self, served: usize) -> bool {
        match self {
            Self::Unix(_) => served < MOST_CONNECTIONS,
            // `Places` limits each peer, and all peers together.
            Self::Tcp(_) => true,
        }
    }

    /// Cancel-safe.
    async fn accept(&self) -> io::Result<Connection> {
        match self {
            Self::Unix(listener) => listener.accept().await.map(|(stream, _)| Connection::Unix(stream)),
            Self::Tcp(listener) => listener.accept().await.map(|(stream, peer)| Connection::Tcp(stream, peer.ip())),
        }
    }
}

/// Removes the socket of a proxy that was killed, but never a socket with a listener, or anything else.
#[expect(clippy::disallowed_methods, reason = "at the start, when nothing runs yet, in the volume of the socket")]
async fn replace_stale(path: &Path) -> io::Result<()> {
    match std::fs::symlink_metadata(path) {
        Ok(found) if !found.file_type().is_socket() => {
            Err(io::Error::new(io::ErrorKind::AlreadyExists, "there is something that is no socket"))
        }
        Ok(_) if UnixStream::connect(path).await.is_ok() => {
            Err(io::Error::new(io::ErrorKind::AddrInUse, "another socket proxy listens there"))
        }
        Ok(_) => std::fs::remove_file(path),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

/// Checks that the Docker socket can be opened. `setting` names the setting that holds its path.
///
/// # Errors
/// The problem and its remedy.
#[expect(clippy::disallowed_methods, reason = "at the start, and its folder has just been looked into")]
pub async fn openable(path: &str, setting: &str) -> Result<(), String> {
    let Err(error) = UnixStream::connect(path).await else { return Ok(()) };
    let user = nix::unistd::getuid();
    Err(match (error.kind(), std::fs::metadata(path)) {
        (io::ErrorKind::PermissionDenied, Ok(socket)) => {
            let (owner, group, mode) = (socket.uid(), socket.gid(), socket.mode() & 0o7777);
            format!(
                "it belongs to user {owner} and group {group} with mode {mode:04o}, and the socket proxy runs as user {user}: run it with user: \"{owner}\", or with user: \"{user}:{group}\" where the group may write; trying again at each call"
            )
        }
        (io::ErrorKind::NotFound, _) => {
            format!(
                "there is no such file; mount the host's: -v /var/run/docker.sock:/var/run/docker.sock:ro, or set {setting}; trying again at each call"
            )
        }
        _ => format!("{error}; is Docker running? trying again at each call"),
    })
}

/// Runs `socket-proxy --check`: asks the running proxy whether it reaches Docker.
///
/// # Errors
/// One line with the reason.
pub async fn check(listen: &Listen) -> Result<String, String> {
    const LIMIT: Duration = Duration::from_secs(4);
    let ask = async {
        let mut answer = String::new();
        match listen {
            Listen::Unix(path) => exchange(UnixStream::connect(path).await?, &mut answer).await?,
            Listen::Tcp(address) => exchange(TcpStream::connect(address).await?, &mut answer).await?,
        }
        Ok::<_, io::Error>(answer)
    };
    match timeout(LIMIT, ask).await {
        Ok(Ok(answer)) if answer.starts_with("HTTP/1.1 200 ") => Ok("the socket proxy reaches Docker".to_owned()),
        Ok(Ok(answer)) => {
            let body = answer.split_once("\r\n\r\n").map_or("", |(_, body)| body);
            Err(format!("the socket proxy does not reach Docker: {body}"))
        }
        Ok(Err(error)) => Err(format!("the socket proxy does not answer on {listen}: {error}")),
        Err(_) => Err(format!("the socket proxy did not answer on {listen} within {}s", LIMIT.as_secs())),
    }
}

async fn exchange(
    mut stream: impl tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
    answer: &mut String,
) -> io::Result<()> {
    stream.write_all(b"GET /_ping HTTP/1.1\r\nHost: docker\r\n\r\n").await?;
    stream.read_to_string(answer).await.map(drop)
}
