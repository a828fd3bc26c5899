//! Looks at the container, its successor and the cloudflared in each, and reports what it saw.

use std::time::Duration;

use jiff::Timestamp;
use tokio::time::Instant;
use tracing::info;

use super::classify::{self, Memory, Page, Seen, Tries};
use super::course::{self, Course, Look, Verdict};
use super::host::Host;
use super::log::{Line, Said};
use super::outage::Dark;
use super::plan::{self, Owner, Slot, Whose};
use super::probe::{self, Readiness};
use super::problem::Problem;
use super::{CALM, Supervisor, WELL_AFTER};
use crate::cause::{Cause, Status};
use crate::channels::{Connector, Departure, View, Wanted, WantedTunnel};
use crate::docker::{
    DockerError, Endpoint, Health, Inspected, LastCheck, METRICS_LABEL, RunState, SPEC_LABEL, TUNNEL_LABEL,
    TUNNEL_NAME_LABEL,
};
use crate::retry::Lasts;
use crate::state::{AgentId, Token, TunnelId};

/// Pause while something is expected to change within seconds.
pub(super) const EAGER: Duration = Duration::from_millis(250);
/// Pause while a fault lasts longer. What cloudflared says about it must be known within three seconds.
const PATIENT: Duration = Duration::from_secs(2);
/// How many first lines to read: they hold cloudflared's version, and what it found out about the host's connection.
pub(super) const START_LINES: usize = 80;
/// How many last lines to read: they hold the fault. Each of four connections reports it in up to eight lines, and the
/// rules need two tries.
pub(super) const LAST_LINES: usize = 100;
/// Shortest time between two reads of the log, and of the metrics, while the connector is not ready.
const LOG_EVERY: Duration = Duration::from_secs(1);
/// Treat a connector as disconnected after this long without a connection: a lost one is often back within the second.
const DARK_LASTS: Duration = Duration::from_secs(2);
const FACTS_EVERY: Duration = Duration::from_secs(10);
/// cloudflared logs each request for its diagnosis. Ask only when the number of ready connections changed, no sooner
/// than `DIAGNOSE_AFTER`, and otherwise every `DIAGNOSE_EVERY`.
const DIAGNOSE_AFTER: Duration = Duration::from_secs(60);
const DIAGNOSE_EVERY: Duration = Duration::from_secs(600);

/// The two containers, as one pass saw them.
#[derive(Debug)]
pub(super) struct Sight {
    /// This agent's ids.
    pub(super) ids: Vec<AgentId>,
    pub(super) main: Option<Inspected>,
    pub(super) next: Option<Inspected>,
}

impl Sight {
    pub(super) fn whose(&self) -> Whose<'_> {
        Whose::Of(&self.ids)
    }

    /// The id of the container seen in a slot.
    pub(super) fn id(&self, slot: Slot) -> Option<String> {
        let seen = if slot == Slot::Main { &self.main } else { &self.next };
        seen.as_ref().map(|seen| seen.id.clone())
    }

    /// The container that is the tunnel: the one with its name, or else the successor that is about to get it.
    fn current(&self) -> Option<(Slot, &Inspected)> {
        let own = |slot, container: &Option<Inspected>| {
            let container = container.as_ref().filter(|found| plan::owner(found, self.whose()) != Owner::Foreign);
            container.map(|_| slot)
        };
        let slot = match (&self.main, &self.next) {
            (None, next) => own(Slot::Next, next),
            (main, _) => own(Slot::Main, main),
        }?;
        let container = if slot == Slot::Main { &self.main } else { &self.next };
        container.as_ref().map(|container| (slot, container))
    }
}

/// What all looks so far have shown about the container under one of the two names.
#[derive(Debug, Default)]
pub(super) struct Known {
    course: Option<Course>,
    container: Option<String>,
    address: Option<String>,
    connections: Option<u32>,
    connector: Connector,
    version: Option<String>,
    /// What the rules keep from earlier looks.
    memory: Memory,
    tries: Option<Tries>,
    /// Its last log lines, preceded by its connectivity checks at the start; and the very last line as written.
    log: Vec<Line>,
    last_words: String,
    /// The container's state when its log was last read, and when that was.
    log_read: Option<(RunState, Instant)>,
    /// Its first lines have been read.
    start_read: bool,
    /// Whether it was ready when its metrics were last read, and when that was.
    facts_read: Option<(bool, Instant)>,
    /// How many connections were ready when it was last asked for its diagnosis, and when that was.
    diagnosed: Option<(u32, Instant)>,
    page: Option<Page>,
    /// The log says already that it is ready.
    announced: bool,
    /// It was draining when this agent first saw it: an earlier agent had stopped it.
    pub(super) left_draining: bool,
    /// Since when it is known to have no connection, and whether it had one in this start.
    dark_since: Option<Instant>,
    was_ready: bool,
}

impl Known {
    fn verdict(&self) -> Verdict {
        self.course.as_ref().map(|course| course.verdict).unwrap_or_default()
    }

    pub(super) fn container(&self) -> Option<String> {
        self.container.clone()
    }

    pub(super) fn is_ready(&self) -> bool {
        self.verdict() == Verdict::Ready
    }

    pub(super) fn is_surely_ready(&self) -> bool {
        self.course.as_ref().is_some_and(Course::is_surely_ready)
    }

    pub(super) fn dark_since(&self) -> Option<Instant> {
        self.dark_since
    }

    pub(super) fn is_dark(&self, now: Instant) -> bool {
        self.dark_since.is_some_and(|since| now - since >= DARK_LASTS)
    }

    /// Time since its last start.
    pub(super) fn age(&self, now: Instant) -> Option<Duration> {
        self.course.as_ref().map(|course| course.age(now))
    }

    /// How it lost its connection, or that it never had one.
    pub(super) fn why_dark(&self) -> Dark {
        match self.verdict() {
            Verdict::Stopped => Dark::ToldToEnd,
            _ if self.was_ready => Dark::Lost,
            _ => Dark::NeverReady,
        }
    }

    /// The cause of its fault, if known.
    pub(super) fn cause(&self) -> Option<Cause> {
        match self.verdict() {
            Verdict::Sick(cause) => Some(cause),
            _ => None,
        }
    }

    /// Whether the host has no route to the edge.
    pub(super) fn cannot_route(&self) -> bool {
        self.cause().is_some() && classify::cannot_route(&self.log)
    }

    /// Notes whether it has a connection. If neither cloudflared nor Docker can tell, nothing is known.
    fn note_light(&mut self, found: &Inspected, readiness: &Readiness, now: Instant) {
        let by_docker = (found.health, found.last_check) == (Some(Health::Unhealthy), Some(LastCheck::NotReady));
        self.dark_since = match readiness {
            Readiness::Ready { .. } => None,
            Readiness::NotReady => self.dark_since.or(Some(now)),
            Readiness::Silent if by_docker => self.dark_since.or(Some(now)),
            Readiness::Silent => None,
        };
    }

    pub(super) fn is_sick(&self) -> bool {
        matches!(self.verdict(), Verdict::Sick(_) | Verdict::Unknown | Verdict::Stopped)
    }

    pub(super) fn is_sick_of(&self, cause: Cause) -> bool {
        self.verdict() == Verdict::Sick(cause)
    }

    pub(super) fn serves(&self, now: Instant) -> bool {
        self.course.as_ref().is_some_and(|course| course.serves(now))
    }

    pub(super) fn is_well(&self, now: Instant) -> bool {
        self.course.as_ref().is_some_and(|course| course.ready_for(now) >= Some(WELL_AFTER))
    }

    pub(super) fn needs_restart(&self, now: Instant) -> bool {
        self.course.as_ref().is_some_and(|course| course.needs_restart(now))
    }

    /// Why it cannot become ready, or did not in time.
    pub(super) fn failure(&self) -> Option<Cause> {
        self.course.as_ref().and_then(|course| course.failure(Instant::now()))
    }

    /// The address at which to ask cloudflared while Docker does not answer. `None` unless it was ready.
    pub(super) fn ask_at(&self) -> Option<&str> {
        self.address.as_deref().filter(|_| self.is_ready())
    }

    fn is_unsettled(&self, now: Instant) -> bool {
        self.course.as_ref().is_some_and(|course| course.is_unsettled(now))
    }

    /// Notes another start of the container, or another container.
    fn begin(&mut self, found: &Inspected, now: Instant) {
        if self.course.as_ref().is_some_and(|course| course.is_of(found)) {
            return;
        }
        let age = found.started_at.parse::<Timestamp>().ok().map(|at| at.duration_until(Timestamp::now()));
        let age = age.and_then(|age| Duration::try_from(age).ok()).unwrap_or_default();
        let is_same = self.container.as_ref() == Some(&found.id);
        let course = match self.course.take() {
            Some(mut course) => {
                course.next_start(found, age, now);
                course
            }
            None => Course::new(found, age, now),
        };
        let memory = if is_same { self.memory.next_start() } else { Memory::default() };
        *self = Self { course: Some(course), container: Some(found.id.clone()), memory, ..Self::default() };
    }

    /// Applies the rules to all that is known.
    fn judge(&mut self, found: &Inspected, readiness: &Readiness, only_quic: bool, now: Instant) -> Verdict {
        // Its age comes from the monotonic clock, so that setting the clock does not make it look young or old.
        let started_at = classify::seconds(&found.started_at).unwrap_or_default();
        let age = self.course.as_ref().map(|course| course.age(now)).unwrap_or_default();
        let page = course::page(found, readiness);
        self.page = Some(page);
        self.memory.classify(&Seen {
            now: started_at + age.as_secs_f64(),
            state: found.state,
            exit_code: Some(found.exit_code),
            out_of_memory: found.out_of_memory,
            started_at,
            page,
            tries: self.tries,
            log: &self.log,
            only_quic,
        })
    }

    /// Stores its log: the last lines, and the first ones if they were read.
    fn take_log(&mut self, first: &[String], last: &[String], token: Option<&Token>) {
        let parse = |lines: &[String]| of_this_start(lines).iter().map(|line| Line::parse(line)).collect::<Vec<_>>();
        let (first, mut lines) = (parse(first), parse(last));
        let is_check = |line: &&Line| matches!(line.said, Said::Precheck { .. });
        if !lines.iter().any(|line| is_check(&line)) {
            // The checks are far up in the log by now.
            let checks = first.iter().chain(&self.log).filter(is_check).cloned().collect::<Vec<_>>();
            lines.splice(..0, checks);
        }
        let used = lines.iter().rev().chain(first.iter().rev()).find_map(|line| line.protocol);
        self.connector.protocol = used.or(self.connector.protocol);
        self.log = lines;
        self.last_words = last_words(last, token);
    }
}

impl<H: Host> Supervisor<H> {
    /// Looks at the containers under both names.
    pub(super) async fn look(&mut self) -> Result<Sight, DockerError> {
        let main = self.host.inspect(&self.name(Slot::Main)).await?;
        let next = self.host.inspect(&self.name(Slot::Next)).await?;
        let ids = self.inputs.wanted.borrow().owners.clone();
        for (slot, container) in [(Slot::Main, &main), (Slot::Next, &next)] {
            match container.as_ref().filter(|found| plan::owner(found, Whose::Of(&ids)) != Owner::Foreign) {
                Some(found) => self.study(slot, found).await,
                None => *self.known(slot) = Known::default(),
            }
        }
        Ok(Sight { ids, main, next })
    }

    fn known(&mut self, slot: Slot) -> &mut Known {
        match slot {
            Slot::Main => &mut self.main,
            Slot::Next => &mut self.next,
        }
    }

    /// Asks a container how it is, and adds the answer to what is known of it.
    async fn study(&mut self, slot: Slot, found: &Inspected) {
        self.known(slot).begin(found, Instant::now());
        let runs = found.state == RunState::Running;
        // Exit code 255 may mean a token that cloudflared does not take: never start that again.
        let is_of_interest = runs || found.state == RunState::Restarting || found.exit_code == 255;
        if !is_of_interest {
            return;
        }
        let place = asked_at(found, &self.config.network);
        // It still serves and only cannot be asked: no reason for its successor to take over in haste.
        let was_placed = found.labels.contains_key(METRICS_LABEL);
        if runs && was_placed && place.is_none() && !self.has_lost_network(found) {
            return;
        }
        let address = place.map(|place| place.address.clone()).filter(|address| runs && !address.is_empty());
        let readiness = match &address {
            Some(address) => self.host.readiness(address).await,
            None => Readiness::Silent,
        };
        self.known(slot).address.clone_from(&address);
        if let Some(address) = address.filter(|_| readiness != Readiness::Silent) {
            self.read_facts(slot, &address, &readiness).await;
        }
        if let Readiness::Ready { connections, connector } = &readiness {
            let known = self.known(slot);
            (known.connections, known.connector.id) = (Some(*connections), connector.clone());
        }
        // Read again while it looks stopped: that may come from the end of the start before.
        if !matches!(readiness, Readiness::Ready { .. }) || self.known(slot).verdict() == Verdict::Stopped {
            self.read_log(slot, found).await;
        }
        let only_quic = self.config.only_quic();
        let is_first = !self.view.borrow().looked;
        let has_lost_network = runs && readiness == Readiness::Silent && self.has_lost_network(found);
        let known = self.known(slot);
        known.note_light(found, &readiness, Instant::now());
        let verdict = match known.judge(found, &readiness, only_quic, Instant::now()) {
            _ if has_lost_network => Verdict::Sick(Cause::NetworkReplaced),
            verdict => verdict,
        };
        known.left_draining |= is_first && runs && verdict == Verdict::Stopped;
        let look = Look { container: found, readiness: &readiness, verdict };
        if let Some(course) = &mut known.course {
            course.take(&look, Instant::now());
            known.was_ready |= course.verdict == Verdict::Ready;
            if !course.answered {
                known.connections = None;
            }
        }
    }

    /// Whether it began on the tunnel's network and is off it now: the container was disconnected, or the network
    /// removed.
    fn has_lost_network(&self, found: &Inspected) -> bool {
        let network = &self.config.network;
        found.network_mode == *network && !found.networks.contains_key(network)
    }

    /// Reads its other pages, no more often than needed.
    async fn read_facts(&mut self, slot: Slot, address: &str, readiness: &Readiness) {
        let ready = match readiness {
            Readiness::Ready { connections, .. } => Some(*connections),
            Readiness::NotReady | Readiness::Silent => None,
        };
        let every = if ready.is_some() { FACTS_EVERY } else { LOG_EVERY };
        let read = self.known(slot).facts_read;
        // Later failures are compared with the counts at the moment it becomes ready.
        if read.is_none_or(|(was_ready, at)| was_ready != ready.is_some() || at.elapsed() >= every) {
            let facts = self.host.facts(address).await;
            let known = self.known(slot);
            known.facts_read = Some((ready.is_some(), Instant::now()));
            known.tries = facts.as_ref().map(|facts| facts.tries);
            if let Some(facts) = facts {
                known.version = facts.version.or(known.version.take());
                let connector = &mut known.connector;
                connector.config_version = facts.config_version.or(connector.config_version);
                connector.traffic = facts.traffic.unwrap_or(connector.traffic);
            }
        }
        let Some(connections) = ready else { return };
        let is_due = self.known(slot).diagnosed.is_none_or(|(counted, at)| {
            at.elapsed() >= DIAGNOSE_EVERY || counted != connections && at.elapsed() >= DIAGNOSE_AFTER
        });
        if is_due {
            let protocol = self.host.protocol(address).await;
            let known = self.known(slot);
            known.diagnosed = Some((connections, Instant::now()));
            known.connector.protocol = protocol.or(known.connector.protocol);
        }
    }

    async fn read_log(&mut self, slot: Slot, found: &Inspected) {
        // The last lines say how it ended, so a new state is always read.
        let read = self.known(slot).log_read;
        if read.is_some_and(|(state, at)| state == found.state && at.elapsed() < LOG_EVERY) {
            return;
        }
        let token = self.inputs.wanted.borrow().token.clone();
        let last = self.host.log_tail(&found.id, started(found), LAST_LINES).await.unwrap_or_default();
        let mut first = Vec::new();
        if last.len() >= LAST_LINES && !self.known(slot).start_read {
            first = self.host.log_start(&found.id, started(found), START_LINES).await.unwrap_or_default();
            self.known(slot).start_read = !first.is_empty();
        }
        let known = self.known(slot);
        known.log_read = Some((found.state, Instant::now()));
        known.take_log(&first, &last, token.as_ref());
        if known.version.is_none() {
            known.version = probe::version_in_log(&first).or_else(|| probe::version_in_log(&last));
        }
    }

    /// Publishes what is known. `acting`: a container is about to be created. Returns how long to wait before the next
    /// look.
    pub(super) async fn publish(
        &mut self,
        wanted: &Wanted,
        sight: &Sight,
        problem: Option<&Problem>,
        acting: bool,
    ) -> Duration {
        let current = sight.current();
        let (name, tunnel_id, other) = tunnel_of(wanted, current.map(|(_, found)| found));
        let mut view = View {
            looked: true,
            name,
            tunnel_id,
            wanted: other,
            container_running: current.is_some_and(|(_, found)| found.state == RunState::Running),
            ..View::default()
        };
        let now = Instant::now();
        let mut pause = match &self.outage {
            // An outage may last for hours.
            Some(outage) => outage.look_again(now),
            None if sight.next.is_some() || self.ended.is_some() => EAGER,
            None => CALM,
        };
        match current {
            Some((slot, found)) if matches!(found.state, RunState::Running | RunState::Restarting) => {
                self.describe(&mut view, slot, found).await;
                pause = pause.min(self.pause(slot));
            }
            Some((slot, found)) if self.known(slot).is_sick_of(Cause::TokenMalformed) => {
                self.describe(&mut view, slot, found).await;
            }
            _ if acting => view.status = Status::Starting,
            _ => {}
        }
        if let Some(problem) = problem {
            // What still runs keeps running: the status describes the traffic, the reason what failed.
            if !view.container_running {
                view.status = problem.cause.status();
            }
            view.reason = Some(problem.cause.reason());
            pause = pause.min(self.not_before.map_or(PATIENT, |at| at.saturating_duration_since(Instant::now())));
        } else if current.is_none() && wanted.id.is_none() && !acting {
            view.reason = Some("no_tunnel_assigned");
        }
        if let Some(refusal) = &wanted.refusal {
            view.status = Status::Error;
            view.reason = Some(refusal.cause.reason());
            view.name = refusal.name.clone().or(view.name);
        }
        if wanted.decommission.is_some() {
            view.departure = self.departure(sight, problem).await;
        }
        self.tell(view);
        // Never zero: a pass that changes nothing must not follow itself at once.
        pause.max(EAGER)
    }

    /// Hands the view to its readers, and keeps the time at which its status began.
    pub(super) fn tell(&self, mut view: View) {
        self.view.send_if_modified(|known| {
            // A master forgets the version that it knows when a report has none.
            view.version =
                view.version.take().or_else(|| known.version.clone()).or_else(|| self.config.image.version());
            let is_same = known.looked && known.status == view.status;
            view.since = if is_same { known.since } else { Some(Timestamp::now()) };
            let is_news = view.is_news(known);
            *known = std::mem::take(&mut view);
            is_news
        });
    }

    /// Describes a container of ours in the view, and logs what changed.
    async fn describe(&mut self, view: &mut View, slot: Slot, found: &Inspected) {
        if self.known(slot).version.is_none() && !self.known(slot).start_read {
            let first = self.host.log_start(&found.id, started(found), START_LINES).await.unwrap_or_default();
            let known = self.known(slot);
            // It may not have said anything yet.
            known.start_read = !first.is_empty();
            known.version = probe::version_in_log(&first);
        }
        let hash = found.labels.get(SPEC_LABEL).map(String::as_str);
        let verdict = match self.known(slot).verdict() {
            Verdict::Sick(cause) => Verdict::Sick(self.certain(slot, cause, hash)),
            verdict => verdict,
        };
        let by_agent = if self.restarts.done.0 == found.id { self.restarts.done.1 } else { 0 };
        let known = self.known(slot);
        view.version.clone_from(&known.version);
        view.connector = known.connector.clone();
        view.restarts = found.restarts + by_agent;
        match verdict {
            Verdict::Starting => view.status = Status::Starting,
            Verdict::Ready => {
                view.status = Status::Running;
                view.serves = true;
                view.connections = known.connections;
                if !std::mem::replace(&mut known.announced, true) && slot == Slot::Main {
                    let after =
                        Lasts(known.course.as_ref().map(|course| course.age(Instant::now())).unwrap_or_default());
                    let name = view.name.as_deref().unwrap_or("-");
                    match view.connections {
                        Some(connections) => info!(name, connections, %after, "tunnel ready"),
                        None => info!(name, %after, "tunnel ready"),
                    }
                }
                self.sick.ended();
            }
            Verdict::Unknown => {
                view.status = Status::Degraded;
                view.connections = (known.page == Some(Page::NotReady)).then_some(0);
                self.sick.failed(
                    &"has no connection to Cloudflare, and why is not known yet",
                    "cloudflared connects again by itself",
                );
            }
            Verdict::Stopped => {
                view.status = Status::Degraded;
                view.connections = (known.page == Some(Page::NotReady)).then_some(0);
                self.sick.failed(&"was told to end, by somebody else", "it is started again when it has ended");
            }
            Verdict::Sick(cause) => {
                view.status = cause.status();
                view.reason = Some(cause.reason());
                view.connections = (known.page == Some(Page::NotReady)).then_some(0);
                let detail = match cause {
                    Cause::EdgeUntrusted => match classify::detail(cause, &known.log) {
                        Some(detail) => format!(": {detail}"),
                        None => String::new(),
                    },
                    Cause::CrashLoop => {
                        format!(": exit code {}, its last words: {}", found.exit_code, known.last_words)
                    }
                    _ => String::new(),
                };
                self.sick.failed(&format_args!("{}{detail}", cause.what()), cause.next());
            }
        }
    }

    /// How long to wait before looking again at a container that Docker keeps running.
    fn pause(&mut self, slot: Slot) -> Duration {
        let known = self.known(slot);
        match known.verdict() {
            _ if known.is_unsettled(Instant::now()) => EAGER,
            Verdict::Ready => CALM,
            Verdict::Starting | Verdict::Unknown | Verdict::Stopped | Verdict::Sick(_) => PATIENT,
        }
    }

    /// What the acknowledgement of a decommission can report by now. `None` while the container is still stopping.
    async fn departure(&self, sight: &Sight, problem: Option<&Problem>) -> Option<Departure> {
        let container = match (sight.current(), problem) {
            (None, _) => "absent",
            (Some((Slot::Main, found)), _)
                if matches!(found.state, RunState::Exited | RunState::Created | RunState::Dead)
                    && sight.next.is_none() =>
            {
                "stopped"
            }
            (Some(_), Some(_)) => "failed",
            // Still stopping.
            (Some(_), None) => return None,
        };
        Some(Departure { container, own: self.host.own_container(self.hostname.as_deref()).await })
    }
}

/// Name and id of the tunnel whose connector runs, and the tunnel that the master wants if that is another.
fn tunnel_of(wanted: &Wanted, found: Option<&Inspected>) -> (Option<String>, Option<TunnelId>, Option<WantedTunnel>) {
    let labelled = |found: &Inspected| found.labels.get(TUNNEL_LABEL).map(|id| TunnelId(id.clone()));
    let runs = found.and_then(|found| found.serves.clone().or_else(|| labelled(found)));
    match (runs, found) {
        (Some(runs), Some(found)) if wanted.id.as_ref() != Some(&runs) => {
            let name = found.labels.get(TUNNEL_NAME_LABEL).cloned();
            let other = wanted.id.clone().map(|id| WantedTunnel { id, name: wanted.name.clone() });
            (name, Some(runs), other)
        }
        _ => (wanted.name.clone(), wanted.id.clone(), None),
    }
}

/// The network on which to ask cloudflared: the one reserved for its metrics, or else the tunnel's.
pub(super) fn asked_at<'a>(found: &'a Inspected, network: &str) -> Option<&'a Endpoint> {
    match found.labels.get(METRICS_LABEL) {
        Some(metrics) => found.networks.get(metrics),
        // A container that is about to be replaced may be on another network.
        None => found.networks.get(network).or_else(|| found.networks.values().next()),
    }
}

/// Seconds since 1970 at the container's last start. Its log is read from there.
pub(super) fn started(found: &Inspected) -> i64 {
    found.started_at.parse::<Timestamp>().map(|at| at.as_second()).unwrap_or_default()
}

/// Docker returns a log from a whole second on, so the end of the start before may come ahead of this start's lines.
fn of_this_start(lines: &[String]) -> &[String] {
    let begins = lines.iter().rposition(|line| line.contains("Starting tunnel")).unwrap_or_default();
    lines.get(begins..).unwrap_or(lines)
}

/// The last line that the container wrote. The token is cut out, in case a version of cloudflared prints it.
fn last_words(lines: &[String], token: Option<&Token>) -> String {
    let last = lines.last().map(String::as_str).unwrap_or("(none)");
    // The time at its beginning would make every line a different one.
    let last = match last.split_once(' ') {
        Some((time, rest)) if time.parse::<Timestamp>().is_ok() => rest,
        _ => last,
    };
    match token {
        Some(token) => last.replace(token.expose(), "<token>"),
        None => last.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_one_start_is_no_word_of_the_next_one_in_the_same_second() {
        let lines = |lines: &[&str]| lines.iter().map(|line| (*line).to_owned()).collect::<Vec<_>>();
        let end = "2026-01-31T10:00:56Z INF Initiating graceful shutdown due to signal terminated ...";
        let start = "2026-01-31T10:00:56Z INF Starting tunnel tunnelID=t1";
        let mut known = Known::default();
        let stops = |known: &Known| known.log.iter().any(|line| line.said == Said::ShuttingDown);
        known.take_log(&[], &lines(&[end]), None);
        assert!(stops(&known), "the next one has written nothing yet");
        known.take_log(&[], &lines(&[end, start]), None);
        assert!(!stops(&known));
        known.take_log(&[], &lines(&[start, end]), None);
        assert!(stops(&known));
    }
}
