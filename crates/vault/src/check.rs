//! `check`: tries everything that the vault needs, without changing anything. For each failure it says what to do.

#![allow(clippy::disallowed_methods, reason = "a command does one thing and has nothing else to serve")]

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::Path;

use dockflare_engine::DockerError;
use serde_json::Value as Json;

use crate::client;
use crate::config::{Config, Pass};
use crate::delivery::Delivery;
use crate::docker::{Containers, Docker};
use crate::doors::admin::Request;
use crate::doors::deliver::try_directory;
use crate::run::Source;
use crate::{keyfile, launcher};

/// The findings, one line each.
#[derive(Default)]
struct Findings {
    text: String,
    fails: bool,
}

impl Findings {
    fn good(&mut self, what: &str) {
        let _ = writeln!(self.text, "✓ {what}");
    }

    fn note(&mut self, what: &str) {
        let _ = writeln!(self.text, "· {what}");
    }

    fn bad(&mut self, what: &str) {
        self.fails = true;
        let _ = writeln!(self.text, "✗ {what}");
    }
}

/// Whether the names of secrets are shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Names {
    /// For the operator.
    Shown,
    /// For whoever helps the operator.
    Hidden,
}

/// Returns the lines, and whether nothing fails. The caller has read the configuration already.
pub fn check(source: &Source, config: &Config, names: Names) -> (String, bool) {
    let mut found = Findings::default();
    let mut states = None;
    match source.file.exists() {
        true => found.good(&format!("configuration {}: {} grants", source.file.display(), config.grants.rows().len())),
        false => {
            found.note(&format!("no configuration at {}: the operator alone may do anything", source.file.display()))
        }
    }
    let key = keyfile::read(&config.master_key_file, keyfile::is_alone());
    match &key {
        Ok(key) => found.good(&format!("master key {}: {}", config.master_key_file.display(), key.id())),
        Err(error) => found.bad(&error.to_string()),
    }
    let socket_is_there = config.admin_socket.exists();
    let store_is_there = config.storage.file.exists();
    let folder = config.storage.file.parent().unwrap_or(Path::new("/"));
    if !socket_is_there && !store_is_there {
        // Asking would create a store.
        match nix::unistd::access(folder, nix::unistd::AccessFlags::W_OK) {
            Ok(()) => {
                found.note(&format!("no store at {} yet: the first start makes it", config.storage.file.display()))
            }
            Err(error) => found.bad(&format!(
                "{} cannot be written ({error}): mount a volume there that belongs to uid {}",
                folder.display(),
                nix::unistd::geteuid()
            )),
        }
    } else if let Ok(key) = key {
        let answer = client::ask(config, Request::Status);
        match answer.message {
            Some(message) => found.bad(&message),
            None => {
                let wanted = answer.data["master_key"].as_str().unwrap_or_default();
                let of = answer.data["secrets"].as_u64().unwrap_or_default();
                found.good(&format!("store {}: {of} secrets", config.storage.file.display()));
                let next = config.next_master_key_file.as_ref();
                let next = next.and_then(|file| keyfile::read(file, keyfile::is_alone()).ok()).map(|key| key.id());
                if wanted != key.id() && next.as_deref() == Some(wanted) {
                    found.note(&format!("the store was sealed with the master key {wanted} of encryption.next_master_key_file: put it in the place of {}", config.master_key_file.display()));
                } else if wanted != key.id() {
                    found.bad(&format!("the store was sealed with the master key {wanted}, and {} holds {}: put the new key there before the next start", config.master_key_file.display(), key.id()));
                }
                audit(&mut found, config);
                states = answer.data.get("deliveries").cloned();
            }
        }
    }
    for delivery in &config.deliveries {
        deliver(&mut found, delivery, states.as_ref(), names);
    }
    docker(&mut found, config);
    if let Some(folder) = &config.launcher {
        launcher(&mut found, folder, states.is_some());
    }
    match &config.storage.counter {
        Some(counter) if same_folder(counter, &config.storage.file) => found.note(
            "storage.change_counter lies beside the store: an older copy of the whole volume would not be noticed",
        ),
        Some(_) => found.good("an older copy of the store is noticed"),
        None => found.note(
            "an older copy of the store would not be noticed: set storage.change_counter to a file on another volume",
        ),
    }
    if let Some(Pass::Here(_)) = config.nats.as_ref().and_then(|nats| nats.pass.as_ref()) {
        found.note("nats.pass stands in the configuration: nats.pass_file keeps it out");
    }
    (found.text, !found.fails)
}

/// Reports what the running vault says of a workload. If no vault runs, tries its directory.
fn deliver(found: &mut Findings, delivery: &Delivery, states: Option<&Json>, names: Names) {
    let workload = &delivery.workload;
    let Some(states) = states else {
        return match try_directory(delivery) {
            Ok(()) => found.good(&format!("workload {workload}: {} can be used", delivery.directory.display())),
            Err(problem) => found.bad(&format!("workload {workload}: {problem}")),
        };
    };
    let state = &states[workload.as_str()];
    let version = match state["version"].as_u64() {
        Some(version) => format!("version {version} of its files is in place"),
        None => "it has no files".to_owned(),
    };
    let lines = |key: &str| {
        let lines: Vec<_> = state[key].as_array().into_iter().flatten().filter_map(Json::as_str).collect();
        match names {
            Names::Shown => lines.join("; "),
            Names::Hidden => format!("{} secrets", lines.len()),
        }
    };
    match state["condition"].as_str() {
        Some("delivered") => found.good(&format!("workload {workload}: {version}")),
        Some("pending") => found.note(&format!("workload {workload}: not looked at yet")),
        Some("missing") => found.bad(&format!("workload {workload}: {version}; missing: {}", lines("missing"))),
        Some("denied") => found.bad(&format!("workload {workload}: {version}; denied: {}", lines("denied"))),
        Some("put_back") => found.bad(&format!(
            "workload {workload}: {version}; version {} was put back: set its secrets again",
            state["refused"]
        )),
        Some(_) => found.bad(&format!(
            "workload {workload}: {version}; {}",
            state["problem"].as_str().unwrap_or("something is wrong with it")
        )),
        None => found.bad(&format!("workload {workload}: the running vault does not know it: see its log for what is wrong with the configuration")),
    }
}

/// Checks that Docker shows each container that the deliveries name. Tries no call that acts on one.
fn docker(found: &mut Findings, config: &Config) {
    let names: BTreeSet<_> = config.deliveries.iter().flat_map(|delivery| &delivery.containers).collect();
    if names.is_empty() {
        return;
    }
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return found.bad(&format!("Docker cannot be asked: {error}")),
    };
    let docker = Docker::new(config.docker.clone());
    for name in names {
        match runtime.block_on(docker.look(name.as_str())) {
            Ok(Some(seen)) => found.good(&format!("container {name}: {}", seen.state.as_str())),
            Ok(None) => found.note(&format!("container {name}: there is none of this name")),
            Err(DockerError::Forbidden { .. }) => found.bad(&format!(
                "container {name}: the socket proxy at {} refuses to show it: add it to the proxy's RELOAD_CONTAINERS",
                config.docker
            )),
            Err(error) if error.is_away() => {
                let remedy = "start the vault's socket proxy and mount its volume, or correct docker.host";
                return found.bad(&format!("docker.host {}: Docker {error}: {remedy}", config.docker));
            }
            Err(error) => found.bad(&format!("container {name}: Docker {error}")),
        }
    }
}

/// Checks that other containers can have the launcher of this version.
fn launcher(found: &mut Findings, folder: &Path, vault_runs: bool) {
    let shown = folder.display();
    let uid = nix::unistd::geteuid();
    if let Err(error) = nix::unistd::access(folder, nix::unistd::AccessFlags::W_OK) {
        return found.bad(&format!(
            "launcher.folder {shown} cannot be written ({error}): mount a volume there that belongs to uid {uid}"
        ));
    }
    match launcher::is_installed(folder) {
        Ok(true) => found.good(&format!("launcher.folder {shown}: the launcher of this version is there")),
        Ok(false) if vault_runs => found
            .bad(&format!("launcher.folder {shown}: the launcher is missing or another one: start the vault again")),
        Ok(false) => found.note(&format!("launcher.folder {shown}: the next start puts the launcher there")),
        Err(error) => found.bad(&format!("launcher.folder {shown} cannot be read: {error}")),
    }
}

fn audit(found: &mut Findings, config: &Config) {
    let answer = client::ask(config, Request::AuditVerify);
    let broken: Vec<_> = answer.data["broken"].as_array().into_iter().flatten().filter_map(Json::as_str).collect();
    match (answer.message, broken.is_empty()) {
        (Some(message), _) => found.bad(&message),
        (None, true) => found.good(&format!(
            "audit {}: {} lines, an unbroken chain",
            config.audit.file.display(),
            answer.data["lines"]
        )),
        (None, false) => broken.iter().for_each(|line| found.bad(line)),
    }
}

fn same_folder(one: &Path, other: &Path) -> bool {
    one.parent() == other.parent()
}
