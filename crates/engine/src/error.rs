//! Describes the calls, each with the grant that allows it, and sorts their errors.

use std::fmt;
use std::time::Duration;

use bollard::errors::Error as EngineError;

use crate::proxy::REFUSES;
use crate::transport::tls_words;

/// What a call does and which grant allows it, for error texts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Call {
    /// What the call does, worded to follow "to".
    pub doing: &'static str,
    /// The variables of the common socket proxy that allow it.
    pub grant: &'static str,
    /// What allows it when the program's own socket proxy refuses it.
    pub own_grant: &'static str,
}

/// Why a call failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DockerError {
    /// Nothing listens, the connection was cut, or the answer was incomplete.
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
    /// 403: a socket proxy or an authorization plugin refuses the call.
    #[error("refuses to {}; the socket proxy needs {}", .call.doing, .call.grant)]
    Forbidden {
        /// The call.
        call: Call,
    },
    /// 404: there is no such object.
    #[error("cannot {}: {message}", .call.doing)]
    NotFound {
        /// The call.
        call: Call,
        /// What Docker said.
        message: String,
    },
    /// 409: the name is taken or the object is in use.
    #[error("cannot {}: {message}", .call.doing)]
    Conflict {
        /// The call.
        call: Call,
        /// What Docker said.
        message: String,
    },
    /// Any other error that Docker answered.
    #[error("cannot {}: {message}", .call.doing)]
    Failed {
        /// The call.
        call: Call,
        /// What Docker said.
        message: String,
    },
}

/// A swarm's message for a network that only its services may use. It comes with status 403, which otherwise means that
/// a proxy refuses.
pub const NOT_ATTACHABLE: &str = "not manually attachable";

/// Docker's answer to plain HTTP on its TLS port.
const TO_TLS_PORT: &str = "HTTP request to an HTTPS server";

impl DockerError {
    /// The status and text of the HTTP answer that reports this error.
    pub fn answer(&self) -> (u16, String) {
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

    /// Whether Docker itself is unavailable, rather than refusing or failing the call.
    pub fn is_away(&self) -> bool {
        matches!(self, Self::Unreachable { .. } | Self::TimedOut { .. })
    }

    /// Whether the error is about a swarm network that takes no standalone containers. The manager's wording is
    /// believed, not tried.
    pub fn is_of_swarm(&self) -> bool {
        matches!(self, Self::Failed { message, .. } if message.contains(NOT_ATTACHABLE))
    }

    /// Whether this project's own socket proxy refuses, which lets through everything that the agent needs.
    pub fn is_of_own_proxy(&self) -> bool {
        matches!(self, Self::Forbidden { call } if call.grant == call.own_grant)
    }
}

/// Sorts an error of the client library.
pub fn sort(call: Call, error: EngineError) -> DockerError {
    match error {
        EngineError::DockerResponseServerError { status_code, message } => {
            let message = one_line(&message);
            match status_code {
                403 if message.starts_with("dockflare-") && message.contains(REFUSES) => {
                    DockerError::Forbidden { call: Call { grant: call.own_grant, ..call } }
                }
                403 if message.contains(NOT_ATTACHABLE) => DockerError::Failed { call, message },
                403 => DockerError::Forbidden { call },
                404 => DockerError::NotFound { call, message },
                409 => DockerError::Conflict { call, message },
                502..=504 if message.is_empty() || message.starts_with('<') => {
                    DockerError::Unreachable { call, problem: format!("the proxy answered {status_code}") }
                }
                // The proxy's own message, if there is one, names the cause.
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
        // `source()` of this variant skips the error that it wraps.
        EngineError::IOError { err } => {
            let problem = tls_words(&err).unwrap_or_else(|| last_cause(&err));
            DockerError::Unreachable { call, problem }
        }
        other => {
            let problem = tls_words(&other).unwrap_or_else(|| last_cause(&other));
            DockerError::Unreachable { call, problem }
        }
    }
}

/// The innermost cause, which names the problem ("Connection refused"). The causes around it repeat the address.
pub fn last_cause(error: &dyn std::error::Error) -> String {
    let mut last = error;
    while let Some(cause) = last.source() {
        last = cause;
    }
    one_line(&last.to_string())
}

/// Puts Docker's message into one log line of at most 300 characters.
pub fn one_line(text: &str) -> String {
    const MAX_CHARS: usize = 300;
    text.split_whitespace().collect::<Vec<_>>().join(" ").chars().take(MAX_CHARS).collect()
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.doing)
    }
}
