//! All HTTP to the master goes through this module.
//!
//! It adds the credentials, limits the size of replies, never follows a redirect, rereads a rotated key from its file,
//! and sorts failures into the few kinds that callers treat differently ([`MasterError`]). It logs once for all callers
//! when the master goes away and when it is back. It keeps nothing on disk; after a crash it starts from scratch.

use std::future::Future;
use std::net::IpAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use dockflare_host::aside::Aside;
use dockflare_host::{container, disk};
use reqwest::header::{AUTHORIZATION, CONTENT_TYPE, DATE, HeaderMap, HeaderValue};
use reqwest::{Client, Method, Response, StatusCode, Url};
use secrecy::{ExposeSecret, SecretString};
use serde::Serialize;
use serde::de::{DeserializeOwned, IgnoredAny};
use tokio::time::{Instant, sleep, timeout};
use tracing::{debug, info, warn};

use crate::config::{MasterConfig, Secret};
use crate::http;
use crate::metrics::Metrics;
use crate::retry::Trouble;
use crate::state::AgentId;

mod certificate;
mod error;
pub(crate) mod wire;
pub(crate) use certificate::shown as certificate_shown;
pub use error::MasterError;
pub(crate) use error::printable;
use error::{NOT_LOCALHOST, away, chain, sort};

/// Maximum size of a reply. A larger one is refused while it is read; no honest reply comes near.
const MAX_REPLY_BYTES: usize = 4 << 20;
/// Limit from the first byte sent to the last byte read. A master may take half a minute to answer. It sends commands
/// only once, so the agent must not give up on such an answer too early.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(90);
/// After this time, give up a request once the master answers a later one. A little more than the half minute that a
/// master may take.
const PATIENCE: Duration = Duration::from_secs(31);
/// The later request must be answered within this time. The one that it overtook then gets the same time again.
const OVERTAKES_WITHIN: Duration = Duration::from_secs(3);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Less than the 10 s after which common proxies close an idle connection.
const IDLE_CONNECTION: Duration = Duration::from_secs(8);

/// The client of a master, for both protocols.
#[derive(Debug)]
pub struct Master {
    client: Client,
    base: Url,
    key: Mutex<Secret>,
    key_file: Aside<Result<Option<SecretString>, String>>,
    /// The address is loopback in the container's own network, where there is no master.
    is_own_container: bool,
    access: HeaderMap,
    link: Mutex<Link>,
    metrics: Metrics,
}

/// What is known about the connection.
#[derive(Debug)]
struct Link {
    trouble: Trouble,
    last_contact: Option<Instant>,
    last_report: Option<SystemTime>,
    /// Number of requests that failed because the master was away.
    failures: u64,
}

/// Result of [`Master::probe`].
#[derive(Debug)]
pub(crate) struct Probed {
    /// The protocol, 1 or 2, of a master that accepts the key; or why there is none.
    pub(crate) answer: Result<u32, MasterError>,
    /// The `Date` header of the answer, and this host's clock when it arrived.
    pub(crate) clocks: Option<(SystemTime, SystemTime)>,
}

impl Master {
    /// Prepares the client; sends nothing yet.
    ///
    /// # Errors
    /// [`MasterError::Client`] when the address is `https` and no CA certificates are found.
    pub fn new(config: MasterConfig, metrics: Metrics) -> Result<Self, MasterError> {
        let mut client = http::client()
            .user_agent(concat!("dockflare-agent/", env!("CARGO_PKG_VERSION")))
            .redirect(reqwest::redirect::Policy::none())
            .connect_timeout(CONNECT_TIMEOUT)
            .timeout(REQUEST_TIMEOUT)
            .pool_idle_timeout(IDLE_CONNECTION)
            // Retries are up to the callers: they know what may be sent twice.
            .retry(reqwest::retry::never());
        if config.url.scheme() == "http" {
            // A master in the next container needs no CA file.
            client = client.tls_certs_only([]);
        }
        let client = client
            .build()
            .map_err(|error| MasterError::Client(format!("the HTTPS client cannot be set up: {}", chain(&error))))?;
        let mut access = HeaderMap::new();
        if let Some(token) = config.access {
            for (name, secret) in
                [("cf-access-client-id", token.client_id), ("cf-access-client-secret", token.client_secret)]
            {
                let mut value = HeaderValue::from_str(secret.expose_secret())
                    .map_err(|_| MasterError::Client("the Access token does not fit into a header".to_owned()))?;
                value.set_sensitive(true);
                access.insert(name, value);
            }
        }
        let link = Link { trouble: Trouble::new("the master"), last_contact: None, last_report: None, failures: 0 };
        let is_own_container = is_loopback(&config.url) && container::has_own_network();
        Ok(Self {
            client,
            base: config.url,
            key: Mutex::new(config.key),
            key_file: Aside::default(),
            is_own_container,
            access,
            link: Mutex::new(link),
            metrics,
        })
    }

    /// The base address, which never holds credentials.
    pub fn url(&self) -> &Url {
        &self.base
    }

    /// When the master last answered any request.
    pub fn last_contact(&self) -> Option<Instant> {
        self.link().last_contact
    }

    /// When the master last accepted a complete report.
    pub fn last_report(&self) -> Option<SystemTime> {
        self.link().last_report
    }

    /// How many requests of all callers found the master away.
    pub(crate) fn failures(&self) -> u64 {
        self.link().failures
    }

    /// Records that the master accepted a complete report.
    pub(crate) fn report_taken(&self) {
        self.link().last_report = Some(SystemTime::now());
    }

    /// `POST /register`. Also returns whether the master has just created the agent.
    pub(crate) async fn register(&self, body: &wire::Register<'_>) -> Result<(wire::Registered, bool), MasterError> {
        let path = ["api", "v2", "agents", "register"];
        let answered = self.try_with_key("register", Method::POST, &path, Some(body)).await;
        let read = answered.and_then(|(status, text)| Ok((read(&text)?, status == StatusCode::CREATED)));
        self.note(read.as_ref().err());
        read
    }

    /// `GET /{agent}/commands`. Empties the master's queue: a command lost from here on is lost for good.
    pub(crate) async fn commands(&self, agent: &AgentId) -> Result<wire::Commands, MasterError> {
        self.call("commands", Method::GET, &["api", "v2", "agents", agent.as_str(), "commands"], None::<&()>).await
    }

    /// `POST /{agent}/events` with a JSON body. Returns the protocol of the master that took it, if the reply shows it.
    pub(crate) async fn send_event(&self, agent: &AgentId, body: &str) -> Result<Option<u32>, MasterError> {
        let path = ["api", "v2", "agents", agent.as_str(), "events"];
        let answered = self.post_with_key("events", Method::POST, &path, Some(body.as_bytes().to_vec())).await;
        let taken = answered.and_then(|(_, text)| {
            if !text.is_empty() {
                read::<IgnoredAny>(&text)?;
            }
            Ok(wire::protocol_of_success(&text))
        });
        self.note(taken.as_ref().err());
        taken
    }

    /// `POST /{agent}/decommission/{operation}/ack`.
    pub(crate) async fn acknowledge(&self, agent: &AgentId, ack: &wire::Ack) -> Result<(), MasterError> {
        let path = ["api", "v2", "agents", agent.as_str(), "decommission", &ack.operation_id, "ack"];
        self.tell("acknowledge", Method::POST, &path, Some(ack)).await
    }

    /// Tests whether a master accepts the key, and which protocol it speaks, without side effects. Sends an event
    /// without content, which both protocols refuse with 400 after they have checked the key, and record nowhere. Any
    /// id will do. Logs nothing.
    pub(crate) async fn probe(&self, agent: &AgentId) -> Probed {
        let url = route(&self.base, &["api", "v2", "agents", agent.as_str(), "events"]);
        let (status, headers, text) = match self.exchange(Method::POST, url, Some(b"{}".to_vec()), &mut None).await {
            Ok(answered) => answered,
            Err(error) => return Probed { answer: Err(error), clocks: None },
        };
        let date = headers.get(DATE).and_then(|date| httpdate::parse_http_date(date.to_str().ok()?).ok());
        let answer = match wire::protocol_of_refusal(&text) {
            Some(protocol) if status == StatusCode::BAD_REQUEST => Ok(protocol),
            _ => Err(sort(&self.base, status, &headers, &text)),
        };
        Probed { answer, clocks: date.map(|date| (date, SystemTime::now())) }
    }

    /// `GET /accounts`.
    pub(crate) async fn accounts(&self) -> Result<wire::Accounts, MasterError> {
        self.call("accounts", Method::GET, &["accounts"], None::<&()>).await
    }

    /// `PUT /accounts/{account}/cfd_tunnel/{tunnel}/configurations`.
    pub(crate) async fn put_configuration(
        &self,
        account: &str,
        tunnel: &str,
        body: &serde_json::Value,
    ) -> Result<(), MasterError> {
        let path = ["accounts", account, "cfd_tunnel", tunnel, "configurations"];
        self.tell("configuration", Method::PUT, &path, Some(body)).await
    }

    /// Sends a request whose answer is JSON. `name` is the route's name in the metrics.
    async fn call<T: DeserializeOwned>(
        &self,
        name: &'static str,
        method: Method,
        path: &[&str],
        body: Option<&impl Serialize>,
    ) -> Result<T, MasterError> {
        let parsed = self.try_with_key(name, method, path, body).await.and_then(|(_, text)| read(&text));
        self.note(parsed.as_ref().err());
        parsed
    }

    /// Sends a request of whose answer only the status matters. A body must be JSON: something between agent and master
    /// may answer 200 with a page of its own.
    async fn tell(
        &self,
        name: &'static str,
        method: Method,
        path: &[&str],
        body: Option<&impl Serialize>,
    ) -> Result<(), MasterError> {
        let told = self.try_with_key(name, method, path, body).await;
        let told =
            told.and_then(|(_, text)| if text.is_empty() { Ok(()) } else { read::<IgnoredAny>(&text).map(drop) });
        self.note(told.as_ref().err());
        told
    }

    /// Sends a request, and once more if it was refused and the key file now holds another key.
    async fn try_with_key(
        &self,
        name: &'static str,
        method: Method,
        path: &[&str],
        body: Option<&impl Serialize>,
    ) -> Result<(StatusCode, Vec<u8>), MasterError> {
        let body = body
            .map(serde_json::to_vec)
            .transpose()
            .map_err(|error| MasterError::Client(format!("a message cannot be written as JSON: {error}")))?;
        self.post_with_key(name, method, path, body).await
    }

    async fn post_with_key(
        &self,
        name: &'static str,
        method: Method,
        path: &[&str],
        body: Option<Vec<u8>>,
    ) -> Result<(StatusCode, Vec<u8>), MasterError> {
        let url = route(&self.base, path);
        let result = self.attempt(name, method.clone(), url.clone(), body.clone()).await;
        match result {
            Err(MasterError::Refused { .. }) if self.reread_key().await => self.attempt(name, method, url, body).await,
            result => result,
        }
    }

    async fn attempt(
        &self,
        name: &'static str,
        method: Method,
        url: Url,
        body: Option<Vec<u8>>,
    ) -> Result<(StatusCode, Vec<u8>), MasterError> {
        let began = Instant::now();
        let mut answered = None;
        let result = self.unless_overtaken(self.exchange(method, url, body, &mut answered)).await;
        self.metrics.request(name, answered.map(|status| status.as_u16()), began.elapsed());
        let (status, headers, text) = result?;
        if status.is_success() { Ok((status, text)) } else { Err(sort(&self.base, status, &headers, &text)) }
    }

    /// Waits for an answer as long as it may still come. A master may take half a minute. But if the network failed for
    /// a moment and lost the request, no answer ever comes, although later requests are answered. So after
    /// [`PATIENCE`], send requests without side effects, each over another connection. If one is answered at once and
    /// this one still is not, give this one up.
    async fn unless_overtaken<T>(
        &self,
        answer: impl Future<Output = Result<T, MasterError>>,
    ) -> Result<T, MasterError> {
        let mut answer = std::pin::pin!(answer);
        let began = Instant::now();
        if let Ok(answered) = timeout(PATIENCE, &mut answer).await {
            return answered;
        }
        loop {
            let overtaken = async {
                let answered = matches!(timeout(OVERTAKES_WITHIN, self.is_answering()).await, Ok(true));
                sleep(OVERTAKES_WITHIN).await;
                answered
            };
            tokio::select! {
                biased;
                answered = &mut answer => return answered,
                is_overtaken = overtaken => if is_overtaken {
                    debug!(seconds = began.elapsed().as_secs(), "giving up a request that a later one has overtaken");
                    let problem = "did not answer a request while it answered a later one".to_owned();
                    return Err(MasterError::Away { problem, retry_after: None });
                },
            }
        }
    }

    /// Whether a master answers a request without side effects. Never uses the connection of a request under way.
    async fn is_answering(&self) -> bool {
        let url = route(&self.base, &["api", "v2", "agents", "probe", "events"]);
        match self.exchange(Method::POST, url, Some(b"{}".to_vec()), &mut None).await {
            Ok((status, ..)) => !status.is_server_error() && status != StatusCode::TOO_MANY_REQUESTS,
            Err(_) => false,
        }
    }

    /// Sets `answered` once there is a status, whatever happens to the body.
    async fn exchange(
        &self,
        method: Method,
        url: Url,
        body: Option<Vec<u8>>,
        answered: &mut Option<StatusCode>,
    ) -> Result<(StatusCode, HeaderMap, Vec<u8>), MasterError> {
        let mut request = self.client.request(method, url).headers(self.access.clone());
        let mut authorization = {
            let key: SecretString = lock(&self.key).value.clone();
            HeaderValue::from_str(&format!("Bearer {}", key.expose_secret()))
                .map_err(|_| MasterError::Client("the agent key does not fit into a header".to_owned()))?
        };
        authorization.set_sensitive(true);
        request = request.header(AUTHORIZATION, authorization);
        if let Some(body) = body {
            request = request.header(CONTENT_TYPE, "application/json").body(body);
        }
        let response = request.send().await.map_err(|error| away(&error))?;
        let (status, headers) = (response.status(), response.headers().clone());
        *answered = Some(status);
        Ok((status, headers, read_bounded(response).await?))
    }

    /// Takes a rotated key from its file and returns whether there is a new one. If the file's disk hangs, waits only a
    /// moment, with a single separate thread.
    async fn reread_key(&self) -> bool {
        let known = lock(&self.key).clone();
        let Some(file) = known.file.as_deref().map(|file| file.display().to_string()) else { return false };
        let read = self.key_file.or_earlier(disk::LIMIT, move || known.reread()).await;
        match read.unwrap_or_else(|| Err(disk::Unread::Hangs.to_string())) {
            Ok(Some(value)) => {
                let mut key = lock(&self.key);
                let is_new = key.value.expose_secret() != value.expose_secret();
                if is_new {
                    info!("the key file holds a new agent key, using it");
                }
                key.value = value;
                // Another task may have taken it in the meantime, but it is new to this request.
                true
            }
            Ok(None) => false,
            Err(problem) => {
                warn!(file, "the key file {problem}; going on with the key read before");
                false
            }
        }
    }

    /// The remedy for the operator when the master is away.
    fn remedy(&self, error: &MasterError) -> &'static str {
        match error {
            MasterError::Away { .. } if self.is_own_container => NOT_LOCALHOST,
            other => other.remedy(),
        }
    }

    /// Updates what all callers share: whether the master can be reached.
    fn note(&self, error: Option<&MasterError>) {
        let mut link = self.link();
        match error {
            Some(error) if error.is_away() => {
                link.failures += 1;
                link.trouble.failed(error, self.remedy(error));
            }
            _ => {
                link.last_contact = Some(Instant::now());
                link.trouble.ended();
            }
        }
    }

    fn link(&self) -> MutexGuard<'_, Link> {
        lock(&self.link)
    }
}

/// Whether an address is loopback.
pub(crate) fn is_loopback(url: &Url) -> bool {
    let host = url.host_str().unwrap_or_default().trim_matches(['[', ']']);
    host == "localhost" || host.ends_with(".localhost") || host.parse().is_ok_and(|ip: IpAddr| ip.is_loopback())
}

/// The address of a route below the base's own path, with or without a trailing slash.
fn route(base: &Url, path: &[&str]) -> Url {
    let mut url = base.clone();
    if let Ok(mut segments) = url.path_segments_mut() {
        segments.pop_if_empty().extend(path);
    }
    url
}

/// No await happens under these locks, and no panic leaves them half-changed.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn read<T: DeserializeOwned>(text: &[u8]) -> Result<T, MasterError> {
    serde_json::from_slice(text).map_err(|error| {
        let place = format!("line {} column {}", error.line(), error.column());
        let problem = format!("answered 200 with something else than the JSON that was due ({place})");
        MasterError::Away { problem, retry_after: None }
    })
}

async fn read_bounded(mut response: Response) -> Result<Vec<u8>, MasterError> {
    let mut text = Vec::new();
    while let Some(chunk) = response.chunk().await.map_err(|error| away(&error))? {
        if text.len() + chunk.len() > MAX_REPLY_BYTES {
            let problem = format!("sent a reply of more than {} MiB, which was not read", MAX_REPLY_BYTES >> 20);
            return Err(MasterError::Away { problem, retry_after: None });
        }
        text.extend_from_slice(&chunk);
    }
    Ok(text)
}

/// See [`crate::fuzzing`].
#[cfg(feature = "fuzzing")]
pub(crate) fn fuzz(body: &[u8]) {
    drop(read::<wire::Registered>(body).map(|reply| reply.agent.and_then(wire::AgentRecord::assignment)));
    drop(read::<wire::Accounts>(body));
    let Ok(base) = Url::parse("https://master") else { return };
    for status in [302, 400, 401, 403, 404, 409, 429, 503] {
        if let Ok(status) = StatusCode::from_u16(status) {
            let text = sort(&base, status, &HeaderMap::new(), body).to_string();
            assert!(!text.contains(char::is_control), "more than a line");
        }
    }
}

#[cfg(test)]
mod hostile;
#[cfg(test)]
mod tests;
