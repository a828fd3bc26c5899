//! Runs `dockflare-agent check` to its end and reads its findings.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use testkit::AgentProcess;

use super::{SOON, agent_binary};

/// The result of a check.
#[derive(Debug)]
pub(crate) struct Checked {
    pub(crate) code: Option<i32>,
    pub(crate) document: Value,
}

/// Runs the program with these arguments; returns its exit code and its output. The output must not contain `secrets`.
pub(crate) async fn run(
    args: &[&str],
    env: &[(String, String)],
    folder: &Path,
    secrets: &[&str],
) -> Result<(Option<i32>, String)> {
    let mut program = AgentProcess::spawn_with(&agent_binary(), args, env, folder)?;
    secrets.iter().for_each(|secret| program.plant(secret));
    let code = program.wait_exit(2 * SOON).await?.code();
    Ok((code, program.log()))
}

impl Checked {
    /// Runs `check --json`, which may print nothing but the document.
    pub(crate) async fn new(env: &[(String, String)], folder: &Path, secrets: &[&str]) -> Result<Self> {
        let (code, text) = run(&["check", "--json"], env, folder, secrets).await?;
        let document: Value = serde_json::from_str(&text).with_context(|| text.clone())?;
        let passed = document["ok"].as_bool().context("no verdict")?;
        ensure!(code == Some(i32::from(!passed)), "{code:?}: {document:#}");
        for finding in Self::all(&document) {
            let outcome = finding["outcome"].as_str().unwrap_or_default();
            let has_remedy = finding["remedy"].as_str().is_some_and(|remedy| !remedy.is_empty());
            ensure!(has_remedy == ["fail", "warn"].contains(&outcome), "{finding:#}");
            ensure!(finding["detail"].as_str().is_some_and(|detail| !detail.is_empty()), "{finding:#}");
        }
        Ok(Self { code, document })
    }

    fn all(document: &Value) -> impl Iterator<Item = &Value> {
        document["checks"].as_array().into_iter().flatten()
    }

    /// The findings with this id.
    pub(crate) fn findings(&self, id: &str) -> Vec<&Value> {
        Self::all(&self.document).filter(|finding| finding["id"] == id).collect()
    }

    /// Asserts that there is one finding with this id and that it has this outcome. Returns its detail and remedy as
    /// text.
    pub(crate) fn is(&self, id: &str, outcome: &str) -> Result<String> {
        let found = self.findings(id);
        ensure!(found.len() == 1 && found[0]["outcome"] == outcome, "{id} is not {outcome}: {:#}", self.document);
        Ok(format!("{} -> {}", found[0]["detail"].as_str().unwrap_or_default(), found[0]["remedy"]))
    }

    /// The ids of the findings with this outcome, in order.
    pub(crate) fn ids(&self, outcome: &str) -> Vec<&str> {
        let found = Self::all(&self.document).filter(|finding| finding["outcome"] == outcome);
        found.filter_map(|finding| finding["id"].as_str()).collect()
    }
}
