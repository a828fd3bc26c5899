//! Tells whether another container runs a connector of the agent's own tunnel. Pure; the tables of tests are the
//! specification.

use crate::docker::{Container, Inspected, RunState};
use crate::state::TunnelId;

/// How sure it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Rivalry {
    /// Its token says so.
    Certain,
    /// It shows no token, and names the tunnel.
    Likely,
}

/// Words that are in the command or the name of most connectors, whatever their tunnel is called.
const COMMON_WORDS: [&str; 3] = ["cloudflared", "tunnel", "run"];
/// Ignore shorter tunnel names in container names: too many contain them by chance.
const LEAST_LETTERS: usize = 3;

/// Whether to inspect a listed container. An image that was rebuilt, or is listed by its id only, is recognized by the
/// labels that it keeps.
pub(super) fn is_candidate(listed: &Container, own: &[String; 2]) -> bool {
    is_connector(&listed.image, listed.labels.values()) && !own.contains(&listed.name)
}

/// Whether a container with this image and these label values may be a connector.
pub(crate) fn is_connector<'a>(image: &str, mut labels: impl Iterator<Item = &'a String>) -> bool {
    image.to_ascii_lowercase().contains("cloudflared") || labels.any(|value| tells_connector(value))
}

/// Whether a label value shows that the container was created from cloudflared's image.
pub(crate) fn tells_connector(value: &str) -> bool {
    value.contains("cloudflare/cloudflared")
}

/// Whether the container serves this tunnel beside the agent's own.
pub(super) fn rivalry(seen: &Inspected, own: &[String; 2], id: &TunnelId, name: Option<&str>) -> Option<Rivalry> {
    if own.contains(&seen.name) || !matches!(seen.state, RunState::Running | RunState::Restarting) {
        return None;
    }
    match &seen.serves {
        Some(serves) if serves == id => return Some(Rivalry::Certain),
        Some(_) => return None,
        None => {}
    }
    // An entry may be a shell command line.
    let words = || seen.command.iter().flat_map(|entry| entry.split([' ', '\t', '\n', '=', '"', '\'', ';']));
    let says = |word: &str| words().any(|known| known.eq_ignore_ascii_case(word));
    let name = name.filter(|name| !COMMON_WORDS.iter().any(|common| common.eq_ignore_ascii_case(name)));
    let in_its_name = |name: &str| {
        let (of, name) = (seen.name.to_lowercase(), name.to_lowercase());
        name.chars().count() >= LEAST_LETTERS && of.contains(&name)
    };
    let named = || says(&id.0) || name.is_some_and(|name| says(name) || in_its_name(name));
    (says("tunnel") && says("run") && named()).then_some(Rivalry::Likely)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::super::way::tests::container;
    use super::*;

    fn own() -> [String; 2] {
        ["tunnel", "tunnel-next"].map(str::to_owned)
    }

    #[test]
    fn candidates_are_other_containers_with_cloudflared_in_them() {
        for (name, image, label, expected) in [
            ("other", "cloudflare/cloudflared:2025.9.0", "", true),
            ("other", "registry.lan/Cloudflared@sha256:00", "", true),
            ("other", "sha256:00", "https://github.com/cloudflare/cloudflared", true),
            ("other", "nginx", "https://github.com/nginx/nginx", false),
            ("tunnel", "cloudflare/cloudflared", "", false),
            ("tunnel-next", "cloudflare/cloudflared", "", false),
        ] {
            let labels = BTreeMap::from([("org.opencontainers.image.source".to_owned(), label.to_owned())]);
            let (name, image) = (name.to_owned(), image.to_owned());
            let listed = Container { id: "i".into(), name, labels, status: "running".into(), image };
            assert_eq!(is_candidate(&listed, &own()), expected, "{listed:?}");
        }
    }

    #[test]
    fn a_rival_is_told_by_its_token_and_without_one_by_the_tunnel_that_it_names() {
        let (ours, other) = (Some("t1"), Some("t2"));
        let run: &[&str] = &["cloudflared", "--no-autoupdate", "tunnel", "run"];
        let with = |more: &[&'static str]| [run, more].concat();
        let quick = vec!["cloudflared", "tunnel", "--url", "http://edge"];
        for (name, serves, command, tunnel, expected) in [
            ("any", ours, with(&[]), Some("edge"), Some(Rivalry::Certain)),
            ("any", ours, vec![], None, Some(Rivalry::Certain)),
            ("edge", other, with(&["edge"]), Some("edge"), None),
            ("any", None, with(&[]), Some("edge"), None),
            ("any", None, with(&["edge"]), Some("edge"), Some(Rivalry::Likely)),
            ("any", None, with(&["Edge"]), Some("edge"), Some(Rivalry::Likely)),
            ("any", None, with(&["edge-2"]), Some("edge"), None),
            ("any", None, with(&["t1"]), None, Some(Rivalry::Likely)),
            ("any", None, vec!["sh", "-c", "cloudflared tunnel run edge"], Some("edge"), Some(Rivalry::Likely)),
            ("my-EDGE-1", None, with(&[]), Some("edge"), Some(Rivalry::Likely)),
            ("my-edge-1", None, with(&[]), Some("ed"), None),
            ("any", None, with(&["ed"]), Some("ed"), Some(Rivalry::Likely)),
            ("my-edge-1", None, quick, Some("edge"), None),
            ("cloudflared-tunnel", None, with(&[]), Some("Tunnel"), None),
            ("any", None, with(&[]), Some("run"), None),
            ("tunnel-next", ours, with(&[]), Some("edge"), None),
        ] {
            let seen = Inspected {
                serves: serves.map(|id| TunnelId(id.into())),
                command: command.iter().map(|word| (*word).to_owned()).collect(),
                ..container(name, &[])
            };
            assert_eq!(
                rivalry(&seen, &own(), &TunnelId("t1".into()), tunnel),
                expected,
                "{name} {command:?} {tunnel:?}"
            );
        }
        let ended = Inspected { serves: Some(TunnelId("t1".into())), state: RunState::Exited, ..container("any", &[]) };
        assert_eq!(rivalry(&ended, &own(), &TunnelId("t1".into()), None), None);
    }
}
