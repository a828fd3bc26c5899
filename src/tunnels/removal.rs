//! Forgets the tunnel of a host that was removed: when the master no longer knows the agent and the edge refuses the
//! token. Either sign alone may be a mistake, a restored backup or an outage, and changes nothing.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::warn;

use super::Poller;
use crate::cause::{Cause, Status};
use crate::channels::View;
use crate::registration::{Protocol, Session};
use crate::state::TunnelState;

/// How often to ask a v1 master whose the tunnel is while the edge refuses its token.
const ASK_EVERY: Duration = Duration::from_secs(600);

impl Poller {
    /// Waits for a session other than `stale`, however long that takes; `None` at a shutdown. A master that has removed
    /// this agent grants none, so the wait also watches for both signs of a removal.
    pub(super) async fn registered(
        &mut self,
        stale: Option<&Session>,
        shutdown: &CancellationToken,
    ) -> Option<Arc<Session>> {
        let registrar = self.registrar.clone();
        let mut removed = registrar.watch_removed();
        // Never dropped halfway: a registration whose reply nobody reads leaves one more agent at the master.
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

    /// Stores the master's sign: a crash may come before the edge's.
    pub(super) async fn unclaim(&mut self, shutdown: &CancellationToken) {
        let state = &self.disk.state;
        if state.token.is_none() || state.unclaimed || self.disk.tombstone.is_some() {
            return;
        }
        let (state, refusal) =
            (TunnelState { unclaimed: true, ..state.clone() }, self.links.wanted.borrow().refusal.clone());
        self.commit(state, refusal, shutdown).await;
    }

    /// Whether the supervisor reports for certain that the edge refuses the tunnel's token.
    fn is_refused(&self) -> bool {
        let view: &View = &self.links.view.borrow();
        let refused = view.status == Status::Error && view.reason == Some(Cause::TokenRefused.reason());
        refused && view.tunnel_id == self.disk.state.id
    }

    /// Asks a v1 master whose the tunnel is when the edge refuses its token. A v1 master says so only at registration,
    /// and may name another token or no tunnel.
    pub(super) async fn ask_whose(&mut self, session: Option<&Session>, shutdown: &CancellationToken) {
        let Some(session) = session.filter(|session| session.protocol == Protocol::V1) else { return };
        let state = &self.disk.state;
        if state.unclaimed || state.token.is_none() || self.disk.tombstone.is_some() || !self.is_refused() {
            return;
        }
        if Instant::now() < self.timers.claim {
            return;
        }
        self.timers.claim = Instant::now() + ASK_EVERY;
        if let Some(session) = self.registered(Some(session), shutdown).await {
            self.recover(&session, shutdown).await;
        }
    }

    /// Warns that the master no longer assigns the tunnel to this host although the edge still accepts it.
    pub(super) fn say_unassigned(&self) {
        let state = &self.disk.state;
        if state.unclaimed && state.token.is_some() && !self.is_refused() {
            warn!(
                name = state.name.as_deref().unwrap_or("-"),
                "the master no longer assigns this tunnel to this host; the connector goes on while Cloudflare accepts it, enrol the agent on the master's Agents page, or delete the tunnel to end it"
            );
        }
    }

    /// Forgets the tunnel once both signs are there. The supervisor then removes its container.
    pub(super) async fn forget_if_removed(&mut self, shutdown: &CancellationToken) {
        let state = &self.disk.state;
        if !state.unclaimed || self.disk.tombstone.is_some() || !self.is_refused() {
            return;
        }
        warn!(
            name = state.name.as_deref().unwrap_or("-"),
            "Cloudflare refuses the tunnel and the master does not know this agent any more, so the host was removed: the connector is stopped and removed and the tunnel forgotten; enrol the agent on the master's Agents page to use it again"
        );
        self.commit(state.forgotten(), None, shutdown).await;
    }
}
