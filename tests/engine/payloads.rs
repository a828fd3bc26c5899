//! Compares each message that the agent sends with its sample in `docs/payloads`.

use anyhow::Result;
use dockflare_dev_master::Protocol;
use serde_json::{Value, json};
use testkit::{Case, Spec};

use crate::containers_commands::rules;
use crate::containers_scene::{on_both, registered, told};
use crate::decommission::own_container::{AS_COMPOSE_SERVICE, contained};
use crate::support::relay::{Relay, Way};
use crate::support::{SOON, Stage};

mod samples;
use samples::{Samples, TUNNEL};

pub(crate) fn cases() -> Vec<Case> {
    on_both("each_message_is_as_its_sample_in_docs_payloads", each_message)
}

/// The labels of a container that a master makes a site of, and one label that must not reach the master.
const LABELS: &[(&str, &str)] = &[
    ("dockflare.enable", "true"),
    ("dockflare.hostname", "app.example.com"),
    ("dockflare.service", "http://web:8080"),
    ("com.example.owner", "somebody"),
];

/// An address where nobody listens.
const NOWHERE: &str = "127.0.0.1:1";

async fn each_message(protocol: Protocol) -> Result<()> {
    let mut stage = Stage::new(protocol).await?;
    let mut samples = Samples::new(protocol);
    let relay = Relay::start(Way::Engine).await?;
    stage.set("DOCKER_HOST", relay.host_url());
    // Make the requests carry every possible header.
    stage.set("CF_ACCESS_CLIENT_ID", "id.access");
    stage.set("CF_ACCESS_CLIENT_SECRET", "not-a-secret");
    stage.master.set_account(Some("0123456789abcdef0123456789abcdef"));

    let mut agent = stage.agent()?;
    first_life(&stage, &mut samples).await?;
    // Cut the agent off from Docker's events, including those of other tests.
    relay.switch(Way::Proxy(NOWHERE.to_owned()));
    if protocol == Protocol::V2 {
        let is_incomplete = |_: &str, body: &Value| body["inventory_complete"] == false;
        samples.take("status_report_incomplete", &stage, is_incomplete).await?;
    }
    agent.sigkill()?;
    agent.wait_exit(SOON).await?;
    second_life(&mut stage, &mut samples).await?;
    samples.all_sent_to(&stage.master)?;
    if protocol == Protocol::V2 {
        leave(&mut samples).await?;
    }
    stage.assert_no_violations();
    samples.check()
}

/// Takes the samples of a new agent, its tunnel, and a container that starts and stops.
async fn first_life(stage: &Stage, samples: &mut Samples) -> Result<()> {
    let (master, scope) = (&stage.master, &stage.scope);
    let id = registered(stage).await?.id;
    samples.take("register", stage, |kind, _| kind == "register").await?;

    master.enroll_with(&id, "edge", TUNNEL, "not-a-token")?;
    told(stage, "error", Some("token_malformed")).await?;
    samples.take("tunnel_status_error", stage, |_, body| body["status"] == "error").await?;
    master.enroll(&id, "edge")?;
    let all_there = |_: &str, body: &Value| {
        (&body["status"], &body["config_version"], &body["ready_connections"])
            == (&json!("running"), &json!(1), &json!(4))
    };
    samples.take("tunnel_status_running", stage, all_there).await?;

    let image = testkit::images().workload().await?;
    let web = scope.run(Spec { image: &image, name: &scope.name("web"), labels: LABELS, ..Spec::default() }).await?;
    let is_web = |kind: &str, body: &Value, wanted: &str| kind == wanted && body["container"]["id"] == *web;
    samples.take("container_start", stage, |kind, body| is_web(kind, body, "container_start")).await?;
    let lists_web = |kind: &str, body: &Value| kind == "status_report" && body.to_string().contains(&web);
    samples.take("status_report", stage, lists_web).await?;
    scope.stop(&web, 0).await?;
    samples.take("container_stop", stage, |kind, body| is_web(kind, body, "container_stop")).await?;

    master.push_commands(&id, vec![json!({ "action": "update_tunnel_config", "rules": rules() })])?;
    samples.take("configuration", stage, |kind, _| kind == "configuration").await
}

/// Takes the samples of the same agent after a crash, with intervals so long that it sends heartbeats.
async fn second_life(stage: &mut Stage, samples: &mut Samples) -> Result<()> {
    stage.set("COMMAND_POLL_INTERVAL_SECONDS", "3600");
    stage.set("REPORT_INTERVAL_SECONDS", "3600");
    let _agent = stage.agent()?;
    let is_known = |kind: &str, body: &Value| kind == "register" && body["agent_id"].is_string();
    samples.take("register_again", stage, is_known).await?;
    samples.take("heartbeat", stage, |kind, _| kind == "heartbeat").await
}

/// Takes the samples of an agent in a container that is decommissioned on the master's page. Its acknowledgements have
/// every possible member.
async fn leave(samples: &mut Samples) -> Result<()> {
    let contained = contained(AS_COMPOSE_SERVICE).await?;
    contained.leaves().await?;
    for phase in ["decommission_prepared", "decommission_shutdown_scheduled"] {
        samples.take_from(phase, &contained.master, contained.scope.suffix(), |kind, _| kind == phase).await?;
    }
    assert_eq!(contained.master.violations(), Vec::<String>::new());
    samples.all_sent_to(&contained.master)
}
