//! Writes each answer anew from what the agent's own types hold of Docker's, and shows the agent only what it needs.
//! Pure.
//!
//! | container | what the agent sees of it |
//! |---|---|
//! | the tunnel's or its successor's, created by the agent | state, networks, our labels; no value of a variable |
//! | another owner's under one of these two names | name, image, state |
//! | created for one of these names and renamed by hand | the same as the tunnel's |
//! | labeled | name, image, state, networks, ports, labels that may leave the host |
//! | one whose network a labeled one shares | name, state, networks, ports |
//! | a connector | name, image, state, command and tunnel id, no secret |
//! | the agent's own | name, image, state, and its place on the tunnel's networks |
//! | one that a service label names | its name, in a listing |
//! | one whose labels nearly enable it | its name and that label, in a listing |
//! | any other | nothing |

use std::collections::{BTreeMap, BTreeSet};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Map, Value, json};

use super::plan::Policy;
use crate::docker::{Action, Container, Event, HOST_GATEWAY, Inspected, LastCheck, NAME_LABEL};
use crate::health::{Owner, Whose, is_own, owner};
use crate::labels::{COMPOSE_SERVICE, is_enabled, may_leave, nearly};
use crate::neighbours::{is_connector, named_host, services, tells_connector};

/// Prefix of the labels that the agent puts on its container.
const OUR_LABELS: &str = "com.dockflare.agent.";

/// What an inspection by name or by full id may show.
pub(super) fn shown(policy: &Policy, mut seen: Inspected) -> Option<Inspected> {
    let is_tunnel = policy.is_tunnels(&seen);
    let connector = is_connector(&seen.image, seen.labels.values());
    let enabled = is_enabled(&seen.labels);
    if is_tunnel {
        match owner(&seen, Whose::Any) {
            Owner::Agent => seen.labels.retain(|key, _| key.starts_with(OUR_LABELS)),
            Owner::PythonAgent => return Some(connector_only(seen)),
            Owner::Foreign => return Some(bare(seen)),
        }
        return Some(seen);
    }
    if enabled {
        let place = place_only(seen.clone());
        let labels = seen.labels.iter().filter(|(key, _)| may_leave(key) || *key == COMPOSE_SERVICE);
        let labels = labels.map(|(key, value)| (key.clone(), value.clone())).collect();
        let also = if connector { connector_only(seen) } else { Inspected { command: vec![], ..bare(seen) } };
        return Some(Inspected {
            labels,
            networks: place.networks,
            network_mode: place.network_mode,
            ports: place.ports,
            ..also
        });
    }
    if connector {
        return Some(connector_only(seen));
    }
    is_own(&seen).then(|| own(policy, seen))
}

/// What the agent may see of its own container: that it exists, and its place on the tunnel's networks.
pub(super) fn own(policy: &Policy, mut seen: Inspected) -> Inspected {
    let labels = seen.labels.get(COMPOSE_SERVICE).map(|name| (COMPOSE_SERVICE.to_owned(), name.clone()));
    let (labels, network_mode) = (labels.into_iter().collect(), std::mem::take(&mut seen.network_mode));
    let mut networks = std::mem::take(&mut seen.networks);
    networks.retain(|name, _| policy.is_network(name));
    Inspected { labels, networks, network_mode, ..bare(seen) }
}

/// What the agent may see of a container whose network a labeled one shares.
pub(super) fn place_only(mut seen: Inspected) -> Inspected {
    let (networks, ports) = (std::mem::take(&mut seen.networks), std::mem::take(&mut seen.ports));
    let network_mode = std::mem::take(&mut seen.network_mode);
    let service = seen.labels.get(COMPOSE_SERVICE).map(|name| (COMPOSE_SERVICE.to_owned(), name.clone()));
    Inspected {
        networks,
        ports,
        network_mode,
        labels: service.into_iter().collect(),
        image: String::new(),
        ..bare(seen)
    }
}

/// Words of this length or more are hidden. No tunnel has so long a name, and such a word may be a secret: a service
/// token of Access has 64 letters.
const MOST_LETTERS: usize = 64;

fn connector_only(mut seen: Inspected) -> Inspected {
    let (command, serves) = (std::mem::take(&mut seen.command), seen.serves.take());
    let command = without_secrets(&command);
    seen.env_names.retain(|name| name == TOKEN);
    let env_names = std::mem::take(&mut seen.env_names);
    Inspected { command, serves, env_names, ..bare(seen) }
}

/// A command without its secrets, as far as they can be recognized.
fn without_secrets(command: &[String]) -> Vec<String> {
    let mut tells = false;
    let mut brief = |word: &str| {
        let (is_option, has_value) = (word.starts_with('-'), word.contains('='));
        let names_one = is_option && ["token", "secret", "key", "pass"].iter().any(|name| word.contains(name));
        let is_told = std::mem::replace(&mut tells, names_one && !has_value) && !is_option;
        // By now only a placeholder is left of the token, which shows that there is one.
        let is_secret = (is_told && !word.starts_with('<')) || (names_one && has_value && !word.ends_with('>'));
        if is_secret || word.len() >= MOST_LETTERS { "<hidden>" } else { word }.to_owned()
    };
    // An entry may be a shell command line.
    command.iter().map(|entry| entry.split(' ').map(&mut brief).collect::<Vec<_>>().join(" ")).collect()
}

/// Name, image and state.
fn bare(seen: Inspected) -> Inspected {
    Inspected {
        health: None,
        last_check: None,
        error: String::new(),
        command: vec![],
        env_names: vec![],
        serves: None,
        labels: std::collections::HashMap::new(),
        networks: BTreeMap::new(),
        network_mode: String::new(),
        ports: BTreeSet::new(),
        knows_host: false,
        ..seen
    }
}

const TOKEN: &str = "TUNNEL_TOKEN";

/// Writes an inspection as the Engine would.
pub(super) fn inspection(seen: &Inspected) -> Value {
    // The agent compares the tunnel's id. A token for that tunnel without its secret allows this, and nothing else.
    let token = seen.serves.as_ref().map_or("hidden".to_owned(), |tunnel| {
        STANDARD.encode(json!({ "a": "hidden", "t": tunnel.0, "s": "hidden" }).to_string())
    });
    let command: Vec<_> = seen.command.iter().map(|word| word.replace("<token>", &token)).collect();
    let env =
        seen.env_names.iter().map(|name| if name == TOKEN { format!("{name}={token}") } else { format!("{name}=") });
    let networks: Map<_, _> = seen
        .networks
        .iter()
        .map(|(name, place)| {
            let place = json!({ "IPAddress": place.address, "Gateway": place.gateway, "Aliases": place.aliases });
            (name.clone(), place)
        })
        .collect();
    let ports: Map<_, _> = seen.ports.iter().map(|port| (format!("{port}/tcp"), json!({}))).collect();
    let mut state = json!({
        "Status": seen.state.as_str(), "StartedAt": seen.started_at, "ExitCode": seen.exit_code,
        "OOMKilled": seen.out_of_memory, "Error": seen.error,
    });
    if let Some(health) = seen.health {
        let last = seen.last_check.map(last_check).into_iter().collect::<Vec<_>>();
        state["Health"] = json!({ "Status": health.as_str(), "Log": last });
    }
    json!({
        "Id": seen.id, "Name": format!("/{}", seen.name), "RestartCount": seen.restarts, "State": state,
        "Config": {
            "Image": seen.image, "Cmd": command, "Env": env.collect::<Vec<_>>(), "Labels": seen.labels,
            "ExposedPorts": ports,
        },
        "HostConfig": {
            "NetworkMode": seen.network_mode,
            "ExtraHosts": if seen.knows_host { vec![HOST_GATEWAY] } else { vec![] },
        },
        "NetworkSettings": { "Networks": networks },
    })
}

/// Writes the result as Docker records it, so that the agent reads it back unchanged.
fn last_check(check: LastCheck) -> Value {
    let (code, output) = match check {
        LastCheck::Ready => (0, ""),
        LastCheck::NotReady => (1, ""),
        LastCheck::TimedOut => (-1, "Health check exceeded timeout"),
        LastCheck::Broken => (-1, ""),
    };
    json!({ "ExitCode": code, "Output": output })
}

/// Longest value of a label that nearly enables a container. A hostname, or a word meant as yes, is shorter.
const MOST_IN_A_LABEL: usize = 255;

/// Writes a listing: the labeled containers, or of all running ones those that the agent may see.
pub(super) fn listing(policy: &Policy, listed: &[Container], labelled_only: bool) -> Value {
    let named: BTreeSet<String> = listed
        .iter()
        .filter(|container| is_enabled(&container.labels))
        .flat_map(|container| services(&container.labels).into_iter().filter_map(|(_, value)| named_host(value)))
        .collect();
    let one = |container: &Container| {
        let enabled = is_enabled(&container.labels);
        let connector = is_connector(&container.image, container.labels.values());
        let ours = policy.is_tunnel(&container.name);
        let service = container.labels.get(COMPOSE_SERVICE);
        let is_named = [Some(&container.name), service].into_iter().flatten();
        let is_named = is_named.map(|name| name.to_ascii_lowercase()).any(|name| named.contains(&name));
        let is_whole = enabled || (!labelled_only && (ours || connector));
        let near = nearly(&container.labels).filter(|_| !labelled_only);
        if !is_whole && (labelled_only || !is_named) && near.is_none() {
            return None;
        }
        let keeps = |key: &str, value: &str| {
            key == COMPOSE_SERVICE
                || (enabled && may_leave(key))
                || (ours && key.starts_with(OUR_LABELS))
                || (is_whole && tells_connector(value))
                || (near.is_some_and(|near| near.key == key) && value.len() <= MOST_IN_A_LABEL)
        };
        let labels: BTreeMap<_, _> = container.labels.iter().filter(|(key, value)| keeps(key, value)).collect();
        let names = [format!("/{}", container.name)];
        Some(if is_whole {
            json!({
                "Id": container.id, "Names": names, "Image": container.image, "State": container.status,
                "Labels": labels,
            })
        } else {
            json!({ "Id": "", "Names": names, "Image": "", "State": "running", "Labels": labels })
        })
    };
    listed.iter().filter_map(one).collect()
}

/// Lists the containers that were created for the tunnel's name, whatever their names are now.
pub(super) fn made(policy: &Policy, listed: &[Container]) -> Value {
    let ours = |one: &&Container| policy.is_tunnel(&one.name) || policy.is_made_for(one.labels.get(NAME_LABEL));
    let one = |container: &Container| {
        let labels: BTreeMap<_, _> = container.labels.iter().filter(|(key, _)| key.starts_with(OUR_LABELS)).collect();
        let names = [format!("/{}", container.name)];
        json!({ "Id": container.id, "Names": names, "Image": "", "State": container.status, "Labels": labels })
    };
    listed.iter().filter(ours).map(one).collect()
}

/// Writes an event as the Engine would, if the agent may see it. For networks other than the tunnel's, it says that
/// something happened but not to which: a container may have been connected to one.
pub(super) fn event(policy: &Policy, event: &Event) -> Option<Value> {
    let (kind, action) = match event.action {
        Action::Start => ("container", "start"),
        Action::End => ("container", "die"),
        Action::Rename => ("container", "rename"),
        Action::Container => ("container", "other"),
        Action::Network => ("network", "connect"),
    };
    let mut id = event.id.as_str();
    let mut attributes = BTreeMap::new();
    if event.action == Action::Network {
        if event.name == policy.tunnel.network {
            attributes.insert("name", event.name.as_str());
        } else {
            id = "";
        }
    } else {
        let image = event.attributes.get("image").map(String::as_str).unwrap_or_default();
        let before = event.attributes.get("oldName").map(|name| name.trim_start_matches('/'));
        let ours = policy.is_tunnel(&event.name)
            || before.is_some_and(|name| policy.is_tunnel(name))
            || policy.is_made_for(event.attributes.get(NAME_LABEL));
        let enabled = is_enabled(&event.attributes);
        if !ours && !enabled && !is_connector(image, std::iter::empty()) {
            return None;
        }
        attributes.extend([("name", event.name.as_str()), ("image", image)]);
        let keeps = |key: &str| (enabled && may_leave(key)) || (ours && key.starts_with(OUR_LABELS));
        let labels = event.attributes.iter().filter(|(key, _)| keeps(key));
        attributes.extend(labels.map(|(key, value)| (key.as_str(), value.as_str())));
    }
    Some(json!({
        "Type": kind, "Action": action, "Actor": { "ID": id, "Attributes": attributes },
        "scope": "local", "time": event.at / 1_000_000_000, "timeNano": event.at,
    }))
}

/// Frames the lines of a log as the Engine does: the stream, three zero bytes, the length, the line.
pub(super) fn log(lines: &[String]) -> Vec<u8> {
    const STDOUT: u8 = 1;
    let frame = |line: &String| {
        let length = u32::try_from(line.len() + 1).unwrap_or(u32::MAX).to_be_bytes();
        [&[STDOUT, 0, 0, 0], &length[..], line.as_bytes(), b"\n"].concat()
    };
    lines.iter().flat_map(frame).collect()
}

#[cfg(test)]
mod tests;
