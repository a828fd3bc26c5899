//! What every program of this project shares: how it logs, waits, stops, serves its pages, asks others over HTTP,
//! and keeps secrets out of what it shows. Nothing here knows what a program is for.

#![cfg_attr(
    test,
    allow(clippy::disallowed_methods, clippy::disallowed_types, clippy::disallowed_macros, reason = "tests may block")
)]

use std::error::Error;

pub mod aside;
pub mod container;
pub mod disk;
pub mod http;
pub mod lock;
pub mod logging;
mod outlet;
pub mod page;
pub mod places;
pub mod pulse;
pub mod redact;
pub mod retry;
pub mod signals;
pub mod words;

/// An error with its causes, in one line.
pub fn error_chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        // Some libraries repeat their cause in their own words.
        if !text.ends_with(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        next = cause.source();
    }
    text
}
