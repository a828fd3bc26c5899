//! The program of the containers that tests and the demo label: a web server, or a program that just exits.
//!
//! | arguments | what happens |
//! |---|---|
//! | none | answers `hello from <hostname>` on port 8080 (`PORT`) until SIGTERM or SIGINT, then exits 0 |
//! | `exit N` | exits N at once |
//! | `sleep MS` | exits 0 after that many milliseconds, or on a signal |

#![allow(clippy::disallowed_methods, clippy::disallowed_types, clippy::disallowed_macros, reason = "for development")]

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use axum::Router;
use axum::routing::get;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};

fn main() -> ExitCode {
    match execute() {
        Ok(code) => code,
        Err(error) => {
            eprintln!("workload: {error:#}");
            ExitCode::from(64)
        }
    }
}

fn execute() -> Result<ExitCode> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    match arguments[..] {
        ["exit", code] => return Ok(ExitCode::from(code.parse::<u8>().context("exit code")?)),
        ["sleep", ms] => {
            let time = Duration::from_millis(ms.parse().context("milliseconds")?);
            // Ends at a signal as well.
            runtime.block_on(async { drop(tokio::time::timeout(time, asked_to_stop()).await) });
        }
        [] => runtime.block_on(serve())?,
        _ => bail!("usage: workload [exit N | sleep MS]"),
    }
    Ok(ExitCode::SUCCESS)
}

async fn serve() -> Result<()> {
    let port = std::env::var("PORT").unwrap_or_else(|_| "8080".into()).parse::<u16>().context("PORT")?;
    let hostname = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let greeting = format!("hello from {}\n", hostname.trim());
    let listener = TcpListener::bind(("0.0.0.0", port)).await.with_context(|| format!("port {port}"))?;
    println!("workload: listening on {}", listener.local_addr()?);
    let server = axum::serve(listener, Router::new().fallback(get(|| async move { greeting })));
    // Not a graceful shutdown: that would wait for idle keep-alive connections.
    tokio::select! {
        served = server => served?,
        stopped = asked_to_stop() => stopped?,
    }
    println!("workload: stopping");
    Ok(())
}

/// Waits for SIGTERM or SIGINT: PID 1 ends only by a signal that it handles.
async fn asked_to_stop() -> Result<()> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    tokio::select! { _ = terminate.recv() => {}, _ = interrupt.recv() => {} }
    Ok(())
}
