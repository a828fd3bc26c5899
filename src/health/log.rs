//! What a line of cloudflared's log means, as text or JSON. An unknown line means nothing.
//!
//! Some lines repeat what a visitor or an operator wrote, such as an address or a rule. A line is therefore recognized
//! by how its message begins, never by a word anywhere in it.

use jiff::Timestamp;
use serde::Deserialize;

/// One log line.
#[derive(Debug, Clone, PartialEq)]
pub struct Line {
    /// When it was written, in seconds since 1970. `None` for the last lines of a cloudflared that ends at once.
    pub at: Option<f64>,
    /// Index of the connection it is about.
    pub connection: Option<u8>,
    /// What it means.
    pub said: Said,
    /// The protocol in use from this line on.
    pub protocol: Option<&'static str>,
}

/// What a line means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Said {
    /// A connection to the edge registered.
    Registered,
    /// cloudflared was told to stop.
    ShuttingDown,
    /// cloudflared stops by itself.
    GaveUp,
    /// cloudflared does not take the token.
    TokenMalformed,
    /// cloudflared has no token.
    TokenMissing,
    /// cloudflared cannot read its token file.
    TokenFile,
    /// The port of cloudflared's own pages is taken.
    MetricsPortTaken,
    /// The edge refuses the token.
    Unauthorized,
    /// The edge refuses the registration for another reason, or does not answer it.
    RegisterError,
    /// A connection's control stream failed. Over QUIC this is a failed registration, whatever the reason.
    ControlStream,
    /// The edge was not reached.
    DialFailed {
        /// The dial was over QUIC.
        quic: bool,
        /// This host, or its router, has no route to the edge: nothing was sent.
        no_route: bool,
    },
    /// cloudflared does not trust the edge's certificate, for this reason.
    Untrusted(&'static str),
    /// The edge's addresses cannot be resolved.
    LookupFailed,
    /// A connectivity check that cloudflared ran at its start (2026).
    Precheck {
        /// UDP, or else TCP.
        udp: bool,
        /// Whether the check passed.
        passed: bool,
    },
    /// The options that cloudflared was started with.
    Options {
        /// It may use only QUIC.
        only_quic: bool,
    },
    /// Anything else.
    Other,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Json {
    time: String,
    message: String,
    error: String,
    component: String,
    status: String,
    #[serde(rename = "connIndex")]
    connection: Option<u8>,
    protocol: String,
}

impl Line {
    /// Reads a line, without the time that Docker puts before it.
    pub fn parse(text: &str) -> Self {
        if let Ok(json) = serde_json::from_str::<Json>(text) {
            let precheck = (json.component.as_str(), json.status.as_str());
            return Self {
                at: time(&json.time),
                connection: json.connection,
                said: meaning(&json.message, &json.error, precheck),
                protocol: protocol(&json.message, &json.protocol),
            };
        }
        // `2026-01-31T10:00:00Z ERR Serve tunnel error error="…" connIndex=0 event=0 ip=…`
        let (at, rest) = match text.split_once(' ') {
            Some((first, rest)) if time(first).is_some() => (time(first), rest),
            _ => (None, text),
        };
        let message = ["INF ", "WRN ", "ERR ", "FTL ", "DBG "].iter().find_map(|level| rest.strip_prefix(level));
        let message = message.unwrap_or(rest);
        let field = |name: &str| message.split_once(name).map(|(_, value)| value).unwrap_or_default();
        let word = |name: &str| field(name).split(['"', ' ']).next().unwrap_or_default();
        let error = field(" error=");
        let precheck = (field(" component=\"").split('"').next().unwrap_or_default(), word(" status="));
        Self {
            at,
            connection: word(" connIndex=").parse().ok(),
            said: meaning(message, error.trim_start_matches('"'), precheck),
            protocol: protocol(message, word(" protocol=")),
        }
    }
}

fn time(text: &str) -> Option<f64> {
    text.parse::<Timestamp>().ok().map(|time| time.as_millisecond() as f64 / 1000.0)
}

fn meaning(message: &str, error: &str, (component, status): (&str, &str)) -> Said {
    let begins = |with: &str| message.starts_with(with);
    // Lines that report how a connection, or a try to make one, ended. The log level may suppress any of them.
    let ends = [
        "Serve tunnel error",
        "Connection terminated",
        "Failed to serve tunnel connection",
        "failed to serve tunnel connection",
        "Failed to dial a quic connection",
        "Unable to establish connection with Cloudflare edge",
    ];
    if begins("Registered tunnel connection") {
        Said::Registered
    } else if begins("Initiating graceful shutdown") {
        Said::ShuttingDown
    } else if begins("Provided Tunnel token is not valid") {
        Said::TokenMalformed
    } else if begins("\"cloudflared tunnel run\" requires the ID or name of the tunnel") {
        Said::TokenMissing
    } else if begins("Failed to read token file") {
        Said::TokenFile
    } else if begins("Error opening metrics server listener") {
        Said::MetricsPortTaken
    } else if begins("Register tunnel error from server side") {
        registration(error)
    } else if begins("Initiating shutdown") {
        if is_lookup(error) { Said::LookupFailed } else { Said::GaveUp }
    } else if begins("Could not lookup srv records")
        || begins("edge discovery: error looking up Cloudflare edge IPs")
        || begins("Failed to fetch features") && is_lookup(error)
    {
        Said::LookupFailed
    } else if begins("precheck") {
        let check = |udp| Said::Precheck { udp, passed: status == "pass" };
        match component {
            "UDP Connectivity" if status != "skip" => check(true),
            "TCP Connectivity" if status != "skip" => check(false),
            _ => Said::Other,
        }
    } else if begins("Environmental variables") || begins("Settings") {
        Said::Options { only_quic: is_only_quic(message) }
    } else if ends.iter().any(|end| begins(end)) {
        end(error)
    } else {
        Said::Other
    }
}

fn registration(error: &str) -> Said {
    if error.contains("Unauthorized") {
        Said::Unauthorized
    } else if error.starts_with("context canceled") {
        // cloudflared gave up the registration itself, because the connection was lost.
        Said::Other
    } else {
        Said::RegisterError
    }
}

/// Why a connection, or a try to make one, ended.
fn end(error: &str) -> Said {
    let quic = error.starts_with("failed to dial to edge with quic");
    if quic || error.starts_with("DialContext error") || error.starts_with("TLS handshake with edge error") {
        match untrusted(error) {
            Some(why) => Said::Untrusted(why),
            None => Said::DialFailed { quic, no_route: is_no_route(error) },
        }
    } else if error.contains("Unauthorized") {
        Said::Unauthorized
    } else if error.starts_with("control stream encountered a failure while serving")
        // Versions up to 2025.8.
        || error.starts_with("context canceled")
    {
        Said::ControlStream
    } else if is_lookup(error) {
        Said::LookupFailed
    } else {
        Said::Other
    }
}

/// Why cloudflared does not trust the edge's certificate, if that is why the dial failed.
fn untrusted(error: &str) -> Option<&'static str> {
    let has = |text: &str| error.contains(text);
    if has("certificate has expired or is not yet valid") {
        Some("by the clock of this host its certificate is not valid yet or any more: set the clock")
    } else if has("signed by unknown authority") {
        Some("its certificate is of an authority that cloudflared does not know: TLS is intercepted on the way")
    } else if has("x509:") {
        Some("its certificate is another one: TLS is intercepted on the way")
    } else if has("TLS handshake with edge error: tls:") {
        Some("what answers there does not speak TLS as the edge does: something on the way interferes")
    } else {
        None
    }
}

/// Linux's wording, as Go passes it on, at the end: `dial tcp 198.51.100.1:7844: connect: network is unreachable`,
/// `write udp [::]:40000->198.51.100.1:7844: sendto: network is unreachable`.
fn is_no_route(error: &str) -> bool {
    let error = error.split('"').next().unwrap_or(error);
    ["network is unreachable", "no route to host", "network is down"].iter().any(|words| error.ends_with(words))
}

/// Whether a name of the edge could not be resolved.
fn is_lookup(error: &str) -> bool {
    error.contains("lookup ") && error.contains("argotunnel.com") || error.contains("the DNS query failed")
}

/// `map[TUNNEL_TRANSPORT_PROTOCOL:quic …]`, `map[protocol:quic …]`
fn is_only_quic(message: &str) -> bool {
    let words = ["TUNNEL_TRANSPORT_PROTOCOL:quic", "protocol:quic", "TUNNEL_POST_QUANTUM:true", "post-quantum:true"];
    message.split(['[', ']', ' ']).any(|word| words.contains(&word))
}

fn protocol(message: &str, field: &str) -> Option<&'static str> {
    let after = |start: &str| message.strip_prefix(start).and_then(|rest| rest.split_whitespace().next());
    let word = match after("Initial protocol ").or_else(|| after("Switching to fallback protocol ")) {
        Some(word) => word,
        None if message.starts_with("Registered tunnel connection") => field,
        None => return None,
    };
    match word {
        "quic" => Some("quic"),
        "http2" => Some("http2"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::hostile::text;

    #[test]
    fn a_line_means_the_same_in_text_and_in_json() {
        for (line, json, said) in [
            (
                r#"2026-01-31T10:00:00Z ERR Register tunnel error from server side error="Unauthorized: Tunnel not found" connIndex=2 event=0 ip=1"#,
                r#"{"level":"error","error":"Unauthorized: Tunnel not found","connIndex":2,"event":0,"ip":"1","time":"2026-01-31T10:00:00Z","message":"Register tunnel error from server side"}"#,
                Said::Unauthorized,
            ),
            (
                r#"2026-01-31T10:00:00Z ERR Serve tunnel error error="control stream encountered a failure while serving" connIndex=2 event=0 ip=1"#,
                r#"{"level":"error","error":"control stream encountered a failure while serving","connIndex":2,"time":"2026-01-31T10:00:00Z","message":"Serve tunnel error"}"#,
                Said::ControlStream,
            ),
            (
                r#"2026-01-31T10:00:00Z ERR Serve tunnel error error="DialContext error: dial tcp 1.2.3.4:7844: i/o timeout" connIndex=2 event=0 ip=1"#,
                r#"{"level":"error","error":"DialContext error: dial tcp 1.2.3.4:7844: i/o timeout","connIndex":2,"time":"2026-01-31T10:00:00Z","message":"Serve tunnel error"}"#,
                Said::DialFailed { quic: false, no_route: false },
            ),
        ] {
            let parsed = Line::parse(line);
            assert_eq!((parsed.said, parsed.connection), (said, Some(2)), "{line}");
            assert_eq!(parsed.at, Some(1_769_853_600.0));
            assert_eq!(Line::parse(json), parsed, "{json}");
        }
        let precheck = Said::Precheck { udp: true, passed: false };
        let line = r#"2026-01-31T10:00:00Z INF precheck component="UDP Connectivity" details="QUIC connection failed" run_id=1 status=fail target=a"#;
        assert_eq!(Line::parse(line).said, precheck);
        let json = r#"{"level":"info","component":"UDP Connectivity","status":"fail","time":"2026-01-31T10:00:00Z","message":"precheck"}"#;
        assert_eq!(Line::parse(json).said, precheck);
    }

    #[test]
    fn what_visitors_and_origins_write_means_nothing() {
        for line in [
            r#"2026-01-31T10:00:00Z ERR Request failed error="Unable to reach the origin service: tls: failed to verify certificate: x509: certificate signed by unknown authority" dest=https://a/"#,
            r#"2026-01-31T10:00:00Z ERR  error="Unable to reach the origin service: dial tcp: lookup argotunnel.com on 1.1.1.1:53: no such host" originService=http://argotunnel.com"#,
            r#"2026-01-31T10:00:00Z ERR Request failed error="Unauthorized" dest=http://a/Registered tunnel connection"#,
            r#"2026-01-31T10:00:00Z INF Updated to new configuration config="{\"ingress\":[{\"path\":\"Initiating graceful shutdown error=\"Unauthorized\"\"}]}" version=1"#,
            r#"2026-01-31T10:00:00Z ERR failed to serve incoming request error="Failed to proxy HTTP: Unauthorized""#,
            r#"2026-01-31T10:00:00Z INF Settings: map[hostname:protocol:quic.example.com]"#,
        ] {
            let said = Line::parse(line).said;
            assert!(matches!(said, Said::Other | Said::Options { only_quic: false }), "{said:?} is made of {line}");
        }
    }

    #[test]
    fn the_protocol_and_what_may_be_used_are_read() {
        let protocol = |line: &str| Line::parse(line).protocol;
        assert_eq!(protocol("2026-01-31T10:00:00Z INF Initial protocol quic"), Some("quic"));
        assert_eq!(
            protocol("2026-01-31T10:00:00Z INF Switching to fallback protocol http2 connIndex=0"),
            Some("http2")
        );
        let registered = "2026-01-31T10:00:00Z INF Registered tunnel connection connIndex=0 location=a protocol=http2";
        assert_eq!(protocol(registered), Some("http2"));
        assert_eq!(protocol("2026-01-31T10:00:00Z INF Something protocol=http2"), None);
        let options = |words: &str| Line::parse(&format!("2026-01-31T10:00:00Z INF {words}")).said;
        let quic = Said::Options { only_quic: true };
        assert_eq!(options("Environmental variables map[TUNNEL_LOGLEVEL:info TUNNEL_TRANSPORT_PROTOCOL:quic]"), quic);
        assert_eq!(options("Settings: map[no-autoupdate:true protocol:quic]"), quic);
        let auto = Said::Options { only_quic: false };
        assert_eq!(options("Environmental variables map[TUNNEL_TRANSPORT_PROTOCOL:auto]"), auto);
    }

    #[test]
    fn a_certificate_that_is_not_believed_is_told_with_the_reason() {
        let said =
            |error: &str| Line::parse(&format!("2026-01-31T10:00:00Z ERR Serve tunnel error error=\"{error}\"")).said;
        let why = |error: &str| match said(error) {
            Said::Untrusted(why) => why,
            other => panic!("{other:?} is made of {error}"),
        };
        let clock = "TLS handshake with edge error: tls: failed to verify certificate: x509: certificate has expired or is not yet valid";
        assert!(why(clock).contains("clock"));
        let other = "failed to dial to edge with quic: CRYPTO_ERROR 0x12a (local): tls: failed to verify certificate: x509: certificate signed by unknown authority";
        assert!(why(other).contains("intercepted"));
        assert!(
            why("TLS handshake with edge error: tls: first record does not look like a TLS handshake")
                .contains("interferes")
        );
        assert_eq!(said("TLS handshake with edge error: EOF"), Said::DialFailed { quic: false, no_route: false });
    }

    #[test]
    fn a_dial_for_which_the_host_knows_no_way_is_told_from_one_that_nobody_answers() {
        for (error, quic, no_route) in [
            ("DialContext error: dial tcp 198.41.200.33:7844: connect: network is unreachable", false, true),
            ("DialContext error: dial tcp 198.41.200.33:7844: connect: no route to host", false, true),
            ("DialContext error: dial tcp 198.41.200.33:7844: i/o timeout", false, false),
            ("DialContext error: dial tcp 198.41.200.33:7844: connect: connection refused", false, false),
            (
                "failed to dial to edge with quic: INTERNAL_ERROR (local): write udp [::]:4->198.41.200.33:7844: sendto: network is unreachable",
                true,
                true,
            ),
            ("failed to dial to edge with quic: timeout: no recent network activity", true, false),
        ] {
            let said = Said::DialFailed { quic, no_route };
            for message in
                ["Serve tunnel error", "Connection terminated", "Unable to establish connection with Cloudflare edge"]
            {
                let line = format!(
                    "2026-01-31T10:00:00Z ERR {message} error=\"{error}\" connIndex=0 event=0 ip=198.41.200.33"
                );
                assert_eq!(Line::parse(&line).said, said, "{line}");
                let json = serde_json::json!({ "message": message, "error": error, "time": "2026-01-31T10:00:00Z" });
                assert_eq!(Line::parse(&json.to_string()).said, said, "{json}");
            }
        }
    }

    proptest! {
        #[test]
        fn any_log_line_of_cloudflared_is_read(
            line in prop_oneof![
                text(),
                "(2026-01-31T10:00:00Z )?(ERR )?(Register tunnel error|Serve tunnel error|precheck|Settings: ).{0,20}( error=.{0,20})?( connIndex=.{0,4})?",
                r#"\{"message":"(Serve tunnel error|.{0,9})","error":"[a-z ]{0,9}","connIndex":-?[0-9]{0,4}\}"#,
            ],
        ) {
            let _ = Line::parse(&line);
        }
    }
}
