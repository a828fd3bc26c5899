//! Requests as they arrive: route, agent, key and body.

use std::fmt;

use hyper::Method;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// A route of the agent API, as the journal records it and as faults select it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Route {
    /// `POST /api/v2/agents/register`.
    Register,
    /// `GET /api/v2/agents/{id}/commands`.
    Commands,
    /// `POST /api/v2/agents/{id}/events`.
    Events,
    /// `POST /api/v2/agents/{id}/decommission/{operation}/ack`.
    Ack,
    /// `GET /accounts` and `PUT /accounts/{account}/cfd_tunnel/{tunnel}/configurations`.
    Accounts,
    /// A path or method that no master has.
    Other,
    /// For faults only: any of the above.
    Any,
}

impl Route {
    /// Whether a fault set on `self` matches a request on `route`.
    pub(crate) fn covers(self, route: Route) -> bool {
        self == Route::Any || self == route
    }
}

impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Route::Register => "register",
            Route::Commands => "commands",
            Route::Events => "events",
            Route::Ack => "ack",
            Route::Accounts => "accounts",
            Route::Other => "other",
            Route::Any => "any",
        })
    }
}

/// What a path means.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Target {
    Register,
    Commands {
        agent: String,
    },
    Events {
        agent: String,
    },
    Ack {
        agent: String,
        operation: String,
    },
    Accounts,
    Configurations {
        account: String,
        tunnel: String,
    },
    /// An operator's route, with the segments of its path.
    Operator(Vec<String>),
    Other,
}

impl Target {
    /// Reads a path whose prefix is already removed.
    pub(crate) fn of(method: &Method, path: &str) -> Self {
        let segments: Vec<&str> = path.trim_matches('/').split('/').collect();
        let operator = || Self::Operator(segments.iter().map(|&s| s.to_owned()).collect());
        let (get, post, put) = (*method == Method::GET, *method == Method::POST, *method == Method::PUT);
        match segments.as_slice() {
            ["api", "v2", "agents", "register"] if post => Self::Register,
            ["api", "v2", "agents", agent, "commands"] if get => Self::Commands { agent: (*agent).to_owned() },
            ["api", "v2", "agents", agent, "events"] if post => Self::Events { agent: (*agent).to_owned() },
            ["api", "v2", "agents", agent, "decommission", operation, "ack"] if post => {
                Self::Ack { agent: (*agent).to_owned(), operation: (*operation).to_owned() }
            }
            ["accounts"] if get => Self::Accounts,
            ["accounts", account, "cfd_tunnel", tunnel, "configurations"] if put => {
                Self::Configurations { account: (*account).to_owned(), tunnel: (*tunnel).to_owned() }
            }
            [""] if get => operator(),
            ["_dev", ..] => operator(),
            ["api", "v2", "agents" | "overview"] if get => operator(),
            ["api", "v2", "agents", "generate-key" | "revoke-key"] if post => operator(),
            ["api", "v2", "agents", _, "enroll" | "redeploy-tunnel" | "roll-key" | "rename" | "remove"] if post => {
                operator()
            }
            _ => Self::Other,
        }
    }

    pub(crate) fn route(&self) -> Route {
        match self {
            Self::Register => Route::Register,
            Self::Commands { .. } => Route::Commands,
            Self::Events { .. } => Route::Events,
            Self::Ack { .. } => Route::Ack,
            Self::Accounts | Self::Configurations { .. } => Route::Accounts,
            Self::Operator(_) | Self::Other => Route::Other,
        }
    }

    pub(crate) fn agent(&self) -> Option<&str> {
        match self {
            Self::Commands { agent } | Self::Events { agent } | Self::Ack { agent, .. } => Some(agent),
            _ => None,
        }
    }
}

/// A body, as far as the double could read it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Payload {
    /// Nothing was sent.
    Empty,
    /// Sent without `Content-Type: application/json`.
    WrongType,
    /// Not JSON, although its `Content-Type` says so.
    Broken,
    Json(Value),
}

/// One request, read to its end.
pub(crate) struct Call {
    pub(crate) method: Method,
    pub(crate) path: String,
    pub(crate) target: Target,
    /// The bearer key, if one was sent.
    pub(crate) key: Option<String>,
    /// `CF-Access-Client-Id` and `CF-Access-Client-Secret`.
    pub(crate) access: (Option<String>, Option<String>),
    /// The names of its headers.
    pub(crate) headers: Vec<String>,
    /// Length of the body in bytes.
    pub(crate) length: usize,
    pub(crate) payload: Payload,
}

impl Call {
    /// The body, if it is a JSON object.
    pub(crate) fn object(&self) -> Option<&Map<String, Value>> {
        match &self.payload {
            Payload::Json(Value::Object(object)) => Some(object),
            _ => None,
        }
    }

    /// The body for the journal: null unless it is JSON.
    pub(crate) fn body(&self) -> Value {
        match &self.payload {
            Payload::Json(value) => value.clone(),
            Payload::Empty | Payload::WrongType | Payload::Broken => Value::Null,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_name_their_routes() {
        let table = [
            (Method::POST, "/api/v2/agents/register", Route::Register),
            (Method::GET, "/api/v2/agents/a/commands", Route::Commands),
            (Method::POST, "/api/v2/agents/a/events", Route::Events),
            (Method::POST, "/api/v2/agents/a/decommission/o/ack", Route::Ack),
            (Method::GET, "/accounts", Route::Accounts),
            (Method::PUT, "/accounts/a/cfd_tunnel/t/configurations", Route::Accounts),
            (Method::GET, "/api/v2/agents/register", Route::Other),
            (Method::POST, "/api/v2/agents/a/commands", Route::Other),
            (Method::GET, "/api/v1/agents/a/commands", Route::Other),
        ];
        for (method, path, route) in table {
            assert_eq!(Target::of(&method, path).route(), route, "{method} {path}");
        }
    }

    #[test]
    fn the_operators_paths_are_not_the_agents() {
        for path in ["/", "/_dev/faults", "/api/v2/agents"] {
            assert!(matches!(Target::of(&Method::GET, path), Target::Operator(_)), "{path}");
        }
    }
}
