//! Tests the socket proxy in a container, as the compose file and the documentation run it.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use dockflare_dev_master::{DevMaster, Phase, Protocol};
use testkit::models::{HealthConfig, HostConfig, RestartPolicy, RestartPolicyNameEnum};
use testkit::{Case, Scope, Spec, case, images, wait_until};

use crate::support::{SOON, agent_binary};

pub(super) fn cases() -> Vec<Case> {
    let mut cases = testkit::cases![
        a_socket_that_cannot_be_opened_is_said_with_the_remedy,
        the_stricter_variant_of_the_documentation_reaches_docker,
        a_mounted_socket_that_docker_made_anew_ends_the_proxy_and_its_restart_policy_mounts_the_new_one,
    ];
    for protocol in [Protocol::V1, Protocol::V2] {
        let name =
            format!("{protocol}_master_from_enrolment_to_decommission_with_the_socket_proxy_of_the_compose_file");
        cases.push(case(name, move || from_enrolment_to_decommission(protocol)).limit(Duration::from_secs(240)));
    }
    cases
}

const CHECK: [&str; 4] = ["CMD", "/dockflare-agent", "socket-proxy", "--check"];

/// Returns the restrictions that the compose file sets.
fn confined(binds: Vec<String>) -> HostConfig {
    HostConfig {
        binds: Some(binds),
        readonly_rootfs: Some(true),
        cap_drop: Some(vec!["ALL".to_owned()]),
        security_opt: Some(vec!["no-new-privileges:true".to_owned()]),
        ..HostConfig::default()
    }
}

/// Creates and starts a container of the agent's image, as this user and with this command.
async fn run_as(scope: &Scope, user: &str, args: &[&str], env: &[(&str, &str)], host: HostConfig) -> Result<String> {
    use testkit::bollard::query_parameters::CreateContainerOptions;
    use testkit::models::ContainerCreateBody;
    let body = ContainerCreateBody {
        image: Some(images().agent(&agent_binary()).await?),
        user: Some(user.to_owned()),
        cmd: Some(args.iter().map(|arg| (*arg).to_owned()).collect()),
        env: Some(env.iter().map(|(name, value)| format!("{name}={value}")).collect()),
        labels: Some(scope.labels()),
        healthcheck: Some(HealthConfig {
            test: Some(CHECK.map(str::to_owned).to_vec()),
            interval: Some(1_000_000_000),
            ..HealthConfig::default()
        }),
        host_config: Some(host),
        ..ContainerCreateBody::default()
    };
    let options = CreateContainerOptions { name: Some(scope.name("socket-proxy")), ..Default::default() };
    let id = scope.docker().create_container(Some(options), body).await?.id;
    scope.start(&id).await?;
    Ok(id)
}

async fn from_enrolment_to_decommission(protocol: Protocol) -> Result<()> {
    let scope = Scope::new(testkit::docker()?);
    let (tunnel, network, api) = (scope.name("tunnel"), scope.name("net"), scope.name("docker-api"));
    scope.create_network(&network).await?;
    scope.create_volume(&api).await?;
    // Make the volume before a container names it: the scope does not remove a volume that Docker makes, without a
    // label.
    scope.create_volume(&scope.name("data")).await?;
    scope.owns_container(&tunnel);
    scope.owns_container(&format!("{tunnel}-next"));
    let found = scope.docker().inspect_network(&network, None).await?;
    let mut configs = found.ipam.and_then(|ipam| ipam.config).into_iter().flatten();
    let gateway = configs.find_map(|config| config.gateway).context("the network has no gateway")?;
    let master =
        DevMaster::builder().protocol(protocol).listen(SocketAddr::new(gateway.parse()?, 0)).enroll_new("edge");
    let master = master.start().await?;
    let stand_in = images().stand_in_with(&[("STAND_IN_DRAIN", "300")]).await?;
    let settings = [
        ("CLOUDFLARED_IMAGE", stand_in.as_str()),
        ("CLOUDFLARED_NETWORK_NAME", &network),
        ("TUNNEL_CONTAINER_NAME", &tunnel),
    ];
    let binds = vec![format!("{}:/var/run/docker.sock:ro", testkit::socket_path()), format!("{api}:/run/dockflare")];
    let host = HostConfig { network_mode: Some("none".to_owned()), ..confined(binds) };
    let proxy = run_as(&scope, "0:0", &["socket-proxy"], &settings, host).await?;
    wait_until("Docker to call the socket proxy healthy", SOON, async || {
        (scope.health(&proxy).await.ok()? == "healthy").then_some(())
    })
    .await?;

    let (url, key) = (master.url(), master.generate_key("test"));
    let mut env = settings.to_vec();
    env.extend([
        ("DOCKFLARE_MASTER_URL", url.as_str()),
        ("DOCKFLARE_API_KEY", &key),
        ("COMMAND_POLL_INTERVAL_SECONDS", "1"),
        ("REPORT_INTERVAL_SECONDS", "5"),
        ("DOCKER_HOST", "unix:///run/dockflare/docker.sock"),
    ]);
    let agent = images().agent(&agent_binary()).await?;
    let name = scope.name("agent");
    let id = scope
        .run(Spec {
            image: &agent,
            name: &name,
            labels: &[("com.docker.compose.service", "dockflare-agent")],
            env: &env,
            network: Some(&network),
            host: HostConfig {
                restart_policy: Some(RestartPolicy {
                    name: Some(RestartPolicyNameEnum::UNLESS_STOPPED),
                    maximum_retry_count: None,
                }),
                mounts: Some(vec![testkit::models::Mount {
                    target: Some("/app/data".to_owned()),
                    typ: Some(testkit::models::MountType::VOLUME),
                    source: Some(scope.name("data")),
                    ..Default::default()
                }]),
                ..confined(vec![format!("{api}:/run/dockflare:ro")])
            },
            ..Spec::default()
        })
        .await?;
    let running = |what: &'static str| {
        master.wait_for(what, SOON, |known| {
            known.only_agent().filter(|agent| agent.tunnel_state() == Some("running")).cloned()
        })
    };
    let known = running("the tunnel to run").await?;
    let web = scope.run_workload(&[("dockflare.enable", "true")], &[], Some(&network), false).await?;
    let what = "the container to be known";
    master
        .wait_for(what, SOON, |known| known.only_agent().filter(|a| a.containers.contains_key(&web)).map(drop))
        .await?;

    let before = scope.inspect(&tunnel).await?.id;
    master.redeploy(&known.id)?;
    wait_until("the replacement", 2 * SOON, async || {
        let now = scope.find(&tunnel).await.ok()??.id;
        let next = scope.status(&format!("{tunnel}-next")).await.ok()?;
        (now != before && next == "gone").then_some(())
    })
    .await?;
    running("the tunnel to run again").await?;

    master.remove(&known.id)?;
    if protocol == Protocol::V2 {
        let done = master.wait_for("the end of the decommission", SOON, |known| {
            known.decommissions.first().filter(|operation| operation.phase == Phase::Completed).map(drop)
        });
        done.await?;
        wait_until("the agent's container to be down", SOON, async || {
            (scope.status(&id).await.ok()? == "exited").then_some(())
        })
        .await?;
        assert_eq!(scope.status(&tunnel).await?, "gone");
    }
    assert_eq!(master.violations(), Vec::<String>::new());
    let said = scope.logs(&proxy).await?;
    ensure!(!said.contains("refused a request"), "{said}");
    ensure!(!said.contains(&key) && !said.contains("eyJ"), "{said}");
    Ok(())
}

async fn a_socket_that_cannot_be_opened_is_said_with_the_remedy() -> Result<()> {
    let scope = Scope::new(testkit::docker()?);
    let binds = vec![format!("{}:/var/run/docker.sock:ro", testkit::socket_path())];
    let host = HostConfig {
        network_mode: Some("none".to_owned()),
        tmpfs: Some([("/socket".to_owned(), "mode=0777".to_owned())].into()),
        ..confined(binds)
    };
    let listen = [("SOCKET_PROXY_LISTEN", "unix:///socket/docker.sock")];
    let proxy = run_as(&scope, "65532:65532", &["socket-proxy"], &listen, host).await?;
    let log = wait_until("the proxy to say so", SOON, async || {
        scope.logs(&proxy).await.ok().filter(|log| log.contains("ERROR"))
    })
    .await?;
    for said in ["belongs to user 0", "with mode 0", "runs as user 65532", "user: \"0\"", "user: \"65532:"] {
        ensure!(log.contains(said), "nothing is said of {said:?}: {log}");
    }
    wait_until("Docker to call it unhealthy", 2 * SOON, async || {
        (scope.health(&proxy).await.ok()? == "unhealthy").then_some(())
    })
    .await
}

/// The variant in docs/security.md: an ordinary user with the socket's group, and a volume that belongs to that user.
async fn the_stricter_variant_of_the_documentation_reaches_docker() -> Result<()> {
    use std::os::unix::fs::MetadataExt;
    use testkit::models::{Mount, MountType, MountVolumeOptions, VolumeCreateRequest};
    let scope = Scope::new(testkit::docker()?);
    let api = scope.name("docker-api");
    let options = [("type", "tmpfs"), ("device", "tmpfs"), ("o", "uid=65532,mode=0755")];
    let request = VolumeCreateRequest {
        name: Some(api.clone()),
        labels: Some(scope.labels()),
        driver_opts: Some(options.map(|(name, value)| (name.to_owned(), value.to_owned())).into()),
        ..Default::default()
    };
    scope.docker().create_volume(request).await?;
    let host = HostConfig {
        network_mode: Some("none".to_owned()),
        mounts: Some(vec![Mount {
            target: Some("/run/dockflare".to_owned()),
            source: Some(api),
            typ: Some(MountType::VOLUME),
            volume_options: Some(MountVolumeOptions { no_copy: Some(true), ..Default::default() }),
            ..Default::default()
        }]),
        ..confined(vec![format!("{}:/var/run/docker.sock:ro", testkit::socket_path())])
    };
    let user = format!("65532:{}", std::fs::metadata(testkit::socket_path())?.gid());
    let proxy = run_as(&scope, &user, &["socket-proxy"], &[], host).await?;
    wait_until("Docker to call the socket proxy healthy", SOON, async || {
        (scope.health(&proxy).await.ok()? == "healthy").then_some(())
    })
    .await
}

/// A socket made as a Docker daemon makes its own. It forwards to the real one.
struct Socket {
    path: std::path::PathBuf,
    relay: tokio::task::JoinHandle<()>,
}

impl Socket {
    /// Makes the socket, and replaces any earlier one.
    fn make(path: &std::path::Path) -> Result<Self> {
        use std::os::unix::fs::PermissionsExt;
        use tokio::net::{UnixListener, UnixStream};
        if path.exists() {
            std::fs::remove_file(path)?;
        }
        let listener = UnixListener::bind(path)?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o666))?;
        let relay = tokio::spawn(async move {
            while let Ok((mut client, _)) = listener.accept().await {
                tokio::spawn(async move {
                    let mut engine = UnixStream::connect(testkit::socket_path()).await?;
                    tokio::io::copy_bidirectional(&mut client, &mut engine).await
                });
            }
        });
        Ok(Self { path: path.to_owned(), relay })
    }

    /// Ends the daemon: nobody listens any more, and the socket file stays until the next start.
    async fn end(self) -> std::path::PathBuf {
        self.relay.abort();
        drop(self.relay.await);
        self.path
    }
}

async fn a_mounted_socket_that_docker_made_anew_ends_the_proxy_and_its_restart_policy_mounts_the_new_one() -> Result<()>
{
    let scope = Scope::new(testkit::docker()?);
    let folder = tempfile::tempdir()?;
    let socket = Socket::make(&folder.path().join("docker.sock"))?;
    let host = HostConfig {
        network_mode: Some("none".to_owned()),
        tmpfs: Some([("/run/dockflare".to_owned(), "mode=0777".to_owned())].into()),
        restart_policy: Some(RestartPolicy {
            name: Some(RestartPolicyNameEnum::UNLESS_STOPPED),
            maximum_retry_count: None,
        }),
        ..confined(vec![format!("{}:/var/run/docker.sock:ro", socket.path.display())])
    };
    let proxy = run_as(&scope, "0:0", &["socket-proxy"], &[], host).await?;
    let healthy = async |what: &str| {
        wait_until(what, 2 * SOON, async || (scope.health(&proxy).await.ok()? == "healthy").then_some(())).await
    };
    healthy("Docker to call the socket proxy healthy").await?;
    let restarts = async || scope.inspect(&proxy).await.ok()?.restart_count;

    // The daemon is down for a while, and comes back with a new socket.
    let path = socket.end().await;
    let _new = Socket::make(&path)?;
    wait_until("the socket proxy to be started again", 3 * SOON, async || (restarts().await? == 1).then_some(()))
        .await?;
    healthy("the socket proxy to reach Docker by the new socket").await?;
    let log = scope.logs(&proxy).await?;
    ensure!(log.contains("nobody listens any more on the Docker socket that is mounted here"), "{log}");
    ensure!(restarts().await == Some(1), "once is enough");
    Ok(())
}
