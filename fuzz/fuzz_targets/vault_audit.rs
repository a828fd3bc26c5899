//! Fuzzes lines of the vault's audit.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| dockflare_vault::fuzzing::audit(bytes));
