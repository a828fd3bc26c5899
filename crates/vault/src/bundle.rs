//! `support-bundle`: what helps to find a problem, without a name, a value or a password.

use serde_json::{Value as Json, json};

use crate::check::{self, Names};
use crate::client;
use crate::config::{Config, Pass};
use crate::doors::admin::Request;
use crate::run::Source;

/// Makes the bundle, one JSON document.
pub fn bundle(source: &Source, config: &Config) -> Json {
    let mut status = client::ask(config, Request::Status);
    for state in status.data["deliveries"].as_object_mut().into_iter().flat_map(|states| states.values_mut()) {
        for lines in ["missing", "denied"] {
            // Each line contains the name of a secret.
            if let Some(count) = state[lines].as_array().map(Vec::len) {
                state[lines] = json!(count);
            }
        }
    }
    let (checked, _) = check::check(source, config, Names::Hidden);
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
            "next_master_key_file": config.next_master_key_file,
            "audit": { "file": config.audit.file, "max_bytes": config.audit.max_bytes, "keep": config.audit.keep },
            "admin_socket": config.admin_socket,
            "health": config.health.map(|(ip, port)| format!("{ip}:{port}")),
            // Principals and operations tell what is intended. The names of secrets stay out.
            "grants": config.grants.rows().iter().map(|row| json!({
                "principal": row.principal.to_string(),
                "operations": row.operations.iter().map(|operation| operation.as_str()).collect::<Vec<_>>(),
            })).collect::<Vec<_>>(),
            "nats": nats,
            // Without the names of files and secrets.
            "deliveries": config.deliveries.iter().map(|delivery| json!({
                "workload": delivery.workload.as_str(),
                "directory": delivery.directory,
                "allow_disk": delivery.allow_disk,
                "uid": delivery.uid,
                "gid": delivery.gid,
                "files": delivery.files.len(),
                "on_change": format!("{:?}", delivery.on_change),
            })).collect::<Vec<_>>(),
        },
        "status": status.data,
        "problem": status.message,
        "check": checked.lines().collect::<Vec<_>>(),
    })
}
