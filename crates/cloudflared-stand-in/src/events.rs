//! What happens to a connection, as the connector's state and the original's log have it.

use std::fmt::Display;
use std::time::Duration;

use crate::connector::Connector;
use crate::log::Level;
use crate::transport::Protocol;

/// The edge that cannot be reached.
pub(crate) const UNREACHED: &str = "198.41.200.13";

/// A connection has been registered.
pub(crate) fn registered(connector: &Connector, index: usize) {
    let connection = connector.register(index);
    connector.log.line(
        Level::Info,
        "Registered tunnel connection",
        &[
            ("connIndex", &index),
            ("connection", &connection.id),
            ("event", &0),
            ("ip", &connection.ip),
            ("location", &connection.location),
            ("protocol", &connector.protocol()),
        ],
    );
}

/// The remote configuration has come over a connection.
pub(crate) fn configured(connector: &Connector) {
    let version = connector.behaviour().config_version;
    if connector.configure(version) {
        let config = r#"{"ingress":[{"service":"http_status:404"}],"warp-routing":{"enabled":false}}"#;
        let fields: [(&str, &dyn Display); 2] = [("config", &config), ("version", &version)];
        connector.log.line(Level::Info, "Updated to new configuration", &fields);
    }
}

/// A connection has broken, or been taken away.
pub(crate) fn closed(connector: &Connector, index: usize) {
    let fields: [(&str, &dyn Display); 3] =
        [("error", &"connection with edge closed"), ("connIndex", &index), ("event", &0)];
    connector.log.line(Level::Error, "Serve tunnel error", &fields);
}

/// A connection will get no more requests: the drain has begun.
pub(crate) fn unregistered(connector: &Connector, index: usize) {
    connector.log.line(Level::Info, "Unregistered tunnel connection", &[("connIndex", &index), ("event", &0)]);
}

/// There is no way to the edge with the protocol in use.
pub(crate) fn dial_failed(connector: &Connector, index: usize) {
    let (message, error) = match connector.protocol() {
        Protocol::Quic => (
            "Failed to dial a quic connection",
            "failed to dial to edge with quic: timeout: no recent network activity".to_owned(),
        ),
        Protocol::Http2 => (
            "Unable to establish connection with Cloudflare edge",
            format!("DialContext error: dial tcp {UNREACHED}:7844: i/o timeout"),
        ),
    };
    let fields: [(&str, &dyn Display); 4] =
        [("error", &error), ("connIndex", &index), ("event", &0), ("ip", &UNREACHED)];
    connector.log.line(Level::Error, message, &fields);
}

/// It will be tried again.
pub(crate) fn retrying(connector: &Connector, index: usize, ip: &str, pause: Duration) {
    connector.log.line(
        Level::Info,
        format_args!("Retrying connection in up to {}s", pause.as_secs()),
        &[("connIndex", &index), ("event", &0), ("ip", &ip)],
    );
}

/// Another protocol has taken the first one's place.
pub(crate) fn fell_back(connector: &Connector) {
    connector.log.line(
        Level::Info,
        format_args!("Switching to fallback protocol {}", connector.protocol()),
        &[("connIndex", &0), ("event", &0), ("ip", &UNREACHED)],
    );
}
