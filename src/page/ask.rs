//! The client side: asks the agent that runs in the same container.

use std::time::Duration;

use serde_json::Value;

use crate::config::{ConfigErrors, PageAddress};

/// Docker gives the whole health check 5 s.
const LIMIT: Duration = Duration::from_secs(4);

/// Whether the agent works, for Docker's HEALTHCHECK. It does even if the master, the tunnel or Docker is away:
/// restarting the agent would not help.
///
/// # Errors
/// One line that says why the agent is not healthy.
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

/// What the page answers at this path, whatever the status.
///
/// # Errors
/// One line, when nobody answers or the answer is not JSON.
pub(crate) async fn ask(page: PageAddress, path: &str) -> Result<Value, String> {
    dockflare_host::page::ask("the agent", page, path, LIMIT).await
}
