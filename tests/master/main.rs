//! Runs the agent and its master as two programs on one host without Docker, and tests each row of the protocol.

#![allow(clippy::disallowed_methods, clippy::disallowed_types, clippy::disallowed_macros, reason = "tests may block")]
#![allow(clippy::unwrap_used, reason = "what a test shares with another is test as well")]

#[path = "../support/mod.rs"]
mod support;

mod bundle;
mod certificates;
mod check;
mod counts;
mod desk;
mod disk;
mod folder;
mod hang;
mod key;
mod kills;
mod labels;
mod monitoring;
mod oddities;
mod outages;
mod pages;
mod program;
mod registration;
mod secrets;
mod session;
mod unread;
