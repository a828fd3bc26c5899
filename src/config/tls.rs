//! TLS to Docker, as Docker's own client does it. `DOCKER_CERT_PATH` is a folder with `ca.pem`, the authority that
//! signed Docker's certificate, and with `cert.pem` and `key.pem`, which identify the agent to Docker. Only that
//! authority is trusted, none of the system's.

use std::path::Path;
use std::sync::Arc;

use dockflare_engine::DockerTls;
use dockflare_host::disk;
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore};

/// Maximum size of a file. A certificate chain has a few kilobytes.
const MOST_BYTES: u64 = 1 << 20;

/// The folder's content.
pub(super) struct Certificates {
    roots: RootCertStore,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
}

impl Certificates {
    /// Reads the three files; returns everything that is wrong with them at once.
    pub(super) fn read(folder: &Path) -> Result<Self, Vec<String>> {
        let read = |name: &str| {
            let read = disk::read_at_start(&folder.join(name), MOST_BYTES);
            read.map_err(|unread| format!("{name} {unread}"))
        };
        let certificates = |name: &str| {
            let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&read(name)?).collect();
            found.ok().filter(|found| !found.is_empty()).ok_or_else(|| format!("{name} holds no certificate in PEM"))
        };
        let roots = certificates("ca.pem").and_then(|found| {
            let mut roots = RootCertStore::empty();
            let (taken, _) = roots.add_parsable_certificates(found);
            if taken > 0 { Ok(roots) } else { Err("ca.pem holds no certificate that can be used".to_owned()) }
        });
        let chain = certificates("cert.pem");
        let key = read("key.pem").and_then(|bytes| {
            PrivateKeyDer::from_pem_slice(&bytes).map_err(|_| "key.pem holds no private key in PEM".to_owned())
        });
        match (roots, chain, key) {
            (Ok(roots), Ok(chain), Ok(key)) => Ok(Self { roots, chain, key }),
            (roots, chain, key) => Err([roots.err(), chain.err(), key.err()].into_iter().flatten().collect()),
        }
    }
}

impl Certificates {
    /// The TLS settings for a connection to this address.
    pub(super) fn with(self, host: &str, port: u16) -> Result<DockerTls, String> {
        let name = ServerName::try_from(host.trim_matches(['[', ']']).to_owned())
            .map_err(|_| format!("{host} is no name that a certificate could be for"))?;
        let Self { roots, chain, key } = self;
        let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .map_err(|error| error.to_string())?
            .with_root_certificates(roots)
            .with_client_auth_cert(chain, key)
            .map_err(|error| format!("cert.pem and key.pem cannot be used together: {error}"))?;
        Ok(DockerTls { address: format!("{host}:{port}"), name, config: Arc::new(config) })
    }
}
