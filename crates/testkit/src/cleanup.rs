//! Removes a scope's objects, this process's images, and what dead processes left.
//!
//! Every listing here filters by label, and every removal by name checks the object's age.

use std::collections::HashMap;
use std::future::Future;
use std::time::Duration;

use anyhow::{Context, Result};
use bollard::Docker;
use bollard::errors::Error;
use bollard::models::NetworkDisconnectRequest;
use bollard::query_parameters::{
    ListContainersOptions, ListImagesOptions, ListNetworksOptions, ListVolumesOptions, RemoveContainerOptions,
    RemoveImageOptions, RemoveVolumeOptions,
};

use crate::engine::{docker, wait_until};
use crate::process::{self, Kind, MARK, Owned, SCOPE, is_orphan, me};

/// How often to try to remove a network that Docker reports as in use, and the pause between tries.
const REMOVAL_TRIES: usize = 20;
const REMOVAL_PAUSE: Duration = Duration::from_millis(100);

/// Runs `future` on a separate runtime.
pub(crate) fn block_on<T>(future: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::runtime::Builder::new_current_thread().enable_all().build().context("no runtime")?.block_on(future)
}

/// Removes the objects with the scope's label and those registered by name. Returns the containers' logs if
/// `want_logs` is set.
pub(crate) async fn end_scope(suffix: &str, owned: &[Owned], want_logs: bool) -> Result<Vec<(String, String)>> {
    let docker = docker()?;
    let label = format!("{SCOPE}={suffix}");
    let mut containers = ids(containers(&docker, &label, |_| true).await?);
    for owned in owned.iter().filter(|owned| owned.kind == Kind::Container) {
        containers.extend(owned_container(&docker, owned).await);
    }
    let mut logs = Vec::new();
    for id in &containers {
        if want_logs {
            logs.extend(tail(&docker, id).await);
        }
        remove_container(&docker, id).await?;
    }
    let mut networks = ids(networks(&docker, &label, |_| true).await?);
    for owned in owned.iter().filter(|owned| owned.kind == Kind::Network) {
        networks.extend(owned_network(&docker, owned).await);
    }
    for id in &networks {
        remove_network(&docker, id).await?;
    }
    for name in volumes(&docker, &label, |_| true).await? {
        remove_volume(&docker, &name).await?;
    }
    Ok(logs)
}

/// Removes what dead test processes of this machine left: containers, networks, volumes and images with this crate's
/// labels, and what those processes registered by name. [`main`](crate::main) calls it.
/// Returns what it removed, each entry like `container web-abcdefgh`.
///
/// # Errors
/// When the engine refuses.
pub async fn sweep(docker: &Docker) -> Result<Vec<String>> {
    let ledgers = process::orphaned_ledgers();
    let mut removed = remove_all(docker, MARK, is_orphan).await?;
    for owned in ledgers.iter().flat_map(|(_, owned)| owned) {
        if remove_owned(docker, owned).await? {
            removed.push(format!("{} {}", owned.kind, owned.name));
        }
    }
    for (path, _) in ledgers {
        // Another process may have swept it at the same time.
        drop(std::fs::remove_file(path));
    }
    Ok(removed)
}

/// Removes every container, network, volume and image with this label (`key` or `key=value`), by force.
/// Returns what it removed, as [`sweep`] does.
///
/// # Errors
/// When the engine refuses.
pub async fn remove_labelled(docker: &Docker, label: &str) -> Result<Vec<String>> {
    remove_all(docker, label, |_| true).await
}

/// Removes this process's images and what is left of its scopes. [`main`](crate::main) does so at its end; any other
/// program that uses the kit calls this function at its own end.
///
/// # Errors
/// When the engine refuses.
pub fn clean_up() -> Result<()> {
    block_on(async { end_process(&docker()?).await })
}

async fn end_process(docker: &Docker) -> Result<()> {
    remove_all(docker, MARK, |labels| me().owns(labels)).await?;
    process::close_ledger();
    Ok(())
}

type Labels = HashMap<String, String>;

/// Removes the objects with the label that `wanted` accepts, in the order that Docker allows.
async fn remove_all(docker: &Docker, label: &str, wanted: impl Fn(&Labels) -> bool) -> Result<Vec<String>> {
    let mut removed = Vec::new();
    for (id, name) in containers(docker, label, &wanted).await? {
        remove_container(docker, &id).await?;
        removed.push(format!("container {name}"));
    }
    for (id, name) in networks(docker, label, &wanted).await? {
        if remove_network(docker, &id).await? {
            removed.push(format!("network {name}"));
        }
    }
    for name in volumes(docker, label, &wanted).await? {
        remove_volume(docker, &name).await?;
        removed.push(format!("volume {name}"));
    }
    removed.extend(remove_images(docker, label, &wanted).await?);
    Ok(removed)
}

fn label_filter(label: &str) -> Option<HashMap<String, Vec<String>>> {
    Some(HashMap::from([("label".to_owned(), vec![label.to_owned()])]))
}

/// Lists ids and names.
async fn containers(docker: &Docker, label: &str, wanted: impl Fn(&Labels) -> bool) -> Result<Vec<(String, String)>> {
    let options = ListContainersOptions { all: true, filters: label_filter(label), ..Default::default() };
    let found = docker.list_containers(Some(options)).await?.into_iter();
    let found = found.filter(|container| wanted(&container.labels.clone().unwrap_or_default()));
    let named = found.filter_map(|container| {
        let id = container.id?;
        let names = container.names.unwrap_or_default();
        let name = names.first().map_or(id.as_str(), |name| name.trim_start_matches('/')).to_owned();
        Some((id, name))
    });
    Ok(named.collect())
}

/// Lists ids and names.
async fn networks(docker: &Docker, label: &str, wanted: impl Fn(&Labels) -> bool) -> Result<Vec<(String, String)>> {
    let found = docker.list_networks(Some(ListNetworksOptions { filters: label_filter(label) })).await?.into_iter();
    let found = found.filter(|network| wanted(&network.labels.clone().unwrap_or_default()));
    Ok(found.filter_map(|network| Some((network.id?, network.name.unwrap_or_default()))).collect())
}

async fn volumes(docker: &Docker, label: &str, wanted: impl Fn(&Labels) -> bool) -> Result<Vec<String>> {
    let found = docker.list_volumes(Some(ListVolumesOptions { filters: label_filter(label) })).await?;
    Ok(found.volumes.unwrap_or_default().into_iter().filter(|v| wanted(&v.labels)).map(|v| v.name).collect())
}

async fn remove_images(docker: &Docker, label: &str, wanted: impl Fn(&Labels) -> bool) -> Result<Vec<String>> {
    let options = ListImagesOptions { filters: label_filter(label), ..Default::default() };
    let mut removed = Vec::new();
    for image in docker.list_images(Some(options)).await?.into_iter().filter(|image| wanted(&image.labels)) {
        let options = RemoveImageOptions { force: true, ..Default::default() };
        tolerate_gone(docker.remove_image(&image.id, Some(options), None).await.map(drop))
            .with_context(|| format!("cannot remove image {:?}", image.repo_tags))?;
        removed.push(format!("image {}", image.repo_tags.first().unwrap_or(&image.id)));
    }
    Ok(removed)
}

fn ids(found: Vec<(String, String)>) -> Vec<String> {
    found.into_iter().map(|(id, _)| id).collect()
}

/// Removes an object registered by name. Returns false if there is none or it is not ours.
async fn remove_owned(docker: &Docker, owned: &Owned) -> Result<bool> {
    let found = match owned.kind {
        Kind::Container => owned_container(docker, owned).await,
        Kind::Network => owned_network(docker, owned).await,
    };
    let Some(id) = found else { return Ok(false) };
    match owned.kind {
        Kind::Container => remove_container(docker, &id).await?,
        Kind::Network => return remove_network(docker, &id).await,
    }
    Ok(true)
}

/// Returns the id of a container registered by name, unless it is older than its registration.
async fn owned_container(docker: &Docker, owned: &Owned) -> Option<String> {
    let found = docker.inspect_container(&owned.name, None).await.ok()?;
    // Docker also finds a container by an id prefix: accept only an exact name.
    let named = found.name.as_deref().map(|name| name.trim_start_matches('/')) == Some(&owned.name);
    (named && is_since(found.created.as_deref()?, owned.since)).then_some(found.id?)
}

async fn owned_network(docker: &Docker, owned: &Owned) -> Option<String> {
    let found = docker.inspect_network(&owned.name, None).await.ok()?;
    let named = found.name.as_deref() == Some(&owned.name);
    (named && is_since(found.created.as_deref()?, owned.since)).then_some(found.id?)
}

/// Whether Docker's time `created` is at or after our time `since`. The engine on this host uses the same clock.
fn is_since(created: &str, since: i64) -> bool {
    created.parse::<jiff::Timestamp>().is_ok_and(|created| created.as_millisecond() >= since)
}

/// Returns a container's name with its status, and the last 200 lines of its log.
async fn tail(docker: &Docker, id: &str) -> Option<(String, String)> {
    let found = docker.inspect_container(id, None).await.ok()?;
    let state = found.state.and_then(|state| state.status).map(|status| status.to_string()).unwrap_or_default();
    let log = crate::containers::logs(docker, id, "200").await.ok()?;
    Some((format!("{} ({state})", found.name.unwrap_or_default().trim_start_matches('/')), log))
}

async fn remove_container(docker: &Docker, id: &str) -> Result<()> {
    let options = RemoveContainerOptions { v: true, force: true, ..Default::default() };
    let removed = docker.remove_container(id, Some(options)).await;
    if let Err(Error::DockerResponseServerError { status_code: 409, .. }) = removed {
        // Another party is removing it: Docker itself, for example, if the container has `--rm`.
        return wait_until("a container to be gone", Duration::from_secs(10), async || {
            let gone = docker.inspect_container(id, None).await;
            matches!(gone, Err(Error::DockerResponseServerError { status_code: 404, .. })).then_some(())
        })
        .await;
    }
    tolerate_gone(removed).with_context(|| format!("cannot remove container {id}"))
}

/// Returns false when Docker cannot remove the network.
async fn remove_network(docker: &Docker, id: &str) -> Result<bool> {
    // Docker frees the last container's endpoint a moment after the container is gone.
    for _ in 0..REMOVAL_TRIES {
        // Any container still attached is not ours, but the network is.
        let attached = docker.inspect_network(id, None).await.ok().and_then(|network| network.containers);
        let attached: Vec<_> = attached.into_iter().flatten().map(|(id, _)| id).collect();
        for container in &attached {
            let request = NetworkDisconnectRequest { container: container.clone(), force: Some(true) };
            drop(docker.disconnect_network(id, request).await);
        }
        match docker.remove_network(id).await {
            Err(Error::DockerResponseServerError { status_code: 403, message })
                if message.contains("has active endpoints") => {}
            removed => {
                return tolerate_gone(removed).map(|()| true).with_context(|| format!("cannot remove network {id}"));
            }
        }
        tokio::time::sleep(REMOVAL_PAUSE).await;
    }
    // Engine 20.10 may count an endpoint that does not exist. Then nobody can remove the network until it restarts.
    eprintln!("testkit: Docker miscounts the places on network {id}, which stays until dockerd is restarted");
    Ok(false)
}

async fn remove_volume(docker: &Docker, name: &str) -> Result<()> {
    let removed = docker.remove_volume(name, Some(RemoveVolumeOptions { force: true })).await;
    tolerate_gone(removed).with_context(|| format!("cannot remove volume {name}"))
}

/// Treats an object that is already gone as removed.
fn tolerate_gone(result: Result<(), Error>) -> Result<(), Error> {
    match result {
        Err(Error::DockerResponseServerError { status_code: 404, .. }) => Ok(()),
        other => other,
    }
}
