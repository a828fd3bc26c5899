//! Reads what a service label asks cloudflared to call. Pure; `way` judges it.
//!
//! Does not use the URL library, which takes the container names `web.1` and `123` for addresses. cloudflared does not.

use std::net::IpAddr;

/// The value of a service label, as cloudflared reads it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Service<'a> {
    /// cloudflared answers by itself.
    Inner,
    /// A socket in the file system of the tunnel container.
    Socket,
    /// An address on a network.
    At(Address<'a>),
    /// Nothing that cloudflared accepts.
    Unreadable,
}

/// Where a service listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Address<'a> {
    /// Lower case.
    pub(super) scheme: String,
    /// The host as written.
    pub(super) text: &'a str,
    pub(super) host: Host<'a>,
    /// The written port, or else the scheme's default.
    pub(super) port: Option<u16>,
}

/// The host of an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Host<'a> {
    /// cloudflared's own container.
    Loopback,
    /// `host.docker.internal`, which Docker Desktop resolves.
    Desktop,
    Ip(IpAddr),
    Name(&'a str),
}

/// cloudflared's built-in services, under each of their names.
const INNER: [&str; 4] = ["hello_world", "hello-world", "bastion", "socks-proxy"];

impl<'a> Service<'a> {
    pub(super) fn read(value: &'a str) -> Self {
        let value = value.trim();
        let begins = |start: &str| value.get(..start.len()).is_some_and(|begin| begin.eq_ignore_ascii_case(start));
        if INNER.iter().any(|inner| inner.eq_ignore_ascii_case(value)) || begins("http_status:") {
            Self::Inner
        } else if begins("unix:") || begins("unix+tls:") {
            Self::Socket
        } else {
            address(value).map_or(Self::Unreadable, Self::At)
        }
    }
}

/// Returns the host of a service label in lower case, if it is a name.
pub(crate) fn named_host(value: &str) -> Option<String> {
    match Service::read(value) {
        Service::At(Address { host: Host::Name(name), .. }) => Some(name.to_ascii_lowercase()),
        _ => None,
    }
}

/// Returns the value without possible secrets: without the user and password before the host and what follows it.
pub(super) fn shown(value: &str) -> String {
    let place = |rest: &str| {
        let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
        authority.rsplit_once('@').map_or(authority, |(_, place)| place).to_owned()
    };
    match value.split_once("://") {
        Some((scheme, rest)) => format!("{scheme}://{}", place(rest)),
        None => value.rsplit_once('@').map_or(value, |(_, behind)| behind).to_owned(),
    }
}

fn address(value: &str) -> Option<Address<'_>> {
    let (scheme, rest) = value.split_once("://")?;
    if !scheme.starts_with(|c: char| c.is_ascii_alphabetic())
        || !scheme.chars().all(|c| c.is_ascii_alphanumeric() || "+-.".contains(c))
    {
        return None;
    }
    let scheme = scheme.to_ascii_lowercase();
    let authority = rest.split(['/', '?', '#']).next()?;
    let place = authority.rsplit_once('@').map_or(authority, |(_, place)| place);
    let (text, port) = match place.strip_prefix('[') {
        Some(bracketed) => {
            let (host, behind) = bracketed.split_once(']')?;
            (host, if behind.is_empty() { "" } else { behind.strip_prefix(':')? })
        }
        None => place.split_once(':').unwrap_or((place, "")),
    };
    if text.is_empty() || text.contains(|c: char| c.is_whitespace() || c.is_control()) {
        return None;
    }
    let port = match port {
        "" => usual_port(&scheme),
        digits if digits.bytes().all(|byte| byte.is_ascii_digit()) => {
            Some(digits.parse().ok().filter(|port| *port != 0)?)
        }
        _ => return None,
    };
    Some(Address { scheme, text, host: host(text), port })
}

fn host(text: &str) -> Host<'_> {
    match text.parse::<IpAddr>() {
        // A call to the unspecified address reaches the caller itself.
        Ok(ip) if ip.is_loopback() || ip.is_unspecified() => Host::Loopback,
        Ok(ip) => Host::Ip(ip),
        Err(_) if text.eq_ignore_ascii_case("localhost") => Host::Loopback,
        Err(_) if text.eq_ignore_ascii_case("host.docker.internal") => Host::Desktop,
        Err(_) => Host::Name(text),
    }
}

/// Returns the default port of a scheme.
fn usual_port(scheme: &str) -> Option<u16> {
    match scheme {
        "http" => Some(80),
        "https" => Some(443),
        "ssh" => Some(22),
        "rdp" => Some(3389),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_password_in_an_address_is_not_shown() {
        for (value, expected) in [
            ("http://me:hunter2@web:80/path?key=hunter2", "http://web:80"),
            ("me:hunter2@web", "web"),
            ("http://web:8080", "http://web:8080"),
            ("unix:/run/web.sock", "unix:/run/web.sock"),
        ] {
            assert_eq!(shown(value), expected);
        }
    }

    #[test]
    fn services_are_read_as_cloudflared_takes_them() {
        for inner in ["http_status:404", "HTTP_STATUS:503", "hello_world", "hello-world", "Bastion", " socks-proxy "] {
            assert_eq!(Service::read(inner), Service::Inner, "{inner}");
        }
        for socket in ["unix:/run/app.sock", "unix+tls:/run/app.sock", "UNIX:/x"] {
            assert_eq!(Service::read(socket), Service::Socket, "{socket}");
        }
        for wrong in ["", "web", "web:80", "http://", "http://:80", "http//web", "http://web:0", "http://web:65536"] {
            assert_eq!(Service::read(wrong), Service::Unreadable, "{wrong}");
        }
        for wrong in ["http://web:+80", "http://web:http", "http://a b", "://web", "1http://web", "http://[::1", "é"] {
            assert_eq!(Service::read(wrong), Service::Unreadable, "{wrong}");
        }
    }

    #[test]
    fn an_address_is_a_scheme_a_host_and_a_port_written_or_usual() {
        let ip = |text: &str| Host::Ip(text.parse().unwrap());
        for (value, scheme, host, port) in [
            ("http://web", "http", Host::Name("web"), Some(80)),
            ("HTTPS://Web/", "https", Host::Name("Web"), Some(443)),
            ("ssh://web", "ssh", Host::Name("web"), Some(22)),
            ("rdp://web", "rdp", Host::Name("web"), Some(3389)),
            ("tcp://web", "tcp", Host::Name("web"), None),
            ("tcp://db:5432", "tcp", Host::Name("db"), Some(5432)),
            ("http://my_web.1:8080/path?x#y", "http", Host::Name("my_web.1"), Some(8080)),
            ("http://user:word@web:81", "http", Host::Name("web"), Some(81)),
            ("http://web:", "http", Host::Name("web"), Some(80)),
            ("http://123", "http", Host::Name("123"), Some(80)),
            ("http://172.18.0.3:81", "http", ip("172.18.0.3"), Some(81)),
            ("http://[fd00::1]:81", "http", ip("fd00::1"), Some(81)),
            ("http://[fd00::1]", "http", ip("fd00::1"), Some(80)),
            ("http://LocalHost:81", "http", Host::Loopback, Some(81)),
            ("http://127.1.2.3", "http", Host::Loopback, Some(80)),
            ("http://[::1]:81", "http", Host::Loopback, Some(81)),
            ("http://0.0.0.0:81", "http", Host::Loopback, Some(81)),
            ("http://Host.Docker.Internal:81", "http", Host::Desktop, Some(81)),
        ] {
            let Service::At(seen) = Service::read(value) else { panic!("{value} is no address") };
            assert_eq!((seen.scheme.as_str(), seen.host, seen.port), (scheme, host, port), "{value}");
        }
    }
}
