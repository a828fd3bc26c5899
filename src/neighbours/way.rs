//! Judges whether the tunnel container can reach a labelled container, and names the remedy. Pure; the table of tests
//! is the specification.
//!
//! Does not judge what it cannot know, such as a host elsewhere or another container that the label names. It calls a
//! container unreachable only for a reason that the operator can see in the settings of the two. A declared port is no
//! such reason: a program may listen on other ports than its image declares. A mismatch only makes a note, and a
//! [`Try`] shows the truth.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use jiff::Timestamp;

use super::service::{Address, Host, Service, shown};
use crate::docker::{Endpoint, Inspected};
use crate::labels::COMPOSE_SERVICE;

/// Docker's built-in networks, which nobody connects a container to by choice.
pub(crate) const DOCKERS_OWN: [&str; 3] = ["bridge", "host", "none"];
/// List this many names or ports in one sentence. More help nobody.
const MOST_TOLD: usize = 5;
/// Try this many ports of one container.
const MOST_TRIES: usize = 4;

/// The surroundings of the workloads.
#[derive(Debug, Clone, Copy)]
pub(super) struct Scene<'a> {
    pub(super) tunnel: &'a Inspected,
    /// The tunnel's own network, from the configuration.
    pub(super) network: &'a str,
    /// Whether this is Docker Desktop. `None` until Docker has answered.
    pub(super) desktop: Option<bool>,
    /// Lower-case names of other running containers.
    pub(super) others: &'a BTreeSet<String>,
}

/// A labelled container.
#[derive(Debug, Clone)]
pub(super) struct Workload<'a> {
    pub(super) seen: &'a Inspected,
    pub(super) lender: Lender<'a>,
    /// Its service labels with their values.
    pub(super) services: Vec<(&'a str, &'a str)>,
    /// Whether it has a hostname label.
    pub(super) has_hostname: bool,
}

/// The container whose networks this one uses.
#[derive(Debug, Clone, Copy)]
pub(super) enum Lender<'a> {
    /// Its own.
    Nobody,
    /// Another container, by `network_mode: container:…`.
    Container(&'a Inspected),
    /// Another container that was removed or does not run.
    Gone,
}

/// The verdict on the way to a workload.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Way {
    /// Nothing blocks it.
    Open {
        /// The value of the label.
        service: String,
        network: String,
        /// What may be wrong, but need not be.
        note: Option<String>,
    },
    /// Cannot be judged: cloudflared answers by itself, or the service is elsewhere.
    Unjudged,
    /// The label of this kind is missing, so no visitor reaches it.
    NoRule(&'static str),
    Blocked(Block),
}

/// A verdict, and connections from the tunnel's own network that test it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Judgement {
    pub(super) way: Way,
    /// At most [`MOST_TRIES`].
    pub(super) tries: Vec<Try>,
}

/// A connection that shows whether something listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Try {
    /// The workload's own address on the tunnel's network, whatever its label says, and the label's port.
    pub(super) at: SocketAddr,
    /// The block to report if the connection is refused.
    pub(super) refused: Block,
}

/// What blocks the way from the tunnel to a workload.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Block {
    pub(super) cause: Cause,
    pub(super) problem: String,
    pub(super) remedy: String,
}

/// The kind of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Cause {
    /// The two share no suitable network.
    NoNetwork,
    /// Anything else: a label, or how the container was created.
    Settings,
    /// The connection was refused.
    Refused,
}

/// Where a workload can be found.
enum Place<'a> {
    /// On the networks of this container: the workload itself or its lender.
    Networks(&'a Inspected),
    Host,
    Nowhere,
    LenderGone,
    /// On what is left of the networks of this lender, which started after the workload.
    Stale(&'a Inspected),
    /// Inside the tunnel container, or behind more than one lender.
    Unjudged,
}

/// Returns the service labels: `dockflare.service`, `dockflare.0.service`, and those under the older prefix.
pub(crate) fn services(labels: &BTreeMap<String, String>) -> Vec<(&str, &str)> {
    of_kind(labels, "service")
}

/// Returns the hostname labels, likewise.
pub(super) fn hostnames(labels: &BTreeMap<String, String>) -> Vec<(&str, &str)> {
    of_kind(labels, "hostname")
}

fn of_kind<'a>(labels: &'a BTreeMap<String, String>, kind: &str) -> Vec<(&'a str, &'a str)> {
    let is_it = |key: &str| {
        let rest = key.strip_prefix("dockflare.").or_else(|| key.strip_prefix("cloudflare.tunnel."));
        let number = rest.and_then(|rest| rest.strip_suffix(kind)?.strip_suffix('.'));
        rest == Some(kind) || number.is_some_and(|n| !n.is_empty() && n.bytes().all(|c| c.is_ascii_digit()))
    };
    let said = labels.iter().map(|(key, value)| (key.as_str(), value.trim()));
    said.filter(|(key, value)| is_it(key) && !value.is_empty()).collect()
}

/// Judges each label of the workload. The first bad label decides, then the first note.
pub(super) fn way(scene: &Scene<'_>, workload: &Workload<'_>) -> Judgement {
    if workload.services.is_empty() {
        return Judgement { way: Way::NoRule("service"), tries: Vec::new() };
    }
    let (mut first, mut tries) = (Way::Unjudged, Vec::new());
    for label in &workload.services {
        let (way, its_try) = scene.judge(workload, *label);
        match (&mut first, way) {
            (_, Way::Blocked(block)) => return Judgement { way: Way::Blocked(block), tries: Vec::new() },
            (Way::Open { note: first @ None, .. }, Way::Open { note, .. }) => *first = note,
            (first @ Way::Unjudged, way) => *first = way,
            _ => {}
        }
        if let Some(another) = its_try
            && tries.len() < MOST_TRIES
            && !tries.iter().any(|known: &Try| known.at == another.at)
        {
            tries.push(another);
        }
    }
    Judgement { way: if workload.has_hostname { first } else { Way::NoRule("hostname") }, tries }
}

/// Returns the networks besides its own that the tunnel container must be on to reach the workload. Networks that it
/// is already on are included, so that they stay requested while they are needed.
pub(super) fn networks_needed(scene: &Scene<'_>, workload: &Workload<'_>) -> BTreeSet<String> {
    let mut bare = scene.tunnel.clone();
    bare.networks.retain(|name, _| name == scene.network);
    let without = Scene { tunnel: &bare, ..*scene };
    let is_lacking = |way: Way| matches!(way, Way::Blocked(block) if block.cause == Cause::NoNetwork);
    if workload.services.is_empty() {
        // An operator may have created a rule for it by hand.
        let is_apart = matches!(workload.place(&bare), Place::Networks(holder) if without.shared(holder).is_empty());
        return is_apart.then(|| scene.choose(workload, None)).flatten().into_iter().collect();
    }
    let lacking = workload.services.iter().filter(|label| is_lacking(without.judge(workload, **label).0));
    lacking.filter_map(|label| scene.choose(workload, Some(*label))).collect()
}

impl<'a> Workload<'a> {
    fn place(&self, tunnel: &Inspected) -> Place<'a> {
        let holder = match self.lender {
            Lender::Nobody => self.seen,
            Lender::Container(lender) if lender.id == tunnel.id => return Place::Unjudged,
            Lender::Container(lender) if lender.network_mode.starts_with("container:") => return Place::Unjudged,
            Lender::Container(lender) => lender,
            Lender::Gone => return Place::LenderGone,
        };
        match holder.network_mode.as_str() {
            "host" => Place::Host,
            "none" => Place::Nowhere,
            _ if began_after(holder, self.seen) => Place::Stale(holder),
            _ => Place::Networks(holder),
        }
    }

    /// Returns the declared ports that the label could mean. If the workload declares none, its lender's prove nothing.
    fn declared(&self, holder: &Inspected) -> BTreeSet<u16> {
        if self.seen.ports.is_empty() { BTreeSet::new() } else { &self.seen.ports | &holder.ports }
    }
}

impl Scene<'_> {
    /// Judges the way to one service, and how to test it.
    fn judge(&self, workload: &Workload<'_>, (key, value): (&str, &str)) -> (Way, Option<Try>) {
        let name = &workload.seen.name;
        let instead =
            || format!("set the label {key} to http://{name}:{}", port_to_suggest(&workload.seen.ports, None));
        let address = match Service::read(value) {
            Service::Inner => return (Way::Unjudged, None),
            Service::At(address) => address,
            Service::Socket => {
                let problem = format!("its service {:?} is a socket inside the tunnel container", shown(value));
                return (blocked(problem, instead()), None);
            }
            Service::Unreadable => {
                let problem = format!("its service {:?} is no address that cloudflared takes", shown(value));
                return (blocked(problem, instead()), None);
            }
        };
        let labelled = Labelled { key, value, address };
        let way = match workload.place(self.tunnel) {
            Place::Networks(holder) => match self.network_to(workload, holder, &labelled) {
                Ok(network) => return self.open(workload, holder, &labelled, network),
                Err(way) => way,
            },
            Place::Host => self.on_the_host(workload, &labelled),
            Place::Nowhere => blocked(
                "it is on no network (network_mode: none)".to_owned(),
                format!("create it anew with --network {}, or with that network in its compose file", self.network),
            ),
            Place::LenderGone => blocked(
                "the container whose network it uses does not run".to_owned(),
                "start the container that its network_mode names, then create this one anew".to_owned(),
            ),
            Place::Stale(lender) => blocked(
                format!("{}, whose network it uses, was started after it, and took that network away", lender.name),
                format!("docker restart {name}"),
            ),
            Place::Unjudged => Way::Unjudged,
        };
        (way, None)
    }

    /// Returns the network on which the tunnel reaches a workload on its own or its lender's networks, or why there is
    /// none.
    fn network_to(&self, workload: &Workload<'_>, holder: &Inspected, labelled: &Labelled<'_>) -> Result<String, Way> {
        let (address, shared) = (&labelled.address, self.shared(holder));
        let better = || labelled.with_host(&holder.name, &workload.declared(holder));
        Ok(match address.host {
            Host::Loopback => {
                let problem = format!("{} in its service is cloudflared's own container", address.text);
                return Err(blocked(problem, better()));
            }
            Host::Desktop => return Err(self.through_the_host(labelled)),
            Host::Ip(ip) => {
                let at = holder.networks.iter().filter(|(_, place)| is_at(place, ip)).map(|(network, _)| network);
                let (here, elsewhere): (Vec<_>, Vec<_>) = at.partition(|name| self.tunnel.networks.contains_key(*name));
                match (here.first(), elsewhere.first()) {
                    (Some(network), _) => (*network).clone(),
                    (None, Some(_)) if shared.is_empty() => return Err(self.no_network(holder)),
                    // Joining another shared network would not make this address reachable.
                    (None, Some(network)) => {
                        let problem =
                            format!("{ip} is its address on the network {network}, which the tunnel is not on");
                        return Err(blocked(problem, better()));
                    }
                    (None, None) => return Err(Way::Unjudged),
                }
            }
            Host::Name(name) => match shared.iter().find(|(network, place)| is_name(name, holder, network, place)) {
                Some((network, _)) => (*network).to_owned(),
                None if self.is_elsewhere(workload, name) => return Err(Way::Unjudged),
                None if shared.is_empty() => return Err(self.no_network(holder)),
                None => {
                    let problem =
                        format!("{name} in its service is none of its names there: {}", names(holder, &shared));
                    return Err(blocked(problem, better()));
                }
            },
        })
    }

    /// Builds an open way, with a note if the declared ports make it doubtful.
    fn open(
        &self,
        workload: &Workload<'_>,
        holder: &Inspected,
        labelled: &Labelled<'_>,
        network: String,
    ) -> (Way, Option<Try>) {
        let declared = workload.declared(holder);
        let port = labelled.address.port;
        let mismatch = port.filter(|port| !declared.is_empty() && !declared.contains(port));
        let note = mismatch.map(|port| {
            format!(
                "port {port} of its service is not among the ports it declares: {}; if the site does not answer, {} (inside the network the container's own port counts, not a published one)",
                list(&declared),
                labelled.with_host(&holder.name, &declared)
            )
        });
        let place = holder.networks.get(&network).filter(|_| network == self.network);
        let at = place.and_then(|place| Some(SocketAddr::new(place.address.parse().ok()?, port?)));
        let its_try = at.map(|at| Try { at, refused: refused(labelled, at.port(), &declared) });
        (Way::Open { service: shown(labelled.value), network, note }, its_try)
    }

    /// Judges a workload on the host's network. It has no name, and any address of the host may be its own.
    fn on_the_host(&self, workload: &Workload<'_>, labelled: &Labelled<'_>) -> Way {
        match labelled.address.host {
            Host::Ip(_) => Way::Unjudged,
            Host::Desktop => self.through_the_host(labelled),
            Host::Name(name) if self.is_elsewhere(workload, name) => Way::Unjudged,
            Host::Loopback | Host::Name(_) => blocked(
                format!("it uses the host's network, where {} does not lead", labelled.address.text),
                self.by_the_host(labelled),
            ),
        }
    }

    /// Judges `host.docker.internal`, wherever the workload is.
    fn through_the_host(&self, labelled: &Labelled<'_>) -> Way {
        if self.desktop == Some(false) && !self.tunnel.knows_host {
            let problem = "host.docker.internal in its service is known on Docker Desktop only";
            return blocked(problem.to_owned(), self.by_the_host(labelled));
        }
        Way::Unjudged
    }

    /// Returns the label change that leads to the host.
    fn by_the_host(&self, labelled: &Labelled<'_>) -> String {
        let gateway = self.tunnel.networks.get(self.network).map(|place| place.gateway.as_str()).unwrap_or_default();
        let host = match (self.desktop, gateway) {
            _ if self.desktop == Some(true) || self.tunnel.knows_host => "host.docker.internal",
            // Such as on an internal network.
            (_, "") => "<address of this host>",
            (_, gateway) => gateway,
        };
        labelled.with_host(host, &BTreeSet::new())
    }

    fn no_network(&self, holder: &Inspected) -> Way {
        Way::Blocked(Block {
            cause: Cause::NoNetwork,
            problem: "it shares no network with the tunnel".to_owned(),
            remedy: format!("docker network connect {} {}", self.network, holder.name),
        })
    }

    /// Returns the networks on which the tunnel finds it by name, with its endpoint there.
    fn shared<'h>(&self, holder: &'h Inspected) -> BTreeMap<&'h str, &'h Endpoint> {
        user_defined(holder).filter(|(network, _)| self.tunnel.networks.contains_key(*network)).collect()
    }

    /// Whether a name means something other than this workload: a host with a domain, another container.
    fn is_elsewhere(&self, workload: &Workload<'_>, name: &str) -> bool {
        let lender = match workload.lender {
            Lender::Container(lender) => Some(lender),
            Lender::Nobody | Lender::Gone => None,
        };
        let own = [Some(workload.seen), lender].into_iter().flatten().any(|container| {
            let service = container.labels.get(COMPOSE_SERVICE);
            container.name.eq_ignore_ascii_case(name)
                || service.is_some_and(|service| service.eq_ignore_ascii_case(name))
                || user_defined(container).any(|(network, place)| is_name(name, container, network, place))
        });
        !own && (name.contains('.') || self.others.contains(&name.to_ascii_lowercase()))
    }

    /// Returns the best network for the label: first one where its host leads to the workload, then one that the tunnel
    /// is already on, then the first of all.
    fn choose(&self, workload: &Workload<'_>, label: Option<(&str, &str)>) -> Option<String> {
        let Place::Networks(holder) = workload.place(self.tunnel) else { return None };
        let host = match label.map(|(_, value)| Service::read(value)) {
            Some(Service::At(address)) => Some(address.host),
            _ => None,
        };
        let leads = |network: &str, place: &Endpoint| match host {
            Some(Host::Name(name)) => is_name(name, holder, network, place),
            Some(Host::Ip(ip)) => is_at(place, ip),
            _ => false,
        };
        let all =
            user_defined(holder).filter(|(network, place)| !matches!(host, Some(Host::Ip(_))) || leads(network, place));
        let best = all.min_by_key(|(network, place)| {
            (!leads(network, place), !self.tunnel.networks.contains_key(*network), *network)
        });
        best.map(|(network, _)| network.to_owned())
    }
}

/// A label whose value is an address.
struct Labelled<'a> {
    key: &'a str,
    value: &'a str,
    address: Address<'a>,
}

impl Labelled<'_> {
    /// Returns the label change that leads to `host`, with a plausible port.
    fn with_host(&self, host: &str, declared: &BTreeSet<u16>) -> String {
        let port = match (self.address.port, declared.is_empty()) {
            (None, true) => String::new(),
            (port, _) => format!(":{}", port_to_suggest(declared, port)),
        };
        format!("set the label {} to {}://{host}{port}", self.key, self.address.scheme)
    }
}

/// The block that a refused connection proves.
fn refused(labelled: &Labelled<'_>, port: u16, declared: &BTreeSet<u16>) -> Block {
    let other = match declared.first() {
        Some(only) if declared.len() == 1 && *only != port => labelled.with_host(labelled.address.text, declared),
        _ => format!("set the label {} to the port that it listens on", labelled.key),
    };
    Block {
        cause: Cause::Refused,
        problem: format!("nothing listens on port {port} of it, connections are refused"),
        remedy: format!("let it listen on 0.0.0.0:{port}, since 127.0.0.1 is not enough; or {other}"),
    }
}

/// Whether a container started after one that uses its network. The dependent container then has nothing but `lo`.
fn began_after(holder: &Inspected, dependent: &Inspected) -> bool {
    let begin = |of: &Inspected| of.started_at.parse::<Timestamp>().ok();
    let (Some(holder_began), Some(began)) = (begin(holder), begin(dependent)) else { return false };
    holder_began > began
}

fn blocked(problem: String, remedy: String) -> Way {
    Way::Blocked(Block { cause: Cause::Settings, problem, remedy })
}

/// Returns the port in the label if it may be right, else the only declared one.
fn port_to_suggest(declared: &BTreeSet<u16>, asked: Option<u16>) -> String {
    match (asked, declared.first()) {
        (Some(asked), None) => asked.to_string(),
        (Some(asked), _) if declared.contains(&asked) => asked.to_string(),
        (_, Some(only)) if declared.len() == 1 => only.to_string(),
        _ => "<port>".to_owned(),
    }
}

fn user_defined(container: &Inspected) -> impl Iterator<Item = (&str, &Endpoint)> {
    let all = container.networks.iter().map(|(network, place)| (network.as_str(), place));
    all.filter(|(network, _)| !DOCKERS_OWN.contains(network))
}

fn is_at(place: &Endpoint, ip: IpAddr) -> bool {
    place.address.parse() == Ok(ip)
}

/// Whether Docker's DNS resolves `name` to the container on this network. Docker knows its name, the start of its id
/// and its aliases there, each also with the network appended, in upper or lower case.
fn is_name(name: &str, container: &Inspected, network: &str, place: &Endpoint) -> bool {
    let is = |known: &str| {
        let Some((begin, rest)) = name.split_at_checked(known.len()) else { return false };
        let ends = rest.is_empty() || rest.strip_prefix('.').is_some_and(|rest| rest.eq_ignore_ascii_case(network));
        !known.is_empty() && begin.eq_ignore_ascii_case(known) && ends
    };
    is(&container.name) || is(short(&container.id)) || place.aliases.iter().any(|alias| is(alias))
}

fn short(id: &str) -> &str {
    id.get(..12).unwrap_or(id)
}

/// Lists the names that work, without the id, which nobody would write in a label.
fn names(holder: &Inspected, shared: &BTreeMap<&str, &Endpoint>) -> String {
    let aliases = shared.values().flat_map(|place| &place.aliases).filter(|alias| *alias != short(&holder.id));
    let mut names = vec![&holder.name];
    for alias in aliases {
        if !names.contains(&alias) {
            names.push(alias);
        }
    }
    list(names)
}

fn list<T: ToString>(things: impl IntoIterator<Item = T>) -> String {
    let told: Vec<_> = things.into_iter().take(MOST_TOLD).map(|thing| thing.to_string()).collect();
    told.join(", ")
}

#[cfg(test)]
pub(super) mod tests;
