//! The environment, `NAME=value` in each line.
#![no_main]

use dockflare_agent::config::Config;

libfuzzer_sys::fuzz_target!(|text: &str| {
    // Files named in it are read, which is not what is looked for here.
    let vars = text
        .lines()
        .filter_map(|line| line.split_once('='))
        .filter(|(name, _)| !name.to_ascii_uppercase().ends_with("_FILE"));
    drop(Config::from_vars(vars.map(|(name, value)| (name.to_owned(), value.to_owned()))));
});
