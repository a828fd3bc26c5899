//! The agent as a library between two doubles, of Docker and of a master: every fault can be had here, quickly, and
//! what the master believes is compared with what Docker runs.

#![allow(clippy::disallowed_methods, clippy::disallowed_types, clippy::disallowed_macros, reason = "tests may block")]
#![allow(clippy::unwrap_used, reason = "what a test shares with another is test as well")]

mod events;
mod model;
mod scene;
