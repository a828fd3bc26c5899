//! Detects a Docker socket that is dead for good. The socket was mounted into the container as a file, and the daemon
//! has since removed it and created a new one under the same name. A daemon with `live-restore` does so if systemd
//! gives it no socket. A container that mounts the folder sees the new socket; one that mounts the file keeps the old
//! one for as long as it runs.
//!
//! Used by the socket proxies, and by an agent that has the socket itself. Both exit when they find one, and their
//! restart policy then mounts the current socket. This module changes nothing and stores nothing.

use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use dockflare_host::aside::Aside;
use tokio::net::UnixStream;
use tokio::time::{Instant, sleep, timeout};

use crate::address::DockerHost;

/// How often it checks: one system call while all is well.
const EVERY: Duration = Duration::from_secs(5);
/// After this long without a listener, the socket counts as dead for good.
const PATIENCE: Duration = Duration::from_secs(30);
/// Limit for one check. A daemon that hangs does not count as dead.
const LIMIT: Duration = Duration::from_secs(5);

/// Returns the socket's path once Docker's socket is orphaned and nothing has listened on it for 30 s. Never returns
/// for another kind of address. Cancel-safe.
pub async fn orphaned(host: DockerHost) -> String {
    let DockerHost::Unix(path) = host else { return std::future::pending().await };
    let (looks, mut since) = (Aside::default(), None);
    loop {
        since = if is_orphan(&looks, &path).await && is_dead(&path).await {
            Some(since.unwrap_or_else(Instant::now))
        } else {
            None
        };
        if since.is_some_and(|since| since.elapsed() >= PATIENCE) {
            return path;
        }
        sleep(EVERY).await;
    }
}

/// Whether the file at this path has no links left. A file that is found by its name has one, unless the path is a
/// mount point.
#[expect(clippy::disallowed_methods, reason = "on a thread of its own")]
async fn is_orphan(looks: &Aside<bool>, path: &str) -> bool {
    let path = path.to_owned();
    looks.or_earlier(LIMIT, move || std::fs::metadata(path).is_ok_and(|found| found.nlink() == 0)).await == Some(true)
}

async fn is_dead(path: &str) -> bool {
    match timeout(LIMIT, UnixStream::connect(path)).await {
        Ok(Err(error)) => matches!(error.kind(), ErrorKind::ConnectionRefused | ErrorKind::NotFound),
        Ok(Ok(_)) | Err(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use std::fs::OpenOptions;
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::OpenOptionsExt;

    use tokio::net::UnixListener;

    use super::*;

    /// Opens a reference to the file, like a mount: it stays valid after the file has lost its name.
    const O_PATH: i32 = 0o10_000_000;

    #[tokio::test(start_paused = true)]
    async fn a_socket_that_was_made_anew_under_its_mount_is_noticed_once_nobody_listens_on_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("docker.sock");
        let text = path.display().to_string();
        let listener = UnixListener::bind(&path).unwrap();
        let mount = OpenOptions::new().read(true).custom_flags(O_PATH).open(&path).unwrap();
        let mounted = format!("/proc/self/fd/{}", mount.as_raw_fd());
        let watch = |path: &str| timeout(Duration::from_secs(600), orphaned(DockerHost::Unix(path.to_owned())));
        assert!(watch(&mounted).await.is_err(), "all is well");
        std::fs::remove_file(&path).unwrap();
        assert!(watch(&mounted).await.is_err(), "somebody still listens");
        drop(listener);
        let _new = UnixListener::bind(&path).unwrap();
        let began = Instant::now();
        assert_eq!(watch(&mounted).await.unwrap(), mounted);
        assert!(began.elapsed() >= PATIENCE && began.elapsed() < PATIENCE * 2, "{:?}", began.elapsed());
        // A container that mounts the folder sees the new socket, or none for a while: neither is an orphan.
        assert!(watch(&text).await.is_err());
        std::fs::remove_file(&path).unwrap();
        assert!(watch(&text).await.is_err());
        assert!(timeout(PATIENCE * 20, orphaned(DockerHost::Http("127.0.0.1:1".into()))).await.is_err());
    }
}
