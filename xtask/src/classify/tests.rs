//! Compares the agent's verdicts with recordings of the real cloudflared in `tests/captures`.

use std::collections::BTreeMap;

use dockflare_agent::cause::Cause;
use serde::Deserialize;

use super::*;

/// Any verdict is accepted for this many seconds after the truth changes: cloudflared must first notice the change, and
/// report it.
const GRACE: f64 = 12.0;
/// The agent must name a visible cause within this many seconds.
const NAMED_WITHIN: f64 = 30.0;

/// What was wrong, and from when until when, in seconds since the recording began.
#[derive(Deserialize)]
struct Period {
    from: f64,
    to: Option<f64>,
    truth: Truth,
    connector: Option<String>,
}

#[derive(Deserialize, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
#[serde(rename_all = "kebab-case")]
enum Truth {
    None,
    Refused,
    EdgeError,
    Unreachable,
    Tls,
    Dns,
    Token,
    TokenFile,
    MetricsPort,
    Stopped,
    /// The edge is back and cloudflared waits before its next try.
    Recovering,
    /// Ended from outside or for lack of memory. What is visible depends on the moment.
    Any,
}

/// Why the agent may misjudge a recording. `docs/reliability.md` lists these reasons.
#[derive(PartialEq, Eq, Clone, Copy, Debug)]
enum Known {
    /// Over HTTP/2, `/ready` answers 200 for minutes while nothing gets through, and the log is silent.
    SwallowedOverHttp2,
    /// Nothing reveals an outage that ends before cloudflared's next try.
    TooShort,
}

fn known(path: &str, truth: Truth) -> Option<Known> {
    let is_of = |part: &str| path.contains(part);
    match truth {
        Truth::Unreachable | Truth::None if is_of("/http2/08") => Some(Known::SwallowedOverHttp2),
        Truth::Unreachable if is_of("/07b-") || is_of("2025.4.0/auto/10c-") => Some(Known::TooShort),
        _ => None,
    }
}

fn is_right(truth: Truth, verdict: Verdict, protocol: &str) -> bool {
    let over_quic = protocol != "http2";
    match (truth, verdict) {
        (Truth::Recovering | Truth::Any, _) => true,
        (Truth::None, verdict) => verdict == Verdict::Ready,
        (Truth::Stopped, verdict) => verdict == Verdict::Stopped,
        (truth, Verdict::Sick(cause)) => match (truth, cause) {
            (Truth::Refused | Truth::EdgeError, Cause::RegistrationRefused) => over_quic,
            (Truth::Unreachable, Cause::UdpBlocked) => protocol == "quic",
            (Truth::Refused, Cause::TokenRefused)
            | (Truth::EdgeError, Cause::EdgeError)
            | (Truth::Unreachable, Cause::EdgeUnreachable)
            | (Truth::Tls, Cause::EdgeUntrusted)
            | (Truth::Dns, Cause::NoDns)
            | (Truth::Token, Cause::TokenMalformed | Cause::TokenMissing)
            | (Truth::TokenFile, Cause::TokenFile)
            | (Truth::MetricsPort, Cause::MetricsPortTaken) => true,
            _ => false,
        },
        _ => false,
    }
}

fn folders(under: &Path, depth: usize) -> Vec<PathBuf> {
    let mut found = vec![under.to_owned()];
    for _ in 0..depth {
        let inner = found.iter().flat_map(|dir| fs::read_dir(dir).unwrap());
        found = inner.map(|entry| entry.unwrap().path()).filter(|path| path.is_dir()).collect();
    }
    found.sort();
    found
}

fn recordings() -> Vec<PathBuf> {
    folders(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/captures"), 3)
}

#[test]
fn no_second_of_any_recording_names_a_wrong_cause_and_each_cause_is_named_in_time() {
    let mut problems = Vec::new();
    let (mut count, mut seconds, mut excepted) = (0, 0, 0);
    // The slowest naming of each kind.
    let mut slowest: BTreeMap<(Truth, String), f64> = BTreeMap::new();
    for dir in recordings() {
        count += 1;
        let path = dir.display().to_string();
        let protocol = dir.parent().and_then(|dir| dir.file_name()).unwrap().to_str().unwrap().to_owned();
        let periods: Vec<Period> = serde_json::from_slice(&fs::read(dir.join("truth.json")).unwrap()).unwrap();
        for connector in read(&dir).unwrap() {
            let verdicts = connector.verdicts();
            seconds += verdicts.len();
            for period in periods.iter().filter(|period| period.connector.as_deref() == connector.name) {
                let to = period.to.unwrap_or(f64::MAX);
                let within = verdicts.iter().enumerate().map(|(second, verdict)| (second as f64, *verdict));
                let within: Vec<_> = within.filter(|(second, _)| (period.from..to).contains(second)).collect();
                let known = known(&path, period.truth);
                let first = within.iter().find(|(_, verdict)| is_right(period.truth, *verdict, &protocol));
                let lasted = within.last().map_or(0.0, |(second, _)| second - period.from);
                match first {
                    Some((second, _)) if second - period.from <= NAMED_WITHIN => {
                        let slowest = slowest.entry((period.truth, protocol.clone())).or_default();
                        *slowest = slowest.max(second - period.from);
                    }
                    _ if known.is_some() || lasted <= NAMED_WITHIN => {}
                    _ => problems.push(format!("{path}: {:?} from {} is not named in time", period.truth, period.from)),
                }
                for (second, verdict) in within {
                    if second - period.from <= GRACE || is_right(period.truth, verdict, &protocol) {
                        continue;
                    }
                    // An open verdict is no mistake unless it lasts.
                    let is_open = matches!(verdict, Verdict::Starting | Verdict::Unknown);
                    if is_open && second - period.from <= NAMED_WITHIN {
                        continue;
                    }
                    match known {
                        // Even in a known case, the agent must not name a wrong cause.
                        Some(_) if matches!(verdict, Verdict::Ready) || is_open => excepted += 1,
                        _ => problems.push(format!("{path} at {second}: {verdict:?} is said of {:?}", period.truth)),
                    }
                }
            }
        }
    }
    println!("{count} recordings, {seconds} seconds classified, {excepted} of them known exceptions");
    for ((truth, protocol), after) in slowest.iter().filter(|((truth, _), _)| *truth < Truth::Recovering) {
        println!("{truth:?} over {protocol}: right after {after:.0} s at most");
    }
    assert!(problems.is_empty(), "{} of {seconds}:\n{}", problems.len(), problems.join("\n"));
    assert!(count >= 240, "{count} recordings: where are the others?");
}

/// Such an agent saw nothing of what happened before, and reads only the last lines of the log.
#[test]
fn an_agent_that_begins_at_any_second_names_no_wrong_cause() {
    let mut problems = Vec::new();
    let (mut looks, mut open) = (0, 0);
    for dir in recordings() {
        let path = dir.display().to_string();
        let protocol = dir.parent().and_then(|dir| dir.file_name()).unwrap().to_str().unwrap().to_owned();
        let periods: Vec<Period> = serde_json::from_slice(&fs::read(dir.join("truth.json")).unwrap()).unwrap();
        for mut connector in read(&dir).unwrap() {
            let only_quic = connector.only_quic();
            let all = std::mem::take(&mut connector.log);
            for period in periods.iter().filter(|period| period.connector.as_deref() == connector.name) {
                let mut second = (period.from + GRACE).ceil();
                while second < period.to.unwrap_or(connector.length).min(connector.length) {
                    let now = connector.began + second;
                    let end = all.partition_point(|(at, _)| *at <= now);
                    connector.log = all[end.saturating_sub(100)..end].to_vec();
                    let sample = connector.samples.iter().rfind(|sample| sample.at <= second).unwrap();
                    let verdict = connector.classify(sample, second, only_quic, &mut Memory::default());
                    looks += 1;
                    let is_open = matches!(verdict, Verdict::Starting | Verdict::Unknown);
                    open += usize::from(is_open);
                    let is_known = known(&path, period.truth).is_some() && verdict == Verdict::Ready;
                    if !(is_open || is_known || is_right(period.truth, verdict, &protocol)) {
                        problems.push(format!("{path} at {second}: {verdict:?} is said of {:?}", period.truth));
                    }
                    second += 1.0;
                }
            }
        }
    }
    println!("{looks} first looks, {open} of them without a verdict");
    assert!(problems.is_empty(), "{} of {looks}:\n{}", problems.len(), problems.join("\n"));
}

#[test]
fn a_refused_token_is_named_within_a_second_of_the_words() {
    let mut seen = 0;
    for dir in recordings() {
        for connector in read(&dir).unwrap() {
            let words = connector.log.iter().find(|(_, line)| line.said == Said::Unauthorized);
            let Some(words) = words.map(|(at, _)| at - connector.began) else { continue };
            let refused = Verdict::Sick(Cause::TokenRefused);
            let named = connector.verdicts().into_iter().position(|verdict| verdict == refused);
            let named = named.map(|second| second as f64).unwrap_or(f64::INFINITY);
            assert!(named - words <= 1.0, "{}: {named} is {} s after the words", dir.display(), named - words);
            seen += 1;
        }
    }
    assert!(seen >= 20, "{seen} recordings with the words");
}

/// The output for a folder that contains only these files.
fn said(samples: &str, log: Option<&str>) -> Vec<String> {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("samples.jsonl"), samples).unwrap();
    if let Some(log) = log {
        fs::write(dir.path().join("log.txt"), log).unwrap();
    }
    let connectors = read(dir.path()).unwrap();
    let words = connectors.iter().flat_map(Connector::verdicts).map(Verdict::as_str);
    words.map(str::to_owned).collect()
}

#[test]
fn gaps_missing_fields_an_empty_log_and_no_metrics_are_read() {
    let started = r#""state":"running","started_at":"2026-01-31T10:00:00Z""#;
    let samples = format!(
        "{{\"t\":0.2,{started},\"ready_status\":null,\"metrics\":null}}\n{{\"t\":2.1,\"ready_status\":200}}\n{{\"t\":5.9}}\n"
    );
    assert_eq!(said(&samples, Some("")), ["starting", "starting", "starting", "ready", "ready", "ready"]);
    assert_eq!(said("{\"t\":1}\n", None), ["starting", "unknown"]);
    assert_eq!(said("", Some("")), ["starting"]);
    assert_eq!(said("{\"t\":0.5,\"ready_status\":503}\n{\"t\":2}", None), ["starting", "starting", "starting"]);
}

#[test]
fn a_second_connector_has_a_log_of_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let samples = "{\"t\":0.2,\"state\":\"running\",\"started_at\":\"2026-01-31T10:00:00Z\",\"ready_status\":200}\n\
        {\"t\":2.2,\"box\":\"-b\",\"state\":\"running\",\"started_at\":\"2026-01-31T10:00:02Z\",\"ready_status\":503}\n\
        {\"t\":4}\n";
    fs::write(dir.path().join("samples.jsonl"), samples).unwrap();
    let refusal = "2026-01-31T10:00:03.5Z 2026-01-31T10:00:03Z ERR Register tunnel error from server side \
        error=\"Unauthorized: Tunnel not found\" connIndex=0\n";
    fs::write(dir.path().join("log-b.txt"), refusal).unwrap();
    let connectors = read(dir.path()).unwrap();
    let verdicts: Vec<_> = connectors.iter().map(|connector| (connector.name, connector.verdicts())).collect();
    let (refused, ready) = (Verdict::Sick(Cause::TokenRefused), Verdict::Ready);
    assert_eq!(verdicts[0], (None, vec![Verdict::Starting, ready, ready, ready, ready]));
    let b = [Verdict::Unknown, Verdict::Unknown, Verdict::Unknown, Verdict::Starting, refused];
    assert_eq!(verdicts[1], (Some("b"), b.to_vec()));
}
