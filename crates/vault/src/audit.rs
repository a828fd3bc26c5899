//! Records who asked for what and what was decided: one JSON line each, in a file that nobody can edit unnoticed.
//!
//! Each line carries a keyed hash of itself and of the line before, and the store holds the newest hash. Changing,
//! removing, inserting or moving a line breaks the chain, and the store notices when lines are cut off at the end.
//! The store alone keeps the key. A line is in the file before the operation takes effect. The line of a read survives
//! the end of the process, and the line of a change also survives a loss of power. If the line cannot be written, the
//! request is not answered.
//!
//! A full file is renamed to `….1`, `….1` to `….2`, and so on. Files beyond the number to keep are removed later: the
//! store first remembers where the newest of them ended, so that removing any more than those is noticed.

#![expect(clippy::disallowed_methods, reason = "blocks on the disk; whoever serves calls it on a thread of its own")]

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, ErrorKind, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use jiff::Timestamp;
use serde::Serialize;

use crate::grant::{Decision, Operation};
use crate::place::plain;
use crate::principal::Principal;
use crate::seal::Key;
use crate::secret::SecretName;
use crate::store::{AuditHead, advice};

/// Longest line to read. A principal and a name have about 255 bytes each at most, and a missing row repeats both.
const MAX_LINE_BYTES: u64 = 4096;
const MAC_HEX: usize = 64;
/// Most digits in the number after a file's name. The settings allow far fewer files.
const MAX_DIGITS: usize = 5;
const MAC_KEY: &str = ",\"mac\":\"";

/// Where the audit is and how much of it to keep.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AuditConfig {
    /// The newest file. Older ones have `.1`, `.2`, ... after their name.
    pub file: PathBuf,
    /// Size from which a new file is started.
    pub max_bytes: u64,
    /// Number of older files to keep.
    pub keep: usize,
}

/// What one line records.
#[derive(Debug, Clone, Copy)]
pub struct Entry<'a> {
    /// Who asked.
    pub principal: &'a Principal,
    /// Which operation.
    pub operation: Operation,
    /// On which secret.
    pub name: Option<&'a SecretName>,
    /// Which version was read or made.
    pub version: Option<u64>,
    /// Id of the master key for which the keys were rewrapped.
    pub master_key: Option<&'a str>,
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
        /// Number of the line, from 1.
        line: u64,
    },
    /// Lines are missing at the end.
    #[error("the audit ends with line {found}, and the store knows {known}: lines were cut off at the end")]
    Cut {
        /// Number of the newest line in the files.
        found: u64,
        /// Number of the newest line that was written.
        known: u64,
    },
}

/// The result of verifying a whole audit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verified {
    /// Lines that were read.
    pub lines: u64,
    /// Files that were read.
    pub files: usize,
    /// What is wrong, in the order of the files.
    pub broken: Vec<Broken>,
}

/// The files at one instant, oldest first, and the end of the audit as known then.
#[derive(Debug)]
pub struct Snapshot {
    /// Name, size, and the file.
    files: Vec<(String, u64, File)>,
    head: AuditHead,
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
    #[serde(skip_serializing_if = "Option::is_none")]
    master_key: Option<&'a str>,
    decision: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    missing: Option<&'a str>,
}

impl Audit {
    /// Checks the files and prepares the newest. Cuts off an unfinished line that a crash left: nobody got an answer
    /// for it. After a SIGKILL the file can be ahead of `head`. Moves `head` to the last line if the chain holds.
    ///
    /// # Errors
    /// [`AuditError`] when the audit cannot be read or written. What is wrong with its content is returned instead.
    pub fn open(config: AuditConfig, key: Key, head: &mut AuditHead) -> Result<(Self, Vec<Broken>), AuditError> {
        let audit = Self { config, key, open: Mutex::new(None), problem: Mutex::new(None) };
        audit.cut_torn_line().map_err(|error| audit.error("read", error))?;
        let (end, mut broken) = audit.follow(audit.snapshot(head)?).map_err(|error| audit.error("read", error))?;
        if end.lines < head.lines {
            broken.push(Broken::Cut { found: end.lines, known: head.lines });
        }
        if broken.is_empty() {
            (head.lines, head.mac) = (end.lines, end.mac);
        }
        Ok((audit, broken))
    }

    /// Writes one line. With `durable`, the line is on disk when this returns.
    ///
    /// # Errors
    /// [`AuditError`]; the line is then not in the file, and `head` is unchanged.
    pub fn record(&self, head: &mut AuditHead, entry: &Entry<'_>, durable: bool) -> Result<(), AuditError> {
        let written = self.append(head, entry, durable);
        *self.problem.lock().unwrap_or_else(PoisonError::into_inner) = written.as_ref().err().map(ToString::to_string);
        written
    }

    /// Why the newest line could not be written, if it failed.
    pub fn problem(&self) -> Option<String> {
        self.problem.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn append(&self, head: &mut AuditHead, entry: &Entry<'_>, durable: bool) -> Result<(), AuditError> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let (text, mac) = self.line(head, entry);
        let opened = self.opened(&mut open)?;
        let (file, bytes) = if opened.1 >= self.config.max_bytes {
            *open = None;
            self.begin_new_file().map_err(|error| self.error("renamed", error))?;
            self.opened(&mut open)?
        } else {
            // Borrow again: the other branch needs `open` free.
            self.opened(&mut open)?
        };
        let written = file.write_all(text.as_bytes()).and_then(|()| if durable { file.sync_data() } else { Ok(()) });
        if let Err(error) = written {
            // Half a line would corrupt the next one.
            let _ = file.set_len(*bytes);
            *open = None;
            return Err(self.error("written", error));
        }
        *bytes += text.len() as u64;
        (head.lines, head.mac) = (head.lines + 1, mac);
        Ok(())
    }

    /// Flushes the written lines to disk, and returns the end of the audit that is there.
    ///
    /// # Errors
    /// [`AuditError`].
    pub fn sync(&self, head: &AuditHead) -> Result<AuditHead, AuditError> {
        let open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((file, _)) = &*open {
            file.sync_data().map_err(|error| self.error("written", error))?;
        }
        Ok(*head)
    }

    /// Tries the disk again after a line could not be written: writes some spaces and cuts them off again. If that
    /// fails halfway, the next start cuts them off.
    pub fn probe(&self) {
        if self.problem().is_none() {
            return;
        }
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let tried = self.opened(&mut open).map_err(|error| error.error).and_then(|(file, bytes)| {
            let written = file.write_all(&[b' '; MAX_LINE_BYTES as usize]);
            file.set_len(*bytes).and(written)
        });
        match tried {
            Ok(()) => *self.problem.lock().unwrap_or_else(PoisonError::into_inner) = None,
            Err(_) => *open = None,
        }
    }

    /// Finds where the newest file beyond those to keep ends, if there is one. Reads the end of one file.
    ///
    /// # Errors
    /// [`AuditError`].
    pub fn surplus(&self) -> Result<Option<(u64, [u8; 32])>, AuditError> {
        let read = || -> io::Result<_> {
            let newest = self.numbers()?.into_iter().find(|number| *number > self.config.keep);
            newest.map_or(Ok(None), |number| last_line(&self.path(number)))
        };
        let last = read().map_err(|error| self.error("read", error))?;
        Ok(last.map(|parsed| (parsed.line, parsed.mac)))
    }

    /// Removes the files beyond those to keep, as far as the store remembers where they ended. A file that became too
    /// old in the meantime waits for the next call.
    ///
    /// # Errors
    /// [`AuditError`].
    pub fn remove_surplus(&self, head: &AuditHead) -> Result<(), AuditError> {
        let remove = || -> io::Result<()> {
            for number in self.numbers()?.into_iter().rev().filter(|number| *number > self.config.keep) {
                let path = self.path(number);
                if last_line(&path)?.is_none_or(|last| last.line <= head.removed.0) {
                    fs::remove_file(path)?;
                }
            }
            Ok(())
        };
        remove().map_err(|error| self.error("removed", error))
    }

    /// Opens the files of this instant, to verify them while others keep writing. A file that is renamed or removed in
    /// the meantime stays readable.
    ///
    /// # Errors
    /// [`AuditError`] when a file cannot be opened.
    pub fn snapshot(&self, head: &AuditHead) -> Result<Snapshot, AuditError> {
        let opened = || -> io::Result<_> {
            let mut files = vec![];
            for number in self.numbers()?.into_iter().rev() {
                let (path, file) = (self.path(number), plain(File::options().read(true), &self.path(number))?);
                files.push((file_name(&path), file.metadata()?.len(), file));
            }
            Ok(files)
        };
        let files = opened().map_err(|error| self.error("read", error))?;
        Ok(Snapshot { files, head: *head })
    }

    /// Reads all files and follows the chain from line to line. Holds no lock, so nobody waits for it.
    ///
    /// # Errors
    /// [`AuditError`] when a file cannot be read.
    pub fn verify(&self, snapshot: Snapshot) -> Result<Verified, AuditError> {
        let (head, files) = (snapshot.head, snapshot.files.len());
        let (end, mut broken) = self.follow(snapshot).map_err(|error| self.error("read", error))?;
        if end.lines < head.lines {
            broken.push(Broken::Cut { found: end.lines, known: head.lines });
        }
        Ok(Verified { lines: end.lines.saturating_sub(head.removed.0), files, broken })
    }

    /// Follows the chain from the first line that was not removed to the last one, and collects what is wrong. The line
    /// at the number that the store knows must have the hash that the store knows.
    fn follow(&self, snapshot: Snapshot) -> io::Result<(AuditHead, Vec<Broken>)> {
        let head = snapshot.head;
        let mut end = AuditHead { lines: head.removed.0, mac: head.removed.1, removed: head.removed };
        let mut broken = vec![];
        for (name, bytes, file) in snapshot.files {
            each_line(file.take(bytes), |line, parsed| match parsed {
                // The store counts this line as removed, but its file is still there.
                Some(parsed) if parsed.line <= head.removed.0 => {}
                Some(parsed) => {
                    let is_known = parsed.line != head.lines || parsed.mac == head.mac;
                    if !self.follows(&parsed, end.lines, &end.mac) || !is_known {
                        broken.push(Broken::Chain { file: name.clone(), line });
                    }
                    (end.lines, end.mac) = (parsed.line, parsed.mac);
                }
                None => broken.push(Broken::Chain { file: name.clone(), line }),
            })?;
        }
        Ok((end, broken))
    }

    /// The numbers of the existing files, newest first; 0 is the newest file. A crash during the renaming leaves a gap.
    fn numbers(&self) -> io::Result<Vec<usize>> {
        let Some(name) = self.config.file.file_name() else { return Ok(vec![]) };
        let folder = self.config.file.parent().filter(|folder| !folder.as_os_str().is_empty());
        let mut numbers = vec![];
        let entries = match fs::read_dir(folder.unwrap_or(Path::new("."))) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(vec![]),
            entries => entries?,
        };
        for entry in entries {
            let entry = entry?.file_name();
            let Some(rest) = entry.as_encoded_bytes().strip_prefix(name.as_encoded_bytes()) else { continue };
            let number = match rest {
                [] => Some(0),
                // Only names that we write: no sign, no leading zero.
                [b'.', digits @ ..] if digits.len() <= MAX_DIGITS && digits.first() != Some(&b'0') => {
                    std::str::from_utf8(digits).ok().and_then(|digits| digits.parse().ok())
                }
                _ => None,
            };
            numbers.extend(number);
        }
        numbers.sort_unstable();
        Ok(numbers)
    }

    fn opened<'a>(&self, open: &'a mut Option<(File, u64)>) -> Result<&'a mut (File, u64), AuditError> {
        match open {
            Some(open) => Ok(open),
            closed => Ok(closed.insert(self.open_newest().map_err(|error| self.error("opened", error))?)),
        }
    }

    fn error(&self, verb: &'static str, error: io::Error) -> AuditError {
        AuditError { path: self.config.file.clone(), verb, error }
    }

    /// The path of a file by its number; the newest is 0.
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
            master_key: entry.master_key,
            decision,
            missing,
        };
        // Cannot fail: JSON can hold these texts and numbers.
        let mut text = serde_json::to_string(&line).unwrap_or_default();
        let mac = self.key.mac(b"audit", &[&head.mac, text.as_bytes()]);
        text.pop();
        let hex: String = mac.iter().map(|byte| format!("{byte:02x}")).collect();
        text.extend([MAC_KEY, &hex, "\"}\n"]);
        (text, mac)
    }

    fn open_newest(&self) -> io::Result<(File, u64)> {
        let is_new = !self.path(0).exists();
        let file = plain(File::options().create(true).append(true).mode(0o600), &self.path(0))?;
        let bytes = file.metadata()?.len();
        if is_new {
            self.sync_folder()?;
        }
        Ok((file, bytes))
    }

    /// Makes room for a new file by renaming, up to the first free number. A crash in between loses nothing: it leaves
    /// a gap, which the next call closes.
    fn begin_new_file(&self) -> io::Result<()> {
        let numbers = self.numbers()?;
        let free = (1..).find(|number| !numbers.contains(number)).unwrap_or_default();
        for number in numbers.into_iter().rev().filter(|number| *number < free) {
            fs::rename(self.path(number), self.path(number + 1))?;
        }
        self.sync_folder()
    }

    /// Flushes the folder, which puts the names of its files on disk.
    fn sync_folder(&self) -> io::Result<()> {
        match self.config.file.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => File::open(folder)?.sync_all(),
            _ => Ok(()),
        }
    }

    /// Cuts off everything after the last line ending.
    fn cut_torn_line(&self) -> io::Result<()> {
        let mut file = match plain(File::options().read(true).write(true), &self.path(0)) {
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

    fn follows(&self, parsed: &Parsed, lines: u64, mac: &[u8; 32]) -> bool {
        parsed.line == lines + 1 && self.key.mac(b"audit", &[mac, parsed.text.as_bytes()]) == parsed.mac
    }
}

fn each_line(text: impl Read, mut each: impl FnMut(u64, Option<Parsed>)) -> io::Result<()> {
    let mut reader = BufReader::new(text);
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

/// The last whole line of a file, `None` if there is none.
fn last_line(path: &Path) -> io::Result<Option<Parsed>> {
    let mut file = plain(File::options().read(true), path)?;
    // Enough for one line and the ending of the line before.
    file.seek(SeekFrom::Start(file.metadata()?.len().saturating_sub(MAX_LINE_BYTES + 1)))?;
    let mut last = None;
    each_line(file.take(MAX_LINE_BYTES + 1), |_, parsed| last = parsed.or(last.take()))?;
    Ok(last)
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// A parsed line.
struct Parsed {
    line: u64,
    /// The line without its hash, as it was hashed.
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
    let mut whole = 0;
    let read = each_line(bytes, |_, parsed| {
        if let Some(parsed) = parsed {
            // A line is longer with its hash than without.
            assert!(parsed.text.ends_with('}'));
            whole += parsed.text.len() + MAC_HEX;
        }
    });
    assert!(read.is_ok() && whole <= bytes.len());
}

#[cfg(test)]
mod tests;
