//! Runs the double as a program, for demonstrations. The library documents what it does.

#![allow(clippy::disallowed_methods, clippy::disallowed_types, clippy::disallowed_macros, reason = "for development")]

use std::net::SocketAddr;

use anyhow::Context;
use clap::Parser;
use dockflare_dev_master::{DevMaster, Protocol};
use tokio::signal::unix::{SignalKind, signal};

/// A development double of a DockFlare master. It keeps nothing, and nobody should rely on it.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// Where to listen
    #[arg(long, env = "DEV_MASTER_LISTEN", default_value = "0.0.0.0:5000")]
    listen: SocketAddr,
    /// Which master to be: v1 or v2
    #[arg(long, env = "DEV_MASTER_PROTOCOL", default_value = "v2")]
    protocol: Protocol,
    /// The highest version a v2 master agrees to: 1 or 2
    #[arg(long, env = "DEV_MASTER_HIGHEST_VERSION", default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=2))]
    highest_version: u8,
    /// The key for the operator's routes
    #[arg(long, env = "DEV_MASTER_MASTER_KEY", hide_env_values = true)]
    master_key: String,
    /// An agent key that is known from the start, with its owner; may be repeated
    #[arg(
        long = "key",
        value_name = "KEY:OWNER",
        env = "DEV_MASTER_KEY",
        hide_env_values = true,
        value_delimiter = ','
    )]
    keys: Vec<String>,
    /// Give each new agent the tunnel of this name at once
    #[arg(long, value_name = "TUNNEL_NAME", env = "DEV_MASTER_ENROLL_NEW")]
    enroll_new: Option<String>,
    /// A path under which all routes lie
    #[arg(long, env = "DEV_MASTER_PREFIX", default_value = "")]
    prefix: String,
    /// Have the /accounts routes, for this account
    #[arg(long, env = "DEV_MASTER_ACCOUNT")]
    account: Option<String>,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    tracing_subscriber::fmt().with_target(false).with_ansi(false).init();
    // The kernel gives the first process of a container no default action for these signals, so install the
    // handlers before anything else.
    let mut terminate = signal(SignalKind::terminate()).context("cannot wait for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot wait for SIGINT")?;

    let mut builder = DevMaster::builder()
        .listen(arguments.listen)
        .protocol(arguments.protocol)
        .highest_version(arguments.highest_version)
        .master_key(arguments.master_key)
        .prefix(&arguments.prefix);
    for pair in &arguments.keys {
        let (key, owner) = pair.split_once(':').unwrap_or((pair, "operator"));
        builder = builder.key(key, owner);
    }
    if let Some(tunnel) = arguments.enroll_new {
        builder = builder.enroll_new(tunnel);
    }
    if let Some(account) = arguments.account {
        builder = builder.account(account);
    }
    let master = builder.start().await?;
    tracing::info!(url = master.url(), protocol = %arguments.protocol, "development master ready");

    tokio::select! {
        _ = terminate.recv() => tracing::info!("SIGTERM: development master ends"),
        _ = interrupt.recv() => tracing::info!("SIGINT: development master ends"),
    }
    Ok(())
}
