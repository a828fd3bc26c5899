//! A program that reads a workload's files as fast as it can and counts bad reads. It runs in its own image, without a
//! shell, as a user who may read files of group 1000.
//!
//! `checker FOLDER LAST` expects the files `key`, which holds eight digits 512 times, and `both`, which holds the
//! content of `key` twice. It prints `seen DIGITS NANOSECONDS` for each new version and `reads N` every 99,999 reads.
//! It ends when it has seen LAST, with exit code 0 if no read found a file missing, cut, mixed with another version, or
//! older than an earlier read.

#![allow(clippy::print_stdout, reason = "it talks to a test through its log")]
#![allow(clippy::disallowed_methods, clippy::disallowed_macros, reason = "it does one thing and nobody waits for it")]

use std::fs::File;
use std::io::{self, ErrorKind, Read};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::fs::{Mode, OFlags, openat};

/// Digits of a version, and how often `key` repeats them.
const DIGITS: usize = 8;
const TIMES: usize = 512;

#[derive(Default)]
struct Count {
    reads: u64,
    missing: u64,
    torn: u64,
    mixed: u64,
    older: u64,
    versions: u64,
}

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let (Some(folder), Some(last)) = (arguments.next(), arguments.next()) else { return ExitCode::from(64) };
    let folder = PathBuf::from(folder);
    while !folder.join("key").exists() {
        std::thread::sleep(Duration::from_millis(1));
    }
    let mut count = Count::default();
    let mut newest = String::new();
    while newest != last {
        let one = std::fs::read(folder.join("key"));
        if let Some(version) = count.version(one, 1) {
            count.note(&mut newest, version);
        }
        match together(&folder) {
            Ok((key, both)) => {
                let (key, both) = (count.version(Ok(key), 1), count.version(Ok(both), 2));
                if key != both {
                    count.mixed += 1;
                }
                if let Some(version) = key {
                    count.note(&mut newest, version);
                }
            }
            Err(error) => {
                count.version(Err(error), 1);
            }
        }
        count.reads += 3;
        if count.reads % 99_999 == 0 {
            println!("reads {}", count.reads);
        }
    }
    let Count { reads, missing, torn, mixed, older, versions } = count;
    println!("reads={reads} versions={versions} missing={missing} torn={torn} mixed={mixed} older={older}");
    ExitCode::from(u8::from(missing + torn + mixed + older > 0))
}

/// Reads both files of one version, as a program does that needs a matching pair.
fn together(folder: &Path) -> io::Result<(Vec<u8>, Vec<u8>)> {
    let set = File::open(folder.join("..data"))?;
    let read = |name: &str| {
        let mut bytes = vec![];
        File::from(openat(&set, name, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?).read_to_end(&mut bytes)?;
        io::Result::Ok(bytes)
    };
    Ok((read("key")?, read("both")?))
}

impl Count {
    /// Returns the version that was read if it is complete, and counts a missing or torn file.
    fn version(&mut self, read: io::Result<Vec<u8>>, copies: usize) -> Option<String> {
        let bytes = match read {
            Ok(bytes) => bytes,
            Err(error) => {
                if error.kind() != ErrorKind::NotFound {
                    println!("{error}");
                }
                self.missing += 1;
                return None;
            }
        };
        let version = bytes.get(..DIGITS)?.to_vec();
        if bytes != version.repeat(TIMES * copies) {
            self.torn += 1;
            return None;
        }
        String::from_utf8(version).ok()
    }

    fn note(&mut self, newest: &mut String, version: String) {
        if version < *newest {
            self.older += 1;
        }
        if version > *newest {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            println!("seen {version} {}", now.as_nanos());
            self.versions += 1;
            *newest = version;
        }
    }
}
