//! The agent's own pages, for Docker's HEALTHCHECK, Prometheus and people. They show what the agent knows, and no
//! secrets.
//!
//! | path | |
//! |---|---|
//! | `/health` | everything, as JSON; 503 only when the agent itself does not work |
//! | `/live` | whether the agent itself works |
//! | `/ready` | whether the tunnel can carry traffic |
//! | `/metrics` | for Prometheus |
//! | `/log` | the last lines of the log; only for requests from the same machine or container |
//!
//! Reads what the tasks publish and owns nothing. Anyone who shares a network with the agent may ask:
//! [`dockflare_host::page`] answers without waiting for any of them.

use std::sync::Arc;
use std::time::Instant;

use dockflare_host::page::{Page, Pages};
pub(crate) use dockflare_host::page::{bind, serve};
use hyper::StatusCode;
use prometheus_client::encoding::prometheus_text;
use serde_json::json;
use tokio::sync::watch;

use crate::channels::{Inventory, View, Wanted, Ways};
use crate::concerns::Concerns;
use crate::logging::Ring;
use crate::master::Master;
use crate::metrics::Metrics;
use crate::pulse::Pulse;
use crate::registration::Session;

mod ask;
mod disk;
mod exposition;
mod summary;
pub(crate) use ask::ask;
pub use ask::check;
pub(crate) use disk::Disk;

/// What the pages read.
#[derive(Debug)]
pub(crate) struct Sources {
    pub(crate) master: Arc<Master>,
    /// The agent's session with the master.
    pub(crate) session: watch::Receiver<Option<Arc<Session>>>,
    /// Whether the master refuses the agent. An earlier session may still be in `session` then.
    pub(crate) refused: watch::Receiver<bool>,
    pub(crate) wanted: watch::Receiver<Wanted>,
    pub(crate) view: watch::Receiver<View>,
    pub(crate) inventory: watch::Receiver<Inventory>,
    pub(crate) ways: watch::Receiver<Ways>,
    pub(crate) metrics: Metrics,
    pub(crate) concerns: Concerns,
    pub(crate) log: Ring,
    /// When the agent started.
    pub(crate) started: Instant,
    pub(crate) tasks: Vec<Pulse>,
    pub(crate) disk: Disk,
}

impl Pages for Sources {
    async fn page(&self, path: &str, is_near: bool) -> Page {
        let (status, body) = match path {
            "/health" => self.health().await,
            "/live" => self.live().await,
            "/ready" => self.ready(),
            "/log" if is_near => (StatusCode::OK, json!({ "lines": self.log.lines() })),
            "/metrics" => return Page::text(prometheus_text::CONTENT_TYPE, self.metrics()),
            _ => (StatusCode::NOT_FOUND, json!({ "error": "there are /health, /live, /ready and /metrics" })),
        };
        Page::json(status, &body)
    }
}
