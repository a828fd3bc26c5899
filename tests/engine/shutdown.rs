//! Tests the agent's shutdown as a process: what it waits for, what it does not wait for, and what it leaves.

use std::time::Duration;

use anyhow::{Result, ensure};
use dockflare_dev_master::{Fault, Protocol, Route, Times};
use serde_json::json;
use testkit::{AgentProcess, Case, Signal, wait_until};
use tokio::net::TcpListener;
use tokio::time::Instant;

use crate::containers_scene::{Story, Tunnel, registered, setting, told, two_more_polls};
use crate::support::{SOON, Stage, agent_binary, complaints};

/// Docker's default time limit for a container to stop.
const DOCKERS_PATIENCE: Duration = Duration::from_secs(10);

pub(crate) fn cases() -> Vec<Case> {
    testkit::cases![
        sigterm_ends_the_agent_with_0_and_takes_the_tunnel_with_it,
        sigint_ends_the_agent_with_0_and_takes_the_tunnel_with_it,
        sigterm_leaves_the_tunnel_where_it_shall_be_kept,
        sigterm_waits_for_the_drain_and_says_so,
        a_second_signal_ends_the_agent_at_once_while_cloudflared_drains,
        sigterm_while_the_tunnel_is_being_made_leaves_no_container,
        sigterm_while_the_tunnel_is_being_replaced_does_not_cut_the_drain_short,
        sigterm_does_not_wait_for_a_master_that_is_away,
        sigterm_does_not_wait_for_a_master_that_never_answers,
        sigterm_does_not_wait_for_a_docker_that_is_away,
        sigterm_does_not_wait_for_a_pull_that_hangs,
        sigterm_does_not_wait_for_an_image_that_cannot_be_had,
        sigterm_after_a_stop_by_command_finds_nothing_to_remove,
        an_invalid_configuration_is_exit_64_with_all_errors_and_no_secret,
        a_data_folder_that_cannot_be_one_is_exit_73,
        two_agents_with_containers_of_their_own_do_not_disturb_each_other,
    ]
}

/// Makes a stage whose agents remove the tunnel when they stop, instead of leaving it to their socket proxy.
async fn at_once(protocol: Protocol) -> Result<Stage> {
    let mut stage = Stage::new(protocol).await?;
    stage.set("TUNNEL_LEASE_SECONDS", "0");
    Ok(stage)
}

/// Sends the signal and waits for the agent to end, with code 0 and before Docker would kill it.
async fn end(agent: &mut AgentProcess, signal: Signal) -> Result<()> {
    agent.signal(signal)?;
    assert_eq!(agent.wait_exit(DOCKERS_PATIENCE).await?.code(), Some(0));
    Ok(())
}

async fn ends_and_takes_the_tunnel(protocol: Protocol, signal: Signal) -> Result<()> {
    let stage = at_once(protocol).await?;
    let tunnel = Tunnel::new(&stage, "");
    let mut agent = tunnel.agent_with_ready_tunnel(&stage).await?;
    stage.tunnel_is("running").await?;
    end(&mut agent, signal).await?;
    assert_eq!(stage.scope.status(&stage.tunnel).await?, "gone");
    told(&stage, "stopped", Some("agent_stopped")).await?;
    assert!(agent.log().contains("tunnel stopped and removed") && agent.log().contains("dockflare-agent stopped"));
    assert!(stage.file("tunnel_state.json")?.contains("running"), "the next start is to bring it back");
    stage.assert_no_violations();
    Ok(())
}

async fn sigterm_ends_the_agent_with_0_and_takes_the_tunnel_with_it() -> Result<()> {
    ends_and_takes_the_tunnel(Protocol::V1, Signal::TERM).await
}

async fn sigint_ends_the_agent_with_0_and_takes_the_tunnel_with_it() -> Result<()> {
    ends_and_takes_the_tunnel(Protocol::V2, Signal::INT).await
}

async fn sigterm_leaves_the_tunnel_where_it_shall_be_kept() -> Result<()> {
    let mut stage = at_once(Protocol::V2).await?;
    stage.set("TUNNEL_ON_EXIT", "keep");
    let tunnel = Tunnel::new(&stage, "");
    let mut agent = tunnel.agent_with_ready_tunnel(&stage).await?;
    stage.tunnel_is("running").await?;
    let before = tunnel.container(&stage).await?;
    end(&mut agent, Signal::TERM).await?;
    assert_eq!(tunnel.container(&stage).await?, before);
    told(&stage, "running", None).await?;
    Ok(())
}

async fn sigterm_waits_for_the_drain_and_says_so() -> Result<()> {
    let stage = at_once(Protocol::V2).await?;
    let tunnel = Tunnel::new(&stage, "drain=3500");
    let mut agent = tunnel.agent_with_ready_tunnel(&stage).await?;
    let story = Story::follow(&stage);
    end(&mut agent, Signal::TERM).await?;
    ensure!(agent.log().contains("waiting for cloudflared to drain its requests"), "it says what it waits for");
    assert_eq!(stage.scope.status(&stage.tunnel).await?, "gone");
    wait_until("the end of the container", SOON, async || (story.count("destroy") == 1).then_some(())).await?;
    assert_eq!(story.exit_codes(), ["0"], "not killed in the middle");
    Ok(())
}

async fn a_second_signal_ends_the_agent_at_once_while_cloudflared_drains() -> Result<()> {
    let stage = at_once(Protocol::V2).await?;
    let tunnel = Tunnel::new(&stage, "drain=20000");
    let mut first = tunnel.agent_with_ready_tunnel(&stage).await?;
    first.sigterm()?;
    first.wait_for_log("waiting for cloudflared to drain its requests", SOON).await?;
    let asked = Instant::now();
    first.sigterm()?;
    assert_eq!(first.wait_exit(SOON).await?.code(), Some(0));
    ensure!(asked.elapsed() < Duration::from_secs(5), "took {:?}", asked.elapsed());
    ensure!(first.log().contains("asked to stop a second time"));
    assert_eq!(stage.scope.status(&stage.tunnel).await?, "running", "still draining");

    let second = Tunnel::new(&stage, "");
    second.store(&stage)?;
    let agent = second.agent(&stage)?;
    agent.wait_for_log("replacing the tunnel container", SOON).await?;
    second.container(&stage).await?;
    Ok(())
}

async fn sigterm_while_the_tunnel_is_being_made_leaves_no_container() -> Result<()> {
    let stage = at_once(Protocol::V2).await?;
    stage.scope.create_network(&stage.network).await?;
    let tunnel = Tunnel::new(&stage, "");
    tunnel.store(&stage)?;
    // These hit before, during and after the creation and the start, depending on this machine.
    for millis in [0, 8, 16, 32, 64, 128, 512] {
        let mut agent = tunnel.agent(&stage)?;
        agent.wait_for_log("starting the tunnel", SOON).await?;
        tokio::time::sleep(Duration::from_millis(millis)).await;
        agent.sigterm()?;
        // A signal that arrives before PID 1 has a handler is lost. Then Docker's timeout ends the container.
        let ended = agent.wait_exit(Duration::from_secs(60)).await?;
        assert_eq!(ended.code(), Some(0));
        assert_eq!(stage.scope.status(&stage.tunnel).await?, "gone", "{millis} ms after it was begun");
        // Once Docker has made and run another container, it has also finished any late work.
        stage.scope.run_workload(&[], &["exit", "0"], None, true).await?;
        assert_eq!(stage.scope.status(&stage.tunnel).await?, "gone", "{millis} ms after it was begun, and late");
    }
    Ok(())
}

async fn sigterm_while_the_tunnel_is_being_replaced_does_not_cut_the_drain_short() -> Result<()> {
    let stage = at_once(Protocol::V1).await?;
    let tunnel = Tunnel::new(&stage, "drain=3000");
    let mut agent = tunnel.agent_with_ready_tunnel(&stage).await?;
    let known = registered(&stage).await?;
    let story = Story::follow(&stage);
    stage.master.push_commands(&known.id, vec![tunnel.restart()])?;
    agent.wait_for_log("replacing the tunnel container", SOON).await?;
    wait_until("the drain", SOON, async || (story.count("kill") == 1).then_some(())).await?;
    end(&mut agent, Signal::TERM).await?;
    assert_eq!(stage.scope.status(&stage.tunnel).await?, "gone");
    wait_until("the end of the container", SOON, async || (story.count("destroy") > 0).then_some(())).await?;
    // The successor may or may not have the name by then.
    let codes = story.exit_codes();
    ensure!(codes.iter().all(|code| code == "0"), "a second signal would have ended it at once: {codes:?}");
    assert_eq!(stage.scope.status(&format!("{}-next", stage.tunnel)).await?, "gone");
    Ok(())
}

async fn sigterm_does_not_wait_for_a_master_that_is_away() -> Result<()> {
    let stage = at_once(Protocol::V2).await?;
    let tunnel = Tunnel::new(&stage, "");
    let mut agent = tunnel.agent_with_ready_tunnel(&stage).await?;
    stage.tunnel_is("running").await?;
    stage.master.pause().await?;
    agent.wait_for_log("the master", SOON).await?;
    end(&mut agent, Signal::TERM).await?;
    assert_eq!(stage.scope.status(&stage.tunnel).await?, "gone");

    // Nor for a master that was never there.
    let mut agent = tunnel.agent_with_ready_tunnel(&stage).await?;
    end(&mut agent, Signal::TERM).await?;
    assert_eq!(stage.scope.status(&stage.tunnel).await?, "gone");
    Ok(())
}

async fn sigterm_does_not_wait_for_a_master_that_never_answers() -> Result<()> {
    let stage = at_once(Protocol::V1).await?;
    let tunnel = Tunnel::new(&stage, "");
    let mut agent = tunnel.agent_with_ready_tunnel(&stage).await?;
    stage.tunnel_is("running").await?;
    stage.master.fault(Route::Any, Fault::Hold, Times::UntilCleared);
    // The agent polls each second: after 2 s of silence it is waiting for an answer.
    wait_until("a request to be held", SOON, async || {
        let quiet = jiff::Timestamp::now().duration_since(registered(&stage).await.ok()?.last_seen?);
        (quiet > jiff::SignedDuration::from_secs(2)).then_some(())
    })
    .await?;
    end(&mut agent, Signal::TERM).await?;
    assert_eq!(stage.scope.status(&stage.tunnel).await?, "gone");
    Ok(())
}

async fn sigterm_does_not_wait_for_a_docker_that_is_away() -> Result<()> {
    let mut stage = at_once(Protocol::V2).await?;
    stage.set("DOCKER_HOST", "tcp://127.0.0.1:1");
    let tunnel = Tunnel::new(&stage, "");
    tunnel.store(&stage)?;
    let mut agent = tunnel.agent(&stage)?;
    told(&stage, "error", Some("docker_unreachable")).await?;
    end(&mut agent, Signal::TERM).await?;
    agent.wait_for_log("the tunnel is left as it is", SOON).await?;
    Ok(())
}

async fn sigterm_does_not_wait_for_a_pull_that_hangs() -> Result<()> {
    let mut stage = at_once(Protocol::V2).await?;
    // A registry that accepts the connection and never answers.
    let registry = TcpListener::bind("127.0.0.1:0").await?;
    stage.set("CLOUDFLARED_IMAGE", format!("{}/cloudflared:1", registry.local_addr()?));
    let tunnel = Tunnel::new(&stage, "");
    tunnel.store(&stage)?;
    let mut agent = tunnel.agent(&stage)?;
    agent.wait_for_log("pulling the cloudflared image", SOON).await?;
    let _asked = tokio::time::timeout(SOON, registry.accept()).await??;
    told(&stage, "starting", None).await?;
    end(&mut agent, Signal::TERM).await?;
    assert_eq!(stage.scope.status(&stage.tunnel).await?, "gone");
    Ok(())
}

async fn sigterm_does_not_wait_for_an_image_that_cannot_be_had() -> Result<()> {
    let mut stage = at_once(Protocol::V1).await?;
    stage.set("CLOUDFLARED_IMAGE", "127.0.0.1:1/cloudflared:1");
    let tunnel = Tunnel::new(&stage, "");
    tunnel.store(&stage)?;
    let mut agent = tunnel.agent(&stage)?;
    told(&stage, "error", Some("image_unavailable")).await?;
    end(&mut agent, Signal::TERM).await
}

async fn sigterm_after_a_stop_by_command_finds_nothing_to_remove() -> Result<()> {
    let stage = at_once(Protocol::V2).await?;
    let tunnel = Tunnel::new(&stage, "");
    let mut agent = tunnel.agent_with_ready_tunnel(&stage).await?;
    let known = registered(&stage).await?;
    stage.master.push_commands(&known.id, vec![json!({ "action": "stop_tunnel" })])?;
    told(&stage, "stopped", None).await?;
    assert_eq!(stage.scope.status(&stage.tunnel).await?, "gone");
    end(&mut agent, Signal::TERM).await?;
    ensure!(!agent.log().contains("could not be removed"), "{}", agent.log());
    Ok(())
}

async fn an_invalid_configuration_is_exit_64_with_all_errors_and_no_secret() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let secrets = ["wordpass", "hunter2-the-key", "access-secret"];
    let wrong = [
        ("DOCKFLARE_MASTER_URL", "ftp://user:wordpass@master.example.com"),
        ("DOCKFLARE_API_KEY", "hunter2-the-key"),
        ("DOCKFLARE_API_KEY_FILE", "/nowhere/key"),
        ("CF_ACCESS_CLIENT_SECRET", "access-secret"),
        ("DOCKER_HOST", "ssh://host"),
        ("CLOUDFLARED_IMAGE", "cloudflare/cloudflared@sha256:abc"),
        ("CLOUDFLARED_NETWORK_NAME", "host"),
        ("TUNNEL_CONTAINER_NAME", "not a name"),
        ("TUNNEL_ON_EXIT", "explode"),
        ("REPORT_INTERVAL_SECONDS", "4"),
        ("COMMAND_POLL_INTERVAL_SECONDS", "often"),
        ("LOG_LEVEL", "LOUD=please=now"),
        ("LOG_FORMAT", "xml"),
        ("TZ", "Mars/Olympus"),
        ("HEALTH_CHECK_PORT", "70000"),
    ];
    let env: Vec<_> = wrong.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    let mut agent = AgentProcess::spawn(&agent_binary(), &env, folder.path())?;
    secrets.iter().for_each(|secret| agent.plant(secret));
    assert_eq!(agent.wait_exit(SOON).await?.code(), Some(64));
    for (name, _) in wrong.iter().filter(|(name, _)| *name != "DOCKFLARE_API_KEY_FILE") {
        ensure!(agent.log().contains(name), "nothing is said of {name}");
    }

    let mut agent = AgentProcess::spawn(&agent_binary(), &[], folder.path())?;
    assert_eq!(agent.wait_exit(SOON).await?.code(), Some(64));
    ensure!(agent.log().contains("DOCKFLARE_MASTER_URL") && agent.log().contains("DOCKFLARE_API_KEY"));
    assert_eq!(std::fs::read_dir(folder.path())?.count(), 0, "nothing is written before the configuration is right");
    Ok(())
}

async fn a_data_folder_that_cannot_be_one_is_exit_73() -> Result<()> {
    let mut stage = at_once(Protocol::V2).await?;
    let file = stage.data.path().join("file");
    std::fs::write(&file, "")?;
    stage.set("DOCKFLARE_DATA_DIR", file.join("data").display().to_string());
    let mut agent = stage.agent()?;
    assert_eq!(agent.wait_exit(SOON).await?.code(), Some(73));
    ensure!(agent.log().contains(&file.display().to_string()));
    assert!(stage.master.requests().is_empty(), "no agent without a memory");
    Ok(())
}

async fn two_agents_with_containers_of_their_own_do_not_disturb_each_other() -> Result<()> {
    let one = at_once(Protocol::V1).await?;
    let mut other = at_once(Protocol::V2).await?;
    let (tunnel, other_tunnel) = (Tunnel::new(&one, ""), Tunnel::new(&other, ""));
    let agent = tunnel.enrolled_agent(&one).await?;
    let before = tunnel.container(&one).await?;
    // Both use the same network, like two agents on one host whose settings differ only in the name.
    other.set("CLOUDFLARED_NETWORK_NAME", setting(&one, "CLOUDFLARED_NETWORK_NAME"));
    let mut other_agent = other_tunnel.agent_with_ready_tunnel(&other).await?;
    let known = registered(&other).await?;
    other_tunnel.container(&other).await?;
    other.master.push_commands(&known.id, vec![other_tunnel.restart()])?;
    let mark = other_agent.mark();
    other_agent.wait_for_log("replacing the tunnel container", SOON).await?;
    // The log line announces the replacement. It is complete once the successor has the name and is ready.
    other_agent.wait_for_log_after(mark, "tunnel ready", 2 * SOON).await?;
    other_tunnel.container(&other).await?;
    end(&mut other_agent, Signal::TERM).await?;
    assert_eq!(other.scope.status(&other.tunnel).await?, "gone");
    two_more_polls(&one).await?;
    assert_eq!(tunnel.container(&one).await?, before);
    told(&one, "running", None).await?;
    assert_eq!(complaints(&agent), Vec::<String>::new(), "nothing to complain about");
    Ok(())
}
