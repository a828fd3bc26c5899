//! The life of the connections, as the script has it.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep, sleep_until};

use crate::connector::Connector;
use crate::events;
use crate::log::Level;
use crate::script::Behaviour;
use crate::transport::Protocol;
use crate::uplink::Uplinks;

/// The edge that refuses.
const REFUSING: &str = "198.41.192.7";
/// The pause after a failure doubles up to this.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// Follows the script, with `uplinks` for the connections to a double of the edge. Returns only to
/// crash: with the exit code.
pub async fn follow_script(connector: &Arc<Connector>, uplinks: &mut Uplinks) -> i32 {
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
        connector.eat(behaviour.eat);
        // Cancel-safe: `live` keeps its progress in the connector, and the crash has a fixed time.
        tokio::select! {
            never = live(connector, &behaviour, uplinks) => match never {},
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

async fn live(connector: &Arc<Connector>, behaviour: &Behaviour, uplinks: &mut Uplinks) -> Infallible {
    let blocked = behaviour.udp_blocked && connector.protocol() == Protocol::Quic;
    if behaviour.unready || behaviour.unauthorized || behaviour.unreachable || blocked {
        lose_connections(connector, uplinks);
    }
    if behaviour.unauthorized {
        fail_ever_less_often(connector, REFUSING, || be_refused(connector)).await;
    }
    if behaviour.unreachable {
        fail_ever_less_often(connector, events::UNREACHED, || events::dial_failed(connector, 0)).await;
    }
    if !behaviour.unready && connector.connections() == 0 && uplinks.is_empty() {
        if blocked {
            give_up_quic(connector).await;
        }
        sleep(Duration::from_millis(behaviour.ready_after)).await;
        connect(connector, behaviour, uplinks);
    }
    std::future::pending().await
}

fn connect(connector: &Arc<Connector>, behaviour: &Behaviour, uplinks: &mut Uplinks) {
    for index in 0..behaviour.connections {
        match &behaviour.edge {
            Some(edge) => uplinks.open(connector, edge, index),
            None => events::registered(connector, index),
        }
    }
    if behaviour.edge.is_none() {
        events::configured(connector);
    }
}

fn lose_connections(connector: &Connector, uplinks: &mut Uplinks) {
    uplinks.cut();
    for index in connector.disconnect() {
        events::closed(connector, index);
    }
}

/// Returns with http2 in the place of quic, or never where quic was chosen.
async fn give_up_quic(connector: &Connector) {
    if connector.may_fall_back {
        events::dial_failed(connector, 0);
        connector.fall_back();
        events::fell_back(connector);
    } else {
        fail_ever_less_often(connector, events::UNREACHED, || events::dial_failed(connector, 0)).await;
    }
}

fn be_refused(connector: &Connector) {
    connector.refuse();
    let refusal = "Unauthorized: Tunnel not found";
    connector.log.line(
        Level::Error,
        "Register tunnel error from server side",
        &[("error", &refusal), ("connIndex", &0), ("event", &0), ("ip", &REFUSING)],
    );
}

async fn fail_ever_less_often(connector: &Connector, ip: &str, fail: impl Fn()) -> Infallible {
    let mut pause = Duration::from_secs(1);
    loop {
        fail();
        events::retrying(connector, 0, ip, pause);
        sleep(pause).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

#[cfg(test)]
mod tests;
