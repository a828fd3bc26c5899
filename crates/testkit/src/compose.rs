//! Finds the two generations of Docker Compose that people deploy with. V1 is Debian 12's package and must be
//! installed. V2 is Debian 13's package, which only needs unpacking.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result, bail, ensure};

use crate::binaries::workspace_root;

/// A generation of Docker Compose.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compose {
    /// 1.29, in Python.
    V1,
    /// 2.26, in Go.
    V2,
}

/// The package to fetch. Debian's pool keeps it under this name and with this content as long as it keeps trixie.
const PACKAGE: &str = "docker-compose_2.26.1-4";
/// SHA-256 of the package, by architecture.
const SUMS: [(&str, &str, &str); 2] = [
    ("x86_64", "amd64", "47681197cb2b1ab88206b42a1a92fc75f50d9530a6322d03494a473eed0408ea"),
    ("aarch64", "arm64", "bbafaa666f3e7fa00ad36f2a8bab889f1c791ca8743d674e7267a3d07203869c"),
];
const POOL: &str = "http://deb.debian.org/debian/pool/main/d/docker-compose";
/// Comes with apt. It checks the sum and uses the proxy that apt is configured with.
const FETCH: &str = "/usr/lib/apt/apt-helper";
/// The program's path in the package.
const PROGRAM: &str = "usr/libexec/docker/cli-plugins/docker-compose";

impl Compose {
    /// Returns the program's path. If V2 is not in `target/tools` yet, fetches it there and blocks meanwhile.
    ///
    /// # Errors
    /// When V1 is not installed, or V2 cannot be fetched or unpacked.
    pub fn program(self) -> Result<PathBuf> {
        match self {
            Self::V1 => {
                let path = std::env::var_os("PATH").unwrap_or_default();
                let found = std::env::split_paths(&path).map(|folder| folder.join("docker-compose"));
                let found = found.filter(|program| program.is_file()).find(|program| is_version(program, "1."));
                found.context("docker-compose 1.29 is not installed: apt-get install docker-compose (Debian 12)")
            }
            Self::V2 => fetched(),
        }
    }
}

fn is_version(program: &Path, begins: &str) -> bool {
    let told = Command::new(program).args(["version", "--short"]).stdin(Stdio::null()).output();
    told.is_ok_and(|told| String::from_utf8_lossy(&told.stdout).trim().trim_start_matches('v').starts_with(begins))
}

/// Held during the fetch, so that each process fetches only once.
static FETCHING: Mutex<()> = Mutex::new(());

fn fetched() -> Result<PathBuf> {
    let _alone = FETCHING.lock().unwrap_or_else(PoisonError::into_inner);
    let tools = workspace_root().join("target/tools");
    let folder = tools.join(PACKAGE);
    let program = folder.join(PROGRAM);
    if program.is_file() {
        return Ok(program);
    }
    let here = std::env::consts::ARCH;
    let known = SUMS.iter().find(|(name, ..)| *name == here);
    let (_, debian, sum) = known.with_context(|| format!("no package of Docker Compose 2 is known for {here}"))?;
    ensure!(Path::new(FETCH).exists(), "Docker Compose 2 is fetched with apt, which is not here");
    std::fs::create_dir_all(&tools)?;
    // Another process may fetch at the same time: the first one moves its copy into place.
    let work = tempfile::tempdir_in(&tools)?;
    let file = work.path().join("package.deb");
    let mut fetch = Command::new(FETCH);
    fetch.args(["-o", "Acquire::http::Timeout=10", "-o", "Acquire::Retries=1", "download-file"]);
    fetch.arg(format!("{POOL}/{PACKAGE}_{debian}.deb")).arg(&file).arg(format!("SHA256:{sum}"));
    run(&mut fetch).context("Docker Compose 2 cannot be fetched")?;
    let unpacked = work.path().join("unpacked");
    run(Command::new("dpkg-deb").arg("-x").arg(&file).arg(&unpacked)).context("Docker Compose 2 cannot be unpacked")?;
    if std::fs::rename(&unpacked, &folder).is_err() && !program.is_file() {
        bail!("Docker Compose 2 cannot be put into {}", folder.display());
    }
    Ok(program)
}

fn run(command: &mut Command) -> Result<()> {
    let done = command.stdin(Stdio::null()).output().with_context(|| format!("cannot run {command:?}"))?;
    ensure!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr).trim());
    Ok(())
}
