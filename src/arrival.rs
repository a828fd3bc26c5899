//! What comes before the first request to the master: being where the master may be known, and having a name.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tracing::debug;

use crate::docker::Docker;
use crate::introduction::{self, Introduction};
use crate::membership::Membership;

/// How long the master waits for a Docker that is away: its socket proxy is started at the same moment.
const PATIENCE: Duration = Duration::from_secs(10);
/// Between two tries in that time.
const SOON: Duration = Duration::from_millis(250);
/// Between two looks at what may be missing later: a network that somebody has taken away, the name of the host.
const AGAIN: Duration = Duration::from_secs(30);

/// Joins the networks, tells how the agent introduces itself, and sees to both until `stop`. Gives back what has then to
/// be left.
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
                // The master is not kept waiting; what is found out later is told with the next registration.
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
