//! The agent's own types for containers, networks and events, and how they are read from and written for the Engine.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use bollard::models;
use dockflare_engine::{Health, RunState};

use super::dialect;
use crate::state::{Token, TunnelId};

/// A running container from a listing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Container {
    /// Full id.
    pub id: String,
    /// Name, without Docker's leading slash.
    pub name: String,
    /// All labels.
    pub labels: BTreeMap<String, String>,
    /// `running`, `paused`, …
    pub status: String,
    /// Reference of the image it was created from.
    pub image: String,
}

impl From<models::ContainerSummary> for Container {
    fn from(summary: models::ContainerSummary) -> Self {
        // A container has one name of its own. Further names, with a second slash, are links of other containers.
        let names = summary.names.unwrap_or_default();
        let name = names.iter().map(|name| name.trim_start_matches('/')).find(|name| !name.contains('/'));
        Self {
            id: summary.id.unwrap_or_default(),
            name: name.unwrap_or_default().to_owned(),
            labels: summary.labels.unwrap_or_default().into_iter().collect(),
            status: summary.state.map(|state| state.to_string()).unwrap_or_default(),
            image: summary.image.unwrap_or_default(),
        }
    }
}

/// The Engine's version and host.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Version {
    /// Its version, such as `28.2.2`.
    pub engine: String,
    /// The newest API version that it supports.
    pub api: String,
    /// Its operating system, such as `linux`.
    pub os: String,
    /// Its processor, such as `amd64`.
    pub arch: String,
    /// Version of its kernel.
    pub kernel: String,
    /// Whether it is Docker Desktop, whose containers resolve `host.docker.internal` without an entry.
    pub is_desktop: bool,
}

impl From<models::SystemVersion> for Version {
    fn from(version: models::SystemVersion) -> Self {
        Self {
            engine: version.version.unwrap_or_default(),
            api: version.api_version.unwrap_or_default(),
            os: version.os.unwrap_or_default(),
            arch: version.arch.unwrap_or_default(),
            kernel: version.kernel_version.unwrap_or_default(),
            is_desktop: version.platform.is_some_and(|platform| platform.name.contains("Docker Desktop")),
        }
    }
}

/// The networks of a running container, from a listing.
#[derive(Debug, Clone)]
pub(crate) struct Placed {
    /// All labels.
    pub(crate) labels: BTreeMap<String, String>,
    /// As in [`Inspected`].
    pub(crate) network_mode: String,
    /// Names of the networks that it is on.
    pub(crate) networks: BTreeSet<String>,
}

impl From<models::ContainerSummary> for Placed {
    fn from(summary: models::ContainerSummary) -> Self {
        let networks = summary.network_settings.and_then(|settings| settings.networks).unwrap_or_default();
        Self {
            labels: summary.labels.unwrap_or_default().into_iter().collect(),
            network_mode: summary.host_config.and_then(|host| host.network_mode).unwrap_or_default(),
            networks: networks.into_keys().collect(),
        }
    }
}

/// An event of a container or a network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// Nanoseconds since 1970 by the Engine's clock.
    pub at: i64,
    /// What happened.
    pub action: Action,
    /// Full id of the container or network.
    pub id: String,
    /// Its name, without the slash.
    pub name: String,
    /// Labels, and the other attributes that the Engine lists among them.
    pub attributes: BTreeMap<String, String>,
}

/// What happened, as finely as the agent distinguishes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// A container started.
    Start,
    /// A container ended, for whatever reason. `die` comes first; `stop` and `destroy` may follow it, or come alone.
    End,
    /// A container was renamed.
    Rename,
    /// Another event of a container, such as a pause or a health status.
    Container,
    /// An event of a network.
    Network,
}

impl Action {
    /// A short and stable name, for the metrics.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Start => "start",
            Self::End => "end",
            Self::Rename => "rename",
            Self::Container => "other",
            Self::Network => "network",
        }
    }
}

impl From<models::EventMessage> for Event {
    fn from(message: models::EventMessage) -> Self {
        let actor = message.actor.unwrap_or_default();
        let mut attributes: BTreeMap<_, _> = actor.attributes.unwrap_or_default().into_iter().collect();
        let name = attributes.remove("name").unwrap_or_default();
        let action = match (message.typ, message.action.as_deref().unwrap_or_default()) {
            (Some(models::EventMessageTypeEnum::NETWORK), _) => Action::Network,
            (_, name) => dialect::action(name),
        };
        let at = message.time_nano.or(message.time.map(|seconds| seconds.saturating_mul(1_000_000_000)));
        let name = name.trim_start_matches('/').to_owned();
        Self { at: at.unwrap_or_default(), action, id: actor.id.unwrap_or_default(), name, attributes }
    }
}

/// A container as an inspection shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inspected {
    /// Full id.
    pub id: String,
    /// Name, without the slash.
    pub name: String,
    /// Its state.
    pub state: RunState,
    /// When it was last started: RFC 3339, as the Engine writes it.
    pub started_at: String,
    /// Exit code of the last run; 0 before the first end.
    pub exit_code: i64,
    /// Whether the kernel killed it for lack of memory.
    pub out_of_memory: bool,
    /// How often Docker's restart policy has restarted it. A manual start resets it to 0.
    pub restarts: u64,
    /// Docker's message about a failed start.
    pub error: String,
    /// The result of its health check.
    pub health: Option<Health>,
    /// The result of the last run of the health check.
    pub last_check: Option<LastCheck>,
    /// Reference of the image it was created from.
    pub image: String,
    /// Entry point and command together, without the values of options that may be secret.
    pub command: Vec<String>,
    /// Names of its variables. The values may be secrets and are not kept.
    pub env_names: Vec<String>,
    /// The tunnel that it serves as a connector, according to a token in its environment or command.
    pub serves: Option<TunnelId>,
    /// Its labels.
    pub labels: HashMap<String, String>,
    /// Its place on each network, by name.
    pub networks: BTreeMap<String, Endpoint>,
    /// `host`, `none`, `container:<id>`, or the name of the network it was created on.
    pub network_mode: String,
    /// The TCP ports that its image or its creator declares.
    pub ports: BTreeSet<u16>,
    /// Whether it was created with an entry for `host.docker.internal`.
    pub knows_host: bool,
}

/// A container's place on a network.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Endpoint {
    /// Its address; empty while it does not run.
    pub address: String,
    /// The host's address there; empty while it does not run.
    pub gateway: String,
    /// Its names there, as in Docker's DNS.
    pub aliases: Vec<String>,
}

/// Alias of the tunnel container on a network that the agent connected it to. Docker stores it with the connection, so
/// the mark appears in the same instant. A connection made by hand never has it.
pub(crate) const JOINED: &str = "dockflare-agent-joined";

impl Endpoint {
    /// Whether the agent made this connection.
    pub(crate) fn is_joined(&self) -> bool {
        self.aliases.iter().any(|alias| alias == JOINED)
    }
}

/// The result of one run of the health check.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LastCheck {
    /// cloudflared answered that it is ready.
    Ready,
    /// cloudflared answered that it is not ready.
    NotReady,
    /// cloudflared did not answer in time.
    TimedOut,
    /// Docker could not run the check.
    Broken,
}

impl LastCheck {
    /// `tunnel ready` exits with 0 or 1. Docker records a timeout as exit code -1 and a text (Engine 20.10 to 29).
    fn of(result: &models::HealthcheckResult) -> Self {
        let output = result.output.as_deref().unwrap_or_default();
        match result.exit_code.unwrap_or(-1) {
            0 => Self::Ready,
            1 => Self::NotReady,
            _ if output.contains("exceeded timeout") => Self::TimedOut,
            _ => Self::Broken,
        }
    }
}

impl From<models::ContainerInspectResponse> for Inspected {
    fn from(response: models::ContainerInspectResponse) -> Self {
        let state = response.state.unwrap_or_default();
        let config = response.config.unwrap_or_default();
        let networks = response.network_settings.and_then(|settings| settings.networks).unwrap_or_default();
        let command: Vec<String> = config.entrypoint.into_iter().chain(config.cmd).flatten().collect();
        let env = config.env.unwrap_or_default();
        let health = state.health.unwrap_or_default();
        let host = response.host_config.unwrap_or_default();
        Self {
            id: response.id.unwrap_or_default(),
            name: response.name.unwrap_or_default().trim_start_matches('/').to_owned(),
            state: state.status.into(),
            started_at: state.started_at.unwrap_or_default(),
            exit_code: state.exit_code.unwrap_or_default(),
            out_of_memory: state.oom_killed.unwrap_or_default(),
            restarts: response.restart_count.and_then(|count| u64::try_from(count).ok()).unwrap_or_default(),
            error: state.error.unwrap_or_default(),
            health: Health::of(health.status),
            last_check: health.log.and_then(|tries| tries.last().map(LastCheck::of)),
            image: config.image.unwrap_or_default(),
            serves: tunnel_of(&env, &command),
            command: without_tokens(command),
            env_names: env.iter().filter_map(|entry| Some(entry.split_once('=')?.0.to_owned())).collect(),
            labels: config.labels.unwrap_or_default(),
            networks: networks.into_iter().map(|(name, endpoint)| (name, Endpoint::from(endpoint))).collect(),
            knows_host: host.extra_hosts.into_iter().flatten().any(|entry| entry.starts_with("host.docker.internal:")),
            network_mode: host.network_mode.unwrap_or_default(),
            ports: config
                .exposed_ports
                .unwrap_or_default()
                .iter()
                .filter_map(|port| port.strip_suffix("/tcp")?.parse().ok())
                .collect(),
        }
    }
}

impl From<models::EndpointSettings> for Endpoint {
    fn from(settings: models::EndpointSettings) -> Self {
        let mut aliases = settings.aliases.unwrap_or_default();
        // From Engine 25 on, this is the complete list, with the container's own name and host name.
        aliases.extend(settings.dns_names.unwrap_or_default());
        aliases.sort_unstable();
        aliases.dedup();
        Self {
            address: settings.ip_address.unwrap_or_default(),
            gateway: settings.gateway.unwrap_or_default(),
            aliases,
        }
    }
}

/// The tunnel of a token in the environment, or after `--token` in the command.
fn tunnel_of(env: &[String], command: &[String]) -> Option<TunnelId> {
    let in_env = env.iter().find_map(|entry| entry.strip_prefix("TUNNEL_TOKEN="));
    let in_command = || {
        let mut words = command.iter().map(String::as_str);
        words
            .by_ref()
            .find_map(|word| if word == "--token" { Some("") } else { word.strip_prefix("--token=") })
            .and_then(|text| if text.is_empty() { words.next() } else { Some(text) })
    };
    let text = in_command().or(in_env)?;
    Token::new(text).claims().ok().map(|claims| claims.tunnel)
}

/// The command without any part of a token.
fn without_tokens(command: Vec<String>) -> Vec<String> {
    let mut hide = false;
    let hidden = command.into_iter().map(|word| {
        let hidden = std::mem::replace(&mut hide, word == "--token");
        if hidden || word.starts_with("--token=") { "<token>".to_owned() } else { word }
    });
    hidden.collect()
}

#[cfg(test)]
impl Inspected {
    /// An empty container for tests to fill in.
    pub(crate) fn blank() -> Self {
        Self::from(models::ContainerInspectResponse::default())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::state::testing::token;

    fn inspected(response: serde_json::Value) -> Inspected {
        Inspected::from(serde_json::from_value::<models::ContainerInspectResponse>(response).unwrap())
    }

    #[test]
    fn the_tunnel_of_a_connector_is_read_from_its_environment_or_its_command_and_the_token_is_not_kept() {
        let token = token("t1");
        let commands = [
            (json!(["tunnel", "run"]), json!([format!("TUNNEL_TOKEN={token}")])),
            (json!(["tunnel", "run", "--token", token]), json!([])),
            (json!(["tunnel", "run", format!("--token={token}")]), json!(["TUNNEL_TOKEN=other"])),
        ];
        for (command, env) in commands {
            let seen = inspected(json!({ "Config": { "Entrypoint": ["cloudflared"], "Cmd": command, "Env": env } }));
            assert_eq!(seen.serves, Some(TunnelId("t1".into())), "{command}");
            assert!(!format!("{seen:?}").contains(&token), "{command}");
        }
        let other = inspected(json!({ "Config": { "Cmd": ["tunnel", "run", "--token"], "Env": ["TUNNEL_TOKEN=%"] } }));
        assert_eq!(other.serves, None);
    }

    #[test]
    fn the_last_try_of_a_health_check_tells_a_refusal_from_a_silence() {
        for (code, output, expected) in [
            (0, "", LastCheck::Ready),
            (1, "endpoint returned status code 503", LastCheck::NotReady),
            (-1, "Health check exceeded timeout (5s)", LastCheck::TimedOut),
            (-1, "OCI runtime exec failed: executable file not found in $PATH", LastCheck::Broken),
        ] {
            let log = json!([{ "ExitCode": 0, "Output": "" }, { "ExitCode": code, "Output": output }]);
            let seen = inspected(json!({ "State": { "Health": { "Status": "unhealthy", "Log": log } } }));
            assert_eq!((seen.health, seen.last_check), (Some(Health::Unhealthy), Some(expected)), "{output}");
        }
    }

    #[test]
    fn places_on_networks_and_declared_ports_are_read() {
        let seen = inspected(json!({
            "HostConfig": { "NetworkMode": "net" },
            "Config": { "ExposedPorts": { "80/tcp": {}, "53/udp": {} } },
            "NetworkSettings": { "Networks": { "net": {
                "IPAddress": "172.18.0.3", "Gateway": "172.18.0.1", "Aliases": ["web"], "DNSNames": ["web", "web-1"],
            } } },
        }));
        let place = &seen.networks["net"];
        assert_eq!((place.address.as_str(), place.gateway.as_str()), ("172.18.0.3", "172.18.0.1"));
        assert_eq!(place.aliases, ["web", "web-1"]);
        assert_eq!((seen.network_mode.as_str(), seen.ports), ("net", BTreeSet::from([80])));
    }
}
