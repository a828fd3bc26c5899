//! The agent's data folder, whose disk can refuse writes.
//!
//! Permissions do not stop root, so for root the folder is its own small file system that can be filled up.

use std::fs::{self, File, Permissions};
use std::io::Write as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result};
use tempfile::TempDir;

/// The file that fills the disk.
const FILLER: &str = "soak-filler";

/// How the soak makes the disk refuse writes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Means {
    /// Fills the small file system.
    Filling,
    /// Takes away the permission to write to the folder.
    Permissions,
    /// Cannot refuse: root without the right to mount.
    None,
}

/// The folder. Dropping it removes it.
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

    /// Makes the disk refuse writes from now on.
    pub(crate) fn refuse(&self) -> Result<()> {
        match self.means {
            Means::Filling => {
                let mut file = File::create(self.path().join(FILLER)).context("cannot fill the disk")?;
                // Write until the disk refuses: page by page, then the rest of the last page.
                for size in [4096, 1] {
                    while file.write(&[0; 4096][..size]).is_ok() {}
                }
                Ok(())
            }
            Means::Permissions => Ok(fs::set_permissions(self.path(), Permissions::from_mode(0o500))?),
            Means::None => Ok(()),
        }
    }

    /// Makes the disk accept writes again.
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
            // Unmount lazily, because a process that is just ending may still have a file open there.
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
