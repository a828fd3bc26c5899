//! The behavior words, collected from the environment, the token and the run-time requests.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Result, bail};
use serde::de::Error as _;
use serde::{Deserialize, Deserializer};

use crate::transport::Protocol;
use crate::wire::Verdict;

/// The edge's answer to a wrong secret.
pub const REFUSAL: &str = "Unauthorized: Invalid tunnel secret";
/// The edge's words for an internal error of its own, as far as they were recorded.
pub const ERROR: &str = "connection with edge closed: internal error";
/// Prefix of the environment variables.
const PREFIX: &str = "STAND_IN_";

/// All words set so far, from `snake_case` word to value. Always valid: [`Script::with`] refuses the rest.
#[derive(Debug, Clone, Default)]
pub struct Script {
    words: BTreeMap<String, String>,
    behaviour: Behaviour,
}

/// The words in force, parsed. The crate's table explains each.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[allow(clippy::struct_excessive_bools, reason = "one per row of the table")]
#[allow(missing_docs, reason = "the crate's table documents the words")]
pub struct Behaviour {
    #[serde(deserialize_with = "flag")]
    pub unready: bool,
    pub ready_after: u64,
    pub connections: usize,
    #[serde(deserialize_with = "flag")]
    pub unauthorized: bool,
    #[serde(deserialize_with = "flag")]
    pub edge_error: bool,
    #[serde(deserialize_with = "flag")]
    pub unanswered: bool,
    #[serde(deserialize_with = "flag")]
    pub unreachable: bool,
    #[serde(deserialize_with = "flag")]
    pub swallowed: bool,
    #[serde(deserialize_with = "flag")]
    pub clock_wrong: bool,
    #[serde(deserialize_with = "flag")]
    pub udp_blocked: bool,
    #[serde(deserialize_with = "address")]
    pub edge: Option<String>,
    #[serde(deserialize_with = "flag")]
    pub hang: bool,
    pub exit: Option<i32>,
    pub exit_after: u64,
    #[serde(deserialize_with = "flag")]
    pub invalid_token: bool,
    #[serde(deserialize_with = "flag")]
    pub token_file_missing: bool,
    #[serde(deserialize_with = "flag")]
    pub metrics_port_taken: bool,
    #[serde(deserialize_with = "flag")]
    pub no_dns: bool,
    #[serde(deserialize_with = "flag")]
    pub dns_silent: bool,
    #[serde(deserialize_with = "flag")]
    pub origin_refuses: bool,
    #[serde(deserialize_with = "speed")]
    pub speed: f64,
    pub drain: Option<u64>,
    #[serde(deserialize_with = "flag")]
    pub ignore_sigterm: bool,
    pub version: String,
    pub config_version: i64,
    pub requests: u64,
    pub errors: u64,
    pub eat: usize,
}

impl Default for Behaviour {
    fn default() -> Self {
        Self {
            unready: false,
            ready_after: 0,
            connections: 4,
            unauthorized: false,
            edge_error: false,
            unanswered: false,
            unreachable: false,
            swallowed: false,
            clock_wrong: false,
            udp_blocked: false,
            edge: None,
            hang: false,
            exit: None,
            exit_after: 0,
            invalid_token: false,
            token_file_missing: false,
            metrics_port_taken: false,
            no_dns: false,
            dns_silent: false,
            origin_refuses: false,
            speed: 1.0,
            drain: None,
            ignore_sigterm: false,
            version: "2025.9.0".into(),
            config_version: 1,
            requests: 0,
            errors: 0,
            eat: 0,
        }
    }
}

impl Behaviour {
    /// The verdict that the words give a try over this protocol; `None` leaves it to the edge.
    #[must_use]
    pub fn verdict(&self, protocol: Protocol) -> Option<Verdict> {
        if self.unauthorized {
            Some(Verdict::Refused(REFUSAL.to_owned()))
        } else if self.edge_error {
            Some(Verdict::Failed(ERROR.to_owned()))
        } else if self.unanswered {
            Some(Verdict::Unanswered)
        } else if self.clock_wrong {
            Some(Verdict::Untrusted)
        } else if self.no_dns || self.dns_silent {
            Some(Verdict::Unresolved)
        } else if self.unreachable || self.udp_blocked && protocol == Protocol::Quic {
            Some(Verdict::Away)
        } else if self.swallowed {
            Some(Verdict::Swallowed)
        } else {
            None
        }
    }

    /// When to crash: how long after the word was set, and with which code.
    #[must_use]
    pub fn crash(&self) -> Option<(Duration, i32)> {
        self.exit.map(|code| (Duration::from_millis(self.exit_after), code))
    }
}

impl Script {
    /// Reads the words from the environment: `STAND_IN_READY_AFTER=500`.
    ///
    /// # Errors
    /// As [`Script::with`].
    pub fn from_vars(vars: impl Iterator<Item = (String, String)>) -> Result<Self> {
        let words = vars.filter_map(|(name, value)| Some((name.strip_prefix(PREFIX)?.to_owned(), value)));
        Self::default().with(words)
    }

    /// This script with more words, which override the earlier ones.
    ///
    /// # Errors
    /// At an unknown word, or a value that does not parse.
    pub fn with(&self, words: impl IntoIterator<Item = (String, String)>) -> Result<Self> {
        let mut all = self.words.clone();
        all.extend(words.into_iter().map(|(word, value)| (word.to_lowercase().replace('-', "_"), value)));
        Self::checked(all)
    }

    /// This script after a run-time request: a JSON object of words to values. `null` removes a word.
    ///
    /// # Errors
    /// As [`Script::with`], or when it is not an object.
    pub fn with_json(&self, request: &serde_json::Value) -> Result<Self> {
        let Some(request) = request.as_object() else { bail!("not a JSON object") };
        let mut all = self.words.clone();
        for (word, value) in request {
            let word = word.replace('-', "_");
            match value {
                serde_json::Value::Null => drop(all.remove(&word)),
                serde_json::Value::String(text) => drop(all.insert(word, text.clone())),
                other => drop(all.insert(word, other.to_string())),
            }
        }
        Self::checked(all)
    }

    fn checked(words: BTreeMap<String, String>) -> Result<Self> {
        let behaviour = envy::from_iter(words.clone())?;
        Ok(Self { words, behaviour })
    }

    /// The words, parsed.
    #[must_use]
    pub fn behaviour(&self) -> &Behaviour {
        &self.behaviour
    }

    /// The words as they were given.
    #[must_use]
    pub fn words(&self) -> &BTreeMap<String, String> {
        &self.words
    }
}

/// Parses a flag as people write it in an environment.
fn flag<'de, D: Deserializer<'de>>(deserializer: D) -> Result<bool, D::Error> {
    match String::deserialize(deserializer)?.as_str() {
        "1" | "true" => Ok(true),
        "0" | "false" | "" => Ok(false),
        other => Err(D::Error::custom(format!("{other:?} is neither true nor false"))),
    }
}

/// How many times as fast as recorded to play.
fn speed<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    let text = String::deserialize(deserializer)?;
    match text.parse::<f64>() {
        Ok(speed) if (0.1..=1000.0).contains(&speed) => Ok(speed),
        _ => Err(D::Error::custom(format!("{text:?} is no speed from 0.1 to 1000"))),
    }
}

/// Checks the form `host:port`. Only dialing shows whether the host exists.
fn address<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    let text = String::deserialize(deserializer)?;
    match text.rsplit_once(':') {
        Some((host, port)) if !host.is_empty() && port.parse::<u16>().is_ok() => Ok(Some(text)),
        _ => Err(D::Error::custom(format!("{text:?} is not host:port"))),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn vars(pairs: &[(&str, &str)]) -> impl Iterator<Item = (String, String)> {
        pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect::<Vec<_>>().into_iter()
    }

    #[test]
    fn later_places_override_earlier_ones_word_by_word() {
        let env = Script::from_vars(vars(&[("STAND_IN_READY_AFTER", "900"), ("STAND_IN_UNREADY", "1"), ("PATH", "/")]));
        let token = env.expect("env").with(vars(&[("ready-after", "500")])).expect("token");
        let now = token.with_json(&json!({"unready": false, "exit": 3, "exit_after": 40})).expect("json");
        assert!(token.behaviour().unready);
        assert_eq!(now.behaviour().ready_after, 500);
        assert!(!now.behaviour().unready);
        assert_eq!(now.behaviour().crash(), Some((Duration::from_millis(40), 3)));
        let back = now.with_json(&json!({"exit": null, "ready_after": null})).expect("null");
        assert_eq!(back.behaviour().crash(), None);
        assert_eq!(back.behaviour().ready_after, Behaviour::default().ready_after);
    }

    #[test]
    fn an_edge_is_a_host_and_a_port() {
        let script = Script::default().with(vars(&[("edge", "[::1]:7844")])).expect("edge");
        assert_eq!(script.behaviour().edge.as_deref(), Some("[::1]:7844"));
        assert_eq!(script.with_json(&json!({"edge": null})).expect("null").behaviour().edge, None);
    }

    #[test]
    fn a_typing_mistake_is_an_error_in_every_place() {
        assert!(Script::from_vars(vars(&[("STAND_IN_UNREDY", "1")])).is_err());
        assert!(Script::from_vars(vars(&[("STAND_IN_UNREADY", "perhaps")])).is_err());
        assert!(Script::default().with(vars(&[("drain", "soon")])).is_err());
        for not_an_edge in ["", "host", "host:", ":7844", "host:port", "host:70000"] {
            assert!(Script::default().with(vars(&[("edge", not_an_edge)])).is_err(), "{not_an_edge}");
        }
        assert!(Script::default().with_json(&json!({"hangs": true})).is_err());
        assert!(Script::default().with_json(&json!(["hang"])).is_err());
    }
}
