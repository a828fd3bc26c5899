//! Tests the agent on a real Podman instead of Docker: registration, enrollment, events, a replacement, `check`.
//!
//! The test runs its own Podman in separate network, process and mount namespaces, with its state in a folder of the
//! test. It does not touch the machine's containers or firewall, and all of it ends with one process. In the
//! namespaces this program runs again, with Podman in Docker's place, and runs the cases of [`inside`]. Podman need not
//! be installed: `PODMAN_ROOT` may name a folder with its unpacked packages.

use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use dockflare_dev_master::Protocol;
use testkit::{Case, case, wait_until};

use crate::containers_scene::{Tunnel, registered};
use crate::support::checked::Checked;
use crate::support::{SOON, Stage};

/// Set for the program that runs in the namespaces.
const INSIDE: &str = "DOCKFLARE_TEST_PODMAN_SOCKET";

pub(crate) fn cases() -> Vec<Case> {
    if let Ok(socket) = std::env::var(INSIDE) {
        let direct = socket.clone();
        return vec![
            case("podman_inside_directly", move || inside(direct, false)),
            case("podman_inside_behind_its_own_proxy", move || inside(socket, true)),
        ];
    }
    let limit = Duration::from_secs(400);
    vec![case("podman_is_served_like_docker", outside).limit(limit).without(missing())]
}

/// Returns the root of Podman's files: `/`, or the folder with its unpacked packages.
fn root() -> PathBuf {
    std::env::var_os("PODMAN_ROOT").map_or_else(|| PathBuf::from("/"), PathBuf::from)
}

fn missing() -> Option<String> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let has = |name: &&str| std::env::split_paths(&path).any(|folder| folder.join(name).exists());
    let tools = ["setpriv", "unshare", "ip", "iptables", "runc", "ldconfig"];
    if let Some(name) = tools.iter().find(|name| !has(name)) {
        return Some(format!("no Podman of its own: {name} is not installed"));
    }
    let podman = root().join("usr/bin/podman");
    (!podman.exists()).then(|| format!("no Podman: {} is not there", podman.display()))
}

/// The script that sets up the namespaces before the cases run. `/run` and `/var/lib` are empty there: Podman keeps
/// files in them whatever its settings say.
const INNER: &str = r#"set -e
ip link set lo up
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /var/lib
mount --bind "$FOLDER/ld.so.cache" /etc/ld.so.cache
"$PODMAN" --runtime "$(command -v runc)" --cgroup-manager cgroupfs --storage-driver vfs --root "$FOLDER/state" \
    --runroot "$FOLDER/run" system service --time 0 "unix://$DOCKFLARE_TEST_PODMAN_SOCKET" >"$FOLDER/log" 2>&1 &
until [ -S "$DOCKFLARE_TEST_PODMAN_SOCKET" ]; do kill -0 $!; sleep 0.05; done
"$@"
"#;

async fn outside() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let (path, root) = (folder.path(), root());
    prepare(path, &root)?;
    let socket = path.join("podman.sock");
    // Everything inside ends with this thread.
    let mut inner = Command::new("setpriv");
    inner
        .args(["--pdeathsig", "KILL", "--", "unshare", "--net", "--mount", "--pid", "--fork", "--kill-child"])
        .args(["--mount-proc", "--", "sh", "-c", INNER, "sh"])
        .arg(std::env::current_exe()?)
        .args(["podman_inside", "--test-threads", "1"])
        .env("FOLDER", path)
        .env("PODMAN", root.join("usr/bin/podman"))
        .env("HOME", path)
        .env("TMPDIR", path.join("tmp"))
        .env("CONTAINERS_CONF", path.join("containers.conf"))
        .env("DOCKER_HOST", format!("unix://{}", socket.display()))
        .env("TEST_DOCKER_PROXY", "none")
        .env(INSIDE, &socket);
    let output = tokio::task::spawn_blocking(move || inner.output()).await?.context("cannot start it")?;
    let text = [&output.stdout[..], &output.stderr].map(|bytes| String::from_utf8_lossy(bytes).into_owned()).concat();
    let log = std::fs::read_to_string(path.join("log")).unwrap_or_default();
    let failed: Vec<_> = log.lines().rev().filter(|line| line.contains("Failed") || line.contains("error")).collect();
    ensure!(
        output.status.success() && text.contains(" 2 passed; 0 failed; 0 ignored"),
        "{} {:?}\n{text}\n--- podman, the last first\n{}",
        output.status,
        output.status.signal(),
        failed.iter().take(20).map(|line| format!("{line}\n")).collect::<String>()
    );
    Ok(())
}

/// Writes this Podman's settings.
fn prepare(folder: &Path, root: &Path) -> Result<()> {
    for name in ["tmp", "networks", ".config/containers"] {
        std::fs::create_dir_all(folder.join(name))?;
    }
    let at = |name: &str| root.join(name).display().to_string();
    let own = |name: &str| folder.join(name).display().to_string();
    // Podman's default limits exceed what a container of the test may set.
    let settings = format!(
        r#"[containers]
default_ulimits = ["nofile=1024:1024", "nproc=4096:4096"]
[engine]
events_logger = "file"
conmon_path = ["{}"]
tmp_dir = "{}"
[network]
network_backend = "cni"
cni_plugin_dirs = ["{}"]
network_config_dir = "{}"
"#,
        at("usr/bin/conmon"),
        own("run/libpod"),
        at("usr/lib/cni"),
        own("networks")
    );
    std::fs::write(folder.join("containers.conf"), settings)?;
    let policy = r#"{"default":[{"type":"insecureAcceptAnything"}]}"#;
    std::fs::write(folder.join(".config/containers/policy.json"), policy)?;
    // Lets an unpacked Podman, and the programs that it starts, find its libraries.
    let mut libraries = String::from("include /etc/ld.so.conf\n");
    for entry in std::fs::read_dir(root.join("usr/lib"))? {
        let path = entry?.path();
        if path.display().to_string().ends_with("-linux-gnu") {
            libraries.push_str(&format!("{}\n", path.display()));
        }
    }
    let list = folder.join("ld.so.conf");
    std::fs::write(&list, libraries)?;
    let made = Command::new("ldconfig").arg("-C").arg(folder.join("ld.so.cache")).arg("-f").arg(&list).output()?;
    ensure!(made.status.success(), "ldconfig: {}", String::from_utf8_lossy(&made.stderr));
    Ok(())
}

async fn inside(socket: String, behind_its_proxy: bool) -> Result<()> {
    let mut stage = Stage::new(Protocol::V2).await?;
    // Make a listing come too late: the agent must learn of changes from events.
    stage.set("REPORT_INTERVAL_SECONDS", "60");
    let host = format!("unix://{socket}");
    // Long enough to observe the lease before the proxy ends it.
    stage.set("TUNNEL_LEASE_SECONDS", "3");
    let _proxy = if behind_its_proxy {
        stage.set("SOCKET_PROXY_DOCKER_HOST", &host);
        let proxy = testkit::SocketProxy::start(&crate::support::agent_binary(), &stage.env)?;
        stage.set("DOCKER_HOST", proxy.host_url());
        Some(proxy)
    } else {
        stage.set("DOCKER_HOST", &host);
        None
    };
    let tunnel = Tunnel::new(&stage, "");
    let mut agent = tunnel.agent(&stage)?;
    tunnel.enrol(&stage, &agent).await?;
    let known = registered(&stage).await?;

    // Ten seconds for a Podman on a busy machine; the listing comes after thirty.
    let soon = Duration::from_secs(10);
    let id = stage.scope.run_workload(&[("dockflare.enable", "true")], &[], Some(&stage.network), false).await?;
    let is_known = |is: bool| {
        let (master, id) = (&stage.master, &id);
        let what = if is { "a start" } else { "an end" };
        master.wait_for(what, soon, move |known| (known.only_agent()?.containers.contains_key(id) == is).then_some(()))
    };
    is_known(true).await?;
    stage.scope.kill(&id, "SIGKILL").await?;
    is_known(false).await?;
    stage.scope.start(&id).await?;
    is_known(true).await?;
    stage.scope.rm(&id).await?;
    is_known(false).await?;

    let before = stage.scope.inspect(&stage.tunnel).await?.id;
    stage.master.push_commands(&known.id, vec![tunnel.restart()])?;
    wait_until("the replacement", 2 * SOON, async || {
        let now = stage.scope.find(&stage.tunnel).await.ok()??;
        let is_alone = stage.scope.find(&format!("{}-next", stage.tunnel)).await.ok()?.is_none();
        (now.id != before && is_alone).then_some(())
    })
    .await?;
    stage.tunnel_is("running").await?;

    let checked = Checked::new(&stage.env, stage.data.path(), &[&stage.key, &tunnel.token]).await?;
    checked.is("docker.answer", "pass")?;
    checked.is("tunnel.container", "pass")?;
    checked.is("tunnel.ready", "pass")?;
    ensure!(checked.code == Some(0), "{:#}", checked.document);

    agent.sigterm()?;
    ensure!(agent.wait_exit(2 * SOON).await?.code() == Some(0), "{}", agent.log());
    wait_until("the end of the tunnel", SOON, async || {
        (stage.scope.status(&stage.tunnel).await.ok()? == "gone").then_some(())
    })
    .await?;
    stage.assert_no_violations();
    Ok(())
}
