//! Images made from local files, once per process, for engines that can pull nothing.

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
/// Where a distribution keeps the authorities that it trusts.
const CA_BUNDLE: &str = "/etc/ssl/certs/ca-certificates.crt";

/// Images, each made once. Those of [`images`] are removed by [`main`](crate::main); without it, by the next
/// sweep.
#[derive(Default)]
pub struct Images {
    owner: Owner,
    /// A std mutex: no await happens under it. The cell makes who comes second wait for the first.
    made: Mutex<BTreeMap<String, Arc<OnceCell<String>>>>,
}

/// What the images are called, and by what they are found to be removed.
#[derive(Default)]
enum Owner {
    /// Names and labels that no other process has.
    #[default]
    Process,
    /// See [`Images::named`].
    Named { repository: String, label: (String, String) },
}

/// The images of this process.
#[must_use]
pub fn images() -> &'static Images {
    static IMAGES: LazyLock<Images> = LazyLock::new(Images::default);
    &IMAGES
}

impl Images {
    /// Images called `<repository>/<what>:local` with this label, for something that outlives the process.
    /// Nobody removes them but who calls [`remove_labelled`](crate::remove_labelled); a later one takes the
    /// name of an earlier one.
    #[must_use]
    pub fn named(repository: &str, label: (&str, &str)) -> Self {
        let label = (label.0.to_owned(), label.1.to_owned());
        Self { owner: Owner::Named { repository: repository.to_owned(), label }, made: Mutex::default() }
    }

    /// The `cloudflared` stand-in, in an image like the real one.
    ///
    /// # Errors
    /// When it does not compile or the engine refuses.
    pub async fn stand_in(&self) -> Result<String> {
        self.stand_in_with(&[]).await
    }

    /// As [`Images::stand_in`], with behaviours set in the image: `[("STAND_IN_UNREADY", "1")]`.
    ///
    /// # Errors
    /// As there.
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

    /// The `workload` program.
    ///
    /// # Errors
    /// When it does not compile or the engine refuses.
    pub async fn workload(&self) -> Result<String> {
        self.program("workload", &["EXPOSE 8080"]).await
    }

    /// The `credential-reader` program.
    ///
    /// # Errors
    /// When it does not compile or the engine refuses.
    pub async fn credential_reader(&self) -> Result<String> {
        self.program("credential-reader", &[]).await
    }

    /// The `checker` program, as user 4242 of group 1000.
    ///
    /// # Errors
    /// When it does not compile or the engine refuses.
    pub async fn checker(&self) -> Result<String> {
        self.once("checker", async || {
            let files = Files::new().copy("/checker", &binary("checker")?, 0o755, ROOT)?;
            let changes = ["USER 4242:1000".to_owned(), r#"ENTRYPOINT ["/checker"]"#.to_owned()];
            self.image_from("checker", &files, &changes).await
        })
        .await
    }

    /// The development master.
    ///
    /// # Errors
    /// When it does not compile or the engine refuses.
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

    /// A Docker socket proxy: this machine's HAProxy with a configuration like that of the usual ones.
    /// [`Scope::socket_proxy`](crate::Scope::socket_proxy) runs it.
    ///
    /// # Errors
    /// When HAProxy is not installed or the engine refuses.
    pub async fn haproxy(&self) -> Result<String> {
        self.once("haproxy", async || self.image_from("socket-proxy", &haproxy::files()?, &haproxy::changes()).await)
            .await
    }

    /// The agent, by the last stage of the repository's own `Dockerfile`, with this program in it.
    ///
    /// # Errors
    /// When the stage copies something else than a program, a CA bundle and two empty folders.
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

    /// The vault, by its stage of the repository's own `Dockerfile`, with this program in it.
    ///
    /// # Errors
    /// When the stage copies something else than a program and empty folders.
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

    /// An image by the stage `FROM scratch AS` this name, or the last `FROM scratch`, of a Dockerfile. What it copies `--from` other stages is
    /// taken from `sources`: pairs of the path there, or of its last part, and the file or folder here.
    ///
    /// Not remembered: each call makes one.
    ///
    /// # Errors
    /// When it copies what is not among the sources, or the engine refuses.
    pub async fn from_stage(
        &self,
        prefix: &str,
        file: &Path,
        stage: Option<&str>,
        sources: &[(&str, &Path)],
    ) -> Result<String> {
        let text = std::fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
        let stage = dockerfile::stage(&text, stage, sources).with_context(|| file.display().to_string())?;
        // At the top, so that what an interrupted build leaves has them too.
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
            // Steps shared with another process's build could be removed under it.
            nocache: true,
            rm: true,
            forcerm: true,
            ..BuildImageOptions::default()
        };
        let docker = docker()?;
        finish(docker.build_image(options, None, Some(body_full(context.tar()?.into())))).await?;
        Ok(image)
    }

    /// An image of these files. `changes` are Dockerfile instructions: `ENTRYPOINT`, `ENV`, `USER` …
    ///
    /// Not remembered: each call makes one.
    ///
    /// # Errors
    /// When the engine refuses.
    pub async fn image_from(&self, prefix: &str, files: &Files, changes: &[String]) -> Result<String> {
        let image = self.name(prefix);
        let labels = self.labels().into_iter().map(|(key, value)| format!("LABEL {key}={value:?}"));
        let options = CreateImageOptions {
            from_src: Some("-".into()),
            // With the tag in it: Podman does not read the one beside it.
            repo: Some(image.clone()),
            changes: changes.iter().cloned().chain(labels).collect(),
            ..CreateImageOptions::default()
        };
        let (docker, changes) = (docker()?, options.changes.join("\n"));
        finish(docker.create_image(Some(options), Some(body_full(files.tar()?.into())), None)).await?;
        let made = docker.inspect_image(&image).await?.config.and_then(|config| config.labels).unwrap_or_default();
        if self.labels().keys().any(|label| !made.contains_key(label)) {
            // Podman reads the first of several instructions.
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

    /// `dockflare-test/<prefix>:<process>-<n>`, or as [`Images::named`] says.
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

    /// The image made under this key, or makes it.
    async fn once(&self, key: &str, make: impl AsyncFnOnce() -> Result<String>) -> Result<String> {
        let cell = self.made.lock().unwrap_or_else(PoisonError::into_inner).entry(key.to_owned()).or_default().clone();
        let image = cell.get_or_try_init(async || make().await.with_context(|| format!("image {key}"))).await?;
        Ok(image.clone())
    }
}

/// Reads a build's or import's report to its end: only then it is done.
async fn finish<T>(report: impl Stream<Item = Result<T, bollard::errors::Error>>) -> Result<()> {
    let mut report = std::pin::pin!(report);
    while let Some(line) = report.next().await {
        if let Err(error) = line {
            bail!("the engine says: {error}");
        }
    }
    Ok(())
}
