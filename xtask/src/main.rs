//! The project's own commands.
//!
//! - [`mod@test`]: `cargo xtask test`, every check, with one line of totals at the end.
//! - [`mod@classify`]: `cargo xtask classify`, the agent's verdicts on a recording of the real cloudflared.
//! - [`demo`]: `cargo xtask demo`, the agent's main job on this machine, without a master or a Cloudflare account.
//! - [`soak`]: `cargo xtask soak`, the agent under one fault after another, for as many minutes as you like.

#![allow(clippy::disallowed_methods, clippy::disallowed_types, clippy::disallowed_macros, reason = "for development")]

use std::process::ExitCode;

use clap::{Parser, Subcommand};

mod classify;
mod demo;
mod soak;
mod test;

/// The project's own commands.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Check format, lints, tests and documentation; the last line is `N passed, N failed, N skipped`.
    ///
    /// What needs a Docker Engine is skipped where none answers, but fails under CI=true.
    Test,
    /// Watch the agent work on this machine: no DockFlare master, no Cloudflare account, nothing pulled.
    ///
    /// Exit codes: 0 all steps seen, 1 one was not, 69 no Docker Engine answers.
    Demo(demo::Arguments),
    /// Print what the agent makes of a recording of cloudflared: `seconds verdict`, one line per second.
    ///
    /// The folder holds `log.txt` and `samples.jsonl`, and `log-b.txt` where there is a second connector, whose
    /// lines are `seconds verdict b`. Nothing else in it is read.
    Classify(classify::Arguments),
    /// Let the agent work for a while, with a fault every few seconds, and see that nothing is lost.
    ///
    /// Exit codes: 0 nothing was lost, 1 something was, 69 no Docker Engine answers.
    Soak(soak::Arguments),
}

fn main() -> ExitCode {
    match Arguments::parse().command {
        Command::Test => test::run(),
        Command::Classify(arguments) => classify::run(&arguments),
        Command::Demo(arguments) => demo::run(&arguments),
        Command::Soak(arguments) => soak::run(&arguments),
    }
}
