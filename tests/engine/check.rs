//! Tests `dockflare-agent check` on a real Engine, directly and behind a real HAProxy: each missing or excess
//! permission, the image, the network, the tunnel and the containers. The check must change nothing.

use std::collections::BTreeSet;

use anyhow::{Context, Result, ensure};
use dockflare_dev_master::Protocol;
use serde_json::{Value, json};
use testkit::bollard::query_parameters::{ListContainersOptions, ListImagesOptions};
use testkit::{Case, Docker, PROXY_OPENS, Scope, Spec, wait_until};

use crate::containers_scene::{COMMAND, Life, Tunnel, registered, setting, two_more_polls};
use crate::proxy::without;
use crate::support::checked::{Checked, run};
use crate::support::{SOON, Stage};

pub(crate) fn cases() -> Vec<Case> {
    testkit::cases![
        each_variable_that_the_socket_proxy_lacks_is_named_at_each_call_that_needs_it,
        what_the_socket_proxy_lets_through_without_need_is_a_warning,
        a_check_leaves_docker_as_it_was,
        an_image_or_network_that_is_missing_is_told_with_what_becomes_of_it,
        a_running_tunnel_and_the_ways_from_it_are_seen_and_left_alone,
        a_container_that_is_not_the_agents_or_not_there_is_told,
        a_tunnel_that_the_master_no_longer_assigns_is_told_by_log_check_and_health,
        the_support_bundle_holds_the_versions_and_not_the_token,
    ]
}

async fn check(stage: &Stage) -> Result<Checked> {
    Checked::new(&stage.env, stage.data.path(), &[&stage.key]).await
}

/// Returns the calls that fail, by the ends of their ids.
fn refused(checked: &Checked) -> Vec<&str> {
    checked.ids("fail").into_iter().filter_map(|id| id.strip_prefix("docker.may_")).collect()
}

async fn each_variable_that_the_socket_proxy_lacks_is_named_at_each_call_that_needs_it() -> Result<()> {
    let mut stage = Stage::new(Protocol::V2).await?;
    let reads = ["list", "inspect", "logs"];
    let changes = ["create", "start", "stop", "restart", "rename", "remove"];
    let table: [(&str, Vec<&str>); 6] = [
        ("CONTAINERS", [&reads[..], &changes].concat()),
        ("EVENTS", vec!["events"]),
        ("NETWORKS", vec!["network", "new_network", "connect", "disconnect"]),
        ("IMAGES", vec!["image", "pull"]),
        ("POST", [&changes[..], &["new_network", "connect", "disconnect", "pull"]].concat()),
        ("VERSION", vec![]),
    ];
    for (variable, expected) in table {
        let scope = Scope::new(testkit::docker()?);
        let proxy = scope.socket_proxy(&without(variable)).await?;
        stage.set("DOCKER_HOST", proxy.host_url());
        let checked = check(&stage).await?;
        ensure!(refused(&checked) == expected, "without {variable}: {:?}", checked.ids("fail"));
        for id in expected {
            let told = checked.is(&format!("docker.may_{id}"), "fail")?;
            ensure!(told.contains(&format!("{variable}=1")) && told.contains("on the socket proxy"), "{told}");
        }
        let version = if variable == "VERSION" { "warn" } else { "pass" };
        ensure!(version == "pass" || checked.is("docker.version", version)?.contains("VERSION=1"));
        checked.is("docker.answer", "pass")?;
        checked.is("docker.exec", "pass")?;
    }
    stage.assert_no_violations();
    Ok(())
}

async fn what_the_socket_proxy_lets_through_without_need_is_a_warning() -> Result<()> {
    let mut stage = Stage::new(Protocol::V2).await?;
    let scope = Scope::new(testkit::docker()?);
    let with = |more: &[(&'static str, &'static str)]| [&PROXY_OPENS[..], more].concat();
    let narrow = scope.socket_proxy(&PROXY_OPENS).await?;
    stage.set("DOCKER_HOST", narrow.host_url());
    let checked = check(&stage).await?;
    ensure!(refused(&checked).is_empty(), "{checked:?}");
    checked.is("docker.exec", "pass")?;
    checked.is("docker.proxy", "pass")?;

    let exec = scope.socket_proxy(&with(&[("EXEC", "1")])).await?;
    stage.set("DOCKER_HOST", exec.host_url());
    let checked = check(&stage).await?;
    ensure!(checked.is("docker.exec", "warn")?.contains("EXEC=0"));
    checked.is("docker.proxy", "pass")?;

    let wide = scope.socket_proxy(&with(&[("VOLUMES", "1"), ("BUILD", "1"), ("SECRETS", "1")])).await?;
    stage.set("DOCKER_HOST", wide.host_url());
    let told = check(&stage).await?.is("docker.proxy", "warn")?;
    ensure!(told.contains("BUILD, SECRETS, VOLUMES") && told.contains("set BUILD=0 SECRETS=0 VOLUMES=0"), "{told}");

    // Directly on Docker there is one warning, not one for each permission.
    stage.set("DOCKER_HOST", "");
    let checked = check(&stage).await?;
    ensure!(checked.is("docker.proxy", "warn")?.contains("the whole host"));
    ensure!(checked.findings("docker.exec").is_empty() && refused(&checked).is_empty());
    Ok(())
}

/// Returns this host's containers, networks and images, except those with our labels: parallel tests make and remove
/// such objects at any time.
async fn picture(docker: &Docker) -> Result<BTreeSet<String>> {
    let is_ours = |label: &String| label.starts_with("dockflare-") || label.starts_with("com.dockflare.");
    let mut seen = BTreeSet::new();
    let all = ListContainersOptions { all: true, ..Default::default() };
    for container in docker.list_containers(Some(all)).await? {
        if !container.labels.unwrap_or_default().keys().any(is_ours) {
            seen.insert(format!("container {:?} {:?}", container.id, container.state));
        }
    }
    for network in docker.list_networks(None).await? {
        if !network.labels.unwrap_or_default().keys().any(is_ours) {
            seen.insert(format!("network {:?} {:?}", network.id, network.name));
        }
    }
    for image in docker.list_images(None::<ListImagesOptions>).await? {
        if !image.labels.keys().any(is_ours) {
            seen.insert(format!("image {} {:?}", image.id, image.repo_tags));
        }
    }
    Ok(seen)
}

async fn a_check_leaves_docker_as_it_was() -> Result<()> {
    let mut stage = Stage::new(Protocol::V2).await?;
    let scope = Scope::new(testkit::docker()?);
    let proxy = scope.socket_proxy(&PROXY_OPENS).await?;
    stage.set("DOCKER_HOST", proxy.host_url());
    let before = picture(scope.docker()).await?;
    let checked = check(&stage).await?;
    ensure!(refused(&checked).is_empty(), "{checked:?}");
    let after = picture(scope.docker()).await?;
    ensure!(before == after, "{:#?}", before.symmetric_difference(&after).collect::<Vec<_>>());
    ensure!(scope.status(&stage.tunnel).await? == "gone");

    // Docker refused every request that would change something.
    let changing = |line: &&str| ["\"POST ", "\"DELETE ", "\"PUT "].iter().any(|method| line.contains(method));
    let log = wait_until("eleven requests in the log of the proxy", SOON, async || {
        scope.logs(proxy.container()).await.ok().filter(|log| log.lines().filter(changing).count() >= 11)
    });
    let log = log.await?;
    for line in log.lines().filter(changing) {
        // HAProxy's httplog: `… clients backend/server timers status bytes …`
        let status = line.split_whitespace().skip_while(|word| *word != "clients").nth(3);
        let status = status.and_then(|word| word.parse::<u16>().ok());
        ensure!(status.is_some_and(|status| status >= 400), "{line}");
    }
    ensure!(log.lines().filter(changing).count() == 11, "{log}");
    Ok(())
}

async fn an_image_or_network_that_is_missing_is_told_with_what_becomes_of_it() -> Result<()> {
    let mut stage = Stage::new(Protocol::V2).await?;
    // Use Docker directly, whatever the other tests use: a proxy would not let the agent ask the registry.
    stage.set("DOCKER_HOST", format!("unix://{}", testkit::socket_path()));
    ensure!(check(&stage).await?.is("docker.image", "pass")?.contains("is here"));
    let absent = format!("registry.invalid/absent-{}:1", stage.scope.suffix());
    stage.set("CLOUDFLARED_IMAGE", absent.clone());
    let checked = check(&stage).await?;
    let told = checked.is("docker.image", "fail")?;
    ensure!(told.contains(&absent) && told.contains("its registry cannot be asked") && told.contains("docker load"));
    ensure!(checked.is("docker.network", "pass")?.contains("is made when it is needed"));

    // This proxy does not let the agent ask the registry, and the agent does not need that permission.
    let scope = Scope::new(testkit::docker()?);
    let narrow = scope.socket_proxy(&without("POST")).await?;
    stage.set("DOCKER_HOST", narrow.host_url());
    let checked = check(&stage).await?;
    ensure!(checked.is("docker.image", "skip")?.contains("pulled when it is needed"));
    let told = checked.is("docker.network", "fail")?;
    ensure!(told.contains(&format!("docker network create {}", stage.network)), "{told}");
    stage.scope.create_network(&stage.network).await?;
    ensure!(check(&stage).await?.is("docker.network", "pass")?.contains("is here"));

    let blind = scope.socket_proxy(&without("CONTAINERS")).await?;
    stage.set("DOCKER_HOST", blind.host_url());
    let checked = check(&stage).await?;
    checked.is("tunnel.container", "skip")?;
    checked.is("containers", "skip")?;
    stage.set("DOCKER_HOST", "unix:///nowhere/docker.sock");
    let checked = check(&stage).await?;
    ensure!(checked.is("docker.answer", "fail")?.contains("DOCKER_HOST"));
    for id in ["docker.rest", "tunnel", "containers"] {
        checked.is(id, "skip")?;
    }
    Ok(())
}

async fn a_running_tunnel_and_the_ways_from_it_are_seen_and_left_alone() -> Result<()> {
    let stage = Stage::new(Protocol::V2).await?;
    let scope = &stage.scope;
    let tunnel = Tunnel::new(&stage, "");
    let agent = tunnel.agent_with_ready_tunnel(&stage).await?;
    let run = async |name: &str, network: &str| -> Result<String> {
        let name = scope.name(name);
        let service = format!("http://{name}:8080");
        let hostname = format!("{name}.example");
        let labels = [("dockflare.enable", "true"), ("dockflare.service", &service), ("dockflare.hostname", &hostname)];
        let image = testkit::images().workload().await?;
        scope
            .run(Spec { image: &image, name: &name, labels: &labels, network: Some(network), ..Spec::default() })
            .await?;
        Ok(name)
    };
    let app = scope.name("app");
    scope.create_network(&app).await?;
    let (web, apart) = (run("web", &stage.network).await?, run("apart", &app).await?);
    let before = Life::now(&stage).await?;
    let checked = Checked::new(&stage.env, stage.data.path(), &[&stage.key, &tunnel.token]).await?;
    ensure!(checked.is("tunnel.assigned", "pass")?.contains("edge"));
    ensure!(checked.is("tunnel.container", "pass")?.contains("cloudflared 2025.9.0"));
    // The version only gets older with time.
    let told = checked.is("tunnel.version", "warn")?;
    ensure!(told.contains("2025.9.0 is") && told.contains("one year") && told.contains("CLOUDFLARED_IMAGE="), "{told}");
    ensure!(checked.is("tunnel.ready", "pass")?.contains("connection"));
    checked.is("tunnel.alone", "pass")?;
    let named = |name: &str| -> Result<Value> {
        let all = checked.findings("container").into_iter().find(|finding| finding["title"] == name);
        all.cloned().with_context(|| format!("{name} is not in {:#}", checked.document))
    };
    let seen = named(&web)?;
    ensure!(seen["outcome"] == "pass" && seen["detail"].as_str().is_some_and(|text| text.contains(&web)), "{seen}");
    let seen = named(&apart)?;
    ensure!(seen["outcome"] == "fail", "{seen}");
    ensure!(seen["remedy"] == json!(format!("docker network connect {} {apart}", stage.network)), "{seen}");
    ensure!(checked.code == Some(1));

    scope.tell_stand_in(&stage.tunnel, &json!({ "unready": true })).await?;
    let told = check(&stage).await?.is("tunnel.ready", "fail")?;
    ensure!(told.contains("the tunnel has no connection to Cloudflare"), "{told}");
    scope.tell_stand_in(&stage.tunnel, &json!({ "unready": false })).await?;

    let image = setting(&stage, "CLOUDFLARED_IMAGE");
    let (rival, token) = (scope.name("rival"), testkit::token(&tunnel.id, ""));
    let env = [("TUNNEL_TOKEN", token.as_str())];
    scope.run(Spec { image: &image, name: &rival, env: &env, args: &COMMAND, ..Spec::default() }).await?;
    let told = check(&stage).await?.is("tunnel.alone", "warn")?;
    ensure!(told.contains(&format!("docker rm -f {rival}")), "{told}");
    ensure!(Life::now(&stage).await? == before, "the tunnel container is the same");
    drop(agent);
    stage.assert_no_violations();
    Ok(())
}

async fn a_tunnel_that_the_master_no_longer_assigns_is_told_by_log_check_and_health() -> Result<()> {
    let mut stage = Stage::new(Protocol::V1).await?;
    let port = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
    stage.set("HEALTH_CHECK_PORT", port.to_string());
    let tunnel = Tunnel::new(&stage, "");
    let agent = tunnel.agent(&stage)?;
    let known = tunnel.enrol(&stage, &agent).await?;
    let before = tunnel.container(&stage).await?;
    let sentence = "the master no longer assigns this tunnel to this host";
    let problem = async || -> Option<bool> {
        let page = testkit::http::get(&format!("127.0.0.1:{port}"), "/health").await.ok()?.body;
        let page: Value = serde_json::from_str(&page).ok()?;
        Some(page["problems"].as_array()?.iter().any(|problem| problem == sentence))
    };
    ensure!(problem().await == Some(false));
    check(&stage).await?.is("tunnel.assigned", "pass")?;

    // The master removes the host; the edge still accepts the token.
    stage.master.forget(&known.id)?;
    let line = agent.wait_for_log(sentence, SOON).await?;
    ensure!(line.contains("WARN") && line.contains("enrol the agent"), "{line}");
    ensure!(problem().await == Some(true));
    let told = check(&stage).await?.is("tunnel.assigned", "warn")?;
    ensure!(told.contains(sentence) && told.contains("enrol the agent"), "{told}");
    two_more_polls(&stage).await?;
    ensure!(agent.log().matches(sentence).count() == 1, "{}", agent.log());
    ensure!(tunnel.container(&stage).await? == before, "it serves as before");

    let known = registered(&stage).await?;
    stage.master.enroll_with(&known.id, "edge", &tunnel.id, &tunnel.token)?;
    wait_until("the problem to be over", SOON, async || (!problem().await?).then_some(())).await?;
    check(&stage).await?.is("tunnel.assigned", "pass")?;
    stage.assert_no_violations();
    Ok(())
}

async fn a_container_that_is_not_the_agents_or_not_there_is_told() -> Result<()> {
    let stage = Stage::new(Protocol::V2).await?;
    let checked = check(&stage).await?;
    ensure!(checked.is("tunnel.assigned", "skip")?.contains("enrol the agent on the master's Agents page"));
    checked.is("tunnel.container", "skip")?;
    let tunnel = Tunnel::new(&stage, "");
    tunnel.store(&stage)?;
    let checked = Checked::new(&stage.env, stage.data.path(), &[&stage.key, &tunnel.token]).await?;
    checked.is("tunnel.assigned", "pass")?;
    ensure!(checked.is("tunnel.container", "fail")?.contains("is not there"));
    checked.is("tunnel.ready", "skip")?;

    // Created but not started, like a container whose network is gone.
    let made = tunnel.python_container(&stage).await?;
    ensure!(check(&stage).await?.is("tunnel.container", "fail")?.contains("was never started"));
    stage.scope.rm(&made).await?;

    let image = testkit::images().workload().await?;
    stage.scope.run(Spec { image: &image, name: &stage.tunnel, ..Spec::default() }).await?;
    let checked = check(&stage).await?;
    let told = checked.is("tunnel.container", "fail")?;
    ensure!(told.contains("is not the agent's") && told.contains(&format!("docker rm {}", stage.tunnel)), "{told}");
    checked.is("tunnel.ready", "skip")?;
    ensure!(stage.scope.status(&stage.tunnel).await? == "running");
    Ok(())
}

async fn the_support_bundle_holds_the_versions_and_not_the_token() -> Result<()> {
    let stage = Stage::new(Protocol::V2).await?;
    let tunnel = Tunnel::new(&stage, "");
    let agent = tunnel.agent_with_ready_tunnel(&stage).await?;
    let secrets = [stage.key.as_str(), tunnel.token.as_str()];
    let (code, text) = run(&["support-bundle"], &stage.env, stage.data.path(), &secrets).await?;
    ensure!(code == Some(0), "{text}");
    let document: Value = serde_json::from_str(&text)?;
    ensure!(document["versions"]["docker"]["engine"].is_string(), "{:#}", document["versions"]);
    ensure!(document["versions"]["cloudflared"]["version"] == "2025.9.0", "{:#}", document["versions"]);
    ensure!(document["files"].as_array().is_some_and(|files| files.iter().any(|f| f["name"] == "tunnel_state.json")));
    for secret in secrets {
        ensure!(!text.contains(secret), "a secret is in the bundle");
    }
    drop(agent);
    Ok(())
}
