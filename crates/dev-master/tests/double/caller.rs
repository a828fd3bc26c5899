//! Plays the agent's side by hand, and sends exactly what the test says.

use std::sync::Once;
use std::time::Duration;

use dockflare_dev_master::{Builder, DevMaster, Protocol};
use reqwest::{Client, Method, Response};
use serde_json::{Map, Value, json};

/// Longer than any wait of these tests should take.
pub(crate) const LONG: Duration = Duration::from_secs(20);

pub(crate) const SCOPE: &str = "dockflare_enabled_running";

/// A client that does not follow redirects and needs no certificates.
pub(crate) fn client() -> Client {
    static PROVIDER: Once = Once::new();
    PROVIDER.call_once(|| drop(rustls::crypto::ring::default_provider().install_default()));
    let builder = Client::builder().tls_certs_only([]).no_proxy();
    builder.redirect(reqwest::redirect::Policy::none()).build().unwrap()
}

pub(crate) async fn v1() -> DevMaster {
    DevMaster::builder().protocol(Protocol::V1).start().await.unwrap()
}

pub(crate) async fn v2() -> DevMaster {
    start(DevMaster::builder()).await
}

pub(crate) async fn start(builder: Builder) -> DevMaster {
    builder.start().await.unwrap()
}

/// A complete reply.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) body: Value,
}

impl Answer {
    pub(crate) fn code(&self) -> &str {
        self.body["code"].as_str().unwrap_or_default()
    }

    pub(crate) fn text(&self, member: &str) -> String {
        self.body[member].as_str().unwrap_or_default().to_owned()
    }

    /// Asserts the status and the code, as the tables list them.
    pub(crate) fn is(&self, status: u16, code: &str) {
        assert_eq!((self.status, self.code()), (status, code), "{:?}", self.body);
    }
}

/// A caller with a key.
#[derive(Clone)]
pub(crate) struct Caller {
    client: Client,
    url: String,
    key: String,
}

impl Caller {
    pub(crate) fn new(master: &DevMaster, key: &str) -> Self {
        Self { client: client(), url: master.url(), key: key.to_owned() }
    }

    /// A caller with a new agent key.
    pub(crate) fn fresh(master: &DevMaster) -> Self {
        Self::new(master, &master.generate_key("tests"))
    }

    /// A caller with the default master key.
    pub(crate) fn operator(master: &DevMaster) -> Self {
        Self::new(master, "dev-master-key")
    }

    pub(crate) fn with_key(&self, key: &str) -> Self {
        Self { key: key.to_owned(), ..self.clone() }
    }

    pub(crate) fn key(&self) -> &str {
        &self.key
    }

    pub(crate) async fn raw(&self, method: Method, path: &str, body: Option<&Value>) -> reqwest::Result<Response> {
        let mut request = self.client.request(method, format!("{}{path}", self.url)).bearer_auth(&self.key);
        if let Some(body) = body {
            request = request.json(body);
        }
        request.send().await
    }

    pub(crate) async fn call(&self, method: Method, path: &str, body: Option<&Value>) -> Answer {
        let response = self.raw(method, path, body).await.unwrap();
        let status = response.status().as_u16();
        let text = response.text().await.unwrap();
        Answer { status, body: serde_json::from_str(&text).unwrap_or(Value::String(text)) }
    }

    pub(crate) async fn post(&self, path: &str, body: &Value) -> Answer {
        self.call(Method::POST, path, Some(body)).await
    }

    pub(crate) async fn get(&self, path: &str) -> Answer {
        self.call(Method::GET, path, None).await
    }

    pub(crate) async fn register(&self, body: &Value) -> Answer {
        self.post("/api/v2/agents/register", body).await
    }

    pub(crate) async fn commands(&self, agent: &str) -> Answer {
        self.get(&format!("/api/v2/agents/{agent}/commands")).await
    }

    pub(crate) async fn events(&self, agent: &str, body: &Value) -> Answer {
        self.post(&format!("/api/v2/agents/{agent}/events"), body).await
    }

    pub(crate) async fn ack(&self, agent: &str, operation: &str, body: &Value) -> Answer {
        self.post(&format!("/api/v2/agents/{agent}/decommission/{operation}/ack"), body).await
    }

    /// Registers and returns the id.
    pub(crate) async fn joined(&self) -> String {
        let answer = self.register(&registration()).await;
        assert_eq!(answer.status, 201, "{:?}", answer.body);
        answer.text("agent_id")
    }
}

/// A registered version 2 agent that numbers what it sends.
pub(crate) struct Session {
    pub(crate) caller: Caller,
    pub(crate) agent: String,
    pub(crate) session: String,
    pub(crate) events: u64,
    pub(crate) reports: u64,
}

impl Session {
    pub(crate) async fn begin(caller: Caller) -> Self {
        let answer = caller.register(&registration()).await;
        assert!(answer.status < 300, "{:?}", answer.body);
        let (agent, session) = (answer.text("agent_id"), answer.text("agent_session_id"));
        Self { caller, agent, session, events: 0, reports: 0 }
    }

    /// Makes an event with these members and the next number of its stream.
    pub(crate) fn next(&mut self, kind: &str, more: &Value) -> Value {
        let (member, number) = match kind {
            "status_report" => ("report_sequence", &mut self.reports),
            _ => ("event_sequence", &mut self.events),
        };
        *number += 1;
        let own = json!({ "protocol_version": 2, "agent_session_id": self.session, member: *number });
        merged(&merged(&event(kind), &own), more)
    }

    pub(crate) async fn send(&mut self, kind: &str, more: &Value) -> Answer {
        let body = self.next(kind, more);
        self.caller.events(&self.agent, &body).await
    }
}

pub(crate) fn registration() -> Value {
    json!({
        "display_name": "host",
        "version": "0.1.0",
        "agent_version": "0.1.0",
        "supported_protocol_versions": [2, 1],
        "capabilities": ["decommission.v1", "tunnel_stop.v1", "self_stop.v1"],
    })
}

pub(crate) fn event(kind: &str) -> Value {
    json!({ "type": kind, "timestamp": "2025-06-01T12:00:00Z" })
}

pub(crate) fn container(id: &str) -> Value {
    json!({ "id": id, "name": format!("name-{id}"), "labels": { "dockflare.enable": "true" }, "status": "running" })
}

/// Merges `more` into `base`; a member of `more` wins.
pub(crate) fn merged(base: &Value, more: &Value) -> Value {
    let mut members: Map<String, Value> = base.as_object().cloned().unwrap();
    members.extend(more.as_object().cloned().unwrap());
    Value::Object(members)
}

/// Asserts that the master recorded no violation.
pub(crate) fn clean(master: &DevMaster) {
    assert_eq!(master.violations(), Vec::<String>::new());
}

/// Asserts that the master recorded a violation that says this.
pub(crate) fn violated(master: &DevMaster, what: &str) {
    let violations = master.violations();
    assert!(violations.iter().any(|found| found.contains(what)), "{what}: {violations:?}");
}
