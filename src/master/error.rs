//! Errors of a request, sorted by what the caller does about them.

use std::fmt;
use std::io;
use std::time::{Duration, SystemTime};

use jiff::Timestamp;
use reqwest::header::{HeaderMap, LOCATION, RETRY_AFTER, SET_COOKIE};
use reqwest::{StatusCode, Url};
use rustls::CertificateError;
use rustls::pki_types::UnixTime;

use super::wire;

/// How much of a refusal's message goes into the log.
const MAX_MESSAGE_CHARS: usize = 200;

/// Errors of a request, sorted by what the caller does about them.
#[derive(Debug)]
pub enum MasterError {
    /// No answer, a truncated answer, or a page of something else. In a running agent only [`Master`](super::Master)
    /// creates this error, and it logs it for all callers.
    Away {
        /// What happened.
        problem: String,
        /// The wait that the master asked for.
        retry_after: Option<Duration>,
    },
    /// 429 or 5xx: try again later. [`Master`](super::Master) logs this as well. Either the master or a proxy before it
    /// is in trouble, or the master cannot handle this one request.
    Unavailable {
        /// The status.
        status: StatusCode,
        /// The `code` of a v2 reply.
        code: String,
        /// The wait that the master asked for.
        retry_after: Option<Duration>,
    },
    /// A master answered properly, but the agent cannot use the answer: a protocol that it did not offer, no session,
    /// no account. [`Master`](super::Master) counts it as an answer, so the caller that retries must log it.
    Unusable {
        /// What is wrong with the answer.
        problem: String,
    },
    /// The certificate of the other side is not trusted. Try again with back-off: somebody may renew it or set a clock.
    Certificate {
        /// What is wrong with it, in the same words each time.
        problem: String,
        /// The remedy for the operator.
        remedy: &'static str,
    },
    /// 401 or 403: the key or the id is not accepted.
    Refused {
        /// 401 or 403.
        status: StatusCode,
        /// The `code` of a v2 reply.
        code: String,
        /// The master's message.
        message: String,
    },
    /// Cloudflare Access is in front of the master and refused the request.
    Access {
        /// The status.
        status: StatusCode,
    },
    /// Something other than a master answered, on the way to it or at a wrong address. Try again with back-off.
    Elsewhere {
        /// The status.
        status: StatusCode,
        /// What is wrong.
        problem: String,
        /// The remedy for the operator.
        remedy: &'static str,
    },
    /// Any other status that is not a success.
    Status {
        /// The status.
        status: StatusCode,
        /// The `code` of a v2 reply.
        code: String,
        /// The master's message.
        message: String,
    },
    /// The client cannot be built, or a request cannot be put together.
    Client(String),
}

impl fmt::Display for MasterError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let said = |f: &mut fmt::Formatter<'_>, code: &str, message: &str| {
            let separator = if code.is_empty() || message.is_empty() { "" } else { ": " };
            if code.is_empty() && message.is_empty() { Ok(()) } else { write!(f, " ({code}{separator}{message})") }
        };
        match self {
            Self::Away { problem, .. }
            | Self::Certificate { problem, .. }
            | Self::Elsewhere { problem, .. }
            | Self::Unusable { problem } => f.write_str(problem),
            Self::Unavailable { status, code, .. } => {
                let separator = if code.is_empty() { "" } else { ", " };
                write!(f, "answered {status}{separator}{code}")
            }
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
    /// The `code` of a v2 reply, or an empty string.
    pub fn code(&self) -> &str {
        match self {
            Self::Refused { code, .. } | Self::Status { code, .. } => code,
            _ => "",
        }
    }

    /// The status, if there was an answer with one.
    pub fn status(&self) -> Option<u16> {
        match self {
            Self::Refused { status, .. }
            | Self::Status { status, .. }
            | Self::Unavailable { status, .. }
            | Self::Elsewhere { status, .. }
            | Self::Access { status } => Some(status.as_u16()),
            Self::Away { .. } | Self::Certificate { .. } | Self::Unusable { .. } | Self::Client(_) => None,
        }
    }

    /// Whether the request reached no master, or none that could answer it. It may be repeated unchanged, after a wait.
    /// [`Master`](super::Master) has already logged it.
    pub fn is_away(&self) -> bool {
        matches!(
            self,
            Self::Away { .. }
                | Self::Unavailable { .. }
                | Self::Certificate { .. }
                | Self::Elsewhere { .. }
                | Self::Access { .. }
        )
    }

    /// Whether the refusal comes from a master: a master sends a code or a message, a proxy sends a page.
    pub(crate) fn is_explained(&self) -> bool {
        match self {
            Self::Refused { code, message, .. } | Self::Status { code, message, .. } => {
                !(code.is_empty() && message.is_empty())
            }
            _ => false,
        }
    }

    /// The wait that the master asked for.
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Away { retry_after, .. } | Self::Unavailable { retry_after, .. } => *retry_after,
            _ => None,
        }
    }

    /// The remedy for the operator when nothing retries.
    pub(crate) fn advice(&self) -> &'static str {
        match self {
            Self::Away { .. } | Self::Unavailable { .. } => "see to the master, and to the way to it",
            Self::Refused { .. } => "set DOCKFLARE_API_KEY to a key from the master's Agents page",
            Self::Certificate { remedy, .. } | Self::Elsewhere { remedy, .. } => {
                remedy.strip_suffix(GOES_ON).unwrap_or(remedy)
            }
            Self::Unusable { .. } => "update the older of agent and master",
            Self::Access { .. } | Self::Status { .. } | Self::Client(_) => self.remedy(),
        }
    }

    /// The remedy for the operator, for the end of a log line.
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::Unusable { .. } => {
                "trying again, the tunnel is not touched; update the older of agent and master, and check that nothing on the way changes its answers"
            }
            Self::Away { .. } | Self::Unavailable { .. } => {
                "trying again, the tunnel is not touched; if this lasts, check that the master runs and that DOCKFLARE_MASTER_URL leads to it"
            }
            Self::Certificate { remedy, .. } | Self::Elsewhere { remedy, .. } => remedy,
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

/// Sorts an error of the HTTP client.
pub(super) fn away(error: &reqwest::Error) -> MasterError {
    match refused_by_tls(error) {
        Some(rustls::Error::InvalidCertificate(certificate)) => return distrusted(certificate),
        Some(rustls::Error::InvalidMessage(rustls::InvalidMessage::InvalidContentType)) => {
            let problem = "does not speak TLS at this port, as https:// asks it to".to_owned();
            return MasterError::Certificate { problem, remedy: USE_HTTP };
        }
        _ => {}
    }
    let kind = if error.is_timeout() {
        "does not answer"
    } else if error.is_connect() {
        "cannot be reached"
    } else {
        "cut the connection"
    };
    MasterError::Away { problem: format!("{kind}: {}", chain(error)), retry_after: None }
}

/// The TLS library's objection to the other side, if that is the cause.
fn refused_by_tls<'a>(error: &'a (dyn std::error::Error + 'static)) -> Option<&'a rustls::Error> {
    let mut next = Some(error);
    while let Some(cause) = next {
        if let Some(refused) = cause.downcast_ref() {
            return Some(refused);
        }
        // `io::Error::source` skips the error that it wraps, which may be another `io::Error`.
        next = match cause.downcast_ref::<io::Error>().and_then(io::Error::get_ref) {
            Some(inner) => Some(inner),
            None => cause.source(),
        };
    }
    None
}

/// Describes the problem in words that stay the same from try to try. The library's words contain the time.
pub(super) fn distrusted(certificate: &CertificateError) -> MasterError {
    let date = |time: UnixTime| {
        let seconds = i64::try_from(time.as_secs()).unwrap_or(i64::MAX);
        Timestamp::from_second(seconds).map_or_else(|_| "an unknown date".to_owned(), |date| date.to_string())
    };
    let (problem, remedy) = match certificate {
        CertificateError::ExpiredContext { not_after, .. } => {
            (format!("has a certificate that expired at {}", date(*not_after)), RENEW)
        }
        CertificateError::Expired => ("has a certificate that has expired".to_owned(), RENEW),
        CertificateError::NotValidYetContext { not_before, .. } => {
            (format!("has a certificate that is not valid before {}", date(*not_before)), SET_CLOCK)
        }
        CertificateError::NotValidYet => ("has a certificate that is not valid yet".to_owned(), SET_CLOCK),
        CertificateError::NotValidForNameContext { presented, .. } => {
            // The library formats a name as `DnsName("master.example.com")`.
            let names = presented.iter().map(|name| name.split('"').nth(1).unwrap_or(name));
            let names = printable(&names.collect::<Vec<_>>().join(", "));
            (format!("has a certificate for another name: {names}"), USE_NAME)
        }
        CertificateError::NotValidForName => ("has a certificate for another name".to_owned(), USE_NAME),
        CertificateError::UnknownIssuer => {
            ("has a certificate of an authority that is not known here".to_owned(), KNOW_ISSUER)
        }
        other => (format!("has a certificate that is not accepted: {}", printable(&other.to_string())), REPLACE),
    };
    MasterError::Certificate { problem, remedy }
}

/// Sorts an answer that does not come from a master: from Cloudflare Access, a proxy, a firewall, or another port.
fn elsewhere(base: &Url, status: StatusCode, headers: &HeaderMap, text: &[u8]) -> Option<MasterError> {
    let location = headers.get(LOCATION).and_then(|to| base.join(to.to_str().ok()?).ok());
    let elsewhere = |problem, remedy| Some(MasterError::Elsewhere { status, problem, remedy });
    match status.as_u16() {
        300..=399 | 403 if is_access(location.as_ref(), headers) => Some(MasterError::Access { status }),
        300..=399 => {
            let to = location?;
            match moved(base, &to) {
                Some(moved) => elsewhere(format!("answers {} and redirects to {moved}", status.as_u16()), USE_ADDRESS),
                None => {
                    let at = to.host_str().unwrap_or("another page");
                    elsewhere(
                        format!("answers {} and redirects to a page of {}", status.as_u16(), printable(at)),
                        LET_THROUGH,
                    )
                }
            }
        }
        403 if headers.get("cf-mitigated").is_some_and(|what| what == "challenge") => {
            elsewhere("is behind Cloudflare, which wants a browser to solve a challenge (403)".to_owned(), NO_CHALLENGE)
        }
        403 => elsewhere(
            "is behind something that refuses the request with a page of its own (403)".to_owned(),
            LET_THROUGH,
        ),
        400 if is_tls_port(text) => {
            elsewhere("expects https there and was asked in plain http (400)".to_owned(), USE_HTTPS)
        }
        _ => None,
    }
}

/// Whether the answer is from Cloudflare Access: by the host of its login page, its headers or its cookies.
fn is_access(location: Option<&Url>, headers: &HeaderMap) -> bool {
    let host = location.and_then(Url::host_str).unwrap_or_default();
    host == "cloudflareaccess.com"
        || host.ends_with(".cloudflareaccess.com")
        || location.is_some_and(|to| to.path().starts_with("/cdn-cgi/access/"))
        || headers.keys().any(|name| name.as_str().starts_with("cf-access-"))
        || headers.get_all(SET_COOKIE).iter().any(|cookie| {
            let name = cookie.as_bytes().split(|byte| *byte == b'=').next().unwrap_or_default();
            [&b"CF_Authorization"[..], b"CF_AppSession", b"CF_Binding"].contains(&name)
        })
}

/// The base address that would need no redirect, if the redirect only changes what comes before the agent's own path.
fn moved(base: &Url, to: &Url) -> Option<Url> {
    let at = to.path().find("/api/v2/agents").or_else(|| to.path().find("/accounts"))?;
    let mut moved = to.clone();
    moved.set_path(&to.path()[..at]);
    moved.set_query(None);
    moved.set_fragment(None);
    let _ = moved.set_username("");
    let _ = moved.set_password(None);
    (moved.as_str().trim_end_matches('/') != base.as_str().trim_end_matches('/')).then_some(moved)
}

/// What nginx, Apache, HAProxy and Go answer to plain HTTP on a TLS port.
fn is_tls_port(text: &[u8]) -> bool {
    let text = String::from_utf8_lossy(&text[..text.len().min(4096)]).to_lowercase();
    ["to https port", "to an https server", "speaking plain http to an ssl", "was sent to https"]
        .iter()
        .any(|words| text.contains(words))
}

/// How the remedies for certificates and wrong addresses end in the log.
const GOES_ON: &str = "; trying again, the tunnel is not touched";
const USE_ADDRESS: &str = "set DOCKFLARE_MASTER_URL to that; trying again, the tunnel is not touched";
const USE_HTTPS: &str = "set DOCKFLARE_MASTER_URL to an address with https://; trying again, the tunnel is not touched";
const USE_HTTP: &str = "set DOCKFLARE_MASTER_URL to an address with http://, or to a port for https; trying again, the tunnel is not touched";
const LET_THROUGH: &str = "let the agent's requests, /api/v2/agents and /accounts, through what stands before the master; trying again, the tunnel is not touched";
const NO_CHALLENGE: &str = "make a rule at Cloudflare that skips challenges for /api/v2/agents and /accounts of the master's name; trying again, the tunnel is not touched";
pub(super) const NOT_LOCALHOST: &str = "localhost is the agent's own container: set DOCKFLARE_MASTER_URL to the name of the master's container on a shared network, or to the host (http://host.docker.internal with extra_hosts host.docker.internal:host-gateway); trying again, the tunnel is not touched";
const RENEW: &str = "renew the certificate at the master or the proxy before it, or set this host's clock; trying again, the tunnel is not touched";
const REPLACE: &str =
    "replace the certificate at the master or the proxy before it; trying again, the tunnel is not touched";
const SET_CLOCK: &str =
    "set the clock of this host, or of the one that made the certificate; trying again, the tunnel is not touched";
const USE_NAME: &str =
    "set DOCKFLARE_MASTER_URL to a name that the certificate is for; trying again, the tunnel is not touched";
const KNOW_ISSUER: &str = "mount a file with the authority's certificate and set SSL_CERT_FILE to it; trying again, the tunnel is not touched";

/// The causes of an error, joined; the last one names the problem. Leaves out the error's own text, which repeats the
/// address.
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
pub(super) fn sort(base: &Url, status: StatusCode, headers: &HeaderMap, text: &[u8]) -> MasterError {
    let refusal = serde_json::from_slice::<wire::Refusal>(text).ok();
    if (refusal.is_none() || status.is_redirection())
        && let Some(elsewhere) = elsewhere(base, status, headers, text)
    {
        return elsewhere;
    }
    let refusal = refusal.unwrap_or_default();
    let code = printable(&refusal.code.unwrap_or_default());
    let message = refusal.message.or_else(|| refusal.error.as_ref()?.as_str().map(str::to_owned));
    let message = printable(&message.unwrap_or_default());
    match status.as_u16() {
        429 | 500..=599 => MasterError::Unavailable { status, code, retry_after: retry_after(headers) },
        401 | 403 => MasterError::Refused { status, code, message },
        _ => MasterError::Status { status, code, message },
    }
}

/// Cuts text of the other side and makes it one line, for the log.
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
