//! The HTTP side: reads requests, lets faults act, and sends or damages replies.
//!
//! The double has its own accept loop, because a fault must be able to end a connection without a reply.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use http_body_util::{BodyExt, Limited};
use hyper::body::{Body, Bytes, Frame, Incoming, SizeHint};
use hyper::header::{AUTHORIZATION, CONTENT_LENGTH, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

use crate::fault::Fault;
use crate::journal::Request;
use crate::reply::Reply;
use crate::request::{Call, Payload, Route, Target};
use crate::state::{Settings, Shared, State};
use crate::{accounts, admin, commands, decommission, events, register};

/// The double's own limit on a body, far above a master's and above anything an agent sends. It cuts the
/// connection beyond.
const BODY: usize = 64 << 20;

/// Ends a connection without a reply.
#[derive(Debug, thiserror::Error)]
#[error("the connection is cut")]
pub(crate) struct Cut;

/// Serves until dropped. Dropping it closes the listener and all connections.
pub(crate) async fn run(listener: TcpListener, shared: Arc<Shared>) -> Infallible {
    let mut connections = JoinSet::new();
    loop {
        // Both arms are cancel-safe: a connection not yet accepted stays in the kernel's queue.
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => drop(connections.spawn(serve(stream, Arc::clone(&shared)))),
                Err(error) => {
                    tracing::warn!("no connection accepted: {error}; trying again");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            },
            Some(_) = connections.join_next() => {}
        }
    }
}

async fn serve(stream: TcpStream, shared: Arc<Shared>) {
    let service = service_fn(|request| answer(Arc::clone(&shared), request));
    // An error here means that the client went away, or that a fault cut the connection.
    let _ = http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
}

/// Answers one request, as far as the faults allow.
async fn answer(shared: Arc<Shared>, request: hyper::Request<Incoming>) -> Result<Response<Outgoing>, Cut> {
    let call = read(&shared.settings, request).await?;
    if let Target::Operator(segments) = &call.target {
        return Ok(whole(admin::handle(&shared, &call, segments)));
    }
    let admitted =
        shared.settings.access.as_ref().is_none_or(|(id, secret)| {
            call.access.0.as_deref() == Some(id) && call.access.1.as_deref() == Some(secret)
        });
    let mut visit = Visit::begin(shared, call);
    if !admitted {
        return Ok(whole(visit.end(|_, _| Reply::login(), true)));
    }
    match visit.fault.clone() {
        None => Ok(whole(visit.end(handle, true))),
        Some(Fault::Delay { millis }) => {
            tokio::time::sleep(Duration::from_millis(millis)).await;
            Ok(whole(visit.end(handle, true)))
        }
        Some(Fault::Hold) => {
            visit.held().await;
            Ok(whole(visit.end(handle, true)))
        }
        Some(Fault::Status { status, code, retry_after }) => {
            let reply = refusal(status, code.as_deref(), retry_after);
            Ok(whole(visit.end(|_, _| reply, true)))
        }
        Some(Fault::Reply { status, body }) => {
            let status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
            Ok(whole(visit.end(|_, _| Reply::json(status, &body), true)))
        }
        Some(Fault::NotJson) => Ok(whole(visit.end(|_, _| Reply::html(StatusCode::OK), true))),
        Some(Fault::LoginRedirect) => Ok(whole(visit.end(|_, _| Reply::login(), true))),
        Some(Fault::CutBefore) => {
            visit.end(|_, _| Reply::html(StatusCode::OK), false);
            Err(Cut)
        }
        Some(Fault::LostReply) => {
            visit.end(handle, false);
            Err(Cut)
        }
        Some(Fault::CutHalfway) => Ok(cut_halfway(visit.end(handle, true))),
        Some(Fault::Truncated) => {
            let mut reply = visit.end(handle, true);
            reply.body.truncate(middle(&reply.body));
            Ok(whole(reply))
        }
    }
}

/// Handles a request on the agent's routes.
fn handle(state: &mut State, call: &Call) -> Reply {
    if call.length > state.rules.front_bytes {
        return Reply::html(StatusCode::PAYLOAD_TOO_LARGE);
    }
    match &call.target {
        Target::Register => register::register(state, call),
        Target::Commands { agent } => commands::commands(state, call, agent),
        Target::Events { agent } => events::events(state, call, agent),
        Target::Ack { agent, operation } => decommission::acknowledge(state, call, agent, operation),
        Target::Accounts => accounts::accounts(state, call),
        Target::Configurations { account, tunnel } => accounts::configurations(state, call, account, tunnel),
        Target::Operator(_) | Target::Other => {
            let what = format!("no master has {} {}", call.method, call.path);
            state.journal.violation(Route::Other, "?", &what);
            Reply::html(StatusCode::NOT_FOUND)
        }
    }
}

/// The reply of a [`Fault::Status`]; an invalid status becomes 500.
fn refusal(status: u16, code: Option<&str>, retry_after: Option<String>) -> Reply {
    let status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let mut reply = code.map_or_else(|| Reply::html(status), |code| Reply::code(status, code));
    reply.headers.extend(retry_after.map(|value| ("retry-after", value)));
    reply
}

/// An agent's request between its arrival and its end. If dropped before its end, records in the journal
/// that the client hung up first.
struct Visit {
    shared: Arc<Shared>,
    call: Call,
    fault: Option<Fault>,
    /// The number of this events request among those in flight.
    flight: Option<u64>,
    /// How often the faults had been cleared when the request arrived.
    clearings: u64,
    ended: bool,
}

impl Visit {
    fn begin(shared: Arc<Shared>, call: Call) -> Self {
        let (fault, flight, clearings) = shared.change(|state| {
            let fault = state.faults.take(call.target.route(), || call.body().to_string());
            if let Some(fault) = &fault {
                tracing::info!("fault on {}: {fault:?}", call.target.route());
            }
            let event = call.object().and_then(|body| body.get("type")).and_then(|kind| kind.as_str());
            let flight = match (&call.target, event) {
                (Target::Events { agent }, Some(event)) => Some(state.take_off(agent, event)),
                _ => None,
            };
            (fault, flight, state.faults.clearings)
        });
        Self { shared, call, fault, flight, clearings, ended: false }
    }

    /// Makes the reply and records the request, at one instant.
    fn end(&mut self, reply: impl FnOnce(&mut State, &Call) -> Reply, sent: bool) -> Reply {
        self.ended = true;
        let Self { shared, call, fault, flight, .. } = self;
        shared.change(|state| {
            let reply = reply(state, call);
            let status = sent.then_some(reply.status.as_u16());
            let code = reply.code.clone().filter(|_| sent);
            state.journal.record(Request::new(call, fault.as_ref(), status, code));
            if let Some(flight) = flight {
                state.land(*flight, true);
            }
            reply
        })
    }

    /// Waits until the faults are cleared.
    async fn held(&self) {
        let mut news = self.shared.subscribe();
        while self.shared.look().faults.clearings == self.clearings {
            if news.changed().await.is_err() {
                return;
            }
        }
    }
}

impl Drop for Visit {
    fn drop(&mut self) {
        if self.ended {
            return;
        }
        let Self { shared, call, fault, flight, .. } = self;
        shared.change(|state| {
            state.journal.record(Request::new(call, fault.as_ref(), None, None));
            if let Some(flight) = flight {
                state.land(*flight, false);
            }
        });
    }
}

/// Reads a request to its end.
async fn read(settings: &Settings, request: hyper::Request<Incoming>) -> Result<Call, Cut> {
    let (head, body) = request.into_parts();
    let body = Limited::new(body, BODY).collect().await.map_err(|_| Cut)?.to_bytes();
    let path = head.uri.path();
    let target = match path.strip_prefix(&settings.prefix) {
        Some(rest) if rest.is_empty() || rest.starts_with('/') => Target::of(&head.method, rest),
        _ => Target::Other,
    };
    let json = text(&head.headers, CONTENT_TYPE).is_some_and(|kind| kind.starts_with("application/json"));
    let payload = match serde_json::from_slice(&body) {
        _ if body.is_empty() => Payload::Empty,
        _ if !json => Payload::WrongType,
        Ok(value) => Payload::Json(value),
        Err(_) => Payload::Broken,
    };
    let access = |name| text(&head.headers, HeaderName::from_static(name));
    Ok(Call {
        target,
        key: text(&head.headers, AUTHORIZATION).and_then(|value| value.strip_prefix("Bearer ").map(str::to_owned)),
        access: (access("cf-access-client-id"), access("cf-access-client-secret")),
        headers: head.headers.keys().map(ToString::to_string).collect(),
        length: body.len(),
        payload,
        path: path.to_owned(),
        method: head.method,
    })
}

fn text(headers: &HeaderMap, name: HeaderName) -> Option<String> {
    headers.get(name).and_then(|value| value.to_str().ok()).map(str::to_owned)
}

/// A body sent in steps. Without a cut it is one piece of known length.
pub(crate) struct Outgoing(VecDeque<Step>);

enum Step {
    Data(Bytes),
    /// Lets the data so far leave the process before the next step.
    Flush,
    Cut,
}

impl Body for Outgoing {
    type Data = Bytes;
    type Error = Cut;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Cut>>> {
        match self.0.pop_front() {
            None => Poll::Ready(None),
            Some(Step::Data(data)) => Poll::Ready(Some(Ok(Frame::data(data)))),
            Some(Step::Flush) => {
                cx.waker().wake_by_ref();
                Poll::Pending
            }
            Some(Step::Cut) => Poll::Ready(Some(Err(Cut))),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.0.is_empty()
    }

    fn size_hint(&self) -> SizeHint {
        match self.0.iter().collect::<Vec<_>>().as_slice() {
            [] => SizeHint::with_exact(0),
            [Step::Data(data)] => SizeHint::with_exact(data.len() as u64),
            _ => SizeHint::default(),
        }
    }
}

fn whole(reply: Reply) -> Response<Outgoing> {
    let body = Bytes::from(reply.body.clone());
    response(reply, [Step::Data(body)].into())
}

/// Announces the whole length, sends the first half, then cuts the connection.
fn cut_halfway(mut reply: Reply) -> Response<Outgoing> {
    let length = reply.body.len();
    reply.body.truncate(middle(&reply.body));
    let half = Bytes::from(reply.body.clone());
    let mut response = response(reply, [Step::Data(half), Step::Flush, Step::Cut].into());
    response.headers_mut().insert(CONTENT_LENGTH, HeaderValue::from(length));
    response
}

/// The position at which to cut a text in half, on a character boundary.
fn middle(text: &str) -> usize {
    (0..=text.len() / 2).rev().find(|&at| text.is_char_boundary(at)).unwrap_or(0)
}

fn response(reply: Reply, body: VecDeque<Step>) -> Response<Outgoing> {
    let mut response = Response::new(Outgoing(body));
    *response.status_mut() = reply.status;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(reply.content_type));
    for (name, value) in reply.headers {
        match HeaderValue::from_str(&value) {
            Ok(value) => drop(headers.insert(name, value)),
            Err(_) => tracing::warn!(name, "not a value for a header; sent without it"),
        }
    }
    response
}
