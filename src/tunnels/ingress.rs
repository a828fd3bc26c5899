//! Pushes delivered ingress rules to Cloudflare, through the master. They stay on disk until Cloudflare has them.

use serde_json::Value;
use tokio::time::Instant;
use tracing::{error, info, warn};

use super::{LONGEST_WAIT, Poller};
use crate::cloudflare::{self, Pushed};
use crate::master::MasterError;

impl Poller {
    /// Pushes the pending ingress rules.
    pub(super) async fn push_ingress(&mut self) {
        let Some(Value::Object(rules)) = self.disk.state.pending_ingress.clone() else { return };
        let Some(tunnel) = self.disk.state.id.clone() else {
            warn!("dropping ingress rules: no tunnel is assigned to this agent");
            return self.forget_ingress().await;
        };
        let account = self.disk.state.token.as_ref().and_then(|token| token.claims().ok()).map(|claims| claims.account);
        match cloudflare::push(&self.master, account.as_deref(), &tunnel, &rules).await {
            Ok(Pushed::Accepted(rules)) => {
                info!(rules, "ingress rules pushed");
                self.forget_ingress().await;
            }
            Ok(Pushed::MasterDoesIt) => {
                if !std::mem::replace(&mut self.timers.no_route, true) {
                    info!("this master updates the ingress rules itself; the agent leaves that to it");
                }
                self.forget_ingress().await;
            }
            Err(error)
                if error.is_away() || matches!(error, MasterError::Refused { .. } | MasterError::Unusable { .. }) =>
            {
                let next = "the rules are kept and tried again, those in force stay; check the account of the master's Cloudflare token";
                self.timers.push = Instant::now() + self.timers.pushing.after(&error, next);
            }
            Err(error) => {
                error!(
                    "dropping ingress rules, since the master {error}; the rules in force stay, save a rule on the master's page to send them again"
                );
                self.forget_ingress().await;
            }
        }
    }

    async fn forget_ingress(&mut self) {
        self.timers.pushing.worked();
        let mut state = self.disk.state.clone();
        state.pending_ingress = None;
        match self.disk.store.save_tunnel(&state).await {
            Ok(()) => self.disk.state = state,
            // The rules are pushed once more, which changes nothing.
            Err(error) => {
                let problem = format!("refuses to note that rules were handed on: {}", crate::error_chain(&error));
                self.timers.disk.failed(&problem, "they are handed on once more; make room or mend the permissions");
                self.timers.push = Instant::now() + LONGEST_WAIT;
            }
        }
    }
}
