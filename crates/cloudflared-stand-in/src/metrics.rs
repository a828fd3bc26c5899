//! The metrics server: what the original answers, and `/stand-in` to change the script.

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
use crate::log::Level;
use crate::transport::Protocol;

/// The ports the original tries in turn when it was not told one; then any.
const DEFAULT_PORTS: std::ops::RangeInclusive<u16> = 20241..=20245;

type Shared = State<Arc<Connector>>;

/// Opens the listener: on `address` alone if one is given.
///
/// # Errors
/// When the address cannot be used.
pub async fn listen(address: Option<&str>) -> Result<TcpListener> {
    if let Some(address) = address {
        // Go's `:20241` means every interface.
        let address = if address.starts_with(':') { format!("0.0.0.0{address}") } else { address.to_owned() };
        return TcpListener::bind(&address).await.with_context(|| format!("cannot listen on {address}"));
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
/// As axum's server: none in practice.
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
    let status = if shown.config_version < 0 { "http_status:503" } else { "http_status:404" };
    Json(json!({
        "version": shown.config_version,
        "config": {"ingress": [{"service": status}], "warp-routing": {"connectTimeout": 5}},
    }))
}

async fn diag(State(connector): Shared) -> Json<Value> {
    // The original's protocol is a number: 0 for http2, 1 for quic; and it leaves out what is zero.
    let shown = connector.shown();
    let quic = shown.protocol == Protocol::Quic;
    let connections: Vec<Value> = shown
        .connections
        .into_iter()
        .map(|(index, connection)| {
            let mut fields = json!({"isConnected": true, "edgeAddress": connection.ip});
            if quic {
                fields["protocol"] = json!(1);
            }
            if index > 0 {
                fields["index"] = json!(index);
            }
            fields
        })
        .collect();
    Json(json!({"tunnelID": connector.tunnel_id, "connectorID": connector.id, "connections": connections}))
}

async fn metrics(State(connector): Shared) -> Response {
    let shown = connector.shown();
    let behaviour = connector.behaviour();
    let mut page = String::new();
    let build = format!(r#"{{goversion="go1.24.4",revision="{}",type="",version="{}"}}"#, BUILT, behaviour.version);
    family(&mut page, "build_info", "gauge", &[(build, 1)]);
    let version = shown.config_version;
    family(&mut page, "cloudflared_orchestration_config_version", "gauge", &[(String::new(), version)]);
    family(&mut page, "cloudflared_tunnel_concurrent_requests_per_tunnel", "gauge", &[(String::new(), 0)]);
    // The trap: the original says 1 here with no connection at all.
    family(&mut page, "cloudflared_tunnel_ha_connections", "gauge", &[(String::new(), 1)]);
    let count = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
    let (requests, errors) = (count(behaviour.requests.saturating_add(shown.served)), count(behaviour.errors));
    family(&mut page, "cloudflared_tunnel_request_errors", "counter", &[(String::new(), errors)]);
    family(&mut page, "cloudflared_tunnel_total_requests", "counter", &[(String::new(), requests)]);
    let codes = [
        (r#"{status_code="200"}"#.to_owned(), requests.saturating_sub(errors)),
        (r#"{status_code="502"}"#.to_owned(), errors),
    ];
    let codes: Vec<_> = codes.into_iter().filter(|(_, n)| *n > 0).collect();
    family(&mut page, "cloudflared_tunnel_response_by_code", "counter", &codes);
    let locations: Vec<_> = shown
        .connections
        .iter()
        .map(|(i, connection)| (format!(r#"{{connection_id="{i}",edge_location="{}"}}"#, connection.location), 1))
        .collect();
    family(&mut page, "cloudflared_tunnel_server_locations", "gauge", &locations);
    let rpc = |error: &str, n: u64| (format!(r#"{{{error}rpcName="registerConnection"}}"#), count(n));
    let registered = [rpc("", shown.registered)];
    let registered = if shown.registered > 0 { &registered[..] } else { &[] };
    family(&mut page, "cloudflared_tunnel_tunnel_register_success", "counter", registered);
    let refused = [rpc(r#"error="server_error","#, shown.refused)];
    let refused = if shown.refused > 0 { &refused[..] } else { &[] };
    family(&mut page, "cloudflared_tunnel_tunnel_register_fail", "counter", refused);
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], page).into_response()
}

/// When the original that is claimed was built.
pub const BUILT: &str = "2025-09-15-1303 UTC";

/// One metric family. As with the original's library, one without samples is not shown.
fn family(page: &mut String, name: &str, kind: &str, samples: &[(String, i64)]) {
    if samples.is_empty() {
        return;
    }
    // Writing to a `String` does not fail.
    _ = writeln!(page, "# HELP {name} As in cloudflared.\n# TYPE {name} {kind}");
    for (labels, value) in samples {
        _ = writeln!(page, "{name}{labels} {value}");
    }
}

async fn words(State(connector): Shared) -> Json<Value> {
    Json(json!(connector.script.borrow().words()))
}

async fn say(State(connector): Shared, Json(request): Json<Value>) -> Response {
    let script = connector.script.borrow().with_json(&request);
    match script {
        Ok(script) => {
            connector.log.line(Level::Info, "stand-in: told to change", &[("words", &request)]);
            connector.script.send_replace(script);
            words(State(connector)).await.into_response()
        }
        Err(error) => (StatusCode::BAD_REQUEST, format!("{error:#}\n")).into_response(),
    }
}
