//! Adds up the results in the output of `cargo test`.

use std::fmt;

/// Counts of tests by result.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    /// Passed.
    pub(crate) passed: u64,
    /// Failed.
    pub(crate) failed: u64,
    /// Not run; the harness calls them `ignored`.
    pub(crate) skipped: u64,
    /// The names of the skipped tests.
    pub(crate) skipped_names: Vec<String>,
}

impl Tally {
    /// Counts one line of output. Only the harness's own lines count.
    pub(crate) fn read(&mut self, line: &str) {
        let line = without_colours(line);
        if let Some(result) = line.strip_prefix("test result: ") {
            self.passed += number_before(result, "passed");
            self.failed += number_before(result, "failed");
            self.skipped += number_before(result, "ignored");
        } else if let Some((name, end)) = line.strip_prefix("test ").and_then(|rest| rest.rsplit_once(" ... "))
            && end.starts_with("ignored")
        {
            self.skipped_names.push(name.trim().to_owned());
        }
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} passed, {} failed, {} skipped", self.passed, self.failed, self.skipped)
    }
}

/// The number in front of a word, or 0 if the word is missing.
fn number_before(text: &str, word: &str) -> u64 {
    let words: Vec<_> = text.split_whitespace().map(|word| word.trim_end_matches([';', '.', ','])).collect();
    let at = words.iter().position(|found| *found == word);
    at.and_then(|at| words.get(at.checked_sub(1)?)?.parse().ok()).unwrap_or(0)
}

/// The text without `ESC [ … m`.
fn without_colours(text: &str) -> String {
    let mut parts = text.split('\x1b');
    let mut plain = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        plain.push_str(part.split_once('m').map_or(part, |(_, rest)| rest));
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Tally {
        let mut tally = Tally::default();
        text.lines().for_each(|line| tally.read(line));
        tally
    }

    #[test]
    fn adds_up_the_results_of_all_harnesses() {
        let tally = read(
            "
running 3 tests
test state::tests::a ... ok
test state::tests::b ... FAILED
test slow ... ignored, needs a night

test result: FAILED. 1 passed; 1 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.00s

test v2_master_from_enrolment_to_sigterm  ... ok
test result: ok. 12 passed; 0 failed; 0 ignored; 0 measured; 3 filtered out; finished in 41.50s
   Doc-tests testkit
test crates/testkit/src/lib.rs - (line 8) - compile ... ok
test result: ok. 1 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.31s",
        );
        assert_eq!(tally.to_string(), "14 passed, 1 failed, 1 skipped");
        assert_eq!(tally.skipped_names, ["slow"]);
    }

    #[test]
    fn names_what_was_skipped() {
        let tally = read(
            "test one_case     ... ignored\ntest src/lib.rs - say (line 3) ... ignored\n\
             test result: ok. 0 passed; 0 failed; 2 ignored; 0 measured; 0 filtered out",
        );
        assert_eq!(tally.skipped_names, ["one_case", "src/lib.rs - say (line 3)"]);
        assert_eq!(tally.skipped, 2);
    }

    #[test]
    fn colours_do_not_matter_and_other_lines_do_not_count() {
        let tally = read(
            "test result: \x1b[32mok\x1b[0m. 7 passed; 0 failed; 0 ignored\n\
             warning: 3 failed\n  test result: ok. 5 passed; 5 failed\nthe test ... ignored\nerror: test failed",
        );
        assert_eq!(tally.to_string(), "7 passed, 0 failed, 0 skipped");
        assert!(tally.skipped_names.is_empty());
    }
}
