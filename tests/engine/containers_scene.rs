//! Shared by the tests of the tunnel container: tunnels as the master names them, and Docker's view of them.

use std::collections::HashMap;
use std::future::Future;

use anyhow::{Context, Result, ensure};
use dockflare_dev_master::{Agent, Protocol};
use futures_util::StreamExt;
use serde_json::{Value, json};
use testkit::bollard::query_parameters::{EventsOptions, ListContainersOptions};
use testkit::{AgentProcess, Case, Spec, case, models, wait_until};
use tokio::sync::watch;

use crate::support::{SOON, Stage};

/// The label that holds the hash of the whole spec.
pub(crate) const SPEC_LABEL: &str = "com.dockflare.agent.spec";
const TUNNEL_LABEL: &str = "com.dockflare.agent.tunnel-id";
/// The arguments of cloudflared.
pub(crate) const COMMAND: [&str; 3] = ["tunnel", "--no-autoupdate", "run"];

/// A tunnel as the master names it.
#[derive(Clone)]
pub(crate) struct Tunnel {
    pub(crate) id: String,
    pub(crate) token: String,
}

impl Tunnel {
    /// Makes the stage's tunnel with a new token that scripts the stand-in with `words`.
    pub(crate) fn new(stage: &Stage, words: &str) -> Self {
        let id = stage.scope.name("id");
        let token = testkit::token(&id, words);
        Self { id, token }
    }

    pub(crate) fn start(&self) -> Value {
        json!({ "action": "start_tunnel", "tunnel_name": "edge", "tunnel_id": self.id, "token": self.token })
    }

    pub(crate) fn restart(&self) -> Value {
        json!({ "action": "restart_tunnel", "tunnel_name": "edge", "tunnel_id": self.id, "tunnel_token": self.token })
    }

    /// Writes the state file as the Python agent does, with this tunnel as the one to run.
    pub(crate) fn store(&self, stage: &Stage) -> Result<()> {
        let state = json!({ "token": self.token, "id": self.id, "name": "edge", "desired_state": "running" });
        Ok(std::fs::write(stage.data.path().join("tunnel_state.json"), state.to_string())?)
    }

    /// Starts an agent that must not log this tunnel's token.
    pub(crate) fn agent(&self, stage: &Stage) -> Result<AgentProcess> {
        let mut agent = stage.agent()?;
        agent.plant(&self.token);
        Ok(agent)
    }

    /// Starts an agent with this tunnel in its state file, and waits until the tunnel is ready.
    pub(crate) async fn agent_with_ready_tunnel(&self, stage: &Stage) -> Result<AgentProcess> {
        self.store(stage)?;
        let agent = self.agent(stage)?;
        agent.wait_for_log("tunnel ready", SOON).await?;
        Ok(agent)
    }

    /// Starts an agent and enrolls it with this tunnel, so that the master knows the tunnel as the agent's.
    pub(crate) async fn enrolled_agent(&self, stage: &Stage) -> Result<AgentProcess> {
        let agent = self.agent(stage)?;
        self.enrol(stage, &agent).await?;
        Ok(agent)
    }

    /// Waits for an agent to register, enrolls it with this tunnel, and waits until the tunnel is ready.
    pub(crate) async fn enrol(&self, stage: &Stage, agent: &AgentProcess) -> Result<Agent> {
        let known = registered(stage).await?;
        stage.master.enroll_with(&known.id, "edge", &self.id, &self.token)?;
        agent.wait_for_log("tunnel ready", SOON).await?;
        stage.tunnel_is("running").await
    }

    /// Waits until the stage's container runs, made by the agent for this token and the stage's settings. It must be
    /// the tunnel's only container, running or not.
    pub(crate) async fn container(&self, stage: &Stage) -> Result<Life> {
        let expected = vec![
            format!("TUNNEL_TOKEN={}", self.token),
            setting(stage, "CLOUDFLARED_IMAGE"),
            setting(stage, "CLOUDFLARED_NETWORK_NAME"),
            "running".to_owned(),
        ];
        let mut seen = Vec::new();
        let found = wait_until("the right container", SOON, async || {
            let found = stage.scope.find(&stage.tunnel).await.ok()??;
            let config = found.config.clone()?;
            let token = config.env?.into_iter().find(|entry| entry.starts_with("TUNNEL_TOKEN="))?;
            let metrics = setting(stage, "CLOUDFLARED_METRICS_NETWORK");
            let networks = found.network_settings.clone()?.networks?.into_keys();
            let networks: Vec<_> = networks.filter(|network| *network != metrics).collect();
            let has_hash = config.labels?.get(SPEC_LABEL).is_some_and(|hash| hash.len() == 64);
            seen = vec![token, config.image?, networks.join(","), found.state.clone()?.status?.to_string()];
            (has_hash && seen == expected).then_some(found)
        });
        // Leave out the tokens: they differ between runs and do not help.
        let found = found.await.with_context(|| format!("expected {:?}, seen last {seen:?}", &expected[1..]))?;
        let filters = HashMap::from([("label".to_owned(), vec![format!("{TUNNEL_LABEL}={}", self.id)])]);
        let options = ListContainersOptions { all: true, filters: Some(filters), ..Default::default() };
        let all = stage.scope.docker().list_containers(Some(options)).await?;
        ensure!(all.len() == 1, "there are {} containers of the tunnel: {all:#?}", all.len());
        Ok(Life::of(&found))
    }

    /// Creates a container like the Python agent's, without starting it.
    pub(crate) async fn python_container(&self, stage: &Stage) -> Result<String> {
        let (image, network) = (setting(stage, "CLOUDFLARED_IMAGE"), stage.network.as_str());
        if stage.scope.docker().inspect_network(network, None).await.is_err() {
            stage.scope.create_network(network).await?;
        }
        let restart_policy = Some(models::RestartPolicy {
            name: Some(models::RestartPolicyNameEnum::UNLESS_STOPPED),
            ..Default::default()
        });
        let spec = Spec {
            image: &image,
            name: &stage.tunnel,
            env: &[("TUNNEL_TOKEN", &self.token)],
            args: &COMMAND,
            network: Some(network),
            host: models::HostConfig { restart_policy, ..Default::default() },
            ..Spec::default()
        };
        stage.scope.create(spec).await
    }
}

/// One start of one container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Life {
    pub(crate) id: String,
    pub(crate) started_at: String,
}

impl Life {
    fn of(found: &models::ContainerInspectResponse) -> Self {
        let started_at = found.state.as_ref().and_then(|state| state.started_at.clone()).unwrap_or_default();
        Self { id: found.id.clone().unwrap_or_default(), started_at }
    }

    /// Returns the current life of the container with the stage's name, whatever its state.
    pub(crate) async fn now(stage: &Stage) -> Result<Self> {
        Ok(Self::of(&stage.scope.inspect(&stage.tunnel).await?))
    }
}

/// Docker's events of the stage's container from now on.
pub(crate) struct Story {
    told: watch::Receiver<Vec<Event>>,
    reader: tokio::task::JoinHandle<()>,
}

struct Event {
    action: String,
    exit_code: Option<String>,
}

impl Story {
    pub(crate) fn follow(stage: &Stage) -> Self {
        Self::follow_named(stage, &stage.tunnel)
    }

    /// Like [`Story::follow`], for another container.
    pub(crate) fn follow_named(stage: &Stage, name: &str) -> Self {
        let filters = HashMap::from([
            ("type".to_owned(), vec!["container".to_owned()]),
            ("container".to_owned(), vec![name.to_owned()]),
        ]);
        // With `since`, Docker also sends the events from before the subscription takes effect.
        let since = Some(format!("{:.9}", jiff::Timestamp::now().as_duration().as_secs_f64()));
        let options = EventsOptions { since, filters: Some(filters), ..Default::default() };
        let mut events = stage.scope.docker().events(Some(options));
        let (write, told) = watch::channel(Vec::new());
        let reader = tokio::spawn(async move {
            while let Some(Ok(event)) = events.next().await {
                let attributes = event.actor.and_then(|actor| actor.attributes).unwrap_or_default();
                let exit_code = attributes.get("exitCode").cloned();
                let action = event.action.unwrap_or_default();
                write.send_modify(|told| told.push(Event { action, exit_code }));
            }
        });
        Self { told, reader }
    }

    /// Waits for this event without polling.
    pub(crate) async fn until(&self, action: &str) -> Result<()> {
        let mut told = self.told.clone();
        let happened = told.wait_for(|told| told.iter().any(|event| event.action == action));
        let in_time = tokio::time::timeout(2 * SOON, happened).await;
        in_time.with_context(|| format!("no {action}"))?.map(drop).context("Docker's events ended")
    }

    /// Returns how often this event occurred so far.
    pub(crate) fn count(&self, action: &str) -> usize {
        self.told.borrow().iter().filter(|event| event.action == action).count()
    }

    /// Returns the exit codes of the lives that have ended so far.
    pub(crate) fn exit_codes(&self) -> Vec<String> {
        self.told.borrow().iter().filter(|event| event.action == "die").filter_map(|e| e.exit_code.clone()).collect()
    }
}

impl Drop for Story {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

/// Returns the value of a setting of the stage's agent; empty if it is not set.
pub(crate) fn setting(stage: &Stage, name: &str) -> String {
    stage.env.iter().find(|(known, _)| known == name).map(|(_, value)| value.clone()).unwrap_or_default()
}

/// Waits until the master knows the stage's agent.
pub(crate) async fn registered(stage: &Stage) -> Result<Agent> {
    stage.master.wait_for("an agent to register", SOON, |known| known.only_agent().cloned()).await
}

/// Waits until the log reports a ready tunnel after this sentence. With a replacement in between, the nominal time is a
/// third of the limit.
pub(crate) async fn ready_after(agent: &AgentProcess, sentence: &str) -> Result<()> {
    let line = agent.wait_for_log(sentence, SOON).await?;
    let mark = agent.log().lines().position(|other| other == line).unwrap_or_default();
    agent.wait_for_log_after(mark, "tunnel ready", 2 * SOON).await.map(drop)
}

/// Waits until `is_it` holds for what the master knows of the stage's agent. Even at best, the agent reports some
/// causes 25 s after they began.
pub(crate) async fn reported<T>(stage: &Stage, what: &str, is_it: impl Fn(&Agent) -> Option<T>) -> Result<T> {
    stage.master.wait_for(what, 2 * SOON, |known| known.only_agent().and_then(&is_it)).await
}

/// Waits until the agent reports this status with this reason to the master.
pub(crate) async fn told(stage: &Stage, status: &str, reason: Option<&str>) -> Result<Agent> {
    let what = format!("the tunnel to be reported as {status} because of {reason:?}");
    reported(stage, &what, |agent| {
        let told = agent.tunnel_status.as_ref()?;
        (told.status == status && told.event["reason"].as_str() == reason).then(|| agent.clone())
    })
    .await
}

/// Waits for two more polls by the agent: by then it has done whatever it had to do.
pub(crate) async fn two_more_polls(stage: &Stage) -> Result<()> {
    let before = registered(stage).await?.polls;
    reported(stage, "two more polls", |agent| (agent.polls >= before + 2).then_some(())).await
}

/// Makes a case for each kind of master, named after it.
pub(crate) fn on_both<F, Fut>(name: &str, body: F) -> Vec<Case>
where
    F: Fn(Protocol) -> Fut + Copy + Send + 'static,
    Fut: Future<Output = Result<()>> + 'static,
{
    let masters = [("v1", Protocol::V1), ("v2", Protocol::V2)];
    masters.into_iter().map(|(label, protocol)| case(format!("{label}_{name}"), move || body(protocol))).collect()
}
