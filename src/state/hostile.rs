//! Files damaged by a broken disk or by somebody else, at every position; and forged tokens.

use base64::Engine as _;
use proptest::prelude::*;
use serde_json::{Value, json};

use super::testing::token;
use super::*;
use crate::hostile::{SECRET, body, is_one_line, near, text};

fn state() -> TunnelState {
    TunnelState {
        token: Some(Token::new(token("t1"))),
        id: Some(TunnelId("t1".into())),
        name: Some("edge".into()),
        desired_state: DesiredState::Running,
        redeploys: 7,
        pending_ingress: Some(json!({"r": {"hostname": "a.example.com"}})),
        ..TunnelState::default()
    }
}

fn tombstone() -> Tombstone {
    Tombstone {
        schema_version: 1,
        operation_id: "o1".into(),
        agent_id: AgentId::try_from("a1".to_owned()).unwrap(),
        phase: Phase::Prepared,
        requested_self_action: "stop".into(),
        prepared_at: Some("2026-01-31T10:00:00Z".into()),
        finalized_at: None,
        acknowledged: false,
    }
}

/// What the store makes of a document with this text: the document as JSON, or why it was set aside.
fn found(store: &Store, name: &'static str, text: &[u8]) -> Result<Value, String> {
    fs::write(store.dir().join(name), text).unwrap();
    let (document, set_aside) = match name {
        TUNNEL => {
            let found = store.tunnel().unwrap();
            (found.document.map(|document| serde_json::to_value(document).unwrap()), found.set_aside)
        }
        TOMBSTONE => {
            let found = store.tombstone().unwrap();
            (found.document.map(|document| serde_json::to_value(document).unwrap()), found.set_aside)
        }
        _ => {
            let found = store.agent_id().unwrap();
            (found.document.map(|document| json!(document.as_str())), found.set_aside)
        }
    };
    match (document, set_aside) {
        (Some(document), None) => Ok(document),
        (None, Some(aside)) => {
            assert_eq!(fs::read(&aside.to).unwrap(), text, "nothing is lost");
            fs::remove_file(aside.to).unwrap();
            Err(aside.problem)
        }
        other => panic!("{name}: both or neither: {other:?}"),
    }
}

fn documents() -> [(&'static str, Vec<u8>); 3] {
    [
        (TUNNEL, serde_json::to_vec_pretty(&state()).unwrap()),
        (TOMBSTONE, serde_json::to_vec_pretty(&tombstone()).unwrap()),
        (AGENT_ID, b"5a353bfd-7b7a-4017-afe3-99d29fefd303".to_vec()),
    ]
}

#[test]
fn a_file_that_is_cut_off_or_zeroed_anywhere_is_set_aside() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    for (name, whole) in documents() {
        assert!(found(&store, name, &whole).is_ok());
        for at in 0..whole.len() {
            let zeroed = |range: std::ops::Range<usize>| {
                let mut text = whole.clone();
                text[range].fill(0);
                text
            };
            let mut broken = vec![zeroed(at..at + 1), zeroed(at..whole.len()), zeroed(0..at + 1)];
            // A truncated id is still an id. The file has the Python agent's form, which has no checksum.
            if name != AGENT_ID || at == 0 {
                broken.push(whole[..at].to_vec());
            }
            for text in broken {
                let problem = found(&store, name, &text).expect_err(&format!("{name} at {at} was taken"));
                assert!(is_one_line(&problem), "{problem}");
            }
        }
    }
}

#[test]
fn a_file_with_one_byte_changed_anywhere_says_what_it_said_or_what_it_says_now_or_is_set_aside() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let (mut taken, mut set_aside) = (0, 0);
    for (name, whole) in documents() {
        let said = found(&store, name, &whole).unwrap();
        for at in 0..whole.len() {
            for bit in 0..8 {
                let mut text = whole.clone();
                text[at] ^= 1 << bit;
                let Ok(document) = found(&store, name, &text) else {
                    set_aside += 1;
                    continue;
                };
                taken += 1;
                // The Python agent's form has no checksum, so a changed letter in a name is another name. But nothing
                // may come out that is not in the file, and none of the agent's own words may turn into another one.
                if name == AGENT_ID {
                    assert_eq!(document, json!(String::from_utf8(text).unwrap().trim()));
                    continue;
                }
                let literally: Value = serde_json::from_slice(&text).unwrap();
                for (key, value) in document.as_object().unwrap() {
                    let is_default = literally.get(key).is_none() && (value.is_null() || is_default(key, value));
                    let is_same = literally.get(key) == Some(value);
                    assert!(is_same || is_default, "{name} at {at}, bit {bit}: {key} became {value}");
                }
                for key in ["desired_state", "phase"] {
                    let now = &document[key];
                    assert!(now == &said[key] || now == "unknown", "{name} at {at}, bit {bit}: {key} became {now}");
                }
            }
        }
    }
    println!("{set_aside} set aside, {taken} taken");
    assert!(set_aside > taken);
}

/// Whether this is the value of a key that the file does not have.
fn is_default(key: &str, value: &Value) -> bool {
    [("desired_state", json!("unknown")), ("redeploys", json!(0)), ("acknowledged", json!(true))]
        .contains(&(key, value.clone()))
}

proptest! {
    #[test]
    fn any_state_file_is_taken_as_it_is_or_refused_without_its_content(
        text in body({
            let mut good = serde_json::to_value(state()).unwrap();
            good["token"] = json!(SECRET);
            good
        }),
    ) {
        match parse_json::<TunnelState>(text) {
            Ok(state) => {
                let again = parse_json::<TunnelState>(serde_json::to_vec_pretty(&state).unwrap()).unwrap();
                prop_assert_eq!(
                    (&again.token, &again.id, &again.name, again.desired_state, again.redeploys, again.unclaimed),
                    (&state.token, &state.id, &state.name, state.desired_state, state.redeploys, state.unclaimed)
                );
            }
            Err(problem) => prop_assert!(is_one_line(&problem) && !problem.contains(SECRET), "{}", problem),
        }
    }

    #[test]
    fn any_tombstone_is_taken_as_it_is_or_refused(text in body(serde_json::to_value(tombstone()).unwrap())) {
        match parse_json::<Tombstone>(text) {
            Ok(stone) => {
                let again = parse_json::<Tombstone>(serde_json::to_vec_pretty(&stone).unwrap()).unwrap();
                prop_assert_eq!(again, stone);
            }
            Err(problem) => prop_assert!(is_one_line(&problem), "{}", problem),
        }
    }

    #[test]
    fn any_agent_id_that_is_taken_is_safe_in_a_path_and_in_a_log(id in text()) {
        if let Ok(id) = AgentId::try_from(id) {
            prop_assert!(is_one_line(id.as_str()) && !id.as_str().contains(['/', '%', ' ', '?']));
        }
    }

    #[test]
    fn any_token_has_claims_or_a_problem_without_its_content(
        text in text(),
        bytes in body(json!({"a": "account", "t": "tunnel", "s": SECRET})),
        near in near(json!({"a": "account", "t": "tunnel", "s": SECRET})),
    ) {
        let encode = |bytes: &[u8]| base64::engine::general_purpose::STANDARD.encode(bytes);
        for text in [text, encode(&bytes), encode(near.to_string().as_bytes())] {
            let token = Token::new(text.clone());
            let shown = format!("{token:?}{:?}", token.claims());
prop_assert!(!shown.contains(SECRET), "{}", shown);
            match token.claims() {
                Ok(claims) => prop_assert!(!claims.account.is_empty() && !claims.tunnel.0.is_empty()),
                Err(problem) => prop_assert!(is_one_line(problem) && (text.len() < 40 || !problem.contains(&text))),
            }
        }
    }
}
