//! The parts that every program of this project shares: it logs, waits, stops, serves its pages, calls others over
//! HTTP, and keeps secrets out of what it shows. Nothing here depends on the purpose of a program.

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

/// Formats an error with its causes in one line.
pub fn error_chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        // Some libraries repeat the cause in their own text.
        if !text.ends_with(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        next = cause.source();
    }
    text
}
