//! The only way to Docker, for every program of the project: how to reach the Engine, how to call it, what its errors
//! mean ([`Client`], [`DockerError`]), and the strict socket proxy that a program puts between itself and the socket
//! ([`proxy`]). Each program defines its own calls, and what its proxy lets through.
//!
//! Each call has a time limit that covers its whole answer. Each call opens a new connection: a proxy may have closed
//! an old one, and some calls must not be sent twice. Texts that people can make as long as they like, such as labels,
//! are read in bounded memory ([`sieve`]).

#![cfg_attr(
    test,
    allow(clippy::disallowed_methods, clippy::disallowed_types, clippy::disallowed_macros, reason = "tests may block")
)]

mod address;
mod client;
mod container;
mod error;
mod orphan;
pub mod proxy;
pub mod sieve;
pub mod transport;

pub use address::{DockerHost, DockerTls};
pub use client::{CHANGE_LIMIT, Client, READ_LIMIT, absent_is_none, limited};
pub use container::{Health, RunState};
pub use error::{Call, DockerError, NOT_ATTACHABLE, last_cause, one_line, sort};
pub use orphan::orphaned;

/// The result of a call.
pub type Result<T> = std::result::Result<T, DockerError>;
