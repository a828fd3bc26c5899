//! Removes the files that a crash or a failing disk leaves between the write of a document and its rename: hidden files
//! beside the document, with a random suffix.
//!
//! Nobody reads such a file, it may hold a token, and each crash would add one more. Only files with such a name are
//! removed.

#![expect(clippy::disallowed_methods, reason = "called by the store as it opens, on a thread of its own")]

use std::fs;
use std::path::Path;

use super::{AGENT_ID, REPORTED, TOMBSTONE, TUNNEL, WRITABLE};

/// Length of the random suffix that atomic-write-file (0.3) gives its files.
const SUFFIX: usize = 6;

/// Removes what earlier runs and writes left. A file that cannot be removed does no harm; the next write or the next
/// start tries again.
pub(super) fn remove(dir: &Path) {
    let Ok(entries) = fs::read_dir(dir) else { return };
    for entry in entries.flatten() {
        let is_file = entry.file_type().is_ok_and(|kind| kind.is_file());
        if is_file && entry.file_name().to_str().is_some_and(is_leftover) {
            let _ = fs::remove_file(entry.path());
        }
    }
}

/// `.<document>.<six letters or digits>`
fn is_leftover(name: &str) -> bool {
    let document_and_end = name.strip_prefix('.').and_then(|rest| rest.rsplit_once('.'));
    document_and_end.is_some_and(|(document, end)| {
        [AGENT_ID, TUNNEL, TOMBSTONE, REPORTED, WRITABLE].contains(&document)
            && end.len() == SUFFIX
            && end.chars().all(|c| c.is_ascii_alphanumeric())
    })
}
