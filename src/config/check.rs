//! The rules: what each variable may be, and the error for everything else.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use dockflare_host::{disk, words};
use reqwest::Url;
use reqwest::header::HeaderValue;

use super::tls::Certificates;
use super::{DEFAULT_IMAGE, DockerHost, ImageRef, MARK, PageAddress, Raw, Secret, read_secret_file, shown_file};

/// Collects errors and warnings while the variables are read.
#[derive(Default)]
pub(super) struct Check {
    pub(super) errors: Vec<String>,
    pub(super) warnings: Vec<String>,
    /// Number of unknown variables.
    unknown: usize,
}

impl Check {
    pub(super) fn error(&mut self, sentence: impl Into<String>) {
        self.errors.push(sentence.into());
    }

    /// Removes quotes around a value. `docker run -e`, an `--env-file` and lists in a compose file keep them as part of
    /// the value.
    pub(super) fn unquoted(&mut self, name: &str, value: &str) -> String {
        let mut bare = value;
        for (opens, closes) in QUOTES {
            match (value.strip_prefix(opens), value.strip_suffix(closes)) {
                (Some(rest), _) if rest.ends_with(closes) => {
                    bare = rest.strip_suffix(closes).unwrap_or(rest).trim();
                    self.warnings.push(format!(
                        "{name} has quotes around its value, which were dropped: remove them, docker run and lists in a compose file take them as part of the value"
                    ));
                    break;
                }
                (Some(_), _) | (_, Some(_)) if name != "AGENT_DISPLAY_NAME" => {
                    self.error(format!("{name} has a quote at one end of its value: remove it"));
                    break;
                }
                _ => {}
            }
        }
        bare.to_owned()
    }

    /// Warns of an unknown variable that may have been meant for the agent. Ignores variables of other programs.
    pub(super) fn unknown(&mut self, name: &str, known: &[String]) {
        const OURS: [&str; 4] = ["DOCKFLARE_", "CF_ACCESS_", "CLOUDFLARED_", "SOCKET_PROXY_"];
        /// Parts of names that Docker links and Kubernetes set for a container or service whose name has such a prefix.
        const SERVICES: [&str; 5] = ["_PORT", "_SERVICE_", "_ENV_", "_TCP", "_NAME"];
        const MOST: usize = 10;
        // Short or common names that too many others resemble.
        let meant = known.iter().filter(|known| !["HOSTNAME", "TZ"].contains(&known.as_str()));
        let near = words::nearest(name, meant.map(String::as_str)).map(|near| (near, words::distance(name, near)));
        let is_ours =
            OURS.iter().any(|prefix| name.starts_with(prefix)) && !SERVICES.iter().any(|mark| name.contains(mark));
        let hint = match near {
            Some((near, distance)) if distance <= 2 || (is_ours && distance <= 4) => format!(": do you mean {near}?"),
            _ if is_ours => String::new(),
            _ => return,
        };
        self.unknown += 1;
        if self.unknown <= MOST {
            let name: String = name.chars().filter(|c| !c.is_control()).take(100).collect();
            self.warnings.push(format!(
                "nothing reads the variable {name}{hint}; remove it, or see docs/settings.md for its name"
            ));
        }
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
            // Do not show the value: it holds a password.
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

    /// A secret from its variable, or from the file that `{name}_FILE` names; never both.
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
                Ok((value, marked)) => {
                    if marked {
                        self.warnings.push(format!(
                            "{file_name}={}: begins with {MARK}; save it as UTF-8 without it",
                            shown_file(&path)
                        ));
                    }
                    (value, Some(PathBuf::from(path)))
                }
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

    pub(super) fn docker_host(&mut self, name: &str, value: &str, raw: &Raw) -> Option<DockerHost> {
        let errors = self.errors.len();
        let certificates = self.docker_certificates(raw);
        let problem = match value.split_once("://") {
            Some(("unix", path)) if path.starts_with('/') && certificates.is_none() => {
                return (self.errors.len() == errors).then(|| DockerHost::Unix(path.to_owned()));
            }
            Some(("unix", path)) if path.starts_with('/') => {
                "is a socket, on which there is no TLS: remove DOCKER_TLS_VERIFY and DOCKER_CERT_PATH, or set an address".to_owned()
            }
            Some(("unix", _)) => "needs an absolute path".to_owned(),
            Some(("https", _)) if certificates.is_none() => {
                "asks for TLS, for which DOCKER_TLS_VERIFY=1 and DOCKER_CERT_PATH must be set as well".to_owned()
            }
            Some(("http", _)) if certificates.is_some() => "asks for plain HTTP, but DOCKER_TLS_VERIFY is set".to_owned(),
            Some(("tcp" | "http" | "https", address)) => match Url::parse(&format!("http://{address}")) {
                Ok(url) if url.path() == "/" && url.username().is_empty() && url.query().is_none() => {
                    // Docker's ports are 2375 for plain HTTP and 2376 for TLS; the URL parser assumes 80.
                    let host = url.host_str().unwrap_or_default();
                    let explicit =
                        address.trim_end_matches('/').rsplit_once(':').and_then(|(_, port)| port.parse().ok());
                    let usual = if certificates.is_some() { 2376 } else { 2375 };
                    let port: u16 = url.port().or(explicit).unwrap_or(usual);
                    let Some(certificates) = certificates else {
                        if port == 2376 {
                            self.warnings.push(format!("{name}={value}: 2376 is Docker's port for TLS, and DOCKER_TLS_VERIFY and DOCKER_CERT_PATH are not set"));
                        }
                        return (self.errors.len() == errors).then(|| DockerHost::Http(format!("{host}:{port}")));
                    };
                    return match certificates?.with(host, port) {
                        Ok(tls) => Some(DockerHost::Tls(tls)),
                        Err(problem) => {
                            self.error(format!("DOCKER_CERT_PATH: {problem}"));
                            None
                        }
                    };
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

    /// The certificates for TLS to Docker, if TLS is asked for; `Some(None)` if they cannot be used, which is reported
    /// by then.
    fn docker_certificates(&mut self, raw: &Raw) -> Option<Option<Certificates>> {
        match (raw.docker_tls_verify.as_deref(), raw.docker_cert_path.as_deref()) {
            (None, None) => None,
            (Some(_), None) => {
                self.error("DOCKER_TLS_VERIFY is set without DOCKER_CERT_PATH: set both or neither; DOCKER_CERT_PATH is the folder with ca.pem, cert.pem and key.pem");
                Some(None)
            }
            (None, Some(_)) => {
                self.error(
                    "DOCKER_CERT_PATH is set without DOCKER_TLS_VERIFY: set both or neither; DOCKER_TLS_VERIFY is 1",
                );
                Some(None)
            }
            (Some(verify), Some(folder)) => {
                if !["1", "true", "yes"].iter().any(|word| word.eq_ignore_ascii_case(verify)) {
                    self.error(format!("DOCKER_TLS_VERIFY={verify}: must be 1; TLS with a Docker whose certificate is not looked at is not supported"));
                }
                match Certificates::read(Path::new(folder)) {
                    Ok(certificates) => Some(Some(certificates)),
                    Err(problems) => {
                        for problem in problems {
                            self.error(format!("DOCKER_CERT_PATH={folder}: {problem}"));
                        }
                        Some(None)
                    }
                }
            }
        }
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

    /// One of a few words in any case; the first is the default.
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

    /// A switch, off by default.
    pub(super) fn yes_or_no(&mut self, name: &str, value: Option<&str>) -> bool {
        let words = [("false", false), ("true", true), ("0", false), ("1", true), ("no", false), ("yes", true)];
        self.one_of(name, value, &words)
    }
}

/// Where the health page listens; `None` for port 0. Returns everything that is wrong at once.
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

/// Quotes that people put around values, and the typographic ones that editors turn them into.
const QUOTES: [(char, char); 4] = [('"', '"'), ('\'', '\''), ('“', '”'), ('‘', '’')];

/// A value without the quotes around it, if any.
pub(super) fn without_quotes(value: &str) -> &str {
    let bare = |(opens, closes)| value.strip_prefix(opens)?.strip_suffix(closes).map(str::trim);
    QUOTES.into_iter().find_map(bare).unwrap_or(value)
}

/// An invalid address in a form that may be shown: without what may be a password before an `@` or after a `?`.
pub(super) fn without_secrets(address: &str) -> String {
    let end = address.find(['?', '#']).unwrap_or(address.len());
    let shown = &address[..end];
    let (start, hidden) = shown.rfind('@').map_or((0, ""), |at| (at, "<hidden>"));
    format!("{hidden}{}{}", &shown[start..], if end < address.len() { "?<hidden>" } else { "" })
}

/// Whether plain HTTP to this host stays on the machine or in a private network, as far as the name tells.
fn is_private(url: &Url) -> bool {
    let host = url.host_str().unwrap_or_default().trim_matches(['[', ']']);
    match host.parse::<IpAddr>() {
        Ok(IpAddr::V4(ip)) => ip.is_loopback() || ip.is_private() || ip.is_link_local(),
        Ok(IpAddr::V6(ip)) => ip.is_loopback() || ip.is_unique_local() || ip.is_unicast_link_local(),
        // A name without a dot is a container, a compose service or a host on the local network.
        Err(_) => {
            !host.contains('.')
                || ["localhost", "local", "internal", "lan", "home.arpa"]
                    .iter()
                    .any(|zone| host.ends_with(&format!(".{zone}")))
        }
    }
}
