//! Sends everything that the master gets as an event: container changes, complete reports, the tunnel's status and
//! heartbeats. Owns their order, sequence numbers and retries.
//!
//! One task with one message in flight. The `outbox` holds what is due. The task reads the tunnel's status and the
//! inventory from their owners when it sends, so a message is never older than its retry. No message is on disk: after
//! a crash, a new session begins with a complete report, which says everything that matters.

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use serde_json::{Value, json};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use crate::channels::{Change, Inventory, Traffic, View, Wanted};
use crate::concerns::Concerns;
use crate::docker::Container;
use crate::labels::ENABLE_KEYS;
use crate::master::{Master, MasterError, wire};
use crate::metrics::{self, Metrics};
use crate::pulse::{BEAT, rest};
use crate::registration::{Protocol, Registrar, Session};
use crate::retry::{Backoff, Trouble};
use crate::state::{Reported, Store};

mod kept;
mod ledger;
mod outbox;
mod rivalry;
mod stubborn;
use kept::Kept;
use ledger::{Ledger, One, Outcome, Why};
use outbox::{Message, Outbox};
use rivalry::Rivalry;
use stubborn::Stubborn;

/// Send a heartbeat after this long without contact. A master treats an agent as offline after 60 s of silence, so one
/// heartbeat may get lost.
const HEARTBEAT_AFTER: Duration = Duration::from_secs(25);
/// Time limit of a shutdown for sending what is still due.
const FLUSH_LIMIT: Duration = Duration::from_secs(2);
/// Back-off while the master does not answer: quick retries at first, and no more than one per [`LONGEST_WAIT`] in a
/// long outage.
const FIRST_WAIT: Duration = Duration::from_millis(500);
const LONGEST_WAIT: Duration = Duration::from_secs(30);
/// A session that ends sooner is short. From the second short session in a row on, wait before registering again.
const LASTING_SESSION: Duration = Duration::from_secs(60);
const LONGEST_RENEWAL_WAIT: Duration = Duration::from_secs(15);

/// The inputs of the reporter.
#[derive(Debug)]
pub struct Inputs {
    /// The inventory, for reports.
    pub inventory: watch::Receiver<Inventory>,
    /// Each change of the inventory.
    pub changes: mpsc::Receiver<Change>,
    /// The status of the tunnel.
    pub tunnel: watch::Receiver<View>,
    /// Whether the agent is being decommissioned. The reporter sends nothing then.
    pub wanted: watch::Receiver<Wanted>,
    /// Counts pending and sent messages.
    pub metrics: Metrics,
    /// Lists the containers that are left out, and the messages that failed.
    pub concerns: Concerns,
    /// Stores what the master knows while containers may be missing from a report.
    pub store: Store,
    /// What an earlier run stored.
    pub reported: Option<Reported>,
}

/// The report task.
#[derive(Debug)]
pub struct Reporter {
    master: Arc<Master>,
    registrar: Arc<Registrar>,
    inputs: Inputs,
    interval: Duration,
    /// Whether the tunnel goes down with the agent. The last message then says so.
    announces_stop: watch::Receiver<bool>,
    outbox: Outbox,
    session: Option<Arc<Session>>,
    streams: Streams,
    /// The master said that it is decommissioning this agent: send nothing more in this session.
    quiet: bool,
    /// What the master accepted and what it refuses.
    ledger: Ledger,
    /// The report in flight: ids and names, and its approximate size in bytes.
    reporting: (BTreeMap<String, String>, usize),
    kept: Kept,
    stubborn: Stubborn,
    rivalry: Rivalry,
    /// A v2 master whose answers look like those of v1.
    is_terse: bool,
    /// The tunnel in the last accepted status message, and in the one in flight.
    told: View,
    telling: View,
    /// The revision of the inventory that was reported or is due.
    revision: u64,
    refused: Trouble,
}

/// The two streams of a session. On v2 each counts from 1 and uses a number for one message only.
#[derive(Debug, Default)]
struct Streams {
    events: Numbered,
    reports: Numbered,
}

#[derive(Debug, Default)]
struct Numbered {
    last: u64,
    /// The message with that number while it is unanswered, and a digest of its content. A retry with the same content
    /// repeats it byte for byte.
    unanswered: Option<(Digest, Arc<Payload>)>,
}

type Digest = [u8; 32];

/// A message, serialized for the session's protocol.
#[derive(Debug)]
struct Payload {
    kind: &'static str,
    body: String,
}

/// The outcome of a message.
enum Sent {
    /// Accepted, with the master's protocol version if the answer shows it.
    Yes(Option<u32>),
    /// The master is away: put the message back and wait.
    Later(Option<Duration>),
    /// The same, but with a 5xx: the master may be failing at this very message.
    Failed(Option<Duration>),
    /// The master never accepts it as it is.
    Refused(Why),
    /// Dropped, with a line in the log.
    Dropped,
    /// The master no longer knows this session.
    Lost,
    /// The master refuses the key or the id.
    Unregistered,
    /// The agent is being decommissioned.
    Decommissioning,
}

impl Reporter {
    /// Creates the task. `announces_stop` tells whether the tunnel container stops with the agent.
    pub fn new(
        master: Arc<Master>,
        registrar: Arc<Registrar>,
        inputs: Inputs,
        interval: Duration,
        announces_stop: watch::Receiver<bool>,
    ) -> Self {
        let document = inputs.reported.clone();
        let ledger = Ledger::new(document.clone().map(|reported| reported.containers));
        let kept = Kept::new(inputs.store.clone(), document);
        Self {
            master,
            registrar,
            inputs,
            interval,
            announces_stop,
            outbox: Outbox::default(),
            session: None,
            streams: Streams::default(),
            quiet: false,
            ledger,
            reporting: Default::default(),
            kept,
            stubborn: Stubborn::default(),
            rivalry: Rivalry::default(),
            is_terse: false,
            told: View::default(),
            telling: View::default(),
            revision: 0,
            refused: Trouble::new("a message:"),
        }
    }

    /// Reports until `shutdown`, then sends what is still due, within two seconds.
    pub async fn run(mut self, shutdown: CancellationToken) {
        let mut backoff = Backoff::new(FIRST_WAIT, LONGEST_WAIT);
        let mut failures = 0;
        let (mut adopted, mut short_sessions) = (Instant::now(), 0);
        let mut renewals = Backoff::new(FIRST_WAIT, LONGEST_RENEWAL_WAIT);
        let mut next_report = Instant::now() + self.interval;
        let mut sessions = self.registrar.watch();
        while !shutdown.is_cancelled() {
            let registrar = self.registrar.clone();
            // A session that appears after this point wakes the wait below.
            sessions.mark_unchanged();
            let Some(session) = self.meanwhile(&shutdown, registrar.session()).await else { break };
            if self.adopt(&session) {
                adopted = Instant::now();
            }
            self.notice();
            self.count();
            let now = Instant::now();
            if now >= next_report {
                self.outbox.report_now();
                // Traffic counts alone do not trigger a status message.
                if *self.inputs.tunnel.borrow() != self.told {
                    self.outbox.status();
                }
                next_report = now + self.interval;
            }
            if self.is_silenced() {
                self.outbox.clear();
                self.wait_for_news(&shutdown, next_report, &mut sessions).await;
                continue;
            }
            let heartbeat_at = self.master.last_contact().map_or(now, |contact| contact + HEARTBEAT_AFTER);
            let Some(message) = self.next(now, now >= heartbeat_at, failures) else {
                let deadline = next_report.min(heartbeat_at).min(self.rivalry.over_at().unwrap_or(next_report));
                self.wait_for_news(&shutdown, deadline, &mut sessions).await;
                continue;
            };
            let payload = self.write(&message, &session);
            let master = self.master.clone();
            let sending = master.send_event(&session.agent_id, &payload.body);
            let Some(result) = self.meanwhile(&shutdown, sending).await else {
                // In flight at the shutdown: the flush repeats it, and a v2 master recognizes the number.
                self.outbox.put_back(message);
                break;
            };
            let sent = self.judge(&result, &message);
            if !matches!(sent, Sent::Later(_) | Sent::Failed(_)) {
                self.answered(&payload);
            }
            let sent = match sent {
                Sent::Failed(asked) if !self.stubborn.failed(&kind_of(&message), Instant::now()) => Sent::Later(asked),
                Sent::Failed(_) => {
                    // The next message differs from this one and needs its own number.
                    self.answered(&payload);
                    self.say_set_aside(&message, &result);
                    Sent::Refused(Why::Failing)
                }
                sent => sent,
            };
            match sent {
                Sent::Yes(speaks) => {
                    self.inputs.metrics.message(payload.kind, metrics::ACCEPTED);
                    failures = 0;
                    backoff.reset();
                    self.taken(message);
                    if speaks == Some(1) && session.protocol != Protocol::V1 && !self.is_terse {
                        info!(
                            "the master answers as the first protocol does, an earlier version has taken its place; registering again"
                        );
                        let Some(renewed) = self.meanwhile(&shutdown, registrar.renew(Some(&session))).await else {
                            break;
                        };
                        // If the master agrees to v2 again, believe that.
                        self.is_terse = renewed.protocol != Protocol::V1;
                    }
                }
                Sent::Dropped => {
                    self.inputs.metrics.message(payload.kind, metrics::DROPPED);
                    self.outbox.delivered(&message);
                }
                Sent::Refused(why) => {
                    self.inputs.metrics.message(payload.kind, metrics::DROPPED);
                    failures = 0;
                    backoff.reset();
                    self.outbox.delivered(&message);
                    self.refused(message, why);
                }
                Sent::Later(asked) | Sent::Failed(asked) => {
                    failures += 1;
                    self.outbox.put_back(message);
                    // The first retry repeats the message. A second failure counts as an outage.
                    if failures > 1 {
                        self.outbox.went_away();
                    }
                    let wait = backoff.next(asked);
                    self.meanwhile(&shutdown, rest(wait)).await;
                }
                Sent::Lost | Sent::Unregistered => {
                    self.outbox.put_back(message);
                    if matches!(sent, Sent::Lost) && self.rivalry.lost(self.master.failures(), Instant::now()) {
                        warn!("{SAME_KEY}; {SAME_KEY_REMEDY}");
                        self.inputs.concerns.raise("same_key", "", SAME_KEY, SAME_KEY_REMEDY);
                    }
                    // Do not spin if the master accepts the registration but not the session, or if another agent uses
                    // the same key.
                    if adopted.elapsed() >= LASTING_SESSION {
                        (short_sessions, renewals) = (0, Backoff::new(FIRST_WAIT, LONGEST_RENEWAL_WAIT));
                    }
                    short_sessions += 1;
                    if short_sessions > 1 {
                        let wait = renewals.next(None);
                        self.meanwhile(&shutdown, rest(wait)).await;
                    }
                    self.meanwhile(&shutdown, registrar.renew(Some(&session))).await;
                }
                Sent::Decommissioning => {
                    info!(
                        "the master says that this agent is being decommissioned: nothing more is reported, commands are still polled"
                    );
                    self.quiet = true;
                }
            }
            self.keep();
        }
        if timeout(FLUSH_LIMIT, self.flush()).await.is_err() {
            warn!("the master did not take the last messages in time; the next start reports anew");
        }
    }

    /// Returns the next message. While no report can be complete and nothing else is due, this is what the master does
    /// not know yet about single containers.
    fn next(&mut self, now: Instant, heartbeat_due: bool, failures: u32) -> Option<Message> {
        if self.rivalry.is_over(now) {
            info!("one session has lasted: no other agent uses this key any more, reports are complete again");
            self.inputs.concerns.clear("same_key", "");
        }
        self.ledger.is_contested = self.rivalry.is_contested();
        // If the master answers a report with a 5xx each time, a heartbeat now and then shows which of the two is at
        // fault.
        if self.outbox.is_away() && self.stubborn.count(REPORT) > 1 && failures % 3 == 1 {
            return Some(Message::Heartbeat);
        }
        loop {
            let can_report = self.can_report();
            if let Some(message) = self.outbox.next(can_report, false) {
                let rests = self.stubborn.rests(&kind_of(&message), now);
                match &message {
                    Message::Change(change) if self.ledger.is_idle_word(change) => self.outbox.delivered(&message),
                    // It becomes due again with the next report.
                    Message::Status | Message::Unknown if rests && !self.outbox.is_away() => {}
                    _ => return Some(message),
                }
                continue;
            }
            let one = {
                let inventory = self.inputs.inventory.borrow();
                if !inventory.complete {
                    break;
                }
                self.ledger.forget_gone(&inventory.containers);
                match self.ledger.next(&inventory.containers, now) {
                    Some(one) => Some(one),
                    None => match self.ledger.settle(&inventory.containers, now) {
                        Some(outcome) => {
                            drop(inventory);
                            self.say_outcome(outcome);
                            self.outbox.report_when_complete();
                            continue;
                        }
                        None => None,
                    },
                }
            };
            self.list_left_out();
            let Some(one) = one else { break };
            let (running, container) = match one {
                One::Start(container) => (true, container),
                One::Stop { id, name } => (false, bare(id, name)),
            };
            return Some(Message::Change(Box::new(Change { at: jiff::Timestamp::now(), running, container })));
        }
        heartbeat_due.then_some(Message::Heartbeat)
    }

    /// Notes that the master accepted a message.
    fn taken(&mut self, message: Message) {
        self.outbox.delivered(&message);
        let kind = kind_of(&message);
        if self.stubborn.taken(&kind) {
            info!("the master takes {} again", describe(&message));
            self.inputs.concerns.clear("message", &kind);
        }
        if self.refused.ended() {
            self.inputs.concerns.clear("message", "");
        }
        match message {
            Message::Report => {
                self.master.report_taken();
                self.ledger.report_taken(std::mem::take(&mut self.reporting.0));
                self.inputs.concerns.clear("report", "");
            }
            Message::Status => self.told.clone_from(&self.telling),
            Message::Change(change) if change.running => self.ledger.start_taken(&change.container),
            Message::Change(change) => self.ledger.stop_taken(&change.container.id),
            Message::Unknown | Message::Heartbeat => {}
        }
    }

    /// Notes that the master refused a message for good.
    fn refused(&mut self, message: Message, why: Why) {
        match message {
            Message::Report => {
                self.ledger.report_refused(self.reporting.1, why);
                self.outbox.report_when_complete();
            }
            Message::Change(change) if change.running => {
                if self.ledger.start_refused(&change.container) {
                    say_left_out(&change.container, why, &self.inputs.concerns);
                }
                self.outbox.report_when_complete();
            }
            // A stop needs only the id and name: send it again without the labels.
            Message::Change(change) if change.container.labels.len() > 1 => {
                let Container { id, name, .. } = change.container.clone();
                self.outbox.put_back(Message::Change(Box::new(Change { container: bare(id, name), ..*change })));
            }
            // The next report says the same.
            Message::Change(_) => self.outbox.report_when_complete(),
            Message::Status | Message::Unknown | Message::Heartbeat => {}
        }
    }

    fn say_set_aside(&mut self, message: &Message, result: &Result<Option<u32>, MasterError>) {
        let Err(error) = result else { return };
        let (what, kind) = (describe(message), kind_of(message));
        let next = "it is set aside and tried again later, the others are sent; see the master's log";
        warn!("{what} is not taken: the master {error} to it each time, and takes others; {next}");
        let problem = format!("{what} is not taken: the master {error} to it each time");
        self.inputs.concerns.raise("message", &kind, problem, next);
    }

    fn say_outcome(&mut self, outcome: Outcome) {
        let Outcome::Whole { why, containers, size } = outcome else { return };
        let problem = match why {
            Why::TooLarge => "the report is refused as too large, by the master or by what stands before it",
            Why::Invalid | Why::Failing => "the master does not take the report",
        };
        let remedy = match why {
            Why::TooLarge => {
                "allow larger requests there (nginx: client_max_body_size 8m); until then each container is told for itself, and what is removed while the agent is down stays published"
            }
            Why::Invalid | Why::Failing => {
                "see the master's log; until then each container is told for itself, and what is removed while the agent is down stays published"
            }
        };
        warn!(containers, bytes = size, "{problem}, and takes each of its containers; {remedy}");
        let listed =
            format!("{problem}: {containers} containers, about {size} bytes; each of them is taken for itself");
        self.inputs.concerns.raise("report", "", listed, remedy);
    }

    /// Removes containers that are no longer left out from the list of concerns.
    fn list_left_out(&self) {
        let names = self.ledger.names(&self.inputs.inventory.borrow().containers);
        self.inputs.concerns.retain(LEFT_OUT, |about| names.contains(about));
    }

    /// Stores what the master knows while it is needed after a restart.
    fn keep(&mut self) {
        let document = self.ledger.to_keep().zip(self.kept.agent_id.clone());
        self.kept.set(document.map(|(containers, agent_id)| Reported { agent_id, containers: containers.clone() }));
    }

    /// Sends what is still due, each message once, and finally that the tunnel stops.
    async fn flush(&mut self) {
        let Some(session) = self.session.clone().filter(|_| !self.is_silenced()) else { return };
        while let Ok(change) = self.inputs.changes.try_recv() {
            self.push(change);
        }
        while let Some(message) = self.outbox.next(self.can_report(), false) {
            let payload = self.write(&message, &session);
            if self.master.send_event(&session.agent_id, &payload.body).await.is_err() {
                return;
            }
            self.answered(&payload);
            self.taken(message);
        }
        if *self.announces_stop.borrow() {
            let view = self.inputs.tunnel.borrow().stopped_with_agent();
            let payload = self.envelope("tunnel_status", view.fields(Traffic::default()), None, &session);
            // Nothing is left to do about a failure: the master shows the agent as offline within a minute.
            let _ = self.master.send_event(&session.agent_id, &payload.body).await;
        }
    }

    fn push(&mut self, change: Change) {
        self.outbox.push(change);
        self.count();
    }

    fn count(&mut self) {
        self.inputs.metrics.queue(self.outbox.len(), self.outbox.take_coalesced());
    }

    /// Waits for `work` and takes in changes meanwhile. Returns `None` and drops `work` if the shutdown comes first.
    async fn meanwhile<T>(&mut self, shutdown: &CancellationToken, work: impl Future<Output = T>) -> Option<T> {
        let mut work = std::pin::pin!(work);
        loop {
            tokio::select! {
                biased;
                done = &mut work => return Some(done),
                () = shutdown.cancelled() => return None,
                Some(change) = self.inputs.changes.recv() => self.push(change),
            }
        }
    }

    /// Waits until something is due. All arms are cancel-safe: they only wait for news.
    async fn wait_for_news(
        &mut self,
        shutdown: &CancellationToken,
        deadline: Instant,
        sessions: &mut watch::Receiver<Option<Arc<Session>>>,
    ) {
        tokio::select! {
            () = shutdown.cancelled() => {}
            // Wake up in between to beat the pulse, however long the wait.
            () = sleep_until(deadline.min(Instant::now() + BEAT)) => {}
            Some(change) = self.inputs.changes.recv() => self.push(change),
            Ok(()) = self.inputs.inventory.changed() => {}
            Ok(()) = self.inputs.tunnel.changed() => self.outbox.status(),
            Ok(()) = self.inputs.wanted.changed() => {}
            Ok(()) = sessions.changed() => {}
        }
    }

    /// Adopts a session and returns whether it is new. A new session has its own numbers, and gets a report.
    fn adopt(&mut self, session: &Arc<Session>) -> bool {
        if self.session.as_ref().is_some_and(|known| known.number == session.number) {
            return false;
        }
        self.session = Some(session.clone());
        self.streams = Streams::default();
        self.quiet = false;
        let agent_id = Some(session.agent_id.as_str().to_owned());
        if std::mem::replace(&mut self.kept.agent_id, agent_id.clone()) != agent_id {
            // The master does not know what was reported under another id.
            self.ledger = Ledger::new(None);
        }
        self.ledger.begin(session.is_first);
        self.rivalry.begun(Instant::now());
        self.outbox.report_when_complete();
        // Before the supervisor's first look there is no status, and its first look counts as a change.
        if self.inputs.tunnel.borrow_and_update().looked {
            self.outbox.status();
        }
        true
    }

    /// Picks up changes of the inventory and the tunnel that came while the task was not waiting for them.
    fn notice(&mut self) {
        if self.inputs.tunnel.has_changed().unwrap_or(false) {
            self.inputs.tunnel.mark_unchanged();
            self.outbox.status();
        }
        let revision = self.inputs.inventory.borrow_and_update().revision;
        if std::mem::replace(&mut self.revision, revision) != revision {
            self.outbox.report_when_complete();
        }
    }

    fn is_silenced(&self) -> bool {
        self.quiet || self.inputs.wanted.borrow().decommission.is_some()
    }

    fn can_report(&self) -> bool {
        let (inventory, now) = (self.inputs.inventory.borrow(), Instant::now());
        inventory.complete && self.ledger.can_report(&inventory.containers, now) && !self.stubborn.rests(REPORT, now)
    }

    /// Decides the outcome of a message by the tables of both protocols.
    fn judge(&mut self, result: &Result<Option<u32>, MasterError>, message: &Message) -> Sent {
        let error = match result {
            Ok(speaks) => return Sent::Yes(*speaks),
            Err(error) => error,
        };
        let of_a_container = matches!(message, Message::Report | Message::Change(_));
        match (error, error.status(), error.code()) {
            (MasterError::Unavailable { retry_after: None, .. }, Some(500..), _) => Sent::Failed(None),
            _ if error.is_away() => Sent::Later(error.retry_after()),
            // The registration logs what is wrong with the key.
            (_, Some(401 | 403 | 404), _) => Sent::Unregistered,
            (_, Some(409), "registration_required") => Sent::Lost,
            (_, Some(409), "stale_sequence") => {
                error!(
                    "the master has seen a higher number in this session, which is a mistake of this agent; registering again and reporting everything"
                );
                Sent::Lost
            }
            (_, Some(409), "agent_decommissioning") => Sent::Decommissioning,
            // The caller logs what is left out, where it knows.
            (_, Some(413), _) if of_a_container => Sent::Refused(Why::TooLarge),
            (_, Some(400), _) if of_a_container => Sent::Refused(Why::Invalid),
            _ => {
                let what = format!("{} is dropped, since the master {error}", describe(message));
                let next = match error.status() {
                    Some(413) => "going on with the next; let what stands before the master take larger requests",
                    _ => "going on with the next; this is a mismatch of agent and master, please report it",
                };
                self.refused.failed(&what, next);
                self.inputs.concerns.raise("message", "", format!("a message: {what}"), next);
                Sent::Dropped
            }
        }
    }

    /// Serializes a message for the session's protocol.
    fn write(&mut self, message: &Message, session: &Session) -> Arc<Payload> {
        match message {
            Message::Change(change) => self.change(change, session),
            Message::Report => self.report(session),
            Message::Unknown if session.protocol != Protocol::V1 => {
                let fields = json!({ "inventory_complete": false, "inventory_scope": SCOPE });
                self.envelope(REPORT, fields, None, session)
            }
            Message::Status => {
                let view = self.inputs.tunnel.borrow_and_update().clone();
                let fields = view.fields(view.connector.carried_since(&self.told.connector));
                self.telling = view;
                self.envelope("tunnel_status", fields, None, session)
            }
            Message::Heartbeat | Message::Unknown => self.envelope("heartbeat", json!({}), None, session),
        }
    }

    fn change(&mut self, change: &Change, session: &Session) -> Arc<Payload> {
        let kind = if change.running { "container_start" } else { "container_stop" };
        let Container { id, name, labels, .. } = change.container.clone();
        let container = wire::Container { id, name, labels };
        self.envelope(kind, json!({ "timestamp": change.at.to_string(), "container": container }), None, session)
    }

    fn report(&mut self, session: &Session) -> Arc<Payload> {
        let list = {
            let inventory = self.inputs.inventory.borrow_and_update();
            let listed: Vec<_> =
                inventory.containers.values().filter(|one| !self.ledger.is_left_out(&one.id)).collect();
            let names = listed.iter().map(|one| (one.id.clone(), one.name.clone())).collect();
            self.reporting = (names, self.ledger.size(&inventory.containers));
            let listed: Vec<_> = listed.into_iter().map(Listed::of).collect();
            // Cannot fail: only strings and maps of strings.
            serde_json::to_string(&listed).unwrap_or_default()
        };
        match session.protocol {
            Protocol::V1 => {
                self.envelope(REPORT, json!({}), Some(("\"container\":{\"containers\":", list, "}")), session)
            }
            Protocol::V2 { .. } => {
                let fields = json!({ "inventory_complete": true, "inventory_scope": SCOPE });
                self.envelope(REPORT, fields, Some(("\"containers\":", list, "")), session)
            }
        }
    }

    /// Wraps `fields` in type, time and, on v2, session and number; `fields` win. `list` is serialized already and
    /// comes with the JSON before and after it, so that the list of a large host is copied as little as possible.
    /// Returns an unanswered message with the same content byte for byte.
    fn envelope(
        &mut self,
        kind: &'static str,
        fields: Value,
        list: Option<(&'static str, String, &'static str)>,
        session: &Session,
    ) -> Arc<Payload> {
        let stream = self.stream(kind);
        let said = digest(&[kind, &fields.to_string(), list.as_ref().map_or("", |(_, list, _)| list)]);
        if let Some((_, message)) = stream.unanswered.as_ref().filter(|(known, _)| *known == said) {
            return message.clone();
        }
        let mut message = json!({ "type": kind, "timestamp": jiff::Timestamp::now().to_string() });
        if let Some(id) = session.protocol.session() {
            stream.last += 1;
            message["protocol_version"] = json!(session.protocol.version());
            message["agent_session_id"] = json!(id);
            message[if kind == REPORT { "report_sequence" } else { "event_sequence" }] = json!(stream.last);
        }
        if let (Value::Object(message), Value::Object(fields)) = (&mut message, fields) {
            message.extend(fields);
        }
        let mut body = message.to_string();
        if let Some((before, list, after)) = list {
            body.truncate(body.len() - 1);
            body.reserve_exact(before.len() + list.len() + after.len() + 2);
            for part in [",", before, &list, after, "}"] {
                body.push_str(part);
            }
        }
        let payload = Arc::new(Payload { kind, body });
        stream.unanswered = Some((said, payload.clone()));
        payload
    }

    fn stream(&mut self, kind: &str) -> &mut Numbered {
        if kind == REPORT { &mut self.streams.reports } else { &mut self.streams.events }
    }

    /// Notes that the master answered. The next message gets a new number, even if its content is the same.
    fn answered(&mut self, payload: &Payload) {
        self.stream(payload.kind).unanswered = None;
    }
}

/// A container in a report.
#[derive(Serialize)]
struct Listed<'a> {
    id: &'a str,
    name: &'a str,
    labels: &'a BTreeMap<String, String>,
    status: &'a str,
}

impl<'a> Listed<'a> {
    fn of(container: &'a Container) -> Self {
        let Container { id, name, labels, status, .. } = container;
        Self { id, name, labels, status }
    }
}

fn digest(parts: &[&str]) -> Digest {
    let mut context = ring::digest::Context::new(&ring::digest::SHA256);
    for part in parts {
        context.update(part.as_bytes());
        context.update(&[0]);
    }
    let mut digest = Digest::default();
    digest.copy_from_slice(context.finish().as_ref());
    digest
}

/// Builds a container with no more than its id, its name and the label that enables it.
fn bare(id: String, name: String) -> Container {
    let labels = [(ENABLE_KEYS[0].to_owned(), "true".to_owned())].into();
    Container { id, name, labels, status: String::new(), image: String::new() }
}

/// Returns the kind by which [`Stubborn`] identifies a message.
fn kind_of(message: &Message) -> String {
    match message {
        Message::Report => REPORT.to_owned(),
        Message::Unknown => "unknown".to_owned(),
        Message::Status => "tunnel_status".to_owned(),
        Message::Heartbeat => "heartbeat".to_owned(),
        Message::Change(change) => {
            format!("{} {}", if change.running { "start" } else { "stop" }, change.container.id)
        }
    }
}

fn say_left_out(container: &Container, why: Why, concerns: &Concerns) {
    let name = &container.name;
    let longest = container.labels.iter().max_by_key(|(key, value)| key.len() + value.len());
    let (label, bytes) = longest.map_or(("-", 0), |(key, value)| (key.as_str(), value.len()));
    let labels = container.labels.len();
    let (problem, remedy) = match why {
        Why::TooLarge => (
            "the master refuses the container as too large, it is left out and the others are reported",
            "use fewer or shorter dockflare.* labels",
        ),
        Why::Invalid => (
            "the master refuses the container as invalid, it is left out and the others are reported",
            "look at its name and dockflare.* labels",
        ),
        Why::Failing => (
            "the master fails at the container each time, it is left out and the others are reported",
            "look at its name and dockflare.* labels, and see the master's log",
        ),
    };
    warn!(container = %name, label, bytes, labels, "{problem}; {remedy}");
    let listed = format!("{name}: {problem}; its longest label is {label} with {bytes} bytes, it has {labels}");
    concerns.raise(LEFT_OUT, name, listed, remedy);
}

/// The id of the concern about a container that the master refuses.
const LEFT_OUT: &str = "container_refused";

/// The problem and remedy that are reported when another agent uses this key.
const SAME_KEY: &str = "another agent uses this key: each host needs its own";
const SAME_KEY_REMEDY: &str = "generate a key for each on the master's Agents page, and delete agent_id.txt on the copy; until one session has lasted ten minutes no report is called complete";

/// The only type of message with a stream of its own.
const REPORT: &str = "status_report";

/// The scope of a complete inventory, in the terms of v2.
const SCOPE: &str = "dockflare_enabled_running";

fn describe(message: &Message) -> String {
    match message {
        Message::Report | Message::Unknown => "the report".to_owned(),
        Message::Status => "the tunnel's status".to_owned(),
        Message::Heartbeat => "a heartbeat".to_owned(),
        Message::Change(change) => {
            let what = if change.running { "start" } else { "stop" };
            format!("the {what} of {}", change.container.name)
        }
    }
}

#[cfg(test)]
mod tests;
