//! Tests the agent behind a real HAProxy that allows only what the agent needs.

use anyhow::{Context, Result, ensure};
use dockflare_dev_master::{Agent, Protocol};
use testkit::bollard::query_parameters::{RemoveImageOptions, TagImageOptions};
use testkit::{AgentProcess, Case, PROXY_OPENS, Proxy, Scope, case, images, wait_until};

use crate::support::relay::{REFUSAL, Relay, Way};
use crate::support::{SOON, Stage};

pub(crate) fn cases() -> Vec<Case> {
    let mut cases = testkit::cases![
        the_log_names_images_when_the_image_is_missing_and_may_not_be_pulled,
        a_network_that_may_not_be_made_is_asked_for_with_the_command,
        a_proxy_that_dies_does_not_touch_the_tunnel,
    ];
    for protocol in [Protocol::V1, Protocol::V2] {
        let name = format!("{protocol}_master_from_enrolment_to_sigterm_through_a_socket_proxy");
        cases.push(case(name, move || from_enrolment_to_sigterm(protocol)));
    }
    // The variable, the remedy in the log, and the protocol: the agent reports different things to v1 and v2 masters.
    for (variable, needs, protocol) in [
        ("CONTAINERS", "the socket proxy needs CONTAINERS=1", Protocol::V1),
        ("CONTAINERS", "the socket proxy needs CONTAINERS=1", Protocol::V2),
        ("EVENTS", "the socket proxy needs EVENTS=1", Protocol::V2),
        ("NETWORKS", "the socket proxy needs NETWORKS=1", Protocol::V2),
        ("POST", "and POST=1", Protocol::V2),
    ] {
        let name = format!("{protocol}_master_without_{variable}_the_log_says_so_and_setting_it_needs_no_restart");
        cases.push(case(name, move || until_it_is_set(variable, needs, protocol)));
    }
    cases
}

/// Returns [`PROXY_OPENS`] with this variable set to 0.
pub(crate) fn without(missing: &str) -> Vec<(&str, &str)> {
    PROXY_OPENS.iter().map(|&(name, value)| (name, if name == missing { "0" } else { value })).collect()
}

/// Returns the container's id and the time of its last start.
async fn life(stage: &Stage) -> Result<(Option<String>, Option<String>)> {
    let found = stage.scope.inspect(&stage.tunnel).await?;
    Ok((found.id, found.state.and_then(|state| state.started_at)))
}

async fn known_to_run(stage: &Stage, id: &str, runs: bool) -> Result<Agent> {
    let what = if runs { "the container to be known" } else { "the container to be forgotten" };
    let right = |agent: &&Agent| agent.containers.contains_key(id) == runs;
    stage.master.wait_for(what, SOON, |known| known.only_agent().filter(right).cloned()).await
}

/// Checks that a workload's start and stop reach the master.
async fn events_arrive(stage: &Stage) -> Result<()> {
    let id = stage.scope.run_workload(&[("dockflare.enable", "true")], &[], None, false).await?;
    known_to_run(stage, &id, true).await?;
    stage.scope.stop(&id, 0).await?;
    let known = known_to_run(stage, &id, false).await?;
    ensure!((known.starts_of(&id), known.stops_of(&id)) == (1, 1));
    Ok(())
}

async fn stops_with_its_tunnel(stage: &Stage, agent: &mut AgentProcess) -> Result<()> {
    agent.sigterm()?;
    assert_eq!(agent.wait_exit(SOON).await?.code(), Some(0));
    assert_eq!(stage.scope.status(&stage.tunnel).await?, "gone");
    stage.tunnel_is("stopped").await?;
    stage.assert_no_violations();
    Ok(())
}

async fn from_enrolment_to_sigterm(protocol: Protocol) -> Result<()> {
    let mut stage = Stage::new(protocol).await?;
    let scope = Scope::new(testkit::docker()?);
    let proxy = scope.socket_proxy(&PROXY_OPENS).await?;
    stage.set("DOCKER_HOST", proxy.host_url());
    let mut agent = stage.agent()?;
    let known = stage.enrolled_agent("edge").await?;
    agent.wait_for_log("tunnel ready", SOON).await?;
    let status = stage.tunnel_is("running").await?.tunnel_status.context("no status")?;
    assert_eq!((status.name.as_deref(), status.version.as_deref()), (Some("edge"), Some("2025.9.0")));
    events_arrive(&stage).await?;

    let (before, mark) = (life(&stage).await?, agent.mark());
    stage.master.redeploy(&known.id)?;
    agent.wait_for_log_after(mark, "tunnel ready", SOON).await?;
    assert_ne!(life(&stage).await?.0, before.0);
    stops_with_its_tunnel(&stage, &mut agent).await?;
    // HAProxy logs a request at its end, and the event stream ended last.
    let asked = wait_until("the log of the proxy", SOON, async || {
        scope.logs(proxy.container()).await.ok().filter(|log| log.contains("/events"))
    })
    .await?;
    assert!(!asked.contains("/exec"), "{asked}");
    Ok(())
}

/// Checks that one line names what is missing, and that only the proxy must change.
async fn until_it_is_set(variable: &str, needs: &str, protocol: Protocol) -> Result<()> {
    let mut stage = Stage::new(protocol).await?;
    let scope = Scope::new(testkit::docker()?);
    let narrow: Proxy = scope.socket_proxy(&without(variable)).await?;
    let wide: Proxy = scope.socket_proxy(&PROXY_OPENS).await?;
    let relay = Relay::start(Way::Proxy(narrow.address().to_owned())).await?;
    stage.set("DOCKER_HOST", relay.host_url());
    let mut agent = stage.agent()?;
    stage.enrolled_agent("edge").await?;
    let line = agent.wait_for_log(needs, SOON).await?;
    assert!(
        line.contains(&format!("{variable}=1")) && line.contains("WARN") && line.contains("trying again"),
        "{line}"
    );
    if ["CONTAINERS", "EVENTS"].contains(&variable) {
        // The agent must not report what it cannot know.
        let unsure =
            |agent: &&Agent| if agent.protocol == 1 { agent.heartbeats > 0 } else { agent.incomplete_reports > 0 };
        let what = "the agent to say that it does not know";
        let known = stage.master.wait_for(what, SOON, |known| known.only_agent().filter(unsure).cloned()).await?;
        assert_eq!(known.complete_reports, 0);
    }

    relay.switch(Way::Proxy(wide.address().to_owned()));
    agent.wait_for_log("tunnel ready", SOON).await?;
    stage.tunnel_is("running").await?;
    events_arrive(&stage).await?;
    stops_with_its_tunnel(&stage, &mut agent).await
}

async fn the_log_names_images_when_the_image_is_missing_and_may_not_be_pulled() -> Result<()> {
    let stand_in = images().stand_in_with(&[("STAND_IN_DRAIN", "300")]).await?;
    let mut stage = Stage::with_image(Protocol::V2, stand_in.clone()).await?;
    let (repository, tag) = (format!("dockflare-test/absent-{}", stage.scope.suffix()), "1");
    let absent = format!("{repository}:{tag}");
    stage.set("CLOUDFLARED_IMAGE", absent.clone());
    let scope = Scope::new(testkit::docker()?);
    let narrow = scope.socket_proxy(&without("IMAGES")).await?;
    let wide = scope.socket_proxy(&PROXY_OPENS).await?;
    let relay = Relay::start(Way::Proxy(narrow.address().to_owned())).await?;
    stage.set("DOCKER_HOST", relay.host_url());
    let mut agent = stage.agent()?;
    stage.enrolled_agent("edge").await?;
    let line = agent.wait_for_log("IMAGES=1", SOON).await?;
    assert!(line.contains("WARN") && line.contains(&absent), "{line}");

    relay.switch(Way::Proxy(wide.address().to_owned()));
    let options = TagImageOptions { repo: Some(repository), tag: Some(tag.to_owned()) };
    stage.scope.docker().tag_image(&stand_in, Some(options)).await?;
    let ended = async {
        agent.wait_for_log("tunnel ready", 2 * SOON).await?;
        stops_with_its_tunnel(&stage, &mut agent).await
    };
    let ended = ended.await;
    stage.scope.docker().remove_image(&absent, None::<RemoveImageOptions>, None).await?;
    ended
}

async fn a_network_that_may_not_be_made_is_asked_for_with_the_command() -> Result<()> {
    let mut stage = Stage::new(Protocol::V2).await?;
    let relay = Relay::start(Way::Answer { line: "/networks/create", with: REFUSAL }).await?;
    stage.set("DOCKER_HOST", relay.host_url());
    let mut agent = stage.agent()?;
    stage.enrolled_agent("edge").await?;
    let command = format!("docker network create {}", stage.network);
    let line = agent.wait_for_log(&command, SOON).await?;
    assert!(line.contains("NETWORKS=1 and POST=1"), "{line}");
    let status = stage.tunnel_is("error").await?.tunnel_status.context("no status")?;
    assert_eq!(status.event["reason"], "network_missing");
    // The operator follows the log's advice.
    stage.scope.create_network(&stage.network).await?;
    agent.wait_for_log("tunnel ready", SOON).await?;
    stops_with_its_tunnel(&stage, &mut agent).await
}

async fn a_proxy_that_dies_does_not_touch_the_tunnel() -> Result<()> {
    let mut stage = Stage::new(Protocol::V2).await?;
    let scope = Scope::new(testkit::docker()?);
    let proxy = scope.socket_proxy(&PROXY_OPENS).await?;
    stage.set("DOCKER_HOST", proxy.host_url());
    let mut agent = stage.agent()?;
    stage.enrolled_agent("edge").await?;
    stage.tunnel_is("running").await?;
    let before = life(&stage).await?;

    proxy.kill().await?;
    agent.wait_for_log("Docker cannot be reached", SOON).await?;
    let unseen = stage.scope.run_workload(&[("dockflare.enable", "true")], &[], None, false).await?;
    proxy.restart().await?;
    known_to_run(&stage, &unseen, true).await?;
    events_arrive(&stage).await?;
    assert_eq!(life(&stage).await?, before);
    // cloudflared was ready all along.
    let told = stage.master.requests();
    let mut told = told.iter().filter(|request| request.event() == Some("tunnel_status"));
    let told_after = told.by_ref().skip_while(|request| request.body["status"] != "running");
    let other: Vec<_> = told_after.filter(|request| request.body["status"] != "running").collect();
    assert!(other.is_empty(), "{other:?}");
    stops_with_its_tunnel(&stage, &mut agent).await
}
