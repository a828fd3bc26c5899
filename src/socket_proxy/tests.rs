//! What the agent sends is let through, and does what it should; the attacks are in `attacks`.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::StreamExt;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use tokio::net::{TcpListener, UnixListener};

use super::plan::{Call, Policy, Subject, plan};
use super::refusals::Refusals;
use super::request::Head;
use super::server::Service;
use super::*;
use crate::config::SocketProxyConfig;
use crate::docker::{REDEPLOY_LABEL, Spec, TUNNEL_LABEL, owner_labels};
use crate::labels::ENABLE_KEYS;
use crate::state::Token;
use crate::state::testing::token;

/// Full id of a container.
pub(super) const ID: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

/// The policy of default settings that connects networks.
pub(super) fn policy() -> Policy {
    let vars = [("AUTO_CONNECT_NETWORKS", "true")].map(|(name, value)| (name.to_owned(), value.to_owned()));
    Policy { tunnel: SocketProxyConfig::from_vars(vars).unwrap().0.tunnel }
}

/// What the agent would make of the policy's settings.
pub(super) fn spec() -> Spec {
    let tunnel = policy().tunnel;
    let mut labels = owner_labels();
    labels.insert(REDEPLOY_LABEL.to_owned(), "3".to_owned());
    labels.insert(TUNNEL_LABEL.to_owned(), "t1".to_owned());
    Spec {
        image: tunnel.image.to_string(),
        network: tunnel.network,
        token: Token::new(token("t1")),
        options: BTreeMap::from([("TUNNEL_REGION", "us".to_owned())]),
        labels,
    }
}

/// Head and body of a request that is there as bytes.
pub(super) fn taken_apart(bytes: &[u8]) -> (&[u8], &[u8]) {
    let end = bytes.windows(4).position(|window| window == b"\r\n\r\n").unwrap() + 4;
    bytes.split_at(end)
}

/// A Docker that answers everything with an error and notes what it was sent.
async fn recorder() -> (crate::docker::Docker, Arc<Mutex<Vec<Vec<u8>>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let docker = crate::docker::Docker::new(DockerHost::Http(listener.local_addr().unwrap().to_string()));
    let requests = Arc::new(Mutex::new(Vec::new()));
    let noted = requests.clone();
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = Vec::new();
            while stream.read_buf(&mut request).await.unwrap() > 0 {
                let Some(end) = request.windows(4).position(|window| window == b"\r\n\r\n") else { continue };
                let head = String::from_utf8_lossy(&request[..end]).to_ascii_lowercase();
                let length = head.split("content-length: ").nth(1).and_then(|rest| rest.lines().next()?.parse().ok());
                if request.len() >= end + 4 + length.unwrap_or(0) {
                    break;
                }
            }
            noted.lock().unwrap().push(request);
            let _ = stream.write_all(b"HTTP/1.1 500 No\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}").await;
        }
    });
    (docker, requests)
}

#[tokio::test]
async fn each_call_that_the_agent_makes_is_planned_as_what_it_is() {
    let (docker, requests) = recorder().await;
    let tunnel = policy().tunnel;
    let (name, next) = (tunnel.container_name.as_str(), tunnel.successor_name());
    let grace = Duration::from_secs(35);
    let _ = docker.ping().await;
    let _ = docker.is_desktop().await;
    let _ = docker.list_with_label_keys(&ENABLE_KEYS[..1]).await;
    let _ = docker.list_running().await;
    drop(docker.events(None).unwrap().next().await);
    drop(docker.events(Some("1700000000.000000042".into())).unwrap().next().await);
    let _ = docker.inspect(name).await;
    let _ = docker.inspect(ID).await;
    let _ = docker.inspect(&ID[..12]).await;
    let _ = docker.log_start(name, 1_700_000_000, 50).await;
    let _ = docker.log_tail(&next, 0, 30).await;
    let _ = docker.has_network(&tunnel.network).await;
    let _ = docker.create_network(&tunnel.network, &owner_labels()).await;
    let _ = docker.connect("app_default", name).await;
    let _ = docker.has_image(&tunnel.image).await;
    let _ = docker.pull(&tunnel.image, |_, _| {}).await;
    let _ = docker.create(&next, &spec()).await;
    let _ = docker.start(&next).await;
    let _ = docker.stop(name, grace).await;
    let _ = docker.stop_self(ID).await;
    let _ = docker.restart(name, grace).await;
    let _ = docker.rename(&next, name).await;
    let _ = docker.remove(name).await;
    let owned = str::to_owned;
    let expected = [
        Call::Ping,
        Call::Version,
        Call::List(Some("dockflare.enable")),
        Call::List(None),
        Call::Events(None),
        Call::Events(Some(owned("1700000000.000000042"))),
        Call::Inspect(Subject::Named(owned(name))),
        Call::Inspect(Subject::Id(owned(ID))),
        Call::Inspect(Subject::Start(owned(&ID[..12]))),
        Call::Logs { name: owned(name), since: 1_700_000_000, last: None },
        Call::Logs { name: next.clone(), since: 0, last: Some(30) },
        Call::Network,
        Call::NewNetwork,
        Call::Connect { network: owned("app_default"), name: owned(name) },
        Call::Image,
        Call::Pull,
        Call::Create { name: next.clone(), spec: Box::new(spec()) },
        Call::Start(next.clone()),
        Call::Stop { name: owned(name), seconds: 35 },
        Call::StopSelf(owned(ID)),
        Call::Restart { name: owned(name), seconds: 35 },
        Call::Rename,
        Call::Remove(owned(name)),
    ];
    let requests = requests.lock().unwrap();
    assert_eq!(requests.len(), expected.len());
    for (request, expected) in requests.iter().zip(expected) {
        let text = String::from_utf8_lossy(request);
        let (head, body) = taken_apart(request);
        let head = Head::read(head).unwrap_or_else(|refusal| panic!("{refusal:?}: {text}"));
        let call = plan(&policy(), &head, body).unwrap_or_else(|refusal| panic!("{refusal:?}: {text}"));
        assert_eq!(call, expected, "{text}");
    }
}
