//! Checks the surroundings of the tunnel container on this host: whether it can reach each labelled container, and
//! whether other connectors serve the same tunnel.
//!
//! Owns the verdicts and remembers which of them were logged. Publishes them as [`Ways`]: the page shows them, and the
//! supervisor connects the tunnel container to the networks in them. Decides and changes nothing. It only reads from
//! Docker, with its own calls, so nothing here delays or fails a report or the tunnel. Nothing is on disk: after a
//! crash it looks again and logs what it finds once more.
//!
//! A look inspects the containers one by one, and a limited number of them on a large host. The inventory, the tunnel,
//! Docker's events of networks and names, and a slow timer wake it. If something cannot be found out now, the last
//! verdict stays. The task also logs why a container is not published although it seems meant to be: labels that
//! nearly enable it, a missing service or hostname label, or a hostname that another container has as well.

use std::collections::{BTreeMap, VecDeque};
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep};
use tracing::{info, warn};

use crate::channels::{Inventory, View, Wanted, Ways};
use crate::config::TunnelConfig;
use crate::docker::Remedy as _;
use crate::docker::{Container, Docker, DockerError, Inspected};
use crate::labels::{Nearly, nearly};
use crate::pulse::rest;
use crate::retry::Trouble;
use crate::state::DesiredState;

mod glance;
mod memory;
mod reach;
mod replicas;
mod rivals;
mod service;
mod survey;
mod way;
pub(crate) use glance::{Verdict, glance};
use memory::{Memory, News, REMEMBERED};
use reach::Reach;
use replicas::replicas;
use rivals::{Rivalry, is_candidate, rivalry};
pub(crate) use rivals::{is_connector, tells_connector};
pub(crate) use service::named_host;
use survey::{Judged, Turn, survey};
pub(crate) use way::{DOCKERS_OWN, services};

/// Wait this long after a wake, to answer a burst with one look. A compose project that starts is a burst of events.
const SETTLE: Duration = Duration::from_millis(500);
/// The wait grows with the duration of a look, up to this. On a busy host with many containers, looks then take no
/// more than a fifth of the time.
const LONGEST_SETTLE: Duration = Duration::from_secs(30);
/// Time between two looks when nothing wakes the task.
const CALM: Duration = Duration::from_secs(300);
/// Time until the next look after a look that failed in part.
const AGAIN: Duration = Duration::from_secs(15);
/// Time until the next look while the supervisor has a network to connect.
const CONNECTING: Duration = Duration::from_secs(5);
/// Docker announces that a container joined a network before the container runs, so a look may come too early. After
/// such an event, look again after each of these waits.
const ECHOES: [Duration; 2] = [Duration::from_secs(3), Duration::from_secs(15)];
/// End a look after this many calls without an answer, at 20 s each.
const MOST_TIME_OUTS: u32 = 3;
/// Remember this many warnings about labels that nearly enable a container, to log each only once.
const MOST_TOLD: usize = 256;
/// Log this many characters of a label's key or value.
const MOST_LETTERS: usize = 40;
/// Name this many containers in one line.
const MOST_NAMES: usize = 10;

/// The task that looks around the tunnel container.
#[derive(Debug)]
pub struct Neighbours {
    docker: Arc<Docker>,
    config: TunnelConfig,
    inputs: Inputs,
    ways: watch::Sender<Ways>,
    memory: Memory,
    reach: Reach,
    turn: Turn,
    /// Warnings that were logged about labels that nearly enable: the container's name, and the problem.
    slips: VecDeque<(String, String)>,
    /// Shared hostnames that were logged, with when they were last shared, so that a restart is not logged again.
    shared: BTreeMap<String, Instant>,
    /// Whether this is Docker Desktop, once Docker has said so.
    desktop: Option<bool>,
    trouble: Trouble,
}

/// What wakes the task.
#[derive(Debug)]
pub struct Inputs {
    /// The labelled containers.
    pub inventory: watch::Receiver<Inventory>,
    /// The status of the tunnel.
    pub view: watch::Receiver<View>,
    /// The spec of the tunnel.
    pub wanted: watch::Receiver<Wanted>,
    /// Sent by the event task on Docker's events of networks, names and connectors.
    pub wake: mpsc::Receiver<()>,
}

impl Neighbours {
    /// Creates the task. It does not call Docker yet.
    pub fn new(docker: Arc<Docker>, config: TunnelConfig, inputs: Inputs, ways: watch::Sender<Ways>) -> Self {
        let trouble = Trouble::new("the look around the tunnel container");
        Self {
            docker,
            config,
            inputs,
            ways,
            memory: Memory::default(),
            reach: Reach::default(),
            turn: Turn::default(),
            slips: VecDeque::new(),
            shared: BTreeMap::new(),
            desktop: None,
            trouble,
        }
    }

    /// Looks around forever. Cancel-safe: it changes nothing.
    pub async fn run(mut self) -> Infallible {
        let (mut asked, mut echoes) = (true, [].iter());
        loop {
            let began = Instant::now();
            let looked = self.look(asked).await;
            let ways = self.memory.ways();
            self.ways.send_if_modified(|known| std::mem::replace(known, ways.clone()) != ways);
            let pause = match &looked {
                Ok(()) => {
                    self.trouble.ended();
                    let pause = if self.memory.waits() { CONNECTING } else { CALM };
                    let pause = self.reach.due_in().unwrap_or(CALM).min(pause);
                    let pause = echoes.next().copied().unwrap_or(CALM).min(pause);
                    if self.turn.goes_on() { Duration::ZERO } else { pause }
                }
                Err(error) => {
                    // The event task already logs that Docker is away.
                    if !matches!(error, DockerError::Unreachable { .. }) {
                        self.trouble.failed(&format_args!("fails, since Docker {error}"), error.remedy());
                    }
                    AGAIN
                }
            };
            let settle = (began.elapsed() * 4).clamp(SETTLE, LONGEST_SETTLE);
            // Going on with a look over many containers does not start a new one.
            let reason = self.inputs.rung(pause).await;
            asked = reason != Reason::Time || !self.turn.goes_on();
            if reason == Reason::Event {
                echoes = ECHOES.iter();
            }
            sleep(settle).await;
        }
    }

    /// Looks around once, as far as Docker answers. Returns the first failure. With `anew`, all containers get a turn
    /// again.
    async fn look(&mut self, anew: bool) -> Result<(), DockerError> {
        let (inventory, wanted) = self.inputs.take();
        if anew {
            self.turn.all(inventory.containers.len());
        }
        let running = self.docker.list_running().await?;
        self.tell_slips(&running);
        let mut failures = Failures::default();
        self.look_for_rivals(&running, &wanted, &mut failures).await?;
        // While the inventory may be incomplete, judge nothing and forget nothing.
        if inventory.complete {
            self.tell_replicas(&inventory);
            self.look_at_ways(&running, &inventory, &mut failures).await?;
        }
        failures.first.map_or(Ok(()), Err)
    }

    async fn look_for_rivals(
        &mut self,
        running: &[Container],
        wanted: &Wanted,
        failures: &mut Failures,
    ) -> Result<(), DockerError> {
        let own = [self.config.container_name.clone(), self.config.successor_name()];
        let runs = wanted.state == DesiredState::Running && wanted.decommission.is_none();
        let (mut rivals, mut found) = (BTreeMap::new(), BTreeMap::new());
        if let Some(id) = wanted.id.as_ref().filter(|_| runs) {
            for candidate in running.iter().filter(|listed| is_candidate(listed, &own)) {
                let Some(seen) = failures.set_aside(self.docker.inspect(&candidate.id).await)? else {
                    let known = self.memory.rival(&candidate.id).cloned();
                    rivals.extend(known.map(|name| (candidate.id.clone(), name)));
                    continue;
                };
                let Some(seen) = seen else { continue };
                if let Some(rivalry) = rivalry(&seen, &own, id, wanted.name.as_deref()) {
                    rivals.insert(seen.id.clone(), seen.name.clone());
                    found.insert(seen.id.clone(), (rivalry, seen));
                }
            }
        }
        for id in self.memory.learn_rivals(rivals) {
            if let Some((rivalry, rival)) = found.get(&id) {
                tell_rival(*rivalry, rival);
            }
        }
        Ok(())
    }

    async fn look_at_ways(
        &mut self,
        running: &[Container],
        inventory: &Inventory,
        failures: &mut Failures,
    ) -> Result<(), DockerError> {
        self.memory.forget_all_but(|id| inventory.containers.contains_key(id));
        self.reach.forget_all_but(|id| inventory.containers.contains_key(id));
        let mut all: Vec<Judged> = Vec::new();
        let labelled = (&inventory.containers, &mut self.turn);
        let judged = |judged| all.push(judged);
        let looked = survey(&self.docker, &self.config, &mut self.desktop, running, labelled, failures, judged).await;
        // Verdicts from before a failure are still valid.
        self.reach.try_out(&all, looked.as_ref().ok().copied().flatten()).await;
        for judged in all {
            let way = self.reach.settle(&judged);
            if let Some(news) = self.memory.learn(&judged.id, &judged.name, way, judged.networks) {
                tell(&judged.name, news);
            }
        }
        if matches!(looked, Ok(Some(_))) && !self.turn.goes_on() && failures.first.is_none() {
            self.memory.know_all();
        }
        looked.map(drop)
    }

    fn tell_slips(&mut self, running: &[Container]) {
        for listed in running {
            let Some((problem, remedy)) = slip(listed) else { continue };
            let told = (listed.name.clone(), problem);
            if self.slips.contains(&told) {
                continue;
            }
            warn!(name = listed.name, remedy, "the container is not enabled, and seems to be meant to: {}", told.1);
            self.slips.push_back(told);
            if self.slips.len() > MOST_TOLD {
                self.slips.pop_front();
            }
        }
    }

    fn tell_replicas(&mut self, inventory: &Inventory) {
        let all = replicas(inventory.containers.values());
        self.shared.retain(|_, last| last.elapsed() < REMEMBERED);
        for (hostname, names) in all {
            if self.shared.insert(hostname.clone(), Instant::now()).is_some() {
                continue;
            }
            let names: Vec<_> = names.iter().take(MOST_NAMES).map(String::as_str).collect();
            info!(
                hostname,
                containers = names.join(", "),
                "containers share a hostname: the master keeps one rule for it, whose container and service are those of the one that it was told of last"
            );
        }
    }
}

impl Inputs {
    /// Takes what is known now. Later news wakes the task again.
    fn take(&mut self) -> (Inventory, Wanted) {
        while self.wake.try_recv().is_ok() {}
        self.view.mark_unchanged();
        (self.inventory.borrow_and_update().clone(), self.wanted.borrow_and_update().clone())
    }

    /// Waits for a reason to look. Cancel-safe: at most a wake-up is lost, and the next look makes up for it.
    async fn rung(&mut self, limit: Duration) -> Reason {
        // The other tasks outlive this one, except during a shutdown.
        tokio::select! {
            Ok(()) = self.inventory.changed() => Reason::News,
            Ok(()) = self.view.changed() => Reason::News,
            Ok(()) = self.wanted.changed() => Reason::News,
            Some(()) = self.wake.recv() => Reason::Event,
            () = rest(limit) => Reason::Time,
        }
    }
}

/// Why the task looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reason {
    /// Another task published something new.
    News,
    /// Something happened in Docker and may still be in progress.
    Event,
    /// The wait is over.
    Time,
}

/// The failures of one look.
#[derive(Debug, Default)]
struct Failures {
    first: Option<DockerError>,
    time_outs: u32,
}

impl Failures {
    /// Notes a failure that concerns one container and returns `None` for it. A failure that concerns all of them ends
    /// the look.
    fn set_aside<T>(&mut self, answer: Result<T, DockerError>) -> Result<Option<T>, DockerError> {
        let error = match answer {
            Ok(found) => return Ok(Some(found)),
            Err(error @ DockerError::Unreachable { .. }) => return Err(error),
            Err(error) => error,
        };
        self.time_outs += u32::from(matches!(error, DockerError::TimedOut { .. }));
        if self.time_outs >= MOST_TIME_OUTS {
            return Err(error);
        }
        self.first.get_or_insert(error);
        Ok(None)
    }
}

/// The problem with labels that seem meant to enable the container, and the remedy.
fn slip(listed: &Container) -> Option<(String, String)> {
    let Nearly { key, value, enables, right } = nearly(&listed.labels)?;
    let brief = |text: &str| text.chars().take(MOST_LETTERS).collect::<String>();
    let problem = match enables {
        true => format!("its label {:?} does not enable it", format!("{}={}", brief(key), brief(value))),
        false => format!("it has the label {:?} and none that enables it", brief(key)),
    };
    Some((problem, format!("set the label {right}")))
}

fn tell(name: &str, news: News) {
    match news {
        News::Open { service, network, note } => {
            info!(name, service, network, "the tunnel can reach the container");
            if let Some(note) = note {
                info!(name, "{note}");
            }
        }
        News::NoRule(kind) => info!(name, "no {kind} label, so the master makes no rule"),
        News::Blocked(block) => {
            warn!(name, remedy = block.remedy, "the tunnel cannot reach the container: {}", block.problem);
        }
        News::Unblocked => info!(name, "nothing is known any more that keeps the tunnel from the container"),
    }
}

fn tell_rival(rivalry: Rivalry, rival: &Inspected) {
    let runs = match rivalry {
        Rivalry::Certain => "runs",
        Rivalry::Likely => "seems to run",
    };
    let (name, image) = (&rival.name, &rival.image);
    warn!(
        "another container {runs} a connector of the same tunnel name={name} image={image}; visitors are led to both and see errors now and then: remove it with docker rm -f {name}"
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_about_one_container_is_set_aside_and_silence_ends_the_look() {
        let mut failures = Failures::default();
        assert_eq!(failures.set_aside(Ok(1)), Ok(Some(1)));
        let away = crate::docker::silent();
        assert_eq!(failures.set_aside::<()>(Err(away.clone())), Err(away));
        assert_eq!(failures.first, None);
    }

    #[tokio::test(start_paused = true)]
    async fn every_input_wakes_and_what_was_taken_does_not_wake_again() {
        let (inventory_tx, inventory) = watch::channel(Inventory::default());
        let (view_tx, view) = watch::channel(View::default());
        let (wanted_tx, wanted) = watch::channel(Wanted::default());
        let (wake_tx, wake) = mpsc::channel(1);
        let mut inputs = Inputs { inventory, view, wanted, wake };
        let causes: [&dyn Fn(); 4] = [
            &|| inventory_tx.send_modify(|inventory| inventory.complete = true),
            &|| view_tx.send_modify(|view| view.looked = true),
            &|| wanted_tx.send_modify(|wanted| wanted.redeploys += 1),
            &|| wake_tx.try_send(()).unwrap(),
        ];
        for (number, cause) in causes.iter().enumerate() {
            cause();
            let expected = if number == 3 { Reason::Event } else { Reason::News };
            assert_eq!(inputs.rung(CALM).await, expected, "cause {number}");
            cause();
            inputs.take();
            assert_eq!(inputs.rung(CALM).await, Reason::Time, "cause {number} was taken");
        }
        drop((inventory_tx, view_tx, wanted_tx, wake_tx));
        let began = Instant::now();
        assert_eq!(inputs.rung(CALM).await, Reason::Time);
        assert_eq!(began.elapsed(), CALM, "inputs that ended must not make it spin");
    }
}
