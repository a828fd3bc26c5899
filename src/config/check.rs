//! The rules: what each variable may be, and the sentence for what it may not.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use dockflare_host::disk;
use reqwest::Url;
use reqwest::header::HeaderValue;
use tracing::level_filters::LevelFilter;
use tracing_subscriber::filter::Targets;

use super::{DEFAULT_IMAGE, DockerHost, ImageRef, PageAddress, Secret, read_secret_file, shown_file};

/// Collects what is wrong or odd while the variables are read.
#[derive(Default)]
pub(super) struct Check {
    pub(super) errors: Vec<String>,
    pub(super) warnings: Vec<String>,
}

impl Check {
    pub(super) fn error(&mut self, sentence: impl Into<String>) {
        self.errors.push(sentence.into());
    }

    pub(super) fn required<'a>(&mut self, name: &str, value: &'a Option<String>, remedy: &str) -> Option<&'a str> {
        if value.is_none() {
            self.error(format!("{name} is not set: {remedy}"));
        }
        value.as_deref()
    }

    pub(super) fn master_url(&mut self, value: &str) -> Option<Url> {
        let name = "DOCKFLARE_MASTER_URL";
        let url = match Url::parse(value) {
            Ok(url) => url,
            Err(error) => {
                self.error(format!(
                    "{name}={}: is not an address ({error}); use one like https://dockflare.example.com",
                    without_secrets(value)
                ));
                return None;
            }
        };
        if !url.username().is_empty() || url.password().is_some() {
            // The value is not shown: it holds a password.
            self.error(format!(
                "{name} holds a user name or password: remove it; the agent proves itself with DOCKFLARE_API_KEY"
            ));
        } else if !matches!(url.scheme(), "http" | "https") || url.host_str().is_none_or(str::is_empty) {
            self.error(format!(
                "{name}={}: must begin with http:// or https:// and name a host",
                without_secrets(value)
            ));
        } else if url.query().is_some() || url.fragment().is_some() {
            self.error(format!(
                "{name}={}: must end after its path; remove what follows '?' or '#'",
                without_secrets(value)
            ));
        } else {
            if url.scheme() == "http" && !is_private(&url) {
                self.warnings
                    .push(format!("{name}={value} sends the agent key unencrypted over a public network: use https"));
            }
            return Some(url);
        }
        None
    }

    /// A secret from its variable or the file that `{name}_FILE` names; never both.
    pub(super) fn secret(&mut self, name: &str, value: Option<String>, file: Option<String>) -> Option<Secret> {
        let file_name = format!("{name}_FILE");
        let (value, file) = match (value, file) {
            (None, None) => return None,
            (Some(_), Some(_)) => {
                self.error(format!("{name} and {file_name} are both set: keep one of them"));
                return None;
            }
            (Some(value), None) => (value, None),
            (None, Some(path)) => match read_secret_file(Path::new(&path), disk::read_at_start) {
                Ok(value) => (value, Some(PathBuf::from(path))),
                Err(problem) => {
                    self.error(format!("{file_name}={}: {problem}", shown_file(&path)));
                    return None;
                }
            },
        };
        if HeaderValue::from_str(&value).is_err() {
            self.error(format!("{name} holds characters that no HTTP header can carry: copy it again, as one line"));
            return None;
        }
        Some(Secret { value: value.into(), file })
    }

    pub(super) fn docker_host(&mut self, name: &str, value: &str) -> Option<DockerHost> {
        let problem = match value.split_once("://") {
            Some(("unix", path)) if path.starts_with('/') => return Some(DockerHost::Unix(path.to_owned())),
            Some(("unix", _)) => "needs an absolute path".to_owned(),
            Some(("tcp" | "http", address)) => match Url::parse(&format!("http://{address}")) {
                Ok(url) if url.path() == "/" && url.username().is_empty() && url.query().is_none() => {
                    // Docker's port for plain HTTP is 2375, where a web address would mean 80.
                    let host = url.host_str().unwrap_or_default();
                    let explicit =
                        address.trim_end_matches('/').rsplit_once(':').and_then(|(_, port)| port.parse().ok());
                    let port: u16 = url.port().or(explicit).unwrap_or(2375);
                    return Some(DockerHost::Http(format!("{host}:{port}")));
                }
                _ => "must be a host and a port, nothing behind them".to_owned(),
            },
            Some((scheme, _)) => format!("the scheme {scheme}:// is not supported"),
            None => "has no scheme".to_owned(),
        };
        self.error(format!(
            "{name}={}: {problem}; use unix:///var/run/docker.sock or tcp://socket-proxy:2375",
            without_secrets(value)
        ));
        None
    }

    pub(super) fn image(&mut self, value: &str) -> Option<ImageRef> {
        let mut reference = value;
        if let Some(at) = value.find(" #").or_else(|| value.find("\t#")) {
            reference = value[..at].trim_end();
            self.warnings.push(format!(
                "CLOUDFLARED_IMAGE: dropped the trailing comment, using {reference}; move the comment to a line of its own"
            ));
        }
        match ImageRef::from_str(reference) {
            Ok(image) => {
                if image.tag_was_added() {
                    self.warnings.push(format!(
                        "CLOUDFLARED_IMAGE={reference} names no version, using {image}: pin a tag to know what runs"
                    ));
                }
                Some(image)
            }
            Err(problem) => {
                self.error(format!("CLOUDFLARED_IMAGE={reference}: {problem}; use repository:tag or repository@sha256:<64 hex digits>, for example {DEFAULT_IMAGE}"));
                None
            }
        }
    }

    /// A name that Docker accepts for containers and networks: `[a-zA-Z0-9][a-zA-Z0-9_.-]+`.
    pub(super) fn name(&mut self, variable: &str, value: Option<String>, default: &str) -> String {
        let value = value.unwrap_or_else(|| default.to_owned());
        let valid = value.len() >= 2
            && value.len() <= 128
            && value.starts_with(|c: char| c.is_ascii_alphanumeric())
            && value.chars().all(|c| c.is_ascii_alphanumeric() || "_.-".contains(c));
        if !valid {
            self.error(format!("{variable}={value}: is no name Docker accepts; use 2 to 128 letters, digits, '_', '.' or '-', a letter or digit first, for example {default}"));
        }
        value
    }

    pub(super) fn seconds(&mut self, name: &str, value: Option<String>, default: u64, least: u64) -> Duration {
        self.seconds_up_to(name, value, default, least, 3600)
    }

    pub(super) fn seconds_up_to(
        &mut self,
        name: &str,
        value: Option<String>,
        default: u64,
        least: u64,
        most: u64,
    ) -> Duration {
        let Some(value) = value else {
            return Duration::from_secs(default);
        };
        match value.parse() {
            Ok(seconds) if (least..=most).contains(&seconds) => Duration::from_secs(seconds),
            _ => {
                self.error(format!("{name}={value}: is not a whole number of seconds from {least} to {most}"));
                Duration::from_secs(default)
            }
        }
    }

    /// One of a few words, any case; the first is the default.
    pub(super) fn one_of<T: Copy>(&mut self, name: &str, value: Option<&str>, words: &[(&str, T)]) -> T {
        let default = words[0].1;
        let Some(value) = value else { return default };
        match words.iter().find(|(word, _)| word.eq_ignore_ascii_case(value)) {
            Some((_, found)) => *found,
            None => {
                let list: Vec<_> = words.iter().map(|(word, _)| *word).collect();
                self.error(format!("{name}={value}: must be one of {}", list.join(", ")));
                default
            }
        }
    }

    /// A switch, off when it is not set.
    pub(super) fn yes_or_no(&mut self, name: &str, value: Option<&str>) -> bool {
        let words = [("false", false), ("true", true), ("0", false), ("1", true), ("no", false), ("yes", true)];
        self.one_of(name, value, &words)
    }

    /// Python's level names, for people who come from the Python agent, or `tracing` directives.
    pub(super) fn log_filter(&mut self, value: &str) -> Targets {
        let level = match value.to_ascii_uppercase().as_str() {
            "NOTSET" => Some(LevelFilter::TRACE),
            "DEBUG" => Some(LevelFilter::DEBUG),
            "INFO" => Some(LevelFilter::INFO),
            "WARNING" | "WARN" => Some(LevelFilter::WARN),
            "ERROR" | "CRITICAL" | "FATAL" => Some(LevelFilter::ERROR),
            _ => None,
        };
        let asked = match level {
            Some(level) => Targets::new().with_default(level),
            None => Targets::from_str(value).unwrap_or_else(|_| {
                self.error(format!("LOG_LEVEL={value}: is neither a level (DEBUG, INFO, WARNING, ERROR, CRITICAL) nor a list of directives like info,dockflare_agent::events=debug"));
                Targets::new()
            }),
        };
        // Below `info` these print addresses, headers and bodies, the tunnel token among them.
        const LOUD: [&str; 6] = ["bollard", "h2", "hyper", "hyper_util", "reqwest", "rustls"];
        let is_loud =
            |target: &str| LOUD.iter().any(|loud| target == *loud || target.starts_with(&format!("{loud}::")));
        let mut filter = Targets::new();
        // What the agent shares with other programs logs for it here.
        let ours = asked.iter().find(|(target, _)| *target == "dockflare_agent").map(|(_, level)| level);
        filter = filter.with_targets(ours.map(|level| ("dockflare_host", level)));
        if let Some(default) = asked.default_level() {
            filter = filter.with_default(default);
        }
        for (target, level) in asked.iter() {
            let level = if is_loud(target) { level.min(LevelFilter::INFO) } else { level };
            filter = filter.with_target(target, level);
        }
        for target in LOUD {
            if asked.iter().all(|(named, _)| named != target) {
                let level = asked.default_level().unwrap_or(LevelFilter::INFO).min(LevelFilter::INFO);
                filter = filter.with_target(target, level);
            }
        }
        filter
    }
}

/// Where the page listens; none with port 0. All that is wrong with it, at once.
pub(super) fn health_page(port: Option<&str>, bind: Option<&str>) -> Result<Option<PageAddress>, Vec<String>> {
    let port = port.filter(|port| !port.is_empty()).unwrap_or("8080");
    let bind = bind.filter(|bind| !bind.is_empty()).unwrap_or("0.0.0.0");
    let number = port
        .parse::<u16>()
        .map_err(|_| format!("HEALTH_CHECK_PORT={port}: is not a port; use 1 to 65535, or 0 to switch the page off"));
    let ip = bind.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>().map_err(|_| {
        format!("HEALTH_CHECK_BIND={bind}: is not an IP address; use 0.0.0.0 for every interface, or 127.0.0.1 for this container only")
    });
    match (number, ip) {
        (Ok(number), Ok(ip)) => Ok((number != 0).then(|| PageAddress(SocketAddr::new(ip, number)))),
        (number, ip) => Err([number.err(), ip.err()].into_iter().flatten().collect()),
    }
}

/// An address as it may be shown when it is wrong: without what may be a password before an `@` or behind a `?`.
pub(super) fn without_secrets(address: &str) -> String {
    let end = address.find(['?', '#']).unwrap_or(address.len());
    let shown = &address[..end];
    let (start, hidden) = shown.rfind('@').map_or((0, ""), |at| (at, "<hidden>"));
    format!("{hidden}{}{}", &shown[start..], if end < address.len() { "?<hidden>" } else { "" })
}

/// Whether plain HTTP to this host stays on the machine or in a private network, as far as a name can tell.
fn is_private(url: &Url) -> bool {
    let host = url.host_str().unwrap_or_default().trim_matches(['[', ']']);
    match host.parse::<IpAddr>() {
        Ok(IpAddr::V4(ip)) => ip.is_loopback() || ip.is_private() || ip.is_link_local(),
        Ok(IpAddr::V6(ip)) => ip.is_loopback() || ip.is_unique_local() || ip.is_unicast_link_local(),
        // A name without a dot is a container, a compose service or a host of the local network.
        Err(_) => {
            !host.contains('.')
                || ["localhost", "local", "internal", "lan", "home.arpa"]
                    .iter()
                    .any(|zone| host.ends_with(&format!(".{zone}")))
        }
    }
}
