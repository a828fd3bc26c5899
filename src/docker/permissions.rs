//! Finds out what Docker, or a socket proxy in front of it, lets the agent do. It probes each call without an effect.
//!
//! It makes a call that reads as it is. A call that changes something names a container, network or image that cannot
//! exist, or has a body that Docker refuses before it acts: a JSON list instead of an object (read in Docker's source,
//! tried on Engine 20.10). Docker answers these with 400, 404, 500 or 503 and an explanation in JSON; a proxy or an
//! authorization plugin answers 403. The client library discards what distinguishes the two, so these few requests
//! bypass it.

use std::time::Duration;

use bollard::models;
use dockflare_engine::transport;
use futures_util::{StreamExt, stream};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::header::{CONTENT_TYPE, SERVER};
use hyper::{Method, Request};
use serde::Deserialize;
use tokio::time::timeout;

use super::error::*;
use super::{Docker, DockerError, Result, Version};
use crate::config::{DockerHost, ImageRef};

/// Time limit for one probe: Docker refuses most of them without a lookup.
const LIMIT: Duration = Duration::from_secs(5);
/// Time limit when Docker asks the registry, which may be slow.
const REGISTRY_LIMIT: Duration = Duration::from_secs(20);
/// Most bytes of an answer. The longest one lists one container.
const MAX_ANSWER_BYTES: usize = 1 << 20;
/// Probes at the same time: few enough for a small proxy.
const AT_ONCE: usize = 4;
/// The `Server` header of this project's socket proxy.
pub(crate) const OWN_PROXY: &str = "dockflare-socket-proxy";

/// The Engine, as far as it is known.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Engine {
    /// The answer to `GET /version`; `None` if a proxy refuses that call.
    pub(crate) version: Option<Version>,
    /// Whether this project's own socket proxy is in front of it, which lets through the agent's calls and no others.
    pub(crate) own_proxy: bool,
}

/// One call and whether it is let through.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Permission {
    /// A short and stable name.
    pub(crate) id: &'static str,
    /// What the call does.
    pub(crate) doing: &'static str,
    /// The variables of the common socket proxy that allow it.
    pub(crate) grant: &'static str,
    pub(crate) gate: Gate,
}

/// Whether a call is let through.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Gate {
    Open,
    /// A socket proxy or an authorization plugin refuses it.
    Closed,
    /// Unknown, and why.
    Unclear(String),
}

/// Whether an image's registry offers it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Registry {
    Has,
    /// The registry does not have it, or asks for a login; its message.
    HasNot(String),
    /// Docker cannot reach the registry, and why.
    Away(String),
    /// A proxy refuses the call.
    Closed,
}

/// A request without an effect. `{}` is a placeholder for a name that nothing has.
struct Probe {
    id: &'static str,
    call: Call,
    method: Method,
    path: &'static str,
    body: &'static str,
}

const fn probe(id: &'static str, call: Call, method: Method, path: &'static str, body: &'static str) -> Probe {
    Probe { id, call, method, path, body }
}

/// Not an object: Docker refuses it before it reads what is asked for.
const NOTHING: &str = "[]";

static NEEDED: [Probe; 16] = [
    probe("list", LIST, Method::GET, "/containers/json?limit=1", ""),
    probe("inspect", INSPECT, Method::GET, "/containers/{}/json", ""),
    probe("logs", LOGS, Method::GET, "/containers/{}/logs?stdout=true&tail=1", ""),
    // Events of one second of 1970: there are none, and the stream ends at once.
    probe("events", EVENTS, Method::GET, "/events?since=1&until=1", ""),
    probe("create", CREATE, Method::POST, "/containers/create", NOTHING),
    probe("start", START, Method::POST, "/containers/{}/start", ""),
    probe("stop", STOP, Method::POST, "/containers/{}/stop", ""),
    probe("restart", RESTART, Method::POST, "/containers/{}/restart", ""),
    probe("rename", RENAME, Method::POST, "/containers/{}/rename?name={}", ""),
    probe("remove", REMOVE, Method::DELETE, "/containers/{}", ""),
    probe("network", NETWORK, Method::GET, "/networks/{}", ""),
    probe("new_network", NEW_NETWORK, Method::POST, "/networks/create", NOTHING),
    probe("connect", CONNECT, Method::POST, "/networks/{}/connect", r#"{"Container":"{}"}"#),
    probe("disconnect", DISCONNECT, Method::POST, "/networks/{}/disconnect", r#"{"Container":"{}"}"#),
    probe("image", IMAGE, Method::GET, "/images/{}/json", ""),
    // No image's name has capital letters.
    probe("pull", PULL, Method::POST, "/images/create?fromImage=NOTHING&tag=none", ""),
];

/// The call that starts a program inside a container.
static EXEC: Probe = probe("exec", INSPECT, Method::POST, "/exec/{}/start", r#"{"Detach":true}"#);

/// Parts of the API that the agent does not need: the proxy's variable, and a path that leads nowhere.
const SURPLUS: [(&str, &str); 10] = [
    ("BUILD", "/build/{}"),
    ("COMMIT", "/commit/{}"),
    ("CONFIGS", "/configs/{}"),
    ("NODES", "/nodes/{}"),
    ("PLUGINS", "/plugins/{}/json"),
    ("SECRETS", "/secrets/{}"),
    ("SERVICES", "/services/{}"),
    ("SWARM", "/swarm/{}"),
    ("SYSTEM", "/system/{}"),
    ("VOLUMES", "/volumes/{}"),
];

/// The parts of an answer that are read.
#[derive(Debug, Clone, Default)]
struct Answer {
    status: u16,
    own_proxy: bool,
    body: Bytes,
}

impl Answer {
    /// Docker's message about a call that it does not carry out. `None` for a proxy's page.
    fn message(&self) -> Option<String> {
        #[derive(Deserialize)]
        struct Said {
            message: String,
        }
        Some(one_line(&serde_json::from_slice::<Said>(&self.body).ok()?.message))
    }

    fn gate(&self) -> Gate {
        let said = self.message();
        match (self.status, said) {
            (200..=399, _) => Gate::Open,
            // Docker itself answers none of the probes with these.
            (401 | 403 | 405, _) => Gate::Closed,
            // Some proxies hide what they refuse.
            (404, None) => Gate::Closed,
            (_, Some(_)) => Gate::Open,
            (status, None) => Gate::Unclear(format!("it answered {status}")),
        }
    }
}

impl Docker {
    /// Asks Docker for its version. Any answer counts, even a refusal.
    ///
    /// # Errors
    /// [`DockerError::Unreachable`] and [`DockerError::TimedOut`], or an answer that is neither a version nor a
    /// refusal.
    pub(crate) async fn engine(&self) -> Result<Engine> {
        let answer = self.ask(VERSION, LIMIT, Method::GET, "/version", "").await?;
        // The answer of a proxy that cannot reach Docker itself.
        if let (500..=599, Some(problem)) = (answer.status, answer.message()) {
            return Err(DockerError::Unreachable { call: VERSION, problem });
        }
        let version = match answer.gate() {
            Gate::Open => {
                Some(serde_json::from_slice::<models::SystemVersion>(&answer.body).map(Version::from).map_err(
                    |_| DockerError::Failed { call: VERSION, message: "what answers there is not Docker".to_owned() },
                )?)
            }
            Gate::Closed => None,
            Gate::Unclear(problem) => return Err(DockerError::Unreachable { call: VERSION, problem }),
        };
        Ok(Engine { version, own_proxy: answer.own_proxy })
    }

    /// Probes each call that the agent makes, in the order of its life. Changes nothing.
    pub(crate) async fn permissions(&self) -> Vec<Permission> {
        let asked = NEEDED.iter().map(async |probe| {
            let gate = self.gate(probe).await;
            Permission { id: probe.id, doing: probe.call.doing, grant: probe.call.grant, gate }
        });
        stream::iter(asked).buffered(AT_ONCE).collect().await
    }

    /// Probes whether the agent could start programs inside containers, which it never does. Changes nothing.
    pub(crate) async fn may_exec(&self) -> bool {
        self.gate(&EXEC).await == Gate::Open
    }

    /// Probes which parts of the API are open that the agent does not need, and gives their variables in the common
    /// socket proxy. Changes nothing.
    ///
    /// If all are open, there is no proxy.
    pub(crate) async fn surplus(&self) -> Surplus {
        let asked = SURPLUS.iter().map(async |(variable, path)| {
            let gate = self.gate(&probe("surplus", INSPECT, Method::GET, path, "")).await;
            (gate == Gate::Open).then_some(*variable)
        });
        let open: Vec<_> = stream::iter(asked).buffered(AT_ONCE).collect().await;
        let variables: Vec<_> = open.into_iter().flatten().collect();
        if variables.len() == SURPLUS.len() { Surplus::Everything } else { Surplus::Some(variables) }
    }

    /// Whether the image's registry has it, as Docker sees it. Pulls nothing. The agent itself never makes this call,
    /// so a proxy may well refuse it.
    ///
    /// # Errors
    /// When the call fails.
    pub(crate) async fn registry_has(&self, image: &ImageRef) -> Result<Registry> {
        let path = format!("/distribution/{image}/json");
        let answer = self.ask(IMAGE, REGISTRY_LIMIT, Method::GET, &path, "").await?;
        let from_docker = answer.message().filter(|said| !answer.own_proxy && !said.contains("denied by plugin"));
        Ok(match (answer.status, from_docker) {
            (200, _) => Registry::Has,
            (401 | 403 | 404, Some(said)) => Registry::HasNot(said),
            (401..=405, None) => Registry::Closed,
            (_, Some(said)) => Registry::Away(said),
            (status, None) => Registry::Away(format!("Docker answered {status}")),
        })
    }

    async fn gate(&self, probe: &Probe) -> Gate {
        // Use a fresh name each time, so that a caching proxy cannot answer.
        let nothing = format!("dockflare-agent-check-{:016x}", fastrand::u64(..));
        let fill = |text: &str| text.replace("{}", &nothing);
        match self.ask(probe.call, LIMIT, probe.method.clone(), &fill(probe.path), &fill(probe.body)).await {
            Ok(answer) => answer.gate(),
            Err(DockerError::TimedOut { limit, .. }) => {
                Gate::Unclear(format!("there was no answer within {} s", limit.as_secs()))
            }
            Err(error) => Gate::Unclear(format!("Docker {error}")),
        }
    }

    /// Sends one request on its own connection.
    async fn ask(&self, call: Call, limit: Duration, method: Method, path: &str, body: &str) -> Result<Answer> {
        let answered = timeout(limit, async {
            let asked = exchange(self.host(), method, path, body).await;
            asked.map_err(|problem| DockerError::Unreachable { call, problem })
        });
        let answer = answered.await.unwrap_or(Err(DockerError::TimedOut { call, limit }))?;
        self.seen_behind(answer.own_proxy);
        Ok(answer)
    }
}

/// The parts of the API that are open without need.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Surplus {
    /// Everything that was probed: there is no proxy in front of Docker.
    Everything,
    /// Those of these variables of the common proxy; ideally none.
    Some(Vec<&'static str>),
}

async fn exchange(host: &DockerHost, method: Method, path: &str, body: &str) -> std::result::Result<Answer, String> {
    let mut request = Request::builder().method(method).uri(path);
    if !body.is_empty() {
        request = request.header(CONTENT_TYPE, "application/json");
    }
    let request = request.body(Full::new(Bytes::from(body.to_owned()))).map_err(|error| error.to_string())?;
    let response = transport::send(host, request).await.map_err(|failed| failed.words())?;
    let status = response.status().as_u16();
    let own_proxy = response.headers().get(SERVER).is_some_and(|server| server == OWN_PROXY);
    let body = Limited::new(response.into_body(), MAX_ANSWER_BYTES).collect().await;
    let body = body.map_err(|error| format!("its answer could not be read to the end: {error}"))?;
    Ok(Answer { status, own_proxy, body: body.to_bytes() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn docker_explains_itself_and_a_proxy_does_not() {
        let answer = |status: u16, body: &'static str| Answer { status, own_proxy: false, body: body.into() };
        let words = r#"{"message":"No such container: x"}"#;
        let html = "<html><body><h1>403 Forbidden</h1></body></html>";
        for (status, body, expected) in [
            (200, "[]", Gate::Open),
            (304, "", Gate::Open),
            (404, words, Gate::Open),
            (400, words, Gate::Open),
            (500, words, Gate::Open),
            (503, r#"{"message":"This node is not a swarm manager."}"#, Gate::Open),
            (403, html, Gate::Closed),
            (403, r#"{"message":"authorization denied by plugin x"}"#, Gate::Closed),
            (405, "Method Not Allowed", Gate::Closed),
            (401, "", Gate::Closed),
            (404, "not found", Gate::Closed),
            (502, html, Gate::Unclear("it answered 502".to_owned())),
        ] {
            assert_eq!(answer(status, body).gate(), expected, "{status} {body}");
        }
    }

    #[test]
    fn nothing_that_is_asked_could_have_an_effect() {
        for probe in NEEDED.iter().chain([&EXEC]) {
            let harmless = probe.method == Method::GET
                || probe.path.contains("{}")
                || probe.body == NOTHING
                || probe.path.contains("fromImage=NOTHING&");
            assert!(harmless, "{}", probe.id);
        }
    }
}
