//! The agent's goodbye to its own socket proxy, and how the agent knows that it is behind one. Calls no Docker API.

use std::pin::Pin;
use std::sync::PoisonError;
use std::time::Duration;

use dockflare_engine::transport;
use http_body_util::{BodyExt, Empty};
use hyper::body::Bytes;
use hyper::header::{HOST, SERVER};
use hyper::{Method, Request, Response, StatusCode, client};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::{sleep, timeout};
use tracing::debug;

use super::error::last_cause;
use super::permissions::OWN_PROXY;
use super::{Docker, reconnect_backoff};
use crate::config::DockerHost;
use crate::state::AgentId;

/// Longest wait for the answer while the agent stops. Where no proxy answers, the agent must end within 2 s.
const GOODBYE_LIMIT: Duration = Duration::from_millis(1500);

/// The answer to a goodbye.
pub(crate) enum Parting {
    /// The socket proxy holds the tunnel. While this future lives, the proxy sees that the agent is still there. It
    /// completes when the proxy ends.
    Held(Pin<Box<dyn Future<Output = ()> + Send>>),
    /// The answer did not come from the agent's own socket proxy, or from one that knows no goodbye.
    Unknown,
    /// No answer, and why.
    Silent(String),
}

impl Docker {
    /// Whether this project's own socket proxy is in front of Docker; `None` before the first answer.
    pub(crate) fn is_behind_own_proxy(&self) -> Option<bool> {
        *self.own_proxy.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn seen_behind(&self, own_proxy: bool) {
        *self.own_proxy.lock().unwrap_or_else(PoisonError::into_inner) = Some(own_proxy);
    }

    /// Asks until it knows whether the agent's own socket proxy is in front of Docker. It asks while the agent runs,
    /// because the proxy may be gone when the agent stops.
    pub(crate) async fn recognise(&self) -> bool {
        let mut pauses = reconnect_backoff();
        loop {
            if let Some(known) = self.is_behind_own_proxy() {
                return known;
            }
            if let Err(error) = self.engine().await {
                debug!("what stands before Docker is not known yet: Docker {error}");
                sleep(pauses.next(None)).await;
            }
        }
    }

    /// Says goodbye: asks the proxy to hold the tunnel for `lease`, for an agent that comes back. `agents` are the ids
    /// that mark the agent's containers.
    pub(crate) async fn goodbye(&self, lease: Duration, agents: &[AgentId]) -> Parting {
        if self.is_behind_own_proxy() == Some(false) {
            return Parting::Unknown;
        }
        let mut path = format!("/dockflare/goodbye?lease={}", lease.as_secs());
        if !agents.is_empty() {
            let ids: Vec<_> = agents.iter().map(AgentId::as_str).collect();
            path = format!("{path}&agents={}", ids.join(","));
        }
        let said = async {
            match self.host() {
                DockerHost::Unix(socket) => {
                    let stream = UnixStream::connect(socket).await.map_err(|error| last_cause(&error))?;
                    say(stream, "docker", &path).await
                }
                DockerHost::Http(address) => {
                    let stream = TcpStream::connect(address.as_str()).await.map_err(|error| last_cause(&error))?;
                    say(stream, address, &path).await
                }
                DockerHost::Tls(tls) => {
                    let stream = transport::shaken(tls).await.map_err(|error| last_cause(&error))?;
                    say(stream, &tls.address, &path).await
                }
            }
        };
        let answer = match timeout(GOODBYE_LIMIT, said).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(problem)) => return Parting::Silent(problem),
            Err(_) => return Parting::Silent("no answer in time".to_owned()),
        };
        let own_proxy = answer.response.headers().get(SERVER).is_some_and(|server| server == OWN_PROXY);
        self.seen_behind(own_proxy);
        match answer.response.status() {
            StatusCode::OK if own_proxy => Parting::Held(Box::pin(answer.ends())),
            _ => Parting::Unknown,
        }
    }
}

/// An answer whose head has arrived.
struct Answer {
    response: Response<hyper::body::Incoming>,
    connection: tokio::task::JoinHandle<()>,
}

impl Answer {
    /// Reads until the proxy closes the answer. Dropping it closes the connection.
    async fn ends(mut self) {
        while let Some(Ok(_)) = self.response.body_mut().frame().await {}
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

async fn say(
    stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    host: &str,
    path: &str,
) -> Result<Answer, String> {
    let problem = |error: hyper::Error| last_cause(&error);
    let (mut sender, connection) = client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(problem)?;
    // If the connection fails, the missing answer reports it.
    let connection = tokio::spawn(async move { drop(connection.await) });
    let request = Request::builder().method(Method::POST).uri(path).header(HOST, host).body(Empty::<Bytes>::new());
    let request = request.map_err(|error| error.to_string())?;
    let response = sender.send_request(request).await.map_err(problem)?;
    Ok(Answer { response, connection })
}
