//! Removes the demo: everything with its label, and the network in case the agent had to create it again.

use std::time::Duration;

use anyhow::Result;
use testkit::Docker;

use super::scene::{self, NETWORK};

/// The removal kills the agent without warning. The engine may still carry out what the agent had asked for, so the
/// removal looks again until it finds nothing, at most this many times.
const PASSES: usize = 5;
const BETWEEN: Duration = Duration::from_millis(300);

/// Removes everything of the demo, and returns what it removed. Finding nothing is fine.
pub(crate) async fn down(docker: &Docker) -> Result<Vec<String>> {
    let mut removed = Vec::new();
    for pass in 1.. {
        match once(docker).await {
            Ok(found) if found.is_empty() => break,
            Ok(found) => removed.extend(found),
            Err(error) if pass == PASSES => return Err(error),
            // Something appeared while its network or its image was being removed.
            Err(_) => tokio::time::sleep(BETWEEN).await,
        }
    }
    Ok(removed)
}

async fn once(docker: &Docker) -> Result<Vec<String>> {
    // Remove the agent first, because it would recreate its tunnel container.
    let mut removed = testkit::remove_labelled(docker, scene::AGENT_LABEL).await?;
    // The tunnel container inherits the label from its image.
    removed.extend(testkit::remove_labelled(docker, &scene::label()).await?);
    if let Ok(network) = docker.inspect_network(NETWORK, None).await
        && network.labels.is_some_and(|labels| labels.contains_key(scene::AGENTS_OWN))
    {
        docker.remove_network(NETWORK).await?;
        removed.push(format!("network {NETWORK}"));
    }
    Ok(removed)
}
