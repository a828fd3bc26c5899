//! Fuzzes requests to the socket proxy: one that it lets through is one of the agent's own calls.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| dockflare_agent::fuzzing::socket_proxy_request(bytes));
