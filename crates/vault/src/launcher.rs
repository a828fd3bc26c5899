//! For images that read nothing but their environment. `exec` waits for files, reads them into the environment, and
//! becomes the program, so that no value shows up in a create call, an image or `docker inspect`. `wait` only waits.
//!
//! The vault puts this program into a folder that containers share ([`install`]). There it needs no configuration, no
//! store and no library. It reads one version of a workload's files and never a mixture of two: the files of a delivery
//! change together, by a link named `..data`.

#![allow(clippy::disallowed_methods, reason = "a command does one thing and has nothing else to serve")]

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::io::{self, ErrorKind, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use dockflare_host::disk::{self, Unread};
use tokio::signal::unix::{Signal, SignalKind, signal};
use zeroize::Zeroizing;

use crate::secret::MAX_VALUE_BYTES;

/// The link to the present files of a delivery.
pub const DATA: &str = "..data";
/// The folder that `exec` reads by default.
pub const DEFAULT_FOLDER: &str = "/run/secrets";
/// The name of the program in the folder that the containers share.
pub const PROGRAM: &str = "dockflare-vault";
/// Exit code after a time-out: the files have not come.
pub const NOT_YET: u8 = 75;
/// How often to look for missing files.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// A wait longer than this is reported, and again after every [`SAY_EVERY`].
const SAY_AFTER: Duration = Duration::from_secs(2);
const SAY_EVERY: Duration = Duration::from_secs(60);
/// How many times to look again at files that changed during the look.
const TRIES: usize = 100;
/// Largest variable that Linux takes, in bytes, with its name, the `=` and the zero at the end.
const MAX_VARIABLE_BYTES: usize = 32 * 4096;

/// What `exec` does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Launch {
    /// Folders with a file for each variable.
    pub folders: Vec<PathBuf>,
    /// Files with a line for each variable.
    pub env_files: Vec<PathBuf>,
    /// Single variables, each with its file.
    pub variables: Vec<(String, PathBuf)>,
    /// Longest wait; `None` for no limit.
    pub limit: Option<Duration>,
    /// The program and its arguments.
    pub command: Vec<OsString>,
}

/// Reads `NAME=FILE`.
///
/// # Errors
/// What is wrong with it.
pub fn variable(text: &str) -> Result<(String, PathBuf), String> {
    let (name, file) = text.split_once('=').ok_or("write NAME=FILE")?;
    if !is_name(name.as_bytes()) {
        return Err(format!("{name:?} is {NO_NAME}"));
    }
    if file.is_empty() { Err("write NAME=FILE".to_owned()) } else { Ok((name.to_owned(), file.into())) }
}

const NO_NAME: &str = "no name of a variable: letters, digits and '_', the first one no digit";

/// Whether programs and shells take this name.
fn is_name(name: &[u8]) -> bool {
    name.first().is_some_and(|first| !first.is_ascii_digit())
        && name.iter().all(|byte| byte.is_ascii_alphanumeric() || *byte == b'_')
}

/// A line for the user, and the exit code.
type Failure = (String, u8);
type Bytes = Zeroizing<Vec<u8>>;

/// The result of a look for the files.
enum Look<T> {
    There(T),
    /// What is missing.
    Missing(String),
}

/// What to read from a folder.
#[derive(Default)]
struct Wanted {
    /// Every file.
    all: bool,
    /// Files by name.
    files: Vec<OsString>,
}

impl Launch {
    /// Waits, reads the files and becomes the program. Returns only on an error, with its exit code: 64 for names or
    /// texts that cannot be used, 73 for a file that may not be read, 75 for a time-out, 126 for a program that cannot
    /// be run, 127 for one that does not exist, 128 plus the number of the signal that ended the wait.
    #[expect(clippy::disallowed_types, reason = "it starts no program, it becomes one")]
    pub fn run(self) -> Failure {
        let found = waited(self.limit, || self.look());
        let variables = match found {
            Ok(variables) => variables,
            Err(failure) => return failure,
        };
        let Some((program, arguments)) = self.command.split_first() else {
            return ("name the program after --".to_owned(), 64);
        };
        let mut command = std::process::Command::new(program);
        command.args(arguments);
        for (name, value) in &variables {
            command.env(name, OsStr::from_bytes(value));
        }
        // The standard library resets signals and their mask as for a new process.
        let error = std::os::unix::process::CommandExt::exec(&mut command);
        let shown = program.display();
        match error.kind() {
            ErrorKind::NotFound => (
                format!(
                    "{shown} is not there, by this path or in PATH, or what runs it is not: name the image's own program after --"
                ),
                127,
            ),
            ErrorKind::ArgumentListTooLong => (
                format!("{shown} cannot be run: the variables and arguments together are more than the system takes"),
                126,
            ),
            _ => (format!("{shown} cannot be run: {error}"), 126),
        }
    }

    /// Reads all variables, if all files are there.
    fn look(&self) -> Result<Look<BTreeMap<String, Bytes>>, Failure> {
        let mut wanted = BTreeMap::<PathBuf, Wanted>::new();
        for folder in &self.folders {
            wanted.entry(folder.clone()).or_default().all = true;
        }
        for file in self.env_files.iter().chain(self.variables.iter().map(|(_, file)| file)) {
            let (folder, name) = parted(file)?;
            wanted.entry(folder).or_default().files.push(name);
        }
        let mut read = BTreeMap::new();
        for (folder, wanted) in &wanted {
            match snapshot(folder, wanted)? {
                Look::There(files) => read.insert(folder.clone(), files),
                Look::Missing(what) => return Ok(Look::Missing(what)),
            };
        }
        let mut found = Variables::default();
        for folder in &self.folders {
            for (name, bytes) in read.get(folder).into_iter().flatten() {
                // Skip a file that another option names: it may be anything.
                let is_other = wanted.get(folder).is_some_and(|wanted| wanted.files.contains(name));
                if !is_other {
                    found.file(&folder.join(name), name.as_bytes(), bytes, true);
                }
            }
        }
        for (name, file) in &self.variables {
            let (folder, file_name) = parted(file)?;
            if let Some(bytes) = read.get(&folder).and_then(|files| files.get(&file_name)) {
                found.file(file, name.as_bytes(), bytes, false);
            }
        }
        for file in &self.env_files {
            let (folder, file_name) = parted(file)?;
            if let Some(bytes) = read.get(&folder).and_then(|files| files.get(&file_name)) {
                found.lines(file, bytes);
            }
        }
        if found.problems.is_empty() {
            Ok(Look::There(found.values.into_iter().map(|(name, (value, _))| (name, value)).collect()))
        } else {
            Err((found.problems.join("\n"), 64))
        }
    }
}

/// The variables that were read, and what is wrong with them.
#[derive(Default)]
struct Variables {
    values: BTreeMap<String, (Bytes, PathBuf)>,
    problems: Vec<String>,
}

impl Variables {
    /// Takes a file as one value, without the line break that editors add at its end.
    fn file(&mut self, file: &Path, name: &[u8], bytes: &Bytes, is_name_of_file: bool) {
        if !is_name(name) {
            let remedy =
                if is_name_of_file { "; rename it where it is delivered, or use --file NAME=FILE" } else { "" };
            self.problems.push(format!("{}: the name is {NO_NAME}{remedy}", file.display()));
            return;
        }
        let value = bytes.strip_suffix(b"\n").unwrap_or(bytes);
        let value = value.strip_suffix(b"\r").filter(|_| value.len() < bytes.len()).unwrap_or(value);
        self.insert(file, name, value, "");
    }

    /// Takes lines of NAME=VALUE as `docker run --env-file` does: the value is everything after the `=`, unchanged.
    fn lines(&mut self, file: &Path, bytes: &Bytes) {
        for (at, line) in bytes.split(|byte| *byte == b'\n').enumerate() {
            let line = line.strip_suffix(b"\r").unwrap_or(line);
            if line.iter().all(u8::is_ascii_whitespace) || line.trim_ascii_start().starts_with(b"#") {
                continue;
            }
            let place = format!(" line {}", at + 1);
            // Do not quote the line: it may be a piece of a value.
            let Some(equals) = line.iter().position(|byte| *byte == b'=') else {
                self.problems.push(format!("{}{place}: there is no '=': write NAME=VALUE", file.display()));
                continue;
            };
            let name = &line[..equals];
            if !is_name(name) {
                self.problems.push(format!("{}{place}: what stands before '=' is {NO_NAME}", file.display()));
                continue;
            }
            self.insert(file, name, &line[equals + 1..], &place);
        }
    }

    fn insert(&mut self, file: &Path, name: &[u8], value: &[u8], place: &str) {
        let name = String::from_utf8_lossy(name).into_owned();
        let place = format!("{}{place}", file.display());
        if value.contains(&0) {
            self.problems.push(format!(
                "{place}: the value of {name} has a zero byte, which no variable can have: let the program read the file"
            ));
            return;
        }
        let length = name.len() + value.len() + 2;
        if length > MAX_VARIABLE_BYTES {
            self.problems.push(format!(
                "{place}: {name} and its value have {length} bytes, and a variable has {MAX_VARIABLE_BYTES} at the most: let the program read the file"
            ));
            return;
        }
        let value = Zeroizing::new(value.to_vec());
        if let Some((_, other)) = self.values.insert(name.clone(), (value, file.to_owned())) {
            self.problems.push(format!(
                "{place}: {name} is in {} already, and which one counts cannot be told: leave one out",
                other.display()
            ));
        }
    }
}

/// Splits a path into the folder and the name in it.
fn parted(file: &Path) -> Result<(PathBuf, OsString), Failure> {
    match (file.parent(), file.file_name()) {
        (Some(folder), Some(name)) => Ok((folder.to_owned(), name.to_owned())),
        _ => Err((format!("{} is no file", file.display()), 64)),
    }
}

/// Reads files of a folder as they were at one moment.
fn snapshot(folder: &Path, wanted: &Wanted) -> Result<Look<BTreeMap<OsString, Bytes>>, Failure> {
    for _ in 0..TRIES {
        let version = version(folder)?;
        let place = version.as_ref().map_or_else(|| folder.to_owned(), |version| folder.join(version));
        let look = read(folder, &place, wanted, version.is_some());
        // The vault removes a set only after the link leads elsewhere, so with an unchanged link the read was whole.
        if version == self::version(folder)? {
            return look;
        }
    }
    Err((format!("{} changes all the time, and was never the same for the length of a look", folder.display()), 73))
}

/// Where the link of a delivery leads; `None` if there is no such link.
fn version(folder: &Path) -> Result<Option<PathBuf>, Failure> {
    match std::fs::read_link(folder.join(DATA)) {
        Ok(version) => Ok(Some(version)),
        // Another kind of folder, such as that of Docker's own secrets.
        Err(error)
            if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::InvalidInput | ErrorKind::NotADirectory) =>
        {
            Ok(None)
        }
        Err(error) => Err(unreadable(folder, &error)),
    }
}

fn read(
    folder: &Path,
    place: &Path,
    wanted: &Wanted,
    is_delivery: bool,
) -> Result<Look<BTreeMap<OsString, Bytes>>, Failure> {
    let mut names = wanted.files.clone();
    if wanted.all {
        let listed = match std::fs::read_dir(place).and_then(Iterator::collect::<io::Result<Vec<_>>>) {
            Ok(listed) => listed,
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
                return Ok(Look::Missing(format!("the folder {}", folder.display())));
            }
            Err(error) => return Err(unreadable(folder, &error)),
        };
        // Skip hidden files: users do not mean them, and the names of the vault's own entries begin with `..`.
        let listed = listed.iter().map(std::fs::DirEntry::file_name).filter(|name| !name.as_bytes().starts_with(b"."));
        let before = names.len();
        names.extend(listed);
        if names.len() == before && !is_delivery {
            return Ok(Look::Missing(format!("files in {}", folder.display())));
        }
    }
    let mut files = BTreeMap::new();
    for name in names {
        let path = place.join(&name);
        match disk::read(&path, MAX_VALUE_BYTES as u64) {
            Ok(bytes) => {
                files.insert(name, Zeroizing::new(bytes));
            }
            Err(unread) if unread.is_missing() => {
                return Ok(Look::Missing(folder.join(&name).display().to_string()));
            }
            Err(Unread::Io(error)) => return Err(unreadable(&folder.join(&name), &error)),
            Err(unread) => return Err((format!("{} {unread}", folder.join(&name).display()), 73)),
        }
    }
    Ok(Look::There(files))
}

fn unreadable(path: &Path, error: &io::Error) -> Failure {
    let (uid, gid) = (nix::unistd::geteuid(), nix::unistd::getegid());
    let remedy = match error.kind() {
        ErrorKind::PermissionDenied => {
            format!(", and this runs as user {uid} and group {gid}: give the files this group where they are delivered")
        }
        _ => String::new(),
    };
    (format!("{} cannot be read: {error}{remedy}", path.display()), 73)
}

/// Waits until the files of a delivery are there.
///
/// # Errors
/// [`NOT_YET`] after a time-out; otherwise what is wrong with the folder.
pub fn wait(folder: &Path, limit: Duration) -> Result<(), Failure> {
    waited(Some(limit), || {
        // Do not look into the files: the caller need not be able to read them.
        let Some(version) = version(folder)? else {
            let is_seen = |entry: io::Result<std::fs::DirEntry>| {
                entry.is_ok_and(|entry| !entry.file_name().as_bytes().starts_with(b"."))
            };
            return match std::fs::read_dir(folder).map(|mut listed| listed.any(is_seen)) {
                Ok(true) => Ok(Look::There(())),
                Ok(false) => Ok(Look::Missing(format!("files in {}", folder.display()))),
                Err(error) if error.kind() == ErrorKind::NotFound => {
                    Ok(Look::Missing(format!("the folder {}", folder.display())))
                }
                Err(error) => Err(unreadable(folder, &error)),
            };
        };
        match folder.join(version).is_dir() {
            true => Ok(Look::There(())),
            false => Ok(Look::Missing(format!("files in {}", folder.display()))),
        }
    })
}

/// Looks until everything is there, a look fails, the time runs out, or a signal comes.
fn waited<T>(limit: Option<Duration>, mut look: impl FnMut() -> Result<Look<T>, Failure>) -> Result<T, Failure> {
    let missing = match look()? {
        Look::There(found) => return Ok(found),
        Look::Missing(what) => what,
    };
    let failed = |error: io::Error| (format!("the system gives no runtime: {error}"), 70);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(failed)?;
    runtime.block_on(async {
        // As the first process of a container, it would otherwise not end on these signals.
        let mut ends = Ends::listen().map_err(failed)?;
        let (began, mut missing, mut say_at) = (Instant::now(), missing, SAY_AFTER);
        loop {
            let waited = began.elapsed();
            if limit.is_some_and(|limit| waited >= limit) {
                return Err((format!("{missing}: not there after {} s", waited.as_secs()), NOT_YET));
            }
            if waited >= say_at {
                let _ = writeln!(io::stderr(), "waiting for {missing}; see the log of the vault");
                say_at = waited + SAY_EVERY;
            }
            let pause = limit.map_or(LOOK_EVERY, |limit| LOOK_EVERY.min(limit.saturating_sub(waited)));
            tokio::select! {
                number = ends.any() => return Err((String::new(), 128 + number)),
                () = tokio::time::sleep(pause) => {}
            }
            match look()? {
                Look::There(found) => return Ok(found),
                Look::Missing(what) => missing = what,
            }
        }
    })
}

/// The signals that end a wait.
struct Ends([(Signal, u8); 4]);

impl Ends {
    fn listen() -> io::Result<Self> {
        let one = |kind: SignalKind| signal(kind).map(|signal| (signal, kind.as_raw_value() as u8));
        Ok(Self([
            one(SignalKind::terminate())?,
            one(SignalKind::interrupt())?,
            one(SignalKind::hangup())?,
            one(SignalKind::quit())?,
        ]))
    }

    /// Waits for one of them and returns its number.
    async fn any(&mut self) -> u8 {
        let [a, b, c, d] = &mut self.0;
        tokio::select! {
            _ = a.0.recv() => a.1,
            _ = b.0.recv() => b.1,
            _ = c.0.recv() => c.1,
            _ = d.0.recv() => d.1,
        }
    }
}

/// Puts this program into a folder for other containers, unless it is there already. Returns its path.
///
/// # Errors
/// When the folder is missing or not writable.
pub fn install(folder: &Path) -> io::Result<PathBuf> {
    let to = folder.join(PROGRAM);
    let own = std::fs::read("/proc/self/exe")?;
    if is_same(&to, &own) {
        return Ok(to);
    }
    // Replace by a rename: running copies keep the old program, and nobody sees half of a new one.
    let temporary = folder.join(format!(".{PROGRAM}.new"));
    let _ = std::fs::remove_file(&temporary);
    let mut file = std::fs::File::create_new(&temporary)?;
    file.write_all(&own)?;
    file.set_permissions(std::fs::Permissions::from_mode(0o555))?;
    file.sync_all()?;
    drop(file);
    std::fs::rename(&temporary, &to)?;
    Ok(to)
}

/// Whether the launcher in the folder is this program.
///
/// # Errors
/// When this program cannot be read.
pub fn is_installed(folder: &Path) -> io::Result<bool> {
    Ok(is_same(&folder.join(PROGRAM), &std::fs::read("/proc/self/exe")?))
}

fn is_same(path: &Path, own: &[u8]) -> bool {
    let is_there = std::fs::symlink_metadata(path)
        .is_ok_and(|found| found.is_file() && found.len() == own.len() as u64 && found.mode() & 0o7777 == 0o555);
    is_there && std::fs::read(path).is_ok_and(|there| there == own)
}
