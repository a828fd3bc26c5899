//! Fuzzes the files in the data folder: an accepted one round-trips unchanged.
#![no_main]

use dockflare_agent::state::{AgentId, Tombstone, TunnelState};

libfuzzer_sys::fuzz_target!(|text: &[u8]| {
    if let Ok(state) = serde_json::from_slice::<TunnelState>(text) {
        let again: TunnelState = serde_json::from_slice(&serde_json::to_vec_pretty(&state).unwrap()).unwrap();
        assert!(again.token == state.token && again.id == state.id && again.redeploys == state.redeploys);
    }
    if let Ok(stone) = serde_json::from_slice::<Tombstone>(text) {
        let again: Tombstone = serde_json::from_slice(&serde_json::to_vec_pretty(&stone).unwrap()).unwrap();
        assert_eq!(again, stone);
    }
    if let Ok(id) = AgentId::try_from(String::from_utf8_lossy(text).into_owned()) {
        assert!(!id.as_str().contains('/'));
    }
});
