//! A host that was removed must not linger: forgetting the tunnel when both the master and the edge have let go of
//! it. Either sign alone may be a mistake, a restored backup or an outage, and changes nothing.

use std::sync::Arc;

use tokio_util::sync::CancellationToken;
use tracing::warn;

use super::Poller;
use crate::cause::{Cause, Status};
use crate::channels::View;
use crate::registration::Session;
use crate::state::TunnelState;

impl Poller {
    /// A session other than `stale`, however long that takes; `None` at a shutdown. A master that has removed this
    /// agent gives none, so meanwhile the signs are watched.
    pub(super) async fn registered(
        &mut self,
        stale: Option<&Session>,
        shutdown: &CancellationToken,
    ) -> Option<Arc<Session>> {
        let registrar = self.registrar.clone();
        let mut removed = registrar.watch_removed();
        // Not dropped half-way: a registration whose reply is not read is one more agent at the master.
        let mut renewal = std::pin::pin!(async {
            match stale {
                None => registrar.session().await,
                stale => registrar.renew(stale).await,
            }
        });
        loop {
            tokio::select! {
                biased;
                () = shutdown.cancelled() => return None,
                session = &mut renewal => return Some(session),
                Ok(()) = self.links.view.changed() => {}
                Ok(()) = removed.changed() => {}
            }
            if *removed.borrow_and_update() {
                self.unclaim(shutdown).await;
            }
            self.forget_if_removed(shutdown).await;
        }
    }

    /// Notes the one sign, on disk: a crash may come before the other.
    pub(super) async fn unclaim(&mut self, shutdown: &CancellationToken) {
        let state = &self.disk.state;
        if state.token.is_none() || state.unclaimed || self.disk.tombstone.is_some() {
            return;
        }
        let (state, refusal) =
            (TunnelState { unclaimed: true, ..state.clone() }, self.links.wanted.borrow().refusal.clone());
        self.commit(state, refusal, shutdown).await;
    }

    /// Forgets the tunnel when the other sign is there as well; the supervisor then removes its container.
    pub(super) async fn forget_if_removed(&mut self, shutdown: &CancellationToken) {
        let state = &self.disk.state;
        let is_refused = |view: &View| {
            let refused = view.status == Status::Error && view.reason == Some(Cause::TokenRefused.reason());
            refused && view.tunnel_id == state.id
        };
        if !state.unclaimed || self.disk.tombstone.is_some() || !is_refused(&self.links.view.borrow()) {
            return;
        }
        warn!(
            name = state.name.as_deref().unwrap_or("-"),
            "Cloudflare refuses the tunnel and the master does not know this agent any more, so the host was removed: the connector is stopped and removed and the tunnel forgotten; enrol the agent on the master's Agents page to use it again"
        );
        self.commit(state.forgotten(), None, shutdown).await;
    }
}
