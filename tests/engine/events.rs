//! What Docker says of labelled containers, and what the master hears of it.

use testkit::Case;

pub(crate) fn cases() -> Vec<Case> {
    testkit::cases![]
}
