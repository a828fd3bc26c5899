//! Runs the supervisor on a host in memory, with paused time, and kills it at each of its calls.

use std::collections::BTreeSet;

use tokio::time::timeout;

use super::classify::Tries;
use super::double::{Behaviour, Behind, Double, Moment};
use super::*;
use crate::channels::Refusal;
use crate::config::OnExit;
use crate::docker::{Health, LastCheck};
use crate::state::testing::token;
use crate::state::{AgentId, DesiredState, Phase, Token, TunnelId};

const MAIN: &str = "tunnel";
const MINUTE: Duration = Duration::from_secs(60);

/// A running supervisor, and the desired state that it gets.
struct Bench {
    wake: mpsc::Sender<()>,
    host: Double,
    wanted: watch::Sender<Wanted>,
    ways: watch::Sender<Ways>,
    view: watch::Receiver<View>,
    stop: CancellationToken,
    work: tokio::task::JoinHandle<()>,
    metrics: Metrics,
}

fn config() -> TunnelConfig {
    TunnelConfig {
        image: "cloudflare/cloudflared:1".parse().unwrap(),
        network: "net".to_owned(),
        metrics_network: None,
        container_name: MAIN.to_owned(),
        on_exit: OnExit::Remove,
        lease: Duration::from_secs(60),
        options: [].into(),
        host_gateway: true,
        pull: crate::config::Pull::Missing,
        auto_connect: true,
    }
}

fn wants(token: &str) -> Wanted {
    Wanted {
        token: Some(Token::new(token)),
        id: Some(TunnelId("t1".into())),
        state: DesiredState::Running,
        owners: vec![AgentId::try_from("agent-1".to_owned()).unwrap()],
        ..Wanted::default()
    }
}

impl Bench {
    fn start(host: &Double, wanted: Wanted) -> Self {
        Self::start_with(host, config(), wanted)
    }

    fn start_with(host: &Double, config: TunnelConfig, wanted: Wanted) -> Self {
        let (wanted, wanted_rx) = watch::channel(wanted);
        let (ways, ways_rx) = watch::channel(Ways::default());
        let (view_tx, view) = watch::channel(View::default());
        // Only a test wakes the supervisor: otherwise it must find out by itself.
        let (wake, wake_rx) = mpsc::channel(1);
        let inputs = Inputs { wanted: wanted_rx, ways: ways_rx, wake: wake_rx };
        let (stop, metrics) = (CancellationToken::new(), Metrics::default());
        let supervisor = Supervisor::on(host.clone(), config, None, inputs, view_tx, metrics.clone());
        let work = tokio::spawn(supervisor.run(stop.clone()));
        Self { wake, host: host.clone(), wanted, ways, view, stop, work, metrics }
    }

    /// Waits until the supervisor reports this status and reason.
    async fn until(&mut self, status: Status, reason: Option<&str>) -> View {
        let is_it = |view: &View| view.looked && view.status == status && view.reason == reason;
        if let Ok(Ok(view)) = timeout(4 * 60 * MINUTE, self.view.wait_for(is_it)).await {
            return view.clone();
        }
        panic!("never {status:?} {reason:?}, but {:?} after {:#?}", self.view.borrow(), self.host.world().calls);
    }

    /// Waits until all is well and the tunnel's container has this token.
    async fn until_served_with(&mut self, letter: char) {
        while self.host.world().containers.get(MAIN).is_none_or(|fake| fake.token != key(letter)) {
            sleep(Duration::from_secs(1)).await;
        }
        self.until(Status::Running, None).await;
    }

    /// Wakes the supervisor as Docker's events do.
    async fn ring(&self) {
        self.wake.send(()).await.unwrap();
    }

    fn order(&self, token: &str) {
        self.wanted.send_replace(wants(token));
    }

    fn calls(&self) -> Vec<String> {
        std::mem::take(&mut self.host.world().calls)
    }

    fn names(&self) -> Vec<String> {
        self.host.world().containers.keys().cloned().collect()
    }

    /// Ends the supervisor as SIGKILL does: it finishes nothing.
    async fn kill(self) {
        self.work.abort();
        assert!(self.work.await.unwrap_err().is_cancelled());
    }
}

/// A token of the tunnel, a different one for each letter.
fn key(letter: char) -> String {
    token(&format!("t{letter}"))
}

async fn running() -> Bench {
    let mut bench = Bench::start(&Double::default(), wants(&key('a')));
    bench.until(Status::Running, None).await;
    bench.calls();
    bench
}

fn never_ready(log: &[&'static str]) -> Behaviour {
    Behaviour { ready_after: None, log: log.to_vec(), ..Behaviour::default() }
}

/// Lines without a time, because the double's clock is not the log's.
const CONTROL: &str =
    r#"ERR Serve tunnel error error="control stream encountered a failure while serving" connIndex=0"#;
const FALLBACK: &str = "INF Switching to fallback protocol http2 connIndex=0";
const REFUSED: &str = r#"ERR Register tunnel error from server side error="Unauthorized: Tunnel not found""#;

/// Waits until a connector serves. Returns how long that took.
async fn until_served(host: &Double) -> Duration {
    let began = Instant::now();
    while host.served() == 0 {
        sleep(Duration::from_millis(100)).await;
        assert!(began.elapsed() < 60 * MINUTE, "nobody is served after {:#?}", host.world().calls);
    }
    began.elapsed()
}

#[tokio::test(start_paused = true)]
async fn after_an_outage_of_any_length_somebody_is_served_within_seconds_of_its_end() {
    for (length, limit) in [(15, 20), (40, 20), (250, 20), (900, 45), (3 * 3600, 45)] {
        for offset in 0..if length > 60 { 1 } else { 5 } {
            let mut bench = running().await;
            sleep(MINUTE).await;
            bench.host.edge_goes();
            let view = bench.until(Status::Degraded, Some("edge_unreachable")).await;
            assert_eq!(view.connections, Some(0));
            sleep(Duration::from_secs(length + 3 * offset)).await;
            assert_eq!(bench.view.borrow().reason, Some("edge_unreachable"));
            bench.host.edge_returns();
            let took = until_served(&bench.host).await;
            assert!(took <= Duration::from_secs(limit), "{took:?} after {length}s");
            bench.until(Status::Running, None).await;
            sleep(2 * MINUTE).await;
            assert_eq!(bench.names(), [MAIN]);
            assert_eq!(bench.view.borrow().status, Status::Running);
            // Nothing more happens once it serves.
            bench.calls();
            sleep(10 * MINUTE).await;
            assert_eq!(bench.calls(), Vec::<String>::new());
            let world = bench.host.world();
            assert_eq!(world.gaps, 0, "the one that served first was taken away");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn fresh_connectors_are_counted_and_come_ever_less_often_and_the_one_that_is_down_stays() {
    let mut bench = running().await;
    sleep(MINUTE).await;
    let before = bench.host.world().containers[MAIN].seen.id.clone();
    bench.host.edge_goes();
    bench.until(Status::Degraded, Some("edge_unreachable")).await;
    sleep(10 * MINUTE).await;
    let first = bench.host.world().count("create tunnel-next");
    assert!((52..=70).contains(&first), "{first} in ten minutes");
    sleep(30 * MINUTE).await;
    let more = bench.host.world().count("create tunnel-next") - first;
    assert!((50..=70).contains(&more), "{more} in half an hour");
    assert_eq!(bench.host.world().containers[MAIN].seen.id, before);
    assert!(bench.host.world().containers.len() <= 2);
    let counted = format!("tunnel_fresh_connectors_total {}", first + more);
    assert_eq!(bench.metrics.lines(&["tunnel_fresh_connectors_total"]), [counted]);
}

#[tokio::test(start_paused = true)]
async fn no_fresh_connector_is_tried_where_it_would_not_help() {
    let dial = "ERR Serve tunnel error error=\"DialContext error: dial tcp 198.51.100.1:7844: connect: network is unreachable\"";
    let lookup = "ERR edge discovery: error looking up Cloudflare edge IPs: the DNS query failed error=\"lookup argotunnel.com\"";
    for (line, reason) in [(REFUSED, "token_refused"), (dial, "edge_unreachable"), (lookup, "no_dns")] {
        let mut bench = running().await;
        sleep(MINUTE).await;
        bench.host.behave(&key('a'), never_ready(&[line]));
        let is_it = |view: &View| view.reason == Some(reason);
        timeout(MINUTE, bench.view.wait_for(is_it)).await.expect(reason).unwrap();
        // A fresh one may have been made before the cause was known.
        sleep(MINUTE).await;
        assert_eq!(bench.names(), [MAIN]);
        bench.calls();
        sleep(10 * MINUTE).await;
        assert_eq!(bench.calls(), Vec::<String>::new(), "{reason}");
        // With a route again but no answer from the edge, fresh ones are tried.
        let away = "ERR Serve tunnel error error=\"DialContext error: dial tcp 198.51.100.1:7844: i/o timeout\"";
        bench.host.behave(&key('a'), never_ready(&[line, line, away]));
        sleep(MINUTE).await;
        assert!(bench.host.world().count("create tunnel-next") > 0, "{reason}");
    }
}

#[tokio::test(start_paused = true)]
async fn one_that_loses_its_connections_for_moments_is_left_alone() {
    let bench = running().await;
    for _ in 0..20 {
        bench.host.behave(&key('a'), never_ready(&[]));
        sleep(Duration::from_secs(7)).await;
        bench.host.behave(&key('a'), Behaviour::default());
        sleep(MINUTE).await;
    }
    assert_eq!(bench.calls(), Vec::<String>::new());
}

/// The newest order serves in the same time after the edge's return, whatever came before it and however long the edge
/// was away.
#[tokio::test(start_paused = true)]
async fn an_order_that_comes_during_an_outage_serves_as_soon_as_the_edge_is_back() {
    for length in [20, 250, 3600] {
        for ordered_before in [0, 8] {
            let mut bench = running().await;
            sleep(MINUTE).await;
            if ordered_before > 0 {
                // Ordered while the old one serves: the successor is waiting for the edge when that goes away.
                bench.order(&key('b'));
                sleep(Duration::from_millis(300)).await;
                bench.host.edge_goes();
            } else {
                bench.host.edge_goes();
                bench.until(Status::Degraded, Some("edge_unreachable")).await;
                bench.order(&key('b'));
            }
            // The newest order's connector runs within seconds, without the edge.
            sleep(Duration::from_secs(15)).await;
            assert_eq!(bench.host.world().containers[MAIN].token, key('b'), "{:#?}", bench.host.world().calls);
            sleep(Duration::from_secs(length)).await;
            // Another order, later.
            bench.order(&key('c'));
            sleep(Duration::from_secs(8)).await;
            assert_eq!(bench.host.world().containers[MAIN].token, key('c'));
            bench.host.edge_returns();
            let took = until_served(&bench.host).await;
            assert!(took <= Duration::from_secs(20), "{took:?} after {length}s");
            bench.until_served_with('c').await;
            sleep(MINUTE).await;
            assert_eq!((bench.names(), bench.host.world().gaps), (vec![MAIN.to_owned()], 0));
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_pause_after_a_successor_that_failed_ends_with_the_connector_beside_it() {
    let mut bench = running().await;
    sleep(MINUTE).await;
    bench.host.behave(&key('b'), never_ready(&[]));
    bench.order(&key('b'));
    bench.until(Status::Running, Some("edge_unreachable")).await;
    sleep(60 * MINUTE).await;
    // By now the pause has grown to half an hour. Then the old one goes down as well.
    bench.host.behave(&key('b'), Behaviour::default());
    bench.host.behave(&key('a'), never_ready(&[]));
    let began = Instant::now();
    bench.until_served_with('b').await;
    assert!(began.elapsed() < Duration::from_secs(30), "{:?}", began.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_token_that_was_refused_is_tried_again_only_while_nobody_is_served() {
    let mut bench = running().await;
    sleep(MINUTE).await;
    bench.host.behave(&key('b'), never_ready(&[REFUSED]));
    bench.order(&key('b'));
    bench.until(Status::Running, Some("token_refused")).await;
    bench.host.edge_goes();
    sleep(5 * MINUTE).await;
    assert_eq!(bench.host.world().containers[MAIN].token, key('a'), "it is the one that will serve again");
    bench.host.edge_returns();
    until_served(&bench.host).await;
    sleep(2 * MINUTE).await;
    assert_eq!((bench.names(), bench.host.world().gaps), (vec![MAIN.to_owned()], 0));
    assert_eq!(bench.view.borrow().status, Status::Running);
}

/// A SIGKILL before and after each call of an outage's first rounds and of the takeover: the next agent goes on.
#[tokio::test(start_paused = true)]
async fn an_agent_that_is_killed_during_an_outage_leaves_what_the_next_one_goes_on_from() {
    let mut deaths = 0;
    for at in [0, 1, 2, 3, 4, 5, 6, 9, 10, 11, 12, 13] {
        for moment in [Moment::Before, Moment::After] {
            for back_first in [false, true] {
                let bench = running().await;
                sleep(MINUTE).await;
                let host = bench.host.clone();
                host.world().dies_at = Some((at, moment));
                host.edge_goes();
                // Two rounds, then the edge is back.
                let died = timeout(Duration::from_secs(28), host.death()).await.is_ok();
                if !died {
                    host.edge_returns();
                    deaths += u32::from(timeout(2 * MINUTE, host.death()).await.is_ok());
                } else {
                    deaths += 1;
                }
                bench.kill().await;
                host.world().dies_at = None;
                if back_first {
                    host.edge_returns();
                    sleep(3 * MINUTE).await;
                }
                let mut bench = Bench::start(&host, wants(&key('a')));
                sleep(Duration::from_secs(30)).await;
                if !back_first {
                    host.edge_returns();
                }
                let took = until_served(&host).await;
                assert!(took <= Duration::from_secs(20), "{moment:?} call {at}: {took:?}");
                sleep(2 * MINUTE).await;
                bench.until(Status::Running, None).await;
                let world = host.world();
                assert_eq!(world.gaps, 0, "{moment:?} call {at}: {:#?}", world.calls);
                assert_eq!(world.containers.keys().collect::<Vec<_>>(), [MAIN], "{moment:?} call {at}");
            }
        }
    }
    assert!(deaths > 20, "{deaths}");
}

#[tokio::test(start_paused = true)]
async fn a_restart_by_hand_is_waited_for() {
    let mut bench = running().await;
    sleep(MINUTE).await;
    for pause in [300, 1500] {
        bench.host.ends(MAIN, 0);
        bench.ring().await;
        sleep(Duration::from_millis(pause)).await;
        bench.host.starts_again(MAIN);
        bench.until(Status::Running, None).await;
        sleep(MINUTE).await;
        assert_eq!(bench.calls(), Vec::<String>::new(), "{pause}");
    }
    // One that stays down is replaced.
    let began = Instant::now();
    bench.host.ends(MAIN, 137);
    bench.ring().await;
    until_served(&bench.host).await;
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    assert_eq!(bench.calls(), ["remove tunnel", "create tunnel", "start tunnel"]);
}

/// A connector that was told to stop takes no new requests, however long it still answers its open ones.
#[tokio::test(start_paused = true)]
async fn one_that_is_told_to_end_by_hand_and_drains_for_long_has_a_fresh_one_beside_it_soon() {
    let host = Double::default();
    let mut bench = Bench::start(&host, wants(&key('a')));
    bench.until(Status::Running, None).await;
    sleep(MINUTE).await;
    bench.calls();
    // Nothing happens for as long as an ordinary drain takes.
    let draining = "INF Initiating graceful shutdown due to signal terminated ...";
    host.behave(&key('a'), never_ready(&[draining]));
    bench.ring().await;
    sleep(Duration::from_millis(2900)).await;
    host.ends(MAIN, 0);
    bench.ring().await;
    sleep(Duration::from_millis(500)).await;
    host.behave(&key('a'), Behaviour::default());
    host.starts_again(MAIN);
    bench.until(Status::Running, None).await;
    sleep(MINUTE).await;
    assert_eq!(bench.calls(), Vec::<String>::new());

    host.behave(&key('a'), never_ready(&[draining]));
    bench.ring().await;
    let told = Instant::now();
    while host.world().count("start tunnel-next") == 0 {
        sleep(Duration::from_millis(50)).await;
        assert!(told.elapsed() < Duration::from_secs(6), "{:?}", host.world().calls);
    }
    assert_eq!(host.world().count("stop tunnel"), 0, "it may still answer");
}

#[tokio::test(start_paused = true)]
async fn fresh_connectors_are_on_the_network_of_the_metrics_before_they_start() {
    let config = TunnelConfig { metrics_network: Some("metrics".to_owned()), ..config() };
    let mut bench = Bench::start_with(&Double::default(), config, wants(&key('a')));
    bench.until(Status::Running, None).await;
    sleep(MINUTE).await;
    bench.calls();
    bench.host.edge_goes();
    while bench.host.world().count("start tunnel-next") < 3 {
        sleep(Duration::from_secs(1)).await;
    }
    let calls = bench.calls();
    let first = ["create tunnel-next", "place tunnel-next metrics", "start tunnel-next", "stop tunnel-next"];
    assert_eq!(calls[..4], first);
    for (at, _) in calls.iter().enumerate().filter(|(_, call)| *call == "start tunnel-next") {
        assert_eq!(calls[at - 1], "place tunnel-next metrics", "{calls:?}");
    }
    // The one that takes over is on it too.
    bench.host.edge_returns();
    bench.until(Status::Running, None).await;
    sleep(MINUTE).await;
    assert!(bench.host.world().containers[MAIN].seen.networks.contains_key("metrics"));
    assert_eq!(bench.names(), [MAIN]);
}

#[tokio::test(start_paused = true)]
async fn where_a_second_container_is_refused_an_outage_is_waited_out_and_nothing_is_given_up() {
    let mut bench = running().await;
    sleep(MINUTE).await;
    bench.host.world().refused = vec!["create tunnel-next"];
    bench.host.edge_goes();
    bench.until(Status::Degraded, Some("edge_unreachable")).await;
    sleep(10 * MINUTE).await;
    // One call checks whether Docker refuses only that name; then no more.
    assert_eq!(bench.calls(), ["create tunnel"]);
    bench.host.edge_returns();
    let took = until_served(&bench.host).await;
    assert!(took <= Duration::from_secs(64), "cloudflared's own pause: {took:?}");
    bench.until(Status::Running, None).await;
    assert_eq!(bench.calls(), Vec::<String>::new());
}

/// Refused over QUIC, where cloudflared does not say why. Over HTTP/2 it behaves as `other`.
fn refused_over_quic(other: Behaviour) -> Behaviour {
    let tries = Tries { failed: 5, registered: 0, seconds: 0.1 };
    Behaviour { tries, over_http2: Some(Box::new(other)), ..never_ready(&[CONTROL]) }
}

#[tokio::test(start_paused = true)]
async fn a_trial_over_http2_says_why_a_registration_is_refused_and_is_taken_back() {
    let mut bench = running().await;
    sleep(MINUTE).await;
    let before = bench.host.world().containers[MAIN].seen.id.clone();
    let began = Instant::now();
    bench.host.behave(&key('a'), refused_over_quic(never_ready(&[REFUSED])));
    bench.until(Status::Degraded, Some("registration_refused")).await;
    assert!(began.elapsed() <= Duration::from_secs(30), "{:?}", began.elapsed());
    let view = bench.until(Status::Error, Some("token_refused")).await;
    assert_eq!(view.connections, Some(0));
    assert!(began.elapsed() <= Duration::from_secs(45), "{:?}", began.elapsed());
    sleep(MINUTE).await;
    assert_eq!(bench.names(), [MAIN]);
    assert_eq!(bench.host.world().containers[MAIN].seen.id, before);
    assert_eq!(bench.calls(), ["create tunnel-next", "start tunnel-next", "stop tunnel-next", "remove tunnel-next"]);
    // The refusal stays certain, is checked again now and then, and ends with a connection.
    sleep(60 * MINUTE).await;
    assert_eq!(bench.view.borrow().reason, Some("token_refused"));
    let asked = bench.host.world().count("create");
    assert!((1..=12).contains(&asked), "{asked} in an hour");
    bench.host.behave(&key('a'), Behaviour::default());
    bench.until(Status::Running, None).await;
}

#[tokio::test(start_paused = true)]
async fn where_only_quic_is_refused_the_trial_serves_and_goes_back_without_an_outage() {
    let mut bench = running().await;
    sleep(MINUTE).await;
    let before = bench.host.world().containers[MAIN].seen.id.clone();
    bench.host.behave(&key('a'), refused_over_quic(Behaviour::default()));
    bench.until(Status::Degraded, Some("registration_refused")).await;
    let took = until_served(&bench.host).await;
    assert!(took <= Duration::from_secs(10), "{took:?}");
    bench.until(Status::Running, None).await;
    sleep(2 * MINUTE).await;
    let trial = bench.host.world().containers[MAIN].seen.id.clone();
    assert!(trial != before && bench.host.world().containers[MAIN].http2);
    // A restarted agent recognizes the trial.
    let host = bench.host.clone();
    bench.kill().await;
    let mut bench = Bench::start(&host, wants(&key('a')));
    sleep(5 * MINUTE).await;
    bench.until(Status::Running, None).await;
    assert_eq!(host.world().containers[MAIN].seen.id, trial);
    // The agent rarely checks whether the tunnel can go back, and keeps the trial while it cannot.
    bench.calls();
    sleep(4 * 60 * MINUTE).await;
    let looked = host.world().count("create");
    assert!((1..=4).contains(&looked), "{looked} in four hours");
    {
        let world = host.world();
        assert_eq!((&world.containers[MAIN].seen.id, world.gaps), (&trial, 0));
    }
    assert_eq!((bench.view.borrow().status, bench.view.borrow().reason), (Status::Running, None));
    host.behave(&key('a'), Behaviour::default());
    sleep(7 * 60 * MINUTE).await;
    assert!(!host.world().containers[MAIN].http2, "{:#?}", host.world().calls);
    assert_eq!((bench.names(), host.world().gaps), (vec![MAIN.to_owned()], 0));
}

#[tokio::test(start_paused = true)]
async fn a_successor_that_is_refused_without_a_word_is_asked_over_http2_and_the_one_before_it_serves() {
    let mut bench = running().await;
    sleep(MINUTE).await;
    bench.host.behave(&key('b'), refused_over_quic(never_ready(&[REFUSED])));
    let began = Instant::now();
    bench.order(&key('b'));
    bench.until(Status::Running, Some("token_refused")).await;
    assert!(began.elapsed() <= MINUTE, "{:?}", began.elapsed());
    sleep(60 * MINUTE).await;
    assert_eq!((bench.names(), bench.host.world().gaps), (vec![MAIN.to_owned()], 0));
    assert_eq!(bench.host.world().containers[MAIN].token, key('a'));
    assert_eq!(bench.host.world().count("create"), 2, "it waits for another token");
    // If only QUIC is at fault, the trial takes over.
    bench.host.behave(&key('c'), refused_over_quic(Behaviour::default()));
    bench.order(&key('c'));
    bench.until_served_with('c').await;
    assert_eq!(bench.host.world().gaps, 0);
}

/// A SIGKILL before and after each call of a trial: the next agent learns what the first would have learned.
#[tokio::test(start_paused = true)]
async fn a_trial_that_is_cut_off_anywhere_is_made_or_taken_back_by_the_next_agent() {
    for serves in [false, true] {
        for at in 0..5 {
            for moment in [Moment::Before, Moment::After] {
                let bench = running().await;
                sleep(MINUTE).await;
                let host = bench.host.clone();
                let other = if serves { Behaviour::default() } else { never_ready(&[REFUSED]) };
                host.behave(&key('a'), refused_over_quic(other));
                host.world().dies_at = Some((at, moment));
                let _ = timeout(2 * MINUTE, host.death()).await;
                bench.kill().await;
                host.world().dies_at = None;
                let mut bench = Bench::start(&host, wants(&key('a')));
                let expected = if serves { (Status::Running, None) } else { (Status::Error, Some("token_refused")) };
                bench.until(expected.0, expected.1).await;
                sleep(2 * MINUTE).await;
                assert_eq!(bench.names(), [MAIN], "{moment:?} call {at}");
                let world = host.world();
                assert_eq!((world.gaps, world.containers[MAIN].http2), (0, serves), "{moment:?} call {at}");
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn one_that_hangs_is_restarted_once() {
    let mut bench = running().await;
    bench.host.behave(&key('a'), Behaviour { silent: true, ..Behaviour::default() });
    bench.until(Status::Degraded, Some("hung")).await;
    while bench.host.world().calls.is_empty() {
        sleep(Duration::from_secs(1)).await;
    }
    bench.host.behave(&key('a'), Behaviour::default());
    let view = bench.until(Status::Running, None).await;
    assert_eq!(view.restarts, 1);
    sleep(30 * MINUTE).await;
    assert_eq!(bench.calls(), ["restart tunnel"]);
    assert_eq!(bench.metrics.lines(&["tunnel_restarts_total"]), ["tunnel_restarts_total 1"]);
}

#[tokio::test(start_paused = true)]
async fn one_that_goes_on_hanging_is_restarted_ever_less_often() {
    let mut bench = running().await;
    bench.host.behave(&key('a'), Behaviour { silent: true, ..Behaviour::default() });
    bench.until(Status::Degraded, Some("hung")).await;
    sleep(2 * 60 * MINUTE).await;
    let restarts = bench.host.world().count("restart");
    assert!((5..=9).contains(&restarts), "{restarts} in two hours");
    assert_eq!(bench.calls().len(), restarts, "and nothing else is done about it");
}

#[tokio::test(start_paused = true)]
async fn one_that_cannot_be_asked_from_here_any_more_but_by_docker_is_left_alone() {
    let mut bench = running().await;
    let docker_says = Some((Health::Healthy, LastCheck::Ready));
    bench.host.behave(&key('a'), Behaviour { silent: true, docker_says, ..Behaviour::default() });
    bench.until(Status::Degraded, Some("hung")).await;
    let view = bench.until(Status::Running, None).await;
    assert_eq!(view.connections, None);
    sleep(30 * MINUTE).await;
    assert_eq!(bench.view.borrow().status, Status::Running);
    assert_eq!(bench.calls(), Vec::<String>::new());
}

#[tokio::test(start_paused = true)]
async fn a_moment_without_connections_is_not_told() {
    let mut bench = running().await;
    bench.view.mark_unchanged();
    for _ in 0..20 {
        bench.host.behave(&key('a'), never_ready(&[]));
        sleep(Duration::from_secs(1)).await;
        bench.host.behave(&key('a'), Behaviour::default());
        sleep(Duration::from_secs(30)).await;
    }
    assert!(!bench.view.has_changed().unwrap(), "{:?}", bench.view.borrow());
}

#[tokio::test(start_paused = true)]
async fn a_crash_loop_is_told_as_one_state_and_left_to_docker() {
    let mut bench = running().await;
    bench.host.behave(&key('a'), never_ready(&["2026-01-01T00:00:00Z ERR all is lost"]));
    bench.host.crash(MAIN, 7);
    bench.until(Status::Restarting, Some("crash_loop")).await;
    bench.view.mark_unchanged();
    for _ in 0..10 {
        bench.host.starts_again(MAIN);
        sleep(Duration::from_secs(20)).await;
        bench.host.crash(MAIN, 7);
        sleep(Duration::from_secs(20)).await;
    }
    let told = bench.view.has_changed().unwrap();
    assert!(!told || bench.view.borrow().reason == Some("crash_loop"), "{:?}", bench.view.borrow());
    assert_eq!(bench.calls(), Vec::<String>::new());
    bench.host.behave(&key('a'), Behaviour::default());
    bench.host.starts_again(MAIN);
    let view = bench.until(Status::Running, None).await;
    assert_eq!(view.restarts, 11);
}

#[tokio::test(start_paused = true)]
async fn each_way_to_end_has_its_cause() {
    for (code, line, memory, reason) in [
        (1, "ERR Could not lookup srv records on _v2-origintunneld._tcp.argotunnel.com: no such host", false, "no_dns"),
        (137, "INF Registered tunnel connection", true, "out_of_memory"),
        (3, "ERR something else", false, "crash_loop"),
        (255, "ERR something else", false, "crash_loop"),
    ] {
        let mut bench = running().await;
        bench.host.behave(&key('a'), never_ready(&[line]));
        bench.host.crash(MAIN, code);
        bench.host.world().containers.get_mut(MAIN).unwrap().seen.out_of_memory = memory;
        bench.until(Status::Restarting, Some(reason)).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_token_that_cloudflared_does_not_take_stops_the_connector_until_another_one_comes() {
    let host = Double::default();
    host.behave(&key('a'), never_ready(&["Provided Tunnel token is not valid."]));
    let mut bench = Bench::start(&host, wants(&key('a')));
    bench.until(Status::Starting, None).await;
    sleep(Duration::from_secs(1)).await;
    host.crash(MAIN, 255);
    bench.until(Status::Error, Some("token_malformed")).await;
    sleep(30 * MINUTE).await;
    assert_eq!(bench.calls(), ["create tunnel", "start tunnel", "stop tunnel"]);
    bench.kill().await;

    let mut bench = Bench::start(&host, wants(&key('a')));
    bench.until(Status::Error, Some("token_malformed")).await;
    sleep(30 * MINUTE).await;
    assert_eq!(bench.calls(), Vec::<String>::new(), "the next agent finds out the same");
    bench.order(&key('b'));
    bench.until(Status::Running, None).await;
}

#[tokio::test(start_paused = true)]
async fn a_token_that_cloudflare_refuses_is_told_within_three_seconds_of_the_words() {
    // The trial over HTTP/2 gives no reason: only the present connector's own log does.
    let silent = || Some(Box::new(never_ready(&[])));
    let refused = |log: &[&'static str]| {
        let tries = Tries { failed: 5, registered: 0, seconds: 0.1 };
        Behaviour { tries, over_http2: silent(), ..never_ready(log) }
    };
    // Under `auto` the reason is logged after the fallback to HTTP/2.
    for pause in 0..20 {
        let host = Double::default();
        host.behave(&key('a'), refused(&[CONTROL]));
        let mut bench = Bench::start(&host, wants(&key('a')));
        bench.until(Status::Degraded, Some("registration_refused")).await;
        sleep(Duration::from_secs(40) + Duration::from_millis(100 * pause)).await;
        assert_eq!(bench.view.borrow().reason, Some("registration_refused"));
        host.behave(&key('a'), refused(&[CONTROL, FALLBACK, REFUSED]));
        let words = Instant::now();
        let view = bench.until(Status::Error, Some("token_refused")).await;
        assert!(words.elapsed() <= Duration::from_secs(3), "{:?}", words.elapsed());
        assert_eq!(view.connections, Some(0));
        // A fresh one may have logged it first. The present one's protocol is known from its own log.
        let knows = bench.view.wait_for(|view| view.connector.protocol == Some("http2"));
        timeout(Duration::from_secs(3), knows).await.unwrap().unwrap();
        if pause > 0 {
            continue;
        }
        // Fresh ones may be tried until the refusal is certain, and none after that.
        sleep(MINUTE).await;
        assert_eq!(bench.names(), [MAIN]);
        bench.calls();
        sleep(30 * MINUTE).await;
        assert_eq!(bench.calls(), Vec::<String>::new(), "cloudflared itself keeps asking");
        host.behave(&key('a'), Behaviour::default());
        bench.until(Status::Running, None).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_connection_that_is_lost_without_a_word_is_told_without_a_cause_until_the_counters_tell() {
    let mut bench = running().await;
    let tries = Tries { failed: 0, registered: 4, seconds: 0.1 };
    bench.host.behave(&key('a'), Behaviour { tries, ..Behaviour::default() });
    sleep(MINUTE).await;
    let lost = || Behaviour { tries, ..never_ready(&[CONTROL]) };
    bench.host.behave(&key('a'), lost());
    let view = bench.until(Status::Degraded, None).await;
    assert_eq!(view.connections, Some(0));
    sleep(10 * MINUTE).await;
    assert_eq!(bench.view.borrow().reason, None, "nothing tells why");
    bench.host.behave(&key('a'), Behaviour { tries: Tries { failed: 1, ..tries }, ..lost() });
    let began = Instant::now();
    bench.until(Status::Degraded, Some("registration_refused")).await;
    assert!(began.elapsed() <= Duration::from_secs(5), "{:?}", began.elapsed());
}

#[tokio::test(start_paused = true)]
async fn the_next_agent_knows_at_once_what_has_been_wrong_for_hours() {
    let host = Double::default();
    let tries = Tries { failed: 200, registered: 0, seconds: 0.4 };
    host.behave(&key('a'), Behaviour { tries, ..never_ready(&[CONTROL, CONTROL]) });
    let mut bench = Bench::start(&host, wants(&key('a')));
    bench.until(Status::Degraded, Some("registration_refused")).await;
    sleep(120 * MINUTE).await;
    bench.kill().await;
    let began = Instant::now();
    let mut bench = Bench::start(&host, wants(&key('a')));
    bench.until(Status::Degraded, Some("registration_refused")).await;
    assert!(began.elapsed() <= Duration::from_secs(3), "{:?}", began.elapsed());
}

#[tokio::test(start_paused = true)]
async fn where_a_refusal_ends_the_process_each_time_the_cause_is_the_same() {
    let host = Double::default();
    let failed = r#"ERR Failed to serve tunnel connection error="context canceled" connIndex=0"#;
    let gave_up = r#"ERR Initiating shutdown error="context canceled""#;
    host.behave(&key('a'), never_ready(&[failed, gave_up]));
    let mut bench = Bench::start(&host, wants(&key('a')));
    sleep(Duration::from_millis(1200)).await;
    host.crash(MAIN, 1);
    bench.until(Status::Degraded, Some("registration_refused")).await;
    bench.view.mark_unchanged();
    for _ in 0..10 {
        host.behave(&key('a'), never_ready(&[]));
        host.starts_again(MAIN);
        sleep(Duration::from_secs(2)).await;
        host.behave(&key('a'), never_ready(&[failed, gave_up]));
        host.crash(MAIN, 1);
        sleep(Duration::from_secs(20)).await;
    }
    let told = bench.view.has_changed().unwrap();
    assert!(!told || bench.view.borrow().reason == Some("registration_refused"), "{:?}", bench.view.borrow());
}

#[tokio::test(start_paused = true)]
async fn the_diagnosis_that_cloudflared_logs_is_asked_for_rarely() {
    let mut bench = running().await;
    sleep(60 * MINUTE).await;
    let asked = bench.host.world().diagnoses;
    assert!((2..=8).contains(&asked), "{asked} in an hour");
    bench.host.behave(&key('a'), never_ready(&[REFUSED]));
    bench.until(Status::Error, Some("token_refused")).await;
    sleep(60 * MINUTE).await;
    assert!(bench.host.world().diagnoses <= asked + 1, "nobody is connected");
}

#[tokio::test(start_paused = true)]
async fn the_version_is_never_told_as_unknown_once_it_is_known() {
    let host = Double::default();
    host.behave(&key('a'), never_ready(&[REFUSED]));
    let mut bench = Bench::start(&host, wants(&key('a')));
    let view = bench.until(Status::Error, Some("token_refused")).await;
    assert_eq!(view.version.as_deref(), Some("2025.9.0"), "its metrics answer while it is not ready");
    bench.wanted.send_modify(|wanted| wanted.state = DesiredState::Stopped);
    let view = bench.until(Status::Stopped, None).await;
    assert_eq!(view.version.as_deref(), Some("2025.9.0"));
    assert_eq!(view.fields(Default::default())["version"], "2025.9.0");
    assert_eq!(View::default().fields(Default::default()).get("version"), None);
}

#[tokio::test(start_paused = true)]
async fn a_replacement_is_there_before_the_one_before_it_goes() {
    let bench = running().await;
    sleep(MINUTE).await;
    bench.order(&key('b'));
    while bench.host.world().count("rename") == 0 {
        sleep(Duration::from_secs(1)).await;
        assert_eq!(bench.view.borrow().status, Status::Running);
    }
    sleep(MINUTE).await;
    let expected = ["create tunnel-next", "start tunnel-next", "stop tunnel", "remove tunnel", "rename tunnel-next"];
    assert_eq!(bench.calls(), expected);
    assert_eq!((bench.names(), bench.host.world().gaps), (vec![MAIN.to_owned()], 0));
    assert_eq!(bench.host.world().containers[MAIN].token, key('b'));
}

#[tokio::test(start_paused = true)]
async fn one_that_somebody_starts_while_its_drain_is_waited_for_is_not_removed_while_it_runs() {
    let bench = running().await;
    sleep(MINUTE).await;
    bench.order(&key('b'));
    while bench.host.world().count("stop") == 0 {
        sleep(Duration::from_millis(100)).await;
    }
    bench.host.starts_again(MAIN);
    sleep(MINUTE).await;
    let expected = ["stop tunnel", "stop tunnel", "remove tunnel", "rename tunnel-next"];
    assert_eq!(bench.calls()[2..], expected, "it is drained once more");
    assert_eq!(bench.names(), [MAIN]);
}

/// The most important test: a SIGKILL before and after each call of a replacement. The next agent ends where the first
/// would have, and visitors do not notice.
#[tokio::test(start_paused = true)]
async fn a_replacement_that_is_cut_off_anywhere_is_finished_without_a_gap() {
    // Nothing dies at the last number: there are five changing calls.
    for at in 0..6 {
        for moment in [Moment::Before, Moment::After] {
            let bench = running().await;
            sleep(MINUTE).await;
            let host = bench.host.clone();
            host.world().dies_at = Some((at, moment));
            bench.order(&key('b'));
            let died = timeout(10 * MINUTE, host.death()).await.is_ok();
            assert_eq!(died, at < 5, "call {at}");
            bench.kill().await;
            host.world().dies_at = None;
            // A while without an agent: what was left must carry the traffic.
            sleep(MINUTE).await;

            let mut bench = Bench::start(&host, wants(&key('b')));
            sleep(5 * MINUTE).await;
            bench.until(Status::Running, None).await;
            assert_eq!(bench.names(), [MAIN], "{moment:?} call {at}");
            assert_eq!(host.world().containers[MAIN].token, key('b'), "{moment:?} call {at}");
            let world = host.world();
            assert_eq!(world.gaps, 0, "{moment:?} call {at}: {:?}", world.calls);
        }
    }
}

#[tokio::test(start_paused = true)]
async fn orders_that_are_taken_back_half_way_leave_what_was() {
    for at in 0..5 {
        let bench = running().await;
        sleep(MINUTE).await;
        let host = bench.host.clone();
        host.world().dies_at = Some((at, Moment::After));
        bench.order(&key('b'));
        host.death().await;
        bench.kill().await;
        host.world().dies_at = None;
        let mut bench = Bench::start(&host, wants(&key('a')));
        sleep(5 * MINUTE).await;
        bench.until(Status::Running, None).await;
        assert_eq!(bench.names(), [MAIN], "call {at}");
        assert_eq!(host.world().containers[MAIN].token, key('a'), "call {at}");
        let world = host.world();
        assert_eq!(world.gaps, 0, "call {at}: {:?}", world.calls);
    }
}

#[tokio::test(start_paused = true)]
async fn a_successor_that_does_not_become_ready_is_removed_and_tried_again_ever_less_often() {
    let mut bench = running().await;
    sleep(MINUTE).await;
    bench.host.behave(&key('b'), never_ready(&[]));
    bench.order(&key('b'));
    let view = bench.until(Status::Running, Some("edge_unreachable")).await;
    assert_eq!(view.connections, Some(4), "the one before it carries the traffic");
    sleep(2 * 60 * MINUTE).await;
    let tries = bench.host.world().count("create");
    assert!((4..=9).contains(&tries), "{tries} in two hours");
    {
        let world = bench.host.world();
        assert_eq!((world.gaps, world.count("stop tunnel-next")), (0, world.count("remove")));
    }
    bench.host.behave(&key('b'), Behaviour::default());
    bench.until_served_with('b').await;
    assert_eq!(bench.host.world().gaps, 0);
}

#[tokio::test(start_paused = true)]
async fn a_successor_whose_token_is_refused_waits_for_another_token() {
    let mut bench = running().await;
    sleep(MINUTE).await;
    bench.host.behave(&key('b'), never_ready(&[REFUSED]));
    bench.order(&key('b'));
    bench.until(Status::Running, Some("token_refused")).await;
    sleep(2 * 60 * MINUTE).await;
    assert_eq!(bench.host.world().count("create"), 1);
    assert_eq!(bench.view.borrow().reason, Some("token_refused"), "it stays true");
    let replacements = |bench: &Bench| bench.metrics.lines(&["tunnel_replacements_total"]);
    let [completed, taken_back] =
        ["completed", "taken_back"].map(|outcome| format!("tunnel_replacements_total{{outcome=\"{outcome}\"}} "));
    assert_eq!(replacements(&bench), [format!("{completed}0"), format!("{taken_back}1")]);
    bench.order(&key('c'));
    bench.until_served_with('c').await;
    assert_eq!(bench.host.world().gaps, 0);
    assert_eq!(replacements(&bench), [format!("{completed}1"), format!("{taken_back}1")]);
}

#[tokio::test(start_paused = true)]
async fn the_failure_of_a_successor_is_not_held_against_the_one_of_later_orders() {
    let mut bench = running().await;
    sleep(MINUTE).await;
    bench.host.behave(&key('b'), never_ready(&[REFUSED]));
    bench.host.world().refused = vec!["stop tunnel-next"];
    bench.order(&key('b'));
    bench.until(Status::Running, Some("docker_refuses")).await;
    bench.host.world().refused.clear();
    bench.order(&key('c'));
    bench.until_served_with('c').await;
    assert_eq!(bench.host.world().gaps, 0);
}

#[tokio::test(start_paused = true)]
async fn taking_orders_back_that_could_not_be_carried_out_ends_the_complaint() {
    let mut bench = running().await;
    bench.host.behave(&key('b'), never_ready(&[REFUSED]));
    bench.order(&key('b'));
    bench.until(Status::Running, Some("token_refused")).await;
    bench.order(&key('a'));
    bench.until(Status::Running, None).await;
    assert_eq!(bench.host.world().containers[MAIN].token, key('a'));
}

#[tokio::test(start_paused = true)]
async fn a_command_that_was_refused_is_complained_of_while_the_tunnel_serves() {
    let mut bench = running().await;
    let refusal = Refusal { name: None, cause: Cause::TokenMalformed, problem: "no token".to_owned() };
    bench.wanted.send_modify(|wanted| wanted.refusal = Some(refusal));
    let view = bench.until(Status::Error, Some("token_malformed")).await;
    assert!(view.serves, "{view:?}");
    // The supervisor also reports when it stops serving.
    bench.wanted.send_modify(|wanted| wanted.state = DesiredState::Stopped);
    let ended = timeout(MINUTE, bench.view.wait_for(|view| !view.serves)).await.unwrap().unwrap().clone();
    assert!(!ended.container_running, "{ended:?}");
}

#[tokio::test(start_paused = true)]
async fn nobody_waits_for_the_edge_where_nothing_serves() {
    let host = Double::default();
    host.behave(&key('a'), never_ready(&[REFUSED]));
    let mut bench = Bench::start(&host, wants(&key('a')));
    bench.until(Status::Error, Some("token_refused")).await;
    let began = Instant::now();
    bench.order(&key('b'));
    while host.world().count("rename") == 0 {
        sleep(Duration::from_millis(100)).await;
    }
    // One second to become ready, three to drain, one before the rename.
    assert!(began.elapsed() < Duration::from_secs(7), "{:?}", began.elapsed());
}

#[tokio::test(start_paused = true)]
async fn where_a_second_container_is_refused_it_is_replaced_in_place() {
    let mut bench = running().await;
    bench.host.world().refused = vec!["create tunnel-next"];
    bench.order(&key('b'));
    while bench.host.world().count("start") == 0 {
        sleep(Duration::from_secs(1)).await;
    }
    bench.until(Status::Running, None).await;
    // The first call only checks whether Docker allows a container of this name at all.
    let expected = ["create tunnel", "stop tunnel", "remove tunnel", "create tunnel", "start tunnel"];
    assert_eq!(bench.calls(), expected);
}

#[tokio::test(start_paused = true)]
async fn a_successor_that_cannot_be_created_for_want_of_space_costs_nothing_that_runs() {
    let mut bench = running().await;
    sleep(MINUTE).await;
    bench.host.world().failing = vec!["create tunnel-next"];
    bench.order(&key('b'));
    bench.until(Status::Running, Some("docker_failed")).await;
    sleep(30 * MINUTE).await;
    assert_eq!(bench.host.world().count("stop"), 0);
    bench.host.world().failing.clear();
    bench.until_served_with('b').await;
    assert_eq!(bench.host.world().gaps, 0);
}

#[tokio::test(start_paused = true)]
async fn where_creating_is_refused_altogether_nothing_is_given_up() {
    let mut bench = running().await;
    bench.host.world().refused = vec!["create"];
    bench.order(&key('b'));
    bench.until(Status::Running, Some("docker_refuses")).await;
    sleep(30 * MINUTE).await;
    assert_eq!(bench.host.world().containers[MAIN].token, key('a'));
}

#[tokio::test(start_paused = true)]
async fn where_renaming_is_refused_one_more_is_made_under_the_right_name() {
    let mut bench = running().await;
    sleep(MINUTE).await;
    bench.host.world().refused = vec!["rename"];
    bench.order(&key('b'));
    sleep(10 * MINUTE).await;
    bench.until(Status::Running, None).await;
    assert_eq!((bench.names(), bench.host.world().gaps), (vec![MAIN.to_owned()], 0));
    assert_eq!(bench.host.world().containers[MAIN].token, key('b'));
}

#[tokio::test(start_paused = true)]
async fn a_successor_is_on_all_networks_before_the_one_before_it_goes() {
    let mut bench = running().await;
    bench.ways.send_modify(|ways| ways.networks = BTreeSet::from(["shop".to_owned()]));
    while bench.host.world().count("connect tunnel shop") == 0 {
        sleep(Duration::from_secs(1)).await;
    }
    bench.calls();
    bench.order(&key('b'));
    sleep(5 * MINUTE).await;
    bench.until(Status::Running, None).await;
    let expected = ["create tunnel-next", "connect tunnel-next shop", "start tunnel-next", "stop tunnel"];
    assert_eq!(bench.calls()[..4], expected);
}

#[tokio::test(start_paused = true)]
async fn metrics_on_a_network_of_their_own_are_placed_there_before_the_start_and_stay() {
    let config = TunnelConfig { metrics_network: Some("metrics".to_owned()), ..config() };
    let mut bench = Bench::start_with(&Double::default(), config, wants(&key('a')));
    bench.until(Status::Running, None).await;
    assert_eq!(bench.calls(), ["create tunnel", "place tunnel metrics", "start tunnel"]);
    sleep(30 * MINUTE).await;
    assert_eq!(bench.calls(), Vec::<String>::new());
}

#[tokio::test(start_paused = true)]
async fn one_that_was_taken_from_the_network_of_its_metrics_is_replaced_without_a_gap() {
    let config = TunnelConfig { metrics_network: Some("metrics".to_owned()), ..config() };
    let mut bench = Bench::start_with(&Double::default(), config, wants(&key('a')));
    bench.until(Status::Running, None).await;
    sleep(MINUTE).await;
    bench.calls();
    let taken = bench.host.world().containers.get_mut(MAIN).and_then(|fake| fake.seen.networks.remove("metrics"));
    assert!(taken.is_some());
    while bench.host.world().count("rename") == 0 {
        sleep(Duration::from_secs(1)).await;
    }
    let world = bench.host.world();
    assert_eq!(world.gaps, 0);
    assert_eq!(world.calls[..3], ["create tunnel-next", "place tunnel-next metrics", "start tunnel-next"]);
}

#[tokio::test(start_paused = true)]
async fn a_successor_that_cannot_be_placed_on_the_network_of_its_metrics_costs_nothing_that_runs() {
    let bench = running().await;
    let host = bench.host.clone();
    bench.kill().await;
    host.world().refused.push("place");
    let config = TunnelConfig { metrics_network: Some("metrics".to_owned()), ..config() };
    let mut bench = Bench::start_with(&host, config, wants(&key('a')));
    bench.until(Status::Running, Some("network_missing")).await;
    sleep(MINUTE).await;
    assert_eq!(bench.names(), ["tunnel"], "it is removed");
    let world = host.world();
    assert_eq!((world.gaps, world.count("stop"), world.count("start")), (0, 0, 0), "{:?}", world.calls);
}

#[tokio::test(start_paused = true)]
async fn what_becomes_of_the_tunnel_at_the_end_depends_on_what_stands_before_docker() {
    use Behind::{Another, Nobody, OwnProxy};
    const GOODBYE: &str = "goodbye 60";
    const AT_ONCE: [&str; 2] = ["stop tunnel", "remove tunnel"];
    let nothing: &[&str] = &[];
    let finalized = Some(Phase::Finalized);
    type Row<'a> = (Behind, OnExit, u64, Option<Phase>, &'a [&'a str]);
    let rows: [Row<'_>; 11] = [
        // The proxy holds the tunnel, or was stopped at the same moment.
        (OwnProxy, OnExit::Remove, 60, None, &[GOODBYE]),
        (Nobody, OnExit::Remove, 60, None, &[GOODBYE]),
        // Nothing could remove it later.
        (Another, OnExit::Remove, 60, None, &AT_ONCE),
        (OwnProxy, OnExit::Remove, 0, None, &AT_ONCE),
        (Another, OnExit::Remove, 0, None, &AT_ONCE),
        // Never removed.
        (OwnProxy, OnExit::Keep, 60, None, nothing),
        (Another, OnExit::Keep, 60, None, nothing),
        // A decommission is no upgrade. Between its phases the master wants to find the container stopped.
        (OwnProxy, OnExit::Remove, 60, finalized, &AT_ONCE[1..]),
        (Another, OnExit::Remove, 60, finalized, &AT_ONCE[1..]),
        (OwnProxy, OnExit::Remove, 60, Some(Phase::Prepared), nothing),
        (OwnProxy, OnExit::Keep, 60, finalized, &AT_ONCE[1..]),
    ];
    for (behind, on_exit, lease, decommission, expected) in rows {
        let config = TunnelConfig { on_exit, lease: Duration::from_secs(lease), ..config() };
        let host = Double::default();
        host.world().behind = behind;
        let mut bench = Bench::start_with(&host, config, wants(&key('a')));
        bench.until(Status::Running, None).await;
        if decommission.is_some() {
            bench.wanted.send_replace(Wanted { decommission, ..wants(&key('a')) });
            bench.until(Status::Stopped, None).await;
        }
        bench.calls();
        let asked = Instant::now();
        bench.stop.cancel();
        bench.work.await.unwrap();
        let told = format!("{behind:?} {on_exit:?} {lease} {decommission:?}");
        let calls = std::mem::take(&mut host.world().calls);
        assert_eq!(calls, expected, "{told}");
        let stays = Duration::from_secs(u64::from(behind == OwnProxy && expected == [GOODBYE]));
        let is_drained = expected.contains(&AT_ONCE[0]);
        assert!(asked.elapsed() >= stays, "{told}: it stays connected for a moment");
        assert!(is_drained || asked.elapsed() < Duration::from_secs(2), "{told}: {:?}", asked.elapsed());
    }
}

#[tokio::test(start_paused = true)]
async fn a_tunnel_that_was_forgotten_leaves_no_container() {
    let mut bench = running().await;
    bench.wanted.send_modify(|wanted| *wanted = Wanted { owners: wanted.owners.clone(), ..stopped() });
    bench.until(Status::Stopped, Some("no_tunnel_assigned")).await;
    assert_eq!(bench.calls(), ["stop tunnel", "remove tunnel"]);
}

#[tokio::test(start_paused = true)]
async fn a_shutdown_in_the_middle_of_a_replacement_takes_both() {
    let bench = running().await;
    sleep(MINUTE).await;
    bench.order(&key('b'));
    while bench.host.world().count("start") == 0 {
        sleep(Duration::from_millis(100)).await;
    }
    bench.stop.cancel();
    bench.work.await.unwrap();
    assert_eq!(bench.host.world().containers.len(), 0);
}

/// Renames a container as `docker rename` does.
fn renamed(host: &Double, name: &str, to: &str) {
    let mut world = host.world();
    let fake = world.containers.remove(name).unwrap();
    world.containers.insert(to.to_owned(), fake);
}

#[tokio::test(start_paused = true)]
async fn one_that_was_renamed_by_hand_gets_its_name_back_and_nobody_notices() {
    let bench = running().await;
    sleep(MINUTE).await;
    renamed(&bench.host, MAIN, "aside");
    sleep(MINUTE).await;
    assert_eq!((bench.calls(), bench.names()), (vec!["rename aside".to_owned()], vec![MAIN.to_owned()]));
    assert_eq!(bench.host.world().gaps, 0);
}

#[tokio::test(start_paused = true)]
async fn one_with_another_name_goes_when_the_one_with_the_right_name_serves() {
    let mut bench = running().await;
    let id = bench.host.world().containers[MAIN].seen.id.clone();
    // Docker refuses to rename it back, so the agent makes another one.
    renamed(&bench.host, MAIN, "aside");
    bench.host.world().refused = vec!["rename"];
    bench.until(Status::Starting, None).await;
    bench.host.world().refused.clear();
    bench.until(Status::Running, None).await;
    sleep(2 * MINUTE).await;
    assert_eq!((bench.names(), bench.host.world().gaps), (vec![MAIN.to_owned()], 0));
    assert_ne!(bench.host.world().containers[MAIN].seen.id, id);
    let expected = ["create tunnel", "start tunnel", "stop aside", "remove aside"];
    assert_eq!(bench.calls(), expected, "it served until the other one did");
}

#[tokio::test(start_paused = true)]
async fn a_renamed_one_goes_with_the_tunnel_and_with_the_agent() {
    let bench = running().await;
    bench.host.world().refused = vec!["rename"];
    renamed(&bench.host, MAIN, "aside");
    bench.stop.cancel();
    bench.work.await.unwrap();
    assert_eq!(bench.host.world().containers.len(), 0);

    let bench = running().await;
    renamed(&bench.host, MAIN, "aside");
    bench.wanted.send_modify(|wanted| *wanted = Wanted { owners: wanted.owners.clone(), ..stopped() });
    sleep(2 * MINUTE).await;
    assert_eq!(bench.names(), Vec::<String>::new());
}

fn stopped() -> Wanted {
    Wanted { state: DesiredState::Stopped, ..Wanted::default() }
}

#[tokio::test(start_paused = true)]
async fn what_carries_the_label_of_another_agent_or_of_none_is_no_stray() {
    for label in ["agent-2", "dockflare-agent"] {
        let bench = running().await;
        sleep(MINUTE).await;
        let mut other = bench.host.world().containers[MAIN].clone();
        other.seen.id = "other".to_owned();
        other.seen.labels.insert("com.dockflare.agent.owner".to_owned(), label.to_owned());
        bench.host.world().containers.insert("other".to_owned(), other);
        sleep(10 * MINUTE).await;
        assert_eq!(bench.calls(), Vec::<String>::new(), "{label}");
        bench.stop.cancel();
        bench.work.await.unwrap();
        assert!(bench.host.world().containers.contains_key("other"), "{label}");
    }
}

#[tokio::test(start_paused = true)]
async fn another_agents_container_under_the_name_is_left_alone_and_told_of() {
    let host = Double::default();
    let mut first = Bench::start(&host, wants(&key('a')));
    first.until(Status::Running, None).await;
    first.calls();
    let other = Wanted { owners: vec![AgentId::try_from("agent-2".to_owned()).unwrap()], ..wants(&key('b')) };
    let mut second = Bench::start(&host, other.clone());
    second.until(Status::Error, Some("name_taken")).await;
    sleep(30 * MINUTE).await;
    assert_eq!(second.calls(), Vec::<String>::new());
    second.wanted.send_replace(Wanted { state: DesiredState::Stopped, token: None, id: None, ..other });
    sleep(MINUTE).await;
    second.stop.cancel();
    second.work.await.unwrap();
    assert_eq!((first.calls(), host.world().containers[MAIN].token.clone()), (vec![], key('a')));
    // An agent that got another id keeps the container that it has.
    first.kill().await;
    let ids = ["agent-1", "agent-9"].map(|id| AgentId::try_from(id.to_owned()).unwrap());
    let mut third = Bench::start(&host, Wanted { owners: ids.to_vec(), ..wants(&key('a')) });
    third.until(Status::Running, None).await;
    assert_eq!(third.calls(), Vec::<String>::new());
}

#[tokio::test(start_paused = true)]
async fn an_engine_that_has_no_name_for_its_host_gets_a_container_without_and_keeps_it() {
    let host = Double::default();
    host.world().is_old = true;
    let mut bench = Bench::start(&host, wants(&key('a')));
    bench.until(Status::Running, None).await;
    assert_eq!(bench.calls(), ["create tunnel", "create tunnel", "start tunnel"]);
    bench.kill().await;
    // The next agent tries once more, beside the one that serves.
    let mut bench = Bench::start(&host, wants(&key('a')));
    bench.until(Status::Running, None).await;
    sleep(10 * MINUTE).await;
    assert_eq!((bench.calls(), host.world().gaps), (vec!["create tunnel-next".to_owned()], 0));
    bench.order(&key('b'));
    bench.until_served_with('b').await;
    assert_eq!(host.world().gaps, 0);
}

#[tokio::test(start_paused = true)]
async fn one_that_was_disconnected_from_its_network_is_connected_again_and_never_called_hung() {
    for refused in [vec![], vec!["connect"]] {
        let mut bench = running().await;
        sleep(MINUTE).await;
        bench.host.world().refused = refused.clone();
        bench.host.world().containers.get_mut(MAIN).unwrap().seen.networks.clear();
        let told = bench.until(Status::Starting, Some("network_replaced")).await;
        assert!(!told.serves);
        let began = Instant::now();
        let told = timeout(
            MINUTE,
            bench.view.wait_for(|view| {
                assert_ne!(view.reason, Some("hung"));
                view.serves
            }),
        );
        told.await.unwrap().unwrap();
        assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
        sleep(2 * MINUTE).await;
        if refused.is_empty() {
            assert_eq!(bench.calls(), ["connect tunnel net"], "it is the same one");
        } else {
            assert_eq!(bench.calls()[..2], ["create tunnel-next", "start tunnel-next"], "it is made anew");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_network_that_it_joined_is_left_when_nobody_needs_it_and_one_connected_by_hand_stays() {
    let mut bench = running().await;
    let needs = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<BTreeSet<_>>();
    bench.ways.send_modify(|ways| ways.networks = needs(&["app", "shop"]));
    sleep(MINUTE).await;
    bench.host.world().containers.get_mut(MAIN).unwrap().seen.networks.insert("by-hand".to_owned(), Default::default());
    assert_eq!(bench.calls(), ["connect tunnel app", "connect tunnel shop"]);

    // A container that comes back soon keeps its network.
    bench.ways.send_modify(|ways| (ways.networks, ways.all_known) = (needs(&["shop"]), true));
    sleep(Duration::from_secs(5)).await;
    bench.ways.send_modify(|ways| ways.networks = needs(&["app", "shop"]));
    sleep(5 * MINUTE).await;
    assert_eq!(bench.calls(), Vec::<String>::new());

    // An agent that has just started and knows no workloads yet leaves no network either.
    let (host, wanted) = (bench.host.clone(), bench.wanted.borrow().clone());
    bench.kill().await;
    bench = Bench::start(&host, wanted);
    sleep(5 * MINUTE).await;
    assert_eq!(bench.calls(), Vec::<String>::new());
    bench.ways.send_modify(|ways| (ways.networks, ways.all_known) = (needs(&["shop"]), true));
    sleep(MINUTE).await;
    assert_eq!(bench.calls(), ["disconnect tunnel app"]);
    let left = bench.host.world().containers[MAIN].seen.networks.keys().cloned().collect::<Vec<_>>();
    assert_eq!(left, ["by-hand", "net", "shop"]);
}

#[tokio::test(start_paused = true)]
async fn who_may_connect_and_not_disconnect_says_so_once_with_what_does_it_and_asks_once_an_hour() {
    let bench = running().await;
    let host = bench.host.clone();
    bench.ways.send_modify(|ways| (ways.networks, ways.all_known) = (["app".to_owned()].into(), true));
    sleep(MINUTE).await;
    assert_eq!(bench.calls(), ["connect tunnel app"]);
    host.world().refused = vec!["disconnect"];
    bench.ways.send_modify(|ways| ways.networks.clear());
    sleep(30 * MINUTE).await;
    assert_eq!(host.world().turned_away, 1, "no more than once");
    sleep(3 * 60 * MINUTE).await;
    assert_eq!(host.world().turned_away, 4, "and then each hour");
    host.world().refused.clear();
    sleep(61 * MINUTE).await;
    assert_eq!(bench.calls(), ["disconnect tunnel app"]);
    sleep(3 * 60 * MINUTE).await;
    assert_eq!(bench.calls(), Vec::<String>::new(), "it has left");
}
