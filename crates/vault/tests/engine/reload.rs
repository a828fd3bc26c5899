//! Tests reloads of real containers when their files change: restarts, signals, files that are put back, starts that
//! Docker refused after a reboot, and a SIGKILL of the vault between the steps.

#![allow(clippy::disallowed_methods, clippy::disallowed_types, reason = "tests block as they like")]

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use futures_util::TryStreamExt;
use testkit::bollard::Docker;
use testkit::bollard::query_parameters::{
    CreateContainerOptions, DownloadFromContainerOptions, InspectContainerOptions, KillContainerOptions, LogsOptions,
    RenameContainerOptions, RestartContainerOptions, StartContainerOptions,
};
use testkit::models::{
    ContainerCreateBody, HealthConfig, HostConfig, Mount, MountBindOptions, MountType, RestartPolicy,
    RestartPolicyNameEnum,
};
use testkit::{AgentProcess, Scope, Spec, images, wait_until};

use super::{SOON, exec, prepared_with};

/// Group of the readers' image.
const GROUP: u32 = 65532;
const DIRECTORY: &str = "/run/deliver/app";

fn hash(text: &str) -> String {
    let hash = text
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
    format!("{hash:016x}")
}

/// Where the vault and a workload share files.
#[derive(Clone)]
enum Place {
    /// A named volume in memory.
    Volume,
    /// A directory in the host's memory, below this one.
    Bound(PathBuf),
}

/// A vault, its socket proxy, and the programs that read its files.
struct Stage {
    scope: Scope,
    vault_image: String,
    reader_image: String,
    place: Place,
}

impl Stage {
    async fn new(on_change: &str, readers: &[&str], place: Place, more: &str) -> Result<Self> {
        let scope = Scope::new(testkit::docker()?);
        let names: Vec<_> = readers.iter().map(|name| scope.name(name)).collect();
        let config = format!(
            "storage: {{change_counter: /app/state/change}}\n{more}\n\
             grants:\n- {{principal: 'workload:app', operations: [get], names: app}}\n\
             deliveries:\n- workload: app\n  directory: {DIRECTORY}\n  gid: {GROUP}\n  on_change: {on_change}\n  \
             containers: [{}]\n  files: [{{name: db_password, secret: app/db}}, {{name: PASSWORD, secret: app/db}}]\n",
            names.join(", ")
        );
        let vault_image = prepared_with(&scope, &config).await?;
        let reader_image = images().credential_reader().await?;
        if matches!(place, Place::Volume) {
            scope.create_memory_volume(&scope.name("secrets"), "size=1m,mode=2750,uid=65431,gid=65532").await?;
        }
        Ok(Self { scope, vault_image, reader_image, place })
    }

    fn volume(&self, name: &str, target: &str, read_only: bool) -> Mount {
        Mount { read_only: Some(read_only), ..self.scope.mount(name, target) }
    }

    fn secrets(&self, target: &str, read_only: bool) -> Mount {
        match &self.place {
            Place::Volume => self.volume("secrets", target, read_only),
            Place::Bound(parent) => {
                let (source, target) = match read_only {
                    true => (parent.join("app"), target),
                    // The vault makes the directory itself.
                    false => (parent.clone(), target.trim_end_matches("/app")),
                };
                Mount {
                    typ: Some(MountType::BIND),
                    source: Some(source.display().to_string()),
                    target: Some(target.to_owned()),
                    read_only: Some(read_only),
                    bind_options: Some(MountBindOptions::default()),
                    ..Mount::default()
                }
            }
        }
    }

    async fn vault(&self) -> Result<String> {
        let tmpfs = HashMap::from([("/run/dockflare-vault".to_owned(), "mode=0700,uid=65431,gid=65431".to_owned())]);
        let host = HostConfig {
            mounts: Some(vec![
                self.volume("data", "/app/data", false),
                self.volume("state", "/app/state", false),
                self.volume("config", "/app/config", true),
                self.volume("docker", "/run/dockflare", true),
                self.volume("launcher", "/app/launcher", false),
                self.secrets(DIRECTORY, false),
            ]),
            tmpfs: Some(tmpfs),
            network_mode: Some("none".to_owned()),
            group_add: Some(vec![GROUP.to_string()]),
            ..confined()
        };
        let name = self.scope.name("vault");
        self.scope.run(Spec { image: &self.vault_image, name: &name, host, ..Spec::default() }).await?;
        self.vault_serves().await?;
        Ok(name)
    }

    /// Waits until the vault logs that it started. It sends no command: one sent too early would open the store itself.
    async fn vault_serves(&self) -> Result<()> {
        let vault = self.scope.name("vault");
        let serves = async || {
            let began: jiff::Timestamp = self.scope.inspect(&vault).await.ok()?.state?.started_at?.parse().ok()?;
            let logs = self.scope.logs(&vault).await.ok()?;
            let said = logs.lines().rfind(|line| line.contains("dockflare-vault started"))?;
            let at: jiff::Timestamp = said.split_whitespace().next()?.parse().ok()?;
            (at >= began).then_some(())
        };
        wait_until("the vault to serve", SOON, serves).await
    }

    async fn proxy(&self, readers: &[&str]) -> Result<String> {
        let names: Vec<_> = readers.iter().map(|name| self.scope.name(name)).collect();
        let host = HostConfig {
            binds: Some(vec![format!("{}:/var/run/docker.sock:ro", testkit::socket_path())]),
            mounts: Some(vec![self.volume("docker", "/run/dockflare", false)]),
            network_mode: Some("none".to_owned()),
            ..confined()
        };
        let name = self.scope.name("proxy");
        let body = ContainerCreateBody {
            image: Some(self.vault_image.clone()),
            cmd: Some(vec!["socket-proxy".to_owned()]),
            user: Some("0:0".to_owned()),
            env: Some(vec![format!("RELOAD_CONTAINERS={}", names.join(","))]),
            labels: Some(self.scope.labels()),
            host_config: Some(host),
            ..ContainerCreateBody::default()
        };
        let options = CreateContainerOptions { name: Some(name.clone()), ..Default::default() };
        self.scope.docker().create_container(Some(options), body).await?;
        self.scope.start(&name).await?;
        Ok(name)
    }

    /// Starts a program that reads the credential, under a name from the configuration.
    async fn reader(&self, name: &str, launched: bool) -> Result<String> {
        let refuses = format!("REFUSES=bad,refused-by-{name}");
        let name = self.scope.name(name);
        let mut mounts = vec![self.secrets("/run/secrets", true)];
        let program = "/usr/local/bin/credential-reader";
        let mut body = ContainerCreateBody {
            image: Some(self.reader_image.clone()),
            env: Some(vec![refuses]),
            labels: Some(self.scope.labels()),
            healthcheck: Some(HealthConfig {
                test: Some(vec!["CMD".to_owned(), program.to_owned(), "check".to_owned()]),
                interval: Some(500_000_000),
                timeout: Some(5_000_000_000),
                retries: Some(2),
                ..HealthConfig::default()
            }),
            ..ContainerCreateBody::default()
        };
        if launched {
            mounts.push(self.volume("launcher", "/launcher", true));
            let file = "PASSWORD=/run/secrets/db_password";
            let words = ["/launcher/dockflare-vault", "exec", "--file", file, "--", program];
            body.entrypoint = Some(words.map(str::to_owned).to_vec());
        }
        let policy = RestartPolicy { name: Some(RestartPolicyNameEnum::UNLESS_STOPPED), ..RestartPolicy::default() };
        body.host_config = Some(HostConfig {
            mounts: Some(mounts),
            network_mode: Some("none".to_owned()),
            restart_policy: Some(policy),
            ..confined()
        });
        let options = CreateContainerOptions { name: Some(name.clone()), ..Default::default() };
        self.scope.docker().create_container(Some(options), body).await?;
        self.scope.start(&name).await?;
        Ok(name)
    }

    async fn set(&self, value: &str) -> Result<()> {
        let (said, code) = exec(&self.scope, &self.scope.name("vault"), &["set", "app/db", value]).await?;
        ensure!(code == 0, "{said}");
        Ok(())
    }

    /// Waits until the container is healthy and its latest start was with this credential.
    async fn is_well_with(&self, container: &str, value: &str) -> Result<()> {
        let line = format!("begins with {}", hash(value));
        let is_it = async || {
            let logs = self.scope.logs(container).await.ok()?;
            let last = logs.lines().rfind(|line| line.contains("begins with"))?;
            let is_well = self.scope.health(container).await.ok()? == "healthy";
            (last.contains(&line) && is_well).then_some(())
        };
        wait_until(&format!("{container} to be well with {value}"), 2 * SOON, is_it)
            .await
            .map_err(|error| error.context("see the logs"))
    }

    /// Waits until the vault has settled the current files.
    async fn is_settled(&self) -> Result<()> {
        let vault = self.scope.name("vault");
        let settled = async || {
            let (said, _) = exec(&self.scope, &vault, &["status"]).await.ok()?;
            let status: serde_json::Value = serde_json::from_str(&said).ok()?;
            let state = &status["deliveries"]["app"];
            (state["version"].is_u64() && state["version"] == state["settled"]).then_some(())
        };
        wait_until("the files to be settled", 2 * SOON, settled).await
    }

    /// Waits until the vault has noted that a container should run, or no longer should.
    async fn is_remembered(&self, container: &str, is_wanted: bool) -> Result<()> {
        let vault = self.scope.name("vault");
        let noted = async || {
            let options = DownloadFromContainerOptions { path: "/app/data/containers.json".to_owned() };
            let pieces = self.scope.docker().download_from_container(&vault, Some(options));
            let archive: Vec<_> = pieces.try_collect().await.ok()?;
            let is_there = String::from_utf8_lossy(&archive.concat()).contains(container);
            (is_there == is_wanted).then_some(())
        };
        wait_until("the vault to note who runs", 4 * SOON, noted).await
    }

    /// How often the program has started.
    async fn begun(&self, container: &str) -> Result<usize> {
        Ok(self.scope.logs(container).await?.lines().filter(|line| line.contains("begins with")).count())
    }
}

fn confined() -> HostConfig {
    HostConfig {
        readonly_rootfs: Some(true),
        cap_drop: Some(vec!["ALL".to_owned()]),
        security_opt: Some(vec!["no-new-privileges".to_owned()]),
        ..HostConfig::default()
    }
}

pub(super) async fn a_rotated_credential_restarts_one_after_the_other_and_a_bad_one_is_put_back() -> Result<()> {
    let names = ["one", "two"];
    let stage = Stage::new("restart", &names, Place::Volume, "").await?;
    stage.proxy(&names).await?;
    stage.vault().await?;
    stage.set("good-1").await?;
    let (one, two) = (stage.reader("one", false).await?, stage.reader("two", false).await?);
    for container in [&one, &two] {
        stage.is_well_with(container, "good-1").await?;
    }
    stage.set("good-2").await?;
    for container in [&one, &two] {
        stage.is_well_with(container, "good-2").await?;
    }
    stage.is_settled().await?;
    let before = (stage.begun(&one).await?, stage.begun(&two).await?);
    stage.set("bad-3").await?;
    let vault = stage.scope.name("vault");
    let said = async || stage.scope.logs(&vault).await.ok()?.contains("is well with the files before").then_some(());
    wait_until("the credential to be put back", 2 * SOON, said).await?;
    for container in [&one, &two] {
        stage.is_well_with(container, "good-2").await?;
    }
    let after = (stage.begun(&one).await?, stage.begun(&two).await?);
    assert_eq!((after.0 - before.0, after.1 - before.1), (2, 0), "one was away, and the other never");
    let log = stage.scope.logs(&vault).await?;
    assert!(log.contains("does not come up well with the new files (its health check fails)"), "{log}");
    assert!(!log.contains("bad-3") && !log.contains("good-2"), "{log}");
    // The next good credential is rolled out as usual.
    stage.set("good-4").await?;
    for container in [&one, &two] {
        stage.is_well_with(container, "good-4").await?;
    }
    Ok(())
}

pub(super) async fn a_vault_that_is_killed_between_the_steps_of_a_restart_goes_on_and_a_bad_one_is_still_put_back()
-> Result<()> {
    let names = ["one", "two"];
    let stage = Stage::new("restart", &names, Place::Volume, "").await?;
    stage.proxy(&names).await?;
    let vault = stage.vault().await?;
    stage.set("good-0").await?;
    let (one, two) = (stage.reader("one", false).await?, stage.reader("two", false).await?);
    for container in [&one, &two] {
        stage.is_well_with(container, "good-0").await?;
    }
    for (round, after) in [20, 300, 800, 1500, 2500].into_iter().enumerate() {
        let value = format!("good-{}", round + 1);
        let before = (stage.begun(&one).await?, stage.begun(&two).await?);
        stage.set(&value).await?;
        tokio::time::sleep(Duration::from_millis(after)).await;
        stage.scope.kill(&vault, "SIGKILL").await?;
        stage.scope.start(&vault).await?;
        stage.vault_serves().await?;
        for container in [&one, &two] {
            stage.is_well_with(container, &value).await?;
        }
        stage.is_settled().await?;
        let now = (stage.begun(&one).await?, stage.begun(&two).await?);
        let times = (now.0 - before.0, now.1 - before.1);
        // Only the call that the kill interrupted may be repeated.
        assert!(times.0 + times.1 <= 3, "killed after {after} ms: {times:?}");
    }
    stage.is_settled().await?;
    // Kill the vault while a bad set is rolled out.
    stage.set("bad").await?;
    let begun = stage.begun(&one).await?;
    wait_until("the first to begin again", SOON, async || (stage.begun(&one).await.ok()? > begun).then_some(()))
        .await?;
    stage.scope.kill(&vault, "SIGKILL").await?;
    stage.scope.start(&vault).await?;
    for container in [&one, &two] {
        stage.is_well_with(container, "good-5").await?;
    }
    // The first container accepts this set and the second refuses it. Kill the vault after it put the old files back
    // and before it restarts the first one.
    stage.vault_serves().await?;
    let back = async || stage.scope.logs(&vault).await.ok().map(|log| log.matches("the ones before are back").count());
    let before = back().await;
    stage.set("refused-by-two").await?;
    wait_until("the set to be put back", 2 * SOON, async || (back().await > before).then_some(())).await?;
    stage.scope.kill(&vault, "SIGKILL").await?;
    let last = format!("begins with {}", hash("refused-by-two"));
    let logs = stage.scope.logs(&one).await?;
    ensure!(logs.lines().rfind(|line| line.contains("begins with")).is_some_and(|line| line.contains(&last)), "{logs}");
    stage.scope.start(&vault).await?;
    for container in [&one, &two] {
        stage.is_well_with(container, "good-5").await?;
    }
    Ok(())
}

pub(super) async fn a_signal_reaches_the_first_process_and_nothing_is_restarted() -> Result<()> {
    let stage = Stage::new("{signal: HUP}", &["one"], Place::Volume, "").await?;
    stage.proxy(&["one"]).await?;
    stage.vault().await?;
    stage.set("good-1").await?;
    let one = stage.reader("one", false).await?;
    stage.is_well_with(&one, "good-1").await?;
    let vault = stage.scope.name("vault");
    let (checked, code) = exec(&stage.scope, &vault, &["check"]).await?;
    ensure!(code == 0 && checked.contains(&format!("✓ container {one}: running")), "{checked}");
    stage.set("good-2").await?;
    let line = format!("read again {}", hash("good-2"));
    let read = async || stage.scope.logs(&one).await.ok()?.contains(&line).then_some(());
    wait_until("the program to read again", SOON, read).await?;
    assert_eq!(stage.begun(&one).await?, 1);
    // A proxy that allows only another container.
    stage.scope.rm(&stage.scope.name("proxy")).await?;
    stage.proxy(&["other"]).await?;
    let (checked, code) = exec(&stage.scope, &vault, &["check"]).await?;
    ensure!(code == 1 && checked.contains("refuses to show it: add it to the proxy's RELOAD_CONTAINERS"), "{checked}");
    Ok(())
}

pub(super) async fn a_launched_program_has_its_credential_and_nobody_else_sees_it() -> Result<()> {
    let stage = Stage::new("restart", &["one"], Place::Volume, "launcher: {folder: /app/launcher}").await?;
    stage.proxy(&["one"]).await?;
    stage.vault().await?;
    // The launcher waits for the files, in an image with nothing but the program itself.
    let one = stage.reader("one", true).await?;
    let waits = async || stage.scope.logs(&one).await.ok()?.contains("waiting for").then_some(());
    wait_until("the launcher to wait", SOON, waits).await?;
    stage.set("good-s3cret-1").await?;
    stage.is_well_with(&one, "good-s3cret-1").await?;
    assert!(stage.scope.logs(&one).await?.contains("pid 1\n"), "it is the first process");
    stage.set("good-s3cret-2").await?;
    stage.is_well_with(&one, "good-s3cret-2").await?;
    let inspected = serde_json::to_string(&stage.scope.inspect(&one).await?)?;
    assert!(!inspected.contains("s3cret") && !stage.scope.logs(&one).await?.contains("s3cret"), "{inspected}");
    let image = stage.scope.inspect(&one).await?.image.context("no image")?;
    let history = format!("{:?}", stage.scope.docker().inspect_image(&image).await?);
    assert!(!history.contains("s3cret"));
    // The program itself gets the signal, and the exit code is its own.
    stage.scope.stop(&one, 10).await?;
    assert_eq!(stage.scope.inspect(&one).await?.state.and_then(|state| state.exit_code), Some(0));
    assert!(stage.scope.logs(&one).await?.ends_with("ends\n"));
    Ok(())
}

/// A directory in the host's memory that belongs to the vault.
struct InMemory(PathBuf);

impl InMemory {
    fn new(scope: &str) -> Result<Self> {
        let path = Path::new("/dev/shm").join(format!("dockflare-{scope}"));
        std::fs::create_dir(&path)?;
        std::os::unix::fs::chown(&path, Some(65431), Some(65431))?;
        Ok(Self(path))
    }
}

impl Drop for InMemory {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

pub(super) async fn after_a_reboot_in_the_worst_order_what_was_refused_is_started_and_what_was_stopped_is_not()
-> Result<()> {
    let memory = InMemory::new(&format!("{:08x}", std::process::id()))?;
    let names = ["one", "two"];
    let stage = Stage::new("none", &names, Place::Bound(memory.0.clone()), "").await?;
    let proxy = stage.proxy(&names).await?;
    let vault = stage.vault().await?;
    stage.set("good-1").await?;
    let there = memory.0.join("app/db_password");
    wait_until("the files", SOON, async || there.exists().then_some(())).await?;
    let (one, two) = (stage.reader("one", false).await?, stage.reader("two", false).await?);
    for container in [&one, &two] {
        stage.is_well_with(container, "good-1").await?;
    }
    for container in [&one, &two] {
        stage.is_remembered(container, true).await?;
    }
    // An operator stopped this one long before.
    stage.scope.stop(&two, 5).await?;
    stage.is_remembered(&two, false).await?;

    for container in [&one, &vault, &proxy] {
        stage.scope.stop(container, 5).await?;
    }
    std::fs::remove_dir_all(memory.0.join("app"))?;
    let refused = stage.scope.start(&one).await.err().context("the start was not refused")?;
    assert!(format!("{refused:#}").contains("bind source path does not exist"), "{refused:#}");
    let state = stage.scope.inspect(&one).await?.state.context("no state")?;
    assert_eq!((state.error.as_deref(), state.exit_code), (Some(""), Some(0)), "Docker tells nothing of it");
    stage.scope.start(&vault).await?;
    stage.scope.start(&proxy).await?;
    stage.is_well_with(&one, "good-1").await?;
    let log = stage.scope.logs(&vault).await?;
    assert!(log.contains("Docker had refused that while its files were missing"), "{log}");
    assert_eq!(stage.scope.status(&two).await?, "exited");
    Ok(())
}

pub(super) async fn the_socket_proxy_does_four_things_for_the_containers_of_its_list_by_id() -> Result<()> {
    let scope = Scope::new(testkit::docker()?);
    let folder = tempfile::tempdir()?;
    let socket = folder.path().join("docker.sock");
    let (name, foreign) = (scope.name("app"), scope.name("foreign"));
    let env = [
        ("SOCKET_PROXY_LISTEN".to_owned(), format!("unix://{}", socket.display())),
        ("SOCKET_PROXY_DOCKER_HOST".to_owned(), format!("unix://{}", testkit::socket_path())),
        ("RELOAD_CONTAINERS".to_owned(), name.clone()),
        ("RELOAD_SIGNALS".to_owned(), "HUP".to_owned()),
    ];
    let program = Path::new(env!("CARGO_BIN_EXE_dockflare-vault"));
    let mut proxy = AgentProcess::spawn_with(program, &["socket-proxy"], &env, folder.path())?;
    proxy.wait_for_log("dockflare-vault socket-proxy starts", SOON).await?;
    let reader = images().credential_reader().await?;
    let env = [("PASSWORD", "s3cret")];
    let app = scope.run(Spec { image: &reader, name: &name, env: &env, ..Spec::default() }).await?;
    let other = scope.run(Spec { image: &reader, name: &foreign, env: &env, ..Spec::default() }).await?;

    let asked = Docker::connect_with_unix(&socket.display().to_string(), 30, testkit::bollard::API_DEFAULT_VERSION)?;
    asked.ping().await?;
    let seen = asked.inspect_container(&name, None::<InspectContainerOptions>).await?;
    assert_eq!(seen.id.as_ref(), Some(&app));
    assert!(seen.config.is_none() && !format!("{seen:?}").contains("s3cret"), "{seen:?}");
    let started = async |id: &str| scope.inspect(id).await.map(|seen| seen.state.and_then(|state| state.started_at));
    let before = started(&app).await?;
    asked.restart_container(&app, None::<RestartContainerOptions>).await?;
    assert_ne!(started(&app).await?, before);
    asked.start_container(&app, None::<StartContainerOptions>).await?;
    let kill = |signal: &str| Some(KillContainerOptions { signal: signal.to_owned() });
    let begun = async || (scope.logs(&app).await.ok()?.matches("begins with").count() == 2).then_some(());
    wait_until("the program to listen again", SOON, begun).await?;
    asked.kill_container(&app, kill("SIGHUP")).await?;
    wait_until("the signal", SOON, async || scope.logs(&app).await.ok()?.contains("read again").then_some(())).await?;

    let refused = |answer: Result<(), testkit::bollard::errors::Error>, rule: &str| {
        let error = answer.err().map(|error| error.to_string()).unwrap_or_default();
        assert!(error.contains(&format!("dockflare-vault socket-proxy refuses this: {rule}")), "{error}");
    };
    refused(asked.kill_container(&app, kill("SIGKILL")).await, "signal");
    refused(asked.restart_container(&other, None::<RestartContainerOptions>).await, "container_name");
    refused(asked.restart_container(&name, None::<RestartContainerOptions>).await, "container_id");
    refused(asked.stop_container(&app, None).await, "route");
    refused(asked.remove_container(&app, None).await, "route");
    refused(asked.inspect_container(&foreign, None::<InspectContainerOptions>).await.map(drop), "container_name");
    let logs = asked.logs(&app, Some(LogsOptions { stdout: true, ..LogsOptions::default() })).try_collect::<Vec<_>>();
    refused(logs.await.map(drop), "route");

    // Another container takes the name between the look and the call: the proxy touches neither.
    let rename = |to: &str| RenameContainerOptions { name: to.to_owned() };
    scope.docker().rename_container(&app, rename(&scope.name("before"))).await?;
    scope.docker().rename_container(&other, rename(&name)).await?;
    let before = (started(&app).await?, started(&other).await?);
    refused(asked.restart_container(&app, None::<RestartContainerOptions>).await, "container_name");
    assert_eq!((started(&app).await?, started(&other).await?), before);
    proxy.sigterm()?;
    assert!(proxy.wait_exit(SOON).await?.success());
    assert!(!socket.exists());
    Ok(())
}
