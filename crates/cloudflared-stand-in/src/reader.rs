//! A program that reads a credential, for tests and the demo of the vault. It logs a short hash of the credential it
//! has. It is healthy while a made-up database accepts the credential that it read at start, or again on SIGHUP.
//!
//! | variable | |
//! |---|---|
//! | `PASSWORD` | the credential itself; if unset, the program reads the file |
//! | `PASSWORD_FILE` | the file; default `/run/secrets/db_password` |
//! | `REFUSES` | refused prefixes, separated by commas; default `bad` |
//!
//! The made-up database accepts every credential except those that start with one of `REFUSES`. `credential-reader
//! check` asks the program in this container, and is its health check.

#![allow(clippy::disallowed_methods, clippy::disallowed_types, clippy::disallowed_macros, reason = "for development")]

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::sleep;

const ADDRESS: &str = "127.0.0.1:7432";
const LOOK_EVERY: Duration = Duration::from_millis(5);

fn main() -> ExitCode {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let ended = runtime.context("no runtime").and_then(|runtime| match &arguments[..] {
        [] => runtime.block_on(read()),
        [word] if word == "check" => runtime.block_on(check()),
        _ => bail!("usage: credential-reader [check]"),
    });
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("credential-reader: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// FNV-1a hash: enough to tell two credentials apart, and does not show the credential.
fn hash(bytes: &[u8]) -> String {
    let hash = bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3));
    format!("{hash:016x}")
}

fn file() -> String {
    std::env::var("PASSWORD_FILE").unwrap_or_else(|_| "/run/secrets/db_password".to_owned())
}

fn credential() -> Result<Vec<u8>> {
    if let Ok(value) = std::env::var("PASSWORD") {
        return Ok(value.into_bytes());
    }
    std::fs::read(file()).with_context(file)
}

/// Whether the database accepts it.
fn is_taken(credential: &[u8]) -> bool {
    let refuses = std::env::var("REFUSES").unwrap_or_else(|_| "bad".to_owned());
    !refuses.split(',').any(|beginning| credential.starts_with(beginning.as_bytes()))
}

async fn read() -> Result<()> {
    let mut present = credential()?;
    println!("begins with {}, pid {}", hash(&present), std::process::id());
    let mut seen = std::fs::read(file()).ok();
    let listener = TcpListener::bind(ADDRESS).await?;
    let (mut terminate, mut hangup) = (signal(SignalKind::terminate())?, signal(SignalKind::hangup())?);
    loop {
        tokio::select! {
            _ = terminate.recv() => {
                println!("ends");
                return Ok(());
            }
            _ = hangup.recv() => {
                present = credential()?;
                println!("read again {}", hash(&present));
            }
            accepted = listener.accept() => {
                let word = if is_taken(&present) { "accepted" } else { "refused" };
                let (mut stream, _) = accepted?;
                let _ = stream.write_all(word.as_bytes()).await;
            }
            () = sleep(LOOK_EVERY) => {
                let now = std::fs::read(file()).ok();
                if now != seen {
                    println!("sees {}", now.as_ref().map_or_else(|| "nothing".to_owned(), |bytes| hash(bytes)));
                    seen = now;
                }
            }
        }
    }
}

async fn check() -> Result<()> {
    let mut said = String::new();
    TcpStream::connect(ADDRESS).await?.read_to_string(&mut said).await?;
    if said == "accepted" { Ok(()) } else { bail!("the database refuses the credential") }
}
