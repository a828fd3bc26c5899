//! Tests what each of the master's commands does to the tunnel container.

use std::time::Duration;

use anyhow::Result;
use dockflare_dev_master::{Fault, Protocol, Route, tunnel_token};
use serde_json::{Value, json};
use testkit::{Case, wait_until};

use crate::containers_scene::{Story, Tunnel, on_both, ready_after, registered, reported, told, two_more_polls};
use crate::support::{SOON, Stage};

pub(crate) fn cases() -> Vec<Case> {
    let mut cases = testkit::cases![v1_a_command_whose_reply_was_lost_is_recovered_by_registering];
    cases.extend(on_both("the_same_start_again_does_not_restart_the_tunnel", the_same_start_again));
    cases.extend(on_both("a_restart_makes_one_new_container", a_restart));
    cases.extend(on_both("a_restart_is_done_once_though_the_agent_is_killed_when_it_is_on_disk", a_restart_and_a_kill));
    cases.extend(on_both("a_stop_holds_over_an_agent_restart_until_the_next_start", a_stop));
    cases.extend(on_both("a_token_that_cannot_be_right_is_refused_and_nothing_is_touched", a_bad_token));
    cases.extend(on_both("white_space_around_a_token_and_an_id_is_none_of_them", white_space));
    cases.extend(on_both("an_unknown_command_does_not_stop_those_after_it", an_unknown_command));
    cases.extend(on_both("of_several_commands_in_one_reply_the_last_wins", several_commands));
    cases.extend(on_both("a_start_of_another_tunnel_replaces_the_running_one", another_tunnel));
    cases.extend(on_both("ingress_rules_are_pushed_with_the_more_specific_first", ingress_rules));
    cases.extend(on_both("a_master_that_does_the_ingress_itself_is_left_to_it", no_ingress_route));
    cases
}

async fn the_same_start_again(protocol: Protocol) -> Result<()> {
    let stage = Stage::new(protocol).await?;
    let tunnel = Tunnel::new(&stage, "");
    let agent = tunnel.agent(&stage)?;
    let known = tunnel.enrol(&stage, &agent).await?;
    let (before, mark) = (tunnel.container(&stage).await?, agent.mark());
    stage.master.enroll_with(&known.id, "edge", &tunnel.id, &tunnel.token)?;
    agent.wait_for_log_after(mark, "command start_tunnel", SOON).await?;
    two_more_polls(&stage).await?;
    assert_eq!(tunnel.container(&stage).await?, before);
    stage.assert_no_violations();
    Ok(())
}

async fn a_restart(protocol: Protocol) -> Result<()> {
    let stage = Stage::new(protocol).await?;
    let tunnel = Tunnel::new(&stage, "");
    let agent = tunnel.agent(&stage)?;
    let known = tunnel.enrol(&stage, &agent).await?;
    let (before, mark) = (tunnel.container(&stage).await?, agent.mark());
    let story = Story::follow(&stage);
    stage.master.redeploy(&known.id)?;
    agent.wait_for_log_after(mark, "tunnel ready", SOON).await?;
    let after = tunnel.container(&stage).await?;
    assert_ne!(after.id, before.id);
    two_more_polls(&stage).await?;
    assert_eq!(tunnel.container(&stage).await?, after);
    assert_eq!((story.count("create"), story.count("start")), (1, 1));
    assert_eq!(story.exit_codes(), ["0"], "the old one drained");
    stage.assert_no_violations();
    Ok(())
}

async fn a_restart_and_a_kill(protocol: Protocol) -> Result<()> {
    let stage = Stage::new(protocol).await?;
    let tunnel = Tunnel::new(&stage, "");
    let mut first = tunnel.agent(&stage)?;
    let known = tunnel.enrol(&stage, &first).await?;
    let before = tunnel.container(&stage).await?;
    let story = Story::follow(&stage);
    stage.master.redeploy(&known.id)?;
    // Not `wait_until`: a replacement may take less time than its pause between two looks.
    tokio::time::timeout(SOON, async {
        while !stage.file("tunnel_state.json").is_ok_and(|state| state.contains(r#""redeploys": 1"#)) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await?;
    first.sigkill()?;
    first.wait_exit(SOON).await?;
    let second = tunnel.agent(&stage)?;
    ready_after(&second, "replacing the tunnel container").await?;
    let after = tunnel.container(&stage).await?;
    assert_ne!(after.id, before.id);
    two_more_polls(&stage).await?;
    assert_eq!(tunnel.container(&stage).await?, after);
    assert_eq!(story.count("start"), 1);
    Ok(())
}

async fn a_stop(protocol: Protocol) -> Result<()> {
    let stage = Stage::new(protocol).await?;
    let tunnel = Tunnel::new(&stage, "");
    let mut first = tunnel.agent(&stage)?;
    let known = tunnel.enrol(&stage, &first).await?;
    let before = tunnel.container(&stage).await?;
    stage.master.push_commands(&known.id, vec![json!({ "action": "stop_tunnel" })])?;
    told(&stage, "stopped", None).await?;
    assert_eq!(stage.scope.status(&before.id).await?, "gone");
    let state: Value = serde_json::from_str(&stage.file("tunnel_state.json")?)?;
    assert_eq!(state["token"], Value::Null, "nobody needs it any more");
    assert_eq!((&state["id"], &state["name"]), (&json!(tunnel.id), &json!("edge")), "what the status names");
    let status = registered(&stage).await?.tunnel_status.map(|status| status.event).unwrap_or_default();
    assert_eq!((&status["tunnel_id"], &status["name"]), (&json!(tunnel.id), &json!("edge")));

    first.sigkill()?;
    first.wait_exit(SOON).await?;
    let second = tunnel.agent(&stage)?;
    second.wait_for_log("registered at the master", SOON).await?;
    two_more_polls(&stage).await?;
    assert_eq!(stage.scope.status(&stage.tunnel).await?, "gone", "a registration does not start it again");

    stage.master.push_commands(&known.id, vec![tunnel.start()])?;
    second.wait_for_log("tunnel ready", SOON).await?;
    told(&stage, "running", None).await?;
    tunnel.container(&stage).await?;
    stage.assert_no_violations();
    Ok(())
}

async fn a_bad_token(protocol: Protocol) -> Result<()> {
    let stage = Stage::new(protocol).await?;
    let tunnel = Tunnel::new(&stage, "");
    let mut agent = tunnel.agent(&stage)?;
    let known = tunnel.enrol(&stage, &agent).await?;
    let before = tunnel.container(&stage).await?;
    let another = testkit::token(&stage.scope.name("another"), "");
    let not_all_there = tunnel_token("account", &tunnel.id, "");
    for (token, reason) in [
        ("bm90LWEtdG9rZW4tYXQtYWxs", "token_malformed"),
        ("certainly%not%base64", "token_malformed"),
        (not_all_there.as_str(), "token_malformed"),
        (another.as_str(), "token_mismatch"),
    ] {
        agent.plant(token);
        stage.master.enroll_with(&known.id, "edge", &tunnel.id, token)?;
        told(&stage, "error", Some(reason)).await?;
        assert_eq!(tunnel.container(&stage).await?, before, "{reason}");
        stage.master.enroll_with(&known.id, "edge", &tunnel.id, &tunnel.token)?;
        told(&stage, "running", None).await?;
        assert_eq!(tunnel.container(&stage).await?, before);
    }
    Ok(())
}

async fn white_space(protocol: Protocol) -> Result<()> {
    let stage = Stage::new(protocol).await?;
    let tunnel = Tunnel::new(&stage, "");
    let agent = tunnel.agent(&stage)?;
    let known = registered(&stage).await?;
    stage.master.enroll_with(&known.id, " edge ", &format!(" {}\n", tunnel.id), &format!("\t{}\r\n", tunnel.token))?;
    agent.wait_for_log("tunnel ready", SOON).await?;
    let before = tunnel.container(&stage).await?;
    // Without the white space it is the same tunnel.
    stage.master.enroll_with(&known.id, "edge", &tunnel.id, &tunnel.token)?;
    two_more_polls(&stage).await?;
    assert_eq!(tunnel.container(&stage).await?, before);
    Ok(())
}

async fn an_unknown_command(protocol: Protocol) -> Result<()> {
    let stage = Stage::new(protocol).await?;
    let (first, last) = (Tunnel::new(&stage, ""), Tunnel::new(&stage, ""));
    let mut agent = first.agent(&stage)?;
    agent.plant(&last.token);
    let known = registered(&stage).await?;
    let nonsense = [json!({ "action": "make_coffee", "cups": 2 }), json!({ "action": 7 }), json!("start_tunnel")];
    let commands = [vec![first.start()], nonsense.to_vec(), vec![last.start()]].concat();
    stage.master.push_commands(&known.id, commands)?;
    agent.wait_for_log("make_coffee", SOON).await?;
    agent.wait_for_log("tunnel ready", SOON).await?;
    last.container(&stage).await?;
    told(&stage, "running", None).await?;
    stage.assert_no_violations();
    Ok(())
}

async fn several_commands(protocol: Protocol) -> Result<()> {
    let stage = Stage::new(protocol).await?;
    let (first, last) = (Tunnel::new(&stage, ""), Tunnel::new(&stage, ""));
    let mut agent = first.agent(&stage)?;
    agent.plant(&last.token);
    let known = registered(&stage).await?;
    let story = Story::follow(&stage);
    let stop = json!({ "action": "stop_tunnel" });
    let commands = vec![first.start(), first.restart(), stop.clone(), last.start()];
    stage.master.push_commands(&known.id, commands)?;
    agent.wait_for_log("tunnel ready", SOON).await?;
    last.container(&stage).await?;
    for (name, times) in [("start_tunnel", 2), ("restart_tunnel", 1), ("stop_tunnel", 1)] {
        let said = agent.log().lines().filter(|line| line.contains(&format!("command {name}"))).count();
        assert_eq!(said, times, "each is logged: {name}");
    }
    assert_eq!(story.count("create"), 1, "only the last word is acted upon");

    stage.master.push_commands(&known.id, vec![last.restart(), first.start(), stop])?;
    told(&stage, "stopped", None).await?;
    assert_eq!(stage.scope.status(&stage.tunnel).await?, "gone");
    stage.assert_no_violations();
    Ok(())
}

async fn another_tunnel(protocol: Protocol) -> Result<()> {
    let stage = Stage::new(protocol).await?;
    let tunnel = Tunnel::new(&stage, "");
    let mut agent = tunnel.agent(&stage)?;
    let known = tunnel.enrol(&stage, &agent).await?;
    let (before, mark) = (tunnel.container(&stage).await?, agent.mark());
    let id = stage.scope.name("another");
    let another = Tunnel { token: testkit::token(&id, "version=2031.2.0"), id };
    agent.plant(&another.token);
    stage.master.enroll_with(&known.id, "elsewhere", &another.id, &another.token)?;
    agent.wait_for_log_after(mark, "tunnel ready", SOON).await?;
    another.container(&stage).await?;
    assert_eq!(stage.scope.status(&before.id).await?, "gone");
    reported(&stage, "the other tunnel's status", |agent| {
        let status = agent.tunnel_status.as_ref()?;
        let seen = (status.status.as_str(), status.name.as_deref(), status.version.as_deref());
        (seen == ("running", Some("elsewhere"), Some("2031.2.0"))).then_some(())
    })
    .await?;
    stage.assert_no_violations();
    Ok(())
}

/// Returns ingress rules of every kind, with the more specific ones not first.
pub(crate) fn rules() -> Value {
    let rule = |host: &str, path: &str, status: &str| json!({ "hostname": host, "path": path, "service": "http://web:80", "status": status });
    let mut with_origin = rule("a.example.com", "", "active");
    with_origin["no_tls_verify"] = json!(true);
    with_origin["http_host_header"] = json!("inner");
    json!({
        "1": rule("*.example.com", "", "active"),
        "2": with_origin,
        "3": rule("a.example.com", "/api", "active"),
        "4": rule("gone.example.com", "", "pending_deletion"),
        "5": rule("a.example.com", "/api/v2", "active"),
    })
}

async fn ingress_rules(protocol: Protocol) -> Result<()> {
    let stage = Stage::new(protocol).await?;
    let account = "0123456789abcdef0123456789abcdef";
    stage.master.set_account(Some(account));
    let id = stage.scope.name("id");
    let tunnel = Tunnel { token: tunnel_token(account, &id, "c2VjcmV0"), id };
    let agent = tunnel.agent(&stage)?;
    let known = tunnel.enrol(&stage, &agent).await?;
    let before = tunnel.container(&stage).await?;
    let update = json!({ "action": "update_tunnel_config", "rules": rules() });
    stage.master.push_commands(&known.id, vec![update])?;
    agent.wait_for_log("ingress rules pushed", SOON).await?;
    let pushed = stage.master.snapshot().pushed;
    assert_eq!((pushed.len(), pushed[0].account.as_str(), pushed[0].tunnel.as_str()), (1, account, tunnel.id.as_str()));
    let service = "http://web:80";
    let expected = json!([
        { "hostname": "a.example.com", "path": "/api/v2", "service": service },
        { "hostname": "a.example.com", "path": "/api", "service": service },
        { "hostname": "a.example.com", "service": service,
          "originRequest": { "noTLSVerify": true, "httpHostHeader": "inner" } },
        { "hostname": "*.example.com", "service": service },
        { "service": "http_status:404" },
    ]);
    assert_eq!(pushed[0].config["ingress"], expected);
    assert_eq!(tunnel.container(&stage).await?, before, "rules are no reason to touch the tunnel");
    stage.assert_no_violations();
    Ok(())
}

async fn no_ingress_route(protocol: Protocol) -> Result<()> {
    let stage = Stage::new(protocol).await?;
    let tunnel = Tunnel::new(&stage, "");
    let agent = tunnel.agent(&stage)?;
    let known = tunnel.enrol(&stage, &agent).await?;
    let sentence = "this master updates the ingress rules itself";
    let asked = || stage.master.requests().iter().filter(|request| request.route == Route::Accounts).count();
    for round in 1..=2 {
        let update = json!({ "action": "update_tunnel_config", "rules": rules() });
        stage.master.push_commands(&known.id, vec![update])?;
        wait_until("the route to be tried", SOON, async || (asked() >= round).then_some(())).await?;
        two_more_polls(&stage).await?;
    }
    assert_eq!(agent.log().lines().filter(|line| line.contains(sentence)).count(), 1, "said once");
    assert_eq!(asked(), 2, "not tried again by itself");
    told(&stage, "running", None).await?;
    Ok(())
}

async fn v1_a_command_whose_reply_was_lost_is_recovered_by_registering() -> Result<()> {
    let stage = Stage::new(Protocol::V1).await?;
    let tunnel = Tunnel::new(&stage, "");
    let agent = tunnel.agent(&stage)?;
    let known = registered(&stage).await?;
    // Pause the master, so that the agent polls only once both the fault and the command are in place.
    stage
        .master
        .while_paused(async {
            stage.master.fault(Route::Commands, Fault::LostReply, 1);
            stage.master.enroll_with(&known.id, "edge", &tunnel.id, &tunnel.token)
        })
        .await??;
    let lost = |request: &dockflare_dev_master::Request| (request.fault == Some(Fault::LostReply)).then_some(());
    stage.master.wait_for_request("the reply to be lost", SOON, lost).await?;
    agent.wait_for_log("tunnel ready", SOON).await?;
    tunnel.container(&stage).await?;
    told(&stage, "running", None).await?;
    stage.assert_no_violations();
    Ok(())
}
