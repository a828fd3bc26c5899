//! Reads the labels of workloads: which of them enable a container, and which may leave the host.

use std::collections::BTreeMap;

/// The limits come from there, because the reader does not even read what exceeds them.
pub(crate) use dockflare_engine::sieve::{CONTAINER_BYTES, ENABLE_KEYS, KEY_BYTES, LABELS, REPORT_BYTES, VALUE_BYTES};

const YES: [&str; 4] = ["true", "1", "t", "yes"];

/// Prefixes of the labels that may leave the host.
const PREFIXES: [&str; 2] = ["dockflare.", "cloudflare.tunnel."];

/// The label with the name that Docker Compose gives a container on its networks.
pub(crate) const COMPOSE_SERVICE: &str = "com.docker.compose.service";

/// Whether the labels enable the container.
pub(crate) fn is_enabled<'a>(labels: impl IntoIterator<Item = (&'a String, &'a String)>) -> bool {
    let says_yes = |value: &str| YES.iter().any(|yes| yes.eq_ignore_ascii_case(value.trim()));
    labels.into_iter().any(|(key, value)| ENABLE_KEYS.contains(&key.as_str()) && says_yes(value))
}

/// Values that disable a container on purpose.
const NO: [&str; 10] = ["false", "0", "f", "no", "n", "off", "disable", "disabled", "none", "null"];

/// A label that seems meant to enable a container and does not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Nearly<'a> {
    /// The label as written.
    pub(crate) key: &'a str,
    pub(crate) value: &'a str,
    /// Whether the label is about enabling at all. If not, a label that enables is missing.
    pub(crate) enables: bool,
    /// The right label, as written in a file.
    pub(crate) right: &'static str,
}

/// Returns the label that nearly enables a container: another form of the key or the value, or a hostname alone.
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

/// Returns the text in lower case, without quotes that a file left in it.
fn plain(text: &str) -> String {
    text.trim_matches(|c: char| c.is_whitespace() || c == '"' || c == '\'').to_ascii_lowercase()
}

/// Labels that are left out because they exceed a limit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Excess {
    /// The first of these labels.
    pub(crate) label: String,
    /// The limit that it exceeds.
    pub(crate) bound: String,
    /// The number of these labels, as far as they were read.
    pub(crate) left_out: usize,
}

impl Excess {
    pub(crate) const REMEDY: &'static str = "use fewer or shorter dockflare.* labels";

    /// Returns one sentence about the container.
    pub(crate) fn sentence(&self) -> String {
        let more = match self.left_out {
            0 | 1 => String::new(),
            count => format!(", and at least {} more", count - 1),
        };
        format!("its label {} is left out{more}: {}", self.label, self.bound)
    }
}

/// Removes the labels that exceed the limits. `room` is the number of bytes left for all containers together. Labels
/// that enable a container always stay.
pub(crate) fn bound(labels: &mut BTreeMap<String, String>, room: usize) -> Option<Excess> {
    let is_enable = |key: &str| ENABLE_KEYS.contains(&key);
    let (mut count, mut bytes) = (labels.keys().filter(|key| is_enable(key)).count(), 0);
    let mut excess: Option<Excess> = None;
    labels.retain(|key, value| {
        let size = key.len() + value.len();
        let beyond = if key.len() > KEY_BYTES {
            Some(format!("its key is longer than {KEY_BYTES} bytes"))
        } else if value.len() > VALUE_BYTES {
            Some(format!("its value is longer than {VALUE_BYTES} bytes"))
        } else if is_enable(key) {
            None
        } else if count >= LABELS {
            Some(format!("the container has more than {LABELS} such labels"))
        } else if bytes + size > CONTAINER_BYTES {
            Some(format!("the container's labels have more than {} KiB together", CONTAINER_BYTES >> 10))
        } else if bytes + size > room {
            Some(format!("the labels of all containers have more than {} MiB together", REPORT_BYTES >> 20))
        } else {
            None
        };
        let Some(bound) = beyond else {
            count += usize::from(!is_enable(key));
            bytes += size;
            return true;
        };
        let label = || key.chars().take(KEY_BYTES).filter(|c| !c.is_control()).collect();
        excess.get_or_insert_with(|| Excess { label: label(), bound, left_out: 0 }).left_out += 1;
        false
    });
    excess
}

/// Whether a label with this key may leave the host.
pub(crate) fn may_leave(key: &str) -> bool {
    PREFIXES.iter().any(|prefix| key.starts_with(prefix))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_beyond_a_bound_is_left_out_and_named_and_what_enables_stays() {
        let enabled = || BTreeMap::from([("dockflare.enable".to_owned(), "true".to_owned())]);
        let with = |more: &mut dyn Iterator<Item = (String, String)>| {
            let mut labels = enabled();
            labels.extend(more);
            labels
        };
        let one = |key: &str, length: usize| with(&mut [(key.to_owned(), "x".repeat(length))].into_iter());
        let many = |count: usize, length: usize| {
            with(&mut (0..count).map(|n| (format!("dockflare.{n}.service"), "x".repeat(length))))
        };
        for (mut labels, room, left, words) in [
            (one("dockflare.service", VALUE_BYTES), REPORT_BYTES, 2, None),
            (one("dockflare.service", VALUE_BYTES + 1), REPORT_BYTES, 1, Some("longer than 4096 bytes")),
            (one(&format!("dockflare.{}", "k".repeat(KEY_BYTES)), 1), REPORT_BYTES, 1, Some("key is longer than 256")),
            (many(LABELS - 1, 1), REPORT_BYTES, LABELS, None),
            (many(20_000, 1), REPORT_BYTES, LABELS, Some("more than 256 such labels")),
            (many(100, 2000), REPORT_BYTES, 33, Some("64 KiB together")),
            (many(100, 100), 1000, 9, Some("2 MiB together")),
            (many(100, 100), 0, 1, Some("2 MiB together")),
        ] {
            let excess = bound(&mut labels, room);
            assert_eq!(labels.len(), left, "{words:?}");
            assert!(labels.contains_key("dockflare.enable"));
            let sentence = excess.map(|excess| excess.sentence()).unwrap_or_default();
            assert!(
                sentence.contains(words.unwrap_or_default()) && sentence.is_empty() == words.is_none(),
                "{sentence}"
            );
        }
    }

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
