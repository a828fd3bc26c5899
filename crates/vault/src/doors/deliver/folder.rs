//! A workload's directory. Only this module touches it. Calls block, and forever on a file system that hangs.
//!
//! ```text
//!   db_password -> ..data/db_password     one link for each file; it never changes
//!   ..data      -> ..42                   replaced by a rename: all files change at once
//!   ..42/db_password                      a set, written in full before any link leads to it, and never changed
//!   ..41/db_password                      the previous set, kept for readers under way and until 42 is settled
//!   ..settled   -> ..41                   the newest settled set; the link is made anew when a newer set replaces it
//!   ..refused   -> ..40 0c5f…             a set that was put back, and a keyed hash of what it held
//! ```
//!
//! Every entry is reached from the directory's own descriptor, by one name, and no symbolic link is followed. Whoever
//! shares the directory can plant anything and gains nothing. After a crash at any step the links lead to the previous
//! set or to the new one, and the next pass removes what is half made.

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use rustix::fs::{
    AtFlags, Dir, FileType, Gid, Mode, OFlags, RenameFlags, Stat, fchmod, fchown, fstat, fstatfs, fsync, mkdirat,
    openat, readlinkat, renameat, renameat_with, statat, symlinkat, unlinkat,
};
use rustix::io::Errno;
use zeroize::Zeroizing;

use super::plan::{File, Files};
use crate::delivery::{Delivery, FileName};

const DATA: &str = "..data";
const SETTLED: &str = "..settled";
const REFUSED: &str = "..refused";
/// Temporary name of a link, until it is renamed.
const NEW: &str = "..new";
/// `linux/magic.h`: file systems that live in memory.
const IN_MEMORY: [u32; 2] = [0x0102_1994, 0x8584_58f6];
/// Largest file to compare, in bytes. The vault writes none larger.
const MAX_FILE_BYTES: u64 = 1 << 20;
/// Most entries to read. A directory with more is nobody's delivery.
const MAX_ENTRIES: usize = 10_000;

/// Why a directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub(super) enum FolderError {
    /// Neither the directory nor its parent exists.
    #[error("{path} is not there, and neither is the directory above it: mount the volume, or make that directory", path = .0.display())]
    Parent(PathBuf),
    /// A link or a file is in its place.
    #[error("{path} is no directory but {1}: it is not followed and not replaced; remove it", path = .0.display())]
    Kind(PathBuf, &'static str),
    /// It lies on a disk.
    #[error(
        "{path} is no tmpfs: secrets would lie on a disk; mount one there (a volume with driver_opts type: tmpfs, device: tmpfs), or write allow_disk: true",
        path = .0.display()
    )]
    Disk(PathBuf),
    /// Its owner is not the configured one.
    #[error("{} belongs to uid {found}, and the delivery says {wanted}: mount it with the option uid={wanted}, or correct the delivery", directory.display())]
    Uid {
        /// The directory.
        directory: PathBuf,
        /// Its owner.
        found: u32,
        /// The configured owner.
        wanted: u32,
    },
    /// Its group is not the configured one.
    #[error("{} has the group {found}, and the delivery says {wanted}: mount it with the option gid={wanted}, or correct the delivery", directory.display())]
    Gid {
        /// The directory.
        directory: PathBuf,
        /// Its group.
        found: u32,
        /// The configured group.
        wanted: u32,
    },
    /// Files in it would not inherit its group.
    #[error("files in {path} would not get its group {1}: mount it with the option mode=2750, whose 2 does that", path = .0.display())]
    Inherit(PathBuf, u32),
    /// The vault cannot give the new directory its group.
    #[error("{path} cannot get the group {1}: run the vault with group_add: [\"{1}\"]", path = .0.display())]
    Group(PathBuf, u32),
    /// The vault may not write it.
    #[error("{path} cannot be written by the vault, which is uid {1}: mount it with the options uid={1},mode=2750", path = .0.display())]
    Denied(PathBuf, u32),
    /// It is mounted `:ro` for the vault, too.
    #[error("{path} is mounted read-only: mount it read-write for the vault, and :ro for the containers of the workload", path = .0.display())]
    ReadOnly(PathBuf),
    /// Two sets do not fit in it.
    #[error("{path} is full: two sets of its files must fit; mount it with a larger size=", path = .0.display())]
    Full(PathBuf),
    /// It holds something that is not the vault's.
    #[error("{path} holds {1:?}, which is not the vault's: give the workload an empty directory of its own", path = .0.display())]
    Foreign(PathBuf, String),
    /// A directory occupies one of the vault's names.
    #[error("{path} has something of its own at {1:?}, which cannot be removed: remove it by hand", path = .0.display())]
    InTheWay(PathBuf, String),
    /// There is no settled set to put back.
    #[error("{path} has no set of files that could be put back", path = .0.display())]
    NothingSettled(PathBuf),
    /// Any other system error.
    #[error("{path} cannot be {1}: {2}", path = .0.display())]
    Io(PathBuf, &'static str, std::io::Error),
    /// A test stops here, as SIGKILL would.
    #[cfg(test)]
    #[error("killed")]
    Killed,
}

/// The open directory of a workload.
#[derive(Debug)]
pub(super) struct Folder {
    path: PathBuf,
    dir: OwnedFd,
    stat: Stat,
    on_disk: bool,
    /// Steps until a test stops it.
    #[cfg(test)]
    pub(super) steps: std::cell::Cell<Option<u32>>,
}

/// The contents of a directory.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Look {
    /// Where `..data` leads: the set that readers see.
    pub(super) current: Option<u64>,
    /// When that set was put in place.
    pub(super) since: Option<Timestamp>,
    /// The newest settled set.
    pub(super) settled: Option<u64>,
    /// When that set was settled, or, later, when a newer one replaced it.
    pub(super) left: Option<Timestamp>,
    /// The newest set that was put back or taken away, and the hash of what it held.
    pub(super) refused: Option<(u64, String)>,
    /// All sets, complete or not.
    pub(super) sets: BTreeSet<u64>,
    /// The vault's links, each to the file of its name.
    links: BTreeSet<String>,
    /// Entries that are not the vault's.
    foreign: BTreeSet<String>,
}

impl Look {
    /// The highest number given so far.
    fn highest(&self) -> u64 {
        let refused = self.refused.as_ref().map(|(number, _)| *number);
        [self.current, self.settled, refused, self.sets.last().copied()].into_iter().flatten().max().unwrap_or(0)
    }

    /// Whether the vault has used this directory before.
    fn is_ours(&self) -> bool {
        self.highest() > 0 || !self.links.is_empty()
    }
}

impl Folder {
    /// Opens the directory of a delivery and checks it against the delivery. `None` if there is none.
    pub(super) fn open(delivery: &Delivery) -> Result<Option<Self>, FolderError> {
        let path = &delivery.directory;
        let (parent, name) = parent(path)?;
        match open_dir(&parent, name) {
            Ok(dir) => Self::checked(delivery, dir).map(Some),
            Err(Errno::NOENT) => Ok(None),
            Err(Errno::NOTDIR | Errno::LOOP) => Err(FolderError::Kind(path.clone(), kind(&parent, name))),
            Err(error) => Err(Self::refused(path, "opened", error)),
        }
    }

    fn checked(delivery: &Delivery, dir: OwnedFd) -> Result<Self, FolderError> {
        let path = delivery.directory.clone();
        let on_disk = !in_memory(&dir).map_err(|error| Self::refused(&path, "looked at", error))?;
        if on_disk && !delivery.allow_disk {
            return Err(FolderError::Disk(path));
        }
        let stat = fstat(&dir).map_err(|error| Self::refused(&path, "looked at", error))?;
        match (delivery.uid, delivery.gid) {
            (Some(wanted), _) if wanted != stat.st_uid => {
                return Err(FolderError::Uid { directory: path, found: stat.st_uid, wanted });
            }
            (_, Some(wanted)) if wanted != stat.st_gid => {
                return Err(FolderError::Gid { directory: path, found: stat.st_gid, wanted });
            }
            _ => {}
        }
        let passes_group_on = stat.st_mode & 0o2000 != 0;
        if !passes_group_on && stat.st_gid != nix::unistd::getegid().as_raw() {
            return Err(FolderError::Inherit(path, stat.st_gid));
        }
        Ok(Self {
            path,
            dir,
            stat,
            on_disk,
            #[cfg(test)]
            steps: std::cell::Cell::default(),
        })
    }

    /// Makes a missing directory with its first set in it. Nobody sees it empty, so a container that binds it starts
    /// with its files or not at all. `None` if somebody else was faster.
    pub(super) fn make(delivery: &Delivery, files: &Files) -> Result<Option<u64>, FolderError> {
        let path = &delivery.directory;
        let (parent, name) = parent(path)?;
        let failed = |error| Self::refused(path, "made", error);
        if !delivery.allow_disk && !in_memory(&parent).map_err(failed)? {
            return Err(FolderError::Disk(path.clone()));
        }
        let half = format!("..{name}.new");
        remove_tree(&parent, &half).map_err(failed)?;
        // Closed to everybody else until it has its group.
        mkdirat(&parent, half.as_str(), Mode::RWXU).map_err(failed)?;
        let made = Self::make_in(delivery, &parent, &half, files);
        if made.is_err() {
            let _ = remove_tree(&parent, &half);
        }
        let version = made?;
        match renameat_with(&parent, half.as_str(), &parent, name, RenameFlags::NOREPLACE) {
            Ok(()) => Ok(Some(version)),
            Err(error) => {
                let _ = remove_tree(&parent, &half);
                if error == Errno::EXIST { Ok(None) } else { Err(failed(error)) }
            }
        }
    }

    fn make_in(delivery: &Delivery, parent: &OwnedFd, half: &str, files: &Files) -> Result<u64, FolderError> {
        let path = &delivery.directory;
        let failed = |error| Self::refused(path, "made", error);
        let dir = open_dir(parent, half).map_err(failed)?;
        if let Some(gid) = delivery.gid {
            let given = fchown(&dir, None, Some(Gid::from_raw(gid)));
            given.map_err(|_| FolderError::Group(path.clone(), gid))?;
        }
        let for_all = if files.values().any(|file| file.mode & 0o005 != 0) { 0o005 } else { 0 };
        fchmod(&dir, Mode::from_raw_mode(0o2750 | for_all)).map_err(failed)?;
        let folder = Self::checked(delivery, dir)?;
        folder.put(&Look::default(), files, 0)
    }

    /// Device and inode, which tell this directory from every other.
    pub(super) fn identity(&self) -> (u64, u64) {
        (self.stat.st_dev, self.stat.st_ino)
    }

    /// Reads what is in it.
    pub(super) fn look(&self) -> Result<Look, FolderError> {
        let mut look = Look::default();
        for name in names(&self.dir).map_err(|error| self.failed("read", error))? {
            let target = self.target(&name);
            match (name.as_str(), target) {
                (DATA, Some(target)) => {
                    look.current = set_number(&target);
                    look.since = look.current.and_then(|_| self.made(DATA));
                }
                (SETTLED, Some(target)) => {
                    look.settled = set_number(&target);
                    look.left = look.settled.and_then(|_| self.made(SETTLED));
                }
                (REFUSED, Some(target)) => {
                    let parts = target.split_once(' ');
                    look.refused = parts.and_then(|(set, hash)| Some((set_number(set)?, hash.to_owned())));
                }
                ("lost+found", None) if self.on_disk => {}
                (name, Some(target)) if target == format!("{DATA}/{name}") => {
                    look.links.insert(name.to_owned());
                }
                (name, None) if set_number(name).is_some_and(|_| self.is_dir(name)) => {
                    look.sets.extend(set_number(name));
                }
                (name, _) => {
                    look.foreign.insert(name.to_owned());
                }
            }
        }
        Ok(look)
    }

    /// Reads the files of a set. `None` if they are not as written: gone, changed, or with something else among them.
    pub(super) fn read(&self, set: u64) -> Option<Files> {
        let dir = open_dir(&self.dir, &set_name(set)).ok()?;
        let mut files = Files::new();
        for name in names(&dir).ok()? {
            let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
            let file = fs::File::from(openat(&dir, name.as_str(), flags, Mode::empty()).ok()?);
            let stat = fstat(&file).ok()?;
            if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile
                || stat.st_size.cast_unsigned() > MAX_FILE_BYTES
            {
                return None;
            }
            // Reserve room for one byte more, so that the buffer does not grow and leave a copy behind.
            let mut bytes = Zeroizing::new(Vec::with_capacity(stat.st_size as usize + 1));
            file.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes).ok()?;
            files.insert(name.parse().ok()?, File { mode: stat.st_mode & 0o7777, bytes });
        }
        Some(files)
    }

    /// Whether each of these files has a link, and there is no other link and no foreign entry.
    pub(super) fn is_tidy(look: &Look, files: &Files) -> bool {
        look.foreign.is_empty() && look.links.iter().map(String::as_str).eq(files.keys().map(FileName::as_str))
    }

    /// Writes a new set and puts it in the place of the present one, all at once. Returns its number, which is higher
    /// than `used`.
    ///
    /// If it fails before the switch, readers see what they saw before. The next pass removes what is left of the new
    /// set.
    pub(super) fn put(&self, look: &Look, files: &Files, used: u64) -> Result<u64, FolderError> {
        if let (false, Some(name)) = (look.is_ours(), look.foreign.first()) {
            return Err(FolderError::Foreign(self.path.clone(), name.clone()));
        }
        let number = look.highest().max(used) + 1;
        let written = self.write(number, files);
        if let Err(error) = written {
            #[cfg(test)]
            if matches!(error, FolderError::Killed) {
                return Err(error);
            }
            let _ = remove_tree(&self.dir, &set_name(number));
            return Err(error);
        }
        // Link before the switch: the new links lead nowhere until then, and to the new files from then on.
        for name in files.keys().filter(|name| !look.links.contains(name.as_str())) {
            self.link(name.as_str(), &format!("{DATA}/{name}"))?;
        }
        // Renew this link: its time later tells which containers started with the settled set and which with a newer
        // one.
        if let Some(settled) = look.settled.filter(|settled| look.current == Some(*settled)) {
            self.settle(settled)?;
        }
        self.link(DATA, &set_name(number))?;
        self.prune(look, files)?;
        Ok(number)
    }

    /// Adds missing links to the files of the present set, and removes foreign entries and links without a file.
    pub(super) fn mend(&self, look: &Look, files: &Files) -> Result<(), FolderError> {
        for name in files.keys().filter(|name| !look.links.contains(name.as_str())) {
            self.link(name.as_str(), &format!("{DATA}/{name}"))?;
        }
        self.prune(look, files)
    }

    /// Removes links without a file, and what others have left here.
    fn prune(&self, look: &Look, files: &Files) -> Result<(), FolderError> {
        let is_ours = |name: &&String| !files.contains_key(name.as_str());
        for name in look.links.iter().chain(&look.foreign).filter(is_ours) {
            self.step()?;
            match unlinkat(&self.dir, name.as_str(), AtFlags::empty()) {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(Errno::ISDIR) => match unlinkat(&self.dir, name.as_str(), AtFlags::REMOVEDIR) {
                    Ok(()) | Err(Errno::NOENT) => {}
                    Err(_) => return Err(FolderError::InTheWay(self.path.clone(), name.clone())),
                },
                Err(error) => return Err(self.failed("tidied", error)),
            }
        }
        Ok(())
    }

    fn write(&self, number: u64, files: &Files) -> Result<(), FolderError> {
        let failed = |error| self.failed("written", error);
        let name = set_name(number);
        self.step()?;
        // As open as the directory itself, but writable only by the vault. The group is inherited.
        let mode = Mode::from_raw_mode(self.stat.st_mode & 0o755 | 0o700);
        match mkdirat(&self.dir, name.as_str(), mode) {
            // A kill left it half made.
            Err(Errno::EXIST) => {
                remove_tree(&self.dir, &name).map_err(failed)?;
                mkdirat(&self.dir, name.as_str(), mode).map_err(failed)?;
            }
            made => made.map_err(failed)?,
        }
        let set = open_dir(&self.dir, &name).map_err(failed)?;
        for (name, file) in files {
            self.step()?;
            let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let target = openat(&set, name.as_str(), flags, Mode::RUSR | Mode::WUSR).map_err(failed)?;
            let mut target = fs::File::from(target);
            self.step()?;
            target.write_all(&file.bytes).map_err(|error| self.failed_io("written", error))?;
            self.step()?;
            fchmod(&target, Mode::from_raw_mode(file.mode)).map_err(failed)?;
            if self.on_disk {
                fsync(&target).map_err(failed)?;
            }
        }
        if self.on_disk {
            fsync(&set).map_err(failed)?;
        }
        Ok(())
    }

    /// Puts the settled set back in the place of the present one. `hash` identifies the refused files from now on.
    pub(super) fn put_back(&self, look: &Look, hash: &str) -> Result<u64, FolderError> {
        let (Some(current), Some(settled)) = (look.current, look.settled) else {
            return Err(FolderError::NothingSettled(self.path.clone()));
        };
        let files = self.read(settled).filter(|files| !files.is_empty());
        let files = files.ok_or_else(|| FolderError::NothingSettled(self.path.clone()))?;
        // Record this first: after a kill, the next pass reads here what was about to happen.
        self.link(REFUSED, &format!("{} {hash}", set_name(current)))?;
        self.go_back(look, settled, &files)?;
        Ok(settled)
    }

    /// Does the rest of a put-back, also after a kill in the middle.
    pub(super) fn go_back(&self, look: &Look, settled: u64, files: &Files) -> Result<(), FolderError> {
        for name in files.keys().filter(|name| !look.links.contains(name.as_str())) {
            self.link(name.as_str(), &format!("{DATA}/{name}"))?;
        }
        self.link(DATA, &set_name(settled))?;
        self.prune(look, files)
    }

    /// Records that this set is settled.
    pub(super) fn settle(&self, set: u64) -> Result<(), FolderError> {
        self.link(SETTLED, &set_name(set))
    }

    /// Forgets which set was put back. Its number must not be higher than the present one.
    pub(super) fn forget_refused(&self) -> Result<(), FolderError> {
        self.step()?;
        match unlinkat(&self.dir, REFUSED, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(error) => Err(self.failed("tidied", error)),
        }
    }

    /// Removes all files at once. The highest number given stays recorded.
    pub(super) fn withdraw(&self, look: &Look) -> Result<(), FolderError> {
        if look.current.is_some() {
            self.link(REFUSED, &format!("{} -", set_name(look.highest())))?;
            self.step()?;
            match unlinkat(&self.dir, DATA, AtFlags::empty()) {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(error) => return Err(self.failed("tidied", error)),
            }
        }
        for set in &look.sets {
            self.remove(*set)?;
        }
        let links = Look { foreign: BTreeSet::new(), ..look.clone() };
        self.prune(&links, &Files::new())
    }

    /// Removes a set that no link leads to.
    pub(super) fn remove(&self, set: u64) -> Result<(), FolderError> {
        self.step()?;
        remove_tree(&self.dir, &set_name(set)).map_err(|error| match error {
            Errno::NOTEMPTY => FolderError::InTheWay(self.path.clone(), set_name(set)),
            error => self.failed("tidied", error),
        })
    }

    /// Makes a link or replaces whatever has its name, so that nobody sees it missing.
    fn link(&self, name: &str, target: &str) -> Result<(), FolderError> {
        let failed = |error| self.failed("written", error);
        self.step()?;
        match symlinkat(target, &self.dir, NEW) {
            // Left by a kill, or planted.
            Err(Errno::EXIST) => {
                remove_tree(&self.dir, NEW).map_err(failed)?;
                symlinkat(target, &self.dir, NEW).map_err(failed)?;
            }
            made => made.map_err(failed)?,
        }
        self.step()?;
        match renameat(&self.dir, NEW, &self.dir, name) {
            Ok(()) => {}
            // Somebody else's directory.
            Err(Errno::ISDIR | Errno::EXIST | Errno::NOTEMPTY) => {
                let in_the_way = |_| FolderError::InTheWay(self.path.clone(), name.to_owned());
                unlinkat(&self.dir, name, AtFlags::REMOVEDIR).map_err(in_the_way)?;
                renameat(&self.dir, NEW, &self.dir, name).map_err(failed)?;
            }
            Err(error) => return Err(failed(error)),
        }
        if self.on_disk {
            fsync(&self.dir).map_err(failed)?;
        }
        Ok(())
    }

    fn target(&self, name: &str) -> Option<String> {
        readlinkat(&self.dir, name, vec![]).ok()?.into_string().ok()
    }

    /// When a link was made. A file system's clock is up to a tick of the kernel behind, some milliseconds.
    fn made(&self, link: &str) -> Option<Timestamp> {
        let stat = statat(&self.dir, link, AtFlags::SYMLINK_NOFOLLOW).ok()?;
        Timestamp::new(stat.st_mtime, i32::try_from(stat.st_mtime_nsec).ok()?).ok()
    }

    fn is_dir(&self, name: &str) -> bool {
        statat(&self.dir, name, AtFlags::SYMLINK_NOFOLLOW)
            .is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::Directory)
    }

    fn failed(&self, verb: &'static str, error: Errno) -> FolderError {
        Self::refused(&self.path, verb, error)
    }

    fn failed_io(&self, verb: &'static str, error: std::io::Error) -> FolderError {
        match Errno::from_io_error(&error) {
            Some(error) => self.failed(verb, error),
            None => FolderError::Io(self.path.clone(), verb, error),
        }
    }

    fn refused(path: &Path, verb: &'static str, error: Errno) -> FolderError {
        let path = path.to_owned();
        match error {
            Errno::NOSPC | Errno::DQUOT => FolderError::Full(path),
            Errno::ROFS => FolderError::ReadOnly(path),
            Errno::ACCESS | Errno::PERM => FolderError::Denied(path, nix::unistd::geteuid().as_raw()),
            error => FolderError::Io(path, verb, error.into()),
        }
    }

    #[cfg(not(test))]
    #[expect(clippy::unnecessary_wraps, clippy::unused_self, reason = "a test may end it here")]
    fn step(&self) -> Result<(), FolderError> {
        Ok(())
    }

    #[cfg(test)]
    fn step(&self) -> Result<(), FolderError> {
        match self.steps.get() {
            Some(0) => Err(FolderError::Killed),
            left => {
                self.steps.set(left.map(|left| left - 1));
                Ok(())
            }
        }
    }
}

fn set_name(number: u64) -> String {
    format!("..{number}")
}

fn set_number(name: &str) -> Option<u64> {
    let digits = name.strip_prefix("..")?;
    // Accept only the form that the vault writes, so that two names never mean one set.
    digits.parse().ok().filter(|number| *number > 0 && set_name(*number) == name)
}

/// Opens the parent directory. Returns it with the last part of the path.
fn parent(path: &Path) -> Result<(OwnedFd, &str), FolderError> {
    let name = path.file_name().and_then(|name| name.to_str());
    let (Some(above), Some(name)) = (path.parent(), name) else {
        return Err(FolderError::Kind(path.to_owned(), "a name that is no text"));
    };
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    match rustix::fs::open(above, flags, Mode::empty()) {
        Ok(parent) => Ok((parent, name)),
        Err(Errno::NOENT) => Err(FolderError::Parent(path.to_owned())),
        Err(error) => Err(Folder::refused(above, "opened", error)),
    }
}

fn open_dir(parent: &OwnedFd, name: &str) -> rustix::io::Result<OwnedFd> {
    openat(parent, name, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
}

fn kind(parent: &OwnedFd, name: &str) -> &'static str {
    match statat(parent, name, AtFlags::SYMLINK_NOFOLLOW).map(|stat| FileType::from_raw_mode(stat.st_mode)) {
        Ok(FileType::Symlink) => "a symbolic link",
        Ok(FileType::RegularFile) => "a file",
        _ => "something else",
    }
}

fn in_memory(dir: &OwnedFd) -> rustix::io::Result<bool> {
    // The field is wider than its value.
    Ok(IN_MEMORY.contains(&(fstatfs(dir)?.f_type as u32)))
}

/// The names in a directory. A name that is not UTF-8 gets replacement characters, and is nobody's delivery.
fn names(dir: &OwnedFd) -> rustix::io::Result<Vec<String>> {
    let mut names = vec![];
    for entry in Dir::read_from(dir.as_fd())? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if name != "." && name != ".." {
            names.push(name);
        }
        if names.len() > MAX_ENTRIES {
            return Err(Errno::OVERFLOW);
        }
    }
    Ok(names)
}

/// Removes an entry. In a directory, removes the files and directories that this module makes, and nothing deeper.
fn remove_tree(parent: &OwnedFd, name: &str) -> rustix::io::Result<()> {
    fn remove(parent: &OwnedFd, name: &str, depth: u8) -> rustix::io::Result<()> {
        match unlinkat(parent, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => return Ok(()),
            Err(Errno::ISDIR) if depth > 0 => {}
            Err(Errno::ISDIR) => return Err(Errno::NOTEMPTY),
            Err(error) => return Err(error),
        }
        let dir = open_dir(parent, name)?;
        for inner in names(&dir)? {
            remove(&dir, &inner, depth - 1)?;
        }
        unlinkat(parent, name, AtFlags::REMOVEDIR)
    }
    remove(parent, name, 2)
}

#[cfg(test)]
mod tests;
