//! A strict socket proxy: stands between a program and the Docker socket, and lets through the program's own calls and
//! nothing more. What these are is the program's ([`Proxy`]); how a request is read, refused and answered is here.
//!
//! ```text
//!  program ──unix socket──> listen ──> server ──Head, body──> Proxy::plan ──Call──> Proxy::perform ──> Docker
//!                                        │                        │                     │
//!                                        │<─── Refusal, told by refusals ───────────────┤
//!                                        └<──────────── answer, made anew ──────────────┘
//! ```
//!
//! Nothing is forwarded: a request becomes one of a closed set of calls, which the proxy makes itself, from checked
//! values; an answer is made anew from what was read of Docker's.

use std::pin::Pin;

use futures_util::Stream;
use serde_json::Value;

use crate::DockerError;

pub mod listen;
mod refusals;
mod request;
mod server;

pub use refusals::Refusals;
pub use request::{Head, MOST_BODY, MOST_HEAD, Method, Refusal};
pub use server::Service;

/// What stands in a refusal behind the program's name; a client of ours knows by it that no other proxy spoke.
pub const REFUSES: &str = " socket-proxy refuses this";

/// What a program lets through.
pub trait Proxy: Send + Sync {
    /// The program's name, for refusals.
    const PROGRAM: &str;
    /// How the proxy names itself in the header `Server`.
    const SERVER: &str;

    /// One of its calls.
    type Call: Send;
    /// Kept for as long as the connection that a call came by.
    type Held: Send;

    /// Whether there is such a route, and a body may follow or not as the head says. Asked before that is read.
    ///
    /// # Errors
    /// The rule that refuses it.
    fn admits(&self, head: &Head) -> Result<(), Refusal>;

    /// The call that a request may be. Its body is as long as its head says.
    ///
    /// # Errors
    /// The rule that refuses it.
    fn plan(&self, head: &Head, body: &[u8]) -> Result<Planned<Self::Call>, Refusal>;

    /// Takes note that a call has come.
    fn hold(&self, call: &Self::Call) -> impl Future<Output = Self::Held> + Send;

    /// Makes the call. Dropped when the client goes.
    fn perform(&self, call: Self::Call) -> impl Future<Output = Result<Answer, Failure>> + Send;
}

/// A call and the template of the route that it came by, for the log.
#[derive(Debug)]
pub struct Planned<C> {
    /// Such as `POST /containers/{name}/start`.
    pub route: &'static str,
    /// The call.
    pub call: C,
}

/// What goes back.
pub enum Answer {
    /// Status and a JSON body.
    Json(u16, Value),
    /// 204.
    Done,
    /// 200 with these bytes.
    Bytes(&'static str, Vec<u8>),
    /// 200 and one JSON value after another. An error ends it as a cut would.
    Stream(Pin<Box<dyn Stream<Item = Result<Value, DockerError>> + Send>>),
}

/// Why a call was not made, or what became of it.
pub enum Failure {
    /// By the rule of this name, which needs a look at Docker.
    Refused(&'static str),
    /// There is no such container.
    Absent(String),
    /// What Docker said, or that it said nothing.
    Docker(DockerError),
}

impl From<DockerError> for Failure {
    fn from(error: DockerError) -> Self {
        Self::Docker(error)
    }
}
