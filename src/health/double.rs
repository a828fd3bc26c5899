//! A host in memory for the supervisor's tests: containers that follow a script, a clock that can be paused, and a
//! crash of the agent at any call.

use std::collections::{BTreeMap, HashMap};
use std::future::pending;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::{Instant, sleep};

use super::classify::Tries;
use super::host::Host;
use super::probe::{Facts, Readiness};
use crate::channels::{OwnContainer, Traffic};
use crate::config::ImageRef;
use crate::docker::Samples as _;
use crate::docker::{
    Container, DockerError, Endpoint, Health, Inspected, JOINED, LastCheck, METRICS_LABEL, MetricsPlace, Parting,
    RunState, SPEC_LABEL, Spec,
};
use crate::state::AgentId;

/// A connector's container as an inspection shows it.
pub(super) fn container(state: RunState, hash: Option<&str>) -> Inspected {
    Inspected {
        id: "c".into(),
        name: "tunnel".into(),
        state,
        image: "cloudflare/cloudflared:1".into(),
        command: ["cloudflared", "--no-autoupdate", "tunnel", "run"].map(str::to_owned).into(),
        env_names: vec!["TUNNEL_TOKEN".into()],
        labels: hash.map(|hash| HashMap::from([(SPEC_LABEL.into(), hash.into())])).unwrap_or_default(),
        networks: BTreeMap::from([("net".into(), Endpoint::default())]),
        network_mode: "net".into(),
        ..Inspected::blank()
    }
}

/// How the connectors of one token behave.
#[derive(Debug, Clone)]
pub(super) struct Behaviour {
    /// Time from a start to the first connection; `None` for never.
    pub(super) ready_after: Option<Duration>,
    /// Its pages do not answer.
    pub(super) silent: bool,
    /// What Docker's health check reports, instead of what it would find.
    pub(super) docker_says: Option<(Health, LastCheck)>,
    /// Its log lines.
    pub(super) log: Vec<&'static str>,
    /// The registrations in its metrics.
    pub(super) tries: Tries,
    /// How connectors behave that may use only HTTP/2, if differently.
    pub(super) over_http2: Option<Box<Behaviour>>,
}

impl Default for Behaviour {
    fn default() -> Self {
        Self {
            ready_after: Some(Duration::from_secs(1)),
            silent: false,
            docker_says: None,
            log: Vec::new(),
            tries: Tries::default(),
            over_http2: None,
        }
    }
}

/// The host. Clones share one world.
#[derive(Debug, Clone, Default)]
pub(super) struct Double {
    world: Arc<Mutex<World>>,
    died: Arc<Notify>,
}

/// What exists, and what has happened.
#[derive(Debug, Default)]
pub(super) struct World {
    pub(super) containers: BTreeMap<String, Fake>,
    /// By token. The connectors of any other token are healthy.
    pub(super) behaviours: BTreeMap<String, Behaviour>,
    /// The changing calls, in order: `create tunnel-next`.
    pub(super) calls: Vec<String>,
    /// Calls that get a 403, by their beginning.
    pub(super) refused: Vec<&'static str>,
    /// How many calls got a 403.
    pub(super) turned_away: usize,
    /// Calls that fail with a 500, by their beginning.
    pub(super) failing: Vec<&'static str>,
    /// How often the last connector that served visitors was taken away.
    pub(super) gaps: u32,
    /// The agent dies at this changing call: before its effect, or after.
    pub(super) dies_at: Option<(usize, Moment)>,
    /// How often a connector was asked for its diagnosis.
    pub(super) diagnoses: usize,
    /// The image that the tag names here, and in its registry. `None` while the registry is away.
    pub(super) image: (String, Option<String>),
    pub(super) pulls: u32,
    /// An Engine that does not know `host-gateway`.
    pub(super) is_old: bool,
    /// What stands in front of Docker.
    pub(super) behind: Behind,
    /// When the edge went away, and when it came back: `None` while it is away. Containers started in between try it as
    /// cloudflared does, less and less often.
    outage: Option<(Instant, Option<Instant>)>,
    made: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Behind {
    OwnProxy,
    Nobody,
    #[default]
    Another,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Moment {
    Before,
    After,
}

#[derive(Debug, Clone)]
pub(super) struct Fake {
    pub(super) seen: Inspected,
    pub(super) token: String,
    /// It may use only HTTP/2.
    pub(super) http2: bool,
    started: Instant,
}

/// How long the edge takes to send visitors to a connector that is ready.
const EDGE_DELAY: Duration = Duration::from_secs(4);

impl World {
    fn behaviour(&self, token: &str) -> Behaviour {
        self.behaviours.get(token).cloned().unwrap_or_default()
    }

    fn behaviour_of(&self, fake: &Fake) -> Behaviour {
        let behaviour = self.behaviour(&fake.token);
        match behaviour.over_http2 {
            Some(ref other) if fake.http2 => (**other).clone(),
            _ => behaviour,
        }
    }

    /// Docker's health check of a container. It has a result a minute after the start.
    fn docker_says(&self, fake: &Fake) -> Option<(Health, LastCheck)> {
        let behaviour = self.behaviour_of(fake);
        let found = match (behaviour.silent, behaviour.ready_after) {
            (true, _) => (Health::Unhealthy, LastCheck::TimedOut),
            (false, None) => (Health::Unhealthy, LastCheck::NotReady),
            (false, Some(_)) => (Health::Healthy, LastCheck::Ready),
        };
        let has_found = fake.started.elapsed() > Duration::from_secs(60);
        behaviour.docker_says.or(has_found.then_some(found))
    }

    fn is_ready(&self, fake: &Fake) -> bool {
        self.ready_since(fake).is_some_and(|since| Instant::now() >= since)
    }

    fn ready_since(&self, fake: &Fake) -> Option<Instant> {
        let behaviour = self.behaviour_of(fake);
        let first = behaviour.ready_after.map(|after| fake.started + after)?;
        if fake.seen.state != RunState::Running || behaviour.silent {
            return None;
        }
        match self.outage {
            Some((went, None)) if Instant::now() >= went => None,
            Some((went, Some(back))) if first < back => {
                // Its tries since it lost the edge, or since its start.
                let mut at = first.max(went);
                let mut gap = Duration::from_secs(1);
                while at < back {
                    at += gap;
                    gap = (gap * 2).min(Duration::from_secs(64));
                }
                Some(at)
            }
            _ => Some(first),
        }
    }

    fn visited(&self) -> usize {
        let known = |fake: &&Fake| self.ready_since(fake).is_some_and(|since| Instant::now() >= since + EDGE_DELAY);
        self.containers.values().filter(known).count()
    }

    fn started_at(&mut self) -> String {
        self.made += 1;
        (jiff::Timestamp::now() + jiff::SignedDuration::from_nanos(self.made.into())).to_string()
    }

    /// The name of the container with exactly this id: a call that changes something must not take a name.
    fn name_of(&self, id: &str) -> String {
        let found = self.containers.iter().find(|(_, fake)| fake.seen.id == id);
        found.map_or_else(|| format!("nothing ({id})"), |(name, _)| name.clone())
    }

    pub(super) fn count(&self, call: &str) -> usize {
        self.calls.iter().filter(|made| made.starts_with(call)).count()
    }
}

impl Double {
    pub(super) fn world(&self) -> MutexGuard<'_, World> {
        self.world.lock().unwrap()
    }

    /// Waits for the call at which the agent dies.
    pub(super) async fn death(&self) {
        self.died.notified().await;
    }

    /// Makes one changing call.
    async fn change<T>(
        &self,
        call: String,
        effect: impl FnOnce(&mut World) -> Result<T, DockerError> + Send,
    ) -> Result<T, DockerError> {
        // Takes time as Docker does, so that two changes never share an instant.
        sleep(Duration::from_millis(50)).await;
        let (result, dies) = {
            let mut world = self.world();
            if world.refused.iter().any(|refused| call.starts_with(refused)) {
                world.turned_away += 1;
                return Err(DockerError::refusal());
            }
            if world.failing.iter().any(|failing| call.starts_with(failing)) {
                return Err(DockerError::failure());
            }
            let number = world.calls.len();
            world.calls.push(call);
            let moment = world.dies_at.filter(|(at, _)| *at == number).map(|(_, moment)| moment);
            if moment == Some(Moment::Before) {
                (None, true)
            } else {
                let before = world.visited();
                let result = effect(&mut world);
                if before > 0 && world.visited() == 0 {
                    world.gaps += 1;
                }
                (Some(result), moment == Some(Moment::After))
            }
        };
        match result {
            Some(result) if !dies => result,
            _ => {
                self.died.notify_one();
                pending().await
            }
        }
    }
}

fn absent() -> DockerError {
    DockerError::not_found()
}

impl Host for Double {
    async fn inspect(&self, name: &str) -> Result<Option<Inspected>, DockerError> {
        let world = self.world();
        let Some((name, fake)) = world.containers.iter().find(|(known, fake)| *known == name || fake.seen.id == name)
        else {
            return Ok(None);
        };
        let (health, last_check) = match world.docker_says(fake) {
            Some((health, check)) => (Some(health), Some(check)),
            None => (Some(Health::Starting), None),
        };
        Ok(Some(Inspected { name: name.clone(), health, last_check, ..fake.seen.clone() }))
    }
    async fn made(&self) -> Result<Vec<Container>, DockerError> {
        let world = self.world();
        let listed = world.containers.iter().map(|(name, fake)| Container {
            id: fake.seen.id.clone(),
            name: name.clone(),
            labels: fake.seen.labels.clone().into_iter().collect(),
            status: String::new(),
            image: String::new(),
        });
        Ok(listed.collect())
    }
    async fn log_start(&self, _: &str, _: i64, _: usize) -> Result<Vec<String>, DockerError> {
        Ok(vec!["2026-01-01T00:00:00Z INF Version 2025.9.0 (Checksum ab)".to_owned()])
    }
    async fn log_tail(&self, id: &str, _: i64, _: usize) -> Result<Vec<String>, DockerError> {
        let world = self.world();
        let fake = world.containers.get(&world.name_of(id)).ok_or_else(absent)?;
        Ok(world.behaviour_of(fake).log.iter().map(|line| (*line).to_owned()).collect())
    }
    async fn has_network(&self, _: &str) -> Result<bool, DockerError> {
        Ok(true)
    }
    async fn create_network(&self, name: &str, _: bool) -> Result<bool, DockerError> {
        self.change(format!("network {name}"), |_| Ok(true)).await
    }
    async fn connect(&self, network: &str, id: &str) -> Result<(), DockerError> {
        let name = self.world().name_of(id);
        self.change(format!("connect {name} {network}"), |world| {
            let fake = world.containers.get_mut(&name).ok_or_else(absent)?;
            let address = if fake.seen.state == RunState::Running { fake.seen.id.clone() } else { String::new() };
            let place = Endpoint { address, aliases: vec![JOINED.to_owned()], ..Endpoint::default() };
            fake.seen.networks.insert(network.to_owned(), place);
            Ok(())
        })
        .await
    }
    async fn place(&self, place: &MetricsPlace, id: &str) -> Result<(), DockerError> {
        let name = self.world().name_of(id);
        self.change(format!("place {name} {}", place.network), |world| {
            let fake = world.containers.get_mut(&name).ok_or_else(absent)?;
            let aliases = vec![place.name.clone()];
            fake.seen.networks.insert(place.network.clone(), Endpoint { aliases, ..Endpoint::default() });
            Ok(())
        })
        .await
    }
    async fn disconnect(&self, network: &str, id: &str) -> Result<(), DockerError> {
        let name = self.world().name_of(id);
        self.change(format!("disconnect {name} {network}"), |world| {
            drop(world.containers.get_mut(&name).ok_or_else(absent)?.seen.networks.remove(network));
            Ok(())
        })
        .await
    }
    async fn has_image(&self, _: &ImageRef) -> Result<bool, DockerError> {
        Ok(true)
    }
    async fn image_id(&self, _: &ImageRef) -> Result<Option<String>, DockerError> {
        Ok(Some(self.world().image.0.clone()))
    }
    async fn pull(&self, _: &ImageRef, _: impl FnMut(u64, u64) + Send) -> Result<(), DockerError> {
        sleep(Duration::from_secs(3)).await;
        let mut world = self.world();
        world.pulls += 1;
        world.image.0 = world.image.1.clone().ok_or_else(DockerError::not_found)?;
        Ok(())
    }
    async fn create(&self, name: &str, spec: &Spec) -> Result<String, DockerError> {
        self.change(format!("create {name}"), |world| {
            if world.containers.contains_key(name) {
                return Err(DockerError::taken());
            }
            if world.is_old && spec.host_gateway {
                return Err(DockerError::no_host_gateway());
            }
            let mut seen = container(RunState::Created, Some(&spec.hash()));
            world.made += 1;
            seen.id = format!("id-{}", world.made);
            seen.labels.extend(spec.labels.clone());
            seen.labels.extend(spec.metrics.iter().map(|place| (METRICS_LABEL.to_owned(), place.network.clone())));
            seen.networks = BTreeMap::from([(spec.network.clone(), Endpoint::default())]);
            let token = spec.token.expose().to_owned();
            let http2 = spec.options.get("TUNNEL_TRANSPORT_PROTOCOL").is_some_and(|protocol| protocol == "http2");
            let id = seen.id.clone();
            world.containers.insert(name.to_owned(), Fake { seen, token, http2, started: Instant::now() });
            Ok(id)
        })
        .await
    }
    async fn start(&self, id: &str) -> Result<(), DockerError> {
        let name = self.world().name_of(id);
        self.change(format!("start {name}"), |world| run(world, &name)).await
    }
    async fn stop(&self, id: &str, _: Duration) -> Result<(), DockerError> {
        // A connector without a connection ends at once.
        let (name, drains) = {
            let world = self.world();
            let name = world.name_of(id);
            let drains = world.containers.get(&name).is_some_and(|fake| world.is_ready(fake));
            (name, drains)
        };
        let drained = self
            .change(format!("stop {name}"), |world| {
                if let Some(fake) = world.containers.get_mut(&name) {
                    fake.seen.state = RunState::Exited;
                }
                Ok(())
            })
            .await;
        sleep(if drains { Duration::from_secs(3) } else { Duration::from_millis(200) }).await;
        drained
    }
    async fn restart(&self, id: &str, _: Duration) -> Result<(), DockerError> {
        let name = self.world().name_of(id);
        self.change(format!("restart {name}"), |world| run(world, &name)).await
    }
    async fn rename(&self, id: &str, to: &str) -> Result<(), DockerError> {
        let name = self.world().name_of(id);
        self.change(format!("rename {name}"), |world| {
            if world.containers.contains_key(to) {
                return Err(DockerError::taken());
            }
            let fake = world.containers.remove(&name).ok_or_else(absent)?;
            world.containers.insert(to.to_owned(), fake);
            Ok(())
        })
        .await
    }
    async fn remove(&self, id: &str) -> Result<(), DockerError> {
        let name = self.world().name_of(id);
        self.change(format!("remove {name}"), |world| {
            world.containers.remove(&name);
            Ok(())
        })
        .await
    }
    async fn readiness(&self, address: &str) -> Readiness {
        let (silent, ready) = {
            let world = self.world();
            let fake = world.containers.values().find(|fake| fake.seen.id == address);
            let Some(fake) = fake else { return Readiness::Silent };
            (world.behaviour_of(fake).silent, world.is_ready(fake))
        };
        if silent {
            sleep(Duration::from_secs(2)).await;
            return Readiness::Silent;
        }
        match ready {
            true => Readiness::Ready { connections: 4, connector: Some(address.to_owned()) },
            false => Readiness::NotReady,
        }
    }
    async fn facts(&self, address: &str) -> Option<Facts> {
        let world = self.world();
        let fake = world.containers.values().find(|fake| fake.seen.id == address)?;
        let behaviour = world.behaviour(&fake.token);
        let traffic = Some(Traffic { requests: 7, errors: 0 });
        let facts =
            Facts { version: Some("2025.9.0".into()), config_version: Some(1), traffic, tries: behaviour.tries };
        (!behaviour.silent).then_some(facts)
    }
    async fn protocol(&self, _: &str) -> Option<&'static str> {
        self.world().diagnoses += 1;
        Some("quic")
    }
    async fn goodbye(&self, lease: Duration, _: &[AgentId]) -> Parting {
        let mut world = self.world();
        // The agent recognizes anything but its own proxy and does not ask it.
        if world.behind != Behind::Another {
            world.calls.push(format!("goodbye {}", lease.as_secs()));
        }
        match world.behind {
            Behind::OwnProxy => Parting::Held(Box::pin(pending())),
            Behind::Nobody => Parting::Silent("nobody there".to_owned()),
            Behind::Another => Parting::Unknown,
        }
    }
    async fn own_container(&self, _: Option<&str>) -> Option<OwnContainer> {
        None
    }
}

fn run(world: &mut World, name: &str) -> Result<(), DockerError> {
    let started_at = world.started_at();
    let fake = world.containers.get_mut(name).ok_or_else(absent)?;
    (fake.seen.state, fake.seen.started_at, fake.started) = (RunState::Running, started_at, Instant::now());
    for place in fake.seen.networks.values_mut() {
        place.address.clone_from(&fake.seen.id);
    }
    Ok(())
}

impl Double {
    /// Changes how the connectors of a token behave, from now on.
    pub(super) fn behave(&self, token: &str, behaviour: Behaviour) {
        self.world().behaviours.insert(token.to_owned(), behaviour);
    }

    /// The edge goes away for every connector.
    pub(super) fn edge_goes(&self) {
        self.world().outage = Some((Instant::now(), None));
    }

    /// Keeps the first time: a later one would extend the outage, and connectors that serve would lose their connection
    /// at once.
    pub(super) fn edge_returns(&self) {
        if let Some((_, back)) = &mut self.world().outage {
            back.get_or_insert_with(Instant::now);
        }
    }

    /// How many connectors Cloudflare can send visitors to.
    pub(super) fn served(&self) -> usize {
        let world = self.world();
        world.containers.values().filter(|fake| world.is_ready(fake)).count()
    }

    /// The container ends and stays down until Docker or somebody starts it.
    pub(super) fn ends(&self, name: &str, code: i64) {
        if let Some(fake) = self.world().containers.get_mut(name) {
            (fake.seen.state, fake.seen.exit_code) = (RunState::Exited, code);
        }
    }

    /// Docker is restarting a container that ended with this code, as its restart policy says.
    pub(super) fn crash(&self, name: &str, code: i64) {
        let mut world = self.world();
        let started_at = world.started_at();
        if let Some(fake) = world.containers.get_mut(name) {
            (fake.seen.state, fake.seen.exit_code, fake.seen.started_at) = (RunState::Restarting, code, started_at);
            fake.seen.restarts += 1;
        }
    }

    /// The restarted container runs again.
    pub(super) fn starts_again(&self, name: &str) {
        run(&mut self.world(), name).unwrap();
    }
}
