//! The vault's calls of Docker: look at a container, signal it, restart it, start it. Made by the vault through its
//! socket proxy, and by the proxy of Docker itself. A container is looked for by its name and acted upon by the id that
//! was seen: another one may have taken the name in between.

use std::time::Duration;

use bollard::models::{
    ContainerInspectResponse, ContainerStateStatusEnum as Status, HealthStatusEnum, RestartPolicyNameEnum,
};
use dockflare_engine::{Call, Client, DockerError, DockerHost, absent_is_none};
use jiff::Timestamp;

use crate::delivery::Signal;

const fn call(doing: &'static str) -> Call {
    Call {
        doing,
        grant: "CONTAINERS=1 and POST=1, or better, be the vault's own: dockflare-vault socket-proxy",
        own_grant: "the name of the container in RELOAD_CONTAINERS and the signal in RELOAD_SIGNALS; its log names the rule",
    }
}

const PING: Call = call("say that it is there");
const INSPECT: Call = call("inspect a container");
const KILL: Call = call("signal a container");
const RESTART: Call = call("restart a container");
const START: Call = call("start a container");

/// Longest time-out of a container's own that a restart waits for.
const MOST_GRACE: Duration = Duration::from_secs(600);

/// A container, as far as the vault looks at it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    /// Full id.
    pub id: String,
    /// Name, without the slash.
    pub name: String,
    /// What it is doing.
    pub state: RunState,
    /// When it was last started, by the clock of its host.
    pub started: Option<Timestamp>,
    /// What its own health check says, where it has one.
    pub health: Option<Health>,
    /// How often Docker's restart policy has started it since it was last started by somebody.
    pub restarts: i64,
    /// Whether Docker is to keep it running: it has a restart policy.
    pub is_kept: bool,
    /// Whether a directory of the host is bound into it: Docker refuses its start while one of them is missing.
    pub has_bind: bool,
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

/// The states, as Docker writes them.
const STATES: [(RunState, &str); 6] = [
    (RunState::Created, "created"),
    (RunState::Running, "running"),
    (RunState::Paused, "paused"),
    (RunState::Restarting, "restarting"),
    (RunState::Exited, "exited"),
    (RunState::Dead, "dead"),
];

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

impl RunState {
    /// As Docker writes it.
    pub fn as_str(self) -> &'static str {
        STATES.iter().find(|(state, _)| *state == self).map_or("", |(_, word)| word)
    }
}

const HEALTHS: [(Health, &str); 3] =
    [(Health::Starting, "starting"), (Health::Healthy, "healthy"), (Health::Unhealthy, "unhealthy")];

impl Seen {
    /// As Docker would write it: this, and nothing else.
    pub fn answer(&self) -> serde_json::Value {
        fn word<T: PartialEq>(table: &[(T, &'static str)], wanted: &T) -> &'static str {
            table.iter().find(|(value, _)| value == wanted).map_or("", |(_, word)| word)
        }
        let mut state = serde_json::json!({
            "Status": self.state.as_str(),
            "StartedAt": self.started.map_or_else(|| "0001-01-01T00:00:00Z".to_owned(), |at| at.to_string()),
        });
        if let Some(health) = self.health {
            state["Health"] = serde_json::json!({ "Status": word(&HEALTHS, &health) });
        }
        let policy = if self.is_kept { "always" } else { "no" };
        serde_json::json!({
            "Id": self.id, "Name": format!("/{}", self.name), "RestartCount": self.restarts, "State": state,
            "HostConfig": { "RestartPolicy": { "Name": policy } },
            "Mounts": if self.has_bind { vec![serde_json::json!({ "Type": "bind" })] } else { vec![] },
        })
    }
}

impl From<ContainerInspectResponse> for Seen {
    fn from(response: ContainerInspectResponse) -> Self {
        use RestartPolicyNameEnum as Policy;
        let state = response.state.unwrap_or_default();
        let policy = response.host_config.and_then(|host| host.restart_policy).and_then(|policy| policy.name);
        // So Docker writes that there was none.
        let started = state.started_at.and_then(|at| at.parse().ok()).filter(|at| *at > Timestamp::UNIX_EPOCH);
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
            started,
            health: state.health.and_then(|health| health.status).and_then(|status| match status {
                HealthStatusEnum::STARTING => Some(Health::Starting),
                HealthStatusEnum::HEALTHY => Some(Health::Healthy),
                HealthStatusEnum::UNHEALTHY => Some(Health::Unhealthy),
                HealthStatusEnum::EMPTY | HealthStatusEnum::NONE => None,
            }),
            restarts: response.restart_count.unwrap_or_default(),
            is_kept: matches!(policy, Some(Policy::ALWAYS | Policy::UNLESS_STOPPED | Policy::ON_FAILURE)),
            has_bind: response.mounts.into_iter().flatten().any(|mount| mount.typ.as_deref() == Some("bind")),
        }
    }
}

/// What the vault asks of Docker; behind it Docker, or a double of it.
pub trait Containers: Send + Sync {
    /// A container by name or id; `None` when there is none.
    fn look(&self, name: &str) -> impl Future<Output = Result<Option<Seen>, DockerError>> + Send;
    /// Sends a signal to the first process of the one with this id.
    fn signal(&self, id: &str, signal: Signal) -> impl Future<Output = Result<(), DockerError>> + Send;
    /// Restarts it, with the time-out that it was made with.
    fn restart(&self, id: &str) -> impl Future<Output = Result<(), DockerError>> + Send;
    /// Starts it; its running already is a success.
    fn start(&self, id: &str) -> impl Future<Output = Result<(), DockerError>> + Send;
}

/// Docker, or the vault's socket proxy before it.
#[derive(Debug)]
pub struct Docker(Client);

impl Docker {
    /// Nothing is asked yet.
    pub fn new(host: DockerHost) -> Self {
        Self(Client::new(host))
    }

    /// Whether Docker answers.
    ///
    /// # Errors
    /// When it does not.
    pub async fn ping(&self) -> Result<(), DockerError> {
        self.0.ping(PING).await
    }
}

impl Containers for Docker {
    async fn look(&self, name: &str) -> Result<Option<Seen>, DockerError> {
        Ok(absent_is_none(self.0.inspected(INSPECT, name).await)?.map(Seen::from))
    }

    async fn signal(&self, id: &str, signal: Signal) -> Result<(), DockerError> {
        self.0.kill(KILL, id, signal.as_str()).await
    }

    async fn restart(&self, id: &str) -> Result<(), DockerError> {
        self.0.restart(RESTART, id, None, MOST_GRACE).await
    }

    async fn start(&self, id: &str) -> Result<(), DockerError> {
        self.0.start(START, id).await
    }
}

/// Reads where Docker is: `unix://` and a path, or `tcp://` and an address.
///
/// # Errors
/// What to write.
pub fn host(text: &str) -> Result<DockerHost, String> {
    match text.split_once("://") {
        Some(("unix", path)) if path.starts_with('/') && !path.ends_with('/') => Ok(DockerHost::Unix(path.to_owned())),
        Some(("tcp", address)) if address.parse::<std::net::SocketAddr>().is_ok() || is_named(address) => {
            Ok(DockerHost::Http(address.to_owned()))
        }
        _ => Err("write unix:// and the absolute path of a socket, or tcp://host:port".to_owned()),
    }
}

fn is_named(address: &str) -> bool {
    address.split_once(':').is_some_and(|(host, port)| {
        let is_host = host.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_'));
        is_host && !host.is_empty() && port.parse::<u16>().is_ok_and(|port| port > 0)
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn seen(value: serde_json::Value) -> Seen {
        Seen::from(serde_json::from_value::<ContainerInspectResponse>(value).unwrap())
    }

    #[test]
    fn what_is_answered_is_read_as_the_same_and_holds_nothing_of_the_container_besides() {
        for (status, health, policy, mount) in [
            ("running", json!({ "Status": "healthy" }), "unless-stopped", "volume"),
            ("exited", json!(null), "no", "bind"),
            ("restarting", json!({ "Status": "unhealthy" }), "always", "tmpfs"),
            ("created", json!({ "Status": "starting" }), "on-failure", "bind"),
        ] {
            let one = seen(json!({
                "Id": "c1", "Name": "/app", "RestartCount": 2,
                "State": {
                    "Status": status, "StartedAt": "2026-01-31T10:00:00.123456789Z", "Error": "s3cret", "Health": health,
                },
                "HostConfig": { "RestartPolicy": { "Name": policy }, "Binds": ["/s3cret:/x"] },
                "Mounts": [{ "Type": mount, "Source": "/s3cret", "Destination": "/x" }],
                "Config": { "Env": ["A=s3cret"], "Cmd": ["s3cret"], "Labels": { "a": "s3cret" } },
            }));
            let answer = one.answer();
            assert!(!answer.to_string().contains("s3cret"), "{answer}");
            assert_eq!(seen(answer), one);
            assert_eq!((one.is_kept, one.has_bind), (policy != "no", mount == "bind"), "{one:?}");
        }
        assert_eq!(seen(json!({ "State": { "StartedAt": "0001-01-01T00:00:00Z" } })).started, None);
    }

    #[test]
    fn where_docker_is_is_a_socket_or_an_address() {
        assert_eq!(host("unix:///run/d.sock"), Ok(DockerHost::Unix("/run/d.sock".into())));
        assert_eq!(host("tcp://proxy:2375"), Ok(DockerHost::Http("proxy:2375".into())));
        assert_eq!(host("tcp://[::1]:2375"), Ok(DockerHost::Http("[::1]:2375".into())));
        for bad in
            ["", "/run/d.sock", "unix://d", "unix:///d/", "tcp://proxy", "tcp://:1", "tcp://a:b@c:1", "http://a:1"]
        {
            assert!(host(bad).is_err(), "{bad}");
        }
    }
}
