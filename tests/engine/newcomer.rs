//! Tests the first evening with the agent: whatever the user forgot, one log line at the default level names the
//! problem and the remedy.

use anyhow::{Context, Result, ensure};
use dockflare_dev_master::Protocol;
use serde_json::json;
use testkit::models::HostConfig;
use testkit::{AgentProcess, Case, Scope, Spec, images, wait_until};

use crate::support::relay::{REFUSAL, Relay, Way};
use crate::support::{SOON, Stage, agent_binary};

pub(crate) fn cases() -> Vec<Case> {
    testkit::cases![
        a_newcomer_without_a_key_is_told_where_to_get_one,
        a_newcomer_with_a_wrong_key_is_told_which_variable_to_set,
        a_newcomer_whose_master_is_down_is_told_what_to_check,
        a_newcomer_whose_proxy_lacks_a_permission_is_told_its_variable,
        a_newcomer_without_the_network_is_told_the_command,
        a_newcomer_without_the_image_is_told_what_to_check,
        a_newcomer_with_a_bad_token_is_told_where_to_get_another,
        a_newcomer_without_a_volume_and_with_localhost_for_the_master_is_told_both,
    ]
}

/// Makes a stage whose agents log at the level that users see.
async fn stage() -> Result<Stage> {
    let mut stage = Stage::new(Protocol::V2).await?;
    stage.set("LOG_LEVEL", "INFO");
    Ok(stage)
}

/// Checks that exactly one line has these words, that it is a warning or an error, and that it names the remedy.
async fn one_line(agent: &AgentProcess, words: &str, remedy: &str) -> Result<()> {
    let line = agent.wait_for_log(words, SOON).await?;
    ensure!(line.contains(remedy), "{remedy} is not in: {line}");
    ensure!(line.contains(" WARN ") || line.contains("ERROR "), "{line}");
    let log = agent.log();
    let lines = log.lines().filter(|line| line.contains(words)).count();
    ensure!(lines == 1, "{lines} lines with: {words}\n{log}");
    Ok(())
}

async fn a_newcomer_without_a_key_is_told_where_to_get_one() -> Result<()> {
    let mut stage = stage().await?;
    stage.set("DOCKFLARE_API_KEY", "");
    let mut agent = stage.agent()?;
    assert_eq!(agent.wait_exit(SOON).await?.code(), Some(64));
    let log = agent.log();
    let line = log.lines().find(|line| line.contains("DOCKFLARE_API_KEY is not set")).context(log.clone())?;
    ensure!(line.contains("generate a key on the master's Agents page"), "{line}");
    Ok(())
}

async fn a_newcomer_with_a_wrong_key_is_told_which_variable_to_set() -> Result<()> {
    let mut stage = stage().await?;
    stage.set("DOCKFLARE_API_KEY", "not-a-key");
    let agent = stage.agent()?;
    one_line(&agent, "refuses the agent key with 401", "set DOCKFLARE_API_KEY").await
}

async fn a_newcomer_whose_master_is_down_is_told_what_to_check() -> Result<()> {
    let mut stage = stage().await?;
    stage.set("DOCKFLARE_MASTER_URL", "http://127.0.0.1:9");
    let agent = stage.agent()?;
    one_line(&agent, "the master cannot be reached", "DOCKFLARE_MASTER_URL").await?;
    // The banner still appears, and says what the agent does not know.
    let banner = agent.wait_for_log("dockflare-agent runs", SOON).await?;
    ensure!(banner.contains("protocol=unknown") && banner.contains("master=http://127.0.0.1:9/"), "{banner}");
    Ok(())
}

async fn a_newcomer_whose_proxy_lacks_a_permission_is_told_its_variable() -> Result<()> {
    let mut stage = stage().await?;
    let scope = Scope::new(testkit::docker()?);
    let proxy = scope
        .socket_proxy(&[("CONTAINERS", "1"), ("EVENTS", "0"), ("NETWORKS", "1"), ("IMAGES", "1"), ("POST", "1")])
        .await?;
    stage.set("DOCKER_HOST", proxy.host_url());
    let agent = stage.agent()?;
    one_line(&agent, "refuses to listen to events", "the socket proxy needs EVENTS=1").await
}

async fn a_newcomer_without_the_network_is_told_the_command() -> Result<()> {
    let mut stage = stage().await?;
    let relay = Relay::start(Way::Answer { line: "/networks/create", with: REFUSAL }).await?;
    stage.set("DOCKER_HOST", relay.host_url());
    let agent = stage.agent()?;
    stage.enrolled_agent("edge").await?;
    one_line(&agent, "the tunnel has no network", &format!("docker network create {}", stage.network)).await
}

async fn a_newcomer_without_the_image_is_told_what_to_check() -> Result<()> {
    let mut stage = stage().await?;
    let absent = format!("localhost:9/dockflare-test/absent-{}:1", stage.scope.suffix());
    stage.set("CLOUDFLARED_IMAGE", absent);
    let agent = stage.agent()?;
    stage.enrolled_agent("edge").await?;
    one_line(&agent, "the tunnel has no image", "check CLOUDFLARED_IMAGE").await
}

async fn a_newcomer_with_a_bad_token_is_told_where_to_get_another() -> Result<()> {
    let stage = stage().await?;
    let agent = stage.agent()?;
    let known = stage.master.wait_for("an agent", SOON, |known| known.only_agent().cloned()).await?;
    let bad = json!({ "action": "start_tunnel", "tunnel_name": "edge", "tunnel_id": "t", "token": "%%%" });
    stage.master.push_commands(&known.id, vec![bad])?;
    one_line(&agent, "refusing a tunnel command", "enrol the agent again on the master's page").await
}

async fn a_newcomer_without_a_volume_and_with_localhost_for_the_master_is_told_both() -> Result<()> {
    let mut stage = stage().await?;
    stage.set("DOCKFLARE_MASTER_URL", "http://localhost:9");
    for name in ["DOCKFLARE_DATA_DIR", "DOCKER_HOST"] {
        stage.set(name, "");
    }
    let image = images().agent(&agent_binary()).await?;
    let env: Vec<_> = stage.env.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
    stage.scope.create_network(&stage.network).await?;
    let spec = Spec {
        image: &image,
        env: &env,
        network: Some(&stage.network),
        host: HostConfig::default(),
        ..Spec::default()
    };
    let id = stage.scope.run(spec).await?;
    for (words, remedy) in [
        ("the data folder is on no volume", "mount a volume there"),
        ("localhost is the agent's own container", "host.docker.internal"),
    ] {
        let found = wait_until(words, SOON, async || {
            let log = stage.scope.logs(&id).await.ok()?;
            log.lines().find(|line| line.contains(words)).map(str::to_owned)
        });
        let line = found.await?;
        ensure!(line.contains(remedy) && line.contains(" WARN "), "{line}");
    }
    Ok(())
}
