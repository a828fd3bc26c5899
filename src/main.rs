//! The program: arguments, signals, exit codes.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use dockflare_agent::config::Config;
use dockflare_agent::{bundle, check, logging, page, run};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

/// Makes a Docker host reachable through Cloudflare Tunnel. Configured by environment variables, see env-example.
///
/// Exit codes: 0 stopped as asked, 64 bad configuration, 70 a task ended that must not, 73 data folder not usable
/// or taken by another agent.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Run the agent; the default.
    Run,
    /// Ask the agent that runs in this container whether it does its job; exit 0 if so, 1 if not.
    Healthcheck,
    /// Try, without changing anything, each thing that the agent needs; exit 0 if nothing fails, 1 if something does.
    Check {
        /// Print one JSON document, for programs.
        #[arg(long)]
        json: bool,
    },
    /// Print one JSON document without secrets that helps to find out what is wrong.
    SupportBundle,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<ExitCode> {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            error.print()?;
            return Ok(ExitCode::from(if error.use_stderr() { 64 } else { 0 }));
        }
    };
    match arguments.command.unwrap_or(Command::Run) {
        Command::Run => start().await,
        Command::Healthcheck => {
            let healthy = page::check(Config::load_health_page()).await;
            println!("{}", healthy.as_ref().unwrap_or_else(|problem| problem));
            Ok(ExitCode::from(u8::from(healthy.is_err())))
        }
        Command::Check { json } => Ok(ExitCode::from(u8::from(!check::command(json).await))),
        Command::SupportBundle => {
            bundle::command().await;
            Ok(ExitCode::SUCCESS)
        }
    }
}

async fn start() -> anyhow::Result<ExitCode> {
    let loaded = match Config::load() {
        Ok(loaded) => loaded,
        Err(errors) => {
            eprintln!("dockflare-agent: {errors}");
            return Ok(ExitCode::from(64));
        }
    };
    let log = logging::start(&loaded.config.log)?;
    logging::end_on_panic();
    for warning in loaded.warnings {
        warn!("{warning}");
    }
    // As PID 1 a process is sent only the signals that it asks for.
    let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let shutdown = CancellationToken::new();
    let asked = shutdown.clone();
    tokio::spawn(async move {
        tokio::select! { _ = term.recv() => {}, _ = int.recv() => {} }
        info!("asked to stop");
        asked.cancel();
        tokio::select! { _ = term.recv() => {}, _ = int.recv() => {} }
        warn!("asked to stop a second time: ending at once, the next start puts right what is left");
        std::process::exit(0);
    });
    if let Err(failure) = run(loaded.config, log, shutdown).await {
        error!("{}", dockflare_agent::error_chain(&failure));
        return Ok(ExitCode::from(failure.exit_code()));
    }
    Ok(ExitCode::SUCCESS)
}
