//! Fuzzes what the Engine sends: an event, an entry of a listing, an inspection.
#![no_main]

use bollard::models;
use dockflare_agent::docker::{Container, Event, Inspected};

libfuzzer_sys::fuzz_target!(|text: &[u8]| {
    if let Ok(event) = serde_json::from_slice::<models::EventMessage>(text) {
        drop(Event::from(event));
    }
    if let Ok(container) = serde_json::from_slice::<models::ContainerSummary>(text) {
        assert!(!Container::from(container).name.contains('/'));
    }
    if let Ok(container) = serde_json::from_slice::<models::ContainerInspectResponse>(text) {
        drop(Inspected::from(container));
    }
});
