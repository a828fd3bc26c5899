//! Fuzzes a master's answers: a registration, commands, a refusal.
#![no_main]

libfuzzer_sys::fuzz_target!(|body: &[u8]| dockflare_agent::fuzzing::reply(body));
