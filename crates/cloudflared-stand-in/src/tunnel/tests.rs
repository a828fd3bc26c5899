//! The life of connections to nothing, with the clock in hand.

use serde_json::json;

use super::*;
use crate::log::Log;
use crate::script::Script;
use crate::transport::Transport;

fn connector(words: serde_json::Value) -> Arc<Connector> {
    connector_over(None, words)
}

fn connector_over(protocol: Option<&str>, words: serde_json::Value) -> Arc<Connector> {
    let script = Script::default().with_json(&words).expect("words");
    let transport = Transport::choose(protocol, None).expect("protocol");
    Arc::new(Connector::new(Log::default(), "t-1", transport, script))
}

fn say(connector: &Connector, words: serde_json::Value) {
    let script = connector.script.borrow().with_json(&words).expect("words");
    connector.script.send_replace(script);
}

/// Runs the script for so long; the exit code if it crashes within.
async fn run_for(connector: &Arc<Connector>, ms: u64) -> Option<i32> {
    let mut uplinks = Uplinks::new();
    tokio::time::timeout(Duration::from_millis(ms), follow_script(connector, &mut uplinks)).await.ok()
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
async fn loses_its_connections_while_the_edge_cannot_be_reached() {
    let connector = connector(json!({"connections": 2}));
    run_for(&connector, 1000).await;
    assert_eq!(connector.connections(), 2);
    say(&connector, json!({"unreachable": true}));
    run_for(&connector, 100_000).await;
    assert_eq!((connector.connections(), connector.shown().refused), (0, 0));
    assert_eq!(connector.protocol(), Protocol::Quic);
    say(&connector, json!({"unreachable": null}));
    run_for(&connector, 1000).await;
    assert_eq!(connector.connections(), 2);
}

#[tokio::test(start_paused = true)]
async fn without_udp_falls_back_for_good_where_no_protocol_was_chosen() {
    let connector = connector(json!({"ready_after": 500}));
    run_for(&connector, 1000).await;
    assert_eq!((connector.connections(), connector.protocol()), (4, Protocol::Quic));
    say(&connector, json!({"udp_blocked": true}));
    run_for(&connector, 499).await;
    assert_eq!((connector.connections(), connector.protocol()), (0, Protocol::Http2));
    run_for(&connector, 1000).await;
    assert_eq!(connector.connections(), 4);
    say(&connector, json!({"udp_blocked": false}));
    run_for(&connector, 1000).await;
    assert_eq!((connector.connections(), connector.protocol()), (4, Protocol::Http2));
}

#[tokio::test(start_paused = true)]
async fn without_udp_a_chosen_protocol_stays() {
    for (protocol, connections) in [("quic", 0), ("http2", 4)] {
        let connector = connector_over(Some(protocol), json!({"udp_blocked": true}));
        run_for(&connector, 100_000).await;
        assert_eq!((connector.connections(), connector.protocol().to_string()), (connections, protocol.to_owned()));
    }
}

#[tokio::test(start_paused = true)]
async fn eats_once_and_keeps_it() {
    let connector = connector(json!({"eat": 3}));
    run_for(&connector, 10).await;
    assert_eq!(connector.eaten(), 3);
    say(&connector, json!({"eat": 5}));
    run_for(&connector, 10).await;
    say(&connector, json!({"eat": null}));
    run_for(&connector, 10).await;
    assert_eq!(connector.eaten(), 5);
}

#[tokio::test(start_paused = true)]
async fn another_word_does_not_postpone_the_crash() {
    let connector = connector(json!({"exit": 7, "exit_after": 1000}));
    let later = async {
        sleep(Duration::from_millis(900)).await;
        say(&connector, json!({"requests": 5}));
        std::future::pending::<()>().await;
    };
    let mut uplinks = Uplinks::new();
    let started = Instant::now();
    let code = tokio::select! { code = follow_script(&connector, &mut uplinks) => code, () = later => unreachable!() };
    assert_eq!((code, started.elapsed()), (7, Duration::from_millis(1000)));
}
