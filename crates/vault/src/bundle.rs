//! `support-bundle`: what helps to find out what is wrong, without a name, a value or a password.

use serde_json::{Value as Json, json};

use crate::config::{Config, Pass};
use crate::doors::admin::Request;
use crate::run::Source;
use crate::{check, client};

/// One document.
pub fn bundle(source: &Source, config: &Config) -> Json {
    let status = client::ask(config, Request::Status);
    let (checked, _) = check::check(source, config);
    let nats = config.nats.as_ref().map(|nats| {
        let pass = match nats.pass {
            None => "none",
            Some(Pass::Here(_)) => "in the configuration",
            Some(Pass::File(_)) => "in a file",
        };
        json!({ "url": nats.url, "pass": pass })
    });
    json!({
        "program": "dockflare-vault",
        "version": env!("CARGO_PKG_VERSION"),
        "uid": nix::unistd::geteuid().as_raw(),
        "configuration": {
            "file": source.file,
            "store": config.storage.file,
            "change_counter": config.storage.counter,
            "master_key_file": config.master_key_file,
            "audit": { "file": config.audit.file, "max_bytes": config.audit.max_bytes, "keep": config.audit.keep },
            "admin_socket": config.admin_socket,
            "health": config.health.map(|(ip, port)| format!("{ip}:{port}")),
            // Principals and operations tell what is meant; names of secrets stay here.
            "grants": config.grants.rows().iter().map(|row| json!({
                "principal": row.principal.to_string(),
                "operations": row.operations.iter().map(|operation| operation.as_str()).collect::<Vec<_>>(),
            })).collect::<Vec<_>>(),
            "nats": nats,
        },
        "status": status.data,
        "problem": status.message,
        "check": checked.lines().collect::<Vec<_>>(),
    })
}
