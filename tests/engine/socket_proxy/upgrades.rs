//! Tests upgrades and removal as people do them: with the repository's compose file, both generations of Docker
//! Compose, and visitors all along.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use dockflare_dev_master::{DevMaster, Protocol};
use testkit::bollard::query_parameters::{ListContainersOptions, TagImageOptions};
use testkit::{Case, Compose, Edge, case, images, wait_until, workspace_root};
use tokio::time::Instant;

use crate::containers_scene::{Life, Tunnel, registered, told};
use crate::support::{SOON, Stage, agent_binary};
use crate::visitors::{self, Visitors};

pub(super) fn cases() -> Vec<Case> {
    with_each_generation(|version, program| {
        let (upgrades, end, vault) = (program.clone(), program.clone(), program);
        vec![
            case(format!("no_upgrade_with_compose_{version}_loses_a_request"), move || no_upgrade_loses_a(upgrades)),
            case(format!("what_compose_{version}_takes_down_is_down_and_what_is_killed_is_not"), move || down(end)),
            case(
                format!("with_compose_{version}_the_agent_has_its_key_from_the_vault_and_rolls_it_without_a_restart"),
                move || key_from_the_vault(vault),
            ),
        ]
    })
}

/// Makes the cases for both generations. `cases` gets the version and the program.
pub(super) fn with_each_generation(cases: impl Fn(&'static str, PathBuf) -> Vec<Case>) -> Vec<Case> {
    let generations = [("1.29", Compose::V1), ("2.26", Compose::V2)];
    let cases = generations.into_iter().flat_map(|(version, compose)| {
        let program = compose.program();
        let missing = program.as_ref().err().map(|error| format!("{error:#}"));
        // Only Debian 12 has a package of the first generation; the kit fetches the second.
        let here = move |case: Case| match compose {
            Compose::V1 => case.where_there_is(missing.clone()),
            Compose::V2 => case.without(missing.clone()),
        };
        cases(version, program.unwrap_or_default()).into_iter().map(here)
    });
    cases.map(|case| case.limit(Duration::from_secs(400) * rounds())).collect()
}

/// How often to repeat the cases that depend on Compose's order of steps, which alone tells a restart and a recreation
/// from a removal. For a manual run, set `COMPOSE_ROUNDS=30`.
fn rounds() -> u32 {
    testkit::number("COMPOSE_ROUNDS", 1) as u32
}

/// How long one command of Compose may take.
const COMMAND_LIMIT: Duration = Duration::from_secs(120);
/// How long `down` may take, with the stand-in's drain and Compose itself. The lease is longer.
const DOWN_LIMIT: Duration = Duration::from_secs(40);
const LEASE: &str = "90";

/// A deployment of the compose file under unique names.
pub(super) struct Deployment {
    pub(super) stage: Stage,
    program: PathBuf,
    folder: tempfile::TempDir,
    image: String,
    settings: HashMap<&'static str, String>,
    proxy_settings: HashMap<&'static str, String>,
    /// The vault's image, if the deployment has a vault.
    vault: Option<String>,
    /// The agent's registrations so far.
    registrations: u64,
}

impl Deployment {
    /// Makes a deployment on an existing network, with an edge and a master that it can reach.
    async fn new(program: PathBuf) -> Result<(Self, Arc<Edge>)> {
        let stage = Stage::new(Protocol::V2).await?;
        let edge = visitors::edge(&stage).await?;
        let listen = edge.address().ip();
        Ok((Self::with_master_at(stage, program, listen).await?, edge))
    }

    /// Makes a deployment with a master at this address of the host, and nothing else yet.
    pub(super) async fn with_master_at(mut stage: Stage, program: PathBuf, listen: IpAddr) -> Result<Self> {
        let listen = SocketAddr::new(listen, 0);
        stage.master = DevMaster::builder().protocol(Protocol::V2).listen(listen).start().await?;
        stage.key = stage.master.generate_key("deployed");
        let setting = |name: &str| crate::containers_scene::setting(&stage, name);
        let settings = HashMap::from([
            ("DOCKFLARE_MASTER_URL", stage.master.url()),
            ("DOCKFLARE_API_KEY", stage.key.clone()),
            ("CLOUDFLARED_IMAGE", setting("CLOUDFLARED_IMAGE")),
            ("CLOUDFLARED_NETWORK_NAME", stage.network.clone()),
            ("TUNNEL_CONTAINER_NAME", stage.tunnel.clone()),
            ("TUNNEL_LEASE_SECONDS", LEASE.to_owned()),
            ("COMMAND_POLL_INTERVAL_SECONDS", "1".to_owned()),
            ("REPORT_INTERVAL_SECONDS", "5".to_owned()),
        ]);
        let image = images().agent(&agent_binary()).await?;
        let (folder, proxy_settings) = (tempfile::tempdir()?, HashMap::new());
        Ok(Self { stage, program, folder, image, settings, proxy_settings, vault: None, registrations: 0 })
    }

    pub(super) fn agent(&self) -> String {
        self.stage.scope.name("agent")
    }

    /// Writes the settings and the differences from the repository's compose file: names, labels, and an existing image
    /// instead of a build.
    fn write(&self) -> Result<()> {
        let mut env = String::new();
        for (name, value) in &self.settings {
            writeln!(env, "{name}={value}")?;
        }
        std::fs::write(self.folder.path().join(".env"), env)?;
        let labels = self.stage.scope.labels();
        let (scope, image) = (&self.stage.scope, &self.image);
        let mut file = serde_json::json!({
            "services": {
                "socket-proxy": {
                    "image": image, "container_name": scope.name("proxy"), "labels": labels,
                    "environment": self.proxy_settings,
                },
                "dockflare-agent": { "image": image, "container_name": self.agent(), "labels": labels },
            },
            // The network that Compose makes by default.
            "networks": { "default": { "name": scope.name("default"), "labels": labels } },
            "volumes": {
                "data": { "name": scope.name("data"), "labels": labels },
                "docker-api": { "name": scope.name("docker-api"), "labels": labels },
            },
        });
        if let Some(image) = &self.vault {
            for (service, name) in [("vault", "vault"), ("vault-socket-proxy", "vault-proxy")] {
                file["services"][service] =
                    serde_json::json!({ "image": image, "container_name": scope.name(name), "labels": labels });
            }
            for volume in ["vault-data", "vault-state", "vault-docker", "launcher", "agent-secrets"] {
                file["volumes"][volume] = serde_json::json!({ "name": scope.name(volume), "labels": labels });
            }
            // Compose 1.29 takes the whole volume from the last file that names it.
            file["volumes"]["agent-secrets"]["driver"] = "local".into();
            file["volumes"]["agent-secrets"]["driver_opts"] = serde_json::json!({
                "type": "tmpfs", "device": "tmpfs", "o": "size=1m,mode=2750,uid=65431,gid=65532",
            });
        }
        std::fs::write(self.folder.path().join("override.yml"), file.to_string()).map_err(Into::into)
    }

    pub(super) async fn compose(&self, args: &[&str]) -> Result<()> {
        self.write()?;
        let mut command = Command::new(&self.program);
        command.arg("-p").arg(project(&self.stage)).arg("--project-directory").arg(self.folder.path());
        command.arg("-f").arg(workspace_root().join("docker-compose.yml"));
        if self.vault.is_some() {
            command.arg("-f").arg(workspace_root().join("deploy/compose-vault.yml"));
        }
        command.arg("-f").arg(self.folder.path().join("override.yml")).args(args);
        // Only the file's settings apply, whatever this process's environment holds.
        command.env_clear().env("PATH", std::env::var_os("PATH").unwrap_or_default());
        command.env("HOME", self.folder.path()).env("DOCKER_HOST", format!("unix://{}", testkit::socket_path()));
        command.current_dir(self.folder.path()).stdin(Stdio::null());
        let work = tokio::task::spawn_blocking(move || command.output());
        let done = tokio::time::timeout(COMMAND_LIMIT, work).await.context("it takes too long")???;
        let said = String::from_utf8_lossy(&done.stderr);
        ensure!(done.status.success(), "{args:?}: {said}");
        Ok(())
    }

    /// Waits until an agent that started since the last call has the tunnel and its master knows it.
    pub(super) async fn is_back(&mut self) -> Result<()> {
        let before = self.registrations;
        let what = "the agent to be back with its tunnel";
        let known = self.stage.master.wait_for(what, 2 * SOON, |known| {
            let agent = known.only_agent().filter(|agent| agent.registrations > before)?;
            (agent.tunnel_state() == Some("running")).then_some(agent.registrations)
        });
        self.registrations = known.await?;
        Ok(())
    }

    /// Runs the first `up`, with visitors coming through the tunnel.
    async fn up(&mut self, edge: &Arc<Edge>, tunnel: &Tunnel) -> Result<Visitors> {
        self.compose(&["up", "-d", "--no-build"]).await?;
        let known = registered(&self.stage).await?;
        self.stage.master.enroll_with(&known.id, "edge", &tunnel.id, &tunnel.token)?;
        told(&self.stage, "running", None).await?;
        self.registrations = registered(&self.stage).await?.registrations;
        Visitors::come(edge, tunnel).await
    }

    /// Runs `down`, which must leave nothing and end in time.
    async fn down(&self) -> Result<()> {
        let asked = Instant::now();
        self.compose(&["down"]).await?;
        let took = asked.elapsed();
        ensure!(self.left().await?.is_empty(), "left: {:?}", self.left().await?);
        ensure!(took < DOWN_LIMIT, "took {took:?}");
        println!("down after {:.1} s, nothing left", took.as_secs_f64());
        Ok(())
    }

    /// Returns what exists of the deployment and its tunnel.
    pub(super) async fn left(&self) -> Result<Vec<String>> {
        let mut left = Vec::new();
        for name in [self.stage.tunnel.clone(), format!("{}-next", self.stage.tunnel)] {
            if self.stage.scope.status(&name).await? != "gone" {
                left.push(name);
            }
        }
        let label = format!("com.docker.compose.project={}", project(&self.stage));
        let filters = HashMap::from([("label".to_owned(), vec![label])]);
        let options = ListContainersOptions { all: true, filters: Some(filters), ..Default::default() };
        let listed = self.stage.scope.docker().list_containers(Some(options)).await?;
        left.extend(listed.into_iter().flat_map(|container| container.names.unwrap_or_default()));
        let default = self.stage.scope.name("default");
        if self.stage.scope.docker().inspect_network(&default, None).await.is_ok() {
            left.push(default);
        }
        Ok(left)
    }
}

pub(super) fn project(stage: &Stage) -> String {
    stage.scope.name("dockflare").to_lowercase()
}

async fn no_upgrade_loses_a(program: PathBuf) -> Result<()> {
    let (mut deployed, edge) = Deployment::new(program).await?;
    let tunnel = visitors::tunnel(&deployed.stage, &edge, "");
    let mut visitors = deployed.up(&edge, &tunnel).await?;
    let before = Life::now(&deployed.stage).await?;
    let mut seen = Vec::new();
    let again = (1..rounds()).flat_map(|_| ["restart", "both"]);
    for step in ["restart", "setting", "image", "proxy alone", "agent alone", "both"].into_iter().chain(again) {
        let began = Instant::now();
        match step {
            "restart" => deployed.compose(&["restart"]).await?,
            "setting" => {
                deployed.settings.insert("AGENT_DISPLAY_NAME", "another".to_owned());
                deployed.compose(&["up", "-d", "--no-build"]).await?;
            }
            "image" => {
                let (repository, tag) = deployed.image.rsplit_once(':').context("a tag")?;
                let options = TagImageOptions { repo: Some(repository.to_owned()), tag: Some(format!("{tag}-new")) };
                deployed.stage.scope.docker().tag_image(&deployed.image, Some(options)).await?;
                deployed.image = format!("{repository}:{tag}-new");
                deployed.compose(&["up", "-d", "--no-build"]).await?;
            }
            "proxy alone" => {
                deployed.proxy_settings.insert("LOG_LEVEL", "DEBUG".to_owned());
                deployed.compose(&["up", "-d", "--no-build", "--no-deps", "socket-proxy"]).await?;
            }
            "agent alone" => {
                deployed
                    .compose(&["up", "-d", "--no-build", "--no-deps", "--force-recreate", "dockflare-agent"])
                    .await?;
            }
            _ => deployed.compose(&["up", "-d", "--no-build", "--force-recreate"]).await?,
        }
        if step != "proxy alone" {
            deployed.is_back().await.with_context(|| step.to_owned())?;
        }
        visitors.all_were_served().await.with_context(|| step.to_owned())?;
        let now = Life::now(&deployed.stage).await?;
        ensure!(now == before, "{step}: it is the same start of the same container");
        seen.push(format!("{step} {:.1} s", began.elapsed().as_secs_f64()));
    }
    println!("{}: no failed request of {}", seen.join(", "), visitors.served());
    deployed.stage.assert_no_violations();
    Ok(())
}

async fn down(program: PathBuf) -> Result<()> {
    let (mut deployed, edge) = Deployment::new(program.clone()).await?;
    let tunnel = visitors::tunnel(&deployed.stage, &edge, "");
    let mut visitors = deployed.up(&edge, &tunnel).await?;
    // A shorter lease from now on; setting it is an upgrade itself.
    deployed.settings.insert("TUNNEL_LEASE_SECONDS", "2".to_owned());
    deployed.compose(&["up", "-d", "--no-build"]).await?;
    deployed.is_back().await?;
    // `docker rm -f` of the agent, which then says no goodbye.
    let before = Life::now(&deployed.stage).await?;
    deployed.stage.scope.rm(&deployed.agent()).await?;
    let gone = Instant::now();
    while gone.elapsed() < Duration::from_secs(5) {
        visitors.all_were_served().await?;
    }
    ensure!(Life::now(&deployed.stage).await? == before);
    deployed.compose(&["up", "-d", "--no-build"]).await?;
    deployed.is_back().await?;
    visitors.all_were_served().await?;
    drop(visitors);

    // The same with an agent that has said goodbye.
    deployed.stage.scope.stop(&deployed.agent(), 10).await?;
    deployed.stage.scope.rm(&deployed.agent()).await?;
    wait_until("the tunnel to be gone", SOON, async || {
        (deployed.stage.scope.status(&deployed.stage.tunnel).await.ok()? == "gone").then_some(())
    })
    .await?;

    deployed.settings.insert("TUNNEL_LEASE_SECONDS", LEASE.to_owned());
    deployed.compose(&["up", "-d", "--no-build"]).await?;
    deployed.is_back().await?;
    let visitors = Visitors::come(&edge, &tunnel).await?;
    deployed.down().await?;
    drop(visitors);
    // The network stays: others may use it.
    deployed.stage.scope.docker().inspect_network(&deployed.stage.network, None).await?;
    for _ in 1..rounds() {
        let (mut deployed, edge) = Deployment::new(program.clone()).await?;
        let tunnel = visitors::tunnel(&deployed.stage, &edge, "");
        let _visitors = deployed.up(&edge, &tunnel).await?;
        deployed.down().await?;
    }
    Ok(())
}

/// Writes the vault's configuration folder: the repository's configuration and a new key.
fn vault_config(folder: &std::path::Path) -> Result<()> {
    use std::os::unix::fs::{PermissionsExt, chown};
    std::fs::create_dir(folder)?;
    let made = Command::new(testkit::binary("dockflare-vault")?).arg("generate-key").output()?;
    ensure!(made.status.success(), "no key");
    std::fs::write(folder.join("master.key"), made.stdout)?;
    std::fs::copy(workspace_root().join("deploy/vault-config.yaml"), folder.join("config.yaml"))?;
    std::fs::set_permissions(folder.join("master.key"), std::fs::Permissions::from_mode(0o600))?;
    for path in [folder.to_owned(), folder.join("master.key"), folder.join("config.yaml")] {
        chown(path, Some(65431), Some(65431))?;
    }
    // Others may enter the parent folder, but cannot read the key.
    std::fs::set_permissions(folder.parent().context("no folder")?, std::fs::Permissions::from_mode(0o755))?;
    Ok(())
}

async fn key_from_the_vault(program: PathBuf) -> Result<()> {
    let (mut deployed, _edge) = Deployment::new(program).await?;
    let scope = &deployed.stage.scope;
    let (agent, vault, vault_proxy, proxy) =
        (deployed.agent(), scope.name("vault"), scope.name("vault-proxy"), scope.name("proxy"));
    let config = deployed.folder.path().join("vault-config");
    vault_config(&config)?;
    deployed.settings.remove("DOCKFLARE_API_KEY");
    deployed.settings.insert("VAULT_CONFIG", config.display().to_string());
    deployed.settings.insert("RELOAD_CONTAINERS", agent.clone());
    deployed.vault = Some(images().vault(&testkit::binary("dockflare-vault")?).await?);

    // All at once is the worst order of a first `up`: without a key the agent ends, and Docker restarts it.
    deployed.compose(&["up", "-d", "--no-build"]).await?;
    let scope = &deployed.stage.scope;
    let says = async |name: &str, text: &str| scope.logs(name).await.ok()?.contains(text).then_some(());
    wait_until("the vault to start", SOON, async || says(&vault, "dockflare-vault started").await).await?;
    wait_until("the agent to miss its key", SOON, async || says(&agent, "DOCKFLARE_API_KEY_FILE").await).await?;
    let set = async |value: &str| -> Result<()> {
        let words = ["/dockflare-vault", "set", "agent/key", value].map(str::to_owned).to_vec();
        let options = testkit::bollard::exec::CreateExecOptions { cmd: Some(words), ..Default::default() };
        let id = scope.docker().create_exec(&vault, options).await?.id;
        let detached = testkit::bollard::exec::StartExecOptions { detach: true, ..Default::default() };
        scope.docker().start_exec(&id, Some(detached)).await?;
        let ended = async || scope.docker().inspect_exec(&id).await.ok()?.exit_code;
        let code = wait_until("the command to end", SOON, ended).await?;
        ensure!(code == 0, "set ended with {code}");
        Ok(())
    };
    set(&deployed.stage.key).await?;
    let known = registered(&deployed.stage).await?;
    let inspected = serde_json::to_string(&scope.inspect(&agent).await?)?;
    ensure!(!inspected.contains(&deployed.stage.key), "the key is in docker inspect");

    let started = async || anyhow::Ok(scope.inspect(&agent).await?.state.and_then(|state| state.started_at));
    let before = started().await?;
    let rolled = deployed.stage.master.roll_key(&known.id)?;
    set(&rolled).await?;
    wait_until("the new key", 2 * SOON, async || says(&agent, "the key file holds a new agent key").await).await?;
    ensure!(started().await? == before, "the agent was restarted");

    // The host reboots: memory is lost, and the agent, which needs the key, starts before the vault, which has it.
    let registrations = registered(&deployed.stage).await?.registrations;
    for name in [&agent, &vault, &vault_proxy, &proxy] {
        scope.stop(name, 40).await?;
    }
    for name in [&agent, &proxy, &vault, &vault_proxy] {
        scope.start(name).await?;
    }
    let known = deployed.stage.master.wait_for("the agent to be back", 3 * SOON, |known| {
        known.only_agent().filter(|agent| agent.registrations > registrations).map(drop)
    });
    known.await?;
    ensure!(!scope.logs(&agent).await?.contains(&rolled), "the key is in the log");
    deployed.compose(&["down"]).await?;
    Ok(())
}
