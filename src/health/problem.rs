//! What keeps the tunnel from its goal: a cause, and the details of this occurrence.

use std::fmt;

use super::plan::Step;
use crate::cause::Cause;
use crate::docker::DockerError;

/// A cause and its details. `Display` is a sentence that begins with "the tunnel".
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Problem {
    pub(super) cause: Cause,
    /// Docker's own wording, a name or a permission. May be empty.
    detail: String,
}

impl Problem {
    pub(super) fn new(cause: Cause, detail: impl Into<String>) -> Self {
        Self { cause, detail: detail.into() }
    }

    /// The problem that an error of Docker means, whatever the call.
    pub(super) fn of(error: &DockerError) -> Self {
        let cause = match error {
            DockerError::Unreachable { .. } | DockerError::TimedOut { .. } => Cause::DockerUnreachable,
            DockerError::Forbidden { .. } => Cause::DockerRefuses,
            // Up to Engine 24, two callers that create a network at the same moment get one each.
            DockerError::Failed { message, .. } if message.contains("ambiguous") => Cause::NetworkAmbiguous,
            _ => Cause::DockerFailed,
        };
        Self::new(cause, format!("Docker {error}"))
    }

    /// The problem that a failure of this step means.
    pub(super) fn at(step: Step, error: &DockerError) -> Self {
        let problem = Self::of(error);
        let cause = match (step, error) {
            (Step::Start(_) | Step::Restart, DockerError::NotFound { .. }) => Cause::NetworkMissing,
            (Step::Create(..), DockerError::NotFound { .. }) => Cause::ImageUnavailable,
            (Step::Create(..) | Step::Rename, DockerError::Conflict { .. }) => Cause::NameTaken,
            _ => problem.cause,
        };
        Self { cause, ..problem }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.cause.what())?;
        if self.detail.is_empty() { Ok(()) } else { write!(f, ": {}", self.detail) }
    }
}
