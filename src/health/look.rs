//! Looking at the container, its successor and cloudflared in them, and saying what was seen.

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

/// While something is expected to change within seconds.
pub(super) const EAGER: Duration = Duration::from_millis(250);
/// While something is wrong for longer: what cloudflared says of it is to be known within three seconds.
const PATIENT: Duration = Duration::from_secs(2);
/// Lines in which cloudflared has told its version, and what it found out about the host's connection.
pub(super) const START_LINES: usize = 80;
/// Lines in which it tells what is wrong; each of four connections says so in up to eight, and two tries are needed.
pub(super) const LAST_LINES: usize = 100;
/// Its log is read so often at most while it is not ready, and its metrics too.
const LOG_EVERY: Duration = Duration::from_secs(1);
/// One that has had no connection for so long has none: a lost one is often back within the second.
const DARK_LASTS: Duration = Duration::from_secs(2);
const FACTS_EVERY: Duration = Duration::from_secs(10);
/// It is asked for its diagnosis, which it logs: when another number of connections is ready, and now and then.
const DIAGNOSE_AFTER: Duration = Duration::from_secs(60);
const DIAGNOSE_EVERY: Duration = Duration::from_secs(600);

/// The two containers, as one pass has seen them.
#[derive(Debug)]
pub(super) struct Sight {
    /// The ids of this agent.
    pub(super) ids: Vec<AgentId>,
    pub(super) main: Option<Inspected>,
    pub(super) next: Option<Inspected>,
}

impl Sight {
    pub(super) fn whose(&self) -> Whose<'_> {
        Whose::Of(&self.ids)
    }

    /// The id of the container that was seen in a slot.
    pub(super) fn id(&self, slot: Slot) -> Option<String> {
        let seen = if slot == Slot::Main { &self.main } else { &self.next };
        seen.as_ref().map(|seen| seen.id.clone())
    }

    /// The one that is the tunnel: the one with its name, or else the successor that is about to have it.
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

/// What is known of the container under one of the two names, from all looks at it.
#[derive(Debug, Default)]
pub(super) struct Known {
    course: Option<Course>,
    container: Option<String>,
    address: Option<String>,
    connections: Option<u32>,
    connector: Connector,
    version: Option<String>,
    /// What the rules need of earlier looks.
    memory: Memory,
    tries: Option<Tries>,
    /// Its last lines, before them what it found out when it started, and the very last one as it is.
    log: Vec<Line>,
    last_words: String,
    /// The state in which its log was read, and when.
    log_read: Option<(RunState, Instant)>,
    /// Its first lines were asked for.
    start_read: bool,
    /// Whether it was ready when its metrics were read, and when.
    facts_read: Option<(bool, Instant)>,
    /// How many connections were ready when it was asked for its diagnosis, and when.
    diagnosed: Option<(u32, Instant)>,
    page: Option<Page>,
    /// That it is ready was said.
    announced: bool,
    /// It was draining when this agent first saw it: an agent before this one had stopped it.
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

    /// How it came to be without a connection.
    pub(super) fn why_dark(&self) -> Dark {
        match self.verdict() {
            Verdict::Stopped => Dark::ToldToEnd,
            _ if self.was_ready => Dark::Lost,
            _ => Dark::NeverReady,
        }
    }

    /// What is the matter, where that is known.
    pub(super) fn cause(&self) -> Option<Cause> {
        match self.verdict() {
            Verdict::Sick(cause) => Some(cause),
            _ => None,
        }
    }

    /// Whether its host has no way to the edge.
    pub(super) fn cannot_route(&self) -> bool {
        self.cause().is_some() && classify::cannot_route(&self.log)
    }

    /// Takes note of whether it has a connection. Where nobody answers, nobody knows.
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

    /// Why it does not become ready, or not in time.
    pub(super) fn failure(&self) -> Option<Cause> {
        self.course.as_ref().and_then(|course| course.failure(Instant::now()))
    }

    /// Where to ask while Docker does not answer, when it was ready before.
    pub(super) fn ask_at(&self) -> Option<&str> {
        self.address.as_deref().filter(|_| self.is_ready())
    }

    fn is_unsettled(&self, now: Instant) -> bool {
        self.course.as_ref().is_some_and(|course| course.is_unsettled(now))
    }

    /// Takes note of another start of the container, or of another container.
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

    /// What the rules make of all that is known.
    fn judge(&mut self, found: &Inspected, readiness: &Readiness, only_quic: bool, now: Instant) -> Verdict {
        // A clock that was set must not make it look young or old.
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

    /// Takes note of its log: its first lines, where they were asked for, and its last.
    fn take_log(&mut self, first: &[String], last: &[String], token: Option<&Token>) {
        let parse = |lines: &[String]| of_this_start(lines).iter().map(|line| Line::parse(line)).collect::<Vec<_>>();
        let (first, mut lines) = (parse(first), parse(last));
        let is_check = |line: &&Line| matches!(line.said, Said::Precheck { .. });
        if !lines.iter().any(|line| is_check(&line)) {
            // They are far up by now.
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
    /// Looks at both names.
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

    /// Asks a container how it is, and adds that to what is known of it.
    async fn study(&mut self, slot: Slot, found: &Inspected) {
        self.known(slot).begin(found, Instant::now());
        let runs = found.state == RunState::Running;
        // 255 may be a token that cloudflared does not take: that must not be started again.
        let is_of_interest = runs || found.state == RunState::Restarting || found.exit_code == 255;
        if !is_of_interest {
            return;
        }
        let place = asked_at(found, &self.config.network);
        // It serves as before and only cannot be asked: that is no reason for its successor to take over in haste.
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
        // What makes it look stopped may be the end of the start before.
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

    /// Whether it began on the tunnel's network and is not on it any more: it was taken from it, or that was removed.
    fn has_lost_network(&self, found: &Inspected) -> bool {
        let network = &self.config.network;
        found.network_mode == *network && !found.networks.contains_key(network)
    }

    /// Reads what its other pages say, no more often than is needed.
    async fn read_facts(&mut self, slot: Slot, address: &str, readiness: &Readiness) {
        let ready = match readiness {
            Readiness::Ready { connections, .. } => Some(*connections),
            Readiness::NotReady | Readiness::Silent => None,
        };
        let every = if ready.is_some() { FACTS_EVERY } else { LOG_EVERY };
        let read = self.known(slot).facts_read;
        // What is counted at the moment in which it becomes ready is what later failures are compared with.
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
        // How it ended is said in the last moment.
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

    /// Publishes what is known. `acting`: a container is about to be made.
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
            // It may last for hours.
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
            // What still runs goes on running: the status tells of the traffic, the reason of what failed.
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

    /// Gives the view to whoever listens. When its status began is kept here.
    pub(super) fn tell(&self, mut view: View) {
        self.view.send_if_modified(|known| {
            // A master forgets the version that it knows when it is told none.
            view.version =
                view.version.take().or_else(|| known.version.clone()).or_else(|| self.config.image.version());
            let is_same = known.looked && known.status == view.status;
            view.since = if is_same { known.since } else { Some(Timestamp::now()) };
            let is_news = view.is_news(known);
            *known = std::mem::take(&mut view);
            is_news
        });
    }

    /// What is known of a container of ours, and says in the log what changed.
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

    /// When to look again at a container that Docker keeps running.
    fn pause(&mut self, slot: Slot) -> Duration {
        let known = self.known(slot);
        match known.verdict() {
            _ if known.is_unsettled(Instant::now()) => EAGER,
            Verdict::Ready => CALM,
            Verdict::Starting | Verdict::Unknown | Verdict::Stopped | Verdict::Sick(_) => PATIENT,
        }
    }

    /// What the acknowledgement of a decommission can say by now.
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

/// Name and id of the tunnel whose connector is there, and the one that is wanted, where that is another.
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

/// Where cloudflared is asked how it is: where it serves its metrics alone, or else on the tunnel's network.
pub(super) fn asked_at<'a>(found: &'a Inspected, network: &str) -> Option<&'a Endpoint> {
    match found.labels.get(METRICS_LABEL) {
        Some(metrics) => found.networks.get(metrics),
        // One that is about to be replaced may be on another network.
        None => found.networks.get(network).or_else(|| found.networks.values().next()),
    }
}

/// Seconds since 1970 at the container's last start, from where its log is read.
pub(super) fn started(found: &Inspected) -> i64 {
    found.started_at.parse::<Timestamp>().map(|at| at.as_second()).unwrap_or_default()
}

/// Docker tells a log from a whole second on, so that the end of the start before may stand before this one's lines.
fn of_this_start(lines: &[String]) -> &[String] {
    let begins = lines.iter().rposition(|line| line.contains("Starting tunnel")).unwrap_or_default();
    lines.get(begins..).unwrap_or(lines)
}

/// The last line that the container wrote, without the token, should a version of cloudflared print it.
fn last_words(lines: &[String], token: Option<&Token>) -> String {
    let last = lines.last().map(String::as_str).unwrap_or("(none)");
    // The time at its beginning would make each line another one.
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
