//! The spec of a tunnel container, and the hash that compares it with an existing container.

use std::collections::BTreeMap;

use bollard::models;
use ring::digest;

use crate::config::patience;
use crate::state::Token;

/// Everything that defines a tunnel container. Two specs with the same [`Spec::hash`] create the same container.
#[derive(Debug, Clone, PartialEq)]
pub struct Spec {
    /// Reference of the image.
    pub image: String,
    /// The network that it is created on.
    pub network: String,
    /// The connector's token.
    pub token: Token,
    /// Other cloudflared variables, by name.
    pub options: BTreeMap<&'static str, String>,
    /// Whether the container resolves `host.docker.internal` to this host.
    pub host_gateway: bool,
    /// Labels that name its owner.
    pub labels: BTreeMap<String, String>,
    /// The only network that serves its metrics; `None` if all of its networks do.
    pub metrics: Option<MetricsPlace>,
}

/// The container's place on the only network that serves its metrics. cloudflared listens on the address that the
/// container's name there resolves to. If a restart changes that address, the name still finds it, so no setting holds
/// an address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MetricsPlace {
    /// Name of the network.
    pub network: String,
    /// The container's name there, and nowhere else. Each container has its own, because a container and its successor
    /// are on that network together. It is hard to guess, so that no neighbor on another network can take it.
    pub name: String,
}

impl MetricsPlace {
    /// Creates a place with a name that no container has had.
    pub(crate) fn new(network: String) -> Self {
        Self { network, name: format!("{METRICS_NAME}{:032x}", fastrand::u128(..)) }
    }

    /// Whether [`MetricsPlace::new`] could have created this name.
    pub(crate) fn is_name(name: &str) -> bool {
        let random = name.strip_prefix(METRICS_NAME);
        random.is_some_and(|hex| hex.len() == 32 && hex.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f')))
    }
}

/// Prefix of the names by which cloudflared finds the address for its metrics.
const METRICS_NAME: &str = "dockflare-agent-metrics-";

/// The `ExtraHosts` entry that lets the container resolve this host. The Engine fills in the address, from 20.10 on.
pub(crate) const HOST_GATEWAY: &str = "host.docker.internal:host-gateway";

/// Label whose value is the hash of the spec.
pub const SPEC_LABEL: &str = "com.dockflare.agent.spec";
/// Label whose value is the id of the tunnel.
pub(crate) const TUNNEL_LABEL: &str = "com.dockflare.agent.tunnel-id";
/// Label whose value is the name of the tunnel, for people. It may change without a new container.
pub(crate) const TUNNEL_NAME_LABEL: &str = "com.dockflare.agent.tunnel-name";
/// Label whose value is the number of the redeploy that created the container.
pub(crate) const REDEPLOY_LABEL: &str = "com.dockflare.agent.redeploy";
/// Label whose value is the name of the tunnel container that it was created as: the container may have been renamed.
pub(crate) const NAME_LABEL: &str = "com.dockflare.agent.container-name";
/// Label whose value is the network that serves its metrics, if there is one.
pub(crate) const METRICS_LABEL: &str = "com.dockflare.agent.metrics-network";
/// Label whose value is the id of the image that it was created from, if the image's tag may move: another id makes
/// another spec.
pub(crate) const IMAGE_LABEL: &str = "com.dockflare.agent.image-id";
/// Key and value of the label on everything that the agent creates. On a container, the value is the agent's id at its
/// master, if that is known. Earlier versions did not write the id.
pub(crate) const OWNER_LABEL: (&str, &str) = ("com.dockflare.agent.owner", "dockflare-agent");

/// The labels of an object that needs none but its owner.
pub(crate) fn owner_labels() -> BTreeMap<String, String> {
    BTreeMap::from([(OWNER_LABEL.0.to_owned(), OWNER_LABEL.1.to_owned())])
}

/// A name as the value of a label: one line of at most 128 characters.
pub(crate) fn label_text(name: &str) -> String {
    name.chars().filter(|c| !c.is_control()).take(MOST_NAME).collect()
}

const MOST_NAME: usize = 128;

/// The command of a tunnel container, after its image's entry point.
pub(crate) const COMMAND: [&str; 3] = ["tunnel", "--no-autoupdate", "run"];

/// The variable that sets the address on which cloudflared serves its metrics.
pub(crate) const METRICS_VARIABLE: &str = "TUNNEL_METRICS";

/// The value of [`METRICS_VARIABLE`]: all addresses of the container, or the one that this name resolves to.
pub(crate) fn metrics_address(name: Option<&str>) -> String {
    format!("{}:{METRICS_PORT}", name.unwrap_or("0.0.0.0"))
}

/// Port on which cloudflared serves `/ready` and `/metrics`. Pinned, because by default cloudflared moves to another
/// port if this one is taken.
pub const METRICS_PORT: u16 = 20241;

impl Spec {
    /// SHA-256 over everything that defines the container, the token included, as lower-case hex.
    ///
    /// It leaves out the owner, the container's name and the tunnel's name: an agent that was given another id, or
    /// whose container an earlier version created, keeps the container that it has. It also leaves out the name for the
    /// metrics, which changes each time.
    pub fn hash(&self) -> String {
        let mut plain = self.plain_body("");
        if let Some(labels) = &mut plain.labels {
            labels.remove(NAME_LABEL);
            labels.remove(TUNNEL_NAME_LABEL);
            labels.entry(OWNER_LABEL.0.to_owned()).and_modify(|owner| OWNER_LABEL.1.clone_into(owner));
        }
        let plain = serde_json::to_string(&serde_json::to_value(plain).unwrap_or_default());
        let digest = digest::digest(&digest::SHA256, plain.unwrap_or_default().as_bytes());
        digest.as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// The same spec over HTTP/2, or `None` if it uses that already. Over HTTP/2, cloudflared says why it is refused,
    /// and serves if only QUIC is at fault.
    pub(crate) fn over_http2(&self) -> Option<Self> {
        const PROTOCOL: &str = "TUNNEL_TRANSPORT_PROTOCOL";
        if self.options.get(PROTOCOL).is_some_and(|protocol| protocol == "http2") {
            return None;
        }
        let mut spec = self.clone();
        // Post-quantum needs QUIC.
        spec.options.retain(|name, value| *name != "TUNNEL_POST_QUANTUM" || value != "true");
        spec.options.insert(PROTOCOL, "http2".to_owned());
        Some(spec)
    }

    /// The body of the create call.
    pub(super) fn body(&self) -> models::ContainerCreateBody {
        let mut body = self.plain_body(self.metrics.as_ref().map_or("", |place| &place.name));
        body.labels.get_or_insert_default().insert(SPEC_LABEL.to_owned(), self.hash());
        body
    }

    /// The body of the create call as JSON.
    #[cfg(test)]
    pub(crate) fn body_for_tests(&self) -> serde_json::Value {
        serde_json::to_value(self.body()).unwrap_or_default()
    }

    /// The body without the spec label, and with this name for its metrics if it has a place for them.
    fn plain_body(&self, name: &str) -> models::ContainerCreateBody {
        let name = self.metrics.as_ref().map(|_| name);
        let mut labels = self.labels.clone();
        labels.extend(self.metrics.iter().map(|place| (METRICS_LABEL.to_owned(), place.network.clone())));
        let words = |list: &[&str]| Some(list.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>());
        let seconds = |n: i64| Some(n * 1_000_000_000);
        let mut env = vec![
            format!("TUNNEL_TOKEN={}", self.token.expose()),
            format!("{METRICS_VARIABLE}={}", metrics_address(name)),
        ];
        env.extend(self.options.iter().map(|(name, value)| format!("{name}={value}")));
        models::ContainerCreateBody {
            image: Some(self.image.clone()),
            cmd: words(&COMMAND),
            env: Some(env),
            labels: Some(labels.into_iter().collect()),
            stop_timeout: i64::try_from(patience(&self.options).as_secs()).ok(),
            // Docker runs the check itself, so nobody needs the right to execute anything in the container.
            healthcheck: Some(models::HealthConfig {
                test: words(&[
                    "CMD",
                    "cloudflared",
                    "tunnel",
                    "--metrics",
                    &metrics_address(Some(name.unwrap_or("127.0.0.1"))),
                    "ready",
                ]),
                interval: seconds(15),
                timeout: seconds(5),
                start_period: seconds(15),
                // From Engine 25 on, checks every second until it is first ready. Older Engines ignore it.
                start_interval: seconds(1),
                retries: Some(3),
            }),
            host_config: Some(models::HostConfig {
                network_mode: Some(self.network.clone()),
                restart_policy: Some(models::RestartPolicy {
                    name: Some(models::RestartPolicyNameEnum::UNLESS_STOPPED),
                    ..Default::default()
                }),
                log_config: Some(models::HostConfigLogConfig {
                    typ: Some("json-file".to_owned()),
                    config: Some([("max-size", "10m"), ("max-file", "3")].map(|(k, v)| (k.into(), v.into())).into()),
                }),
                extra_hosts: self.host_gateway.then(|| vec![HOST_GATEWAY.to_owned()]),
                cap_drop: words(&["ALL"]),
                security_opt: words(&["no-new-privileges:true"]),
                readonly_rootfs: Some(true),
                // Threads count too: Go starts one for each blocking call.
                pids_limit: Some(512),
                ..Default::default()
            }),
            ..Default::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> Spec {
        Spec {
            image: "cloudflare/cloudflared:1".into(),
            network: "net".into(),
            token: Token::new("s3cret"),
            options: BTreeMap::from([("TUNNEL_REGION", "us".to_owned())]),
            host_gateway: true,
            // Enough labels that a random order would show.
            labels: ('a'..='p').map(|key| (key.to_string(), "1".to_owned())).collect(),
            metrics: None,
        }
    }

    fn placed(network: &str) -> Spec {
        Spec { metrics: Some(MetricsPlace::new(network.into())), ..spec() }
    }

    #[test]
    fn a_spec_without_a_network_for_its_metrics_has_the_hash_that_earlier_versions_gave_it() {
        assert_eq!(spec().hash(), "f4bf469a1fe44b8c73ea417f41f5ce9857284a2b4b3034f52eb8bf9fafe1e791");
    }

    #[test]
    fn metrics_on_a_network_of_their_own_are_served_and_asked_for_under_a_name_there() {
        let (one, other) = (placed("metrics"), placed("metrics"));
        let name = one.metrics.clone().unwrap().name;
        assert!(MetricsPlace::is_name(&name) && one.metrics != other.metrics, "each container has its own");
        assert_eq!(one.hash(), other.hash(), "which makes it no other container");
        assert_ne!(one.hash(), spec().hash());
        assert_ne!(one.hash(), placed("metrics2").hash());
        let (body, plain) = (one.body_for_tests(), spec().body_for_tests());
        let at = format!("{name}:20241");
        assert_eq!(body["Env"][1], format!("TUNNEL_METRICS={at}"));
        assert_eq!(body["Healthcheck"]["Test"][4], at);
        assert_eq!(body["Labels"][METRICS_LABEL], "metrics");
        assert_eq!(body["HostConfig"], plain["HostConfig"], "it begins on the tunnel's network");
        assert_eq!(plain["Env"][1], "TUNNEL_METRICS=0.0.0.0:20241");
        assert_eq!(plain["Labels"].get(METRICS_LABEL), None);
        for wrong in ["", "web", "dockflare-agent-metrics-", "dockflare-agent-metrics-0123", &name.to_uppercase()] {
            assert!(!MetricsPlace::is_name(wrong), "{wrong}");
        }
    }

    #[test]
    fn the_hash_changes_with_every_part_and_with_nothing_else() {
        let base = spec().hash();
        assert_eq!(base, spec().hash());
        assert_eq!(base.len(), 64);
        let changes: [fn(&mut Spec); 7] = [
            |spec| spec.image.push('2'),
            |spec| spec.network.push('2'),
            |spec| spec.token = Token::new("other"),
            |spec| spec.host_gateway = false,
            |spec| drop(spec.options.insert("TUNNEL_GRACE_PERIOD", "90s".into())),
            |spec| drop(spec.options.insert("TUNNEL_LOGLEVEL", "debug".into())),
            |spec| drop(spec.labels.insert("z".into(), "3".into())),
        ];
        for (number, change) in changes.into_iter().enumerate() {
            let mut changed = spec();
            change(&mut changed);
            assert_ne!(changed.hash(), base, "change {number}");
        }
    }

    #[test]
    fn whose_it_is_does_not_change_the_hash() {
        let mut earlier = spec();
        earlier.labels.extend(owner_labels());
        let mut ours = spec();
        ours.labels.insert(OWNER_LABEL.0.into(), "agent-1".into());
        ours.labels.insert(NAME_LABEL.into(), "tunnel".into());
        assert_eq!(ours.hash(), earlier.hash());
        assert_eq!(ours.body_for_tests()["Labels"][OWNER_LABEL.0], "agent-1");
    }

    #[test]
    fn the_container_can_do_as_little_as_cloudflared_needs() {
        let body = serde_json::to_value(spec().body()).unwrap();
        let host = &body["HostConfig"];
        assert_eq!(host["CapDrop"], serde_json::json!(["ALL"]));
        assert_eq!(host["SecurityOpt"], serde_json::json!(["no-new-privileges:true"]));
        assert_eq!(host["ReadonlyRootfs"], true);
        assert_eq!(host["RestartPolicy"]["Name"], "unless-stopped");
        assert_eq!(body["Cmd"], serde_json::json!(["tunnel", "--no-autoupdate", "run"]));
        for dangerous in ["Binds", "Mounts", "Privileged", "Devices", "CapAdd", "PidMode", "PortBindings"] {
            assert!(host.get(dangerous).is_none(), "{dangerous}");
        }
        assert_eq!(body["Labels"][SPEC_LABEL], spec().hash());
        assert_eq!(
            (&body["StopTimeout"], &host["ExtraHosts"]),
            (&serde_json::json!(35), &serde_json::json!([HOST_GATEWAY]))
        );
        let mut other = Spec { host_gateway: false, ..spec() };
        other.options.insert("TUNNEL_GRACE_PERIOD", "90s".into());
        let body = other.body_for_tests();
        assert_eq!((&body["StopTimeout"], body["HostConfig"].get("ExtraHosts")), (&serde_json::json!(95), None));
    }
}
