//! Turns the goal and what is there into steps. Pure; the table of tests is the specification.
//!
//! Two names may be in use: the tunnel's own, and a second one for its successor during a replacement. A replacement
//! starts the successor, waits until it serves, drains and removes the connector before it, and renames the successor.
//! If the connector before it serves nobody, there is no wait: the connector of the newest order takes over as soon as
//! it runs, and during an outage a fresh one is tried beside it again and again. The plan can continue from every state
//! in which a crash can leave the two, and no step takes away the last connector that serves.

use crate::docker::{Inspected, METRICS_LABEL, OWNER_LABEL, RunState, SPEC_LABEL};
use crate::state::AgentId;

/// The desired state of the tunnel container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Goal {
    /// No order yet: leave alone what runs.
    Leave,
    /// Stopped but present: the master wants to find it so between the two phases of a decommission.
    Stop,
    /// Absent: the master does not want it, or the tunnel no longer exists.
    Remove,
    /// Running, made from the spec with this hash, on this network.
    Run {
        /// Hash of the spec.
        hash: String,
        /// Hash of the same spec over HTTP/2; `None` if that is the same spec.
        trial: Option<String>,
        /// The network it is created on.
        network: String,
    },
}

/// The name that a container has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Slot {
    /// The tunnel's own.
    Main,
    /// The successor's.
    Next,
}

/// Which of the two specs a container is made from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Make {
    /// The spec as the master wants it.
    Wanted,
    /// The same spec over HTTP/2, where cloudflared says why the edge refuses it.
    Trial,
}

/// One step. The supervisor runs steps in order; the first failure ends the attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// Make sure that the network and the image are there, while whatever runs keeps running.
    Prepare,
    /// Stop, with cloudflared's drain.
    Stop(Slot),
    /// Remove, which frees the name.
    Remove(Slot),
    Create(Slot, Make),
    Start(Slot),
    /// Restart in place.
    Restart,
    /// Give the successor the tunnel's own name.
    Rename,
}

/// Who made the container that has the name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Owner {
    /// This agent.
    Agent,
    /// The Python agent: same name, runs cloudflared with a token, no label of ours.
    PythonAgent,
    /// Anyone else, including another agent: never touched.
    Foreign,
}

/// Which agent counts as this one.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) enum Whose<'a> {
    /// Any agent: for the socket proxy, which does not know its agent's id, and for a check from outside.
    #[default]
    Any,
    /// The agent that has had these ids.
    Of(&'a [AgentId]),
}

/// Tells who made a container.
pub(crate) fn owner(container: &Inspected, whose: Whose<'_>) -> Owner {
    if container.labels.contains_key(SPEC_LABEL) {
        return if another_agent(container, whose).is_some() { Owner::Foreign } else { Owner::Agent };
    }
    let names_cloudflared = container.image.contains("cloudflared")
        || container.command.iter().any(|word| word == "cloudflared" || word.ends_with("/cloudflared"));
    let runs_tunnel = container.command.iter().any(|word| word == "tunnel");
    let has_token = container.env_names.iter().any(|name| name == "TUNNEL_TOKEN");
    if names_cloudflared && runs_tunnel && has_token { Owner::PythonAgent } else { Owner::Foreign }
}

/// The id of the other agent that made the container. Earlier versions wrote no id; their containers are adopted.
pub(crate) fn another_agent<'a>(container: &'a Inspected, whose: Whose<'_>) -> Option<&'a str> {
    let Whose::Of(ids) = whose else { return None };
    let label = container.labels.get(OWNER_LABEL.0).filter(|_| container.labels.contains_key(SPEC_LABEL))?;
    let is_ours = label == OWNER_LABEL.1 || ids.iter().any(|id| id.as_str() == label);
    (!is_ours).then_some(label.as_str())
}

/// How far a successor is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Progress {
    /// Not ready yet, or not ready for long enough for the edge to know it.
    #[default]
    Waiting,
    /// Cloudflare sends visitors to it.
    Serves,
    /// It cannot become ready, or did not in time.
    Failed,
}

/// What is there, as far as the plan depends on it. "Main" has the tunnel's own name, "next" the successor's.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Scene<'a> {
    /// This agent's ids.
    pub(super) whose: Whose<'a>,
    /// The container under the tunnel's own name.
    pub(super) main: Option<&'a Inspected>,
    /// The container under the successor's name.
    pub(super) next: Option<&'a Inspected>,
    /// How far the successor is.
    pub(super) progress: Progress,
    /// Main is ready.
    pub(super) main_ready: bool,
    /// Main runs and has had no connection for some seconds: it certainly serves nobody.
    pub(super) dark: bool,
    /// Main ended a moment ago; a manual restart looks like this halfway through.
    pub(super) ended_lately: bool,
    /// The successor is ready.
    pub(super) next_ready: bool,
    /// The successor is known to have no connection. Both this and `next_ready` may be false, when neither is known.
    pub(super) next_dark: bool,
    /// During an outage: time for a fresh connector, made from this spec.
    pub(super) fresh: Option<Make>,
    /// The edge refuses the successor without a reason; a trial over HTTP/2 shows why.
    pub(super) ask_why: bool,
    /// The successor, tried beside a connector that serves nobody, has shown what it can: remove it.
    pub(super) next_over: bool,
    /// Main serves over HTTP/2 only, and it is time to try the wanted spec again.
    pub(super) go_back: bool,
    /// A successor of this spec failed recently, beside a connector that serves.
    pub(super) resting: bool,
    /// Restart main now.
    pub(super) restart: bool,
    /// Main is draining on the order of an agent that is gone, and will end.
    pub(super) draining: bool,
    /// cloudflared does not take main's token: never start it again.
    pub(super) bad_token: bool,
    /// A successor of this spec could not become ready because of its token.
    pub(super) given_up: bool,
    /// Docker refuses a second container beside the first.
    pub(super) no_second: bool,
    /// Docker refuses to rename.
    pub(super) no_rename: bool,
}

/// Whether it would run again, or still holds its connections.
pub(super) fn is_alive(container: &Inspected) -> bool {
    matches!(container.state, RunState::Running | RunState::Restarting | RunState::Paused)
}

/// What decides whether a container matches an order: the hashes of both specs, and the network.
#[derive(Debug, Clone, Copy)]
pub(super) struct Order<'a> {
    pub(super) hash: &'a str,
    pub(super) trial: Option<&'a str>,
    pub(super) network: &'a str,
}

impl Order<'_> {
    /// Which of the two specs the container was made from, if either.
    pub(super) fn made(&self, container: &Inspected) -> Option<Make> {
        match container.labels.get(SPEC_LABEL)?.as_str() {
            label if label == self.hash => Some(Make::Wanted),
            label if Some(label) == self.trial => Some(Make::Trial),
            _ => None,
        }
    }

    /// As [`Self::made`], if Docker keeps the container running and it is on the tunnel's network and on that of its
    /// metrics. A container that lost its metrics network and is connected to it again keeps listening on an address
    /// that is gone.
    pub(super) fn fits(&self, container: &Inspected) -> Option<Make> {
        let is_kept = matches!(container.state, RunState::Running | RunState::Restarting);
        let is_on = |network: &String| container.networks.contains_key(network);
        let is_placed = container.labels.get(METRICS_LABEL).is_none_or(is_on);
        self.made(container).filter(|_| is_kept && is_placed && container.networks.contains_key(self.network))
    }
}

impl Goal {
    /// The order, if something should run.
    pub(super) fn order(&self) -> Option<Order<'_>> {
        match self {
            Self::Run { hash, trial, network } => Some(Order { hash, trial: trial.as_deref(), network }),
            Self::Leave | Self::Stop | Self::Remove => None,
        }
    }
}

/// Decides what to do. An empty plan means: all is as it should be, something takes time, or the container is not ours.
pub(super) fn plan(goal: &Goal, scene: &Scene<'_>) -> Vec<Step> {
    // A foreign container under the second name has the same effect as a refused second container.
    let foreign_next = scene.next.is_some_and(|next| owner(next, scene.whose) == Owner::Foreign);
    let scene =
        Scene { next: scene.next.filter(|_| !foreign_next), no_second: scene.no_second || foreign_next, ..*scene };
    if scene.main.is_some_and(|main| owner(main, scene.whose) == Owner::Foreign) {
        return vec![];
    }
    match goal {
        Goal::Leave => vec![],
        Goal::Stop => match (scene.main, scene.next) {
            (Some(main), next) => [next.map(away).unwrap_or_default(), stop(main, Slot::Main)].concat(),
            (None, Some(next)) if scene.no_rename => stop(next, Slot::Next),
            (None, Some(_)) => vec![Step::Rename],
            (None, None) => vec![],
        },
        Goal::Remove => {
            let main = scene.main.map(|main| [stop(main, Slot::Main), vec![Step::Remove(Slot::Main)]].concat());
            [scene.next.map(away).unwrap_or_default(), main.unwrap_or_default()].concat()
        }
        Goal::Run { hash, trial, network } => run(&scene, Order { hash, trial: trial.as_deref(), network }),
    }
}

fn stop(container: &Inspected, slot: Slot) -> Vec<Step> {
    if is_alive(container) { vec![Step::Stop(slot)] } else { vec![] }
}

/// Removes a successor that is not wanted. It may serve already, so it drains first.
fn away(next: &Inspected) -> Vec<Step> {
    [stop(next, Slot::Next), vec![Step::Remove(Slot::Next)]].concat()
}

fn run(scene: &Scene<'_>, order: Order<'_>) -> Vec<Step> {
    use Slot::{Main, Next};
    use Step::{Create, Prepare, Remove, Restart, Start, Stop};
    let made = [Prepare, Create(Main, Make::Wanted), Start(Main)];
    let beside = |make| vec![Prepare, Create(Next, make), Start(Next)];
    // Replaces a throwaway connector: no waiting for an image or a network.
    let anew = |next, make| [away(next), vec![Create(Next, make), Start(Next)]].concat();
    let fits = |main: &Inspected| order.fits(main).filter(|_| !scene.draining);
    match (scene.main, scene.next) {
        (None, None) => made.into(),
        // A replacement that lacks only its last steps.
        (None, Some(_)) if !scene.no_rename => rename(scene),
        // It cannot get the name, so make another one under it, which takes over the same way.
        (None, Some(_)) => made.into(),
        (Some(main), _) if scene.bad_token && order.made(main).is_some() => stop(main, Main),
        // Whoever restarts it by hand must not find another one in its place.
        (Some(main), _) if scene.ended_lately && !scene.next_ready && order.made(main).is_some() => vec![],
        (Some(main), None) if fits(main).is_some() => match scene.fresh {
            _ if scene.restart => vec![Restart],
            Some(make) if !scene.no_second => vec![Create(Next, make), Start(Next)],
            _ if scene.go_back && fits(main) == Some(Make::Trial) && !scene.no_second => beside(Make::Wanted),
            _ => vec![],
        },
        (Some(main), Some(next)) if fits(main).is_some() => beside_the_right_one(scene, order, main, next),
        (Some(main), None) if main.state == RunState::Running && !scene.no_second => {
            if scene.given_up {
                // Tried only as during an outage: it takes over if the edge accepts its token after all.
                scene.fresh.filter(|_| scene.dark).map(beside).unwrap_or_default()
            } else if scene.resting && !scene.dark {
                vec![]
            } else {
                beside(Make::Wanted)
            }
        }
        // A frozen process cannot drain, and one that Docker is about to restart has nothing to drain.
        (Some(main), None) => {
            let drain = if main.state == RunState::Paused { vec![] } else { stop(main, Main) };
            [vec![Prepare], drain, vec![Remove(Main), Create(Main, Make::Wanted), Start(Main)]].concat()
        }
        (Some(main), Some(next)) if main.state == RunState::Running => match order.fits(next) {
            // An older order's connector, and the only one that serves: give it the name first.
            None if scene.dark && scene.next_ready && next.state == RunState::Running => take_over(scene),
            None => away(next),
            Some(_)
                if next.state == RunState::Running
                    && (scene.progress == Progress::Serves || scene.dark && scene.next_ready) =>
            {
                take_over(scene)
            }
            // Nobody is served, so do not wait until it is ready.
            Some(Make::Wanted) if scene.dark && !scene.given_up && next.state == RunState::Running => take_over(scene),
            Some(Make::Trial) if scene.dark && scene.next_over && scene.next_dark => away(next),
            // Discard it only for a fresh one.
            Some(_) if scene.dark => {
                scene.fresh.filter(|_| scene.next_dark).map(|make| anew(next, make)).unwrap_or_default()
            }
            // Refused without a reason.
            Some(Make::Wanted) if scene.ask_why => anew(next, Make::Trial),
            Some(_) if scene.progress == Progress::Failed => away(next),
            Some(_) => vec![],
        },
        // Nothing serves under the name: whatever lives under the second name takes it over.
        (Some(main), Some(next)) if is_alive(next) => {
            let drain = if main.state == RunState::Restarting { vec![Stop(Main)] } else { vec![] };
            [drain, vec![Remove(Main)], rename(scene)].concat()
        }
        (Some(_), Some(_)) => vec![Remove(Next)],
    }
}

/// Plans for two containers when main is made as it should be.
fn beside_the_right_one(scene: &Scene<'_>, order: Order<'_>, main: &Inspected, next: &Inspected) -> Vec<Step> {
    let (is_trial, fits) = (order.fits(main) == Some(Make::Trial), order.fits(next));
    let serves = scene.progress == Progress::Serves;
    let main_serves = main.state == RunState::Running && scene.main_ready;
    let is_return = is_trial && fits == Some(Make::Wanted);
    match fits {
        _ if next.state != RunState::Running && !(is_return && is_alive(next)) => away(next),
        // Back from HTTP/2 to the wanted spec: a replacement like any other.
        Some(_) if main_serves && is_return => match scene.progress {
            Progress::Serves if next.state == RunState::Running => take_over(scene),
            Progress::Waiting | Progress::Serves => vec![],
            Progress::Failed => away(next),
        },
        // Left over: remove it when main no longer needs it.
        _ if main_serves => away(next),
        // A fresh one that was ready first. If it cannot get the name, wait for main.
        Some(_) if serves && next.state == RunState::Running && !scene.no_rename => take_over(scene),
        // It may serve, as far as anyone knows.
        _ if !scene.next_dark || !scene.dark => vec![],
        _ if scene.next_over => away(next),
        _ => match scene.fresh {
            Some(make) => [away(next), vec![Step::Create(Slot::Next, make), Step::Start(Slot::Next)]].concat(),
            None => vec![],
        },
    }
}

/// The successor takes the place of main.
fn take_over(scene: &Scene<'_>) -> Vec<Step> {
    [vec![Step::Stop(Slot::Main), Step::Remove(Slot::Main)], rename(scene)].concat()
}

fn rename(scene: &Scene<'_>) -> Vec<Step> {
    if scene.no_rename { vec![] } else { vec![Step::Rename] }
}

#[cfg(test)]
mod tests {
    use super::Make::{Trial, Wanted};
    use super::Slot::{Main, Next};
    use super::Step::{Create, Prepare, Remove, Rename, Restart, Start, Stop};
    use super::*;
    use crate::health::double::container;

    const ANEW: [Step; 4] = [Prepare, Remove(Main), Create(Main, Wanted), Start(Main)];

    fn goal() -> Goal {
        Goal::Run { hash: "right".into(), trial: Some("trial".into()), network: "net".into() }
    }

    /// The plan for one container under the tunnel's name.
    fn alone(goal: &Goal, main: &Inspected) -> Vec<Step> {
        plan(goal, &Scene { main: Some(main), ..Scene::default() })
    }

    #[test]
    fn a_missing_container_is_made() {
        assert_eq!(plan(&goal(), &Scene::default()), [Prepare, Create(Main, Wanted), Start(Main)]);
        for goal in [Goal::Stop, Goal::Leave, Goal::Remove] {
            assert_eq!(plan(&goal, &Scene::default()), []);
        }
    }

    #[test]
    fn the_right_container_is_adopted_and_left_to_dockers_restart_policy() {
        for state in [RunState::Running, RunState::Restarting] {
            assert_eq!(alone(&goal(), &container(state, Some("right"))), []);
        }
    }

    #[test]
    fn a_running_container_is_replaced_by_a_successor_beside_it() {
        for mut main in [container(RunState::Running, Some("wrong")), container(RunState::Running, None)] {
            assert_eq!(alone(&goal(), &main), [Prepare, Create(Next, Wanted), Start(Next)]);
            main.networks.clear();
            assert_eq!(alone(&goal(), &main), [Prepare, Create(Next, Wanted), Start(Next)]);
        }
        let mut stranded = container(RunState::Running, Some("right"));
        stranded.networks.clear();
        assert_eq!(alone(&goal(), &stranded), [Prepare, Create(Next, Wanted), Start(Next)]);
    }

    #[test]
    fn one_that_was_taken_from_the_network_of_its_metrics_is_replaced() {
        let mut main = container(RunState::Running, Some("right"));
        main.labels.insert(METRICS_LABEL.into(), "metrics".into());
        assert_eq!(alone(&goal(), &main), [Prepare, Create(Next, Wanted), Start(Next)]);
        main.networks.insert("metrics".into(), crate::docker::Endpoint::default());
        assert_eq!(alone(&goal(), &main), []);
    }

    #[test]
    fn one_that_does_not_run_is_made_anew_in_its_place() {
        for hash in [Some("right"), Some("wrong"), None] {
            for state in [RunState::Created, RunState::Paused, RunState::Exited, RunState::Dead] {
                assert_eq!(alone(&goal(), &container(state, hash)), ANEW, "{state:?} {hash:?}");
            }
        }
        let looping = container(RunState::Restarting, Some("wrong"));
        assert_eq!(alone(&goal(), &looping), [Prepare, Stop(Main), Remove(Main), Create(Main, Wanted), Start(Main)]);
    }

    #[test]
    fn one_that_an_agent_before_has_left_draining_has_a_successor_before_it_ends() {
        let main = container(RunState::Running, Some("right"));
        let scene = Scene { main: Some(&main), draining: true, ..Scene::default() };
        assert_eq!(plan(&goal(), &scene), [Prepare, Create(Next, Wanted), Start(Next)]);
        let next = container(RunState::Running, Some("right"));
        let scene = Scene { next: Some(&next), ..scene };
        assert_eq!(plan(&goal(), &scene), []);
        let serves = Scene { progress: Progress::Serves, ..scene };
        assert_eq!(plan(&goal(), &serves), [Stop(Main), Remove(Main), Rename], "which waits for the drain");
        let ended = container(RunState::Exited, Some("right"));
        let scene = Scene { main: Some(&ended), ..scene };
        assert_eq!(plan(&goal(), &scene), [Remove(Main), Rename]);
    }

    #[test]
    fn a_successor_takes_over_when_it_serves_and_goes_when_it_fails() {
        let (main, next) = (container(RunState::Running, Some("wrong")), container(RunState::Running, Some("right")));
        let with =
            |progress| plan(&goal(), &Scene { main: Some(&main), next: Some(&next), progress, ..Scene::default() });
        assert_eq!(with(Progress::Waiting), []);
        assert_eq!(with(Progress::Serves), [Stop(Main), Remove(Main), Rename]);
        assert_eq!(with(Progress::Failed), [Stop(Next), Remove(Next)]);
    }

    #[test]
    fn a_successor_of_other_orders_goes_and_one_that_never_ran_too() {
        let main = container(RunState::Running, Some("wrong"));
        for (next, steps) in [
            (container(RunState::Running, Some("older")), vec![Stop(Next), Remove(Next)]),
            (container(RunState::Created, Some("right")), vec![Remove(Next)]),
            (container(RunState::Exited, Some("right")), vec![Remove(Next)]),
        ] {
            for progress in [Progress::Waiting, Progress::Serves, Progress::Failed] {
                let scene = Scene { main: Some(&main), next: Some(&next), progress, ..Scene::default() };
                assert_eq!(plan(&goal(), &scene), steps, "{next:?}");
            }
        }
    }

    #[test]
    fn what_a_crash_leaves_under_the_second_name_takes_the_first_one() {
        for hash in ["right", "older"] {
            let next = container(RunState::Running, Some(hash));
            assert_eq!(plan(&goal(), &Scene { next: Some(&next), ..Scene::default() }), [Rename]);
            assert_eq!(plan(&Goal::Stop, &Scene { next: Some(&next), ..Scene::default() }), [Rename]);
            for state in [RunState::Exited, RunState::Created, RunState::Dead, RunState::Paused] {
                let main = container(state, Some("wrong"));
                let scene = Scene { main: Some(&main), next: Some(&next), ..Scene::default() };
                assert_eq!(plan(&goal(), &scene), [Remove(Main), Rename], "{state:?}");
            }
        }
    }

    #[test]
    fn a_leftover_beside_the_right_one_goes_unless_it_is_the_one_that_serves() {
        let (main, next) = (container(RunState::Running, Some("right")), container(RunState::Running, Some("older")));
        let scene = Scene { main: Some(&main), next: Some(&next), ..Scene::default() };
        assert_eq!(plan(&goal(), &scene), []);
        assert_eq!(plan(&goal(), &Scene { main_ready: true, ..scene }), [Stop(Next), Remove(Next)]);
        let dead = container(RunState::Exited, Some("older"));
        assert_eq!(plan(&goal(), &Scene { next: Some(&dead), ..scene }), [Remove(Next)]);
    }

    #[test]
    fn where_docker_refuses_a_second_container_it_is_replaced_in_place() {
        let main = container(RunState::Running, Some("wrong"));
        let in_place = [Prepare, Stop(Main), Remove(Main), Create(Main, Wanted), Start(Main)];
        let scene = Scene { main: Some(&main), no_second: true, ..Scene::default() };
        assert_eq!(plan(&goal(), &scene), in_place);
        let foreign = container(RunState::Running, None);
        let foreign = Inspected { env_names: vec![], ..foreign };
        let scene = Scene { main: Some(&main), next: Some(&foreign), ..Scene::default() };
        assert_eq!(plan(&goal(), &scene), in_place, "the second name is somebody else's");
    }

    #[test]
    fn where_docker_refuses_to_rename_another_one_is_made_under_the_name_and_takes_over() {
        let (wrong, right) = (container(RunState::Running, Some("wrong")), container(RunState::Running, Some("right")));
        let scene = Scene { no_rename: true, ..Scene::default() };
        let serves = Scene { main: Some(&wrong), next: Some(&right), progress: Progress::Serves, ..scene };
        assert_eq!(plan(&goal(), &serves), [Stop(Main), Remove(Main)]);
        assert_eq!(plan(&goal(), &Scene { next: Some(&right), ..scene }), [Prepare, Create(Main, Wanted), Start(Main)]);
        let both = Scene { main: Some(&right), next: Some(&right), ..scene };
        assert_eq!(plan(&goal(), &both), []);
        assert_eq!(plan(&goal(), &Scene { main_ready: true, ..both }), [Stop(Next), Remove(Next)]);
        assert_eq!(plan(&Goal::Stop, &Scene { next: Some(&right), ..scene }), [Stop(Next)]);
    }

    #[test]
    fn a_stop_stops_and_does_not_remove_but_for_a_successor() {
        for state in RunState::ALL {
            let main = container(state, Some("right"));
            let alive = matches!(state, RunState::Running | RunState::Restarting | RunState::Paused);
            let stops = if alive { vec![Stop(Main)] } else { vec![] };
            assert_eq!(alone(&Goal::Stop, &main), stops, "{state:?}");
            let next = container(RunState::Running, Some("older"));
            let scene = Scene { main: Some(&main), next: Some(&next), ..Scene::default() };
            assert_eq!(plan(&Goal::Stop, &scene), [vec![Stop(Next), Remove(Next)], stops].concat(), "{state:?}");
        }
    }

    #[test]
    fn a_tunnel_that_is_no_more_leaves_nothing() {
        let (running, exited) = (container(RunState::Running, Some("a")), container(RunState::Exited, Some("b")));
        assert_eq!(alone(&Goal::Remove, &running), [Stop(Main), Remove(Main)]);
        assert_eq!(alone(&Goal::Remove, &exited), [Remove(Main)]);
        let scene = Scene { main: Some(&exited), next: Some(&running), ..Scene::default() };
        assert_eq!(plan(&Goal::Remove, &scene), [Stop(Next), Remove(Next), Remove(Main)]);
    }

    #[test]
    fn nothing_is_touched_before_the_master_has_spoken() {
        for state in RunState::ALL {
            assert_eq!(alone(&Goal::Leave, &container(state, None)), []);
        }
    }

    #[test]
    fn a_foreign_container_is_never_touched() {
        let changes: [fn(&mut Inspected); 3] = [
            |c| c.env_names.clear(),
            |c| c.command = vec!["cloudflared".into(), "proxy-dns".into()],
            |c| (c.image, c.command) = ("nginx".into(), vec!["nginx".into(), "tunnel".into()]),
        ];
        for change in changes {
            for state in RunState::ALL {
                let mut foreign = container(state, None);
                change(&mut foreign);
                assert_eq!(owner(&foreign, Whose::Any), Owner::Foreign);
                for goal in [goal(), Goal::Stop, Goal::Leave, Goal::Remove] {
                    assert_eq!(alone(&goal, &foreign), []);
                    let scene = Scene { next: Some(&foreign), ..Scene::default() };
                    assert!(!plan(&goal, &scene).iter().any(|step| matches!(step, Rename | Stop(Next) | Remove(Next))));
                }
            }
        }
    }

    #[test]
    fn another_agents_container_is_as_foreign_as_any_and_one_of_an_earlier_version_is_adopted() {
        let ids = ["new", "old"].map(|id| AgentId::try_from(id.to_owned()).unwrap());
        let whose = Whose::Of(&ids);
        for (label, ours) in [
            (None, true),
            (Some("dockflare-agent"), true),
            (Some("old"), true),
            (Some("new"), true),
            (Some("x"), false),
        ] {
            let mut main = container(RunState::Running, Some("wrong"));
            main.labels.extend(label.map(|label| (OWNER_LABEL.0.to_owned(), label.to_owned())));
            assert_eq!(owner(&main, whose), if ours { Owner::Agent } else { Owner::Foreign }, "{label:?}");
            assert_eq!(another_agent(&main, whose), label.filter(|_| !ours));
            for goal in [goal(), Goal::Stop, Goal::Remove] {
                let steps = plan(&goal, &Scene { whose, main: Some(&main), ..Scene::default() });
                assert_eq!(steps.is_empty(), !ours, "{goal:?} {label:?}");
                let scene = Scene { whose, next: Some(&main), ..Scene::default() };
                let touches = plan(&goal, &scene).iter().any(|step| matches!(step, Rename | Stop(Next) | Remove(Next)));
                assert_eq!(touches, ours, "{goal:?} {label:?}");
            }
            // An agent that does not know its own id has made no container that carries one.
            assert_eq!(owner(&main, Whose::Of(&[])) == Owner::Agent, label.is_none_or(|l| l == "dockflare-agent"));
        }
    }

    #[test]
    fn one_that_hangs_is_restarted_where_it_is() {
        let main = container(RunState::Running, Some("right"));
        assert_eq!(plan(&goal(), &Scene { main: Some(&main), restart: true, ..Scene::default() }), [Restart]);
        let wrong = container(RunState::Running, Some("wrong"));
        let scene = Scene { main: Some(&wrong), restart: true, ..Scene::default() };
        assert_eq!(plan(&goal(), &scene), [Prepare, Create(Next, Wanted), Start(Next)], "its successor is what helps");
    }

    #[test]
    fn one_with_a_bad_token_is_stopped_until_another_token_comes() {
        let mut scene = Scene { bad_token: true, ..Scene::default() };
        let (looping, exited) =
            (container(RunState::Restarting, Some("right")), container(RunState::Exited, Some("right")));
        scene.main = Some(&looping);
        assert_eq!(plan(&goal(), &scene), [Stop(Main)]);
        scene.main = Some(&exited);
        assert_eq!(plan(&goal(), &scene), []);
        let older = container(RunState::Exited, Some("older"));
        scene.main = Some(&older);
        assert_eq!(plan(&goal(), &scene), ANEW);
    }

    #[test]
    fn a_successor_with_a_bad_token_is_not_tried_again() {
        let main = container(RunState::Running, Some("wrong"));
        assert_eq!(plan(&goal(), &Scene { main: Some(&main), given_up: true, ..Scene::default() }), []);
    }

    #[test]
    fn an_order_that_comes_while_nobody_is_served_is_carried_out_at_once() {
        let (main, next) = (container(RunState::Running, Some("wrong")), container(RunState::Running, Some("right")));
        let dark = Scene { main: Some(&main), dark: true, ..Scene::default() };
        for resting in [false, true] {
            assert_eq!(plan(&goal(), &Scene { resting, ..dark }), [Prepare, Create(Next, Wanted), Start(Next)]);
        }
        assert_eq!(
            plan(&goal(), &Scene { resting: true, dark: false, ..dark }),
            [],
            "it pauses beside one that serves"
        );
        // Ready or not, and however long it has not been ready.
        for progress in [Progress::Waiting, Progress::Serves, Progress::Failed] {
            let scene = Scene { next: Some(&next), progress, ..dark };
            assert_eq!(plan(&goal(), &scene), [Stop(Main), Remove(Main), Rename], "{progress:?}");
            // Except for a token that is known to be refused.
            let steps = plan(&goal(), &Scene { given_up: true, ..scene });
            assert_eq!(steps.is_empty(), progress != Progress::Serves, "{steps:?}");
        }
        // Meanwhile an older order's connector serves: it gets the name before it is replaced.
        let older = container(RunState::Running, Some("older"));
        let scene = Scene { next: Some(&older), next_ready: true, ..dark };
        assert_eq!(plan(&goal(), &scene), [Stop(Main), Remove(Main), Rename]);
        assert_eq!(plan(&goal(), &Scene { next_ready: false, ..scene }), [Stop(Next), Remove(Next)]);
    }

    #[test]
    fn in_an_outage_a_fresh_one_is_tried_beside_it_and_whichever_is_ready_first_stays() {
        let (main, next) = (container(RunState::Running, Some("right")), container(RunState::Running, Some("right")));
        let dark = Scene { main: Some(&main), dark: true, next_dark: true, ..Scene::default() };
        assert_eq!(plan(&goal(), &dark), [], "not yet");
        for make in [Wanted, Trial] {
            let due = Scene { fresh: Some(make), ..dark };
            assert_eq!(plan(&goal(), &due), [Create(Next, make), Start(Next)]);
            assert_eq!(plan(&goal(), &Scene { no_second: true, ..due }), []);
            let both = Scene { next: Some(&next), ..due };
            assert_eq!(plan(&goal(), &both), [Stop(Next), Remove(Next), Create(Next, make), Start(Next)]);
            let unknown = Scene { next_dark: false, ..both };
            assert_eq!(plan(&goal(), &unknown), [], "it may serve");
            let takes_over = Scene { progress: Progress::Serves, next_ready: true, ..unknown };
            assert_eq!(plan(&goal(), &takes_over), [Stop(Main), Remove(Main), Rename]);
            assert_eq!(plan(&goal(), &Scene { next_ready: true, ..unknown }), [], "nearly");
            let first = Scene { dark: false, main_ready: true, next_ready: true, fresh: None, ..both };
            assert_eq!(plan(&goal(), &first), [Stop(Next), Remove(Next)]);
        }
        assert_eq!(plan(&goal(), &Scene { next: Some(&next), ..dark }), [], "it has its time");
        assert_eq!(plan(&goal(), &Scene { next: Some(&next), next_over: true, ..dark }), [Stop(Next), Remove(Next)]);
    }

    #[test]
    fn one_that_ended_a_moment_ago_may_come_back() {
        let main = container(RunState::Exited, Some("right"));
        let scene = Scene { main: Some(&main), ended_lately: true, ..Scene::default() };
        assert_eq!(plan(&goal(), &scene), []);
        let next = container(RunState::Running, Some("right"));
        assert_eq!(plan(&goal(), &Scene { next: Some(&next), ..scene }), []);
        let serves = Scene { next: Some(&next), next_ready: true, ..scene };
        assert_eq!(plan(&goal(), &serves), [Remove(Main), Rename]);
        let older = container(RunState::Exited, Some("older"));
        assert_eq!(plan(&goal(), &Scene { main: Some(&older), ..scene }), ANEW, "nobody wants that one back");
        for goal in [Goal::Stop, Goal::Remove] {
            assert_eq!(plan(&goal, &scene).is_empty(), goal == Goal::Stop);
        }
    }

    #[test]
    fn one_over_http2_serves_until_it_is_time_to_go_back_and_the_other_one_can() {
        let (main, next) = (container(RunState::Running, Some("trial")), container(RunState::Running, Some("right")));
        let scene = Scene { main: Some(&main), main_ready: true, ..Scene::default() };
        assert_eq!(plan(&goal(), &scene), []);
        let back = Scene { go_back: true, ..scene };
        assert_eq!(plan(&goal(), &back), [Prepare, Create(Next, Wanted), Start(Next)]);
        let both = |progress| plan(&goal(), &Scene { next: Some(&next), progress, ..scene });
        assert_eq!(both(Progress::Waiting), []);
        assert_eq!(both(Progress::Serves), [Stop(Main), Remove(Main), Rename]);
        assert_eq!(both(Progress::Failed), [Stop(Next), Remove(Next)]);
    }

    #[test]
    fn a_successor_that_is_refused_without_a_word_is_asked_over_http2() {
        let main = container(RunState::Running, Some("wrong"));
        let (next, trial) = (container(RunState::Running, Some("right")), container(RunState::Running, Some("trial")));
        let scene = Scene { main: Some(&main), main_ready: true, progress: Progress::Failed, ..Scene::default() };
        let asked = Scene { next: Some(&next), ask_why: true, ..scene };
        assert_eq!(plan(&goal(), &asked), [Stop(Next), Remove(Next), Create(Next, Trial), Start(Next)]);
        let scene = Scene { next: Some(&trial), ..scene };
        assert_eq!(plan(&goal(), &scene), [Stop(Next), Remove(Next)]);
        assert_eq!(plan(&goal(), &Scene { progress: Progress::Waiting, ..scene }), []);
        let serves = Scene { progress: Progress::Serves, next_ready: true, ..scene };
        assert_eq!(plan(&goal(), &serves), [Stop(Main), Remove(Main), Rename]);
    }

    /// Every pair of containers, however far the successor is and whatever else is known. While something should run,
    /// the plan stops or removes the connector that serves only when another one is known to serve. It removes main
    /// also when main is known to serve nobody.
    #[test]
    fn no_plan_takes_away_the_last_one_that_serves() {
        let states = [RunState::Created, RunState::Running, RunState::Restarting, RunState::Exited];
        let hashes = ["right", "trial", "wrong"];
        let each = || states.into_iter().flat_map(|state| hashes.map(|hash| Some(container(state, Some(hash)))));
        let (mut plans, goal) = (0, goal());
        let order = goal.order().unwrap();
        for (main, next) in
            each().chain([None]).flat_map(|main| each().chain([None]).map(move |next| (main.clone(), next)))
        {
            let runs = |c: &Option<Inspected>| c.as_ref().is_some_and(|c| c.state == RunState::Running);
            for bits in 0..1_u32 << 12 {
                let is = |bit: u32| bits & 1 << bit != 0;
                let progress = match (is(0), is(1)) {
                    (false, false) => Progress::Waiting,
                    (true, false) => Progress::Serves,
                    (_, true) => Progress::Failed,
                };
                let fresh = match (is(2), is(3)) {
                    (false, _) => None,
                    (true, false) => Some(Wanted),
                    (true, true) => Some(Trial),
                };
                let (main_ready, dark) = (is(4) && runs(&main), is(5) && runs(&main));
                // A connector that serves is ready.
                let next_ready = runs(&next) && (is(6) || progress == Progress::Serves);
                let next_dark = is(11) && runs(&next);
                if main_ready && dark || next_ready && (next_dark || progress == Progress::Failed) {
                    continue;
                }
                let scene = Scene {
                    main: main.as_ref(),
                    next: next.as_ref(),
                    progress,
                    main_ready,
                    dark,
                    ended_lately: is(7),
                    next_ready,
                    next_dark,
                    fresh,
                    ask_why: is(8) && progress == Progress::Failed,
                    next_over: is(9) && !next_ready,
                    go_back: is(10),
                    resting: is(9),
                    given_up: is(8),
                    ..Scene::default()
                };
                let steps = plan(&goal, &scene);
                plans += 1;
                let takes = |slot| steps.iter().any(|step| *step == Stop(slot) || *step == Remove(slot));
                if takes(Main) && runs(&main) {
                    assert!(runs(&next), "{steps:?} of {scene:?}");
                    assert!(progress == Progress::Serves || dark, "{steps:?} of {scene:?}");
                    assert!(!takes(Next), "{steps:?} of {scene:?}");
                }
                if takes(Next) && runs(&next) {
                    assert!(runs(&main), "{steps:?} of {scene:?}");
                    assert!(
                        next_dark || !dark || main_ready || order.fits(next.as_ref().unwrap()).is_none(),
                        "{steps:?} of {scene:?}"
                    );
                }
            }
        }
        assert!(plans > 100_000, "{plans}");
    }
}
