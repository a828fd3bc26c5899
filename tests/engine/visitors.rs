//! Visitors of a tunnel: a steady stream of requests through a stand-in for Cloudflare's edge, and their outcome.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use testkit::{Edge, wait_until};
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::containers_scene::Tunnel;
use crate::support::{SOON, Stage};

/// How long the edge takes to send visitors to a newly registered connector.
pub(crate) const EDGE_TAKES: Duration = Duration::from_secs(3);
/// The pause between two visitors. Every second one makes a slow request.
const EVERY: Duration = Duration::from_millis(20);

/// An edge on the stage's network, with visitors of one tunnel.
pub(crate) struct Visitors {
    edge: Arc<Edge>,
    tunnel: String,
    seen: watch::Receiver<Seen>,
    /// Dropping this ends the visits.
    coming: JoinSet<()>,
}

/// The outcome of the visits so far.
#[derive(Debug, Default, Clone)]
struct Seen {
    served: usize,
    failed: Vec<String>,
}

/// Makes the stage's network and an edge that containers on it can reach.
pub(crate) async fn edge(stage: &Stage) -> Result<Arc<Edge>> {
    stage.scope.create_network(&stage.network).await?;
    edge_on(stage).await
}

/// Makes an edge that containers on the stage's existing network can reach.
pub(crate) async fn edge_on(stage: &Stage) -> Result<Arc<Edge>> {
    let network = stage.scope.docker().inspect_network(&stage.network, None).await?;
    let config = network.ipam.and_then(|ipam| ipam.config).and_then(|config| config.into_iter().next());
    let gateway: IpAddr = config.and_then(|config| config.gateway).context("no gateway")?.parse()?;
    Ok(Arc::new(Edge::start(SocketAddr::new(gateway, 0), EDGE_TAKES).await?))
}

/// Returns the stage's tunnel with a new token, whose connectors register at this edge.
pub(crate) fn tunnel(stage: &Stage, edge: &Edge, words: &str) -> Tunnel {
    Tunnel::new(stage, &format!("edge={} drain=1500 {words}", edge.address()))
}

impl Visitors {
    /// Waits for the first connector, then starts the visits.
    pub(crate) async fn come(edge: &Arc<Edge>, tunnel: &Tunnel) -> Result<Self> {
        let (told, seen) = watch::channel(Seen::default());
        let visitors = Self { edge: edge.clone(), tunnel: tunnel.id.clone(), seen, coming: JoinSet::new() };
        visitors.until_connectors(1).await?;
        let mut visitors = visitors;
        let (edge, tunnel) = (edge.clone(), tunnel.id.clone());
        visitors.coming.spawn(async move {
            let mut under_way = JoinSet::new();
            let mut number = 0_u64;
            loop {
                number += 1;
                let (edge, tunnel, told) = (edge.clone(), tunnel.clone(), told.clone());
                under_way.spawn(async move {
                    let path = if number.is_multiple_of(2) { "/slow?ms=700" } else { "/" };
                    let answer = tokio::time::timeout(SOON, edge.ask(&tunnel, path)).await;
                    told.send_modify(|seen| match answer {
                        Ok(Ok(_)) => seen.served += 1,
                        Ok(Err(error)) => seen.failed.push(format!("{number}: {error:#}")),
                        Err(_) => seen.failed.push(format!("{number}: no answer")),
                    });
                });
                while under_way.try_join_next().is_some() {}
                tokio::time::sleep(EVERY).await;
            }
        });
        Ok(visitors)
    }

    /// Waits until the edge sends visitors to this many connectors.
    pub(crate) async fn until_connectors(&self, count: usize) -> Result<()> {
        let what = format!("{count} connector(s) at the edge");
        wait_until(&what, SOON, async || (self.edge.connectors(&self.tunnel).len() == count).then_some(())).await
    }

    /// Returns how many visits failed so far, and how many succeeded.
    pub(crate) fn counted(&self) -> (usize, usize) {
        let seen = self.seen.borrow();
        (seen.failed.len(), seen.served)
    }

    /// Returns how many visits succeeded so far.
    pub(crate) fn served(&self) -> usize {
        self.seen.borrow().served
    }

    /// Waits for a hundred more visits, and checks that none has failed so far.
    pub(crate) async fn all_were_served(&mut self) -> Result<()> {
        self.all_were_served_but(0).await
    }

    /// Like [`Visitors::all_were_served`], but allows for the first `before` failures.
    pub(crate) async fn all_were_served_but(&mut self, before: usize) -> Result<()> {
        let more = self.seen.borrow().served + 100;
        let enough = |seen: &Seen| seen.served >= more || seen.failed.len() > before;
        let seen = tokio::time::timeout(SOON, self.seen.wait_for(enough)).await.context("no visitors any more")??;
        let failed = seen.failed.get(before..).context("fewer than before")?;
        ensure!(failed.is_empty(), "{} of {} failed: {failed:#?}", failed.len(), failed.len() + seen.served);
        Ok(())
    }
}
