//! Why the tunnel is not as it is wanted, as the master's page and the log say it.

use super::plan::Action;
use crate::docker::DockerError;

/// Why the tunnel is not as it is wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Problem {
    /// Short and stable, for the master's page.
    pub(super) reason: String,
    /// For people.
    pub(super) text: String,
    /// What happens next and what they can do.
    pub(super) next: &'static str,
}

/// What the failure of a step means.
pub(super) fn problem_of(step: Action, error: &DockerError) -> Problem {
    let reason = match (step, error) {
        (Action::Start, DockerError::NotFound { .. }) => "network_missing",
        (Action::Create, DockerError::NotFound { .. }) => "image_unavailable",
        (Action::Create, DockerError::Conflict { .. }) => "name_taken",
        _ => reason_of(error),
    };
    Problem { reason: reason.to_owned(), text: format!("Docker {error}"), next: error.remedy() }
}

/// The short word for a failure of Docker.
pub(super) fn reason_of(error: &DockerError) -> &'static str {
    match error {
        DockerError::Unreachable { .. } | DockerError::TimedOut { .. } => "docker_unreachable",
        DockerError::Forbidden { .. } => "docker_refuses",
        _ => "docker_failed",
    }
}
