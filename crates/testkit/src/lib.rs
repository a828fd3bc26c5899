//! The support code that the engine tests and the demo share: access to a real Docker Engine, images made from local
//! files, and scopes that leave nothing behind.
//!
//! # A test file
//!
//! ```no_run
//! # // In Cargo.toml: [[test]] name = "…", harness = false
//! use std::time::Duration;
//! use testkit::{Scope, Spec, wait_until};
//!
//! async fn a_workload_ends_with_its_code() -> anyhow::Result<()> {
//!     let scope = Scope::new(testkit::docker()?);
//!     let id = scope.run_workload(&[("dockflare.enable", "true")], &["exit", "3"], None, false).await?;
//!     wait_until("the end", Duration::from_secs(10), async || {
//!         let state = scope.inspect(&id).await.ok()?.state?;
//!         (state.exit_code == Some(3)).then_some(())
//!     })
//!     .await
//! }
//!
//! fn main() -> std::process::ExitCode {
//!     testkit::main(testkit::cases![a_workload_ends_with_its_code])
//! }
//! ```
//!
//! # Guarantees
//!
//! - **Without an engine** the runner reports every case as ignored. With `CI=true` every case fails instead.
//! - **Nothing is left behind.** A dropped [`Scope`] removes everything with its label and everything registered by
//!   name, also on panic. [`main`] removes the images of this process. The next start sweeps what a killed process
//!   left. The kit removes only things with this crate's labels and names that a scope registered.
//! - **A failure explains itself.** A failing case prints the logs of the scope's containers and of the
//!   [`AgentProcess`]es; a passing one does not.
//!
//! # Parts
//!
//! [`main`], [`case`], [`cases!`] run tests · [`docker`], [`engine`], [`wait_until`] reach the engine ·
//! [`Scope`] with [`Spec`] and [`Proxy`] makes containers, networks and volumes · [`images`] makes images from
//! [`Files`] · [`SocketProxy`] runs the agent's own proxy as a process · [`FakeDocker`] is an engine that fails on
//! demand · [`binary`] builds the workspace's programs · [`AgentProcess`] runs one outside Docker ·
//! [`token`], [`http`] talk to the `cloudflared` stand-in.

#![allow(clippy::disallowed_methods, clippy::disallowed_types, clippy::disallowed_macros, reason = "for development")]
#![allow(
    clippy::expect_used,
    clippy::unwrap_used,
    reason = "test support: a panic with a clear message is how it reports what cannot go on"
)]

mod agent;
mod binaries;
mod cleanup;
mod compose;
mod containers;
mod dockerfile;
mod engine;
mod fake_docker;
mod files;
mod haproxy;
mod images;
mod process;
mod proxy;
mod runner;
mod scope;
mod socket_proxy;

pub use agent::AgentProcess;
pub use binaries::{binary, cargo, cargo_build, release_binary, workspace_root};
pub use bollard::{self, Docker, models};
pub use cleanup::{clean_up, remove_labelled, sweep};
pub use cloudflared_stand_in::edge::{Edge, Whose};
pub use cloudflared_stand_in::http;
pub use cloudflared_stand_in::transport::Protocol as Via;
pub use compose::Compose;
pub use containers::{Spec, logs};
pub use engine::{docker, engine, in_ci, number, skipped, socket_path, wait_until};
pub use fake_docker::{FakeDocker, Listing};
pub use files::Files;
pub use images::{Images, images};
pub use proxy::{PROXY_OPENS, Proxy};
pub use runner::{Case, SWEPT, case, main, note};
pub use rustix::process::Signal;
pub use scope::Scope;
pub use socket_proxy::{Between, SocketProxy};

/// Returns a fresh tunnel token that scripts the stand-in. `words` come from the stand-in's table (`unready`,
/// `ready-after=500 connections=2`); an empty string makes a healthy tunnel.
#[must_use]
pub fn token(tunnel_id: &str, words: &str) -> String {
    cloudflared_stand_in::token::Token::scripted(tunnel_id, words)
}
