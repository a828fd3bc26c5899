//! Serves a program's own pages: one GET per connection, within narrow limits, and nothing secret. The program defines
//! their content ([`Pages`]).
//!
//! Anyone on the program's networks may ask, so nothing here waits for a client. A client that holds connections open
//! takes places only from itself: each peer has a few, and peers on this machine have a pool of their own.

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

/// Most connections at a time from elsewhere, and again as many from this machine. Further ones are closed.
const MOST_CONNECTIONS: usize = 64;
/// Most connections of one peer. A browser opens six.
const MOST_OF_ONE_PEER: usize = 8;
/// Time limit for a client to send its request, which is one packet.
const HEAD_LIMIT: Duration = Duration::from_secs(5);
/// Time limit for a request and its answer; after it, the client is cut off.
const CONNECTION_LIMIT: Duration = Duration::from_secs(10);
/// Most bytes of a request, which has a line and some headers. 8 KiB is the least that the library accepts.
const MAX_REQUEST_BYTES: usize = 8 << 10;

/// Address and port of a program's own pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageAddress(pub SocketAddr);

impl fmt::Display for PageAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The answer to a request.
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

/// The content of the pages.
pub trait Pages: Send + Sync + 'static {
    /// The page at this path, for a client on this machine or elsewhere.
    fn page(&self, path: &str, is_near: bool) -> impl Future<Output = Page> + Send;
}

/// Opens the port. Inside a container, this publishes nothing.
///
/// # Errors
/// When the port is taken, or the address may not be used.
pub async fn bind(page: PageAddress) -> std::io::Result<TcpListener> {
    TcpListener::bind(page.0).await
}

/// Serves the pages forever. Cancel-safe.
pub async fn serve(listener: TcpListener, pages: impl Pages) -> Infallible {
    let pages = Arc::new(pages);
    let places = Places::new(MOST_CONNECTIONS, MOST_OF_ONE_PEER);
    loop {
        let (stream, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                // Most likely out of file descriptors: give others a chance to close theirs.
                warn!("the health page cannot take a connection: {error}; trying again");
                tokio::time::sleep(Duration::from_secs(1)).await;
                continue;
            }
        };
        // A connection without a place is closed at once, so that slow clients delay nobody else.
        if let Some(place) = places.take(peer.ip()) {
            tokio::spawn(converse(stream, peer, pages.clone(), place));
        }
    }
}

/// Serves one request on one connection.
async fn converse(stream: TcpStream, peer: SocketAddr, pages: Arc<impl Pages>, place: Place) {
    let service = service_fn(move |request| answer(request, peer, pages.clone()));
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_LIMIT)
        .max_buf_size(MAX_REQUEST_BYTES)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), service);
    // A client that disconnects or stalls is not our problem.
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

/// Asks a program in the same container for the page at this path, and returns it whatever its status. `who` is the
/// subject of the error sentence.
///
/// # Errors
/// One line, when nothing answers within `limit` or the answer is not JSON.
pub async fn ask(who: &str, page: PageAddress, path: &str, limit: Duration) -> Result<Value, String> {
    let at = reached_at(page);
    let get = async { http::neighbour(limit)?.get(format!("http://{at}{path}")).send().await?.bytes().await };
    let body = get.await.map_err(|error| format!("{who} does not answer on {at}: {}", error_chain(&error)))?;
    serde_json::from_slice(&body).map_err(|_| format!("{at} is served by something else"))
}

/// The address at which this machine reaches a page that listens there.
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
            // The server resets connections that found no place.
            let _ = idle.read_to_end(&mut Vec::new()).await;
        }
        assert!(began.elapsed() < CONNECTION_LIMIT, "{:?}", began.elapsed());
    }
}
