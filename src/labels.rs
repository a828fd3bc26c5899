//! Labels of workloads: which of them make a container count, and which may leave the host.

use std::collections::BTreeMap;

/// A container counts when one of these says yes.
pub(crate) const ENABLE_KEYS: [&str; 2] = ["dockflare.enable", "cloudflare.tunnel.enable"];
const YES: [&str; 4] = ["true", "1", "t", "yes"];

/// What may leave the host of a container's labels.
const PREFIXES: [&str; 2] = ["dockflare.", "cloudflare.tunnel."];

/// Under which docker compose makes a container known on its networks.
pub(crate) const COMPOSE_SERVICE: &str = "com.docker.compose.service";

/// Whether the labels ask for the container to be served.
pub(crate) fn is_enabled<'a>(labels: impl IntoIterator<Item = (&'a String, &'a String)>) -> bool {
    let says_yes = |value: &str| YES.iter().any(|yes| yes.eq_ignore_ascii_case(value.trim()));
    labels.into_iter().any(|(key, value)| ENABLE_KEYS.contains(&key.as_str()) && says_yes(value))
}

/// Values that say no on purpose.
const NO: [&str; 10] = ["false", "0", "f", "no", "n", "off", "disable", "disabled", "none", "null"];

/// A label that was meant to make a container count, and does not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Nearly<'a> {
    /// The label as it is.
    pub(crate) key: &'a str,
    pub(crate) value: &'a str,
    /// Whether it is about enabling at all; if not, such a label is missing beside it.
    pub(crate) enables: bool,
    /// What would do, as it is written in a file.
    pub(crate) right: &'static str,
}

/// What nearly makes a container count: a key or a value in another form, or a hostname with no such key.
pub(crate) fn nearly(labels: &BTreeMap<String, String>) -> Option<Nearly<'_>> {
    if is_enabled(labels) {
        return None;
    }
    let (mut enables, mut hostname) = (None, None);
    for (key, value) in labels {
        let name = plain(key).replace(['_', '-'], ".");
        let (rest, right) = match (name.strip_prefix("dockflare."), name.strip_prefix("cloudflare.tunnel.")) {
            (Some(rest), _) => (rest, "dockflare.enable=true"),
            (None, Some(rest)) => (rest, "cloudflare.tunnel.enable=true"),
            (None, None) => continue,
        };
        let slip = |enables| Nearly { key, value, enables, right };
        match rest {
            "enable" | "enabled" if NO.contains(&plain(value).as_str()) => return None,
            "enable" | "enabled" => enables = enables.or(Some(slip(true))),
            _ if rest == "hostname" || rest.ends_with(".hostname") => hostname = hostname.or(Some(slip(false))),
            _ => {}
        }
    }
    enables.or(hostname)
}

/// Without quotes that a file left in it, in lower case.
fn plain(text: &str) -> String {
    text.trim_matches(|c: char| c.is_whitespace() || c == '"' || c == '\'').to_ascii_lowercase()
}

/// Whether a label with this key may leave the host.
pub(crate) fn may_leave(key: &str) -> bool {
    PREFIXES.iter().any(|prefix| key.starts_with(prefix))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_that_nearly_enable_are_known_with_the_right_form_and_a_no_is_a_no() {
        let (ours, older) = (Some("dockflare.enable=true"), Some("cloudflare.tunnel.enable=true"));
        for (labels, expected) in [
            (&[("dockflare.enable", "true")][..], None),
            (&[("dockflare.enable", "TRUE ")], None),
            (&[("dockflare.enable", "true"), ("dockflare.enabled", "true")], None),
            (&[("dockflare.enabled", "true")], ours),
            (&[("Dockflare.Enable", "true")], ours),
            (&[("DOCKFLARE_ENABLE", "1")], ours),
            (&[("\"dockflare.enable\"", "true")], ours),
            (&[("dockflare.enable", "\"true\"")], ours),
            (&[("dockflare.enable", "'yes'")], ours),
            (&[("dockflare.enable", "on")], ours),
            (&[("dockflare.enable", "enabled")], ours),
            (&[("dockflare.enable", "")], ours),
            (&[("cloudflare.tunnel.enabled", "true")], older),
            (&[("cloudflare.tunnel.hostname", "a.example")], older),
            (&[("dockflare.0.hostname", "a.example")], ours),
            (&[("dockflare.enable", "false"), ("dockflare.hostname", "a.example")], None),
            (&[("dockflare.enable", "Off"), ("dockflare.hostname", "a.example")], None),
            (&[("dockflare.enabled", "\"no\"")], None),
            (&[("dockflare.service", "http://web")], None),
            (&[("traefik.enable", "true")], None),
            (&[], None),
        ] {
            let labels = labels.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
            assert_eq!(nearly(&labels).map(|nearly| nearly.right), expected, "{labels:?}");
        }
    }
}
