//! `GET /`: what people see who watch a demonstration.

use hyper::StatusCode;

use crate::reply::Reply;
use crate::state::State;

/// Requests shown on the page and in the error of a wait that was in vain.
const LAST: usize = 20;

/// The page: the picture and the last requests, without secrets and without authentication.
pub(crate) fn page(state: &State) -> Reply {
    Reply::text(StatusCode::OK, text(state))
}

/// The picture and the last requests, readable.
pub(crate) fn text(state: &State) -> String {
    let requests = state.journal.requests();
    let last = requests.iter().rev().take(LAST).rev();
    let last: String = last.map(|request| format!("{request}\n")).collect();
    state.redact(format!("{}\nlast requests, of {}:\n{last}", state.snapshot(), requests.len()))
}
