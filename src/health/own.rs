//! Finds the container that the agent itself runs in.

use dockflare_host::container;

use crate::channels::OwnContainer;
use crate::docker::{Docker, DockerError, Inspected};
use crate::labels::COMPOSE_SERVICE;

/// Finds the agent's own container for the end of a decommission: the one that [`this_container`] finds, if it is the
/// compose service or has the name `dockflare-agent`. Anything less certain gives `None`.
pub(crate) async fn own_container(docker: &Docker, hostname: Option<&str>) -> Option<OwnContainer> {
    let found = this_container(docker, hostname).await.ok().flatten()?;
    is_own(&found).then_some(OwnContainer { id: found.id, image: found.image })
}

/// Finds the container that this program runs in. `HOSTNAME` is the start of its id unless somebody set another; the
/// list of mounts gives the whole id. `None` if neither is a container of this Docker.
///
/// # Errors
/// When Docker does not answer, or refuses to show it.
pub(crate) async fn this_container(docker: &Docker, hostname: Option<&str>) -> Result<Option<Inspected>, DockerError> {
    let is_id = |name: &&str| {
        (12..=64).contains(&name.len()) && name.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
    };
    let names = [hostname.filter(is_id).map(str::to_owned), container::own_id()];
    let mut refused = None;
    for name in names.into_iter().flatten() {
        match docker.inspect(&name).await {
            Ok(found) => {
                if let Some(found) = found.filter(|found| found.id.starts_with(&name)) {
                    return Ok(Some(found));
                }
            }
            Err(error) if error.is_away() => return Err(error),
            // The other name may be a different container's, and Docker may show that one.
            Err(error) => refused = Some(error),
        }
    }
    refused.map_or(Ok(None), Err)
}

/// Whether it is the compose service or has the name `dockflare-agent`.
pub(crate) fn is_own(container: &Inspected) -> bool {
    const NAME: &str = "dockflare-agent";
    let service = container.labels.get(COMPOSE_SERVICE).map(String::as_str);
    service == Some(NAME) || container.name == NAME
}
