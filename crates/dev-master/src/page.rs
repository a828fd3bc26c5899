//! `GET /`: the page for people who watch a demonstration.

use hyper::StatusCode;

use crate::reply::Reply;
use crate::state::State;

/// How many requests the page and the error of a timed-out wait show.
const LAST: usize = 20;

/// The page: the snapshot and the last requests, without secrets. It needs no authentication.
pub(crate) fn page(state: &State) -> Reply {
    Reply::text(StatusCode::OK, text(state))
}

/// Formats the snapshot and the last requests for people, without secrets.
pub(crate) fn text(state: &State) -> String {
    let requests = state.journal.requests();
    let last = requests.iter().rev().take(LAST).rev();
    let last: String = last.map(|request| format!("{request}\n")).collect();
    state.redact(format!("{}\nlast requests, of {}:\n{last}", state.snapshot(), requests.len()))
}
