//! `cargo xtask demo --vault`: a credential reaches a container that knows nothing of a vault. The demo rotates it
//! while the container runs, and shows that it is stored nowhere else and survives the vault. It also shows that the
//! vault takes a bad one back.
//!
//! The vault, its image, the Docker Engine and everything that happens on it are real. The reading program is this
//! workspace's `credential-reader`, with a made-up database that accepts every password except those that begin with
//! `bad`.

use std::collections::HashMap;
use std::fmt::Display;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use futures_util::{Stream, StreamExt};
use testkit::bollard::body_full;
use testkit::bollard::container::LogOutput;
use testkit::bollard::errors::Error;
use testkit::bollard::exec::{CreateExecOptions, StartExecResults};
use testkit::bollard::models::{
    ContainerConfig, ContainerCreateBody, HealthConfig, HostConfig, Mount, MountType, RestartPolicy,
    RestartPolicyNameEnum, VolumeCreateRequest,
};
use testkit::bollard::query_parameters::{
    CommitContainerOptions, CreateContainerOptions, DownloadFromContainerOptions, KillContainerOptions,
    RemoveContainerOptions, UploadToContainerOptions,
};
use testkit::{Docker, Images, wait_until};
use tokio::io::AsyncWriteExt;

use super::down;
use super::scene::{LABEL, REPOSITORY, confined, labels};

const VAULT: &str = "dockflare-demo-vault";
const PROXY: &str = "dockflare-demo-vault-proxy";
const SHOP: &str = "dockflare-demo-shop";
const MAKER: &str = "dockflare-demo-vault-key";
const VOLUMES: [&str; 4] = [
    "dockflare-demo-vault-config",
    "dockflare-demo-vault-data",
    "dockflare-demo-vault-state",
    "dockflare-demo-vault-docker",
];
/// In memory, and shared by the vault and the program.
const SECRETS: &str = "dockflare-demo-shop-secrets";
const SECRET: &str = "shop/db-password";
/// How long any one step may take.
const LIMIT: Duration = Duration::from_secs(90);

const CONFIG: &str = "\
storage: {change_counter: /app/state/change}
grants:
- {principal: workload:shop, operations: [get], names: shop}
deliveries:
- workload: shop
  directory: /deliver/shop
  gid: 65532
  files: [{name: db_password, secret: shop/db-password}]
  on_change: restart
  containers: [dockflare-demo-shop]
";

/// The hash by which the reader tells one credential from another.
fn hash(text: &str) -> String {
    let hash = text
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
    format!("{hash:016x}")
}

fn password(word: &str) -> String {
    format!("{word}-{:016x}{:016x}", fastrand::u64(..), fastrand::u64(..))
}

struct Play {
    docker: Docker,
    began: Instant,
    image: String,
    reader: String,
}

/// Plays the vault demo.
pub(super) async fn play(docker: &Docker) -> Result<()> {
    println!(
        "A real vault and a real Docker Engine; the program that reads is a small one of this workspace, with a\n\
         made-up database. Everything here is called dockflare-demo…\n"
    );
    let began = Instant::now();
    say(began, "demo", "building the vault and the program that reads; the first time takes minutes");
    for name in ["dockflare-vault", "credential-reader"] {
        let status = testkit::cargo_build(name, false).status().context("cannot run cargo")?;
        ensure!(status.success(), "cannot build {name}: {status}");
    }
    let before = down::down(docker).await.context("cannot remove the previous demo")?;
    if !before.is_empty() {
        say(began, "demo", format_args!("removed the previous demo, {} things", before.len()));
    }
    let images = Images::named(REPOSITORY, LABEL);
    let image = images.vault(&testkit::binary("dockflare-vault")?).await?;
    let reader = images.credential_reader().await?;
    say(began, "docker", "images made from local files, FROM scratch");
    let play = Play { docker: docker.clone(), began, image, reader };
    let told = play.tell().await;
    if told.is_err() {
        for name in [VAULT, PROXY, SHOP] {
            let log = testkit::logs(docker, name, "50").await.unwrap_or_else(|error| error.to_string());
            println!("\n--- {name} ---\n{}", log.trim_end());
        }
        println!("\nAll is left as it is, to look at. Remove it: cargo xtask demo --down");
    }
    told
}

impl Play {
    fn say(&self, who: &str, what: impl Display) {
        say(self.began, who, what);
    }

    async fn tell(&self) -> Result<()> {
        self.prepare().await?;
        self.start_proxy().await?;
        self.say(
            "docker",
            format_args!("{PROXY} started: holds the Docker socket, no network; may restart {SHOP} and nothing else"),
        );
        self.start_vault().await?;
        self.say(
            "docker",
            format_args!("{VAULT} started: uid 65431, no network, read-only, no capabilities, no Docker socket"),
        );

        let first = password("good");
        self.set(&first).await?;
        self.say(
            "demo",
            format_args!("vault set {SECRET}, from standard input: a password whose hash is {}", hash(&first)),
        );
        self.start_shop().await?;
        self.well_with(&first).await?;
        self.say("shop", format_args!("reads /run/secrets/db_password, finds {}, and is healthy", hash(&first)));

        let second = password("good");
        let at = Instant::now();
        self.set(&second).await?;
        self.say("demo", format_args!("vault set {SECRET}: another one, {}", hash(&second)));
        self.wait_for_log(SHOP, &format!("sees {}", hash(&second))).await?;
        self.say("shop", format_args!("sees it in its file, {} ms after the command began", at.elapsed().as_millis()));
        self.well_with(&second).await?;
        self.settled().await?;
        self.say("vault", format_args!("has restarted {SHOP}, waited for its health, and settled the new files"));

        self.search(&[&first, &second]).await?;
        self.outlive(&second).await?;
        self.take_back(&second).await?;
        println!(
            "\nLook further:\n  docker logs {VAULT}\n  docker exec {VAULT} /dockflare-vault status\n  docker exec {VAULT} /dockflare-vault audit verify\n  \
             docker inspect {SHOP}\nRotate it yourself, and see what becomes of one that begins with bad:\n  \
             printf good-9 | docker exec -i {VAULT} /dockflare-vault set {SECRET}; docker logs -f {SHOP}\n\
             Remove all of it:\n  cargo xtask demo --down"
        );
        Ok(())
    }

    /// Creates the volumes, and a key in the configuration volume.
    async fn prepare(&self) -> Result<()> {
        for name in VOLUMES {
            let volume = VolumeCreateRequest { name: Some(name.to_owned()), labels: labels([]), ..Default::default() };
            self.docker.create_volume(volume).await.with_context(|| format!("cannot create the volume {name}"))?;
        }
        let options = [("type", "tmpfs"), ("device", "tmpfs"), ("o", "size=1m,mode=2750,uid=65431,gid=65532")];
        let options = options.map(|(key, value)| (key.to_owned(), value.to_owned()));
        let volume = VolumeCreateRequest {
            name: Some(SECRETS.to_owned()),
            driver_opts: Some(HashMap::from(options)),
            labels: labels([]),
            ..Default::default()
        };
        self.docker.create_volume(volume).await.with_context(|| format!("cannot create the volume {SECRETS}"))?;
        let host = HostConfig {
            network_mode: Some("none".into()),
            mounts: Some(vec![volume_at(VOLUMES[0], "/app/config", false)]),
            ..HostConfig::default()
        };
        let body = ContainerCreateBody { cmd: Some(vec!["generate-key".into()]), ..self.body(&self.image, host) };
        self.start(MAKER, body).await?;
        let key = self
            .wait("the key", async || {
                let log = testkit::logs(&self.docker, MAKER, "all").await.ok()?;
                Some(log.trim().to_owned()).filter(|key| key.len() == 44)
            })
            .await?;
        let mut archive = tar::Builder::new(Vec::new());
        for (name, text) in [("master.key", key.as_str()), ("config.yaml", CONFIG)] {
            let mut header = tar::Header::new_gnu();
            header.set_size(text.len() as u64);
            header.set_mode(0o600);
            header.set_uid(65431);
            header.set_gid(65431);
            header.set_cksum();
            archive.append_data(&mut header, name, text.as_bytes())?;
        }
        let to = UploadToContainerOptions { path: "/app/config".to_owned(), ..Default::default() };
        self.docker.upload_to_container(MAKER, Some(to), body_full(archive.into_inner()?.into())).await?;
        // This also removes the container's log, which contains the key.
        let remove = RemoveContainerOptions { force: true, ..Default::default() };
        self.docker.remove_container(MAKER, Some(remove)).await?;
        self.say("vault", "generated a master key, in a volume of its own");
        Ok(())
    }

    fn body(&self, image: &str, host: HostConfig) -> ContainerCreateBody {
        ContainerCreateBody {
            image: Some(image.to_owned()),
            host_config: Some(host),
            labels: labels([]),
            ..ContainerCreateBody::default()
        }
    }

    async fn start(&self, name: &str, body: ContainerCreateBody) -> Result<()> {
        let options = CreateContainerOptions { name: Some(name.to_owned()), ..Default::default() };
        self.docker.create_container(Some(options), body).await.with_context(|| format!("cannot create {name}"))?;
        self.docker.start_container(name, None).await.with_context(|| format!("cannot start {name}"))
    }

    async fn start_proxy(&self) -> Result<()> {
        let host = HostConfig {
            network_mode: Some("none".into()),
            binds: Some(vec![format!("{}:/var/run/docker.sock:ro", testkit::socket_path())]),
            mounts: Some(vec![volume_at(VOLUMES[3], "/run/dockflare", false)]),
            ..confined()
        };
        let body = ContainerCreateBody {
            cmd: Some(vec!["socket-proxy".into()]),
            user: Some("0:0".into()),
            env: Some(vec![format!("RELOAD_CONTAINERS={SHOP}")]),
            ..self.body(&self.image, host)
        };
        self.start(PROXY, body).await
    }

    async fn start_vault(&self) -> Result<()> {
        let [config, data, state, docker] = VOLUMES;
        let host = HostConfig {
            network_mode: Some("none".into()),
            mounts: Some(vec![
                volume_at(config, "/app/config", true),
                volume_at(data, "/app/data", false),
                volume_at(state, "/app/state", false),
                volume_at(docker, "/run/dockflare", true),
                volume_at(SECRETS, "/deliver/shop", false),
            ]),
            tmpfs: Some(HashMap::from([("/run/dockflare-vault".into(), "mode=0700,uid=65431,gid=65431".into())])),
            ..confined()
        };
        self.start(VAULT, self.body(&self.image, host)).await?;
        self.wait_for_log(VAULT, "dockflare-vault started").await
    }

    async fn start_shop(&self) -> Result<()> {
        let policy = RestartPolicy { name: Some(RestartPolicyNameEnum::UNLESS_STOPPED), ..Default::default() };
        let host = HostConfig {
            network_mode: Some("none".into()),
            mounts: Some(vec![volume_at(SECRETS, "/run/secrets", true)]),
            restart_policy: Some(policy),
            ..confined()
        };
        let check = ["CMD", "/usr/local/bin/credential-reader", "check"].map(str::to_owned).to_vec();
        let body = ContainerCreateBody {
            healthcheck: Some(HealthConfig {
                test: Some(check),
                interval: Some(1_000_000_000),
                timeout: Some(5_000_000_000),
                retries: Some(2),
                ..HealthConfig::default()
            }),
            ..self.body(&self.reader, host)
        };
        self.start(SHOP, body).await
    }

    /// Runs a command of the vault, which must succeed, and returns its output. The input goes through standard input,
    /// so that no process list and no event shows it.
    async fn vault(&self, arguments: &[&str], input: &str) -> Result<String> {
        let command = ["/dockflare-vault"].iter().chain(arguments).map(|word| (*word).to_owned()).collect();
        let options = CreateExecOptions {
            cmd: Some(command),
            attach_stdin: Some(!input.is_empty()),
            attach_stdout: Some(true),
            attach_stderr: Some(true),
            ..CreateExecOptions::<String>::default()
        };
        let id = self.docker.create_exec(VAULT, options).await?.id;
        let mut text = String::new();
        if let StartExecResults::Attached { mut output, input: mut to } = self.docker.start_exec(&id, None).await? {
            to.write_all(input.as_bytes()).await?;
            to.shutdown().await?;
            while let Some(piece) = output.next().await {
                if let LogOutput::StdOut { message } | LogOutput::StdErr { message } = piece? {
                    text += &String::from_utf8_lossy(&message);
                }
            }
        }
        let code = self.docker.inspect_exec(&id).await?.exit_code;
        ensure!(code == Some(0), "{arguments:?} ended with {code:?}: {text}");
        Ok(text)
    }

    async fn set(&self, value: &str) -> Result<()> {
        self.vault(&["set", SECRET], value).await.map(drop)
    }

    async fn wait<T>(&self, what: &str, look: impl AsyncFnMut() -> Option<T>) -> Result<T> {
        wait_until(what, LIMIT, look).await
    }

    async fn wait_for_log(&self, container: &str, text: &str) -> Result<()> {
        let said = async || testkit::logs(&self.docker, container, "all").await.ok()?.contains(text).then_some(());
        self.wait(&format!("{container} to say {text:?}"), said).await
    }

    async fn health(&self) -> Option<String> {
        Some(self.docker.inspect_container(SHOP, None).await.ok()?.state?.health?.status?.to_string())
    }

    /// Waits until the program is healthy and has last begun with this value.
    async fn well_with(&self, value: &str) -> Result<()> {
        let line = format!("begins with {}", hash(value));
        let is_it = async || {
            let log = testkit::logs(&self.docker, SHOP, "all").await.ok()?;
            let last = log.lines().rfind(|line| line.contains("begins with"))?.contains(&line);
            (last && self.health().await? == "healthy").then_some(())
        };
        self.wait("the program to be healthy", is_it).await
    }

    async fn settled(&self) -> Result<()> {
        let settled = async || {
            let status: serde_json::Value = serde_json::from_str(&self.vault(&["status"], "").await.ok()?).ok()?;
            let state = &status["deliveries"]["shop"];
            (state["version"].is_u64() && state["version"] == state["settled"]).then_some(())
        };
        self.wait("the files to be settled", settled).await
    }

    /// Searches for the passwords wherever Docker or a disk could hold them.
    async fn search(&self, passwords: &[&str]) -> Result<()> {
        let needles: Vec<Vec<u8>> = passwords.iter().map(|text| text.as_bytes().to_vec()).collect();
        let clean = |place: &str, found: bool| {
            if found { Err(anyhow::anyhow!("a password was found in {place}")) } else { Ok(()) }
        };
        for name in [VAULT, PROXY, SHOP] {
            let inspected = serde_json::to_vec(&self.docker.inspect_container(name, None).await?)?;
            clean(&format!("docker inspect {name}"), has(&inspected, &needles))?;
            clean(&format!("docker export {name}"), streams(self.docker.export_container(name), &needles).await?)?;
            let log = testkit::logs(&self.docker, name, "all").await?;
            clean(&format!("docker logs {name}"), has(log.as_bytes(), &needles))?;
        }
        let options = CommitContainerOptions {
            container: Some(SHOP.to_owned()),
            repo: Some(format!("{REPOSITORY}/committed")),
            tag: Some("local".to_owned()),
            ..Default::default()
        };
        let image = self.docker.commit_container(options, ContainerConfig::default()).await?.id;
        clean("docker commit and save", streams(self.docker.export_image(&image), &needles).await?)?;
        for path in ["/app/data", "/app/state", "/app/config"] {
            let options = DownloadFromContainerOptions { path: path.to_owned() };
            let archive = self.docker.download_from_container(VAULT, Some(options));
            clean(&format!("the vault's {path}"), streams(archive, &needles).await?)?;
        }
        self.say("demo", "looked for both passwords in docker inspect, logs and export of all three, in docker commit and save, and in the vault's volumes: nothing");
        let root = self.docker.info().await?.docker_root_dir.unwrap_or_default();
        match on_disk(Path::new(&root), &needles) {
            Ok(0) => self.say(
                "demo",
                format_args!("{root} cannot be read by this user: as root, the disk would be searched as well"),
            ),
            Ok(files) => self.say(
                "demo",
                format_args!(
                    "and in {files} files of these containers and volumes below {root}, memory left out: nothing"
                ),
            ),
            Err(place) => bail!("a password was found in {}", place.display()),
        }
        let file = DownloadFromContainerOptions { path: "/deliver/shop".to_owned() };
        let there = streams(self.docker.download_from_container(VAULT, Some(file)), &needles).await?;
        ensure!(there, "the search finds nothing at all: not even in memory, where the password is");
        self.say("demo", "the same search finds it in the one place where it is: the volume in memory");
        Ok(())
    }

    /// Kills the vault, and shows that nothing else notices.
    async fn outlive(&self, value: &str) -> Result<()> {
        let kill = KillContainerOptions { signal: "SIGKILL".to_owned() };
        self.docker.kill_container(VAULT, Some(kill)).await?;
        self.say("demo", format_args!("docker kill {VAULT}"));
        let file = DownloadFromContainerOptions { path: "/run/secrets/..data/db_password".to_owned() };
        let there = self.docker.download_from_container(SHOP, Some(file));
        ensure!(streams(there, &[value.as_bytes().to_vec()]).await?, "the file is gone");
        self.well_with(value).await?;
        self.say("shop", "goes on, healthy: its file is in memory that it holds itself");
        self.docker.start_container(VAULT, None).await?;
        let starts = async || {
            let log = testkit::logs(&self.docker, VAULT, "all").await.ok()?;
            (log.matches("dockflare-vault started").count() == 2).then_some(())
        };
        self.wait("the vault to start again", starts).await?;
        self.say("docker", format_args!("{VAULT} started again"));
        Ok(())
    }

    /// Sets a password that the database rejects, and shows that the vault takes it back.
    async fn take_back(&self, good: &str) -> Result<()> {
        let bad = password("bad");
        self.set(&bad).await?;
        self.say("demo", format_args!("vault set {SECRET}: one that the database refuses, {}", hash(&bad)));
        self.wait_for_log(VAULT, "does not come up well with the new files").await?;
        self.say("vault", format_args!("{SHOP} is not healthy with it: the files before are put back"));
        self.well_with(good).await?;
        self.say("shop", format_args!("is healthy again, with {}", hash(good)));
        Ok(())
    }
}

fn say(began: Instant, who: &str, what: impl Display) {
    println!("{:7.1} s  {who:<7} {what}", began.elapsed().as_secs_f64());
}

fn volume_at(name: &str, target: &str, read_only: bool) -> Mount {
    Mount {
        typ: Some(MountType::VOLUME),
        source: Some(name.to_owned()),
        target: Some(target.to_owned()),
        read_only: Some(read_only),
        ..Mount::default()
    }
}

fn has(bytes: &[u8], needles: &[Vec<u8>]) -> bool {
    needles.iter().any(|needle| bytes.windows(needle.len()).any(|window| window == needle))
}

/// Whether a stream contains one of the needles, even across the border of two pieces.
async fn streams<B: AsRef<[u8]>>(stream: impl Stream<Item = Result<B, Error>>, needles: &[Vec<u8>]) -> Result<bool> {
    let mut stream = std::pin::pin!(stream);
    let overlap = needles.iter().map(Vec::len).max().unwrap_or(1) - 1;
    let mut rest = Vec::new();
    let mut found = false;
    while let Some(piece) = stream.next().await {
        rest.extend_from_slice(piece?.as_ref());
        found |= has(&rest, needles);
        rest.drain(..rest.len().saturating_sub(overlap));
    }
    Ok(found)
}

/// Searches the demo's files below Docker's folder. Returns how many there are if none contains a needle, or else the
/// file that does. Skips what is only in memory.
fn on_disk(root: &Path, needles: &[Vec<u8>]) -> Result<usize, PathBuf> {
    let mut files = 0;
    let mut folders: Vec<PathBuf> = VOLUMES.iter().map(|name| root.join("volumes").join(name)).collect();
    folders.push(root.join("containers"));
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).into_iter().flatten().flatten() {
            let (path, Ok(kind)) = (entry.path(), entry.file_type()) else { continue };
            if kind.is_dir() {
                folders.push(path);
            } else if kind.is_file()
                && let Ok(bytes) = std::fs::read(&path)
            {
                files += 1;
                if has(&bytes, needles) {
                    return Err(path);
                }
            }
        }
    }
    Ok(files)
}
