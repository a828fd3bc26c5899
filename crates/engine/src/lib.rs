//! The one door to Docker, for every program of the project: how the Engine is reached, how it is asked, what its
//! errors mean ([`Client`], [`DockerError`]), and the strict socket proxy that a program puts between itself and the
//! socket ([`proxy`]). What a program asks of Docker, and what its proxy lets through, is its own.
//!
//! Each call has a time limit that covers its whole answer. No connection is kept for a second call, so that one that a
//! proxy closed in the meantime is never used for a call that must not be made twice. What people can write into without
//! end, as labels, is read into little memory ([`sieve`]).

#![cfg_attr(
    test,
    allow(clippy::disallowed_methods, clippy::disallowed_types, clippy::disallowed_macros, reason = "tests may block")
)]

mod address;
mod client;
mod error;
mod orphan;
pub mod proxy;
pub mod sieve;
pub mod transport;

pub use address::{DockerHost, DockerTls};
pub use client::{CHANGE_LIMIT, Client, READ_LIMIT, absent_is_none, limited};
pub use error::{Call, DockerError, NOT_ATTACHABLE, last_cause, one_line, sort};
pub use orphan::orphaned;

/// What a call gives.
pub type Result<T> = std::result::Result<T, DockerError>;
