//! The address of the Docker Engine.

use std::fmt;
use std::sync::Arc;

use rustls::ClientConfig;
use rustls::pki_types::ServerName;

/// The address of the Docker Engine API.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DockerHost {
    /// Path of a unix socket.
    Unix(String),
    /// `host:port` for plain HTTP.
    Http(String),
    /// TLS with a certificate on both sides.
    Tls(DockerTls),
}

impl fmt::Display for DockerHost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix://{path}"),
            Self::Http(address) => write!(f, "tcp://{address}"),
            Self::Tls(tls) => write!(f, "tcp://{} (TLS)", tls.address),
        }
    }
}

/// The address of a Docker Engine behind TLS, and the certificates of both sides.
#[derive(Clone)]
pub struct DockerTls {
    /// `host:port`.
    pub address: String,
    /// The name that Docker's certificate must be for.
    pub name: ServerName<'static>,
    /// Holds our client certificate and the only CA that we trust.
    pub config: Arc<ClientConfig>,
}

impl fmt::Debug for DockerTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DockerTls").field("address", &self.address).finish_non_exhaustive()
    }
}

impl PartialEq for DockerTls {
    fn eq(&self, other: &Self) -> bool {
        self.address == other.address && Arc::ptr_eq(&self.config, &other.config)
    }
}

impl Eq for DockerTls {}
