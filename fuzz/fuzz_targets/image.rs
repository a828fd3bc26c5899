//! Fuzzes image references: an accepted one is displayed as it was written.
#![no_main]

use dockflare_agent::config::ImageRef;

libfuzzer_sys::fuzz_target!(|text: &str| {
    if let Ok(image) = text.parse::<ImageRef>() {
        assert!(image.to_string().starts_with(text));
    }
});
