//! The running vault: one store, its doors, and its background tasks.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use dockflare_host::{error_chain, page};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{Notify, watch};
use tokio::task::{JoinSet, spawn_blocking};
use tokio::time::{MissedTickBehavior, interval, sleep};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use crate::config::{Config, fixed_sections};
use crate::delivery::Delivery;
use crate::docker::Docker;
use crate::doors::admin::{self, Around};
use crate::doors::deliver;
use crate::pages::{Health, VaultPages};
use crate::start::{Opened, StartError, open};
use crate::store::{Removed, Sweep};
use crate::vault::Vault;
use crate::{launcher, reload};

/// How far the end of the audit in the store may lag behind the audit file.
const SAVE_EVERY: Duration = Duration::from_secs(1);
/// How long a start waits for a command that holds the store.
const COMMAND_LIMIT: Duration = Duration::from_secs(3);
/// How often to check the configuration file.
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// Pause between two passes that remove expired values and old deleted names, and between two steps of a pass.
const SWEEP_EVERY: Duration = Duration::from_secs(600);
const SWEEP_PAUSE: Duration = Duration::from_millis(100);
/// Pause after a step of a rotation that failed.
const RESEAL_PAUSE: Duration = Duration::from_secs(10);

/// Where the configuration comes from, so that it can be read again.
#[derive(Debug, Clone)]
pub struct Source {
    /// The file.
    pub file: PathBuf,
    /// Whether the operator named the file. A named file must exist.
    pub is_named: bool,
    /// The environment.
    pub env: BTreeMap<String, String>,
}

impl Source {
    /// Reads the configuration.
    ///
    /// # Errors
    /// All problems at once.
    pub fn load(&self) -> Result<Config, crate::config::ConfigErrors> {
        Config::load(&self.file, self.is_named, &self.env)
    }
}

/// Why the vault does not run.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The store cannot be opened.
    #[error(transparent)]
    Start(#[from] StartError),
    /// The admin socket cannot be opened.
    #[error("the admin socket {} cannot be opened: {error}; mount a tmpfs of the vault's own user there, or set admin.socket", path.display())]
    Socket {
        /// Where.
        path: PathBuf,
        /// Why.
        error: std::io::Error,
    },
    /// The pages cannot be served.
    #[error(
        "health.bind and health.port: {0} cannot be listened on ({1}); use another port, or port 0 to switch the pages off"
    )]
    Page(page::PageAddress, std::io::Error),
    /// A task ended that must never end.
    #[error(
        "the task {0} ended, which it must not: this is a mistake in the vault, please report it with the lines above"
    )]
    Task(&'static str),
}

impl RunError {
    /// 64: settings. 70: a bug in the vault. 73: a place that cannot be used. 74: the disk.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Start(error) => error.exit_code(),
            Self::Page(..) => 64,
            Self::Task(_) => 70,
            Self::Socket { .. } => 73,
        }
    }
}

/// Runs until `shutdown`.
///
/// # Errors
/// [`RunError`]; everything that was stored is on disk.
pub async fn run(
    source: Source,
    config: Config,
    accept_rollback: bool,
    shutdown: CancellationToken,
) -> Result<(), RunError> {
    let opened = {
        let config = config.clone();
        let opened = spawn_blocking(move || open(&config, accept_rollback, COMMAND_LIMIT)).await;
        opened.map_err(|_| RunError::Task("start"))??
    };
    let Opened { vault, broken, lock: _lock } = opened;
    let socket = admin::listen(&config.admin_socket)
        .map_err(|error| RunError::Socket { path: config.admin_socket.clone(), error })?;
    let listener = match config.health.map(|(ip, port)| page::PageAddress((ip, port).into())) {
        None => None,
        Some(address) => Some(page::bind(address).await.map_err(|error| RunError::Page(address, error))?),
    };
    let vault = Arc::new(vault);
    let health = Arc::new(Health::default());
    // Take SIGHUP before anybody knows that the vault runs: unhandled, it ends the process.
    let hangup = signal(SignalKind::hangup()).map_err(|_| RunError::Task("configuration"))?;
    if let Some(folder) = config.launcher.clone() {
        put_launcher(folder, &health).await;
    }
    greet(&config, &vault, &broken, &health);

    let rotated = Arc::new(Notify::new());
    let mut tasks = JoinSet::new();
    let (desk, inside) = deliver::desk();
    let around = Arc::new(Around { rotated: rotated.clone(), deliveries: Some(desk.clone()) });
    tasks.spawn(named("admin", admin::serve(socket, vault.clone(), around)));
    tasks.spawn(named("rotation", reseal(vault.clone(), rotated.clone(), health.clone())));
    tasks.spawn(named("sweep", sweep(vault.clone())));
    tasks.spawn(named("audit", save(vault.clone(), health.clone())));
    let (wanted, deliveries) = watch::channel(Arc::new(config.deliveries.clone()));
    let docker = Arc::new(Docker::new(config.docker.clone()));
    let reloading = reload::serve(docker.clone(), desk.clone(), deliveries.clone(), health.clone());
    tasks.spawn(named("reload", reloading));
    let memory = reload::Memory::beside(&config.storage.file);
    // Before the delivery directories are made.
    let noted = {
        let (memory, deliveries) = (memory.clone(), config.deliveries.clone());
        spawn_blocking(move || memory.note_missing(&deliveries)).await
    };
    if let Ok(Err(problem)) = noted {
        error!(
            "which containers are waited for cannot be noted: {problem}; start those by hand that Docker has refused"
        );
    }
    tasks.spawn(named("gate", reload::gate(docker, desk.clone(), deliveries.clone(), memory)));
    tasks.spawn(named("deliveries", deliver::serve(vault.clone(), deliveries, inside)));
    let following = follow(source, config.clone(), hangup, vault.clone(), health.clone(), wanted);
    tasks.spawn(named("configuration", following));
    if let Some(listener) = listener {
        let pages = VaultPages::new(vault.clone(), health.clone(), desk.clone());
        tasks.spawn(named("pages", async move { match page::serve(listener, pages).await {} }));
    }
    let ended = tokio::select! {
        () = shutdown.cancelled() => None,
        ended = tasks.join_next() => Some(ended),
    };
    // A write that a task has started still completes: the abort takes effect only between two steps.
    tasks.shutdown().await;
    let saved = spawn_blocking(move || vault.save()).await;
    if let Ok(Err(error)) = saved {
        error!("the end of the audit cannot be kept: {error}");
    }
    match ended {
        None => {
            info!("dockflare-vault stopped");
            Ok(())
        }
        Some(Some(Ok(name))) => Err(RunError::Task(name)),
        Some(_) => Err(RunError::Task("unknown")),
    }
}

async fn named(name: &'static str, work: impl Future<Output = ()>) -> &'static str {
    work.await;
    name
}

/// Installs the launcher. On failure the vault runs without it.
async fn put_launcher(folder: PathBuf, health: &Health) {
    let shown = folder.display().to_string();
    match spawn_blocking(move || launcher::install(&folder)).await {
        Ok(Ok(path)) => info!(path = %path.display(), "the launcher is in its place"),
        Ok(Err(problem)) => {
            error!(
                "launcher.folder: {shown} cannot be written ({problem}): mount a volume there that belongs to uid {}, and start the vault again",
                nix::unistd::geteuid()
            );
            health.launcher_missing.store(true, Ordering::Relaxed);
        }
        Err(problem) => error!("the launcher was not put in its place: {}", error_chain(&problem)),
    }
}

fn greet(config: &Config, vault: &Vault, broken: &[crate::audit::Broken], health: &Health) {
    let status = vault.peek();
    info!(
        version = env!("CARGO_PKG_VERSION"),
        secrets = status.secrets,
        master_key = status.master_key,
        grants = config.grants.rows().len(),
        "dockflare-vault started"
    );
    if config.storage.counter.is_none() {
        info!(
            "an older copy of the store would not be noticed: set storage.change_counter to a file on another volume"
        );
    }
    if config.nats.is_some() {
        warn!("this version has no NATS door: the sections nats and subjects are read and not used");
    }
    for broken in broken {
        error!("the audit was changed from outside: {broken}; going on, find out who did it");
    }
    health.audit_broken.store(!broken.is_empty(), Ordering::Relaxed);
}

/// Reseals records of older data keys step by step, after a start and after each rotation.
async fn reseal(vault: Arc<Vault>, rotated: Arc<Notify>, health: Arc<Health>) {
    let mut is_said = false;
    loop {
        let step = {
            let vault = vault.clone();
            spawn_blocking(move || vault.reseal()).await
        };
        match step {
            Ok(Ok(true)) => {
                if !std::mem::replace(&mut is_said, true) {
                    info!("sealing all secrets with the new data key");
                }
            }
            Ok(Ok(false)) => {
                if std::mem::replace(&mut is_said, false) {
                    info!("all secrets are sealed with the new data key, the old one is gone");
                }
                health.rotation_failed.store(false, Ordering::Relaxed);
                rotated.notified().await;
            }
            Ok(Err(problem)) => {
                if !health.rotation_failed.swap(true, Ordering::Relaxed) {
                    error!("the rotation stands still: {problem}; trying again");
                }
                sleep(RESEAL_PAUSE).await;
            }
            Err(_) => return,
        }
    }
}

/// Removes expired values and old deleted names, a little at a time.
async fn sweep(vault: Arc<Vault>) {
    let (mut state, mut is_said) = (Sweep::default(), false);
    loop {
        let step = {
            let vault = vault.clone();
            spawn_blocking(move || {
                let step = vault.sweep(&mut state);
                (state, step)
            })
            .await
        };
        let Ok((after, step)) = step else { return };
        state = after;
        match step {
            Ok(has_more) => {
                let Removed { values, names } = state.removed;
                if !has_more && (values, names) != (0, 0) {
                    info!(
                        values,
                        names, "removed values that were over for a day and names that were deleted long ago"
                    );
                }
                is_said = false;
                sleep(if has_more { SWEEP_PAUSE } else { SWEEP_EVERY }).await;
            }
            Err(problem) => {
                if !std::mem::replace(&mut is_said, true) {
                    error!("what is over cannot be removed: {problem}; trying again");
                }
                sleep(SWEEP_EVERY).await;
            }
        }
    }
}

/// Keeps the end of the audit in the store up to date.
async fn save(vault: Arc<Vault>, health: Arc<Health>) {
    let mut every = interval(SAVE_EVERY);
    every.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        every.tick().await;
        let vault = vault.clone();
        let saved = spawn_blocking(move || vault.save()).await;
        match saved {
            Ok(Ok(())) => {
                if health.store_failed.swap(false, Ordering::Relaxed) {
                    info!("the store can be written again");
                }
            }
            Ok(Err(problem)) => {
                if !health.store_failed.swap(true, Ordering::Relaxed) {
                    error!("the end of the audit cannot be kept: {problem}; trying again");
                }
            }
            Err(_) => return,
        }
    }
}

/// Applies new grants and deliveries when the file changes or on SIGHUP: all of them or nothing.
async fn follow(
    source: Source,
    mut present: Config,
    mut hangup: Signal,
    vault: Arc<Vault>,
    health: Arc<Health>,
    wanted: watch::Sender<Arc<Vec<Delivery>>>,
) {
    let mut seen = modified(&source).await;
    let mut last = seen;
    loop {
        let asked = tokio::select! {
            _ = hangup.recv() => true,
            () = sleep(LOOK_EVERY) => false,
        };
        let now = modified(&source).await;
        // Wait while the file is being written or is briefly missing.
        let is_still = std::mem::replace(&mut last, now) == now;
        if !asked && (now == seen || !is_still || now.is_none()) {
            continue;
        }
        seen = now;
        let read = {
            let source = source.clone();
            spawn_blocking(move || source.load()).await
        };
        match read {
            Ok(Ok(config)) if !fixed_sections(&config, &present).is_empty() => {
                health.config_refused.store(true, Ordering::Relaxed);
                let sections = fixed_sections(&config, &present).join(", ");
                error!(
                    "the new configuration is not taken, the present one goes on: {sections} count from a start, so restart the vault for it"
                );
            }
            Ok(Ok(config)) => {
                if health.config_refused.swap(false, Ordering::Relaxed) {
                    info!("the configuration is right again");
                }
                // Apply deliveries before grants, with nothing in between. A workload that loses its delivery together
                // with its grant keeps its files, and one that gets both is never refused.
                if config.deliveries != present.deliveries {
                    info!(deliveries = config.deliveries.len(), "took the new deliveries");
                    wanted.send_replace(Arc::new(config.deliveries.clone()));
                }
                if config.grants != present.grants {
                    info!(grants = config.grants.rows().len(), "took the new table of grants");
                    vault.replace_grants(config.grants.clone());
                }
                (present.grants, present.deliveries) = (config.grants, config.deliveries);
            }
            Ok(Err(problems)) => {
                health.config_refused.store(true, Ordering::Relaxed);
                for problem in problems.0 {
                    error!("the new configuration is not taken, the present one goes on: {problem}");
                }
            }
            Err(problem) => error!("the configuration cannot be read: {}", error_chain(&problem)),
        }
    }
}

/// Modification time and size. An editor that replaces the file and a swapped volume change at least one of them.
async fn modified(source: &Source) -> Option<(SystemTime, u64)> {
    let meta = tokio::fs::metadata(&source.file).await.ok()?;
    Some((meta.modified().ok()?, meta.len()))
}

/// Reads the flags, which are set when something is wrong, for the pages.
impl Health {
    pub(crate) fn is_set(flag: &AtomicBool) -> bool {
        flag.load(Ordering::Relaxed)
    }
}
