//! Plays the recordings: their lines, counters and readiness at their times. At each recorded try it asks the words or
//! the edge for a verdict, which decides the recording that goes on.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, sleep_until};

use crate::cli::TunnelEnv;
use crate::connector::{Connector, random_uuid};
use crate::log::fill;
use crate::metrics;
use crate::recording::{Chosen, Version, What};
use crate::scene::{Dns, Scene, Stand};
use crate::script::Behaviour;
use crate::transport::Protocol;
use crate::uplink::{self, Uplink, Uplinks};
use crate::wire::{Loss, Verdict};

/// Edge addresses that the log shows.
const EDGES: [(&str, &str); 4] =
    [("edge1", "198.41.192.7"), ("edge2", "198.41.200.13"), ("edge3", "198.41.192.27"), ("edge4", "198.41.200.33")];
/// How often to ask again while a dial is under way: an edge that comes back answers the next packet.
const PACKETS: Duration = Duration::from_millis(200);
/// How long to wait for the other ends: connections that are lost together are reported one by one.
const TOGETHER: Duration = Duration::from_millis(50);
/// Recorded seconds until `auto` gives up on a QUIC that never connected. The real program takes 114 to 164 s, and no
/// recording shows it within 130 s.
const FALLBACK_AFTER: f64 = 135.0;

/// Plays one process from start to exit.
pub struct Player {
    connector: Arc<Connector>,
    env: TunnelEnv,
    uplinks: Uplinks,
    /// The connection that a try registered, for the line that reports it.
    held: Option<Uplink>,
    scene: Scene,
    /// How far the recording has played, in recorded seconds, and when it got there.
    at: f64,
    since: Instant,
    /// Recorded time since the start of the process.
    lived: f64,
    /// Recorded time until which a dial is under way.
    dialing: Option<f64>,
    /// The edge's latest words.
    words: String,
    /// Whether the first try has been made.
    begun: bool,
    /// No try before this time.
    held_back: Option<Instant>,
    /// `unready` is in force: no tries.
    holding: bool,
    serving: Option<JoinHandle<()>>,
}

/// What ended a wait.
enum Turn {
    Due,
    Ended(usize, Loss),
    Said,
    Packet,
}

impl Player {
    /// A process at its start.
    ///
    /// # Errors
    /// When no recording shows such a start.
    pub fn new(connector: Arc<Connector>, env: TunnelEnv) -> Result<Self> {
        let behaviour = connector.behaviour();
        let dns = match (behaviour.dns_silent, behaviour.no_dns) {
            (true, _) => Some(Dns::Silent),
            (_, true) => Some(Dns::Fails),
            _ => None,
        };
        let scene = stand(&connector).start(dns)?;
        Ok(Self {
            connector,
            env,
            uplinks: Uplinks::new(),
            held: None,
            scene,
            at: 0.0,
            since: Instant::now(),
            lived: 0.0,
            dialing: None,
            words: String::new(),
            begun: false,
            held_back: None,
            holding: false,
            serving: None,
        })
    }

    /// A process that fails before its first try, as in the recording `name`.
    ///
    /// # Errors
    /// When no recording shows it.
    pub fn failing(connector: Arc<Connector>, env: TunnelEnv, name: &str) -> Result<Self> {
        let scene = stand(&connector).failed_start(name)?;
        let mut player = Self::new(connector, env)?;
        player.scene = scene;
        Ok(player)
    }

    /// Plays until the process ends, and returns its exit code. Cancel-safe: the next call continues where this one
    /// stopped.
    ///
    /// # Errors
    /// When something happens that no recording shows.
    pub async fn play(&mut self) -> Result<i32> {
        let mut script = self.connector.script.subscribe();
        let mut crash = None;
        let mut crash_at = Instant::now();
        loop {
            let behaviour = script.borrow_and_update().behaviour().clone();
            if crash != behaviour.crash() {
                // Count from when the word was set: another word in between does not postpone the exit.
                crash = behaviour.crash();
                crash_at = Instant::now() + crash.map_or(Duration::ZERO, |(after, _)| after);
            }
            self.connector.eat(behaviour.eat);
            let due = self.due(&behaviour);
            // Cancel-safe: all of them only wait.
            let turn = tokio::select! {
                () = sleep_until(crash_at), if crash.is_some() => {
                    return Ok(crash.map_or(0, |(_, code)| code));
                }
                _ = script.changed() => Turn::Said,
                (index, loss) = self.uplinks.ended() => Turn::Ended(index, loss),
                () = sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => Turn::Due,
                () = sleep(PACKETS), if self.dialing.is_some() => Turn::Packet,
            };
            self.pass(behaviour.speed);
            match turn {
                Turn::Due => {
                    if let Some(code) = self.next().await? {
                        return Ok(code);
                    }
                }
                Turn::Said => self.said()?,
                Turn::Ended(index, loss) => self.lost(index, loss).await?,
                Turn::Packet => {
                    let verdict = self.ask().await;
                    if !verdict.is_like(&self.scene.expects) {
                        self.come_to(verdict)?;
                    }
                }
            }
        }
    }

    /// When the next entry is due; `None` at the end of the scene and while `unready` holds.
    fn due(&self, behaviour: &Behaviour) -> Option<Instant> {
        if self.holding || self.scene.next > self.scene.end {
            return None;
        }
        let wait = (self.scene.recording.entries[self.scene.next].at - self.at).max(0.0) / behaviour.speed;
        let due = self.since + Duration::from_secs_f64(wait);
        Some(self.held_back.map_or(due, |until| until.max(due)))
    }

    /// Counts the time since the last turn as played.
    fn pass(&mut self, speed: f64) {
        let now = Instant::now();
        let passed = (now - self.since).as_secs_f64() * speed;
        let next = self.scene.recording.entries.get(self.scene.next).map_or(f64::MAX, |entry| entry.at);
        self.lived += passed;
        // Being late once must not make everything after it early.
        self.at = (self.at + passed).min(next.max(self.at));
        self.since = now;
    }

    /// Plays the next entry. Returns the exit code if the process ends with it.
    async fn next(&mut self) -> Result<Option<i32>> {
        let behaviour = self.connector.behaviour();
        let next = self.scene.next;
        if next == self.scene.end {
            match (&self.scene.recording.entries[next].what, self.scene.again) {
                (What::Exit(code), _) => return Ok(Some(*code)),
                // The state lasts, and the scene ends at a try: ask again.
                (What::Try(_), Some(again)) => {
                    let verdict = self.ask().await;
                    if !verdict.is_like(&self.scene.expects) {
                        self.come_to(verdict)?;
                        return Ok(None);
                    }
                    self.go(Scene { next: again + 1, ..self.scene.clone() });
                    self.begin_dial(&verdict);
                }
                (_, Some(again)) => self.go(Scene { next: again, ..self.scene.clone() }),
                (_, None) => self.scene.next += 1,
            }
            return Ok(None);
        }
        let entry = &self.scene.recording.entries[next];
        if let Some(line) = self.unwanted(next, &behaviour).await {
            // Still count what else happened at that moment.
            for entry in &self.scene.recording.entries[next..line] {
                let of_it = matches!(&entry.what, What::Add(name, _) if name.contains("register_"));
                if !of_it {
                    self.count(&entry.what, &behaviour);
                }
            }
            self.scene.next = line + 1;
            return Ok(None);
        }
        self.scene.next += 1;
        match &entry.what {
            What::Try(index) if *index < behaviour.connections => {
                if !self.begun {
                    if behaviour.unready {
                        self.scene.next = next;
                        self.holding = true;
                        return Ok(None);
                    }
                    self.begun = true;
                    if behaviour.ready_after > 0 {
                        self.scene.next = next;
                        self.held_back = Some(Instant::now() + Duration::from_millis(behaviour.ready_after));
                        return Ok(None);
                    }
                }
                self.held_back = None;
                self.attempt().await?;
            }
            What::Try(_) | What::Mark(_) | What::End => {}
            What::Line(level, text) => {
                if let Some(code) = self.line(*level, text).await? {
                    return Ok(Some(code));
                }
            }
            counted @ (What::Add(..) | What::Set(..) | What::Ready(_)) => self.count(counted, &behaviour),
            What::Exit(code) => return Ok(Some(*code)),
        }
        Ok(None)
    }

    /// Shows a recorded counter, gauge or readiness.
    fn count(&self, what: &What, behaviour: &Behaviour) {
        self.connector.show(|shown| match what {
            What::Add(name, value) => *shown.series.entry(name.clone()).or_default() += value,
            What::Set(name, value) => {
                let most = behaviour.connections.to_string().parse().unwrap_or(f64::MAX);
                let index =
                    name.split_once("connection_id=\"").and_then(|(_, rest)| rest.split('"').next()?.parse().ok());
                let is_none = index.is_some_and(|index: usize| index >= behaviour.connections);
                let value = if name == "cloudflared_tunnel_ha_connections" { value.min(most) } else { *value };
                if !is_none {
                    shown.series.insert(name.clone(), value);
                }
            }
            // A new connection is counted with its log line.
            What::Ready(count) => {
                while shown.connections.len() > *count {
                    shown.connections.pop_last();
                }
            }
            _ => {}
        });
    }

    /// Finds entries about a connection that this process does not make. Returns the log line that ends them.
    async fn unwanted(&mut self, from: usize, behaviour: &Behaviour) -> Option<usize> {
        let entries = &self.scene.recording.entries;
        let counts = |what: &What| matches!(what, What::Add(..) | What::Set(..) | What::Ready(_));
        let line = (from..self.scene.end).find(|i| !counts(&entries[*i].what))?;
        let What::Line(_, text) = &entries[line].what else { return None };
        if index_of(text).is_some_and(|index| index >= behaviour.connections) {
            return Some(line);
        }
        let index = index_of(text).filter(|_| text.starts_with("Registered tunnel connection"))?;
        let edge = behaviour.edge.clone()?;
        if self.connector.show(|shown| shown.connections.contains(&index)) {
            return None;
        }
        if self.held.is_none() {
            self.held = uplink::dial(&self.connector, &edge).await.1;
        }
        self.held.is_none().then_some(line)
    }

    /// Logs one line, and applies what it means for the rest of the process.
    async fn line(&mut self, level: Option<crate::log::Level>, text: &str) -> Result<Option<i32>> {
        if text.starts_with("Starting metrics server on") && self.serving.is_none() {
            match metrics::listen(self.env.metrics.as_deref()).await {
                Ok(listener) => {
                    let address = listener.local_addr()?;
                    let connector = self.connector.clone();
                    self.say(level, &fill(text, &[("metrics", &address.to_string())]));
                    self.serving = Some(tokio::spawn(async move { drop(metrics::serve(listener, connector).await) }));
                }
                Err(_) => {
                    // Play the recording from the line that reports the error.
                    let mut scene = stand(&self.connector).failed_start("15-metrics-port-taken")?;
                    scene.next = scene.recording.line("Error opening metrics server listener").unwrap_or(scene.next);
                    self.go(scene);
                }
            }
            return Ok(None);
        }
        if text.starts_with("Failed to dial") || text.contains("i/o timeout") {
            self.dialing = None;
        }
        if text.starts_with("Switching to fallback protocol") {
            self.connector.show(|shown| shown.protocol = Protocol::Http2);
        }
        if text.starts_with("Updated to new configuration") {
            self.connector.show(|shown| shown.configured = true);
        }
        if text.starts_with("Registered tunnel connection")
            && let Some(index) = index_of(text)
        {
            if let Some(uplink) = self.held.take() {
                self.uplinks.open(&self.connector, uplink, index);
            }
            self.connector.show(|shown| {
                shown.connections.insert(index);
                shown.connected_once = true;
            });
        }
        self.say(level, text);
        Ok(None)
    }

    /// Logs a recorded line as this process's own.
    fn say(&self, level: Option<crate::log::Level>, text: &str) {
        say(&self.connector, &self.env, &self.words, level, text);
    }

    /// The verdict of a try made now. Holds the connection if one was made.
    async fn ask(&mut self) -> Verdict {
        let behaviour = self.connector.behaviour();
        let protocol = self.connector.protocol();
        match (behaviour.verdict(protocol), &behaviour.edge) {
            (Some(verdict), _) => verdict,
            (None, None) => Verdict::Registered,
            (None, Some(edge)) => {
                if self.held.is_some() {
                    return Verdict::Registered;
                }
                let (verdict, uplink) = uplink::dial(&self.connector, edge).await;
                self.held = uplink;
                verdict
            }
        }
    }

    async fn attempt(&mut self) -> Result<()> {
        let mut verdict = self.ask().await;
        if self.falls_back(&verdict) {
            // All versions log the same line, and not every one was seen to fall back.
            let like = Stand { version: Version::V2025_9, ..stand(&self.connector) };
            let line = like.line("02-refused-at-start", "Switching to fallback protocol")?;
            if let What::Line(level, text) = line {
                self.line(*level, text).await?;
            }
            verdict = self.ask().await;
            return self.come_to(verdict);
        }
        if verdict.is_like(&self.scene.expects) {
            self.keep_words(&verdict);
            self.begin_dial(&verdict);
            return Ok(());
        }
        self.come_to(verdict)
    }

    /// Whether to give up on QUIC. The fallback was recorded only for refusals; how long it takes was measured.
    fn falls_back(&self, verdict: &Verdict) -> bool {
        let stand = stand(&self.connector);
        let lost = matches!(verdict, Verdict::Away | Verdict::Swallowed);
        let may = stand.chosen == Chosen::Auto && stand.protocol == Protocol::Quic && !stand.connected_once;
        lost && may && self.lived >= FALLBACK_AFTER
    }

    /// Switches to the recording that shows what follows a try with this verdict.
    fn come_to(&mut self, verdict: Verdict) -> Result<()> {
        let scene = match (&verdict, self.scene.back()) {
            (Verdict::Registered, Some(back)) => back,
            _ => stand(&self.connector).after_try(&verdict)?,
        };
        self.keep_words(&verdict);
        self.dialing = None;
        self.go(scene);
        self.begin_dial(&verdict);
        Ok(())
    }

    fn keep_words(&mut self, verdict: &Verdict) {
        if let Verdict::Refused(words) | Verdict::Failed(words) = verdict {
            self.words.clone_from(words);
        }
    }

    /// Notes how long a dial without an answer stays under way: the answer may still come.
    fn begin_dial(&mut self, verdict: &Verdict) {
        if matches!(verdict, Verdict::Away | Verdict::Swallowed) {
            let given_up = |what: &What| matches!(what, What::Line(_, text) if text.starts_with("Failed to dial") || text.contains("i/o timeout"));
            let entries = &self.scene.recording.entries;
            let end = self.scene.recording.find(self.scene.next, given_up).map(|i| entries[i].at);
            // A refused dial is over at once.
            self.dialing = end.filter(|end| *end > self.at + 1.0 && *end < self.at + 20.0);
        }
    }

    /// Applies a change of the words at run time.
    fn said(&mut self) -> Result<()> {
        let behaviour = self.connector.behaviour();
        if behaviour.unready {
            if !self.holding && self.begun {
                self.uplinks.cut();
                self.held = None;
                self.dialing = None;
                self.connector.show(|shown| shown.connections.clear());
                self.holding = true;
            }
            return Ok(());
        }
        if self.holding {
            self.holding = false;
            self.since = Instant::now();
            if self.begun {
                // Try again at once: play from the first try after a loss.
                let mut scene = stand(&self.connector).after_try(&Verdict::Registered)?;
                scene.next -= 1;
                self.go(scene);
                self.at = self.scene.recording.entries[self.scene.next].at;
                self.held_back = Some(self.since + Duration::from_millis(behaviour.ready_after));
            }
            return Ok(());
        }
        let served = self.connector.connections() > 0 && self.scene.expects == Verdict::Registered;
        match behaviour.verdict(self.connector.protocol()) {
            // cloudflared does not resolve names again while it knows addresses.
            Some(verdict) if served && verdict != Verdict::Unresolved => self.fault(&verdict),
            _ => Ok(()),
        }
    }

    async fn lost(&mut self, index: usize, loss: Loss) -> Result<()> {
        sleep(TOGETHER).await;
        self.since = Instant::now();
        if !self.uplinks.is_empty() {
            return self.lost_one(index).await;
        }
        // All connections are gone: drop the remaining reports of their ends.
        self.uplinks.cut();
        let verdict = match loss {
            Loss::Dropped => Verdict::Refused(String::new()),
            Loss::Away => Verdict::Away,
            Loss::Swallowed => Verdict::Swallowed,
        };
        self.fault(&verdict)
    }

    /// Handles the loss of one of several connections, as recorded, up to the next try.
    async fn lost_one(&mut self, index: usize) -> Result<()> {
        let behaviour = self.connector.behaviour();
        let recording = stand(&self.connector).lost_one()?;
        let end = recording.after_try(0);
        for entry in &recording.entries[..end] {
            if let What::Line(level, text) = &entry.what {
                self.say(*level, &text.replace("connIndex=0", &format!("connIndex={index}")));
            }
        }
        self.connector.show(|shown| shown.connections.remove(&index));
        let Some(edge) = behaviour.edge else { return Ok(()) };
        sleep(Duration::from_secs_f64(1.0 / behaviour.speed)).await;
        if let (_, Some(uplink)) = uplink::dial(&self.connector, &edge).await {
            self.held = Some(uplink);
            let line = stand(&self.connector)
                .line("01-healthy", &format!("Registered tunnel connection connIndex={index}"))?;
            if let What::Line(level, text) = line {
                self.line(*level, text).await?;
            }
        }
        self.since = Instant::now();
        Ok(())
    }

    /// Handles the loss of all connections.
    fn fault(&mut self, verdict: &Verdict) -> Result<()> {
        let scene = stand(&self.connector).fault(verdict)?;
        self.uplinks.cut();
        self.held = None;
        self.dialing = None;
        self.keep_words(verdict);
        self.go(scene);
        Ok(())
    }

    fn go(&mut self, scene: Scene) {
        self.at = scene.recording.entries[scene.next].at;
        if scene.next > 0 {
            // The entries before it were already played here.
            self.at = self.at.min(scene.recording.entries[scene.next - 1].at);
        }
        self.since = Instant::now();
        self.scene = scene;
    }

    /// Drains as recorded, for at most `grace`. `hurry` resolves at a second signal, which cuts everything.
    ///
    /// # Errors
    /// When no recording shows it.
    pub async fn stop(mut self, signal: &str, grace: Duration, hurry: impl Future<Output = ()>) -> Result<i32> {
        let recording = stand(&self.connector).stop()?;
        let behaviour = self.connector.behaviour();
        self.held = None;
        let served = self.connector.shown().connections;
        let entries = &recording.entries;
        let drained = recording.line("Unregistered tunnel connection").unwrap_or(0);
        let closing = (drained..entries.len())
            .find(|i| matches!(&entries[*i].what, What::Line(_, text) if index_of(text).is_some() && !text.starts_with("Unregistered")))
            .unwrap_or(entries.len() - 1);
        let last = (closing..entries.len())
            .find(|i| matches!(&entries[*i].what, What::Line(_, text) if index_of(text).is_none()))
            .unwrap_or(entries.len() - 1);
        for entry in &entries[..closing] {
            match &entry.what {
                What::Line(level, text) if index_of(text).is_none_or(|index| served.contains(&index)) => {
                    self.say(*level, &text.replace("terminated", signal));
                }
                What::Add(name, value) if !served.is_empty() => {
                    self.connector.show(|shown| *shown.series.entry(name.clone()).or_default() += value);
                }
                _ => {}
            }
        }
        self.connector.show(|shown| shown.connections.clear());
        if !served.is_empty() {
            self.uplinks.unregister(behaviour.drain);
            // Log these connections' last lines, in the recorded order.
            let close = |player: &Self, closed: &BTreeSet<usize>| {
                for entry in &entries[closing..last] {
                    if let What::Line(level, text) = &entry.what
                        && index_of(text).is_some_and(|index| closed.contains(&index))
                    {
                        player.say(*level, text);
                    }
                }
            };
            let recorded = entries[closing].at - entries[drained].at;
            let linger =
                behaviour.drain.map_or(Duration::from_secs_f64(recorded / behaviour.speed), Duration::from_millis);
            let drain = async {
                if self.uplinks.is_empty() {
                    // No real connections: wait as long as the edge takes to close them.
                    sleep(linger).await;
                    close(&self, &served);
                }
                for _ in 0..self.uplinks.len() {
                    let (index, _) = self.uplinks.ended().await;
                    close(&self, &BTreeSet::from([index]));
                }
            };
            tokio::select! {
                () = drain => {}
                () = sleep(grace) => {}
                () = hurry => return Ok(CUT_SHORT),
            }
        }
        for entry in &entries[last..] {
            if let What::Line(level, text) = &entry.what
                && (!served.is_empty() || !text.starts_with("no more connections"))
            {
                self.say(*level, text);
            }
        }
        Ok(0)
    }
}

/// Exit code 128 + SIGTERM, as a shell reports it.
const CUT_SHORT: i32 = 143;

fn stand(connector: &Connector) -> Stand {
    let (protocol, connected_once) = connector.show(|shown| (shown.protocol, shown.connected_once));
    Stand { version: connector.version(), chosen: connector.chosen, protocol, connected_once }
}

/// The index of the connection that a line is about.
fn index_of(text: &str) -> Option<usize> {
    let (_, rest) = text.split_once("connIndex=")?;
    rest.chars().take_while(char::is_ascii_digit).collect::<String>().parse().ok()
}

fn say(connector: &Connector, env: &TunnelEnv, words: &str, level: Option<crate::log::Level>, text: &str) {
    let behaviour = connector.behaviour();
    let (id, connection) = (connector.id.to_string(), random_uuid().to_string());
    let (config, environment) = (behaviour.config_version.to_string(), env.shown());
    let mut values = vec![
        ("tunnel", connector.tunnel_id.as_str()),
        ("connector", &id),
        ("connection", &connection),
        ("version", &behaviour.version),
        ("config", &config),
        ("environment", &environment),
        ("words", words),
        ("source", "172.17.0.2"),
        ("metrics", env.metrics.as_deref().unwrap_or("0.0.0.0:20241")),
        ("token_file", env.token_file.as_deref().unwrap_or_default()),
    ];
    values.extend(EDGES);
    let text = fill(text, &values);
    match level {
        Some(level) => connector.log.say(level, text),
        None => connector.log.bare(text),
    }
}

/// Logs a request that the origin refused, as recorded, and returns what the visitor sees.
pub(crate) fn origin_refused(connector: &Connector) -> String {
    for words in ["error=\"Unable to reach the origin service", "Request failed"] {
        if let Ok(What::Line(level, text)) = stand(connector).line("14-origin-refuses", words) {
            say(connector, &TunnelEnv::default(), "", *level, text);
        }
    }
    "502".to_owned()
}
