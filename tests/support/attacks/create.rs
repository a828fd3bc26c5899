//! Bodies that differ from the agent's.

use serde_json::{Value, json};

use super::{Attacks, Target, create_path};

pub(super) fn bodies(attacks: &mut Attacks, target: &Target<'_>) {
    let path = create_path(target);
    let good = target.body.to_string();
    let inner = &good[1..good.len() - 1];
    attacks.line(&format!("POST {path}"), "body_missing");
    attacks.line("POST /networks/create", "body_missing");
    attacks.line("POST /networks/app/connect", "body_missing");
    let utf16: Vec<u8> = good.encode_utf16().flat_map(u16::to_le_bytes).collect();
    attacks.post("UTF-16", &path, utf16, "body_json");
    attacks.post("a byte order mark", &path, format!("\u{feff}{good}"), "body_json");
    attacks.post(
        "invalid UTF-8 in a key",
        &path,
        [b"{\"\xff\":1,".as_slice(), inner.as_bytes(), b"}"].concat(),
        "body_fields",
    );
    attacks.post(
        "invalid UTF-8 in a value",
        &path,
        [b"{\"Image\":\"\xff\",".as_slice(), inner.as_bytes(), b"}"].concat(),
        "body_fields",
    );
    let mut deep = format!("{{\"X\":{}", "[".repeat(10_000));
    deep.push_str(&"]".repeat(10_000));
    deep.push('}');
    for (name, body, rule) in [
        ("nothing but a space", " ".to_owned(), "body_json"),
        ("null", "null".to_owned(), "body_fields"),
        ("a list", format!("[{good}]"), "body_fields"),
        ("a string", "\"x\"".to_owned(), "body_fields"),
        ("an empty object", "{}".to_owned(), "body_fields"),
        ("something behind", format!("{good}{{\"HostConfig\":{{\"Privileged\":true}}}}"), "body_json"),
        ("a comma behind", format!("{good},"), "body_json"),
        ("a zero byte behind", format!("{good}\0"), "body_json"),
        ("cut off", good[..good.len() - 1].to_owned(), "body_json"),
        ("a comment", format!("/* x */{good}"), "body_json"),
        ("single quotes", good.replace('"', "'"), "body_json"),
        ("deep nesting", deep, "body_fields"),
        ("a deep value", format!("{{\"Image\":{}1{},{inner}}}", "[".repeat(100), "]".repeat(100)), "body_fields"),
        ("a huge number", format!("{{\"StopTimeout\":1e999,{inner}}}"), "body_fields"),
        ("the form of a form", "HostConfig.Privileged=true".to_owned(), "body_json"),
    ] {
        attacks.post(format!("body: {name}"), &path, body, rule);
    }
    // Each field twice: Docker would merge the two.
    let Value::Object(fields) = &target.body else { return };
    for (key, value) in fields {
        attacks.post(format!("{key} twice"), &path, format!("{{\"{key}\":{value},{inner}}}"), "body_fields");
    }
    let host = target.body["HostConfig"].to_string();
    let merged = good.replace(&host, &format!("{},\"NetworkMode\":\"host\"}}", &host[..host.len() - 1]));
    attacks.post("NetworkMode twice", &path, merged, "body_fields");
    let labels = target.body["Labels"].to_string();
    let twice = format!("{},\"com.dockflare.agent.owner\":\"dockflare-agent\"}}", &labels[..labels.len() - 1]);
    attacks.post("a label twice", &path, good.replace(&labels, &twice), "body_fields");
}

/// Fields that the agent does not send, in their proper place and in a wrong one.
pub(super) fn fields(attacks: &mut Attacks, target: &Target<'_>) {
    let path = create_path(target);
    let mut with = |place: Option<&str>, key: &str, value: Value| {
        let mut body = target.body.clone();
        let name = format!("{}{key}={value}", place.map_or(String::new(), |place| format!("{place}.")));
        match place {
            Some(place) => body[place][key] = value,
            None => body[key] = value,
        }
        attacks.post(name, &path, body.to_string(), "body_fields");
    };
    let host = [
        ("Privileged", json!(true)),
        ("Binds", json!(["/:/host"])),
        ("Mounts", json!([{ "Type": "bind", "Source": "/", "Target": "/host" }])),
        ("Devices", json!([{ "PathOnHost": "/dev/sda", "PathInContainer": "/dev/sda", "CgroupPermissions": "rwm" }])),
        ("DeviceCgroupRules", json!(["a *:* rwm"])),
        ("DeviceRequests", json!([])),
        ("CapAdd", json!(["ALL"])),
        ("Capabilities", json!(["ALL"])),
        ("PidMode", json!("host")),
        ("IpcMode", json!("host")),
        ("UTSMode", json!("host")),
        ("UsernsMode", json!("host")),
        ("CgroupnsMode", json!("host")),
        ("Cgroup", json!("x")),
        ("CgroupParent", json!("/")),
        ("VolumesFrom", json!(["x"])),
        ("VolumeDriver", json!("x")),
        ("Runtime", json!("x")),
        ("Sysctls", json!({ "kernel.x": "1" })),
        ("Tmpfs", json!({ "/x": "exec" })),
        ("PortBindings", json!({ "80/tcp": [{ "HostPort": "80" }] })),
        ("PublishAllPorts", json!(true)),
        ("Dns", json!(["1.2.3.4"])),
        ("Links", json!(["x"])),
        ("GroupAdd", json!(["0"])),
        ("OomScoreAdj", json!(-1000)),
        ("Ulimits", json!([])),
        ("Memory", json!(0)),
        ("AutoRemove", json!(true)),
        ("MaskedPaths", json!([])),
        ("ReadonlyPaths", json!([])),
        ("ContainerIDFile", json!("/x")),
        ("StorageOpt", json!({})),
        ("Annotations", json!({})),
        ("Init", json!(true)),
    ];
    for (key, value) in host {
        with(Some("HostConfig"), key, value.clone());
        // Up to Engine 26, Docker honors them there as well.
        with(None, key, value);
    }
    for (key, value) in [
        ("User", json!("0:0")),
        ("Entrypoint", json!(["sh"])),
        ("Volumes", json!({ "/x": {} })),
        ("WorkingDir", json!("/")),
        ("ExposedPorts", json!({ "80/tcp": {} })),
        ("NetworkingConfig", json!({ "EndpointsConfig": { "host": {} } })),
        ("NetworkDisabled", json!(false)),
        ("MacAddress", json!("02:42:ac:11:00:02")),
        ("Hostname", json!("x")),
        ("Domainname", json!("x")),
        ("Tty", json!(true)),
        ("OpenStdin", json!(true)),
        ("AttachStdin", json!(true)),
        ("StopSignal", json!("SIGKILL")),
        ("OnBuild", json!(["RUN x"])),
        ("Shell", json!(["sh"])),
        ("ArgsEscaped", json!(true)),
        ("", json!(1)),
        ("__proto__", json!({})),
    ] {
        with(None, key, value);
    }
    // Keys that Go's case folding makes equal: case, the long s, the Kelvin sign.
    for key in ["hostconfig", "HOSTCONFIG", "HoſtConfig", "hoſtconfig"] {
        with(None, key, json!({ "Privileged": true }));
    }
    for key in ["image", "IMAGE", "env", "ENV", "cmd", "labels", "Labelſ", "healthcheck", "HealthchecK"] {
        with(None, key, json!(null));
    }
    for key in ["privileged", "PRIVILEGED", "binds", "Bindſ", "bInDs", "networkmode", "NetworKMode", "capadd", "Mountſ"]
    {
        with(Some("HostConfig"), key, json!(null));
    }
    with(Some("Healthcheck"), "test", json!(["CMD-SHELL", "x"]));
    with(Some("Healthcheck"), "Shell", json!(["x"]));
    for (place, key, value) in [
        ("RestartPolicy", "MaximumRetryCount", json!(1)),
        ("RestartPolicy", "name", json!("always")),
        ("LogConfig", "type", json!("syslog")),
        ("LogConfig", "Options", json!({})),
    ] {
        let mut body = target.body.clone();
        body["HostConfig"][place][key] = value;
        attacks.post(format!("HostConfig.{place}.{key}"), &path, body.to_string(), "body_fields");
    }
}

/// Fields that the agent sends, with values that it does not send.
pub(super) fn values(attacks: &mut Attacks, target: &Target<'_>) {
    let path = create_path(target);
    let mut with = |pointer: &str, value: Value, rule: &'static str| {
        let mut body = target.body.clone();
        let name = format!("{pointer}={value}");
        let Some(place) = body.pointer_mut(pointer) else { panic!("the agent's own call has no {pointer}") };
        *place = value;
        attacks.post(name, &path, body.to_string(), rule);
    };
    for image in [json!("alpine"), json!(format!("{}x", target.image)), json!("sha256:00"), json!(""), json!(" ")] {
        with("/Image", image, "create_image");
    }
    for wrong in [json!(null), json!(1), json!(["x"]), json!({})] {
        with("/Image", wrong.clone(), "body_fields");
        with("/HostConfig/NetworkMode", wrong, "body_fields");
    }
    for command in [
        json!([]),
        json!(["tunnel", "run"]),
        json!(["tunnel", "--no-autoupdate", "run", "--config", "/x"]),
        json!(["tunnel", "--url", "http://x", "run"]),
        json!(["access", "tcp"]),
        json!(["sh", "-c", "x"]),
    ] {
        with("/Cmd", command, "create_command");
    }
    with("/Cmd", json!("tunnel --no-autoupdate run"), "body_fields");
    with("/Cmd", json!(null), "body_fields");
    for network in ["host", "none", "bridge", "default", "container:x", "other", ""] {
        with("/HostConfig/NetworkMode", json!(network), "create_network");
    }
    with("/HostConfig", json!(null), "body_fields");
    with("/HostConfig/CapDrop", json!([]), "body_fields");
    with("/HostConfig/SecurityOpt", json!(["a", "b"]), "body_fields");
    with("/HostConfig/PidsLimit", json!("x"), "body_fields");
    for hosts in [
        json!(["evil:10.0.0.1"]),
        json!(["host.docker.internal:10.0.0.1"]),
        json!(["HOST.docker.internal:host-gateway"]),
    ] {
        with("/HostConfig/ExtraHosts", hosts, "create_hosts");
    }
    for hosts in [json!([]), json!("x"), json!(["host.docker.internal:host-gateway", "evil:10.0.0.1"])] {
        with("/HostConfig/ExtraHosts", hosts, "body_fields");
    }
    let env = target.body["Env"].as_array().cloned().unwrap_or_default();
    for (entry, rule) in [
        ("LD_PRELOAD=/x", "create_environment"),
        ("PATH=/x", "create_environment"),
        ("HTTPS_PROXY=http://x", "create_environment"),
        ("TUNNEL_ORIGIN_CERT=/x", "create_environment"),
        ("TUNNEL_LOGFILE=/x", "create_environment"),
        ("TUNNEL_CONFIG=/x", "create_environment"),
        ("TUNNEL_EDGE=evil:7844", "create_environment"),
        ("TUNNEL_CRED_FILE=/x", "create_environment"),
        ("TUNNEL_REGION=eu", "create_environment"),
        ("TUNNEL_LOGLEVEL=trace", "create_environment"),
        ("TUNNEL_GRACE_PERIOD=1h", "create_environment"),
        ("TUNNEL_GRACE_PERIOD=181s", "create_environment"),
        ("tunnel_region=us", "create_environment"),
        ("TUNNEL_METRICS=0.0.0.0:80", "create_environment"),
        ("TUNNEL_METRICS", "create_environment"),
        ("=x", "create_environment"),
        ("", "create_environment"),
        ("TUNNEL_TOKEN=x", "create_environment"),
        ("TUNNEL_METRICS=0.0.0.0:20241", "create_environment"),
    ] {
        let more = env.iter().cloned().chain([json!(entry)]).collect();
        with("/Env", Value::Array(more), rule);
    }
    with("/Env", json!([]), "create_environment");
    with("/Env", json!(null), "body_fields");
    with("/Env", json!({ "TUNNEL_TOKEN": "x" }), "body_fields");
    with("/Env", json!([1]), "body_fields");
    with("/Env", Value::Array(env.iter().take(1).cloned().collect()), "create_environment");
    for token in ["", "x", "a b", "eyJhIjoieCJ9", &"A".repeat(5000), "${X}", "eyJhIjoiYSIsInQiOiIiLCJzIjoicyJ9"] {
        let with_token = [json!(format!("TUNNEL_TOKEN={token}"))].into_iter().chain(env.iter().skip(1).cloned());
        with("/Env", with_token.collect(), "create_token");
    }
    for (key, value) in [
        ("com.docker.compose.project", "x"),
        ("dockflare.enable", "true"),
        ("com.dockflare.agent.owner", "a b"),
        ("com.dockflare.agent.owner", ""),
        ("com.dockflare.agent.container-name", "evil"),
        ("com.dockflare.agent.Owner", "dockflare-agent"),
        ("com.dockflare.agent.redeploy", "-1"),
        ("com.dockflare.agent.redeploy", "01"),
        ("com.dockflare.agent.tunnel-id", "a/b"),
        ("com.dockflare.agent.image-id", "latest"),
        ("com.dockflare.agent.image-id", "sha256:0123"),
        ("com.dockflare.agent.tunnel-id", ""),
        ("com.dockflare.agent.other", "x"),
        ("", ""),
    ] {
        let mut labels = target.body["Labels"].clone();
        labels[key] = json!(value);
        with("/Labels", labels, "create_labels");
    }
    with("/Labels", json!({}), "create_labels");
    with("/Labels", json!([]), "body_fields");
    with("/Labels", json!(null), "body_fields");
    let mut labels = target.body["Labels"].clone();
    labels["com.dockflare.agent.spec"] = json!("0".repeat(64));
    with("/Labels", labels.clone(), "create_spec_label");
    if let Some(labels) = labels.as_object_mut() {
        labels.remove("com.dockflare.agent.spec");
    }
    with("/Labels", labels, "create_spec_label");
}

/// The two other calls with a body.
pub(super) fn others(attacks: &mut Attacks, target: &Target<'_>) {
    let network = json!({
        "Name": target.network, "Driver": "bridge", "Labels": { "com.dockflare.agent.owner": "dockflare-agent" },
    });
    for (key, value, rule) in [
        ("Name", json!("evil"), "network_name"),
        ("Driver", json!("macvlan"), "network_driver"),
        ("Driver", json!("host"), "network_driver"),
        ("Labels", json!({}), "network_labels"),
        ("Labels", json!({ "x": "y" }), "network_labels"),
        ("Options", json!({ "com.docker.network.bridge.name": "docker0" }), "body_fields"),
        ("IPAM", json!({}), "body_fields"),
        ("Internal", json!(false), "network_internal"),
        ("Attachable", json!(true), "body_fields"),
        ("ConfigFrom", json!({ "Network": "x" }), "body_fields"),
        ("name", json!("x"), "body_fields"),
        ("CheckDuplicate", json!(true), "body_fields"),
    ] {
        let mut body = network.clone();
        body[key] = value;
        attacks.post(format!("network {key}"), "/networks/create", body.to_string(), rule);
    }
    for (key, value) in
        [("EndpointConfig", json!({ "IPAMConfig": {} })), ("container", json!("x")), ("Force", json!(true))]
    {
        let mut body = json!({ "Container": target.tunnel });
        body[key] = value;
        attacks.post(format!("connect with {key}"), "/networks/app/connect", body.to_string(), "body_fields");
    }
}
