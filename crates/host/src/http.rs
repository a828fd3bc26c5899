//! How HTTP clients are set up: one kind of TLS for all, and a plain one for neighbours.

use std::time::Duration;

use hyper_util::client::proxy::matcher::Matcher;
use reqwest::{Client, ClientBuilder, Url};

/// A client to build upon. TLS is rustls with ring.
pub fn client() -> ClientBuilder {
    // Another part of the process has chosen the same provider before: that is fine.
    let _ = rustls::crypto::ring::default_provider().install_default();
    Client::builder()
}

/// A client for plain HTTP to this machine and its containers: no certificates are needed, no connection is kept,
/// and it never goes through a proxy meant for the way out.
///
/// # Errors
/// When the client cannot be set up.
pub fn neighbour(limit: Duration) -> reqwest::Result<Client> {
    client().no_proxy().tls_certs_only([]).timeout(limit).pool_max_idle_per_host(0).build()
}

/// The proxy, as host and port, through which a client of [`client`] goes to this address: `HTTPS_PROXY` and its kin.
pub fn proxy_to(url: &Url) -> Option<(String, u16)> {
    let intercepted = Matcher::from_env().intercept(&url.as_str().parse().ok()?)?;
    let proxy = intercepted.uri();
    let default = if proxy.scheme_str() == Some("https") { 443 } else { 80 };
    Some((proxy.host()?.to_owned(), proxy.port_u16().unwrap_or(default)))
}
