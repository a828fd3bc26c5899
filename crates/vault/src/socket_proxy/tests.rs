//! Tests what the proxy lets through, for whom, and what reaches Docker: a double that records each call.

use std::sync::Mutex;

use dockflare_engine::DockerError;
use dockflare_engine::proxy::MOST_BODY;
use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

use super::*;
use crate::docker::RunState;

const APP: &str = "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa";
const OTHER: &str = "bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb";

/// Containers by id, with their names, and the calls that acted on them.
#[derive(Debug, Default)]
struct Double {
    names: BTreeMap<&'static str, &'static str>,
    done: Mutex<Vec<String>>,
}

impl Double {
    fn note(&self, what: String) -> Result<(), DockerError> {
        self.done.lock().unwrap().push(what);
        Ok(())
    }
}

impl Containers for Double {
    async fn look(&self, name: &str) -> Result<Option<Seen>, DockerError> {
        // Like Docker, finds a container by name, by id, or by the beginning of an id.
        let found = self.names.iter().find(|(_, known)| **known == name);
        let found = found.or_else(|| self.names.iter().find(|(id, _)| id.starts_with(name)));
        Ok(found.map(|(id, name)| Seen {
            id: (*id).to_owned(),
            name: (*name).to_owned(),
            state: RunState::Running,
            started: None,
            health: None,
            restarts: 0,
            is_kept: true,
            has_bind: false,
        }))
    }

    async fn signal(&self, id: &str, signal: Signal) -> Result<(), DockerError> {
        self.note(format!("{} {id}", signal.as_str()))
    }

    async fn restart(&self, id: &str) -> Result<(), DockerError> {
        self.note(format!("restart {id}"))
    }

    async fn start(&self, id: &str) -> Result<(), DockerError> {
        self.note(format!("start {id}"))
    }
}

impl Pings for Double {
    async fn ping(&self) -> Result<(), DockerError> {
        Ok(())
    }
}

fn read(vars: &[(&str, &str)]) -> Result<ProxyConfig, Vec<String>> {
    ProxyConfig::read(&vars.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect())
}

fn service() -> Service<VaultProxy<Double>> {
    let policy = read(&[("RELOAD_CONTAINERS", "app, worker"), ("RELOAD_SIGNALS", "HUP")]).unwrap().policy;
    let docker = Double { names: BTreeMap::from([(APP, "app"), (OTHER, "other")]), ..Double::default() };
    Service { proxy: VaultProxy { docker, policy }, refusals: Refusals::default() }
}

async fn answer(service: &Service<VaultProxy<Double>>, request: &str) -> String {
    let (mut client, server) = duplex(1 << 20);
    client.write_all(request.as_bytes()).await.unwrap();
    let talk = async {
        let mut answer = String::new();
        client.read_to_string(&mut answer).await.unwrap();
        drop(client);
        answer
    };
    tokio::join!(service.serve(server), talk).1
}

#[tokio::test]
async fn the_calls_of_the_vault_are_made_and_each_names_the_id() {
    let service = service();
    for (request, status) in [
        ("GET /_ping", 200),
        ("HEAD /v1.41/_ping", 200),
        ("GET /v1.41/containers/app/json", 200),
        (&format!("GET /containers/{APP}/json"), 200),
        ("GET /containers/worker/json", 404),
        (&format!("POST /v1.53/containers/{APP}/kill?signal=SIGHUP"), 204),
        (&format!("POST /containers/{APP}/restart"), 204),
        (&format!("POST /containers/{APP}/start?"), 204),
    ] {
        let said = answer(&service, &format!("{request} HTTP/1.1\r\nHost: d\r\n\r\n")).await;
        assert!(said.starts_with(&format!("HTTP/1.1 {status} ")), "{request}: {said}");
        assert!(said.contains("Server: dockflare-vault-socket-proxy\r\n"), "{said}");
    }
    let done = service.proxy.docker.done.lock().unwrap().clone();
    assert_eq!(done, [format!("SIGHUP {APP}"), format!("restart {APP}"), format!("start {APP}")]);
}

#[tokio::test]
async fn everything_else_is_refused_by_its_rule_and_nothing_reaches_docker() {
    let service = service();
    let chunk = "x".repeat(MOST_BODY + 1);
    let attacks = [
        // Other calls, including those that the agent's own proxy lets through.
        ("GET /version".to_owned(), "route"),
        ("GET /info".to_owned(), "route"),
        ("GET /events".to_owned(), "route"),
        ("GET /containers/json".to_owned(), "route"),
        ("GET /containers/json?all=true".to_owned(), "route"),
        (format!("GET /containers/{APP}/logs?stdout=true"), "route"),
        (format!("GET /containers/{APP}/archive?path=/run/secrets"), "route"),
        (format!("GET /containers/{APP}/export"), "route"),
        (format!("GET /containers/{APP}/top"), "route"),
        (format!("POST /containers/{APP}/stop"), "route"),
        (format!("POST /containers/{APP}/pause"), "route"),
        (format!("POST /containers/{APP}/exec"), "route"),
        (format!("POST /containers/{APP}/attach"), "route"),
        (format!("POST /containers/{APP}/rename?name=x"), "route"),
        (format!("POST /containers/{APP}/update"), "route"),
        (format!("DELETE /containers/{APP}"), "route"),
        (format!("DELETE /containers/{APP}?force=true"), "route"),
        ("POST /containers/create?name=app".to_owned(), "route"),
        ("POST /containers/prune".to_owned(), "route"),
        ("POST /commit".to_owned(), "route"),
        ("POST /images/create?fromImage=x&tag=y".to_owned(), "route"),
        ("POST /networks/create".to_owned(), "route"),
        ("GET /secrets".to_owned(), "route"),
        ("GET /volumes".to_owned(), "route"),
        ("POST /dockflare/goodbye?lease=60".to_owned(), "route"),
        ("HEAD /containers/app/json".to_owned(), "route"),
        // Other containers, and other ways to name one.
        ("GET /containers/other/json".to_owned(), "container_name"),
        ("GET /containers/ap/json".to_owned(), "container_name"),
        (format!("GET /containers/{}/json", &APP[..12]), "container_name"),
        (format!("GET /containers/{OTHER}/json"), "container_name"),
        (format!("POST /containers/{OTHER}/restart"), "container_name"),
        (format!("POST /containers/{OTHER}/start"), "container_name"),
        (format!("POST /containers/{OTHER}/kill?signal=SIGHUP"), "container_name"),
        ("POST /containers/app/restart".to_owned(), "container_id"),
        ("POST /containers/app/start".to_owned(), "container_id"),
        ("POST /containers/app/kill?signal=SIGHUP".to_owned(), "container_id"),
        (format!("POST /containers/{}/restart", &APP[..12]), "container_id"),
        (format!("POST /containers/{}/restart", APP.to_uppercase()), "container_id"),
        // Other signals and settings.
        (format!("POST /containers/{APP}/kill"), "signal"),
        (format!("POST /containers/{APP}/kill?signal=SIGKILL"), "signal"),
        (format!("POST /containers/{APP}/kill?signal=9"), "signal"),
        (format!("POST /containers/{APP}/kill?signal=SIGUSR1"), "signal"),
        (format!("POST /containers/{APP}/kill?signal=SIGHUP&x=y"), "query_key"),
        (format!("POST /containers/{APP}/restart?t=0"), "query_key"),
        (format!("POST /containers/{APP}/restart?signal=SIGKILL"), "query_key"),
        (format!("POST /containers/{APP}/start?detachKeys=x"), "query_key"),
        ("GET /containers/app/json?size=true".to_owned(), "query_key"),
        // Other ways to write a path.
        (format!("POST /containers/{APP}%2frestart"), "path_bytes"),
        (format!("POST /containers/{OTHER}/../{APP}/restart"), "path_segments"),
        (format!("POST //containers/{APP}/restart"), "path_segments"),
        (format!("POST /v1.23/containers/{APP}/restart"), "api_version"),
    ];
    for (request, rule) in &attacks {
        let said = answer(&service, &format!("{request} HTTP/1.1\r\nHost: d\r\n\r\n")).await;
        let expected = format!("dockflare-vault socket-proxy refuses this: {rule}\"");
        assert!(said.starts_with("HTTP/1.1 4") && said.contains(&expected), "{request}: {said}");
    }
    let start = format!("POST /containers/{APP}/start HTTP/1.1\r\nHost: d\r\n");
    for (rest, rule) in [
        ("Content-Type: application/json\r\nContent-Length: 2\r\n\r\n{}".to_owned(), "body_unexpected"),
        (format!("Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{chunk}", chunk.len()), "body_length"),
        ("Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n".to_owned(), "header_transfer_encoding"),
        ("Upgrade: tcp\r\nConnection: Upgrade\r\n\r\n".to_owned(), "header_upgrade"),
        ("\r\nPOST /containers/create HTTP/1.1\r\nHost: d\r\n\r\n".to_owned(), "bytes_after_request"),
    ] {
        let said = answer(&service, &format!("{start}{rest}")).await;
        assert!(said.contains(&format!("refuses this: {rule}\"")), "{rule}: {said}");
    }
    assert!(service.proxy.docker.done.lock().unwrap().is_empty());
}

#[tokio::test]
async fn a_container_that_lost_its_name_and_one_that_took_it_for_another_are_told_apart_at_the_call() {
    let mut service = service();
    let restart = format!("POST /containers/{APP}/restart HTTP/1.1\r\nHost: d\r\n\r\n");
    // The container was renamed, and another one has its name now.
    service.proxy.docker.names = BTreeMap::from([(APP, "app-before"), (OTHER, "app")]);
    let said = answer(&service, &restart).await;
    assert!(said.contains("refuses this: container_name"), "{said}");
    // A container whose name looks like the id of another.
    service.proxy.docker.names = BTreeMap::from([(OTHER, APP)]);
    let said = answer(&service, &restart).await;
    assert!(said.starts_with("HTTP/1.1 404 "), "{said}");
    assert!(service.proxy.docker.done.lock().unwrap().is_empty());
}

#[test]
fn the_settings_have_errors_that_name_them_all_at_once() {
    let config = read(&[("RELOAD_CONTAINERS", "a1 b2,c3")]).unwrap();
    assert_eq!(config.listen.to_string(), DEFAULT_LISTEN);
    assert_eq!(config.docker.to_string(), DEFAULT_DOCKER);
    assert!(["a1", "b2", "c3"].iter().all(|name| config.policy.has(name)) && config.policy.signals == SIGNALS);
    let problems = read(&[
        ("SOCKET_PROXY_LISTEN", "tcp://0.0.0.0:2375"),
        ("SOCKET_PROXY_DOCKER_HOST", "ssh://s3cret@host"),
        ("RELOAD_CONTAINERS", "/app"),
        ("RELOAD_SIGNALS", "KILL"),
    ])
    .unwrap_err();
    for name in ["SOCKET_PROXY_LISTEN", "SOCKET_PROXY_DOCKER_HOST", "RELOAD_CONTAINERS", "RELOAD_SIGNALS"] {
        assert!(problems.iter().any(|problem| problem.starts_with(name)), "{name}: {problems:?}");
    }
    assert!(problems.len() == 4 && !problems.concat().contains("s3cret"), "{problems:?}");
    assert!(read(&[]).unwrap_err()[0].contains("RELOAD_CONTAINERS is missing"));
    let same = read(&[("RELOAD_CONTAINERS", "a1"), ("SOCKET_PROXY_LISTEN", DEFAULT_DOCKER)]).unwrap_err();
    assert!(same[0].contains("Docker's own socket"), "{same:?}");
}
