//! Reads the bodies of requests. Each is a closed set of fields, spelled exactly, none of them twice.
//!
//! Docker's own reader takes `hostconfig`, `HoſtConfig` and a second `HostConfig` for the same field. Here, the first
//! two are unknown fields and the third is a duplicate. The body of a create call becomes a [`Spec`], which writes the
//! body that Docker gets: it holds command, hardening, health check and log limits, whatever the client sent.

use std::collections::BTreeMap;
use std::fmt;

use serde::de::{Error, IgnoredAny, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};

use super::plan::Policy;
use crate::config::connector_option;
use crate::docker::{
    COMMAND, HOST_GATEWAY, IMAGE_LABEL, JOINED, METRICS_LABEL, METRICS_VARIABLE, MetricsPlace, NAME_LABEL, OWNER_LABEL,
    REDEPLOY_LABEL, SPEC_LABEL, Spec, TUNNEL_LABEL, TUNNEL_NAME_LABEL, label_text, metrics_address,
};
use crate::state::{AgentId, Token, TunnelId};

type Rule = &'static str;

/// The fields of a create call that [`Spec`] writes.
#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "PascalCase")]
struct Container {
    image: String,
    cmd: Vec<String>,
    env: Vec<String>,
    labels: Labels,
    host_config: HostConfig,
    // The proxy writes the following fields anew; here they only need the right type.
    #[serde(default, rename = "StopTimeout")]
    _stop_timeout: Option<u16>,
    #[serde(default, rename = "Healthcheck")]
    _healthcheck: Option<Healthcheck>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "PascalCase")]
struct HostConfig {
    network_mode: String,
    #[serde(default)]
    extra_hosts: Option<[String; 1]>,
    #[serde(default, rename = "RestartPolicy")]
    _restart_policy: Option<RestartPolicy>,
    #[serde(default, rename = "LogConfig")]
    _log_config: Option<LogConfig>,
    #[serde(default, rename = "CapDrop")]
    _cap_drop: Option<[String; 1]>,
    #[serde(default, rename = "SecurityOpt")]
    _security_opt: Option<[String; 1]>,
    #[serde(default, rename = "ReadonlyRootfs")]
    _readonly_rootfs: Option<bool>,
    #[serde(default, rename = "PidsLimit")]
    _pids_limit: Option<i64>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RestartPolicy {
    #[serde(rename = "Name")]
    _name: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct LogConfig {
    #[serde(rename = "Type")]
    _type: String,
    #[serde(rename = "Config")]
    _config: Labels,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Healthcheck {
    #[serde(rename = "Test")]
    _test: Vec<String>,
    #[serde(default, rename = "Interval")]
    _interval: Option<i64>,
    #[serde(default, rename = "Timeout")]
    _timeout: Option<i64>,
    #[serde(default, rename = "StartPeriod")]
    _start_period: Option<i64>,
    #[serde(default, rename = "StartInterval")]
    _start_interval: Option<i64>,
    #[serde(default, rename = "Retries")]
    _retries: Option<i64>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "PascalCase")]
struct Network {
    name: String,
    driver: String,
    #[serde(default)]
    internal: Option<bool>,
    labels: Labels,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "PascalCase")]
struct Connect {
    container: String,
    endpoint_config: Option<Joined>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "PascalCase")]
struct Joined {
    aliases: [String; 1],
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "PascalCase")]
struct Disconnect {
    container: String,
}

/// Labels with their values; no name may occur twice.
struct Labels(BTreeMap<String, String>);

impl<'de> Deserialize<'de> for Labels {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Pairs;
        impl<'de> Visitor<'de> for Pairs {
            type Value = Labels;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("names with values")
            }

            fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<Labels, M::Error> {
                let mut labels = BTreeMap::new();
                while let Some((key, value)) = map.next_entry()? {
                    if labels.insert(key, value).is_some() {
                        return Err(M::Error::custom("a name occurs twice"));
                    }
                }
                Ok(Labels(labels))
            }
        }
        deserializer.deserialize_map(Pairs)
    }
}

/// Reads a body: one JSON object with nothing after it. The rule says what is wrong without revealing the content.
fn read<'a, T: Deserialize<'a>>(body: &'a [u8]) -> Result<T, Rule> {
    serde_json::from_slice(body).map_err(|_| match serde_json::from_slice::<IgnoredAny>(body) {
        Ok(_) => "body_fields",
        Err(_) => "body_json",
    })
}

/// Reads what a create call may create: the container of the agent's settings, with any valid token.
pub(super) fn container(policy: &Policy, body: &[u8]) -> Result<Spec, Rule> {
    let asked: Container = read(body)?;
    let tunnel = &policy.tunnel;
    if asked.image != tunnel.image.to_string() {
        return Err("create_image");
    }
    if asked.cmd != COMMAND {
        return Err("create_command");
    }
    if asked.host_config.network_mode != tunnel.network {
        return Err("create_network");
    }
    if asked.host_config.extra_hosts.as_ref().is_some_and(|[host]| host != HOST_GATEWAY) {
        return Err("create_hosts");
    }
    let host_gateway = asked.host_config.extra_hosts.is_some();
    let (token, metrics, options) = environment(policy, &asked.env)?;
    let mut labels = asked.labels.0;
    let hash = labels.remove(SPEC_LABEL);
    if labels.remove(METRICS_LABEL) != tunnel.metrics_network {
        return Err("create_labels");
    }
    check_labels(policy, &labels)?;
    let network = tunnel.network.clone();
    let spec = Spec { image: asked.image, network, token, options, host_gateway, labels, metrics };
    // The agent would replace a container with an unexpected hash again and again.
    if hash.is_none_or(|hash| hash != spec.hash()) {
        return Err("create_spec_label");
    }
    Ok(spec)
}

type Environment = (Token, Option<MetricsPlace>, BTreeMap<&'static str, String>);

fn environment(policy: &Policy, entries: &[String]) -> Result<Environment, Rule> {
    let (mut token, mut metrics, mut options) = (None, None, BTreeMap::new());
    for entry in entries {
        let (name, value) = entry.split_once('=').ok_or("create_environment")?;
        let is_new = match name {
            "TUNNEL_TOKEN" => token.replace(Token::new(value)).is_none(),
            METRICS_VARIABLE => metrics.replace(metrics_place(policy, value)?).is_none(),
            _ => {
                let name = connector_option(name, value).ok_or("create_environment")?;
                options.insert(name, value.to_owned()).is_none()
            }
        };
        if !is_new {
            return Err("create_environment");
        }
    }
    let (Some(token), Some(metrics)) = (token, metrics) else { return Err("create_environment") };
    if token.claims().is_err() {
        return Err("create_token");
    }
    Ok((token, metrics, options))
}

/// Where the container serves its metrics: under a name on the network for them if there is one, otherwise on all
/// addresses.
fn metrics_place(policy: &Policy, address: &str) -> Result<Option<MetricsPlace>, Rule> {
    let name = address.rsplit_once(':').map(|(name, _)| name).filter(|name| MetricsPlace::is_name(name));
    let is_whole = address == metrics_address(name);
    match (&policy.tunnel.metrics_network, name) {
        (None, None) if is_whole => Ok(None),
        (Some(network), Some(name)) if is_whole => {
            Ok(Some(MetricsPlace { network: network.clone(), name: name.to_owned() }))
        }
        _ => Err("create_environment"),
    }
}

/// Accepts the owner label, and of the others only those that the agent sets.
fn check_labels(policy: &Policy, labels: &BTreeMap<String, String>) -> Result<(), Rule> {
    let is_number = |text: &str| text.parse::<u64>().is_ok_and(|number| number.to_string() == text);
    let fits = labels.iter().all(|(key, value)| match key.as_str() {
        TUNNEL_LABEL => TunnelId::read(value).is_ok_and(|id| id.0 == *value),
        TUNNEL_NAME_LABEL => !value.is_empty() && *value == label_text(value),
        REDEPLOY_LABEL => is_number(value),
        IMAGE_LABEL => is_image_id(value),
        NAME_LABEL => *value == policy.tunnel.container_name,
        // The proxy does not know which agent it serves.
        key => key == OWNER_LABEL.0 && AgentId::try_from(value.clone()).is_ok(),
    });
    if fits && labels.contains_key(OWNER_LABEL.0) { Ok(()) } else { Err("create_labels") }
}

fn is_image_id(text: &str) -> bool {
    let hex = text.strip_prefix("sha256:").filter(|hex| hex.len() == 64);
    hex.is_some_and(|hex| hex.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f')))
}

/// Accepts only the tunnel's network and the one for its metrics, as the agent creates them.
pub(super) fn network(policy: &Policy, body: &[u8]) -> Result<String, Rule> {
    let asked: Network = read(body)?;
    if !policy.is_network(&asked.name) {
        return Err("network_name");
    }
    if asked.internal != policy.is_for_metrics(&asked.name).then_some(true) {
        return Err("network_internal");
    }
    if asked.driver != "bridge" {
        return Err("network_driver");
    }
    if asked.labels.0 != crate::docker::owner_labels() {
        return Err("network_labels");
    }
    Ok(asked.name)
}

/// Reads which container to connect to the network for its metrics, and its name there.
pub(super) fn place(body: &[u8]) -> Result<(String, String), Rule> {
    let Connect { container, endpoint_config } = read(body)?;
    match endpoint_config {
        Some(Joined { aliases: [name] }) if MetricsPlace::is_name(&name) => Ok((container, name)),
        _ => Err("endpoint_aliases"),
    }
}

/// Reads which container to connect, with the alias that marks the connection as the agent's.
pub(super) fn joined(body: &[u8]) -> Result<String, Rule> {
    let Connect { container, endpoint_config } = read(body)?;
    match endpoint_config {
        Some(Joined { aliases: [alias] }) if alias == JOINED => Ok(container),
        _ => Err("endpoint_aliases"),
    }
}

/// Reads which container to connect.
pub(super) fn connect(body: &[u8]) -> Result<String, Rule> {
    let Connect { container, endpoint_config } = read(body)?;
    match endpoint_config {
        Some(Joined { aliases: [alias] }) if alias != JOINED => Err("endpoint_aliases"),
        _ => Ok(container),
    }
}

/// Reads which container to disconnect.
pub(super) fn disconnect(body: &[u8]) -> Result<String, Rule> {
    read(body).map(|Disconnect { container }| container)
}
