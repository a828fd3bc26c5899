//! Builds the workspace's programs when a test first asks for them.

use std::collections::HashMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

/// The programs whose package has another name.
const PACKAGES: [(&str, &str); 4] = [
    ("cloudflared", "cloudflared-stand-in"),
    ("workload", "cloudflared-stand-in"),
    ("credential-reader", "cloudflared-stand-in"),
    ("checker", "testkit"),
];

/// The programs that this process has built; `true` means the release profile.
static BUILT: Mutex<Option<HashMap<(String, bool), PathBuf>>> = Mutex::new(None);

/// Returns the workspace's folder.
///
/// # Panics
/// Never, as long as this crate is in `crates/`.
#[must_use]
pub fn workspace_root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).expect("crates/testkit lies in the workspace").to_owned()
}

/// Returns the path of one of the workspace's programs (`cloudflared`, `workload`, `dockflare-dev-master`,
/// `dockflare-agent`), statically linked like all its builds. Builds it if this process has not done so yet.
///
/// Blocks while Cargo builds. Cargo's lock serializes several test processes.
///
/// # Errors
/// When there is no such program or it does not compile.
pub fn binary(name: &str) -> Result<PathBuf> {
    remembered(name, false)
}

/// Like [`binary`], in the release profile: the program that is shipped.
///
/// # Errors
/// As for [`binary`].
pub fn release_binary(name: &str) -> Result<PathBuf> {
    remembered(name, true)
}

fn remembered(name: &str, release: bool) -> Result<PathBuf> {
    // Held during the build. A caller that needs the same program waits for it; one that needs another program would
    // wait for Cargo's lock anyway.
    let mut built = BUILT.lock().unwrap_or_else(PoisonError::into_inner);
    let built = built.get_or_insert_default();
    let key = (name.to_owned(), release);
    if let Some(path) = built.get(&key) {
        return Ok(path.clone());
    }
    let path = build(name, release).with_context(|| format!("cannot build {name}"))?;
    built.insert(key, path.clone());
    Ok(path)
}

fn build(name: &str, release: bool) -> Result<PathBuf> {
    let mut command = cargo_build(name, release);
    command.args(["--quiet", "--message-format=json-render-diagnostics"]).stderr(Stdio::inherit());
    let output = command.output().context("cannot run cargo")?;
    ensure!(output.status.success(), "cargo build --bin {name}: {}", output.status);
    let messages = String::from_utf8_lossy(&output.stdout);
    let path = messages.lines().filter_map(|line| executable(line, name)).next_back();
    path.context("cargo named no executable")
}

/// Returns the command that builds one of the workspace's programs as [`binary`] and [`release_binary`] do, but
/// shows Cargo's progress. Run it before them if a person is watching.
#[must_use]
pub fn cargo_build(name: &str, release: bool) -> Command {
    let package = PACKAGES.iter().find(|(binary, _)| *binary == name).map_or(name, |(_, package)| package);
    let mut command = cargo();
    command.args(["build", "-p", package, "--bin", name]).args(release.then_some("--release"));
    command
}

/// Returns a Cargo command in the workspace's folder, as a person would run it there: without the variables that
/// Cargo sets for the processes it runs, and without standard input.
#[must_use]
pub fn cargo() -> Command {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| env!("CARGO").into());
    let mut command = Command::new(cargo);
    command.current_dir(workspace_root()).stdin(Stdio::null());
    for (variable, _) in std::env::vars_os().filter(|(variable, _)| is_cargos_own(variable)) {
        command.env_remove(variable);
    }
    command
}

/// Returns the path of the program, if this line of Cargo's report names it.
fn executable(line: &str, name: &str) -> Option<PathBuf> {
    let message: Value = serde_json::from_str(line).ok()?;
    let is_it = message["reason"] == "compiler-artifact" && message["target"]["name"] == name;
    message["executable"].as_str().filter(|_| is_it).map(PathBuf::from)
}

/// Whether Cargo set the variable for the process it runs. Such a variable differs from one caller to the next:
/// passed on, it would make build scripts that read it run again.
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
