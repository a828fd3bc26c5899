//! Turns what was seen into what the plan must know: the goal, how far a successor is, and which pauses still hold. A
//! pause ends with its reason.

use std::collections::BTreeMap;

use tokio::time::Instant;

use super::host::Host;
use super::look::{Known, Sight};
use super::outage::{self, Outage};
use super::plan::{Goal, Make, Order, Progress, Scene, Slot};
use super::problem::Problem;
use super::{COMES_BACK, Supervisor, trial};
use crate::cause::Cause;
use crate::channels::Wanted;
use crate::docker::{
    IMAGE_LABEL, Inspected, MetricsPlace, NAME_LABEL, OWNER_LABEL, REDEPLOY_LABEL, RunState, Spec, TUNNEL_LABEL,
    TUNNEL_NAME_LABEL, label_text,
};
use crate::state::{AgentId, DesiredState};

impl<H: Host> Supervisor<H> {
    /// The goal for the container. A token that cloudflared would not take is a problem, not a goal.
    pub(super) fn goal(&self, wanted: &Wanted) -> Result<Goal, Problem> {
        if wanted.decommission.is_some() {
            return Ok(Goal::Stop);
        }
        match (wanted.state, &wanted.token) {
            (DesiredState::Unknown, _) => Ok(Goal::Leave),
            (DesiredState::Stopped, _) => Ok(Goal::Remove),
            (DesiredState::Running, None) => Err(Problem::new(Cause::TokenMissing, "")),
            (DesiredState::Running, Some(token)) => match (token.claims(), self.spec(wanted)) {
                (Ok(_), Some(spec)) => {
                    let trial = spec.over_http2().map(|trial| trial.hash());
                    Ok(Goal::Run { hash: spec.hash(), trial, network: self.config.network.clone() })
                }
                (problem, _) => Err(Problem::new(Cause::TokenMalformed, problem.err().unwrap_or_default())),
            },
        }
    }

    pub(super) fn spec(&self, wanted: &Wanted) -> Option<Spec> {
        let id = wanted.owners.last().map_or(OWNER_LABEL.1, AgentId::as_str);
        let mut labels = BTreeMap::from([
            (OWNER_LABEL.0.to_owned(), id.to_owned()),
            (NAME_LABEL.to_owned(), self.config.container_name.clone()),
        ]);
        labels.insert(REDEPLOY_LABEL.to_owned(), wanted.redeploys.to_string());
        labels.extend(wanted.id.as_ref().map(|id| (TUNNEL_LABEL.to_owned(), id.to_string())));
        labels.extend(self.refresh.id().map(|id| (IMAGE_LABEL.to_owned(), id.clone())));
        let name = wanted.name.as_deref().map(label_text).filter(|name| !name.is_empty());
        labels.extend(name.map(|name| (TUNNEL_NAME_LABEL.to_owned(), name)));
        Some(Spec {
            image: self.config.image.to_string(),
            network: self.config.network.clone(),
            token: wanted.token.clone()?,
            options: self.config.options.clone(),
            host_gateway: self.config.host_gateway && !self.no_host_gateway,
            labels,
            metrics: self.config.metrics_network.clone().map(MetricsPlace::new),
        })
    }

    /// Starts afresh for new orders: they do not wait for the failures of old ones, and the troubles of those are over.
    pub(super) fn begin_anew(&mut self) {
        (self.problem, self.not_before, self.rests_until, self.outage) = (None, None, None, None);
        self.backoff.reset();
        self.replacing.reset();
        self.attempts.dropped();
        self.replacements.dropped();
    }

    /// Notes what began and ended since the last look, and ends the pauses whose reason is gone.
    pub(super) fn take_note(&mut self, sight: &Sight, goal: &Goal) {
        let now = Instant::now();
        if std::mem::take(&mut self.was_silent) {
            self.not_before = None;
            self.backoff.reset();
        }
        let main = sight.main.as_ref();
        if self.main_id.as_ref() != main.map(|main| &main.id) {
            self.main_id = main.map(|main| main.id.clone());
            self.rests_until = None;
            self.replacing.reset();
            self.restarts.not_before = None;
            self.restarts.pauses.reset();
        }
        self.note_trials(sight, goal, now);
        let ended = main.filter(|main| main.state == RunState::Exited && goal.order().is_some());
        self.ended = ended.map(|main| {
            let start = format!("{} {}", main.id, main.started_at);
            match self.ended.take() {
                Some((known, at)) if known == start => (known, at),
                _ => (start, now),
            }
        });
        match (self.main.dark_since(), main) {
            (Some(since), Some(main)) if main.state == RunState::Running && goal.order().is_some() => {
                if self.is_dark(now) && self.outage.is_none() {
                    self.outage = Some(Outage::new(since, self.main.why_dark()));
                }
            }
            // A connector that takes over during an outage has not answered yet: the outage goes on.
            _ if !self.main.is_surely_ready() && goal.order().is_some() => {}
            _ => {
                if self.outage.take().is_some() {
                    self.rests_until = None;
                    self.replacing.reset();
                }
            }
        }
    }

    /// The connector has had no connection for some seconds, so it serves nobody.
    pub(super) fn is_dark(&self, now: Instant) -> bool {
        self.main.is_dark(now)
    }

    /// Gathers what the plan must know.
    pub(super) fn scene<'a>(&self, sight: &'a Sight, goal: &Goal) -> Scene<'a> {
        let now = Instant::now();
        let order = goal.order();
        let hash = order.map_or("", |order| order.hash);
        let is_known = self.refused.hash == hash;
        let runs = sight.main.as_ref().is_some_and(|main| main.state == RunState::Running);
        let made = |container| order.and_then(|order| order.made(container));
        // Progress counts only for a successor of this order, not of an older one.
        let next = sight.next.as_ref().and_then(made);
        let given_up = self.given_up.as_deref() == Some(hash);
        let is_due = self.outage.as_ref().is_some_and(|outage| outage.is_due(now));
        let asked = order.filter(|order| self.asks_about_main(sight, *order, now)).map(|_| Make::Trial);
        let fresh = asked.or_else(|| order.and_then(|order| self.fresh(sight, order, given_up, now)));
        Scene {
            whose: sight.whose(),
            main: sight.main.as_ref(),
            next: sight.next.as_ref(),
            progress: if next.is_some() { self.progress(sight, goal, now) } else { Progress::Waiting },
            main_ready: self.main.serves(now) || self.main.is_surely_ready() && !self.next.is_ready(),
            // A draining connector still answers its open requests.
            dark: runs && self.is_dark(now) && !self.main.left_draining,
            ended_lately: self.ended.as_ref().is_some_and(|(_, at)| now - *at < COMES_BACK),
            next_ready: self.next.is_surely_ready(),
            next_dark: self.next.dark_since().is_some(),
            fresh,
            ask_why: next == Some(Make::Wanted) && order.is_some_and(|order| self.may_ask(order, &self.next, now)),
            next_over: next == Some(Make::Trial) && self.is_over(now)
                || is_due && fresh.is_none() && !self.asks(next, now),
            go_back: self.trial.may_return(now),
            resting: self.rests_until.is_some_and(|at| now < at) && !self.main.is_sick(),
            restart: self.main.needs_restart(now) && self.restarts.not_before.is_none_or(|at| now >= at),
            draining: self.main.left_draining,
            bad_token: self.main.is_sick_of(Cause::TokenMalformed),
            given_up,
            no_second: is_known && self.refused.second,
            no_rename: is_known && self.refused.rename,
        }
    }

    /// Whether it is time for a fresh connector beside one that serves nobody, and from which spec.
    fn fresh(&self, sight: &Sight, order: Order<'_>, given_up: bool, now: Instant) -> Option<Make> {
        let main = sight.main.as_ref()?;
        let like = order.fits(main).or(given_up.then_some(Make::Wanted))?;
        let outage = self
            .outage
            .as_ref()
            .filter(|outage| outage.is_due(now) && self.is_dark(now) && !self.main.left_draining)?;
        // Let a trial finish. Try nothing while the edge is known to refuse the token.
        let next = sight.next.as_ref().and_then(|next| order.made(next));
        let is_refused = self.main.is_sick_of(Cause::RegistrationRefused)
            && (self.trial.is_certain(order.hash) || order.trial.is_some() && !self.trial.was_asked(order.hash));
        if self.asks(next, now) || is_refused {
            return None;
        }
        let may_differ = order.trial.is_some() && (like == Make::Trial || !self.config.only_quic());
        let may_help = outage::may_help(self.main.cause()) && !self.main.cannot_route();
        may_help.then(|| outage.make(like, may_differ))
    }

    /// Whether a trial is under way that asks for the reason of a refusal. A trial that only looks for the edge over
    /// another protocol gets no longer than other fresh connectors.
    fn asks(&self, next: Option<Make>, now: Instant) -> bool {
        next == Some(Make::Trial) && !self.is_over(now) && self.main.is_sick_of(Cause::RegistrationRefused)
    }

    /// Whether the trial has said why, or had the time to.
    fn is_over(&self, now: Instant) -> bool {
        let is_told = self.next.is_sick_of(Cause::TokenRefused);
        !self.next.is_ready() && (is_told || self.next.age(now) >= Some(trial::LIMIT))
    }

    /// Whether it is time for a trial beside the present connector, which the edge refuses without a reason.
    fn asks_about_main(&self, sight: &Sight, order: Order<'_>, now: Instant) -> bool {
        let main = sight.main.as_ref().and_then(|main| order.fits(main));
        main == Some(Make::Wanted) && self.is_dark(now) && self.may_ask(order, &self.main, now)
    }

    fn may_ask(&self, order: Order<'_>, refused: &Known, now: Instant) -> bool {
        order.trial.is_some() && refused.is_sick_of(Cause::RegistrationRefused) && self.trial.is_due(order.hash, now)
    }

    /// Whether the next trial asks for the first time why the edge refuses this spec.
    pub(super) fn asks_why(&self, goal: &Goal) -> bool {
        let is_new = goal.order().is_some_and(|order| !self.trial.was_asked(order.hash));
        let is_refused = [&self.main, &self.next].iter().any(|known| known.is_sick_of(Cause::RegistrationRefused));
        is_new && is_refused
    }

    /// Whether the connector with the name serves over HTTP/2 only.
    pub(super) fn is_over_http2(&self, sight: &Sight, goal: &Goal) -> bool {
        let made = |main| goal.order().and_then(|order| order.made(main));
        sight.main.as_ref().and_then(made) == Some(Make::Trial)
    }

    /// Notes what trials have shown.
    fn note_trials(&mut self, sight: &Sight, goal: &Goal, now: Instant) {
        let Some(order) = goal.order() else { return self.trial.forget() };
        let made = |container: &Option<Inspected>| container.as_ref().and_then(|found| order.made(found));
        let (main, next) = (made(&sight.main), made(&sight.next));
        match main {
            Some(Make::Wanted) if self.main.is_surely_ready() => {
                self.trial.forget();
                self.trial.is_back(self.main.is_well(now));
            }
            Some(Make::Trial) if self.main.is_surely_ready() => self.trial.serves_otherwise(now),
            _ => {}
        }
        if next.is_some() && self.next.is_sick_of(Cause::TokenRefused) {
            self.trial.told(order.hash, true, now);
        } else if next.is_some() && self.next.is_surely_ready() {
            self.trial.told(order.hash, false, now);
        }
    }

    /// Why the successor cannot become ready, or did not in time.
    pub(super) fn next_failure(&self, sight: &Sight, goal: &Goal) -> Option<Cause> {
        let now = Instant::now();
        let order = goal.order()?;
        let made = sight.next.as_ref().and_then(|next| order.made(next));
        // The edge may refuse a token that is seconds old: count that refusal only once it has lasted.
        let is_over = made == Some(Make::Trial) && self.is_over(now) && !self.next.is_sick_of(Cause::TokenRefused);
        // The first refusal tells that the tunnel cannot go back yet.
        let is_return = self.is_over_http2(sight, goal) && self.next.is_sick_of(Cause::RegistrationRefused);
        let failure = self.next.failure().or_else(|| is_over.then_some(Cause::RegistrationRefused));
        failure.or_else(|| is_return.then_some(Cause::RegistrationRefused))
    }

    /// The cause to report. A refused registration becomes a refused token once a trial has said so.
    pub(super) fn certain(&self, slot: Slot, cause: Cause, hash: Option<&str>) -> Cause {
        let is_certain = slot == Slot::Main && hash.is_some_and(|hash| self.trial.is_certain(hash));
        if cause == Cause::RegistrationRefused && is_certain { Cause::TokenRefused } else { cause }
    }

    /// How far the successor is. If the connector before it serves nobody, do not wait for the edge.
    fn progress(&self, sight: &Sight, goal: &Goal, now: Instant) -> Progress {
        let failure = self.next_failure(sight, goal);
        let is_refused = matches!(failure, Some(Cause::TokenMalformed | Cause::TokenRefused));
        if self.next.serves(now) || self.next.is_surely_ready() && (self.main.is_sick() || self.is_dark(now)) {
            Progress::Serves
        } else if is_refused || failure.is_some() && !self.main.is_sick() {
            Progress::Failed
        } else {
            Progress::Waiting
        }
    }
}
