//! Commands: their form on the wire, and how each changes the desired state. No I/O.

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::cause::Cause;
use crate::channels::Refusal;
use crate::master::printable;
use crate::master::wire::Assignment;
use crate::state::{AgentId, DesiredState, Token, TunnelId, TunnelState};

/// A command that this agent understands.
#[derive(Debug, PartialEq)]
pub(super) enum Command {
    Start(Assigned),
    /// Replaces the container even when nothing changed.
    Restart(Assigned),
    Stop,
    Ingress(Map<String, Value>),
    Prepare(Decommission),
    Finalize(Decommission),
}

/// A tunnel and a token for it, checked by [`check`].
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Assigned {
    id: TunnelId,
    token: Token,
    name: Option<String>,
}

/// The fields of both decommission commands.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub(super) struct Decommission {
    pub(super) operation_id: String,
    pub(super) command_id: String,
    pub(super) requested_self_action: String,
    #[serde(default)]
    pub(super) expected_tunnel_id: Option<String>,
}

/// Why a command cannot be carried out.
#[derive(Debug, PartialEq)]
pub(super) enum Rejected {
    /// Unknown to this agent, or a required field is missing: skipped.
    NotUnderstood(String),
    /// Understood but not trusted: what runs stays untouched.
    Refused(Refusal),
}

impl Command {
    /// Reads one command. A failure does not affect the others in the same reply.
    pub(super) fn parse(value: &Value) -> Result<Self, Rejected> {
        let skip = |problem: String| Rejected::NotUnderstood(problem);
        let text = |key: &str| value.get(key).and_then(Value::as_str).filter(|text| !text.is_empty());
        let action = text("action").ok_or_else(|| skip("a command without an action".to_owned()))?;
        let decommission = || {
            Decommission::deserialize(value)
                .map_err(|_| skip(format!("{action} without operation_id, command_id and requested_self_action")))
        };
        match action {
            "start_tunnel" => assignment(action, text, "token").map(Self::Start),
            "restart_tunnel" => assignment(action, text, "tunnel_token").map(Self::Restart),
            "stop_tunnel" => Ok(Self::Stop),
            "update_tunnel_config" => match value.get("rules").and_then(Value::as_object) {
                Some(rules) => Ok(Self::Ingress(rules.clone())),
                None => Err(skip("update_tunnel_config without rules".to_owned())),
            },
            "prepare_decommission" => decommission().map(Self::Prepare),
            "finalize_decommission" => decommission().map(Self::Finalize),
            other => {
                let name: String = other.chars().filter(|c| !c.is_control()).take(64).collect();
                Err(skip(format!("the command {name}, which this agent does not know")))
            }
        }
    }

    /// The command's name in the log.
    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::Start(_) => "start_tunnel",
            Self::Restart(_) => "restart_tunnel",
            Self::Stop => "stop_tunnel",
            Self::Ingress(_) => "update_tunnel_config",
            Self::Prepare(_) => "prepare_decommission",
            Self::Finalize(_) => "finalize_decommission",
        }
    }
}

/// Reads a command's tunnel and checks its token, before anything that runs is touched.
fn assignment<'a>(action: &str, text: impl Fn(&str) -> Option<&'a str>, token_key: &str) -> Result<Assigned, Rejected> {
    let name = text("tunnel_name").map(str::to_owned);
    let (Some(id), Some(token)) = (text("tunnel_id"), text(token_key)) else {
        return Err(Rejected::NotUnderstood(format!("{action} without tunnel_id and {token_key}")));
    };
    check(&Assignment { id: id.to_owned(), token: Token::new(token), name }).map_err(Rejected::Refused)
}

/// Longest tunnel name kept, in characters. No name that a person gives comes close.
const MOST_NAME: usize = 200;

/// Checks that the id is valid, that cloudflared would take the token, and that the token is for that tunnel.
pub(super) fn check(assignment: &Assignment) -> Result<Assigned, Refusal> {
    let name = assignment.name.as_deref().map(str::trim).filter(|name| !name.is_empty());
    let name = name.map(|name| name.chars().take(MOST_NAME).collect::<String>());
    let refusal = |cause, problem| Refusal { name: name.clone(), cause, problem };
    let claims = assignment.token.claims().map_err(|problem| refusal(Cause::TokenMalformed, problem.to_owned()))?;
    match TunnelId::read(&assignment.id) {
        Ok(id) if id == claims.tunnel => Ok(Assigned { id, token: assignment.token.clone(), name }),
        _ => Err(refusal(
            Cause::TokenMismatch,
            format!(
                "the token is for tunnel {} and the command for tunnel {}",
                printable(&claims.tunnel.0),
                printable(&assignment.id)
            ),
        )),
    }
}

/// Applies a tunnel command to the desired state. Decommission commands change nothing here.
pub(super) fn apply(state: &mut TunnelState, command: &Command) {
    match command {
        Command::Start(assignment) => adopt(state, assignment),
        Command::Restart(assignment) => {
            adopt(state, assignment);
            // Only the change counts, whatever number the file held.
            state.redeploys = state.redeploys.wrapping_add(1);
        }
        // Keep id and name for the status. The command that starts the tunnel again brings a token.
        Command::Stop => {
            (state.desired_state, state.token, state.unclaimed) = (DesiredState::Stopped, None, false);
        }
        Command::Ingress(rules) => state.pending_ingress = Some(Value::Object(rules.clone())),
        Command::Prepare(_) | Command::Finalize(_) => {}
    }
}

fn adopt(state: &mut TunnelState, assignment: &Assigned) {
    if state.id.as_ref() != Some(&assignment.id) {
        // Pending rules are for the tunnel before.
        state.pending_ingress = None;
    }
    state.id = Some(assignment.id.clone());
    state.token = Some(assignment.token.clone());
    // A command without a name does not take the name away.
    state.name = assignment.name.clone().or_else(|| state.name.take());
    state.desired_state = DesiredState::Running;
    state.unclaimed = false;
}

/// Treats the tunnel that a v1 master names at registration as the command that may have been lost. A tunnel that is
/// already known stays as it is, even when it was stopped. `agent` is this agent's id.
pub(super) fn recover(
    state: &TunnelState,
    assignment: &Assignment,
    agent: &AgentId,
) -> Result<Option<TunnelState>, Refusal> {
    let id = TunnelId::read(&assignment.id).ok();
    let known = match state.desired_state {
        DesiredState::Unknown => false,
        DesiredState::Running => state.token.as_ref() == Some(&assignment.token),
        // A stop forgets the token.
        DesiredState::Stopped => state.token.as_ref().is_none_or(|token| *token == assignment.token),
    };
    if known && id.is_some() && state.id == id {
        let claimed = TunnelState { unclaimed: false, ..state.clone() };
        return Ok(Some(claimed).filter(|claimed| claimed != state));
    }
    let assigned = check(assignment)?;
    let mut next = state.clone();
    next.be(agent);
    adopt(&mut next, &assigned);
    Ok(Some(next))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::state::testing::token;

    fn after(state: &TunnelState, commands: &[Value]) -> TunnelState {
        let mut state = state.clone();
        for command in commands {
            apply(&mut state, &Command::parse(command).unwrap());
        }
        state
    }

    fn start(tunnel: &str) -> Value {
        json!({"action": "start_tunnel", "tunnel_name": "edge", "tunnel_id": tunnel, "token": token(tunnel)})
    }

    fn restart(tunnel: &str) -> Value {
        json!({"action": "restart_tunnel", "tunnel_name": "edge", "tunnel_id": tunnel, "tunnel_token": token(tunnel)})
    }

    #[test]
    fn start_makes_the_tunnel_wanted() {
        let state = after(&TunnelState::default(), &[start("t1")]);
        assert_eq!(state.desired_state, DesiredState::Running);
        assert_eq!(state.id, Some(TunnelId("t1".into())));
        assert_eq!(state.token.unwrap().expose(), token("t1"));
        assert_eq!(state.name.as_deref(), Some("edge"));
    }

    #[test]
    fn the_same_start_again_changes_nothing() {
        let state = after(&TunnelState::default(), &[start("t1")]);
        assert_eq!(after(&state, &[start("t1")]), state);
    }

    #[test]
    fn each_restart_counts_once() {
        let state = after(&TunnelState::default(), &[start("t1"), restart("t1"), restart("t1")]);
        assert_eq!(state.redeploys, 2);
        assert_eq!(state.desired_state, DesiredState::Running);
    }

    #[test]
    fn a_restart_counts_also_behind_the_highest_number() {
        let state = TunnelState { redeploys: u64::MAX, ..TunnelState::default() };
        assert_eq!(after(&state, &[restart("t1")]).redeploys, 0);
    }

    #[test]
    fn the_last_word_wins() {
        let stop = json!({"action": "stop_tunnel"});
        assert_eq!(after(&TunnelState::default(), &[start("t1"), stop.clone()]).desired_state, DesiredState::Stopped);
        let state = after(&TunnelState::default(), &[start("t1"), stop, start("t2")]);
        assert_eq!((state.desired_state, state.id), (DesiredState::Running, Some(TunnelId("t2".into()))));
    }

    #[test]
    fn a_stop_forgets_the_token_and_keeps_what_the_status_names() {
        let state = after(&TunnelState::default(), &[start("t1"), json!({"action": "stop_tunnel"})]);
        assert_eq!((state.token, state.id), (None, Some(TunnelId("t1".into()))));
        assert_eq!((state.name.as_deref(), state.desired_state), (Some("edge"), DesiredState::Stopped));
    }

    #[test]
    fn white_space_around_a_token_an_id_or_a_name_is_none_of_it() {
        let command = json!({
            "action": "start_tunnel", "tunnel_name": " edge ", "tunnel_id": " t1\n", "token": format!("\t{} \r\n", token("t1")),
        });
        assert_eq!(after(&TunnelState::default(), &[command]), after(&TunnelState::default(), &[start("t1")]));
        let assignment =
            Assignment { id: " t1 ".into(), token: Token::new(format!("{}\n", token("t1"))), name: Some(" ".into()) };
        let agent = AgentId::try_from("a".to_owned()).unwrap();
        let started = recover(&TunnelState::default(), &assignment, &agent).unwrap().unwrap();
        assert_eq!((started.id, started.token.unwrap().expose()), (Some(TunnelId("t1".into())), token("t1").as_str()));
        assert_eq!(started.name, None);
    }

    #[test]
    fn an_id_that_is_none_and_a_token_beyond_all_measure_are_refused_and_replace_nothing() {
        let long = "x".repeat(5000);
        let state = after(&TunnelState::default(), &[start("t1")]);
        let agent = AgentId::try_from("a".to_owned()).unwrap();
        for id in ["a b", "a/b", "../x", "-x", "é", &"x".repeat(129), &long] {
            let command = json!({"action": "start_tunnel", "tunnel_name": "edge", "tunnel_id": id, "token": token(id)});
            assert!(matches!(Command::parse(&command), Err(Rejected::Refused(_))), "{id}");
            let assignment = Assignment { id: id.to_owned(), token: Token::new(token(id)), name: None };
            assert!(recover(&state, &assignment, &agent).is_err(), "{id}");
        }
        let named = json!({"action": "start_tunnel", "tunnel_name": long, "tunnel_id": "t1", "token": token("t1")});
        assert_eq!(after(&state, &[named]).name.map(|name| name.len()), Some(MOST_NAME));
    }

    #[test]
    fn a_token_that_is_malformed_or_for_another_tunnel_is_refused() {
        for (bad, cause) in [("%%%".to_owned(), Cause::TokenMalformed), (token("other"), Cause::TokenMismatch)] {
            for (action, key) in [("start_tunnel", "token"), ("restart_tunnel", "tunnel_token")] {
                let command = json!({"action": action, "tunnel_name": "edge", "tunnel_id": "t1", key: bad.clone()});
                match Command::parse(&command) {
                    Err(Rejected::Refused(refusal)) => {
                        assert_eq!(refusal.cause, cause);
                        assert!(!refusal.problem.contains(&bad));
                    }
                    other => panic!("{other:?}"),
                }
            }
        }
    }

    #[test]
    fn nonsense_is_skipped_with_a_word_about_it() {
        for bad in [
            json!({}),
            json!("start_tunnel"),
            json!({"action": 1}),
            json!({"action": "explode"}),
            json!(null),
            json!({"action": "start_tunnel"}),
            json!({"action": "update_tunnel_config", "rules": []}),
            json!({"action": "prepare_decommission", "operation_id": "o"}),
            // The field in which the other command carries its token.
            json!({"action": "start_tunnel", "tunnel_id": "t1", "tunnel_token": token("t1")}),
        ] {
            assert!(matches!(Command::parse(&bad), Err(Rejected::NotUnderstood(_))), "{bad}");
        }
    }

    #[test]
    fn an_assignment_at_registration_recovers_a_lost_command_and_nothing_else() {
        let assignment = |tunnel: &str| Assignment {
            id: tunnel.into(),
            token: Token::new(token(tunnel)),
            name: Some("edge".into()),
        };
        let agent = AgentId::try_from("a".to_owned()).unwrap();
        let mut started = after(&TunnelState::default(), &[start("t1")]);
        started.be(&agent);
        let stopped = after(&started, &[json!({"action": "stop_tunnel"})]);
        assert_eq!(recover(&TunnelState::default(), &assignment("t1"), &agent), Ok(Some(started.clone())));
        assert_eq!(recover(&started, &assignment("t1"), &agent), Ok(None));
        assert_eq!(recover(&stopped, &assignment("t1"), &agent), Ok(None), "a stopped tunnel stays stopped");
        assert_eq!(recover(&stopped, &assignment("t2"), &agent).unwrap().unwrap().desired_state, DesiredState::Running);
        let bad = Assignment { token: Token::new("%%%"), ..assignment("t1") };
        assert!(recover(&started, &bad, &agent).is_err());
    }

    #[test]
    fn rules_wait_until_they_are_pushed_and_do_not_survive_another_tunnel() {
        let rules = json!({"action": "update_tunnel_config", "rules": {"r": {}}});
        let state = after(&TunnelState::default(), &[start("t1"), rules]);
        assert_eq!(state.pending_ingress, Some(json!({"r": {}})));
        assert!(after(&state, &[start("t1")]).pending_ingress.is_some());
        assert!(after(&state, &[start("t2")]).pending_ingress.is_none());
    }
}
