//! Maps a request to the only call of Docker that it may be, or to the rule that refuses it. Pure; the tables in the
//! tests are the specification.
//!
//! There is no rule language: the routes are those of [`crate::docker`], and the values those of the agent's own
//! settings. A [`Call`] holds nothing but checked values, and the proxy makes it through the same code as the agent's
//! own calls. So everything that reaches Docker was written here.

use std::collections::BTreeMap;

use dockflare_engine::proxy::{Head, Method, Planned, Refusal};
use serde::Deserialize;

use super::create;
use super::lease::{LONGEST, MOST_AGENTS};
use crate::config::{MOST_PATIENCE, TunnelConfig};
use crate::docker::{EVENT_ACTIONS, EVENT_TYPES, Inspected, MetricsPlace, NAME_LABEL, OWNER_LABEL, Spec};
use crate::labels::ENABLE_KEYS;
use crate::state::AgentId;

/// The calls that the agent may make.
#[derive(Debug, Clone)]
pub(super) struct Policy {
    /// The agent's own settings.
    pub(super) tunnel: TunnelConfig,
}

impl Policy {
    /// Whether this is the tunnel's network or the one for its metrics.
    pub(super) fn is_network(&self, name: &str) -> bool {
        name == self.tunnel.network || self.is_for_metrics(name)
    }

    /// Whether this is the network for the tunnel's metrics.
    pub(super) fn is_for_metrics(&self, name: &str) -> bool {
        self.tunnel.metrics_network.as_deref() == Some(name)
    }

    /// Whether the name is the tunnel container's, or its successor's.
    pub(super) fn is_tunnel(&self, name: &str) -> bool {
        name == self.tunnel.container_name || name == self.tunnel.successor_name()
    }

    /// Whether the container was created for one of these names, whatever its name is now.
    pub(super) fn is_made_for(&self, label: Option<&String>) -> bool {
        label == Some(&self.tunnel.container_name)
    }

    /// Whether the container has one of these names, or was created for one and renamed by hand.
    pub(super) fn is_tunnels(&self, seen: &Inspected) -> bool {
        self.is_tunnel(&seen.name) || self.is_made_for(seen.labels.get(NAME_LABEL))
    }
}

/// A container to inspect.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Subject {
    /// The tunnel container or its successor.
    Named(String),
    /// Full id.
    Id(String),
    /// The start of an id, as in a container's host name: the agent asks for its own container.
    Start(String),
}

/// A call of Docker. A call that acts on a container or reads its log names the full id: the proxy checks the owner
/// first, and a name might belong to another container by then.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Call {
    Ping,
    Version,
    /// The host's name, and nothing else from `GET /info`.
    HostName,
    /// Running containers: all, or those with this label.
    List(Option<&'static str>),
    /// The containers that agents have created, running or not.
    Made,
    Events(Option<String>),
    Inspect(Subject),
    /// The first lines, or this many of the last.
    Logs {
        id: String,
        since: i64,
        last: Option<usize>,
    },
    /// Whether this network exists.
    Network(String),
    NewNetwork(String),
    /// The tunnel's container or the agent's own: the owner decides what it may be connected to.
    Connect {
        network: String,
        id: String,
    },
    /// Connects a container that has not started yet to the network for its metrics.
    Place {
        id: String,
        place: MetricsPlace,
    },
    Disconnect {
        network: String,
        id: String,
    },
    /// Disconnects the agent's own container from one of the tunnel's networks.
    Leave {
        network: String,
        id: String,
    },
    Image,
    Pull,
    Create {
        name: String,
        spec: Box<Spec>,
    },
    Start(String),
    Stop {
        id: String,
        seconds: u16,
    },
    /// Full id; it must be the agent's own container.
    StopSelf(String),
    Restart {
        id: String,
        seconds: u16,
    },
    /// Gives the tunnel's name to the container with this id.
    Rename(String),
    Remove(String),
    /// Not a call of Docker: the agent says that it stops, and for how many seconds to hold the tunnel.
    Goodbye {
        seconds: u64,
        /// The ids that mark the agent's containers.
        agents: Vec<AgentId>,
    },
}

/// A route, with the names in its path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Route<'a> {
    Ping,
    Version,
    Info,
    List,
    Events,
    Inspect(&'a str),
    Logs(&'a str),
    Network(&'a str),
    NewNetwork,
    Connect(&'a str),
    Disconnect(&'a str),
    Image,
    Pull,
    Create,
    Start(&'a str),
    Stop(&'a str),
    Restart(&'a str),
    Rename(&'a str),
    Remove(&'a str),
    Goodbye,
}

/// Most lines of a log in one answer.
pub(super) const MOST_LINES: usize = 200;

impl<'a> Route<'a> {
    fn of(head: &'a Head) -> Option<Self> {
        let path: Vec<_> = head.path.iter().map(String::as_str).collect();
        Some(match (head.method, &path[..]) {
            (Method::Get | Method::Head, ["_ping"]) => Self::Ping,
            (Method::Get, ["version"]) => Self::Version,
            (Method::Get, ["info"]) => Self::Info,
            (Method::Get, ["events"]) => Self::Events,
            (Method::Get, ["containers", "json"]) => Self::List,
            (Method::Get, ["containers", name, "json"]) => Self::Inspect(name),
            (Method::Get, ["containers", name, "logs"]) => Self::Logs(name),
            (Method::Get, ["networks", name]) => Self::Network(name),
            (Method::Get, ["images", _, .., "json"]) => Self::Image,
            (Method::Post, ["networks", "create"]) => Self::NewNetwork,
            (Method::Post, ["networks", name, "connect"]) => Self::Connect(name),
            (Method::Post, ["networks", name, "disconnect"]) => Self::Disconnect(name),
            (Method::Post, ["images", "create"]) => Self::Pull,
            (Method::Post, ["containers", "create"]) => Self::Create,
            (Method::Post, ["containers", name, "start"]) => Self::Start(name),
            (Method::Post, ["containers", name, "stop"]) => Self::Stop(name),
            (Method::Post, ["containers", name, "restart"]) => Self::Restart(name),
            (Method::Post, ["containers", name, "rename"]) => Self::Rename(name),
            (Method::Delete, ["containers", name]) => Self::Remove(name),
            (Method::Post, ["dockflare", "goodbye"]) => Self::Goodbye,
            _ => return None,
        })
    }

    /// For the log.
    fn template(self) -> &'static str {
        match self {
            Self::Ping => "GET /_ping",
            Self::Version => "GET /version",
            Self::Info => "GET /info",
            Self::List => "GET /containers/json",
            Self::Events => "GET /events",
            Self::Inspect(_) => "GET /containers/{name}/json",
            Self::Logs(_) => "GET /containers/{name}/logs",
            Self::Network(_) => "GET /networks/{name}",
            Self::NewNetwork => "POST /networks/create",
            Self::Connect(_) => "POST /networks/{name}/connect",
            Self::Disconnect(_) => "POST /networks/{name}/disconnect",
            Self::Image => "GET /images/{name}/json",
            Self::Pull => "POST /images/create",
            Self::Create => "POST /containers/create",
            Self::Start(_) => "POST /containers/{name}/start",
            Self::Stop(_) => "POST /containers/{name}/stop",
            Self::Restart(_) => "POST /containers/{name}/restart",
            Self::Rename(_) => "POST /containers/{name}/rename",
            Self::Remove(_) => "DELETE /containers/{name}",
            Self::Goodbye => "POST /dockflare/goodbye",
        }
    }

    fn takes_body(self) -> bool {
        matches!(self, Self::Create | Self::NewNetwork | Self::Connect(_) | Self::Disconnect(_))
    }
}

/// Finds the route of a head, and checks that it may or may not have a body, as the head says. Called before the body
/// is read.
pub(super) fn admits(head: &Head) -> Result<Route<'_>, Refusal> {
    let route = Route::of(head).ok_or(Refusal { status: 403, route: "-", rule: "route" })?;
    match (route.takes_body(), head.length) {
        (true, 0) => Err(Refusal { status: 403, route: route.template(), rule: "body_missing" }),
        (false, 1..) => Err(Refusal { status: 403, route: route.template(), rule: "body_unexpected" }),
        _ => Ok(route),
    }
}

/// Turns a request into its call. The body is as long as the head says.
pub(super) fn plan(policy: &Policy, head: &Head, body: &[u8]) -> Result<Planned<Call>, Refusal> {
    let route = admits(head)?;
    let refused = |rule| Refusal { status: 403, route: route.template(), rule };
    let call = call(policy, route, head, body).map_err(refused)?;
    Ok(Planned { route: route.template(), call })
}

type Rule = &'static str;

fn call(policy: &Policy, route: Route<'_>, head: &Head, body: &[u8]) -> Result<Call, Rule> {
    let mut query = Query(head.query.clone());
    let full_id = |id: &str| if is_full_id(id) { Ok(id.to_owned()) } else { Err("container_id") };
    let call = match route {
        Route::Ping => Call::Ping,
        Route::Version => Call::Version,
        Route::Info => Call::HostName,
        Route::List => {
            query.is("size", "false")?;
            match query.take("filters").map(|filters| label_filter(&filters)).transpose()? {
                Some(label) if label == OWNER_LABEL.0 => {
                    query.must_be("all", "true", "query_value")?;
                    Call::Made
                }
                label => {
                    query.is("all", "false")?;
                    Call::List(label)
                }
            }
        }
        Route::Events => {
            query.take("filters").map_or(Err("query_filters"), |filters| event_filter(&filters))?;
            Call::Events(query.take("since").map(moment).transpose()?)
        }
        Route::Inspect(name) => Call::Inspect(subject(policy, name)?),
        Route::Logs(id) => {
            for (key, value) in [("follow", "false"), ("stdout", "true"), ("stderr", "true"), ("until", "0")] {
                query.is(key, value)?;
            }
            query.is("timestamps", "false")?;
            let since = query.take("since").map(|text| number(&text, i32::MAX as u64)).transpose()?;
            let last = match query.take("tail").as_deref() {
                None | Some("all") => None,
                Some(text) => Some(number(text, MOST_LINES as u64)? as usize),
            };
            Call::Logs { id: full_id(id)?, since: since.unwrap_or_default() as i64, last }
        }
        Route::Network(name) => {
            if !policy.is_network(name) {
                return Err("network_name");
            }
            Call::Network(name.to_owned())
        }
        Route::NewNetwork => Call::NewNetwork(create::network(policy, body)?),
        Route::Connect(network) if policy.is_for_metrics(network) => match create::place(body) {
            Ok((id, name)) => {
                Call::Place { id: full_id(&id)?, place: MetricsPlace { network: network.to_owned(), name } }
            }
            // The agent's own container, which never serves metrics there.
            Err(_) => Call::Connect { network: network.to_owned(), id: full_id(&create::joined(body)?)? },
        },
        Route::Connect(network) => {
            // The agent reconnects its container to the tunnel's network if somebody disconnected it.
            if !policy.tunnel.auto_connect && network != policy.tunnel.network {
                return Err("connect_not_asked_for");
            }
            Call::Connect { network: network_name(network)?, id: full_id(&create::connect(body)?)? }
        }
        Route::Disconnect(network) => {
            let id = create::disconnect(body);
            if policy.is_network(network) {
                return Ok(Call::Leave { network: network.to_owned(), id: full_id(&id?)? });
            }
            if !policy.tunnel.auto_connect {
                return Err("connect_not_asked_for");
            }
            Call::Disconnect { network: network_name(network)?, id: full_id(&id?)? }
        }
        Route::Image => {
            let name = head.path[1..head.path.len() - 1].join("/");
            if name != policy.tunnel.image.to_string() {
                return Err("image");
            }
            Call::Image
        }
        Route::Pull => {
            let image = &policy.tunnel.image;
            query.must_be("fromImage", image.repository(), "image")?;
            query.must_be("tag", image.tag_or_digest(), "image")?;
            query.is("platform", "")?;
            Call::Pull
        }
        Route::Create => {
            let name = query.take("name").ok_or("container_name")?;
            query.is("platform", "")?;
            if !policy.is_tunnel(&name) {
                return Err("container_name");
            }
            Call::Create { name, spec: Box::new(create::container(policy, body)?) }
        }
        Route::Start(id) => Call::Start(full_id(id)?),
        Route::Stop(id) => match query.take("t") {
            Some(seconds) => Call::Stop { id: full_id(id)?, seconds: grace(&seconds)? },
            // The agent's own container has the timeout that it was created with.
            None => Call::StopSelf(full_id(id)?),
        },
        Route::Restart(id) => {
            let seconds = query.take("t").ok_or("query_value")?;
            Call::Restart { id: full_id(id)?, seconds: grace(&seconds)? }
        }
        Route::Rename(id) => {
            query.must_be("name", &policy.tunnel.container_name, "container_name")?;
            Call::Rename(full_id(id)?)
        }
        Route::Remove(id) => {
            query.must_be("force", "true", "query_value")?;
            query.is("v", "false")?;
            query.is("link", "false")?;
            Call::Remove(full_id(id)?)
        }
        Route::Goodbye => {
            let seconds = number(&query.take("lease").ok_or("query_value")?, LONGEST)?;
            // An agent that wants nothing held removes the tunnel before it stops.
            if seconds == 0 {
                return Err("query_value");
            }
            Call::Goodbye {
                seconds,
                agents: query.take("agents").map(|ids| agents(&ids)).transpose()?.unwrap_or_default(),
            }
        }
    };
    query.is_done()?;
    Ok(call)
}

/// The pairs of a query that have not been read yet.
struct Query(BTreeMap<String, String>);

impl Query {
    fn take(&mut self, key: &str) -> Option<String> {
        self.0.remove(key)
    }

    /// The key may be missing, and otherwise must have this value.
    fn is(&mut self, key: &str, value: &str) -> Result<(), Rule> {
        match self.take(key) {
            Some(given) if given != value => Err("query_value"),
            _ => Ok(()),
        }
    }

    fn must_be(&mut self, key: &str, value: &str, rule: Rule) -> Result<(), Rule> {
        if self.take(key).as_deref() == Some(value) { Ok(()) } else { Err(rule) }
    }

    fn is_done(&self) -> Result<(), Rule> {
        if self.0.is_empty() { Ok(()) } else { Err("query_key") }
    }
}

fn subject(policy: &Policy, name: &str) -> Result<Subject, Rule> {
    let is_hex = name.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    match name.len() {
        _ if policy.is_tunnel(name) => Ok(Subject::Named(name.to_owned())),
        64 if is_hex => Ok(Subject::Id(name.to_owned())),
        12..64 if is_hex => Ok(Subject::Start(name.to_owned())),
        _ => Err("container_name"),
    }
}

fn is_full_id(name: &str) -> bool {
    name.len() == 64 && name.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

/// Refuses Docker's own networks: nobody connects a container to those on purpose.
fn network_name(name: &str) -> Result<String, Rule> {
    let fits = !crate::neighbours::DOCKERS_OWN.contains(&name) && !name.contains([':', '@']);
    if fits { Ok(name.to_owned()) } else { Err("network_name") }
}

fn label_filter(text: &str) -> Result<&'static str, Rule> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Filters {
        label: [String; 1],
    }
    let Filters { label: [asked] } = serde_json::from_str(text).map_err(|_| "query_filters")?;
    ENABLE_KEYS.into_iter().chain([OWNER_LABEL.0]).find(|key| *key == asked).ok_or("query_filters")
}

fn event_filter(text: &str) -> Result<(), Rule> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Filters {
        r#type: Vec<String>,
        event: Vec<String>,
    }
    let Filters { r#type, event } = serde_json::from_str(text).map_err(|_| "query_filters")?;
    let fits = |asked: &[String], known: &[&str]| {
        !asked.is_empty() && asked.len() <= known.len() && asked.iter().all(|one| known.contains(&one.as_str()))
    };
    if fits(&r#type, &EVENT_TYPES) && fits(&event, &EVENT_ACTIONS) { Ok(()) } else { Err("query_filters") }
}

/// Reads seconds of the Engine's clock, with or without nanoseconds.
fn moment(text: String) -> Result<String, Rule> {
    let (seconds, nanos) = text.split_once('.').unwrap_or((&text, "0"));
    let fits = |digits: &str, most: usize| {
        (1..=most).contains(&digits.len()) && digits.bytes().all(|byte| byte.is_ascii_digit())
    };
    if fits(seconds, 11) && fits(nanos, 9) { Ok(text) } else { Err("query_value") }
}

fn agents(ids: &str) -> Result<Vec<AgentId>, Rule> {
    let ids: Result<Vec<_>, _> = ids.split(',').map(|id| AgentId::try_from(id.to_owned())).collect();
    ids.ok().filter(|ids| ids.len() <= MOST_AGENTS).ok_or("query_value")
}

fn number(text: &str, most: u64) -> Result<u64, Rule> {
    let fits = !text.is_empty() && text.len() <= 10 && text.bytes().all(|byte| byte.is_ascii_digit());
    text.parse().ok().filter(|number| fits && *number <= most).ok_or("query_value")
}

/// Reads how long a container has to end by itself: no longer than the agent ever waits.
fn grace(text: &str) -> Result<u16, Rule> {
    Ok(number(text, MOST_PATIENCE)? as u16)
}
