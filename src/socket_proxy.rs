//! `dockflare-agent socket-proxy`: stands between the agent and the Docker socket, and lets through the agent's own
//! calls and nothing more.
//!
//! A second process of the same program, meant for a container of its own: it holds the Docker socket and has no
//! network, the agent has the network and reaches Docker through the socket that this one makes. Whoever takes over
//! the agent can then stop the tunnel or change its token, and that is all.
//!
//! ```text
//!  agent ──unix socket──> server ──Head, body──> plan ──Call──> perform ──typed call──> crate::docker ──> Docker
//!                           │                     │                │
//!                           │<─── Refusal, told by refusals ───────┤
//!                           └<──────────── answer, made anew ──────┘
//! ```
//!
//! - `server` reads one request of a connection within narrow limits; `request` is how strictly.
//! - `plan` is a pure function from a request to one of a closed set of calls. What may be asked for comes from the
//!   agent's own settings: image, network, name of the tunnel container. `create` reads the bodies.
//! - `perform` makes the call through [`crate::docker`], as the agent would: what Docker gets was written there, from
//!   checked values, under no version of the API but Docker's own. Before it changes a container it looks whose it is.
//! - `answer` makes the answer from what the agent's own types hold of Docker's, and of that what it may see.
//!
//! - `lease` holds the tunnel when the agent has said goodbye, until one comes back, and removes it otherwise.
//!
//! Nothing but that lease is on disk or remembered: it may be killed at any time. Its socket is then in the way of the
//! next one, which replaces it; the agent makes a connection for each call and finds that.

use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::task::JoinSet;
use tokio::time::{sleep, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use crate::RunError;
use crate::config::{DockerHost, Listen, SocketProxyConfig};
use crate::docker::Docker;
use crate::orphan::orphaned;

mod answer;
mod create;
#[cfg(feature = "fuzzing")]
pub(crate) mod fuzz;
mod lease;
mod perform;
mod plan;
mod refusals;
mod request;
mod server;

use lease::Leases;
use plan::Policy;
use refusals::Refusals;
use server::Service;

/// The agent needs no more than six at a time; who opens more waits.
const MOST_CONNECTIONS: usize = 64;
/// After the system could not accept a connection, for want of file handles as a rule.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Serves until `shutdown`.
///
/// # Errors
/// When it cannot listen, and when Docker's socket is dead for ever.
pub async fn run(config: SocketProxyConfig, shutdown: CancellationToken) -> Result<(), RunError> {
    let listener = Listener::bind(&config.listen).await.map_err(RunError::Config)?;
    let tunnel = &config.tunnel;
    info!(
        version = env!("CARGO_PKG_VERSION"),
        listen = %config.listen,
        docker = %config.docker_host,
        image = %tunnel.image,
        network = tunnel.network,
        container = tunnel.container_name,
        connects = tunnel.auto_connect,
        "dockflare-agent socket-proxy starts"
    );
    if let DockerHost::Unix(path) = &config.docker_host
        && let Err(problem) = openable(path).await
    {
        error!("the Docker socket {path} cannot be opened: {problem}");
    }
    let orphaned = orphaned(config.docker_host.clone());
    let docker = Arc::new(Docker::new(config.docker_host));
    let leases = Leases::open(&config.tunnel.container_name, lease_file(&config.listen));
    let service = Arc::new(Service {
        docker: docker.clone(),
        policy: Policy { tunnel: config.tunnel },
        refusals: Refusals::new(),
        leases: leases.clone(),
    });
    let given_up = CancellationToken::new();
    // The connections live for as long as the lease is kept: that they are open says that an agent is there.
    let serve = async {
        let (connections, ended) = accept_all(&listener, &service, orphaned, &shutdown).await;
        if let Listen::Unix(path) = &config.listen {
            leave(path);
        }
        drop(listener);
        if ended.is_err() {
            given_up.cancel();
        }
        (connections, ended)
    };
    // Without Docker nothing can be removed: the next one goes on with the lease.
    let keep = async {
        tokio::select! {
            () = leases.keep(&*docker, &shutdown) => {}
            () = given_up.cancelled() => {}
        }
    };
    let ((connections, ended), ()) = tokio::join!(serve, keep);
    drop(connections);
    info!("dockflare-agent socket-proxy stopped");
    ended
}

/// Where the lease is kept: beside the socket, in the folder that is the proxy's own.
fn lease_file(listen: &Listen) -> Option<PathBuf> {
    match listen {
        Listen::Unix(path) => Some(PathBuf::from(format!("{path}.lease"))),
        Listen::Tcp(_) => None,
    }
}

/// Serves until `shutdown`, or until Docker's socket is dead for ever; gives the connections that are open then.
async fn accept_all(
    listener: &Listener,
    service: &Arc<Service>,
    orphaned: impl Future<Output = String>,
    shutdown: &CancellationToken,
) -> (JoinSet<()>, Result<(), RunError>) {
    let mut orphaned = pin!(orphaned);
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            () = shutdown.cancelled() => return (connections, Ok(())),
            path = &mut orphaned => return (connections, Err(RunError::Orphaned(path))),
            () = sleep_until(service.refusals.next_turn()) => service.refusals.turn(),
            Some(_) = connections.join_next() => {}
            accepted = listener.accept(), if connections.len() < MOST_CONNECTIONS => match accepted {
                Ok(Connection::Unix(stream)) => serve(&mut connections, service, stream),
                Ok(Connection::Tcp(stream)) => serve(&mut connections, service, stream),
                Err(error) => {
                    warn!("cannot accept a connection: {error}; trying again");
                    sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }
}

/// The next one would replace the socket; without it a client is told at once that nobody is there.
#[expect(clippy::disallowed_methods, reason = "the last thing that it does")]
fn leave(path: &str) {
    let _ = std::fs::remove_file(path);
}

fn serve<S>(connections: &mut JoinSet<()>, service: &Arc<Service>, stream: S)
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Send + 'static,
{
    let service = service.clone();
    // That the client went is no news.
    connections.spawn(async move { drop(service.serve(stream).await) });
}

enum Listener {
    Unix(UnixListener),
    Tcp(TcpListener),
}

enum Connection {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl Listener {
    #[expect(clippy::disallowed_methods, reason = "at the start, when nothing runs yet, in the volume of the socket")]
    async fn bind(listen: &Listen) -> Result<Self, String> {
        let said = |problem: &dyn std::fmt::Display, remedy: &str| {
            format!("SOCKET_PROXY_LISTEN={listen}: cannot be listened on ({problem}); {remedy}")
        };
        match listen {
            Listen::Unix(path) => {
                const REMEDY: &str = "its folder must exist and belong to the user that the socket proxy runs as";
                replace_stale(Path::new(path)).await.map_err(|error| said(&error, REMEDY))?;
                let listener = UnixListener::bind(path).map_err(|error| said(&error, REMEDY))?;
                // The folder is what keeps others out: it is shared with the agent alone, whoever that runs as.
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

    /// Cancel-safe.
    async fn accept(&self) -> io::Result<Connection> {
        match self {
            Self::Unix(listener) => listener.accept().await.map(|(stream, _)| Connection::Unix(stream)),
            Self::Tcp(listener) => listener.accept().await.map(|(stream, _)| Connection::Tcp(stream)),
        }
    }
}

/// Removes the socket of one that was killed; never a socket on which somebody listens, nor anything else.
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

/// Whether the Docker socket can be opened, and if not, what would help.
#[expect(clippy::disallowed_methods, reason = "at the start, and its folder has just been looked into")]
async fn openable(path: &str) -> Result<(), String> {
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
            "there is no such file; mount the host's: -v /var/run/docker.sock:/var/run/docker.sock:ro, or set SOCKET_PROXY_DOCKER_HOST; trying again at each call".to_owned()
        }
        _ => format!("{error}; is Docker running? trying again at each call"),
    })
}

/// What `socket-proxy --check` does: asks the one that runs here whether it reaches Docker.
///
/// # Errors
/// One line that says why not.
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

#[cfg(test)]
mod tests;
