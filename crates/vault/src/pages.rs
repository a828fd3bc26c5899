//! Serves `/live`, `/ready`, `/health` and `/metrics`. None of them shows a value or the name of a secret.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use dockflare_host::page::{Page, PageAddress, Pages, ask};
use hyper::StatusCode;
use serde_json::{Value as Json, json};
use tokio::task::spawn_blocking;

use crate::delivery::Workload;
use crate::doors::deliver::{Condition, Desk, State, States};
use crate::store::Status;
use crate::vault::Vault;

/// Longest time for the vault's own page to answer its health check.
const CHECK_LIMIT: Duration = Duration::from_secs(3);

/// What is wrong with the vault, if anything.
#[derive(Debug, Default)]
pub struct Health {
    /// The store cannot be written.
    pub store_failed: AtomicBool,
    /// A rotation has stopped.
    pub rotation_failed: AtomicBool,
    /// The audit was changed from outside.
    pub audit_broken: AtomicBool,
    /// Docker does not signal or restart the containers whose files have changed.
    pub docker_failed: AtomicBool,
    /// The launcher is not in its folder.
    pub launcher_missing: AtomicBool,
    /// The present configuration file was refused; an earlier one is in effect.
    pub config_refused: AtomicBool,
}

impl Health {
    /// A code and a sentence for each problem.
    fn problems(&self, vault: &Vault) -> Vec<(&'static str, String)> {
        let mut problems = vec![];
        let set = |flag, word, sentence: &str| Health::is_set(flag).then(|| (word, sentence.to_owned()));
        problems.extend(set(&self.store_failed, "store_unavailable", "the store cannot be written; see the log"));
        problems.extend(vault.audit_problem().map(|problem| ("audit_unavailable", problem)));
        problems.extend(vault.counter_problem().map(|problem| ("counter_behind", problem)));
        problems.extend(set(&self.rotation_failed, "rotation_failed", "a rotation stands still; see the log"));
        problems.extend(set(
            &self.audit_broken,
            "audit_broken",
            "the audit was changed from outside; see audit verify",
        ));
        problems.extend(set(
            &self.docker_failed,
            "docker_unavailable",
            "containers whose files have changed cannot be signalled or restarted; see the log",
        ));
        problems.extend(set(
            &self.launcher_missing,
            "launcher_missing",
            "the launcher is not in launcher.folder; see the log",
        ));
        problems.extend(set(
            &self.config_refused,
            "config_refused",
            "the present configuration file is not taken; see the log",
        ));
        problems
    }
}

/// The pages of a vault.
#[derive(Debug)]
pub struct VaultPages {
    vault: Arc<Vault>,
    health: Arc<Health>,
    desk: Desk,
}

/// Most workloads with a problem that are named one by one.
const MAX_NAMED: usize = 20;

impl VaultPages {
    pub(crate) fn new(vault: Arc<Vault>, health: Arc<Health>, desk: Desk) -> Self {
        Self { vault, health, desk }
    }

    /// The problems of the vault, then those of its deliveries.
    fn problems(&self) -> Vec<(&'static str, String)> {
        let mut problems = self.health.problems(&self.vault);
        let states = self.desk.states();
        let states = states.borrow();
        let wrong: Vec<_> = states.iter().filter_map(|(name, state)| Some((name, state.problem()?))).collect();
        for (name, (word, what)) in wrong.iter().take(MAX_NAMED) {
            problems.push((word, format!("workload {name}: {what}; see dockflare-vault status")));
        }
        if let Some(more) = wrong.len().checked_sub(MAX_NAMED).filter(|more| *more > 0) {
            problems.push(("delivery_failed", format!("{more} more workloads; see dockflare-vault status")));
        }
        problems
    }

    /// The workloads and their state.
    fn deliveries(&self) -> Json {
        let states = self.desk.states();
        let states = states.borrow();
        let show = |(name, state): (&Workload, &State)| {
            let word = state.problem().map_or("delivered", |(word, _)| word.trim_start_matches("delivery_"));
            let word = if state.condition == Condition::Pending { "pending" } else { word };
            (name.to_string(), json!({ "version": state.version, "settled": state.settled, "condition": word }))
        };
        states.iter().map(show).collect::<serde_json::Map<_, _>>().into()
    }

    async fn status(&self) -> Option<Status> {
        let vault = self.vault.clone();
        spawn_blocking(move || vault.peek()).await.ok()
    }
}

impl Pages for VaultPages {
    async fn page(&self, path: &str, _is_near: bool) -> Page {
        let problems = self.problems();
        let cannot_serve = problems.iter().any(|(word, _)| matches!(*word, "store_unavailable" | "audit_unavailable"));
        match path {
            "/live" => Page::json(StatusCode::OK, &json!({ "status": "alive" })),
            "/ready" if cannot_serve => Page::json(StatusCode::SERVICE_UNAVAILABLE, &json!({ "status": "not ready" })),
            "/ready" => Page::json(StatusCode::OK, &json!({ "status": "ready" })),
            "/health" => {
                let (code, word) = match (cannot_serve, problems.is_empty()) {
                    (true, _) => (StatusCode::SERVICE_UNAVAILABLE, "unhealthy"),
                    (false, false) => (StatusCode::OK, "degraded"),
                    (false, true) => (StatusCode::OK, "healthy"),
                };
                let problems: Vec<_> =
                    problems.iter().map(|(word, sentence)| json!({ "problem": word, "what": sentence })).collect();
                let deliveries = self.deliveries();
                let body = json!({ "status": word, "problems": problems, "deliveries": deliveries, "store": self.status().await });
                Page::json(code, &body)
            }
            "/metrics" => match self.status().await {
                Some(status) => {
                    let text = metrics(&status, &problems) + &delivered(&self.desk.states().borrow());
                    Page::text("text/plain; version=0.0.4; charset=utf-8", text)
                }
                None => Page::json(StatusCode::INTERNAL_SERVER_ERROR, &json!({ "error": "no status" })),
            },
            _ => Page::json(StatusCode::NOT_FOUND, &json!({ "error": "there are /live, /ready, /health, /metrics" })),
        }
    }
}

fn metrics(status: &Status, problems: &[(&'static str, String)]) -> String {
    let mut text = String::new();
    let mut gauge = |name: &str, help: &str, value: String| {
        let name = format!("dockflare_vault_{name}");
        text += &format!("# HELP {name} {help}\n# TYPE {name} gauge\n{name} {value}\n");
    };
    gauge("secrets", "Secrets that are not deleted.", status.secrets.to_string());
    gauge("versions", "Values that are kept.", status.versions.to_string());
    gauge("changes", "Transactions of the store so far.", status.change.to_string());
    gauge(
        "data_key_created_seconds",
        "When the data key was made, in seconds since 1970.",
        status.data_key_created.to_string(),
    );
    gauge("rotating", "1 while records are sealed anew.", u8::from(status.is_rotating).to_string());
    gauge("problems", "Things that are wrong, see /health.", problems.len().to_string());
    text
}

/// Metrics for each workload. A workload's name has no character that needs escaping.
fn delivered(states: &States) -> String {
    if states.is_empty() {
        return String::new();
    }
    let mut text = String::new();
    let mut gauge = |name: &str, help: &str, value: &dyn Fn(&State) -> i64| {
        let name = format!("dockflare_vault_delivery_{name}");
        text += &format!("# HELP {name} {help}\n# TYPE {name} gauge\n");
        for (workload, state) in states {
            text += &format!("{name}{{workload=\"{workload}\"}} {}\n", value(state));
        }
    };
    let version = |version: Option<u64>| version.and_then(|version| i64::try_from(version).ok()).unwrap_or(0);
    gauge("version", "Number of the set of files in place, 0 for none.", &|state| version(state.version));
    gauge("settled_version", "Number of the set that was dealt with, 0 for none.", &|state| version(state.settled));
    gauge("since_seconds", "When the set was put in place, in seconds since 1970, 0 for none.", &|state| {
        state.since.map_or(0, jiff::Timestamp::as_second)
    });
    gauge("up_to_date", "1 if the files are what they are to be, 0 if they are missing or stale.", &|state| {
        i64::from(state.condition == Condition::Delivered)
    });
    text
}

/// Answers `healthcheck`: the vault in this container works, or what is wrong with it.
///
/// # Errors
/// One line.
pub async fn check(address: Option<PageAddress>) -> Result<(), String> {
    let Some(address) = address else {
        return Err("the pages are switched off (health.port is 0): there is nobody to ask".to_owned());
    };
    let health = ask("the vault", address, "/health", CHECK_LIMIT).await?;
    match health["status"].as_str() {
        Some("healthy" | "degraded") => Ok(()),
        _ => Err(format!("the vault is unhealthy: {}", health["problems"])),
    }
}
