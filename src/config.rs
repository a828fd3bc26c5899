//! The operator's settings: read once from the environment, validated as a whole, then never changed.
//!
//! [`Config::load`] reads the process environment and takes unset variables from a `.env` file. [`Config::from_vars`]
//! does the work on any list of pairs, so tests never touch the process environment. It reports every mistake at once
//! ([`ConfigErrors`]), before anything has been started or written.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

pub use dockflare_engine::{DockerHost, DockerTls};
use dockflare_host::disk;
use dockflare_host::logging;
pub use dockflare_host::logging::{LogConfig, LogFormat};
pub use dockflare_host::page::PageAddress;
use reqwest::Url;
use reqwest::header::HeaderValue;
use secrecy::{ExposeSecret, SecretString};
use serde::Deserialize;

mod check;
mod connector;
mod environment;
mod image;
mod names;
mod shown;
mod socket_proxy;
mod tls;
use check::{Check, health_page};
pub(crate) use connector::{MOST_PATIENCE, connector_option, patience};
use environment::{Environment, environment};
pub use image::ImageRef;
pub(crate) use shown::Settings;
pub use socket_proxy::{Listen, SocketProxyConfig};

/// The agent's whole configuration, valid by construction.
#[derive(Debug, Clone)]
pub struct Config {
    /// The master's address and the credentials for it.
    pub master: MasterConfig,
    /// Address of the Docker Engine, or of a socket proxy in front of it.
    pub docker_host: DockerHost,
    /// Settings of the tunnel container.
    pub tunnel: TunnelConfig,
    /// Time between two complete reports; 5 s to 1 h.
    pub report_interval: Duration,
    /// Time between two polls for commands; 1 s to 1 h, jittered by the poller.
    pub poll_interval: Duration,
    /// The name under which the agent registers; the master's UI may override it.
    pub display_name: Option<String>,
    /// Where `GET /health` and the other pages listen; `None` when switched off with port 0.
    pub health_page: Option<PageAddress>,
    /// The folder that holds identity and state.
    pub data_dir: PathBuf,
    /// `HOSTNAME`, which inside a container is the start of the container's own id.
    pub hostname: Option<String>,
    /// Log level, format and time zone.
    pub log: LogConfig,
}

/// The master's address and the credentials for each request.
#[derive(Debug, Clone)]
pub struct MasterConfig {
    /// Base address, `http` or `https`, without query, fragment or credentials; a path prefix is kept.
    pub url: Url,
    /// The agent key.
    pub key: Secret,
    /// The Cloudflare Access service token, if the master is behind Access.
    pub access: Option<AccessToken>,
}

/// A secret, given as a value or in a file that may be replaced while the agent runs.
#[derive(Debug, Clone)]
pub struct Secret {
    /// The value at start; a valid HTTP header value.
    pub value: SecretString,
    /// Where to reread it after a refusal.
    pub file: Option<PathBuf>,
}

/// A Cloudflare Access service token.
#[derive(Debug, Clone)]
pub struct AccessToken {
    /// `CF-Access-Client-Id`.
    pub client_id: SecretString,
    /// `CF-Access-Client-Secret`.
    pub client_secret: SecretString,
}

/// Settings of the tunnel container.
#[derive(Debug, Clone)]
pub struct TunnelConfig {
    /// Image of cloudflared.
    pub image: ImageRef,
    /// When to pull the image.
    pub pull: Pull,
    /// User-defined network that cloudflared and the workloads share.
    pub network: String,
    /// The only network on which cloudflared serves its metrics; on all of its networks if `None`.
    pub metrics_network: Option<String>,
    /// Name of the tunnel container.
    pub container_name: String,
    /// What happens to the container when the agent stops.
    pub on_exit: OnExit,
    /// How long the agent's own socket proxy keeps the container for an agent that comes back; 0 to 1 h, 0 for no
    /// lease.
    pub lease: Duration,
    /// More variables for cloudflared, under cloudflared's own names.
    pub options: BTreeMap<&'static str, String>,
    /// Whether the tunnel container can reach this host as `host.docker.internal`.
    pub host_gateway: bool,
    /// Whether to connect the tunnel container to networks of labelled containers that share none with it.
    pub auto_connect: bool,
}

impl TunnelConfig {
    /// Name of the container that replaces the tunnel container, until it has done so.
    pub fn successor_name(&self) -> String {
        successor_of(&self.container_name)
    }

    /// How long Docker waits for the tunnel container to exit: longer than cloudflared's drain.
    pub fn patience(&self) -> Duration {
        patience(&self.options)
    }

    /// Whether cloudflared may use only QUIC.
    pub(crate) fn only_quic(&self) -> bool {
        let set = |name: &str, value: &str| self.options.get(name).is_some_and(|set| set == value);
        set("TUNNEL_TRANSPORT_PROTOCOL", "quic") || set("TUNNEL_POST_QUANTUM", "true")
    }
}

/// Name of the container that replaces the one with this name, until it has done so.
pub(crate) fn successor_of(container_name: &str) -> String {
    format!("{container_name}-next")
}

/// When to pull the image of cloudflared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pull {
    /// When it is not on this host.
    Missing,
    /// Also at each start of the agent and each redeploy, since the tag may have moved.
    Always,
}

/// What happens to the tunnel container when the agent stops.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnExit {
    /// Drain, stop and remove it: behind the agent's own socket proxy after the lease, otherwise at once.
    Remove,
    /// Leave it as it is.
    Keep,
}

/// A usable configuration, and warnings about it.
#[derive(Debug)]
pub struct Loaded {
    /// The configuration.
    pub config: Config,
    /// Sentences to log as warnings once logging works.
    pub warnings: Vec<String>,
}

/// Everything that is wrong with the configuration, one sentence each.
#[derive(Debug, thiserror::Error)]
#[error("the configuration has {} error(s):\n  - {}", .0.len(), .0.join("\n  - "))]
pub struct ConfigErrors(pub Vec<String>);

/// The variables as they are spelled; `envy` maps the names, and the rules are below.
#[derive(Debug, Default, Deserialize)]
struct Raw {
    dockflare_master_url: Option<String>,
    dockflare_api_key: Option<String>,
    dockflare_api_key_file: Option<String>,
    cf_access_client_id: Option<String>,
    cf_access_client_secret: Option<String>,
    cf_access_client_secret_file: Option<String>,
    docker_host: Option<String>,
    docker_tls_verify: Option<String>,
    docker_cert_path: Option<String>,
    socket_proxy_listen: Option<String>,
    socket_proxy_docker_host: Option<String>,
    cloudflared_image: Option<String>,
    cloudflared_pull: Option<String>,
    cloudflared_network_name: Option<String>,
    cloudflared_metrics_network: Option<String>,
    tunnel_container_name: Option<String>,
    tunnel_on_exit: Option<String>,
    tunnel_lease_seconds: Option<String>,
    auto_connect_networks: Option<String>,
    cloudflared_protocol: Option<String>,
    cloudflared_region: Option<String>,
    cloudflared_edge_ip_version: Option<String>,
    cloudflared_post_quantum: Option<String>,
    cloudflared_loglevel: Option<String>,
    cloudflared_grace_period: Option<String>,
    cloudflared_host_gateway: Option<String>,
    report_interval_seconds: Option<String>,
    command_poll_interval_seconds: Option<String>,
    agent_display_name: Option<String>,
    log_level: Option<String>,
    log_format: Option<String>,
    tz: Option<String>,
    health_check_port: Option<String>,
    health_check_bind: Option<String>,
    dockflare_data_dir: Option<String>,
    hostname: Option<String>,
}

impl Config {
    /// Reads the process environment, and takes unset variables from a `.env` in the working folder.
    ///
    /// # Errors
    /// Everything that is wrong, at once.
    pub fn load() -> Result<Loaded, ConfigErrors> {
        let (mut loaded, warnings) = from_environment(Self::from_vars)?;
        loaded.warnings.splice(..0, warnings);
        Ok(loaded)
    }

    /// Reads only the address of the health page, for its clients.
    ///
    /// # Errors
    /// When the port or the address is invalid.
    pub fn load_health_page() -> Result<Option<PageAddress>, ConfigErrors> {
        let vars = environment().vars;
        let value = |name: &str| vars.get(name).map(|value| value.trim());
        health_page(value("HEALTH_CHECK_PORT"), value("HEALTH_CHECK_BIND")).map_err(ConfigErrors)
    }

    /// Validates a list of variables. An empty value counts as unset.
    pub fn from_vars(vars: impl IntoIterator<Item = (String, String)>) -> Result<Loaded, ConfigErrors> {
        let mut check = Check::default();
        let mut raw = Raw::read(vars, &mut check)?;

        let url = check.required(
            "DOCKFLARE_MASTER_URL",
            &raw.dockflare_master_url,
            "set it to the master's address, for example https://dockflare.example.com",
        );
        let url = url.and_then(|value| check.master_url(value));
        let key = check.secret("DOCKFLARE_API_KEY", raw.dockflare_api_key.take(), raw.dockflare_api_key_file.take());
        if key.is_none() && check.errors.iter().all(|error| !error.starts_with("DOCKFLARE_API_KEY")) {
            check.error("DOCKFLARE_API_KEY is not set: generate a key on the master's Agents page and set it, or name a file that holds it in DOCKFLARE_API_KEY_FILE");
        }
        let access_secret = check.secret(
            "CF_ACCESS_CLIENT_SECRET",
            raw.cf_access_client_secret.take(),
            raw.cf_access_client_secret_file.take(),
        );
        let access = match (raw.cf_access_client_id.take(), access_secret) {
            (None, None) => None,
            (Some(id), Some(secret)) if HeaderValue::from_str(&id).is_ok() => {
                Some(AccessToken { client_id: id.into(), client_secret: secret.value })
            }
            (Some(_), Some(_)) => {
                check.error("CF_ACCESS_CLIENT_ID holds characters that no HTTP header can carry: copy it again from Cloudflare Access");
                None
            }
            (Some(_), None) => {
                check.error("CF_ACCESS_CLIENT_ID is set without CF_ACCESS_CLIENT_SECRET (or CF_ACCESS_CLIENT_SECRET_FILE): set both or neither");
                None
            }
            (None, Some(_)) => {
                check.error("CF_ACCESS_CLIENT_SECRET is set without CF_ACCESS_CLIENT_ID: set both or neither");
                None
            }
        };
        let docker = raw.docker_host.as_deref().unwrap_or("unix:///var/run/docker.sock");
        let docker_host = check.docker_host("DOCKER_HOST", docker, &raw);
        let tunnel = tunnel(&mut check, &mut raw);
        let report_interval = check.seconds("REPORT_INTERVAL_SECONDS", raw.report_interval_seconds.take(), 30, 5);
        let poll_interval =
            check.seconds("COMMAND_POLL_INTERVAL_SECONDS", raw.command_poll_interval_seconds.take(), 10, 1);
        let health_page = health_page(raw.health_check_port.as_deref(), raw.health_check_bind.as_deref());
        let health_page = health_page.unwrap_or_else(|problems| {
            check.errors.extend(problems);
            None
        });
        let log = log(&mut check, &raw);

        match (url, key, docker_host, tunnel) {
            (Some(url), Some(key), Some(docker_host), Some(tunnel)) if check.errors.is_empty() => Ok(Loaded {
                config: Config {
                    master: MasterConfig { url, key, access },
                    docker_host,
                    tunnel,
                    report_interval,
                    poll_interval,
                    display_name: raw.agent_display_name,
                    health_page,
                    data_dir: PathBuf::from(raw.dockflare_data_dir.as_deref().unwrap_or(shown::DEFAULT_DATA_DIR)),
                    hostname: raw.hostname,
                    log,
                },
                warnings: check.warnings,
            }),
            _ => Err(ConfigErrors(check.errors)),
        }
    }
}

/// Applies `read` to the variables of this process. Returns its result with warnings about the environment, or
/// everything that is wrong with either.
fn from_environment<T>(
    read: impl FnOnce(BTreeMap<String, String>) -> Result<T, ConfigErrors>,
) -> Result<(T, Vec<String>), ConfigErrors> {
    let Environment { vars, mut errors, warnings } = environment();
    match read(vars) {
        Ok(loaded) if errors.is_empty() => Ok((loaded, warnings)),
        Ok(_) => Err(ConfigErrors(errors)),
        Err(ConfigErrors(more)) => {
            errors.extend(more);
            Err(ConfigErrors(errors))
        }
    }
}

impl Raw {
    /// An empty value counts as unset. Collects unknown variables and odd values in `check`.
    fn read(vars: impl IntoIterator<Item = (String, String)>, check: &mut Check) -> Result<Self, ConfigErrors> {
        let known = names::of::<Self>();
        let mut set = Vec::new();
        for (name, value) in vars {
            let value = value.trim();
            if value.is_empty() {
                continue;
            }
            if known.iter().any(|known| known.eq_ignore_ascii_case(&name)) {
                let value = check.unquoted(&name, value);
                set.push((name, value));
            } else {
                check.unknown(&name, &known);
            }
        }
        envy::from_iter(set).map_err(|error| ConfigErrors(vec![error.to_string()]))
    }
}

/// Settings of the tunnel container; `None` if its image is not a valid reference.
fn tunnel(check: &mut Check, raw: &mut Raw) -> Option<TunnelConfig> {
    let image = check.image(raw.cloudflared_image.as_deref().unwrap_or(DEFAULT_IMAGE));
    let pull = check.one_of(
        "CLOUDFLARED_PULL",
        raw.cloudflared_pull.as_deref(),
        &[("missing", Pull::Missing), ("always", Pull::Always)],
    );
    let network = check.name("CLOUDFLARED_NETWORK_NAME", raw.cloudflared_network_name.take(), "cloudflare-net");
    if ["host", "none", "bridge", "default"].contains(&network.as_str()) {
        check.error(format!("CLOUDFLARED_NETWORK_NAME={network}: is one of Docker's own networks, on which containers do not find each other by name; name a network of your own, for example cloudflare-net"));
    }
    let metrics_network = raw
        .cloudflared_metrics_network
        .take()
        .map(|name| check.name("CLOUDFLARED_METRICS_NETWORK", Some(name), "cloudflare-metrics"));
    if let Some(name) = metrics_network.as_deref() {
        let dockers_own = ["host", "none", "bridge", "default"].contains(&name);
        if dockers_own || name == network {
            let what = if dockers_own { "is one of Docker's own networks" } else { "is the tunnel's network as well" };
            check.error(format!("CLOUDFLARED_METRICS_NETWORK={name}: {what}; name one for agent and tunnel container alone, for example cloudflare-metrics, or leave it empty"));
        }
    }
    let container_name =
        check.name("TUNNEL_CONTAINER_NAME", raw.tunnel_container_name.take(), "dockflare-agent-tunnel");
    let on_exit = check.one_of(
        "TUNNEL_ON_EXIT",
        raw.tunnel_on_exit.as_deref(),
        &[("remove", OnExit::Remove), ("keep", OnExit::Keep)],
    );
    let lease = check.seconds("TUNNEL_LEASE_SECONDS", raw.tunnel_lease_seconds.take(), 60, 0);
    let auto_connect = check.yes_or_no("AUTO_CONNECT_NETWORKS", raw.auto_connect_networks.as_deref());
    let options = check.connector_options(
        &[
            ("CLOUDFLARED_PROTOCOL", raw.cloudflared_protocol.take()),
            ("CLOUDFLARED_REGION", raw.cloudflared_region.take()),
            ("CLOUDFLARED_EDGE_IP_VERSION", raw.cloudflared_edge_ip_version.take()),
            ("CLOUDFLARED_POST_QUANTUM", raw.cloudflared_post_quantum.take()),
            ("CLOUDFLARED_LOGLEVEL", raw.cloudflared_loglevel.take()),
        ],
        raw.cloudflared_grace_period.take(),
    );
    let host_gateway = match raw.cloudflared_host_gateway.as_deref() {
        None => true,
        given => check.yes_or_no("CLOUDFLARED_HOST_GATEWAY", given),
    };
    Some(TunnelConfig {
        image: image?,
        pull,
        network,
        metrics_network,
        container_name,
        on_exit,
        lease,
        options,
        host_gateway,
        auto_connect,
    })
}

fn log(check: &mut Check, raw: &Raw) -> LogConfig {
    let asked =
        logging::Asked { level: raw.log_level.as_deref(), format: raw.log_format.as_deref(), zone: raw.tz.as_deref() };
    let (config, problems) = logging::read(asked, "dockflare_agent");
    problems.into_iter().for_each(|problem| check.error(problem));
    config
}

/// The image that a fresh installation runs.
pub const DEFAULT_IMAGE: &str = "cloudflare/cloudflared:2026.8.2";

/// Maximum size of a secret's file. No HTTP header can be nearly as long, and a device file named by mistake has no
/// end.
const MAX_SECRET_BYTES: u64 = 64 << 10;

/// The path of a secret's file, unless it may be the secret itself, put there by mistake.
fn shown_file(path: &str) -> &str {
    if path.contains('/') {
        path
    } else {
        "(not shown: no path, and perhaps the secret itself; set the path of a file)"
    }
}

/// Reads a secret from its file and trims it. Reading may block, so the caller chooses how with `read`. Also returns
/// whether the file began with a byte order mark.
///
/// # Errors
/// A sentence without the content, if the file cannot be read or is empty.
fn read_secret_file(
    path: &Path,
    read: impl FnOnce(&Path, u64) -> Result<Vec<u8>, disk::Unread>,
) -> Result<(String, bool), String> {
    let bytes = read(path, MAX_SECRET_BYTES).map_err(|unread| match unread {
        disk::Unread::TooLong(most) => format!("is longer than {most} bytes, which is no secret"),
        other => other.to_string(),
    })?;
    let (text, marked) = text_of(bytes)?;
    let text = text.trim();
    let text =
        ['"', '\''].into_iter().find_map(|quote| text.strip_prefix(quote)?.strip_suffix(quote)).unwrap_or(text).trim();
    if text.is_empty() {
        return Err("is empty; put the secret into it, alone on one line".to_owned());
    }
    if text.contains(BYTE_ORDER_MARK) {
        return Err("has a byte order mark within the secret; write the file anew".to_owned());
    }
    Ok((text.to_owned(), marked))
}

/// Some editors begin a file with it. It is invisible, and `trim` does not remove it.
const BYTE_ORDER_MARK: char = '\u{feff}';
/// How messages describe a mark that was dropped.
const MARK: &str = "a byte order mark (U+FEFF, which no editor shows), which was dropped";

/// Decodes a text file and drops the byte order mark that some editors write. Also returns whether there was one.
fn text_of(bytes: Vec<u8>) -> Result<(String, bool), String> {
    if bytes.starts_with(&[0xff, 0xfe]) || bytes.starts_with(&[0xfe, 0xff]) {
        return Err("is UTF-16, as Windows PowerShell writes it; save it as UTF-8".to_owned());
    }
    let text = String::from_utf8(bytes).map_err(|_| "is not UTF-8 text".to_owned())?;
    Ok(match text.strip_prefix(BYTE_ORDER_MARK) {
        Some(rest) => (rest.to_owned(), true),
        None => (text, false),
    })
}

impl Secret {
    /// Rereads the file; `None` if there is none or the secret is unchanged. Blocks as long as the disk does.
    ///
    /// # Errors
    /// A sentence without the content, if the file cannot be used.
    pub fn reread(&self) -> Result<Option<SecretString>, String> {
        let Some(path) = &self.file else { return Ok(None) };
        // A byte order mark was already warned of at the start.
        let (value, _) = read_secret_file(path, disk::read)?;
        if HeaderValue::from_str(&value).is_err() {
            return Err("holds characters that no HTTP header can carry".to_owned());
        }
        Ok(Some(value).filter(|value| value != self.value.expose_secret()).map(Into::into))
    }
}

#[cfg(test)]
mod hostile;
#[cfg(test)]
mod tests;
