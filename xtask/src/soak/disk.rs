//! The agent's data folder, whose disk can refuse to be written to.
//!
//! Root is not stopped by permissions, so for root it is a small file system of its own that can be filled up.

use std::fs::{self, File, Permissions};
use std::io::Write as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result};
use tempfile::TempDir;

/// What fills it up.
const FILLER: &str = "soak-filler";

/// How the disk is made to refuse.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Means {
    /// A file system of this size is filled.
    Filling,
    /// The folder may not be written to.
    Permissions,
    /// Not at all: root without the right to mount.
    None,
}

/// The folder; dropped, it is gone.
pub(crate) struct Disk {
    folder: TempDir,
    means: Means,
}

impl Disk {
    pub(crate) fn new() -> Result<Self> {
        let folder = tempfile::Builder::new().prefix("dockflare-soak-").tempdir()?;
        let root = fs::metadata("/proc/self").is_ok_and(|process| process.uid() == 0);
        let means = match root {
            false => Means::Permissions,
            true if command(
                "mount",
                &["-t", "tmpfs", "-o", "size=256k,mode=0700", "dockflare-soak"],
                folder.path(),
            ) =>
            {
                Means::Filling
            }
            true => Means::None,
        };
        Ok(Self { folder, means })
    }

    pub(crate) fn path(&self) -> &Path {
        self.folder.path()
    }

    pub(crate) fn can_refuse(&self) -> bool {
        self.means != Means::None
    }

    /// From now on nothing can be written.
    pub(crate) fn refuse(&self) -> Result<()> {
        match self.means {
            Means::Filling => {
                let mut file = File::create(self.path().join(FILLER)).context("cannot fill the disk")?;
                // Until it refuses: page by page, then what is left of the last one.
                for size in [4096, 1] {
                    while file.write(&[0; 4096][..size]).is_ok() {}
                }
                Ok(())
            }
            Means::Permissions => Ok(fs::set_permissions(self.path(), Permissions::from_mode(0o500))?),
            Means::None => Ok(()),
        }
    }

    /// It can be written again.
    pub(crate) fn relent(&self) -> Result<()> {
        match self.means {
            Means::Filling => Ok(fs::remove_file(self.path().join(FILLER))?),
            Means::Permissions => Ok(fs::set_permissions(self.path(), Permissions::from_mode(0o700))?),
            Means::None => Ok(()),
        }
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        match self.means {
            // Lazily: a process that is just ending may still have it open.
            Means::Filling => drop(command("umount", &["--lazy"], self.path())),
            Means::Permissions => drop(self.relent()),
            Means::None => {}
        }
    }
}

fn command(program: &str, arguments: &[&str], path: &Path) -> bool {
    let mut command = Command::new(program);
    command.args(arguments).arg(path).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command.status().is_ok_and(|status| status.success())
}
