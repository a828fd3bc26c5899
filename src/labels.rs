//! Labels of workloads: which of them make a container count, and which may leave the host.

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

/// Whether a label with this key may leave the host.
pub(crate) fn may_leave(key: &str) -> bool {
    PREFIXES.iter().any(|prefix| key.starts_with(prefix))
}
