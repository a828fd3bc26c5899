//! Requests that the socket proxy must refuse, each with the rule that refuses it. The proxy's own tests prove with an
//! upstream that it forwards nothing. The tests on a real Engine compare the Engine's state before and after.

use serde_json::{Value, json};

#[path = "attacks/create.rs"]
mod create;
#[path = "attacks/mutate.rs"]
mod mutate;
pub(crate) use mutate::mutated;

/// One request that must be refused.
pub(crate) struct Attack {
    pub(crate) name: String,
    pub(crate) bytes: Vec<u8>,
    pub(crate) rule: &'static str,
}

/// What the attacker knows.
pub(crate) struct Target<'a> {
    /// Name of the tunnel container.
    pub(crate) tunnel: &'a str,
    /// Name of the tunnel's network.
    pub(crate) network: &'a str,
    /// Image of the tunnel container.
    pub(crate) image: &'a str,
    /// Name of somebody else's container.
    pub(crate) victim: &'a str,
    /// The full id of that container.
    pub(crate) id: &'a str,
    /// The body of the agent's own create call.
    pub(crate) body: Value,
}

/// All attacks.
pub(crate) fn attacks(target: &Target<'_>) -> Vec<Attack> {
    let mut attacks = Attacks::default();
    routes(&mut attacks, target);
    names(&mut attacks, target);
    paths(&mut attacks, target);
    queries(&mut attacks, target);
    framing(&mut attacks, target);
    create::bodies(&mut attacks, target);
    create::fields(&mut attacks, target);
    create::values(&mut attacks, target);
    create::others(&mut attacks, target);
    attacks.0
}

#[derive(Default)]
struct Attacks(Vec<Attack>);

impl Attacks {
    fn raw(&mut self, name: impl Into<String>, bytes: impl Into<Vec<u8>>, rule: &'static str) {
        self.0.push(Attack { name: name.into(), bytes: bytes.into(), rule });
    }

    /// A request without a body.
    fn line(&mut self, line: &str, rule: &'static str) {
        self.raw(line, format!("{line} HTTP/1.1\r\nHost: docker\r\n\r\n"), rule);
    }

    fn post(&mut self, name: impl Into<String>, path: &str, body: impl AsRef<[u8]>, rule: &'static str) {
        self.raw(name, post(path, body.as_ref()), rule);
    }
}

fn post(path: &str, body: &[u8]) -> Vec<u8> {
    let length = body.len();
    let head = format!(
        "POST {path} HTTP/1.1\r\nHost: docker\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
    );
    [head.as_bytes(), body].concat()
}

fn create_path(target: &Target<'_>) -> String {
    format!("/v1.41/containers/create?name={}", target.tunnel)
}

fn routes(attacks: &mut Attacks, target: &Target<'_>) {
    let Target { tunnel, victim, .. } = target;
    for line in [
        "POST /info",
        "HEAD /info",
        "GET /info/x",
        "GET /system/df",
        "POST /auth",
        "POST /build",
        "POST /build/prune",
        "POST /session",
        "POST /commit",
        "POST /containers/prune",
        "POST /networks/prune",
        "POST /images/prune",
        "POST /volumes/prune",
        "GET /volumes",
        "POST /volumes/create",
        "DELETE /volumes/x",
        "GET /swarm",
        "POST /swarm/init",
        "POST /swarm/join",
        "POST /swarm/leave",
        "GET /nodes",
        "GET /services",
        "POST /services/create",
        "GET /tasks",
        "GET /secrets",
        "POST /secrets/create",
        "GET /configs",
        "POST /configs/create",
        "GET /plugins",
        "POST /plugins/pull",
        "GET /images/json",
        "GET /images/search?term=x",
        "GET /images/get",
        "POST /images/load",
        "GET /networks",
        "GET /distribution/x/json",
        "POST /grpc",
        "GET /",
        "GET /metrics",
        "GET /debug/pprof/heap",
        "PUT /version",
        "DELETE /version",
        "POST /version",
        "POST /_ping",
        "HEAD /version",
        "POST /events",
        "POST /containers/json",
        "HEAD /containers/json",
        "DELETE /containers/json",
        "GET /dockflare/goodbye?lease=60",
        "DELETE /dockflare/goodbye?lease=60",
        "POST /dockflare",
        "POST /dockflare/hello",
        "POST /dockflare/goodbye/now?lease=60",
        "POST /goodbye?lease=60",
    ] {
        let rule = if line.starts_with("PUT") {
            "method"
        } else if line == "DELETE /containers/json" {
            "query_value"
        } else if line == "GET /" {
            "path_segments"
        } else {
            "route"
        };
        attacks.line(line, rule);
    }
    for action in ["exec", "attach", "update", "kill", "pause", "unpause", "wait", "resize", "commit"] {
        for name in [tunnel, victim] {
            attacks.line(&format!("POST /containers/{name}/{action}"), "route");
        }
    }
    for action in ["top", "stats?stream=false", "changes", "export", "archive?path=/", "attach/ws", "checkpoints"] {
        attacks.line(&format!("GET /containers/{tunnel}/{action}"), "route");
    }
    attacks.line(&format!("PUT /containers/{tunnel}/archive?path=/"), "method");
    attacks.line(&format!("HEAD /containers/{tunnel}/archive?path=/"), "route");
    attacks.line("POST /exec/0123/start", "route");
    attacks.line("GET /exec/0123/json", "route");
    for (line, rule) in [
        ("DELETE /networks/NET", "route"),
        ("POST /networks/NET/disconnect", "body_missing"),
        ("DELETE /images/IMAGE", "route"),
        ("GET /images/IMAGE/history", "route"),
        ("POST /images/IMAGE/push", "route"),
        ("POST /images/IMAGE/tag?repo=x", "route"),
    ] {
        attacks.line(&line.replace("NET", target.network).replace("IMAGE", target.image), rule);
    }
    for method in ["OPTIONS", "TRACE", "CONNECT", "PATCH", "PURGE", "get", "Get"] {
        let rule = if method.starts_with(|c: char| c.is_ascii_uppercase()) { "method" } else { "head_bytes" };
        attacks.line(&format!("{method} /_ping"), rule);
    }
}

fn names(attacks: &mut Attacks, target: &Target<'_>) {
    let Target { tunnel, victim, id, .. } = target;
    let upper = tunnel.to_ascii_uppercase();
    let prefix = &id[..12];
    // Calls that act on a container must use its full id. A name, even the tunnel's own, may belong to another
    // container by then.
    let next = format!("{tunnel}-next");
    let long = format!("{id}0");
    for name in [*victim, prefix, &id[..63], &long, &id.to_ascii_uppercase(), &upper, *tunnel, &next] {
        for line in [
            format!("POST /containers/{name}/start"),
            format!("POST /containers/{name}/stop?t=1"),
            format!("POST /containers/{name}/restart?t=1"),
            format!("POST /containers/{name}/rename?name={tunnel}"),
            format!("DELETE /containers/{name}?force=true"),
            format!("GET /containers/{name}/logs?stdout=true"),
        ] {
            attacks.line(&line, "container_id");
        }
    }
    attacks.line(&format!("POST /containers/{tunnel}/stop"), "container_id");
    for line in [
        format!("GET /containers/{victim}/json"),
        format!("GET /containers/{}/json", &id[..11]),
        format!("POST /containers/{id}/rename?name={victim}"),
        format!("POST /containers/{id}/rename?name={tunnel}-next"),
        format!("POST /containers/{id}/rename?name={id}"),
        format!("POST /containers/{id}/rename"),
    ] {
        attacks.line(&line, "container_name");
    }
    for name in [*victim, "", "evil", id, &format!("{tunnel}-next-next")] {
        let path = format!("/containers/create?name={name}");
        attacks.post(format!("create under {name:?}"), &path, target.body.to_string(), "container_name");
    }
    attacks.post("create without a name", "/containers/create", target.body.to_string(), "container_name");
    for network in ["bridge", "host", "none", "a:b", "a@b"] {
        let body = json!({ "Container": id }).to_string();
        attacks.post(
            format!("connect {network}"),
            &format!("/networks/{network}/connect"),
            body.clone(),
            "network_name",
        );
        attacks.post(format!("disconnect {network}"), &format!("/networks/{network}/disconnect"), body, "network_name");
    }
    for name in [*victim, *tunnel, prefix, ""] {
        let body = json!({ "Container": name }).to_string();
        attacks.post(format!("connect {name:?} to a network"), "/networks/app/connect", body.clone(), "container_id");
        attacks.post(format!("disconnect {name:?}"), "/networks/app/disconnect", body, "container_id");
    }
    let forced = json!({ "Container": id, "Force": true }).to_string();
    attacks.post("disconnect by force".to_owned(), "/networks/app/disconnect", forced, "body_fields");
    attacks.line("GET /networks/bridge", "network_name");
    attacks.line(&format!("GET /networks/{}x", target.network), "network_name");
    attacks.line("GET /images/alpine/json", "image");
    attacks.line(&format!("GET /images/{}x/json", target.image), "image");
    attacks.line(&format!("GET /images/{}/x/json", target.image), "image");
}

fn paths(attacks: &mut Attacks, target: &Target<'_>) {
    let tunnel = target.tunnel;
    for (line, rule) in [
        ("GET /v1.23/version", "api_version"),
        ("GET /v1.0/version", "api_version"),
        ("GET /v1.9/version", "api_version"),
        ("GET /v1.041/version", "api_version"),
        ("GET /v01.41/version", "api_version"),
        ("GET /v1.41.0/version", "api_version"),
        ("GET /v1/version", "api_version"),
        ("GET /v2.41/version", "api_version"),
        ("GET /V1.41/version", "api_version"),
        ("GET /v1.4a/version", "api_version"),
        ("GET /v-1.41/version", "api_version"),
        ("GET /v/version", "api_version"),
        ("GET /v1.41/v1.41/version", "route"),
        ("GET /v1.41", "path_segments"),
        ("GET //version", "path_segments"),
        ("GET /v1.41//version", "path_segments"),
        ("GET /version/", "path_segments"),
        ("GET /./version", "path_segments"),
        ("GET /x/../version", "path_segments"),
        ("GET /containers/../version", "path_segments"),
        ("GET /containers%2fjson", "path_bytes"),
        ("GET /%76ersion", "path_bytes"),
        ("GET /containers/%2e%2e/json", "path_bytes"),
        ("GET /version%00", "path_bytes"),
        ("GET /version;x=1", "path_bytes"),
        ("GET /version\\x", "path_bytes"),
        ("GET /version#x", "path_bytes"),
        ("GET /version|x", "path_bytes"),
        ("GET /version~", "path_bytes"),
        ("GET version", "target_form"),
        ("GET http://docker/version", "target_form"),
        ("GET https://docker/version", "target_form"),
        ("GET unix://docker/version", "target_form"),
        ("GET *", "target_form"),
        ("GET docker:2375", "target_form"),
        ("GET ?x=1", "target_form"),
        ("GET /Version", "route"),
        ("GET /containers/JSON", "route"),
    ] {
        attacks.line(line, rule);
    }
    attacks.post(
        "a body that old versions apply to a start",
        &format!("/v1.23/containers/{tunnel}/start"),
        r#"{"Privileged":true}"#,
        "api_version",
    );
    attacks.post("a body at a start", &format!("/v1.24/containers/{tunnel}/start"), "{}", "body_unexpected");
    attacks.raw("a tab in the request line", "GET\t/version HTTP/1.1\r\nHost: d\r\n\r\n", "head_malformed");
    attacks.raw("two spaces in the request line", "GET  /version HTTP/1.1\r\nHost: d\r\n\r\n", "head_malformed");
    attacks.raw("a path with a byte above ASCII", b"GET /versi\xc3\xb6n HTTP/1.1\r\nHost: d\r\n\r\n", "head_bytes");
    attacks.raw("a path with a zero byte", b"GET /version\0 HTTP/1.1\r\nHost: d\r\n\r\n", "head_bytes");
}

fn queries(attacks: &mut Attacks, target: &Target<'_>) {
    let Target { tunnel, id, .. } = target;
    let (repository, tag) = target.image.rsplit_once(':').unwrap_or((target.image, "latest"));
    let pull = format!("/images/create?fromImage={repository}&tag={tag}");
    let logs = format!("/containers/{id}/logs?stdout=true");
    let remove = format!("/containers/{id}?force=true");
    for (line, rule) in [
        ("GET /containers/json?all=true".to_owned(), "query_value"),
        ("GET /containers/json?all=1".to_owned(), "query_value"),
        ("GET /containers/json?size=true".to_owned(), "query_value"),
        ("GET /containers/json?limit=1".to_owned(), "query_key"),
        ("GET /containers/json?ALL=false".to_owned(), "query_key"),
        ("GET /containers/json?all=false&all=true".to_owned(), "query_duplicate"),
        ("GET /containers/json?al%6c=false".to_owned(), "query_malformed"),
        ("GET /containers/json?all".to_owned(), "query_malformed"),
        ("GET /containers/json?&".to_owned(), "query_malformed"),
        ("GET /containers/json?=false".to_owned(), "query_malformed"),
        ("GET /containers/json?all=false;size=false".to_owned(), "query_malformed"),
        ("GET /containers/json?all=%".to_owned(), "query_malformed"),
        ("GET /containers/json?all=%zz".to_owned(), "query_malformed"),
        ("GET /containers/json?all=%00".to_owned(), "query_malformed"),
        ("GET /containers/json?all=%c5%bf".to_owned(), "query_malformed"),
        ("GET /containers/json?filters=%7B%7D".to_owned(), "query_filters"),
        ("GET /containers/json?filters=x".to_owned(), "query_filters"),
        (r#"GET /containers/json?filters={"label":["x"]}"#.to_owned(), "query_filters"),
        (r#"GET /containers/json?filters={"label":["com.dockflare.agent.owner"]}"#.to_owned(), "query_value"),
        (r#"GET /containers/json?all=true&filters={"label":["dockflare.enable"]}"#.to_owned(), "query_value"),
        (r#"GET /containers/json?all=true&filters={"label":["com.dockflare.agent.spec"]}"#.to_owned(), "query_filters"),
        (r#"GET /containers/json?filters={"label":["dockflare.enable","x"]}"#.to_owned(), "query_filters"),
        (r#"GET /containers/json?filters={"label":{"dockflare.enable":true}}"#.to_owned(), "query_filters"),
        (
            r#"GET /containers/json?filters={"label":["dockflare.enable"],"status":["exited"]}"#.to_owned(),
            "query_filters",
        ),
        (r#"GET /containers/json?filters={"label":["dockflare.enable"],"label":["x"]}"#.to_owned(), "query_filters"),
        (r#"GET /containers/json?filters={"Label":["dockflare.enable"]}"#.to_owned(), "query_filters"),
        ("GET /events".to_owned(), "query_filters"),
        ("GET /events?filters=%7B%7D".to_owned(), "query_filters"),
        (r#"GET /events?filters={"type":["image"],"event":["start"]}"#.to_owned(), "query_filters"),
        (r#"GET /events?filters={"type":["container"],"event":["exec_start"]}"#.to_owned(), "query_filters"),
        (r#"GET /events?filters={"type":[],"event":[]}"#.to_owned(), "query_filters"),
        (r#"GET /events?filters={"type":["container"],"event":["start"]}&until=1"#.to_owned(), "query_key"),
        (r#"GET /events?filters={"type":["container"],"event":["start"]}&since=now"#.to_owned(), "query_value"),
        (r#"GET /events?filters={"type":["container"],"event":["start"]}&since=-1"#.to_owned(), "query_value"),
        (format!("GET {logs}&follow=true"), "query_value"),
        (format!("GET {logs}&details=true"), "query_key"),
        (format!("GET {logs}&tail=9999999"), "query_value"),
        (format!("GET {logs}&tail=-1"), "query_value"),
        (format!("GET {logs}&since=99999999999"), "query_value"),
        (format!("GET {logs}&until=5"), "query_value"),
        (format!("GET /containers/{tunnel}/json?size=true"), "query_key"),
        ("POST /dockflare/goodbye".to_owned(), "query_value"),
        ("POST /dockflare/goodbye?lease=".to_owned(), "query_value"),
        ("POST /dockflare/goodbye?lease=0".to_owned(), "query_value"),
        ("POST /dockflare/goodbye?lease=-1".to_owned(), "query_value"),
        ("POST /dockflare/goodbye?lease=1.5".to_owned(), "query_value"),
        ("POST /dockflare/goodbye?lease=3601".to_owned(), "query_value"),
        ("POST /dockflare/goodbye?lease=60&name=victim".to_owned(), "query_key"),
        ("POST /dockflare/goodbye?lease=60&lease=1".to_owned(), "query_duplicate"),
        ("POST /dockflare/goodbye?lease=60&agents=,".to_owned(), "query_value"),
        ("POST /dockflare/goodbye?lease=60&agents=a/b".to_owned(), "query_value"),
        (format!("POST /containers/{id}/stop?t=-1"), "query_value"),
        (format!("POST /containers/{id}/stop?t=3600"), "query_value"),
        (format!("POST /containers/{id}/stop?t=1&signal=SIGKILL"), "query_key"),
        (format!("POST /containers/{id}/restart?t=1e1"), "query_value"),
        (format!("POST /containers/{id}/start?detachKeys=a"), "query_key"),
        (format!("POST /containers/{id}/start?checkpoint=a"), "query_key"),
        (format!("DELETE /containers/{id}"), "query_value"),
        (format!("POST /containers/{id}/restart"), "query_value"),
        (format!("DELETE {remove}&v=true"), "query_value"),
        (format!("DELETE {remove}&link=true"), "query_value"),
        (format!("DELETE {remove}&x=y"), "query_key"),
        ("POST /images/create".to_owned(), "image"),
        ("POST /images/create?fromImage=evil&tag=latest".to_owned(), "image"),
        (format!("POST /images/create?fromImage={repository}"), "image"),
        (format!("POST /images/create?fromImage={repository}&tag=evil"), "image"),
        (format!("POST /images/create?fromImage=evil/{repository}&tag={tag}"), "image"),
        (format!("POST {pull}&fromSrc=http://evil/x.tar"), "query_key"),
        (format!("POST {pull}&fromSrc=-"), "query_key"),
        (format!("POST {pull}&repo=evil"), "query_key"),
        (format!("POST {pull}&changes=CMD+x"), "query_key"),
        (format!("POST {pull}&platform=linux/arm64"), "query_value"),
        (format!("POST {pull}&fromImage=evil"), "query_duplicate"),
        (format!("POST {pull}&FromImage=evil"), "query_key"),
        ("GET /version?x=1".to_owned(), "query_key"),
        ("GET /info?x=1".to_owned(), "query_key"),
        ("GET /_ping?x=1".to_owned(), "query_key"),
    ] {
        // Some clients send a double quote unencoded.
        attacks.line(&line, rule);
    }
    for (key, value) in [("platform", "linux/arm64"), ("x", "y")] {
        let path = format!("{}&{key}={value}", create_path(target));
        let rule = if key == "platform" { "query_value" } else { "query_key" };
        attacks.post(format!("create with {key}={value}"), &path, target.body.to_string(), rule);
    }
}

fn framing(attacks: &mut Attacks, target: &Target<'_>) {
    let ok = "GET /version HTTP/1.1\r\nHost: d\r\n";
    for (header, rule) in [
        ("Transfer-Encoding: chunked", "header_transfer_encoding"),
        ("transfer-encoding: identity", "header_transfer_encoding"),
        ("Transfer-Encoding: xchunked", "header_transfer_encoding"),
        ("Transfer-Encoding:\tchunked", "header_transfer_encoding"),
        ("Content-Length: 0\r\nTransfer-Encoding: chunked", "header_transfer_encoding"),
        ("Transfer-Encoding: chunked\r\nContent-Length: 5", "header_transfer_encoding"),
        ("Content-Length: 0\r\nContent-Length: 0", "header_content_length"),
        ("Content-Length: 0\r\ncontent-length: 5", "header_content_length"),
        ("Content-Length: 0, 5", "header_content_length"),
        ("Content-Length: +0", "header_content_length"),
        ("Content-Length: -1", "header_content_length"),
        ("Content-Length: 00", "header_content_length"),
        ("Content-Length: 0x5", "header_content_length"),
        ("Content-Length: 1e3", "header_content_length"),
        ("Content-Length:", "header_content_length"),
        ("Content-Length: 99999999999999999999999", "header_content_length"),
        ("Content-Length: 65537", "body_length"),
        ("Content-Length: 18446744073709551615", "body_length"),
        ("Content-Length: 5", "header_content_type"),
        ("Content-Type: application/json\r\nContent-Length: 5", "body_unexpected"),
        ("Expect: 100-continue", "header_expect"),
        ("Upgrade: tcp", "header_upgrade"),
        ("Connection: Upgrade", "header_connection"),
        ("Connection: Upgrade\r\nUpgrade: tcp", "header_connection"),
        ("Connection: close, content-length", "header_connection"),
        ("HTTP2-Settings: AAMAAABkAAQAAP__", "header_upgrade"),
        ("TE: trailers", "header_te"),
        ("Trailer: Content-Length", "header_trailer"),
        ("Range: bytes=0-1", "header_range"),
        ("Content-Encoding: gzip", "header_content_encoding"),
        ("X-HTTP-Method-Override: DELETE", "header_method_override"),
        ("X-Registry-Auth: e30=", "header_registry_auth"),
        ("X-Registry-Config: e30=", "header_registry_auth"),
        ("Host: e", "header_host"),
        ("Content-Type: text/plain", "header_content_type"),
        ("Content-Type: application/json; charset=utf-16", "header_content_type"),
        ("Content-Type: application/x-www-form-urlencoded", "header_content_type"),
        ("Content-Type: application/json\r\nContent-Type: application/json", "header_content_type"),
        ("Content-Length : 0", "head_malformed"),
        ("X: y\r\n folded", "head_malformed"),
        ("X: y\r\n\tfolded", "head_malformed"),
        (" X: y", "head_malformed"),
        ("X y", "head_malformed"),
        (": y", "head_malformed"),
        ("X\u{7f}: y", "head_bytes"),
        ("X: \u{1}", "head_bytes"),
        ("X: y\nTransfer-Encoding: chunked", "head_bytes"),
        ("X: y\rTransfer-Encoding: chunked", "head_bytes"),
        ("X: y\r\r", "head_bytes"),
        ("X: \u{e9}", "head_bytes"),
    ] {
        attacks.raw(format!("header {header:?}"), format!("{ok}{header}\r\n\r\n"), rule);
    }
    let big = "x".repeat(20_000);
    for (name, bytes, rule) in [
        ("no host", "GET /version HTTP/1.1\r\n\r\n".to_owned(), "header_host"),
        ("HTTP/1.0", "GET /version HTTP/1.0\r\nHost: d\r\n\r\n".to_owned(), "http_version"),
        ("HTTP/2.0", "GET /version HTTP/2.0\r\nHost: d\r\n\r\n".to_owned(), "http_version"),
        ("HTTP/1.2", "GET /version HTTP/1.2\r\nHost: d\r\n\r\n".to_owned(), "http_version"),
        ("HTTP/0.9", "GET /version\r\n\r\n".to_owned(), "head_malformed"),
        ("the preface of HTTP/2", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_owned(), "http_version"),
        ("a TLS greeting", "\u{16}\u{3}\u{1}\u{2}\u{0}\r\n\r\n".to_owned(), "head_bytes"),
        ("an empty line first", format!("\r\n{ok}\r\n"), "head_bytes"),
        ("lines that end in LF", "GET /version HTTP/1.1\nHost: d\n\n\r\n\r\n".to_owned(), "head_bytes"),
        ("a long header", format!("{ok}X: {big}\r\n\r\n"), "head_length"),
        ("a long path", format!("GET /{big} HTTP/1.1\r\nHost: d\r\n\r\n"), "head_length"),
        ("a head without end", format!("{ok}X: {big}"), "head_length"),
        ("many headers", format!("{ok}{}\r\n", "X: y\r\n".repeat(40)), "head_length"),
        ("a second request behind", format!("{ok}\r\nDELETE /containers/x HTTP/1.1\r\n\r\n"), "bytes_after_request"),
        ("a body that is not announced", format!("{ok}\r\n{{}}"), "bytes_after_request"),
    ] {
        attacks.raw(name, bytes, rule);
    }
    let path = create_path(target);
    let longer = [post(&path, target.body.to_string().as_bytes()), b"POST /x HTTP/1.1\r\n\r\n".to_vec()].concat();
    attacks.raw("a request behind the body", longer, "bytes_after_request");
    let chunked = format!(
        "POST {path} HTTP/1.1\r\nHost: d\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{{}}\r\n0\r\n\r\n"
    );
    attacks.raw("a body in chunks", chunked, "header_transfer_encoding");
}
