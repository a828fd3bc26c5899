//! Whether the tunnel container can reach a labelled container, and what mends it. Pure; the table of tests is the
//! specification.
//!
//! What cannot be known is not judged: a host elsewhere, a container that another label means. A container that is
//! called unreachable is so for a reason that its operator can see in the settings of the two.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use super::service::{Address, Host, Service, shown};
use crate::docker::{Endpoint, Inspected};
use crate::labels::COMPOSE_SERVICE;

/// Networks of Docker's own, which nobody is connected to by choice.
pub(crate) const DOCKERS_OWN: [&str; 3] = ["bridge", "host", "none"];
/// Names and ports told in one sentence; more of them help nobody.
const MOST_TOLD: usize = 5;

/// What is around the workloads.
#[derive(Debug, Clone, Copy)]
pub(super) struct Scene<'a> {
    pub(super) tunnel: &'a Inspected,
    /// The tunnel's own network, by the settings.
    pub(super) network: &'a str,
    /// `None` while Docker has not said.
    pub(super) desktop: Option<bool>,
    /// Lower-case names that other running containers go by.
    pub(super) others: &'a BTreeSet<String>,
}

/// A labelled container.
#[derive(Debug, Clone)]
pub(super) struct Workload<'a> {
    pub(super) seen: &'a Inspected,
    pub(super) lender: Lender<'a>,
    /// Its service labels with their values.
    pub(super) services: Vec<(&'a str, &'a str)>,
}

/// Whose networks a container is on.
#[derive(Debug, Clone, Copy)]
pub(super) enum Lender<'a> {
    /// Its own.
    Nobody,
    /// Those of another container, by `network_mode: container:…`.
    Container(&'a Inspected),
    /// Those of another container that is removed or does not run.
    Gone,
}

/// What is known of the way to a workload.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Way {
    /// Nothing stands between them.
    Open {
        /// The value of the label, where there is one.
        service: Option<String>,
        network: String,
    },
    /// Nothing can be said: cloudflared answers by itself, or the service is elsewhere.
    Unjudged,
    Blocked(Block),
}

/// What stands between the tunnel and a workload.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Block {
    pub(super) cause: Cause,
    pub(super) problem: String,
    pub(super) remedy: String,
}

/// What kind of thing stands in the way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Cause {
    /// The two share no network that would do.
    NoNetwork,
    /// Whatever else: a label, or how the container was made.
    Settings,
}

/// Where a workload is found.
enum Place<'a> {
    /// On the networks of this container, itself or its lender.
    Networks(&'a Inspected),
    Host,
    Nowhere,
    LenderGone,
    /// Inside the tunnel container, or behind more than one lender.
    Unjudged,
}

/// The service labels among all labels: `dockflare.service`, `dockflare.0.service`, and under the older prefix.
pub(crate) fn services(labels: &BTreeMap<String, String>) -> Vec<(&str, &str)> {
    let is_service = |key: &str| {
        let rest = key.strip_prefix("dockflare.").or_else(|| key.strip_prefix("cloudflare.tunnel."));
        let number = rest.and_then(|rest| rest.strip_suffix(".service"));
        rest == Some("service") || number.is_some_and(|n| !n.is_empty() && n.bytes().all(|c| c.is_ascii_digit()))
    };
    let said = labels.iter().map(|(key, value)| (key.as_str(), value.trim()));
    said.filter(|(key, value)| is_service(key) && !value.is_empty()).collect()
}

/// Judges each label of the workload; the first bad one counts.
pub(super) fn way(scene: &Scene<'_>, workload: &Workload<'_>) -> Way {
    let mut first = Way::Unjudged;
    for label in workload.labels() {
        match scene.judge(workload, label) {
            Way::Blocked(block) => return Way::Blocked(block),
            open if first == Way::Unjudged => first = open,
            _ => {}
        }
    }
    first
}

/// The networks that the tunnel container must be on, besides its own, for the workload's sake; whether it is on
/// them already makes no difference, so that they stay wanted for as long as they are needed.
pub(super) fn networks_needed(scene: &Scene<'_>, workload: &Workload<'_>) -> BTreeSet<String> {
    let mut bare = scene.tunnel.clone();
    bare.networks.retain(|name, _| name == scene.network);
    let without = Scene { tunnel: &bare, ..*scene };
    let lacking = workload.labels().into_iter().filter(
        |label| matches!(without.judge(workload, *label), Way::Blocked(block) if block.cause == Cause::NoNetwork),
    );
    lacking.filter_map(|label| scene.choose(workload, label)).collect()
}

impl<'a> Workload<'a> {
    /// One judgement for each service, one if there is none.
    fn labels(&self) -> Vec<Option<(&'a str, &'a str)>> {
        let labels = self.services.iter().copied().map(Some);
        if self.services.is_empty() { vec![None] } else { labels.collect() }
    }

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
            _ => Place::Networks(holder),
        }
    }

    /// The declared ports that could be meant. Those of a lender say nothing of who declares none.
    fn declared(&self, holder: &Inspected) -> BTreeSet<u16> {
        if self.seen.ports.is_empty() { BTreeSet::new() } else { &self.seen.ports | &holder.ports }
    }
}

impl Scene<'_> {
    /// The way to one service, or, without a label, to the container as such.
    fn judge(&self, workload: &Workload<'_>, label: Option<(&str, &str)>) -> Way {
        let name = &workload.seen.name;
        let labelled = match label.map(|(key, value)| (key, value, Service::read(value))) {
            None => None,
            Some((_, _, Service::Inner)) => return Way::Unjudged,
            Some((key, value, Service::At(address))) => Some(Labelled { key, value, address }),
            Some((key, value, Service::Socket)) => {
                return blocked(
                    format!("its service {:?} is a socket inside the tunnel container", shown(value)),
                    format!("set the label {key} to http://{name}:{}", port_to_suggest(&workload.seen.ports, None)),
                );
            }
            Some((key, value, Service::Unreadable)) => {
                return blocked(
                    format!("its service {:?} is no address that cloudflared takes", shown(value)),
                    format!("set the label {key} to http://{name}:{}", port_to_suggest(&workload.seen.ports, None)),
                );
            }
        };
        match workload.place(self.tunnel) {
            Place::Networks(holder) => match &labelled {
                Some(labelled) => self.on_networks(workload, holder, labelled),
                None => match self.shared(holder).keys().next() {
                    Some(network) => Way::Open { service: None, network: (*network).to_owned() },
                    None => self.no_network(holder),
                },
            },
            Place::Host => labelled.map_or(Way::Unjudged, |labelled| self.on_the_host(workload, &labelled)),
            Place::Nowhere => blocked(
                "it is on no network (network_mode: none)".to_owned(),
                format!("create it anew with --network {}, or with that network in its compose file", self.network),
            ),
            Place::LenderGone => blocked(
                "the container whose network it uses does not run".to_owned(),
                "start the container that its network_mode names, then create this one anew".to_owned(),
            ),
            Place::Unjudged => Way::Unjudged,
        }
    }

    /// A workload with networks of its own, or of its lender.
    fn on_networks(&self, workload: &Workload<'_>, holder: &Inspected, labelled: &Labelled<'_>) -> Way {
        let (address, shared) = (&labelled.address, self.shared(holder));
        let better = || labelled.with_host(&holder.name, &workload.declared(holder));
        let network = match address.host {
            Host::Loopback => {
                return blocked(format!("{} in its service is cloudflared's own container", address.text), better());
            }
            Host::Desktop => return self.through_the_host(labelled),
            Host::Ip(ip) => {
                let at = holder.networks.iter().filter(|(_, place)| is_at(place, ip)).map(|(network, _)| network);
                let (here, elsewhere): (Vec<_>, Vec<_>) = at.partition(|name| self.tunnel.networks.contains_key(*name));
                match (here.first(), elsewhere.first()) {
                    (Some(network), _) => (*network).clone(),
                    (None, Some(_)) if shared.is_empty() => return self.no_network(holder),
                    // Another network would not make this address one that leads there.
                    (None, Some(network)) => {
                        return blocked(
                            format!("{ip} is its address on the network {network}, which the tunnel is not on"),
                            better(),
                        );
                    }
                    (None, None) => return Way::Unjudged,
                }
            }
            Host::Name(name) => match shared.iter().find(|(network, place)| is_name(name, holder, network, place)) {
                Some((network, _)) => (*network).to_owned(),
                None if self.is_elsewhere(workload, name) => return Way::Unjudged,
                None if shared.is_empty() => return self.no_network(holder),
                None => {
                    return blocked(
                        format!("{name} in its service is none of its names there: {}", names(holder, &shared)),
                        better(),
                    );
                }
            },
        };
        let declared = workload.declared(holder);
        match address.port {
            Some(port) if !declared.is_empty() && !declared.contains(&port) => blocked(
                format!(
                    "port {port} of its service is not among the ports it declares: {} (inside the network the container's own port counts, not a published one)",
                    list(&declared)
                ),
                // Programs listen where they are told to, whatever their image says.
                format!("{}; if it does listen on {port}, declare that: --expose {port}", better()),
            ),
            _ => Way::Open { service: Some(shown(labelled.value)), network },
        }
    }

    /// A workload on the host's network: it has no name, and every address of the host may be its.
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

    /// `host.docker.internal`, whoever's it is.
    fn through_the_host(&self, labelled: &Labelled<'_>) -> Way {
        if self.desktop == Some(false) {
            let problem = "host.docker.internal in its service is known on Docker Desktop only";
            return blocked(problem.to_owned(), self.by_the_host(labelled));
        }
        Way::Unjudged
    }

    /// The label change that leads to the host.
    fn by_the_host(&self, labelled: &Labelled<'_>) -> String {
        let gateway = self.tunnel.networks.get(self.network).map(|place| place.gateway.as_str()).unwrap_or_default();
        let host = match (self.desktop, gateway) {
            (Some(true), _) => "host.docker.internal",
            // As on an internal network.
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

    /// The networks on which the tunnel finds it by name, with its place there.
    fn shared<'h>(&self, holder: &'h Inspected) -> BTreeMap<&'h str, &'h Endpoint> {
        user_defined(holder).filter(|(network, _)| self.tunnel.networks.contains_key(*network)).collect()
    }

    /// Whether a name means something else than this workload: a host with a domain, another container.
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

    /// The network that serves the label best: where its host leads to the workload, then one that the tunnel is on
    /// already, then the first.
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
    /// The change of the label that leads to `host`, with a port that may be right.
    fn with_host(&self, host: &str, declared: &BTreeSet<u16>) -> String {
        let port = match (self.address.port, declared.is_empty()) {
            (None, true) => String::new(),
            (port, _) => format!(":{}", port_to_suggest(declared, port)),
        };
        format!("set the label {} to {}://{host}{port}", self.key, self.address.scheme)
    }
}

fn blocked(problem: String, remedy: String) -> Way {
    Way::Blocked(Block { cause: Cause::Settings, problem, remedy })
}

/// The asked one where it may be right, else the only one that is declared.
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

/// Docker's DNS knows a container by its name, the start of its id and its aliases there, each also with the
/// network behind it, in any case.
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

/// The names that would do, for people: the id is none that one would write.
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
