//! `dockflare-vault` keeps credentials sealed and hands them out by one table of grants. The design in one sentence:
//!
//! > A **principal** asks for an operation on a **secret**; the table of **grants** decides; the **store** keeps the
//! > secret sealed; a **door** carries request and answer; the **audit** keeps one line of it.
//!
//! ```text
//!   doors/admin ────Request──> vault ──authorize──> grant      the only place that decides
//!   doors/deliver ──get──────>   │
//!                              ├──> store/sealed ──seal──> one file, one transaction per change
//!                              └──> audit ──────────────> one chained line, on disk before a change takes effect
//! ```
//!
//! | file | owns | never does |
//! |---|---|---|
//! | [`secret`] | names and values, and wiping values | show a value |
//! | [`principal`] | who asks, and what proved it | trust a field that anyone can write |
//! | [`grant`] | the table and `authorize`, which decides | look at a store |
//! | [`seal`] | keys, sealing, keyed hashes | know what it seals |
//! | [`store`] | the file, its keys, versions, rotations, tamper detection | decide who may do what |
//! | [`audit`] | the chained log lines | contain a value |
//! | [`vault`] | the order of steps: decide, do, record, answer | talk to the outside |
//! | [`doors`] | incoming requests, and files delivered into workload directories | decide |
//! | [`reload`] | reloading the containers whose files have changed | read a secret |
//! | [`docker`] | the four Docker API calls, always through [`socket_proxy`], a second process | decide |
//! | [`launcher`] | files turned into the environment of a program, inside its container | know the store |
//!
//! Around them: [`config`] (one YAML file), [`delivery`] (what a workload gets), [`keyfile`] (the master key),
//! [`start`] (lock, key, store, audit), [`run`] (the running vault and its tasks), [`cli`] and [`client`] (the command
//! line over the admin socket), [`pages`], [`check`], [`bundle`]. To add a door, add a file below `doors/` that makes a
//! [`principal::Principal`] and calls [`vault::Vault`]. To add an operation, add a variant to [`grant::Operation`].
//!
//! After a crash at any instant the store holds the state from before a change or from after it. Whatever was answered
//! is kept.

#![cfg_attr(
    test,
    allow(clippy::disallowed_methods, clippy::disallowed_types, clippy::disallowed_macros, reason = "tests may block")
)]

pub mod audit;
pub mod bundle;
pub mod check;
pub mod cli;
pub mod client;
pub mod config;
pub mod delivery;
pub mod docker;
pub mod doors;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing;
pub mod grant;
pub mod keyfile;
pub mod launcher;
pub mod pages;
mod place;
pub mod principal;
pub mod reload;
pub mod run;
pub mod seal;
pub mod secret;
pub mod settings;
pub mod socket_proxy;
pub mod start;
pub mod store;
pub mod vault;
