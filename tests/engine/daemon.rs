//! Runs the test's own Engine, so that a test can withhold, kill, freeze and restart it under the agent.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use dockflare_dev_master::{Agent, Protocol, Snapshot};
use testkit::bollard::Docker;
use testkit::bollard::query_parameters::ListContainersOptions;
use testkit::{Case, case, wait_until};

use crate::support::{SOON, Stage, agent_binary};

pub(crate) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for protocol in [Protocol::V1, Protocol::V2] {
        let name = |what: &str| format!("{protocol}_master_{what}");
        cases.push(case(name("a_docker_that_is_started_after_the_agent_is_known_in_moments"), move || later(protocol)));
        cases.push(case(name("a_killed_docker_is_known_again_in_moments_and_stops_nothing"), move || killed(protocol)));
        cases.push(case(name("a_docker_that_hangs_is_known_again_in_moments"), move || hangs(protocol)));
    }
    let name = "a_socket_that_a_live_restored_docker_made_anew_ends_the_proxy_that_mounts_the_old_one_and_nothing_else";
    cases.push(case(name, live_restored).limit(Duration::from_secs(240)));
    cases.into_iter().map(|case| case.without(missing())).collect()
}

/// How long the master's picture may stay wrong after an outage ends.
const MOMENTS: Duration = Duration::from_secs(2);

/// Returns what prevents a separate Engine on this machine, if anything.
pub(crate) fn missing() -> Option<String> {
    let has = |name: &str| {
        let path = std::env::var_os("PATH").unwrap_or_default();
        std::env::split_paths(&path).any(|folder| folder.join(name).exists())
    };
    let is_root = || {
        std::fs::metadata("/proc/self").is_ok_and(|process| {
            use std::os::unix::fs::MetadataExt;
            process.uid() == 0
        })
    };
    let absent = ["dockerd", "docker", "setpriv", "unshare"].into_iter().find(|name| !has(name));
    match absent {
        Some(name) => Some(format!("no Engine of its own: {name} is not installed")),
        None => (!is_root()).then(|| "no Engine of its own: that takes root".to_owned()),
    }
}

/// An Engine in its own folder. Dropping it removes everything.
pub(crate) struct Daemon {
    folder: tempfile::TempDir,
    child: Option<Child>,
    kind: Kind,
}

/// The network of an Engine, and the fate of its containers when it ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// In its own network namespace. The containers survive a kill, as with `live-restore`.
    Apart,
    /// In the private network namespace of the case's thread: see [`leave_the_hosts_network`]. The containers end with
    /// the Engine, as on most hosts.
    WithTheCase,
}

/// Moves this thread, and whatever it starts or listens on from now on, into a new network namespace. The namespace
/// ends with them.
pub(crate) fn leave_the_hosts_network() -> Result<()> {
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).context("no network of its own")
}

/// Whether this thread has left the host's network.
fn has_left_the_hosts_network() -> Result<bool> {
    // The process's first thread never leaves it.
    let first = format!("/proc/{0}/task/{0}/ns/net", std::process::id());
    Ok(std::fs::read_link("/proc/thread-self/ns/net")? != std::fs::read_link(first)?)
}

const IMAGE: &str = "workload:1";

impl Daemon {
    fn new() -> Result<Self> {
        Self::of_kind(Kind::Apart)
    }

    /// Makes an Engine in the network of this thread, which must have left the host's.
    pub(crate) fn with_the_case() -> Result<Self> {
        ensure!(has_left_the_hosts_network()?, "an Engine without a bridge would remove that of this machine");
        Self::of_kind(Kind::WithTheCase)
    }

    fn of_kind(kind: Kind) -> Result<Self> {
        // Keep it short: the path of a socket in it is limited to 107 bytes.
        Ok(Self { folder: tempfile::Builder::new().prefix("dfd-").tempdir_in("/tmp")?, child: None, kind })
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn host_url(&self) -> String {
        format!("unix://{}", self.path("docker.sock").display())
    }

    fn client(&self) -> Result<Docker> {
        Ok(Docker::connect_with_unix(&self.host_url(), 20, testkit::bollard::API_DEFAULT_VERSION)?)
    }

    /// Starts or restarts the Engine and waits until it answers.
    pub(crate) async fn start(&mut self) -> Result<()> {
        self.spawn()?;
        let answers = wait_until("the test's own Engine to answer", SOON, async || {
            self.client().ok()?.ping().await.ok().map(drop)
        });
        answers.await.with_context(|| std::fs::read_to_string(self.path("log")).unwrap_or_default())
    }

    fn spawn(&mut self) -> Result<()> {
        let settings = self.path("daemon.json");
        std::fs::write(&settings, format!("{{\"live-restore\":{}}}", self.kind == Kind::Apart))?;
        let log = File::options().create(true).append(true).open(self.path("log"))?;
        // The Engine ends with this thread, even if a SIGKILL ends the tests. It needs its own network: an Engine
        // without a bridge removes any `docker0` that it finds, here the machine's.
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--"]);
        if self.kind == Kind::Apart {
            command.args(["unshare", "--net", "--"]);
        }
        let child = command
            .args(["dockerd", "--storage-driver=vfs", "--bridge=none", "--iptables=false"])
            .args(["--ip6tables=false", "--ip-masq=false", "--ip-forward=false"])
            .arg("--config-file")
            .arg(&settings)
            .arg("--data-root")
            .arg(self.path("data"))
            .arg("--exec-root")
            .arg(self.path("exec"))
            .arg("--pidfile")
            .arg(self.path("pid"))
            .arg("--host")
            .arg(self.host_url())
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("cannot start dockerd")?;
        self.child = Some(child);
        Ok(())
    }

    /// Kills the Engine with SIGKILL; its containers keep running.
    fn kill(&mut self) -> Result<()> {
        let mut child = self.child.take().context("it does not run")?;
        child.kill()?;
        child.wait()?;
        self.end_containerd();
        Ok(())
    }

    /// Stops the Engine as `systemctl stop docker` does: it ends its containers first.
    pub(crate) async fn stop(&mut self) -> Result<()> {
        self.signal("-TERM")?;
        let child = self.child.as_mut().context("it does not run")?;
        wait_until("the end of Docker", 2 * SOON, async || child.try_wait().ok().flatten().map(drop)).await?;
        self.child = None;
        self.end_containerd();
        Ok(())
    }

    /// Switches the host off, either suddenly or after signaling all processes to end. Whatever is not on its disk is
    /// lost.
    pub(crate) async fn switch_off(&mut self, suddenly: bool) -> Result<()> {
        let ids = self.docker(&["ps", "-q"])?;
        let pids: Vec<_> = ids.split_whitespace().map(|id| self.pid_of(id)).collect::<Result<_>>()?;
        let pids: Vec<_> = pids.iter().map(u32::to_string).collect();
        if suddenly {
            self.kill()?;
        } else {
            let all = [&["-TERM".to_owned()], &pids[..]].concat();
            Command::new("kill").args(all).stderr(Stdio::null()).status()?;
            self.stop().await?;
        }
        let left = pids.into_iter().chain(processes_of(self.folder.path()));
        for pid in left {
            let _ = Command::new("kill").args(["-KILL", &pid]).stderr(Stdio::null()).status();
        }
        for mount in mounts_in(self.folder.path()) {
            let _ = Command::new("umount").arg("-l").arg(mount).status();
        }
        std::fs::remove_dir_all(self.path("exec"))?;
        Ok(())
    }

    fn end_containerd(&self) {
        // The Engine's containerd ends with it. On a machine where nobody reaps orphans, both leave a process id that
        // looks alive, and the next dockerd would wait for them.
        let containerd = self.path("exec/containerd/containerd.pid");
        if let Ok(pid) = std::fs::read_to_string(&containerd) {
            let _ = Command::new("kill").args(["-KILL", pid.trim()]).stderr(Stdio::null()).status();
        }
        for file in [containerd, self.path("pid")] {
            drop(std::fs::remove_file(file));
        }
    }

    /// Sends a signal to the Engine.
    fn signal(&self, signal: &str) -> Result<()> {
        let pid = self.child.as_ref().context("it does not run")?.id();
        ensure!(Command::new("kill").args([signal, &pid.to_string()]).status()?.success(), "kill {signal} {pid}");
        Ok(())
    }

    pub(crate) fn docker(&self, args: &[&str]) -> Result<String> {
        let done =
            Command::new("docker").arg("--host").arg(self.host_url()).args(args).stdin(Stdio::null()).output()?;
        ensure!(done.status.success(), "docker {args:?}: {}", String::from_utf8_lossy(&done.stderr));
        Ok(String::from_utf8_lossy(&done.stdout).trim().to_owned())
    }

    /// Like [`Daemon::docker`], but includes standard error.
    pub(crate) fn docker_both(&self, args: &[&str]) -> Result<String> {
        let done =
            Command::new("docker").arg("--host").arg(self.host_url()).args(args).stdin(Stdio::null()).output()?;
        Ok(format!("{}{}", String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr)))
    }

    /// Imports the workload's image.
    fn import(&self) -> Result<()> {
        let archive = self.path("image.tar");
        let mut tar = tar::Builder::new(File::create(&archive)?);
        // The Engine cannot read this library's entries for sparse files.
        tar.sparse(false);
        tar.append_path_with_name(testkit::binary("workload")?, "workload")?;
        tar.finish()?;
        self.docker(&["import", &archive.display().to_string(), IMAGE]).map(drop)
    }

    /// Loads images from the machine's own Engine.
    fn load(&self, images: &[&str]) -> Result<()> {
        let archive = self.path("images.tar").display().to_string();
        let saved = Command::new("docker").args(["save", "-o", &archive]).args(images).stdin(Stdio::null()).output()?;
        ensure!(saved.status.success(), "docker save: {}", String::from_utf8_lossy(&saved.stderr));
        self.docker(&["load", "-i", &archive]).map(drop)
    }

    /// Starts a labelled workload. As a last resort, it ends by itself after a while.
    fn run(&self) -> Result<String> {
        self.docker(&[
            "run",
            "-d",
            "--label",
            "dockflare.enable=true",
            "--network",
            "none",
            IMAGE,
            "/workload",
            "sleep",
            "300000",
        ])
    }

    /// Returns the host's process id of a container.
    fn pid_of(&self, id: &str) -> Result<u32> {
        Ok(self.docker(&["inspect", "--format", "{{.State.Pid}}", id])?.parse()?)
    }

    /// Returns the running containers: id and name.
    async fn running(&self) -> Result<BTreeMap<String, String>> {
        let listed = self.client()?.list_containers(None::<ListContainersOptions>).await?;
        let pair = |container: testkit::models::ContainerSummary| {
            let name = container.names?.first()?.trim_start_matches('/').to_owned();
            Some((container.id?, name))
        };
        Ok(listed.into_iter().filter_map(pair).collect())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // Only the Engine itself can remove its running containers, so start it if necessary. Ignore errors: the
        // leftovers will show them, and nothing else can be done here.
        if self.child.is_none() && self.path("data").exists() {
            drop(self.spawn());
        }
        if let Some(child) = &mut self.child {
            let _ = Command::new("kill").args(["-CONT", &child.id().to_string()]).status();
        }
        let end = std::time::Instant::now() + Duration::from_secs(10);
        let all = loop {
            match self.docker(&["ps", "-aq"]) {
                Ok(all) => break all,
                Err(_) if self.child.is_some() && std::time::Instant::now() < end => {
                    std::thread::sleep(Duration::from_millis(50));
                }
                Err(_) => break String::new(),
            }
        };
        let ids: Vec<&str> = all.split_whitespace().collect();
        if !ids.is_empty() {
            drop(self.docker(&[&["rm", "-f"], &ids[..]].concat()));
        }
        if let Some(mut child) = self.child.take() {
            drop(child.kill());
            drop(child.wait());
        }
        // Kill the containers' shims, in case the Engine did not start to remove them. The workloads end by themselves.
        for pid in processes_of(self.folder.path()) {
            let _ = Command::new("kill").args(["-KILL", &pid]).stderr(Stdio::null()).status();
        }
        for mount in mounts_in(self.folder.path()) {
            let _ = Command::new("umount").arg("-l").arg(mount).status();
        }
        testkit::note("dockerd", &std::fs::read_to_string(self.path("log")).unwrap_or_default());
    }
}

/// Returns the processes whose command line contains this folder, which is unique to the test.
fn processes_of(folder: &Path) -> Vec<String> {
    let folder = folder.display().to_string();
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().into_string().ok());
    let is_its = |pid: &String| {
        std::fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| String::from_utf8_lossy(&line).contains(&folder))
    };
    pids.filter(|pid| pid.bytes().all(|byte| byte.is_ascii_digit())).filter(is_its).collect()
}

/// Returns the mount points in the folder, the innermost first.
fn mounts_in(folder: &Path) -> Vec<PathBuf> {
    let mounts = std::fs::read_to_string("/proc/mounts").unwrap_or_default();
    let places = mounts.lines().filter_map(|line| line.split(' ').nth(1)).map(PathBuf::from);
    let mut inside: Vec<_> = places.filter(|place| place.starts_with(folder)).collect();
    inside.reverse();
    inside
}

/// Waits until the master's picture matches what this Engine runs, and returns how long that took.
async fn agreed(stage: &Stage, daemon: &Daemon, within: Duration) -> Result<Duration> {
    let began = std::time::Instant::now();
    let running = daemon.running().await?;
    let believed = |agent: &Agent| {
        agent.containers.iter().map(|(id, container)| (id.clone(), container.name.clone())).collect::<BTreeMap<_, _>>()
    };
    let right = |agent: &&Agent| believed(agent) == running;
    let what = format!("the picture {running:?}");
    stage.master.wait_for(&what, within, |known| known.only_agent().filter(right).map(drop)).await?;
    Ok(began.elapsed())
}

/// Starts a daemon with two containers, and an agent that has reported both.
async fn scene(protocol: Protocol) -> Result<(Stage, Daemon, testkit::AgentProcess, [String; 2])> {
    let mut daemon = Daemon::new()?;
    daemon.start().await?;
    daemon.import()?;
    let ids = [daemon.run()?, daemon.run()?];
    let mut stage = Stage::new(protocol).await?;
    stage.set("DOCKER_HOST", daemon.host_url());
    let agent = stage.agent()?;
    agreed(&stage, &daemon, SOON).await?;
    Ok((stage, daemon, agent, ids))
}

async fn later(protocol: Protocol) -> Result<()> {
    let mut daemon = Daemon::new()?;
    let mut stage = Stage::new(protocol).await?;
    stage.set("DOCKER_HOST", daemon.host_url());
    let agent = stage.agent()?;
    agent.wait_for_log("Docker cannot be reached", SOON).await?;
    daemon.start().await?;
    let came = tokio::time::Instant::now();
    agent.wait_for_log("listening to Docker's events again", MOMENTS).await?;
    let took = came.elapsed();
    daemon.import()?;
    daemon.run()?;
    agreed(&stage, &daemon, MOMENTS).await?;
    eprintln!("{protocol}: listens {took:.1?} after Docker came");
    stage.assert_no_violations();
    Ok(())
}

async fn killed(protocol: Protocol) -> Result<()> {
    let (stage, mut daemon, agent, [always, ends]) = scene(protocol).await?;
    let pid = daemon.pid_of(&ends)?;
    let mark = agent.mark();
    daemon.kill()?;
    agent.wait_for_log_after(mark, "Docker cannot be reached", SOON).await?;
    ensure!(Command::new("kill").args(["-KILL", &pid.to_string()]).status()?.success());
    daemon.start().await?;
    let took = agreed(&stage, &daemon, MOMENTS).await?;
    let running = daemon.running().await?;
    ensure!(running.contains_key(&always) && !running.contains_key(&ends), "{running:?}");
    // The agent receives events again, too.
    daemon.run()?;
    agreed(&stage, &daemon, MOMENTS).await?;
    eprintln!("{protocol}: the picture right {took:.1?} after the killed Docker answered again");
    stage.assert_never_missed(&always)
}

async fn hangs(protocol: Protocol) -> Result<()> {
    let (stage, daemon, agent, [always, ends]) = scene(protocol).await?;
    let pid = daemon.pid_of(&ends)?;
    let mark = agent.mark();
    daemon.signal("-STOP")?;
    ensure!(Command::new("kill").args(["-KILL", &pid.to_string()]).status()?.success());
    // The agent notices with the next report, because Docker does not answer its listing.
    agent
        .wait_for_log_after(mark, "WARN Docker did not answer within 20s when asked to list containers", 2 * SOON)
        .await?;
    daemon.signal("-CONT")?;
    agent.wait_for_log_after(mark, "listening to Docker's events again", SOON).await?;
    let took = agreed(&stage, &daemon, MOMENTS).await?;
    eprintln!("{protocol}: the picture right {took:.1?} after the hung Docker answered again");
    stage.assert_never_missed(&always)
}

/// The socket proxy mounts Docker's socket as a file, as most people do, and the daemon makes its own socket instead of
/// getting it from systemd. After a restart the containers keep running, but the proxy's socket stays dead forever.
async fn live_restored() -> Result<()> {
    let mut daemon = Daemon::new()?;
    daemon.start().await?;
    daemon.import()?;
    let mut stage = Stage::new(Protocol::V2).await?;
    let agent_image = testkit::images().agent(&agent_binary()).await?;
    let setting = |name: &str| {
        let found = stage.env.iter().find(|(known, _)| known == name);
        found.map(|(_, value)| value.clone()).with_context(|| format!("{name} is not set"))
    };
    let stand_in = setting("CLOUDFLARED_IMAGE")?;
    daemon.load(&[&agent_image, &stand_in])?;
    let api = daemon.path("api");
    std::fs::create_dir(&api)?;
    let mut args = ["run", "-d", "--name", "proxy", "--network", "none", "--user", "0:0", "--read-only"].to_vec();
    args.extend(["--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--restart", "unless-stopped"]);
    let binds = [
        format!("{}:/var/run/docker.sock:ro", daemon.path("docker.sock").display()),
        format!("{}:/run/dockflare", api.display()),
    ];
    let names = ["CLOUDFLARED_IMAGE", "CLOUDFLARED_NETWORK_NAME", "TUNNEL_CONTAINER_NAME"];
    let settings = names.iter().map(|name| Ok(format!("{name}={}", setting(name)?))).collect::<Result<Vec<_>>>()?;
    args.extend(binds.iter().flat_map(|bind| ["-v", bind]));
    args.extend(settings.iter().flat_map(|setting| ["-e", setting]));
    args.extend([agent_image.as_str(), "socket-proxy"]);
    daemon.docker(&args)?;
    stage.set("DOCKER_HOST", format!("unix://{}", api.join("docker.sock").display()));
    let agent = stage.agent()?;
    stage.enrolled_agent("edge").await?;
    agent.wait_for_log("tunnel ready", 2 * SOON).await?;
    let always = daemon.run()?;
    let knows = async |id: &str| {
        let known = |known: &Snapshot| known.only_agent().filter(|agent| agent.containers.contains_key(id)).map(drop);
        stage.master.wait_for("the container to be known", 2 * SOON, known).await
    };
    knows(&always).await?;
    let life = |name: &str| daemon.docker(&["inspect", "--format", "{{.Id}} {{.State.StartedAt}}", name]);
    let (tunnel, proxy) = (life(&stage.tunnel)?, life("proxy")?);

    let mark = agent.mark();
    daemon.kill()?;
    agent.wait_for_log_after(mark, "Docker cannot be reached", SOON).await?;
    daemon.start().await?;
    let back = std::time::Instant::now();
    let life = |name: &str| daemon.docker(&["inspect", "--format", "{{.Id}} {{.State.StartedAt}}", name]);
    ensure!(life("proxy")? == proxy && life(&stage.tunnel)? == tunnel, "both went on without their daemon");
    agent.wait_for_log_after(mark, "listening to Docker's events again", 3 * SOON).await?;
    eprintln!("the agent listens again {:.1?} after the daemon with a new socket was up", back.elapsed());
    let log = Command::new("docker").arg("--host").arg(daemon.host_url()).args(["logs", "proxy"]).output()?;
    let log = [log.stdout, log.stderr].concat();
    let log = String::from_utf8_lossy(&log);
    ensure!(log.contains("nobody listens any more on the Docker socket that is mounted here"), "{log}");
    ensure!(daemon.docker(&["inspect", "--format", "{{.RestartCount}}", "proxy"])? == "1", "{log}");
    ensure!(life(&stage.tunnel)? == tunnel, "the tunnel was touched");
    let new = daemon.run()?;
    knows(&new).await?;
    stage.assert_never_missed(&always)
}
