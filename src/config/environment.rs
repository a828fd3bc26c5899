//! Where the variables come from: the process, and a `.env` for those that are unset there.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::io::{self, Read};
use std::path::Path;

use dockflare_host::disk;

use super::{BYTE_ORDER_MARK, MARK, text_of};

/// Maximum size of a `.env`, which has a few lines.
const MOST_BYTES: u64 = 1 << 20;

/// What the process and `.env` set, and what is wrong or odd about it.
#[derive(Debug, Default)]
pub(super) struct Environment {
    /// The variables of the process, and those of `.env` that are unset there.
    pub(super) vars: BTreeMap<String, String>,
    /// What is wrong with either.
    pub(super) errors: Vec<String>,
    /// What was odd and has been corrected.
    pub(super) warnings: Vec<String>,
}

impl Environment {
    /// Removes byte order marks at the start of names and at both ends of values. `$(cat file)` and readers of
    /// `--env-file` pass them on. A name without a mark takes precedence over the same name with one.
    fn drop_marks(&mut self) {
        let is_marked = |text: &str| text.contains(BYTE_ORDER_MARK);
        for (name, value) in std::mem::take(&mut self.vars) {
            if !is_marked(&name) && !is_marked(&value) {
                self.vars.insert(name, value);
                continue;
            }
            let bare_name = name.trim_start_matches(BYTE_ORDER_MARK).to_owned();
            let bare = value.trim().trim_matches(BYTE_ORDER_MARK);
            let shown: String = bare_name.chars().filter(|c| !c.is_control()).take(100).collect();
            if bare_name != name {
                self.warnings.push(format!(
                    "{shown}: the name of the variable begins with {MARK}; save the file that it comes from as UTF-8 without it"
                ));
            }
            if bare != value.trim() {
                self.warnings.push(format!(
                    "{shown}: an end of the value has {MARK}; save the file that it comes from as UTF-8 without it"
                ));
            }
            self.vars.entry(bare_name).or_insert_with(|| bare.to_owned());
        }
    }
}

/// Reads the environment of the process and `.env`.
pub(super) fn environment() -> Environment {
    const OURS: [&str; 3] = ["DOCKFLARE_", "CF_ACCESS_", "CLOUDFLARED_"];
    let mut environment = match disk::read_at_start(Path::new(".env"), MOST_BYTES) {
        Ok(bytes) => of_file(bytes),
        Err(unread) if unread.is_missing() => Environment::default(),
        Err(unread) => Environment { errors: vec![format!(".env: {unread}")], ..Environment::default() },
    };
    let Environment { vars, errors, .. } = &mut environment;
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
    environment.drop_marks();
    environment
}

/// The variables that a `.env` sets. Drops a byte order mark before the first line and warns of it: other programs that
/// read the file may take it as part of the first name.
fn of_file(bytes: Vec<u8>) -> Environment {
    let mut environment = Environment::default();
    match text_of(bytes) {
        Ok((text, marked)) => {
            if marked {
                environment
                    .warnings
                    .push(format!(".env line 1: begins with {MARK}; save the file as UTF-8 without it"));
            }
            environment.errors = read_lines(&text, &mut environment.vars);
        }
        Err(problem) => environment.errors.push(format!(".env: {problem}")),
    }
    environment
}

/// Yields a text line by line and counts the lines read.
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

/// Adds the variables of a `.env` to `vars`. Returns the errors by line number: the line itself may hold a secret.
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
        _ if line.contains('\u{feff}') => {
            "has a byte order mark in the middle of the file, as two files put together have it: write the line anew"
        }
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

    #[test]
    fn a_byte_order_mark_is_dropped_where_it_is_first_and_named_with_its_line_everywhere() {
        let of = |text: &str| of_file(text.as_bytes().to_vec());
        let first = of("\u{feff}DOCKFLARE_API_KEY=s3cret\r\nB=2\r\n");
        assert_eq!((first.vars["DOCKFLARE_API_KEY"].as_str(), first.vars["B"].as_str()), ("s3cret", "2"));
        assert!(first.errors.is_empty(), "{first:?}");
        assert!(first.warnings.len() == 1 && first.warnings[0].starts_with(".env line 1: "), "{first:?}");
        assert!(first.warnings[0].contains("byte order mark") && !first.warnings[0].contains("s3cret"), "{first:?}");
        let later = of("A=1\n\u{feff}DOCKFLARE_API_KEY=s3cret\n");
        assert!(later.errors.len() == 1 && later.errors[0].starts_with(".env line 2: "), "{later:?}");
        assert!(later.errors[0].contains("byte order mark") && !later.errors[0].contains("s3cret"), "{later:?}");
        assert!(of("A=1\n").warnings.is_empty());
        let value = of("DOCKFLARE_API_KEY=\u{feff}s3cret\n");
        assert!(value.errors.is_empty(), "{value:?}");
        let utf16 = of_file(b"\xff\xfeA\0=\x001\0".to_vec());
        assert!(utf16.errors.len() == 1 && utf16.errors[0].contains("UTF-16"), "{utf16:?}");
    }

    #[test]
    fn a_byte_order_mark_at_a_name_or_a_value_is_dropped_and_said_without_the_value() {
        let set = [
            ("A", "fine"),
            ("CLOUDFLARED_REGION", "us"),
            ("CLOUDFLARED_IMAGE", "cloudflare/cloudflared:1\u{feff} "),
            ("DOCKFLARE_API_KEY", "\u{feff}s3cret-key"),
            ("\u{feff}DOCKFLARE_MASTER_URL", "https://m"),
            ("\u{feff}CLOUDFLARED_REGION", "other"),
        ];
        let vars = set.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
        let mut environment = Environment { vars, ..Environment::default() };
        environment.drop_marks();
        for (name, value) in [
            ("A", "fine"),
            ("CLOUDFLARED_REGION", "us"),
            ("CLOUDFLARED_IMAGE", "cloudflare/cloudflared:1"),
            ("DOCKFLARE_API_KEY", "s3cret-key"),
            ("DOCKFLARE_MASTER_URL", "https://m"),
        ] {
            assert_eq!(environment.vars[name], value);
        }
        let said = &environment.warnings;
        assert_eq!(said.len(), 4, "{said:?}");
        for name in ["DOCKFLARE_MASTER_URL", "DOCKFLARE_API_KEY", "CLOUDFLARED_IMAGE", "CLOUDFLARED_REGION"] {
            assert!(said.iter().any(|line| line.starts_with(name) && line.contains("byte order mark")), "{said:?}");
        }
        assert!(!said.join("").contains("s3cret"), "{said:?}");
    }
}
