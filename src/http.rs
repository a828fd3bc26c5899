//! How HTTP clients are set up: one kind of TLS for all, and a plain one for neighbours.

use std::time::Duration;

use reqwest::{Client, ClientBuilder};

/// A client to build upon. TLS is rustls with ring.
pub(crate) fn client() -> ClientBuilder {
    // Another part of the process has chosen the same provider before: that is fine.
    let _ = rustls::crypto::ring::default_provider().install_default();
    Client::builder()
}

/// A client for plain HTTP to this machine and its containers: no certificates are needed, no connection is kept,
/// and it never goes through a proxy meant for the way out.
pub(crate) fn neighbour(limit: Duration) -> reqwest::Result<Client> {
    client().no_proxy().tls_certs_only([]).timeout(limit).pool_max_idle_per_host(0).build()
}
