//! The settings in a form that may be shown: every variable with its effective value, secrets only as set or unset. For
//! `dockflare-agent support-bundle`, which also works when the configuration has mistakes.

use std::collections::BTreeMap;
use std::path::Path;

use dockflare_host::disk;
use secrecy::SecretString;
use serde_json::{Map, Value};

use super::check::{without_quotes, without_secrets};
use super::environment::environment;
use super::{DEFAULT_IMAGE, read_secret_file, shown_file};

/// How to show a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// As it is, or this default.
    Plain(Option<&'static str>),
    /// Without what may be a password in it, or this default.
    Address(Option<&'static str>),
    /// `set` or `unset`.
    Secret,
    /// The path of a secret's file. The path itself is not secret.
    SecretFile,
}

/// All variables of the table in `docs/settings.md`, in the same order.
const SETTINGS: [(&str, Kind); 34] = {
    use Kind::{Address, Plain, Secret, SecretFile};
    [
        ("DOCKFLARE_MASTER_URL", Address(None)),
        ("DOCKFLARE_API_KEY", Secret),
        ("DOCKFLARE_API_KEY_FILE", SecretFile),
        ("CF_ACCESS_CLIENT_ID", Secret),
        ("CF_ACCESS_CLIENT_SECRET", Secret),
        ("CF_ACCESS_CLIENT_SECRET_FILE", SecretFile),
        ("DOCKER_HOST", Address(Some("unix:///var/run/docker.sock"))),
        ("DOCKER_TLS_VERIFY", Plain(None)),
        ("DOCKER_CERT_PATH", Plain(None)),
        ("CLOUDFLARED_IMAGE", Plain(Some(DEFAULT_IMAGE))),
        ("CLOUDFLARED_PULL", Plain(Some("missing"))),
        ("CLOUDFLARED_NETWORK_NAME", Plain(Some("cloudflare-net"))),
        ("CLOUDFLARED_METRICS_NETWORK", Plain(None)),
        ("TUNNEL_CONTAINER_NAME", Plain(Some("dockflare-agent-tunnel"))),
        ("TUNNEL_ON_EXIT", Plain(Some("remove"))),
        ("TUNNEL_LEASE_SECONDS", Plain(Some("60"))),
        ("AUTO_CONNECT_NETWORKS", Plain(Some("false"))),
        ("CLOUDFLARED_PROTOCOL", Plain(None)),
        ("CLOUDFLARED_REGION", Plain(None)),
        ("CLOUDFLARED_EDGE_IP_VERSION", Plain(None)),
        ("CLOUDFLARED_POST_QUANTUM", Plain(None)),
        ("CLOUDFLARED_LOGLEVEL", Plain(None)),
        ("CLOUDFLARED_GRACE_PERIOD", Plain(Some("30"))),
        ("CLOUDFLARED_HOST_GATEWAY", Plain(Some("true"))),
        ("REPORT_INTERVAL_SECONDS", Plain(Some("30"))),
        ("COMMAND_POLL_INTERVAL_SECONDS", Plain(Some("10"))),
        ("AGENT_DISPLAY_NAME", Plain(None)),
        ("LOG_LEVEL", Plain(Some("INFO"))),
        ("LOG_FORMAT", Plain(Some("text"))),
        ("TZ", Plain(Some("UTC"))),
        ("HEALTH_CHECK_PORT", Plain(Some("8080"))),
        ("HEALTH_CHECK_BIND", Plain(Some("0.0.0.0"))),
        ("DOCKFLARE_DATA_DIR", Plain(Some(DEFAULT_DATA_DIR))),
        ("HOSTNAME", Plain(None)),
    ]
};

/// Default folder of the state.
pub(super) const DEFAULT_DATA_DIR: &str = "/app/data";

/// The settings as they may be shown, and the secrets among them, which must not appear elsewhere either.
#[derive(Debug)]
pub(crate) struct Settings {
    /// By name; `null` if the variable is unset and has no default.
    pub(crate) shown: Map<String, Value>,
    /// Values of the secrets, including those in files.
    pub(crate) secrets: Vec<SecretString>,
}

impl Settings {
    /// The settings of this process and of the `.env` in its working folder.
    pub(crate) fn of_environment() -> Self {
        Self::of(&environment().vars)
    }

    fn of(vars: &BTreeMap<String, String>) -> Self {
        let (mut shown, mut secrets) = (Map::new(), Vec::<SecretString>::new());
        for (name, kind) in SETTINGS {
            let set = vars.get(name).map(|value| value.trim()).filter(|value| !value.is_empty());
            let value = match (kind, set) {
                (Kind::Plain(default), set) => set.or(default).map(str::to_owned),
                (Kind::Address(default), set) => set.map(without_secrets).or(default.map(str::to_owned)),
                (Kind::Secret, Some(secret)) => {
                    secrets.push(secret.into());
                    // Also without quotes: that is the value that the agent uses and sends.
                    let bare = Some(without_quotes(secret)).filter(|bare| *bare != secret);
                    secrets.extend(bare.map(Into::into));
                    Some("set".to_owned())
                }
                (Kind::Secret, None) => Some("unset".to_owned()),
                (Kind::SecretFile, Some(path)) => {
                    let read = read_secret_file(Path::new(without_quotes(path)), disk::read_at_start);
                    secrets.extend(read.ok().map(|(secret, _)| secret.into()));
                    Some(shown_file(path).to_owned())
                }
                (Kind::SecretFile, None) => None,
            };
            // A password in an address is a secret, whether or not the address is valid.
            if let (Kind::Address(_), Some(address)) = (kind, set) {
                secrets.extend(password(address).map(Into::into));
            }
            shown.insert(name.to_owned(), value.map_or(Value::Null, Value::String));
        }
        Self { shown, secrets }
    }
}

fn password(address: &str) -> Option<String> {
    let (before, _) = address.rsplit_once('@')?;
    let user = before.rsplit_once("//").map_or(before, |(_, user)| user);
    let (_, password) = user.split_once(':')?;
    Some(password.to_owned())
}

#[cfg(test)]
mod tests {
    use secrecy::ExposeSecret;

    use super::*;
    use crate::config::Config;

    #[test]
    fn every_variable_of_the_documented_table_is_shown_and_no_other() {
        let page = include_str!("../../docs/settings.md");
        let table = page.lines().skip_while(|line| !line.starts_with("| variable | default |")).skip(2);
        let rows: Vec<_> = table.take_while(|line| line.starts_with('|')).collect();
        let first = |row: &&str| row.split('|').nth(1).unwrap_or_default().to_owned();
        let named: Vec<_> = rows.iter().map(first).collect();
        let mut listed: Vec<_> = named.iter().flat_map(|cell| cell.split('`').skip(1).step_by(2)).collect();
        // Set by Docker; the agent recognizes its own container by it.
        listed.push("HOSTNAME");
        assert_eq!(SETTINGS.map(|(name, _)| name).to_vec(), listed);
    }

    #[test]
    fn what_is_assumed_is_what_the_agent_assumes() {
        let settings = Settings::of(&BTreeMap::new());
        let assumed =
            settings.shown.iter().filter_map(|(name, value)| Some((name.clone(), value.as_str()?.to_owned())));
        let required = [("DOCKFLARE_MASTER_URL", "http://m"), ("DOCKFLARE_API_KEY", "k")];
        let required = required.map(|(name, value)| (name.to_owned(), value.to_owned()));
        let plain = assumed.filter(|(_, value)| value != "unset");
        let all = Config::from_vars(plain.chain(required.clone())).unwrap().config;
        let none = Config::from_vars(required).unwrap().config;
        assert_eq!(format!("{all:?}"), format!("{none:?}"));
    }

    #[test]
    fn secrets_are_told_as_set_and_kept_to_look_for_them() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("key");
        std::fs::write(&file, "in-a-file\n").unwrap();
        let vars = [
            ("DOCKFLARE_MASTER_URL", "https://me:pass-word@m/x?token=1"),
            ("DOCKFLARE_API_KEY_FILE", file.to_str().unwrap()),
            ("CF_ACCESS_CLIENT_ID", "an-id"),
            ("CF_ACCESS_CLIENT_SECRET", "'in-quotes'"),
            ("LOG_LEVEL", " DEBUG "),
        ];
        let settings = Settings::of(&vars.map(|(name, value)| (name.to_owned(), value.to_owned())).into());
        let text = Value::Object(settings.shown.clone()).to_string();
        for secret in ["in-a-file", "pass-word", "an-id", "in-quotes", "token=1"] {
            assert!(!text.contains(secret), "{text}");
        }
        let kept: Vec<_> = settings.secrets.iter().map(ExposeSecret::expose_secret).collect();
        assert_eq!(kept, ["pass-word", "in-a-file", "an-id", "'in-quotes'", "in-quotes"]);
        assert_eq!(settings.shown["CF_ACCESS_CLIENT_ID"], "set");
        assert_eq!(settings.shown["DOCKFLARE_API_KEY"], "unset");
        assert_eq!(settings.shown["LOG_LEVEL"], "DEBUG");
    }
}
