//! The way to the master, step by step: DNS, TCP, TLS, and one request without side effects that shows the rest.

use std::net::SocketAddr;
use std::time::{Duration, SystemTime};

use dockflare_host::container;
use jiff::Timestamp;
use reqwest::Url;
use tokio::net::{TcpStream, lookup_host};
use tokio::time::timeout;

use super::{MASTER, Section};
use crate::config::Config;
use crate::http;
use crate::master::{Master, MasterError, Probed, certificate_shown, is_loopback};
use crate::metrics::Metrics;
use crate::state::{AgentId, Folder};

/// Limit for DNS, one connection and one handshake: well above what a bad line needs.
const STEP_LIMIT: Duration = Duration::from_secs(5);
/// Limit for an answer. A busy master takes its time; the agent itself waits longer.
const ANSWER_LIMIT: Duration = Duration::from_secs(20);
/// Maximum number of a name's addresses to try.
const MOST_ADDRESSES: usize = 4;
/// Warn below this. Certificates are usually renewed a month before they expire, so by then something is wrong.
const FEW_DAYS: i64 = 14;
/// A minute breaks nothing, but the times that the master shows are off by it.
const CLOCK_WARN: Duration = Duration::from_secs(60);
/// New certificates are valid from an hour before they are issued. A clock further behind makes the agent refuse them.
const CLOCK_FAIL: Duration = Duration::from_secs(3600);

/// Id and title of the tests after DNS, TCP and TLS.
const REST: [(&str, &str); 4] = [
    ("master.answer", "answer"),
    ("master.clock", "clock"),
    ("master.access", "Cloudflare Access"),
    ("master.key", "key accepted"),
];

pub(super) async fn look(config: &Config, folder: &Folder, to: &mut Section) {
    to.begin(MASTER);
    let url = &config.master.url;
    let proxy = http::proxy_to(url);
    let (host, port) = match &proxy {
        Some((host, port)) => (host.clone(), *port),
        None => {
            let host = url.host_str().unwrap_or_default().trim_matches(['[', ']']);
            (host.to_owned(), url.port_or_known_default().unwrap_or(443))
        }
    };
    if let Err(because) = way(url, &host, port, proxy.is_some(), to).await {
        for (id, title) in REST {
            to.skip(id, title, because);
        }
        return;
    }
    let master = match Master::new(config.master.clone(), Metrics::default()) {
        Ok(master) => master,
        Err(error) => return answer_fails(&error, to),
    };
    // Any id will do, but the agent's own is the one to look for in the master's log.
    let id = folder.agent_id.as_ref().ok().and_then(|id| id.clone());
    let Some(id) = id.or_else(|| AgentId::try_from("check".to_owned()).ok()) else { return };
    let probed = timeout(ANSWER_LIMIT, master.probe(&id)).await.unwrap_or_else(|_| {
        let problem = format!("does not answer within {} s", ANSWER_LIMIT.as_secs());
        Probed { answer: Err(MasterError::Away { problem, retry_after: None }), clocks: None }
    });
    judge(&probed, config.master.access.is_some(), to);
}

/// Adds what the running agent complains of: problems that only show over time, such as another agent with its key, or
/// a refusal by the master. Asks the agent's health page, which has no side effects.
pub(super) async fn running(config: &Config, to: &mut Section) {
    let Some(page) = config.health_page else { return };
    // No agent runs, or not in this container: nothing to add.
    let Ok(health) = crate::page::ask(page, "/health").await else { return };
    to.begin(MASTER);
    for concern in health["concerns"].as_array().into_iter().flatten() {
        let text = |name: &str| concern[name].as_str().unwrap_or_default();
        let title = if text("about").is_empty() { "the running agent" } else { text("about") };
        to.warn(&format!("agent.{}", text("id")), title, text("problem"), text("remedy"));
    }
}

/// Tests DNS, TCP and TLS. The error is the reason to skip what depends on them.
async fn way(url: &Url, host: &str, port: u16, proxied: bool, to: &mut Section) -> Result<(), &'static str> {
    let through = if proxied { " (the HTTP proxy of this environment)" } else { "" };
    let (id, title) = ("master.dns", "DNS");
    let addresses = match timeout(STEP_LIMIT, lookup_host((host, port))).await {
        Ok(Ok(found)) => found.take(MOST_ADDRESSES).collect::<Vec<_>>(),
        Ok(Err(error)) => return dns_fails(host, &error.to_string(), to),
        Err(_) => return dns_fails(host, &format!("no answer within {} s", STEP_LIMIT.as_secs()), to),
    };
    if host.parse::<std::net::IpAddr>().is_ok() {
        to.skip(id, title, format!("{host}{through} is an address already"));
    } else {
        let list: Vec<_> = addresses.iter().map(|address| address.ip().to_string()).collect();
        to.pass(id, title, format!("{host}{through} is {}", list.join(", ")));
    }
    let stream = match connect(&addresses).await {
        Ok(stream) => stream,
        Err(problem) => {
            let remedy = if is_loopback(url) && container::has_own_network() {
                "localhost is the agent's own container: name the master's container on a shared network, or the host (host.docker.internal with extra_hosts host.docker.internal:host-gateway)".to_owned()
            } else {
                format!("let the agent out to {host}:{port}, and see that something listens there")
            };
            to.fail("master.tcp", "TCP", format!("{host}:{port} cannot be connected to: {problem}"), remedy);
            to.skip("master.tls", "TLS", "there is no connection");
            return Err("there is no connection");
        }
    };
    to.pass("master.tcp", "TCP", format!("{host}:{port} takes connections"));
    let (id, title) = ("master.tls", "TLS");
    if url.scheme() == "http" {
        to.skip(id, title, "the address begins with http://, so nothing is encrypted");
    } else if proxied {
        to.skip(id, title, "a proxy is on the way; the answer below shows whether the certificate is accepted");
    } else {
        return tls(stream, host, to).await;
    }
    Ok(())
}

fn dns_fails(host: &str, problem: &str, to: &mut Section) -> Result<(), &'static str> {
    let remedy = "check the host in DOCKFLARE_MASTER_URL, and the DNS servers of the agent's container";
    to.fail("master.dns", "DNS", format!("{host} cannot be looked up: {problem}"), remedy);
    for (id, title) in [("master.tcp", "TCP"), ("master.tls", "TLS")] {
        to.skip(id, title, "the name cannot be looked up");
    }
    Err("the name cannot be looked up")
}

async fn connect(addresses: &[SocketAddr]) -> Result<TcpStream, String> {
    let mut last = "it has no address".to_owned();
    for address in addresses {
        match timeout(STEP_LIMIT, TcpStream::connect(address)).await {
            Ok(Ok(stream)) => return Ok(stream),
            Ok(Err(error)) => last = error.to_string(),
            Err(_) => last = format!("no answer within {} s", STEP_LIMIT.as_secs()),
        }
    }
    Err(last)
}

async fn tls(stream: TcpStream, host: &str, to: &mut Section) -> Result<(), &'static str> {
    let (id, title) = ("master.tls", "TLS");
    let shown = timeout(STEP_LIMIT, certificate_shown(stream, host)).await;
    let shown = match shown.unwrap_or_else(|_| Err("no answer in time".to_owned())) {
        Ok(shown) => shown,
        Err(problem) => {
            let remedy = "check that the port is one for https, and the CA certificates in /etc/ssl/certs of the image";
            to.fail(id, title, format!("no encrypted connection: {problem}"), remedy);
            return Err("there is no encrypted connection");
        }
    };
    let days = shown.not_after.map(|end| days_left(end, Timestamp::now()));
    let facts = match days {
        Some(days) if days >= 0 => format!("issued by {}, {days} days left", shown.issuer),
        Some(days) => format!("issued by {}, over since {} days", shown.issuer, -days),
        None => format!("issued by {}", shown.issuer),
    };
    if let Some(distrust) = shown.distrust {
        to.fail(id, title, format!("the master {distrust}; {facts}"), distrust.advice());
        return Err("the certificate is not accepted");
    }
    if days.is_some_and(|days| days < FEW_DAYS) {
        to.warn(id, title, facts, "renew the certificate at the master or the proxy before it");
    } else {
        to.pass(id, title, facts);
    }
    Ok(())
}

/// Whole days, negative once it has expired.
fn days_left(end: Timestamp, now: Timestamp) -> i64 {
    end.duration_since(now).as_secs().div_euclid(86_400)
}

/// Reports what the answer shows.
fn judge(probed: &Probed, with_access: bool, to: &mut Section) {
    let error = match &probed.answer {
        Ok(protocol) => {
            answered(&format!("a DockFlare master, protocol {protocol}"), probed, with_access, to);
            return to.pass("master.key", "key accepted", "yes");
        }
        Err(error) => error,
    };
    let said = match error {
        MasterError::Refused { code, message, .. } => Some((code, message)),
        _ => None,
    };
    match (error, said) {
        // Only a master gives a reason. A refusal without one may come from anything in front of the master.
        (_, Some((code, message))) if !code.is_empty() || !message.is_empty() => {
            let protocol = if code.is_empty() { 1 } else { 2 };
            answered(&format!("a DockFlare master, protocol {protocol}"), probed, with_access, to);
            to.fail("master.key", "key accepted", format!("the master {error}"), error.advice());
        }
        (_, Some(_)) => {
            let remedy =
                "something before the master wants a login: let the agent's routes, /api/v2/agents, through it";
            to.fail("master.answer", "answer", format!("{error}, and does not say why"), remedy);
            not_asked(probed, "no master answered", to);
            to.skip("master.key", "key accepted", "no master answered");
        }
        (MasterError::Access { .. }, _) => {
            to.skip("master.answer", "answer", "Cloudflare Access answered instead of the master");
            clock(probed, to);
            let remedy = if with_access {
                "let the Access policy admit this service token (action Service Auth), and check CF_ACCESS_CLIENT_ID and CF_ACCESS_CLIENT_SECRET"
            } else {
                error.advice()
            };
            to.fail("master.access", "Cloudflare Access", format!("the master {error}"), remedy);
            to.skip("master.key", "key accepted", "Cloudflare Access answered instead of the master");
        }
        _ => answer_fails(error, to),
    }
}

fn answered(detail: &str, probed: &Probed, with_access: bool, to: &mut Section) {
    to.pass("master.answer", "answer", detail);
    clock(probed, to);
    let (id, title) = ("master.access", "Cloudflare Access");
    if with_access {
        to.pass(id, title, "the master answers with the service token");
    } else {
        to.skip(id, title, "not set, and not needed");
    }
}

fn not_asked(probed: &Probed, because: &str, to: &mut Section) {
    clock(probed, to);
    to.skip("master.access", "Cloudflare Access", because);
}

fn answer_fails(error: &MasterError, to: &mut Section) {
    to.fail("master.answer", "answer", format!("the master {error}"), error.advice());
    for (id, title) in &REST[1..] {
        to.skip(id, title, "no master answered");
    }
}

fn clock(probed: &Probed, to: &mut Section) {
    let (id, title) = ("master.clock", "clock");
    let Some((theirs, ours)) = probed.clocks else {
        return to.skip(id, title, "the answer has no Date");
    };
    let (apart, which) = difference(theirs, ours);
    let detail = format!("{} s {which} the master's", apart.as_secs());
    let remedy = "set the clock of this host or of the master's, and keep it set: timedatectl set-ntp true";
    if apart > CLOCK_FAIL {
        to.fail(id, title, detail, remedy);
    } else if apart > CLOCK_WARN {
        to.warn(id, title, detail, remedy);
    } else if apart.as_secs() < 2 {
        // `Date` has whole seconds only.
        to.pass(id, title, "the same as the master's");
    } else {
        to.pass(id, title, detail);
    }
}

fn difference(theirs: SystemTime, ours: SystemTime) -> (Duration, &'static str) {
    match ours.duration_since(theirs) {
        Ok(ahead) => (ahead, "ahead of"),
        Err(behind) => (behind.duration(), "behind"),
    }
}

#[cfg(test)]
mod tests {
    use reqwest::StatusCode;

    use super::super::{Finding, Outcome};
    use super::*;

    fn judged(answer: Result<u32, MasterError>, off: i64, with_access: bool) -> Vec<Finding> {
        let ours = SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000);
        let theirs = if off < 0 {
            ours + Duration::from_secs(off.unsigned_abs())
        } else {
            ours - Duration::from_secs(off as u64)
        };
        let mut to = Section::default();
        to.begin(MASTER);
        judge(&Probed { answer, clocks: Some((theirs, ours)) }, with_access, &mut to);
        to.findings
    }

    fn outcomes(findings: &[Finding]) -> Vec<(&str, Outcome)> {
        findings.iter().map(|finding| (finding.id.as_str(), finding.outcome)).collect()
    }

    fn refused(code: &str, message: &str) -> MasterError {
        MasterError::Refused { status: StatusCode::UNAUTHORIZED, code: code.into(), message: message.into() }
    }

    #[test]
    fn each_answer_has_one_finding_that_fails_and_always_the_same_four() {
        use Outcome::{Fail, Pass, Skip};
        let away = || MasterError::Away { problem: "answered 502".into(), retry_after: None };
        let access = || MasterError::Access { status: StatusCode::FOUND };
        let status =
            || MasterError::Status { status: StatusCode::NOT_FOUND, code: String::new(), message: String::new() };
        for (answer, with_access, expected) in [
            (Ok(2), false, [Pass, Pass, Skip, Pass]),
            (Ok(1), true, [Pass, Pass, Pass, Pass]),
            (Err(refused("unauthorized", "")), false, [Pass, Pass, Skip, Fail]),
            (Err(refused("", "Unauthorized")), false, [Pass, Pass, Skip, Fail]),
            (Err(refused("", "")), false, [Fail, Pass, Skip, Skip]),
            (Err(access()), true, [Skip, Pass, Fail, Skip]),
            (Err(away()), false, [Fail, Skip, Skip, Skip]),
            (Err(status()), false, [Fail, Skip, Skip, Skip]),
        ] {
            let text = format!("{answer:?}");
            let findings = judged(answer, 0, with_access);
            let ids = REST.map(|(id, _)| id);
            let expected: Vec<_> = ids.into_iter().zip(expected).collect();
            assert_eq!(outcomes(&findings), expected, "{text}");
            let failed = findings.iter().filter(|finding| finding.outcome == Fail);
            assert!(failed.clone().count() <= 1 && failed.clone().all(|finding| finding.remedy.is_some()), "{text}");
            assert!(failed.clone().all(|f| !f.remedy.as_deref().unwrap_or_default().contains("trying again")));
        }
    }

    #[test]
    fn a_clock_that_is_off_warns_after_a_minute_and_fails_after_an_hour() {
        for (off, expected, words) in [
            (0, Outcome::Pass, "the same"),
            (60, Outcome::Pass, "60 s ahead of"),
            (61, Outcome::Warn, "61 s ahead of"),
            (-300, Outcome::Warn, "300 s behind"),
            (-3601, Outcome::Fail, "3601 s behind"),
        ] {
            let findings = judged(Ok(2), off, false);
            let clock = &findings[1];
            assert!(clock.outcome == expected && clock.detail.contains(words), "{off}: {clock:?}");
        }
    }

    #[test]
    fn days_are_whole_and_count_down_to_nothing() {
        let now: Timestamp = "2026-01-31T12:00:00Z".parse().unwrap();
        for (end, days) in [("2026-02-14T12:00:00Z", 14), ("2026-02-14T11:59:59Z", 13), ("2026-01-31T11:00:00Z", -1)] {
            assert_eq!(days_left(end.parse().unwrap(), now), days, "{end}");
        }
    }
}
