//! What happens to the containers when the agent ends.
//!
//! Behind its own socket proxy the agent says goodbye and leaves them to the proxy. The proxy outlives an upgrade, and
//! knows better than the agent whether this is one (`socket_proxy/lease.rs`). Otherwise the agent removes or keeps them
//! at once.

use std::time::Duration;

use tokio::time::timeout;
use tracing::{info, warn};

use super::host::Host;
use super::plan::{self, Owner, Slot, Whose};
use super::{LAST_STEP_LIMIT, Supervisor};
use crate::config::OnExit;
use crate::docker::{DockerError, Parting, RunState};
use crate::retry::Lasts;
use crate::state::{AgentId, Phase};

/// How long the agent stays connected to the socket proxy after its goodbye. `docker compose restart` and `up` stop
/// both within 20 ms of each other; only on `down` is the agent gone before the proxy is stopped.
const STAYS: Duration = Duration::from_secs(1);

impl<H: Host> Supervisor<H> {
    /// Keeps or removes the containers as configured.
    pub(super) async fn leave(&mut self) {
        let wanted = self.inputs.wanted.borrow().clone();
        // The master wants to find the container stopped between the two phases of a decommission.
        let prepared = wanted.decommission == Some(Phase::Prepared);
        // After the second phase the tunnel no longer exists, whatever the configuration says.
        let keep = prepared || self.config.on_exit == OnExit::Keep && wanted.decommission.is_none();
        // A decommission ends everything, even if an agent comes back.
        let is_held = self.config.on_exit == OnExit::Remove && wanted.decommission.is_none();
        if is_held && !self.config.lease.is_zero() && self.say_goodbye(&wanted.owners).await {
            return;
        }
        // In parallel: each may drain for half a minute.
        let whose = Whose::Of(&wanted.owners);
        tokio::join!(self.leave_one(Slot::Main, whose, keep), self.leave_one(Slot::Next, whose, keep));
        if !keep {
            self.leave_strays(whose).await;
        }
    }

    /// Whether the agent leaves the containers to its own socket proxy.
    async fn say_goodbye(&self, agents: &[AgentId]) -> bool {
        let lease = self.config.lease;
        match self.host.goodbye(lease, agents).await {
            Parting::Held(gone) => {
                info!(
                    lease = %Lasts(lease),
                    "leaving the tunnel to the socket proxy, which removes it unless an agent comes back in time"
                );
                // A shorter stay would look as if the agent had been stopped first, and the proxy after it.
                let _ = timeout(STAYS, gone).await;
                true
            }
            Parting::Silent(problem) => {
                warn!(
                    "the tunnel is left as it is, since nothing answers where Docker is reached ({problem}); the next start takes it over, or remove it with docker rm -f {}",
                    self.config.container_name
                );
                true
            }
            Parting::Unknown => false,
        }
    }

    /// Stops and removes all containers of this agent.
    pub(super) async fn clear_once(&self) -> Result<(), DockerError> {
        let ids = self.inputs.wanted.borrow().owners.clone();
        let whose = Whose::Of(&ids);
        let mut left = self.strays(whose).await?;
        for slot in [Slot::Main, Slot::Next] {
            let found = self.host.inspect(&self.name(slot)).await?;
            left.extend(found.filter(|found| plan::owner(found, whose) == Owner::Agent));
        }
        for container in left {
            self.end(&container).await?;
            info!(container = container.name, "removed the container of the tunnel that is no more");
        }
        Ok(())
    }

    async fn leave_one(&self, slot: Slot, whose: Whose<'_>, keep: bool) {
        let name = self.name(slot);
        let looked = timeout(LAST_STEP_LIMIT, self.host.inspect(&name)).await;
        let found = match looked.unwrap_or_else(|_| Err(crate::docker::silent())) {
            Ok(Some(found)) if plan::owner(&found, whose) == Owner::Agent => found,
            Ok(_) => return,
            Err(error) => {
                if slot == Slot::Main {
                    warn!("the tunnel is left as it is, since Docker {error}; the next start puts it right");
                }
                return;
            }
        };
        if keep {
            info!(container = name, "leaving the tunnel container as it is");
            return;
        }
        let removed = async {
            if found.state == RunState::Running {
                self.drain(&found.id).await?;
            }
            self.host.remove(&found.id).await
        };
        match removed.await {
            Ok(()) => info!(container = name, "tunnel stopped and removed"),
            Err(error) => warn!(
                container = name,
                "the tunnel could not be removed, since Docker {error}; the next start puts it right"
            ),
        }
    }
}
