//! The demo's images, networks and containers.

use std::collections::HashMap;
use std::os::unix::fs::MetadataExt;

use anyhow::{Context, Result, ensure};
use testkit::bollard::models::{
    ContainerCreateBody, HealthConfig, HostConfig, NetworkCreateRequest, PortBinding, VolumeCreateRequest,
};
use testkit::bollard::query_parameters::CreateContainerOptions;
use testkit::{Docker, Images};

use super::Protocol;
use super::master::{self, Master};
use super::story::Story;

/// The containers.
pub(crate) const AGENT: &str = "dockflare-demo-agent";
/// Made by the agent.
pub(crate) const TUNNEL: &str = "dockflare-demo-tunnel";
pub(crate) const WEB: &str = "dockflare-demo-web";
const MASTER: &str = "dockflare-demo-master";
const PROXY: &str = "dockflare-demo-socket-proxy";
/// Connects the tunnel with what it serves, and the agent with the master.
pub(crate) const NETWORK: &str = "dockflare-demo-net";
const VOLUME: &str = "dockflare-demo-data";
/// Holds the socket between the agent and the socket proxy, as in the compose file.
const SOCKET_VOLUME: &str = "dockflare-demo-docker-api";
/// Images are called `dockflare-demo/<what>:local`.
pub(super) const REPOSITORY: &str = "dockflare-demo";

/// On everything, including the images, and therefore on the containers that the agent creates from them.
pub(super) const LABEL: (&str, &str) = ("dockflare-demo", "1");
/// Also on the agent's container.
pub(crate) const AGENT_LABEL: &str = "dockflare-demo.agent";
/// The label that the agent puts on what it creates itself.
pub(crate) const AGENTS_OWN: &str = "com.dockflare.agent.owner";

/// Where the master listens in its container.
const MASTER_PORT: &str = "5000/tcp";
const WEB_LABELS: [(&str, &str); 3] = [
    ("dockflare.enable", "true"),
    ("dockflare.hostname", "web.example.com"),
    ("dockflare.service", "http://dockflare-demo-web:8080"),
];

/// The label in the form of a Docker filter.
pub(crate) fn label() -> String {
    format!("{}={}", LABEL.0, LABEL.1)
}

/// The workload's labels, formatted for people.
pub(crate) fn web_labels() -> String {
    WEB_LABELS.map(|(key, value)| format!("{key}={value}")).join(" ")
}

pub(super) fn labels<'a>(more: impl IntoIterator<Item = (&'a str, &'a str)>) -> Option<HashMap<String, String>> {
    let all = [LABEL].into_iter().chain(more);
    Some(all.map(|(key, value)| (key.to_owned(), value.to_owned())).collect())
}

/// Builds the programs, and shows Cargo's progress.
pub(crate) fn build() -> Result<()> {
    let programs =
        [("dockflare-agent", true), ("dockflare-dev-master", false), ("cloudflared", false), ("workload", false)];
    for (name, release) in programs {
        let status = testkit::cargo_build(name, release).status().context("cannot run cargo")?;
        ensure!(status.success(), "cannot build {name}: {status}");
    }
    Ok(())
}

/// Images and networks, ready for the containers.
pub(crate) struct Scene {
    docker: Docker,
    agent: String,
    cloudflared: String,
    master: String,
    web: String,
    /// Whether the agent reaches Docker through the socket proxy.
    proxy: bool,
}

impl Scene {
    /// Creates the images, networks and volumes.
    pub(crate) async fn prepare(docker: &Docker, story: &Story, socket: bool) -> Result<Self> {
        let images = Images::named(REPOSITORY, LABEL);
        let agent = images.agent(&testkit::release_binary("dockflare-agent")?).await?;
        // The real cloudflared drains for 30 s, which would only make `docker stop` of the agent slow.
        let cloudflared = images.stand_in_with(&[("STAND_IN_DRAIN", "1000")]).await?;
        let (master, web) = (images.dev_master().await?, images.workload().await?);
        let size = docker.inspect_image(&agent).await?.size.unwrap_or_default();
        let megabytes = size as f64 / 1e6;
        story.say("docker", format_args!("images made from local files; the agent's has {megabytes:.1} MB"));
        let request =
            NetworkCreateRequest { name: NETWORK.to_owned(), labels: labels([]), ..NetworkCreateRequest::default() };
        docker.create_network(request).await.with_context(|| format!("cannot create network {NETWORK}"))?;
        for name in [VOLUME, SOCKET_VOLUME] {
            let volume = VolumeCreateRequest { name: Some(name.to_owned()), labels: labels([]), ..Default::default() };
            docker.create_volume(volume).await.with_context(|| format!("cannot create the volume {name}"))?;
        }
        Ok(Self { docker: docker.clone(), agent, cloudflared, master, web, proxy: !socket })
    }

    /// Whether the agent reaches Docker through a socket proxy.
    pub(crate) fn has_proxy(&self) -> bool {
        self.proxy
    }

    /// Starts the master and publishes its port on 127.0.0.1; 0 picks a free one.
    pub(crate) async fn start_master(&self, protocol: Protocol, port: u16) -> Result<Master> {
        let binding = PortBinding { host_ip: Some("127.0.0.1".into()), host_port: Some(port.to_string()) };
        let host = HostConfig {
            network_mode: Some(NETWORK.into()),
            port_bindings: Some(HashMap::from([(MASTER_PORT.to_owned(), Some(vec![binding]))])),
            ..confined()
        };
        let body = ContainerCreateBody {
            image: Some(self.master.clone()),
            exposed_ports: Some(vec![MASTER_PORT.to_owned()]),
            env: environment([("DEV_MASTER_PROTOCOL", protocol.as_str()), ("DEV_MASTER_MASTER_KEY", master::KEY)]),
            host_config: Some(host),
            labels: labels([]),
            ..ContainerCreateBody::default()
        };
        self.create(MASTER, body).await?;
        self.start(MASTER).await?;
        let network = self.docker.inspect_container(MASTER, None).await?.network_settings.context("no network")?;
        let mut bindings = network.ports.and_then(|mut ports| ports.remove(MASTER_PORT)?).unwrap_or_default();
        let port =
            bindings.pop().and_then(|binding| binding.host_port).context("the master's port is not published")?;
        Ok(Master::new(port.parse().context("the master's port")?))
    }

    /// Starts the socket proxy and then the agent, as the compose file does.
    pub(crate) async fn start_agent(&self, key: &str) -> Result<()> {
        let master = format!("http://{MASTER}:5000");
        let mut variables = vec![
            ("DOCKFLARE_MASTER_URL", master.as_str()),
            ("DOCKFLARE_API_KEY", key),
            ("CLOUDFLARED_IMAGE", &self.cloudflared),
            ("CLOUDFLARED_NETWORK_NAME", NETWORK),
            ("TUNNEL_CONTAINER_NAME", TUNNEL),
            ("AGENT_DISPLAY_NAME", "dockflare-demo"),
            // Shorter than the default, because someone is watching.
            ("COMMAND_POLL_INTERVAL_SECONDS", "2"),
        ];
        let mut host = HostConfig {
            network_mode: Some(NETWORK.into()),
            binds: Some(vec![format!("{VOLUME}:/app/data")]),
            ..confined()
        };
        if self.proxy {
            self.start_proxy().await?;
            host.binds.get_or_insert_default().push(format!("{SOCKET_VOLUME}:/run/dockflare:ro"));
            variables.push(("DOCKER_HOST", "unix:///run/dockflare/docker.sock"));
        } else {
            host.binds.get_or_insert_default().push(format!("{}:/var/run/docker.sock:ro", testkit::socket_path()));
            host.group_add = Some(vec![self.socket_group().await?.to_string()]);
        }
        let body = ContainerCreateBody {
            image: Some(self.agent.clone()),
            env: environment(variables),
            host_config: Some(host),
            // The socket proxy recognizes the agent by the second label, as with the compose file.
            labels: labels([(AGENT_LABEL, "1"), ("com.docker.compose.service", "dockflare-agent")]),
            // Run the image's own health check, but more often.
            healthcheck: Some(HealthConfig { interval: Some(2_000_000_000), ..HealthConfig::default() }),
            stop_timeout: Some(60),
            ..ContainerCreateBody::default()
        };
        self.create(AGENT, body).await?;
        self.start(AGENT).await
    }

    /// Starts the labelled container, and returns its id.
    pub(crate) async fn start_web(&self) -> Result<String> {
        let body = ContainerCreateBody {
            image: Some(self.web.clone()),
            host_config: Some(HostConfig { network_mode: Some(NETWORK.into()), ..confined() }),
            labels: labels(WEB_LABELS),
            ..ContainerCreateBody::default()
        };
        let id = self.create(WEB, body).await?;
        self.start(WEB).await?;
        Ok(id)
    }

    async fn start_proxy(&self) -> Result<()> {
        let host = HostConfig {
            network_mode: Some("none".into()),
            binds: Some(vec![
                format!("{}:/var/run/docker.sock:ro", testkit::socket_path()),
                format!("{SOCKET_VOLUME}:/run/dockflare"),
            ]),
            ..confined()
        };
        let body = ContainerCreateBody {
            image: Some(self.agent.clone()),
            cmd: Some(vec!["socket-proxy".into()]),
            user: Some("0:0".into()),
            env: environment([
                ("CLOUDFLARED_IMAGE", self.cloudflared.as_str()),
                ("CLOUDFLARED_NETWORK_NAME", NETWORK),
                ("TUNNEL_CONTAINER_NAME", TUNNEL),
            ]),
            healthcheck: Some(HealthConfig {
                test: Some(["CMD", "/dockflare-agent", "socket-proxy", "--check"].map(str::to_owned).to_vec()),
                interval: Some(2_000_000_000),
                ..HealthConfig::default()
            }),
            host_config: Some(host),
            labels: labels([]),
            ..ContainerCreateBody::default()
        };
        self.create(PROXY, body).await?;
        self.start(PROXY).await
    }

    /// The group that may use the socket, as seen in a container.
    async fn socket_group(&self) -> Result<u32> {
        let options = self.docker.info().await?.security_options.unwrap_or_default();
        if options.iter().any(|option| option == "name=rootless") {
            // In a rootless engine, the user who runs it is root in its containers, and owns the socket.
            return Ok(0);
        }
        let socket = testkit::socket_path();
        Ok(std::fs::metadata(&socket).with_context(|| format!("cannot look at {socket}"))?.gid())
    }

    async fn create(&self, name: &str, body: ContainerCreateBody) -> Result<String> {
        let options = CreateContainerOptions { name: Some(name.to_owned()), ..Default::default() };
        let created = self.docker.create_container(Some(options), body).await;
        Ok(created.with_context(|| format!("cannot create {name}"))?.id)
    }

    async fn start(&self, name: &str) -> Result<()> {
        self.docker.start_container(name, None).await.with_context(|| format!("cannot start {name}"))
    }
}

/// A configuration with no rights except to run.
pub(super) fn confined() -> HostConfig {
    HostConfig {
        readonly_rootfs: Some(true),
        cap_drop: Some(vec!["ALL".into()]),
        security_opt: Some(vec!["no-new-privileges".into()]),
        ..HostConfig::default()
    }
}

fn environment<'a>(variables: impl IntoIterator<Item = (&'a str, &'a str)>) -> Option<Vec<String>> {
    Some(variables.into_iter().map(|(name, value)| format!("{name}={value}")).collect())
}
