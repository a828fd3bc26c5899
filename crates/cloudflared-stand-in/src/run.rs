//! `tunnel run`: start, serve, drain.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::cli::TunnelEnv;
use crate::connector::Connector;
use crate::log::{Level, Log};
use crate::player::Player;
use crate::recording::Chosen;
use crate::script::Script;
use crate::token::Token;
use crate::transport::Transport;

/// Runs the tunnel to its end and returns the exit code. `env` already includes the command line's options.
///
/// # Errors
/// When no recording shows the behavior that it was asked for.
pub async fn run(env: TunnelEnv, script: Script) -> Result<i32> {
    let log = match env.log() {
        Ok(log) => log,
        Err(error) => return Ok(fail(Log::default(), &format!("{error:#}"), 1)),
    };
    // Before anything else: as PID 1, a process without handlers ignores SIGTERM.
    let signals = Signals::listen()?;
    let fails = |connector: Connector, name: &'static str| {
        let env = env.clone();
        async move { Player::failing(Arc::new(connector), env, name)?.play().await }
    };
    let nobody = |script: Script| Connector::new(log, "", "", Transport { chosen: Chosen::Auto }, script);
    let text = match token_text(&env) {
        Ok(Some(text)) => text,
        Ok(None) => return fails(nobody(script), "11d-token-not-set").await,
        Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => {
            return fails(nobody(script), "20d-token-file-unreadable").await;
        }
        Err(_) => return fails(nobody(script), "20c-token-file-missing").await,
    };
    let token = Token::parse(&text).ok().filter(|_| !script.behaviour().invalid_token);
    let Some(token) = token else { return fails(nobody(script), "11a-token-malformed").await };
    let script = match script.with(token.words()) {
        Ok(script) if script.behaviour().invalid_token => return fails(nobody(script), "11a-token-malformed").await,
        Ok(script) => script,
        Err(error) => return Ok(fail(log, &format!("stand-in: the token's words: {error}"), 64)),
    };
    if script.behaviour().token_file_missing {
        return fails(nobody(script), "20c-token-file-missing").await;
    }
    let (grace, transport) = match (env.grace_period(), env.transport()) {
        (Ok(grace), Ok(transport)) => (grace, transport),
        (Err(error), _) | (_, Err(error)) => return Ok(fail(log, &format!("{error:#}"), 1)),
    };
    let port_is_taken = script.behaviour().metrics_port_taken;
    let connector = Connector::new(log, token.tunnel(), &text, transport, script);
    if port_is_taken {
        return fails(connector, "15-metrics-port-taken").await;
    }
    let connector = Arc::new(connector);
    serve(Player::new(connector.clone(), env)?, &connector, signals, grace).await
}

/// The token's text, or `None` if none was given. A file may end in a newline. Like the original, an empty token counts
/// as none.
fn token_text(env: &TunnelEnv) -> std::io::Result<Option<String>> {
    let text = match (&env.token, &env.token_file) {
        (Some(text), _) => Some(text.clone()),
        (None, Some(path)) => Some(std::fs::read_to_string(path)?),
        (None, None) => None,
    };
    Ok(text.filter(|text| !text.is_empty()))
}

/// Plays until the process exits by itself or a signal comes; then drains.
async fn serve(mut player: Player, connector: &Connector, mut signals: Signals, grace: Duration) -> Result<i32> {
    let signal = tokio::select! {
        code = player.play() => return code,
        signal = asked_to_stop(connector, &mut signals) => signal,
    };
    player
        .stop(signal, grace, async move {
            _ = signals.next().await;
        })
        .await
}

async fn asked_to_stop(connector: &Connector, signals: &mut Signals) -> &'static str {
    loop {
        let name = signals.next().await;
        if !connector.behaviour().ignore_sigterm {
            return name;
        }
    }
}

fn fail(log: Log, problem: &str, code: i32) -> i32 {
    log.say(Level::Error, problem);
    code
}

/// SIGTERM and SIGINT, handled alike.
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
