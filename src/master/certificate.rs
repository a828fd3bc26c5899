//! Fetches the certificate of an `https` master, even an untrusted one, with a handshake and nothing more. Only
//! `dockflare-agent check` uses it. Sends no credentials.

use std::sync::{Arc, Mutex};

use jiff::Timestamp;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::ring;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, Error, SignatureScheme};
use rustls_platform_verifier::Verifier;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use x509_cert::Certificate;
use x509_cert::der::Decode;

use super::error::distrusted;
use super::{MasterError, lock, printable};

/// The certificate that the other side presented.
#[derive(Debug)]
pub(crate) struct Shown {
    /// Organization and name of the issuer.
    pub(crate) issuer: String,
    /// When it expires; `None` if that cannot be read.
    pub(crate) not_after: Option<Timestamp>,
    /// Why the agent does not trust it, in the agent's own words; `None` if it does.
    pub(crate) distrust: Option<MasterError>,
}

/// Does a TLS handshake on this connection with the roots of the agent's HTTPS client, then closes it.
///
/// # Errors
/// One line: no roots are found, or the other side does not speak TLS.
pub(crate) async fn shown(stream: TcpStream, host: &str) -> Result<Shown, String> {
    let provider = Arc::new(ring::default_provider());
    let inner = Verifier::new(provider.clone()).map_err(|error| format!("no certificates of authorities: {error}"))?;
    let looker = Arc::new(Looker { inner, seen: Mutex::default() });
    let config = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    let mut config = config
        .map_err(|error| error.to_string())?
        .dangerous()
        .with_custom_certificate_verifier(looker.clone())
        .with_no_client_auth();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    let name = ServerName::try_from(host.to_owned()).map_err(|error| error.to_string())?;
    let shaken = TlsConnector::from(Arc::new(config)).connect(name, stream).await;
    let seen = lock(&looker.seen).take();
    match (seen, shaken) {
        (Some(Seen { certificate, verdict }), _) => {
            let (issuer, not_after) = read(&certificate);
            Ok(Shown { issuer, not_after, distrust: verdict.err().map(distrust) })
        }
        (None, Err(error)) => Err(match error.get_ref().and_then(|inner| inner.downcast_ref()) {
            Some(Error::InvalidMessage(rustls::InvalidMessage::InvalidContentType)) => {
                "there is no TLS at this port; use an address with http://, or a port for https".to_owned()
            }
            _ => printable(&error.to_string()),
        }),
        (None, Ok(_)) => Err("no certificate was shown".to_owned()),
    }
}

fn distrust(error: Error) -> MasterError {
    match error {
        Error::InvalidCertificate(certificate) => distrusted(&certificate),
        other => MasterError::Away {
            problem: format!("has a certificate that cannot be judged: {}", printable(&other.to_string())),
            retry_after: None,
        },
    }
}

/// Issuer and expiry. Neither is trusted: they are only shown, and the date is compared with today.
fn read(certificate: &CertificateDer<'_>) -> (String, Option<Timestamp>) {
    let Ok(certificate) = Certificate::from_der(certificate) else {
        return ("an authority that cannot be read".to_owned(), None);
    };
    let facts = certificate.tbs_certificate();
    let issuer = facts.issuer();
    let text = |part: Result<Option<x509_cert::ext::pkix::name::DirectoryString>, _>| {
        part.ok().flatten().map(|text| printable(&text.value()))
    };
    let parts: Vec<_> = [text(issuer.organization()), text(issuer.common_name())].into_iter().flatten().collect();
    // Formatting the whole name would pull in the table of all name types and make the program 190 kB larger.
    let issuer = if parts.is_empty() { "an authority without a name".to_owned() } else { parts.join(" ") };
    let end = i64::try_from(facts.validity().not_after.to_unix_duration().as_secs());
    (issuer, end.ok().and_then(|end| Timestamp::from_second(end).ok()))
}

/// Accepts any certificate and stores it with the verdict of the agent's own verifier.
#[derive(Debug)]
struct Looker {
    inner: Verifier,
    seen: Mutex<Option<Seen>>,
}

#[derive(Debug)]
struct Seen {
    certificate: CertificateDer<'static>,
    verdict: Result<(), Error>,
}

impl ServerCertVerifier for Looker {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let verdict = self.inner.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now);
        *lock(&self.seen) = Some(Seen { certificate: end_entity.clone().into_owned(), verdict: verdict.map(drop) });
        // Accept it: nothing is sent over this connection.
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.inner.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.inner.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.inner.supported_verify_schemes()
    }
}
