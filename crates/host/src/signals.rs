//! SIGTERM and SIGINT: the first asks to stop, the second ends the process.

use std::io;

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::logging;

/// A token that the first of the two signals cancels.
///
/// # Errors
/// When the system refuses to deliver signals.
pub fn shutdown_on_signals() -> io::Result<CancellationToken> {
    // PID 1 receives only the signals that it asks for.
    let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let shutdown = CancellationToken::new();
    let asked = shutdown.clone();
    tokio::spawn(async move {
        tokio::select! { _ = term.recv() => {}, _ = int.recv() => {} }
        info!("asked to stop");
        asked.cancel();
        tokio::select! { _ = term.recv() => {}, _ = int.recv() => {} }
        warn!("asked to stop a second time: ending at once, the next start puts right what is left");
        logging::flush();
        std::process::exit(0);
    });
    Ok(shutdown)
}
