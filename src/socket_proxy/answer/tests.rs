use std::collections::HashMap;

use testkit::bollard::models;

use super::*;
use crate::docker::{Endpoint, Health, RunState, SPEC_LABEL};
use crate::socket_proxy::tests::{ID, policy};
use crate::state::TunnelId;

/// A container with every field set, and this name, image and labels.
fn full(name: &str, image: &str, labels: &[(&str, &str)]) -> Inspected {
    let place = Endpoint { address: "10.0.0.2".into(), gateway: "10.0.0.1".into(), aliases: vec!["alias".into()] };
    Inspected {
        id: ID.into(),
        name: name.into(),
        image: image.into(),
        state: RunState::Running,
        started_at: "2026-01-31T10:00:00Z".into(),
        exit_code: 3,
        out_of_memory: true,
        restarts: 4,
        error: "an error".into(),
        health: Some(Health::Unhealthy),
        last_check: Some(LastCheck::TimedOut),
        command: ["cloudflared", "tunnel", "run", "--token", "<token>"].map(str::to_owned).to_vec(),
        env_names: ["PATH", "TUNNEL_TOKEN", "PASSWORD"].map(str::to_owned).to_vec(),
        serves: Some(TunnelId("t1".into())),
        labels: labels.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect(),
        networks: BTreeMap::from([("net".to_owned(), place)]),
        network_mode: "net".into(),
        knows_host: true,
        ports: BTreeSet::from([80]),
    }
}

/// The inspection as the agent reads it from the proxy's answer.
fn read(seen: &Inspected) -> Inspected {
    let shown: models::ContainerInspectResponse = serde_json::from_value(inspection(seen)).unwrap();
    Inspected::from(shown)
}

fn sees(name: &str, image: &str, labels: &[(&str, &str)]) -> Option<Inspected> {
    shown(&policy(), full(name, image, labels)).map(|shown| read(&shown))
}

#[test]
fn of_its_own_container_the_agent_sees_what_it_would_without_a_proxy_but_no_value_of_a_variable() {
    let labels = [(SPEC_LABEL, "hash"), ("org.other", "x")];
    for name in ["dockflare-agent-tunnel", "dockflare-agent-tunnel-next"] {
        let own = full(name, "cloudflare/cloudflared:1", &labels);
        let seen = sees(name, &own.image, &labels).unwrap();
        let expected = Inspected { labels: HashMap::from([(SPEC_LABEL.into(), "hash".into())]), ..own };
        assert_eq!(seen, expected);
    }
}

#[test]
fn every_state_health_and_check_is_read_as_it_was() {
    for state in RunState::ALL {
        let seen = Inspected { state, ..full("x", "y", &[]) };
        assert_eq!(read(&seen), seen);
    }
    for health in [None, Some(Health::Starting), Some(Health::Healthy), Some(Health::Unhealthy)] {
        let seen = Inspected { health, last_check: None, ..full("x", "y", &[]) };
        assert_eq!(read(&seen), seen);
    }
    for check in [LastCheck::Ready, LastCheck::NotReady, LastCheck::TimedOut, LastCheck::Broken] {
        let seen = Inspected { last_check: Some(check), ..full("x", "y", &[]) };
        assert_eq!(read(&seen), seen);
    }
}

#[test]
fn no_token_is_shown_but_which_tunnel_it_is_for() {
    let text = inspection(&full("x", "cloudflare/cloudflared:1", &[])).to_string();
    assert!(!text.contains("<token>"), "{text}");
    assert_eq!(read(&full("x", "y", &[])).serves, Some(TunnelId("t1".into())));
}

#[test]
fn of_each_other_kind_only_what_is_needed_is_shown() {
    // Command and token, networks, labels, image.
    let parts = |seen: &Inspected| {
        (!seen.command.is_empty(), !seen.networks.is_empty(), seen.labels.len(), !seen.image.is_empty())
    };
    let enabled = [("dockflare.enable", "true"), (COMPOSE_SERVICE, "web"), ("secret", "s3cret")];
    let source = [("org.opencontainers.image.source", "https://github.com/cloudflare/cloudflared")];
    for (name, image, labels, expected) in [
        ("web", "nginx", &enabled[..], Some((false, true, 2, true))),
        ("web", "my/cloudflared", &enabled, Some((true, true, 2, true))),
        ("other", "cloudflare/cloudflared:1", &[], Some((true, false, 0, true))),
        ("other", "sha256:00", &source, Some((true, false, 0, true))),
        ("dockflare-agent", "x", &[], Some((false, false, 0, true))),
        ("any", "x", &[(COMPOSE_SERVICE, "dockflare-agent")], Some((false, false, 1, true))),
        ("db", "postgres", &[("secret", "s3cret")], None),
        ("web", "nginx", &[("dockflare.enable", "false")], None),
        ("web", "nginx", &[("dockflare.hostname", "h")], None),
    ] {
        let seen = sees(name, image, labels);
        assert_eq!(seen.as_ref().map(parts), expected, "{name} {image} {labels:?}");
        let Some(seen) = seen else { continue };
        assert!(!seen.env_names.contains(&"PASSWORD".to_owned()), "{seen:?}");
        assert!(!format!("{seen:?}").contains("s3cret") && seen.error.is_empty(), "{seen:?}");
    }
    let long = format!("cloudflared tunnel --credentials-contents={} run edge", "x".repeat(65));
    let shell = Inspected { command: vec![long], ..full("other", "cloudflare/cloudflared:1", &[]) };
    let shell = read(&shown(&policy(), shell).unwrap());
    assert_eq!(shell.command, ["cloudflared tunnel <hidden> run edge"]);
    // The agent recognizes the Python agent's container by its command and the name of its variable.
    let python = sees("dockflare-agent-tunnel", "cloudflare/cloudflared:1", &[]).unwrap();
    assert_eq!(owner(&python, Whose::Any), Owner::PythonAgent);
    let foreign = Inspected { command: vec!["nginx".into()], ..full("dockflare-agent-tunnel", "nginx", &[]) };
    let foreign = read(&shown(&policy(), foreign).unwrap());
    assert_eq!((owner(&foreign, Whose::Any), parts(&foreign)), (Owner::Foreign, (false, false, 0, true)));
    assert_eq!(parts(&read(&place_only(full("lender", "x", &[("secret", "s")])))), (false, true, 0, false));
}

fn listed(name: &str, image: &str, labels: &[(&str, &str)]) -> Container {
    Container {
        id: ID.into(),
        name: name.into(),
        labels: labels.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect(),
        status: "running".into(),
        image: image.into(),
    }
}

#[test]
fn a_listing_shows_labelled_ones_our_own_connectors_and_names_that_labels_say() {
    let all = [
        listed(
            "web",
            "nginx",
            &[("dockflare.enable", "true"), ("dockflare.service", "http://Front:80"), ("s", "s3cret")],
        ),
        listed("front", "caddy", &[("s", "s3cret")]),
        listed("project-front-1", "caddy", &[(COMPOSE_SERVICE, "front")]),
        listed("db", "postgres", &[]),
        listed("off", "x", &[("dockflare.enable", "no"), ("dockflare.service", "http://db")]),
        listed("near", "x", &[("dockflare.enabled", "true"), ("dockflare.hostname", "h"), ("s", "s3cret")]),
        listed("other", "cloudflare/cloudflared:1", &[]),
        listed("dockflare-agent-tunnel", "cloudflare/cloudflared:1", &[(SPEC_LABEL, "h"), ("s", "s3cret")]),
    ];
    let shown = |labelled_only: bool| {
        let answer = listing(&policy(), &all, labelled_only);
        assert!(!answer.to_string().contains("s3cret"), "{answer}");
        let shown: Vec<models::ContainerSummary> = serde_json::from_value(answer).unwrap();
        shown.into_iter().map(Container::from).collect::<Vec<_>>()
    };
    let all_shown = shown(false);
    let names: Vec<_> = all_shown.iter().map(|shown| shown.name.as_str()).collect();
    assert_eq!(names, ["web", "front", "project-front-1", "near", "other", "dockflare-agent-tunnel"]);
    for named in &all_shown[1..4] {
        assert!(named.id.is_empty() && named.image.is_empty(), "{named:?}");
    }
    assert_eq!(all_shown[3].labels, BTreeMap::from([("dockflare.enabled".to_owned(), "true".to_owned())]));
    let labelled: Vec<_> = shown(true).into_iter().map(|shown| shown.name).collect();
    assert_eq!(labelled, ["web"]);
}

#[test]
fn events_of_others_are_dropped_and_of_networks_only_the_tunnels_is_named() {
    let told = |action: Action, name: &str, attributes: &[(&str, &str)]| {
        let attributes = attributes.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        let told = Event { at: 1_700_000_000_000_000_042, action, id: ID.into(), name: name.into(), attributes };
        let shown: models::EventMessage = serde_json::from_value(event(&policy(), &told)?).unwrap();
        Some(Event::from(shown))
    };
    let enabled = [("dockflare.enable", "true"), ("dockflare.hostname", "h"), ("image", "nginx"), ("secret", "s3cret")];
    for action in [Action::Start, Action::End, Action::Rename, Action::Container] {
        let seen = told(action.clone(), "web", &enabled).unwrap();
        assert_eq!((seen.action, seen.at, seen.id.as_str()), (action.clone(), 1_700_000_000_000_000_042, ID));
        assert_eq!(seen.attributes.len(), 3, "{:?}", seen.attributes);
        assert_eq!(told(action.clone(), "db", &[("image", "postgres")]), None);
        assert_eq!(told(action.clone(), "off", &[("dockflare.enable", "false")]), None);
        assert!(told(action.clone(), "dockflare-agent-tunnel-next", &[]).is_some());
        assert!(told(action, "other", &[("image", "cloudflare/cloudflared")]).is_some());
    }
    let away = told(Action::Rename, "stolen", &[("oldName", "/dockflare-agent-tunnel")]);
    assert_eq!(away.unwrap().name, "stolen");
    assert_eq!(told(Action::Network, "cloudflare-net", &[("container", "c")]).unwrap().name, "cloudflare-net");
    let other = told(Action::Network, "secret-net", &[("container", "c")]).unwrap();
    assert_eq!((other.name.as_str(), other.id.as_str(), other.attributes.len()), ("", "", 0));
}

#[test]
fn a_command_is_shown_without_its_secrets() {
    let shown = |words: &str| without_secrets(&words.split(' ').map(str::to_owned).collect::<Vec<_>>()).join(" ");
    for words in [
        "cloudflared tunnel --no-autoupdate run --token <token> edge",
        "tunnel run 6ff42ae2-765d-4adf-8112-31c55c1551ef",
    ] {
        assert_eq!(shown(words), words);
    }
    let access = shown("access tcp --service-token-secret s3cret --hostname h");
    assert_eq!(access, "access tcp --service-token-secret <hidden> --hostname h");
    assert_eq!(shown("tunnel --api-key=s3cret run"), "tunnel <hidden> run");
    assert_eq!(shown(&format!("run {}", "f".repeat(64))), "run <hidden>");
    assert_eq!(
        without_secrets(&["sh -c cloudflared --token s3cret".to_owned()]),
        ["sh -c cloudflared --token <hidden>"]
    );
}
