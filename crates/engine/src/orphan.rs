//! Notices a Docker socket that is dead for ever: mounted into a container as a file, and removed since by a daemon
//! that made a new one under the same name, as one with `live-restore` does that systemd gives no socket to. Who mounts
//! the folder sees the new one; who mounts the file keeps the old one for as long as the container runs.
//!
//! Used by the socket proxies, and by an agent that has the socket itself. Both end by it, so that their restart policy
//! mounts what is there now. Changes nothing and keeps nothing.

use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use dockflare_host::aside::Aside;
use tokio::net::UnixStream;
use tokio::time::{Instant, sleep, timeout};

use crate::address::DockerHost;

/// How often it looks: one call of the system while all is well.
const EVERY: Duration = Duration::from_secs(5);
/// Dead for this long, it stays so.
const PATIENCE: Duration = Duration::from_secs(30);
/// A daemon that hangs is not dead.
const LIMIT: Duration = Duration::from_secs(5);

/// Returns when Docker's socket is orphaned and nobody has listened on it for half a minute; its path. Never for
/// anything but a socket. Cancel-safe.
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

/// Whether what is there has no name any more anywhere. A file that is found by its name has one, unless it is a mount.
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

    /// Names what is open, as a mount does: it leads there also when there is no name for it any more.
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
        // Who sees the folder has the new one, or none for a while: both end by themselves.
        assert!(watch(&text).await.is_err());
        std::fs::remove_file(&path).unwrap();
        assert!(watch(&text).await.is_err());
        assert!(timeout(PATIENCE * 20, orphaned(DockerHost::Http("127.0.0.1:1".into()))).await.is_err());
    }
}
