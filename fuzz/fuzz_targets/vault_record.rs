//! Fuzzes records of the vault's store, and its state.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| dockflare_vault::fuzzing::record(bytes));
