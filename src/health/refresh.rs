//! Fresh images: with `CLOUDFLARED_PULL=always` the agent pulls a tag that may have moved at each of its starts and at
//! each redeploy.
//!
//! The pull runs in the background, because a registry may be slow. Meanwhile what serves goes on serving, and a
//! missing connector starts from the image that is here. The image's id is part of the spec
//! ([`IMAGE_LABEL`](crate::docker::IMAGE_LABEL)), so a connector of the image before is replaced like any other that
//! does not match the spec. Only a redeploy of a connector that serves waits for the pull; otherwise it would be
//! replaced twice.

use std::sync::Arc;

use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tracing::{debug, info};

use super::Supervisor;
use super::host::Host;
use super::plan::{Slot, Step};
use crate::channels::Wanted;
use crate::config::Pull;
use crate::docker::DockerError;
use crate::retry::Trouble;
use crate::state::DesiredState;

/// What is known of the image.
#[derive(Debug)]
pub(super) struct Refresh {
    /// Id of the image that the tag names on this host.
    id: Option<String>,
    /// The redeploy of the last pull.
    pulled_for: Option<u64>,
    work: Option<JoinHandle<Result<(), DockerError>>>,
    /// Rung when the pull has ended.
    pub(super) done: Arc<Notify>,
    trouble: Trouble,
}

impl Refresh {
    pub(super) fn new() -> Self {
        Self {
            id: None,
            pulled_for: None,
            work: None,
            done: Arc::default(),
            trouble: Trouble::new("the newest cloudflared image"),
        }
    }

    /// The image's id, if it is part of the spec.
    pub(super) fn id(&self) -> Option<&String> {
        self.id.as_ref()
    }
}

impl Drop for Refresh {
    fn drop(&mut self) {
        if let Some(work) = &self.work {
            work.abort();
        }
    }
}

impl<H: Host> Supervisor<H> {
    fn refreshes(&self) -> bool {
        self.config.pull == Pull::Always && !self.config.image.is_pinned()
    }

    /// Starts a pull if one is due, and handles the result of one that has ended.
    pub(super) async fn freshen(&mut self, wanted: &Wanted) {
        if !self.refreshes() || wanted.state != DesiredState::Running || wanted.decommission.is_some() {
            return;
        }
        if let Some(work) = self.refresh.work.take_if(|work| work.is_finished()) {
            match work.await {
                Ok(Ok(())) => {
                    self.refresh.trouble.ended();
                    self.read_image_id().await;
                }
                Ok(Err(error)) => self.refresh.trouble.failed(
                    &format_args!("is not known, since Docker {error}"),
                    "going on with the one that is here; it is pulled again at the next start or redeploy",
                ),
                Err(error) => debug!("a pull was cut off: {error}"),
            }
        }
        if self.refresh.id.is_none() {
            self.read_image_id().await;
        }
        if self.refresh.work.is_none() && self.refresh.pulled_for != Some(wanted.redeploys) {
            self.refresh.pulled_for = Some(wanted.redeploys);
            let (host, image, done) = (self.host.clone(), self.config.image.clone(), self.refresh.done.clone());
            debug!(%image, "looking for a newer image of this tag");
            self.refresh.work = Some(tokio::spawn(async move {
                let pulled = host.pull(&image, |_, _| ()).await;
                done.notify_one();
                pulled
            }));
        }
    }

    /// Reads which image the tag names on this host. Returns whether the id is new or another one.
    pub(super) async fn read_image_id(&mut self) -> bool {
        if !self.refreshes() {
            return false;
        }
        let image = &self.config.image;
        let id = match self.host.image_id(image).await {
            Ok(id) => id.filter(|id| !id.is_empty()),
            Err(error) => {
                debug!(%image, "which image it is is not known: Docker {error}");
                return false;
            }
        };
        if id == self.refresh.id || id.is_none() {
            return false;
        }
        if self.refresh.id.is_some() {
            info!(%image, "the tag has moved to another image, which the tunnel is replaced with");
        }
        self.refresh.id = id;
        true
    }

    /// Whether to wait for the pull: these steps would be repeated after it, and the connector serves meanwhile.
    pub(super) fn waits_for_image(&self, steps: &[Step]) -> bool {
        let replaces = steps.iter().any(|step| matches!(step, Step::Create(Slot::Next, _)));
        self.refresh.work.is_some() && replaces && self.main.is_ready()
    }
}
