//! Fuzzes the environment, with `NAME=value` on each line.
#![no_main]

use dockflare_agent::config::Config;

libfuzzer_sys::fuzz_target!(|text: &str| {
    // Skip variables that name a file: reading files is not under test.
    let vars = text
        .lines()
        .filter_map(|line| line.split_once('='))
        .filter(|(name, _)| !name.to_ascii_uppercase().ends_with("_FILE"));
    drop(Config::from_vars(vars.map(|(name, value)| (name.to_owned(), value.to_owned()))));
});
