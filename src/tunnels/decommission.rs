//! Decommissions this agent in two phases: the tombstone that makes each phase survive a crash, and the
//! acknowledgements.

use jiff::Timestamp;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::commands::Decommission;
use super::{LONGEST_WAIT, Poller};
use crate::channels::Departure;
use crate::master::printable;
use crate::master::wire::{Ack, AckPhase};
use crate::state::{AgentId, Phase, TOMBSTONE, Tombstone, TunnelId};

/// An acknowledgement that the master has not accepted yet.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct PendingAck {
    pub(super) operation_id: String,
    pub(super) command_id: String,
    pub(super) phase: Phase,
    /// Why the command was refused; `None` when it is carried out.
    pub(super) conflict: Option<&'static str>,
}

impl PendingAck {
    fn new(command: &Decommission, phase: Phase, conflict: Option<&'static str>) -> Self {
        let (operation_id, command_id) = (command.operation_id.clone(), command.command_id.clone());
        Self { operation_id, command_id, phase, conflict }
    }

    /// Builds the message. `None` until the supervisor reports the state of the tunnel container.
    pub(super) fn message(
        &self,
        session: Option<&str>,
        departure: Option<&Departure>,
        cloudflared: &str,
    ) -> Option<Ack> {
        let departure = match (departure, self.conflict) {
            (Some(departure), _) => departure.clone(),
            (None, Some(_)) => Departure::default(),
            (None, None) => return None,
        };
        // The master accepts `supported` only with an image that it can read.
        let agent_image = departure.own.map(|own| own.image).filter(|image| is_reference(image));
        let mut ack = Ack {
            operation_id: self.operation_id.clone(),
            command_id: self.command_id.clone(),
            phase: AckPhase::from(self.phase),
            agent_session_id: session.map(str::to_owned),
            tombstone_persisted: None,
            tunnel_container: None,
            self_stop_capability: if agent_image.is_some() { "supported" } else { "manual" },
            agent_image: None,
            cloudflared_image: None,
            error_code: self.conflict,
        };
        if self.phase == Phase::Prepared {
            ack.tombstone_persisted = Some(self.conflict.is_none());
            ack.tunnel_container = Some(if self.conflict.is_some() { "failed" } else { departure.container });
            ack.error_code = self.conflict.or((departure.container == "failed").then_some("tunnel_stop_failed"));
            ack.agent_image = agent_image;
            ack.cloudflared_image = Some(cloudflared.to_owned()).filter(|image| is_reference(image));
        }
        Some(ack)
    }
}

/// `^[A-Za-z0-9][A-Za-z0-9._:/@-]{0,254}$`, the form that v2 masters accept.
fn is_reference(image: &str) -> bool {
    image.len() <= 255
        && image.starts_with(|c: char| c.is_ascii_alphanumeric())
        && image.chars().all(|c| c.is_ascii_alphanumeric() || "._:/@-".contains(c))
}

/// Decides what a command does to the tombstone. Returns the one to write, if any, and the answer.
pub(super) fn decide(
    tombstone: Option<&Tombstone>,
    agent: &AgentId,
    tunnel: Option<&TunnelId>,
    command: &Decommission,
    phase: Phase,
) -> (Option<Tombstone>, PendingAck) {
    let refuse = |code| (None, PendingAck::new(command, phase, Some(code)));
    if command.requested_self_action != "stop" {
        return refuse("unsupported_self_action");
    }
    let expected = command.expected_tunnel_id.as_deref().filter(|id| !id.is_empty());
    if let (None, Some(expected), Some(tunnel)) = (tombstone, expected, tunnel)
        && tunnel.0 != expected
    {
        return refuse("tunnel_mismatch");
    }
    let now = Timestamp::now().to_string();
    let written = match tombstone {
        Some(known) if known.operation_id != command.operation_id || known.agent_id != *agent => {
            return refuse("tombstone_conflict");
        }
        Some(known) if known.phase == Phase::Finalized || phase == Phase::Prepared => None,
        Some(known) => Some(known.clone()),
        None => Some(Tombstone {
            schema_version: 1,
            operation_id: command.operation_id.clone(),
            agent_id: agent.clone(),
            phase,
            requested_self_action: command.requested_self_action.clone(),
            prepared_at: Some(now.clone()),
            finalized_at: None,
            acknowledged: false,
        }),
    };
    let written = written.map(|mut tombstone| {
        tombstone.phase = phase;
        tombstone.acknowledged = false;
        tombstone.finalized_at = (phase == Phase::Finalized).then_some(now);
        tombstone
    });
    (written, PendingAck::new(command, phase, None))
}

impl Poller {
    /// Sends the pending acknowledgement once its content is known. Returns whether the decommission is complete.
    pub(super) async fn acknowledge(&mut self, shutdown: &CancellationToken) -> bool {
        let Some(ack) = self.ack.clone() else { return false };
        // After a crash in the last phase there is no session; the acknowledgement needs one first.
        let session = tokio::select! {
            () = shutdown.cancelled() => return false,
            session = self.registrar.session() => session,
        };
        let departure = self.links.view.borrow_and_update().departure.clone();
        let Some(message) = ack.message(session.protocol.session(), departure.as_ref(), &self.cloudflared_image) else {
            // Nothing to send yet; the supervisor's next report wakes this task.
            self.timers.ack = Instant::now() + LONGEST_WAIT;
            return false;
        };
        let result = tokio::select! {
            () = shutdown.cancelled() => return false,
            result = self.master.acknowledge(&session.agent_id, &message) => result,
        };
        let finalized = ack.phase == Phase::Finalized && ack.conflict.is_none();
        match result {
            Ok(()) => {
                self.timers.acking.worked();
                self.ack = None;
                info!(operation = ack.operation_id, phase = ?ack.phase, "the master took the acknowledgement");
                finalized && self.bury().await
            }
            Err(error) => {
                // A refusal that did not come from the master means nothing, so try again. All others are reported by
                // the registration, or below.
                let is_nobodys = matches!(error.status(), Some(401 | 403 | 404)) && !error.is_explained();
                let wait = match is_nobodys {
                    true => self.timers.acking.after(&error, error.remedy()),
                    false => self.timers.acking.while_registering(&error),
                };
                self.timers.ack = Instant::now() + wait;
                match (&error, error.status(), error.code()) {
                    _ if error.is_away() => false,
                    // The first acknowledgement arrived and only its answer was lost: the master has deleted the key
                    // and the agent.
                    (_, Some(401 | 403 | 404), _) if finalized => error.is_explained() && self.bury().await,
                    (_, Some(401 | 403 | 404), _) | (_, Some(409), "registration_required") => {
                        tokio::select! {
                            () = shutdown.cancelled() => {}
                            _ = self.registrar.renew(Some(&session)) => {}
                        }
                        false
                    }
                    _ => {
                        warn!(
                            operation = ack.operation_id,
                            "the master did not take the acknowledgement and {error}; waiting for its next word"
                        );
                        self.ack = None;
                        false
                    }
                }
            }
        }
    }

    /// Stores that the master has decommissioned this agent, so that the next start need not ask.
    pub(super) async fn bury(&mut self) -> bool {
        // A crash may have come between the writes of the tombstone and the state.
        let state = self.disk.state.forgotten();
        if state != self.disk.state
            && let Err(error) = self.disk.store.save_tunnel(&state).await
        {
            warn!("the tunnel's token cannot be removed from the disk: {}", crate::error_chain(&error));
        }
        if let Some(tombstone) = self.disk.tombstone.clone() {
            let tombstone = Tombstone { acknowledged: true, ..tombstone };
            if let Err(error) = self.disk.store.save_tombstone(&tombstone).await {
                warn!(
                    "the end of the decommission cannot be stored: {}; the next start asks the master once more",
                    crate::error_chain(&error)
                );
            }
        }
        true
    }
}

/// The message of an agent that was decommissioned in an earlier run.
pub(crate) fn epitaph(tombstone: &Tombstone, data: &std::path::Path) -> String {
    format!(
        "this agent was decommissioned at {} by operation {}: it does nothing; to enrol it again, delete {} and set a new agent key",
        printable(tombstone.finalized_at.as_deref().unwrap_or("an unknown time")),
        printable(&tombstone.operation_id),
        data.join(TOMBSTONE).display()
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::channels::OwnContainer;

    fn agent() -> AgentId {
        AgentId::try_from("agent-1".to_owned()).unwrap()
    }

    fn command(operation: &str) -> Decommission {
        Decommission {
            operation_id: operation.into(),
            command_id: "c1".into(),
            requested_self_action: "stop".into(),
            expected_tunnel_id: Some("t1".into()),
        }
    }

    fn decide_for(tombstone: Option<&Tombstone>, operation: &str, phase: Phase) -> (Option<Tombstone>, PendingAck) {
        decide(tombstone, &agent(), Some(&TunnelId("t1".into())), &command(operation), phase)
    }

    #[test]
    fn both_phases_are_written_once_and_acknowledged_each_time() {
        let (prepared, ack) = decide_for(None, "o1", Phase::Prepared);
        let prepared = prepared.unwrap();
        assert_eq!((prepared.phase, ack.conflict), (Phase::Prepared, None));
        assert_eq!(decide_for(Some(&prepared), "o1", Phase::Prepared), (None, ack), "repeated until acknowledged");
        let (finalized, ack) = decide_for(Some(&prepared), "o1", Phase::Finalized);
        let finalized = finalized.unwrap();
        assert!(finalized.finalized_at.is_some() && finalized.prepared_at == prepared.prepared_at);
        assert!(!finalized.acknowledged);
        assert_eq!(decide_for(Some(&finalized), "o1", Phase::Finalized), (None, ack));
    }

    #[test]
    fn another_operation_agent_tunnel_or_action_is_a_conflict() {
        let (prepared, _) = decide_for(None, "o1", Phase::Prepared);
        let prepared = prepared.unwrap();
        assert_eq!(decide_for(Some(&prepared), "o2", Phase::Prepared).1.conflict, Some("tombstone_conflict"));
        assert_eq!(decide_for(Some(&prepared), "o2", Phase::Finalized).1.conflict, Some("tombstone_conflict"));
        let other = Tombstone { agent_id: AgentId::try_from("agent-2".to_owned()).unwrap(), ..prepared };
        assert_eq!(decide_for(Some(&other), "o1", Phase::Prepared).1.conflict, Some("tombstone_conflict"));
        let running = TunnelId("t2".into());
        let (written, ack) = decide(None, &agent(), Some(&running), &command("o1"), Phase::Prepared);
        assert_eq!((written, ack.conflict), (None, Some("tunnel_mismatch")));
        let restart = Decommission { requested_self_action: "restart".into(), ..command("o1") };
        assert_eq!(decide(None, &agent(), None, &restart, Phase::Prepared).1.conflict, Some("unsupported_self_action"));
    }

    #[test]
    fn an_acknowledgement_waits_for_the_container_and_names_images_that_a_master_can_read() {
        let (_, ack) = decide_for(None, "o1", Phase::Prepared);
        assert!(ack.message(Some("s"), None, "cf:1").is_none(), "the container is not stopped yet");
        let own = OwnContainer { id: "0123456789ab".into(), image: "registry/dockflare-agent:1".into() };
        let departure = Departure { container: "stopped", own: Some(own.clone()) };
        let message = serde_json::to_value(ack.message(Some("s"), Some(&departure), "cf:1").unwrap()).unwrap();
        let expected = serde_json::json!({
            "operation_id": "o1", "command_id": "c1", "phase": "prepared", "agent_session_id": "s",
            "tombstone_persisted": true, "tunnel_container": "stopped", "self_stop_capability": "supported",
            "agent_image": "registry/dockflare-agent:1", "cloudflared_image": "cf:1",
        });
        assert_eq!(message, expected);
        let odd = Departure { container: "stopped", own: Some(OwnContainer { image: "<none>".into(), ..own }) };
        let message = ack.message(None, Some(&odd), "cf:1").unwrap();
        assert_eq!((message.self_stop_capability, message.agent_image), ("manual", None));
    }

    #[test]
    fn a_refusal_is_acknowledged_as_failed() {
        let (prepared, _) = decide_for(None, "o1", Phase::Prepared);
        let (_, ack) = decide_for(prepared.as_ref(), "o2", Phase::Prepared);
        let message = ack.message(Some("s"), None, "cf:1").unwrap();
        assert_eq!(message.tombstone_persisted, Some(false));
        assert_eq!(message.tunnel_container, Some("failed"));
        assert_eq!(message.error_code, Some("tombstone_conflict"));
    }
}
