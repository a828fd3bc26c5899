//! Fuzzes the key ring in the vault's store.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| dockflare_vault::fuzzing::key_ring(bytes));
