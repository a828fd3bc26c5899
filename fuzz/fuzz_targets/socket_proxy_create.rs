//! Fuzzes bodies of create calls: one that the proxy lets through makes the agent's own container.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| dockflare_agent::fuzzing::socket_proxy_create(bytes));
