//! The operator's door: a unix socket in the vault's own private tmpfs, reached by `docker exec`. Whoever may open it
//! is the operator; nothing in a request says who asks.
//!
//! Each connection carries one request and one answer, each one line of JSON. Values are base64 in both directions.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};
use serde_json::{Value as Json, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Notify, Semaphore};
use tokio::task::spawn_blocking;
use tokio::time::timeout;
use zeroize::{Zeroize, Zeroizing};

use crate::doors::deliver::Desk;
use crate::keyfile;
use crate::principal::Principal;
use crate::secret::{MAX_VALUE_BYTES, SecretName, Value};
use crate::store::Change;
use crate::vault::{Refusal, Vault, now};

/// Longest request line, in bytes: a value in base64, its name, and room.
const MAX_LINE_BYTES: usize = MAX_VALUE_BYTES * 4 / 3 + 4096;
/// Most connections at a time; the next one waits for a free place.
const MAX_CONNECTIONS: usize = 16;
/// Longest time to receive a request and send its answer. A list of 100,000 names takes a fraction of it.
const LIMIT: Duration = Duration::from_secs(30);

/// A request of the operator.
#[derive(Serialize, Deserialize)]
#[serde(tag = "operation", rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// Read the newest value, or an older version that is kept.
    Get {
        /// The secret.
        name: String,
        /// `None` for the newest.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        version: Option<u64>,
    },
    /// Store a new version.
    Set {
        /// The secret.
        name: String,
        /// Base64.
        value_base64: Zeroizing<String>,
        /// Seconds from now.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        expires_in: Option<u64>,
        /// The newest version that the caller has seen.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        if_version: Option<u64>,
    },
    /// Delete a secret.
    Delete {
        /// The secret.
        name: String,
        /// Also take it from the workloads that have it.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        revoke: bool,
    },
    /// List names.
    List {
        /// Only names below this one.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        prefix: Option<String>,
    },
    /// List the versions of a secret.
    History {
        /// The secret.
        name: String,
    },
    /// Make a new data key, or wrap all keys for the master key in a file.
    Rotate {
        /// A file that the vault itself can read: no key crosses the socket.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        master_key_file: Option<PathBuf>,
    },
    /// Report counts and ages.
    Status,
    /// Verify the whole audit.
    AuditVerify,
}

/// The answer to a request.
#[derive(Debug, Serialize, Deserialize)]
pub struct Answer {
    /// `success` or `error`.
    pub status: String,
    /// With an error: a code for programs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub code: Option<String>,
    /// With an error: a sentence.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// With an error: the exit code of the command line.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit: Option<u8>,
    /// The result.
    #[serde(default, skip_serializing_if = "Json::is_null")]
    pub data: Json,
}

impl Answer {
    fn success(data: Json) -> Self {
        Self { status: "success".to_owned(), code: None, message: None, exit: None, data }
    }

    /// Makes an error.
    pub fn error(code: &str, message: &str, exit: u8) -> Self {
        let (code, message) = (Some(code.to_owned()), Some(message.to_owned()));
        Self { status: "error".to_owned(), code, message, exit: Some(exit), data: Json::Null }
    }
}

impl From<Refusal> for Answer {
    fn from(refusal: Refusal) -> Self {
        Self::error(refusal.code(), &refusal.to_string(), refusal.exit_code())
    }
}

/// What the running vault has besides the store.
#[derive(Debug, Default)]
pub struct Around {
    /// Notified when there is something to reseal.
    pub rotated: Arc<Notify>,
    /// The state of each workload; `None` where no vault runs.
    pub deliveries: Option<Desk>,
}

/// Answers one request as the operator. Blocks on the disk.
pub fn answer(vault: &Vault, request: Request, around: &Around) -> Answer {
    perform(vault, request, around).map_or_else(|answer| answer, Answer::success)
}

fn perform(vault: &Vault, request: Request, around: &Around) -> Result<Json, Answer> {
    let who = &Principal::Operator;
    let name =
        |text: &str| text.parse::<SecretName>().map_err(|error| Answer::error("bad_name", &error.to_string(), 64));
    Ok(match request {
        Request::Get { name: text, version } => {
            let found = vault.get(who, &name(&text)?, version)?;
            let mut data = json!({ "version": found.info.version, "expires_at": found.info.expires });
            // `json!` would copy the text and leave the copy in memory.
            data["value_base64"] = Json::String(STANDARD.encode(found.value.expose()));
            data
        }
        Request::Set { name: text, value_base64, expires_in, if_version } => {
            let name = name(&text)?;
            let bytes = STANDARD.decode(value_base64.as_bytes());
            let bytes = bytes.map_err(|_| Answer::error("bad_value", "the value is no base64", 64))?;
            let value = Value::new(bytes).map_err(|error| Answer::error("too_large", &error.to_string(), 64))?;
            let now = now();
            let expires = expires_in.map(|seconds| now.saturating_add_unsigned(seconds));
            json!({ "version": vault.set(who, &name, &value, &Change { now, expires, if_version })? })
        }
        Request::Delete { name: text, revoke } => json!({ "version": vault.delete(who, &name(&text)?, revoke)? }),
        Request::List { prefix } => {
            let prefix = prefix.map(|text| name(&text)).transpose()?;
            json!(vault.list(who, prefix.as_ref())?.iter().map(SecretName::as_str).collect::<Vec<_>>())
        }
        Request::History { name: text } => json!(vault.history(who, &name(&text)?)?),
        Request::Rotate { master_key_file: None } => {
            let data_key = vault.rotate(who)?;
            around.rotated.notify_one();
            json!({ "data_key": data_key })
        }
        Request::Rotate { master_key_file: Some(file) } if file.is_relative() => {
            let message =
                format!("{} is no absolute path: the vault would look for it in its own folder", file.display());
            return Err(Answer::error("bad_key", &message, 64));
        }
        Request::Rotate { master_key_file: Some(file) } => {
            let new = keyfile::read(&file, keyfile::is_alone());
            let new = new.map_err(|error| Answer::error("bad_key", &error.to_string(), 64))?;
            json!({ "master_key": vault.rotate_master(who, new)? })
        }
        Request::Status => {
            let mut status = json!(vault.status(who)?);
            if let Some(desk) = &around.deliveries {
                status["deliveries"] = desk.show();
            }
            status
        }
        Request::AuditVerify => {
            let verified = vault.verify_audit(who)?;
            let broken: Vec<_> = verified.broken.iter().map(ToString::to_string).collect();
            json!({ "lines": verified.lines, "files": verified.files, "broken": broken })
        }
    })
}

/// Opens the socket, which only this user may use. Replaces a socket that a killed vault left: the caller holds the
/// lock of the store, so nobody listens on it.
///
/// # Errors
/// When the folder is missing or not writable.
#[allow(clippy::disallowed_methods, reason = "at the start, before anything is served, on a tmpfs")]
pub fn listen(path: &Path) -> io::Result<UnixListener> {
    use std::os::unix::fs::{FileTypeExt, PermissionsExt};
    match std::fs::symlink_metadata(path) {
        Ok(meta) if meta.file_type().is_socket() => std::fs::remove_file(path)?,
        Ok(_) => return Err(io::Error::other("something that is no socket has its place")),
        Err(_) => {}
    }
    // Nobody may connect before the permissions are set.
    let before = nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o177));
    let listener = UnixListener::bind(path);
    nix::sys::stat::umask(before);
    let listener = listener?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// Serves the door until it is dropped.
pub async fn serve(listener: UnixListener, vault: Arc<Vault>, around: Arc<Around>) {
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        // The semaphore is never closed.
        let Ok(place) = places.clone().acquire_owned().await else { return };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "cannot take a connection on the admin socket; trying again");
                tokio::time::sleep(Duration::from_secs(1)).await;
                continue;
            }
        };
        let (vault, around) = (vault.clone(), around.clone());
        tokio::spawn(async move {
            // A client that breaks off or exceeds the limit gets no answer.
            let _ = timeout(LIMIT, converse(stream, vault, around)).await;
            drop(place);
        });
    }
}

async fn converse(mut stream: UnixStream, vault: Arc<Vault>, around: Arc<Around>) -> io::Result<()> {
    // Reserve all the room it may need: a buffer that grows leaves copies of the value behind.
    let mut line = Zeroizing::new(Vec::with_capacity(MAX_LINE_BYTES));
    let (mut reading, mut writing) = stream.split();
    while line.len() < MAX_LINE_BYTES && !line.ends_with(b"\n") {
        if reading.read_buf(&mut *line).await? == 0 {
            break;
        }
    }
    let request = serde_json::from_slice::<Request>(&line);
    let is_whole = line.ends_with(b"\n");
    drop(line);
    let answer = match request {
        // The error's text may show a piece of the value.
        Err(_) if !is_whole => Answer::error("too_large", "the request is cut off or too large", 64),
        Err(_) => Answer::error("bad_request", "the request is none of this version's", 64),
        Ok(request) => spawn_blocking(move || answer(&vault, request, &around))
            .await
            .map_err(|error| io::Error::other(error.to_string()))?,
    };
    let room = answer.data["value_base64"].as_str().map_or(0, str::len) + 4096;
    let mut text = Zeroizing::new(Vec::with_capacity(room));
    serde_json::to_writer(&mut *text, &answer)?;
    wipe(answer.data);
    text.push(b'\n');
    writing.write_all(&text).await?;
    writing.shutdown().await
}

/// Wipes every string in an answer, so that no value stays in memory.
pub fn wipe(data: Json) {
    match data {
        Json::String(mut text) => text.zeroize(),
        Json::Object(map) => map.into_iter().for_each(|(_, value)| wipe(value)),
        Json::Array(list) => list.into_iter().for_each(wipe),
        Json::Null | Json::Bool(_) | Json::Number(_) => {}
    }
}
