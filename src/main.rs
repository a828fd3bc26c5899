//! The program: arguments, signals, exit codes.

use std::io::{self, Write};
use std::process::ExitCode;
use std::time::Duration;

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
/// or taken by another agent, 75 the mounted Docker socket is dead since Docker has made a new one.
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

/// Time limit for a pending write when the program ends.
const LAST_WRITE_LIMIT: Duration = Duration::from_secs(1);

#[expect(clippy::disallowed_methods, reason = "this is main")]
fn main() -> ExitCode {
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return not_started(&error),
    };
    let code = runtime.block_on(async {
        match Arguments::try_parse() {
            Ok(arguments) => perform(arguments.command.unwrap_or(Command::Run)).await,
            Err(error) => Ok(not_understood(&error).await),
        }
    });
    // Finish pending writes, but do not wait for a disk that hangs.
    runtime.shutdown_timeout(LAST_WRITE_LIMIT);
    logging::flush();
    code.unwrap_or_else(|error| not_started(&error))
}

async fn perform(command: Command) -> io::Result<ExitCode> {
    match command {
        Command::Run => match Config::load() {
            Ok(Loaded { config, warnings }) => {
                let (log, shutdown) = begin(&config.log, warnings)?;
                Ok(ended(run(config, log, shutdown).await))
            }
            Err(errors) => Ok(misconfigured(&errors).await),
        },
        Command::Healthcheck => Ok(told(page::check(Config::load_health_page()).await).await),
        Command::Check { json } => Ok(ExitCode::from(u8::from(!check::command(json).await))),
        Command::SupportBundle => {
            bundle::command().await;
            Ok(ExitCode::SUCCESS)
        }
        Command::SocketProxy { check } => match SocketProxyConfig::load() {
            Ok((config, _)) if check => Ok(told(socket_proxy::check(&config.listen).await).await),
            Ok((config, warnings)) => {
                let (_, shutdown) = begin(&config.log, warnings)?;
                Ok(ended(socket_proxy::run(config, shutdown).await))
            }
            Err(errors) => Ok(misconfigured(&errors).await),
        },
    }
}

async fn not_understood(error: &clap::Error) -> ExitCode {
    let text = error.render().to_string();
    if error.use_stderr() {
        logging::print_error(&text).await;
        return ExitCode::from(64);
    }
    logging::print(&text).await;
    ExitCode::SUCCESS
}

/// Reports that the system refuses what every program needs.
fn not_started(error: &io::Error) -> ExitCode {
    let why = if error.kind() == io::ErrorKind::WouldBlock { logging::NO_THREAD } else { "cannot start" };
    let _ = writeln!(io::stderr(), "dockflare-agent: {why} ({error})");
    ExitCode::from(70)
}

async fn told(answer: Result<String, String>) -> ExitCode {
    logging::print(&format!("{}\n", answer.as_ref().unwrap_or_else(|problem| problem))).await;
    ExitCode::from(u8::from(answer.is_err()))
}

async fn misconfigured(errors: &ConfigErrors) -> ExitCode {
    logging::print_error(&format!("dockflare-agent: {errors}\n")).await;
    ExitCode::from(64)
}

fn ended(ended: Result<(), RunError>) -> ExitCode {
    let Err(failure) = ended else { return ExitCode::SUCCESS };
    error!("{}", dockflare_agent::error_chain(&failure));
    ExitCode::from(failure.exit_code())
}

/// Starts logging. Returns the last lines of the log, and the token that is cancelled when the program must stop.
fn begin(log: &LogConfig, warnings: Vec<String>) -> io::Result<(Ring, CancellationToken)> {
    let ring = logging::start(log)?;
    let panicked = RunError::Task("that panicked");
    logging::end_on_panic(panicked.to_string(), panicked.exit_code());
    for warning in warnings {
        warn!("{warning}");
    }
    Ok((ring, shutdown_on_signals()?))
}
