//! Tests the agent's main job from beginning to end.

use anyhow::{Context, Result};
use dockflare_dev_master::Protocol;
use testkit::Case;

use crate::support::{SOON, Stage};

pub(crate) fn cases() -> Vec<Case> {
    testkit::cases![v1_master_from_enrolment_to_sigterm, v2_master_from_enrolment_to_sigterm]
}

async fn v1_master_from_enrolment_to_sigterm() -> Result<()> {
    from_enrolment_to_sigterm(Protocol::V1).await
}

async fn v2_master_from_enrolment_to_sigterm() -> Result<()> {
    from_enrolment_to_sigterm(Protocol::V2).await
}

async fn from_enrolment_to_sigterm(protocol: Protocol) -> Result<()> {
    let mut stage = Stage::new(protocol).await?;
    // The tunnel must end with the agent, without a lease.
    stage.set("TUNNEL_LEASE_SECONDS", "0");
    let mut agent = stage.agent()?;
    stage.enrolled_agent("edge").await?;
    agent.wait_for_log("tunnel ready", SOON).await?;
    let known = stage.tunnel_is("running").await?;
    let status = known.tunnel_status.context("no status")?;
    assert_eq!((status.name.as_deref(), status.version.as_deref()), (Some("edge"), Some("2025.9.0")));

    let id = stage.scope.run_workload(&[("dockflare.enable", "true"), ("secret", "s")], &[], None, false).await?;
    let what = "the container to be known";
    stage
        .master
        .wait_for(what, SOON, |known| known.only_agent().filter(|a| a.containers.contains_key(&id)).cloned())
        .await?;
    stage.scope.stop(&id, 0).await?;
    let what = "the container to be forgotten";
    stage
        .master
        .wait_for(what, SOON, |known| known.only_agent().filter(|a| !a.containers.contains_key(&id)).cloned())
        .await?;

    agent.sigterm()?;
    assert_eq!(agent.wait_exit(SOON).await?.code(), Some(0));
    assert_eq!(stage.scope.status(&stage.tunnel).await?, "gone");
    stage.tunnel_is("stopped").await?;
    stage.assert_no_violations();
    Ok(())
}
