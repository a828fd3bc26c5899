//! Tests the tunnel container's surroundings: the way to each workload, and other connectors of the same tunnel.

use std::net::TcpListener;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use dockflare_dev_master::{Protocol, Snapshot};
use serde_json::{Value, json};
use testkit::{AgentProcess, Case, PROXY_OPENS, Scope, Spec, models, wait_until};

use crate::containers_scene::{COMMAND, Tunnel, registered, setting};
use crate::support::relay::{Relay, Way};
use crate::support::{SOON, Stage};

pub(crate) fn cases() -> Vec<Case> {
    testkit::cases![
        a_workload_is_told_once_as_reachable_and_one_apart_with_the_command_that_connects_it,
        each_label_that_leads_nowhere_is_told_with_what_mends_it_and_shown_by_the_health_page,
        a_declared_port_proves_nothing_and_what_answers_on_its_own_address_is_what_counts,
        whoever_uses_the_network_of_a_container_that_was_restarted_is_told_to_restart,
        labels_that_make_no_site_are_named_once_with_what_would,
        a_second_connector_is_told_by_its_token_or_by_the_tunnel_that_it_names,
        with_auto_connect_the_tunnel_joins_a_workloads_network_and_does_so_again_after_a_replacement,
        behind_a_proxy_that_connects_and_does_not_disconnect_that_is_said_once_with_what_does_it,
    ]
}

/// A scene with the health page on a free port.
struct Scene {
    stage: Stage,
    address: String,
}

impl Scene {
    async fn new() -> Result<Self> {
        let mut stage = Stage::new(Protocol::V2).await?;
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        stage.set("HEALTH_CHECK_PORT", port.to_string());
        Ok(Self { stage, address: format!("127.0.0.1:{port}") })
    }

    /// Starts a labelled workload under this name with a random suffix, and returns the full name, which also replaces
    /// `{}` in the service. The workload declares port 8080 and listens there.
    async fn run(&self, name: &str, service: &str, network: &str) -> Result<String> {
        self.run_on(name, service, network, "8080").await
    }

    /// Like [`Scene::run`], listening on this port.
    async fn run_on(&self, name: &str, service: &str, network: &str, port: &str) -> Result<String> {
        let name = self.stage.scope.name(name);
        let (service, hostname) = (service.replace("{}", &name), format!("{name}.example"));
        let labels = [("dockflare.enable", "true"), ("dockflare.service", &service), ("dockflare.hostname", &hostname)];
        self.run_labelled(&name, &labels, network, port).await?;
        Ok(name)
    }

    async fn run_labelled(&self, name: &str, labels: &[(&str, &str)], network: &str, port: &str) -> Result<String> {
        let image = testkit::images().workload().await?;
        // A workload on the network of the host or of another container must not take a port there.
        let is_shared = network == "host" || network.starts_with("container:");
        let args: &[&str] = if is_shared { &["sleep", "600000"] } else { &[] };
        let env = [("PORT", port)];
        let spec = Spec { image: &image, name, labels, args, env: &env, network: Some(network), ..Spec::default() };
        self.stage.scope.run(spec).await
    }

    /// Waits until `is_it` holds for the health page.
    async fn page(&self, what: &str, is_it: impl Fn(&Value) -> bool) -> Result<Value> {
        self.page_within(what, SOON, is_it).await
    }

    async fn page_within(&self, what: &str, limit: Duration, is_it: impl Fn(&Value) -> bool) -> Result<Value> {
        let mut last = Value::Null;
        let page = wait_until(what, limit, async || {
            let answer = testkit::http::get(&self.address, "/health").await.ok()?;
            last = serde_json::from_str(&answer.body).ok()?;
            is_it(&last).then(|| last.clone())
        });
        let page = page.await;
        page.with_context(|| format!("the page says {last:#}"))
    }

    /// Waits until the page shows this many of the scene's containers as out of reach. Returns them, sorted by name.
    async fn unreachable(&self, count: usize) -> Result<Vec<Value>> {
        self.unreachable_within(count, SOON).await
    }

    async fn unreachable_within(&self, count: usize, limit: Duration) -> Result<Vec<Value>> {
        let own = |page: &Value| {
            let all = page["unreachable_containers"].as_array().into_iter().flatten();
            let own = all.filter(|container| self.is_own(container["name"].as_str().unwrap_or_default()));
            own.cloned().collect::<Vec<_>>()
        };
        let what = format!("{count} container(s) out of reach");
        let page = self.page_within(&what, limit, |page| own(page).len() == count).await?;
        let problems = page["problems"].as_array().into_iter().flatten().filter_map(Value::as_str);
        let sentences = problems.filter(|problem| problem.contains("cannot be reached by the tunnel: ")).count();
        ensure!(sentences == 1 || count == 0, "{page:#}");
        let mut shown = own(&page);
        shown.sort_by_key(|container| container["name"].to_string());
        Ok(shown)
    }

    /// Whether the text names a container of this scene. The agent also sees the labelled containers of parallel tests.
    fn is_own(&self, text: &str) -> bool {
        text.contains(self.stage.scope.suffix())
    }

    /// Returns how often the agent logged this text about the scene's containers.
    fn count(&self, agent: &AgentProcess, text: &str) -> usize {
        let log = agent.log();
        let names = log.lines().filter(|line| line.contains(text)).filter_map(|line| line.split_once("name="));
        names.filter(|(_, name)| self.is_own(name.split(' ').next().unwrap_or_default())).count()
    }

    async fn connectors(&self, expected: &[&str]) -> Result<()> {
        let what = format!("the other connectors to be {expected:?}");
        self.page(&what, |page| page["other_connectors"] == json!(expected)).await.map(drop)
    }
}

async fn a_workload_is_told_once_as_reachable_and_one_apart_with_the_command_that_connects_it() -> Result<()> {
    let scene = Scene::new().await?;
    let (scope, network) = (&scene.stage.scope, &scene.stage.network);
    let agent = Tunnel::new(&scene.stage, "").agent_with_ready_tunnel(&scene.stage).await?;
    let web = scene.run("web", "http://{}:8080", network).await?;
    let reached = format!("the tunnel can reach the container name={web}");
    let line = agent.wait_for_log(&reached, SOON).await?;
    ensure!(line.contains(&format!("service=http://{web}:8080 network={network}")), "{line}");

    let app = scope.name("app");
    scope.create_network(&app).await?;
    let apart = scene.run("apart", "http://{}:8080", &app).await?;
    let command = format!("docker network connect {network} {apart}");
    let line = agent.wait_for_log(&format!("name={apart} remedy="), SOON).await?;
    ensure!(
        line.contains("WARN the tunnel cannot reach the container: it shares no network with the tunnel"),
        "{line}"
    );
    ensure!(line.contains(&format!("remedy=\"{command}\"")), "{line}");
    let shown = scene.unreachable(1).await?;
    ensure!(shown[0] == json!({ "name": apart, "problem": "it shares no network with the tunnel", "remedy": command }));

    scope.connect(network, &apart).await?;
    agent.wait_for_log(&format!("the tunnel can reach the container name={apart}"), SOON).await?;
    scene.unreachable(0).await?;
    ensure!(scene.count(&agent, &reached) == 1 && scene.count(&agent, "cannot reach the container") == 1);

    // Meanwhile the reports were complete, and the tunnel joined no network.
    let known = scene.stage.master.wait_for("both in a complete report", SOON, |known| {
        let agent = known.only_agent()?;
        let own = agent.containers.values().filter(|container| scene.is_own(&container.name)).count();
        (agent.complete_reports > 1 && own == 2).then_some(())
    });
    known.await?;
    let networks = scope.inspect(&scene.stage.tunnel).await?.network_settings.and_then(|settings| settings.networks);
    ensure!(networks.unwrap_or_default().keys().eq([network]));
    scene.stage.assert_no_violations();
    Ok(())
}

async fn each_label_that_leads_nowhere_is_told_with_what_mends_it_and_shown_by_the_health_page() -> Result<()> {
    let scene = Scene::new().await?;
    let network = scene.stage.network.as_str();
    let agent = Tunnel::new(&scene.stage, "").agent_with_ready_tunnel(&scene.stage).await?;

    let mut expected = Vec::new();
    for (name, service, network, better) in [
        ("a-typo", "http://typo:8080", network, "http://{}:8080"),
        // The tunnel container knows its host by that name.
        ("c-host", "http://{}:8123", "host", "http://host.docker.internal:8123"),
        ("d-loop", "http://localhost:8080", network, "http://{}:8080"),
    ] {
        let name = scene.run(name, service, network).await?;
        let remedy = format!("set the label dockflare.service to {}", better.replace("{}", &name));
        expected.push((name, remedy));
    }
    let shown = scene.unreachable(expected.len()).await?;
    for (shown, (name, remedy)) in shown.iter().zip(&expected) {
        let told = shown["remedy"].as_str().unwrap_or_default();
        ensure!(shown["name"] == *name && told.starts_with(remedy), "expected {remedy:?}: {shown:#}");
        let line = agent.wait_for_log(&format!("name={name} remedy="), SOON).await?;
        ensure!(line.contains("cannot reach the container") && line.contains(remedy), "{line}");
    }
    ensure!(scene.count(&agent, "cannot reach the container") == expected.len());
    for (name, _) in &expected {
        scene.stage.scope.rm(name).await?;
    }
    scene.unreachable(0).await?;
    scene.stage.assert_no_violations();
    Ok(())
}

async fn a_declared_port_proves_nothing_and_what_answers_on_its_own_address_is_what_counts() -> Result<()> {
    let scene = Scene::new().await?;
    let (scope, network) = (&scene.stage.scope, scene.stage.network.as_str());
    let agent = Tunnel::new(&scene.stage, "").agent_with_ready_tunnel(&scene.stage).await?;
    let found = scope.inspect(&scene.stage.tunnel).await?.network_settings.and_then(|settings| settings.networks);
    let gateway = found.and_then(|mut all| all.remove(network)?.gateway).context("the tunnel has no gateway")?;

    // The image declares 8080, but the workload listens on the port in its label.
    let odd = scene.run_on("odd", "http://{}:9000", network, "9000").await?;
    agent.wait_for_log(&format!("the tunnel can reach the container name={odd}"), SOON).await?;
    // The label names a declared port, but nothing listens there.
    let shut = scene.run_on("shut", "http://{}:8080", network, "9000").await?;
    // Whatever the label says, the agent connects only to the labelled container itself.
    let listener = tokio::net::TcpListener::bind((gateway.as_str(), 0)).await?;
    let lured = format!("http://{gateway}:{}", listener.local_addr()?.port());
    scene.run("lure", &lured, network).await?;

    let shown = scene.unreachable_within(1, 4 * SOON).await?;
    let remedy = "let it listen on 0.0.0.0:8080, since 127.0.0.1 is not enough; or set the label dockflare.service to the port that it listens on";
    let problem = "nothing listens on port 8080 of it, connections are refused";
    ensure!(shown[0] == json!({ "name": shut, "problem": problem, "remedy": remedy }), "{shown:#?}");
    agent.wait_for_log(&format!("name={shut} remedy="), SOON).await?;
    ensure!(scene.count(&agent, "cannot reach the container") == 1, "{}", agent.log());
    ensure!(!agent.log().contains(&format!("name={odd} remedy")) && !agent.log().contains("among the ports"));
    let called = tokio::time::timeout(Duration::from_millis(100), listener.accept()).await;
    ensure!(called.is_err(), "the agent connected to where a label led");
    scene.stage.assert_no_violations();
    Ok(())
}

async fn whoever_uses_the_network_of_a_container_that_was_restarted_is_told_to_restart() -> Result<()> {
    let scene = Scene::new().await?;
    let (scope, network) = (&scene.stage.scope, scene.stage.network.as_str());
    let agent = Tunnel::new(&scene.stage, "").agent_with_ready_tunnel(&scene.stage).await?;
    let vpn = scope.name("vpn");
    scene.run_labelled(&vpn, &[], network, "8080").await?;
    let web = scene.run("web", &format!("http://{vpn}:8080"), &format!("container:{vpn}")).await?;
    let reached = format!("the tunnel can reach the container name={web}");
    agent.wait_for_log(&reached, SOON).await?;

    scope.restart(&vpn, 0).await?;
    let shown = scene.unreachable(1).await?;
    let problem = format!("{vpn}, whose network it uses, was started after it, and took that network away");
    ensure!(shown[0] == json!({ "name": web, "problem": problem, "remedy": format!("docker restart {web}") }));
    // The problem is real: the workload has lost the other container's networks until it restarts.
    let mark = agent.mark();
    scope.restart(&web, 0).await?;
    agent.wait_for_log_after(mark, &reached, SOON).await?;
    scene.unreachable(0).await?;
    scene.stage.assert_no_violations();
    Ok(())
}

async fn labels_that_make_no_site_are_named_once_with_what_would() -> Result<()> {
    let scene = Scene::new().await?;
    let (scope, network) = (&scene.stage.scope, scene.stage.network.as_str());
    let agent = Tunnel::new(&scene.stage, "").agent_with_ready_tunnel(&scene.stage).await?;
    let name = |base: &str| scope.name(base);
    let run = async |name: &str, labels: &[(&str, &str)]| scene.run_labelled(name, labels, network, "8080").await;

    let bare = name("bare");
    run(&bare, &[("dockflare.enable", "true")]).await?;
    agent.wait_for_log(&format!("no service label, so the master makes no rule name={bare}"), SOON).await?;
    let nameless = name("nameless");
    let service = format!("http://{nameless}:8080");
    run(&nameless, &[("dockflare.enable", "true"), ("dockflare.service", &service)]).await?;
    agent.wait_for_log(&format!("no hostname label, so the master makes no rule name={nameless}"), SOON).await?;

    for (base, key, value, problem) in [
        ("enabled", "dockflare.enabled", "true", r#"its label "dockflare.enabled=true" does not enable it"#),
        ("case", "DockFlare.Enable", "true", r#"its label "DockFlare.Enable=true" does not enable it"#),
        ("quoted", "dockflare.enable", "\"true\"", "does not enable it"),
        ("on", "dockflare.enable", "on", r#"its label "dockflare.enable=on" does not enable it"#),
        ("hostname", "dockflare.hostname", "h.example", "and none that enables it"),
    ] {
        let name = name(base);
        run(&name, &[(key, value)]).await?;
        let line = agent.wait_for_log(&format!("name={name} remedy="), SOON).await?;
        let sentence = "WARN the container is not enabled, and seems to be meant to: ";
        ensure!(line.contains(sentence) && line.contains(problem), "{line}");
        ensure!(line.ends_with("remedy=\"set the label dockflare.enable=true\""), "{line}");
    }
    let off = name("off");
    run(&off, &[("dockflare.enable", "false"), ("dockflare.hostname", "off.example")]).await?;

    let hostname = format!("{}.example", name("shop"));
    let (first, second) = (name("shop-1"), name("shop-2"));
    for replica in [&first, &second] {
        let service = format!("http://{replica}:8080");
        let labels =
            [("dockflare.enable", "true"), ("dockflare.service", service.as_str()), ("dockflare.hostname", &hostname)];
        run(replica, &labels).await?;
    }
    let line = agent.wait_for_log(&format!("hostname={hostname}"), SOON).await?;
    ensure!(line.contains("INFO containers share a hostname: the master keeps one rule for it"), "{line}");
    ensure!(line.contains(&format!("containers=\"{first}, {second}\"")), "{line}");
    scene.unreachable(0).await?;

    // The agent logs this once, whatever happens around it.
    scope.restart(&bare, 0).await?;
    scope.restart(&second, 0).await?;
    let after = scene.run("after", "http://{}:8080", network).await?;
    agent.wait_for_log(&format!("the tunnel can reach the container name={after}"), SOON).await?;
    let log = agent.log();
    for once in [format!("makes no rule name={bare}"), format!("hostname={hostname}"), "is not enabled".to_owned()] {
        let own = log.lines().filter(|line| line.contains(&once) && scene.is_own(line)).count();
        ensure!(own == if once == "is not enabled" { 5 } else { 1 }, "{own} lines with {once}:\n{log}");
    }
    ensure!(!log.lines().any(|line| line.contains("not enabled") && line.contains(&off)), "{log}");
    scene.stage.assert_no_violations();
    Ok(())
}

async fn a_second_connector_is_told_by_its_token_or_by_the_tunnel_that_it_names() -> Result<()> {
    let scene = Scene::new().await?;
    let (stage, scope) = (&scene.stage, &scene.stage.scope);
    let tunnel = Tunnel::new(stage, "");
    let state =
        json!({ "token": tunnel.token, "id": tunnel.id, "name": scope.name("shop"), "desired_state": "running" });
    std::fs::write(stage.data.path().join("tunnel_state.json"), state.to_string())?;
    let agent = tunnel.agent(stage)?;
    agent.wait_for_log("tunnel ready", SOON).await?;

    let image = setting(stage, "CLOUDFLARED_IMAGE");
    let by_token = async |name: &str, token: &str| {
        let env = [("TUNNEL_TOKEN", token)];
        scope.run(Spec { image: &image, name, env: &env, args: &COMMAND, ..Spec::default() }).await
    };
    let (other, rival, likely) = (scope.name("other"), scope.name("rival"), scope.name("shop"));
    by_token(&other, &testkit::token(&scope.name("other-id"), "")).await?;
    by_token(&rival, &testkit::token(&tunnel.id, "")).await?;
    let told = |name: &str, runs: &str| {
        format!(
            "another container {runs} a connector of the same tunnel name={name} image={image}; visitors are led to both and see errors now and then: remove it with docker rm -f {name}"
        )
    };
    let certain = told(&rival, "runs");
    let line = agent.wait_for_log(&certain, SOON).await?;
    ensure!(line.contains("WARN"), "{line}");
    scene.connectors(&[&rival]).await?;

    // With the token in a file, only the container's name gives it away.
    let file = stage.data.path().join("token-of-the-rival");
    std::fs::write(&file, testkit::token(&tunnel.id, ""))?;
    let host = models::HostConfig { binds: Some(vec![format!("{}:/token:ro", file.display())]), ..Default::default() };
    let args = ["tunnel", "run", "--token-file", "/token"];
    let spec = Spec { image: &image, name: &likely, args: &args, host, ..Spec::default() };
    scope.run(spec).await?;
    agent.wait_for_log(&told(&likely, "seems to run"), SOON).await?;
    ensure!(scene.count(&agent, &certain) == 1 && scene.count(&agent, &other) == 0, "{}", agent.log());

    scope.rm(&likely).await?;
    scope.stop(&rival, 0).await?;
    scene.connectors(&[]).await?;
    let mark = agent.mark();
    scope.start(&rival).await?;
    agent.wait_for_log_after(mark, &certain, SOON).await?;
    stage.assert_no_violations();
    Ok(())
}

/// Returns the networks of the stage's tunnel container.
async fn networks(stage: &Stage) -> Result<Vec<String>> {
    let found = stage.scope.inspect(&stage.tunnel).await?.network_settings.and_then(|settings| settings.networks);
    let mut names: Vec<_> = found.unwrap_or_default().into_keys().collect();
    names.sort();
    Ok(names)
}

async fn with_auto_connect_the_tunnel_joins_a_workloads_network_and_does_so_again_after_a_replacement() -> Result<()> {
    let mut scene = Scene::new().await?;
    scene.stage.set("AUTO_CONNECT_NETWORKS", "true");
    let app = scene.stage.scope.name("app");
    // Hide the host's other networks from the agent.
    let relay = Relay::start(Way::OneNetwork(app.clone(), None)).await?;
    scene.stage.set("DOCKER_HOST", relay.host_url());
    scene.stage.scope.create_network(&app).await?;
    let tunnel = Tunnel::new(&scene.stage, "");
    let agent = tunnel.agent_with_ready_tunnel(&scene.stage).await?;
    let apart = scene.run("apart", "http://{}:8080", &app).await?;
    agent.wait_for_log(&format!("network={app}"), SOON).await?;
    agent.wait_for_log(&format!("the tunnel can reach the container name={apart}"), SOON).await?;
    let mut expected = [app.clone(), scene.stage.network.clone()];
    expected.sort();
    ensure!(networks(&scene.stage).await? == expected);
    ensure!(scene.count(&agent, "cannot reach the container") == 0, "{}", agent.log());

    let before = scene.stage.scope.inspect(&scene.stage.tunnel).await?.id;
    let known = registered(&scene.stage).await?;
    scene.stage.master.push_commands(&known.id, vec![tunnel.restart()])?;
    wait_until("the replacement", 2 * SOON, async || {
        (scene.stage.scope.find(&scene.stage.tunnel).await.ok()??.id != before).then_some(())
    })
    .await?;
    ensure!(networks(&scene.stage).await? == expected, "before it took over");
    scene.unreachable(0).await?;

    // The tunnel leaves the network when the last container that needs it is gone, even under an agent that started
    // after the tunnel joined. A network that was connected by hand stays.
    let by_hand = scene.stage.scope.name("hand");
    scene.stage.scope.create_network(&by_hand).await?;
    scene.stage.scope.connect(&by_hand, &scene.stage.tunnel).await?;
    agent.sigkill()?;
    let agent = tunnel.agent(&scene.stage)?;
    agent.wait_for_log(&format!("the tunnel can reach the container name={apart}"), SOON).await?;
    scene.stage.scope.rm(&apart).await?;
    agent.wait_for_log("disconnected the tunnel from a network that no labelled container needs", 2 * SOON).await?;
    let mut expected = [by_hand, scene.stage.network.clone()];
    expected.sort();
    ensure!(networks(&scene.stage).await? == expected, "{:?}", networks(&scene.stage).await?);
    scene.stage.scope.remove_network(&app).await
}

async fn behind_a_proxy_that_connects_and_does_not_disconnect_that_is_said_once_with_what_does_it() -> Result<()> {
    let mut scene = Scene::new().await?;
    scene.stage.set("AUTO_CONNECT_NETWORKS", "true");
    let scope = Scope::new(testkit::docker()?);
    let proxy = scope.socket_proxy(&[&PROXY_OPENS[..], &[("KEEPS_CONNECTED", "1")]].concat()).await?;
    let app = scene.stage.scope.name("app");
    let relay = Relay::start(Way::OneNetwork(app.clone(), Some(proxy.address().to_owned()))).await?;
    scene.stage.set("DOCKER_HOST", relay.host_url());
    scene.stage.scope.create_network(&app).await?;
    let tunnel = Tunnel::new(&scene.stage, "");
    let agent = tunnel.agent_with_ready_tunnel(&scene.stage).await?;
    let apart = scene.run("apart", "http://{}:8080", &app).await?;
    agent.wait_for_log(&format!("the tunnel can reach the container name={apart}"), SOON).await?;
    scene.stage.scope.rm(&apart).await?;
    let refused = "disconnecting the tunnel from a network that nobody needs:";
    let line = agent.wait_for_log(refused, 2 * SOON).await?;
    let command = format!("docker network disconnect {app} {}", scene.stage.tunnel);
    ensure!(line.contains("WARN") && line.contains("NETWORKS=1") && line.contains(&command), "{line}");

    // The tunnel goes on and serves the next container of that network, and the agent does not keep asking.
    let again = scene.run("again", "http://{}:8080", &app).await?;
    agent.wait_for_log(&format!("the tunnel can reach the container name={again}"), SOON).await?;
    scene.stage.scope.rm(&again).await?;
    let known = registered(&scene.stage).await?;
    let enough = known.complete_reports + 3;
    let later = |known: &Snapshot| known.only_agent().filter(|agent| agent.complete_reports >= enough).map(drop);
    scene.stage.master.wait_for("three more reports", 2 * SOON, later).await?;
    scope.stop(proxy.container(), 5).await?;
    let asked = scope.logs(proxy.container()).await?.lines().filter(|line| line.contains("/disconnect")).count();
    ensure!(asked == 1, "asked {asked} times");
    ensure!(agent.log().matches(refused).count() == 1, "said more than once:\n{}", agent.log());
    drop(agent);
    scene.stage.scope.rm(&scene.stage.tunnel).await?;
    scene.stage.scope.remove_network(&app).await
}
