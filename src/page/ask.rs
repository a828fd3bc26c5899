//! The client side: asks the agent that runs in the same container.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use serde_json::Value;

use crate::config::{ConfigErrors, PageAddress};
use crate::http;

/// Docker gives the whole of a health check 5 s.
const LIMIT: Duration = Duration::from_secs(4);

/// Whether the agent does its job, for Docker's HEALTHCHECK. One whose master, tunnel or Docker is away does: to
/// start it again would not help.
///
/// # Errors
/// One line that says why the agent does not count as healthy.
pub async fn check(page: Result<Option<PageAddress>, ConfigErrors>) -> Result<String, String> {
    let Some(page) = page.map_err(|errors| errors.to_string())? else {
        return Ok("the health page is switched off (HEALTH_CHECK_PORT=0), nothing can be asked".to_owned());
    };
    let answer = ask(page, "/health").await?;
    let word = |value: &Value| value.as_str().unwrap_or("unknown").to_owned();
    let problems: Vec<_> = answer["problems"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    let line = match problems.as_slice() {
        [] => format!("{}, tunnel {}", word(&answer["status"]), word(&answer["tunnel"]["state"])),
        problems => format!("{}: {}", word(&answer["status"]), problems.join("; ")),
    };
    match answer["status"].as_str() {
        Some("healthy" | "degraded") => Ok(line),
        Some("unhealthy") => Err(line),
        _ => Err(format!("{page} is served by something else")),
    }
}

/// What the page answers under this path, whatever its status.
///
/// # Errors
/// One line, when nobody answers or it is not JSON.
pub(crate) async fn ask(page: PageAddress, path: &str) -> Result<Value, String> {
    let at = reached_at(page);
    let get = async { http::neighbour(LIMIT)?.get(format!("http://{at}{path}")).send().await?.bytes().await };
    let body =
        get.await.map_err(|error| format!("the agent does not answer on {at}: {}", crate::error_chain(&error)))?;
    serde_json::from_slice(&body).map_err(|_| format!("{at} is served by something else"))
}

/// Where a page that listens there is reached from this machine.
fn reached_at(page: PageAddress) -> SocketAddr {
    let ip = match page.0.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => std::net::Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => std::net::Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    SocketAddr::new(ip, page.0.port())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_on_every_interface_is_asked_on_the_loopback_and_any_other_where_it_is() {
        for (listens, asked) in [
            ("0.0.0.0:8080", "127.0.0.1:8080"),
            ("[::]:8080", "[::1]:8080"),
            ("127.0.0.1:1", "127.0.0.1:1"),
            ("172.18.0.2:80", "172.18.0.2:80"),
        ] {
            assert_eq!(reached_at(PageAddress(listens.parse().unwrap())).to_string(), asked);
        }
    }
}
