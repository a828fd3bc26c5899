//! What comes before the first request to the master: finding out how the agent introduces itself.

use std::convert::Infallible;
use std::future::pending;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::sleep;

use crate::docker::Docker;
use crate::introduction::{self, Introduction};

/// How often Docker, when it is away, is asked again for the name of its host.
const AGAIN: Duration = Duration::from_secs(15);

/// Tells how the agent introduces itself: by the operator's word where there is one.
pub(crate) async fn introduce(
    docker: Arc<Docker>,
    display_name: Option<String>,
    told: watch::Sender<Option<Introduction>>,
) -> Infallible {
    let mut known = display_name.map(Introduction::Named);
    while known.is_none() {
        known = introduction::of_host(&docker).await;
        if known.is_none() {
            // The master is not kept waiting; what is found out later is told with the next registration.
            told.send_replace(Some(Introduction::ById));
            sleep(AGAIN).await;
        }
    }
    told.send_replace(known);
    // Whoever asks later finds it still.
    pending().await
}
