//! `dockflare-agent support-bundle`: what it contains, and what it must never contain.

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD, URL_SAFE_NO_PAD};
use dockflare_dev_master::{DevMaster, Protocol};
use serde_json::Value;

use crate::desk::{Desk, stop};
use crate::program::free_port;
use crate::support::SOON;
use crate::support::checked::run;

async fn bundle(desk: &Desk) -> (String, Value) {
    let (code, text) = run(&["support-bundle"], &desk.env, desk.data.path(), &[&desk.key]).await.unwrap();
    assert_eq!(code, Some(0), "{text}");
    let document = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"));
    (text, document)
}

/// The secret in plain text, and in each form that could wrap it.
fn wrapped(secret: &str) -> Vec<String> {
    let mut all = vec![secret.to_owned(), STANDARD.encode(secret), URL_SAFE_NO_PAD.encode(secret)];
    all.push(STANDARD_NO_PAD.encode(secret));
    all
}

#[tokio::test]
async fn it_holds_what_helps_and_none_of_the_planted_secrets() {
    for in_files in [false, true] {
        let (id, secret) = ("4cc355-id.access", "s3cret-of-access");
        let master = DevMaster::builder().protocol(Protocol::V2).access(id, secret);
        let mut desk = Desk::with(master).await.unwrap();
        let port = free_port();
        desk.set("HEALTH_CHECK_PORT", port.to_string());
        desk.set("CF_ACCESS_CLIENT_ID", id);
        desk.set("AGENT_DISPLAY_NAME", "kitchen");
        if in_files {
            for (name, value) in
                [("DOCKFLARE_API_KEY", desk.key.clone()), ("CF_ACCESS_CLIENT_SECRET", secret.to_owned())]
            {
                let file = desk.path(&name.to_lowercase());
                std::fs::write(&file, value).unwrap();
                desk.set(name, "");
                desk.set(&format!("{name}_FILE"), file.display().to_string());
            }
        } else {
            desk.set("CF_ACCESS_CLIENT_SECRET", secret);
        }
        let mut agent = desk.agent().unwrap();
        let known = desk.registered(1).await.unwrap();
        let tunnel = desk.master.enroll(&known.id, "edge").unwrap();
        agent.wait_for_log("command start_tunnel", SOON).await.unwrap();
        testkit::wait_until("the state", SOON, async || {
            desk.file("tunnel_state.json").ok().filter(|t| t.contains("edge"))
        })
        .await
        .unwrap();

        let before = desk.master.snapshot().registrations;
        let (text, document) = bundle(&desk).await;
        let claims: Value = serde_json::from_slice(&STANDARD.decode(&tunnel.token).unwrap()).unwrap();
        let inner = claims["s"].as_str().unwrap();
        for hidden in [desk.key.as_str(), id, secret, tunnel.token.as_str(), inner] {
            for form in wrapped(hidden) {
                assert!(!text.contains(&form), "a secret is in the bundle");
            }
        }

        assert_eq!(document["configuration"]["CF_ACCESS_CLIENT_ID"], "set");
        let key = if in_files { "unset" } else { "set" };
        assert_eq!(document["configuration"]["DOCKFLARE_API_KEY"], key);
        assert_eq!(document["configuration"]["DOCKFLARE_API_KEY_FILE"].is_string(), in_files);
        assert_eq!(document["configuration"]["AGENT_DISPLAY_NAME"], "kitchen");
        assert_eq!(document["configuration"]["CLOUDFLARED_NETWORK_NAME"], "cloudflare-net");
        assert_eq!(document["health"]["agent_id"], known.id);
        assert_eq!(document["check"]["checks"][0]["id"], "config");
        assert_eq!(document["versions"]["agent"], env!("CARGO_PKG_VERSION"));
        assert!(document["versions"]["docker"]["not_available"].is_string(), "{document:#}");
        let files = document["files"].as_array().unwrap();
        let state = files.iter().find(|file| file["name"] == "tunnel_state.json").unwrap();
        assert!(
            state["mode"] == "0600" && state["bytes"].as_u64() > Some(0) && state["modified"].is_string(),
            "{state}"
        );
        let lines = document["log"].as_array().unwrap();
        assert!(lines.iter().any(|line| line.to_string().contains("command start_tunnel")), "{document:#}");
        assert!(document["generated_at"].is_string());
        assert_eq!(desk.master.snapshot().registrations, before);
        stop(&mut agent).await.unwrap();
        desk.assert_no_violations();
    }
}

#[tokio::test]
async fn without_an_agent_and_with_mistakes_in_the_configuration_it_says_so() {
    let mut desk = Desk::new(Protocol::V2).await.unwrap();
    let port = free_port();
    desk.set("HEALTH_CHECK_PORT", port.to_string());
    desk.set("DOCKFLARE_MASTER_URL", "https://me:pass-w0rd@master.example?key=0ther-secret");
    desk.set("DOCKER_HOST", "tcp://me:d0cker-word@proxy:2375");
    let (text, document) = bundle(&desk).await;
    for hidden in ["pass-w0rd", "0ther-secret", "d0cker-word", desk.key.as_str()] {
        assert!(!text.contains(hidden), "a secret is in the bundle");
    }
    assert_eq!(document["check"]["ok"], false);
    for part in ["health", "log"] {
        let why = document[part]["not_available"].as_str().unwrap_or_default();
        assert!(why.contains(&port.to_string()), "{document:#}");
    }
}
