//! What a tunnel container is made of, and the hash by which one that is there is compared with it.

use std::collections::BTreeMap;

use bollard::models;
use ring::digest;

use crate::config::patience;
use crate::state::Token;

/// Everything a tunnel container is made of. Two specs with the same [`Spec::hash`] make the same container.
#[derive(Debug, Clone, PartialEq)]
pub struct Spec {
    /// Reference of the image.
    pub image: String,
    /// The one network it is on.
    pub network: String,
    /// The connector's token.
    pub token: Token,
    /// Further variables of cloudflared, by name.
    pub options: BTreeMap<&'static str, String>,
    /// Whether it knows this host as `host.docker.internal`.
    pub host_gateway: bool,
    /// Labels that say whose it is.
    pub labels: BTreeMap<String, String>,
}

/// The entry of the container's hosts by which it knows this host. The Engine fills in the address, from 20.10 on.
pub(crate) const HOST_GATEWAY: &str = "host.docker.internal:host-gateway";

/// Label whose value is the hash of the spec.
pub const SPEC_LABEL: &str = "com.dockflare.agent.spec";
/// Label whose value is the id of the tunnel.
pub(crate) const TUNNEL_LABEL: &str = "com.dockflare.agent.tunnel-id";
/// Label whose value is the name of the tunnel, for people: it may change without another container.
pub(crate) const TUNNEL_NAME_LABEL: &str = "com.dockflare.agent.tunnel-name";
/// Label whose value is the number of the redeploy that it was made for.
pub(crate) const REDEPLOY_LABEL: &str = "com.dockflare.agent.redeploy";
/// Label whose value is the name of the tunnel container that it was made for: its own name may have been changed.
pub(crate) const NAME_LABEL: &str = "com.dockflare.agent.container-name";
/// What everything that the agent makes is marked with: key and value. On a container the value is the id of the
/// agent at its master, where that is known; earlier versions did not write it.
pub(crate) const OWNER_LABEL: (&str, &str) = ("com.dockflare.agent.owner", "dockflare-agent");

/// The labels of a thing of which nothing is said but whose it is.
pub(crate) fn owner_labels() -> BTreeMap<String, String> {
    BTreeMap::from([(OWNER_LABEL.0.to_owned(), OWNER_LABEL.1.to_owned())])
}

/// A name as the value of a label: one line of bounded length.
pub(crate) fn label_text(name: &str) -> String {
    name.chars().filter(|c| !c.is_control()).take(MOST_NAME).collect()
}

const MOST_NAME: usize = 128;

/// What a tunnel container runs, after its image's entry point.
pub(crate) const COMMAND: [&str; 3] = ["tunnel", "--no-autoupdate", "run"];

/// The variable that tells cloudflared where to serve its metrics, with its value.
pub(crate) fn metrics_variable() -> String {
    format!("TUNNEL_METRICS=0.0.0.0:{METRICS_PORT}")
}

/// Where cloudflared serves `/ready` and `/metrics`. Pinned, since left alone it moves when the port is taken.
pub const METRICS_PORT: u16 = 20241;

impl Spec {
    /// SHA-256 over everything that the container is made of, the token included, as lower-case hex.
    ///
    /// Not over whose it is, what it was called and what its tunnel is called: an agent that was given another id, or
    /// whose container was made by an earlier version, goes on with the container that it has.
    pub fn hash(&self) -> String {
        let mut plain = self.plain_body();
        if let Some(labels) = &mut plain.labels {
            labels.remove(NAME_LABEL);
            labels.remove(TUNNEL_NAME_LABEL);
            labels.entry(OWNER_LABEL.0.to_owned()).and_modify(|owner| OWNER_LABEL.1.clone_into(owner));
        }
        let plain = serde_json::to_string(&serde_json::to_value(plain).unwrap_or_default());
        let digest = digest::digest(&digest::SHA256, plain.unwrap_or_default().as_bytes());
        digest.as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// The same over HTTP/2, where that is not what it asks for anyway: there cloudflared says why it is refused, and
    /// serves where only QUIC is at fault.
    pub(crate) fn over_http2(&self) -> Option<Self> {
        const PROTOCOL: &str = "TUNNEL_TRANSPORT_PROTOCOL";
        if self.options.get(PROTOCOL).is_some_and(|protocol| protocol == "http2") {
            return None;
        }
        let mut spec = self.clone();
        // Needs QUIC.
        spec.options.retain(|name, value| *name != "TUNNEL_POST_QUANTUM" || value != "true");
        spec.options.insert(PROTOCOL, "http2".to_owned());
        Some(spec)
    }

    /// The body of the create call.
    pub(super) fn body(&self) -> models::ContainerCreateBody {
        let mut body = self.plain_body();
        body.labels.get_or_insert_default().insert(SPEC_LABEL.to_owned(), self.hash());
        body
    }

    /// The same, as it is written.
    #[cfg(test)]
    pub(crate) fn body_for_tests(&self) -> serde_json::Value {
        serde_json::to_value(self.body()).unwrap_or_default()
    }

    fn plain_body(&self) -> models::ContainerCreateBody {
        let words = |list: &[&str]| Some(list.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>());
        let seconds = |n: i64| Some(n * 1_000_000_000);
        let mut env = vec![format!("TUNNEL_TOKEN={}", self.token.expose()), metrics_variable()];
        env.extend(self.options.iter().map(|(name, value)| format!("{name}={value}")));
        models::ContainerCreateBody {
            image: Some(self.image.clone()),
            cmd: words(&COMMAND),
            env: Some(env),
            labels: Some(self.labels.clone().into_iter().collect()),
            stop_timeout: i64::try_from(patience(&self.options).as_secs()).ok(),
            // Docker asks cloudflared itself, so nobody needs the right to execute anything in the container.
            healthcheck: Some(models::HealthConfig {
                test: words(&[
                    "CMD",
                    "cloudflared",
                    "tunnel",
                    "--metrics",
                    &format!("127.0.0.1:{METRICS_PORT}"),
                    "ready",
                ]),
                interval: seconds(15),
                timeout: seconds(5),
                start_period: seconds(15),
                // From Engine 25 on: each second until it is first ready. Older ones do not know it.
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
                // Threads count: Go makes one for each call that blocks.
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
            // Enough of them that an order left to chance would show.
            labels: ('a'..='p').map(|key| (key.to_string(), "1".to_owned())).collect(),
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
