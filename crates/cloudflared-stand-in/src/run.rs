//! `tunnel run`: start, serve, drain.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::sleep;

use crate::cli::TunnelEnv;
use crate::connector::Connector;
use crate::events;
use crate::log::{Level, Log};
use crate::metrics;
use crate::script::Script;
use crate::token::Token;
use crate::tunnel;
use crate::uplink::Uplinks;

/// The original's exit code for a command that cannot be carried out as given.
const USAGE: i32 = 255;
/// 128 + SIGTERM, as a shell would say.
const CUT_SHORT: i32 = 143;

/// Runs the tunnel to its end and returns the exit code. `env` has the command line's options merged
/// in already.
pub async fn run(env: TunnelEnv, script: Script) -> i32 {
    let log = match env.log() {
        Ok(log) => log,
        Err(error) => return fail(Log::default(), &format!("{error:#}"), 1),
    };
    // First of all: as PID 1 a process without handlers ignores SIGTERM.
    let signals = match Signals::listen() {
        Ok(signals) => signals,
        Err(error) => return fail(log, &format!("cannot handle signals: {error}"), 1),
    };
    let text = match token_text(&env) {
        Ok(Some(text)) => text,
        Ok(None) => {
            let problem = "You did not specify any valid additional argument to the cloudflared tunnel command.";
            return fail(log, problem, USAGE);
        }
        Err(error) => return fail(log, &format!("Failed to read token file: {error}"), USAGE),
    };
    let token = Token::parse(&text).ok().filter(|_| !script.behaviour().invalid_token);
    let Some((token, script)) = token.map(|token| {
        let script = script.with(token.words());
        (token, script)
    }) else {
        return invalid_token();
    };
    let script = match script {
        Ok(script) if script.behaviour().invalid_token => return invalid_token(),
        Ok(script) => script,
        Err(error) => return fail(log, &format!("stand-in: the token's words: {error}"), 64),
    };
    let grace = match env.grace_period() {
        Ok(grace) => grace,
        Err(error) => return fail(log, &format!("{error:#}"), 1),
    };
    let transport = match env.transport() {
        Ok(transport) => transport,
        Err(error) => return fail(log, &format!("{error:#}"), 1),
    };
    let connector = Arc::new(Connector::new(log, token.tunnel(), transport, script));
    introduce(&connector, &env);
    let listener = match metrics::listen(env.metrics.as_deref()).await {
        Ok(listener) => listener,
        Err(error) => return fail(log, &format!("Error opening metrics server listener: {error:#}"), 1),
    };
    if let Ok(address) = listener.local_addr() {
        log.say(Level::Info, format_args!("Starting metrics server on {address}/metrics"));
    }
    if connector.behaviour().no_dns {
        let host = "_v2-origintunneld._tcp.argotunnel.com";
        let problem = format!("Could not lookup srv records on {host}: lookup {host}: server misbehaving");
        return fail(log, &problem, 1);
    }
    tokio::spawn(metrics::serve(listener, connector.clone()));
    serve(&connector, signals, grace).await
}

/// The token's text; none if none was given. A file may end in a newline.
fn token_text(env: &TunnelEnv) -> std::io::Result<Option<String>> {
    match (&env.token, &env.token_file) {
        (Some(text), _) => Ok(Some(text.clone())),
        (None, Some(path)) => std::fs::read_to_string(path).map(Some),
        (None, None) => Ok(None),
    }
}

/// Follows the script until it crashes or a signal comes, and then drains.
async fn serve(connector: &Arc<Connector>, mut signals: Signals, grace: Duration) -> i32 {
    // Outlives the script: what is in flight at a signal is answered during the drain.
    let mut uplinks = Uplinks::new();
    tokio::select! {
        code = tunnel::follow_script(connector, &mut uplinks) => return code,
        () = asked_to_stop(connector, &mut signals) => {}
    }
    let drain = connector.behaviour().drain.map_or(grace, Duration::from_millis);
    // Unregistered before the drain: `/ready` says 503 while requests in flight still end.
    let registered = connector.disconnect();
    uplinks.unregister();
    for index in &registered {
        events::unregistered(connector, *index);
    }
    if !registered.is_empty() {
        tokio::select! {
            () = sleep(drain) => {}
            _ = signals.next() => return CUT_SHORT,
        }
    }
    connector.log.say(Level::Info, "Tunnel server stopped");
    connector.log.say(Level::Info, "Metrics server stopped");
    0
}

async fn asked_to_stop(connector: &Connector, signals: &mut Signals) {
    loop {
        let name = signals.next().await;
        if !connector.behaviour().ignore_sigterm {
            connector.log.say(Level::Info, format_args!("Initiating graceful shutdown due to signal {name} ..."));
            return;
        }
        connector.log.say(Level::Info, format_args!("stand-in: ignoring signal {name}"));
    }
}

/// The lines the original begins with.
fn introduce(connector: &Connector, env: &TunnelEnv) {
    let log = connector.log;
    let version = connector.behaviour().version;
    log.line(Level::Info, "Starting tunnel", &[("tunnelID", &connector.tunnel_id)]);
    log.say(Level::Info, format_args!("Version {version} (Checksum {:064x})", 0x57a2_d191_u64));
    let arch = std::env::consts::ARCH.replace("x86_64", "amd64").replace("aarch64", "arm64");
    log.say(Level::Info, format_args!("GOOS: linux, GOVersion: go1.24.4, GoArch: {arch}"));
    log.say(Level::Info, format_args!("Settings: {}", env.settings()));
    log.say(Level::Info, format_args!("Generated Connector ID: {}", connector.id));
    log.say(Level::Info, format_args!("Initial protocol {}", connector.protocol()));
}

fn fail(log: Log, problem: &str, code: i32) -> i32 {
    log.say(Level::Error, problem);
    code
}

/// Bare, as the original prints it.
fn invalid_token() -> i32 {
    eprintln!("Provided Tunnel token is not valid.\nSee 'cloudflared tunnel run --help'.");
    USAGE
}

/// SIGTERM and SIGINT, one like the other.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn listen() -> Result<Self> {
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    /// The next signal's name, as Go prints it. Cancel-safe, as both arms are.
    async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "terminated",
            _ = self.interrupt.recv() => "interrupt",
        }
    }
}
