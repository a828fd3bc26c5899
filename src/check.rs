//! `dockflare-agent check`: tests each thing that the agent needs, and gives the remedy for each that fails.
//!
//! It changes nothing on this host, at the master or in Docker, and does not disturb an agent that runs beside it: it
//! locks nothing, fetches no command, registers nobody. It only makes calls without side effects:
//! [`crate::master::Master`]'s probe, Docker permission tests with names that nothing has, and a look at the data
//! folder. Mostly run as `docker exec dockflare-agent /dockflare-agent check`.
//!
//! The tests, in this order. A test that depends on a failed one is skipped, and the report says why:
//!
//! | group | what | in |
//! |---|---|---|
//! | configuration | every mistake in it | here |
//! | data folder | exists, can be written, has space; documents; which agent uses it | `folder` |
//! | master | DNS, TCP, TLS, answer, protocol, clock, Cloudflare Access, key; the running agent's concerns | `master` |
//! | Docker | answer, version, each call, what else is allowed, image, network | `docker` |
//! | tunnel | assigned, container, readiness, other connectors | `tunnel` |
//! | containers | the way from the tunnel to each labelled one | `tunnel` |
//!
//! The tests of the master and of Docker run side by side. Each wait has a limit, and so has each side as a whole.

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

/// Limit for all waits of one side together.
const SIDE_LIMIT: Duration = Duration::from_secs(60);

/// Outcome of one test.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// As the agent needs it.
    Pass,
    /// Not as the agent needs it; the remedy says what to do.
    Fail,
    /// The agent works with it, but it could be better.
    Warn,
    /// Not tested, or nothing to test; the detail says why.
    Skip,
}

/// One test and its outcome.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// Stable id for programs, such as `master.key`. Several findings may share one, such as one for each container.
    pub id: String,
    /// The group in the report.
    pub group: &'static str,
    /// What was tested, for people.
    pub title: String,
    /// The outcome.
    pub outcome: Outcome,
    /// What was found, in one line.
    pub detail: String,
    /// What to do about it, in one line. Present for each failure and each warning.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub remedy: Option<String>,
}

/// All findings.
#[derive(Debug, Clone, Default)]
pub struct Report {
    findings: Vec<Finding>,
}

impl Report {
    /// The findings in the order of the report.
    pub fn findings(&self) -> &[Finding] {
        &self.findings
    }

    /// Whether nothing failed. Warnings and skipped tests do not count.
    pub fn passed(&self) -> bool {
        self.count(Outcome::Fail) == 0
    }

    /// The report as one JSON document, for programs.
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

/// Collects the findings of one group after the other.
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

    /// Skips a call that a proxy refuses: its permissions already report the refusal. This project's own proxy has
    /// none, so a refusal by it counts as a failure.
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

/// The subcommand: runs all tests with the settings of this process and prints the report, as a JSON document with
/// `json`. Returns whether nothing failed.
pub async fn command(json: bool) -> bool {
    let report = run(Config::load()).await;
    let text = if json { format!("{:#}\n", report.to_json()) } else { report.to_text(Style::of_stdout()) };
    logging::print(&text).await;
    report.passed()
}

/// Runs all tests. Takes seconds if all is well, and about a minute if nothing answers.
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
        findings.warn("config", title, warning, "docs/settings.md says what it may be");
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
