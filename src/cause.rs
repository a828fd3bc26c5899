//! The status of the tunnel, and the list of causes why it differs from the spec. Each cause has a status, a reason,
//! one sentence, the agent's action, and what the operator can do.
//!
//! The command poller and the supervisor find the causes. The log, the master and the health page show them. The table
//! in `docs/troubleshoot.md` is this list, and a test keeps the two in sync.

/// The status of the tunnel, in the master's terms.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Status {
    /// Running, and carrying traffic.
    Running,
    /// Being created, or created and not ready yet.
    Starting,
    /// Running, but carrying no traffic.
    Degraded,
    /// Ending again and again; Docker restarts it.
    Restarting,
    /// Not running, as the spec says.
    #[default]
    Stopped,
    /// Should run and does not; the reason says why.
    Error,
}

impl Status {
    /// All statuses.
    pub const ALL: [Self; 6] =
        [Self::Running, Self::Starting, Self::Degraded, Self::Restarting, Self::Stopped, Self::Error];

    /// Returns the word on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Starting => "starting",
            Self::Degraded => "degraded",
            Self::Restarting => "restarting",
            Self::Stopped => "stopped",
            Self::Error => "error",
        }
    }
}

/// Why the tunnel differs from the spec.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cause {
    /// The tunnel should run, but no token is known.
    TokenMissing,
    /// cloudflared, or the agent before it, cannot read the token.
    TokenMalformed,
    /// A command carries the token of another tunnel.
    TokenMismatch,
    /// The edge refuses the token: a wrong secret, or a deleted tunnel.
    TokenRefused,
    /// The edge refuses the registration, and cloudflared does not say why. Over QUIC it never does.
    RegistrationRefused,
    /// The edge answers with an error, or accepts the connection and never answers. The token is not at fault.
    EdgeError,
    /// The edge's certificate is not trusted: something intercepts the connection, or the clock is wrong.
    EdgeUntrusted,
    /// cloudflared cannot read its token file.
    TokenFile,
    /// The port of cloudflared's own pages is taken.
    MetricsPortTaken,
    /// cloudflared ends at its start because it cannot resolve the edge's name.
    NoDns,
    /// No connection to the edge.
    EdgeUnreachable,
    /// The same, with QUIC as the only allowed protocol.
    UdpBlocked,
    /// The connector has answered before and no longer does.
    Hung,
    /// The agent cannot query the connector, and Docker's health check does not work either.
    NotAnswering,
    /// The connector ends again and again.
    CrashLoop,
    /// The kernel killed the connector because memory ran out.
    OutOfMemory,
    /// The image is missing and cannot be pulled.
    ImageUnavailable,
    /// The network is missing and cannot be created.
    NetworkMissing,
    /// The container is not on the network any more, or on a removed one of the same name.
    NetworkReplaced,
    /// Several networks have the name.
    NetworkAmbiguous,
    /// A container that is not the agent's has the name of the tunnel container.
    NameTaken,
    /// A socket proxy or an authorization plugin refuses a call.
    DockerRefuses,
    /// Docker does not answer.
    DockerUnreachable,
    /// Docker answered with another error.
    DockerFailed,
}

/// What the agent does about a cause.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Only wait: acting would not help, or would break what still works.
    Wait,
    /// Stop the connector, so that Docker does not start it again, until another token comes.
    Stop,
    /// Restart the connector, with growing pauses between restarts.
    Restart,
    /// Leave it to Docker's restart policy, which starts it again with growing pauses of up to a minute.
    LeaveToDocker,
    /// Try the same again, with growing pauses.
    TryAgain,
    /// Create the container again.
    MakeAnew,
}

/// One row: reason, status, action, the problem of the tunnel, and what happens next and what to do.
type Row = (&'static str, Status, Action, &'static str, &'static str);

impl Cause {
    /// All causes, in the order of `docs/troubleshoot.md`.
    pub const ALL: [Self; 24] = [
        Self::TokenMissing,
        Self::TokenMalformed,
        Self::TokenMismatch,
        Self::TokenRefused,
        Self::TokenFile,
        Self::RegistrationRefused,
        Self::EdgeError,
        Self::EdgeUntrusted,
        Self::NoDns,
        Self::EdgeUnreachable,
        Self::UdpBlocked,
        Self::MetricsPortTaken,
        Self::Hung,
        Self::NotAnswering,
        Self::CrashLoop,
        Self::OutOfMemory,
        Self::ImageUnavailable,
        Self::NetworkMissing,
        Self::NetworkReplaced,
        Self::NetworkAmbiguous,
        Self::NameTaken,
        Self::DockerRefuses,
        Self::DockerUnreachable,
        Self::DockerFailed,
    ];

    const fn row(self) -> Row {
        use Action::{LeaveToDocker, MakeAnew, Restart, Stop, TryAgain, Wait};
        use Status::{Degraded, Error, Restarting, Starting};
        match self {
            Self::TokenMissing => (
                "token_missing",
                Error,
                Wait,
                "has no token",
                "nothing is started; enrol the agent on the master's Agents page",
            ),
            Self::TokenMalformed => (
                "token_malformed",
                Error,
                Stop,
                "has a token that cloudflared does not take",
                "it is not started until another token comes; enrol the agent again on the master's Agents page",
            ),
            Self::TokenMismatch => (
                "token_mismatch",
                Error,
                Wait,
                "was given a token that is for another tunnel",
                "what runs is not touched; enrol the agent again on the master's Agents page",
            ),
            Self::TokenRefused => (
                "token_refused",
                Error,
                Wait,
                "is refused by Cloudflare",
                "cloudflared keeps asking and is not restarted; if the tunnel was deleted or its token rotated, redeploy or enrol the agent on the master's Agents page",
            ),
            Self::TokenFile => (
                "token_file",
                Restarting,
                LeaveToDocker,
                "ends because cloudflared cannot read its token file",
                "Docker starts it again with growing pauses; see docker logs of the tunnel container for the file",
            ),
            Self::RegistrationRefused => (
                "registration_refused",
                Degraded,
                Wait,
                "reaches Cloudflare, which refuses its registration without a reason",
                "cloudflared keeps asking; over QUIC it does not say whether its token is at fault, so a second one asks over HTTP/2; if this lasts, redeploy or enrol the agent on the master's Agents page",
            ),
            Self::EdgeError => (
                "edge_error",
                Degraded,
                Wait,
                "reaches Cloudflare, which cannot register it",
                "fresh connectors are tried beside it until one is connected; the fault is at Cloudflare: see www.cloudflarestatus.com",
            ),
            Self::EdgeUntrusted => (
                "edge_untrusted",
                Error,
                Wait,
                "does not trust the certificate that answers in Cloudflare's place",
                "fresh connectors are tried beside it until one is connected; set the clock of the host, or let port 7844 pass without TLS inspection",
            ),
            Self::NoDns => (
                "no_dns",
                Restarting,
                LeaveToDocker,
                "ends because Cloudflare's addresses cannot be looked up",
                "Docker starts it again with growing pauses; check the DNS servers of the host and of Docker",
            ),
            Self::EdgeUnreachable => (
                "edge_unreachable",
                Degraded,
                Wait,
                "has no connection to Cloudflare",
                "fresh connectors are tried beside it until one is connected; port 7844 must be open outwards, TCP and UDP",
            ),
            Self::UdpBlocked => (
                "udp_blocked",
                Degraded,
                Wait,
                "has no connection to Cloudflare over QUIC, and may use nothing else",
                "fresh connectors are tried beside it until one is connected; open UDP port 7844 outwards, or set CLOUDFLARED_PROTOCOL=auto",
            ),
            Self::MetricsPortTaken => (
                "metrics_port_taken",
                Restarting,
                LeaveToDocker,
                "ends because the port of its metrics is taken",
                "Docker starts it again with growing pauses; end what else listens on that port in the same container network",
            ),
            Self::Hung => (
                "hung",
                Degraded,
                Restart,
                "hangs: cloudflared does not answer any more",
                "it is restarted, with growing pauses between restarts; if this comes back, set another CLOUDFLARED_IMAGE",
            ),
            Self::NotAnswering => (
                "not_answering",
                Degraded,
                Wait,
                "runs, and nobody can tell whether it is connected",
                "it is left alone; put the agent on the tunnel network, so that it can ask cloudflared itself",
            ),
            Self::CrashLoop => (
                "crash_loop",
                Restarting,
                LeaveToDocker,
                "ends again and again",
                "Docker starts it again with growing pauses; see docker logs of the tunnel container",
            ),
            Self::OutOfMemory => (
                "out_of_memory",
                Restarting,
                LeaveToDocker,
                "is ended by the kernel for want of memory",
                "Docker starts it again with growing pauses; give it or the host more memory",
            ),
            Self::ImageUnavailable => (
                "image_unavailable",
                Error,
                TryAgain,
                "has no image",
                "trying again; check CLOUDFLARED_IMAGE and the host's way to the registry, or load the image with docker load",
            ),
            Self::NetworkMissing => (
                "network_missing",
                Error,
                TryAgain,
                "has no network",
                "trying again; let the agent create networks, or make it with docker network create",
            ),
            Self::NetworkReplaced => (
                "network_replaced",
                Starting,
                MakeAnew,
                "has lost its network",
                "it is connected to it again, or made anew on the network of that name",
            ),
            Self::NetworkAmbiguous => (
                "network_ambiguous",
                Error,
                TryAgain,
                "has several networks of its name to choose from",
                "trying again; remove all but one: docker network ls, docker network rm with the id",
            ),
            Self::NameTaken => (
                "name_taken",
                Error,
                Wait,
                "cannot be started, since a container that is not the agent's has the name",
                "that one is not touched; remove it with docker rm, or set TUNNEL_CONTAINER_NAME to another name",
            ),
            Self::DockerRefuses => (
                "docker_refuses",
                Error,
                TryAgain,
                "cannot be looked after, since Docker refuses a call",
                "trying again; set on the socket proxy what it needs and recreate it",
            ),
            Self::DockerUnreachable => (
                "docker_unreachable",
                Error,
                TryAgain,
                "cannot be looked after, since Docker does not answer",
                "trying again, a running tunnel is not affected; check DOCKER_HOST, the socket's permissions and the socket proxy",
            ),
            Self::DockerFailed => {
                ("docker_failed", Error, TryAgain, "cannot be set up", "trying again; what Docker says is in this line")
            }
        }
    }

    /// Returns the reason: short and stable, for the master's page.
    pub const fn reason(self) -> &'static str {
        self.row().0
    }

    /// Returns the status of the tunnel with this cause.
    pub const fn status(self) -> Status {
        self.row().1
    }

    /// Returns what the agent does about it.
    pub const fn action(self) -> Action {
        self.row().2
    }

    /// Returns the problem, as the rest of a sentence that begins with "the tunnel".
    pub const fn what(self) -> &'static str {
        self.row().3
    }

    /// Returns what happens next and what the operator can do.
    pub const fn next(self) -> &'static str {
        self.row().4
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_documented_table_lists_each_cause_with_the_words_of_the_log() {
        let page = include_str!("../docs/troubleshoot.md");
        let expected = Cause::ALL.map(|cause| {
            let (reason, status, _, what, next) = cause.row();
            format!("| `{reason}` | `{}` | the tunnel {what} | {next} |", status.as_str())
        });
        let missing: Vec<_> = expected.iter().filter(|row| !page.contains(row.as_str())).collect();
        assert!(missing.is_empty(), "rows that docs/troubleshoot.md lacks:\n{missing:#?}");
        let rows = page.lines().skip_while(|line| !line.starts_with("| reason | status |")).skip(2);
        let rows = rows.take_while(|line| line.starts_with('|')).count();
        assert_eq!(rows, Cause::ALL.len(), "rows of causes that the code does not know");
    }

    #[test]
    fn only_a_hang_is_answered_by_a_restart_of_ours() {
        let restarted: Vec<_> = Cause::ALL.into_iter().filter(|cause| cause.action() == Action::Restart).collect();
        assert_eq!(restarted, [Cause::Hung]);
    }
}
