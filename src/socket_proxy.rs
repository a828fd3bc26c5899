//! `dockflare-agent socket-proxy`: sits between the agent and the Docker socket, and lets through the agent's own calls
//! and nothing else.
//!
//! It is a second process of the same program, meant for a container of its own. The proxy holds the Docker socket and
//! has no network; the agent has the network and reaches Docker through the socket that the proxy creates. An attacker
//! who takes over the agent can then stop the tunnel or change its token, and nothing else.
//!
//! ```text
//!  agent ──unix socket──> server ──Head, body──> plan ──Call──> perform ──typed call──> crate::docker ──> Docker
//!                           │                     │                │
//!                           │<─── Refusal, logged by refusals ─────┤
//!                           └<──────────── answer, made anew ──────┘
//! ```
//!
//! - [`dockflare_engine::proxy`] reads one request per connection within narrow limits, and documents how strictly.
//! - `plan` is a pure function from a request to one of a closed set of calls. The agent's own settings define what it
//!   may ask for: image, network, name of the tunnel container. `create` reads the bodies.
//! - `perform` makes the call through [`crate::docker`], as the agent would. The proxy writes what Docker gets from
//!   checked values, under Docker's own version of the API only. Before it changes a container, it checks the owner.
//! - `answer` writes the answer from what the agent's own types hold of Docker's, as far as the agent may see it.
//!
//! - `lease` holds the tunnel after the agent has said goodbye until an agent comes back, and otherwise removes it.
//!
//! Only the lease is on disk or remembered, so the proxy may be killed at any time. The next proxy replaces the socket
//! that it leaves behind. The agent opens a connection for each call and so finds the new socket.

use std::path::PathBuf;
use std::sync::Arc;

use dockflare_engine::orphaned;
pub use dockflare_engine::proxy::listen::check;
use dockflare_engine::proxy::listen::{Listener, accept_all, leave, openable};
use dockflare_engine::proxy::{Answer, Failure, Head, Planned, Proxy, Refusal, Refusals, Service};
use tokio_util::sync::CancellationToken;
use tracing::{error, info};

use crate::RunError;
use crate::config::{DockerHost, Listen, SocketProxyConfig};
use crate::docker::{Docker, OWN_PROXY};

mod answer;
mod create;
#[cfg(feature = "fuzzing")]
pub(crate) mod fuzz;
mod lease;
mod perform;
mod plan;

use lease::{Leases, Presence};
use plan::{Call, Policy};

/// The agent's proxy: its policy, its leases and the Docker that it calls.
#[derive(Debug)]
struct AgentProxy {
    docker: Arc<Docker>,
    policy: Policy,
    leases: Arc<Leases>,
}

impl Proxy for AgentProxy {
    const PROGRAM: &str = "dockflare-agent";
    const SERVER: &str = OWN_PROXY;
    type Call = Call;
    type Held = Option<Presence>;

    fn admits(&self, head: &Head) -> Result<(), Refusal> {
        plan::admits(head).map(drop)
    }

    fn plan(&self, head: &Head, body: &[u8]) -> Result<Planned<Call>, Refusal> {
        plan::plan(&self.policy, head, body)
    }

    async fn hold(&self, call: &Call) -> Option<Presence> {
        match call {
            Call::Events(_) => Some(self.leases.agent().await),
            Call::Goodbye { seconds, agents } => Some(self.leases.goodbye(*seconds, agents.clone()).await),
            _ => None,
        }
    }

    async fn perform(&self, call: Call) -> Result<Answer, Failure> {
        perform::perform(&self.docker, &self.policy, call).await
    }
}

/// Serves until `shutdown`.
///
/// # Errors
/// When it cannot listen, and when Docker's socket is dead for good.
pub async fn run(config: SocketProxyConfig, shutdown: CancellationToken) -> Result<(), RunError> {
    let listener = Listener::bind("SOCKET_PROXY_LISTEN", &config.listen).await.map_err(RunError::Config)?;
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
        && let Err(problem) = openable(path, "SOCKET_PROXY_DOCKER_HOST").await
    {
        error!("the Docker socket {path} cannot be opened: {problem}");
    }
    let orphaned = orphaned(config.docker_host.clone());
    let docker = Arc::new(Docker::new(config.docker_host));
    let leases = Leases::open(&config.tunnel.container_name, lease_file(&config.listen));
    let service = Arc::new(Service {
        proxy: AgentProxy { docker: docker.clone(), policy: Policy { tunnel: config.tunnel }, leases: leases.clone() },
        refusals: Refusals::default(),
    });
    let given_up = CancellationToken::new();
    // The connections stay open for as long as the lease is kept: an open one shows that an agent is there.
    let serve = async {
        let (connections, orphan) = accept_all(&listener, &service, orphaned, &shutdown).await;
        let ended = orphan.map_or(Ok(()), |path| Err(RunError::Orphaned(path)));
        if let Listen::Unix(path) = &config.listen {
            leave(path);
        }
        drop(listener);
        if ended.is_err() {
            given_up.cancel();
        }
        (connections, ended)
    };
    // Without Docker, the proxy cannot remove anything. The next one goes on with the lease.
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

/// Path of the lease file: beside the socket, in the folder that belongs to the proxy.
fn lease_file(listen: &Listen) -> Option<PathBuf> {
    match listen {
        Listen::Unix(path) => Some(PathBuf::from(format!("{path}.lease"))),
        Listen::Tcp(_) => None,
    }
}

#[cfg(test)]
mod tests;
