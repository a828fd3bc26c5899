//! `dockflare-agent support-bundle`: prints one JSON document for somebody who helps to diagnose a problem.
//!
//! The document holds the findings of [`crate::check`], the pages of the agent that runs in the same container, and
//! versions, settings and files. It changes nothing and holds no secret: secrets are not put in, and text from
//! elsewhere, such as log lines, is searched for every secret that this process can know.

use std::path::PathBuf;
use std::time::Duration;

use dockflare_host::redact;
use secrecy::SecretString;
use serde_json::{Value, json};
use tokio::time::timeout;

use crate::check;
use crate::config::{Config, Loaded, PageAddress, Settings};
use crate::docker::Docker;
use crate::{health, logging, page, state};

/// Time limit for Docker's version and the look at the tunnel container.
const LIMIT: Duration = Duration::from_secs(10);

/// Runs the subcommand: prints the document.
pub async fn command() {
    logging::print(&format!("{:#}\n", gather().await)).await;
}

/// Gathers the document. Takes as long as a check.
async fn gather() -> Value {
    let settings = Settings::of_environment();
    let loaded = Config::load();
    let address = Config::load_health_page().ok().flatten();
    let data_dir = PathBuf::from(settings.shown["DOCKFLARE_DATA_DIR"].as_str().unwrap_or_default());
    let config = loaded.as_ref().ok().map(|Loaded { config, .. }| config.clone());
    let (check, health, log, versions) = tokio::join!(
        check::run(loaded),
        agent_says(address, "/health"),
        agent_says(address, "/log"),
        versions(config.as_ref())
    );
    let log = match log {
        Ok(page) if page["lines"].is_array() => page["lines"].clone(),
        // Another agent's page, or the address is not this container's own.
        Ok(page) => not_available(page["error"].as_str().unwrap_or("the agent that runs does not show it")),
        Err(why) => not_available(&why),
    };
    let files = state::files(data_dir.clone()).await.map(|files| json!(files));
    let mut document = json!({
        "generated_at": jiff::Timestamp::now().to_string(),
        "versions": versions,
        "configuration": settings.shown,
        "check": check.to_json(),
        "health": health.unwrap_or_else(|why| not_available(&why)),
        "files": files.unwrap_or_else(|error| not_available(&format!("{}: {error}", data_dir.display()))),
        "log": log,
    });
    let folder = state::peek_soon(data_dir).await;
    redact::redact(&mut document, &words(&settings.secrets, &folder));
    document
}

fn not_available(why: &str) -> Value {
    json!({ "not_available": why })
}

/// Fetches a page from the agent that runs in the same container.
async fn agent_says(address: Option<PageAddress>, path: &str) -> Result<Value, String> {
    let Some(address) = address else {
        return Err("the agent's page is switched off (HEALTH_CHECK_PORT=0)".to_owned());
    };
    page::ask(address, path).await
}

async fn versions(config: Option<&Config>) -> Value {
    let kernel = kernel();
    let (mut docker, mut cloudflared) = (Value::Null, Value::Null);
    if let Some(config) = config {
        let client = Docker::new(config.docker_host.clone());
        let asked =
            async { (client.engine().await, health::glance(&client, &config.tunnel, health::Whose::Any).await) };
        if let Ok((engine, glance)) = timeout(LIMIT, asked).await {
            docker = match engine {
                Ok(engine) => engine.version.map_or(Value::Null, |version| {
                    json!({
                        "engine": version.engine,
                        "api": version.api,
                        "platform": format!("{}/{}", version.os, version.arch),
                        "kernel": version.kernel,
                    })
                }),
                Err(error) => not_available(&format!("Docker {error}")),
            };
            cloudflared = glance
                .ok()
                .flatten()
                .map_or(Value::Null, |seen| json!({ "version": seen.version, "image": seen.image }));
        }
    }
    json!({ "agent": env!("CARGO_PKG_VERSION"), "docker": docker, "cloudflared": cloudflared, "kernel": kernel })
}

#[expect(clippy::disallowed_methods, reason = "the kernel itself answers")]
fn kernel() -> Option<String> {
    std::fs::read_to_string("/proc/sys/kernel/osrelease").ok().map(|text| text.trim().to_owned())
}

/// Returns what must not appear: the settings' secrets, the tunnel's token and the secret in it, each also in base64.
fn words(settings: &[SecretString], folder: &state::Folder) -> Vec<SecretString> {
    let mut secrets = settings.to_vec();
    if let Ok(Some(tunnel)) = &folder.tunnel {
        secrets.extend(tunnel.token.iter().map(|token| token.expose().to_owned().into()));
        secrets.extend(tunnel.token.as_ref().and_then(state::Token::secret));
    }
    redact::words(secrets)
}

#[cfg(test)]
mod tests {
    use base64::Engine as _;
    use base64::engine::general_purpose::STANDARD;

    use super::*;
    use crate::state::testing::token;

    #[test]
    fn every_secret_is_taken_out_wherever_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let token = token("t1");
        let state = json!({ "token": token, "id": "t1", "desired_state": "running" });
        std::fs::write(dir.path().join("tunnel_state.json"), state.to_string()).unwrap();
        let words = words(&["the-agent-key".into(), "abc".into()], &state::peek(dir.path()));
        let base64 = STANDARD.encode("the-agent-key");
        let mut document = json!({
            "log": ["abc", format!("key the-agent-key, {base64}"), format!("x{token}y"), "its secret c2VjcmV0"],
            "the-agent-key": { "n": 1 },
        });
        redact::redact(&mut document, &words);
        assert_eq!(
            document,
            json!({
                "log": ["abc", "key <redacted>, <redacted>", "x<redacted>y", "its secret <redacted>"],
                "<redacted>": { "n": 1 },
            })
        );
    }
}
