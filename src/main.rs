//! The program: arguments, signals, exit codes.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use dockflare_agent::config::{Config, ConfigErrors, Loaded, LogConfig, SocketProxyConfig};
use dockflare_agent::logging::Ring;
use dockflare_agent::signals::shutdown_on_signals;
use dockflare_agent::{RunError, bundle, check, logging, page, run, socket_proxy};
use tokio_util::sync::CancellationToken;
use tracing::{error, warn};

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
    /// Stand between the agent and the Docker socket, and let through what the agent needs.
    SocketProxy {
        /// Ask the one that runs in this container whether it reaches Docker; exit 0 if so, 1 if not.
        #[arg(long)]
        check: bool,
    },
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
        Command::Run => match Config::load() {
            Ok(Loaded { config, warnings }) => {
                let (log, shutdown) = begin(&config.log, warnings)?;
                Ok(ended(run(config, log, shutdown).await))
            }
            Err(errors) => Ok(misconfigured(&errors)),
        },
        Command::Healthcheck => Ok(told(page::check(Config::load_health_page()).await)),
        Command::Check { json } => Ok(ExitCode::from(u8::from(!check::command(json).await))),
        Command::SupportBundle => {
            bundle::command().await;
            Ok(ExitCode::SUCCESS)
        }
        Command::SocketProxy { check } => match SocketProxyConfig::load() {
            Ok((config, _)) if check => Ok(told(socket_proxy::check(&config.listen).await)),
            Ok((config, warnings)) => {
                let (_, shutdown) = begin(&config.log, warnings)?;
                Ok(ended(socket_proxy::run(config, shutdown).await))
            }
            Err(errors) => Ok(misconfigured(&errors)),
        },
    }
}

fn told(answer: Result<String, String>) -> ExitCode {
    println!("{}", answer.as_ref().unwrap_or_else(|problem| problem));
    ExitCode::from(u8::from(answer.is_err()))
}

fn misconfigured(errors: &ConfigErrors) -> ExitCode {
    eprintln!("dockflare-agent: {errors}");
    ExitCode::from(64)
}

fn ended(ended: Result<(), RunError>) -> ExitCode {
    let Err(failure) = ended else { return ExitCode::SUCCESS };
    error!("{}", dockflare_agent::error_chain(&failure));
    ExitCode::from(failure.exit_code())
}

/// Starts logging; gives the last lines of the log, and the token that tells when to stop.
fn begin(log: &LogConfig, warnings: Vec<String>) -> anyhow::Result<(Ring, CancellationToken)> {
    let ring = logging::start(log)?;
    let panicked = RunError::Task("that panicked");
    logging::end_on_panic(panicked.to_string(), panicked.exit_code());
    for warning in warnings {
        warn!("{warning}");
    }
    Ok((ring, shutdown_on_signals()?))
}
