//! Makes the calls to Docker. Calls whose answers hold what people have written, labels above all, bypass the client
//! library, which keeps a whole answer in memory however large it is. Each of them opens its own connection and reads
//! the answer through a [`Sieve`].

use std::collections::HashMap;
use std::future::Future;
use std::io;
use std::path::Path;
use std::sync::OnceLock;
use std::time::Duration;

use bollard::errors::Error as EngineError;
use bollard::models;
use bollard::query_parameters as query;
use futures_util::{Stream, StreamExt, stream};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::header::HOST;
use hyper::{Request, client};
use hyper_util::rt::TokioIo;
use reqwest::Url;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::address::DockerHost;
use crate::error::{Call, last_cause, sort};
use crate::sieve::Sieve;
use crate::{DockerError, Result, transport};

/// Time limit for calls that read.
pub const READ_LIMIT: Duration = Duration::from_secs(20);
/// Time limit for calls that change something: a busy Engine takes its time to set up a container.
pub const CHANGE_LIMIT: Duration = Duration::from_secs(60);
/// Longer than any limit above, so that ours applies: the client library's limit covers the headers only.
const CLIENT_TIMEOUT_SECONDS: u64 = 3600;

/// A Docker Engine, or the part of it that a socket proxy lets through. The [`Call`] that each method takes holds the
/// words for its errors.
#[derive(Debug)]
pub struct Client {
    host: DockerHost,
    /// Created at first use: the client library refuses a socket that does not exist yet.
    library: OnceLock<bollard::Docker>,
}

/// Most bytes that are read of the message with which Docker refuses a call.
const MESSAGE_BYTES: usize = 64 << 10;

/// An answer that is being read.
struct Answer {
    call: Call,
    body: Incoming,
    sieve: Sieve,
    connection: JoinHandle<()>,
}

impl Drop for Answer {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

impl Client {
    /// Creates the client without calling Docker.
    pub fn new(host: DockerHost) -> Self {
        Self { host, library: OnceLock::new() }
    }

    /// The address, for the log.
    pub fn host(&self) -> &DockerHost {
        &self.host
    }

    /// Whether Docker answers.
    ///
    /// # Errors
    /// When it does not.
    pub async fn ping(&self, call: Call) -> Result<()> {
        let docker = self.library(call)?;
        limited(call, READ_LIMIT, docker.ping()).await.map(drop)
    }

    /// Starts a container. Succeeds if it already runs.
    ///
    /// # Errors
    /// [`DockerError::NotFound`] also when its network is gone.
    pub async fn start(&self, call: Call, id: &str) -> Result<()> {
        let docker = self.library(call)?;
        limited(call, CHANGE_LIMIT, docker.start_container(id, None)).await
    }

    /// Stops a container. Docker sends SIGKILL after `grace`, or without one after the container's own timeout, for
    /// which the call then allows `most`. Succeeds if the container is not running or does not exist.
    ///
    /// # Errors
    /// When the call fails.
    pub async fn stop(&self, call: Call, id: &str, grace: Option<Duration>, most: Duration) -> Result<()> {
        let docker = self.library(call)?;
        let seconds = grace.and_then(|grace| i32::try_from(grace.as_secs()).ok());
        let options = query::StopContainerOptions { t: seconds, ..Default::default() };
        let limit = CHANGE_LIMIT + grace.unwrap_or(most);
        absent_is_none(limited(call, limit, docker.stop_container(id, Some(options))).await).map(drop)
    }

    /// Restarts a container. Docker sends SIGKILL after `grace`, or without one after the container's own timeout, for
    /// which the call then allows `most`.
    ///
    /// # Errors
    /// When the call fails.
    pub async fn restart(&self, call: Call, id: &str, grace: Option<Duration>, most: Duration) -> Result<()> {
        let docker = self.library(call)?;
        let seconds = grace.and_then(|grace| i32::try_from(grace.as_secs()).ok());
        let options = query::RestartContainerOptions { t: seconds, ..Default::default() };
        limited(call, CHANGE_LIMIT + grace.unwrap_or(most), docker.restart_container(id, Some(options))).await
    }

    /// Sends a signal such as `SIGHUP` to a container's main process.
    ///
    /// # Errors
    /// [`DockerError::Conflict`] when the container does not run.
    pub async fn kill(&self, call: Call, id: &str, signal: &str) -> Result<()> {
        let docker = self.library(call)?;
        let options = query::KillContainerOptions { signal: signal.to_owned() };
        limited(call, CHANGE_LIMIT, docker.kill_container(id, Some(options))).await
    }

    /// `GET /containers/json`, whole or not at all.
    ///
    /// # Errors
    /// An incomplete answer is an error, never a short list.
    pub async fn listed(&self, call: Call, all: bool, label: Option<&str>) -> Result<Vec<models::ContainerSummary>> {
        let filters = label.map(|label| HashMap::from([("label", vec![label])]));
        let mut url = address(call, &["containers", "json"])?;
        url.query_pairs_mut().append_pair("all", if all { "true" } else { "false" });
        self.document(call, with_filters(url, filters)).await
    }

    /// `GET /containers/{name}/json`.
    ///
    /// # Errors
    /// [`DockerError::NotFound`] when there is no such container.
    pub async fn inspected(&self, call: Call, name: &str) -> Result<models::ContainerInspectResponse> {
        self.document(call, address(call, &["containers", name, "json"])?).await
    }

    /// The host's name, from `GET /info`.
    ///
    /// # Errors
    /// When the call fails.
    pub async fn host_name(&self, call: Call) -> Result<String> {
        let info: Info = self.document(call, address(call, &["info"])?).await?;
        Ok(info.name)
    }

    /// `GET /events`. Connects when the stream is first read.
    ///
    /// # Errors
    /// When the call cannot be made at all. Later errors come out of the stream.
    pub fn told(
        &self,
        call: Call,
        since: Option<&str>,
        types: &[&str],
        actions: &[&str],
    ) -> Result<impl Stream<Item = Result<models::EventMessage>> + use<>> {
        let mut url = address(call, &["events"])?;
        if let Some(since) = since {
            url.query_pairs_mut().append_pair("since", since);
        }
        let filters = HashMap::from([("type", types.to_vec()), ("event", actions.to_vec())]);
        let (host, url) = (self.host.clone(), with_filters(url, Some(filters)));
        let messages = stream::unfold(Some(Reading::Begins(host, url)), move |reading| async move {
            let mut answer = match reading? {
                Reading::Begins(host, url) => match Answer::begin(&host, call, url).await {
                    Ok(answer) => answer,
                    Err(error) => return Some((Err(error), None)),
                },
                Reading::Goes(answer) => answer,
            };
            match answer.next::<models::EventMessage>().await {
                Ok(Some(message)) => Some((Ok(message), Some(Reading::Goes(answer)))),
                Ok(None) => None,
                Err(error) => Some((Err(error), None)),
            }
        });
        Ok(Box::pin(messages.fuse()))
    }

    async fn document<T: DeserializeOwned>(&self, call: Call, url: Url) -> Result<T> {
        let limit: Duration = READ_LIMIT;
        let read = async {
            let mut answer = Answer::begin(&self.host, call, url).await?;
            let read = answer.next().await?;
            read.ok_or_else(|| DockerError::Unreachable { call, problem: NOT_WHOLE.to_owned() })
        };
        timeout(limit, read).await.unwrap_or(Err(DockerError::TimedOut { call, limit }))
    }

    /// The client library, for calls that only one program makes.
    ///
    /// # Errors
    /// [`DockerError::Unreachable`] while there is no socket.
    #[expect(
        clippy::disallowed_methods,
        reason = "a socket's folder is of this host, and the client library looks itself"
    )]
    pub fn library(&self, call: Call) -> Result<&bollard::Docker> {
        if let Some(client) = self.library.get() {
            return Ok(client);
        }
        let version = bollard::API_DEFAULT_VERSION;
        let made = match &self.host {
            DockerHost::Unix(path) if !Path::new(path).exists() => {
                return Err(DockerError::Unreachable { call, problem: format!("there is no socket at {path}") });
            }
            DockerHost::Unix(path) => bollard::Docker::connect_with_unix(path, CLIENT_TIMEOUT_SECONDS, version),
            DockerHost::Http(address) => bollard::Docker::connect_with_http(address, CLIENT_TIMEOUT_SECONDS, version),
            DockerHost::Tls(tls) => bollard::Docker::connect_with_custom_transport(
                transport::custom(tls.clone()),
                Some(format!("http://{}", tls.address)),
                CLIENT_TIMEOUT_SECONDS,
                version,
            ),
        };
        let made = made.map_err(|error| sort(call, error))?;
        Ok(self.library.get_or_init(|| made))
    }
}

/// Waits for a whole answer, at most for `limit`.
///
/// # Errors
/// [`DockerError::TimedOut`], or the error that Docker answers.
pub async fn limited<T>(
    call: Call,
    limit: Duration,
    answer: impl Future<Output = std::result::Result<T, EngineError>>,
) -> Result<T> {
    match timeout(limit, answer).await {
        Ok(answer) => answer.map_err(|error| sort(call, error)),
        Err(_) => Err(DockerError::TimedOut { call, limit }),
    }
}

/// Turns [`DockerError::NotFound`] into `None`.
///
/// # Errors
/// Every other error.
pub fn absent_is_none<T>(answer: Result<T>) -> Result<Option<T>> {
    match answer {
        Ok(found) => Ok(Some(found)),
        Err(DockerError::NotFound { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

const NOT_WHOLE: &str = "the answer was not whole or not JSON";

enum Reading {
    Begins(DockerHost, Url),
    Goes(Answer),
}

/// The host in the URL is a placeholder; Docker only looks at the path.
fn address(call: Call, path: &[&str]) -> Result<Url> {
    let failed = |error| DockerError::Failed { call, message: format!("400 {error}") };
    let mut url = Url::parse("http://docker/").map_err(failed)?;
    if let Ok(mut segments) = url.path_segments_mut() {
        segments.pop_if_empty().extend(path);
    }
    Ok(url)
}

fn with_filters(mut url: Url, filters: Option<HashMap<&str, Vec<&str>>>) -> Url {
    if let Some(filters) = filters {
        // Cannot fail: only strings and lists of strings.
        url.query_pairs_mut().append_pair("filters", &serde_json::to_string(&filters).unwrap_or_default());
    }
    url
}

impl Answer {
    async fn begin(host: &DockerHost, call: Call, url: Url) -> Result<Self> {
        let unreachable = |error: &dyn std::error::Error| DockerError::Unreachable { call, problem: last_cause(error) };
        match host {
            DockerHost::Unix(path) => {
                let stream = UnixStream::connect(path).await.map_err(|error| match error.kind() {
                    io::ErrorKind::NotFound => {
                        DockerError::Unreachable { call, problem: format!("there is no socket at {path}") }
                    }
                    _ => unreachable(&error),
                })?;
                Self::ask(stream, "docker", call, url).await
            }
            DockerHost::Http(address) => {
                let stream = TcpStream::connect(address.as_str()).await.map_err(|error| unreachable(&error))?;
                Self::ask(stream, address, call, url).await
            }
            DockerHost::Tls(tls) => {
                let stream = transport::shaken(tls).await.map_err(|error| DockerError::Unreachable {
                    call,
                    problem: transport::tls_words(&error).unwrap_or_else(|| last_cause(&error)),
                })?;
                Self::ask(stream, &tls.address, call, url).await
            }
        }
    }

    async fn ask(
        stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
        host: &str,
        call: Call,
        url: Url,
    ) -> Result<Self> {
        let unreachable = |error: hyper::Error| DockerError::Unreachable {
            call,
            problem: transport::tls_words(&error).unwrap_or_else(|| last_cause(&error)),
        };
        let (mut sender, connection) =
            client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(unreachable)?;
        // The task ends with the answer. If the connection fails, the missing answer reports it.
        let connection = tokio::spawn(async move { drop(connection.await) });
        let path = url.query().map_or_else(|| url.path().to_owned(), |query| format!("{}?{query}", url.path()));
        let request = Request::get(path).header(HOST, host).body(Empty::<Bytes>::new());
        let request = request.map_err(|error| DockerError::Failed { call, message: format!("400 {error}") })?;
        let response = sender.send_request(request).await.map_err(unreachable)?;
        let status = response.status();
        if status.is_success() {
            return Ok(Self { call, body: response.into_body(), sieve: Sieve::default(), connection });
        }
        let body = Limited::new(response.into_body(), MESSAGE_BYTES).collect().await;
        connection.abort();
        let body = body.map(|body| body.to_bytes()).unwrap_or_default();
        let message = match serde_json::from_slice::<Said>(&body) {
            Ok(said) => said.message,
            Err(_) => String::from_utf8_lossy(&body).into_owned(),
        };
        Err(sort(call, EngineError::DockerResponseServerError { status_code: status.as_u16(), message }))
    }

    /// The next document, or `None` at the end.
    async fn next<T: DeserializeOwned>(&mut self) -> Result<Option<T>> {
        let call = self.call;
        let not_whole = || DockerError::Unreachable { call, problem: NOT_WHOLE.to_owned() };
        loop {
            if let Some(document) = self.sieve.document() {
                return serde_json::from_slice(&document).map(Some).map_err(|_| not_whole());
            }
            let Some(frame) = self.body.frame().await else {
                return if self.sieve.is_between() { Ok(None) } else { Err(not_whole()) };
            };
            let frame = frame.map_err(|error| DockerError::Unreachable { call, problem: last_cause(&error) })?;
            if let Ok(chunk) = frame.into_data() {
                let clogged = |error| DockerError::Failed { call, message: format!("500 the answer {error}") };
                self.sieve.feed(&chunk).map_err(clogged)?;
            }
        }
    }
}

/// The only field of `GET /info` that is read.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Info {
    #[serde(default)]
    name: String,
}

#[derive(Deserialize)]
struct Said {
    message: String,
}
