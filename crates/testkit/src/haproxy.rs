//! Builds the files of a Docker socket proxy: this machine's HAProxy and a configuration that behaves like
//! `tecnativa/docker-socket-proxy` 0.4.1, the most used one.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::files::Files;

const ROOT: (u64, u64) = (0, 0);
const PROGRAM: &str = "/usr/sbin/haproxy";
/// The proxy's TCP port.
pub(crate) const PORT: u16 = 2375;

/// Maps each variable to the path it opens. The pattern has no end anchor: it opens everything below the path and
/// every path with that prefix.
const OPENS: [(&str, &str); 27] = [
    ("ALLOW_RESTARTS", "/containers/[a-zA-Z0-9_.-]+/(stop|restart|kill)"),
    ("ALLOW_START", "/containers/[a-zA-Z0-9_.-]+/start"),
    ("ALLOW_STOP", "/containers/[a-zA-Z0-9_.-]+/stop"),
    ("AUTH", "/auth"),
    ("BUILD", "/build"),
    ("COMMIT", "/commit"),
    ("CONFIGS", "/configs"),
    ("CONTAINERS", "/containers"),
    ("DISTRIBUTION", "/distribution"),
    ("EVENTS", "/events"),
    ("EXEC", "/exec"),
    ("GRPC", "/grpc"),
    ("IMAGES", "/images"),
    ("INFO", "/info"),
    ("NETWORKS", "/networks"),
    ("NODES", "/nodes"),
    ("PING", "/_ping"),
    ("PLUGINS", "/plugins"),
    ("SECRETS", "/secrets"),
    ("SERVICES", "/services"),
    ("SESSION", "/session"),
    ("SWARM", "/swarm"),
    ("SYSTEM", "/system"),
    ("TASKS", "/tasks"),
    ("VERSION", "/version"),
    ("VOLUMES", "/volumes"),
    // Opens no path. It allows methods other than GET and HEAD.
    ("POST", ""),
];

/// Our own variable: forbids disconnecting containers from a network, whatever else is open.
pub(crate) const KEEPS_CONNECTED: &str = "KEEPS_CONNECTED";

/// The variables that default to 1.
const OPEN_BY_DEFAULT: [&str; 3] = ["EVENTS", "PING", "VERSION"];

/// The reply to a refused request: HTTP/1.0 with an HTML body. It closes the connection.
const REFUSAL: &str = "HTTP/1.0 403 Forbidden\r\n\
    Cache-Control: no-cache\r\n\
    Connection: close\r\n\
    Content-Type: text/html\r\n\
    \r\n\
    <html><body><h1>403 Forbidden</h1>\nRequest forbidden by administrative rules.\n</body></html>\n";

/// Returns HAProxy, the libraries it needs, and its configuration.
pub(crate) fn files() -> Result<Files> {
    ensure!(Path::new(PROGRAM).exists(), "HAProxy is not installed: apt-get install haproxy");
    let output = Command::new("ldd").arg(PROGRAM).output().context("cannot run ldd")?;
    ensure!(output.status.success(), "ldd {PROGRAM}: {}", String::from_utf8_lossy(&output.stderr));
    let mut files = Files::new()
        .copy(PROGRAM, Path::new(PROGRAM), 0o755, ROOT)?
        .bytes("/etc/haproxy/haproxy.cfg", configuration(), 0o644, ROOT)
        .bytes("/etc/haproxy/403.http", REFUSAL, 0o644, ROOT);
    for library in libraries(&String::from_utf8_lossy(&output.stdout)) {
        files = files.copy(library, Path::new(library), 0o755, ROOT)?;
    }
    Ok(files)
}

/// Returns the image's configuration as Dockerfile instructions.
pub(crate) fn changes() -> Vec<String> {
    let variables =
        OPENS.iter().map(|(variable, _)| format!("ENV {variable}={}", u8::from(OPEN_BY_DEFAULT.contains(variable))));
    let fixed = [
        "ENV LOG_LEVEL=info".to_owned(),
        format!("ENV {KEEPS_CONNECTED}=0"),
        format!("EXPOSE {PORT}"),
        format!(r#"ENTRYPOINT ["{PROGRAM}", "-db", "-f", "/etc/haproxy/haproxy.cfg"]"#),
    ];
    variables.chain(fixed).collect()
}

/// Returns the absolute paths in the output of `ldd`, including the dynamic loader's.
fn libraries(report: &str) -> Vec<&str> {
    report.lines().filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/'))).collect()
}

fn configuration() -> String {
    let version = r"^(/v[\d\.]+)?(/\w+)?";
    let path = |pattern: &str| format!("path,url_dec -m reg -i {version}{pattern}");
    let rules: String = OPENS
        .iter()
        .filter(|(_, pattern)| !pattern.is_empty())
        .map(|(variable, pattern)| {
            format!("    http-request allow if {{ {} }} {{ env({variable}) -m bool }}\n", path(pattern))
        })
        .collect();
    format!(
        "\
global
    log stdout format raw daemon \"${{LOG_LEVEL}}\"
    maxconn 4000

defaults
    mode http
    log global
    option httplog
    option dontlognull
    option http-server-close
    option redispatch
    retries 3
    maxconn 3000
    timeout http-request 10s
    timeout http-keep-alive 10s
    timeout queue 1m
    timeout connect 10s
    timeout client 10m
    timeout server 10m
    errorfile 403 /etc/haproxy/403.http

frontend clients
    bind :{PORT}
    http-request deny unless METH_GET || {{ env(POST) -m bool }}
    http-request deny if {{ path,url_dec -m reg -i /networks/[^/]+/disconnect$ }} {{ env({KEEPS_CONNECTED}) -m bool }}
{rules}    http-request deny
    use_backend events if {{ {events} }}
    default_backend engine

backend engine
    server socket /var/run/docker.sock

# Events may be silent for longer than any time limit; the client's still holds.
backend events
    timeout server 0
    server socket /var/run/docker.sock
",
        events = path("/events"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_libraries_and_the_loader_but_not_the_vdso() {
        let report = "\tlinux-vdso.so.1 (0x00007ffd)\n\
            \tlibcrypt.so.1 => /lib/x86_64-linux-gnu/libcrypt.so.1 (0x00007f00)\n\
            \t/lib64/ld-linux-x86-64.so.2 (0x00007f01)\n";
        assert_eq!(libraries(report), ["/lib/x86_64-linux-gnu/libcrypt.so.1", "/lib64/ld-linux-x86-64.so.2"]);
    }

    #[test]
    fn every_variable_has_a_rule_and_a_default() {
        let configuration = configuration();
        for (variable, _) in OPENS {
            assert!(configuration.contains(&format!("env({variable})")), "{variable}");
            assert!(changes().iter().any(|change| change.starts_with(&format!("ENV {variable}="))), "{variable}");
        }
        assert!(changes().contains(&"ENV PING=1".to_owned()) && changes().contains(&"ENV POST=0".to_owned()));
    }
}
