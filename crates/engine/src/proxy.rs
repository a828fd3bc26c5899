//! A strict socket proxy: sits between a program and the Docker socket, and lets through the program's own calls and
//! nothing else. The program defines these calls ([`Proxy`]); this module reads, refuses and answers requests.
//!
//! ```text
//!  program ──unix socket──> listen ──> server ──Head, body──> Proxy::plan ──Call──> Proxy::perform ──> Docker
//!                                        │                        │                     │
//!                                        │<─── Refusal, logged by refusals ─────────────┤
//!                                        └<──────────── answer, made anew ──────────────┘
//! ```
//!
//! The proxy forwards nothing. It turns a request into one of a closed set of calls, which it makes itself from checked
//! values, and writes the answer anew from what it read of Docker's.

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

/// Follows the program's name in a refusal. Our clients recognize their own proxy by it.
pub const REFUSES: &str = " socket-proxy refuses this";

/// The calls that a program lets through.
pub trait Proxy: Send + Sync {
    /// The program's name, for refusals.
    const PROGRAM: &str;
    /// The proxy's value of the header `Server`.
    const SERVER: &str;

    /// One of its calls.
    type Call: Send;
    /// A value that lives as long as the connection of its call.
    type Held: Send;

    /// Checks that the route exists, and that its method may or may not have a body, as the head says. Called before
    /// the body is read.
    ///
    /// # Errors
    /// The rule that refuses the request.
    fn admits(&self, head: &Head) -> Result<(), Refusal>;

    /// Turns a request into its call. The body is as long as the head says.
    ///
    /// # Errors
    /// The rule that refuses the request.
    fn plan(&self, head: &Head, body: &[u8]) -> Result<Planned<Self::Call>, Refusal>;

    /// Records that a call has arrived.
    fn hold(&self, call: &Self::Call) -> impl Future<Output = Self::Held> + Send;

    /// Makes the call. Dropped when the client disconnects.
    fn perform(&self, call: Self::Call) -> impl Future<Output = Result<Answer, Failure>> + Send;
}

/// A call, and the template of its route for the log.
#[derive(Debug)]
pub struct Planned<C> {
    /// Such as `POST /containers/{name}/start`.
    pub route: &'static str,
    /// The call.
    pub call: C,
}

/// The answer to a request.
pub enum Answer {
    /// Status and a JSON body.
    Json(u16, Value),
    /// 204.
    Done,
    /// 200 with this content type and these bytes.
    Bytes(&'static str, Vec<u8>),
    /// 200 and one JSON value after another. An error ends the stream as a cut connection would.
    Stream(Pin<Box<dyn Stream<Item = Result<Value, DockerError>> + Send>>),
}

/// Why a call was not made, or how it failed.
pub enum Failure {
    /// Refused by this rule, which needs a look at Docker.
    Refused(&'static str),
    /// There is no such container.
    Absent(String),
    /// Docker's error, or its silence.
    Docker(DockerError),
}

impl From<DockerError> for Failure {
    fn from(error: DockerError) -> Self {
        Self::Docker(error)
    }
}
