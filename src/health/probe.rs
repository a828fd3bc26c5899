//! Asks cloudflared itself whether it can carry traffic, and which version it is.

use std::time::Duration;

use reqwest::{Client, StatusCode};
use serde::Deserialize;

use super::classify::Tries;
use crate::channels::Traffic;
use crate::docker::METRICS_PORT;
use crate::http;

/// What cloudflared answers about its readiness.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Readiness {
    /// It can carry traffic.
    Ready {
        /// Connections to the edge that are ready, at least one.
        connections: u32,
        /// Its connector id.
        connector: Option<String>,
    },
    /// It has no connection that is ready.
    NotReady,
    /// It cannot be reached from here, or does not answer.
    Silent,
}

/// What its metrics page says.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Facts {
    pub(super) version: Option<String>,
    pub(super) config_version: Option<i64>,
    pub(super) traffic: Option<Traffic>,
    pub(super) tries: Tries,
}

/// A healthy cloudflared answers within a millisecond. Without an answer in this time it hangs or is out of reach.
const LIMIT: Duration = Duration::from_secs(2);
/// Bytes read of a page. The metrics page of a busy cloudflared has some ten kilobytes.
const MAX_BYTES: usize = 1 << 20;

#[derive(Debug)]
pub(super) struct Probe {
    client: Client,
}

impl Probe {
    pub(super) fn new() -> Result<Self, reqwest::Error> {
        let client = http::neighbour(LIMIT)?;
        Ok(Self { client })
    }

    /// `GET /ready` of the container at this address.
    pub(super) async fn readiness(&self, address: &str) -> Readiness {
        #[derive(Deserialize)]
        struct Ready {
            #[serde(rename = "readyConnections")]
            connections: u32,
            #[serde(rename = "connectorId", default)]
            connector: Option<String>,
        }
        match self.get(address, "ready").await {
            Some((StatusCode::OK, body)) => match serde_json::from_slice(&body) {
                Ok(Ready { connections, connector }) => {
                    let connector = connector.and_then(|id| valid_word(&id));
                    Readiness::Ready { connections: connections.max(1), connector }
                }
                Err(_) => Readiness::Silent,
            },
            Some((StatusCode::SERVICE_UNAVAILABLE, _)) => Readiness::NotReady,
            _ => Readiness::Silent,
        }
    }

    /// The facts from `/metrics` of the container at this address; `None` if it does not answer.
    pub(super) async fn facts(&self, address: &str) -> Option<Facts> {
        let page = self.read(address, "metrics").await?;
        Some(facts_in_metrics(&String::from_utf8_lossy(&page)))
    }

    /// The protocol of its connections, from `/diag/tunnel`. Ask rarely: cloudflared logs two lines each time.
    pub(super) async fn protocol(&self, address: &str) -> Option<&'static str> {
        protocol_in_diag(&self.read(address, "diag/tunnel").await?)
    }

    async fn read(&self, address: &str, page: &str) -> Option<Vec<u8>> {
        self.get(address, page).await.filter(|(status, _)| status.is_success()).map(|(_, body)| body)
    }

    async fn get(&self, address: &str, page: &str) -> Option<(StatusCode, Vec<u8>)> {
        let mut response = self.client.get(format!("http://{address}:{METRICS_PORT}/{page}")).send().await.ok()?;
        let mut body = Vec::new();
        while let Some(chunk) = response.chunk().await.ok()? {
            body.extend_from_slice(&chunk);
            if body.len() > MAX_BYTES {
                return None;
            }
        }
        Some((response.status(), body))
    }
}

fn facts_in_metrics(page: &str) -> Facts {
    // cloudflared 2025 and 2026 put no labels on any of these; with labels, their sum would still be right.
    let sum = |name: &str| {
        let values = page.lines().filter_map(|line| {
            let rest = line.strip_prefix(name).filter(|rest| rest.starts_with([' ', '{']))?;
            rest.split_whitespace().next_back()?.parse::<f64>().ok().filter(|value| value.is_finite())
        });
        values.reduce(|sum, value| sum + value)
    };
    // Counters of events are whole numbers and far below 2^53.
    let count = |name: &str| sum(name).map(|value| value.max(0.0) as u64);
    Facts {
        version: version_in_metrics(page),
        config_version: sum("cloudflared_orchestration_config_version").map(|version| version as i64),
        tries: Tries::of(page.lines().filter_map(series)),
        traffic: count("cloudflared_tunnel_total_requests").map(|requests| Traffic {
            requests,
            errors: count("cloudflared_tunnel_request_errors").unwrap_or_default(),
        }),
    }
}

/// `name{label="…"} 1.5e3`
fn series(line: &str) -> Option<(&str, f64)> {
    let (name, value) = line.rsplit_once(' ')?;
    Some((name, value.parse().ok()?))
}

/// The protocol of the first connection. 1 is quic; http2 is 0, which cloudflared leaves out (2025.9).
fn protocol_in_diag(page: &[u8]) -> Option<&'static str> {
    #[derive(Deserialize)]
    struct Diag {
        #[serde(default)]
        connections: Vec<Connection>,
    }
    #[derive(Deserialize)]
    struct Connection {
        #[serde(rename = "isConnected", default)]
        connected: bool,
        #[serde(default)]
        protocol: i64,
    }
    let diag: Diag = serde_json::from_slice(page).ok()?;
    match diag.connections.iter().find(|connection| connection.connected)?.protocol {
        0 => Some("http2"),
        1 => Some("quic"),
        _ => None,
    }
}

/// `build_info{…,version="2025.9.0"} 1`
fn version_in_metrics(page: &str) -> Option<String> {
    let line = page.lines().find(|line| line.starts_with("build_info{"))?;
    // `goversion` is another label of the same line.
    let rest = ["{version=\"", ",version=\""].iter().find_map(|key| Some(line.split_once(key)?.1))?;
    valid_word(rest.split_once('"')?.0)
}

/// `2025-09-01T10:00:00Z INF Version 2025.9.0 (Checksum …)`
pub(super) fn version_in_log(lines: &[String]) -> Option<String> {
    let after = |line: &String| valid_word(line.split_once("INF Version ")?.1.split_whitespace().next()?);
    lines.iter().find_map(after)
}

/// Passes on a version or an id only if it looks like one.
fn valid_word(text: &str) -> Option<String> {
    let fits = (1..=64).contains(&text.len()) && text.chars().all(|c| c.is_ascii_alphanumeric() || ".-_+".contains(c));
    fits.then(|| text.to_owned())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;
    use tokio::net::TcpListener;

    use super::*;
    use crate::hostile::{BUFFERS, body, endless, text};

    #[test]
    fn the_metrics_page_tells_of_the_configuration_and_of_what_was_carried() {
        let page = "# TYPE cloudflared_tunnel_total_requests counter\ncloudflared_tunnel_total_requests 1.2e+03\n\
            cloudflared_tunnel_request_errors 7\ncloudflared_orchestration_config_version -1\n\
            cloudflared_tunnel_total_requests_other 9\n";
        let facts = facts_in_metrics(page);
        assert_eq!(facts.traffic, Some(Traffic { requests: 1200, errors: 7 }));
        assert_eq!((facts.config_version, facts.version), (Some(-1), None));
        assert_eq!(facts_in_metrics("cloudflared_tunnel_total_requests NaN"), Facts::default());
    }

    #[test]
    fn the_metrics_page_tells_of_the_registrations() {
        let page = "cloudflared_rpc_client_failures{handler=\"registration\",method=\"register_connection\"} 3\n\
            cloudflared_rpc_client_failures{handler=\"registration\",method=\"unregister_connection\"} 9\n\
            cloudflared_rpc_client_latency_secs_sum{handler=\"registration\",method=\"register_connection\"} 0.25\n\
            cloudflared_tunnel_tunnel_register_success{rpcName=\"registerConnection\"} 4\n\
            cloudflared_tunnel_ha_connections 4\n";
        assert_eq!(facts_in_metrics(page).tries, Tries { failed: 3, registered: 4, seconds: 0.25 });
    }

    #[test]
    fn the_diagnosis_page_tells_the_protocol() {
        let page = |connections: &str| format!(r#"{{"tunnelID":"t","connections":[{connections}]}}"#);
        let protocol = |connections: &str| protocol_in_diag(page(connections).as_bytes());
        assert_eq!(protocol(r#"{"isConnected":true,"protocol":1}"#), Some("quic"));
        assert_eq!(protocol(r#"{"index":1},{"isConnected":true,"edgeAddress":"198.41.192.7"}"#), Some("http2"));
        assert_eq!(protocol(""), None);
        assert_eq!(protocol_in_diag(b"404 page not found"), None);
    }

    #[test]
    fn the_version_is_found_on_the_metrics_page() {
        let page = "# HELP build_info Build and version information\nbuild_info{goversion=\"go1.24\",revision=\"x\",type=\"\",version=\"2025.9.0\"} 1\n";
        assert_eq!(version_in_metrics(page), Some("2025.9.0".into()));
        assert_eq!(version_in_metrics("build_info{version=\"1\"} 1"), Some("1".into()));
        assert_eq!(version_in_metrics("go_info{version=\"go1.24\"} 1"), None);
        assert_eq!(version_in_metrics("build_info{version=\"<script>\"} 1"), None);
    }

    #[test]
    fn the_version_is_found_in_the_log() {
        let lines =
            ["2025-09-01T10:00:00Z INF Starting tunnel", "2025-09-01T10:00:00Z INF Version 2025.9.0 (Checksum ab)"];
        assert_eq!(version_in_log(&lines.map(str::to_owned)), Some("2025.9.0".into()));
        assert_eq!(version_in_log(&["INF GOOS: linux".to_owned()]), None);
    }

    proptest! {
        #[test]
        fn any_page_of_cloudflared_is_read(
            lines in prop::collection::vec(prop_oneof![
                text(),
                ("(cloudflared_tunnel_total_requests|cloudflared_orchestration_config_version|build_info)", text())
                    .prop_map(|(name, rest)| format!("{name} {rest}")),
                ("[{ ].{0,8}", any::<f64>())
                    .prop_map(|(labels, value)| format!("cloudflared_tunnel_request_errors{labels} {value}")),
                "build_info\\{(version=\"\\PC{0,9}\"?,?){0,3}",
                ".{0,9}INF Version .{0,9}",
            ], 0..8),
            diag in body(json!({"connections": [{"isConnected": true, "protocol": 1, "edgeAddress": "a"}]})),
        ) {
            let facts = facts_in_metrics(&lines.join("\n"));
            let _ = protocol_in_diag(&diag);
            for word in facts.version.iter().chain(&version_in_log(&lines)) {
                prop_assert!((1..=64).contains(&word.len()) && word.is_ascii(), "{}", word);
            }
        }
    }

    #[tokio::test]
    async fn a_page_without_end_is_dropped_soon_after_1_mib() {
        // An address for this test alone: the port is always the same.
        const ADDRESS: &str = "127.31.41.59";
        let head = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";
        let listener = TcpListener::bind((ADDRESS, METRICS_PORT)).await.unwrap();
        let server = tokio::spawn(endless(listener, head, 2));
        let probe = Probe::new().unwrap();
        let began = tokio::time::Instant::now();
        assert_eq!(probe.readiness(ADDRESS).await, Readiness::Silent);
        assert_eq!(probe.read(ADDRESS, "metrics").await, None);
        // It must not wait out the time limit of the two requests.
        assert!(began.elapsed() < LIMIT, "{:?}", began.elapsed());
        let taken = tokio::time::timeout(Duration::from_secs(30), server).await.expect("it hangs").unwrap();
        assert!(taken.iter().all(|sent| *sent <= (1 << 20) + BUFFERS), "{taken:?} bytes were taken");
    }
}
