//! The same agent through a real haproxy that lets through as little as it needs.

use testkit::Case;

pub(crate) fn cases() -> Vec<Case> {
    testkit::cases![]
}
