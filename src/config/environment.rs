//! Where the variables come from: the process, and a `.env` for what is unset there.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::io::{self, Read};
use std::path::Path;

use dockflare_host::disk;

use super::text_of;

/// Of a `.env`, which has some lines.
const MOST_BYTES: u64 = 1 << 20;

/// The variables of the process, before them those of `.env`, and what is wrong with either.
pub(super) fn environment() -> (BTreeMap<String, String>, Vec<String>) {
    const OURS: [&str; 3] = ["DOCKFLARE_", "CF_ACCESS_", "CLOUDFLARED_"];
    let (mut vars, mut errors) = (BTreeMap::new(), Vec::new());
    match disk::read_at_start(Path::new(".env"), MOST_BYTES) {
        Ok(bytes) => match text_of(bytes) {
            Ok(text) => errors.extend(read_lines(&text, &mut vars)),
            Err(problem) => errors.push(format!(".env: {problem}")),
        },
        Err(unread) if unread.is_missing() => {}
        Err(unread) => errors.push(format!(".env: {unread}")),
    }
    for (name, value) in std::env::vars_os() {
        let name = name.to_string_lossy().into_owned();
        match value.into_string() {
            Ok(value) if value.trim().is_empty() => {}
            Ok(value) => drop(vars.insert(name, value)),
            Err(_) if OURS.iter().any(|prefix| name.starts_with(prefix)) => {
                errors.push(format!("{name}: is not valid UTF-8"));
            }
            Err(_) => {}
        }
    }
    (vars, errors)
}

/// Gives a text line by line, and counts the lines that were taken.
struct Lines<'a> {
    rest: &'a [u8],
    taken: &'a Cell<usize>,
}

impl Read for Lines<'_> {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        let line = self.rest.iter().position(|byte| *byte == b'\n').map_or(self.rest.len(), |end| end + 1);
        let (now, later) = self.rest.split_at(line.min(to.len()));
        to[..now.len()].copy_from_slice(now);
        self.taken.set(self.taken.get() + usize::from(now.ends_with(b"\n") || (later.is_empty() && !now.is_empty())));
        self.rest = later;
        Ok(now.len())
    }
}

/// Puts what a `.env` sets into `vars`. Gives what is wrong with it, by line: the line itself may hold a secret.
fn read_lines(text: &str, vars: &mut BTreeMap<String, String>) -> Vec<String> {
    let mut errors = Vec::new();
    let taken = Cell::new(0);
    for read in dotenvy::from_read_iter(Lines { rest: text.as_bytes(), taken: &taken }) {
        match read {
            Ok((name, value)) => drop(vars.insert(name, value)),
            Err(dotenvy::Error::LineParse(..)) => {
                let number = taken.get();
                let line = text.lines().nth(number.saturating_sub(1)).unwrap_or_default();
                errors.push(format!(".env line {number}: {}", wrong_line(line)));
            }
            Err(error) => errors.push(format!(".env: cannot be read: {error}")),
        }
    }
    errors
}

fn wrong_line(line: &str) -> &'static str {
    let name = line.split_once('=').map(|(name, _)| name.trim());
    match name.map(|name| name.strip_prefix("export ").unwrap_or(name)) {
        None => "is not NAME=value; begin comments with '#'",
        Some(name) if name.trim().contains(char::is_whitespace) => {
            "the name before '=' has spaces in it: use the name of the variable, such as AGENT_DISPLAY_NAME"
        }
        Some(name) if name.is_empty() || !name.chars().all(|c| c.is_ascii_alphanumeric() || "_.".contains(c)) => {
            "the name before '=' has other characters than letters, digits and '_'"
        }
        Some(_) => "cannot be read as NAME=value; put quotes around a value with spaces, and close each quote",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_that_cannot_be_read_is_named_by_its_number_and_never_shown() {
        let mut vars = BTreeMap::new();
        let text = "# fine\nA=1\nName With Spaces=s3cret\n\nB=s3cret two words\nno assignment\nC='s3cret\n";
        let errors = read_lines(text, &mut vars);
        let lines: Vec<_> = errors.iter().map(|error| error.split(':').next().unwrap()).collect();
        assert_eq!(lines[..3], [".env line 3", ".env line 5", ".env line 6"], "{errors:#?}");
        assert!(errors[0].contains("spaces") && errors[1].contains("quotes"), "{errors:#?}");
        assert!(!errors.join("").contains("s3cret"), "{errors:#?}");
        assert_eq!(vars["A"], "1");
    }
}
