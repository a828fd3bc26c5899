//! Logs one line that says what runs here.

use std::sync::Arc;
use std::time::Duration;

use reqwest::Url;
use tokio::sync::watch;
use tokio::time::timeout;
use tracing::info;

use crate::config::TunnelConfig;
use crate::docker::Docker;
use crate::registration::Session;
use crate::state::AgentId;

/// Longest wait for the master and Docker.
const LIMIT: Duration = Duration::from_secs(2);

/// Logs the line once the master and Docker have answered, or without the answers that are late. `known_id` is the
/// agent's id from disk.
pub(crate) async fn show(
    docker: Arc<Docker>,
    master: Url,
    mut session: watch::Receiver<Option<Arc<Session>>>,
    known_id: Option<AgentId>,
    tunnel: TunnelConfig,
) {
    let registered = async { session.wait_for(Option::is_some).await.ok().and_then(|session| session.clone()) };
    let (session, version) = tokio::join!(timeout(LIMIT, registered), timeout(LIMIT, docker.version()));
    let session = session.ok().flatten();
    let id = session.as_ref().map(|session| session.agent_id.clone()).or(known_id);
    let unknown = || "unknown".to_owned();
    info!(
        version = env!("CARGO_PKG_VERSION"),
        id = id.map_or_else(|| "none yet".to_owned(), |id| id.to_string()),
        %master,
        protocol = session.map_or_else(unknown, |session| session.protocol.version().to_string()),
        docker = version.ok().and_then(Result::ok).map_or_else(unknown, |version| version.engine),
        host = %docker.host(),
        network = tunnel.network,
        image = %tunnel.image,
        "dockflare-agent runs"
    );
}
