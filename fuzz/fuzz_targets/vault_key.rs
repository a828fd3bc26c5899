//! Fuzzes key files: no key is ever shown, whatever is wrong with its file.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| dockflare_vault::fuzzing::key_file(bytes));
