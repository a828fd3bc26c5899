//! Key files: none is shown, whatever is wrong with it.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| dockflare_vault::fuzzing::key_file(bytes));
