//! What can go wrong with a request, sorted by what a caller does about it.

use std::fmt;
use std::time::{Duration, SystemTime};

use reqwest::StatusCode;
use reqwest::header::{HeaderMap, LOCATION, RETRY_AFTER};

use super::wire;

/// How much of a refusal's message is repeated in the log.
const MAX_MESSAGE_CHARS: usize = 200;

/// What can go wrong with a request. Sorted by what a caller does about it.
#[derive(Debug)]
pub enum MasterError {
    /// No answer, half an answer, or one that says "later": 429, 5xx. Try again with back-off.
    Away {
        /// What happened.
        problem: String,
        /// What the master asked for.
        retry_after: Option<Duration>,
    },
    /// 401 or 403: the key or the id is not accepted.
    Refused {
        /// 401 or 403.
        status: StatusCode,
        /// v2's code.
        code: String,
        /// What the master said.
        message: String,
    },
    /// Cloudflare Access stands before the master and did not let the request through.
    Access {
        /// What it answered.
        status: StatusCode,
    },
    /// Another status that is not success.
    Status {
        /// The status.
        status: StatusCode,
        /// v2's code.
        code: String,
        /// What the master said.
        message: String,
    },
    /// The configured client cannot be built or the address cannot be formed.
    Client(String),
}

impl fmt::Display for MasterError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let said = |f: &mut fmt::Formatter<'_>, code: &str, message: &str| {
            let separator = if code.is_empty() || message.is_empty() { "" } else { ": " };
            if code.is_empty() && message.is_empty() { Ok(()) } else { write!(f, " ({code}{separator}{message})") }
        };
        match self {
            Self::Away { problem, .. } => f.write_str(problem),
            Self::Refused { status, code, message } => {
                write!(f, "refuses the agent key with {}", status.as_u16())?;
                said(f, code, message)
            }
            Self::Access { status } => {
                write!(f, "is behind Cloudflare Access, which answered {} instead of the master", status.as_u16())
            }
            Self::Status { status, code, message } => {
                write!(f, "answered {}", status.as_u16())?;
                said(f, code, message)
            }
            Self::Client(problem) => f.write_str(problem),
        }
    }
}

impl std::error::Error for MasterError {}

impl MasterError {
    /// v2's code, or an empty string.
    pub fn code(&self) -> &str {
        match self {
            Self::Refused { code, .. } | Self::Status { code, .. } => code,
            _ => "",
        }
    }

    /// The status, where there was an answer that counts as one.
    pub fn status(&self) -> Option<u16> {
        match self {
            Self::Refused { status, .. } | Self::Status { status, .. } | Self::Access { status } => {
                Some(status.as_u16())
            }
            Self::Away { .. } | Self::Client(_) => None,
        }
    }

    /// What the master asked to wait.
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Away { retry_after, .. } => *retry_after,
            _ => None,
        }
    }

    /// What an operator can do, for the end of a log line.
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::Away { .. } => "trying again, the tunnel is not touched",
            Self::Refused { .. } => {
                "the tunnel is not touched; set DOCKFLARE_API_KEY to a key from the master's Agents page (a key file is read again by itself)"
            }
            Self::Access { .. } => {
                "set CF_ACCESS_CLIENT_ID and CF_ACCESS_CLIENT_SECRET to a service token that the Access policy admits"
            }
            Self::Status { .. } => {
                "check that DOCKFLARE_MASTER_URL is the address of a DockFlare master, with its path prefix if it has one"
            }
            Self::Client(_) => "check the CA certificates in /etc/ssl/certs of the image",
        }
    }
}

/// Sorts what the HTTP client says.
pub(super) fn away(error: &reqwest::Error) -> MasterError {
    let kind = if error.is_timeout() {
        "does not answer"
    } else if error.is_connect() {
        "cannot be reached"
    } else {
        "cut the connection"
    };
    MasterError::Away { problem: format!("{kind}: {}", chain(error)), retry_after: None }
}

/// The causes of an error without its own text, which repeats the address; the last one names the matter.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut causes = Vec::<String>::new();
    let mut next = error.source();
    while let Some(cause) = next {
        causes.push(cause.to_string());
        next = cause.source();
    }
    causes.dedup();
    if causes.is_empty() { error.to_string() } else { causes.join(": ") }
}

/// Sorts an answer that is not a success.
pub(super) fn sort(status: StatusCode, headers: &HeaderMap, text: &[u8]) -> MasterError {
    let refusal = serde_json::from_slice::<wire::Refusal>(text).ok();
    let is_json = refusal.is_some();
    let refusal = refusal.unwrap_or_default();
    let code = printable(&refusal.code.unwrap_or_default());
    let message = refusal.message.or_else(|| refusal.error.as_ref()?.as_str().map(str::to_owned));
    let message = printable(&message.unwrap_or_default());
    match status.as_u16() {
        429 | 500..=599 => {
            let separator = if code.is_empty() { "" } else { ", " };
            MasterError::Away {
                problem: format!("answered {status}{separator}{code}"),
                retry_after: retry_after(headers),
            }
        }
        // Access sends people to a login page and machines a page of HTML.
        300..=399 if headers.contains_key(LOCATION) => MasterError::Access { status },
        403 if !is_json => MasterError::Access { status },
        401 | 403 => MasterError::Refused { status, code, message },
        _ => MasterError::Status { status, code, message },
    }
}

/// What another side says goes into one log line, and not all of it.
pub(crate) fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(MAX_MESSAGE_CHARS).collect()
}

/// Seconds or an HTTP date, RFC 9110 10.2.3.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let value = headers.get(RETRY_AFTER)?.to_str().ok()?.trim();
    match value.parse() {
        Ok(seconds) => Some(Duration::from_secs(seconds)),
        Err(_) => httpdate::parse_http_date(value).ok()?.duration_since(SystemTime::now()).ok(),
    }
}
