//! The states of a container and of its health check, with the words that Docker has for them.

use bollard::models::{ContainerStateStatusEnum as Status, HealthStatusEnum};

/// The state of a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RunState {
    /// Never started.
    Created,
    /// Running.
    Running,
    /// Frozen.
    Paused,
    /// Waiting for Docker's restart policy to start it again.
    Restarting,
    /// Ended.
    Exited,
    /// Partly removed.
    Dead,
}

impl RunState {
    /// All states.
    pub const ALL: [Self; 6] = [Self::Created, Self::Running, Self::Paused, Self::Restarting, Self::Exited, Self::Dead];

    /// Returns Docker's word for the state.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Restarting => "restarting",
            Self::Exited => "exited",
            Self::Dead => "dead",
        }
    }
}

impl From<Option<Status>> for RunState {
    /// Reads the state from an inspection. A container that is being stopped still runs.
    fn from(status: Option<Status>) -> Self {
        match status {
            Some(Status::RUNNING | Status::STOPPING) => Self::Running,
            Some(Status::PAUSED) => Self::Paused,
            Some(Status::RESTARTING) => Self::Restarting,
            Some(Status::EXITED) => Self::Exited,
            Some(Status::DEAD | Status::REMOVING) => Self::Dead,
            Some(Status::CREATED | Status::EMPTY) | None => Self::Created,
        }
    }
}

/// The result of a container's health check.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Health {
    /// No verdict yet.
    Starting,
    /// The last run succeeded.
    Healthy,
    /// Several runs in a row failed.
    Unhealthy,
}

impl Health {
    /// Reads the result from an inspection. Returns `None` for a container without a health check.
    pub fn of(status: Option<HealthStatusEnum>) -> Option<Self> {
        match status? {
            HealthStatusEnum::STARTING => Some(Self::Starting),
            HealthStatusEnum::HEALTHY => Some(Self::Healthy),
            HealthStatusEnum::UNHEALTHY => Some(Self::Unhealthy),
            HealthStatusEnum::EMPTY | HealthStatusEnum::NONE => None,
        }
    }

    /// Returns Docker's word for the result.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Healthy => "healthy",
            Self::Unhealthy => "unhealthy",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_word_is_read_as_what_it_was_written_for() {
        for state in RunState::ALL {
            assert_eq!(RunState::from(Some(state.as_str().parse().unwrap())), state);
        }
        for health in [Health::Starting, Health::Healthy, Health::Unhealthy] {
            assert_eq!(Health::of(Some(health.as_str().parse().unwrap())), Some(health));
        }
        assert_eq!((RunState::from(None), Health::of(None)), (RunState::Created, None));
    }
}
