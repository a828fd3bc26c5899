//! Sends one HTTP request on its own connection: all that `tunnel ready` and the tests need.

use anyhow::{Context, Result};
use http_body_util::{BodyExt, Full};
use hyper::Request;
use hyper::body::Bytes;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

/// A complete answer.
#[derive(Debug)]
pub struct Answer {
    /// The HTTP status.
    pub status: u16,
    /// The body, as text.
    pub body: String,
}

/// `GET http://{address}{path}`, without a time limit: wrap it if you need one.
///
/// # Errors
/// When the connection fails, or does not give an HTTP answer.
pub async fn get(address: &str, path: &str) -> Result<Answer> {
    request("GET", address, path, None).await
}

/// `POST http://{address}{path}` with a JSON body.
///
/// # Errors
/// As [`get`].
pub async fn post(address: &str, path: &str, body: &serde_json::Value) -> Result<Answer> {
    request("POST", address, path, Some(body.to_string())).await
}

async fn request(method: &str, address: &str, path: &str, body: Option<String>) -> Result<Answer> {
    let stream = TcpStream::connect(address).await.with_context(|| format!("cannot connect to {address}"))?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let mut request = Request::builder().method(method).uri(path).header("host", address);
    if body.is_some() {
        request = request.header("content-type", "application/json");
    }
    let request = request.body(Full::new(Bytes::from(body.unwrap_or_default())))?;
    let exchange = async {
        let response = sender.send_request(request).await?;
        let status = response.status().as_u16();
        let body = response.into_body().collect().await?.to_bytes();
        Ok(Answer { status, body: String::from_utf8_lossy(&body).into_owned() })
    };
    // Drive the connection here, not in a task, so that nothing outlives the request. The connection may end first,
    // once the answer has arrived: the exchange still has all of it then.
    tokio::pin!(connection);
    tokio::pin!(exchange);
    tokio::select! {
        answer = &mut exchange => answer,
        ended = &mut connection => {
            ended?;
            exchange.await
        }
    }
}
