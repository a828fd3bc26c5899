//! Faults: ways in which the double fails its agents on purpose.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::request::Route;

/// One way to fail a request. Each variant says whether the double still handles the request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Fault {
    /// Answers with a status instead of handling the request. No effect.
    Status {
        /// The HTTP status.
        status: u16,
        /// The `code` of a JSON body; if absent, the body is a proxy's HTML.
        #[serde(default)]
        code: Option<String>,
        /// The `Retry-After` header as sent: seconds or an HTTP date.
        #[serde(default)]
        retry_after: Option<String>,
    },
    /// Answers with this JSON instead of handling the request. No effect.
    Reply {
        /// The HTTP status.
        status: u16,
        /// The body.
        body: Value,
    },
    /// Waits, then handles the request as usual unless the client has hung up.
    Delay {
        /// How long to wait, in milliseconds.
        millis: u64,
    },
    /// Waits until the faults are cleared, then handles the request as usual unless the client has hung up.
    Hold,
    /// Cuts the connection instead of handling the request. No effect.
    CutBefore,
    /// Handles the request, announces the reply's full length, sends half of it and cuts the connection.
    CutHalfway,
    /// Handles the request and cuts the connection without any reply.
    LostReply,
    /// Handles the request and sends half of the reply as if that were all: broken JSON.
    Truncated,
    /// Answers 200 with HTML instead of handling the request. No effect.
    NotJson,
    /// Answers 302 to a login page, as Cloudflare Access does. No effect.
    LoginRedirect,
}

impl Fault {
    /// Answers `status` with a proxy's HTML.
    pub fn status(status: u16) -> Self {
        Self::Status { status, code: None, retry_after: None }
    }

    /// Answers `status` with a master's JSON and its `code`.
    pub fn code(status: u16, code: &str) -> Self {
        Self::Status { status, code: Some(code.to_owned()), retry_after: None }
    }

    /// Answers `status` with this JSON.
    pub fn reply(status: u16, body: Value) -> Self {
        Self::Reply { status, body }
    }

    /// Adds `Retry-After`, in seconds or as an HTTP date, to a [`Fault::Status`]. Leaves other faults unchanged.
    #[must_use]
    pub fn retry_after(mut self, value: &str) -> Self {
        if let Self::Status { retry_after, .. } = &mut self {
            *retry_after = Some(value.to_owned());
        }
        self
    }

    /// Waits `delay`, rounded down to milliseconds, before handling the request.
    pub fn delay(delay: Duration) -> Self {
        Self::Delay { millis: u64::try_from(delay.as_millis()).unwrap_or(u64::MAX) }
    }
}

/// How many requests a fault acts on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Times {
    /// This many requests.
    Count(u32),
    /// Every request, until the faults are cleared.
    UntilCleared,
}

impl From<u32> for Times {
    fn from(count: u32) -> Self {
        Self::Count(count)
    }
}

/// The faults in force, oldest first. At most one acts on a request.
#[derive(Debug, Default)]
pub(crate) struct Faults {
    set: Vec<Set>,
    /// How often the faults were cleared; a held request waits for this to change.
    pub(crate) clearings: u64,
}

#[derive(Debug)]
struct Set {
    route: Route,
    /// Acts only on bodies that contain this text.
    containing: Option<String>,
    fault: Fault,
    times: Times,
}

impl Faults {
    pub(crate) fn add(&mut self, route: Route, containing: Option<String>, fault: Fault, times: Times) {
        if times != Times::Count(0) {
            self.set.push(Set { route, containing, fault, times });
        }
    }

    pub(crate) fn clear(&mut self) {
        self.set.clear();
        self.clearings += 1;
    }

    pub(crate) fn len(&self) -> usize {
        self.set.len()
    }

    /// Returns the fault that acts on a request on `route` with this body, if any, and counts it as used.
    pub(crate) fn take(&mut self, route: Route, body: impl Fn() -> String) -> Option<Fault> {
        let text = self.set.iter().any(|set| set.containing.is_some()).then(body).unwrap_or_default();
        let acts = |set: &Set| {
            set.route.covers(route) && set.containing.as_ref().is_none_or(|part| text.contains(part.as_str()))
        };
        let at = self.set.iter().position(acts)?;
        let Set { fault, times, .. } = &mut self.set[at];
        let fault = fault.clone();
        if let Times::Count(left) = times {
            *left -= 1;
            if *left == 0 {
                self.set.remove(at);
            }
        }
        Some(fault)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_acts_as_often_as_it_was_set_and_only_on_its_route() {
        let mut faults = Faults::default();
        faults.add(Route::Events, Some("two".to_owned()), Fault::LostReply, Times::UntilCleared);
        faults.add(Route::Events, None, Fault::CutBefore, Times::Count(2));
        faults.add(Route::Any, None, Fault::NotJson, Times::UntilCleared);
        let one = || "one".to_owned();
        assert_eq!(faults.take(Route::Commands, one), Some(Fault::NotJson));
        assert_eq!(faults.take(Route::Events, one), Some(Fault::CutBefore));
        assert_eq!(faults.take(Route::Events, || "one and two".to_owned()), Some(Fault::LostReply));
        assert_eq!(faults.take(Route::Events, one), Some(Fault::CutBefore));
        assert_eq!(faults.take(Route::Events, one), Some(Fault::NotJson));
        faults.clear();
        assert_eq!(faults.take(Route::Events, one), None);
    }

    #[test]
    fn a_fault_is_readable_from_json() {
        let read: Fault = serde_json::from_str(r#"{"kind":"status","status":503,"retry_after":"2"}"#).unwrap();
        assert_eq!(read, Fault::status(503).retry_after("2"));
        let read: Fault = serde_json::from_str(r#"{"kind":"delay","millis":5}"#).unwrap();
        assert_eq!(read, Fault::delay(Duration::from_millis(5)));
    }
}
