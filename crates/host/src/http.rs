//! Sets up HTTP clients: one kind of TLS for all, and a plain client for neighbors.

use std::time::Duration;

use hyper_util::client::proxy::matcher::Matcher;
use reqwest::{Client, ClientBuilder, Url};

/// A client builder. Its TLS is rustls with ring.
pub fn client() -> ClientBuilder {
    // Fails if another part of the process has installed the same provider before, which is fine.
    let _ = rustls::crypto::ring::default_provider().install_default();
    Client::builder()
}

/// A client for plain HTTP to this machine and its containers. It needs no certificates, keeps no connection, and never
/// uses a proxy meant for the way out.
///
/// # Errors
/// When the client cannot be set up.
pub fn neighbour(limit: Duration) -> reqwest::Result<Client> {
    client().no_proxy().tls_certs_only([]).timeout(limit).pool_max_idle_per_host(0).build()
}

/// Host and port of the proxy that a client of [`client`] uses for this address: `HTTPS_PROXY` and the like.
pub fn proxy_to(url: &Url) -> Option<(String, u16)> {
    let intercepted = Matcher::from_env().intercept(&url.as_str().parse().ok()?)?;
    let proxy = intercepted.uri();
    let default = if proxy.scheme_str() == Some("https") { 443 } else { 80 };
    Some((proxy.host()?.to_owned(), proxy.port_u16().unwrap_or(default)))
}
