//! The program, as the demonstration runs it.

use std::process::Stdio;

use serde_json::json;
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStdout, Command};

use crate::caller::*;

async fn run(arguments: &[&str], environment: &[(&str, &str)]) -> (Child, Lines<BufReader<ChildStdout>>) {
    let mut child = Command::new(env!("CARGO_BIN_EXE_dockflare-dev-master"))
        .args(arguments)
        .envs(environment.iter().copied())
        .env_remove("DEV_MASTER_LISTEN")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    (child, lines)
}

async fn line_with(lines: &mut Lines<BufReader<ChildStdout>>, what: &str) -> String {
    let found = async {
        while let Some(line) = lines.next_line().await.unwrap() {
            if line.contains(what) {
                return line;
            }
        }
        panic!("the output ended without {what}");
    };
    tokio::time::timeout(LONG, found).await.unwrap()
}

#[tokio::test]
async fn it_enrolls_tells_what_happens_and_ends_on_sigterm() {
    let (mut child, mut lines) = run(
        &["--listen", "127.0.0.1:0", "--protocol", "v2", "--key", "the-agent-key:kitchen", "--enroll-new", "edge"],
        &[("DEV_MASTER_MASTER_KEY", "the-master-key")],
    )
    .await;
    let ready = line_with(&mut lines, "development master ready").await;
    let url = ready.split("url=\"").nth(1).and_then(|rest| rest.split('"').next()).unwrap().to_owned();

    let post = |path: String, key: &str, body: serde_json::Value| {
        client().post(format!("{url}{path}")).bearer_auth(key).json(&body).send()
    };
    let reply = post("/api/v2/agents/register".to_owned(), "the-agent-key", registration()).await.unwrap();
    let reply: serde_json::Value = reply.json().await.unwrap();
    line_with(&mut lines, "agent registered for the first time").await;
    line_with(&mut lines, "agent enrolled").await;
    let session = json!({ "protocol_version": 2, "agent_session_id": reply["agent_session_id"], "event_sequence": 1 });
    let start = merged(&merged(&event("container_start"), &session), &json!({ "container": container("c1") }));
    let events = format!("/api/v2/agents/{}/events", reply["agent_id"].as_str().unwrap());
    assert_eq!(post(events, "the-agent-key", start).await.unwrap().status(), 200);
    line_with(&mut lines, "container started").await;

    let pid = child.id().unwrap().to_string();
    assert!(Command::new("kill").args(["-TERM", &pid]).status().await.unwrap().success());
    line_with(&mut lines, "SIGTERM").await;
    assert!(child.wait().await.unwrap().success());
}

#[tokio::test]
async fn it_does_not_start_without_a_master_key() {
    let (mut child, _) = run(&["--listen", "127.0.0.1:0"], &[]).await;
    assert_eq!(child.wait().await.unwrap().code(), Some(2));
}
