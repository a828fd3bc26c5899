//! Each message that the agent sends, held against its sample in `docs/payloads`.

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

/// What a container has that a master shall make a site of, and one label that is none of the master's business.
const LABELS: &[(&str, &str)] = &[
    ("dockflare.enable", "true"),
    ("dockflare.hostname", "app.example.com"),
    ("dockflare.service", "http://web:8080"),
    ("com.example.owner", "somebody"),
];

/// Nobody listens there.
const NOWHERE: &str = "127.0.0.1:1";

async fn each_message(protocol: Protocol) -> Result<()> {
    let mut stage = Stage::new(protocol).await?;
    let mut samples = Samples::new(protocol);
    let relay = Relay::start(Way::Engine).await?;
    stage.set("DOCKER_HOST", relay.host_url());
    // So that a request has all the headers it can have.
    stage.set("CF_ACCESS_CLIENT_ID", "id.access");
    stage.set("CF_ACCESS_CLIENT_SECRET", "not-a-secret");
    stage.master.set_account(Some("0123456789abcdef0123456789abcdef"));

    let mut agent = stage.agent()?;
    first_life(&stage, &mut samples).await?;
    // What Docker does from now on, here and for other tests, is not heard.
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

/// An agent that nobody knows yet, its tunnel, and a container that comes and goes.
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

/// The same agent after a crash, with so little to say that its heart is heard.
async fn second_life(stage: &mut Stage, samples: &mut Samples) -> Result<()> {
    stage.set("COMMAND_POLL_INTERVAL_SECONDS", "3600");
    stage.set("REPORT_INTERVAL_SECONDS", "3600");
    let _agent = stage.agent()?;
    let is_known = |kind: &str, body: &Value| kind == "register" && body["agent_id"].is_string();
    samples.take("register_again", stage, is_known).await?;
    samples.take("heartbeat", stage, |kind, _| kind == "heartbeat").await
}

/// An agent in a container of its own, removed on the master's page: its acknowledgements have all there is to say.
async fn leave(samples: &mut Samples) -> Result<()> {
    let contained = contained(AS_COMPOSE_SERVICE).await?;
    contained.leaves().await?;
    for phase in ["decommission_prepared", "decommission_shutdown_scheduled"] {
        samples.take_from(phase, &contained.master, contained.scope.suffix(), |kind, _| kind == phase).await?;
    }
    assert_eq!(contained.master.violations(), Vec::<String>::new());
    samples.all_sent_to(&contained.master)
}
