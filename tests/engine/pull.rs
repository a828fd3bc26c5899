//! Tests pulling the cloudflared image from the test's own registry. Docker uses plain HTTP for registries on the
//! loopback address.

use std::collections::HashMap;
use std::convert::Infallible;
use std::io::Read;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result, ensure};
use dockflare_dev_master::Protocol;
use futures_util::TryStreamExt;
use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use ring::digest;
use serde_json::{Value, json};
use testkit::bollard::query_parameters::{RemoveImageOptions, TagImageOptions};
use testkit::{AgentProcess, Case, wait_until};
use tokio::net::TcpListener;

use crate::containers_scene::{Life, Story, Tunnel};
use crate::support::{SOON, Stage};

pub(crate) fn cases() -> Vec<Case> {
    testkit::cases![
        a_missing_image_is_pulled_by_its_tag,
        a_missing_image_is_pulled_by_its_digest,
        an_image_that_appears_while_its_pull_fails_is_used,
        a_tag_that_has_moved_is_pulled_at_a_redeploy_and_at_a_start_and_replaces_the_connector,
    ]
}

/// How the registry answers a request for the manifest.
#[derive(Clone, Copy, PartialEq)]
enum Mood {
    Serves,
    /// Refuses the request.
    Fails,
    /// Tags the image locally, so that it exists anyway, and then refuses the request.
    FailsButTags,
}

/// A registry with one image: the stand-in.
struct Registry {
    /// `127.0.0.1:port/cloudflared`.
    repository: String,
    manifest_digest: String,
    docker: testkit::Docker,
    content: Arc<Mutex<Content>>,
    _server: tokio::task::JoinHandle<()>,
}

#[derive(Clone)]
struct Content {
    blobs: HashMap<String, (String, Bytes)>,
    mood: Mood,
    docker: testkit::Docker,
    stand_in: String,
    repository: String,
}

const MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
const CONFIG: &str = "application/vnd.docker.container.image.v1+json";
const LAYER: &str = "application/vnd.docker.image.rootfs.diff.tar.gzip";

fn sha256(bytes: &[u8]) -> String {
    let hex: String =
        digest::digest(&digest::SHA256, bytes).as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{hex}")
}

impl Registry {
    async fn new(mood: Mood) -> Result<Self> {
        let docker = testkit::docker()?;
        let stand_in = testkit::images().stand_in_with(&[("STAND_IN_DRAIN", "300")]).await?;
        let (blobs, manifest_digest) = blobs(&docker, &stand_in).await?;
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let repository = format!("{}/cloudflared", listener.local_addr()?);
        let content = Content { blobs, mood, docker: docker.clone(), stand_in, repository: repository.clone() };
        let content = Arc::new(Mutex::new(content));
        let server = tokio::spawn(serve(listener, content.clone()));
        Ok(Self { repository, manifest_digest, docker, content, _server: server })
    }

    /// Moves the tag to this image. With `None`, the registry answers 403 from now on.
    async fn moves_to(&self, image: Option<&str>) -> Result<()> {
        let new = match image {
            Some(image) => Some(blobs(&self.docker, image).await?.0),
            None => None,
        };
        let mut content = self.content.lock().unwrap_or_else(PoisonError::into_inner);
        content.mood = if new.is_some() { Mood::Serves } else { Mood::Fails };
        content.blobs.extend(new.into_iter().flatten());
        Ok(())
    }

    fn tagged(&self) -> String {
        format!("{}:latest-test", self.repository)
    }

    fn digested(&self) -> String {
        format!("{}@{}", self.repository, self.manifest_digest)
    }

    /// Removes the pulled image.
    async fn forget(&self) {
        for reference in [self.tagged(), self.digested()] {
            let options = RemoveImageOptions { force: true, ..Default::default() };
            // Ignore errors: most tests create only one of the two references.
            let _ = self.docker.remove_image(&reference, Some(options), None).await;
        }
    }
}

/// Returns a local image as a registry serves it, by digest and by tag, and the digest of its manifest.
async fn blobs(docker: &testkit::Docker, image: &str) -> Result<(HashMap<String, (String, Bytes)>, String)> {
    let saved: Vec<Bytes> = docker.export_image(image).try_collect().await?;
    let mut files = HashMap::new();
    for entry in tar::Archive::new(saved.concat().as_slice()).entries()? {
        let mut entry = entry?;
        let mut content = Vec::new();
        entry.read_to_end(&mut content)?;
        files.insert(entry.path()?.display().to_string(), Bytes::from(content));
    }
    let index: Value = serde_json::from_slice(files.get("manifest.json").context("no manifest.json")?)?;
    let file = |name: &Value| files.get(name.as_str().unwrap_or_default()).cloned().context("a file is missing");
    let config = file(&index[0]["Config"])?;
    let layers = index[0]["Layers"].as_array().context("no layers")?;
    let layers: Vec<Bytes> = layers.iter().map(file).collect::<Result<_>>()?;
    let describe =
        |kind: &str, bytes: &Bytes| json!({ "mediaType": kind, "size": bytes.len(), "digest": sha256(bytes) });
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": describe(CONFIG, &config),
        "layers": layers.iter().map(|layer| describe(LAYER, layer)).collect::<Vec<_>>(),
    });
    let manifest = Bytes::from(manifest.to_string());
    let manifest_digest = sha256(&manifest);
    let mut blobs = HashMap::from([
        ("latest-test".to_owned(), (MANIFEST.to_owned(), manifest.clone())),
        (manifest_digest.clone(), (MANIFEST.to_owned(), manifest)),
        (sha256(&config), (CONFIG.to_owned(), config)),
    ]);
    blobs.extend(layers.into_iter().map(|layer| (sha256(&layer), (LAYER.to_owned(), layer))));
    Ok((blobs, manifest_digest))
}

async fn serve(listener: TcpListener, content: Arc<Mutex<Content>>) {
    while let Ok((stream, _)) = listener.accept().await {
        let content = content.clone();
        tokio::spawn(async move {
            let service = service_fn(move |request| {
                let now = content.lock().unwrap_or_else(PoisonError::into_inner).clone();
                answer(request, now)
            });
            // Ignore errors: Docker may hang up at any time.
            let _ = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
        });
    }
}

async fn answer(request: Request<Incoming>, content: Content) -> Result<Response<Full<Bytes>>, Infallible> {
    let path = request.uri().path();
    let wanted = path.rsplit('/').next().unwrap_or_default();
    let mut response = Response::new(Full::default());
    if path.contains("/manifests/") {
        match content.mood {
            Mood::Serves => {}
            Mood::Fails => {
                *response.status_mut() = StatusCode::FORBIDDEN;
                return Ok(response);
            }
            Mood::FailsButTags => {
                let options =
                    TagImageOptions { repo: Some(content.repository.clone()), tag: Some("latest-test".to_owned()) };
                // Ignore the result: without the tag the test fails anyway.
                let _ = content.docker.tag_image(&content.stand_in, Some(options)).await;
                *response.status_mut() = StatusCode::FORBIDDEN;
                return Ok(response);
            }
        }
    }
    match content.blobs.get(wanted) {
        Some((kind, bytes)) => {
            let headers = response.headers_mut();
            headers.extend(
                [("content-type", kind.as_str()), ("docker-content-digest", &sha256(bytes))].into_iter().filter_map(
                    |(name, value)| Some((hyper::header::HeaderName::from_static(name), value.parse().ok()?)),
                ),
            );
            *response.body_mut() = Full::new(bytes.clone());
        }
        None if path.ends_with("/v2/") => {}
        None => *response.status_mut() = StatusCode::NOT_FOUND,
    }
    Ok(response)
}

/// Runs a test of an agent whose image this registry serves. Removes the pulled image afterwards, also on failure.
async fn with_agent(
    mood: Mood,
    reference: impl Fn(&Registry) -> String,
    story: impl AsyncFnOnce(Stage, AgentProcess) -> Result<()>,
) -> Result<()> {
    let registry = Registry::new(mood).await?;
    let stage = Stage::with_image(Protocol::V2, reference(&registry)).await?;
    let agent = stage.agent()?;
    let told = story(stage, agent).await;
    registry.forget().await;
    told
}

async fn pulled(reference: impl Fn(&Registry) -> String) -> Result<()> {
    with_agent(Mood::Serves, reference, async |stage, agent| {
        stage.enrolled_agent("edge").await?;
        agent.wait_for_log("pulling the cloudflared image", SOON).await?;
        agent.wait_for_log("pulled the cloudflared image", SOON).await?;
        agent.wait_for_log("tunnel ready", SOON).await?;
        stage.tunnel_is("running").await.map(drop)
    })
    .await
}

async fn a_missing_image_is_pulled_by_its_tag() -> Result<()> {
    pulled(Registry::tagged).await
}

async fn a_missing_image_is_pulled_by_its_digest() -> Result<()> {
    pulled(Registry::digested).await
}

async fn an_image_that_appears_while_its_pull_fails_is_used() -> Result<()> {
    with_agent(Mood::FailsButTags, Registry::tagged, async |stage, agent| {
        stage.enrolled_agent("edge").await?;
        agent.wait_for_log("tunnel ready", SOON).await.map(drop)
    })
    .await
}

async fn a_tag_that_has_moved_is_pulled_at_a_redeploy_and_at_a_start_and_replaces_the_connector() -> Result<()> {
    let registry = Registry::new(Mood::Serves).await?;
    let mut stage = Stage::with_image(Protocol::V2, registry.tagged()).await?;
    stage.set("CLOUDFLARED_PULL", "always");
    let told = moved(&registry, &stage).await;
    registry.forget().await;
    told
}

async fn moved(registry: &Registry, stage: &Stage) -> Result<()> {
    let (tunnel, scope) = (Tunnel::new(stage, ""), &stage.scope);
    let image_of = async |name: &str| anyhow::Ok(scope.inspect(name).await?.image.context("no image")?);
    let id_of = async |image: &str| anyhow::Ok(scope.docker().inspect_image(image).await?.id.context("no id")?);
    let other = testkit::images().stand_in_with(&[("STAND_IN_DRAIN", "301")]).await?;
    let (first, second) = (testkit::images().stand_in_with(&[("STAND_IN_DRAIN", "300")]).await?, other);
    let (first_id, second_id) = (id_of(&first).await?, id_of(&second).await?);
    ensure!(first_id != second_id);
    let becomes = async |id: &str| {
        let what = "a connector of the other image";
        wait_until(what, 2 * SOON, async || {
            let is_alone = scope.status(&format!("{}-next", stage.tunnel)).await.ok()? == "gone";
            (is_alone && image_of(&stage.tunnel).await.ok()? == id).then_some(())
        })
        .await
        .context(id.to_owned())
    };
    let mut agent = tunnel.agent(stage)?;
    let known = tunnel.enrol(stage, &agent).await?;
    ensure!(image_of(&stage.tunnel).await? == first_id);
    let before = Life::now(stage).await?;

    // A redeploy makes exactly one successor, from the newer image.
    let story = Story::follow_named(stage, &format!("{}-next", stage.tunnel));
    registry.moves_to(Some(&second)).await?;
    stage.master.redeploy(&known.id)?;
    becomes(&second_id).await?;
    agent.wait_for_log("the tag has moved", SOON).await?;
    let taken_over = |log: &str| log.lines().filter(|line| line.contains("the new connector takes over")).count();
    assert_eq!(taken_over(&agent.log()), 1, "{}", agent.log());
    assert_eq!(story.count("create"), 1, "one was made of the image before");
    let redeployed = Life::now(stage).await?;
    ensure!(redeployed.id != before.id);

    // A start also checks the tag. If it has not moved, the agent leaves the connector alone.
    agent.sigkill()?;
    agent.wait_exit(SOON).await?;
    let mut agent = tunnel.agent(stage)?;
    agent.wait_for_log("tunnel ready", SOON).await?;
    ensure!(Life::now(stage).await? == redeployed);
    agent.sigkill()?;
    agent.wait_exit(SOON).await?;
    registry.moves_to(Some(&first)).await?;
    let mut agent = tunnel.agent(stage)?;
    becomes(&first_id).await?;
    assert_eq!(taken_over(&agent.log()), 1, "{}", agent.log());
    agent.sigkill()?;
    agent.wait_exit(SOON).await?;

    // A registry that is down or refuses must not harm the running connector.
    let last = Life::now(stage).await?;
    registry.moves_to(None).await?;
    let agent = tunnel.agent(stage)?;
    let line = agent.wait_for_log("the newest cloudflared image", SOON).await?;
    ensure!(line.contains("WARN") && line.contains("going on with the one that is here"), "{line}");
    agent.wait_for_log("tunnel ready", SOON).await?;
    ensure!(Life::now(stage).await? == last);
    stage.assert_no_violations();
    Ok(())
}
