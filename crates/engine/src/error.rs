//! The calls, each with what allows it, and how what goes wrong with them is sorted.

use std::fmt;
use std::time::Duration;

use bollard::errors::Error as EngineError;

/// What a call is for and what allows it, for error texts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Call {
    pub(super) doing: &'static str,
    /// Variables of the common socket proxy.
    pub(super) grant: &'static str,
}

pub(super) const LIST: Call = Call { doing: "list containers", grant: "CONTAINERS=1" };
pub(super) const INSPECT: Call = Call { doing: "inspect a container", grant: "CONTAINERS=1" };
pub(super) const LOGS: Call = Call { doing: "read the tunnel container's log", grant: "CONTAINERS=1" };
pub(super) const EVENTS: Call = Call { doing: "listen to events", grant: "EVENTS=1" };
pub(super) const CREATE: Call = Call { doing: "create the tunnel container", grant: "CONTAINERS=1 and POST=1" };
pub(super) const START: Call = Call { doing: "start the tunnel container", grant: "CONTAINERS=1 and POST=1" };
pub(super) const STOP: Call = Call { doing: "stop the tunnel container", grant: "CONTAINERS=1 and POST=1" };
pub(super) const REMOVE: Call = Call { doing: "remove the tunnel container", grant: "CONTAINERS=1 and POST=1" };
pub(super) const RESTART: Call = Call { doing: "restart the tunnel container", grant: "CONTAINERS=1 and POST=1" };
pub(super) const RENAME: Call = Call { doing: "rename the tunnel container", grant: "CONTAINERS=1 and POST=1" };
pub(super) const CONNECT: Call =
    Call { doing: "connect the tunnel container to a network", grant: "NETWORKS=1 and POST=1" };
pub(super) const DISCONNECT: Call =
    Call { doing: "disconnect the tunnel container from a network", grant: "NETWORKS=1 and POST=1" };
pub(super) const VERSION: Call = Call { doing: "tell its version", grant: "VERSION=1" };
pub(super) const PING: Call = Call { doing: "say that it is there", grant: "PING=1" };
pub(super) const SELF_STOP: Call = Call { doing: "stop the agent's own container", grant: "CONTAINERS=1 and POST=1" };
pub(super) const NETWORK: Call = Call { doing: "look for the tunnel network", grant: "NETWORKS=1" };
pub(super) const NEW_NETWORK: Call = Call { doing: "create the tunnel network", grant: "NETWORKS=1 and POST=1" };
pub(super) const IMAGE: Call = Call { doing: "look for the cloudflared image", grant: "IMAGES=1" };
pub(super) const PULL: Call = Call { doing: "pull the cloudflared image", grant: "IMAGES=1 and POST=1" };

/// Why a call did not succeed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DockerError {
    /// Nobody listens, the connection was cut or the answer was not whole.
    #[error("cannot be reached to {}: {problem}", .call.doing)]
    Unreachable {
        /// The call.
        call: Call,
        /// What happened.
        problem: String,
    },
    /// No answer within the time limit.
    #[error("did not answer within {}s when asked to {}", .limit.as_secs(), .call.doing)]
    TimedOut {
        /// The call.
        call: Call,
        /// The limit.
        limit: Duration,
    },
    /// 403: a socket proxy or an authorisation plugin refuses the call.
    #[error("refuses to {}; the socket proxy needs {}", .call.doing, .call.grant)]
    Forbidden {
        /// The call.
        call: Call,
    },
    /// 404: the thing named is not there.
    #[error("cannot {}: {message}", .call.doing)]
    NotFound {
        /// The call.
        call: Call,
        /// What Docker said.
        message: String,
    },
    /// 409: the name is taken or the thing is in use.
    #[error("cannot {}: {message}", .call.doing)]
    Conflict {
        /// The call.
        call: Call,
        /// What Docker said.
        message: String,
    },
    /// Anything else that Docker answered.
    #[error("cannot {}: {message}", .call.doing)]
    Failed {
        /// The call.
        call: Call,
        /// What Docker said.
        message: String,
    },
}

/// What a swarm says of a network that only its services may use, with a status that else is a proxy's refusal.
const NOT_ATTACHABLE: &str = "not manually attachable";
const SWARM_NETWORK: &str = "the network is one of a swarm, for its services only: make it with docker network create -d overlay --attachable, or set CLOUDFLARED_NETWORK_NAME to another; trying again";

/// What Docker says to plain HTTP at its port for TLS.
const TO_TLS_PORT: &str = "HTTP request to an HTTPS server";

/// How a refusal of the agent's own socket proxy begins.
pub(crate) const OWN_REFUSAL: &str = "dockflare-agent socket-proxy refuses this";
/// What allows a call there.
const OWN_GRANT: &str = "the version and the settings of the agent (CLOUDFLARED_IMAGE, CLOUDFLARED_NETWORK_NAME, CLOUDFLARED_METRICS_NETWORK, TUNNEL_CONTAINER_NAME, AUTO_CONNECT_NETWORKS), and its log names the rule";

impl DockerError {
    /// The status and the text of an answer that says this.
    pub(crate) fn answer(&self) -> (u16, String) {
        match self {
            Self::Unreachable { problem, .. } => (502, problem.clone()),
            Self::TimedOut { .. } => (504, self.to_string()),
            Self::Forbidden { .. } => (403, self.to_string()),
            Self::NotFound { message, .. } => (404, message.clone()),
            Self::Conflict { message, .. } => (409, message.clone()),
            Self::Failed { message, .. } => match message.split_once(' ') {
                Some((status, text)) if matches!(status.parse(), Ok(400..=599_u16)) => {
                    (status.parse().unwrap_or(500), text.to_owned())
                }
                _ => (500, message.clone()),
            },
        }
    }

    /// For a caller that gave up sooner than the call itself would have.
    pub(crate) fn silent() -> Self {
        Self::Unreachable { call: INSPECT, problem: "no answer in time".to_owned() }
    }

    /// Whether Docker itself is away, as against a call that it answered.
    pub fn is_away(&self) -> bool {
        matches!(self, Self::Unreachable { .. } | Self::TimedOut { .. })
    }

    /// Whether a network of a swarm takes no single containers. In the words of its manager, believed, not tried.
    fn is_of_swarm(&self) -> bool {
        matches!(self, Self::Failed { message, .. } if message.contains(NOT_ATTACHABLE))
    }

    /// Whether it is a refusal by this project's own socket proxy, which lets through all that the agent needs.
    pub(crate) fn is_of_own_proxy(&self) -> bool {
        matches!(self, Self::Forbidden { call } if call.grant == OWN_GRANT)
    }

    /// What an operator can do, when nobody is trying again.
    pub(crate) fn advice(&self) -> String {
        match self {
            Self::Unreachable { problem, .. } if problem.contains("Permission denied") => {
                "let the agent's user use the socket (group_add with the group of the socket), or put a socket proxy between".to_owned()
            }
            Self::Unreachable { .. } | Self::TimedOut { .. } => {
                "check DOCKER_HOST, the socket's permissions and the socket proxy".to_owned()
            }
            Self::Forbidden { .. } if self.is_of_own_proxy() => {
                "give agent and socket proxy the same version and the same CLOUDFLARED_IMAGE, CLOUDFLARED_NETWORK_NAME, CLOUDFLARED_METRICS_NETWORK, TUNNEL_CONTAINER_NAME and AUTO_CONNECT_NETWORKS: docker compose up -d; the proxy's log names the rule".to_owned()
            }
            Self::Forbidden { call } => format!("set {} on the socket proxy and recreate it", call.grant),
            Self::Failed { message, .. } if message.contains("ambiguous") => {
                "several networks have this name, remove all but one: docker network ls, docker network rm with the id"
                    .to_owned()
            }
            _ if self.is_of_swarm() => SWARM_NETWORK.trim_end_matches("; trying again").to_owned(),
            Self::NotFound { .. } | Self::Conflict { .. } | Self::Failed { .. } => {
                "see what Docker says, and the log of the Docker daemon".to_owned()
            }
        }
    }

    /// What an operator can do, for the end of a log line.
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::Unreachable { .. } | Self::TimedOut { .. } => {
                "trying again, a running tunnel is not affected; check DOCKER_HOST, the socket's permissions and the socket proxy"
            }
            Self::Forbidden { .. } => "trying again; set what it needs on the socket proxy and recreate it",
            _ if self.is_of_swarm() => SWARM_NETWORK,
            // Up to Engine 24 two who create a network at the same moment get one each.
            Self::Failed { message, .. } if message.contains("ambiguous") => {
                "trying again; several networks have this name, remove all but one: docker network ls, docker network rm with the id"
            }
            _ => "trying again",
        }
    }
}

/// Sorts what the client library says.
pub(super) fn sort(call: Call, error: EngineError) -> DockerError {
    match error {
        EngineError::DockerResponseServerError { status_code, message } => {
            let message = one_line(&message);
            match status_code {
                403 if message.starts_with(OWN_REFUSAL) => {
                    DockerError::Forbidden { call: Call { grant: OWN_GRANT, ..call } }
                }
                403 if message.contains(NOT_ATTACHABLE) => DockerError::Failed { call, message },
                403 => DockerError::Forbidden { call },
                404 => DockerError::NotFound { call, message },
                409 => DockerError::Conflict { call, message },
                502..=504 if message.is_empty() || message.starts_with('<') => {
                    DockerError::Unreachable { call, problem: format!("the proxy answered {status_code}") }
                }
                // Its own words, where it has some, name the cause.
                502..=504 => DockerError::Unreachable { call, problem: message },
                400 if message.contains(TO_TLS_PORT) => {
                    let problem = "it wants TLS at this port: set DOCKER_TLS_VERIFY=1 and DOCKER_CERT_PATH".to_owned();
                    DockerError::Unreachable { call, problem }
                }
                _ => DockerError::Failed { call, message: format!("{status_code} {message}") },
            }
        }
        EngineError::DockerStreamError { error } => DockerError::Failed { call, message: one_line(&error) },
        EngineError::JsonDataError { .. } | EngineError::JsonSerdeError { .. } => {
            DockerError::Unreachable { call, problem: "the answer was not whole or not JSON".to_owned() }
        }
        // It does not count the error that it was made of among its causes.
        EngineError::IOError { err } => {
            let problem = super::transport::tls_words(&err).unwrap_or_else(|| last_cause(&err));
            DockerError::Unreachable { call, problem }
        }
        other => {
            let problem = super::transport::tls_words(&other).unwrap_or_else(|| last_cause(&other));
            DockerError::Unreachable { call, problem }
        }
    }
}

/// The last cause names the matter ("Connection refused"); what is around it repeats the address.
pub(super) fn last_cause(error: &dyn std::error::Error) -> String {
    let mut last = error;
    while let Some(cause) = last.source() {
        last = cause;
    }
    one_line(&last.to_string())
}

/// What Docker says goes into one log line, and not all of it.
pub(super) fn one_line(text: &str) -> String {
    const MAX_CHARS: usize = 300;
    text.split_whitespace().collect::<Vec<_>>().join(" ").chars().take(MAX_CHARS).collect()
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.doing)
    }
}

#[cfg(test)]
impl DockerError {
    /// What doubles answer.
    pub(crate) fn refusal() -> Self {
        Self::Forbidden { call: CREATE }
    }

    pub(crate) fn failure() -> Self {
        Self::Failed { call: CREATE, message: "500 no space left on device".to_owned() }
    }

    pub(crate) fn no_host_gateway() -> Self {
        let message = "400 invalid IP address in add-host: \"host-gateway\"".to_owned();
        Self::Failed { call: CREATE, message }
    }

    pub(crate) fn taken() -> Self {
        Self::Conflict { call: CREATE, message: "the name is taken".to_owned() }
    }

    pub(crate) fn not_found() -> Self {
        Self::NotFound { call: INSPECT, message: "no such container".to_owned() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_network_of_a_swarm_is_named_and_not_taken_for_a_proxy() {
        let message = "Could not attach to network web: rpc error: code = PermissionDenied desc = network web not manually attachable";
        let refused = EngineError::DockerResponseServerError { status_code: 403, message: message.to_owned() };
        let error = sort(START, refused);
        assert!(error.advice().contains("--attachable") && error.remedy().contains("--attachable"), "{error}");
        assert!(!error.to_string().contains("proxy") && error.to_string().contains("network web"), "{error}");
    }

    #[test]
    fn what_to_do_names_the_variable_or_the_socket_and_promises_no_further_try() {
        let unreachable = |problem: &str| DockerError::Unreachable { call: VERSION, problem: problem.to_owned() };
        for (error, words) in [
            (unreachable("Permission denied (os error 13)"), "group_add"),
            (unreachable("Connection refused (os error 111)"), "DOCKER_HOST"),
            (DockerError::TimedOut { call: LIST, limit: Duration::from_secs(1) }, "socket proxy"),
            (DockerError::Forbidden { call: PULL }, "set IMAGES=1 and POST=1 on the socket proxy"),
            (DockerError::Failed { call: NETWORK, message: "network x is ambiguous".to_owned() }, "remove all but one"),
        ] {
            let advice = error.advice();
            assert!(advice.contains(words) && !advice.contains("trying again"), "{error}: {advice}");
        }
    }
}
