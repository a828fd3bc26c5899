//! Tests the double against its contract: each row of the protocol's tables, each fault, each violation.

#![allow(clippy::disallowed_methods, clippy::disallowed_types, clippy::disallowed_macros, reason = "tests may block")]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails, in its helpers too")]

mod caller;
mod commands;
mod decommission;
mod events_v1;
mod events_v2;
mod faults;
mod operator;
mod program;
mod register;
mod waiting;
