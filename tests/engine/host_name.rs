//! Tests `host.docker.internal` in a service label: the tunnel container resolves that name to its host.

use anyhow::{Context, Result, ensure};
use dockflare_dev_master::Protocol;
use testkit::{Case, Spec};

use crate::containers_scene::Tunnel;
use crate::support::{SOON, Stage};

pub(crate) fn cases() -> Vec<Case> {
    testkit::cases![
        a_service_on_the_host_is_reached_by_the_name_that_labels_use,
        without_it_the_label_is_told_of_with_an_address_that_leads_there,
    ]
}

/// Starts two labelled containers, of which the second is out of reach.
async fn labelled(stage: &Stage) -> Result<(String, String)> {
    let image = testkit::images().workload().await?;
    let run = async |name: &str, service: &str, network: Option<&str>| -> Result<String> {
        let name = stage.scope.name(name);
        let labels =
            [("dockflare.enable", "true"), ("dockflare.service", service), ("dockflare.hostname", "x.example")];
        stage.scope.run(Spec { image: &image, name: &name, labels: &labels, network, ..Spec::default() }).await?;
        Ok(name)
    };
    let host = run("host", "http://host.docker.internal:8123", Some(&stage.network)).await?;
    let apart = run("apart", "http://nowhere:8080", None).await?;
    Ok((host, apart))
}

async fn a_service_on_the_host_is_reached_by_the_name_that_labels_use() -> Result<()> {
    let stage = Stage::new(Protocol::V2).await?;
    let tunnel = Tunnel::new(&stage, "");
    let agent = tunnel.agent_with_ready_tunnel(&stage).await?;
    let found = stage.scope.inspect(&stage.tunnel).await?;
    let hosts = found.host_config.and_then(|host| host.extra_hosts).unwrap_or_default();
    assert_eq!(hosts, ["host.docker.internal:host-gateway"]);
    // The address to which the Engine has resolved it.
    let file = std::fs::read_to_string(found.hosts_path.context("no file of hosts")?)?;
    let line = file.lines().find(|line| line.ends_with("\thost.docker.internal")).context(file.clone())?;
    let address: std::net::IpAddr = line.split('\t').next().unwrap_or_default().parse()?;
    ensure!(!address.is_loopback(), "{line}");

    let (host, apart) = labelled(&stage).await?;
    let said = |name: &str| format!("cannot reach the container {name}");
    agent.wait_for_log(&apart, SOON).await?;
    ensure!(!agent.log().contains(&said(&host)), "{}", agent.log());
    Ok(())
}

async fn without_it_the_label_is_told_of_with_an_address_that_leads_there() -> Result<()> {
    let mut stage = Stage::new(Protocol::V2).await?;
    stage.set("CLOUDFLARED_HOST_GATEWAY", "false");
    let tunnel = Tunnel::new(&stage, "");
    let agent = tunnel.agent_with_ready_tunnel(&stage).await?;
    let found = stage.scope.inspect(&stage.tunnel).await?;
    ensure!(found.host_config.and_then(|host| host.extra_hosts).unwrap_or_default().is_empty());
    labelled(&stage).await?;
    let line = agent.wait_for_log("host.docker.internal in its service", SOON).await?;
    ensure!(line.contains("set the label dockflare.service to http://"), "{line}");
    Ok(())
}
