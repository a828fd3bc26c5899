//! Makes the calls through [`crate::docker`], as the agent does. Before it changes a container, it inspects it, and
//! then acts on the id that it saw, so that no other container can take the name in between.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use dockflare_engine::proxy::{Answer, Failure};
use futures_util::{StreamExt, future, stream};
use serde_json::json;
use tokio::sync::{Mutex, watch};
use tokio::time::timeout;

use super::answer;
use super::plan::{Call, MOST_LINES, Policy, Subject};
use crate::docker::{Docker, DockerError, Endpoint, Inspected, RunState, owner_labels};
use crate::health::{Owner, Whose, is_own, owner};
use crate::labels::{ENABLE_KEYS, is_enabled};

/// How long to wait for the refusal of a subscription: Docker refuses at once, or not at all.
const REFUSAL_LIMIT: Duration = Duration::from_millis(50);

/// Held while a network is created.
static MAKING_A_NETWORK: Mutex<()> = Mutex::const_new(());

/// Creates one of the tunnel's networks if it does not exist. Up to Engine 24, a client that asks twice gets two
/// networks of that name, and a host has room for some thirty. So the proxy checks first, creates one at a time, and
/// finishes even if the client has disconnected.
async fn new_network(docker: &Arc<Docker>, policy: &Policy, name: String) -> Result<Answer, Failure> {
    let (docker, internal) = (docker.clone(), policy.is_for_metrics(&name));
    let there = Answer::Json(409, json!({ "message": format!("network with name {name} already exists") }));
    let Ok(alone) = MAKING_A_NETWORK.try_lock() else { return Ok(there) };
    let made = tokio::spawn(async move {
        let _alone = alone;
        if docker.has_network(&name).await? {
            return Ok(None);
        }
        docker.create_network(&name, internal, &owner_labels()).await?;
        Ok::<_, DockerError>(Some(name))
    });
    match made.await {
        Ok(Ok(Some(name))) => Ok(Answer::Json(201, json!({ "Id": name, "Warning": "" }))),
        Ok(Ok(None)) => Ok(there),
        Ok(Err(error)) => Err(error.into()),
        // Only the end of the runtime aborts the task.
        Err(_) => Err(Failure::Docker(crate::docker::silent())),
    }
}

/// Makes the call. As cancel-safe as Docker: a call that is cut off may have been carried out.
pub(super) async fn perform(docker: &Arc<Docker>, policy: &Policy, call: Call) -> Result<Answer, Failure> {
    Ok(match call {
        Call::Ping => {
            docker.ping().await?;
            Answer::Bytes("text/plain; charset=utf-8", b"OK".to_vec())
        }
        Call::Version => {
            let seen = docker.version().await?;
            let platform = if seen.is_desktop { "Docker Desktop" } else { "" };
            Answer::Json(
                200,
                json!({
                    "Platform": { "Name": platform }, "Version": seen.engine, "ApiVersion": seen.api,
                    "Os": seen.os, "Arch": seen.arch, "KernelVersion": seen.kernel,
                }),
            )
        }
        Call::HostName => Answer::Json(200, json!({ "Name": docker.host_name().await? })),
        Call::List(label) => {
            let listed = match label {
                Some(key) => docker.list_with_label_keys(&[key]).await?,
                None => docker.list_running().await?,
            };
            Answer::Json(200, answer::listing(policy, &listed, label.is_some()))
        }
        Call::Made => Answer::Json(200, answer::made(policy, &docker.list_made().await?)),
        Call::Events(since) => events(docker, policy, since).await?,
        Call::Inspect(subject) => inspect(docker, policy, subject).await?,
        Call::Logs { id, since, last } => {
            let seen = own_container(docker, policy, &id, &[Owner::Agent, Owner::PythonAgent]).await?;
            let lines = match last {
                Some(last) => docker.log_tail(&seen.id, since, last).await?,
                None => docker.log_start(&seen.id, since, MOST_LINES).await?,
            };
            Answer::Bytes("application/vnd.docker.multiplexed-stream", answer::log(&lines))
        }
        Call::Network(name) => {
            if docker.has_network(&name).await? {
                Answer::Json(200, json!({ "Name": name }))
            } else {
                Answer::Json(404, json!({ "message": format!("network {name} not found") }))
            }
        }
        Call::NewNetwork(name) => new_network(docker, policy, name).await?,
        Call::Place { id, place } => {
            let seen = own_container(docker, policy, &id, &[Owner::Agent]).await?;
            // Too late after a start: cloudflared has looked up its address by then.
            if seen.state != RunState::Created {
                return Err(Failure::Refused("container_started"));
            }
            docker.place(&place, &seen.id).await?;
            Answer::Json(200, json!({}))
        }
        Call::Connect { network, id } => {
            if let Some(agent) = agents_own(docker, policy, &id).await? {
                if !policy.is_network(&network) {
                    return Err(Failure::Refused("network_name"));
                }
                docker.connect(&network, &agent.id).await?;
                return Ok(Answer::Json(200, json!({})));
            }
            let seen = own_container(docker, policy, &id, &[Owner::Agent]).await?;
            if policy.is_for_metrics(&network) {
                return Err(Failure::Refused("endpoint_aliases"));
            }
            if network != policy.tunnel.network && !networks_of_labelled(docker).await?.contains(&network) {
                return Err(Failure::Refused("network_not_of_labelled"));
            }
            docker.connect(&network, &seen.id).await?;
            Answer::Json(200, json!({}))
        }
        Call::Leave { network, id } => {
            let Some(agent) = agents_own(docker, policy, &id).await? else {
                return Err(Failure::Refused("network_name"));
            };
            // Connections that were declared or made by hand stay.
            if !agent.networks.get(&network).is_some_and(Endpoint::is_joined) {
                return Err(Failure::Refused("network_not_joined"));
            }
            docker.disconnect(&network, &agent.id).await?;
            Answer::Json(200, json!({}))
        }
        Call::Disconnect { network, id } => {
            let seen = own_container(docker, policy, &id, &[Owner::Agent]).await?;
            // The agent must not remove connections that were made by hand.
            if !seen.networks.get(&network).is_some_and(Endpoint::is_joined) {
                return Err(Failure::Refused("network_not_joined"));
            }
            docker.disconnect(&network, &seen.id).await?;
            Answer::Json(200, json!({}))
        }
        Call::Image => {
            let image = &policy.tunnel.image;
            match docker.image_id(image).await? {
                Some(id) => Answer::Json(200, json!({ "Id": id, "RepoTags": [image.to_string()] })),
                None => Answer::Json(404, json!({ "message": format!("No such image: {image}") })),
            }
        }
        Call::Pull => pull(docker, policy).await?,
        Call::Create { name, spec } => {
            let id = docker.create(&name, &spec).await?;
            Answer::Json(201, json!({ "Id": id, "Warnings": [] }))
        }
        Call::Start(id) => {
            let seen = own_container(docker, policy, &id, &[Owner::Agent]).await?;
            docker.start(&seen.id).await?;
            Answer::Done
        }
        Call::Stop { id, seconds } => {
            let seen = own_container(docker, policy, &id, &[Owner::Agent, Owner::PythonAgent]).await?;
            docker.stop(&seen.id, Duration::from_secs(seconds.into())).await?;
            Answer::Done
        }
        Call::StopSelf(id) => {
            match docker.inspect(&id).await? {
                Some(seen) if seen.id == id && is_own(&seen) => docker.stop_self(&id).await?,
                Some(_) => return Err(Failure::Refused("owner")),
                None => return Err(Failure::Absent(id)),
            }
            Answer::Done
        }
        Call::Restart { id, seconds } => {
            let seen = own_container(docker, policy, &id, &[Owner::Agent]).await?;
            docker.restart(&seen.id, Duration::from_secs(seconds.into())).await?;
            Answer::Done
        }
        Call::Rename(id) => {
            let seen = own_container(docker, policy, &id, &[Owner::Agent]).await?;
            docker.rename(&seen.id, &policy.tunnel.container_name).await?;
            Answer::Done
        }
        Call::Remove(id) => {
            let seen = own_container(docker, policy, &id, &[Owner::Agent, Owner::PythonAgent]).await?;
            docker.remove(&seen.id).await?;
            Answer::Done
        }
        // The stream ends when the agent disconnects, which tells the proxy that the agent has gone.
        Call::Goodbye { seconds, .. } => {
            let held = stream::iter([Ok(json!({ "seconds": seconds }))]);
            Answer::Stream(Box::pin(held.chain(stream::pending())))
        }
    })
}

/// The container with exactly this id. Refuses it unless it is the tunnel's by name or label, with one of these owners.
async fn own_container(docker: &Docker, policy: &Policy, id: &str, owners: &[Owner]) -> Result<Inspected, Failure> {
    // A container's name may equal another container's id.
    match docker.inspect(id).await?.filter(|seen| seen.id == id) {
        Some(seen) if policy.is_tunnels(&seen) && owners.contains(&owner(&seen, Whose::Any)) => Ok(seen),
        Some(_) => Err(Failure::Refused("owner")),
        None => Err(Failure::Absent(id.to_owned())),
    }
}

/// The container with exactly this id, if it is the agent's own container and not the tunnel's.
async fn agents_own(docker: &Docker, policy: &Policy, id: &str) -> Result<Option<Inspected>, DockerError> {
    let seen = docker.inspect(id).await?.filter(|seen| seen.id == id);
    Ok(seen.filter(|seen| is_own(seen) && !policy.is_tunnels(seen)))
}

async fn inspect(docker: &Docker, policy: &Policy, subject: Subject) -> Result<Answer, Failure> {
    let (Subject::Named(asked) | Subject::Id(asked) | Subject::Start(asked)) = &subject;
    let seen = docker.inspect(asked).await?.filter(|seen| match &subject {
        Subject::Named(name) => seen.name == *name,
        Subject::Id(id) => seen.id == *id,
        Subject::Start(start) => seen.id.starts_with(start),
    });
    let Some(seen) = seen else { return Err(Failure::Absent(asked.clone())) };
    let shown = match subject {
        Subject::Start(_) => is_own(&seen).then(|| answer::own(policy, seen)),
        Subject::Named(_) => answer::shown(policy, seen),
        Subject::Id(_) => match answer::shown(policy, seen.clone()) {
            Some(shown) => Some(shown),
            None if lends(docker, &seen).await? => Some(answer::place_only(seen)),
            None => None,
        },
    };
    match shown {
        Some(shown) => Ok(Answer::Json(200, answer::inspection(&shown))),
        None => Err(Failure::Refused("container_not_shown")),
    }
}

/// Whether a labeled container shares this container's network.
async fn lends(docker: &Docker, lender: &Inspected) -> Result<bool, DockerError> {
    let placed = docker.placed_with_label_keys(&ENABLE_KEYS).await?;
    let mut modes = placed.iter().filter(|placed| is_enabled(&placed.labels)).map(|placed| &placed.network_mode);
    Ok(modes.any(|mode| mode.strip_prefix("container:").is_some_and(|of| of == lender.id || of == lender.name)))
}

/// The networks of labeled containers: their own, or those of the container whose network they share.
async fn networks_of_labelled(docker: &Docker) -> Result<BTreeSet<String>, DockerError> {
    let mut networks = BTreeSet::new();
    for placed in docker.placed_with_label_keys(&ENABLE_KEYS).await? {
        if !is_enabled(&placed.labels) {
            continue;
        }
        networks.extend(placed.networks);
        if let Some(lender) = placed.network_mode.strip_prefix("container:")
            && let Some(lender) = docker.inspect(lender).await?
        {
            networks.extend(lender.networks.into_keys());
        }
    }
    Ok(networks)
}

async fn events(docker: &Docker, policy: &Policy, since: Option<String>) -> Result<Answer, Failure> {
    let mut told = Box::pin(docker.events(since)?);
    // Waits for a possible refusal before the head of the answer. Asking for the first event sends the subscription.
    let first = match timeout(REFUSAL_LIMIT, told.next()).await {
        Ok(Some(Err(error))) => return Err(error.into()),
        Ok(first) => stream::iter(first),
        Err(_) => stream::iter(None),
    };
    let policy = policy.clone();
    let shown = first.chain(told).filter_map(move |told| {
        future::ready(match told {
            Ok(told) => answer::event(&policy, &told).map(Ok),
            Err(error) => Some(Err(error)),
        })
    });
    Ok(Answer::Stream(Box::pin(shown)))
}

/// Pulls the image and reports how much has arrived. Reports a refusal as a refusal when it comes before any progress.
async fn pull(docker: &Arc<Docker>, policy: &Policy) -> Result<Answer, Failure> {
    let (steps, mut newest) = watch::channel((0, 0));
    let (docker, image) = (docker.clone(), policy.tunnel.image.clone());
    // Nobody receives the steps once the client has disconnected.
    let pulled = async move { docker.pull(&image, |come, due| steps.send((come, due)).unwrap_or_default()).await };
    let mut pulled = Box::pin(pulled);
    tokio::select! {
        ended = &mut pulled => {
            ended?;
            return Ok(Answer::Stream(Box::pin(stream::empty())));
        }
        Ok(()) = newest.changed() => newest.mark_changed(),
    }
    let lines = stream::unfold(Some((pulled, newest)), |state| async move {
        let (mut pulled, mut newest) = state?;
        tokio::select! {
            biased;
            Ok(()) = newest.changed() => {
                let (come, due) = *newest.borrow_and_update();
                let step = json!({
                    "status": "Downloading", "id": "image", "progressDetail": { "current": come, "total": due },
                });
                Some((Ok(step), Some((pulled, newest))))
            }
            ended = &mut pulled => match ended {
                Err(error) => {
                    let (_, message) = error.answer();
                    Some((Ok(json!({ "error": message, "errorDetail": { "message": message } })), None))
                }
                Ok(()) => Some((Ok(json!({ "status": "the image is there" })), None)),
            },
        }
    });
    Ok(Answer::Stream(Box::pin(lines)))
}
