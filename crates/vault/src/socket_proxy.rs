//! `dockflare-vault socket-proxy`: stands between the vault and the Docker socket. It lets the vault inspect the
//! containers of `RELOAD_CONTAINERS`, send them a signal of `RELOAD_SIGNALS`, restart them and start them.
//!
//! It is a second process of the same program, meant for a container of its own. It holds the Docker socket and has
//! neither network nor key nor store. Whoever takes over the vault can signal, restart and start these containers, and
//! nothing more. [`dockflare_engine::proxy`] reads and answers requests, as it does for the agent's proxy. `plan` is
//! a pure function from a request to one of a closed set of calls.
//!
//! A call that acts on a container names its full id. The proxy looks the container up at that moment, and the
//! container must then have one of the listed names. So the call touches neither a container that has lost its name nor
//! another one that has taken it.

use std::collections::{BTreeMap, BTreeSet};
use std::str::FromStr;

use dockflare_engine::proxy::listen::{Listen, Listener, accept_all, leave, openable};
use dockflare_engine::proxy::{Answer, Failure, Head, Planned, Proxy, Refusal, Refusals, Service};
use dockflare_engine::{DockerHost, orphaned};
use tokio_util::sync::CancellationToken;
use tracing::{error, info};

use crate::delivery::{ContainerName, SIGNALS, Signal};
use crate::docker::{Containers, Docker, Seen, host};

mod plan;
use plan::{Call, Policy, Subject};

/// Where the proxy listens by default, and where the vault asks by default.
pub const DEFAULT_LISTEN: &str = "unix:///run/dockflare/docker.sock";
const DEFAULT_DOCKER: &str = "unix:///var/run/docker.sock";

/// The settings, all from the environment. The proxy does not read the configuration with its grants.
#[derive(Debug, Clone)]
pub struct ProxyConfig {
    /// Where the vault connects.
    pub listen: Listen,
    /// Where Docker listens.
    pub docker: DockerHost,
    /// What the vault may do.
    policy: Policy,
}

impl ProxyConfig {
    /// Reads the settings; an empty value counts as unset.
    ///
    /// # Errors
    /// All problems, one line each.
    pub fn read(env: &BTreeMap<String, String>) -> Result<Self, Vec<String>> {
        let mut problems = vec![];
        let given = |name: &str| env.get(name).map(|value| value.trim()).filter(|value| !value.is_empty());
        let listen = match given("SOCKET_PROXY_LISTEN").unwrap_or(DEFAULT_LISTEN).split_once("://") {
            Some(("unix", path)) if path.starts_with('/') && !path.ends_with('/') => {
                Some(Listen::Unix(path.to_owned()))
            }
            _ => {
                problems.push(
                    "SOCKET_PROXY_LISTEN: write unix:// and the absolute path of the socket that it is to make"
                        .to_owned(),
                );
                None
            }
        };
        let docker = host(given("SOCKET_PROXY_DOCKER_HOST").unwrap_or(DEFAULT_DOCKER));
        let docker = docker.map_err(|error| problems.push(format!("SOCKET_PROXY_DOCKER_HOST: {error}"))).ok();
        if let (Some(Listen::Unix(own)), Some(DockerHost::Unix(docker))) = (&listen, &docker)
            && own == docker
        {
            problems.push(format!("SOCKET_PROXY_LISTEN=unix://{own}: is Docker's own socket; name another path"));
        }
        let containers = words::<ContainerName>("RELOAD_CONTAINERS", given("RELOAD_CONTAINERS"), &mut problems);
        if given("RELOAD_CONTAINERS").is_none() {
            problems.push(
                "RELOAD_CONTAINERS is missing: name the containers that the vault may signal and restart, with commas between them"
                    .to_owned(),
            );
        }
        let signals = match given("RELOAD_SIGNALS") {
            None => SIGNALS.to_vec(),
            named => words::<Signal>("RELOAD_SIGNALS", named, &mut problems),
        };
        match (listen, docker) {
            (Some(listen), Some(docker)) if problems.is_empty() => {
                let policy = Policy { containers: containers.into_iter().collect(), signals };
                Ok(Self { listen, docker, policy })
            }
            _ => Err(problems),
        }
    }
}

/// Parses words with commas or white space between them.
fn words<T: FromStr<Err = String>>(name: &str, text: Option<&str>, problems: &mut Vec<String>) -> Vec<T> {
    let words = text.unwrap_or_default().split(|c: char| c == ',' || c.is_whitespace()).filter(|word| !word.is_empty());
    words.filter_map(|word| word.parse().map_err(|error| problems.push(format!("{name}: {error}"))).ok()).collect()
}

/// What the vault may ask for, and the Docker that does it.
#[derive(Debug)]
struct VaultProxy<C> {
    docker: C,
    policy: Policy,
}

/// What else the proxy needs of Docker.
trait Pings: Containers {
    fn ping(&self) -> impl Future<Output = Result<(), dockflare_engine::DockerError>> + Send;
}

impl Pings for Docker {
    async fn ping(&self) -> Result<(), dockflare_engine::DockerError> {
        Docker::ping(self).await
    }
}

impl<C: Pings> Proxy for VaultProxy<C> {
    const PROGRAM: &str = "dockflare-vault";
    const SERVER: &str = "dockflare-vault-socket-proxy";
    type Call = Call;
    type Held = ();

    fn admits(&self, head: &Head) -> Result<(), Refusal> {
        plan::admits(head).map(drop)
    }

    fn plan(&self, head: &Head, _: &[u8]) -> Result<Planned<Call>, Refusal> {
        plan::plan(&self.policy, head)
    }

    async fn hold(&self, _: &Call) {}

    async fn perform(&self, call: Call) -> Result<Answer, Failure> {
        Ok(match call {
            Call::Ping => {
                self.docker.ping().await?;
                Answer::Bytes("text/plain; charset=utf-8", b"OK".to_vec())
            }
            Call::Inspect(subject) => Answer::Json(200, self.found(&subject).await?.answer()),
            Call::Kill { id, signal } => {
                let seen = self.found(&Subject::Id(id)).await?;
                self.docker.signal(&seen.id, signal).await?;
                Answer::Done
            }
            Call::Restart(id) => {
                let seen = self.found(&Subject::Id(id)).await?;
                self.docker.restart(&seen.id).await?;
                Answer::Done
            }
            Call::Start(id) => {
                let seen = self.found(&Subject::Id(id)).await?;
                self.docker.start(&seen.id).await?;
                Answer::Done
            }
        })
    }
}

impl<C: Pings> VaultProxy<C> {
    /// Finds the container that is meant, if its name is on the list at this moment.
    async fn found(&self, subject: &Subject) -> Result<Seen, Failure> {
        let (Subject::Name(asked) | Subject::Id(asked)) = subject;
        let seen = self.docker.look(asked).await?.filter(|seen| match subject {
            // Docker accepts the beginning of an id as a name, and a name may look like an id.
            Subject::Name(name) => seen.name == *name,
            Subject::Id(id) => seen.id == *id,
        });
        match seen {
            Some(seen) if self.policy.has(&seen.name) => Ok(seen),
            Some(_) => Err(Failure::Refused("container_name")),
            None => Err(Failure::Absent(asked.clone())),
        }
    }
}

/// Why the proxy does not run.
#[derive(Debug, thiserror::Error)]
pub enum ProxyError {
    /// It cannot listen.
    #[error("{0}")]
    Listen(String),
    /// Docker has made its socket anew, and the mounted one is dead forever.
    #[error(
        "the Docker socket {0} is dead: the daemon has made a new one, and the one that was mounted leads nowhere; ending, so that a restart mounts the new one"
    )]
    Orphaned(String),
}

impl ProxyError {
    /// 64 for settings, 75 if a restart helps.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Listen(_) => 64,
            Self::Orphaned(_) => 75,
        }
    }
}

/// Serves until `shutdown`.
///
/// # Errors
/// [`ProxyError`]
pub async fn run(config: ProxyConfig, shutdown: CancellationToken) -> Result<(), ProxyError> {
    let listener = Listener::bind("SOCKET_PROXY_LISTEN", &config.listen).await.map_err(ProxyError::Listen)?;
    let words = |words: BTreeSet<&str>| words.into_iter().collect::<Vec<_>>().join(",");
    info!(
        version = env!("CARGO_PKG_VERSION"),
        listen = %config.listen,
        docker = %config.docker,
        containers = words(config.policy.containers.iter().map(ContainerName::as_str).collect()),
        signals = words(config.policy.signals.iter().map(|signal| signal.as_str()).collect()),
        "dockflare-vault socket-proxy starts"
    );
    if let DockerHost::Unix(path) = &config.docker
        && let Err(problem) = openable(path, "SOCKET_PROXY_DOCKER_HOST").await
    {
        error!("the Docker socket {path} cannot be opened: {problem}");
    }
    let orphaned = orphaned(config.docker.clone());
    let proxy = VaultProxy { docker: Docker::new(config.docker), policy: config.policy };
    let service = std::sync::Arc::new(Service { proxy, refusals: Refusals::default() });
    let (connections, orphan) = accept_all(&listener, &service, orphaned, &shutdown).await;
    if let Listen::Unix(path) = &config.listen {
        leave(path);
    }
    drop(connections);
    info!("dockflare-vault socket-proxy stopped");
    orphan.map_or(Ok(()), |path| Err(ProxyError::Orphaned(path)))
}

#[cfg(test)]
mod tests;
