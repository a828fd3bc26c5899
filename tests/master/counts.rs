//! How often the agent asks a master in trouble: never more often than the back-off promises, and one request of a
//! stream at a time.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use dockflare_dev_master::{DevMaster, Fault, Protocol, Request, Route, Times};
use futures_util::future::join_all;
use testkit::AgentProcess;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until};

use crate::desk::{BOTH, Desk, stop};
use crate::support::{SOON, agent_binary};

/// How long a test counts requests.
const WINDOW: Duration = Duration::from_secs(15);
/// The back-off draws waits evenly below bounds that double. The bounds begin at 0.5 s for the reporter and at 1 s for
/// the poller, so five or six requests of each are likely in the window. The chance of this many requests of one stream
/// is less than one in a million. Without growing waits there would be far more: the agent asks for commands each
/// second, and the shortest wait is 0.1 s.
const MOST_OF_A_STREAM: usize = 13;

/// Waits for the end of the window. There is no event to wait for: the test shows that little happens.
async fn window() {
    sleep_until(Instant::now() + WINDOW).await;
}

fn of(requests: &[Arc<Request>], route: Route) -> Vec<&Request> {
    requests.iter().filter(|request| request.route == route).map(Arc::as_ref).collect()
}

#[tokio::test]
async fn a_master_in_trouble_is_asked_ever_less_often() {
    let faults = [
        Fault::status(500),
        Fault::status(503),
        Fault::status(502).retry_after("1"),
        Fault::code(429, "rate_limited"),
        Fault::CutBefore,
        Fault::CutHalfway,
        Fault::LostReply,
        Fault::NotJson,
        Fault::LoginRedirect,
    ];
    let rows = BOTH.iter().flat_map(|&protocol| faults.iter().map(move |fault| (protocol, fault.clone())));
    let rows = rows.map(async |(protocol, fault)| {
        let desk = Desk::new(protocol).await.unwrap();
        let mut agent = desk.agent().unwrap();
        desk.answered(Route::Events, if protocol == Protocol::V1 { 202 } else { 200 }).await.unwrap();
        let before = desk.master.requests().len();
        desk.master.fault(Route::Any, fault.clone(), Times::UntilCleared);
        window().await;
        let asked = desk.master.requests()[before..].to_vec();
        for route in [Route::Commands, Route::Events, Route::Register] {
            let count = of(&asked, route).len();
            println!("{protocol} {fault:?}: {count} requests of {route}");
            assert!(count <= MOST_OF_A_STREAM, "{protocol} {fault:?}: {count} requests of {route}");
        }
        assert!(!asked.is_empty(), "and it does not give up");
        stop(&mut agent).await.unwrap();
        desk.assert_no_violations();
    });
    join_all(rows).await;
}

#[tokio::test]
async fn a_master_that_refuses_for_good_is_asked_ever_less_often() {
    // What happens to the key or the messages, and the most requests allowed in the window.
    let cases: [(&str, usize); 3] =
        [("the key is revoked", MOST_OF_A_STREAM), ("the agent is forgotten", 2 * MOST_OF_A_STREAM), ("413", 10)];
    let rows = cases.map(async |(case, most)| {
        let desk = Desk::new(Protocol::V2).await.unwrap();
        let mut agent = desk.agent().unwrap();
        let id = desk.registered(1).await.unwrap().id;
        desk.answered(Route::Events, 200).await.unwrap();
        let before = desk.master.requests().len();
        match case {
            "413" => desk.master.fault(Route::Events, Fault::code(413, "payload_too_large"), Times::UntilCleared),
            "the key is revoked" => drop(desk.master.revoke_key(&desk.key).unwrap()),
            _ => desk.master.forget(&id).unwrap(),
        }
        window().await;
        let asked = desk.master.requests()[before..].to_vec();
        // A forgotten agent sends two requests per try: one with its id and one without.
        for route in [Route::Register, Route::Events] {
            let count = of(&asked, route).len();
            println!("{case}: {count} requests of {route}");
            assert!(count <= most, "{case}: {count} requests of {route}");
        }
        if case == "413" {
            let bodies: Vec<_> = of(&asked, Route::Events).into_iter().map(|request| &request.body).collect();
            let repeated = bodies.iter().enumerate().any(|(at, body)| bodies[..at].contains(body));
            assert!(!repeated, "the same bytes again: {bodies:#?}");
        } else {
            assert!(of(&asked, Route::Register).len() > 1, "{case}: it goes on asking");
            assert!(of(&asked, Route::Commands).len() <= 2, "{case}: without a session no commands are asked for");
        }
        assert!(agent.is_running().unwrap());
        stop(&mut agent).await.unwrap();
        desk.assert_no_violations();
    });
    join_all(rows).await;
}

#[tokio::test]
async fn a_master_that_hangs_up_at_once_is_knocked_at_ever_less_often() {
    let mut desk = Desk::new(Protocol::V2).await.unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (knocked, knocks) = watch::channel(0);
    let door = tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            knocked.send_modify(|count| *count += 1);
            drop(client);
        }
    });
    desk.set("DOCKFLARE_MASTER_URL", format!("http://{address}"));
    let mut agent = desk.agent().unwrap();
    window().await;
    let count = *knocks.borrow();
    println!("{count} connections");
    // Only the task that registers connects. The others wait for it.
    assert!((2..=MOST_OF_A_STREAM).contains(&count), "{count} connections");
    // The agent may see a connection end in several ways. It logs each way once.
    let log = agent.log();
    assert!(log.lines().filter(|line| line.contains("WARN the master ")).count() <= 3, "{log}");
    stop(&mut agent).await.unwrap();
    door.abort();
}

#[tokio::test]
async fn a_name_that_does_not_resolve_is_said_once_and_waited_for() {
    let mut desk = Desk::new(Protocol::V2).await.unwrap();
    desk.set("DOCKFLARE_MASTER_URL", "http://nowhere.invalid:5000");
    let mut agent = desk.agent().unwrap();
    let line = agent.wait_for_log("the master cannot be reached", SOON).await.unwrap();
    for part in ["WARN", "dns error", "trying again, the tunnel is not touched"] {
        assert!(line.contains(part), "{part} is not in: {line}");
    }
    window().await;
    let log = agent.log();
    assert_eq!(log.lines().filter(|line| line.contains("WARN the master ")).count(), 1, "{log}");
    stop(&mut agent).await.unwrap();
}

/// As on a cloned host: each agent ends the other's session, and no lock can see that.
#[tokio::test]
async fn two_agents_with_one_key_do_not_chase_each_other_without_a_pause() {
    let desk = Desk::new(Protocol::V2).await.unwrap();
    let mut first = desk.agent().unwrap();
    desk.registered(1).await.unwrap();
    let data = tempfile::tempdir().unwrap();
    let mut env = desk.env.clone();
    env.push(("DOCKFLARE_DATA_DIR".to_owned(), data.path().display().to_string()));
    let mut second = AgentProcess::spawn(&agent_binary(), &env, data.path()).unwrap();
    second.plant(&desk.key);
    desk.registered(3).await.unwrap();
    let before = desk.master.requests().len();
    window().await;
    let asked = desk.master.requests()[before..].to_vec();
    let count = of(&asked, Route::Register).len();
    println!("{count} registrations");
    assert!((1..=2 * MOST_OF_A_STREAM).contains(&count), "{count} registrations");
    stop(&mut first).await.unwrap();
    stop(&mut second).await.unwrap();
}

#[tokio::test]
async fn a_master_that_needs_half_a_minute_is_waited_for_and_not_asked_meanwhile() {
    let rows = BOTH.map(async |protocol| {
        let desk = Desk::new(protocol).await.unwrap();
        let mut agent = desk.agent().unwrap();
        let id = desk.registered(1).await.unwrap().id;
        desk.answered(Route::Commands, 200).await.unwrap();
        let slow = Duration::from_secs(30);
        desk.master.fault(Route::Commands, Fault::delay(slow), 1);
        desk.master.fault(Route::Events, Fault::delay(slow), 1);
        desk.master.enroll(&id, "edge").unwrap();
        let before = desk.master.requests().len();
        agent.wait_for_log("command start_tunnel", slow + SOON).await.unwrap();
        // The double records requests when it answers them. Requests sent meanwhile come before the slow one.
        let asked = desk.master.requests()[before..].to_vec();
        for route in [Route::Commands, Route::Events] {
            let of_route = of(&asked, route);
            let slow_at = of_route.iter().position(|request| matches!(request.fault, Some(Fault::Delay { .. })));
            // The double may have answered one between the look and the fault.
            assert!(slow_at.is_none_or(|at| at <= 1), "{protocol} {route}: {slow_at:?} before the slow one");
        }
        let delivered = of(&asked, Route::Commands).iter().any(|request| request.fault.is_some());
        assert!(delivered, "the command came with the slow reply");
        assert!(!agent.log().contains("WARN the master "), "slow is not away:\n{}", agent.log());
        stop(&mut agent).await.unwrap();
        desk.assert_no_violations();
    });
    join_all(rows).await;
}

#[tokio::test]
async fn a_master_that_flaps_is_not_asked_more_often_than_one_that_is_there() {
    let rows = BOTH.map(async |protocol| {
        let desk = Desk::new(protocol).await.unwrap();
        let mut agent = desk.agent().unwrap();
        let id = desk.registered(1).await.unwrap().id;
        let before = desk.master.requests().len();
        let began = Instant::now();
        for _ in 0..8 {
            desk.master.pause().await.unwrap();
            sleep(Duration::from_millis(800)).await;
            desk.master.resume().await.unwrap();
            sleep(Duration::from_millis(1200)).await;
        }
        let took = began.elapsed().as_secs() as usize;
        let asked = desk.master.requests()[before..].to_vec();
        let commands = of(&asked, Route::Commands).len();
        assert!(commands <= took + 8, "{protocol}: {commands} polls in {took} s");
        let events = of(&asked, Route::Events).len();
        assert!(events <= 2 * 8 + took / 5 + 2, "{protocol}: {events} events in {took} s");
        // At most three lines per outage: a request was cut, nothing listens, and the master is back.
        let log = agent.log();
        let is_said = |line: &&str| line.contains("WARN the master ") || line.contains("the master works again");
        let said = log.lines().filter(is_said).count();
        assert!(said <= 3 * 8, "{said} lines:\n{log}");
        desk.master.enroll(&id, "edge").unwrap();
        agent.wait_for_log("command start_tunnel", SOON).await.unwrap();
        stop(&mut agent).await.unwrap();
        desk.assert_no_violations();
    });
    join_all(rows).await;
}

#[tokio::test]
async fn retry_after_is_honoured_with_each_status_as_seconds_and_as_a_date() {
    let statuses = [429, 500, 502, 503];
    let rows = statuses.iter().flat_map(|&status| [(status, false), (status, true)]);
    let rows = rows.map(async |(status, as_date)| {
        let desk = Desk::new(Protocol::V2).await.unwrap();
        let mut agent = desk.agent().unwrap();
        desk.answered(Route::Commands, 200).await.unwrap();
        // An HTTP date has no fractions of a second, so at least four of the five seconds are left.
        let date = httpdate::fmt_http_date(SystemTime::now() + Duration::from_secs(5));
        let value = if as_date { date.as_str() } else { "4" };
        desk.master.fault(Route::Commands, Fault::status(status).retry_after(value), 1);
        let again = desk.master.wait_for("the next poll that is answered", SOON, |_| {
            let asked = desk.master.requests();
            let refused = asked.iter().find(|request| request.status == Some(status))?;
            let next = asked.iter().find(|request| request.route == Route::Commands && request.at > refused.at)?;
            Some(next.at.duration_since(refused.at).as_millis())
        });
        let waited = again.await.unwrap();
        // The agent may read the date up to 1.5 s after the test wrote it.
        let least = if as_date { 2_400 } else { 4_000 };
        assert!((least..10_500).contains(&waited), "{status} {value}: {waited} ms");
        stop(&mut agent).await.unwrap();
        desk.assert_no_violations();
    });
    join_all(rows).await;
}

/// One of many agents at one master.
fn one_of_many(master: &DevMaster, data: &tempfile::TempDir) -> AgentProcess {
    let env = [
        ("DOCKFLARE_MASTER_URL", master.url()),
        ("DOCKFLARE_API_KEY", master.generate_key("many")),
        ("DOCKFLARE_DATA_DIR", data.path().display().to_string()),
        ("DOCKER_HOST", "unix:///nowhere/docker.sock".to_owned()),
        ("COMMAND_POLL_INTERVAL_SECONDS", "1".to_owned()),
        ("HEALTH_CHECK_PORT", "0".to_owned()),
    ];
    let env = env.map(|(name, value)| (name.to_owned(), value));
    AgentProcess::spawn(&agent_binary(), &env, data.path()).unwrap()
}

#[tokio::test]
async fn agents_whose_master_returns_do_not_all_come_at_once() {
    const MANY: usize = 20;
    let master = DevMaster::builder().start().await.unwrap();
    let folders: Vec<_> = (0..MANY).map(|_| tempfile::tempdir().unwrap()).collect();
    let agents: Vec<_> = folders.iter().map(|data| one_of_many(&master, data)).collect();
    let all = master.wait_for("all to poll", 2 * SOON, |known| {
        (known.agents.len() == MANY && known.agents.values().all(|agent| agent.polls > 0)).then_some(())
    });
    all.await.unwrap();
    master.fault(Route::Any, Fault::status(503), Times::UntilCleared);
    // Long enough for bounds of 4 s and more.
    sleep(Duration::from_secs(8)).await;
    master.clear_faults();
    let back = jiff::Timestamp::now();
    let first_polls = || {
        let asked = master.requests();
        let polls = asked.iter().filter(|request| request.route == Route::Commands && request.at > back);
        let mut first = std::collections::BTreeMap::new();
        for poll in polls {
            first.entry(poll.agent.clone()).or_insert(poll.at.duration_since(back).as_secs_f64());
        }
        (first.len() == MANY).then_some(first)
    };
    let first = master.wait_for("all to poll again", 2 * SOON, |_| first_polls()).await.unwrap();
    let mut waits: Vec<_> = first.into_values().collect();
    waits.sort_by(f64::total_cmp);
    // The agents poll each second, so with equal waits they would all return within one second. The tests beside the
    // code that draws the waits check with a thousand of them how evenly it does so.
    let busiest = waits.iter().map(|from| waits.iter().filter(|at| (*from..from + 1.0).contains(*at)).count()).max();
    assert!(busiest.is_some_and(|busiest| busiest <= MANY * 3 / 4), "{waits:?}");
    let most = waits[MANY - 3] - waits[2];
    assert!(most > 2.0, "all but the first and last two come within {most:.1} s: {waits:?}");
    drop(agents);
    assert_eq!(master.violations(), Vec::<String>::new());
}
