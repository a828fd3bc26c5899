//! Checks what happens to the tunnel, whatever agent and proxy do and wherever the proxy is killed.

use std::collections::BTreeSet;
use std::future::pending;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::time::{advance, timeout};

use super::*;

const OWN: &str = "tunnel";

fn an_agent() -> AgentId {
    AgentId::try_from("a-1".to_owned()).unwrap()
}

fn names(names: &[&str]) -> Containers {
    names.iter().map(|name| ((*name).to_owned(), vec![an_agent()])).collect()
}

/// Goodbye said, its connection open, an agent connected, lease over, asked to stop; and the verdict on the tunnel.
type Row = (bool, bool, bool, bool, bool, &'static str);

const TABLE: [Row; 20] = [
    // Nobody said goodbye: a crash, a kill, or normal operation. Nothing is removed, whether an agent is connected or
    // not.
    (false, false, false, false, false, "stays"),
    (false, false, true, false, false, "stays"),
    (false, false, false, false, true, "stays"),
    (false, false, true, false, true, "stays"),
    // The agent is about to disconnect.
    (true, true, false, false, false, "held"),
    (true, true, false, true, false, "held"),
    // `restart`, and `up` with changes to both.
    (true, true, false, false, true, "held"),
    (true, true, false, true, true, "held"),
    // The agent has gone.
    (true, false, false, false, false, "held"),
    (true, false, false, true, false, "goes"),
    // `down`.
    (true, false, false, false, true, "goes"),
    (true, false, false, true, true, "goes"),
    // The agent is back, or another one is connected.
    (true, false, true, false, false, "stays"),
    (true, false, true, true, false, "stays"),
    (true, false, true, false, true, "stays"),
    (true, false, true, true, true, "stays"),
    // Both at once: remaining connections of the old agent, or a new agent that is early. Nothing is removed.
    (true, true, true, false, false, "held"),
    (true, true, true, true, false, "held"),
    (true, true, true, false, true, "held"),
    (true, true, true, true, true, "held"),
];

#[tokio::test(start_paused = true)]
async fn the_verdict_follows_from_what_was_said_and_who_is_there() {
    for (row, (said, open, agent, over, stop, expected)) in TABLE.into_iter().enumerate() {
        // The order of the events makes no difference.
        for agent_first in [true, false] {
            let mut standing = Standing::default();
            let now = Instant::now();
            standing.agents += usize::from(agent && agent_first);
            if said {
                standing.goodbye(OWN, 60, vec![an_agent()], now);
                standing.settle(OWN);
                standing.parting -= usize::from(!open);
                standing.settle(OWN);
            }
            standing.agents += usize::from(agent && !agent_first);
            standing.settle(OWN);
            let later = now + Duration::from_secs(if over { 60 } else { 59 });
            let verdict = if stop { standing.last_verdict() } else { standing.verdict(later) };
            let told = match verdict {
                Verdict::Stays => "stays",
                Verdict::Held(_) => "held",
                Verdict::Goes(_) => "goes",
            };
            assert_eq!(told, expected, "row {row}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_tunnel_container_of_another_name_goes_when_its_time_is_over_though_the_agent_is_back() {
    let now = Instant::now();
    let mut standing = Standing::default();
    standing.goodbye("old", 60, vec![an_agent()], now);
    standing.parting -= 1;
    standing.agents += 1;
    standing.settle("new");
    assert_eq!(standing.verdict(now), Verdict::Held(Some(now + Duration::from_secs(60))));
    assert_eq!(standing.last_verdict(), Verdict::Held(None));
    // When the agent under the new name also says goodbye, both go.
    standing.agents -= 1;
    standing.goodbye("new", 60, vec![an_agent()], now + Duration::from_secs(30));
    standing.parting -= 1;
    assert_eq!(standing.verdict(now + Duration::from_secs(60)), Verdict::Held(Some(now + Duration::from_secs(90))));
    assert_eq!(standing.verdict(now + Duration::from_secs(90)), Verdict::Goes(names(&["new", "old"])));
}

/// Docker, as far as the lease uses it: two containers that each take a while to remove.
#[derive(Debug, Default)]
struct Double {
    there: Mutex<BTreeSet<String>>,
    /// Removals that have started.
    begun: AtomicUsize,
    /// The removal at which the proxy is killed: before it, or after it was done.
    dies: Option<(usize, bool)>,
    /// How many removals fail before one succeeds.
    failing: AtomicUsize,
    /// Docker does not answer before this instant.
    away_until: Option<Instant>,
}

impl Double {
    fn new() -> Self {
        Self { there: Mutex::new(ALL.map(str::to_owned).into()), ..Self::default() }
    }

    fn there(&self) -> Vec<String> {
        self.there.lock().unwrap().iter().cloned().collect()
    }
}

impl Hands for Double {
    async fn answers(&self) -> bool {
        self.away_until.is_none_or(|until| Instant::now() >= until)
    }

    async fn remove(&self, name: &str, agents: &[AgentId], is_back: &dyn Fn() -> bool) -> Result<(), DockerError> {
        assert_eq!(agents, [an_agent()], "whose it is");
        if !self.answers().await {
            return Err(crate::docker::silent());
        }
        let number = self.begun.fetch_add(1, Ordering::Relaxed);
        if self.dies == Some((number, false)) {
            pending::<()>().await;
        }
        if self.failing.load(Ordering::Relaxed) > 0 {
            self.failing.fetch_sub(1, Ordering::Relaxed);
            return Err(crate::docker::silent());
        }
        sleep(Duration::from_secs(3)).await;
        if !is_back() {
            self.there.lock().unwrap().remove(name);
        }
        if self.dies == Some((number, true)) {
            pending::<()>().await;
        }
        Ok(())
    }
}

/// Keeps the lease for this long, like a proxy that is then killed.
async fn keep_for(leases: &Leases, hands: &Double, seconds: u64) {
    let never = CancellationToken::new();
    let _ = timeout(Duration::from_secs(seconds), leases.keep(hands, &never)).await;
}

/// Keeps the lease like a proxy that is asked to stop.
async fn keep_to_the_end(leases: &Leases, hands: &Double) {
    let stop = CancellationToken::new();
    stop.cancel();
    timeout(Duration::from_secs(60), leases.keep(hands, &stop)).await.unwrap();
}

const ALL: [&str; 3] = ["other", "tunnel", "tunnel-next"];

#[tokio::test(start_paused = true)]
async fn the_tunnel_goes_when_no_agent_comes_back_and_stays_when_one_does() {
    let (hands, leases) = (Double::new(), Leases::open(OWN, None));
    drop(leases.goodbye(60, vec![an_agent()]).await);
    keep_for(&leases, &hands, 59).await;
    assert_eq!(hands.there(), ALL);
    keep_for(&leases, &hands, 5).await;
    assert_eq!(hands.there(), ["other"]);
    // Only once.
    keep_for(&leases, &hands, 600).await;
    assert_eq!(hands.begun.load(Ordering::Relaxed), 2);

    let (hands, leases) = (Double::new(), Leases::open(OWN, None));
    drop(leases.goodbye(60, vec![an_agent()]).await);
    keep_for(&leases, &hands, 59).await;
    // The agent is killed a moment later, without a goodbye.
    drop(leases.agent().await);
    keep_for(&leases, &hands, 6000).await;
    keep_to_the_end(&leases, &hands).await;
    assert_eq!(hands.there(), ALL);
}

#[tokio::test(start_paused = true)]
async fn asked_to_stop_the_proxy_removes_the_tunnel_only_after_its_agent() {
    let (hands, leases) = (Double::new(), Leases::open(OWN, None));
    keep_to_the_end(&leases, &hands).await;
    let parting = leases.goodbye(60, vec![an_agent()]).await;
    keep_to_the_end(&leases, &hands).await;
    assert_eq!(hands.there(), ALL);
    drop(parting);
    keep_to_the_end(&leases, &hands).await;
    assert_eq!(hands.there(), ["other"]);
}

#[tokio::test(start_paused = true)]
async fn what_docker_does_not_do_is_tried_again_and_left_to_an_agent_that_is_back() {
    let hands = Double { failing: AtomicUsize::new(7), ..Double::new() };
    let leases = Leases::open(OWN, None);
    drop(leases.goodbye(1, vec![an_agent()]).await);
    keep_for(&leases, &hands, 300).await;
    assert_eq!(hands.there(), ["other"]);

    let hands = Double { failing: AtomicUsize::new(usize::MAX), ..Double::new() };
    drop(leases.goodbye(1, vec![an_agent()]).await);
    keep_for(&leases, &hands, 300).await;
    drop(leases.agent().await);
    let tried = hands.begun.load(Ordering::Relaxed);
    keep_for(&leases, &hands, 300).await;
    assert_eq!((hands.begun.load(Ordering::Relaxed), hands.there()), (tried, ALL.map(str::to_owned).to_vec()));
}

/// Docker starts its containers before its API. The more containers, the longer that takes.
#[tokio::test(start_paused = true)]
async fn the_time_in_which_a_docker_that_starts_does_not_answer_is_not_taken_from_the_agent() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("docker.sock.lease");
    for comes_back in [true, false] {
        drop(Leases::open(OWN, Some(path.clone())).goodbye(60, vec![an_agent()]).await);
        let leases = Leases::open(OWN, Some(path.clone()));
        let away = Duration::from_secs(300);
        let hands = Double { away_until: Some(Instant::now() + away), ..Double::new() };
        keep_for(&leases, &hands, 300 + 13).await;
        assert_eq!((hands.begun.load(Ordering::Relaxed), hands.there()), (0, ALL.map(str::to_owned).to_vec()));
        if comes_back {
            let agent = leases.agent().await;
            keep_for(&leases, &hands, 600).await;
            drop(agent);
            keep_for(&leases, &hands, 600).await;
            assert_eq!(hands.there(), ALL);
        } else {
            keep_for(&leases, &hands, 30).await;
            assert_eq!(hands.there(), ["other"]);
        }
    }
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_comes_back_during_the_drain_keeps_what_it_makes() {
    let (hands, leases) = (Double::new(), Leases::open(OWN, None));
    drop(leases.goodbye(1, vec![an_agent()]).await);
    keep_for(&leases, &hands, 2).await;
    assert_eq!(hands.begun.load(Ordering::Relaxed), 2);
    let leases = Leases::open(OWN, None);
    drop(leases.goodbye(1, vec![an_agent()]).await);
    let back = async {
        sleep(Duration::from_secs(2)).await;
        let agent = leases.agent().await;
        // The agent says goodbye again during the drain, which begins another lease.
        drop(agent);
        leases.goodbye(600, vec![an_agent()]).await
    };
    let (parting, ()) = tokio::join!(back, keep_for(&leases, &hands, 30));
    assert_eq!(hands.there(), ALL);
    assert_eq!(leases.standing().verdict(Instant::now()), Verdict::Held(None));
    drop(parting);
}

#[tokio::test(start_paused = true)]
async fn a_proxy_that_is_killed_anywhere_is_followed_by_one_that_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("docker.sock.lease");
    let open = || Leases::open(OWN, Some(path.clone()));
    // Killed before the goodbye: there is no lease.
    let hands = Double::new();
    keep_for(&open(), &hands, 600).await;
    assert_eq!(hands.there(), ALL);

    // Killed after the goodbye, during the lease, and before and after each removal, each time also with an agent that
    // is back.
    let deaths = [(0, false), (1, false), (0, true), (1, true)];
    for (at, dies) in [(0, None), (30, None)].into_iter().chain(deaths.map(|at| (64, Some(at)))) {
        for is_back in [false, true] {
            let mut hands = Double { dies, ..Double::new() };
            let first = open();
            drop(first.goodbye(60, vec![an_agent()]).await);
            assert!(path.exists(), "on disk before it is answered");
            keep_for(&first, &hands, at).await;
            drop(first);
            hands.dies = None;
            let second = open();
            let left = hands.there();
            if is_back {
                drop(second.agent().await);
                assert!(!path.exists());
            }
            keep_for(&second, &hands, 70).await;
            let expected = if is_back { left } else { vec!["other".to_owned()] };
            assert_eq!(hands.there(), expected, "killed after {at} s, at {dies:?}, agent back: {is_back}");
            assert!(!path.exists(), "what is over is not on disk");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_lease_that_a_restart_left_is_gone_on_with_and_one_that_was_carried_out_is_not() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("docker.sock.lease");
    let (hands, leases) = (Double::new(), Leases::open(OWN, Some(path.clone())));
    let parting = leases.goodbye(60, vec![an_agent()]).await;
    keep_to_the_end(&leases, &hands).await;
    assert!(path.exists(), "the agent was still connected: it may come back or not");
    drop((parting, leases));

    let leases = Leases::open(OWN, Some(path.clone()));
    keep_to_the_end(&leases, &hands).await;
    assert_eq!((hands.there(), path.exists()), (vec!["other".to_owned()], false));
}

#[tokio::test(start_paused = true)]
async fn the_time_on_disk_is_the_hosts_own_and_begins_anew_with_it() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("lease");
    let at = |boot: &str, seconds: u64| Uptime { boot: boot.to_owned(), millis: seconds * 1000 };
    let lease = Lease { containers: names(&[OWN]), seconds: 60, ends: Instant::now() + Duration::from_secs(60) };
    write(&path, Some(&lease), &at("one", 1000)).unwrap();
    let left = |now: Uptime| {
        let read = read(&path, &now).unwrap().unwrap();
        assert_eq!((read.seconds, read.containers), (60, names(&[OWN])));
        (read.ends - Instant::now()).as_secs()
    };
    assert_eq!(left(at("one", 1000)), 60);
    assert_eq!(left(at("one", 1020)), 40);
    // A proxy that has just started gives an agent that starts with it some time.
    assert_eq!(left(at("one", 1059)), 15);
    assert_eq!(left(at("one", 9000)), 15);
    // Never more than the whole lease.
    assert_eq!(left(at("one", 900)), 60);
    // Another boot of the host, and one that is unknown.
    assert_eq!(left(at("two", 10)), 60);
    assert_eq!(left(at("", 1020)), 60);
    // This also holds for a short lease: an agent does not start any faster for it.
    let short = Lease { seconds: 5, ends: Instant::now() + Duration::from_secs(5), ..lease };
    write(&path, Some(&short), &at("one", 1000)).unwrap();
    assert_eq!((read(&path, &at("one", 9000)).unwrap().unwrap().ends - Instant::now()).as_secs(), 15);
    advance(Duration::from_secs(1)).await;

    let now = Uptime::now();
    assert!(now.boot.len() == 36 && now.millis > 0, "{now:?}");
}

#[tokio::test(start_paused = true)]
async fn a_file_that_is_no_lease_removes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("lease");
    let good = r#"{"containers":{"tunnel":["a-1"]},"seconds":60,"boot":"b","ends":1}"#;
    let wrong = [
        "",
        "{",
        "[]",
        &good.replace("60", "3601"),
        &good.replace("60", "-1"),
        &good.replace("\"tunnel\":[\"a-1\"]", ""),
        &good.replace("tunnel", "../tunnel"),
        &good.replace("tunnel", ""),
        &good.replace("a-1", ""),
        &good.replace("a-1", "-a"),
        &good.replace("\"boot\"", "\"more\":1,\"boot\""),
        &good.replace("tunnel", &"x".repeat(70_000)),
    ];
    for text in wrong {
        std::fs::write(&path, text).unwrap();
        let (hands, leases) = (Double::new(), Leases::open(OWN, Some(path.clone())));
        keep_for(&leases, &hands, 6000).await;
        assert_eq!(hands.there(), ALL, "{text}");
        assert!(!path.exists(), "{text}");
    }
    std::fs::write(&path, good).unwrap();
    let (hands, leases) = (Double::new(), Leases::open(OWN, Some(path)));
    keep_for(&leases, &hands, 70).await;
    assert_eq!(hands.there(), ["other"]);
}

#[tokio::test(start_paused = true)]
async fn a_folder_that_cannot_be_written_costs_nothing_but_the_memory_of_a_kill() {
    let (hands, leases) = (Double::new(), Leases::open(OWN, Some("/nowhere/lease".into())));
    drop(leases.goodbye(60, vec![an_agent()]).await);
    keep_for(&leases, &hands, 70).await;
    assert_eq!(hands.there(), ["other"]);
}
