//! Asking cloudflared itself: whether it can carry traffic, and which version it is.

use std::time::Duration;

use reqwest::{Client, StatusCode};
use serde::Deserialize;

use crate::docker::METRICS_PORT;
use crate::http;

/// What cloudflared says of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Readiness {
    /// This many connections to the edge are ready, at least one.
    Ready(u32),
    /// None is.
    NotReady,
    /// It cannot be asked from here, or it does not answer.
    Silent,
}

/// A healthy cloudflared answers in a millisecond; this much means that it hangs or cannot be reached.
const LIMIT: Duration = Duration::from_secs(2);
/// The metrics page of a busy cloudflared has some ten kilobytes.
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
        }
        match self.get(address, "ready").await {
            Some((StatusCode::OK, body)) => match serde_json::from_slice(&body) {
                Ok(Ready { connections }) => Readiness::Ready(connections.max(1)),
                Err(_) => Readiness::Silent,
            },
            Some((StatusCode::SERVICE_UNAVAILABLE, _)) => Readiness::NotReady,
            _ => Readiness::Silent,
        }
    }

    /// The version from `build_info` of the metrics page.
    pub(super) async fn version(&self, address: &str) -> Option<String> {
        let (_, body) = self.get(address, "metrics").await.filter(|(status, _)| status.is_success())?;
        version_in_metrics(&String::from_utf8_lossy(&body))
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

/// `build_info{…,version="2025.9.0"} 1`
fn version_in_metrics(page: &str) -> Option<String> {
    let line = page.lines().find(|line| line.starts_with("build_info{"))?;
    // `goversion` is another label of the same line.
    let rest = ["{version=\"", ",version=\""].iter().find_map(|key| Some(line.split_once(key)?.1))?;
    valid_version(rest.split_once('"')?.0)
}

/// `2025-09-01T10:00:00Z INF Version 2025.9.0 (Checksum …)`
pub(super) fn version_in_log(lines: &[String]) -> Option<String> {
    let after = |line: &String| valid_version(line.split_once("INF Version ")?.1.split_whitespace().next()?);
    lines.iter().find_map(after)
}

/// What is sent on as a version looks like one.
fn valid_version(text: &str) -> Option<String> {
    let fits = (1..=64).contains(&text.len()) && text.chars().all(|c| c.is_ascii_alphanumeric() || ".-_+".contains(c));
    fits.then(|| text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

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
}
