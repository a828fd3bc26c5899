//! A development double of a DockFlare master, for trying an agent without a Cloudflare account.
//!
//! The double refuses what a real master refuses. It records a *protocol violation* for a message that no
//! agent should send, even where a real master accepts it. It shows what a master would believe about each
//! agent, and breaks its side of the connection on request. Do not run it as a master: it has no storage,
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
//! # How a request travels
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
//! One lock guards all state, and nothing waits while holding it. Each request therefore takes effect at
//! one instant, and the order of the journal is the order of the effects.

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
