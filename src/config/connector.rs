//! The allowed options of cloudflared. The list is closed, since some of cloudflared's variables redirect traffic or
//! write files. The values are from cloudflared's documentation and source (2025.9).

use std::collections::BTreeMap;
use std::time::Duration;

use super::check::Check;

/// One option: our variable, cloudflared's, and the allowed values.
struct Choice {
    ours: &'static str,
    theirs: &'static str,
    values: &'static [&'static str],
}

const CHOICES: [Choice; 5] = [
    Choice { ours: "CLOUDFLARED_PROTOCOL", theirs: "TUNNEL_TRANSPORT_PROTOCOL", values: &["auto", "quic", "http2"] },
    // The only region there is; if unset, cloudflared uses all.
    Choice { ours: "CLOUDFLARED_REGION", theirs: "TUNNEL_REGION", values: &["us"] },
    Choice { ours: "CLOUDFLARED_EDGE_IP_VERSION", theirs: "TUNNEL_EDGE_IP_VERSION", values: &["auto", "4", "6"] },
    Choice { ours: "CLOUDFLARED_POST_QUANTUM", theirs: "TUNNEL_POST_QUANTUM", values: &["true", "false"] },
    Choice {
        ours: "CLOUDFLARED_LOGLEVEL",
        theirs: "TUNNEL_LOGLEVEL",
        values: &["debug", "info", "warn", "error", "fatal"],
    },
];

/// How long cloudflared may finish open requests when it is stopped. The agent does not pass on cloudflared's own
/// default, so nothing changes where nothing is set.
const GRACE: &str = "TUNNEL_GRACE_PERIOD";
const USUAL_GRACE: u64 = 30;
/// cloudflared refuses to start with a longer one.
const MOST_GRACE: u64 = 180;
/// Seconds that Docker waits beyond cloudflared's grace period. With less, Docker would kill cloudflared mid-drain.
const MORE_PATIENCE: u64 = 5;
/// The longest that the agent ever asks Docker to wait for a tunnel container.
pub(crate) const MOST_PATIENCE: u64 = MOST_GRACE + MORE_PATIENCE;

/// How long Docker waits for a container with these options to exit.
pub(crate) fn patience(options: &BTreeMap<&'static str, String>) -> Duration {
    let seconds = options.get(GRACE).and_then(|text| grace_seconds(text));
    Duration::from_secs(seconds.unwrap_or(USUAL_GRACE) + MORE_PATIENCE)
}

/// Whole seconds, in the form that the agent writes.
fn grace_seconds(text: &str) -> Option<u64> {
    let seconds = text.strip_suffix('s')?.parse().ok()?;
    ((1..=MOST_GRACE).contains(&seconds) && format!("{seconds}s") == text).then_some(seconds)
}

/// The name of cloudflared's variable, if this name and this value are allowed.
pub(crate) fn connector_option(name: &str, value: &str) -> Option<&'static str> {
    if name == GRACE {
        return grace_seconds(value).map(|_| GRACE);
    }
    let choice = CHOICES.iter().find(|choice| choice.theirs == name)?;
    choice.values.contains(&value).then_some(choice.theirs)
}

impl Check {
    /// Maps our variables that are set to cloudflared's; values may have any case. cloudflared decides what is unset.
    pub(super) fn connector_options(
        &mut self,
        given: &[(&str, Option<String>)],
        grace: Option<String>,
    ) -> BTreeMap<&'static str, String> {
        let mut options = BTreeMap::new();
        let grace = self.seconds_up_to("CLOUDFLARED_GRACE_PERIOD", grace, USUAL_GRACE, 1, MOST_GRACE).as_secs();
        if grace != USUAL_GRACE {
            options.insert(GRACE, format!("{grace}s"));
        }
        for choice in &CHOICES {
            let value = given.iter().find(|(name, _)| *name == choice.ours).and_then(|(_, value)| value.as_deref());
            if value.is_some() {
                let words: Vec<_> = choice.values.iter().map(|value| (*value, *value)).collect();
                options.insert(choice.theirs, self.one_of(choice.ours, value, &words).to_owned());
            }
        }
        let is = |name: &str, value: &str| options.get(name).is_some_and(|set| set == value);
        if is("TUNNEL_POST_QUANTUM", "true") && is("TUNNEL_TRANSPORT_PROTOCOL", "http2") {
            self.error("CLOUDFLARED_POST_QUANTUM=true needs QUIC and CLOUDFLARED_PROTOCOL=http2 forbids it: set the protocol to quic or auto, or drop one of the two");
        }
        options
    }
}
