//! Sends SIGKILL at hundreds of random moments around the delivery of commands. Afterwards the disk must hold either
//! the state from before or the state after the whole reply, and nothing else. The test computes the expected state
//! itself, without the agent's code.

use std::time::{Duration, Instant};

use dockflare_dev_master::{DevMaster, Fault, Protocol, Route, tunnel_token};
use futures_util::future::join_all;
use serde_json::{Map, Value, json};
use testkit::AgentProcess;

use crate::desk::{BOTH, Desk, stop};
use crate::support::SOON;

/// Kills per desk with tunnel commands: 200, or `TEST_KILLS`. There are two such desks per protocol.
fn kills() -> usize {
    testkit::number("TEST_KILLS", 200) as usize
}

/// Kills per desk with decommissions. There is one such desk per protocol.
fn kills_leaving() -> usize {
    kills() / 2
}

/// A command, as the test models it.
#[derive(Debug, Clone)]
enum Order {
    Start(Tunnel),
    /// Restarts the tunnel that the master has assigned when it queues the command.
    Restart(Option<Tunnel>),
    Stop,
    /// Ingress rules for this host name.
    Rules(String),
    Prepare(String),
    Finalize(String),
}

#[derive(Debug, Clone, PartialEq)]
struct Tunnel {
    id: String,
    name: String,
    /// Empty in the files once the tunnel is stopped.
    token: String,
}

impl Tunnel {
    fn new() -> Self {
        let id = format!("{:016x}", fastrand::u64(..));
        Self { name: format!("edge-{id}"), token: tunnel_token("account", &id, "c2VjcmV0"), id }
    }
}

/// The parts of both files that commands change.
#[derive(Debug, Clone, Default, PartialEq)]
struct Files {
    tunnel: Option<Tunnel>,
    desired: String,
    redeploys: u64,
    rules: Option<String>,
    /// The phase and the operation.
    tombstone: Option<(String, String)>,
}

impl Files {
    /// Reads both files. Fails the test if a file exists and is not complete JSON.
    fn read(desk: &Desk) -> Self {
        let parsed = |name: &str| -> Option<Map<String, Value>> {
            let text = std::fs::read(desk.path(name)).ok()?;
            Some(serde_json::from_slice(&text).unwrap_or_else(|error| panic!("{name} is torn ({error}): {text:?}")))
        };
        let state = parsed("tunnel_state.json").unwrap_or_default();
        let text = |key: &str| state.get(key).and_then(Value::as_str).map(str::to_owned);
        let tunnel = || Some(Tunnel { id: text("id")?, name: text("name")?, token: text("token").unwrap_or_default() });
        let rules = state.get("pending_ingress").and_then(|rules| rules["r"]["hostname"].as_str()).map(str::to_owned);
        let tombstone = parsed("decommission.json");
        let of_tombstone = |key: &str| Some(tombstone.as_ref()?.get(key)?.as_str()?.to_owned());
        assert_ne!(state.get("unclaimed"), Some(&json!(true)), "the master knows this agent");
        Self {
            tunnel: tunnel(),
            desired: text("desired_state").unwrap_or_else(|| "unknown".to_owned()),
            redeploys: state.get("redeploys").and_then(Value::as_u64).unwrap_or_default(),
            rules,
            tombstone: of_tombstone("phase").zip(of_tombstone("operation_id")),
        }
    }

    fn adopt(&mut self, tunnel: &Tunnel) {
        if self.tunnel.as_ref().map(|known| &known.id) != Some(&tunnel.id) {
            self.rules = None;
        }
        self.tunnel = Some(tunnel.clone());
        self.desired = "running".to_owned();
    }

    /// The files after the agent has carried out a whole reply.
    fn after(&self, orders: &[Order]) -> Self {
        let mut files = self.clone();
        for order in orders {
            match order {
                Order::Prepare(operation) | Order::Finalize(operation) => {
                    let finalized = files.tombstone.as_ref().is_some_and(|(phase, _)| phase == "finalized");
                    let phase = if matches!(order, Order::Finalize(_)) || finalized { "finalized" } else { "prepared" };
                    files.tombstone = Some((phase.to_owned(), operation.clone()));
                    files.desired = "stopped".to_owned();
                    if phase == "finalized" {
                        (files.tunnel, files.rules) = (None, None);
                    }
                }
                _ if files.tombstone.is_some() => {}
                Order::Start(tunnel) => files.adopt(tunnel),
                Order::Restart(tunnel) => {
                    files.adopt(tunnel.as_ref().unwrap());
                    files.redeploys += 1;
                }
                Order::Stop => {
                    files.desired = "stopped".to_owned();
                    if let Some(tunnel) = &mut files.tunnel {
                        tunnel.token.clear();
                    }
                }
                Order::Rules(host) => files.rules = Some(host.clone()),
            }
        }
        files
    }

    /// The files after a registration with a v1 master, which recovers a lost start command.
    fn recovered(&self, assigned: Option<&Tunnel>) -> Self {
        let mut files = self.clone();
        let is_known = |tunnel: &&Tunnel| {
            let known = files.tunnel.as_ref();
            known == Some(*tunnel)
                || known
                    .is_some_and(|known| known.id == tunnel.id && known.token.is_empty() && files.desired == "stopped")
        };
        if let Some(tunnel) = assigned.filter(|tunnel| !is_known(tunnel))
            && files.tombstone.is_none()
        {
            files.adopt(tunnel);
        }
        files
    }

    fn without_rules(&self) -> Self {
        Self { rules: None, ..self.clone() }
    }
}

/// Whether the files show the result of a command.
type Reached = fn(&Files) -> bool;

/// Counts what the kills hit.
#[derive(Debug, Default)]
struct Tally {
    kills: usize,
    /// The agent was gone before the master delivered the commands, so the master still has them.
    not_fetched: usize,
    /// Delivered but not on disk. The commands are lost unless the protocol can recover them.
    before_the_write: usize,
    /// The tombstone was on disk, and the state was not yet.
    between_the_writes: usize,
    after_the_write: usize,
    /// Lost starts that a registration recovered.
    recovered: usize,
    leftovers: usize,
}

impl Tally {
    fn add(mut self, other: &Self) -> Self {
        self.kills += other.kills;
        self.not_fetched += other.not_fetched;
        self.before_the_write += other.before_the_write;
        self.between_the_writes += other.between_the_writes;
        self.after_the_write += other.after_the_write;
        self.recovered += other.recovered;
        self.leftovers += other.leftovers;
        self
    }
}

/// One data folder, the agents that run on it one after the other, and what is certain about it.
struct Round {
    desk: Desk,
    protocol: Protocol,
    id: Option<String>,
    /// The files as found after the last kill.
    files: Files,
    assigned: Option<Tunnel>,
    /// Queued at the master and not delivered.
    queued: Vec<Order>,
    tally: Tally,
    /// Restarts that reached the disk.
    restarts: u64,
}

impl Round {
    async fn new(protocol: Protocol) -> Self {
        let desk = Desk::with(DevMaster::builder().protocol(protocol).account("account")).await.unwrap();
        let files = Files::read(&desk);
        let (tally, queued) = Default::default();
        Self { desk, protocol, id: None, files, assigned: None, queued, tally, restarts: 0 }
    }

    /// Starts an agent and waits until the master holds its first request for commands. By then the agent has finished
    /// what the last one left, and this checks that it did.
    async fn agent(&mut self) -> AgentProcess {
        self.desk.master.fault(Route::Commands, Fault::Hold, 1);
        let agent = self.desk.agent().unwrap();
        let held = |known: &dockflare_dev_master::Snapshot| (known.faults == 0).then_some(());
        self.desk.master.wait_for("a held request for commands", SOON, held).await.unwrap();
        let mut expected = self.files.clone();
        if self.protocol == Protocol::V1 {
            expected = expected.recovered(self.assigned.as_ref());
            self.tally.recovered += usize::from(expected != self.files);
        }
        if let Some(host) = expected.rules.take_if(|_| self.files.tombstone.is_none()) {
            // After a lost start there is no tunnel that the rules could be for.
            let is_pushed = expected.tunnel.is_none() || self.is_pushed(&host);
            assert!(is_pushed, "rules that were on disk are still to be pushed");
        }
        self.files = Files::read(&self.desk);
        assert_eq!(self.files, expected, "{:?}: after the start\n{}", self.protocol, agent.log());
        if self.id.is_none() {
            self.id = Some(self.desk.file("agent_id.txt").unwrap());
        }
        agent
    }

    fn is_pushed(&self, host: &str) -> bool {
        self.desk.master.snapshot().pushed.iter().any(|pushed| pushed.config["ingress"][0]["hostname"] == host)
    }

    fn queue(&mut self, order: &Order) {
        let id = self.id.clone().unwrap();
        let push = |command: Value| self.desk.master.push_commands(&id, vec![command]).unwrap();
        let decommission = |phase: &str, operation: &str| {
            push(json!({
                "action": format!("{phase}_decommission"), "operation_id": operation,
                "command_id": format!("{operation}-{phase}"), "requested_self_action": "stop",
            }));
        };
        match order {
            Order::Start(tunnel) => {
                self.desk.master.enroll_with(&id, &tunnel.name, &tunnel.id, &tunnel.token).unwrap();
                self.assigned = Some(tunnel.clone());
            }
            Order::Restart(_) => {
                self.desk.master.redeploy(&id).unwrap();
                return self.queued.push(Order::Restart(self.assigned.clone()));
            }
            Order::Stop => push(json!({"action": "stop_tunnel"})),
            Order::Rules(host) => push(json!({"action": "update_tunnel_config", "rules": {
                "r": {"hostname": host, "service": "http://web:80", "status": "active"},
            }})),
            Order::Prepare(operation) => decommission("prepare", operation),
            Order::Finalize(operation) => decommission("finalize", operation),
        }
        self.queued.push(order.clone());
    }

    /// Lets the master deliver the orders, kills the agent at a random moment, and checks what it left.
    async fn kill_around(&mut self, orders: &[Order]) {
        let mut agent = self.agent().await;
        let polls = self.held_polls().len();
        orders.iter().for_each(|order| self.queue(order));
        // Most of the work happens within the first milliseconds.
        let micros = if fastrand::bool() { fastrand::u64(0..6_000) } else { fastrand::u64(0..40_000) };
        let too_early = fastrand::u8(0..10) == 0;
        if !too_early {
            let handed_out = Instant::now();
            self.desk.master.clear_faults();
            // This waits for no event: the test needs this exact moment.
            at(handed_out + Duration::from_micros(micros)).await;
        }
        agent.sigkill().unwrap();
        agent.wait_exit(SOON).await.unwrap();
        self.tally.kills += 1;

        let ended = |_: &_| Some(self.held_polls()).filter(|seen| seen.len() > polls);
        let seen = self.desk.master.wait_for("the end of the held request", SOON, ended).await.unwrap();
        let before = self.files.clone();
        let found = Files::read(&self.desk);
        let hidden = |entry: &std::fs::DirEntry| entry.file_name().as_encoded_bytes().starts_with(b".");
        self.tally.leftovers += std::fs::read_dir(self.desk.data.path()).unwrap().flatten().filter(hidden).count();
        if seen.last() != Some(&true) {
            assert_eq!(found, before, "nothing was handed out");
            self.tally.not_fetched += 1;
            return;
        }
        let orders = std::mem::take(&mut self.queued);
        let after = before.after(&orders);
        let between = Files { tombstone: after.tombstone.clone(), ..before.clone() };
        let pushed = after.rules.as_ref().is_some_and(|host| self.is_pushed(host));
        let stored = found == after || (pushed && found == after.without_rules());
        if stored {
            self.tally.after_the_write += 1;
            self.restarts += orders.iter().filter(|order| matches!(order, Order::Restart(_))).count() as u64;
        } else if found == before {
            self.tally.before_the_write += 1;
        } else if found == between {
            self.tally.between_the_writes += 1;
        } else {
            panic!("{:?}: from {before:#?} {orders:#?} made {found:#?}\n{}", self.protocol, agent.log());
        }
        // The agent must not report a tunnel that is not on disk.
        let told = self.desk.master.snapshot();
        let told = self.id.as_ref().and_then(|id| told.agents.get(id)?.tunnel_status.clone()?.name);
        let on_disk = found.tunnel.as_ref().map(|tunnel| &tunnel.name);
        let new = orders.iter().any(|order| matches!(order, Order::Start(new) if told.as_ref() == Some(&new.name)));
        assert!(stored || !new || told.as_ref() == on_disk, "{told:?} was told to the master and is not on disk");
        self.files = found;
    }

    /// For each held request for commands that has ended, whether the master answered it.
    fn held_polls(&self) -> Vec<bool> {
        let asked = self.desk.master.requests();
        let held =
            asked.iter().filter(|request| request.route == Route::Commands && request.fault == Some(Fault::Hold));
        held.map(|request| request.status == Some(200)).collect()
    }

    /// Runs one more agent, which nobody kills. It must end with the expected state on disk and leave the folder clean.
    async fn settle(mut self) -> Tally {
        let mut agent = self.agent().await;
        let orders = std::mem::take(&mut self.queued);
        self.desk.master.clear_faults();
        let expected = self.files.after(&orders).without_rules();
        self.restarts += orders.iter().filter(|order| matches!(order, Order::Restart(_))).count() as u64;
        // Wait for two more polls: by then the first reply is on disk and its rules are pushed. Without rules, the
        // files may look finished before the reply arrives.
        let id = self.id.clone().unwrap();
        let polls = |known: &dockflare_dev_master::Snapshot| known.agents[&id].polls;
        let enough = polls(&self.desk.master.snapshot()) + 2;
        let taken = self.desk.master.wait_for("two more polls", SOON, |known| (polls(known) >= enough).then_some(()));
        taken.await.unwrap();
        let there = async || (Files::read(&self.desk) == expected).then_some(());
        testkit::wait_until("what was wanted to be on disk", SOON, there).await.unwrap();
        stop(&mut agent).await.unwrap();
        assert_eq!(Files::read(&self.desk), expected);
        assert_eq!(expected.redeploys, self.restarts, "each restart that reached the disk counts once");
        let left = std::fs::read_dir(self.desk.data.path()).unwrap().flatten().map(|entry| entry.file_name());
        let mut left: Vec<_> = left.collect();
        left.sort();
        assert_eq!(left, ["agent.lock", "agent_id.txt", "tunnel_state.json"]);
        self.desk.assert_no_violations();
        self.tally
    }
}

/// Returns at this moment, more precisely than a timer, while other tasks go on.
async fn at(moment: Instant) {
    if let Some(long) = moment.checked_duration_since(Instant::now()).filter(|left| left.as_millis() > 3) {
        tokio::time::sleep(long - Duration::from_millis(2)).await;
    }
    while Instant::now() < moment {
        tokio::task::yield_now().await;
    }
}

/// A reply with tunnel commands.
fn some_orders() -> Vec<Order> {
    let (start, rules) = (Order::Start(Tunnel::new()), Order::Rules(format!("{:x}.example.com", fastrand::u64(..))));
    match fastrand::u8(0..8) {
        0 => vec![start],
        1 => vec![Order::Restart(None)],
        2 => vec![Order::Stop],
        3 => vec![rules],
        4 => vec![start, rules],
        5 => vec![Order::Restart(None), Order::Restart(None), rules],
        6 => vec![Order::Stop, start],
        _ => vec![start, Order::Stop, Order::Restart(None)],
    }
}

async fn tunnel_commands(protocol: Protocol) -> Tally {
    let mut round = Round::new(protocol).await;
    round.kill_around(&[Order::Start(Tunnel::new())]).await;
    while round.tally.kills < kills() {
        round.kill_around(&some_orders()).await;
    }
    round.settle().await
}

/// Ends each agent with its decommission. The master repeats both commands until the agent acknowledges them.
async fn decommissions(protocol: Protocol) -> Tally {
    let mut tally = Tally::default();
    while tally.kills < kills_leaving() {
        let mut round = Round::new(protocol).await;
        let operation = format!("{:x}", fastrand::u64(..));
        let steps: [(Order, Reached); 3] = [
            (Order::Start(Tunnel::new()), |files| files.desired == "running"),
            (Order::Prepare(operation.clone()), |files| files.tombstone.is_some() && files.desired == "stopped"),
            (Order::Finalize(operation), |files| {
                files.tombstone.as_ref().is_some_and(|(phase, _)| phase == "finalized") && files.tunnel.is_none()
            }),
        ];
        for (order, is_done) in steps {
            while !is_done(&round.files) && round.tally.kills < 3 * kills_leaving() {
                let orders = if round.queued.is_empty() { vec![order.clone()] } else { Vec::new() };
                round.kill_around(&orders).await;
            }
            assert!(is_done(&round.files), "{order:?} never reached the disk");
        }
        tally = tally.add(&round.tally);
    }
    tally
}

#[tokio::test]
async fn what_was_on_disk_when_the_agent_was_killed_is_what_was_delivered_and_nothing_between() {
    let began = Instant::now();
    let tunnels = join_all(BOTH.iter().chain(&BOTH).map(|&protocol| tunnel_commands(protocol)));
    let leaving = join_all(BOTH.map(decommissions));
    let (tunnels, leaving) = futures_util::future::join(tunnels, leaving).await;
    let sum = |tallies: &[Tally]| tallies.iter().fold(Tally::default(), Tally::add);
    let (tunnels, leaving) = (sum(&tunnels), sum(&leaving));
    println!("tunnel commands: {tunnels:?}\ndecommissions: {leaving:?}\nin {:.1?}", began.elapsed());
    assert!(tunnels.kills + leaving.kills >= 5 * kills() / 2);
}

/// v2 cannot recover a command that was delivered and lost. The operator sees an enrolled agent without a tunnel, and
/// uses Redeploy.
#[tokio::test]
async fn on_v2_an_enrolment_that_was_lost_with_its_reply_stays_lost_until_redeploy() {
    for fault in [Fault::LostReply, Fault::CutHalfway, Fault::Truncated] {
        let desk = Desk::new(Protocol::V2).await.unwrap();
        let mut agent = desk.agent().unwrap();
        let id = desk.registered(1).await.unwrap().id;
        // Set both at one instant, so that the damaged poll is the one with the command.
        desk.master.fault(Route::Commands, fault.clone(), 1);
        desk.master.enroll(&id, "edge").unwrap();
        let again = desk.master.wait_for("a poll after the damaged one", SOON, |known| {
            (known.faults == 0 && known.agents[&id].queued == 0).then_some(known.agents[&id].polls)
        });
        let polls = again.await.unwrap();
        let later = desk.master.wait_for("one more", SOON, |known| (known.agents[&id].polls > polls).then_some(()));
        later.await.unwrap();
        assert!(!desk.path("tunnel_state.json").exists(), "{fault:?}: nothing is made up");
        let shown = desk.master.snapshot().agents[&id].clone();
        assert_ne!(shown.tunnel_state(), Some("running"), "{fault:?}");
        assert_eq!(shown.tunnel.map(|tunnel| tunnel.name).as_deref(), Some("edge"), "enrolled all the same");

        desk.master.redeploy(&id).unwrap();
        let kept = async || desk.file("tunnel_state.json").ok().filter(|state| state.contains("\"running\""));
        let state = testkit::wait_until("the tunnel on disk", SOON, kept).await.unwrap();
        assert!(state.contains("\"redeploys\": 1"), "{fault:?}");
        stop(&mut agent).await.unwrap();
        desk.assert_no_violations();
    }
}
