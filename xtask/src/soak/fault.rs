//! The faults: their names, how each begins, and how it ends.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::ValueEnum as _;
use dockflare_dev_master::{Fault, Protocol, Route, Times};
use fastrand::Rng;
use serde_json::{Value, json};

use super::relay::Door;
use super::scene::Scene;

/// All kinds of faults, and the orders that may arrive in the middle of them. The soak deals them from a shuffled deck
/// that holds each kind once, so that it leaves none out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Kind {
    MasterStatus,
    MasterRetryAfter,
    MasterDelay,
    MasterHold,
    MasterCutBefore,
    MasterCutHalfway,
    MasterLostReply,
    MasterTruncated,
    MasterNotJson,
    MasterLoginRedirect,
    MasterPaused,
    SessionEnded,
    AgentForgotten,
    KeyRolled,
    OrderStart,
    OrderRestart,
    OrderStopAndStart,
    OrderNewToken,
    OrderIngress,
    DockerCut,
    DockerRefused,
    DockerSilent,
    ProxyKilled,
    TunnelKilled,
    TunnelStopped,
    TunnelRemoved,
    TunnelPaused,
    TunnelHung,
    TunnelUnready,
    TunnelCrashed,
    AgentKilled,
    AgentStopped,
    DiskRefuses,
}

use Kind::*;

/// What a fault acts on. At most one lasting fault acts on each of these at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Organ {
    Master,
    Key,
    Orders,
    Docker,
    Tunnel,
    Disk,
    None,
}

impl Kind {
    fn organ(self) -> Organ {
        match self {
            MasterHold | MasterPaused => Organ::Master,
            AgentForgotten | KeyRolled => Organ::Key,
            OrderStart | OrderRestart | OrderStopAndStart | OrderNewToken => Organ::Orders,
            DockerCut | DockerRefused | DockerSilent | ProxyKilled => Organ::Docker,
            TunnelKilled | TunnelStopped | TunnelRemoved | TunnelPaused | TunnelHung | TunnelUnready
            | TunnelCrashed => Organ::Tunnel,
            DiskRefuses => Organ::Disk,
            _ => Organ::None,
        }
    }
}

/// The lasting faults in force, and the deck with the next ones.
pub(crate) struct Faults {
    rng: Rng,
    deck: Vec<Kind>,
    lasting: Vec<(Kind, Instant)>,
    key: Option<String>,
    /// How many faults of each kind there were.
    pub(crate) count: Vec<u32>,
}

impl Faults {
    pub(crate) fn new(seed: u64) -> Self {
        let count = vec![0; Kind::value_variants().len()];
        Self { rng: Rng::with_seed(seed), deck: Vec::new(), lasting: Vec::new(), key: None, count }
    }

    pub(crate) fn total(&self) -> u32 {
        self.count.iter().sum()
    }

    pub(crate) fn of(&self, kind: Kind) -> u32 {
        self.count[kind as usize]
    }

    /// The kinds that never occurred.
    pub(crate) fn missing(&self) -> Vec<Kind> {
        Kind::value_variants()
            .iter()
            .zip(&self.count)
            .filter(|(_, count)| **count == 0)
            .map(|(kind, _)| *kind)
            .collect()
    }

    /// Begins the next fault in the deck that can begin now, if any.
    pub(crate) async fn strike(&mut self, scene: &mut Scene<'_>, may_end_the_agent: bool) -> Result<()> {
        if self.deck.is_empty() {
            self.deck = Kind::value_variants().to_vec();
            self.rng.shuffle(&mut self.deck);
        }
        let busy = |organ: Organ| organ != Organ::None && self.lasting.iter().any(|(kind, _)| kind.organ() == organ);
        let fits = |kind: &Kind| {
            let possible = match kind {
                ProxyKilled => scene.proxy.can_be_killed(),
                DiskRefuses => scene.disk.can_refuse(),
                // An agent that starts on a refusing disk logs that and exits.
                AgentKilled | AgentStopped => may_end_the_agent && !busy(Organ::Disk),
                SessionEnded | AgentForgotten | KeyRolled | OrderNewToken => scene.known().is_some(),
                _ => true,
            };
            possible && !busy(kind.organ())
        };
        let Some(at) = self.deck.iter().rposition(fits) else {
            self.deck.clear();
            return Ok(());
        };
        let kind = self.deck.remove(at);
        self.count[kind as usize] += 1;
        let lasts = self.begin(kind, scene).await.with_context(|| format!("at {kind:?}"))?;
        if let Some(lasts) = lasts {
            self.lasting.push((kind, Instant::now() + lasts));
        }
        Ok(())
    }

    /// Ends the faults that have lasted long enough.
    pub(crate) async fn relent(&mut self, scene: &mut Scene<'_>) -> Result<()> {
        while let Some(at) = self.lasting.iter().position(|(_, until)| *until <= Instant::now()) {
            let (kind, _) = self.lasting.remove(at);
            self.end(kind, scene).await.with_context(|| format!("at the end of {kind:?}"))?;
        }
        Ok(())
    }

    /// Ends all faults.
    pub(crate) async fn end_all(&mut self, scene: &mut Scene<'_>) -> Result<()> {
        self.lasting.iter_mut().for_each(|(_, until)| *until = Instant::now());
        self.relent(scene).await?;
        scene.master.clear_faults();
        Ok(())
    }

    fn seconds(&mut self, least: u64, most: u64) -> Duration {
        Duration::from_millis(self.rng.u64(least * 1000..=most * 1000))
    }

    /// Sets a fault of the master, on a random route and for a random number of requests.
    fn at_the_master(&mut self, scene: &mut Scene<'_>, kind: Kind, fault: Fault) {
        let route = [Route::Any, Route::Commands, Route::Events, Route::Register][self.rng.usize(..4)];
        let times = self.rng.u32(1..=4);
        // The master handles the request, but the reply does not arrive whole.
        let loses = matches!(fault, Fault::LostReply | Fault::CutHalfway | Fault::Truncated);
        scene.may_be_lost |= loses && matches!(route, Route::Any | Route::Commands);
        scene.say("fault", format_args!("{kind:?} on {times} request(s), route {route}: {fault:?}"));
        scene.master.fault(route, fault, times);
    }

    /// Begins a fault, and returns how long it lasts unless it is over at once.
    async fn begin(&mut self, kind: Kind, scene: &mut Scene<'_>) -> Result<Option<Duration>> {
        let agent = scene.known().map(|agent| agent.id);
        let tunnel = scene.tunnel.clone();
        let say = |scene: &Scene<'_>, lasts: Option<Duration>| match lasts {
            Some(lasts) => scene.say("fault", format_args!("{kind:?} for {:.1} s", lasts.as_secs_f64())),
            None => scene.say("fault", format_args!("{kind:?}")),
        };
        match kind {
            MasterStatus => {
                let status = [500, 502, 503, 504][self.rng.usize(..4)];
                self.at_the_master(scene, kind, Fault::status(status));
            }
            MasterRetryAfter => {
                let fault = if self.rng.bool() { Fault::code(429, "rate_limited") } else { Fault::status(503) };
                let after = self.rng.u32(1..=3).to_string();
                self.at_the_master(scene, kind, fault.retry_after(&after));
            }
            MasterDelay => {
                let delay = self.seconds(1, 6);
                self.at_the_master(scene, kind, Fault::delay(delay));
            }
            MasterCutBefore => self.at_the_master(scene, kind, Fault::CutBefore),
            MasterCutHalfway => self.at_the_master(scene, kind, Fault::CutHalfway),
            MasterLostReply => self.at_the_master(scene, kind, Fault::LostReply),
            MasterTruncated => self.at_the_master(scene, kind, Fault::Truncated),
            MasterNotJson => self.at_the_master(scene, kind, Fault::NotJson),
            MasterLoginRedirect => self.at_the_master(scene, kind, Fault::LoginRedirect),
            MasterHold => {
                let lasts = self.seconds(2, 8);
                say(scene, Some(lasts));
                scene.master.fault(Route::Any, Fault::Hold, Times::UntilCleared);
                return Ok(Some(lasts));
            }
            MasterPaused => {
                let lasts = self.seconds(2, 10);
                say(scene, Some(lasts));
                // A reply may be in flight.
                scene.may_be_lost = true;
                scene.master.pause().await?;
                return Ok(Some(lasts));
            }
            SessionEnded | AgentForgotten | KeyRolled => {
                let Some(agent) = agent else { return Ok(None) };
                let lasts = self.seconds(0, 3);
                say(scene, None);
                match kind {
                    SessionEnded => {
                        scene.master.end_session(&agent)?;
                        return Ok(None);
                    }
                    // The operator needs a moment to put the new key into the file.
                    KeyRolled => self.key = Some(scene.master.roll_key(&agent)?),
                    _ => {
                        scene.master.forget(&agent)?;
                        // Version 1 takes the agent as new. Version 2 refuses that key for good.
                        if scene.master.snapshot().protocol == Protocol::V1 {
                            return Ok(None);
                        }
                        self.key = Some(scene.master.generate_key("soak"));
                    }
                }
                return Ok(Some(lasts));
            }
            OrderStart | OrderRestart | OrderNewToken | OrderStopAndStart | OrderIngress => {
                say(scene, None);
                if kind == OrderNewToken {
                    scene.new_token();
                }
                // An agent that the master does not know gets everything when it enrolls.
                let Some(agent) = agent else { return Ok(None) };
                match kind {
                    OrderRestart => {
                        scene.note_order();
                        // The agent may be pending, and then this fails.
                        drop(scene.master.redeploy(&agent));
                    }
                    OrderIngress => scene.order(&agent, Scene::ingress(self.rng.u32(..100)))?,
                    OrderStopAndStart => {
                        scene.order(&agent, json!({ "action": "stop_tunnel" }))?;
                        return Ok(Some(self.seconds(1, 6)));
                    }
                    _ => scene.order_start(&agent)?,
                }
            }
            DockerCut => {
                say(scene, None);
                scene.relay.turn(Door::Open);
            }
            DockerRefused => {
                let lasts = self.seconds(1, 8);
                say(scene, Some(lasts));
                scene.relay.turn(Door::Refused);
                return Ok(Some(lasts));
            }
            DockerSilent => {
                // Sometimes stay silent for longer than the agent's calls wait.
                let lasts = if self.rng.u8(..4) == 0 { self.seconds(20, 25) } else { self.seconds(1, 8) };
                say(scene, Some(lasts));
                scene.relay.turn(Door::Silent);
                return Ok(Some(lasts));
            }
            ProxyKilled => {
                let lasts = self.seconds(1, 6);
                say(scene, Some(lasts));
                scene.proxy.kill().await?;
                return Ok(Some(lasts));
            }
            TunnelKilled | TunnelStopped | TunnelRemoved | TunnelCrashed => {
                let done = match kind {
                    TunnelKilled => scene.scope.kill(&tunnel, "SIGKILL").await,
                    TunnelStopped => scene.scope.stop(&tunnel, 5).await,
                    TunnelRemoved => scene.scope.rm(&tunnel).await,
                    _ => scene.scope.tell_stand_in(&tunnel, &json!({ "exit": 1 })).await,
                };
                // The container may be missing at this moment.
                scene.say("fault", format_args!("{kind:?}{}", if done.is_ok() { "" } else { " (there is none)" }));
            }
            TunnelPaused | TunnelHung | TunnelUnready => {
                // Sometimes last long enough for the agent to restart a hung connector.
                let lasts = if self.rng.u8(..4) == 0 { self.seconds(20, 40) } else { self.seconds(2, 10) };
                let done = match kind {
                    TunnelPaused => scene.scope.pause(&tunnel).await,
                    TunnelHung => scene.scope.tell_stand_in(&tunnel, &json!({ "hang": true })).await,
                    _ => scene.scope.tell_stand_in(&tunnel, &json!({ "unready": true })).await,
                };
                match done {
                    Ok(()) => {
                        say(scene, Some(lasts));
                        return Ok(Some(lasts));
                    }
                    Err(_) => scene.say("fault", format_args!("{kind:?} (there is none)")),
                }
            }
            AgentKilled => {
                say(scene, None);
                let arrived = scene.has_arrived();
                scene.kill_agent().await?;
                // The last order may not be on the agent's disk yet. Every earlier one must be.
                if arrived {
                    scene.is_kept()?;
                }
                scene.may_be_lost |= !arrived;
                tokio::time::sleep(self.seconds(0, 2)).await;
                let on_exit = self.on_exit();
                scene.start_agent(on_exit)?;
            }
            AgentStopped => {
                let arrived = scene.has_arrived();
                let took = scene.stop_agent().await?;
                if arrived {
                    scene.is_kept()?;
                }
                scene.say("fault", format_args!("{kind:?}, which took {:.1} s", took.as_secs_f64()));
                tokio::time::sleep(self.seconds(0, 2)).await;
                let on_exit = self.on_exit();
                scene.start_agent(on_exit)?;
            }
            DiskRefuses => {
                let lasts = self.seconds(2, 10);
                say(scene, Some(lasts));
                scene.disk.refuse()?;
                return Ok(Some(lasts));
            }
        }
        Ok(None)
    }

    async fn end(&mut self, kind: Kind, scene: &mut Scene<'_>) -> Result<()> {
        let tunnel = scene.tunnel.clone();
        match kind {
            MasterHold => scene.master.clear_faults(),
            MasterPaused => scene.master.resume().await?,
            AgentForgotten | KeyRolled => {
                if let Some(key) = self.key.take() {
                    scene.hand_over(&key)?;
                    scene.say("operator", "puts the new key into the agent's file");
                }
            }
            OrderStopAndStart => {
                if let Some(agent) = scene.known() {
                    scene.order_start(&agent.id)?;
                }
            }
            DockerRefused | DockerSilent => scene.relay.turn(Door::Open),
            ProxyKilled => scene.proxy.restart().await?,
            // The container may be another one by now, or missing.
            TunnelPaused => drop(scene.scope.unpause(&tunnel).await),
            TunnelHung => drop(scene.scope.tell_stand_in(&tunnel, &json!({ "hang": Value::Null })).await),
            TunnelUnready => drop(scene.scope.tell_stand_in(&tunnel, &json!({ "unready": Value::Null })).await),
            DiskRefuses => scene.disk.relent()?,
            _ => {}
        }
        Ok(())
    }

    fn on_exit(&mut self) -> &'static str {
        if self.rng.bool() { "remove" } else { "keep" }
    }
}
