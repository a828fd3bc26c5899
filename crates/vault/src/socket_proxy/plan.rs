//! Maps a request to the one call that it may make, or to the rule that refuses it. Pure.
//!
//! | request | becomes |
//! |---|---|
//! | `GET`, `HEAD /_ping` | whether Docker answers |
//! | `GET /containers/{name or id}/json` | id, name, state, start, health, restarts and their policy, any bind mount |
//! | `POST /containers/{id}/kill?signal=` | one of the listed signals |
//! | `POST /containers/{id}/restart`, without a time-out | a restart with the container's own time-out |
//! | `POST /containers/{id}/start` | a start |

use std::collections::BTreeSet;

use dockflare_engine::proxy::{Head, Method, Planned, Refusal};

use crate::delivery::{ContainerName, Signal};

/// What the vault may ask for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Policy {
    /// The containers that it may ask for.
    pub(super) containers: BTreeSet<ContainerName>,
    /// The signals that it may send.
    pub(super) signals: Vec<Signal>,
}

impl Policy {
    pub(super) fn has(&self, name: &str) -> bool {
        self.containers.iter().any(|known| known.as_str() == name)
    }
}

/// How a request names a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Subject {
    /// A name on the list.
    Name(String),
    /// Full id.
    Id(String),
}

/// A call to Docker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Call {
    Ping,
    Inspect(Subject),
    Kill { id: String, signal: Signal },
    Restart(String),
    Start(String),
}

/// A route, with what its path names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Route<'a> {
    Ping,
    Inspect(&'a str),
    Kill(&'a str),
    Restart(&'a str),
    Start(&'a str),
}

impl<'a> Route<'a> {
    fn of(head: &'a Head) -> Option<Self> {
        let path: Vec<_> = head.path.iter().map(String::as_str).collect();
        Some(match (head.method, &path[..]) {
            (Method::Get | Method::Head, ["_ping"]) => Self::Ping,
            (Method::Get, ["containers", name, "json"]) => Self::Inspect(name),
            (Method::Post, ["containers", id, "kill"]) => Self::Kill(id),
            (Method::Post, ["containers", id, "restart"]) => Self::Restart(id),
            (Method::Post, ["containers", id, "start"]) => Self::Start(id),
            _ => return None,
        })
    }

    fn template(self) -> &'static str {
        match self {
            Self::Ping => "GET /_ping",
            Self::Inspect(_) => "GET /containers/{name}/json",
            Self::Kill(_) => "POST /containers/{name}/kill",
            Self::Restart(_) => "POST /containers/{name}/restart",
            Self::Start(_) => "POST /containers/{name}/start",
        }
    }
}

/// The route of a head. None takes a body.
pub(super) fn admits(head: &Head) -> Result<Route<'_>, Refusal> {
    let route = Route::of(head).ok_or(Refusal { status: 403, route: "-", rule: "route" })?;
    match head.length {
        0 => Ok(route),
        _ => Err(Refusal { status: 403, route: route.template(), rule: "body_unexpected" }),
    }
}

/// The call that a request may make.
pub(super) fn plan(policy: &Policy, head: &Head) -> Result<Planned<Call>, Refusal> {
    let route = admits(head)?;
    let refused = |rule| Refusal { status: 403, route: route.template(), rule };
    let mut query = head.query.clone();
    let id = |text: &str| if is_id(text) { Ok(text.to_owned()) } else { Err(refused("container_id")) };
    let call = match route {
        Route::Ping => Call::Ping,
        Route::Inspect(name) if policy.has(name) => Call::Inspect(Subject::Name(name.to_owned())),
        Route::Inspect(name) if is_id(name) => Call::Inspect(Subject::Id(name.to_owned())),
        Route::Inspect(_) => return Err(refused("container_name")),
        Route::Kill(name) => {
            let signal = query.remove("signal").and_then(|text| text.parse().ok());
            let signal = signal.filter(|signal| policy.signals.contains(signal)).ok_or_else(|| refused("signal"))?;
            Call::Kill { id: id(name)?, signal }
        }
        Route::Restart(name) => Call::Restart(id(name)?),
        Route::Start(name) => Call::Start(id(name)?),
    };
    if query.is_empty() { Ok(Planned { route: route.template(), call }) } else { Err(refused("query_key")) }
}

fn is_id(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}
