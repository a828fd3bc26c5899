//! Tests the agent behind its own socket proxy, deployed as in the compose file, and what others get from that proxy.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use dockflare_dev_master::Protocol;
use futures_util::StreamExt;
use serde_json::{Value, json};
use testkit::{AgentProcess, Case, Scope, SocketProxy, Spec, case, images, models};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use crate::containers_scene::{SPEC_LABEL, Tunnel};
use crate::support::checked::Checked;
use crate::support::{SOON, Stage, agent_binary};

#[path = "../support/attacks.rs"]
mod attacks;
mod deployed;
mod lease;
mod networks;
mod upgrades;

pub(crate) fn cases() -> Vec<Case> {
    let mut cases = testkit::cases![
        no_attack_changes_anything_on_the_engine,
        what_is_somebody_elses_is_neither_shown_nor_touched,
        the_hardening_is_forced_whatever_the_client_sent,
        one_network_is_made_however_often_it_is_asked_for,
        a_proxy_that_was_killed_is_followed_by_one_at_the_same_address,
        a_connector_of_the_same_tunnel_is_shown_without_its_secret,
        an_agent_reaches_a_proxy_that_listens_on_tcp_which_says_what_that_means,
        a_check_behind_the_own_proxy_asks_for_nothing_that_it_refuses,
        a_check_finds_a_socket_proxy_with_other_settings_than_the_agents,
        a_check_finds_a_docker_that_is_away_behind_the_own_proxy,
    ];
    let name = "no_mutated_request_changes_anything_but_the_tunnel_on_the_engine";
    // The limit allows for tens of thousands of requests, on demand.
    cases.push(case(name, no_mutated_request_changes_anything_but_the_tunnel).limit(Duration::from_secs(1800)));
    cases.extend(deployed::cases());
    cases.extend(lease::cases());
    cases.extend(networks::cases());
    cases.extend(upgrades::cases());
    cases
}

/// Sends these bytes to the proxy. Returns the status and the body of the answer.
async fn ask(proxy: &Path, bytes: &[u8]) -> Result<(u16, String)> {
    let mut stream = UnixStream::connect(proxy).await?;
    stream.write_all(bytes).await?;
    let mut answer = String::new();
    tokio::time::timeout(SOON, stream.read_to_string(&mut answer)).await.context("no answer")??;
    let (head, body) = answer.split_once("\r\n\r\n").context("no answer")?;
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).context("no status")?;
    Ok((status, body.to_owned()))
}

async fn line(proxy: &Path, line: &str) -> Result<(u16, String)> {
    ask(proxy, format!("{line} HTTP/1.1\r\nHost: docker\r\n\r\n").as_bytes()).await
}

async fn post(proxy: &Path, path: &str, body: &Value) -> Result<(u16, String)> {
    let body = body.to_string();
    let head = format!(
        "POST {path} HTTP/1.1\r\nHost: d\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    ask(proxy, (head + &body).as_bytes()).await
}

/// Makes the agent's tunnel container, without a running agent, and a socket proxy with its settings.
async fn tunnel_and_proxy(stage: &Stage) -> Result<(Tunnel, SocketProxy)> {
    let tunnel = Tunnel::new(stage, "");
    let agent = tunnel.agent_with_ready_tunnel(stage).await?;
    agent.sigkill()?;
    Ok((tunnel, SocketProxy::start(&agent_binary(), &stage.env)?))
}

/// Returns the body of the agent's create request, reconstructed from the container.
async fn create_body(stage: &Stage) -> Result<Value> {
    let config = stage.scope.inspect(&stage.tunnel).await?.config.context("no config")?;
    let env: Vec<_> = config.env.into_iter().flatten().filter(|entry| entry.starts_with("TUNNEL_")).collect();
    let labels: serde_json::Map<_, _> = config
        .labels
        .into_iter()
        .flatten()
        .filter(|(key, _)| key.starts_with("com.dockflare.agent."))
        .map(|(key, value)| (key, json!(value)))
        .collect();
    Ok(json!({
        "Image": config.image, "Cmd": config.cmd, "Env": env, "Labels": labels, "StopTimeout": 35,
        "Healthcheck": { "Test": ["CMD", "x"], "Interval": 1_000_000_000 },
        "HostConfig": {
            "NetworkMode": stage.network, "RestartPolicy": { "Name": "unless-stopped" },
            "LogConfig": { "Type": "json-file", "Config": { "max-size": "10m" } },
            "ExtraHosts": ["host.docker.internal:host-gateway"], "CapDrop": ["ALL"], "SecurityOpt": ["no-new-privileges:true"], "ReadonlyRootfs": true, "PidsLimit": 512,
        },
    }))
}

/// Returns the settings of a proxy on a free port of this host, and its address.
fn on_tcp(stage: &Stage) -> Result<(Vec<(String, String)>, String)> {
    let free = std::net::TcpListener::bind(("127.0.0.1", 0))?.local_addr()?;
    let mut env = stage.env.clone();
    env.push(("SOCKET_PROXY_LISTEN".to_owned(), format!("tcp://{free}")));
    env.push(("SOCKET_PROXY_DOCKER_HOST".to_owned(), format!("unix://{}", testkit::socket_path())));
    Ok((env, format!("tcp://{free}")))
}

async fn an_agent_reaches_a_proxy_that_listens_on_tcp_which_says_what_that_means() -> Result<()> {
    let mut stage = Stage::new(Protocol::V2).await?;
    let (env, url) = on_tcp(&stage)?;
    let folder = tempfile::tempdir()?;
    let mut proxy = AgentProcess::spawn_with(&agent_binary(), &["socket-proxy"], &env, folder.path())?;
    proxy.plant(&stage.key);
    let warning = proxy.wait_for_log("SOCKET_PROXY_LISTEN=tcp://", SOON).await?;
    ensure!(warning.contains("WARN") && warning.contains("whoever reaches this address"), "{warning}");
    stage.set("DOCKER_HOST", url);
    let mut agent = stage.agent()?;
    stage.enrolled_agent("edge").await?;
    agent.wait_for_log("tunnel ready", SOON).await?;
    let banner = agent.wait_for_log("dockflare-agent runs", SOON).await?;
    ensure!(!banner.contains("docker=unknown"), "the version is let through: {banner}");
    agent.sigterm()?;
    ensure!(agent.wait_exit(SOON).await?.code() == Some(0));
    ensure!(!proxy.log().contains("refused a request"), "{}", proxy.log());
    proxy.sigterm()?;
    ensure!(proxy.wait_exit(SOON).await?.code() == Some(0), "{}", proxy.log());
    Ok(())
}

async fn a_check_behind_the_own_proxy_asks_for_nothing_that_it_refuses() -> Result<()> {
    let mut stage = Stage::new(Protocol::V2).await?;
    let proxy = SocketProxy::start(&agent_binary(), &stage.env)?;
    stage.set("DOCKER_HOST", proxy.host_url());
    let _agent = stage.agent()?;
    stage.enrolled_agent("edge").await?;
    stage.tunnel_is("running").await?;
    let checked = Checked::new(&stage.env, stage.data.path(), &[&stage.key]).await?;
    ensure!(checked.is("docker.proxy", "pass")?.contains("this project's own"), "{:#}", checked.document);
    ensure!(checked.is("docker.version", "pass")?.contains("linux/"), "{:#}", checked.document);
    // Other cases' containers are not on this tunnel's network, so the check may complain about them.
    ensure!(checked.ids("fail").iter().all(|id| *id == "container"), "{:#}", checked.document);
    ensure!(proxy.refusals().is_empty(), "{:#?}", proxy.refusals());
    Ok(())
}

async fn a_check_finds_a_socket_proxy_with_other_settings_than_the_agents() -> Result<()> {
    let mut stage = Stage::new(Protocol::V2).await?;
    let table = [
        ("CLOUDFLARED_IMAGE", "docker.image", "other:1"),
        ("CLOUDFLARED_NETWORK_NAME", "docker.network", "other-net"),
        ("TUNNEL_CONTAINER_NAME", "tunnel.container", "other-tunnel"),
    ];
    for (variable, finding, other) in table {
        let mut env = stage.env.clone();
        env.retain(|(name, _)| name != variable);
        env.push((variable.to_owned(), other.to_owned()));
        let proxy = SocketProxy::start(&agent_binary(), &env)?;
        stage.set("DOCKER_HOST", proxy.host_url());
        let checked = Checked::new(&stage.env, stage.data.path(), &[&stage.key]).await?;
        let told = checked.is(finding, "fail")?;
        ensure!(told.contains(variable) && told.contains("docker compose up -d"), "{told}");
        ensure!(checked.code == Some(1), "{:#}", checked.document);
    }
    Ok(())
}

async fn a_check_finds_a_docker_that_is_away_behind_the_own_proxy() -> Result<()> {
    let mut stage = Stage::new(Protocol::V2).await?;
    let (mut env, url) = on_tcp(&stage)?;
    env.push(("SOCKET_PROXY_DOCKER_HOST".to_owned(), "unix:///nowhere/docker.sock".to_owned()));
    let folder = tempfile::tempdir()?;
    let proxy = AgentProcess::spawn_with(&agent_binary(), &["socket-proxy"], &env, folder.path())?;
    proxy.wait_for_log("SOCKET_PROXY_LISTEN=tcp://", SOON).await?;
    stage.set("DOCKER_HOST", url);
    let checked = Checked::new(&stage.env, stage.data.path(), &[&stage.key]).await?;
    let told = checked.is("docker.answer", "fail")?;
    ensure!(told.contains("there is no socket at /nowhere"), "the cause is told: {told}");
    Ok(())
}

/// Returns everything of the stage, and everything an attack would make, that only an attack can change.
async fn state(scope: &Scope) -> Result<Value> {
    use testkit::bollard::query_parameters::{ListContainersOptions, ListNetworksOptions, ListVolumesOptions};
    let docker = scope.docker();
    let ours = |name: &str| name.contains(scope.suffix()) || name.contains("evil");
    let mut state = Vec::new();
    let options = ListContainersOptions { all: true, ..Default::default() };
    for container in docker.list_containers(Some(options)).await? {
        let names = container.names.unwrap_or_default();
        if names.iter().any(|name| ours(name)) {
            let found = scope.inspect(&container.id.unwrap_or_default()).await?;
            let run = found.state.map(|state| (state.status, state.started_at, state.exit_code));
            let networks = found.network_settings.and_then(|settings| settings.networks);
            let networks: Vec<_> = networks.into_iter().flatten().map(|(name, _)| name).collect();
            state.push(json!([
                found.id,
                found.name,
                found.config,
                found.host_config,
                run,
                found.restart_count,
                networks
            ]));
        }
    }
    for network in docker.list_networks(None::<ListNetworksOptions>).await? {
        if network.name.as_deref().is_some_and(ours) {
            state.push(json!([network.id, network.name, network.labels, network.options]));
        }
    }
    let volumes = docker.list_volumes(None::<ListVolumesOptions>).await?.volumes.unwrap_or_default();
    state.extend(volumes.into_iter().filter(|volume| ours(&volume.name)).map(|volume| json!(volume.name)));
    for image in docker.list_images(None::<testkit::bollard::query_parameters::ListImagesOptions>).await? {
        state.extend(image.repo_tags.iter().filter(|tag| ours(tag)).map(|tag| json!(tag)));
    }
    Ok(Value::Array(state))
}

/// A container of somebody else, and what an attack on it must name.
struct Victim {
    name: String,
    id: String,
    /// The image that the tunnel may have.
    image: String,
}

impl Victim {
    async fn new(stage: &Stage) -> Result<Self> {
        let (name, image) = (stage.scope.name("victim"), images().workload().await?);
        let id = stage.scope.run(Spec { image: &image, name: &name, ..Spec::default() }).await?;
        Ok(Self { name, id, image: crate::containers_scene::setting(stage, "CLOUDFLARED_IMAGE") })
    }
}

async fn no_attack_changes_anything_on_the_engine() -> Result<()> {
    let mut stage = Stage::new(Protocol::V2).await?;
    stage.set("AUTO_CONNECT_NETWORKS", "true");
    let (tunnel, mut proxy) = tunnel_and_proxy(&stage).await?;
    proxy.process_mut().plant(&tunnel.token);
    let Victim { name, id, image } = &Victim::new(&stage).await?;
    let body = create_body(&stage).await?;
    let target = attacks::Target { tunnel: &stage.tunnel, network: &stage.network, image, victim: name, id, body };
    let before = state(&stage.scope).await?;
    let attacks = attacks::attacks(&target);
    for attack in &attacks {
        let (status, body) = ask(&proxy.path(), &attack.bytes).await.with_context(|| attack.name.clone())?;
        let message = format!("dockflare-agent socket-proxy refuses this: {}", attack.rule);
        let refused = (400..=505).contains(&status) && body.contains(&message);
        ensure!(refused, "{}: {status} {body} instead of {}", attack.name, attack.rule);
    }
    assert_eq!(state(&stage.scope).await?, before);
    // A flood of refusals must not flood the log, and no line may hold what was sent.
    let lines = proxy.refusals().len();
    let log = proxy.process().log();
    ensure!((20..=60).contains(&lines), "{lines} lines for {} attacks", attacks.len());
    ensure!(!log.contains(name) && !log.contains("Privileged"), "{log}");
    Ok(())
}

/// `TEST_SEED` repeats a run or tries other mutations. `TEST_MUTATIONS` sets their number, 600 by default.
async fn no_mutated_request_changes_anything_but_the_tunnel() -> Result<()> {
    let seed = testkit::number("TEST_SEED", fastrand::u64(..));
    let count = usize::try_from(testkit::number("TEST_MUTATIONS", 600))?;
    eprintln!("TEST_SEED={seed} TEST_MUTATIONS={count}");
    let stage = Stage::new(Protocol::V2).await?;
    let (_tunnel, proxy) = tunnel_and_proxy(&stage).await?;
    let Victim { name, id, image } = &Victim::new(&stage).await?;
    let body = create_body(&stage).await?;
    let target = attacks::Target { tunnel: &stage.tunnel, network: &stage.network, image, victim: name, id, body };
    let own = [stage.tunnel.clone(), format!("{}-next", stage.tunnel)];
    let hardened = stage.scope.inspect(&stage.tunnel).await?.host_config;
    let own_id = stage.scope.inspect(&stage.tunnel).await?.id.context("no id")?;
    let is_own = |entry: &Value| own.iter().any(|own| entry[1] == *format!("/{own}"));
    let others = async || -> Result<Vec<Value>> {
        let Value::Array(all) = state(&stage.scope).await? else { bail!("no list") };
        Ok(all.into_iter().filter(|entry| !is_own(entry)).collect())
    };
    let (before, began) = (others().await?, std::time::Instant::now());
    let mut answers = std::collections::BTreeMap::<u16, usize>::new();
    let requests = futures_util::stream::iter(attacks::mutated(&target, &own_id, seed, count));
    // Some requests have no end, or a distant one.
    let mut answered = requests.map(|bytes| brief(&proxy, bytes)).buffer_unordered(8);
    while let Some(status) = answered.next().await {
        *answers.entry(status?).or_default() += 1;
    }
    drop(answered);
    eprintln!("{count} requests in {:.1?}: {answers:?} (0: cut off by the client)", began.elapsed());
    assert_eq!(others().await?, before);
    // Any container with one of the tunnel's names must be as the agent would make it.
    for name in &own {
        let Some(found) = stage.scope.find(name).await? else { continue };
        let made = found.host_config.clone().map(|host| models::HostConfig { network_mode: None, ..host });
        let expected = hardened.clone().map(|host| models::HostConfig { network_mode: None, ..host });
        ensure!(made == expected, "{name}: {made:?} instead of {expected:?}");
        ensure!(found.config.and_then(|config| config.image).as_ref() == Some(image));
    }
    let (status, _) = line(&proxy.path(), "GET /_ping").await?;
    ensure!(status == 200, "the proxy serves no more: {status}");
    ensure!(
        answers
            .keys()
            .all(|status| [0, 200, 201, 204, 304, 400, 403, 404, 405, 408, 409, 413, 431, 500, 502, 505]
                .contains(status)),
        "{answers:?}"
    );
    Ok(())
}

/// Returns the status of the answer to these bytes; 0 if none comes within 3 s.
async fn brief(proxy: &SocketProxy, bytes: Vec<u8>) -> Result<u16> {
    let talk = async {
        let mut stream = UnixStream::connect(proxy.path()).await?;
        // Ignore the error: the proxy may answer before everything is sent.
        let _ = stream.write_all(&bytes).await;
        if !bytes.windows(4).any(|four| four == b"\r\n\r\n") {
            let _ = stream.shutdown().await;
        }
        let mut answer = vec![0; 16];
        let read = stream.read(&mut answer).await.unwrap_or_default();
        let head = String::from_utf8_lossy(&answer[..read]).into_owned();
        Ok::<_, anyhow::Error>(head.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0))
    };
    tokio::time::timeout(Duration::from_secs(3), talk).await.unwrap_or(Ok(0))
}

async fn what_is_somebody_elses_is_neither_shown_nor_touched() -> Result<()> {
    let mut stage = Stage::new(Protocol::V2).await?;
    stage.set("AUTO_CONNECT_NETWORKS", "true");
    let proxy = SocketProxy::start(&agent_binary(), &stage.env)?;
    let (scope, path) = (&stage.scope, proxy.path());
    let (own, next) = (stage.tunnel.clone(), format!("{}-next", stage.tunnel));
    // Containers that the agent did not make have the tunnel's names. One of them has the owner's label, but no other.
    let image = images().workload().await?;
    let labels = [("com.dockflare.agent.owner", "dockflare-agent")];
    let foreign = scope.run(Spec { image: &image, name: &own, ..Spec::default() }).await?;
    let foreign_next = scope.run(Spec { image: &image, name: &next, labels: &labels, ..Spec::default() }).await?;
    let other = scope.name("other");
    scope.create_network(&other).await?;
    let other_id = scope
        .run(Spec { image: &image, network: Some(&other), env: &[("PASSWORD", "hunter2")], ..Spec::default() })
        .await?;
    let before = state(scope).await?;
    for name in [&foreign, &foreign_next, &other_id] {
        for request in [
            format!("POST /containers/{name}/start"),
            format!("POST /containers/{name}/stop?t=1"),
            format!("POST /containers/{name}/restart?t=1"),
            format!("DELETE /containers/{name}?force=true"),
            format!("GET /containers/{name}/logs?stdout=true"),
        ] {
            let (status, body) = line(&path, &request).await?;
            ensure!(status == 403 && body.ends_with("refuses this: owner\"}"), "{request}: {status} {body}");
        }
    }
    let (status, body) = line(&path, &format!("POST /containers/{foreign_next}/rename?name={own}")).await?;
    ensure!(status == 403 && body.contains("owner"), "{body}");
    let (status, body) = line(&path, &format!("POST /containers/{other_id}/stop")).await?;
    ensure!(status == 403 && body.contains("owner"), "{body}");
    let (status, body) = post(&path, &format!("/networks/{other}/connect"), &json!({ "Container": foreign })).await?;
    ensure!(status == 403 && body.contains("owner"), "{body}");
    for asked in [&other_id, &other_id[..12], &foreign[..12]] {
        let (status, body) = line(&path, &format!("GET /containers/{asked}/json")).await?;
        ensure!(status == 403 && body.contains("container_not_shown"), "{asked}: {body}");
    }
    let (_, listed) = line(&path, "GET /v1.41/containers/json").await?;
    ensure!(!listed.contains(&other_id), "{listed}");
    let (_, seen) = line(&path, &format!("GET /containers/{own}/json")).await?;
    ensure!(seen.contains(&own) && !seen.contains("PATH") && !seen.contains("/usr/local/bin"), "{seen}");
    assert_eq!(state(scope).await?, before);

    // The proxy connects the agent's tunnel container only to networks of labelled containers.
    scope.rm(&own).await?;
    scope.rm(&next).await?;
    let tunnel = Tunnel::new(&stage, "");
    tunnel.agent_with_ready_tunnel(&stage).await?.sigkill()?;
    let ours = scope.inspect(&own).await?.id;
    let connect = async || post(&path, &format!("/networks/{other}/connect"), &json!({ "Container": ours })).await;
    let (status, body) = connect().await?;
    ensure!(status == 403 && body.contains("network_not_of_labelled"), "{body}");
    scope.run_workload(&[("dockflare.enable", "true")], &[], Some(&other), false).await?;
    let (status, body) = connect().await?;
    ensure!(status == 200, "{body}");
    Ok(())
}

/// Docker up to Engine 24 makes another network of the same name for each request, until it runs out of addresses.
async fn one_network_is_made_however_often_it_is_asked_for() -> Result<()> {
    let stage = Stage::new(Protocol::V2).await?;
    let proxy = SocketProxy::start(&agent_binary(), &stage.env)?;
    let labels = json!({ "com.dockflare.agent.owner": "dockflare-agent" });
    let (path, body) = (proxy.path(), json!({ "Name": stage.network, "Driver": "bridge", "Labels": labels }));
    let ask = async |_: usize| post(&path, "/networks/create", &body).await;
    // Clients that hang up at once, then many at the same time, then one after the other.
    for _ in 0..8 {
        let text = body.to_string();
        let head = format!(
            "POST /networks/create HTTP/1.1\r\nHost: d\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
            text.len()
        );
        UnixStream::connect(&path).await?.write_all((head + &text).as_bytes()).await?;
    }
    for answer in futures_util::future::join_all((0..32).map(ask)).await {
        let (status, said) = answer?;
        ensure!(status == 201 || status == 409, "{status} {said}");
    }
    let named = async || -> Result<usize> {
        let networks = stage.scope.docker().list_networks(None).await?;
        Ok(networks.iter().filter(|network| network.name.as_deref() == Some(&stage.network)).count())
    };
    testkit::wait_until("the network", SOON, async || (named().await.ok()? > 0).then_some(())).await?;
    for _ in 0..4 {
        let (status, said) = ask(0).await?;
        ensure!(status == 409 && said.contains("already exists"), "{status} {said}");
    }
    let named = named().await?;
    ensure!(named == 1, "{named} networks of one name");
    Ok(())
}

async fn the_hardening_is_forced_whatever_the_client_sent() -> Result<()> {
    let stage = Stage::new(Protocol::V2).await?;
    let (_, proxy) = tunnel_and_proxy(&stage).await?;
    let mut body = create_body(&stage).await?;
    body["HostConfig"] = json!({
        "NetworkMode": stage.network, "ExtraHosts": ["host.docker.internal:host-gateway"], "ReadonlyRootfs": false,
        "PidsLimit": -1,
    });
    body["StopTimeout"] = json!(0);
    let name = format!("{}-next", stage.tunnel);
    // With an old API version Docker would drop the process limit.
    let (status, answer) = post(&proxy.path(), &format!("/v1.24/containers/create?name={name}"), &body).await?;
    ensure!(status == 201, "{status} {answer}");
    let (made, ours) = (stage.scope.inspect(&name).await?, stage.scope.inspect(&stage.tunnel).await?);
    let (made_host, our_host) = (made.host_config.context("none")?, ours.host_config.context("none")?);
    assert_eq!(made_host, our_host);
    assert_eq!(made_host.pids_limit, Some(512));
    let (made, ours) = (made.config.context("none")?, ours.config.context("none")?);
    assert_eq!((made.healthcheck, made.stop_timeout, made.cmd), (ours.healthcheck, ours.stop_timeout, ours.cmd));
    assert!(made.labels.is_some_and(|labels| labels.contains_key(SPEC_LABEL)));
    Ok(())
}

async fn a_proxy_that_was_killed_is_followed_by_one_at_the_same_address() -> Result<()> {
    let mut stage = Stage::new(Protocol::V2).await?;
    let mut proxy = SocketProxy::start(&agent_binary(), &stage.env)?;
    stage.set("DOCKER_HOST", proxy.host_url());
    let agent = stage.agent()?;
    stage.enrolled_agent("edge").await?;
    stage.tunnel_is("running").await?;
    let before = stage.scope.inspect(&stage.tunnel).await?.id;
    proxy.process().sigkill()?;
    proxy.process_mut().wait_exit(SOON).await?;
    ensure!(proxy.path().exists(), "a killed one cannot remove its socket");
    agent.wait_for_log("Docker cannot be reached", SOON).await?;
    let unseen = stage.scope.run_workload(&[("dockflare.enable", "true")], &[], None, false).await?;
    proxy.restart()?;
    let what = "the container to be known";
    stage
        .master
        .wait_for(what, SOON, |known| known.only_agent().filter(|a| a.containers.contains_key(&unseen)).map(drop))
        .await?;
    assert_eq!(stage.scope.inspect(&stage.tunnel).await?.id, before);
    // A second proxy at the same address reports that the first one is listening.
    let mut second = testkit::AgentProcess::spawn_with(
        &agent_binary(),
        &["socket-proxy"],
        &[("SOCKET_PROXY_LISTEN".to_owned(), proxy.host_url())],
        stage.data.path(),
    )?;
    assert_eq!(second.wait_exit(SOON).await?.code(), Some(64));
    ensure!(second.log().contains("another socket proxy listens there"), "{}", second.log());
    proxy.process().sigterm()?;
    assert_eq!(proxy.process_mut().wait_exit(SOON).await?.code(), Some(0));
    ensure!(!proxy.path().exists(), "one that stops removes its socket");
    Ok(())
}

async fn a_connector_of_the_same_tunnel_is_shown_without_its_secret() -> Result<()> {
    let stage = Stage::new(Protocol::V2).await?;
    let (tunnel, proxy) = tunnel_and_proxy(&stage).await?;
    let image = images().stand_in().await?;
    let rival =
        Spec { image: &image, env: &[("TUNNEL_TOKEN", &tunnel.token)], args: &["tunnel", "run"], ..Spec::default() };
    let rival = stage.scope.run(rival).await?;
    for asked in [&rival, &stage.tunnel] {
        let (status, seen) = line(&proxy.path(), &format!("GET /containers/{asked}/json")).await?;
        ensure!(status == 200 && seen.contains("TUNNEL_TOKEN=") && !seen.contains(&tunnel.token), "{status} {seen}");
    }
    Ok(())
}
