//! The vault's calls to Docker: inspect, signal, restart and start a container. The vault makes them through its socket
//! proxy, and the proxy makes them to Docker itself. Containers are looked up by name and acted on by the id that was
//! seen, because another container may have taken the name in between.

use std::time::Duration;

use bollard::models::{ContainerInspectResponse, RestartPolicyNameEnum};
use dockflare_engine::{Call, Client, DockerError, DockerHost, absent_is_none};
pub use dockflare_engine::{Health, RunState};
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

/// Longest time that a restart waits for the container's own time-out.
const MOST_GRACE: Duration = Duration::from_secs(600);

/// What the vault knows of a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    /// Full id.
    pub id: String,
    /// Name, without the slash.
    pub name: String,
    /// Its state.
    pub state: RunState,
    /// When it was last started, by the clock of its host.
    pub started: Option<Timestamp>,
    /// The result of its health check, if it has one.
    pub health: Option<Health>,
    /// How often its restart policy has started it since somebody last started it.
    pub restarts: i64,
    /// Whether it has a restart policy, so that Docker keeps it running.
    pub is_kept: bool,
    /// Whether it binds a directory of the host: Docker refuses to start it while such a directory is missing.
    pub has_bind: bool,
}

impl Seen {
    /// The answer as Docker would write it, with these fields and nothing else.
    pub fn answer(&self) -> serde_json::Value {
        let mut state = serde_json::json!({
            "Status": self.state.as_str(),
            "StartedAt": self.started.map_or_else(|| "0001-01-01T00:00:00Z".to_owned(), |at| at.to_string()),
        });
        if let Some(health) = self.health {
            state["Health"] = serde_json::json!({ "Status": health.as_str() });
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
        // Docker writes the year 1 for a container that was never started.
        let started = state.started_at.and_then(|at| at.parse().ok()).filter(|at| *at > Timestamp::UNIX_EPOCH);
        Self {
            id: response.id.unwrap_or_default(),
            name: response.name.unwrap_or_default().trim_start_matches('/').to_owned(),
            state: state.status.into(),
            started,
            health: Health::of(state.health.and_then(|health| health.status)),
            restarts: response.restart_count.unwrap_or_default(),
            is_kept: matches!(policy, Some(Policy::ALWAYS | Policy::UNLESS_STOPPED | Policy::ON_FAILURE)),
            has_bind: response.mounts.into_iter().flatten().any(|mount| mount.typ.as_deref() == Some("bind")),
        }
    }
}

/// What the vault asks of Docker. Tests use a double.
pub trait Containers: Send + Sync {
    /// Looks up a container by name or id; `None` if there is none.
    fn look(&self, name: &str) -> impl Future<Output = Result<Option<Seen>, DockerError>> + Send;
    /// Sends a signal to the first process of the container with this id.
    fn signal(&self, id: &str, signal: Signal) -> impl Future<Output = Result<(), DockerError>> + Send;
    /// Restarts it with its own time-out.
    fn restart(&self, id: &str) -> impl Future<Output = Result<(), DockerError>> + Send;
    /// Starts it. If it already runs, that is a success.
    fn start(&self, id: &str) -> impl Future<Output = Result<(), DockerError>> + Send;
}

/// Docker itself, or the vault's socket proxy in front of it.
#[derive(Debug)]
pub struct Docker(Client);

impl Docker {
    /// Makes a client. Asks nothing yet.
    pub fn new(host: DockerHost) -> Self {
        Self(Client::new(host))
    }

    /// Checks that Docker answers.
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

/// Reads the address of Docker: `unix://` and a path, or `tcp://` and an address.
///
/// # Errors
/// What to write instead.
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
