//! Polls the master for commands, and owns the desired state and the file that stores it.
//!
//! The master forgets a command once it has sent it. The poller therefore turns a whole reply into one new desired
//! state and writes that to disk before anyone acts on it (write, then publish). If the disk refuses, the state waits
//! in memory, the poller fetches nothing more, and log and health say so. Delivered ingress rules stay in the file
//! until Cloudflare has them. The agent forgets a tunnel when the master no longer knows this host and the edge refuses
//! the token. This task never touches Docker: the supervisor compares the desired state with what runs.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use crate::channels::{Refusal, View, Wanted};
use crate::concerns::{Concerns, Retry};
use crate::master::{Master, MasterError};
use crate::metrics::{self, Metrics};
use crate::pulse::BEAT;
use crate::registration::{Protocol, Registrar, Session};
use crate::retry::{Backoff, Trouble};
use crate::state::{AgentId, DesiredState, Phase, Store, Tombstone, TunnelState};

mod commands;
mod decommission;
mod ingress;
mod removal;
use commands::{Command, Rejected};
use decommission::PendingAck;
pub(crate) use decommission::epitaph;

/// How the task ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// A shutdown.
    Shutdown,
    /// The master has decommissioned this agent.
    Decommissioned,
}

/// The stored state, as it is on disk at this moment.
#[derive(Debug)]
pub struct OnDisk {
    /// The data folder.
    pub store: Store,
    /// `tunnel_state.json`.
    pub state: TunnelState,
    /// `decommission.json`.
    pub tombstone: Option<Tombstone>,
}

/// What the poller shares with other tasks, and what it reads from them.
#[derive(Debug)]
pub struct Links {
    /// The desired state.
    pub wanted: watch::Sender<Wanted>,
    /// The state of the tunnel.
    pub view: watch::Receiver<View>,
    /// Counts the commands.
    pub metrics: Metrics,
    /// Lists what is being retried.
    pub concerns: Concerns,
}

/// The command task.
#[derive(Debug)]
pub struct Poller {
    master: Arc<Master>,
    registrar: Arc<Registrar>,
    disk: OnDisk,
    interval: Duration,
    cloudflared_image: String,
    links: Links,
    /// Number of the last session whose assignment was checked.
    recovered: u64,
    /// A reply, and commands with it, may have been lost. A v1 registration names the tunnel they were about.
    reply_lost: bool,
    ack: Option<PendingAck>,
    timers: Timers,
}

/// When each thing is next due, and the back-off of each.
#[derive(Debug)]
struct Timers {
    poll: Instant,
    polling: Retry,
    push: Instant,
    pushing: Retry,
    ack: Instant,
    acking: Retry,
    /// When a v1 master may next be asked whether the tunnel still belongs to this host.
    claim: Instant,
    disk: Trouble,
    no_route: bool,
}

/// How long a shutdown waits for the reply to a command poll that is under way: the reply may carry commands.
const LAST_REPLY_LIMIT: Duration = Duration::from_secs(3);
/// The wait is split into pieces of this length. Many machines freeze for a while as they go down: what arrived during
/// the freeze is then read before the next piece begins.
const LAST_REPLY_PIECE: Duration = Duration::from_millis(250);
const FIRST_WAIT: Duration = Duration::from_secs(1);
const LONGEST_WAIT: Duration = Duration::from_secs(60);

impl Poller {
    /// The caller has already set the `wanted` channel of `links` from `disk`.
    pub fn new(
        master: Arc<Master>,
        registrar: Arc<Registrar>,
        disk: OnDisk,
        interval: Duration,
        cloudflared_image: String,
        links: Links,
    ) -> Self {
        let now = Instant::now();
        let retry = |id, what| Retry::new(id, what, FIRST_WAIT, LONGEST_WAIT, links.concerns.clone());
        let timers = Timers {
            poll: now,
            polling: retry("commands", "polling commands:"),
            push: now,
            pushing: retry("ingress", "handing on ingress rules:"),
            ack: now,
            acking: retry("acknowledgement", "acknowledging a decommission:"),
            claim: now,
            disk: Trouble::new("the data folder"),
            no_route: false,
        };
        Self {
            master,
            registrar,
            disk,
            interval,
            cloudflared_image,
            links,
            recovered: 0,
            reply_lost: false,
            ack: None,
            timers,
        }
    }

    /// Polls until `shutdown` or until the master has decommissioned this agent.
    pub async fn run(mut self, shutdown: CancellationToken) -> Ended {
        let mut sessions = self.registrar.watch();
        loop {
            // A session that starts after this point, for example during a poll, wakes the wait below.
            sessions.mark_unchanged();
            let session = tokio::select! {
                biased;
                () = shutdown.cancelled() => return Ended::Shutdown,
                // After the last phase the key may be gone, and registering would wait forever.
                () = std::future::ready(()), if self.is_finalized() => None,
                session = self.registered(None, &shutdown) => session,
            };
            if let Some(session) = session.as_deref() {
                self.recover(session, &shutdown).await;
            }
            self.ask_whose(session.as_deref(), &shutdown).await;
            self.forget_if_removed(&shutdown).await;
            let now = Instant::now();
            if self.ack.is_some() && now >= self.timers.ack && self.acknowledge(&shutdown).await {
                return Ended::Decommissioned;
            }
            if self.disk.state.pending_ingress.is_some() && now >= self.timers.push {
                tokio::select! {
                    () = shutdown.cancelled() => return Ended::Shutdown,
                    () = self.push_ingress() => {}
                }
            }
            if now >= self.timers.poll && self.poll(session.as_deref(), &shutdown).await {
                return Ended::Decommissioned;
            }
            let ack_at = self.ack.is_some().then_some(self.timers.ack);
            let push_at = self.disk.state.pending_ingress.is_some().then_some(self.timers.push);
            // However long the wait, wake in between to show that this task is alive.
            let next = [Some(self.timers.poll), ack_at, push_at, Some(now + BEAT)].into_iter().flatten().min();
            tokio::select! {
                () = shutdown.cancelled() => return Ended::Shutdown,
                () = sleep_until(next.unwrap_or(self.timers.poll)) => {}
                // The acknowledgement waits for the supervisor to stop the container. A removed host waits for the
                // supervisor to report whether the edge refuses the token.
                Ok(()) = self.links.view.changed(), if self.awaits_view(session.as_deref()) => {
                    self.timers.ack = Instant::now();
                }
                Ok(()) = sessions.changed(), if session.is_some() => {}
            }
        }
    }

    /// Whether a change of the view may be what this task waits for.
    fn awaits_view(&self, session: Option<&Session>) -> bool {
        let by_registration = session.is_some_and(|session| session.protocol == Protocol::V1);
        self.ack.is_some() || self.disk.state.unclaimed || by_registration && self.disk.state.token.is_some()
    }

    fn is_finalized(&self) -> bool {
        self.disk.tombstone.as_ref().is_some_and(|tombstone| tombstone.phase == Phase::Finalized)
    }

    /// Polls once for commands. Returns whether the master has decommissioned this agent.
    async fn poll(&mut self, session: Option<&Session>, shutdown: &CancellationToken) -> bool {
        let agent = match (session, &self.disk.tombstone) {
            (Some(session), _) => session.agent_id.clone(),
            (None, Some(tombstone)) => tombstone.agent_id.clone(),
            (None, None) => return false,
        };
        let reply = {
            let master = self.master.clone();
            let mut reply = std::pin::pin!(master.commands(&agent));
            tokio::select! {
                reply = &mut reply => Some(reply),
                // Dropping the connection would lose a reply that is on its way.
                () = shutdown.cancelled() => last_reply(reply.as_mut()).await,
            }
        };
        let Some(reply) = reply else { return false };
        let pause = self.interval.mul_f64(0.9 + 0.2 * fastrand::f64());
        match reply {
            Ok(reply) => {
                self.timers.polling.worked();
                self.timers.poll = Instant::now() + pause;
                self.carry_out(&agent, &reply.commands, shutdown).await;
                let lost = std::mem::take(&mut self.reply_lost);
                if let Some(session) = session.filter(|session| lost && session.protocol == Protocol::V1)
                    && let Some(session) = self.registered(Some(session), shutdown).await
                {
                    self.recover(&session, shutdown).await;
                }
                false
            }
            Err(error) => {
                self.reply_lost |= matches!(error, MasterError::Away { .. } | MasterError::Unavailable { .. });
                let is_refused = matches!(error.status(), Some(401 | 403 | 404)) && !error.is_away();
                let wait = match is_refused && !self.is_finalized() {
                    true => self.timers.polling.while_registering(&error),
                    false => self.timers.polling.after(&error, error.remedy()),
                };
                self.timers.poll = Instant::now() + wait;
                match (&error, error.status()) {
                    _ if error.is_away() => false,
                    // A proxy in between may send this status too; then it means nothing.
                    _ if is_refused && self.is_finalized() => error.is_explained() && self.bury().await,
                    _ if is_refused => {
                        if error.status() == Some(404) && error.is_explained() {
                            info!(
                                "the master does not know this agent any more; registering again, the tunnel is not touched"
                            );
                            self.unclaim(shutdown).await;
                        }
                        self.registered(session, shutdown).await;
                        false
                    }
                    _ => false,
                }
            }
        }
    }

    /// Turns a whole reply into one new state, stores it, and only then publishes it.
    async fn carry_out(&mut self, agent: &AgentId, commands: &[Value], shutdown: &CancellationToken) {
        if commands.is_empty() {
            return;
        }
        let mut state = self.disk.state.clone();
        let mut tombstone = self.disk.tombstone.clone();
        let mut refusal = self.links.wanted.borrow().refusal.clone();
        // Logged once it is on disk: until then a command could be lost.
        let mut carried_out = Vec::new();
        for value in commands {
            let count = |outcome| {
                self.links.metrics.command(value["action"].as_str().unwrap_or_default(), outcome);
            };
            let command = match Command::parse(value) {
                Ok(command) => command,
                Err(Rejected::NotUnderstood(what)) => {
                    count(metrics::NOT_UNDERSTOOD);
                    warn!("skipping {what}; update the agent if the master is newer");
                    continue;
                }
                Err(Rejected::Refused(refused)) => {
                    count(metrics::REFUSED);
                    error!(
                        name = refused.name.as_deref().unwrap_or("-"),
                        "refusing a tunnel command: {}; what runs is not touched, enrol the agent again on the master's page",
                        refused.problem
                    );
                    refusal = Some(refused);
                    continue;
                }
            };
            let phase = match &command {
                Command::Prepare(_) => Phase::Prepared,
                Command::Finalize(_) => Phase::Finalized,
                _ if tombstone.is_some() => {
                    count(metrics::IGNORED);
                    warn!("ignoring {}: this agent is being decommissioned", command.name());
                    continue;
                }
                _ => {
                    commands::apply(&mut state, &command);
                    if matches!(command, Command::Start(_) | Command::Restart(_)) {
                        state.be(agent);
                    }
                    if !matches!(command, Command::Ingress(_)) {
                        refusal = None;
                    }
                    carried_out.push((command, state.name.clone()));
                    continue;
                }
            };
            let (Command::Prepare(order) | Command::Finalize(order)) = &command else { continue };
            let (written, ack) = decommission::decide(tombstone.as_ref(), agent, state.id.as_ref(), order, phase);
            if let Some(code) = ack.conflict {
                count(metrics::REFUSED);
                warn!(operation = order.operation_id, code, "refusing {}", command.name());
            } else {
                // Update the state even if the tombstone was there already: a crash may have come between the two
                // writes.
                tombstone = written.or(tombstone);
                state.desired_state = DesiredState::Stopped;
                if tombstone.as_ref().is_some_and(|tombstone| tombstone.phase == Phase::Finalized) {
                    state = state.forgotten();
                }
                carried_out.push((command, None));
            }
            self.timers.ack = Instant::now();
            self.ack = Some(ack);
        }
        if !self.store(&state, tombstone.as_ref(), shutdown).await {
            return;
        }
        for (command, tunnel) in carried_out {
            let name = command.name();
            self.links.metrics.command(name, metrics::CARRIED_OUT);
            if let Command::Prepare(order) | Command::Finalize(order) = command {
                let operation = order.operation_id;
                warn!(operation, "command {name}: the tunnel stops and nothing more is reported");
            } else {
                info!(name = tunnel.as_deref().unwrap_or("-"), "command {name}");
            }
        }
        self.publish(state, tombstone, refusal);
    }

    /// Checks once per session what the master says at registration. On v1 this recovers a command that was lost.
    async fn recover(&mut self, session: &Session, shutdown: &CancellationToken) {
        if self.recovered >= session.number {
            return;
        }
        self.recovered = session.number;
        if session.is_new {
            self.unclaim(shutdown).await;
            self.say_unassigned();
        } else if self.disk.state.unclaimed && session.protocol != Protocol::V1 {
            // A v2 master accepts an agent's id only while it knows the agent; a v1 master also names the agent's
            // tunnel.
            let state = TunnelState { unclaimed: false, ..self.disk.state.clone() };
            let refusal = self.links.wanted.borrow().refusal.clone();
            self.commit(state, refusal, shutdown).await;
        }
        let Some(assignment) = session.assignment.as_ref().filter(|_| self.disk.tombstone.is_none()) else { return };
        match commands::recover(&self.disk.state, assignment, &session.agent_id) {
            Ok(None) => {}
            // Nothing new, except that the tunnel is assigned to this host again.
            Ok(Some(state)) if self.disk.state.unclaimed && state.token == self.disk.state.token => {
                self.commit(state, None, shutdown).await;
            }
            Ok(Some(state)) => {
                info!(
                    name = state.name.as_deref().unwrap_or("-"),
                    "the master has a tunnel for this agent that was not known here; starting it"
                );
                self.commit(state, None, shutdown).await;
            }
            Err(refusal) => {
                error!(
                    "refusing the tunnel that the master named at registration: {}; what runs is not touched",
                    refusal.problem
                );
                self.links.wanted.send_if_modified(|wanted| wanted.refusal.replace(refusal.clone()) != Some(refusal));
            }
        }
    }

    /// Stores the new state, then publishes it.
    async fn commit(&mut self, state: TunnelState, refusal: Option<Refusal>, shutdown: &CancellationToken) {
        if self.store(&state, None, shutdown).await {
            self.publish(state, None, refusal);
        }
    }

    /// Stores what changed. Retries while the disk refuses, because the next reply would be lost as well. A shutdown
    /// ends the wait and loses what is not on disk. Returns whether the state is stored.
    async fn store(
        &mut self,
        state: &TunnelState,
        tombstone: Option<&Tombstone>,
        shutdown: &CancellationToken,
    ) -> bool {
        let mut backoff = Backoff::new(FIRST_WAIT, Duration::from_secs(15));
        while let Err(error) = self.store_changes(state, tombstone).await {
            let problem = format!("refuses a command that the master has sent: {}", crate::error_chain(&error));
            self.timers.disk.failed(&problem, "the command is kept in memory and tried again, no further ones are fetched; make room or mend the permissions");
            self.links.wanted.send_if_modified(|wanted| wanted.unsaved.replace(problem.clone()) != Some(problem));
            if shutdown.is_cancelled() {
                error!(
                    "stopping with a command that could not be stored: redeploy the tunnel on the master's page after the start"
                );
                return false;
            }
            tokio::select! {
                () = shutdown.cancelled() => {}
                () = sleep_until(Instant::now() + backoff.next(None)) => {}
            }
        }
        self.timers.disk.ended();
        true
    }

    /// Publishes a desired state that is on disk.
    fn publish(&mut self, state: TunnelState, tombstone: Option<Tombstone>, refusal: Option<Refusal>) {
        self.disk.state = state;
        self.disk.tombstone = tombstone;
        let wanted = Wanted { refusal, ..Wanted::new(&self.disk.state, self.disk.tombstone.as_ref()) };
        self.links.wanted.send_if_modified(|known| std::mem::replace(known, wanted.clone()) != wanted);
    }

    async fn store_changes(
        &self,
        state: &TunnelState,
        tombstone: Option<&Tombstone>,
    ) -> Result<(), crate::state::StateError> {
        // The tombstone first: on its own it stops the tunnel, even after a crash between the two writes.
        if let Some(tombstone) = tombstone.filter(|tombstone| self.disk.tombstone.as_ref() != Some(tombstone)) {
            self.disk.store.save_tombstone(tombstone).await?;
        }
        if *state != self.disk.state {
            self.disk.store.save_tunnel(state).await?;
        }
        Ok(())
    }
}

/// Waits up to [`LAST_REPLY_LIMIT`] for a reply, in pieces that let this task run in between.
async fn last_reply<T>(mut reply: Pin<&mut impl Future<Output = T>>) -> Option<T> {
    for _ in 0..LAST_REPLY_LIMIT.div_duration_f64(LAST_REPLY_PIECE) as u32 {
        if let Ok(reply) = timeout(LAST_REPLY_PIECE, &mut reply).await {
            return Some(reply);
        }
    }
    None
}

/// See [`crate::fuzzing`].
#[cfg(feature = "fuzzing")]
pub(crate) fn fuzz(body: &[u8]) {
    let Ok(reply) = serde_json::from_slice::<crate::master::wire::Commands>(body) else { return };
    let mut state = TunnelState::default();
    for command in &reply.commands {
        match Command::parse(command) {
            Ok(command) => commands::apply(&mut state, &command),
            Err(Rejected::NotUnderstood(text)) => assert!(!text.contains(char::is_control), "more than a line"),
            Err(Rejected::Refused(refusal)) => {
                assert!(!refusal.problem.contains(char::is_control), "more than a line");
            }
        }
    }
}

#[cfg(test)]
mod hostile;
#[cfg(test)]
mod tests;
