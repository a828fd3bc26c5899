//! Tests what the tunnel container is made of, what starts it, and what the agent reports of it.

use anyhow::{Context, Result, ensure};
use dockflare_dev_master::Protocol;
use serde_json::json;
use testkit::{Case, models, wait_until};

use crate::containers_scene::{COMMAND, Life, SPEC_LABEL, Tunnel, on_both, registered, told, two_more_polls};
use crate::support::{SOON, Stage};

pub(crate) fn cases() -> Vec<Case> {
    let mut cases = testkit::cases![
        the_container_can_do_as_little_as_cloudflared_needs,
        a_missing_network_is_made_with_a_label_that_says_whose_it_is,
        two_networks_of_the_name_are_an_error_with_a_remedy_until_one_is_removed,
        an_image_that_cannot_be_had_is_an_error_with_a_remedy,
        a_running_tunnel_goes_on_when_its_new_image_cannot_be_had,
        a_stop_is_obeyed_while_the_pull_of_another_image_hangs,
        a_tunnel_of_a_python_agents_state_file_starts_before_the_master_answers,
    ];
    cases.extend(on_both("a_tunnel_in_the_state_file_starts_while_the_master_is_away", starts_without_master));
    cases.extend(on_both("a_new_tunnel_is_starting_and_then_running", starting_then_running));
    cases.extend(on_both("a_tunnel_without_connections_is_degraded_until_it_has_them_again", degraded));
    cases.extend(on_both("a_token_that_cloudflared_does_not_take_is_stopped_until_another_one_comes", bad_token));
    cases
}

async fn the_container_can_do_as_little_as_cloudflared_needs() -> Result<()> {
    let stage = Stage::new(Protocol::V2).await?;
    let tunnel = Tunnel::new(&stage, "");
    let _agent = tunnel.agent_with_ready_tunnel(&stage).await?;
    tunnel.container(&stage).await?;
    let found = stage.scope.inspect(&stage.tunnel).await?;
    let (config, host) = (found.config.context("config")?, found.host_config.context("host config")?);
    assert_eq!(host.cap_drop, Some(vec!["ALL".to_owned()]));
    assert_eq!(host.cap_add.unwrap_or_default(), Vec::<String>::new());
    assert_eq!(host.privileged, Some(false));
    assert_eq!(host.security_opt, Some(vec!["no-new-privileges:true".to_owned()]));
    assert_eq!(host.readonly_rootfs, Some(true));
    assert!((1..=4096).contains(&host.pids_limit.unwrap_or_default()), "{:?}", host.pids_limit);
    assert_eq!(host.binds.unwrap_or_default(), Vec::<String>::new());
    assert!(host.mounts.unwrap_or_default().is_empty() && host.port_bindings.unwrap_or_default().is_empty());
    let policy = host.restart_policy.context("restart policy")?.name;
    assert_eq!(policy, Some(models::RestartPolicyNameEnum::UNLESS_STOPPED));
    let log = host.log_config.context("log config")?;
    assert_eq!(log.typ.as_deref(), Some("json-file"));
    let rotation = log.config.unwrap_or_default();
    assert!(rotation.contains_key("max-size") && rotation.contains_key("max-file"), "{rotation:?}");

    let labels = config.labels.unwrap_or_default();
    let label = |key: &str| labels.get(key).map(String::as_str);
    assert_eq!(label("com.dockflare.agent.owner"), Some("dockflare-agent"));
    assert_eq!(label("com.dockflare.agent.tunnel-id"), Some(tunnel.id.as_str()));
    assert_eq!(label(SPEC_LABEL).map(str::len), Some(64));
    assert_eq!(config.cmd, Some(COMMAND.map(str::to_owned).to_vec()));
    assert!(config.stop_timeout > Some(30), "above cloudflared's grace: {:?}", config.stop_timeout);
    let env = config.env.unwrap_or_default();
    let ours: Vec<_> = env.iter().filter_map(|entry| entry.strip_prefix("TUNNEL_")).collect();
    assert_eq!(ours.len(), 2, "nothing but the token and the metrics");
    assert!(ours.contains(&"METRICS=0.0.0.0:20241"));
    let check = config.healthcheck.and_then(|check| check.test).unwrap_or_default();
    assert_eq!(check.join(" "), "CMD cloudflared tunnel --metrics 127.0.0.1:20241 ready");
    wait_until("Docker's own check", SOON, async || {
        (stage.scope.health(&stage.tunnel).await.ok()? == "healthy").then_some(())
    })
    .await
}

async fn a_missing_network_is_made_with_a_label_that_says_whose_it_is() -> Result<()> {
    let stage = Stage::new(Protocol::V1).await?;
    let tunnel = Tunnel::new(&stage, "");
    let agent = tunnel.agent_with_ready_tunnel(&stage).await?;
    agent.wait_for_log("created the tunnel network", SOON).await?;
    let network = stage.scope.docker().inspect_network(&stage.network, None).await?;
    let labels = network.labels.unwrap_or_default();
    assert_eq!(labels.get("com.dockflare.agent.owner").map(String::as_str), Some("dockflare-agent"));
    assert_eq!(network.driver.as_deref(), Some("bridge"));
    Ok(())
}

async fn two_networks_of_the_name_are_an_error_with_a_remedy_until_one_is_removed() -> Result<()> {
    let stage = Stage::new(Protocol::V2).await?;
    stage.scope.create_network(&stage.network).await?;
    // Engine 25 and later refuse a second network of the same name.
    let Ok(second) = stage.scope.create_network(&stage.network).await else { return Ok(()) };
    let tunnel = Tunnel::new(&stage, "");
    tunnel.store(&stage)?;
    let agent = tunnel.agent(&stage)?;
    let line = agent.wait_for_log("ambiguous", SOON).await?;
    ensure!(line.contains(&stage.network) && line.contains("docker network rm"), "{line}");
    told(&stage, "error", Some("network_ambiguous")).await?;
    stage.scope.remove_network(&second).await?;
    agent.wait_for_log("tunnel ready", SOON).await?;
    told(&stage, "running", None).await?;
    tunnel.container(&stage).await.map(drop)
}

/// Returns an image whose registry address nobody listens at, so that a pull fails at once.
fn missing_image(stage: &Stage) -> String {
    format!("127.0.0.1:1/cloudflared:{}", stage.scope.suffix())
}

async fn an_image_that_cannot_be_had_is_an_error_with_a_remedy() -> Result<()> {
    let mut stage = Stage::new(Protocol::V2).await?;
    let image = missing_image(&stage);
    stage.set("CLOUDFLARED_IMAGE", image.clone());
    let tunnel = Tunnel::new(&stage, "");
    tunnel.store(&stage)?;
    let agent = tunnel.agent(&stage)?;
    let line = agent.wait_for_log("is not on this host", SOON).await?;
    ensure!(line.contains(&image) && line.contains("CLOUDFLARED_IMAGE") && line.contains("docker load"), "{line}");
    told(&stage, "error", Some("image_unavailable")).await?;
    assert_eq!(stage.scope.status(&stage.tunnel).await?, "gone");
    Ok(())
}

async fn a_running_tunnel_goes_on_when_its_new_image_cannot_be_had() -> Result<()> {
    let mut stage = Stage::new(Protocol::V2).await?;
    let tunnel = Tunnel::new(&stage, "");
    let mut first = tunnel.agent_with_ready_tunnel(&stage).await?;
    let before = tunnel.container(&stage).await?;
    first.sigkill()?;
    first.wait_exit(SOON).await?;
    let env = stage.env.clone();
    stage.set("CLOUDFLARED_IMAGE", missing_image(&stage));
    let agent = tunnel.agent(&stage)?;
    agent.wait_for_log("is not on this host", SOON).await?;
    told(&stage, "running", Some("image_unavailable")).await?;
    two_more_polls(&stage).await?;
    stage.env = env;
    assert_eq!(tunnel.container(&stage).await?, before);
    Ok(())
}

async fn a_stop_is_obeyed_while_the_pull_of_another_image_hangs() -> Result<()> {
    let mut stage = Stage::new(Protocol::V2).await?;
    let tunnel = Tunnel::new(&stage, "");
    let mut first = tunnel.agent_with_ready_tunnel(&stage).await?;
    let before = tunnel.container(&stage).await?;
    first.sigkill()?;
    first.wait_exit(SOON).await?;
    // A registry that accepts the connection and never answers.
    let registry = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    stage.set("CLOUDFLARED_IMAGE", format!("{}/cloudflared:1", registry.local_addr()?));
    let agent = tunnel.agent(&stage)?;
    agent.wait_for_log("pulling the cloudflared image", SOON).await?;
    let _asked = tokio::time::timeout(SOON, registry.accept()).await??;
    assert_eq!(stage.scope.status(&before.id).await?, "running", "it goes on while the next one is fetched");
    let known = registered(&stage).await?;
    stage.master.push_commands(&known.id, vec![json!({ "action": "stop_tunnel" })])?;
    told(&stage, "stopped", None).await?;
    assert_eq!(stage.scope.status(&before.id).await?, "gone");
    Ok(())
}

async fn starts_without_master(protocol: Protocol) -> Result<()> {
    let stage = Stage::new(protocol).await?;
    let tunnel = Tunnel::new(&stage, "");
    stage.master.pause().await?;
    let _agent = tunnel.agent_with_ready_tunnel(&stage).await?;
    let before = tunnel.container(&stage).await?;
    stage.master.resume().await?;
    stage.tunnel_is("running").await?;
    two_more_polls(&stage).await?;
    assert_eq!(tunnel.container(&stage).await?, before);
    stage.assert_no_violations();
    Ok(())
}

async fn a_tunnel_of_a_python_agents_state_file_starts_before_the_master_answers() -> Result<()> {
    let stage = Stage::new(Protocol::V1).await?;
    let tunnel = Tunnel::new(&stage, "");
    // An agent that the master knows, with the files that the Python agent would have left.
    let mut first = stage.agent()?;
    let known = registered(&stage).await?;
    first.sigkill()?;
    first.wait_exit(SOON).await?;
    for entry in std::fs::read_dir(stage.data.path())? {
        std::fs::remove_file(entry?.path())?;
    }
    let state = format!(
        "{{\n  \"token\": \"{}\",\n  \"id\": \"{}\",\n  \"name\": \"edge\",\n  \"desired_state\": \"running\",\n  \"extra\": [1]\n}}\n",
        tunnel.token, tunnel.id
    );
    std::fs::write(stage.data.path().join("tunnel_state.json"), state)?;
    std::fs::write(stage.data.path().join("agent_id.txt"), format!("{}\n", known.id))?;
    stage.master.pause().await?;
    let mut agent = tunnel.agent(&stage)?;
    agent.wait_for_log("tunnel ready", SOON).await?;
    tunnel.container(&stage).await?;
    stage.master.resume().await?;
    let known_again = stage.tunnel_is("running").await?;
    assert_eq!((known_again.id.as_str(), known_again.registrations), (known.id.as_str(), 2));

    // And back: a command rewrites the file, and the Python agent must still be able to read it.
    stage.master.push_commands(&known.id, vec![json!({ "action": "stop_tunnel" })])?;
    stage.tunnel_is("stopped").await?;
    agent.sigterm()?;
    agent.wait_exit(SOON).await?;
    let state: serde_json::Value = serde_json::from_str(&stage.file("tunnel_state.json")?)?;
    let seen = ["token", "id", "name", "desired_state"].map(|key| state[key].as_str());
    assert_eq!(seen, [None, Some(tunnel.id.as_str()), Some("edge"), Some("stopped")]);
    assert_eq!(state["extra"], json!([1]), "what others keep there stays");
    assert_eq!(stage.file("agent_id.txt")?.trim(), known.id);
    Ok(())
}

/// Returns the statuses reported to the master, in order.
fn statuses(stage: &Stage) -> Vec<String> {
    let requests = stage.master.requests();
    let told = requests.iter().filter(|request| request.event() == Some("tunnel_status"));
    let mut statuses: Vec<_> = told.filter_map(|request| Some(request.body["status"].as_str()?.to_owned())).collect();
    statuses.dedup();
    statuses
}

async fn starting_then_running(protocol: Protocol) -> Result<()> {
    let stage = Stage::new(protocol).await?;
    let tunnel = Tunnel::new(&stage, "ready-after=1500 version=2099.1.0");
    let agent = tunnel.agent(&stage)?;
    let known = tunnel.enrol(&stage, &agent).await?;
    assert_eq!(statuses(&stage), ["stopped", "starting", "running"]);
    let status = known.tunnel_status.context("a status")?;
    assert_eq!((status.name.as_deref(), status.version.as_deref()), (Some("edge"), Some("2099.1.0")));
    stage.assert_no_violations();
    Ok(())
}

async fn degraded(protocol: Protocol) -> Result<()> {
    let stage = Stage::new(protocol).await?;
    let tunnel = Tunnel::new(&stage, "");
    let agent = tunnel.agent(&stage)?;
    tunnel.enrol(&stage, &agent).await?;
    let before = tunnel.container(&stage).await?;
    stage.scope.tell_stand_in(&stage.tunnel, &json!({ "unready": true })).await?;
    // Without a message from cloudflared the agent names no cause.
    told(&stage, "degraded", None).await?;
    stage.scope.tell_stand_in(&stage.tunnel, &json!({ "unready": null })).await?;
    told(&stage, "running", None).await?;
    stage.scope.tell_stand_in(&stage.tunnel, &json!({ "hang": true })).await?;
    told(&stage, "degraded", Some("hung")).await?;
    stage.scope.tell_stand_in(&stage.tunnel, &json!({ "hang": null })).await?;
    told(&stage, "running", None).await?;
    assert_eq!(tunnel.container(&stage).await?, before, "restarting it would not help");
    stage.assert_no_violations();
    Ok(())
}

async fn bad_token(protocol: Protocol) -> Result<()> {
    let stage = Stage::new(protocol).await?;
    let tunnel = Tunnel::new(&stage, "invalid-token");
    let mut agent = tunnel.agent(&stage)?;
    let known = registered(&stage).await?;
    stage.master.enroll_with(&known.id, "edge", &tunnel.id, &tunnel.token)?;
    told(&stage, "error", Some("token_malformed")).await?;
    agent.wait_for_log("has a token that cloudflared does not take", SOON).await?;
    wait_until("Docker to leave it alone", SOON, async || {
        (stage.scope.status(&stage.tunnel).await.ok()? == "exited").then_some(())
    })
    .await?;
    two_more_polls(&stage).await?;
    assert_eq!(stage.scope.status(&stage.tunnel).await?, "exited", "it waits for another token");
    assert!(!statuses(&stage).contains(&"running".to_owned()));
    // The next agent comes to the same result.
    agent.sigkill()?;
    agent.wait_exit(SOON).await?;
    let before = Life::now(&stage).await?;
    let second = tunnel.agent(&stage)?;
    second.wait_for_log("has a token that cloudflared does not take", SOON).await?;
    two_more_polls(&stage).await?;
    assert_eq!(Life::now(&stage).await?, before);
    // Another token ends the refusal.
    let good = Tunnel::new(&stage, "");
    stage.master.enroll_with(&known.id, "edge", &good.id, &good.token)?;
    second.wait_for_log("tunnel ready", SOON).await?;
    told(&stage, "running", None).await?;
    stage.assert_no_violations();
    Ok(())
}
