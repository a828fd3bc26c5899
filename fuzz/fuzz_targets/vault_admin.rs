//! Fuzzes requests at the vault's admin socket.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| dockflare_vault::fuzzing::admin_request(bytes));
