//! Runs the agent as a library between two doubles, one of Docker and one of a master. These tests can cause every
//! fault quickly, and compare what the master believes with what Docker runs.

#![allow(clippy::disallowed_methods, clippy::disallowed_types, clippy::disallowed_macros, reason = "tests may block")]
#![allow(clippy::unwrap_used, reason = "what a test shares with another is test as well")]

mod events;
mod model;
mod scene;
