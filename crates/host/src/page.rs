//! A program's own pages: one GET for each connection, within narrow limits, and nothing secret. What is on them is
//! the program's business ([`Pages`]).
//!
//! Whoever shares a network with the program may ask, so nothing here waits for a client. Who holds connections open
//! takes places from nobody but themselves: each peer has a few, and those on this machine have their own.

use std::convert::Infallible;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{ALLOW, CONTENT_TYPE, HeaderValue};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;
use tracing::warn;

use crate::places::{Place, Places, is_near};
use crate::{error_chain, http};

/// Connections served at once from elsewhere, and as many from this machine; further ones are closed.
const MOST_CONNECTIONS: usize = 64;
/// Of these for each peer: a person's browser opens six.
const MOST_OF_ONE_PEER: usize = 8;
/// A client has this long to send its request, which is one packet.
const HEAD_LIMIT: Duration = Duration::from_secs(5);
/// A client that takes longer for its request and our answer is cut off.
const CONNECTION_LIMIT: Duration = Duration::from_secs(10);
/// A request has a line and some headers. 8 KiB is the least that the library takes.
const MAX_REQUEST_BYTES: usize = 8 << 10;

/// Address and port of a program's own pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageAddress(pub SocketAddr);

impl fmt::Display for PageAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// What is answered.
#[derive(Debug)]
pub struct Page {
    status: StatusCode,
    kind: &'static str,
    text: String,
}

impl Page {
    /// A JSON document.
    pub fn json(status: StatusCode, body: &Value) -> Self {
        Self { status, kind: "application/json", text: format!("{body}\n") }
    }

    /// A text of this content type, with status 200.
    pub fn text(kind: &'static str, text: String) -> Self {
        Self { status: StatusCode::OK, kind, text }
    }
}

/// Who knows what is on the pages.
pub trait Pages: Send + Sync + 'static {
    /// The page under this path, for a client on this machine or one from elsewhere.
    fn page(&self, path: &str, is_near: bool) -> impl Future<Output = Page> + Send;
}

/// Opens the port; inside a container nothing is published by that.
///
/// # Errors
/// When the port is taken or the address may not be used.
pub async fn bind(page: PageAddress) -> std::io::Result<TcpListener> {
    TcpListener::bind(page.0).await
}

/// Serves the pages for ever. Cancel-safe.
pub async fn serve(listener: TcpListener, pages: impl Pages) -> Infallible {
    let pages = Arc::new(pages);
    let places = Places::new(MOST_CONNECTIONS, MOST_OF_ONE_PEER);
    loop {
        let (stream, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                // Out of descriptors, most likely: others must have a chance to close theirs.
                warn!("the health page cannot take a connection: {error}; trying again");
                tokio::time::sleep(Duration::from_secs(1)).await;
                continue;
            }
        };
        // Who finds no place is closed at once, so that nobody waits behind those who dawdle.
        if let Some(place) = places.take(peer.ip()) {
            tokio::spawn(converse(stream, peer, pages.clone(), place));
        }
    }
}

/// One connection, one request.
async fn converse(stream: TcpStream, peer: SocketAddr, pages: Arc<impl Pages>, place: Place) {
    let service = service_fn(move |request| answer(request, peer, pages.clone()));
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_LIMIT)
        .max_buf_size(MAX_REQUEST_BYTES)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), service);
    // A client that breaks off or dawdles is its own problem.
    let _ = timeout(CONNECTION_LIMIT, connection).await;
    drop(place);
}

async fn answer(
    request: Request<Incoming>,
    peer: SocketAddr,
    pages: Arc<impl Pages>,
) -> Result<Response<Full<Bytes>>, Infallible> {
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        let mut refusal = response(Page::json(StatusCode::METHOD_NOT_ALLOWED, &json!({ "error": "use GET" })));
        refusal.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
        return Ok(refusal);
    }
    Ok(response(pages.page(request.uri().path(), is_near(peer.ip())).await))
}

fn response(page: Page) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(page.text)));
    *response.status_mut() = page.status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(page.kind));
    response
}

/// What the page of a program in the same container answers under this path, whatever its status. `who` is the
/// subject of the sentence when nobody does.
///
/// # Errors
/// One line, when nobody answers within `limit` or it is not JSON.
pub async fn ask(who: &str, page: PageAddress, path: &str, limit: Duration) -> Result<Value, String> {
    let at = reached_at(page);
    let get = async { http::neighbour(limit)?.get(format!("http://{at}{path}")).send().await?.bytes().await };
    let body = get.await.map_err(|error| format!("{who} does not answer on {at}: {}", error_chain(&error)))?;
    serde_json::from_slice(&body).map_err(|_| format!("{at} is served by something else"))
}

/// Where a page that listens there is reached from this machine.
fn reached_at(page: PageAddress) -> SocketAddr {
    let ip = match page.0.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    SocketAddr::new(ip, page.0.port())
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpSocket;

    use super::*;

    #[test]
    fn a_page_on_every_interface_is_asked_on_the_loopback_and_any_other_where_it_is() {
        for (listens, asked) in [
            ("0.0.0.0:8080", "127.0.0.1:8080"),
            ("[::]:8080", "[::1]:8080"),
            ("127.0.0.1:1", "127.0.0.1:1"),
            ("172.18.0.2:80", "172.18.0.2:80"),
        ] {
            assert_eq!(reached_at(PageAddress(listens.parse().unwrap())).to_string(), asked);
        }
    }

    struct Word;

    impl Pages for Word {
        async fn page(&self, path: &str, _: bool) -> Page {
            Page::text("text/plain", path.to_owned())
        }
    }

    #[tokio::test]
    async fn idle_connections_of_one_neighbour_keep_no_other_from_an_answer_and_are_closed_soon() {
        let listener = bind(PageAddress("127.0.0.1:0".parse().unwrap())).await.unwrap();
        let at = listener.local_addr().unwrap();
        tokio::spawn(async move { match serve(listener, Word).await {} });
        let from = async |ip: &str| {
            let socket = TcpSocket::new_v4().unwrap();
            socket.bind(SocketAddr::new(ip.parse().unwrap(), 0)).unwrap();
            socket.connect(at).await.unwrap()
        };
        let mut idle = Vec::new();
        for _ in 0..2 * MOST_CONNECTIONS {
            idle.push(from("127.0.0.2").await);
        }
        for other in ["127.0.0.1", "127.0.0.3"] {
            let mut stream = from(other).await;
            stream.write_all(b"GET /word HTTP/1.1\r\nHost: a\r\n\r\n").await.unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).await.unwrap();
            assert!(answer.starts_with("HTTP/1.1 200 OK") && answer.ends_with("/word"), "{other}: {answer}");
        }
        let began = Instant::now();
        for mut idle in idle {
            // Reset where it had no place.
            let _ = idle.read_to_end(&mut Vec::new()).await;
        }
        assert!(began.elapsed() < CONNECTION_LIMIT, "{:?}", began.elapsed());
    }
}
