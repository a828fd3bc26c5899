//! From what is wanted and what is there to what is to be done. Pure; the table of tests is the specification.

use crate::docker::{Inspected, RunState, SPEC_LABEL};

/// What the tunnel container should be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Goal {
    /// Nothing was said yet: what runs is left alone.
    Leave,
    /// There, and not running.
    Stop,
    /// Running, made from the spec with this hash, on this network.
    Run {
        /// Hash of the spec.
        hash: String,
        /// The one network.
        network: String,
    },
}

/// One step. Steps are carried out in order; the first failure ends the attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Action {
    /// See to the network and the image, while whatever runs still runs.
    Prepare,
    /// Stop with cloudflared's drain.
    Stop,
    /// Remove, so that the name is free.
    Remove,
    Create,
    Start,
}

/// Whose container has the name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Owner {
    /// Made by this agent.
    Agent,
    /// Made by the Python agent: same name, runs cloudflared with a token, no label of ours.
    PythonAgent,
    /// Anybody else's: never touched.
    Foreign,
}

/// Tells whose container it is.
pub(super) fn owner(container: &Inspected) -> Owner {
    if container.labels.contains_key(SPEC_LABEL) {
        return Owner::Agent;
    }
    let names_cloudflared = container.image.contains("cloudflared")
        || container.command.iter().any(|word| word == "cloudflared" || word.ends_with("/cloudflared"));
    let runs_tunnel = container.command.iter().any(|word| word == "tunnel");
    let has_token = container.env_names.iter().any(|name| name == "TUNNEL_TOKEN");
    if names_cloudflared && runs_tunnel && has_token { Owner::PythonAgent } else { Owner::Foreign }
}

/// What to do, given what is there. An empty plan means: it is as it should be, or it is not ours to touch.
pub(super) fn plan(goal: &Goal, found: Option<&Inspected>) -> Vec<Action> {
    use Action::{Create, Prepare, Remove, Start, Stop};
    let Some(container) = found else {
        return match goal {
            Goal::Run { .. } => vec![Prepare, Create, Start],
            Goal::Stop | Goal::Leave => vec![],
        };
    };
    let whose = owner(container);
    if whose == Owner::Foreign {
        return vec![];
    }
    // In each of these it would run again, or still holds its connections.
    let alive = matches!(container.state, RunState::Running | RunState::Restarting | RunState::Paused);
    match goal {
        Goal::Leave => vec![],
        Goal::Stop if alive => vec![Stop],
        Goal::Stop => vec![],
        Goal::Run { hash, network } => {
            let is_right = container.labels.get(SPEC_LABEL) == Some(hash) && container.networks.contains_key(network);
            match container.state {
                RunState::Running if is_right => vec![],
                // Docker's restart policy is at work on the right container; a new one would fail the same way.
                RunState::Restarting if is_right => vec![],
                // A frozen process cannot drain.
                RunState::Running | RunState::Restarting => vec![Prepare, Stop, Remove, Create, Start],
                RunState::Paused | RunState::Created | RunState::Exited | RunState::Dead => {
                    vec![Prepare, Remove, Create, Start]
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet, HashMap};

    use super::Action::{Create, Prepare, Remove, Start, Stop};
    use super::*;
    use crate::docker::Endpoint;

    fn container(state: RunState, hash: Option<&str>) -> Inspected {
        Inspected {
            id: "c".into(),
            name: "tunnel".into(),
            state,
            started_at: String::new(),
            exit_code: 0,
            out_of_memory: false,
            restarts: 0,
            error: String::new(),
            health: None,
            last_check: None,
            image: "cloudflare/cloudflared:1".into(),
            command: ["cloudflared", "--no-autoupdate", "tunnel", "run"].map(str::to_owned).into(),
            env_names: vec!["TUNNEL_TOKEN".into()],
            serves: None,
            labels: hash.map(|hash| HashMap::from([(SPEC_LABEL.into(), hash.into())])).unwrap_or_default(),
            networks: BTreeMap::from([("net".into(), Endpoint::default())]),
            network_mode: "net".into(),
            ports: BTreeSet::new(),
        }
    }

    fn run() -> Goal {
        Goal::Run { hash: "right".into(), network: "net".into() }
    }

    const ALL: [RunState; 6] = [
        RunState::Created,
        RunState::Running,
        RunState::Paused,
        RunState::Restarting,
        RunState::Exited,
        RunState::Dead,
    ];

    #[test]
    fn a_missing_container_is_made() {
        assert_eq!(plan(&run(), None), [Prepare, Create, Start]);
        assert_eq!(plan(&Goal::Stop, None), []);
        assert_eq!(plan(&Goal::Leave, None), []);
    }

    #[test]
    fn the_right_container_is_adopted_and_left_to_dockers_restart_policy() {
        assert_eq!(plan(&run(), Some(&container(RunState::Running, Some("right")))), []);
        assert_eq!(plan(&run(), Some(&container(RunState::Restarting, Some("right")))), []);
    }

    #[test]
    fn any_other_state_ends_in_one_container_and_frees_the_name_first() {
        for state in ALL {
            for hash in [Some("right"), Some("wrong"), None] {
                let steps = plan(&run(), Some(&container(state, hash)));
                if hash == Some("right") && matches!(state, RunState::Running | RunState::Restarting) {
                    continue;
                }
                let place = |step| {
                    steps.iter().position(|s| *s == step).unwrap_or_else(|| panic!("{state:?} {hash:?}: no {step:?}"))
                };
                assert_eq!(place(Prepare), 0, "what runs goes on while images are pulled");
                assert!(place(Remove) < place(Create) && place(Create) < place(Start), "{state:?} {hash:?}");
            }
        }
    }

    #[test]
    fn a_container_that_lost_its_network_is_replaced() {
        let mut stranded = container(RunState::Running, Some("right"));
        stranded.networks.clear();
        assert_eq!(plan(&run(), Some(&stranded)), [Prepare, Stop, Remove, Create, Start]);
    }

    #[test]
    fn a_stop_stops_and_does_not_remove() {
        for state in ALL {
            let steps = plan(&Goal::Stop, Some(&container(state, Some("right"))));
            let alive = matches!(state, RunState::Running | RunState::Restarting | RunState::Paused);
            assert_eq!(steps, if alive { vec![Stop] } else { vec![] }, "{state:?}");
        }
    }

    #[test]
    fn nothing_is_touched_before_the_master_has_spoken() {
        for state in ALL {
            assert_eq!(plan(&Goal::Leave, Some(&container(state, None))), []);
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
            for state in ALL {
                let mut foreign = container(state, None);
                change(&mut foreign);
                assert_eq!(owner(&foreign), Owner::Foreign);
                for goal in [run(), Goal::Stop, Goal::Leave] {
                    assert_eq!(plan(&goal, Some(&foreign)), []);
                }
            }
        }
    }

    #[test]
    fn the_python_agents_container_is_taken_over() {
        let python = container(RunState::Running, None);
        assert_eq!(owner(&python), Owner::PythonAgent);
        assert_eq!(plan(&run(), Some(&python)), [Prepare, Stop, Remove, Create, Start]);
    }
}
