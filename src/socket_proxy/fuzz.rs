//! The fuzz targets of the proxy, see [`crate::fuzzing`]: whatever comes in, what the proxy lets through was written
//! here.

use dockflare_engine::proxy::Head;

use super::create;
use super::plan::{Call, Policy, plan};
use crate::config::SocketProxyConfig;
use crate::docker::Spec;

fn policy() -> Option<Policy> {
    let vars = [("AUTO_CONNECT_NETWORKS".to_owned(), "true".to_owned())];
    Some(Policy { tunnel: SocketProxyConfig::from_vars(vars).ok()?.0.tunnel })
}

/// A request: a head up to the first empty line, and a body.
pub(crate) fn request(bytes: &[u8]) {
    let Some(policy) = policy() else { return };
    let end = bytes.windows(4).position(|window| window == b"\r\n\r\n").map_or(bytes.len(), |at| at + 4);
    let (head, body) = bytes.split_at(end);
    let Ok(head) = Head::read(head) else { return };
    assert!(head.path.iter().all(|segment| !["", ".", ".."].contains(&segment.as_str())));
    match plan(&policy, &head, body).map(|planned| planned.call) {
        Ok(Call::Create { name, spec }) => {
            assert!(policy.is_tunnel(&name));
            is_ours(&policy, &spec);
        }
        Ok(Call::Start(name) | Call::Remove(name) | Call::Stop { name, .. } | Call::Restart { name, .. }) => {
            assert!(policy.is_tunnel(&name));
        }
        _ => {}
    }
}

/// The body of a create call.
pub(crate) fn create(body: &[u8]) {
    let Some(policy) = policy() else { return };
    if let Ok(spec) = create::container(&policy, body) {
        is_ours(&policy, &spec);
    }
}

fn is_ours(policy: &Policy, spec: &Spec) {
    assert!(spec.image == policy.tunnel.image.to_string() && spec.network == policy.tunnel.network);
    assert!(spec.token.claims().is_ok());
    assert!(spec.labels.keys().all(|key| key.starts_with("com.dockflare.agent.")));
    assert!(spec.options.iter().all(|(name, value)| crate::config::connector_option(name, value).is_some()));
}
