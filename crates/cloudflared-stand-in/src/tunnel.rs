//! The life of the connections, as the script has it.

use std::convert::Infallible;
use std::time::Duration;

use tokio::time::{Instant, sleep, sleep_until};

use crate::connector::Connector;
use crate::log::Level;
use crate::script::Behaviour;

/// The pause after a refused registration doubles up to this.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// Follows the script. Returns only to crash: with the exit code.
pub async fn follow_script(connector: &Connector) -> i32 {
    let mut script = connector.script.subscribe();
    let mut crash = None;
    let mut crash_at = Instant::now();
    loop {
        let behaviour = script.borrow_and_update().behaviour().clone();
        if crash != behaviour.crash() {
            // Counted from when it was said: another word in between does not postpone it.
            crash = behaviour.crash();
            crash_at = Instant::now() + crash.map_or(Duration::ZERO, |(after, _)| after);
        }
        // Cancel-safe: `live` keeps its progress in the connector, and the crash has a fixed time.
        tokio::select! {
            never = live(connector, &behaviour) => match never {},
            code = crash_then(crash, crash_at) => return code,
            changed = script.changed() => if changed.is_err() { return 0 },
        }
    }
}

async fn crash_then(crash: Option<(Duration, i32)>, at: Instant) -> i32 {
    let Some((_, code)) = crash else { return std::future::pending().await };
    sleep_until(at).await;
    code
}

async fn live(connector: &Connector, behaviour: &Behaviour) -> Infallible {
    if behaviour.unready || behaviour.unauthorized {
        lose_connections(connector);
    }
    if behaviour.unauthorized {
        be_refused(connector).await;
    }
    if !behaviour.unready && connector.connections() == 0 {
        sleep(Duration::from_millis(behaviour.ready_after)).await;
        connect(connector, behaviour);
    }
    std::future::pending().await
}

fn connect(connector: &Connector, behaviour: &Behaviour) {
    for _ in 0..behaviour.connections {
        let (index, connection) = connector.register();
        connector.log.line(
            Level::Info,
            "Registered tunnel connection",
            &[
                ("connIndex", &index),
                ("connection", &connection.id),
                ("event", &0),
                ("ip", &connection.ip),
                ("location", &connection.location),
                ("protocol", &connector.protocol),
            ],
        );
    }
    if connector.configure(behaviour.config_version) {
        let config = r#"{"ingress":[{"service":"http_status:404"}],"warp-routing":{"enabled":false}}"#;
        let fields: [(&str, &dyn std::fmt::Display); 2] = [("config", &config), ("version", &behaviour.config_version)];
        connector.log.line(Level::Info, "Updated to new configuration", &fields);
    }
}

fn lose_connections(connector: &Connector) {
    for index in 0..connector.disconnect() {
        connector.log.line(
            Level::Error,
            "Serve tunnel error",
            &[("error", &"connection with edge closed"), ("connIndex", &index), ("event", &0)],
        );
    }
}

async fn be_refused(connector: &Connector) -> Infallible {
    let mut pause = Duration::from_secs(1);
    loop {
        connector.refuse();
        let refusal = "Unauthorized: Tunnel not found";
        connector.log.line(
            Level::Error,
            "Register tunnel error from server side",
            &[("error", &refusal), ("connIndex", &0), ("event", &0), ("ip", &"198.41.192.7")],
        );
        connector.log.line(
            Level::Info,
            format_args!("Retrying connection in up to {}s", pause.as_secs()),
            &[("connIndex", &0), ("event", &0), ("ip", &"198.41.192.7")],
        );
        sleep(pause).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::log::Log;
    use crate::script::Script;

    fn connector(words: serde_json::Value) -> Connector {
        let script = Script::default().with_json(&words).expect("words");
        Connector::new(Log::default(), "t-1", "quic", script)
    }

    fn say(connector: &Connector, words: serde_json::Value) {
        let script = connector.script.borrow().with_json(&words).expect("words");
        connector.script.send_replace(script);
    }

    /// Runs the script for so long; the exit code if it crashes within.
    async fn run_for(connector: &Connector, ms: u64) -> Option<i32> {
        tokio::time::timeout(Duration::from_millis(ms), follow_script(connector)).await.ok()
    }

    #[tokio::test(start_paused = true)]
    async fn connects_once_its_time_has_come() {
        let connector = connector(json!({"ready_after": 500, "connections": 2}));
        run_for(&connector, 499).await;
        assert_eq!((connector.connections(), connector.shown().config_version), (0, -1));
        run_for(&connector, 501).await;
        assert_eq!((connector.connections(), connector.shown().config_version), (2, 1));
    }

    #[tokio::test(start_paused = true)]
    async fn loses_its_connections_when_told_and_comes_back() {
        let connector = connector(json!({}));
        run_for(&connector, 1000).await;
        assert_eq!(connector.connections(), 4);
        say(&connector, json!({"unready": true}));
        run_for(&connector, 1000).await;
        assert_eq!(connector.connections(), 0);
        say(&connector, json!({"unready": false}));
        run_for(&connector, 1000).await;
        assert_eq!(connector.connections(), 4);
    }

    #[tokio::test(start_paused = true)]
    async fn is_refused_ever_less_often() {
        let connector = connector(json!({"unauthorized": true}));
        run_for(&connector, 600_000).await;
        assert_eq!(connector.connections(), 0);
        assert!((10..20).contains(&connector.shown().refused), "{}", connector.shown().refused);
    }

    #[tokio::test(start_paused = true)]
    async fn another_word_does_not_postpone_the_crash() {
        let connector = connector(json!({"exit": 7, "exit_after": 1000}));
        let later = async {
            sleep(Duration::from_millis(900)).await;
            say(&connector, json!({"requests": 5}));
            std::future::pending::<()>().await;
        };
        let started = Instant::now();
        let code = tokio::select! { code = follow_script(&connector) => code, () = later => unreachable!() };
        assert_eq!((code, started.elapsed()), (7, Duration::from_millis(1000)));
    }
}
