//! The proxy lets through what the agent sends, and each call does what it should. The attacks are in `attacks`.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use dockflare_engine::proxy::listen::{MOST_CONNECTIONS, MOST_OF_ONE_PEER};
use futures_util::StreamExt;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};
use tokio::net::TcpListener;
use tokio::time::timeout;

use super::plan::{Call, Policy, Subject, plan};
use super::*;
use crate::config::SocketProxyConfig;
use crate::docker::{METRICS_LABEL, MetricsPlace, REDEPLOY_LABEL, Spec, TUNNEL_LABEL, owner_labels};
use crate::labels::ENABLE_KEYS;
use crate::state::testing::token;
use crate::state::{AgentId, Token};

fn agent(id: &str) -> AgentId {
    AgentId::try_from(id.to_owned()).unwrap()
}

/// Full id of a container.
pub(super) const ID: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

/// The policy of the default settings, with `AUTO_CONNECT_NETWORKS` on.
pub(super) fn policy() -> Policy {
    let vars = [("AUTO_CONNECT_NETWORKS", "true")].map(|(name, value)| (name.to_owned(), value.to_owned()));
    Policy { tunnel: SocketProxyConfig::from_vars(vars).unwrap().0.tunnel }
}

/// The spec that the agent would create from the policy's settings.
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
        host_gateway: true,
        labels,
        metrics: None,
    }
}

/// The same policy with a network for the metrics, the spec that the agent would then create, and its place there.
fn with_metrics_network() -> (Policy, Spec, MetricsPlace) {
    let mut policy = policy();
    policy.tunnel.metrics_network = Some("metrics".to_owned());
    let place = MetricsPlace::new("metrics".to_owned());
    (policy, Spec { metrics: Some(place.clone()), ..spec() }, place)
}

/// Splits the bytes of a request into head and body.
pub(super) fn taken_apart(bytes: &[u8]) -> (&[u8], &[u8]) {
    let end = bytes.windows(4).position(|window| window == b"\r\n\r\n").unwrap() + 4;
    bytes.split_at(end)
}

/// A Docker that answers everything with an error and records each request.
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
    let _ = docker.version().await;
    let _ = docker.host_name().await;
    let _ = docker.list_with_label_keys(&ENABLE_KEYS[..1]).await;
    let _ = docker.list_running().await;
    let _ = docker.list_made().await;
    drop(docker.events(None).unwrap().next().await);
    drop(docker.events(Some("1700000000.000000042".into())).unwrap().next().await);
    let _ = docker.inspect(name).await;
    let _ = docker.inspect(ID).await;
    let _ = docker.inspect(&ID[..12]).await;
    let _ = docker.log_start(ID, 1_700_000_000, 50).await;
    let _ = docker.log_tail(ID, 0, 30).await;
    let _ = docker.has_network(&tunnel.network).await;
    let _ = docker.create_network(&tunnel.network, false, &owner_labels()).await;
    let _ = docker.connect("app_default", ID).await;
    let _ = docker.disconnect("app_default", ID).await;
    let _ = docker.has_image(&tunnel.image).await;
    let _ = docker.pull(&tunnel.image, |_, _| {}).await;
    let _ = docker.create(&next, &spec()).await;
    let _ = docker.start(ID).await;
    let _ = docker.stop(ID, grace).await;
    let _ = docker.stop_self(ID).await;
    let _ = docker.restart(ID, grace).await;
    let _ = docker.rename(ID, name).await;
    let _ = docker.remove(ID).await;
    let _ = docker.goodbye(Duration::from_secs(60), &[agent("a1"), agent("a.2")]).await;
    let owned = str::to_owned;
    let expected = [
        Call::Ping,
        Call::Version,
        Call::HostName,
        Call::List(Some("dockflare.enable")),
        Call::List(None),
        Call::Made,
        Call::Events(None),
        Call::Events(Some(owned("1700000000.000000042"))),
        Call::Inspect(Subject::Named(owned(name))),
        Call::Inspect(Subject::Id(owned(ID))),
        Call::Inspect(Subject::Start(owned(&ID[..12]))),
        Call::Logs { id: owned(ID), since: 1_700_000_000, last: None },
        Call::Logs { id: owned(ID), since: 0, last: Some(30) },
        Call::Network(tunnel.network.clone()),
        Call::NewNetwork(tunnel.network.clone()),
        Call::Connect { network: owned("app_default"), id: owned(ID) },
        Call::Disconnect { network: owned("app_default"), id: owned(ID) },
        // Checks whether the connection exists after all.
        Call::Inspect(Subject::Id(owned(ID))),
        Call::Image,
        Call::Pull,
        Call::Create { name: next.clone(), spec: Box::new(spec()) },
        Call::Start(owned(ID)),
        Call::Stop { id: owned(ID), seconds: 35 },
        Call::StopSelf(owned(ID)),
        Call::Restart { id: owned(ID), seconds: 35 },
        Call::Rename(owned(ID)),
        Call::Remove(owned(ID)),
        Call::Goodbye { seconds: 60, agents: vec![agent("a1"), agent("a.2")] },
    ];
    let requests = requests.lock().unwrap();
    assert_eq!(requests.len(), expected.len());
    for (request, expected) in requests.iter().zip(expected) {
        let text = String::from_utf8_lossy(request);
        let (head, body) = taken_apart(request);
        let head = Head::read(head).unwrap_or_else(|refusal| panic!("{refusal:?}: {text}"));
        let planned = plan(&policy(), &head, body).unwrap_or_else(|refusal| panic!("{refusal:?}: {text}"));
        assert_eq!(planned.call, expected, "{text}");
    }
}

#[tokio::test]
async fn a_network_for_the_metrics_is_made_and_joined_and_only_with_that_setting() {
    let (docker, requests) = recorder().await;
    let (policy, spec, place) = with_metrics_network();
    let _ = docker.has_network("metrics").await;
    let _ = docker.create_network("metrics", true, &owner_labels()).await;
    let _ = docker.create("dockflare-agent-tunnel-next", &spec).await;
    let _ = docker.place(&place, ID).await;
    let next = policy.tunnel.successor_name();
    let expected = [
        (Call::Network("metrics".to_owned()), "network_name"),
        (Call::NewNetwork("metrics".to_owned()), "network_name"),
        (Call::Create { name: next, spec: Box::new(spec.clone()) }, "create_environment"),
        (Call::Place { id: ID.to_owned(), place: place.clone() }, "endpoint_aliases"),
    ];
    let requests = requests.lock().unwrap();
    assert_eq!(requests.len(), expected.len());
    for (request, (expected, rule)) in requests.iter().zip(expected) {
        let (head, body) = taken_apart(request);
        let head = Head::read(head).unwrap();
        assert_eq!(plan(&policy, &head, body).unwrap().call, expected);
        assert_eq!(plan(&super::tests::policy(), &head, body).unwrap_err().rule, rule, "{expected:?}");
    }
}

#[test]
fn what_differs_from_the_agents_own_place_for_the_metrics_is_refused() {
    let (policy, spec, place) = with_metrics_network();
    let refused = |path: &str, body: &serde_json::Value| {
        let (method, path) = path.split_once(' ').unwrap();
        let body = body.to_string();
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: d\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
            body.len()
        );
        plan(&policy, &Head::read(head.as_bytes()).unwrap(), body.as_bytes()).map_err(|refusal| refusal.rule)
    };
    let create = "POST /containers/create?name=dockflare-agent-tunnel";
    assert!(refused(create, &spec.body_for_tests()).is_ok());
    let metrics = |value: &str| {
        let mut body = spec.body_for_tests();
        body["Env"][1] = format!("TUNNEL_METRICS={value}").into();
        refused(create, &body).unwrap_err()
    };
    let name = &place.name;
    for wrong in ["0.0.0.0:20241", "web:20241", &format!("{name}:80"), name, &format!("{name}0:20241"), ""] {
        assert_eq!(metrics(wrong), "create_environment", "{wrong}");
    }
    for label in [serde_json::Value::Null, "net".into()] {
        let mut body = spec.body_for_tests();
        match label {
            serde_json::Value::Null => drop(body["Labels"].as_object_mut().unwrap().remove(METRICS_LABEL)),
            other => body["Labels"][METRICS_LABEL] = other,
        }
        assert_eq!(refused(create, &body).unwrap_err(), "create_labels");
    }
    let connect = |network: &str, alias: &str| {
        let body = serde_json::json!({ "Container": ID, "EndpointConfig": { "Aliases": [alias] } });
        refused(&format!("POST /networks/{network}/connect"), &body).map(|planned| planned.call)
    };
    assert!(matches!(connect("metrics", name), Ok(Call::Place { .. })));
    // The agent's own container, which the proxy inspects before it makes the call.
    let own = Call::Connect { network: "metrics".to_owned(), id: ID.to_owned() };
    assert_eq!(connect("metrics", crate::docker::JOINED), Ok(own));
    for (network, alias) in [("metrics", "web"), ("app", name), ("cloudflare-net", name)] {
        assert_eq!(connect(network, alias), Err("endpoint_aliases"), "{network} {alias}");
    }
    let bare = serde_json::json!({ "Container": ID });
    assert_eq!(refused("POST /networks/metrics/connect", &bare).unwrap_err(), "endpoint_aliases");
    let leave = Call::Leave { network: "metrics".to_owned(), id: ID.to_owned() };
    assert_eq!(refused("POST /networks/metrics/disconnect", &bare).map(|planned| planned.call), Ok(leave));
    let network = |name: &str, internal: bool| {
        let body =
            serde_json::json!({ "Name": name, "Driver": "bridge", "Internal": internal, "Labels": owner_labels() });
        refused("POST /networks/create", &body).map(|planned| planned.call)
    };
    assert!(network("metrics", true).is_ok());
    assert_eq!(network("metrics", false), Err("network_internal"));
    assert_eq!(network("cloudflare-net", true), Err("network_internal"));
    assert_eq!(network("other", true), Err("network_name"));
}

#[path = "../../tests/support/attacks.rs"]
mod attacks;

/// Calls `make` with a target for the policy's settings.
fn of_target<T>(make: impl FnOnce(&attacks::Target<'_>) -> T) -> T {
    let tunnel = policy().tunnel;
    let image = tunnel.image.to_string();
    let body = spec().body_for_tests();
    make(&attacks::Target {
        tunnel: &tunnel.container_name,
        network: &tunnel.network,
        image: &image,
        victim: "victim",
        id: ID,
        body,
    })
}

/// Sends these bytes to the service and returns its whole answer.
async fn answer_to(service: &Service<AgentProxy>, bytes: &[u8]) -> String {
    let (mut client, server) = duplex(1 << 20);
    client.write_all(bytes).await.unwrap();
    let talk = async {
        let mut answer = String::new();
        client.read_to_string(&mut answer).await.unwrap();
        // The client closes when it has its answer.
        drop(client);
        answer
    };
    let (served, answer) = tokio::join!(service.serve(server), talk);
    // The writer of a stream may see that the client closed.
    let _ = served;
    answer
}

fn service(docker: crate::docker::Docker) -> Service<AgentProxy> {
    let leases = Leases::open("dockflare-agent-tunnel", None);
    Service { proxy: AgentProxy { docker: Arc::new(docker), policy: policy(), leases }, refusals: Refusals::default() }
}

#[tokio::test]
async fn every_attack_is_refused_by_its_rule_and_nothing_is_forwarded() {
    let (docker, requests) = recorder().await;
    let service = service(docker);
    let attacks = of_target(attacks::attacks);
    let mut wrong = Vec::new();
    for attack in &attacks {
        let answer = answer_to(&service, &attack.bytes).await;
        let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_default();
        let expected = json!({ "message": format!("{}: {}", crate::docker::OWN_REFUSAL, attack.rule) });
        let is_refusal = head.starts_with("HTTP/1.1 4") || head.starts_with("HTTP/1.1 505");
        if !is_refusal || serde_json::from_str::<serde_json::Value>(body).ok() != Some(expected) {
            wrong.push(format!("{}: {} instead of {}", attack.name, body, attack.rule));
        }
    }
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), attacks.len(), wrong.join("\n"));
    assert!(attacks.len() > 500, "{}", attacks.len());
    println!("{} attacks", attacks.len());
    let forwarded = requests.lock().unwrap();
    assert!(forwarded.is_empty(), "{:?}", String::from_utf8_lossy(&forwarded[0]));
}

/// `TEST_SEED` repeats a run, and `TEST_MUTATIONS` sets the number of mutations.
#[tokio::test]
async fn whatever_becomes_of_a_request_docker_is_asked_for_nothing_that_the_agent_may_not_ask() {
    let seed = testkit::number("TEST_SEED", fastrand::u64(..));
    let count = testkit::number("TEST_MUTATIONS", 3000) as usize;
    println!("TEST_SEED={seed} TEST_MUTATIONS={count}");
    let (docker, requests) = recorder().await;
    let service = service(docker);
    let own = ID.replace('0', "f");
    let mut forwarded = 0;
    for bytes in of_target(|target| attacks::mutated(target, &own, seed, count).collect::<Vec<_>>()) {
        let sent = String::from_utf8_lossy(&bytes);
        // Docker answers each with an error, so nothing lasts.
        let answer = timeout(Duration::from_secs(20), cut_answer(&service, &bytes)).await.expect(&sent);
        assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 "), "{sent:?}: {answer:?}");
        for asked in requests.lock().unwrap().drain(..) {
            forwarded += 1;
            let (head, body) = taken_apart(&asked);
            let allowed = Head::read(head).and_then(|head| plan(&policy(), &head, body));
            assert!(allowed.is_ok(), "{sent:?} became {:?}: {allowed:?}", String::from_utf8_lossy(&asked));
        }
    }
    println!("{forwarded} calls to Docker");
    assert!(forwarded > count / 100, "the mutations get nowhere: {forwarded} of {count}");
}

/// Like [`answer_to`], but for requests that may be cut off: the client sends nothing more and does not wait for the
/// rest.
async fn cut_answer(service: &Service<AgentProxy>, bytes: &[u8]) -> String {
    let (mut client, server) = duplex(1 << 20);
    client.write_all(bytes).await.unwrap();
    let whole = bytes.windows(4).any(|four| four == b"\r\n\r\n");
    let talk = async {
        if !whole {
            client.shutdown().await.unwrap();
        }
        let mut answer = Vec::new();
        // A body shorter than announced ends when the client closes.
        if timeout(Duration::from_millis(50), client.read_to_end(&mut answer)).await.is_err() {
            client.shutdown().await.unwrap();
            let _ = client.read_to_end(&mut answer).await;
        }
        drop(client);
        String::from_utf8_lossy(&answer).into_owned()
    };
    let (_, answer) = tokio::join!(service.serve(server), talk);
    answer
}

#[tokio::test]
async fn on_a_network_idle_connections_of_one_peer_keep_no_other_from_an_answer() {
    let (docker, _requests) = recorder().await;
    let service = Arc::new(service(docker));
    let tcp = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = tcp.local_addr().unwrap();
    let shutdown = CancellationToken::new();
    let (stop, served) = (shutdown.clone(), service.clone());
    let server = tokio::spawn(async move {
        let listener = Listener::Tcp(tcp);
        accept_all(&listener, &served, std::future::pending(), &stop).await.1
    });
    let from = async |ip: &str| {
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.bind(std::net::SocketAddr::new(ip.parse().unwrap(), 0)).unwrap();
        socket.connect(at).await.unwrap()
    };
    let mut idle = Vec::new();
    for _ in 0..2 * MOST_CONNECTIONS {
        idle.push(from("127.0.0.2").await);
    }
    let mut other = from("127.0.0.1").await;
    other.write_all(b"GET /nothing HTTP/1.1\r\nHost: d\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    // Idle connections have 5 s to send a head. A client that had to wait for them would wait as long.
    timeout(Duration::from_secs(4), other.read_to_string(&mut answer)).await.expect("served at once").unwrap();
    assert!(answer.starts_with("HTTP/1.1 403 ") && answer.contains("route"), "{answer}");
    // A connection without a place is closed at once without an answer. One with a place is told that it was slow.
    let mut told = 0;
    for mut one in idle {
        let mut answer = String::new();
        let _ = one.read_to_string(&mut answer).await;
        told += usize::from(answer.contains("head_slow"));
    }
    assert_eq!(told, MOST_OF_ONE_PEER);
    shutdown.cancel();
    assert_eq!(server.await.unwrap(), None);
}

#[tokio::test(start_paused = true)]
async fn a_head_or_a_body_that_does_not_come_in_time_is_not_waited_for() {
    let service = service(crate::docker::Docker::new(DockerHost::Unix("/nowhere".into())));
    let head =
        "POST /networks/create HTTP/1.1\r\nHost: d\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n";
    for (sent, rule) in
        [("", "head_slow"), ("GET /ver", "head_slow"), (head, "body_slow"), (&format!("{head}{{"), "body_slow")]
    {
        let (mut client, server) = duplex(1 << 16);
        client.write_all(sent.as_bytes()).await.unwrap();
        service.serve(server).await.unwrap();
        let mut answer = String::new();
        client.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 408 ") && answer.contains(rule), "{sent:?}: {answer}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_head_that_comes_byte_by_byte_does_not_gain_time_with_each() {
    let service = service(crate::docker::Docker::new(DockerHost::Unix("/nowhere".into())));
    let (mut client, server) = duplex(1 << 16);
    let drip = async {
        loop {
            client.write_all(b"G").await?;
            tokio::time::sleep(Duration::from_secs(1)).await;
            if false {
                return Ok::<_, std::io::Error>(());
            }
        }
    };
    tokio::select! {
        served = service.serve(server) => served.unwrap(),
        _ = drip => panic!("the drip ended first"),
    }
}

#[tokio::test]
async fn a_request_that_is_cut_off_is_refused_and_a_connection_without_one_is_nothing() {
    let service = service(crate::docker::Docker::new(DockerHost::Unix("/nowhere".into())));
    let body =
        "POST /networks/create HTTP/1.1\r\nHost: d\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{";
    for (sent, rule) in [("", ""), ("GET /ver", "head_short"), (body, "body_short")] {
        let (mut client, server) = duplex(1 << 16);
        client.write_all(sent.as_bytes()).await.unwrap();
        client.shutdown().await.unwrap();
        service.serve(server).await.unwrap();
        let mut answer = String::new();
        client.read_to_string(&mut answer).await.unwrap();
        assert!(answer.contains(rule) && answer.is_empty() == rule.is_empty(), "{sent:?}: {answer}");
    }
}

/// A Docker that gives each request this answer, and reports when its connection has ended.
async fn engine(answer: String, stays_open: bool) -> (crate::docker::Docker, tokio::sync::mpsc::Receiver<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let docker = crate::docker::Docker::new(DockerHost::Http(listener.local_addr().unwrap().to_string()));
    let (ended, ends) = tokio::sync::mpsc::channel(8);
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let (answer, ended) = (answer.clone(), ended.clone());
            tokio::spawn(async move {
                let mut request = Vec::new();
                while !request.ends_with(b"\r\n\r\n") {
                    stream.read_buf(&mut request).await.unwrap();
                }
                stream.write_all(answer.as_bytes()).await.unwrap();
                while stays_open && stream.read(&mut [0]).await.is_ok_and(|read| read > 0) {}
                let _ = ended.send(()).await;
            });
        }
    });
    (docker, ends)
}

#[tokio::test]
async fn a_goodbye_is_answered_when_it_is_on_disk_lasts_until_the_agent_goes_and_asks_nothing_of_docker() {
    let (docker, requests) = recorder().await;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("docker.sock.lease");
    let mut service = service(docker);
    service.proxy.leases = Leases::open("dockflare-agent-tunnel", Some(path.clone()));
    let (mut client, server) = duplex(1 << 16);
    client.write_all(b"POST /dockflare/goodbye?lease=60 HTTP/1.1\r\nHost: d\r\n\r\n").await.unwrap();
    let talk = async {
        let mut answer = Vec::new();
        while !String::from_utf8_lossy(&answer).contains("{\"seconds\":60}") {
            assert!(client.read_buf(&mut answer).await.unwrap() > 0);
        }
        let answer = String::from_utf8(answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 200 ") && answer.contains(crate::docker::OWN_PROXY), "{answer}");
        let lease = std::fs::read_to_string(&path).unwrap();
        assert!(lease.contains("dockflare-agent-tunnel"), "{lease}");
        // A health check of the proxy does not end the lease; a running agent does.
        answer_to(&service, b"GET /_ping HTTP/1.1\r\nHost: d\r\n\r\n").await;
        assert!(path.exists());
        drop(client);
    };
    let (served, ()) = tokio::join!(service.serve(server), talk);
    let _ = served;
    assert!(path.exists());
    assert_eq!(requests.lock().unwrap().len(), 1, "the ping");
    answer_to(&service, EVENTS.as_bytes()).await;
    assert!(!path.exists(), "an agent listens, whatever Docker answers it");
}

const EVENTS: &str = "GET /events?filters=%7B%22type%22%3A%5B%22container%22%5D%2C%22event%22%3A%5B%22start%22%5D%7D HTTP/1.1\r\nHost: d\r\n\r\n";

#[tokio::test]
async fn a_stream_shows_only_what_it_may_and_ends_at_docker_when_the_client_goes() {
    let event = |name: &str, more: serde_json::Value| {
        let mut attributes = json!({ "name": name, "image": "nginx", "secret.label": "s3cret" });
        attributes.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        json!({ "Type": "container", "Action": "start", "Actor": { "ID": ID, "Attributes": attributes },
            "time": 1, "timeNano": 1_000_000_001_i64 })
    };
    let lines = [
        event("other", json!({})),
        event("web", json!({ "dockflare.enable": "true", "dockflare.hostname": "h" })),
        event("quiet", json!({ "dockflare.enable": "no" })),
        event("dockflare-agent-tunnel", json!({ "com.dockflare.agent.spec": "h" })),
    ];
    let lines: String = lines.iter().map(|line| format!("{line}\n")).collect();
    let chunk = format!("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n{:x}\r\n{lines}\r\n", lines.len());
    let (docker, mut ended) = engine(chunk, true).await;
    let service = service(docker);
    let (mut client, server) = duplex(1 << 16);
    client.write_all(EVENTS.as_bytes()).await.unwrap();
    let talk = async {
        let mut seen = Vec::new();
        while !String::from_utf8_lossy(&seen).contains("dockflare-agent-tunnel") {
            assert!(client.read_buf(&mut seen).await.unwrap() > 0);
        }
        // The client disconnects. The proxy must notice without anything further from Docker.
        drop(client);
        String::from_utf8(seen).unwrap()
    };
    let (served, seen) = tokio::join!(service.serve(server), talk);
    // Either end may notice first that the other has gone.
    let _ = served;
    assert!(seen.contains("\"web\"") && seen.contains("dockflare.hostname"), "{seen}");
    for hidden in ["\"other\"", "quiet", "s3cret"] {
        assert!(!seen.contains(hidden), "{seen}");
    }
    ended.recv().await.unwrap();
}

#[tokio::test]
async fn a_stream_that_docker_cuts_is_cut_and_one_that_it_ends_is_ended() {
    let whole = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n";
    let cut = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{";
    for (upstream, ends) in [(whole, true), (cut, false)] {
        let (docker, _) = engine(upstream.to_owned(), false).await;
        let answer = answer_to(&service(docker), EVENTS.as_bytes()).await;
        assert_eq!(answer.ends_with("0\r\n\r\n"), ends, "{answer}");
    }
}

#[tokio::test]
async fn what_docker_refuses_or_does_not_answer_is_told_in_its_own_shape() {
    let refusal = "HTTP/1.1 409 Conflict\r\nContent-Length: 22\r\n\r\n{\"message\":\"in use\"}\r\n";
    let nobody = crate::docker::Docker::new(DockerHost::Http("127.0.0.1:1".into()));
    for (docker, status, text) in [(engine(refusal.into(), false).await.0, "409", "in use"), (nobody, "502", "refused")]
    {
        let answer = answer_to(&service(docker), b"GET /_ping HTTP/1.1\r\nHost: d\r\n\r\n").await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")) && answer.contains(text), "{answer}");
        assert!(answer.contains("{\"message\":\""), "{answer}");
    }
}

/// Folds a field name as Go's JSON reader does to compare it.
fn folded(name: &str) -> String {
    name.chars()
        .map(|c| match c {
            '\u{17f}' => 's',
            '\u{212a}' => 'k',
            other => other.to_ascii_lowercase(),
        })
        .collect()
}

/// Collects the path of every field of this document, folded.
fn fields(value: &serde_json::Value, at: &str, found: &mut std::collections::BTreeSet<String>) {
    match value {
        serde_json::Value::Object(map) => map.iter().for_each(|(key, value)| {
            let path = format!("{at}/{}", folded(key));
            fields(value, &path, found);
            found.insert(path);
        }),
        serde_json::Value::Array(items) => items.iter().for_each(|item| fields(item, at, found)),
        _ => {}
    }
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(2000))]

    /// The proxy forwards only what it wrote itself: the same fields as in the agent's own call, whatever came in.
    #[test]
    fn whatever_create_call_is_let_through_has_only_the_allowed_fields(
        body in crate::hostile::body(spec().body_for_tests()),
        path in proptest::sample::select(vec!["containers/create", "networks/create", "networks/app/connect"]),
    ) {
        let name = policy().tunnel.container_name;
        let query = if path == "containers/create" { format!("?name={name}") } else { String::new() };
        let length = body.len().max(1);
        let text = format!("POST /{path}{query} HTTP/1.1\r\nHost: d\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n");
        if let Ok(head) = Head::read(text.as_bytes())
            && let Ok(Planned { call: Call::Create { spec: planned, .. }, .. }) = plan(&policy(), &head, &body)
        {
            let (mut seen, mut allowed) = Default::default();
            fields(&planned.body_for_tests(), "", &mut seen);
            let mut most = spec();
            most.options.extend([("TUNNEL_LOGLEVEL", "info".to_owned()), ("TUNNEL_GRACE_PERIOD", "90s".to_owned())]);
            fields(&most.body_for_tests(), "", &mut allowed);
            proptest::prop_assert!(seen.is_subset(&allowed), "{seen:?}");
            proptest::prop_assert_eq!(&planned.image, &spec().image);
            proptest::prop_assert_eq!(&planned.network, &spec().network);
        }
    }

    /// Any bytes that are accepted as a head are one request that can be read in only one way.
    #[test]
    fn any_head_is_read_or_refused(line in "(GET|POST|DELETE|HEAD) /[ -~]{0,40}", rest in "([A-Za-z-]{1,20}: [ -~]{0,20}\r\n){0,3}") {
        let bytes = format!("{line} HTTP/1.1\r\nHost: d\r\n{rest}\r\n");
        if let Ok(head) = Head::read(bytes.as_bytes()) {
            let is_plain = |segment: &String| !["", ".", ".."].contains(&segment.as_str()) && !segment.contains('%');
            proptest::prop_assert!(!head.path.is_empty() && head.path.iter().all(is_plain));
            proptest::prop_assert!(!rest.to_ascii_lowercase().contains("transfer-encoding:"));
            let _ = plan(&policy(), &head, b"");
        }
    }
}
