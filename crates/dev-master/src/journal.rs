//! The journal: requests with their replies, and the protocol violations among them.

use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;

use jiff::Timestamp;
use serde::Serialize;
use serde_json::Value;

use crate::fault::Fault;
use crate::request::{Call, Route};

/// How many requests the journal keeps; it drops the oldest first. Enough for days of an idle agent, or
/// minutes of a request storm.
const REQUESTS: usize = 10_000;

/// How many violations the journal keeps; it ignores later ones. This many show well enough what is wrong.
const VIOLATIONS: usize = 1_000;

/// One request of an agent, and how the double answered it.
#[derive(Clone, Debug, Serialize)]
pub struct Request {
    /// When the double recorded it: as it made the reply, or when the client hung up.
    pub at: Timestamp,
    /// Its HTTP method.
    pub method: String,
    /// Its path, with the prefix.
    pub path: String,
    /// The route it was for.
    pub route: Route,
    /// The agent its path names.
    pub agent: Option<String>,
    /// The status answered; `None` if the connection was cut or the client hung up first.
    pub status: Option<u16>,
    /// The `code` of the reply, if it has one.
    pub code: Option<String>,
    /// Its body; null if it was empty or not JSON.
    pub body: Value,
    /// The names of its headers, in lower case. The journal does not keep their values.
    pub headers: Vec<String>,
    /// The fault that acted on it.
    pub fault: Option<Fault>,
    /// The `CF-Access-Client-Id` it carried.
    pub access_client_id: Option<String>,
    /// Whether it carried a `CF-Access-Client-Secret`.
    pub access_client_secret: bool,
}

impl Request {
    pub(crate) fn new(call: &Call, fault: Option<&Fault>, status: Option<u16>, code: Option<String>) -> Self {
        Self {
            at: Timestamp::now(),
            method: call.method.to_string(),
            path: call.path.clone(),
            route: call.target.route(),
            agent: call.target.agent().map(str::to_owned),
            status,
            code,
            body: call.body(),
            headers: call.headers.clone(),
            fault: fault.cloned(),
            access_client_id: call.access.0.clone(),
            access_client_secret: call.access.1.is_some(),
        }
    }

    /// The event's `type`, if this is an event.
    pub fn event(&self) -> Option<&str> {
        (self.route == Route::Events).then(|| self.body["type"].as_str()).flatten()
    }
}

impl fmt::Display for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.3} {} {}", self.at, self.method, self.path)?;
        match self.status {
            Some(status) => write!(f, " -> {status}")?,
            None => f.write_str(" -> no reply")?,
        }
        if let Some(code) = &self.code {
            write!(f, " {code}")?;
        }
        if let Some(fault) = &self.fault {
            write!(f, " (fault: {fault:?})")?;
        }
        if !self.body.is_null() {
            write!(f, " {}", self.body)?;
        }
        Ok(())
    }
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Journal {
    requests: VecDeque<Arc<Request>>,
    violations: Vec<String>,
}

impl Journal {
    pub(crate) fn record(&mut self, request: Request) {
        if self.requests.len() == REQUESTS {
            self.requests.pop_front();
        }
        self.requests.push_back(Arc::new(request));
    }

    /// Records that `agent` sent something on `route` that no agent should send.
    pub(crate) fn violation(&mut self, route: Route, agent: &str, what: &str) {
        tracing::warn!(%route, agent, "protocol violation: {what}");
        if self.violations.len() < VIOLATIONS {
            self.violations.push(format!("{route} {agent}: {what}"));
        }
    }

    pub(crate) fn requests(&self) -> Vec<Arc<Request>> {
        self.requests.iter().cloned().collect()
    }

    pub(crate) fn violations(&self) -> Vec<String> {
        self.violations.clone()
    }
}
