//! Each state in which the agent may find its tunnel container, and each command.

use testkit::Case;

pub(crate) fn cases() -> Vec<Case> {
    testkit::cases![]
}
