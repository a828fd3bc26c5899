//! Makes images from local files, once per process, for engines that cannot pull.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

use anyhow::{Context, Result, bail};
use bollard::body_full;
use bollard::query_parameters::{BuildImageOptions, CreateImageOptions};
use futures_util::{Stream, StreamExt};
use tokio::sync::OnceCell;

use crate::binaries::{binary, workspace_root};
use crate::dockerfile;
use crate::engine::docker;
use crate::files::Files;
use crate::haproxy;
use crate::process::me;

const ROOT: (u64, u64) = (0, 0);
/// The user of distroless images.
const NONROOT: &str = "USER 65532:65532";
/// Where the distribution keeps its bundle of trusted CA certificates.
const CA_BUNDLE: &str = "/etc/ssl/certs/ca-certificates.crt";

/// Images, each made once. [`main`](crate::main) removes those of [`images`]; without it, the next sweep does.
#[derive(Default)]
pub struct Images {
    owner: Owner,
    /// A std mutex: no await happens under it. The cell makes a second caller wait for the first one.
    made: Mutex<BTreeMap<String, Arc<OnceCell<String>>>>,
}

/// The names of the images, and the labels by which they are found for removal.
#[derive(Default)]
enum Owner {
    /// Names and labels of this process alone.
    #[default]
    Process,
    /// See [`Images::named`].
    Named { repository: String, label: (String, String) },
}

/// Returns the images of this process.
#[must_use]
pub fn images() -> &'static Images {
    static IMAGES: LazyLock<Images> = LazyLock::new(Images::default);
    &IMAGES
}

impl Images {
    /// Makes images named `<repository>/<what>:local` with this label, for use beyond the life of the process.
    /// Only [`remove_labelled`](crate::remove_labelled) removes them. A later image takes the name of an earlier one.
    #[must_use]
    pub fn named(repository: &str, label: (&str, &str)) -> Self {
        let label = (label.0.to_owned(), label.1.to_owned());
        Self { owner: Owner::Named { repository: repository.to_owned(), label }, made: Mutex::default() }
    }

    /// Makes an image of the `cloudflared` stand-in that resembles the real image.
    ///
    /// # Errors
    /// When the program does not compile or the engine refuses.
    pub async fn stand_in(&self) -> Result<String> {
        self.stand_in_with(&[]).await
    }

    /// Like [`Images::stand_in`], with behaviors set in the image: `[("STAND_IN_UNREADY", "1")]`.
    ///
    /// # Errors
    /// As for [`Images::stand_in`].
    pub async fn stand_in_with(&self, env: &[(&str, &str)]) -> Result<String> {
        self.once(&format!("cloudflared {env:?}"), async || {
            let files = Files::new().copy("/usr/local/bin/cloudflared", &binary("cloudflared")?, 0o755, ROOT)?.bytes(
                "/etc/passwd",
                "nonroot:x:65532:65532:nonroot:/home/nonroot:/sbin/nologin\n",
                0o644,
                ROOT,
            );
            let mut changes = vec![
                "ENV PATH=/usr/local/bin".to_owned(),
                NONROOT.to_owned(),
                r#"ENTRYPOINT ["cloudflared","--no-autoupdate"]"#.to_owned(),
                r#"CMD ["version"]"#.to_owned(),
                "LABEL org.opencontainers.image.source=https://github.com/cloudflare/cloudflared".to_owned(),
            ];
            changes.extend(env.iter().map(|(name, value)| format!("ENV {name}={value:?}")));
            self.image_from("cloudflared", &files, &changes).await
        })
        .await
    }

    /// Makes an image of the `workload` program.
    ///
    /// # Errors
    /// When the program does not compile or the engine refuses.
    pub async fn workload(&self) -> Result<String> {
        self.program("workload", &["EXPOSE 8080"]).await
    }

    /// Makes an image of the `credential-reader` program.
    ///
    /// # Errors
    /// When the program does not compile or the engine refuses.
    pub async fn credential_reader(&self) -> Result<String> {
        self.program("credential-reader", &[]).await
    }

    /// Makes an image of the `checker` program, which runs as user 4242 in group 1000.
    ///
    /// # Errors
    /// When the program does not compile or the engine refuses.
    pub async fn checker(&self) -> Result<String> {
        self.once("checker", async || {
            let files = Files::new().copy("/checker", &binary("checker")?, 0o755, ROOT)?;
            let changes = ["USER 4242:1000".to_owned(), r#"ENTRYPOINT ["/checker"]"#.to_owned()];
            self.image_from("checker", &files, &changes).await
        })
        .await
    }

    /// Makes an image of the development master.
    ///
    /// # Errors
    /// When the program does not compile or the engine refuses.
    pub async fn dev_master(&self) -> Result<String> {
        self.program("dockflare-dev-master", &[]).await
    }

    async fn program(&self, name: &str, changes: &[&str]) -> Result<String> {
        self.once(name, async || {
            let path = format!("/usr/local/bin/{name}");
            let files = Files::new().copy(&path, &binary(name)?, 0o755, ROOT)?;
            let mut all = vec![NONROOT.to_owned(), format!("ENTRYPOINT [{path:?}]")];
            all.extend(changes.iter().map(|change| (*change).to_owned()));
            self.image_from(name, &files, &all).await
        })
        .await
    }

    /// Makes an image of a Docker socket proxy: this machine's HAProxy, configured like the common socket proxies.
    /// [`Scope::socket_proxy`](crate::Scope::socket_proxy) runs it.
    ///
    /// # Errors
    /// When HAProxy is not installed or the engine refuses.
    pub async fn haproxy(&self) -> Result<String> {
        self.once("haproxy", async || self.image_from("socket-proxy", &haproxy::files()?, &haproxy::changes()).await)
            .await
    }

    /// Makes an image of the agent by the `agent` stage of the repository's `Dockerfile`, with this program in it.
    ///
    /// # Errors
    /// When the stage copies anything but a program, a CA bundle and two empty folders.
    pub async fn agent(&self, program: &Path) -> Result<String> {
        let name = program.file_name().and_then(|name| name.to_str()).context("the agent's path has no name")?;
        self.once(&format!("agent {}", program.display()), async || {
            let (empty, open) = (tempfile::tempdir()?, tempfile::tempdir()?);
            std::fs::set_permissions(open.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
            let sources: [(&str, &Path); 4] = [
                (name, program),
                ("ca-certificates.crt", Path::new(CA_BUNDLE)),
                ("data", empty.path()),
                ("run", open.path()),
            ];
            self.from_stage("agent", &workspace_root().join("Dockerfile"), Some("agent"), &sources).await
        })
        .await
    }

    /// Makes an image of the vault by the `vault` stage of the repository's `Dockerfile`, with this program in it.
    ///
    /// # Errors
    /// When the stage copies anything but a program and empty folders.
    pub async fn vault(&self, program: &Path) -> Result<String> {
        self.once(&format!("vault {}", program.display()), async || {
            let (empty, open) = (tempfile::tempdir()?, tempfile::tempdir()?);
            std::fs::set_permissions(open.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
            let sources: [(&str, &Path); 4] =
                [("dockflare-vault", program), ("data", empty.path()), ("launcher", open.path()), ("run", open.path())];
            self.from_stage("vault", &workspace_root().join("Dockerfile"), Some("vault"), &sources).await
        })
        .await
    }

    /// Builds an image by the Dockerfile's stage `FROM scratch AS <stage>`, or by its last `FROM scratch` stage.
    /// Whatever the stage copies `--from` other stages comes from `sources`: pairs of the path there, or its last part,
    /// and the file or folder here.
    ///
    /// Not cached: each call makes an image.
    ///
    /// # Errors
    /// When the stage copies a path that is not among the sources, or the engine refuses.
    pub async fn from_stage(
        &self,
        prefix: &str,
        file: &Path,
        stage: Option<&str>,
        sources: &[(&str, &Path)],
    ) -> Result<String> {
        let text = std::fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
        let stage = dockerfile::stage(&text, stage, sources).with_context(|| file.display().to_string())?;
        // At the top, so that the leftovers of an interrupted build have the labels too.
        let labels = self.labels().into_iter().map(|(key, value)| format!("LABEL {key}={value:?}\n"));
        let text = stage.dockerfile.replacen('\n', &format!("\n{}", labels.collect::<String>()), 1);
        let mut context = Files::new().bytes("Dockerfile", text, 0o644, ROOT);
        for (path, local, mode) in &stage.copies {
            context = match mode {
                Some(mode) => context.copy(path, local, *mode, ROOT)?,
                None => context.copy_all(path, local)?,
            };
        }
        let image = self.name(prefix);
        let options = BuildImageOptions {
            dockerfile: "Dockerfile".into(),
            t: Some(image.clone()),
            // Another process could remove the layers that the builds share.
            nocache: true,
            rm: true,
            forcerm: true,
            ..BuildImageOptions::default()
        };
        let docker = docker()?;
        finish(docker.build_image(options, None, Some(body_full(context.tar()?.into())))).await?;
        Ok(image)
    }

    /// Makes an image of these files. `changes` are Dockerfile instructions: `ENTRYPOINT`, `ENV`, `USER` …
    ///
    /// Not cached: each call makes an image.
    ///
    /// # Errors
    /// When the engine refuses.
    pub async fn image_from(&self, prefix: &str, files: &Files, changes: &[String]) -> Result<String> {
        let image = self.name(prefix);
        let labels = self.labels().into_iter().map(|(key, value)| format!("LABEL {key}={value:?}"));
        let options = CreateImageOptions {
            from_src: Some("-".into()),
            // Includes the tag: Podman ignores the separate `tag` parameter.
            repo: Some(image.clone()),
            changes: changes.iter().cloned().chain(labels).collect(),
            ..CreateImageOptions::default()
        };
        let (docker, changes) = (docker()?, options.changes.join("\n"));
        finish(docker.create_image(Some(options), Some(body_full(files.tar()?.into())), None)).await?;
        let made = docker.inspect_image(&image).await?.config.and_then(|config| config.labels).unwrap_or_default();
        if self.labels().keys().any(|label| !made.contains_key(label)) {
            // Podman applies only the first of several instructions: build once more on top to apply them all.
            let text = format!("FROM {image}\n{changes}\n");
            let context = Files::new().bytes("Dockerfile", text, 0o644, ROOT);
            let options = BuildImageOptions {
                dockerfile: "Dockerfile".into(),
                t: Some(image.clone()),
                rm: true,
                ..BuildImageOptions::default()
            };
            finish(docker.build_image(options, None, Some(body_full(context.tar()?.into())))).await?;
        }
        Ok(image)
    }

    /// Returns `dockflare-test/<prefix>:<process>-<n>`, or the name that [`Images::named`] describes.
    fn name(&self, prefix: &str) -> String {
        static COUNT: std::sync::atomic::AtomicUsize = std::sync::atomic::AtomicUsize::new(1);
        match &self.owner {
            Owner::Process => {
                let n = COUNT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                format!("dockflare-test/{prefix}:{}-{n}", me().suffix)
            }
            Owner::Named { repository, .. } => format!("{repository}/{prefix}:local"),
        }
    }

    fn labels(&self) -> HashMap<String, String> {
        match &self.owner {
            Owner::Process => me().labels(),
            Owner::Named { label: (key, value), .. } => HashMap::from([(key.clone(), value.clone())]),
        }
    }

    /// Returns the image of this key; makes it on the first call.
    async fn once(&self, key: &str, make: impl AsyncFnOnce() -> Result<String>) -> Result<String> {
        let cell = self.made.lock().unwrap_or_else(PoisonError::into_inner).entry(key.to_owned()).or_default().clone();
        let image = cell.get_or_try_init(async || make().await.with_context(|| format!("image {key}"))).await?;
        Ok(image.clone())
    }
}

/// Reads the report of a build or an import to its end: only then is the image done.
async fn finish<T>(report: impl Stream<Item = Result<T, bollard::errors::Error>>) -> Result<()> {
    let mut report = std::pin::pin!(report);
    while let Some(line) = report.next().await {
        if let Err(error) = line {
            bail!("the engine says: {error}");
        }
    }
    Ok(())
}
