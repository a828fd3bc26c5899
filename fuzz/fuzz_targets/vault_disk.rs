//! What lies on the vault's disk: records, key ring, state, audit lines.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| dockflare_vault::fuzzing::disk(bytes));
