//! `dockflare-agent check`: tries each thing that the agent needs, and says of each that fails what to do.
//!
//! It changes nothing, here, at the master or in Docker, and takes nothing from an agent that runs beside it: it
//! locks nothing, fetches no command, registers nobody. Of the doors it uses those calls that have no effect:
//! [`crate::master::Master`]'s probe, Docker's permissions asked with names that nothing has, and a look at the data
//! folder. It is mostly run as `docker exec dockflare-agent /dockflare-agent check`.
//!
//! What is tried, in this order; what rests on something that failed is not tried, and says because of what:
//!
//! | group | what | in |
//! |---|---|---|
//! | configuration | every mistake in it | here |
//! | data folder | there, can be written, has room; documents; who holds it | `folder` |
//! | master | DNS, TCP, TLS, answer and protocol, clock, Cloudflare Access, key; what the running agent complains of | `master` |
//! | Docker | answer, version, each call, what else is let through, image, network | `docker` |
//! | tunnel | assigned, container, readiness, other connectors | `tunnel` |
//! | containers | the way from the tunnel to each labelled one | `tunnel` |
//!
//! The master's side and Docker's run beside each other. Each wait has a limit, and each side one for all of it.

use std::time::Duration;

use serde::Serialize;
use serde_json::{Value, json};
use tokio::time::timeout;

use crate::config::{Config, ConfigErrors, Loaded};
use crate::docker::DockerError;
use crate::docker::Remedy as _;
use crate::{logging, state};

mod docker;
mod folder;
mod master;
mod print;
mod tunnel;
pub use print::Style;

/// For each of the two sides, all waits together.
const SIDE_LIMIT: Duration = Duration::from_secs(60);

/// What came of one thing that was tried.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// It is as the agent needs it.
    Pass,
    /// It is not; the remedy says what to do.
    Fail,
    /// The agent works with it, and it would be better otherwise.
    Warn,
    /// It was not tried, or there is nothing to try; the detail says why.
    Skip,
}

/// One thing that was tried.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// Stable, for programs: `master.key`. Several findings may share one, such as one for each container.
    pub id: String,
    /// Which part of the list it belongs to.
    pub group: &'static str,
    /// What was tried, for people.
    pub title: String,
    /// What came of it.
    pub outcome: Outcome,
    /// What was found; one line.
    pub detail: String,
    /// What to do about it; one line, for each that failed and each warning.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub remedy: Option<String>,
}

/// All that was tried.
#[derive(Debug, Clone, Default)]
pub struct Report {
    findings: Vec<Finding>,
}

impl Report {
    /// In the order in which it is shown.
    pub fn findings(&self) -> &[Finding] {
        &self.findings
    }

    /// Whether nothing failed. Warnings and what was not tried do not count.
    pub fn passed(&self) -> bool {
        self.count(Outcome::Fail) == 0
    }

    /// As one document, for programs.
    pub fn to_json(&self) -> Value {
        json!({
            "ok": self.passed(),
            "version": env!("CARGO_PKG_VERSION"),
            "passed": self.count(Outcome::Pass),
            "failed": self.count(Outcome::Fail),
            "not_tried": self.count(Outcome::Skip),
            "warnings": self.count(Outcome::Warn),
            "checks": self.findings,
        })
    }

    fn count(&self, outcome: Outcome) -> usize {
        self.findings.iter().filter(|finding| finding.outcome == outcome).count()
    }
}

/// Collects the findings of one part.
#[derive(Debug, Default)]
struct Section {
    group: &'static str,
    findings: Vec<Finding>,
}

impl Section {
    fn begin(&mut self, group: &'static str) {
        self.group = group;
    }

    fn pass(&mut self, id: &str, title: &str, detail: impl Into<String>) {
        self.add(id, title, Outcome::Pass, detail, None);
    }

    fn skip(&mut self, id: &str, title: &str, why: impl Into<String>) {
        self.add(id, title, Outcome::Skip, why, None);
    }

    fn fail(&mut self, id: &str, title: &str, detail: impl Into<String>, remedy: impl Into<String>) {
        self.add(id, title, Outcome::Fail, detail, Some(remedy.into()));
    }

    fn warn(&mut self, id: &str, title: &str, detail: impl Into<String>, remedy: impl Into<String>) {
        self.add(id, title, Outcome::Warn, detail, Some(remedy.into()));
    }

    /// What a proxy refuses is told among its permissions, and here only as not tried; this project's own has none.
    fn refused_or_failed(&mut self, id: &str, title: &str, error: &DockerError) {
        match error {
            DockerError::Forbidden { .. } if !error.is_of_own_proxy() => {
                self.skip(id, title, format!("Docker {error}"))
            }
            _ => self.fail(id, title, format!("Docker {error}"), error.advice()),
        }
    }

    fn add(&mut self, id: &str, title: &str, outcome: Outcome, detail: impl Into<String>, remedy: Option<String>) {
        let (id, title) = (id.to_owned(), title.to_owned());
        self.findings.push(Finding { id, group: self.group, title, outcome, detail: detail.into(), remedy });
    }
}

const CONFIGURATION: &str = "configuration";
const FOLDER: &str = "data folder";
const MASTER: &str = "master";
const DOCKER: &str = "Docker";
const TUNNEL: &str = "tunnel";
const CONTAINERS: &str = "containers";

/// The subcommand: tries everything with the settings of this process and prints the list, or with `json` one
/// document. Returns whether nothing failed.
pub async fn command(json: bool) -> bool {
    let report = run(Config::load()).await;
    let text = if json { format!("{:#}\n", report.to_json()) } else { report.to_text(Style::of_stdout()) };
    logging::print(&text).await;
    report.passed()
}

/// Tries everything. Takes seconds where all is well, and about a minute where nothing answers.
pub async fn run(loaded: Result<Loaded, ConfigErrors>) -> Report {
    let mut findings = Section::default();
    findings.begin(CONFIGURATION);
    let title = "settings";
    let loaded = match loaded {
        Ok(loaded) => loaded,
        Err(ConfigErrors(errors)) => {
            for error in errors {
                findings.fail("config", title, error, "mend it in the environment or .env, and create the agent anew");
            }
            for group in [FOLDER, MASTER, DOCKER, TUNNEL, CONTAINERS] {
                findings.begin(group);
                findings.skip(&group.to_lowercase().replace(' ', "_"), "all of it", "the configuration has errors");
            }
            return Report { findings: findings.findings };
        }
    };
    findings.pass("config", title, "valid");
    for warning in loaded.warnings {
        findings.warn("config", title, warning, "the README's table of settings says what it may be");
    }
    let config = loaded.config;
    let folder = state::peek_soon(config.data_dir.clone()).await;
    findings.begin(FOLDER);
    folder::look(&config, &folder, &mut findings);

    let (mut ours, mut theirs) = (Section::default(), Section::default());
    let master = async {
        let done = timeout(SIDE_LIMIT, master::look(&config, &folder, &mut ours)).await.is_ok();
        overdue(&mut ours, "master", done);
        master::running(&config, &mut ours).await;
    };
    let docker = async {
        let done = timeout(SIDE_LIMIT, docker::look(&config, &folder, &mut theirs)).await.is_ok();
        overdue(&mut theirs, "docker", done);
    };
    tokio::join!(master, docker);
    let all = [findings.findings, ours.findings, theirs.findings];
    Report { findings: all.into_iter().flatten().collect() }
}

fn overdue(section: &mut Section, id: &str, done: bool) {
    if !done {
        let detail = format!("not done after {} s, given up", SIDE_LIMIT.as_secs());
        section.fail(id, "the rest", detail, "try again; something there answers very slowly");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn each_mistake_of_the_configuration_fails_and_the_rest_says_why_it_was_not_tried() {
        let vars = [("DOCKFLARE_MASTER_URL", "ftp://master"), ("TZ", "Mars/Olympus")];
        let loaded = Config::from_vars(vars.map(|(name, value)| (name.to_owned(), value.to_owned())));
        let report = run(loaded).await;
        let failed: Vec<_> = report.findings().iter().filter(|f| f.outcome == Outcome::Fail).collect();
        assert_eq!(failed.len(), 3, "{failed:#?}");
        assert!(failed.iter().all(|finding| finding.remedy.is_some() && finding.group == CONFIGURATION));
        let skipped: Vec<_> = report.findings().iter().filter(|f| f.outcome == Outcome::Skip).collect();
        let ids: Vec<_> = skipped.iter().map(|finding| finding.id.as_str()).collect();
        assert_eq!(ids, ["data_folder", "master", "docker", "tunnel", "containers"]);
        assert!(!report.passed());
        assert_eq!(report.to_json()["not_tried"], 5);
    }
}
