//! What the agent knows of containers, in its own words, and how that is read from and written for the Engine.

use std::collections::{BTreeMap, HashMap};

use bollard::models;
use ring::digest;

use crate::state::Token;

/// A running container from a listing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Container {
    /// Full id.
    pub id: String,
    /// Name, without Docker's leading slash.
    pub name: String,
    /// All of its labels.
    pub labels: BTreeMap<String, String>,
    /// `running`, `paused`, …
    pub status: String,
}

impl From<models::ContainerSummary> for Container {
    fn from(summary: models::ContainerSummary) -> Self {
        // A container has one name of its own; further ones, with a second slash, are links of others.
        let names = summary.names.unwrap_or_default();
        let name = names.iter().map(|name| name.trim_start_matches('/')).find(|name| !name.contains('/'));
        Self {
            id: summary.id.unwrap_or_default(),
            name: name.unwrap_or_default().to_owned(),
            labels: summary.labels.unwrap_or_default().into_iter().collect(),
            status: summary.state.map(|state| state.to_string()).unwrap_or_default(),
        }
    }
}

/// Something that happened to a container or a network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// Nanoseconds since 1970 by the Engine's clock.
    pub at: i64,
    /// What happened.
    pub action: Action,
    /// Full id of what it happened to.
    pub id: String,
    /// Its name.
    pub name: String,
    /// Labels, and what else the Engine says beside them.
    pub attributes: BTreeMap<String, String>,
}

/// What happened, as far as the agent tells it apart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// A container began to run.
    Start,
    /// A container ended, whatever the cause: `die` comes first, `stop` and `destroy` may follow or be all there is.
    End,
    /// A container has another name.
    Rename,
    /// Something else about a container, such as a pause or a health status.
    Container,
    /// Something about a network.
    Network,
}

impl From<models::EventMessage> for Event {
    fn from(message: models::EventMessage) -> Self {
        let actor = message.actor.unwrap_or_default();
        let mut attributes: BTreeMap<_, _> = actor.attributes.unwrap_or_default().into_iter().collect();
        let name = attributes.remove("name").unwrap_or_default();
        let action = match (message.typ, message.action.as_deref().unwrap_or_default()) {
            (Some(models::EventMessageTypeEnum::NETWORK), _) => Action::Network,
            (_, "start") => Action::Start,
            (_, "die" | "stop" | "destroy") => Action::End,
            (_, "rename") => Action::Rename,
            _ => Action::Container,
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
    /// What it is doing.
    pub state: RunState,
    /// When it was last started, RFC 3339 as the Engine writes it.
    pub started_at: String,
    /// How it last ended; 0 while it never did.
    pub exit_code: i64,
    /// What Docker says of a start that failed.
    pub error: String,
    /// What its own health check says.
    pub health: Option<Health>,
    /// Reference of the image it was created from.
    pub image: String,
    /// Entrypoint and command together.
    pub command: Vec<String>,
    /// Names of the variables it was given; the values may be secrets and are not kept.
    pub env_names: Vec<String>,
    /// Its labels.
    pub labels: HashMap<String, String>,
    /// Its address by network; empty while it does not run.
    pub networks: BTreeMap<String, String>,
}

/// What a container is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RunState {
    /// Never started.
    Created,
    /// Running.
    Running,
    /// Frozen.
    Paused,
    /// Between two runs of Docker's restart policy.
    Restarting,
    /// Ended.
    Exited,
    /// Half removed.
    Dead,
}

/// What a container's own health check says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Health {
    /// Not tried often enough yet.
    Starting,
    /// Its last try succeeded.
    Healthy,
    /// Several tries failed.
    Unhealthy,
}

impl From<models::ContainerInspectResponse> for Inspected {
    fn from(response: models::ContainerInspectResponse) -> Self {
        use models::ContainerStateStatusEnum as Status;
        use models::HealthStatusEnum as HealthStatus;
        let state = response.state.unwrap_or_default();
        let config = response.config.unwrap_or_default();
        let networks = response.network_settings.and_then(|settings| settings.networks).unwrap_or_default();
        let command = config.entrypoint.into_iter().chain(config.cmd).flatten().collect();
        let env = config.env.unwrap_or_default();
        Self {
            id: response.id.unwrap_or_default(),
            name: response.name.unwrap_or_default().trim_start_matches('/').to_owned(),
            state: match state.status {
                Some(Status::RUNNING | Status::STOPPING) => RunState::Running,
                Some(Status::PAUSED) => RunState::Paused,
                Some(Status::RESTARTING) => RunState::Restarting,
                Some(Status::EXITED) => RunState::Exited,
                Some(Status::DEAD | Status::REMOVING) => RunState::Dead,
                Some(Status::CREATED | Status::EMPTY) | None => RunState::Created,
            },
            started_at: state.started_at.unwrap_or_default(),
            exit_code: state.exit_code.unwrap_or_default(),
            error: state.error.unwrap_or_default(),
            health: state.health.and_then(|health| health.status).and_then(|status| match status {
                HealthStatus::STARTING => Some(Health::Starting),
                HealthStatus::HEALTHY => Some(Health::Healthy),
                HealthStatus::UNHEALTHY => Some(Health::Unhealthy),
                HealthStatus::EMPTY | HealthStatus::NONE => None,
            }),
            image: config.image.unwrap_or_default(),
            command,
            env_names: env.iter().filter_map(|entry| Some(entry.split_once('=')?.0.to_owned())).collect(),
            labels: config.labels.unwrap_or_default(),
            networks: networks
                .into_iter()
                .map(|(name, endpoint)| (name, endpoint.ip_address.unwrap_or_default()))
                .collect(),
        }
    }
}

/// Everything a tunnel container is made of. Two specs with the same [`Spec::hash`] make the same container.
#[derive(Debug, Clone, PartialEq)]
pub struct Spec {
    /// Reference of the image.
    pub image: String,
    /// The one network it is on.
    pub network: String,
    /// The connector's token.
    pub token: Token,
    /// Labels that say whose it is.
    pub labels: BTreeMap<String, String>,
}

/// Label whose value is the hash of the spec.
pub const SPEC_LABEL: &str = "com.dockflare.agent.spec";

/// cloudflared's drain is 30 s unless told otherwise; a shorter time-out kills it in the middle.
pub const STOP_GRACE_SECONDS: u16 = 35;

/// Where cloudflared serves `/ready` and `/metrics`. Pinned, since left alone it moves when the port is taken.
pub const METRICS_PORT: u16 = 20241;

impl Spec {
    /// SHA-256 over everything that the container is made of, the token included, as lower-case hex.
    pub fn hash(&self) -> String {
        let plain = serde_json::to_string(&serde_json::to_value(self.plain_body()).unwrap_or_default());
        let digest = digest::digest(&digest::SHA256, plain.unwrap_or_default().as_bytes());
        digest.as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// The body of the create call.
    pub(super) fn body(&self) -> models::ContainerCreateBody {
        let mut body = self.plain_body();
        body.labels.get_or_insert_default().insert(SPEC_LABEL.to_owned(), self.hash());
        body
    }

    fn plain_body(&self) -> models::ContainerCreateBody {
        let words = |list: &[&str]| Some(list.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>());
        let seconds = |n: i64| Some(n * 1_000_000_000);
        models::ContainerCreateBody {
            image: Some(self.image.clone()),
            cmd: words(&["tunnel", "--no-autoupdate", "run"]),
            env: Some(vec![
                format!("TUNNEL_TOKEN={}", self.token.expose()),
                format!("TUNNEL_METRICS=0.0.0.0:{METRICS_PORT}"),
            ]),
            labels: Some(self.labels.clone().into_iter().collect()),
            stop_timeout: Some(STOP_GRACE_SECONDS.into()),
            // Docker asks cloudflared itself, so nobody needs the right to execute anything in the container.
            healthcheck: Some(models::HealthConfig {
                test: words(&[
                    "CMD",
                    "cloudflared",
                    "tunnel",
                    "--metrics",
                    &format!("127.0.0.1:{METRICS_PORT}"),
                    "ready",
                ]),
                interval: seconds(15),
                timeout: seconds(5),
                start_period: seconds(15),
                retries: Some(3),
                ..Default::default()
            }),
            host_config: Some(models::HostConfig {
                network_mode: Some(self.network.clone()),
                restart_policy: Some(models::RestartPolicy {
                    name: Some(models::RestartPolicyNameEnum::UNLESS_STOPPED),
                    ..Default::default()
                }),
                log_config: Some(models::HostConfigLogConfig {
                    typ: Some("json-file".to_owned()),
                    config: Some([("max-size", "10m"), ("max-file", "3")].map(|(k, v)| (k.into(), v.into())).into()),
                }),
                cap_drop: words(&["ALL"]),
                security_opt: words(&["no-new-privileges:true"]),
                readonly_rootfs: Some(true),
                // Threads count: Go makes one for each call that blocks.
                pids_limit: Some(512),
                ..Default::default()
            }),
            ..Default::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> Spec {
        Spec {
            image: "cloudflare/cloudflared:1".into(),
            network: "net".into(),
            token: Token::new("s3cret"),
            // Enough of them that an order left to chance would show.
            labels: ('a'..='p').map(|key| (key.to_string(), "1".to_owned())).collect(),
        }
    }

    #[test]
    fn the_hash_changes_with_every_part_and_with_nothing_else() {
        let base = spec().hash();
        assert_eq!(base, spec().hash());
        assert_eq!(base.len(), 64);
        let changes: [fn(&mut Spec); 4] = [
            |spec| spec.image.push('2'),
            |spec| spec.network.push('2'),
            |spec| spec.token = Token::new("other"),
            |spec| drop(spec.labels.insert("z".into(), "3".into())),
        ];
        for (number, change) in changes.into_iter().enumerate() {
            let mut changed = spec();
            change(&mut changed);
            assert_ne!(changed.hash(), base, "change {number}");
        }
    }

    #[test]
    fn the_container_can_do_as_little_as_cloudflared_needs() {
        let body = serde_json::to_value(spec().body()).unwrap();
        let host = &body["HostConfig"];
        assert_eq!(host["CapDrop"], serde_json::json!(["ALL"]));
        assert_eq!(host["SecurityOpt"], serde_json::json!(["no-new-privileges:true"]));
        assert_eq!(host["ReadonlyRootfs"], true);
        assert_eq!(host["RestartPolicy"]["Name"], "unless-stopped");
        assert_eq!(body["Cmd"], serde_json::json!(["tunnel", "--no-autoupdate", "run"]));
        for dangerous in ["Binds", "Mounts", "Privileged", "Devices", "CapAdd", "PidMode", "PortBindings"] {
            assert!(host.get(dangerous).is_none(), "{dangerous}");
        }
        assert_eq!(body["Labels"][SPEC_LABEL], spec().hash());
    }
}
