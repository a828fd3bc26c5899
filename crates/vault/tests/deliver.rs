#![allow(clippy::disallowed_methods, clippy::disallowed_types, reason = "tests block as they like")]
//! Tests deliveries on a real Docker Engine: the vault in its image without privileges, and a workload in an image
//! without a shell, on both kinds of directory in memory.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use futures_util::StreamExt;
use testkit::bollard::container::LogOutput;
use testkit::bollard::exec::{CreateExecOptions, StartExecResults};
use testkit::bollard::query_parameters::{RemoveImageOptions, UploadToContainerOptions};
use testkit::models::{HostConfig, Mount, MountBindOptions, MountType};
use testkit::{Scope, Spec, images, wait_until};
use tokio::io::AsyncWriteExt;

const SOON: Duration = Duration::from_secs(60);
/// The vault's user in its image; below, the workload's group.
const VAULT: u32 = 65431;
const GROUP: u32 = 1000;

fn main() -> ExitCode {
    testkit::main(testkit::cases![
        a_reader_in_a_container_finds_one_version_whole_and_always_while_it_is_rotated_and_the_vault_is_killed,
        a_folder_of_the_host_is_made_with_its_files_and_refuses_a_container_until_then,
        a_secret_that_is_delivered_stands_in_no_inspect_commit_export_volume_log_process_or_disk,
        what_is_wrong_with_a_directory_is_named_with_the_option_and_leaves_the_others_alone,
    ])
}

/// A vault in its container, with a delivery into each of its mounts.
struct Vault<'a> {
    scope: &'a Scope,
    id: String,
}

/// The parts of a vault.
struct Plan<'a> {
    /// Grants and deliveries.
    config: &'a str,
    mounts: Vec<Mount>,
    groups: Vec<String>,
}

fn read_only(mount: Mount) -> Mount {
    Mount { read_only: Some(true), ..mount }
}

/// Only the privileges that the documentation gives.
fn confined(mounts: Vec<Mount>) -> HostConfig {
    HostConfig {
        mounts: Some(mounts),
        network_mode: Some("none".to_owned()),
        readonly_rootfs: Some(true),
        cap_drop: Some(vec!["ALL".to_owned()]),
        security_opt: Some(vec!["no-new-privileges".to_owned()]),
        ..HostConfig::default()
    }
}

async fn upload(scope: &Scope, container: &str, files: &[(&str, &str)]) -> Result<()> {
    let mut archive = tar::Builder::new(Vec::new());
    for (name, text) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(text.len() as u64);
        header.set_mode(0o600);
        header.set_uid(VAULT.into());
        header.set_gid(VAULT.into());
        header.set_cksum();
        archive.append_data(&mut header, name, text.as_bytes())?;
    }
    let to = UploadToContainerOptions { path: "/app/config".to_owned(), ..Default::default() };
    let body = testkit::bollard::body_full(archive.into_inner()?.into());
    Ok(scope.docker().upload_to_container(container, Some(to), body).await?)
}

impl<'a> Vault<'a> {
    async fn start(scope: &'a Scope, plan: Plan<'_>) -> Result<Self> {
        let image = images().vault(Path::new(env!("CARGO_BIN_EXE_dockflare-vault"))).await?;
        let config = scope.mount("config", "/app/config");
        let make =
            Spec { image: &image, args: &["generate-key"], host: confined(vec![config.clone()]), ..Spec::default() };
        let maker = scope.run(make).await?;
        wait_until("the key to be made", SOON, async || (scope.status(&maker).await.ok()? == "exited").then_some(()))
            .await?;
        let key = scope.logs(&maker).await?;
        upload(scope, &maker, &[("master.key", key.trim()), ("config.yaml", plan.config)]).await?;
        let mut mounts = vec![config, scope.mount("data", "/app/data")];
        mounts.extend(plan.mounts);
        let tmpfs = HashMap::from([("/run/dockflare-vault".to_owned(), format!("mode=0700,uid={VAULT},gid={VAULT}"))]);
        let host = HostConfig { tmpfs: Some(tmpfs), group_add: Some(plan.groups), ..confined(mounts) };
        let id = scope.run(Spec { image: &image, host, ..Spec::default() }).await?;
        let vault = Self { scope, id };
        vault.serves(1).await?;
        Ok(vault)
    }

    /// Waits until the vault has started this often. It reads the log: a command sent earlier would open the store
    /// itself.
    async fn serves(&self, starts: usize) -> Result<()> {
        let started = async || {
            let log = self.scope.logs(&self.id).await.ok()?;
            (log.matches("dockflare-vault started").count() >= starts).then_some(())
        };
        wait_until("the vault to serve", SOON, started).await
    }

    /// Runs a command in the container. Returns its output and its exit code.
    async fn exec(&self, arguments: &[&str], input: &[u8]) -> Result<(String, i64)> {
        let docker = self.scope.docker();
        let command = ["/dockflare-vault"].iter().chain(arguments).map(|word| (*word).to_owned()).collect();
        let options = CreateExecOptions {
            cmd: Some(command),
            attach_stdin: Some(true),
            attach_stdout: Some(true),
            attach_stderr: Some(true),
            ..CreateExecOptions::<String>::default()
        };
        let id = docker.create_exec(&self.id, options).await?.id;
        let mut text = String::new();
        if let StartExecResults::Attached { mut output, input: mut writer } = docker.start_exec(&id, None).await? {
            // A command that reads nothing may have ended.
            let _ = writer.write_all(input).await;
            let _ = writer.shutdown().await;
            while let Some(piece) = output.next().await {
                if let LogOutput::StdOut { message } | LogOutput::StdErr { message } = piece? {
                    text += &String::from_utf8_lossy(&message);
                }
            }
        }
        Ok((text, docker.inspect_exec(&id).await?.exit_code.context("no code")?))
    }

    async fn set(&self, name: &str, value: &str) -> Result<()> {
        let (said, code) = self.exec(&["set", name], value.as_bytes()).await?;
        ensure!(code == 0, "{said}");
        Ok(())
    }

    /// What `status` reports for a workload.
    async fn state(&self, workload: &str) -> Result<serde_json::Value> {
        let (text, code) = self.exec(&["status"], b"").await?;
        ensure!(code == 0, "{text}");
        Ok(serde_json::from_str::<serde_json::Value>(&text)?["deliveries"][workload].clone())
    }

    async fn until(&self, workload: &str, condition: &str) -> Result<serde_json::Value> {
        let like = async || {
            let state = self.state(workload).await.ok()?;
            (state["condition"] == condition).then_some(state)
        };
        wait_until(&format!("{workload} to be {condition}"), SOON, like).await
    }
}

/// The content of the file `key` at a version: see the checker.
fn content(version: u32) -> String {
    format!("{version:08}").repeat(512)
}

const LAST: &str = "99999999";
const BOTH: &str = "files: [{name: key, secret: app/key}, \
                    {name: both, template: \"{{ key }}{{ key }}\", secrets: {key: app/key}}]";

async fn a_reader_in_a_container_finds_one_version_whole_and_always_while_it_is_rotated_and_the_vault_is_killed()
-> Result<()> {
    let scope = Scope::new(testkit::docker()?);
    scope.create_memory_volume(&scope.name("files"), &format!("size=1m,mode=2750,uid={VAULT},gid={GROUP}")).await?;
    let config = format!(
        "grants: [{{principal: workload:app, operations: [get], names: app}}]\n\
         deliveries: [{{workload: app, directory: /deliver/app, uid: {VAULT}, gid: {GROUP}, {BOTH}}}]\n"
    );
    let mounts = vec![scope.mount("files", "/deliver/app")];
    let vault = Vault::start(&scope, Plan { config: &config, mounts, groups: vec![] }).await?;
    let image = images().checker().await?;
    let host = confined(vec![read_only(scope.mount("files", "/run/secrets"))]);
    let checker = scope.run(Spec { image: &image, args: &["/run/secrets", LAST], host, ..Spec::default() }).await?;
    vault.set("app/key", &content(0)).await?;

    // Kill the vault at random points after a change and start it again, until the checker has read enough.
    let mut version = 0;
    for round in 0_u32.. {
        let log = scope.logs(&checker).await?;
        ensure!(scope.status(&checker).await? == "running", "{log}");
        if round >= 25 && log.lines().filter(|line| line.starts_with("reads ")).count() >= 5 {
            break;
        }
        for _ in 0..4 {
            version += 1;
            vault.set("app/key", &content(version)).await?;
        }
        version += 1;
        let value = content(version);
        let (_, killed) = tokio::join!(
            // Fails if the vault dies before it can answer.
            vault.set("app/key", &value),
            async {
                tokio::time::sleep(Duration::from_millis(u64::from(round * 7 % 150))).await;
                scope.kill(&vault.id, "SIGKILL").await
            }
        );
        killed?;
        scope.start(&vault.id).await?;
        vault.serves(round as usize + 2).await?;
    }
    vault.set("app/key", &LAST.repeat(512)).await?;
    let ended = async || (scope.status(&checker).await.ok()? == "exited").then_some(());
    wait_until("the reader to see the last version", SOON, ended).await?;
    let log = scope.logs(&checker).await?;
    let summary = log.lines().last().unwrap_or_default().to_owned();
    testkit::note("what the reader found", &summary);
    ensure!(summary.ends_with("missing=0 torn=0 mixed=0 older=0"), "{summary}");
    assert_eq!(scope.inspect(&checker).await?.state.and_then(|state| state.exit_code), Some(0));
    // Neither half a set nor an old one is left.
    let state = vault.until("app", "delivered").await?;
    let pid = scope.inspect(&vault.id).await?.state.and_then(|state| state.pid).context("no process")?;
    let only = async || {
        let names = std::fs::read_dir(format!("/proc/{pid}/root/deliver/app")).ok()?.flatten();
        let mut names: Vec<_> = names.filter_map(|entry| entry.file_name().into_string().ok()).collect();
        names.sort();
        let set = format!("..{}", state["version"]);
        (names == [&set, "..data", "..settled", "both", "key"]).then_some(())
    };
    wait_until("the last set to be the only one", SOON, only).await?;
    ensure!(state["version"].as_u64().unwrap_or_default() > 100, "{state}");
    Ok(())
}

/// A folder in the host's memory, removed when the test ends.
struct HostFolder(PathBuf);

impl HostFolder {
    fn new(scope: &Scope) -> Result<Self> {
        let path = Path::new("/dev/shm").join(scope.name("dockflare-vault"));
        std::fs::create_dir(&path)?;
        std::os::unix::fs::chown(&path, Some(VAULT), Some(VAULT)).context("the test must run as root for this")?;
        Ok(Self(path))
    }

    fn mount(&self, inner: &str, target: &str) -> Mount {
        Mount {
            typ: Some(MountType::BIND),
            source: Some(self.0.join(inner).display().to_string().trim_end_matches('/').to_owned()),
            target: Some(target.to_owned()),
            bind_options: Some(MountBindOptions::default()),
            ..Mount::default()
        }
    }
}

impl Drop for HostFolder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

async fn a_folder_of_the_host_is_made_with_its_files_and_refuses_a_container_until_then() -> Result<()> {
    let scope = Scope::new(testkit::docker()?);
    let folder = HostFolder::new(&scope)?;
    let config = format!(
        "grants: [{{principal: workload:app, operations: [get], names: app}}, {{principal: workload:none, operations: [get], names: app}}]\n\
         deliveries: [{{workload: app, directory: /deliver/app, gid: {GROUP}, {BOTH}}}, \
         {{workload: none, directory: /deliver/none, gid: 4321, {BOTH}}}]\n"
    );
    let mounts = vec![folder.mount("", "/deliver")];
    let vault = Vault::start(&scope, Plan { config: &config, mounts, groups: vec![GROUP.to_string()] }).await?;
    let state = vault.until("app", "missing").await?;
    ensure!(state["missing"][0] == "app/key is not there: dockflare-vault set app/key", "{state}");

    let image = images().checker().await?;
    let spec = || Spec {
        image: &image,
        args: &["/run/secrets", "00000002"],
        host: confined(vec![read_only(folder.mount("app", "/run/secrets"))]),
        ..Spec::default()
    };
    let refused = scope.run(spec()).await.err().context("a container began without its folder")?;
    ensure!(format!("{refused:#}").contains("bind source path does not exist"), "{refused:#}");

    vault.set("app/key", &content(1)).await?;
    vault.until("app", "delivered").await?;
    let checker = scope.run(spec()).await?;
    let seen = async || scope.logs(&checker).await.ok()?.contains("seen 00000001").then_some(());
    wait_until("the container to see its file", SOON, seen).await?;
    vault.set("app/key", &content(2)).await?;
    let ended = async || (scope.status(&checker).await.ok()? == "exited").then_some(());
    wait_until("the container to see the change", SOON, ended).await?;
    assert_eq!(scope.inspect(&checker).await?.state.and_then(|state| state.exit_code), Some(0));

    // The vault is not in this group.
    let state = vault.until("none", "failed").await?;
    let problem = state["problem"].as_str().unwrap_or_default();
    ensure!(problem.contains("run the vault with group_add: [\"4321\"]"), "{problem}");
    assert_eq!(std::fs::read_dir(&folder.0)?.count(), 1, "something half made was left");
    Ok(())
}

/// Finds the files that contain the text, below a folder of one file system or of `/proc`.
fn files_with(folder: &str, needle: &str) -> Vec<String> {
    let output = std::process::Command::new("grep").args(["-rlaF", "--devices=skip", "-e", needle, folder]).output();
    let text = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
    text.lines().map(str::to_owned).collect()
}

async fn a_secret_that_is_delivered_stands_in_no_inspect_commit_export_volume_log_process_or_disk() -> Result<()> {
    let scope = Scope::new(testkit::docker()?);
    let docker = scope.docker();
    // Build the needle from two pieces, so that no file of this program contains it.
    let needle = format!("needle-{}-{}", scope.suffix(), scope.suffix().chars().rev().collect::<String>());
    scope.create_memory_volume(&scope.name("files"), &format!("size=1m,mode=2750,uid={VAULT},gid={GROUP}")).await?;
    let config = format!(
        "grants: [{{principal: workload:app, operations: [get], names: app}}]\n\
         deliveries: [{{workload: app, directory: /deliver/app, {BOTH}}}]\n"
    );
    let mounts = vec![scope.mount("files", "/deliver/app")];
    let vault = Vault::start(&scope, Plan { config: &config, mounts, groups: vec![] }).await?;
    let image = images().checker().await?;
    let host = confined(vec![read_only(scope.mount("files", "/run/secrets"))]);
    let app = scope.run(Spec { image: &image, args: &["/run/secrets", LAST], host, ..Spec::default() }).await?;
    for turn in ["first", "second"] {
        vault.set("app/key", &format!("{needle} {turn}")).await?;
    }
    let state = vault.until("app", "delivered").await?;
    ensure!(state["version"].as_u64() >= Some(1), "{state}");

    let found = docker.inspect_container(&app, None).await?;
    let pid = found.state.and_then(|state| state.pid).context("no process")?;
    let seen = std::fs::read_to_string(format!("/proc/{pid}/root/run/secrets/key"))?;
    ensure!(seen == format!("{needle} second"), "it was not delivered: {seen}");

    let mut places: Vec<(String, Vec<u8>)> = vec![];
    for container in [&app, &vault.id] {
        let inspected = serde_json::to_vec(&docker.inspect_container(container, None).await?)?;
        places.push((format!("inspect {container}"), inspected));
        places.push((format!("logs {container}"), scope.logs(container).await?.into_bytes()));
        places.push((format!("export {container}"), collect(docker.export_container(container)).await?));
        let commit = testkit::bollard::query_parameters::CommitContainerOptions {
            container: Some(container.clone()),
            repo: Some(scope.name("commit")),
            tag: Some(container[..12].to_owned()),
            ..Default::default()
        };
        let name = format!("{}:{}", scope.name("commit"), &container[..12]);
        docker.commit_container(commit, testkit::models::ContainerConfig::default()).await?;
        let saved = collect(docker.export_image(&name)).await;
        let inspected = docker.inspect_image(&name).await;
        docker.remove_image(&name, None::<RemoveImageOptions>, None).await?;
        places.push((format!("image {container}"), saved?));
        places.push((format!("inspect image {container}"), serde_json::to_vec(&inspected?)?));
    }
    for name in ["files", "data", "config"] {
        let inspected = docker.inspect_volume(&scope.name(name)).await?;
        places.push((format!("volume {name}"), serde_json::to_vec(&inspected)?));
    }
    for (place, bytes) in &places {
        ensure!(!bytes.is_empty() || place.starts_with("logs"), "{place} is empty");
        ensure!(!bytes.windows(needle.len()).any(|window| window == needle.as_bytes()), "it stands in {place}");
    }

    // Search the disk below Docker: everything of the two containers and their volumes. Only the volume in memory may
    // hold the needle.
    let root = docker.info().await?.docker_root_dir.context("no folder")?;
    let held = format!("{root}/volumes/{}", scope.name("files"));
    let on_disk = files_with(&format!("{root}/volumes"), &needle);
    ensure!(!on_disk.is_empty() && on_disk.iter().all(|file| file.starts_with(&held)), "{on_disk:?}");
    let in_memory = std::process::Command::new("stat").args(["-f", "-c", "%T", &format!("{held}/_data")]).output()?;
    assert_eq!(String::from_utf8_lossy(&in_memory.stdout).trim(), "tmpfs");
    for folder in ["containers", "overlay2", "image"] {
        let found = files_with(&format!("{root}/{folder}"), &needle);
        // A mount shows the volume in memory through this path.
        let found: Vec<_> = found.iter().filter(|file| !file.contains("/merged/run/secrets/")).collect();
        ensure!(found.is_empty(), "{found:?}");
    }
    for entry in std::fs::read_dir("/proc")?.flatten() {
        for file in ["cmdline", "environ"] {
            let bytes = std::fs::read(entry.path().join(file)).unwrap_or_default();
            let stands = bytes.windows(needle.len()).any(|window| window == needle.as_bytes());
            ensure!(!stands, "it stands in {}/{file}", entry.path().display());
        }
    }
    // Make sure that the search finds a needle that is there.
    let control = Spec { image: &image, env: &[("PASSWORD", &needle)], args: &["/none", LAST], ..Spec::default() };
    let control = scope.create(control).await?;
    ensure!(serde_json::to_string(&scope.inspect(&control).await?)?.contains(&needle));
    ensure!(!files_with(&format!("{root}/containers"), &needle).is_empty());
    Ok(())
}

async fn collect<B: AsRef<[u8]>, E: Into<anyhow::Error>>(
    stream: impl futures_util::Stream<Item = std::result::Result<B, E>>,
) -> Result<Vec<u8>> {
    let mut all = vec![];
    let mut stream = std::pin::pin!(stream);
    while let Some(piece) = stream.next().await {
        all.extend_from_slice(piece.map_err(Into::into)?.as_ref());
    }
    Ok(all)
}

async fn what_is_wrong_with_a_directory_is_named_with_the_option_and_leaves_the_others_alone() -> Result<()> {
    let scope = Scope::new(testkit::docker()?);
    let right = format!("mode=2750,uid={VAULT},gid={GROUP}");
    for (name, options) in [
        ("good", format!("size=1m,{right}")),
        ("full", format!("size=24k,{right}")),
        ("owner", format!("size=1m,mode=2755,uid=4242,gid={GROUP}")),
        ("closed", format!("size=1m,mode=2750,uid=4242,gid={GROUP}")),
        ("group", format!("size=1m,mode=2750,uid={VAULT},gid=4321")),
        ("inherit", format!("size=1m,mode=0750,uid={VAULT},gid={GROUP}")),
        ("locked", format!("size=1m,{right}")),
    ] {
        scope.create_memory_volume(&scope.name(name), &options).await?;
    }
    let mut config = "grants:\n".to_owned();
    let names = ["good", "full", "owner", "closed", "group", "inherit", "locked", "disk"];
    for name in names {
        config += &format!("- {{principal: workload:{name}, operations: [get], names: app}}\n");
    }
    config += "deliveries:\n";
    for name in names {
        let more = match name {
            "owner" => format!("uid: {VAULT},"),
            "group" => format!("gid: {GROUP},"),
            _ => String::new(),
        };
        config += &format!(
            "- {{workload: {name}, directory: /deliver/{name}, {more} files: [{{name: key, secret: app/key}}]}}\n"
        );
    }
    let mounts = names.map(|name| {
        let mount = scope.mount(name, &format!("/deliver/{name}"));
        if name == "locked" { read_only(mount) } else { mount }
    });
    let vault = Vault::start(&scope, Plan { config: &config, mounts: mounts.to_vec(), groups: vec![] }).await?;
    // Two sets of this value fit; a set with a larger one does not.
    vault.set("app/key", "small").await?;
    vault.until("good", "delivered").await?;
    vault.until("full", "delivered").await?;
    for (name, remedy) in [
        ("owner", format!("mount it with the option uid={VAULT}")),
        ("closed", format!("mount it with the options uid={VAULT},mode=2750")),
        ("group", format!("mount it with the option gid={GROUP}")),
        ("inherit", "mount it with the option mode=2750".to_owned()),
        ("locked", "is mounted read-only: mount it read-write for the vault".to_owned()),
        ("disk", "is no tmpfs".to_owned()),
    ] {
        let state = vault.until(name, "failed").await?;
        ensure!(state["problem"].as_str().is_some_and(|problem| problem.contains(&remedy)), "{name}: {state}");
        ensure!(state["version"].is_null(), "{name}: {state}");
    }
    vault.set("app/key", &"x".repeat(40_000)).await?;
    let state = vault.until("full", "failed").await?;
    ensure!(state["problem"].as_str().is_some_and(|problem| problem.contains("is full: two sets")), "{state}");
    ensure!(state["version"] == 1, "the old files are gone: {state}");
    let state = vault.until("good", "delivered").await?;
    ensure!(state["version"] == 2, "{state}");

    let (checked, code) = vault.exec(&["check"], b"").await?;
    assert_eq!(code, 1, "{checked}");
    ensure!(checked.contains("✓ workload good: version 2 of its files is in place"), "{checked}");
    ensure!(
        checked.contains("✗ workload full: version 1 of its files is in place; /deliver/full is full"),
        "{checked}"
    );
    // With a smaller value it recovers by itself.
    vault.set("app/key", "small again").await?;
    vault.until("full", "delivered").await?;
    Ok(())
}
