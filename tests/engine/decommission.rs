//! Leaving the master, through both phases and over restarts.

use testkit::Case;

pub(crate) fn cases() -> Vec<Case> {
    testkit::cases![]
}
