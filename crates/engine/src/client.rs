//! The calls that read what people have written, labels above all: made without the client library, which holds a
//! whole answer in memory, however large. A connection each, and the answer through a [`Sieve`].

use std::collections::HashMap;
use std::io;
use std::time::Duration;

use bollard::errors::Error as EngineError;
use bollard::models;
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

use super::error::*;
use super::sieve::Sieve;
use super::{Docker, DockerError, Event, READ_LIMIT, Result, transport};
use crate::config::DockerHost;

/// What Docker says of a call that it does not carry out.
const MESSAGE_BYTES: usize = 64 << 10;

/// An answer under way.
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

impl Docker {
    /// `GET /containers/json`, whole or not at all.
    pub(super) async fn listed(&self, all: bool, label: Option<&str>) -> Result<Vec<models::ContainerSummary>> {
        let filters = label.map(|label| HashMap::from([("label", vec![label])]));
        let mut url = address(LIST, &["containers", "json"])?;
        url.query_pairs_mut().append_pair("all", if all { "true" } else { "false" });
        self.document(LIST, with_filters(url, filters)).await
    }

    /// `GET /containers/{name}/json`.
    pub(super) async fn inspected(&self, name: &str) -> Result<models::ContainerInspectResponse> {
        self.document(INSPECT, address(INSPECT, &["containers", name, "json"])?).await
    }

    /// `GET /events`; connects when it is first read.
    pub(super) fn told(
        &self,
        since: Option<&str>,
        types: &[&str],
        actions: &[&str],
    ) -> Result<impl Stream<Item = Result<Event>> + use<>> {
        let mut url = address(EVENTS, &["events"])?;
        if let Some(since) = since {
            url.query_pairs_mut().append_pair("since", since);
        }
        let filters = HashMap::from([("type", types.to_vec()), ("event", actions.to_vec())]);
        let (host, url) = (self.host.clone(), with_filters(url, Some(filters)));
        let messages = stream::unfold(Some(Reading::Begins(host, url)), |reading| async {
            let mut answer = match reading? {
                Reading::Begins(host, url) => match Answer::begin(&host, EVENTS, url).await {
                    Ok(answer) => answer,
                    Err(error) => return Some((Err(error), None)),
                },
                Reading::Goes(answer) => answer,
            };
            match answer.next::<models::EventMessage>().await {
                Ok(Some(message)) => Some((Ok(Event::from(message)), Some(Reading::Goes(answer)))),
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
}

const NOT_WHOLE: &str = "the answer was not whole or not JSON";

enum Reading {
    Begins(DockerHost, Url),
    Goes(Answer),
}

/// The host of it says nothing; Docker looks at the path.
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
        // Texts and lists of texts.
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
        // It ends with the answer; what goes wrong with it is told by the answer that does not come.
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

    /// The next document; `None` at the end.
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

#[derive(Deserialize)]
struct Said {
    message: String,
}
