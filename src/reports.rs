//! Everything that is sent to the master as an event: container changes, complete reports, the tunnel's status
//! and heartbeats; their order, their numbers and their retries.
//!
//! One task, one message in flight. What is due is kept in the `outbox`; what the tunnel and the inventory are
//! is read from their owners at the moment of sending, so a message is never older than its retry. Nothing is on
//! disk: after a crash a new session begins with a complete report, which says all that matters.

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use crate::channels::{Change, Inventory, Traffic, View, Wanted};
use crate::docker::Container;
use crate::master::{Master, MasterError, wire};
use crate::metrics::{self, Metrics};
use crate::pulse::{BEAT, rest};
use crate::registration::{Protocol, Registrar, Session};
use crate::retry::{Backoff, Trouble};

mod outbox;
use outbox::{Message, Outbox};

/// A master counts an agent as gone when it has heard nothing for 60 s; a sign of life goes out well before, so
/// that one may be lost.
const HEARTBEAT_AFTER: Duration = Duration::from_secs(25);
/// What a shutdown may spend on what is still unsaid.
const FLUSH_LIMIT: Duration = Duration::from_secs(2);
/// A master that does not answer is tried again quickly at first, and at most this often in a long outage.
const FIRST_WAIT: Duration = Duration::from_millis(500);
const LONGEST_WAIT: Duration = Duration::from_secs(30);
/// A session that ends sooner is a short one, and after two of them in a row the next is waited for.
const LASTING_SESSION: Duration = Duration::from_secs(60);
const LONGEST_RENEWAL_WAIT: Duration = Duration::from_secs(15);

/// What the reporter reads.
#[derive(Debug)]
pub struct Inputs {
    /// The inventory, for reports.
    pub inventory: watch::Receiver<Inventory>,
    /// Each change of it.
    pub changes: mpsc::Receiver<Change>,
    /// How the tunnel is.
    pub tunnel: watch::Receiver<View>,
    /// Whether the agent is being decommissioned, in which case nothing is said.
    pub wanted: watch::Receiver<Wanted>,
    /// Counts what waits and what was said.
    pub metrics: Metrics,
}

/// The report task.
#[derive(Debug)]
pub struct Reporter {
    master: Arc<Master>,
    registrar: Arc<Registrar>,
    inputs: Inputs,
    interval: Duration,
    /// Whether the tunnel goes down with the agent, which the last message then says.
    announces_stop: bool,
    outbox: Outbox,
    session: Option<Arc<Session>>,
    streams: Streams,
    /// The master said that this agent is being decommissioned: nothing more in this session.
    quiet: bool,
    /// An inventory that the master found too large; it is not sent again as it is.
    too_large: Option<BTreeMap<String, Container>>,
    /// The tunnel as the last status told it, and as the one under way does.
    told: View,
    telling: View,
    /// The inventory's revision that is reported or due.
    revision: u64,
    refused: Trouble,
}

/// The two streams of a session. On v2 each counts from 1, and a number is used for one message only.
#[derive(Debug, Default)]
struct Streams {
    events: Numbered,
    reports: Numbered,
}

#[derive(Debug, Default)]
struct Numbered {
    last: u64,
    /// The message under that number while it is not answered, and what it says: whoever wants to say the same
    /// repeats it to the letter.
    unanswered: Option<(Value, Value)>,
}

/// What became of a message.
enum Sent {
    Yes,
    /// Not now: put it back and wait.
    Later(Option<Duration>),
    /// Never as it is.
    Dropped,
    /// Not under this session.
    Unregistered,
    /// The agent is being decommissioned.
    Decommissioning,
}

impl Reporter {
    /// `announces_stop`: whether the tunnel container is stopped when the agent is.
    pub fn new(
        master: Arc<Master>,
        registrar: Arc<Registrar>,
        inputs: Inputs,
        interval: Duration,
        announces_stop: bool,
    ) -> Self {
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
            too_large: None,
            told: View::default(),
            telling: View::default(),
            revision: 0,
            refused: Trouble::new("a message:"),
        }
    }

    /// Reports until `shutdown`, then says what is still unsaid, within two seconds.
    pub async fn run(mut self, shutdown: CancellationToken) {
        let mut backoff = Backoff::new(FIRST_WAIT, LONGEST_WAIT);
        let mut failures = 0;
        let (mut adopted, mut short_sessions) = (Instant::now(), 0);
        let mut renewals = Backoff::new(FIRST_WAIT, LONGEST_RENEWAL_WAIT);
        let mut next_report = Instant::now() + self.interval;
        let mut sessions = self.registrar.watch();
        while !shutdown.is_cancelled() {
            let registrar = self.registrar.clone();
            // One that comes after this look wakes the wait below.
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
                // What is only counted is not told by itself.
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
            let Some(message) = self.outbox.next(self.can_report(), now >= heartbeat_at) else {
                self.wait_for_news(&shutdown, next_report.min(heartbeat_at), &mut sessions).await;
                continue;
            };
            let payload = self.write(&message, &session);
            let master = self.master.clone();
            let Some(result) = self.meanwhile(&shutdown, master.send_event(&session.agent_id, &payload)).await else {
                // Under way when the shutdown came: the flush repeats it, and v2 masters know the number.
                self.outbox.put_back(message);
                break;
            };
            let sent = self.judge(result, &message);
            if !matches!(sent, Sent::Later(_)) {
                self.answered(&payload);
            }
            let kind = payload["type"].as_str().unwrap_or_default();
            match sent {
                Sent::Yes => {
                    self.inputs.metrics.message(kind, metrics::ACCEPTED);
                    failures = 0;
                    backoff.reset();
                    self.outbox.delivered(&message);
                    self.refused.ended();
                    match message {
                        Message::Report => self.master.report_taken(),
                        Message::Status => self.told.clone_from(&self.telling),
                        _ => {}
                    }
                }
                Sent::Dropped => {
                    self.inputs.metrics.message(kind, metrics::DROPPED);
                    self.outbox.delivered(&message);
                }
                Sent::Later(asked) => {
                    failures += 1;
                    self.outbox.put_back(message);
                    // The first retry repeats the message; after that it is an outage.
                    if failures > 1 {
                        self.outbox.went_away();
                    }
                    let wait = backoff.next(asked);
                    self.meanwhile(&shutdown, rest(wait)).await;
                }
                Sent::Unregistered => {
                    self.outbox.put_back(message);
                    // A master that takes the registration and not the session must not make this spin, nor another
                    // agent with the same key.
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
        }
        if timeout(FLUSH_LIMIT, self.flush()).await.is_err() {
            warn!("the master did not take the last messages in time; the next start reports anew");
        }
    }

    /// Says what is still due, each message once, and last that the tunnel stops.
    async fn flush(&mut self) {
        let Some(session) = self.session.clone().filter(|_| !self.is_silenced()) else { return };
        while let Ok(change) = self.inputs.changes.try_recv() {
            self.push(change);
        }
        while let Some(message) = self.outbox.next(self.can_report(), false) {
            let payload = self.write(&message, &session);
            if self.master.send_event(&session.agent_id, &payload).await.is_err() {
                return;
            }
            self.answered(&payload);
            self.outbox.delivered(&message);
        }
        if self.announces_stop {
            let view = self.inputs.tunnel.borrow().stopped_with_agent();
            let payload = self.envelope("tunnel_status", view.fields(Traffic::default()), &session);
            // There is nothing left to do about a failure: the master shows the agent as offline in a minute.
            let _ = self.master.send_event(&session.agent_id, &payload).await;
        }
    }

    fn push(&mut self, change: Change) {
        self.outbox.push(change);
        self.count();
    }

    fn count(&mut self) {
        self.inputs.metrics.queue(self.outbox.len(), self.outbox.take_coalesced());
    }

    /// Waits for `work` while changes keep coming in. `None` when the shutdown came first; `work` is dropped then.
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
            // However long it is until then, it shows in between that it lives.
            () = sleep_until(deadline.min(Instant::now() + BEAT)) => {}
            Some(change) = self.inputs.changes.recv() => self.push(change),
            Ok(()) = self.inputs.inventory.changed() => {}
            Ok(()) = self.inputs.tunnel.changed() => self.outbox.status(),
            Ok(()) = self.inputs.wanted.changed() => {}
            Ok(()) = sessions.changed() => {}
        }
    }

    /// Takes up a session: a new one has its own numbers and knows nothing yet. Returns whether it is one.
    fn adopt(&mut self, session: &Arc<Session>) -> bool {
        if self.session.as_ref().is_some_and(|known| known.number == session.number) {
            return false;
        }
        self.session = Some(session.clone());
        self.streams = Streams::default();
        self.quiet = false;
        self.too_large = None;
        self.outbox.report_when_complete();
        // Before the supervisor's first look there is nothing to say, and its first word is a change.
        if self.inputs.tunnel.borrow_and_update().looked {
            self.outbox.status();
        }
        true
    }

    /// Takes note of what changed in the inventory and the tunnel while nobody waited for it.
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
        let inventory = self.inputs.inventory.borrow();
        inventory.complete && self.too_large.as_ref() != Some(&inventory.containers)
    }

    /// Decides what becomes of a message, by the tables of both protocols.
    fn judge(&mut self, result: Result<(), MasterError>, message: &Message) -> Sent {
        let Err(error) = result else { return Sent::Yes };
        match (&error, error.status(), error.code()) {
            _ if error.is_away() => Sent::Later(error.retry_after()),
            // Whoever registers says what is wrong with the key.
            (_, Some(401 | 403 | 404), _) | (_, Some(409), "registration_required") => Sent::Unregistered,
            (_, Some(409), "stale_sequence") => {
                error!(
                    "the master has seen a higher number in this session, which is a mistake of this agent; registering again and reporting everything"
                );
                Sent::Unregistered
            }
            (_, Some(409), "agent_decommissioning") => Sent::Decommissioning,
            (_, Some(413), _) => {
                if *message == Message::Report {
                    self.too_large = Some(self.inputs.inventory.borrow().containers.clone());
                    let containers = self.inputs.inventory.borrow().containers.len();
                    warn!(
                        containers,
                        "the master refuses the report as too large; it removes nothing until the next one that fits, use fewer or shorter dockflare.* labels"
                    );
                } else {
                    warn!(
                        "the master refuses {} as too large; it is dropped, use fewer or shorter dockflare.* labels",
                        describe(message)
                    );
                }
                Sent::Dropped
            }
            _ => {
                let what = format!("{} is dropped, since the master {error}", describe(message));
                self.refused
                    .failed(&what, "going on with the next; this is a mismatch of agent and master, please report it");
                Sent::Dropped
            }
        }
    }

    /// Puts a message into the session's words.
    fn write(&mut self, message: &Message, session: &Session) -> Value {
        match message {
            Message::Change(change) => self.change(change, session),
            Message::Report => self.report(session),
            Message::Unknown if session.protocol != Protocol::V1 => {
                let fields = json!({ "inventory_complete": false, "inventory_scope": SCOPE });
                self.envelope(REPORT, fields, session)
            }
            Message::Status => {
                let view = self.inputs.tunnel.borrow_and_update().clone();
                let fields = view.fields(view.connector.carried_since(&self.told.connector));
                self.telling = view;
                self.envelope("tunnel_status", fields, session)
            }
            Message::Heartbeat | Message::Unknown => self.envelope("heartbeat", json!({}), session),
        }
    }

    fn change(&mut self, change: &Change, session: &Session) -> Value {
        let kind = if change.running { "container_start" } else { "container_stop" };
        let Container { id, name, labels, .. } = change.container.clone();
        let container = wire::Container { id, name, labels };
        self.envelope(kind, json!({ "timestamp": change.at.to_string(), "container": container }), session)
    }

    fn report(&mut self, session: &Session) -> Value {
        let containers: Vec<Value> = {
            let inventory = self.inputs.inventory.borrow_and_update();
            let listed = inventory.containers.values();
            listed.map(|c| json!({ "id": c.id, "name": c.name, "labels": c.labels, "status": c.status })).collect()
        };
        match session.protocol {
            Protocol::V1 => self.envelope(REPORT, json!({ "container": { "containers": containers } }), session),
            Protocol::V2 { .. } => {
                let fields = json!({ "inventory_complete": true, "inventory_scope": SCOPE, "containers": containers });
                self.envelope(REPORT, fields, session)
            }
        }
    }

    /// Type, time and, on v2, session and number around `fields`, which win. What was sent and not answered is
    /// repeated to the letter.
    fn envelope(&mut self, kind: &'static str, fields: Value, session: &Session) -> Value {
        let stream = self.stream(kind);
        let says = json!([kind, fields]);
        if let Some((_, message)) = stream.unanswered.as_ref().filter(|(said, _)| *said == says) {
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
        stream.unanswered = Some((says, message.clone()));
        message
    }

    fn stream(&mut self, kind: &str) -> &mut Numbered {
        if kind == REPORT { &mut self.streams.reports } else { &mut self.streams.events }
    }

    /// The master has answered: the next message is another one, even if it says the same.
    fn answered(&mut self, payload: &Value) {
        self.stream(payload["type"].as_str().unwrap_or_default()).unanswered = None;
    }
}

/// The one type of message that has a stream of its own.
const REPORT: &str = "status_report";

/// What a complete inventory covers, in the words of v2.
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
