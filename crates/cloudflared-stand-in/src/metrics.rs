//! The metrics server: the original's routes, and `/stand-in` to change the script.

use std::fmt::Write as _;
use std::sync::Arc;

use anyhow::{Context, Result};
use axum::extract::{Request, State};
use axum::http::{StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use serde_json::{Value, json};
use tokio::net::TcpListener;

use crate::connector::Connector;
use crate::log::{Level, fill};
use crate::transport::Protocol;

/// Ports that the original tries in turn when none was given. After those it takes any port.
const DEFAULT_PORTS: std::ops::RangeInclusive<u16> = 20241..=20245;

type Shared = State<Arc<Connector>>;

/// Opens the listener: only on `address` if there is one.
///
/// # Errors
/// When the address cannot be used.
pub async fn listen(address: Option<&str>) -> Result<TcpListener> {
    if let Some(address) = address {
        // Go's `:20241` means every interface.
        let address = if address.starts_with(':') { format!("0.0.0.0{address}") } else { address.to_owned() };
        // Go resolves a name to one address, and prefers IPv4.
        let found: Vec<_> =
            tokio::net::lookup_host(&address).await.with_context(|| format!("cannot listen on {address}"))?.collect();
        let chosen = found.iter().find(|address| address.is_ipv4()).or(found.first());
        let chosen = chosen.with_context(|| format!("{address} has no address"))?;
        return TcpListener::bind(chosen).await.with_context(|| format!("cannot listen on {address}"));
    }
    for port in DEFAULT_PORTS {
        if let Ok(listener) = TcpListener::bind(("0.0.0.0", port)).await {
            return Ok(listener);
        }
    }
    TcpListener::bind(("0.0.0.0", 0)).await.context("cannot listen on any port")
}

/// Serves until the process ends.
///
/// # Errors
/// The errors of axum's server: none in practice.
pub async fn serve(listener: TcpListener, connector: Arc<Connector>) -> std::io::Result<()> {
    let original = Router::new()
        .route("/ready", get(ready))
        .route("/healthcheck", get(|| async { "OK\n" }))
        .route("/metrics", get(metrics))
        .route("/config", get(config))
        .route("/diag/tunnel", get(diag))
        .layer(middleware::from_fn_with_state(connector.clone(), hang));
    let control = Router::new().route("/stand-in", get(words).post(say));
    axum::serve(listener, original.merge(control).with_state(connector)).await
}

/// Holds a request for as long as the script says `hang`.
async fn hang(State(connector): Shared, request: Request, next: Next) -> Response {
    connector.no_hang().await;
    next.run(request).await
}

async fn ready(State(connector): Shared) -> Response {
    let connections = connector.connections();
    let status = if connections > 0 { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let body = json!({"status": status.as_u16(), "readyConnections": connections, "connectorId": connector.id});
    (status, Json(body)).into_response()
}

async fn config(State(connector): Shared) -> Json<Value> {
    let shown = connector.shown();
    let status = if !shown.configured { "http_status:503" } else { "http_status:404" };
    Json(json!({
        "version": if shown.configured { connector.behaviour().config_version } else { -1 },
        "config": {"ingress": [{"service": status}], "warp-routing": {"connectTimeout": 5}},
    }))
}

async fn diag(State(connector): Shared) -> Json<Value> {
    // Like the original, log each read.
    connector.log.say(Level::Info, "Collection started collector=tunnelState");
    // The original encodes the protocol as a number, 0 for HTTP/2 and 1 for QUIC, and omits fields that are zero.
    let shown = connector.shown();
    let quic = shown.protocol == Protocol::Quic;
    let connections: Vec<Value> = shown
        .connections
        .iter()
        .map(|index| {
            let mut fields = json!({"isConnected": true, "edgeAddress": "198.41.192.7"});
            if quic {
                fields["protocol"] = json!(1);
            }
            if *index > 0 {
                fields["index"] = json!(index);
            }
            fields
        })
        .collect();
    connector.log.say(Level::Info, "Collection finished collector=tunnelState");
    Json(json!({"tunnelID": connector.tunnel_id, "connectorID": connector.id, "connections": connections}))
}

/// Answers with the recorded series so far, and this process's own version, configuration and requests. It answers with
/// samples only: the original's comments were not recorded.
async fn metrics(State(connector): Shared) -> Response {
    let (shown, behaviour) = (connector.shown(), connector.behaviour());
    let count = |n: u64| n.to_string().parse().unwrap_or(f64::MAX);
    let (requests, errors) = (behaviour.requests.saturating_add(shown.served), behaviour.errors + shown.failed);
    let mut series = shown.series;
    // The original shows these from the start; a recording has them only from its first sample on.
    for (name, value) in FROM_THE_START {
        series.entry((*name).to_owned()).or_insert(*value);
    }
    for (name, value) in
        [("cloudflared_tunnel_total_requests", requests), ("cloudflared_tunnel_request_errors", errors)]
    {
        series.insert(name.to_owned(), count(value));
    }
    series.insert("cloudflared_tunnel_concurrent_requests_per_tunnel".to_owned(), count(shown.in_flight));
    for (code, value) in [(200, requests.saturating_sub(errors)), (502, errors)] {
        let name = format!(r#"cloudflared_tunnel_response_by_code{{status_code="{code}"}}"#);
        series.remove(&name);
        if value > 0 {
            series.insert(name, count(value));
        }
    }
    let config = "cloudflared_orchestration_config_version".to_owned();
    let version = if shown.configured { behaviour.config_version.to_string().parse().unwrap_or(-1.0) } else { -1.0 };
    series.insert(config, version);
    let mut page = String::new();
    for (name, value) in &series {
        // Writing to a `String` does not fail.
        _ = writeln!(page, "{} {value}", fill(name, &[("version", &behaviour.version)]));
    }
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], page).into_response()
}

/// Series that the page has from its first answer on.
const FROM_THE_START: &[(&str, f64)] = &[
    (r#"build_info{goversion="go1.27.3",revision="2026-01-01-0000_UTC",type="",version="{version}"}"#, 1.0),
    ("cloudflared_tunnel_ha_connections", 0.0),
];

async fn words(State(connector): Shared) -> Json<Value> {
    Json(json!(connector.script.borrow().words()))
}

async fn say(State(connector): Shared, Json(request): Json<Value>) -> Response {
    let script = connector.script.borrow().with_json(&request);
    match script {
        Ok(script) => {
            connector.script.send_replace(script);
            words(State(connector)).await.into_response()
        }
        Err(error) => (StatusCode::BAD_REQUEST, format!("{error:#}\n")).into_response(),
    }
}
