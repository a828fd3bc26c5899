//! Connects to Docker: over its socket, over plain HTTP, or over TLS with certificates on both sides. A connection
//! carries one request, for the client library and for the few requests that bypass it.

use std::io;
use std::pin::Pin;

use bollard::BollardRequest;
use hyper::body::{Body, Incoming};
use hyper::header::{HOST, HeaderValue};
use hyper::{Request, Response, Uri, client};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::address::{DockerHost, DockerTls};
use crate::error::last_cause;

/// Why there was no answer.
#[derive(Debug)]
pub enum Failed {
    /// No connection.
    Io(io::Error),
    /// No answer on the connection.
    Http(hyper::Error),
}

impl Failed {
    /// The error in one line.
    pub fn words(&self) -> String {
        let error: &(dyn std::error::Error + 'static) = match self {
            Self::Io(error) => error,
            Self::Http(error) => error,
        };
        tls_words(error).unwrap_or_else(|| last_cause(error))
    }
}

/// A future answer.
type Answering = Pin<Box<dyn Future<Output = Result<Response<Incoming>, bollard::errors::Error>> + Send>>;

/// The transport of the client library's requests over TLS, for which it has none of its own.
pub fn custom(tls: DockerTls) -> impl Fn(BollardRequest) -> Answering + Send + Sync {
    let host = DockerHost::Tls(tls);
    move |request: BollardRequest| {
        let host = host.clone();
        Box::pin(async move {
            send(&host, request).await.map_err(|failed| match failed {
                Failed::Io(err) => bollard::errors::Error::IOError { err },
                Failed::Http(err) => bollard::errors::Error::HyperResponseError { err },
            })
        })
    }
}

/// Sends one request on its own connection, which ends with the answer's body.
///
/// # Errors
/// [`Failed`].
pub async fn send<B>(host: &DockerHost, mut request: Request<B>) -> Result<Response<Incoming>, Failed>
where
    B: Body<Data: Send, Error: Into<Box<dyn std::error::Error + Send + Sync>>> + Send + 'static,
{
    let name = match host {
        DockerHost::Unix(_) => "docker",
        DockerHost::Http(address) => address,
        DockerHost::Tls(tls) => &tls.address,
    };
    let name = HeaderValue::from_str(name).map_err(|error| Failed::Io(io::Error::other(error)))?;
    request.headers_mut().insert(HOST, name);
    // A request to a server holds only the path.
    if let Some(path) = request.uri().path_and_query() {
        *request.uri_mut() = Uri::from(path.clone());
    }
    match host {
        DockerHost::Unix(socket) => exchange(UnixStream::connect(socket).await.map_err(Failed::Io)?, request).await,
        DockerHost::Http(address) => {
            exchange(TcpStream::connect(address.as_str()).await.map_err(Failed::Io)?, request).await
        }
        DockerHost::Tls(tls) => exchange(shaken(tls).await.map_err(Failed::Io)?, request).await,
    }
}

/// Connects and completes the TLS handshake, with certificates on both sides.
///
/// # Errors
/// When there is no connection, or one side does not accept the other's certificate.
pub async fn shaken(tls: &DockerTls) -> io::Result<TlsStream<TcpStream>> {
    let stream = TcpStream::connect(tls.address.as_str()).await?;
    TlsConnector::from(tls.config.clone()).connect(tls.name.clone(), stream).await
}

async fn exchange<B>(
    stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    request: Request<B>,
) -> Result<Response<Incoming>, Failed>
where
    B: Body<Data: Send, Error: Into<Box<dyn std::error::Error + Send + Sync>>> + Send + 'static,
{
    let (mut sender, connection) = client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(Failed::Http)?;
    // The task ends with the answer, or when nobody reads it any more. The answer reports errors of the connection.
    tokio::spawn(connection);
    sender.send_request(request).await.map_err(Failed::Http)
}

/// Says in plain words why one side rejects the other's TLS or certificate.
pub fn tls_words(error: &(dyn std::error::Error + 'static)) -> Option<String> {
    use rustls::{AlertDescription as Alert, CertificateError, Error, InvalidMessage};
    let mut next = Some(error);
    let refused = loop {
        let cause = next?;
        if let Some(refused) = cause.downcast_ref::<Error>() {
            break refused;
        }
        next = match cause.downcast_ref::<io::Error>().and_then(io::Error::get_ref) {
            Some(inner) => Some(inner),
            None => cause.source(),
        };
    };
    Some(match refused {
        Error::InvalidMessage(InvalidMessage::InvalidContentType) => {
            "there is no TLS at this port: remove DOCKER_TLS_VERIFY and DOCKER_CERT_PATH, or use the port for TLS, 2376 as a rule".to_owned()
        }
        Error::InvalidCertificate(CertificateError::UnknownIssuer) => {
            "its certificate is not signed by the ca.pem in DOCKER_CERT_PATH".to_owned()
        }
        Error::InvalidCertificate(CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. }) => {
            "its certificate is for another name than the one in the address".to_owned()
        }
        Error::InvalidCertificate(CertificateError::Expired | CertificateError::ExpiredContext { .. }) => {
            "its certificate has expired".to_owned()
        }
        Error::InvalidCertificate(other) => format!("its certificate is not accepted: {other}"),
        Error::AlertReceived(
            Alert::UnknownCA
            | Alert::BadCertificate
            | Alert::CertificateRequired
            | Alert::CertificateUnknown
            | Alert::CertificateExpired
            | Alert::CertificateRevoked
            | Alert::UnsupportedCertificate
            | Alert::AccessDenied
            | Alert::DecryptError,
        ) => "it does not accept the certificate cert.pem in DOCKER_CERT_PATH".to_owned(),
        other => other.to_string(),
    })
}
