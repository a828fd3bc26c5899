//! The end of the agent, as a process and as a container.

use testkit::Case;

pub(crate) fn cases() -> Vec<Case> {
    testkit::cases![]
}
