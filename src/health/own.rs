//! Which container the agent itself runs in, for the end of a decommission.

use crate::channels::OwnContainer;
use crate::docker::{Docker, Inspected};
use crate::labels::COMPOSE_SERVICE;

/// Finds the agent's own container: `HOSTNAME` is the start of its id, and it is the compose service or carries
/// the name `dockflare-agent`. Anything less certain is nothing.
pub(crate) async fn own_container(docker: &Docker, hostname: Option<&str>) -> Option<OwnContainer> {
    let hostname = hostname?;
    let is_id = (12..=64).contains(&hostname.len()) && hostname.chars().all(|c| matches!(c, '0'..='9' | 'a'..='f'));
    let found = if is_id { docker.inspect(hostname).await.ok().flatten()? } else { return None };
    (found.id.starts_with(hostname) && is_own(&found)).then_some(OwnContainer { id: found.id, image: found.image })
}

/// Whether it is the compose service or carries the name `dockflare-agent`.
pub(crate) fn is_own(container: &Inspected) -> bool {
    const NAME: &str = "dockflare-agent";
    let service = container.labels.get(COMPOSE_SERVICE).map(String::as_str);
    service == Some(NAME) || container.name == NAME
}
