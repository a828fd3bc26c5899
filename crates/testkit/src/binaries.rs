//! The workspace's programs, built when first asked for.

use std::collections::HashMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

/// The programs whose package is called otherwise.
const PACKAGES: [(&str, &str); 2] = [("cloudflared", "cloudflared-stand-in"), ("workload", "cloudflared-stand-in")];

/// Built already, by this process.
static BUILT: Mutex<Option<HashMap<String, PathBuf>>> = Mutex::new(None);

/// The workspace's folder.
///
/// # Panics
/// Never, while this crate lies in `crates/`.
#[must_use]
pub fn workspace_root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).expect("crates/testkit lies in the workspace").to_owned()
}

/// The path of one of the workspace's programs (`cloudflared`, `workload`, `dockflare-dev-master`,
/// `dockflare-agent`), static like all its builds. Builds it if this process has not done so yet.
///
/// Blocks while Cargo works. Cargo's own lock keeps several test processes apart.
///
/// # Errors
/// When there is no such program or it does not compile.
pub fn binary(name: &str) -> Result<PathBuf> {
    // Held while building: who wants the same program waits for it, who wants another would wait for
    // Cargo's lock anyway.
    let mut built = BUILT.lock().unwrap_or_else(PoisonError::into_inner);
    let built = built.get_or_insert_default();
    if let Some(path) = built.get(name) {
        return Ok(path.clone());
    }
    let path = build(name).with_context(|| format!("cannot build {name}"))?;
    built.insert(name.to_owned(), path.clone());
    Ok(path)
}

fn build(name: &str) -> Result<PathBuf> {
    let package = PACKAGES.iter().find(|(binary, _)| *binary == name).map_or(name, |(_, package)| package);
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| env!("CARGO").into());
    let mut command = Command::new(cargo);
    command
        .args(["build", "--quiet", "--message-format=json-render-diagnostics", "-p", package, "--bin", name])
        .current_dir(workspace_root())
        .stdin(Stdio::null())
        .stderr(Stdio::inherit());
    for (variable, _) in std::env::vars_os().filter(|(variable, _)| is_cargos_own(variable)) {
        command.env_remove(variable);
    }
    let output = command.output().context("cannot run cargo")?;
    ensure!(output.status.success(), "cargo build -p {package} --bin {name}: {}", output.status);
    let messages = String::from_utf8_lossy(&output.stdout);
    let path = messages.lines().filter_map(|line| executable(line, name)).next_back();
    path.context("cargo named no executable")
}

/// Where one line of Cargo's report says that the program is.
fn executable(line: &str, name: &str) -> Option<PathBuf> {
    let message: Value = serde_json::from_str(line).ok()?;
    let is_it = message["reason"] == "compiler-artifact" && message["target"]["name"] == name;
    message["executable"].as_str().filter(|_| is_it).map(PathBuf::from)
}

/// Whether Cargo set the variable for the process it runs. Passed on, it would differ from one caller to
/// the next, and build scripts that look at it would make Cargo build again.
fn is_cargos_own(variable: &OsString) -> bool {
    let Some(variable) = variable.to_str() else { return false };
    let prefixes = ["CARGO_PKG_", "CARGO_BIN_", "CARGO_MANIFEST_"];
    prefixes.iter().any(|prefix| variable.starts_with(prefix))
        || ["CARGO_CRATE_NAME", "CARGO_PRIMARY_PACKAGE", "CARGO_TARGET_TMPDIR"].contains(&variable)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_executable_in_cargos_report() {
        let line = r#"{"reason":"compiler-artifact","target":{"name":"workload"},"executable":"/t/debug/workload"}"#;
        assert_eq!(executable(line, "workload"), Some("/t/debug/workload".into()));
        assert_eq!(executable(line, "cloudflared"), None);
        assert_eq!(executable(r#"{"reason":"build-finished","success":true}"#, "workload"), None);
    }

    #[test]
    fn says_which_program_it_could_not_build() {
        assert!(workspace_root().join("Cargo.toml").exists());
        let error = format!("{:#}", binary("no-such-program").expect_err("there is none"));
        assert!(error.contains("no-such-program"), "{error}");
    }
}
