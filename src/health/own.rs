//! Which container the agent itself runs in, for the end of a decommission.

use crate::channels::OwnContainer;
use crate::docker::Docker;

/// Finds the agent's own container: `HOSTNAME` is the start of its id, and it is the compose service or carries
/// the name `dockflare-agent`. Anything less certain is nothing.
pub(crate) async fn own_container(docker: &Docker, hostname: Option<&str>) -> Option<OwnContainer> {
    const NAME: &str = "dockflare-agent";
    let hostname = hostname?;
    let is_id = (12..=64).contains(&hostname.len()) && hostname.chars().all(|c| matches!(c, '0'..='9' | 'a'..='f'));
    let found = if is_id { docker.inspect(hostname).await.ok().flatten()? } else { return None };
    let service = found.labels.get("com.docker.compose.service").map(String::as_str);
    let is_own = found.id.starts_with(hostname) && (service == Some(NAME) || found.name == NAME);
    is_own.then_some(OwnContainer { id: found.id, image: found.image })
}
