//! Fuzzes the vault's configuration.
#![no_main]

libfuzzer_sys::fuzz_target!(|text: &str| dockflare_vault::fuzzing::configuration(text));
