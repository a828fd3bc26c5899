//! Tests a new host: its name at the master, and a log that tells the operator what to do next.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};
use dockflare_dev_master::{DevMaster, Protocol};
use testkit::models::HostConfig;
use testkit::{Case, Scope, Spec, images};

use crate::support::checked::Checked;
use crate::support::{SOON, Stage, agent_binary};

pub(crate) fn cases() -> Vec<Case> {
    let mut cases = testkit::cases![
        a_new_agent_has_the_name_of_its_docker_host_and_the_operators_word_goes_first,
        who_has_to_be_enrolled_reads_where_in_the_log_and_in_the_check,
    ];
    for protocol in [Protocol::V1, Protocol::V2] {
        let name = format!("{protocol}_three_new_hosts_of_which_nothing_is_known_do_not_look_alike");
        cases.push(testkit::case(name, move || three_new_hosts(protocol)));
    }
    cases
}

async fn a_new_agent_has_the_name_of_its_docker_host_and_the_operators_word_goes_first() -> Result<()> {
    let mut stage = Stage::new(Protocol::V2).await?;
    stage.set("AGENT_DISPLAY_NAME", "");
    let host = stage.scope.docker().info().await?.name.context("Docker does not say its host's name")?;
    let mut agent = stage.agent()?;
    let known = stage.master.wait_for("an agent", SOON, |known| known.only_agent().cloned()).await?;
    assert_eq!((known.display_name, known.registrations), (host, 1));
    agent.sigterm()?;
    agent.wait_exit(SOON).await?;
    stage.set("AGENT_DISPLAY_NAME", "attic");
    let _agent = stage.agent()?;
    let renamed = |known: &dockflare_dev_master::Snapshot| {
        known.only_agent().filter(|agent| agent.display_name == "attic").map(|agent| agent.registrations)
    };
    assert_eq!(stage.master.wait_for("the other name", SOON, renamed).await?, 2);
    stage.assert_no_violations();
    Ok(())
}

/// Runs four agents in containers without Docker, so they know only their containers' ids. One of them mounts the
/// host's `/etc/hostname`.
async fn three_new_hosts(protocol: Protocol) -> Result<()> {
    let scope = Scope::new(testkit::docker()?);
    let network = scope.name("net");
    scope.create_network(&network).await?;
    let found = scope.docker().inspect_network(&network, None).await?;
    let mut ranges = found.ipam.and_then(|ipam| ipam.config).into_iter().flatten();
    let address = ranges.find_map(|range| range.gateway).context("the network has no gateway")?;
    let listen = SocketAddr::new(address.parse()?, 0);
    let master = DevMaster::builder().protocol(protocol).listen(listen).start().await?;
    let image = images().agent(&agent_binary()).await?;
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("hostname");
    std::fs::write(&file, "pantry\n")?;
    for host in 0..4 {
        let (url, key) = (master.url(), master.generate_key(&host.to_string()));
        let binds = (host == 3).then(|| vec![format!("{}:/etc/hostname:ro", file.display())]);
        let env = [
            ("DOCKFLARE_MASTER_URL", url.as_str()),
            ("DOCKFLARE_API_KEY", &key),
            ("DOCKER_HOST", "unix:///nowhere/docker.sock"),
        ];
        let host = HostConfig { binds, ..HostConfig::default() };
        scope.run(Spec { image: &image, env: &env, network: Some(&network), host, ..Spec::default() }).await?;
    }
    let names = master
        .wait_for("four names", SOON, |known| {
            let names: BTreeSet<_> = known.agents.values().map(|agent| agent.display_name.clone()).collect();
            (names.len() == 4 && !names.contains("dockflare-agent")).then_some(known.agents.clone())
        })
        .await?;
    for agent in names.values() {
        if agent.display_name == "pantry" {
            assert_eq!(agent.registrations, 1);
        } else {
            assert_eq!(agent.display_name, format!("agent-{}", &agent.id[..8]));
            assert_eq!(agent.registrations, 2, "the second one at once");
        }
    }
    let violations = master.violations();
    ensure!(violations.is_empty(), "{violations:#?}");
    Ok(())
}

async fn who_has_to_be_enrolled_reads_where_in_the_log_and_in_the_check() -> Result<()> {
    let mut stage = Stage::new(Protocol::V2).await?;
    stage.set("LOG_LEVEL", "INFO");
    let check = async |stage: &Stage| Checked::new(&stage.env, stage.data.path(), &[&stage.key]).await;
    check(&stage).await?.is("tunnel.assigned", "skip")?;
    let agent = stage.agent()?;
    let line = agent.wait_for_log("waits to be enrolled", SOON).await?;
    let page = format!("{}/agents", stage.master.url().trim_end_matches('/'));
    ensure!(line.contains(" INFO ") && line.contains(&page), "{page} is not in: {line}");
    let told = check(&stage).await?.is("tunnel.assigned", "fail")?;
    ensure!(told.contains("enrolled") && told.contains(&page), "{told}");
    stage.enrolled_agent("edge").await?;
    stage.tunnel_is("running").await?;
    check(&stage).await?.is("tunnel.assigned", "pass")?;
    let lines = agent.log().lines().filter(|line| line.contains("waits to be enrolled")).count();
    assert_eq!(lines, 1);
    Ok(())
}
