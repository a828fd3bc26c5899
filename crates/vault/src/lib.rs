//! `dockflare-vault` keeps credentials sealed and hands them out by one table of grants. The whole of it is one sentence:
//!
//! > A **principal** asks for an operation on a **secret**; one table of **grants** answers; one **store** holds it
//! > sealed; a **door** carries it; one line of **audit** remains.
//!
//! ```text
//!   doors/admin ────Request──> vault ──authorize──> grant      nothing is decided anywhere else
//!   doors/deliver ──get──────>   │
//!                              ├──> store/sealed ──seal──> one file, one transaction for what belongs together
//!                              └──> audit ──────────────> one chained line, on disk before a change takes effect
//! ```
//!
//! | file | owns | never does |
//! |---|---|---|
//! | [`secret`] | names and values, and that a value is wiped | show a value |
//! | [`principal`] | who asks, and what proved it | believe a field that anybody may write |
//! | [`grant`] | the table and the one `authorize` | look at a store |
//! | [`seal`] | keys, sealing, keyed hashes | know what is sealed |
//! | [`store`] | the file, its keys, versions, rotations, what was tampered with | decide who may |
//! | [`audit`] | the chained lines | hold a value |
//! | [`vault`] | the order of all that: decide, do, write down, answer | speak to anybody outside |
//! | [`doors`] | how it is asked, and files into the directories of workloads | decide |
//! | [`reload`] | what happens to containers when their files have changed | read a secret |
//! | [`docker`] | the four calls of Docker, always through [`socket_proxy`], a second process | decide |
//! | [`launcher`] | files into the environment of a program, in its container | know the store |
//!
//! Around them: [`config`] (one YAML file), [`delivery`] (what a workload is to have), [`keyfile`] (the master key), [`start`] (lock, key, store, audit), [`run`] (the
//! running vault and its tasks), [`cli`] and [`client`] (the command line over the admin socket), [`pages`], [`check`],
//! [`bundle`]. A new door is a file below `doors/` that makes a [`principal::Principal`] and calls [`vault::Vault`]; a new
//! operation is a row of [`grant::Operation`].
//!
//! After a crash at any instant the store is as it was before a change or after it; what was answered is kept.

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
