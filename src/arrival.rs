//! Prepares the first request to the master: joins the networks where the master may be known, and finds a name.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tracing::debug;

use crate::docker::Docker;
use crate::introduction::{self, Introduction};
use crate::membership::Membership;

/// Delay the first request to the master by up to this while Docker is away: the socket proxy may start at the same
/// time.
const PATIENCE: Duration = Duration::from_secs(10);
/// Time between two tries during that delay.
const SOON: Duration = Duration::from_millis(250);
/// Time between two later checks: somebody may disconnect a network, or the host's name may become known.
const AGAIN: Duration = Duration::from_secs(30);

/// Joins the networks, publishes how the agent introduces itself, and keeps both up to date until `stop`. Returns the
/// membership, for the caller to leave the networks.
pub(crate) async fn arrive(
    docker: Arc<Docker>,
    mut membership: Membership,
    display_name: Option<String>,
    told: watch::Sender<Option<Introduction>>,
    stop: CancellationToken,
) -> Membership {
    let work = async {
        let joined = async {
            while let Err(error) = membership.join().await {
                debug!("no network is joined yet: Docker {error}");
                sleep(SOON).await;
            }
        };
        let _ = timeout(PATIENCE, joined).await;
        let mut known = display_name.map(Introduction::Named);
        loop {
            if known.is_none() {
                known = introduction::of_host(&docker).await;
                // Do not keep the master waiting. A name that is found later goes out with the next registration.
                told.send_replace(Some(known.clone().unwrap_or(Introduction::ById)));
            } else if told.borrow().is_none() {
                told.send_replace(known.clone());
            }
            sleep(AGAIN).await;
            if let Err(error) = membership.join().await {
                debug!("whether the agent is on its networks is not known: Docker {error}");
            }
        }
    };
    tokio::select! {
        () = stop.cancelled() => {}
        () = work => {}
    }
    membership
}
