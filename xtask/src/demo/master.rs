//! The development master, used over HTTP as its operator would.

use anyhow::{Context, Result, bail, ensure};
use jiff::Timestamp;
use serde_json::{Value, json};

/// The operator's key. It is no secret, because only this machine can reach the development master.
pub(crate) const KEY: &str = "dockflare-demo";

/// How many seconds an answer may take.
const LIMIT: u64 = 5;

/// The master of the demo.
pub(crate) struct Master {
    /// `http://127.0.0.1:<port>`
    url: String,
}

impl Master {
    pub(crate) fn new(port: u16) -> Self {
        Self { url: format!("http://127.0.0.1:{port}") }
    }

    /// The URL of the master's page.
    pub(crate) fn url(&self) -> &str {
        &self.url
    }

    /// Everything the master knows.
    pub(crate) fn snapshot(&self) -> Result<Value> {
        self.get("/_dev/snapshot")
    }

    /// Generates a key for an agent.
    pub(crate) fn generate_key(&self) -> Result<String> {
        let reply = self.post("/api/v2/agents/generate-key", &json!({ "owner": "demo" }))?;
        Ok(reply["key"].as_str().context("no key in the reply")?.to_owned())
    }

    /// The id of the registered agent, if there is one.
    pub(crate) fn only_agent(&self) -> Result<Option<String>> {
        Ok(self.snapshot()?["agents"].as_object().and_then(|agents| agents.keys().next().cloned()))
    }

    /// Enrolls an agent with a tunnel of this name.
    pub(crate) fn enroll(&self, agent: &str, tunnel: &str) -> Result<()> {
        self.post(&format!("/api/v2/agents/{agent}/enroll"), &json!({ "tunnel_name": tunnel })).map(drop)
    }

    /// Tells an agent to replace its connector.
    pub(crate) fn redeploy(&self, agent: &str) -> Result<()> {
        self.post(&format!("/api/v2/agents/{agent}/redeploy-tunnel"), &json!({})).map(drop)
    }

    /// Describes the agent's tunnel as reported to the master, once it runs.
    pub(crate) fn tunnel_runs(&self, agent: &str) -> Result<Option<String>> {
        let status = self.snapshot()?["agents"][agent]["tunnel_status"].take();
        let word = |key: &str| status[key].as_str().unwrap_or("unknown").to_owned();
        let sentence = format!("tunnel {:?} {}, cloudflared {}", word("name"), word("status"), word("version"));
        Ok((word("status") == "running").then_some(sentence))
    }

    /// When the master accepted the `nth` event of this type for a container.
    pub(crate) fn arrival(&self, event: &str, container: &str, nth: usize) -> Result<Option<Timestamp>> {
        arrival(&self.get("/_dev/requests")?["requests"], event, container, nth)
    }

    /// The protocol violations that the master recorded.
    pub(crate) fn violations(&self) -> Result<Vec<String>> {
        let reply = self.get("/_dev/violations")?;
        let violations = reply["violations"].as_array().context("no violations in the reply")?;
        Ok(violations.iter().map(|violation| violation.as_str().unwrap_or_default().to_owned()).collect())
    }

    fn get(&self, path: &str) -> Result<Value> {
        self.send(path, minreq::get(format!("{}{path}", self.url)))
    }

    fn post(&self, path: &str, body: &Value) -> Result<Value> {
        let request = minreq::post(format!("{}{path}", self.url)).with_header("Content-Type", "application/json");
        self.send(path, request.with_body(body.to_string()))
    }

    fn send(&self, path: &str, request: minreq::Request) -> Result<Value> {
        let request = request.with_header("Authorization", format!("Bearer {KEY}")).with_timeout(LIMIT);
        let reply = request.send().with_context(|| format!("the master does not answer {path}"))?;
        let body = reply.as_str().context("the master's reply is no text")?;
        ensure!((200..300).contains(&reply.status_code), "the master says {} to {path}: {body}", reply.status_code);
        serde_json::from_str(body).with_context(|| format!("the master's reply to {path} is no JSON"))
    }
}

fn arrival(requests: &Value, event: &str, container: &str, nth: usize) -> Result<Option<Timestamp>> {
    let Some(requests) = requests.as_array() else { bail!("no requests in the reply") };
    let taken = requests.iter().filter(|request| {
        let (status, body) = (request["status"].as_u64().unwrap_or(0), &request["body"]);
        (200..300).contains(&status) && body["type"] == event && body["container"]["id"] == container
    });
    let at = taken.skip(nth - 1).find_map(|request| request["at"].as_str());
    at.map(|at| at.parse().context("the master's time")).transpose()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_nth_event_that_was_taken() {
        let event = |at: &str, status: u16, kind: &str| json!({ "at": at, "status": status, "body": { "type": kind, "container": { "id": "abc" } } });
        let requests = json!([
            event("2026-01-01T00:00:00Z", 200, "container_start"),
            event("2026-01-01T00:00:01Z", 200, "container_stop"),
            event("2026-01-01T00:00:02Z", 503, "container_start"),
            event("2026-01-01T00:00:03Z", 202, "container_start"),
            { "at": "2026-01-01T00:00:04Z", "status": null, "body": null },
        ]);
        let found = |event, id, nth| arrival(&requests, event, id, nth).expect("times").map(|at| at.as_second() % 60);
        assert_eq!(found("container_start", "abc", 1), Some(0));
        assert_eq!(found("container_start", "abc", 2), Some(3));
        assert_eq!(found("container_start", "abc", 3), None);
        assert_eq!(found("container_stop", "abc", 1), Some(1));
        assert_eq!(found("container_stop", "abd", 1), None);
    }
}
