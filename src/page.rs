//! `GET /health`: what the agent knows, as JSON, for Docker's HEALTHCHECK and for people; and the client side of it.
//!
//! Reads what the tasks publish and owns nothing. No secret is in any of it.

use std::convert::Infallible;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{ALLOW, CONTENT_TYPE, HeaderValue};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde_json::{Map, Value, json};
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};
use tokio::time::timeout;
use tracing::warn;

use crate::cause::Status;
use crate::channels::{Inventory, View, Wanted, Ways};
use crate::config::ConfigErrors;
use crate::http;
use crate::master::Master;
use crate::registration::Session;
use crate::state::Phase;

/// Connections served at once; further ones wait in the system's queue.
const MAX_CONNECTIONS: usize = 16;
/// A client that takes longer for its request and our answer is cut off.
const CONNECTION_LIMIT: Duration = Duration::from_secs(10);

/// Where the page reads from.
#[derive(Debug, Clone)]
pub struct Sources {
    /// Connection to the master.
    pub master: Arc<Master>,
    /// Who the agent is there.
    pub session: watch::Receiver<Option<Arc<Session>>>,
    /// What is wanted.
    pub wanted: watch::Receiver<Wanted>,
    /// How the tunnel is.
    pub view: watch::Receiver<View>,
    /// The labelled containers.
    pub inventory: watch::Receiver<Inventory>,
    /// The ways from the tunnel to them.
    pub ways: watch::Receiver<Ways>,
    /// When the agent started.
    pub started: Instant,
    /// The tasks by name, and whether each lives.
    pub tasks: Vec<(&'static str, Weak<()>)>,
}

/// Opens the port on every interface; inside a container nothing is published by that.
///
/// # Errors
/// When the port is taken or may not be used.
pub async fn bind(port: u16) -> std::io::Result<TcpListener> {
    TcpListener::bind(SocketAddr::from((Ipv4Addr::UNSPECIFIED, port))).await
}

/// Serves the page for ever. Cancel-safe.
pub async fn serve(listener: TcpListener, sources: Sources) -> Infallible {
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        // The semaphore is never closed.
        let Ok(place) = places.clone().acquire_owned().await else { continue };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Out of descriptors, most likely: others must have a chance to close theirs.
                warn!("the health page cannot take a connection: {error}; trying again");
                tokio::time::sleep(Duration::from_secs(1)).await;
                continue;
            }
        };
        let sources = sources.clone();
        tokio::spawn(async move {
            let service = service_fn(move |request| std::future::ready(answer(&request, &sources)));
            let connection = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(CONNECTION_LIMIT)
                .keep_alive(false)
                .serve_connection(TokioIo::new(stream), service);
            // A client that breaks off or dawdles is its own problem.
            let _ = timeout(CONNECTION_LIMIT, connection).await;
            drop(place);
        });
    }
}

fn answer(request: &Request<Incoming>, sources: &Sources) -> Result<Response<Full<Bytes>>, Infallible> {
    let (status, body) = match (request.method(), request.uri().path()) {
        (&Method::GET | &Method::HEAD, "/health") => (StatusCode::OK, sources.summary()),
        (_, "/health") => (StatusCode::METHOD_NOT_ALLOWED, json!({ "error": "use GET" })),
        _ => (StatusCode::NOT_FOUND, json!({ "error": "there is only /health" })),
    };
    let mut response = Response::new(Full::new(Bytes::from(format!("{body}\n"))));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    if status == StatusCode::METHOD_NOT_ALLOWED {
        response.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
    }
    Ok(response)
}

impl Sources {
    fn summary(&self) -> Value {
        let session = self.session.borrow().clone();
        let (wanted, view) = (self.wanted.borrow(), self.view.borrow());
        let (inventory, ways) = (self.inventory.borrow(), self.ways.borrow());
        let since_contact = self.master.last_contact().map(|contact| contact.elapsed().as_secs());
        let last_report = self.master.last_report().and_then(|at| jiff::Timestamp::try_from(at).ok());
        let mut problems: Vec<String> = wanted.unsaved.iter().cloned().collect();
        if wanted.decommission == Some(Phase::Finalized) {
            problems.push("this agent was decommissioned and does nothing".to_owned());
        } else if session.is_none() {
            problems.push("not registered at the master".to_owned());
        } else if since_contact.is_some_and(|seconds| seconds > 60) {
            problems.push("no contact with the master for more than a minute".to_owned());
        }
        if !inventory.complete {
            problems.push("the containers are not known, Docker does not answer".to_owned());
        }
        if matches!(view.status, Status::Error | Status::Degraded | Status::Restarting) {
            problems.push(format!("the tunnel is {}: {}", view.status.as_str(), view.reason.unwrap_or("-")));
        }
        problems.extend(unreachable_sentence(&ways));
        let unreachable: Vec<_> = ways
            .unreachable
            .values()
            .map(
                |container| json!({ "name": container.name, "problem": container.problem, "remedy": container.remedy }),
            )
            .collect();
        json!({
            "status": if problems.is_empty() { "healthy" } else { "degraded" },
            "problems": problems,
            "agent_id": session.as_ref().map(|session| session.agent_id.as_str()),
            "version": env!("CARGO_PKG_VERSION"),
            "uptime_seconds": self.started.elapsed().as_secs(),
            "registered": session.is_some(),
            "protocol": session.as_ref().map(|session| session.protocol.version()),
            "decommissioned": wanted.decommission.is_some(),
            "tunnel": {
                "state": view.status.as_str(),
                "desired_state": wanted.state,
                "reason": view.reason,
                "name": view.name,
                "id": view.tunnel_id,
                "container_running": view.container_running,
                "since": view.since.map(|since| since.to_string()),
                "ready_connections": view.connections,
                "version": view.version,
                "connector_id": view.connector.id,
                "config_version": view.connector.config_version,
                "protocol": view.connector.protocol,
                "requests": view.connector.traffic.requests,
                "errors": view.connector.traffic.errors,
                "restarts": view.restarts,
            },
            "containers": inventory.complete.then_some(inventory.containers.len()),
            "unreachable_containers": unreachable,
            "other_connectors": ways.rivals,
            "master_connection": {
                "url": self.master.url().as_str(),
                "last_successful_report": last_report.map(|at| at.to_string()),
                "seconds_since_contact": since_contact,
            },
            "threads": self.tasks.iter().map(|(name, pulse)| ((*name).to_owned(), json!(pulse.strong_count() > 0))).collect::<Map<_, _>>(),
        })
    }
}

/// One sentence for all containers that the tunnel cannot reach.
fn unreachable_sentence(ways: &Ways) -> Option<String> {
    const MOST_NAMES: usize = 10;
    let count = ways.unreachable.len();
    let names: Vec<_> = ways.unreachable.values().take(MOST_NAMES).map(|container| container.name.as_str()).collect();
    let more = if count > MOST_NAMES { ", …" } else { "" };
    let containers = if count == 1 { "1 container".to_owned() } else { format!("{count} containers") };
    (count > 0).then(|| format!("{containers} cannot be reached by the tunnel: {}{more}", names.join(", ")))
}

/// Asks the agent in the same container, for Docker's HEALTHCHECK. An agent that answers does its job: one whose
/// master or Docker is away is degraded, and restarting it would not help.
///
/// # Errors
/// One line that says why the agent does not count as healthy.
pub async fn check(port: Result<Option<u16>, ConfigErrors>) -> Result<String, String> {
    let Some(port) = port.map_err(|errors| errors.to_string())? else {
        return Ok("the health page is switched off (HEALTH_CHECK_PORT=0), nothing can be asked".to_owned());
    };
    let client = http::neighbour(Duration::from_secs(4));
    let ask = async {
        let response = client?.get(format!("http://127.0.0.1:{port}/health")).send().await?.error_for_status()?;
        response.bytes().await
    };
    let body = ask
        .await
        .map_err(|error| format!("the agent does not answer on port {port}: {}", crate::error_chain(&error)))?;
    let page: Value = serde_json::from_slice(&body).map_err(|_| format!("port {port} is served by something else"))?;
    let word = |value: &Value| value.as_str().unwrap_or("unknown").to_owned();
    Ok(format!("{}, tunnel {}", word(&page["status"]), word(&page["tunnel"]["state"])))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::channels::Unreachable;

    #[test]
    fn containers_that_cannot_be_reached_make_one_sentence() {
        let unreachable = |number: usize| Unreachable {
            name: format!("web{number}"),
            problem: "p".to_owned(),
            remedy: "r".to_owned(),
        };
        let sentence = |count: usize| {
            let all = (0..count).map(|number| (format!("{number:03}"), unreachable(number)));
            unreachable_sentence(&Ways { unreachable: all.collect(), ..Ways::default() })
        };
        assert_eq!(sentence(0), None);
        assert_eq!(sentence(1).as_deref(), Some("1 container cannot be reached by the tunnel: web0"));
        assert_eq!(sentence(2).as_deref(), Some("2 containers cannot be reached by the tunnel: web0, web1"));
        assert!(sentence(200).is_some_and(|sentence| sentence.ends_with("web9, …")));
    }
}
