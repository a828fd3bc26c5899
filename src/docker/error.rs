//! The calls of the agent, each with the grant that allows it, and the remedies for their errors.

pub use dockflare_engine::DockerError;
pub(super) use dockflare_engine::{Call, last_cause, one_line, sort};

const fn call(doing: &'static str, grant: &'static str) -> Call {
    Call { doing, grant, own_grant: OWN_GRANT }
}

pub(super) const LIST: Call = call("list containers", "CONTAINERS=1");
pub(super) const INSPECT: Call = call("inspect a container", "CONTAINERS=1");
pub(super) const LOGS: Call = call("read the tunnel container's log", "CONTAINERS=1");
pub(super) const EVENTS: Call = call("listen to events", "EVENTS=1");
pub(super) const CREATE: Call = call("create the tunnel container", "CONTAINERS=1 and POST=1");
pub(super) const START: Call = call("start the tunnel container", "CONTAINERS=1 and POST=1");
pub(super) const STOP: Call = call("stop the tunnel container", "CONTAINERS=1 and POST=1");
pub(super) const REMOVE: Call = call("remove the tunnel container", "CONTAINERS=1 and POST=1");
pub(super) const RESTART: Call = call("restart the tunnel container", "CONTAINERS=1 and POST=1");
pub(super) const RENAME: Call = call("rename the tunnel container", "CONTAINERS=1 and POST=1");
pub(super) const CONNECT: Call = call("connect the tunnel container to a network", "NETWORKS=1 and POST=1");
pub(super) const DISCONNECT: Call = call("disconnect the tunnel container from a network", "NETWORKS=1 and POST=1");
pub(super) const VERSION: Call = call("tell its version", "VERSION=1");
pub(super) const INFO: Call = call("tell the name of its host", "INFO=1");
pub(super) const PING: Call = call("say that it is there", "PING=1");
pub(super) const SELF_STOP: Call = call("stop the agent's own container", "CONTAINERS=1 and POST=1");
pub(super) const NETWORK: Call = call("look for the tunnel network", "NETWORKS=1");
pub(super) const NEW_NETWORK: Call = call("create the tunnel network", "NETWORKS=1 and POST=1");
pub(super) const IMAGE: Call = call("look for the cloudflared image", "IMAGES=1");
pub(super) const PULL: Call = call("pull the cloudflared image", "IMAGES=1 and POST=1");

const SWARM_NETWORK: &str = "the network is one of a swarm, for its services only: make it with docker network create -d overlay --attachable, or set CLOUDFLARED_NETWORK_NAME to another; trying again";

/// The start of a refusal by the agent's own socket proxy.
#[cfg(test)]
pub(crate) const OWN_REFUSAL: &str = "dockflare-agent socket-proxy refuses this";
/// What allows a call that the agent's own socket proxy refuses.
const OWN_GRANT: &str = "the version and the settings of the agent (CLOUDFLARED_IMAGE, CLOUDFLARED_NETWORK_NAME, CLOUDFLARED_METRICS_NETWORK, TUNNEL_CONTAINER_NAME, AUTO_CONNECT_NETWORKS), and its log names the rule";

/// The error for a caller that gave up before the call's own time limit.
pub(crate) fn silent() -> DockerError {
    DockerError::Unreachable { call: INSPECT, problem: "no answer in time".to_owned() }
}

/// Tells an operator what to do about an error.
pub(crate) trait Remedy {
    /// The remedy when the agent does not retry.
    fn advice(&self) -> String;
    /// The remedy for the end of a log line.
    fn remedy(&self) -> &'static str;
}

impl Remedy for DockerError {
    fn advice(&self) -> String {
        match self {
            DockerError::Unreachable { problem, .. } if problem.contains("Permission denied") => {
                "let the agent's user use the socket (group_add with the group of the socket), or put a socket proxy between".to_owned()
            }
            DockerError::Unreachable { .. } | DockerError::TimedOut { .. } => {
                "check DOCKER_HOST, the socket's permissions and the socket proxy".to_owned()
            }
            DockerError::Forbidden { .. } if self.is_of_own_proxy() => {
                "give agent and socket proxy the same version and the same CLOUDFLARED_IMAGE, CLOUDFLARED_NETWORK_NAME, CLOUDFLARED_METRICS_NETWORK, TUNNEL_CONTAINER_NAME and AUTO_CONNECT_NETWORKS: docker compose up -d; the proxy's log names the rule".to_owned()
            }
            DockerError::Forbidden { call } => format!("set {} on the socket proxy and recreate it", call.grant),
            DockerError::Failed { message, .. } if message.contains("ambiguous") => {
                "several networks have this name, remove all but one: docker network ls, docker network rm with the id"
                    .to_owned()
            }
            _ if self.is_of_swarm() => SWARM_NETWORK.trim_end_matches("; trying again").to_owned(),
            DockerError::NotFound { .. } | DockerError::Conflict { .. } | DockerError::Failed { .. } => {
                "see what Docker says, and the log of the Docker daemon".to_owned()
            }
        }
    }

    fn remedy(&self) -> &'static str {
        match self {
            DockerError::Unreachable { .. } | DockerError::TimedOut { .. } => {
                "trying again, a running tunnel is not affected; check DOCKER_HOST, the socket's permissions and the socket proxy"
            }
            DockerError::Forbidden { .. } => "trying again; set what it needs on the socket proxy and recreate it",
            _ if self.is_of_swarm() => SWARM_NETWORK,
            // Up to Engine 24, two clients that create a network at the same moment get one each.
            DockerError::Failed { message, .. } if message.contains("ambiguous") => {
                "trying again; several networks have this name, remove all but one: docker network ls, docker network rm with the id"
            }
            _ => "trying again",
        }
    }
}

/// Errors that test doubles answer with.
#[cfg(test)]
pub(crate) trait Samples {
    fn refusal() -> DockerError;
    fn failure() -> DockerError;
    fn no_host_gateway() -> DockerError;
    fn taken() -> DockerError;
    fn not_found() -> DockerError;
}

#[cfg(test)]
impl Samples for DockerError {
    /// Errors that test doubles answer with.
    fn refusal() -> DockerError {
        DockerError::Forbidden { call: CREATE }
    }

    fn failure() -> DockerError {
        DockerError::Failed { call: CREATE, message: "500 no space left on device".to_owned() }
    }

    fn no_host_gateway() -> DockerError {
        let message = "400 invalid IP address in add-host: \"host-gateway\"".to_owned();
        DockerError::Failed { call: CREATE, message }
    }

    fn taken() -> DockerError {
        DockerError::Conflict { call: CREATE, message: "the name is taken".to_owned() }
    }

    fn not_found() -> DockerError {
        DockerError::NotFound { call: INSPECT, message: "no such container".to_owned() }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use bollard::errors::Error as EngineError;

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
