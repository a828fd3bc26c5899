//! Who asked for what, and what was decided: one JSON line each, in a file that cannot be edited without a trace.
//!
//! Each line carries the keyed hash of itself and of the one before, and the store holds the newest. So a line that was
//! changed, removed, put in or moved breaks the chain, and lines that were cut off at the end are missed by the store.
//! The key never leaves the store. A line is in the file before what it tells has an effect; a read's line survives
//! the end of the process, a change's also the loss of power. What cannot be written is not answered.
//!
//! The file is renamed to `….1` when it is full, `….1` to `….2`, and the last one goes; the store remembers where that
//! one ended, so that nobody can remove more.

#![expect(clippy::disallowed_methods, reason = "blocks on the disk; whoever serves calls it on a thread of its own")]

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, ErrorKind, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use jiff::Timestamp;
use serde::Serialize;

use crate::grant::{Decision, Operation};
use crate::principal::Principal;
use crate::seal::Key;
use crate::secret::SecretName;
use crate::store::{AuditHead, advice};

/// Longest line that is read: a principal, a name and a missing row have 255 bytes each.
const MAX_LINE_BYTES: u64 = 4096;
const MAC_HEX: usize = 64;
const MAC_KEY: &str = ",\"mac\":\"";

/// Where the audit is and how much of it is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AuditConfig {
    /// The newest file; older ones have `.1`, `.2`, ... behind their name.
    pub file: PathBuf,
    /// Size from which on a new file is begun.
    pub max_bytes: u64,
    /// Older files that are kept.
    pub keep: usize,
}

/// What one line tells.
#[derive(Debug, Clone, Copy)]
pub struct Entry<'a> {
    /// Who asked.
    pub principal: &'a Principal,
    /// For what.
    pub operation: Operation,
    /// Of which secret.
    pub name: Option<&'a SecretName>,
    /// Which version was read or made.
    pub version: Option<u64>,
    /// What was decided.
    pub decision: &'a Decision,
}

/// The audit cannot be written or read.
#[derive(Debug, thiserror::Error)]
#[error("the audit {} cannot be {verb}: {error}{}; nothing is answered until it can be", path.display(), advice(error))]
pub struct AuditError {
    path: PathBuf,
    verb: &'static str,
    #[source]
    error: io::Error,
}

/// What is wrong with an audit.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Broken {
    /// The chain does not hold.
    #[error("{file}, line {line}: it was changed, or lines before it were removed, added or moved")]
    Chain {
        /// Name of the file.
        file: String,
        /// From 1.
        line: u64,
    },
    /// Lines are missing at the end.
    #[error("the audit ends with line {found}, and the store knows {known}: lines were cut off at the end")]
    Cut {
        /// Number of the newest line there is.
        found: u64,
        /// Number of the newest line that was written.
        known: u64,
    },
}

/// What a whole audit came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verified {
    /// Lines that were read.
    pub lines: u64,
    /// Files that they are in.
    pub files: usize,
    /// What is wrong, in the order of the files.
    pub broken: Vec<Broken>,
}

/// The audit of a store. All methods block on the disk.
#[derive(Debug)]
pub struct Audit {
    config: AuditConfig,
    key: Key,
    /// The open file and its size.
    open: Mutex<Option<(File, u64)>>,
    /// Why the newest line could not be written.
    problem: Mutex<Option<String>>,
}

#[derive(Serialize)]
struct Line<'a> {
    time: String,
    line: u64,
    principal: String,
    operation: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    version: Option<u64>,
    decision: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    missing: Option<&'a str>,
}

impl Audit {
    /// Opens the newest file. What a crash left of a line that nobody was answered for is cut off. Lines that are ahead
    /// of `head`, since the process was killed, are taken into it when the chain shows that they are ours.
    ///
    /// # Errors
    /// [`AuditError`] when it cannot be read or written. What is wrong with its content is returned.
    pub fn open(config: AuditConfig, key: Key, head: &mut AuditHead) -> Result<(Self, Vec<Broken>), AuditError> {
        let audit = Self { config, key, open: Mutex::new(None), problem: Mutex::new(None) };
        audit.cut_torn_line().map_err(|error| audit.error("read", error))?;
        let mut broken = vec![];
        let end = audit.read_file(0, &mut broken).map_err(|error| audit.error("read", error))?;
        match end {
            Some((lines, mac)) if lines >= head.lines && broken.is_empty() => (head.lines, head.mac) = (lines, mac),
            end => {
                // In the file before, perhaps: a new one was begun just before the end.
                let before = audit.read_file(1, &mut vec![]).map_err(|error| audit.error("read", error))?;
                let found = end.or(before).map_or(head.removed.0, |(lines, _)| lines);
                if found < head.lines {
                    broken.push(Broken::Cut { found, known: head.lines });
                }
            }
        }
        Ok((audit, broken))
    }

    /// Writes one line. `durable`: it is on disk when this returns.
    ///
    /// # Errors
    /// [`AuditError`]; the line is then not in the file, and `head` as it was.
    pub fn record(&self, head: &mut AuditHead, entry: &Entry<'_>, durable: bool) -> Result<(), AuditError> {
        let written = self.append(head, entry, durable);
        *self.problem.lock().unwrap_or_else(PoisonError::into_inner) = written.as_ref().err().map(ToString::to_string);
        written
    }

    /// Why the newest line could not be written, where it could not.
    pub fn problem(&self) -> Option<String> {
        self.problem.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn append(&self, head: &mut AuditHead, entry: &Entry<'_>, durable: bool) -> Result<(), AuditError> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if open.as_ref().is_some_and(|(_, bytes)| *bytes >= self.config.max_bytes) {
            *open = None;
            self.begin_new_file(head).map_err(|error| self.error("renamed", error))?;
        }
        let (text, mac) = self.line(head, entry);
        let (file, bytes) = match &mut *open {
            Some(open) => open,
            closed => {
                let opened = self.open_newest().map_err(|error| self.error("opened", error))?;
                closed.insert(opened)
            }
        };
        let written = file.write_all(text.as_bytes()).and_then(|()| if durable { file.sync_data() } else { Ok(()) });
        if let Err(error) = written {
            // Half a line would break the next one.
            let _ = file.set_len(*bytes);
            *open = None;
            return Err(self.error("written", error));
        }
        *bytes += text.len() as u64;
        (head.lines, head.mac) = (head.lines + 1, mac);
        Ok(())
    }

    /// Reads all that is kept and follows the chain from one line to the next.
    ///
    /// # Errors
    /// [`AuditError`] when a file cannot be read.
    pub fn verify(&self, head: &AuditHead) -> Result<Verified, AuditError> {
        let mut verified = Verified { lines: 0, files: 0, broken: vec![] };
        let mut end = (head.removed.0, head.removed.1);
        for number in (0..=self.config.keep).rev() {
            let before = end;
            let read = self.follow(number, &mut end, &mut verified.broken);
            match read {
                Err(error) if error.kind() == ErrorKind::NotFound => continue,
                read => read.map_err(|error| self.error("read", error))?,
            }
            verified.files += 1;
            verified.lines += end.0.saturating_sub(before.0);
        }
        if end.0 < head.lines {
            verified.broken.push(Broken::Cut { found: end.0, known: head.lines });
        }
        Ok(verified)
    }

    fn error(&self, verb: &'static str, error: io::Error) -> AuditError {
        AuditError { path: self.config.file.clone(), verb, error }
    }

    /// The newest file is 0.
    fn path(&self, number: usize) -> PathBuf {
        if number == 0 {
            return self.config.file.clone();
        }
        let mut path = self.config.file.clone().into_os_string();
        path.push(format!(".{number}"));
        path.into()
    }

    fn line(&self, head: &AuditHead, entry: &Entry<'_>) -> (String, [u8; 32]) {
        let (decision, missing) = match entry.decision {
            Decision::Allowed => ("allowed", None),
            Decision::Denied { missing } => ("denied", Some(missing.as_str())),
        };
        let line = Line {
            time: Timestamp::now().strftime("%Y-%m-%dT%H:%M:%S%.3fZ").to_string(),
            line: head.lines + 1,
            principal: entry.principal.to_string(),
            operation: entry.operation.as_str(),
            name: entry.name.map(SecretName::as_str),
            version: entry.version,
            decision,
            missing,
        };
        // Texts and numbers: there is nothing that JSON cannot hold.
        let mut text = serde_json::to_string(&line).unwrap_or_default();
        let mac = self.key.mac(b"audit", &[&head.mac, text.as_bytes()]);
        text.pop();
        let hex: String = mac.iter().map(|byte| format!("{byte:02x}")).collect();
        text.extend([MAC_KEY, &hex, "\"}\n"]);
        (text, mac)
    }

    fn open_newest(&self) -> io::Result<(File, u64)> {
        let file = File::options().create(true).append(true).mode(0o600).open(self.path(0))?;
        let bytes = file.metadata()?.len();
        Ok((file, bytes))
    }

    /// Renames from the oldest on, so that a crash in between leaves a gap in the numbers and loses nothing.
    fn begin_new_file(&self, head: &mut AuditHead) -> io::Result<()> {
        let last = self.config.keep;
        if last == 0 || self.path(last).exists() {
            if let Some(end) = self.read_file(last, &mut vec![])? {
                head.removed = end;
            }
            fs::remove_file(self.path(last))?;
        }
        for number in (0..last).rev() {
            match fs::rename(self.path(number), self.path(number + 1)) {
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                renamed => renamed?,
            }
        }
        Ok(())
    }

    /// Cuts off what is behind the last end of a line.
    fn cut_torn_line(&self) -> io::Result<()> {
        let mut file = match File::options().read(true).write(true).open(self.path(0)) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
            file => file?,
        };
        let bytes = file.metadata()?.len();
        let from = bytes.saturating_sub(MAX_LINE_BYTES);
        file.seek(SeekFrom::Start(from))?;
        let mut tail = vec![];
        (&file).take(MAX_LINE_BYTES).read_to_end(&mut tail)?;
        let whole = tail.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at as u64 + 1);
        if whole < tail.len() as u64 {
            tracing::warn!(
                bytes = tail.len() as u64 - whole,
                "cut an unfinished line off the audit: nobody was answered for it"
            );
            file.set_len(from + whole)?;
        }
        Ok(())
    }

    /// The end of one file, and where its own chain breaks; the line before its first one is taken as it says.
    fn read_file(&self, number: usize, broken: &mut Vec<Broken>) -> io::Result<Option<(u64, [u8; 32])>> {
        let mut before = None;
        let found = self.each_line(number, |line, parsed| {
            let Some(parsed) = parsed else {
                broken.push(Broken::Chain { file: file_name(&self.path(number)), line });
                return;
            };
            if let Some((lines, mac)) = before
                && !self.follows(&parsed, lines, &mac)
            {
                broken.push(Broken::Chain { file: file_name(&self.path(number)), line });
            }
            before = Some((parsed.line, parsed.mac));
        });
        match found {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            found => found.map(|()| before),
        }
    }

    /// Follows the chain through one file, from the end of the one before to its own.
    fn follow(&self, number: usize, end: &mut (u64, [u8; 32]), broken: &mut Vec<Broken>) -> io::Result<()> {
        self.each_line(number, |line, parsed| {
            let file = || file_name(&self.path(number));
            match parsed {
                None => broken.push(Broken::Chain { file: file(), line }),
                Some(parsed) => {
                    if !self.follows(&parsed, end.0, &end.1) {
                        broken.push(Broken::Chain { file: file(), line });
                    }
                    *end = (parsed.line, parsed.mac);
                }
            }
        })
    }

    fn follows(&self, parsed: &Parsed, lines: u64, mac: &[u8; 32]) -> bool {
        parsed.line == lines + 1 && self.key.mac(b"audit", &[mac, parsed.text.as_bytes()]) == parsed.mac
    }

    fn each_line(&self, number: usize, mut each: impl FnMut(u64, Option<Parsed>)) -> io::Result<()> {
        let mut reader = BufReader::new(File::open(self.path(number))?);
        let (mut bytes, mut at) = (vec![], 0);
        loop {
            bytes.clear();
            if reader.by_ref().take(MAX_LINE_BYTES).read_until(b'\n', &mut bytes)? == 0 {
                return Ok(());
            }
            at += 1;
            each(at, Parsed::read(&bytes));
        }
    }
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// A line taken apart.
struct Parsed {
    line: u64,
    /// Without its hash, as it was hashed.
    text: String,
    mac: [u8; 32],
}

impl Parsed {
    fn read(bytes: &[u8]) -> Option<Self> {
        let line = std::str::from_utf8(bytes).ok()?.strip_suffix("\"}\n")?;
        let (text, hex) = line.split_at_checked(line.len().checked_sub(MAC_HEX)?)?;
        let text = format!("{}}}", text.strip_suffix(MAC_KEY)?);
        let mut mac = [0; 32];
        for (byte, pair) in mac.iter_mut().zip(hex.as_bytes().chunks_exact(2)) {
            *byte = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
        }
        #[derive(serde::Deserialize)]
        struct Number {
            line: u64,
        }
        let Number { line } = serde_json::from_str(&text).ok()?;
        Some(Self { line, text, mac })
    }
}

#[cfg(feature = "fuzzing")]
pub(crate) fn fuzz(bytes: &[u8]) {
    let _ = Parsed::read(bytes);
}

#[cfg(test)]
mod tests;
