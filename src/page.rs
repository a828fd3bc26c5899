//! The agent's own pages, for Docker's HEALTHCHECK, for Prometheus and for people: what it knows, and nothing secret.
//!
//! | path | |
//! |---|---|
//! | `/health` | all that is known, as JSON; 503 only when the agent itself does not do its job |
//! | `/live` | whether it does |
//! | `/ready` | whether the tunnel can carry traffic |
//! | `/metrics` | for Prometheus |
//! | `/log` | the last lines of the log; answered only from the same machine or container |
//!
//! Reads what the tasks publish and owns nothing. Whoever shares a network with the agent may ask, so nothing here
//! waits for a client, and however many come, one that asks from the same machine has a place.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{ALLOW, CONTENT_TYPE, HeaderValue};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use prometheus_client::encoding::prometheus_text;
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::timeout;
use tracing::warn;

use crate::channels::{Inventory, View, Wanted, Ways};
use crate::config::PageAddress;
use crate::logging::Ring;
use crate::master::Master;
use crate::metrics::Metrics;
use crate::pulse::Pulse;
use crate::registration::Session;

mod ask;
mod disk;
mod exposition;
mod summary;
pub(crate) use ask::ask;
pub use ask::check;
pub(crate) use disk::Disk;

/// Connections served at once from elsewhere, and as many from this machine; further ones are closed.
const MAX_CONNECTIONS: usize = 16;
/// A client that takes longer for its request and our answer is cut off.
const CONNECTION_LIMIT: Duration = Duration::from_secs(10);
/// A request has a line and some headers. 8 KiB is the least that the library takes.
const MAX_REQUEST_BYTES: usize = 8 << 10;

/// Where the pages read from.
#[derive(Debug)]
pub(crate) struct Sources {
    pub(crate) master: Arc<Master>,
    /// Who the agent is there.
    pub(crate) session: watch::Receiver<Option<Arc<Session>>>,
    /// Whether the master refuses the agent, which has a session of earlier then.
    pub(crate) refused: watch::Receiver<bool>,
    pub(crate) wanted: watch::Receiver<Wanted>,
    pub(crate) view: watch::Receiver<View>,
    pub(crate) inventory: watch::Receiver<Inventory>,
    pub(crate) ways: watch::Receiver<Ways>,
    pub(crate) metrics: Metrics,
    pub(crate) log: Ring,
    /// When the agent started.
    pub(crate) started: Instant,
    pub(crate) tasks: Vec<Pulse>,
    pub(crate) disk: Disk,
}

/// Opens the port; inside a container nothing is published by that.
///
/// # Errors
/// When the port is taken or the address may not be used.
pub async fn bind(page: PageAddress) -> std::io::Result<TcpListener> {
    TcpListener::bind(page.0).await
}

/// Serves the pages for ever. Cancel-safe.
pub(crate) async fn serve(listener: TcpListener, sources: Sources) -> Infallible {
    let sources = Arc::new(sources);
    let [near, far] = [(); 2].map(|()| Arc::new(Semaphore::new(MAX_CONNECTIONS)));
    loop {
        let (stream, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                // Out of descriptors, most likely: others must have a chance to close theirs.
                warn!("the health page cannot take a connection: {error}; trying again");
                tokio::time::sleep(Duration::from_secs(1)).await;
                continue;
            }
        };
        let places = if peer.ip().to_canonical().is_loopback() { &near } else { &far };
        // Who finds no place is closed at once, so that nobody waits behind those who dawdle.
        if let Ok(place) = places.clone().try_acquire_owned() {
            tokio::spawn(converse(stream, peer, sources.clone(), place));
        }
    }
}

/// One connection, one request.
async fn converse(stream: TcpStream, peer: SocketAddr, sources: Arc<Sources>, place: OwnedSemaphorePermit) {
    let service = service_fn(move |request| answer(request, peer, sources.clone()));
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(CONNECTION_LIMIT)
        .max_buf_size(MAX_REQUEST_BYTES)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), service);
    // A client that breaks off or dawdles is its own problem.
    let _ = timeout(CONNECTION_LIMIT, connection).await;
    drop(place);
}

async fn answer(
    request: Request<Incoming>,
    peer: SocketAddr,
    sources: Arc<Sources>,
) -> Result<Response<Full<Bytes>>, Infallible> {
    let is_near = peer.ip().to_canonical().is_loopback();
    let path = request.uri().path();
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        let mut refusal = of_json(StatusCode::METHOD_NOT_ALLOWED, &json!({ "error": "use GET" }));
        refusal.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
        return Ok(refusal);
    }
    let (status, body) = match path {
        "/health" => sources.health().await,
        "/live" => sources.live().await,
        "/ready" => sources.ready(),
        "/log" if is_near => (StatusCode::OK, json!({ "lines": sources.log.lines() })),
        "/metrics" => {
            return Ok(response(StatusCode::OK, prometheus_text::CONTENT_TYPE, sources.metrics()));
        }
        _ => (StatusCode::NOT_FOUND, json!({ "error": "there are /health, /live, /ready and /metrics" })),
    };
    Ok(of_json(status, &body))
}

fn of_json(status: StatusCode, body: &Value) -> Response<Full<Bytes>> {
    response(status, "application/json", format!("{body}\n"))
}

fn response(status: StatusCode, kind: &'static str, text: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(text)));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    response
}
