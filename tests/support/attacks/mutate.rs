//! The agent's own requests and the attacks, with some bytes, words or lines changed. The same seed gives the same
//! requests.

use super::{Attack, Target, attacks, create_path, post};

/// The agent's own calls, as it sends them, except those that never end or that contact a registry. `own` is the full
/// id of the tunnel container.
fn own_calls(target: &Target<'_>, own: &str) -> Vec<Vec<u8>> {
    let Target { tunnel, network, image, .. } = target;
    let line = |line: String| format!("{line} HTTP/1.1\r\nHost: docker\r\n\r\n").into_bytes();
    let body = |text: &str| text.replace("OWN", own).replace("NET", network).into_bytes();
    let container = body(r#"{"Container":"OWN"}"#);
    let new_network = body(
        r#"{"Name":"NET","Driver":"bridge","Internal":false,"Labels":{"com.dockflare.agent.owner":"dockflare-agent"}}"#,
    );
    vec![
        line("GET /_ping".to_owned()),
        line("GET /version".to_owned()),
        line("GET /containers/json?all=false".to_owned()),
        line(r#"GET /containers/json?filters={"label":["dockflare.enable"]}"#.to_owned()),
        line(format!("GET /containers/{tunnel}/json")),
        line(format!("GET /containers/{own}/json")),
        line(format!("GET /containers/{own}/logs?stdout=true&stderr=true&tail=30")),
        line(format!("GET /networks/{network}")),
        line(format!("GET /images/{image}/json")),
        line(format!("POST /containers/{own}/start")),
        line(format!("POST /containers/{own}/stop?t=1")),
        line(format!("POST /containers/{own}/restart?t=1")),
        line(format!("POST /containers/{own}/rename?name={tunnel}")),
        line(format!("DELETE /containers/{own}?force=true")),
        post("/networks/create", &new_network),
        post(&format!("/networks/{network}/connect"), &container),
        post("/networks/app/disconnect", &container),
        post(&create_path(target), target.body.to_string().as_bytes()),
    ]
}

/// What an attacker would try instead of another word.
fn words(target: &Target<'_>, own: &str) -> Vec<String> {
    let fixed = [
        "exec",
        "attach",
        "update",
        "archive",
        "kill",
        "export",
        "commit",
        "prune",
        "create",
        "json",
        "host",
        "bridge",
        "none",
        "evil",
        "true",
        "false",
        "null",
        "0",
        "-1",
        "99999999999999999999",
        "..",
        "/",
        "//",
        "%2f",
        "%00",
        "?",
        "&",
        "=",
        "?force=true",
        "&v=true",
        "&signal=SIGKILL",
        "/v1.24",
        "/v1.23",
        "GET",
        "POST",
        "DELETE",
        "PUT",
        "Content-Length: 0\r\n",
        "Transfer-Encoding: chunked\r\n",
        "Upgrade: tcp\r\n",
        "Connection: Upgrade\r\n",
        "\r\n",
        "\r\n\r\n",
        "\0",
        "\u{17f}",
        "\u{212a}",
        r#""Privileged":true,"#,
        r#""Binds":["/:/host"],"#,
        r#""NetworkMode":"host","#,
        r#""PidMode":"host","#,
        r#""CapAdd":["ALL"],"#,
        r#""Image":"evil","#,
        r#""HostConfig":{"Privileged":true},"#,
        r#""Env":["TUNNEL_TOKEN=x"],"#,
        r#""User":"0","#,
        "{",
        "}",
        "[",
        "]",
        "\"",
        ",",
        r#"{"Container":"evil"}"#,
    ];
    let known = [target.tunnel, target.network, target.image, target.victim, target.id, &target.id[..12], own];
    fixed.iter().map(|word| (*word).to_owned()).chain(known.map(str::to_owned)).collect()
}

/// The first `count` mutated requests of this seed.
pub(crate) fn mutated(target: &Target<'_>, own: &str, seed: u64, count: usize) -> impl Iterator<Item = Vec<u8>> {
    let mut rng = fastrand::Rng::with_seed(seed);
    let own_calls = own_calls(target, own);
    let others: Vec<_> =
        attacks(target).into_iter().map(|Attack { bytes, .. }| bytes).filter(|it| it.len() < 4096).collect();
    let words = words(target, own);
    (0..count).map(move |_| {
        let from = if rng.bool() { &own_calls } else { &others };
        let mut bytes = from[rng.usize(0..from.len())].clone();
        // The most telling requests differ in one thing.
        let changes = if rng.bool() { 1 } else { rng.usize(1..=4) };
        for _ in 0..changes {
            change(&mut bytes, &mut rng, &own_calls, &words);
        }
        // Otherwise the proxy would refuse most of them before it reads the body.
        if rng.u8(0..4) > 0 {
            mend_length(&mut bytes);
        }
        bytes
    })
}

fn change(bytes: &mut Vec<u8>, rng: &mut fastrand::Rng, others: &[Vec<u8>], words: &[String]) {
    if bytes.is_empty() {
        return;
    }
    let at = rng.usize(0..bytes.len());
    let end = (at + rng.usize(1..=16)).min(bytes.len());
    let word = words[rng.usize(0..words.len())].as_bytes();
    match rng.u8(0..13) {
        0 => bytes[at] ^= 1 << rng.u8(0..8),
        1 => bytes[at] = rng.u8(..),
        2 => drop(bytes.drain(at..end)),
        3 => {
            let twice = bytes[at..end].to_vec();
            drop(bytes.splice(end..end, twice));
        }
        4 => drop(bytes.splice(at..at, word.iter().copied())),
        // Replace the word at this position.
        5..=9 => {
            let is_part = |byte: &u8| byte.is_ascii_alphanumeric() || b"_.-".contains(byte);
            let begin = bytes[..at].iter().rposition(|byte| !is_part(byte)).map_or(0, |before| before + 1);
            let end = bytes[at..].iter().position(|byte| !is_part(byte)).map_or(bytes.len(), |after| at + after);
            drop(bytes.splice(begin..end.max(begin), word.iter().copied()));
        }
        10 => {
            let other = &others[rng.usize(0..others.len())];
            bytes.truncate(at);
            bytes.extend(&other[rng.usize(0..other.len())..]);
        }
        11 => {
            let byte = &mut bytes[at];
            *byte = if byte.is_ascii_lowercase() { byte.to_ascii_uppercase() } else { byte.to_ascii_lowercase() };
        }
        _ => bytes.truncate(at),
    }
}

/// Corrects `Content-Length`, if the head has one.
fn mend_length(bytes: &mut Vec<u8>) {
    const NAME: &[u8] = b"Content-Length: ";
    let Some(end) = bytes.windows(4).position(|four| four == b"\r\n\r\n") else { return };
    let Some(at) = bytes[..end].windows(NAME.len()).position(|name| name == NAME) else { return };
    let digits = at + NAME.len();
    let until = bytes[digits..].iter().position(|byte| *byte == b'\r').map_or(end, |length| digits + length);
    let length = (bytes.len() - end - 4).to_string();
    drop(bytes.splice(digits..until, length.bytes()));
}
