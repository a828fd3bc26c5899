//! Owns this agent's identity at its master: the id, the protocol and the session. Registers again when the master no
//! longer knows one of them.
//!
//! The poller and the reporter share one [`Registrar`]. The task whose session is refused calls [`Registrar::renew`].
//! The first caller registers, the other waits for the result. The id is on disk before the session is used, so an
//! agent that is killed in between comes back with the same id.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Mutex, watch};
use tokio::time::sleep;
use tracing::{info, warn};

use crate::concerns::{Concerns, Retry};
use crate::introduction::Introduction;
use crate::master::wire::{Assignment, CAPABILITIES, PROTOCOLS, Register, Registered};
use crate::master::{Master, MasterError};
use crate::pulse::{rest, rest_until};
use crate::retry::{Backoff, Trouble};
use crate::state::{AgentId, Store};

/// What a master agreed to at registration.
#[derive(Debug, Clone, PartialEq)]
pub struct Session {
    /// This agent's id at the master.
    pub agent_id: AgentId,
    /// The protocol that both speak.
    pub protocol: Protocol,
    /// Counts the registrations of this process, from 1.
    pub number: u64,
    /// The tunnel that a v1 master assigns to this agent. It recovers a tunnel whose command was lost.
    pub assignment: Option<Assignment>,
    /// The agent is new to the master, or was removed there: on v1 it has no tunnel there, on v2 it got another id.
    pub is_new: bool,
    /// The master created this agent with this registration, so it has accepted nothing from it before.
    pub is_first: bool,
}

/// The protocol of a session.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Protocol {
    /// Masters 3.0 to 3.1: no session, no sequence numbers.
    V1,
    /// Newer masters: each event carries the session and a sequence number.
    V2 {
        /// The id of the session.
        session: String,
    },
}

impl Protocol {
    /// Returns its number on the wire.
    pub fn version(&self) -> u32 {
        match self {
            Self::V1 => 1,
            Self::V2 { .. } => 2,
        }
    }

    /// Returns the id of the session, which v1 does not have.
    pub fn session(&self) -> Option<&str> {
        match self {
            Self::V1 => None,
            Self::V2 { session } => Some(session),
        }
    }
}

/// Registers this agent, once for all tasks that need a session.
#[derive(Debug)]
pub struct Registrar {
    master: Arc<Master>,
    store: Store,
    /// Set once the agent has joined its networks. Nothing is sent before.
    introduction: watch::Receiver<Option<Introduction>>,
    /// Locked while registering, so that at most one registration is in flight.
    work: Mutex<Work>,
    session: watch::Sender<Option<Arc<Session>>>,
    /// A v2 master says that the agent of this key was removed.
    removed: watch::Sender<bool>,
    /// The master refuses the agent's key or id.
    refused: watch::Sender<bool>,
}

#[derive(Debug)]
struct Work {
    agent_id: Option<AgentId>,
    /// The master has created the agent in a registration that needs a second one.
    is_first: bool,
    retry: Retry,
    unsaved: Trouble,
}

/// v2: the key is bound to another id. If the request had no id, the key is bound to a removed agent.
const KEY_OF_ANOTHER: &str = "agent_key_mismatch";
/// Retry a refused key, which may be rolled, but not often.
const FIRST_WAIT: Duration = Duration::from_secs(1);
const LONGEST_WAIT: Duration = Duration::from_secs(60);

impl Registrar {
    /// Creates the registrar. `agent_id` is the one on disk. Nothing registers before `introduction` is set.
    pub fn new(
        master: Arc<Master>,
        store: Store,
        agent_id: Option<AgentId>,
        introduction: watch::Receiver<Option<Introduction>>,
        concerns: Concerns,
    ) -> Self {
        let work = Work {
            agent_id,
            is_first: false,
            retry: Retry::new("registration", "registration:", FIRST_WAIT, LONGEST_WAIT, concerns),
            unsaved: Trouble::new("the agent id"),
        };
        Self {
            master,
            store,
            introduction,
            work: Mutex::new(work),
            session: watch::channel(None).0,
            removed: watch::channel(false).0,
            refused: watch::channel(false).0,
        }
    }

    /// Returns whether the master says for good that the agent of this key was removed.
    pub(crate) fn watch_removed(&self) -> watch::Receiver<bool> {
        self.removed.subscribe()
    }

    /// Returns whether the master refuses this agent. False again once the master accepts it.
    pub(crate) fn watch_refused(&self) -> watch::Receiver<bool> {
        self.refused.subscribe()
    }

    /// Returns the current session and those that follow.
    pub fn watch(&self) -> watch::Receiver<Option<Arc<Session>>> {
        self.session.subscribe()
    }

    /// Returns the current session. Registers first if there is none, and never gives up.
    pub async fn session(&self) -> Arc<Session> {
        match self.current() {
            Some(session) => session,
            None => self.renew(None).await,
        }
    }

    /// Returns a session newer than `stale`. Registers unless another task already has, and never gives up.
    pub async fn renew(&self, stale: Option<&Session>) -> Arc<Session> {
        // The task that registers holds the lock for as long as the master is away.
        let mut work = rest_until(Box::pin(self.work.lock())).await;
        let known = stale.map_or(0, |session| session.number);
        if let Some(session) = self.current().filter(|session| session.number > known) {
            return session;
        }
        let number = self.current().map_or(0, |session| session.number) + 1;
        loop {
            match self.register(&mut work, number).await {
                Ok(session) => {
                    work.retry.worked();
                    self.removed.send_replace(false);
                    self.refused.send_replace(false);
                    let session = Arc::new(session);
                    self.session.send_replace(Some(session.clone()));
                    return session;
                }
                Err(error) => {
                    // Refused without an id as well: see `ask`.
                    if error.code() == KEY_OF_ANOTHER {
                        self.removed.send_if_modified(|removed| !std::mem::replace(removed, true));
                    }
                    if !error.is_away() {
                        self.refused.send_replace(true);
                    }
                    let wait = work.retry.after(&error, self.remedy(&error));
                    rest(wait).await;
                }
            }
        }
    }

    fn current(&self) -> Option<Arc<Session>> {
        self.session.borrow().clone()
    }

    /// Waits for how the agent introduces itself. By id if the sender is gone, which happens only at the end.
    async fn introduction(&self) -> Introduction {
        let mut told = self.introduction.clone();
        let told = rest_until(Box::pin(told.wait_for(Option::is_some))).await;
        told.ok().and_then(|told| told.clone()).unwrap_or(Introduction::ById)
    }

    /// Registers once. On v2, a second request without the id follows if the master refused the id. A new agent whose
    /// name needs the id sends a second request with both.
    async fn register(&self, work: &mut Work, number: u64) -> Result<Session, MasterError> {
        let introduction = self.introduction().await;
        let (display_name, is_whole) = introduction.name(work.agent_id.as_ref());
        let (mut reply, is_first) = self.ask(work.agent_id.as_ref(), &display_name).await?;
        let mut another = work.agent_id.as_ref().is_some_and(|known| *known != reply.agent_id);
        self.keep(work, &reply.agent_id).await;
        work.is_first |= is_first;
        let mut name = display_name;
        if !is_whole {
            name = introduction.name(work.agent_id.as_ref()).0;
            (reply, _) = self.ask(work.agent_id.as_ref(), &name).await?;
            another |= work.agent_id.as_ref().is_some_and(|known| *known != reply.agent_id);
            self.keep(work, &reply.agent_id).await;
        }
        let protocol = match (reply.protocol_version, reply.agent_session_id) {
            (Some(2), Some(session)) if !session.is_empty() => Protocol::V2 { session },
            (None | Some(1), _) => Protocol::V1,
            (Some(2), _) => {
                let problem = "agreed to protocol 2 without naming a session".to_owned();
                return Err(MasterError::Unusable { problem });
            }
            (Some(other), _) => {
                let problem = format!("agreed to protocol {other}, which was not offered");
                return Err(MasterError::Unusable { problem });
            }
        };
        info!(id = %reply.agent_id, protocol = protocol.version(), name, "registered at the master");
        let is_first = std::mem::take(&mut work.is_first);
        let is_unassigned = reply.agent.as_ref().is_some_and(|agent| !agent.has_tunnel());
        let assignment = reply.agent.and_then(|agent| agent.assignment());
        let is_new = if protocol == Protocol::V1 { is_unassigned } else { another };
        Ok(Session { agent_id: reply.agent_id, protocol, number, assignment, is_new, is_first })
    }

    /// Sends one request, and a second one without the id if the id belongs to another key. Also returns whether the
    /// master has just created the agent.
    async fn ask(&self, id: Option<&AgentId>, display_name: &str) -> Result<(Registered, bool), MasterError> {
        let mut request = Register {
            display_name,
            version: env!("CARGO_PKG_VERSION"),
            agent_version: env!("CARGO_PKG_VERSION"),
            supported_protocol_versions: PROTOCOLS,
            capabilities: CAPABILITIES,
            agent_id: id,
        };
        match self.master.register(&request).await {
            // The key is bound to another id: a request without one returns the right one.
            Err(error) if error.code() == KEY_OF_ANOTHER && id.is_some() => {
                request.agent_id = None;
                self.master.register(&request).await
            }
            reply => reply,
        }
    }

    /// Writes the id to disk before it is used. A forgotten id would show as a second agent on the master.
    async fn keep(&self, work: &mut Work, id: &AgentId) {
        if work.agent_id.as_ref() == Some(id) {
            return;
        }
        if let Some(old) = &work.agent_id {
            warn!(%old, new = %id, "the master gave this agent another id; using and storing the new one");
        }
        let mut backoff = Backoff::new(FIRST_WAIT, LONGEST_WAIT);
        while let Err(error) = self.store.save_agent_id(id).await {
            let problem = format!("{id} cannot be stored: {}", crate::error_chain(&error));
            work.unsaved.failed(
                &problem,
                "trying again, nothing is reported until then; make room or mend the permissions of the data folder",
            );
            sleep(backoff.next(None)).await;
        }
        work.unsaved.ended();
        work.agent_id = Some(id.clone());
    }

    fn remedy(&self, error: &MasterError) -> &'static str {
        match (error.code(), error.status()) {
            (KEY_OF_ANOTHER, _) => {
                "this key belongs to an agent that was removed: generate a new key on the master's Agents page and set it; the tunnel is not touched"
            }
            ("", Some(403)) => {
                "the stored id belongs to another key: set the key this agent enrolled with, or delete agent_id.txt to enrol as a new agent; the tunnel is not touched"
            }
            ("unsupported_protocol", _) => {
                "agent and master have no protocol in common: update the older of the two; the tunnel is not touched"
            }
            ("payload_too_large", _) => "set a shorter AGENT_DISPLAY_NAME; the tunnel is not touched",
            _ => error.remedy(),
        }
    }
}

/// For tests of tasks that need a session.
#[cfg(test)]
pub(crate) fn introduced() -> watch::Receiver<Option<Introduction>> {
    watch::channel(Some(Introduction::Named("test".to_owned()))).1
}
