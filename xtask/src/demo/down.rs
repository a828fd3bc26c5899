//! Removes the demo: what has its label, and the network, should the agent have had to make it anew.

use std::time::Duration;

use anyhow::Result;
use testkit::Docker;

use super::scene::{self, NETWORK};

/// The agent is ended without its having a say. What it had asked the engine for may still come about after that,
/// so it is looked again until nothing is found.
const PASSES: usize = 5;
const BETWEEN: Duration = Duration::from_millis(300);

/// Removes everything there is of the demo, and gives what that was. Nothing is fine, too.
pub(crate) async fn down(docker: &Docker) -> Result<Vec<String>> {
    let mut removed = Vec::new();
    for pass in 1.. {
        match once(docker).await {
            Ok(found) if found.is_empty() => break,
            Ok(found) => removed.extend(found),
            Err(error) if pass == PASSES => return Err(error),
            // Something came while its network or its image was being removed.
            Err(_) => tokio::time::sleep(BETWEEN).await,
        }
    }
    Ok(removed)
}

async fn once(docker: &Docker) -> Result<Vec<String>> {
    // First, for it would make its tunnel container again.
    let mut removed = testkit::remove_labelled(docker, scene::AGENT_LABEL).await?;
    // The tunnel container has the label from its image.
    removed.extend(testkit::remove_labelled(docker, &scene::label()).await?);
    if let Ok(network) = docker.inspect_network(NETWORK, None).await
        && network.labels.is_some_and(|labels| labels.contains_key(scene::AGENTS_OWN))
    {
        docker.remove_network(NETWORK).await?;
        removed.push(format!("network {NETWORK}"));
    }
    Ok(removed)
}
