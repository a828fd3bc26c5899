//! Tells from what is seen of a connector what is wrong with it. Pure: no clock, no I/O.
//!
//! The rules come from recordings of the real cloudflared: three versions and three protocols in each kind of failure.
//! The tests of `xtask/src/classify.rs` hold the rules to these recordings second by second. The supervisor and `cargo
//! xtask classify` feed the same rules by different means.
//!
//! Three rules come first. Only `/ready` tells that a connector is ready. The newest log lines count: each try of a
//! connection ends with words of its own, and one registered connection ends every cause. A line that only reports a
//! lost connection names no cause, because a planned drain looks the same.

use jiff::Timestamp;

use super::log::{Line, Said};
use crate::cause::Cause;
use crate::docker::RunState;

/// A connector that is not ready this many seconds after its start has a problem, even if nothing else shows one.
pub(super) const START_LIMIT: f64 = 30.0;
/// Lines from this many seconds before the last look that found it ready may belong to what came after.
const OVERLAP: f64 = 3.0;
/// After this many seconds without a line in the log, the edge is unreachable: the metrics count every other failure.
const WORDLESS_LIMIT: f64 = 40.0;
/// One registration also fails when the connection is lost in the middle of it; this many do not.
const SEVERAL: u64 = 3;
/// cloudflared waits 5 s for the edge to answer a registration. A refusal takes milliseconds.
const UNANSWERED: f64 = 4.9;

/// How a connector's `/ready` page answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Page {
    /// `/ready` returns 200.
    Ready,
    /// `/ready` returns 503.
    NotReady,
    /// No answer.
    Silent,
}

/// How often a connector has tried to register since its start, from `/metrics`.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Tries {
    /// Tries that failed: the edge refused them or did not answer. A try that did not reach the edge is not counted.
    pub failed: u64,
    /// Tries that succeeded.
    pub registered: u64,
    /// Seconds that all tries took together.
    pub seconds: f64,
}

impl Tries {
    /// Reads the counts from the series of a metrics page: names with their labels, and values.
    pub fn of<'a>(series: impl Iterator<Item = (&'a str, f64)>) -> Self {
        let mut tries = Self::default();
        for (name, value) in series.filter(|(_, value)| value.is_finite()) {
            let (name, labels) = name.split_once('{').unwrap_or((name, ""));
            let is_registration = labels.contains("method=\"register_connection\"");
            match name {
                "cloudflared_rpc_client_failures" if is_registration => tries.failed += value.max(0.0) as u64,
                "cloudflared_rpc_client_latency_secs_sum" if is_registration => tries.seconds += value,
                "cloudflared_tunnel_tunnel_register_success" => tries.registered += value.max(0.0) as u64,
                _ => {}
            }
        }
        tries
    }
}

/// A connector at one moment. Times are in seconds since 1970.
#[derive(Debug, Clone, Copy)]
pub struct Seen<'a> {
    /// The moment of the look.
    pub now: f64,
    /// The state of its container.
    pub state: RunState,
    /// Its exit code, if known.
    pub exit_code: Option<i64>,
    /// Whether the kernel killed it for lack of memory. Docker keeps this flag through the next start.
    pub out_of_memory: bool,
    /// When it was last started.
    pub started_at: f64,
    /// How its `/ready` page answers.
    pub page: Page,
    /// Its registrations, if its metrics can be read.
    pub tries: Option<Tries>,
    /// Lines since its last start, oldest first. If there are many, the last ones are enough.
    pub log: &'a [Line],
    /// Whether it may use only QUIC.
    pub only_quic: bool,
}

/// What is wrong with a connector.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Verdict {
    /// Too early for it to be ready.
    #[default]
    Starting,
    /// It can carry traffic.
    Ready,
    /// It cannot carry traffic, for a reason that does not show yet.
    Unknown,
    /// It was told to stop.
    Stopped,
    /// It cannot carry traffic, for this cause.
    Sick(Cause),
}

impl Verdict {
    /// One word: the cause's reason, if there is one.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Ready => "ready",
            Self::Unknown => "unknown",
            Self::Stopped => "stopped",
            Self::Sick(cause) => cause.reason(),
        }
    }
}

/// What earlier looks at the same container leave for later ones.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Memory {
    /// When this start began.
    started_at: f64,
    /// When it was last seen ready in this start.
    ready_at: Option<f64>,
    /// The registrations at that time. Zero for a connector that was never connected in this start.
    base: Option<Tries>,
    /// The cause that ended the start before, until this start is ready.
    ended_of: Option<Cause>,
}

impl Memory {
    /// Adds a look and returns the verdict on it.
    pub fn classify(&mut self, seen: &Seen<'_>) -> Verdict {
        if self.started_at != seen.started_at {
            *self = Self { started_at: seen.started_at, ..self.next_start() };
        }
        if let Some(tries) = seen.tries {
            if seen.page == Page::Ready {
                self.base = Some(tries);
            } else if self.base.is_none() && tries.registered == 0 {
                // Whatever it has tried, it never had a connection.
                self.base = Some(Tries::default());
            }
        }
        let verdict = classify(seen, self);
        match verdict {
            Verdict::Ready => (self.ready_at, self.ended_of) = (Some(seen.now), None),
            Verdict::Sick(cause) if has_ended(seen.state) => self.ended_of = Some(cause),
            _ => {}
        }
        verdict
    }

    /// The memory for another start of the same container.
    pub(super) fn next_start(&self) -> Self {
        Self { ended_of: self.ended_of, ..Self::default() }
    }
}

fn has_ended(state: RunState) -> bool {
    matches!(state, RunState::Restarting | RunState::Exited | RunState::Dead)
}

/// The rules, from the surest sign down.
pub fn classify(seen: &Seen<'_>, memory: &Memory) -> Verdict {
    let age = seen.now - seen.started_at;
    match seen.state {
        RunState::Created => return Verdict::Starting,
        RunState::Paused => return Verdict::Unknown,
        RunState::Restarting | RunState::Exited | RunState::Dead => return death(seen, memory),
        RunState::Running => {}
    }
    if seen.log.iter().any(|line| line.said == Said::ShuttingDown) {
        return Verdict::Stopped;
    }
    if seen.page == Page::Ready {
        return Verdict::Ready;
    }
    if let Some(cause) = last_words(seen.log) {
        // It has ended since the look at its container.
        return Verdict::Sick(cause);
    }
    if let Some(cause) = sign(seen, memory) {
        return Verdict::Sick(cause);
    }
    let is_new = memory.ready_at.is_none() && age < START_LIMIT;
    match memory.ended_of {
        Some(cause) if is_new => Verdict::Sick(cause),
        // cloudflared writes some ten lines when it starts. A log without any cannot be read, or is turned off.
        _ if seen.page == Page::NotReady && seen.log.is_empty() => wordless(seen, memory),
        _ if is_new => Verdict::Starting,
        _ => Verdict::Unknown,
    }
}

fn has_connected(seen: &Seen<'_>) -> bool {
    seen.log.iter().any(|line| line.said == Said::Registered)
}

/// Without a log, only the counters are left.
fn wordless(seen: &Seen<'_>, memory: &Memory) -> Verdict {
    let since = memory.ready_at.unwrap_or(seen.started_at);
    match failures(seen, memory) {
        Some((failed, _)) if failed > 0 => Verdict::Sick(Cause::RegistrationRefused),
        _ if seen.now - since >= WORDLESS_LIMIT => Verdict::Sick(Cause::EdgeUnreachable),
        _ if memory.ready_at.is_none() && seen.now - since < START_LIMIT => Verdict::Starting,
        _ => Verdict::Unknown,
    }
}

/// Registrations that failed since it was last ready, and the seconds that all tries took since then.
fn failures(seen: &Seen<'_>, memory: &Memory) -> Option<(u64, f64)> {
    let (now, base) = (seen.tries?, memory.base?);
    Some((now.failed.saturating_sub(base.failed), now.seconds - base.seconds))
}

/// Why a connector ended.
fn death(seen: &Seen<'_>, memory: &Memory) -> Verdict {
    // A SIGKILL from outside leaves the same code, and no log line either.
    let killed = seen.exit_code.is_none_or(|code| code == 137);
    let has_said = |said: Said| seen.log.iter().any(|line| line.said == said);
    let cause = match last_words(seen.log) {
        Some(cause) => cause,
        _ if seen.out_of_memory && killed => Cause::OutOfMemory,
        _ if has_said(Said::ShuttingDown) => return Verdict::Stopped,
        _ if seen.exit_code == Some(137) => Cause::CrashLoop,
        _ => sign(seen, memory).unwrap_or(Cause::CrashLoop),
    };
    Verdict::Sick(cause)
}

/// The fatal error that it logged as it ended.
fn last_words(log: &[Line]) -> Option<Cause> {
    log.iter().rev().find_map(|line| match line.said {
        Said::TokenMalformed => Some(Cause::TokenMalformed),
        Said::TokenMissing => Some(Cause::TokenMissing),
        Said::TokenFile => Some(Cause::TokenFile),
        Said::MetricsPortTaken => Some(Cause::MetricsPortTaken),
        _ => None,
    })
}

/// The newest sign in the log that belongs to the present fault.
fn sign(seen: &Seen<'_>, memory: &Memory) -> Option<Cause> {
    let since = memory.ready_at.map(|at| at - OVERLAP);
    let is_old = |line: &Line| since.is_some_and(|since| line.at.is_some_and(|at| at < since));
    let lines = seen.log.iter().enumerate().rev().take_while(|(_, line)| !is_old(line));
    for (index, line) in lines {
        match line.said {
            Said::Registered => return None,
            Said::Untrusted(_) => return Some(Cause::EdgeUntrusted),
            Said::Unauthorized => return Some(Cause::TokenRefused),
            Said::RegisterError => return Some(Cause::EdgeError),
            // Logged when a registration fails over QUIC, and sometimes when a connection is lost.
            Said::ControlStream => match refusal(seen, memory, index) {
                Some(cause) => return Some(cause),
                None => continue,
            },
            Said::DialFailed { quic, .. } => return Some(unreachable(seen, quic)),
            Said::LookupFailed => return Some(Cause::NoDns),
            _ => {}
        }
    }
    // The wording of this version is unknown. Over HTTP/2 every version says why.
    let over_http2 = seen.log.iter().rev().find_map(|line| line.protocol) == Some("http2");
    match failures(seen, memory) {
        Some((failed, _)) if failed >= SEVERAL && !over_http2 => Some(Cause::RegistrationRefused),
        _ => None,
    }
}

/// The cause of a failed control stream, the line with this index.
fn refusal(seen: &Seen<'_>, memory: &Memory, index: usize) -> Option<Cause> {
    if has_ended(seen.state) {
        // Versions up to 2025.8 end when their first registration fails, and lose the counters.
        let gave_up = seen.log[index..].iter().any(|line| line.said == Said::GaveUp);
        return (gave_up && !has_connected(seen)).then_some(Cause::RegistrationRefused);
    }
    match failures(seen, memory) {
        Some((0, _)) => None,
        Some((failed, seconds)) if seconds / failed as f64 >= UNANSWERED => Some(Cause::EdgeError),
        Some(_) => Some(Cause::RegistrationRefused),
        // It was connected before the first look. A connection is lost only once; a second failure was a registration.
        None => {
            let line = &seen.log[index];
            let before = seen.log[..index].iter().rev().take_while(|line| line.said != Said::Registered);
            let again = before.filter(|earlier| earlier.said == line.said && earlier.connection == line.connection);
            let has_failed = seen.tries.is_some_and(|tries| tries.failed > 0);
            (has_failed && again.count() > 0).then_some(Cause::RegistrationRefused)
        }
    }
}

/// The edge was not reached. cloudflared may have found out at its start whether only UDP is blocked.
fn unreachable(seen: &Seen<'_>, quic: bool) -> Cause {
    let checks = |udp: bool, passed: bool| seen.log.iter().any(|line| line.said == Said::Precheck { udp, passed });
    let tcp_failed = checks(false, false);
    let only_udp_failed = checks(true, false) && checks(false, true) && !checks(true, true) && !tcp_failed;
    if quic && (only_udp_failed || seen.only_quic && !tcp_failed) { Cause::UdpBlocked } else { Cause::EdgeUnreachable }
}

/// How many dials, of four connections, must agree. Where one kind of address has no route, as IPv6 on many hosts, dials
/// to the other kind end differently.
const LAST_DIALS: usize = 4;

/// Whether the host itself has no route to the edge: the newest dials since the last connection all failed for that.
/// Another connector would get no further.
pub(super) fn cannot_route(log: &[Line]) -> bool {
    let dials = log.iter().rev().take_while(|line| line.said != Said::Registered).filter_map(|line| match line.said {
        Said::DialFailed { no_route, .. } => Some(no_route),
        // An answered dial was routed.
        Said::Unauthorized | Said::RegisterError | Said::Untrusted(_) => Some(false),
        _ => None,
    });
    let last: Vec<_> = dials.take(LAST_DIALS).collect();
    !last.is_empty() && last.iter().all(|no_route| *no_route)
}

/// What the log adds to a cause.
pub fn detail(cause: Cause, log: &[Line]) -> Option<&'static str> {
    let newest = log.iter().rev().find_map(|line| match line.said {
        Said::Untrusted(why) => Some(why),
        _ => None,
    });
    newest.filter(|_| cause == Cause::EdgeUntrusted)
}

/// Converts a time as Docker writes it to seconds since 1970.
pub fn seconds(time: &str) -> Option<f64> {
    let time: Timestamp = time.parse().ok()?;
    // Docker writes a time in the year 1 for what has not happened.
    (time.as_second() > 0).then(|| time.as_millisecond() as f64 / 1000.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: f64 = 1_769_853_600.0;

    fn lines(texts: &[&str]) -> Vec<Line> {
        texts.iter().map(|text| Line::parse(text)).collect()
    }

    fn seen(log: &[Line]) -> Seen<'_> {
        Seen {
            now: START + 100.0,
            state: RunState::Running,
            exit_code: Some(0),
            out_of_memory: false,
            started_at: START,
            page: Page::NotReady,
            tries: None,
            log,
            only_quic: false,
        }
    }

    fn sick(cause: Cause) -> Verdict {
        Verdict::Sick(cause)
    }

    const CONTROL: &str = r#"2026-01-31T10:01:30Z ERR Serve tunnel error error="control stream encountered a failure while serving" connIndex=0"#;
    const DIAL: &str = r#"2026-01-31T10:01:30Z ERR Failed to dial a quic connection error="failed to dial to edge with quic: timeout: no recent network activity" connIndex=0"#;
    const UDP_FAILS: &str = r#"2026-01-31T10:00:10Z INF precheck component="UDP Connectivity" status=fail target=a"#;
    const TCP_FAILS: &str = r#"2026-01-31T10:00:10Z INF precheck component="TCP Connectivity" status=fail target=a"#;
    const TCP_PASSES: &str = r#"2026-01-31T10:00:10Z INF precheck component="TCP Connectivity" status=pass target=a"#;

    #[test]
    fn over_quic_only_the_counters_tell_a_refusal_from_a_lost_connection() {
        let log = lines(&[CONTROL]);
        let with = |tries| Seen { tries: Some(tries), ..seen(&log) };
        let mut memory = Memory::default();
        let ready =
            Seen { page: Page::Ready, now: START + 80.0, ..with(Tries { failed: 2, registered: 4, seconds: 0.1 }) };
        assert_eq!(memory.classify(&ready), Verdict::Ready);
        let lost = with(Tries { failed: 2, registered: 4, seconds: 0.1 });
        assert_eq!(memory.classify(&lost), Verdict::Unknown);
        let refused = with(Tries { failed: 3, registered: 4, seconds: 0.11 });
        assert_eq!(memory.classify(&refused), sick(Cause::RegistrationRefused));
        let unanswered = with(Tries { failed: 3, registered: 4, seconds: 5.11 });
        assert_eq!(memory.classify(&unanswered), sick(Cause::EdgeError));
    }

    #[test]
    fn an_agent_that_comes_to_one_that_has_been_refused_for_hours_knows_it() {
        let log = lines(&[CONTROL]);
        let never = Tries { failed: 9, registered: 0, seconds: 0.1 };
        let never_ready = Seen { tries: Some(never), now: START + 9000.0, ..seen(&log) };
        assert_eq!(Memory::default().classify(&never_ready), sick(Cause::RegistrationRefused));
        // It was connected at some time. One such line may be the loss; a second one on the same connection is not.
        let was_ready = Seen { tries: Some(Tries { registered: 4, ..never }), ..never_ready };
        assert_eq!(Memory::default().classify(&was_ready), Verdict::Unknown);
        let twice = lines(&[CONTROL, CONTROL]);
        assert_eq!(Memory::default().classify(&Seen { log: &twice, ..was_ready }), sick(Cause::RegistrationRefused));
    }

    #[test]
    fn falling_back_after_refusals_is_no_sign_of_blocked_udp() {
        let fallback = "2026-01-31T10:01:31Z INF Switching to fallback protocol http2 connIndex=0";
        let log = lines(&[CONTROL, fallback]);
        let tries = Some(Tries { failed: 5, registered: 0, seconds: 0.1 });
        assert_eq!(Memory::default().classify(&Seen { tries, ..seen(&log) }), sick(Cause::RegistrationRefused));
    }

    #[test]
    fn udp_is_blocked_where_nothing_else_may_be_used_or_tcp_gets_through() {
        let told = |texts: &[&str], only_quic| {
            let log = lines(texts);
            Memory::default().classify(&Seen { only_quic, ..seen(&log) })
        };
        assert_eq!(told(&[DIAL], false), sick(Cause::EdgeUnreachable));
        assert_eq!(told(&[DIAL], true), sick(Cause::UdpBlocked));
        assert_eq!(told(&[UDP_FAILS, TCP_PASSES, DIAL], false), sick(Cause::UdpBlocked));
        assert_eq!(told(&[UDP_FAILS, TCP_FAILS, DIAL], true), sick(Cause::EdgeUnreachable));
        let tcp = r#"2026-01-31T10:01:30Z ERR Serve tunnel error error="DialContext error: i/o timeout" connIndex=0"#;
        assert_eq!(told(&[UDP_FAILS, TCP_PASSES, DIAL, tcp], false), sick(Cause::EdgeUnreachable));
    }

    #[test]
    fn the_host_knows_no_way_where_the_newest_dials_all_say_so() {
        let dial = |end: &str| {
            format!(
                "2026-01-31T10:01:30Z ERR Serve tunnel error error=\"DialContext error: dial tcp 1.2.3.4:7844: {end}\" connIndex=0"
            )
        };
        let lost = dial("connect: network is unreachable");
        let (away, registered) =
            (dial("i/o timeout"), "2026-01-31T10:01:36Z INF Registered tunnel connection connIndex=0");
        let cannot = |texts: &[&str]| cannot_route(&lines(texts));
        assert!(cannot(&[&lost]) && cannot(&[registered, &lost]) && cannot(&[&away, &lost, &lost, &lost, &lost]));
        assert!(!cannot(&[]) && !cannot(&[&away]) && !cannot(&[&lost, registered]));
        assert!(!cannot(&[&lost, &lost, &lost, &lost, &away]), "there is a way again");
        assert!(!cannot(&[&away, &lost, &away, &lost]), "only one kind of address");
        assert!(!cannot(&[&lost, DIAL]));
    }

    #[test]
    fn the_newest_sign_counts_and_none_from_before_it_was_ready() {
        let refused =
            r#"2026-01-31T10:01:35Z ERR Register tunnel error from server side error="Unauthorized: a" connIndex=0"#;
        let log = lines(&[DIAL, refused]);
        assert_eq!(Memory::default().classify(&seen(&log)), sick(Cause::TokenRefused));
        let mut memory = Memory::default();
        memory.classify(&Seen { page: Page::Ready, ..seen(&log) });
        let later = Seen { now: START + 103.0, ..seen(&log) };
        assert_eq!(memory.classify(&later), Verdict::Unknown, "these lines are 5 s older");
        let registered = "2026-01-31T10:01:36Z INF Registered tunnel connection connIndex=0 protocol=quic";
        let log = lines(&[DIAL, refused, registered]);
        assert_eq!(Memory::default().classify(&seen(&log)), Verdict::Unknown);
    }

    #[test]
    fn what_a_start_ended_of_is_said_of_the_next_one_until_it_tells_otherwise() {
        let log = lines(&["Error opening metrics server listener: address already in use"]);
        let mut memory = Memory::default();
        let ended = Seen { state: RunState::Restarting, exit_code: Some(1), page: Page::Silent, ..seen(&log) };
        assert_eq!(memory.classify(&ended), sick(Cause::MetricsPortTaken));
        let again = Seen { started_at: START + 100.0, now: START + 101.0, page: Page::Silent, log: &[], ..seen(&[]) };
        assert_eq!(memory.classify(&again), sick(Cause::MetricsPortTaken));
        assert_eq!(memory.classify(&Seen { log: &lines(&[DIAL]), ..again }), sick(Cause::EdgeUnreachable));
        assert_eq!(memory.classify(&Seen { page: Page::Ready, ..again }), Verdict::Ready);
        assert_eq!(memory.classify(&again), Verdict::Unknown, "that is over");
    }

    #[test]
    fn each_way_to_end_has_its_cause() {
        let end = |texts: &[&str], exit_code: i64, out_of_memory| {
            let log = lines(texts);
            let state = RunState::Restarting;
            let ended = Seen { state, exit_code: Some(exit_code), out_of_memory, page: Page::Silent, ..seen(&log) };
            Memory::default().classify(&ended)
        };
        assert_eq!(end(&["Provided Tunnel token is not valid."], 255, false), sick(Cause::TokenMalformed));
        assert_eq!(end(&["Failed to read token file: open a: permission denied"], 255, false), sick(Cause::TokenFile));
        let missing = "\"cloudflared tunnel run\" requires the ID or name of the tunnel to run as the last argument.";
        assert_eq!(end(&[missing], 255, false), sick(Cause::TokenMissing));
        assert_eq!(end(&[], 137, true), sick(Cause::OutOfMemory));
        // Docker's out-of-memory flag is left from an earlier end.
        assert_eq!(end(&[], 1, true), sick(Cause::CrashLoop));
        assert_eq!(end(&[DIAL], 137, false), sick(Cause::CrashLoop), "it was killed");
        let told = "2026-01-31T10:01:30Z INF Initiating graceful shutdown due to signal terminated ...";
        assert_eq!(end(&[told], 0, false), Verdict::Stopped);
        let lookup = "Could not lookup srv records on _v2-origintunneld._tcp.argotunnel.com: server misbehaving";
        assert_eq!(end(&[lookup], 1, false), sick(Cause::NoDns));
        let failed =
            r#"2026-01-31T10:01:30Z ERR Failed to serve tunnel connection error="context canceled" connIndex=0"#;
        let gave_up = r#"2026-01-31T10:01:30Z ERR Initiating shutdown error="context canceled""#;
        assert_eq!(end(&[failed, gave_up], 1, false), sick(Cause::RegistrationRefused));
        let registered = "2026-01-31T10:01:29Z INF Registered tunnel connection connIndex=0";
        assert_eq!(end(&[registered, failed, gave_up], 1, false), sick(Cause::CrashLoop));
    }

    #[test]
    fn without_a_log_the_counters_and_time_are_left() {
        let at = |after: f64, failed: u64| {
            let tries = Some(Tries { failed, registered: 0, seconds: 0.0 });
            Memory::default().classify(&Seen { now: START + after, tries, ..seen(&[]) })
        };
        assert_eq!(at(5.0, 0), Verdict::Starting);
        assert_eq!(at(5.0, 2), sick(Cause::RegistrationRefused));
        assert_eq!(at(35.0, 0), Verdict::Unknown);
        assert_eq!(at(41.0, 0), sick(Cause::EdgeUnreachable));
    }
}
