//! The table of what is reachable, and of the remedy where it is not.

use super::*;
use crate::docker::RunState;

/// A running container on these networks, with these addresses there.
pub(in crate::neighbours) fn container(name: &str, networks: &[(&str, &str)]) -> Inspected {
    let place = |address: &str| Endpoint {
        address: address.to_owned(),
        gateway: address.rsplit_once('.').map(|(net, _)| format!("{net}.1")).unwrap_or_default(),
        aliases: Vec::new(),
    };
    Inspected {
        id: format!("{:0<64}", format!("{:x}", name.len()) + "abcdef0123456789"),
        name: name.into(),
        state: RunState::Running,
        image: "web:1".into(),
        networks: networks.iter().map(|(network, address)| ((*network).to_owned(), place(address))).collect(),
        network_mode: networks.first().map_or("none", |(network, _)| network).into(),
        ..Inspected::blank()
    }
}

/// On the tunnel's network `net`.
fn web() -> Inspected {
    container("web", &[("net", "172.18.0.3")])
}

fn with_mode(mode: &str) -> Inspected {
    Inspected { network_mode: mode.into(), ..container("web", &[(mode, "")]) }
}

fn with_ports(ports: &[u16]) -> Inspected {
    Inspected { ports: ports.iter().copied().collect(), ..web() }
}

fn with_aliases(aliases: &[&str]) -> Inspected {
    let mut seen = web();
    seen.networks.entry("net".into()).or_default().aliases = aliases.iter().map(|alias| (*alias).to_owned()).collect();
    seen
}

/// A judgement in one line: `open <network>`, with a note where there is one, `-`, `no <label>`, or
/// `<problem> => <remedy>`.
fn told(judgement: Judgement) -> String {
    match judgement.way {
        Way::Open { network, note: None, .. } => format!("open {network}"),
        Way::Open { network, note: Some(note), .. } => format!("open {network}: {note}"),
        Way::Unjudged => "-".to_owned(),
        Way::NoRule(kind) => format!("no {kind}"),
        Way::Blocked(block) => format!("{} => {}", block.problem, block.remedy),
    }
}

/// An ordinary scene, for a test to change.
struct Around<'a> {
    tunnel: Inspected,
    desktop: Option<bool>,
    others: &'a [&'a str],
    lender: Lender<'a>,
    has_hostname: bool,
}

impl Default for Around<'_> {
    fn default() -> Self {
        let tunnel = container("tunnel", &[("net", "172.18.0.2")]);
        Self { tunnel, desktop: Some(false), others: &[], lender: Lender::Nobody, has_hostname: true }
    }
}

impl<'a> Around<'a> {
    fn with<T>(&self, seen: &'a Inspected, values: &'a [&'a str], judge: impl Fn(&Scene<'_>, &Workload<'_>) -> T) -> T {
        let keys = ["dockflare.service", "dockflare.0.service", "dockflare.1.service"];
        let others = self.others.iter().map(|name| (*name).to_owned()).collect();
        let scene = Scene { tunnel: &self.tunnel, network: "net", desktop: self.desktop, others: &others };
        let services = keys.into_iter().zip(values.iter().copied()).collect();
        judge(&scene, &Workload { seen, lender: self.lender, services, has_hostname: self.has_hostname })
    }

    /// The addresses that are tried.
    fn tries(&self, seen: &'a Inspected, values: &'a [&'a str]) -> Vec<String> {
        self.with(seen, values, way).tries.into_iter().map(|one| one.at.to_string()).collect()
    }

    fn way(&self, seen: &'a Inspected, values: &'a [&'a str]) -> String {
        told(self.with(seen, values, way))
    }

    fn needed(&self, seen: &'a Inspected, values: &'a [&'a str]) -> Vec<String> {
        self.with(seen, values, networks_needed).into_iter().collect()
    }
}

const CONNECT: &str = "it shares no network with the tunnel => docker network connect net web";

#[test]
fn the_way_to_a_workload_on_networks_of_its_own() {
    let (apart, on_bridge) = (container("web", &[("app", "10.0.0.3")]), container("web", &[("bridge", "172.17.0.3")]));
    let short = web().id[..12].to_owned();
    let (by_id, by_id_there) = (format!("http://{short}"), format!("http://{short}.net"));
    let alias_elsewhere = {
        let mut seen = container("web", &[("app", "10.0.0.3"), ("net", "172.18.0.3")]);
        seen.networks.entry("app".into()).or_default().aliases.push("inner".into());
        seen
    };
    let other_name = |name: &str| {
        format!(
            "{name} in its service is none of its names there: web => set the label dockflare.service to http://web:80"
        )
    };
    for (seen, value, expected) in [
        (web(), "http://web", "open net".to_owned()),
        (web(), "http://WEB:8080", "open net".into()),
        (web(), "tcp://web", "open net".into()),
        (web(), "http://web.net", "open net".into()),
        (web(), "http://Web.NET", "open net".into()),
        (web(), &by_id, "open net".into()),
        (web(), &by_id_there, "open net".into()),
        (with_aliases(&["shop", "shop.lan"]), "https://shop", "open net".into()),
        (with_aliases(&["shop", "shop.lan"]), "https://shop.lan", "open net".into()),
        (with_aliases(&["shop", "shop.lan"]), "https://shop.net", "open net".into()),
        // Another name.
        (web(), "http://shop", other_name("shop")),
        (web(), "http://web2", other_name("web2")),
        (web(), "http://we", other_name("we")),
        (alias_elsewhere.clone(), "http://inner", other_name("inner")),
        (alias_elsewhere, "http://web.app", "web.app in its service is none of its names there: web => set the label dockflare.service to http://web:80".into()),
        (
            with_aliases(&["shop", &short, "web"]),
            "http://typo:81",
            "typo in its service is none of its names there: web, shop => set the label dockflare.service to http://web:81".into(),
        ),
        // A host elsewhere.
        (web(), "http://nas.lan:5000", "-".into()),
        (apart.clone(), "http://nas.lan:5000", "-".into()),
        (web(), "http://neighbour:80", "-".into()),
        // No network.
        (apart.clone(), "http://web", CONNECT.into()),
        (apart.clone(), "http://typo", CONNECT.into()),
        (apart.clone(), "http://web.app", CONNECT.into()),
        (on_bridge.clone(), "http://web", CONNECT.into()),
        (with_mode("app"), "http://web", CONNECT.into()),
        (Inspected { networks: BTreeMap::new(), ..web() }, "http://web", CONNECT.into()),
        // Addresses.
        (web(), "http://172.18.0.3:8080", "open net".into()),
        (web(), "http://192.168.1.10:8080", "-".into()),
        (web(), "http://[fd00::1]:8080", "-".into()),
        (apart.clone(), "http://10.0.0.3", CONNECT.into()),
        (on_bridge, "http://172.17.0.3", CONNECT.into()),
        (
            container("web", &[("app", "10.0.0.3"), ("net", "172.18.0.3")]),
            "http://10.0.0.3:81",
            "10.0.0.3 is its address on the network app, which the tunnel is not on => set the label dockflare.service to http://web:81".into(),
        ),
        // cloudflared's own container.
        (
            web(),
            "http://localhost:8080",
            "localhost in its service is cloudflared's own container => set the label dockflare.service to http://web:8080".into(),
        ),
        (
            with_ports(&[3000]),
            "http://127.0.0.1:8080",
            "127.0.0.1 in its service is cloudflared's own container => set the label dockflare.service to http://web:3000".into(),
        ),
        (
            apart,
            "tcp://[::1]:22",
            "::1 in its service is cloudflared's own container => set the label dockflare.service to tcp://web:22".into(),
        ),
        // The host.
        (
            web(),
            "http://host.docker.internal:81",
            "host.docker.internal in its service is known on Docker Desktop only => set the label dockflare.service to http://172.18.0.1:81".into(),
        ),
        // What cloudflared serves by itself, and what it cannot read.
        (web(), "http_status:404", "-".into()),
        (with_mode("none"), "hello_world", "-".into()),
        (
            web(),
            "unix:/run/app.sock",
            "its service \"unix:/run/app.sock\" is a socket inside the tunnel container => set the label dockflare.service to http://web:<port>".into(),
        ),
        (
            with_ports(&[8080]),
            "web:8080",
            "its service \"web:8080\" is no address that cloudflared takes => set the label dockflare.service to http://web:8080".into(),
        ),
    ] {
        let around = Around { others: &["neighbour"], ..Around::default() };
        assert_eq!(around.way(&seen, &[value]), expected, "{value}");
    }
}

#[test]
fn a_declared_port_proves_nothing_and_another_one_is_a_note() {
    let other = |port: u16, declared: &str, better: &str| {
        format!(
            "open net: port {port} of its service is not among the ports it declares: {declared}; if the site does not answer, set the label dockflare.service to {better} (inside the network the container's own port counts, not a published one)"
        )
    };
    for (ports, value, expected) in [
        (&[][..], "http://web:81", "open net".to_owned()),
        (&[8080], "http://web:8080", "open net".into()),
        (&[80, 443], "http://web", "open net".into()),
        (&[80, 443], "https://web", "open net".into()),
        (&[22], "ssh://web", "open net".into()),
        (&[3389], "rdp://web", "open net".into()),
        (&[8080], "tcp://web", "open net".into()),
        (&[8080], "http://172.18.0.3:8080", "open net".into()),
        (&[8080], "http://web", other(80, "8080", "http://web:8080")),
        (&[8080], "https://172.18.0.3", other(443, "8080", "https://web:8080")),
        (&[80, 443], "http://web:9000", other(9000, "80, 443", "http://web:<port>")),
        (&[8080], "ssh://web", other(22, "8080", "ssh://web:8080")),
    ] {
        assert_eq!(Around::default().way(&with_ports(ports), &[value]), expected, "{ports:?} {value}");
    }
    let noted = Around::default().way(&with_ports(&[8080]), &["http://web:8080", "http://web:1"]);
    assert!(noted.starts_with("open net: port 1 of"), "{noted}");
}

#[test]
fn only_an_address_that_the_container_itself_has_on_the_tunnels_network_is_tried() {
    let around = Around { others: &["neighbour"], ..Around::default() };
    let two = container("web", &[("app", "10.0.0.3"), ("net", "172.18.0.3")]);
    let apart = container("web", &[("app", "10.0.0.3")]);
    let vpn = container("vpn", &[("net", "172.18.0.4")]);
    let lent = Inspected { network_mode: "container:vpn".into(), ..container("web", &[]) };
    let on_app =
        Around { tunnel: container("tunnel", &[("net", "172.18.0.2"), ("app", "10.0.0.2")]), ..Around::default() };
    let borrowing = Around { lender: Lender::Container(&vpn), ..Around::default() };
    for (around, seen, values, expected) in [
        (&around, &web(), &["http://web"][..], &["172.18.0.3:80"][..]),
        (&around, &web(), &["http://172.18.0.3:81"], &["172.18.0.3:81"]),
        (&around, &two, &["http://web:81"], &["172.18.0.3:81"]),
        (&around, &web(), &["http://web:1", "https://web", "http://web:1"], &["172.18.0.3:1", "172.18.0.3:443"]),
        (&borrowing, &lent, &["http://vpn:8000"], &["172.18.0.4:8000"]),
        // Whatever the label says: elsewhere, another container, the tunnel itself, another network, no port.
        (&around, &web(), &["http://192.168.1.10:22"], &[]),
        (&around, &web(), &["http://172.18.0.2:20241"], &[]),
        (&around, &web(), &["http://neighbour:22", "http://nas.lan:22"], &[]),
        (&around, &web(), &["http://localhost:22", "http://169.254.169.254"], &[]),
        (&around, &apart, &["http://web"], &[]),
        (&around, &with_mode("host"), &["http://172.18.0.1:22"], &[]),
        (&on_app, &apart, &["http://web"], &[]),
        (&around, &web(), &["tcp://web", "hello_world", "unix:/x"], &[]),
        (&around, &web(), &[], &[]),
    ] {
        assert_eq!(around.tries(seen, values), expected, "{values:?}");
    }
    let many: Vec<_> = (1..20).map(|port| format!("http://web:{port}")).collect();
    let scene = Scene { tunnel: &around.tunnel, network: "net", desktop: None, others: &BTreeSet::new() };
    let services = many.iter().map(|value| ("dockflare.service", value.as_str())).collect();
    let seen = web();
    let workload = Workload { seen: &seen, lender: Lender::Nobody, services, has_hostname: true };
    assert_eq!(way(&scene, &workload).tries.len(), MOST_TRIES);
}

#[test]
fn a_refused_connection_is_told_with_what_helps() {
    for (ports, value, expected) in [
        (&[8080][..], "http://web", "set the label dockflare.service to http://web:8080"),
        (&[80], "http://web", "set the label dockflare.service to the port that it listens on"),
        (&[], "http://web", "set the label dockflare.service to the port that it listens on"),
    ] {
        let seen = with_ports(ports);
        let tried = Around::default().with(&seen, &[value], way).tries.remove(0).refused;
        assert_eq!(tried.problem, "nothing listens on port 80 of it, connections are refused");
        assert_eq!(tried.remedy, format!("let it listen on 0.0.0.0:80, since 127.0.0.1 is not enough; or {expected}"));
    }
}

#[test]
fn without_the_labels_that_a_rule_is_made_of_nobody_is_led_to_it() {
    let around = Around::default();
    let nameless = Around { has_hostname: false, ..Around::default() };
    for seen in [web(), with_mode("host"), with_mode("none"), container("web", &[("app", "10.0.0.3")])] {
        assert_eq!(around.way(&seen, &[]), "no service", "{:?}", seen.networks);
    }
    assert_eq!(nameless.way(&web(), &[]), "no service");
    assert_eq!(nameless.way(&web(), &["http://web"]), "no hostname");
    assert_eq!(nameless.way(&with_mode("host"), &["http_status:404"]), "no hostname");
    assert_eq!(nameless.way(&container("web", &[("app", "10.0.0.3")]), &["http://web"]), CONNECT);
}

#[test]
fn each_label_is_judged_and_the_first_bad_one_is_told() {
    let (around, seen) = (Around::default(), web());
    assert_eq!(around.way(&seen, &["http://web:1", "http_status:404"]), "open net");
    assert_eq!(around.way(&seen, &["http_status:404", "http://web:1"]), "open net");
    let way = around.way(&seen, &["http://web:1", "http://typo:2", "http://typo:3"]);
    assert!(way.ends_with("set the label dockflare.0.service to http://web:2"), "{way}");
    // Names need a network of their own.
    let on_bridge =
        Around { tunnel: container("tunnel", &[("bridge", "172.17.0.2"), ("net", "")]), ..Around::default() };
    let seen = container("web", &[("bridge", "172.17.0.3")]);
    assert_eq!(on_bridge.way(&seen, &["http://web"]), CONNECT);
    assert_eq!(on_bridge.way(&seen, &["http://172.17.0.3"]), "open bridge");
}

#[test]
fn a_workload_on_the_hosts_network_is_reached_by_an_address_of_the_host() {
    let seen = with_mode("host");
    let by = |host: &str, text: &str| {
        format!(
            "it uses the host's network, where {text} does not lead => set the label dockflare.service to http://{host}:8123"
        )
    };
    let only_desktop = "host.docker.internal in its service is known on Docker Desktop only => set the label dockflare.service to http://172.18.0.1:8123";
    for (desktop, value, expected) in [
        (Some(false), "http://172.18.0.1:8123", "-".to_owned()),
        (Some(false), "http://192.168.1.10:8123", "-".into()),
        (Some(false), "http://nas.lan:8123", "-".into()),
        (Some(false), "http://web:8123", by("172.18.0.1", "web")),
        (Some(false), "http://localhost:8123", by("172.18.0.1", "localhost")),
        (Some(false), "http://host.docker.internal:8123", only_desktop.into()),
        (None, "http://host.docker.internal:8123", "-".into()),
        (None, "http://web:8123", by("172.18.0.1", "web")),
        (Some(true), "http://host.docker.internal:8123", "-".into()),
        (Some(true), "http://web:8123", by("host.docker.internal", "web")),
    ] {
        let around = Around { desktop, ..Around::default() };
        assert_eq!(around.way(&seen, &[value]), expected, "{desktop:?} {value}");
    }
    let internal = Around { tunnel: container("tunnel", &[("net", "")]), ..Around::default() };
    assert_eq!(internal.way(&seen, &["http://web:8123"]), by("<address of this host>", "web"));
}

#[test]
fn a_workload_without_a_network_must_be_made_anew() {
    let expected = "it is on no network (network_mode: none) => create it anew with --network net, or with that network in its compose file";
    for values in [&["http://web"][..], &["http://10.0.0.1"], &["http://localhost"]] {
        assert_eq!(Around::default().way(&with_mode("none"), values), expected, "{values:?}");
    }
}

#[test]
fn a_workload_on_the_network_of_another_container_is_found_by_the_names_of_that() {
    let vpn = Inspected { ports: BTreeSet::from([8000]), ..container("vpn", &[("net", "172.18.0.4")]) };
    let apart = container("vpn", &[("app", "10.0.0.4")]);
    let chained = Inspected { network_mode: "container:x".into(), ..container("vpn", &[]) };
    let none = with_mode("none");
    let seen = Inspected { network_mode: "container:vpn".into(), ..container("web", &[]) };
    let declares = Inspected { ports: BTreeSet::from([80]), ..seen.clone() };
    let tunnel = container("tunnel", &[("net", "172.18.0.2")]);
    for (lender, seen, value, expected) in [
        (Lender::Container(&vpn), &seen, "http://vpn:81", "open net"),
        (Lender::Container(&vpn), &seen, "http://172.18.0.4:81", "open net"),
        (Lender::Container(&vpn), &declares, "http://vpn:80", "open net"),
        (Lender::Container(&vpn), &declares, "http://vpn:8000", "open net"),
        (
            Lender::Container(&vpn),
            &seen,
            "http://web:81",
            "web in its service is none of its names there: vpn => set the label dockflare.service to http://vpn:81",
        ),
        (
            Lender::Container(&vpn),
            &seen,
            "http://localhost:81",
            "localhost in its service is cloudflared's own container => set the label dockflare.service to http://vpn:81",
        ),
        (
            Lender::Container(&apart),
            &seen,
            "http://vpn:81",
            "it shares no network with the tunnel => docker network connect net vpn",
        ),
        (Lender::Container(&chained), &seen, "http://vpn:81", "-"),
        (Lender::Container(&tunnel), &seen, "http://localhost:81", "-"),
        (
            Lender::Container(&none),
            &seen,
            "http://vpn:81",
            "it is on no network (network_mode: none) => create it anew with --network net, or with that network in its compose file",
        ),
        (
            Lender::Gone,
            &seen,
            "http://vpn:81",
            "the container whose network it uses does not run => start the container that its network_mode names, then create this one anew",
        ),
    ] {
        let around = Around { lender, ..Around::default() };
        assert_eq!(around.way(seen, &[value]), expected, "{value} {lender:?}");
    }
}

#[test]
fn whoever_began_before_the_container_whose_network_it_uses_has_none_any_more() {
    let at = |time: &str, seen: Inspected| Inspected { started_at: time.into(), ..seen };
    let (early, late) = ("2026-11-26T10:00:00.000000001Z", "2026-11-26T10:00:00.000000002Z");
    let seen = || Inspected { network_mode: "container:vpn".into(), ..container("web", &[]) };
    let vpn = || container("vpn", &[("net", "172.18.0.4")]);
    let stale = "vpn, whose network it uses, was started after it, and took that network away => docker restart web";
    for (seen, lender, expected) in [
        (at(early, seen()), at(late, vpn()), stale),
        (at("2026-11-26T11:59:59+02:00", seen()), at(early, vpn()), stale),
        (at(late, seen()), at(early, vpn()), "open net"),
        (at(early, seen()), at(early, vpn()), "open net"),
        (at(early, seen()), vpn(), "open net"),
        (seen(), at(late, vpn()), "open net"),
        // A container that uses the host's network through another keeps it.
        (at(early, seen()), at(late, with_mode("host")), "-"),
    ] {
        let around = Around { lender: Lender::Container(&lender), ..Around::default() };
        let value = if lender.network_mode == "host" { "http://172.18.0.1:81" } else { "http://vpn:81" };
        assert_eq!(around.way(&seen, &[value]), expected, "{} {}", seen.started_at, lender.started_at);
        assert_eq!(around.needed(&seen, &[value]), Vec::<String>::new());
    }
}

#[test]
fn a_name_of_its_own_is_never_taken_for_another_container() {
    let mut seen = container("web", &[("bridge", "172.17.0.3")]);
    seen.labels.insert(COMPOSE_SERVICE.into(), "shop".into());
    let around = Around { others: &["web", "shop", "other"], ..Around::default() };
    assert_eq!(around.way(&seen, &["http://web"]), CONNECT);
    assert_eq!(around.way(&seen, &["http://shop"]), CONNECT);
    assert_eq!(around.way(&seen, &["http://Other"]), "-");
}

#[test]
fn networks_are_asked_for_where_the_tunnels_own_does_not_lead() {
    let two = container("web", &[("alpha", "10.0.0.3"), ("beta", "10.1.0.3"), ("bridge", "172.17.0.3")]);
    let mut named = two.clone();
    named.networks.entry("beta".into()).or_default().aliases.push("shop".into());
    let on_beta = container("tunnel", &[("net", "172.18.0.2"), ("beta", "10.1.0.2")]);
    let at_home = container("web", &[("alpha", "10.0.0.3"), ("net", "172.18.0.3")]);
    for (seen, values, expected) in [
        (&two, &["http://web"][..], &["alpha"][..]),
        (&two, &[], &["alpha"]),
        (&two, &["http://typo"], &["alpha"]),
        (&named, &["http://shop"], &["beta"]),
        (&named, &["http://shop", "http://web.alpha"], &["alpha", "beta"]),
        (&two, &["http://10.1.0.3"], &["beta"]),
        (&two, &["http://172.17.0.3"], &[]),
        (&two, &["http_status:404"], &[]),
        (&two, &["http://nas.lan"], &[]),
        (&two, &["http://localhost"], &[]),
        (&at_home, &["http://web"], &[]),
        (&at_home, &["http://typo"], &[]),
        (&container("web", &[("bridge", "172.17.0.3")]), &["http://web"], &[]),
        (&with_mode("host"), &["http://web"], &[]),
        (&with_mode("none"), &["http://web"], &[]),
    ] {
        assert_eq!(Around::default().needed(seen, values), expected, "{:?} {values:?}", seen.networks.keys());
    }
    // A network stays requested once the tunnel is on it, and a network that the tunnel is on comes before others.
    let around = Around { tunnel: on_beta, ..Around::default() };
    assert_eq!(around.way(&two, &["http://web"]), "open beta");
    assert_eq!(around.needed(&two, &["http://web"]), ["beta"]);
    let vpn = container("vpn", &[("app", "10.0.0.4")]);
    let lent = Around { lender: Lender::Container(&vpn), ..Around::default() };
    assert_eq!(lent.needed(&Inspected { network_mode: "container:vpn".into(), ..container("web", &[]) }, &[]), ["app"]);
}

#[test]
fn service_labels_are_read_under_both_prefixes_with_and_without_a_number() {
    let labels = [
        ("dockflare.service", "a"),
        ("dockflare.0.service", " b "),
        ("dockflare.12.service", "c"),
        ("cloudflare.tunnel.service", "d"),
        ("cloudflare.tunnel.1.service", "e"),
        ("dockflare.1.service", "  "),
        ("dockflare.x.service", "no"),
        ("dockflare..service", "no"),
        ("dockflare.0.1.service", "no"),
        ("dockflare.services", "no"),
        ("other.service", "no"),
    ];
    let labels = labels.map(|(key, value)| (key.to_owned(), value.to_owned())).into();
    let mut found: Vec<_> = services(&labels).into_iter().map(|(_, value)| value).collect();
    found.sort_unstable();
    assert_eq!(found, ["a", "b", "c", "d", "e"]);
}
