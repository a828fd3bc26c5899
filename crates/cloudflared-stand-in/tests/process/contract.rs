//! Compares the stand-in with the real program. It does to the stand-in what was done to the real one, at the same
//! times, and compares log, counters and answers with `tests/captures`. The captures were made from the recordings
//! independently of the stand-in's own files.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use anyhow::ensure;
use jiff::Timestamp;

use super::*;

/// How many times as fast as recorded to play: first all cases together, then the ones that differed, alone. A machine
/// that is a second late is ten recorded seconds late; a real difference shows at any pace.
const SPEEDS: [f64; 2] = [10.0, 4.0];
/// How far apart the two may be, in recorded seconds: the resolution of the recordings (1 s), the delay of their
/// machine, and half a second on this one.
const APART: f64 = 8.0;
/// How many cases run at once. They do little but wait.
const AT_ONCE: usize = 12;

const VERSIONS: [&str; 3] = ["2025.4.0", "2025.9.0", "2026.8.2"];
const PROTOCOLS: [&str; 3] = ["auto", "quic", "http2"];

/// What was done to the real program: words from the start, or from one second until another.
struct Done {
    capture: &'static str,
    words: &'static str,
    from: Option<f64>,
    to: Option<f64>,
}

const fn at_start(capture: &'static str, words: &'static str) -> Done {
    Done { capture, words, from: None, to: None }
}

const fn later(capture: &'static str, words: &'static str, from: f64, to: Option<f64>) -> Done {
    Done { capture, words, from: Some(from), to }
}

const ALL: [Done; 14] = [
    at_start("01-healthy", ""),
    at_start("02-refused-at-start", "unauthorized"),
    at_start("05-edge-away-at-start-refused", "unreachable"),
    at_start("06-edge-away-at-start-swallowed", "swallowed"),
    at_start("10-no-dns", "dns_silent"),
    at_start("10b-dns-servfail", "no_dns"),
    at_start("21-clock-wrong", "clock_wrong"),
    later("03-connected-then-refused", "unauthorized", 20.0, None),
    later("03b-connected-then-edge-error", "edge_error", 20.0, None),
    later("03c-registration-never-answered", "unanswered", 20.0, None),
    later("07-connected-edge-away-refused", "unreachable", 20.0, Some(110.0)),
    later("08-connected-edge-away-swallowed", "swallowed", 20.0, Some(110.0)),
    later("08b-connected-edge-away-swallowed-long", "swallowed", 20.0, Some(320.0)),
    later("12a-sigterm-idle", "SIGTERM", 15.0, None),
];

/// What a process did, from its start to its end or to the end of the recording.
#[derive(Default)]
struct Seen {
    lines: Vec<(f64, String)>,
    /// Readiness and registration counters over time.
    samples: Vec<(f64, Option<bool>, BTreeMap<String, f64>)>,
    exit: Option<i32>,
}

/// Exit code of a process that ended before anybody saw its code.
const UNSEEN: i32 = -1;

const COUNTERS: [&str; 2] = [
    r#"cloudflared_rpc_client_failures{handler="registration",method="register_connection"}"#,
    r#"cloudflared_tunnel_tunnel_register_success{rpcName="registerConnection"}"#,
];

fn folder(version: &str, protocol: &str, capture: &str) -> PathBuf {
    testkit::workspace_root().join("tests/captures").join(version).join(protocol).join(capture)
}

/// A line without the parts that differ between two processes or that the captures leave out; cut where they cut it.
fn shape(line: &str) -> String {
    let body = line.split_once("Z ").filter(|(time, _)| time.starts_with("20")).map_or(line, |(_, body)| body);
    for begin in
        ["INF Starting tunnel", "INF Version", "INF Environmental", "INF Updated to new", "ERR Failed to fetch"]
    {
        if body.starts_with(begin) {
            return begin.to_owned();
        }
    }
    let varies = |word: &str| {
        ["event=", "ip=", "connection=", "run_id=", "target="].iter().any(|begin| word.starts_with(begin))
            || word.contains(|c: char| c.is_ascii_digit()) && word.matches('.').count() >= 3
    };
    let words: Vec<_> = body.split_whitespace().filter(|word| !varies(word)).collect();
    words.join(" ")
}

/// What the captures hold of the process's first life.
fn recorded(version: &str, protocol: &str, capture: &str) -> Result<Seen> {
    let folder = folder(version, protocol, capture);
    let samples = std::fs::read_to_string(folder.join("samples.jsonl"))?;
    let samples: Vec<Value> = samples.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
    let first = samples.first().context("no sample")?;
    let started: Timestamp = first["started_at"].as_str().context("started_at")?.parse()?;
    let mut seen = Seen::default();
    for line in std::fs::read_to_string(folder.join("log.txt"))?.lines() {
        let Some((time, body)) = line.split_once(' ') else { continue };
        let at = time.parse::<Timestamp>()?.duration_since(started).as_secs_f64();
        let shape = shape(body);
        // Docker started the process again.
        if seen.lines.first().is_some_and(|(_, first)| *first == shape) {
            break;
        }
        seen.lines.push((at, shape));
    }
    let over = |sample: &Value| matches!(sample["state"].as_str(), Some("exited" | "restarting"));
    let (mut ready, mut counters) = (None, BTreeMap::new());
    for sample in &samples {
        if sample["restarts"].as_u64().is_some_and(|restarts| restarts > 0) || over(sample) {
            break;
        }
        if let Some(status) = sample.get("ready_status") {
            ready = status.as_u64().map(|status| status == 200);
        }
        for counter in COUNTERS {
            if let Some(value) = sample["metrics"][counter].as_f64() {
                counters.insert(counter.to_owned(), value);
            }
        }
        seen.samples.push((sample["t"].as_f64().context("t")?, ready, counters.clone()));
    }
    let code = samples.iter().find_map(|sample| sample["exit_code"].as_i64().filter(|code| *code != 0));
    let ended = samples.iter().any(|sample| over(sample) || sample["restarts"].as_u64().is_some_and(|n| n > 0));
    // Docker may already have restarted it between two samples.
    let stopped = samples.iter().any(|sample| sample["state"] == "exited");
    let unseen = if stopped { 0 } else { UNSEEN };
    seen.exit = ended.then(|| code.and_then(|code| i32::try_from(code).ok()).unwrap_or(unseen));
    Ok(seen)
}

fn flag(words: &str, value: bool) -> Value {
    json!({ words: value })
}

/// Does to the stand-in what was done to the real program, for `until` recorded seconds.
async fn played(version: &str, protocol: &str, done: &Done, until: f64, speed: f64) -> Result<Seen> {
    let mut words = format!("speed={speed} version={version}");
    let signal = done.words == "SIGTERM";
    if done.from.is_none() && !done.words.is_empty() {
        words = format!("{words} {}", done.words);
    }
    // Pick the port here: the test asks it before the log names it.
    let port = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
    let address = format!("127.0.0.1:{port}");
    let mut process = run(&words, &[("TUNNEL_TRANSPORT_PROTOCOL", protocol), ("TUNNEL_METRICS", &address)]);
    let started = Instant::now();
    let now = || started.elapsed().as_secs_f64() * speed;
    let (mut said, mut taken_back, mut lines) = (None, false, 0);
    let mut seen = Seen::default();
    while now() < until {
        if done.from.is_some_and(|from| now() >= from) && said.is_none() {
            said = Some(now());
            if signal {
                process.sigterm()?;
            } else {
                post(&address, "/stand-in", &flag(done.words, true)).await?;
            }
        }
        // Wait as long as in the recording, plus a second: the first change may have come late.
        let due = said.zip(done.to).zip(done.from).map(|((said, to), from)| said + to - from + 1.0);
        if due.is_some_and(|due| now() >= due) && !taken_back {
            taken_back = true;
            post(&address, "/stand-in", &flag(done.words, false)).await?;
        }
        let log = process.log();
        let all: Vec<_> = log.lines().collect();
        seen.lines.extend(all[lines.min(all.len())..].iter().map(|line| (now(), shape(line))));
        lines = all.len();
        if !process.is_running()? {
            seen.exit = Some(process.wait_exit(SOON).await?.code().unwrap_or(-1));
            let log = process.log();
            let all: Vec<_> = log.lines().collect();
            seen.lines.extend(all[lines..].iter().map(|line| (now(), shape(line))));
            break;
        }
        let asked = now();
        let ready = get(&address, "/ready").await.ok().map(|answer| answer.status == 200);
        let page = get(&address, "/metrics").await.ok().map(|answer| answer.body).unwrap_or_default();
        let value = |counter: &str| page.lines().find_map(|line| line.strip_prefix(counter)?.trim().parse().ok());
        let counters = COUNTERS.iter().filter_map(|counter| Some(((*counter).to_owned(), value(counter)?)));
        // Drop slow answers: their time is not known.
        if now() - asked < 3.0 {
            seen.samples.push((asked, ready, counters.collect()));
        }
        tokio::time::sleep(Duration::from_millis(60)).await;
    }
    Ok(seen)
}

/// Splits the lines after the last connection is registered and the configuration has arrived. The order of the earlier
/// lines depends on the network. `later`: whether there is such a point.
fn split(lines: &[(f64, String)], later: bool, known: &BTreeSet<String>) -> (BTreeSet<String>, Vec<(f64, String)>) {
    let known: Vec<_> = lines.iter().filter(|(_, line)| known.contains(line)).cloned().collect();
    let registered =
        known.iter().position(|(_, line)| line.starts_with("INF Registered tunnel connection connIndex=3"));
    let configured = known.iter().position(|(_, line)| line.starts_with("INF Updated to new"));
    let point = registered.max(configured).filter(|_| later).map_or(0, |last| last + 1);
    (known[..point].iter().map(|(_, line)| line.clone()).collect(), known[point..].to_vec())
}

fn compare(real: &Seen, ours: &Seen, done: &Done, until: f64) -> Result<()> {
    let known: BTreeSet<String> = real.lines.iter().map(|(_, line)| line.clone()).collect();
    let later = done.from.is_some() || done.capture.starts_with("01-");
    let (real_before, mut real_after) = split(&real.lines, later, &known);
    let (our_before, our_after) = split(&ours.lines, later, &known);
    ensure!(real_before == our_before, "before: {real_before:#?}\n{our_before:#?}");
    // The time of the change is known to about a second, the real program's first line after it to the millisecond.
    let first = |lines: &[(f64, String)]| lines.first().map(|(at, _)| *at);
    let shift = first(&our_after).zip(first(&real_after)).map_or(0.0, |(ours, real)| ours - real);
    // If the real program was not back by the end of its recording, stop comparing at `to`: the stand-in comes back at
    // its next try.
    let back = |(at, line): &(f64, String)| done.to.is_some_and(|to| *at > to) && line.contains("Registered tunnel");
    let until = done.to.filter(|_| !real.lines.iter().any(back)).unwrap_or(until);
    if real.exit.is_none() {
        // A line near the end may come after ours end.
        real_after.retain(|(at, _)| *at < until - APART);
    }
    let same = real_after.iter().zip(&our_after).take_while(|(real, ours)| real.1 == ours.1).count();
    let near = |lines: &[(f64, String)]| lines.iter().skip(same.saturating_sub(3)).take(8).cloned().collect::<Vec<_>>();
    let what = || format!("after {same} lines: real {:#?}\nours {:#?}", near(&real_after), near(&our_after));
    ensure!(same == real_after.len(), "{}", what());
    let same_end = ours.exit == real.exit || real.exit == Some(UNSEEN) && ours.exit.is_some();
    ensure!(same_end, "exit code {:?} instead of {:?}", ours.exit, real.exit);
    for ((real, line), (ours, _)) in real_after.iter().zip(&our_after) {
        ensure!((ours - shift - real).abs() < APART, "{line:?} comes at {:.1} instead of {real:.1}", ours - shift);
    }
    for (at, ready, counters) in &ours.samples {
        let at = at - shift;
        let around: Vec<_> = real.samples.iter().filter(|(t, ..)| (at - t).abs() <= APART).collect();
        // A sample counts until the next one.
        let before = real.samples.iter().rev().find(|(t, ..)| t + APART < at);
        let around: Vec<_> = before.into_iter().chain(around).collect();
        let is_last = at + APART > until || real.samples.last().is_none_or(|(last, ..)| at + APART > *last);
        // No capture shows exactly when the program opens its port.
        if around.is_empty() || is_last || at < APART {
            continue;
        }
        ensure!(around.iter().any(|(_, real, _)| real == ready), "at {at:.1}: ready {ready:?}, of {:?}", states(real));
        for counter in COUNTERS {
            let values = around.iter().map(|(_, _, real)| real.get(counter).copied().unwrap_or(0.0));
            let (least, most) = values.fold((f64::MAX, 0.0_f64), |(least, most), one| (least.min(one), most.max(one)));
            let ours = counters.get(counter).copied().unwrap_or(0.0);
            ensure!(
                ready.is_none() || (least..=most).contains(&ours),
                "at {at:.1}: {counter} is {ours}, not {least} to {most}"
            );
        }
    }
    Ok(())
}

/// The changes of readiness, with their times.
fn states(seen: &Seen) -> Vec<(f64, Option<bool>)> {
    let mut states: Vec<(f64, Option<bool>)> = Vec::new();
    for (at, ready, _) in &seen.samples {
        if states.last().is_none_or(|(_, last)| last != ready) {
            states.push((*at, *ready));
        }
    }
    states
}

/// Runs the stand-in through the same events and compares the two.
async fn beside(version: &str, protocol: &str, done: &Done, speed: f64) -> Result<()> {
    let real = recorded(version, protocol, done.capture)?;
    let until = real.samples.last().map_or(0.0, |(at, ..)| *at).max(4.0);
    // Another configuration arrived after that.
    let until = if done.capture.starts_with("01-") { 14.0 } else { until };
    let until = if real.exit.is_some() { real.lines.last().map_or(0.0, |(at, _)| *at) + 60.0 } else { until };
    // Play on for 20 s, since ours may start late.
    let ours = played(version, protocol, done, until + 20.0, speed).await?;
    compare(&real, &ours, done, until)
}

#[tokio::test]
async fn what_is_done_to_it_looks_as_it_did_in_the_real_program() -> Result<()> {
    let places = Arc::new(tokio::sync::Semaphore::new(AT_ONCE));
    let mut cases = JoinSet::new();
    for version in VERSIONS {
        for protocol in PROTOCOLS {
            for done in &ALL {
                if !folder(version, protocol, done.capture).exists() {
                    continue;
                }
                // Over HTTP/2 an outage of 90 s that swallows packets goes unnoticed; the long capture shows what
                // follows.
                if done.capture.starts_with("08-") && protocol == "http2" {
                    continue;
                }
                let places = places.clone();
                cases.spawn(async move {
                    let _place = places.acquire_owned().await;
                    let result = beside(version, protocol, done, SPEEDS[0]).await;
                    (version, protocol, done, result)
                });
            }
        }
    }
    let all = cases.join_all().await;
    assert!(all.len() > 80, "only {} recordings", all.len());
    let count = all.len();
    let mut failed = Vec::new();
    for (version, protocol, done, first) in all {
        let Err(first) = first else { continue };
        testkit::note("tried again alone", &format!("{version}/{protocol}/{}: {first:#}", done.capture));
        if let Err(error) = beside(version, protocol, done, SPEEDS[1]).await {
            failed.push(format!("{version}/{protocol}/{}: {error:#}", done.capture));
        }
        // Three failures are enough: each takes its time.
        if failed.len() > 2 {
            break;
        }
    }
    assert!(failed.is_empty(), "{} of {count}: {}", failed.len(), failed.join("\n\n"));
    Ok(())
}

#[tokio::test]
async fn what_cannot_start_ends_with_the_real_programs_words() -> Result<()> {
    let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
    let taken = listener.local_addr()?.to_string();
    for version in VERSIONS {
        let said = |env: &[(&str, &str)]| {
            let mut all =
                vec![("STAND_IN_VERSION", version), ("STAND_IN_SPEED", "10"), ("TUNNEL_METRICS", "127.0.0.1:0")];
            all.extend(env);
            cloudflared(&["tunnel", "--no-autoupdate", "run"], &all)
        };
        let good = token("tunnel-1", "");
        for (capture, env) in [
            ("11a-token-malformed", &[("TUNNEL_TOKEN", "TOKEN")][..]),
            ("11c-token-empty", &[("TUNNEL_TOKEN", "")]),
            ("11d-token-not-set", &[]),
            ("15-metrics-port-taken", &[("TUNNEL_TOKEN", &good), ("TUNNEL_METRICS", &taken)]),
            ("20c-token-file-missing", &[("TUNNEL_TOKEN_FILE", "/run/tf/token")]),
        ] {
            let real = recorded(version, "auto", capture)?;
            let mut process = said(env);
            process.plant(&good);
            let code = process.wait_exit(SOON).await?.code();
            let known: BTreeSet<String> = real.lines.iter().map(|(_, line)| line.clone()).collect();
            let ours: Vec<_> = process.log().lines().map(shape).filter(|line| known.contains(line)).collect();
            let real_lines: Vec<_> = real.lines.into_iter().map(|(_, line)| line).collect();
            assert_eq!((ours, code), (real_lines, real.exit), "{version} {capture}: {}", process.log());
        }
    }
    Ok(())
}
