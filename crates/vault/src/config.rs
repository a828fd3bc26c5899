//! The settings: one YAML file. Environment variables can set every single value outside a list. Reports all problems
//! at once.

#![expect(clippy::disallowed_methods, reason = "read at a start, and by a thread of its own when the file changes")]

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use dockflare_engine::DockerHost;

use crate::audit::AuditConfig;
use crate::delivery::Delivery;
use crate::grant::{Grant, Grants, NamePattern, Operation};
use crate::principal::PrincipalPattern;
use crate::store::Location;

mod deliveries;
mod reader;
use reader::{Reader, Section};

/// Path of the file, unless `--config` or `CONFIG_FILE` names another.
pub const DEFAULT_FILE: &str = "/app/config/config.yaml";
/// Prefix of the environment variables: `storage.file` is `DOCKFLARE_VAULT_STORAGE_FILE`.
pub const ENV_PREFIX: &str = "DOCKFLARE_VAULT_";
/// Largest file to read. A thousand grants take a tenth of it.
const MAX_BYTES: u64 = 1 << 20;

/// All settings.
#[derive(Debug, Clone)]
pub struct Config {
    /// Database and counter.
    pub storage: Location,
    /// The file that holds the master key.
    pub master_key_file: PathBuf,
    /// The file with the next master key, if one is ready.
    pub next_master_key_file: Option<PathBuf>,
    /// Who may do what, including the operator's own row.
    pub grants: Grants,
    /// The audit.
    pub audit: AuditConfig,
    /// The socket for the command line.
    pub admin_socket: PathBuf,
    /// Address and port of the pages; `None` switches them off.
    pub health: Option<(IpAddr, u16)>,
    /// Which workload gets which files, sorted by workload.
    pub deliveries: Vec<Delivery>,
    /// Where the vault reaches its socket proxy, to reload containers whose files have changed.
    pub docker: DockerHost,
    /// A folder shared with other containers, into which the vault puts the launcher. `None` for no launcher.
    pub launcher: Option<PathBuf>,
    /// The connection to a NATS server, if the settings have such a section.
    pub nats: Option<Nats>,
}

/// How to reach a NATS server.
#[derive(Clone)]
pub struct Nats {
    /// `nats://host:4222`.
    pub url: String,
    /// User name.
    pub user: Option<String>,
    /// Password, from the settings themselves or from a file that they name.
    pub pass: Option<Pass>,
    /// The subject of requests, in the original's format.
    pub request_subject: String,
    /// The subject of replies, in the original's format.
    pub reply_subject: String,
}

/// Where a password is.
#[derive(Clone, PartialEq, Eq)]
pub enum Pass {
    /// In the configuration itself.
    Here(zeroize::Zeroizing<String>),
    /// In this file.
    File(PathBuf),
}

impl std::fmt::Debug for Nats {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Nats").field("url", &self.url).field("user", &self.user).finish_non_exhaustive()
    }
}

/// All problems with the settings, one line each.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}", .0.join("\n"))]
pub struct ConfigErrors(pub Vec<String>);

impl Config {
    /// Reads the file and the variables in `env`. A missing file counts as empty, unless it was named.
    ///
    /// # Errors
    /// [`ConfigErrors`], all at once.
    pub fn load(file: &Path, is_named: bool, env: &BTreeMap<String, String>) -> Result<Self, ConfigErrors> {
        let text = match std::fs::metadata(file) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound && !is_named => Ok(String::new()),
            Err(error) => Err(format!("cannot be read: {error}")),
            Ok(meta) if !meta.is_file() => Err("is no regular file".to_owned()),
            Ok(meta) if meta.len() > MAX_BYTES => Err(format!("has {} bytes, and 1 MiB is the most", meta.len())),
            Ok(_) => std::fs::read_to_string(file).map_err(|error| format!("cannot be read: {error}")),
        };
        match text {
            Ok(text) => Self::parse(&text, env),
            Err(problem) => Err(ConfigErrors(vec![format!("the configuration {} {problem}", file.display())])),
        }
    }

    /// Reads the settings from a text.
    ///
    /// # Errors
    /// [`ConfigErrors`], all at once.
    pub fn parse(text: &str, env: &BTreeMap<String, String>) -> Result<Self, ConfigErrors> {
        let mut reader = Reader::new(env);
        let mut top = reader.parse(text);

        let mut storage = reader.section(&mut top, "storage");
        let location = Location {
            file: reader.path(&mut storage, "file").unwrap_or_else(|| "/app/data/vault.redb".into()),
            counter: reader.path(&mut storage, "change_counter"),
        };
        reader.end(storage);

        let mut encryption = reader.section(&mut top, "encryption");
        let [named, also] = ["master_key", "master_key_file"].map(|key| reader.path(&mut encryption, key));
        if let (Some(named), Some(also)) = (&named, &also)
            && named != also
        {
            reader
                .problem("encryption.master_key and encryption.master_key_file name two files: leave one of them out");
        }
        let master_key_file = also.or(named).unwrap_or_else(|| "/app/config/master.key".into());
        let next_master_key_file = reader.path(&mut encryption, "next_master_key_file");
        if next_master_key_file.as_ref() == Some(&master_key_file) {
            reader.problem("encryption.next_master_key_file is the present key's file: name another one");
        }
        reader.end(encryption);

        let mut audit = reader.section(&mut top, "audit");
        let audit_config = AuditConfig {
            file: reader.path(&mut audit, "file").unwrap_or_else(|| "/app/data/audit.log".into()),
            max_bytes: reader.number(&mut audit, "max_bytes", 4096, 1 << 40).unwrap_or(10 << 20),
            keep: reader.number(&mut audit, "keep", 0, 1000).unwrap_or(10) as usize,
        };
        reader.end(audit);

        let mut admin = reader.section(&mut top, "admin");
        let admin_socket =
            reader.path(&mut admin, "socket").unwrap_or_else(|| "/run/dockflare-vault/admin.sock".into());
        reader.end(admin);

        let mut docker = reader.section(&mut top, "docker");
        let text = reader.text(&mut docker, "host").unwrap_or_else(|| crate::socket_proxy::DEFAULT_LISTEN.to_owned());
        let docker_host = crate::docker::host(&text);
        if let Err(error) = &docker_host {
            reader.problem(&format!("docker.host: {error}"));
        }
        reader.end(docker);

        let mut launcher = reader.section(&mut top, "launcher");
        let launcher_folder = reader.path(&mut launcher, "folder");
        reader.end(launcher);

        let mut health = reader.section(&mut top, "health");
        let bind = reader.text(&mut health, "bind").unwrap_or_else(|| "127.0.0.1".to_owned());
        let port = reader.number(&mut health, "port", 0, 65535).unwrap_or(8231) as u16;
        let address = bind.parse::<IpAddr>();
        if address.is_err() {
            reader.problem(&format!("health.bind: {bind:?} is no address: write one such as 127.0.0.1 or 0.0.0.0"));
        }
        reader.end(health);

        let nats = Self::nats(&mut reader, &mut top);
        let grants = Self::grants(&mut reader, &mut top);
        let deliveries = deliveries::read(&mut reader, &mut top);
        reader.end(top);
        let errors = reader.finish();
        match (address, docker_host, errors.is_empty()) {
            (Ok(address), Ok(docker), true) => Ok(Self {
                storage: location,
                master_key_file,
                next_master_key_file,
                grants: Grants::new(grants),
                audit: audit_config,
                admin_socket,
                health: (port != 0).then_some((address, port)),
                deliveries,
                docker,
                launcher: launcher_folder,
                nats,
            }),
            _ => Err(ConfigErrors(errors)),
        }
    }

    fn nats(reader: &mut Reader<'_>, top: &mut Section) -> Option<Nats> {
        let is_there = reader.has(top, "nats") || reader.has(top, "subjects");
        let mut nats = reader.section(top, "nats");
        let url = reader.text(&mut nats, "url").unwrap_or_else(|| "nats://nats-server:4222".to_owned());
        if !["nats://", "tls://", "ws://", "wss://"].iter().any(|scheme| url.starts_with(scheme)) || url.contains('@') {
            // Do not show the address: it may contain a password.
            reader.problem("nats.url: write nats://host:port, and user and password as nats.user and nats.pass_file");
        }
        let user = reader.text(&mut nats, "user");
        let pass = reader.secret(&mut nats, "pass").map(Pass::Here);
        let pass_file = reader.path(&mut nats, "pass_file").map(Pass::File);
        if pass.is_some() && pass_file.is_some() {
            reader.problem("nats.pass and nats.pass_file are both set: leave nats.pass out");
        }
        reader.end(nats);
        let mut subjects = reader.section(top, "subjects");
        let mut subject = |key, default: &str| {
            let subject = reader.text(&mut subjects, key).unwrap_or_else(|| default.to_owned());
            if let Err(error) = crate::principal::Principal::nats(&subject) {
                reader.problem(&format!("subjects.{key}: {error}"));
            }
            subject
        };
        let (request_subject, reply_subject) =
            (subject("request", "vault.requests"), subject("reply", "vault.replies"));
        reader.end(subjects);
        is_there.then_some(Nats { url, user, pass: pass.or(pass_file), request_subject, reply_subject })
    }

    fn grants(reader: &mut Reader<'_>, top: &mut Section) -> Vec<Grant> {
        let mut grants = vec![Grant::operator()];
        let mut seen: BTreeMap<(PrincipalPattern, NamePattern), String> = BTreeMap::new();
        for (list, who) in [("acl", "subject"), ("grants", "principal")] {
            for (at, mut row) in reader.rows(top, list).into_iter().enumerate() {
                let place = format!("{list}[{at}]");
                let principal = reader.required(&mut row, who).and_then(|text| {
                    let pattern = if list == "acl" { PrincipalPattern::nats(&text) } else { text.parse() };
                    pattern.map_err(|error| reader.problem(&format!("{place}.{who}: {error}"))).ok()
                });
                let operations: Vec<Operation> = reader
                    .words(&mut row, "operations")
                    .iter()
                    .filter_map(|word| {
                        word.parse().map_err(|error| reader.problem(&format!("{place}.operations: {error}"))).ok()
                    })
                    .collect();
                let names = match list {
                    "acl" => Some(NamePattern::Any),
                    _ => reader.text(&mut row, "names").unwrap_or_else(|| "*".to_owned()).parse().map_or_else(
                        |error: String| {
                            reader.problem(&format!("{place}.names: {error}"));
                            None
                        },
                        Some,
                    ),
                };
                reader.end(row);
                let (Some(principal), Some(names)) = (principal, names) else { continue };
                let key = (principal.clone(), names.clone());
                if let Some(other) = seen.insert(key, place.clone()) {
                    reader.problem(&format!(
                        "{other} and {place} are both for {principal} and {names}: which one counts cannot be told; make one row of them"
                    ));
                }
                grants.push(Grant { principal, operations, names });
            }
        }
        grants
    }
}

/// The sections that differ and take effect only at a start.
pub(crate) fn fixed_sections(one: &Config, other: &Config) -> Vec<&'static str> {
    let sections = |config: &Config| {
        let Config {
            storage,
            master_key_file,
            next_master_key_file,
            audit,
            admin_socket,
            health,
            launcher,
            docker,
            ..
        } = config;
        [
            ("storage", format!("{storage:?}")),
            ("encryption", format!("{master_key_file:?}{next_master_key_file:?}")),
            ("audit", format!("{audit:?}")),
            ("admin", format!("{admin_socket:?}")),
            ("health", format!("{health:?}")),
            ("launcher", format!("{launcher:?}")),
            ("docker", format!("{docker:?}")),
        ]
    };
    let pairs = sections(one).into_iter().zip(sections(other));
    pairs.filter(|(one, other)| one != other).map(|((name, _), _)| name).collect()
}

#[cfg(test)]
mod tests;
