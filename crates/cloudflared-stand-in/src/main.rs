//! The stand-in's `cloudflared` program: see the library's page for what it does and how to make it fail.

#![allow(clippy::disallowed_methods, clippy::disallowed_types, clippy::disallowed_macros, reason = "for development")]

use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Parser;
use cloudflared_stand_in::cli::{Cli, Command, TunnelCommand, TunnelEnv};
use cloudflared_stand_in::script::Script;
use cloudflared_stand_in::{http, run};

fn main() -> ExitCode {
    match execute(Cli::parse()) {
        // An exit code has eight bits.
        Ok(code) => ExitCode::from(u8::try_from(code & 0xff).unwrap_or(u8::MAX)),
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn execute(cli: Cli) -> Result<i32> {
    let script = Script::from_vars(utf8_vars()).context("stand-in: the environment's words")?;
    let (metrics, command) = match cli.command {
        Some(Command::Tunnel { metrics, command, .. }) if !cli.version => (metrics, command),
        Some(Command::Version) => return Ok(print_version(&script)),
        _ if cli.version => return Ok(print_version(&script)),
        _ => anyhow::bail!("nothing to do: see cloudflared --help"),
    };
    let mut env = TunnelEnv::from_vars(utf8_vars())?;
    env.metrics = metrics.or(env.metrics);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    Ok(match command {
        TunnelCommand::Run { token, token_file } => {
            if token.is_some() || token_file.is_some() {
                (env.token, env.token_file) = (token, token_file);
            }
            let code = runtime.block_on(run::run(env, script));
            // Do not wait for a lookup of an edge's name that is still running.
            runtime.shutdown_background();
            code?
        }
        TunnelCommand::Ready => runtime.block_on(ready(&env))?,
    })
}

/// Build time that the claimed version reports. Any time will do.
const BUILT: &str = "2025-09-15-1303 UTC";

fn print_version(script: &Script) -> i32 {
    println!("cloudflared version {} (built {})", script.behaviour().version, BUILT);
    0
}

/// Asks `/ready` without a time limit, like the original. Docker limits its health checks itself.
async fn ready(env: &TunnelEnv) -> Result<i32> {
    let address = env.metrics.as_deref().context("--metrics has to be provided")?;
    let answer = http::get(address, "/ready").await?;
    if answer.status == 200 {
        return Ok(0);
    }
    eprintln!("http://{address}/ready endpoint returned status code {}\n{}", answer.status, answer.body);
    Ok(1)
}

/// Skips variables that are not UTF-8: none of ours can be.
fn utf8_vars() -> impl Iterator<Item = (String, String)> {
    std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
}
