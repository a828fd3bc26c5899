//! The keys that the vault's store holds.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| dockflare_vault::fuzzing::key_ring(bytes));
