//! Commands that no honest master sends, and how they may change the desired state.

use proptest::prelude::*;
use serde_json::{Value, json};

use super::commands::{self, Command, Rejected};
use super::decommission::decide;
use super::*;
use crate::hostile::{SECRET, is_one_line, near, text};
use crate::master::wire::Assignment;
use crate::state::testing::token;
use crate::state::{Token, TunnelId};

fn command() -> impl Strategy<Value = Value> {
    let token = token("t1");
    let rule = json!({"hostname": "a.example.com", "service": "http://a", "status": "active"});
    let leaving = |action: &str| {
        json!({"action": action, "operation_id": "o1", "command_id": "c1", "requested_self_action": "stop",
            "expected_tunnel_id": "t1"})
    };
    prop_oneof![
        near(json!({"action": "start_tunnel", "tunnel_name": "edge", "tunnel_id": "t1", "token": token})),
        near(json!({"action": "restart_tunnel", "tunnel_name": "edge", "tunnel_id": "t1", "tunnel_token": token})),
        near(json!({"action": "restart_tunnel", "tunnel_id": "t1", "tunnel_token": SECRET})),
        near(json!({"action": "stop_tunnel"})),
        near(json!({"action": "update_tunnel_config", "rules": {"r": rule}})),
        near(leaving("prepare_decommission")),
        near(leaving("finalize_decommission")),
        near(json!([])),
    ]
}

proptest! {
    #[test]
    fn any_command_is_understood_or_skipped_in_one_line_without_its_token(
        orders in prop::collection::vec(command(), 0..5),
        redeploys in prop_oneof![Just(0), Just(u64::MAX), any::<u64>()],
    ) {
        let mut state = TunnelState { redeploys, ..TunnelState::default() };
        let agent = AgentId::try_from("a1".to_owned()).unwrap();
        let mut tombstone = None;
        for order in &orders {
            let before = state.redeploys;
            match Command::parse(order) {
                Ok(command) => {
                    commands::apply(&mut state, &command);
                    let again = state.redeploys != before;
                    prop_assert_eq!(again, matches!(command, Command::Restart(_)));
                    if let Command::Prepare(order) | Command::Finalize(order) = &command {
                        for phase in [Phase::Prepared, Phase::Finalized] {
                            let (written, _) = decide(tombstone.as_ref(), &agent, state.id.as_ref(), order, phase);
                            tombstone = written.or(tombstone);
                        }
                    }
                    // The resulting state must survive the way to disk and back.
                    let text = serde_json::to_vec(&state).unwrap();
                    prop_assert!(serde_json::from_slice::<TunnelState>(&text).is_ok());
                    let shown = format!("{command:?}");
prop_assert!(!shown.contains(&token("t1")), "{}", shown);
                }
                Err(Rejected::NotUnderstood(text)) => {
                    prop_assert!(is_one_line(&text) && !text.contains(SECRET), "{}", text);
                }
                Err(Rejected::Refused(refusal)) => {
                    prop_assert!(is_one_line(&refusal.problem) && !refusal.problem.contains(SECRET), "{:?}", refusal);
                }
            }
        }
    }

    #[test]
    fn any_assignment_at_a_registration_is_taken_or_refused(id in text(), text in text(), of in text()) {
        let agent = AgentId::try_from("a".to_owned()).unwrap();
        for token in [text, token(&of), token(&id)] {
            let assignment = Assignment { id: id.clone(), token: Token::new(token.clone()), name: None };
            match commands::recover(&TunnelState::default(), &assignment, &agent) {
                Ok(state) => prop_assert_eq!(state.unwrap().id.unwrap(), TunnelId(id.trim().to_owned())),
                Err(refusal) => {
                    prop_assert!(is_one_line(&refusal.problem), "{:?}", refusal);
                    prop_assert!(token.len() < 20 || !refusal.problem.contains(&token), "{:?}", refusal);
                }
            }
        }
    }
}
