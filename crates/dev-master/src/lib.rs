//! A development double of a DockFlare master: what an agent can be tried against without a
//! Cloudflare account.
//!
//! It refuses what a real master refuses, notes as a *protocol violation* what a real one lets pass
//! although it should not be sent, shows what a master would believe of each agent, and breaks its
//! side of the connection when asked to. Nothing here is fit to run as a master: there is no storage,
//! no TLS and no Cloudflare behind it.
//!
//! ```no_run
//! # async fn demo() -> anyhow::Result<()> {
//! use dockflare_dev_master::{DevMaster, Fault, Protocol, Route};
//! use std::time::Duration;
//!
//! let master = DevMaster::builder().protocol(Protocol::V2).start().await?;
//! let key = master.generate_key("tests");
//! // … start an agent with `key` and `master.url()` …
//! # let _ = key;
//! let minute = Duration::from_secs(60);
//! let id = master
//!     .wait_for("an agent to register", minute, |seen| seen.agents.keys().next().cloned())
//!     .await?;
//! master.fault(Route::Commands, Fault::LostReply, 1);
//! master.enroll(&id, "edge")?;
//! # Ok(())
//! # }
//! ```
//!
//! # The way of a request
//!
//! ```text
//! server ── reads, consults faults ──> agent routes: register, commands, events, decommission, accounts
//!    │                                 operator routes: admin, page          │
//!    │                                                                       v
//!    └── damages or drops the reply                        state: keys, agents, operations, journal
//!                                                                            │
//!                                       snapshot <── DevMaster::wait_for ────┘
//! ```
//!
//! All state is in one place behind one lock and no wait happens under it, so each request is handled
//! at one instant: the order of the journal is the order of the effects.

#![allow(clippy::disallowed_methods, clippy::disallowed_types, clippy::disallowed_macros, reason = "for development")]

mod accounts;
mod admin;
mod builder;
mod check;
mod commands;
mod decommission;
mod events;
mod fault;
mod journal;
mod master;
mod operate;
mod page;
mod register;
mod reply;
mod request;
mod server;
mod snapshot;
mod state;

pub use builder::Builder;
pub use decommission::{Decommission, Phase};
pub use fault::{Fault, Times};
pub use journal::Request;
pub use master::DevMaster;
pub use operate::{Command, tunnel_token};
pub use request::Route;
pub use snapshot::{Agent, AgentStatus, Container, PushedConfig, Snapshot, Tunnel, TunnelStatus};
pub use state::{Limits, Protocol};
