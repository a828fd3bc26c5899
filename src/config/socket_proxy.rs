//! Settings of the socket proxy: where it listens, and which Docker it exposes. Its policy comes from the same
//! variables as the agent's tunnel; it needs neither master nor key.

use std::net::SocketAddr;

pub use dockflare_engine::proxy::listen::Listen;

use super::check::{Check, without_secrets};
use super::{ConfigErrors, DockerHost, LogConfig, Raw, TunnelConfig, from_environment, log, tunnel};

/// The socket proxy's whole configuration, valid by construction.
#[derive(Debug, Clone)]
pub struct SocketProxyConfig {
    /// Where the agent connects to it.
    pub listen: Listen,
    /// Where Docker listens.
    pub docker_host: DockerHost,
    /// Settings of the tunnel container, which bound what the agent may ask for.
    pub tunnel: TunnelConfig,
    /// Log level, format and time zone.
    pub log: LogConfig,
}

/// In its own folder, so that a volume can share it between the two containers.
const DEFAULT_LISTEN: &str = "unix:///run/dockflare/docker.sock";

impl SocketProxyConfig {
    /// Reads the process environment, and takes unset variables from a `.env` in the working folder. Also returns the
    /// warnings to log once logging works.
    ///
    /// # Errors
    /// Everything that is wrong, at once.
    pub fn load() -> Result<(Self, Vec<String>), ConfigErrors> {
        let ((config, mut warnings), of_environment) = from_environment(Self::from_vars)?;
        warnings.splice(..0, of_environment);
        Ok((config, warnings))
    }

    /// Validates a list of variables. An empty value counts as unset.
    ///
    /// # Errors
    /// Everything that is wrong, at once.
    pub fn from_vars(vars: impl IntoIterator<Item = (String, String)>) -> Result<(Self, Vec<String>), ConfigErrors> {
        let mut check = Check::default();
        let mut raw = Raw::read(vars, &mut check)?;
        let listen = check.listen(raw.socket_proxy_listen.as_deref().unwrap_or(DEFAULT_LISTEN));
        let docker = raw.socket_proxy_docker_host.as_deref().unwrap_or("unix:///var/run/docker.sock");
        let docker_host = check.docker_host("SOCKET_PROXY_DOCKER_HOST", docker, &raw);
        let tunnel = tunnel(&mut check, &mut raw);
        let log = log(&mut check, &raw);
        if let (Some(Listen::Unix(own)), Some(DockerHost::Unix(docker))) = (&listen, &docker_host)
            && own == docker
        {
            check.error(format!("SOCKET_PROXY_LISTEN=unix://{own}: is Docker's own socket; name another path"));
        }
        match (listen, docker_host, tunnel) {
            (Some(listen), Some(docker_host), Some(tunnel)) if check.errors.is_empty() => {
                Ok((Self { listen, docker_host, tunnel, log }, check.warnings))
            }
            _ => Err(ConfigErrors(check.errors)),
        }
    }
}

impl Check {
    fn listen(&mut self, value: &str) -> Option<Listen> {
        match value.split_once("://") {
            Some(("unix", path)) if path.starts_with('/') && !path.ends_with('/') => {
                return Some(Listen::Unix(path.to_owned()));
            }
            Some(("tcp", address)) => {
                if let Ok(address) = address.parse::<SocketAddr>() {
                    self.warnings.push(format!(
                        "SOCKET_PROXY_LISTEN={value}: whoever reaches this address can stop the tunnel or change its token; keep it on a network with the agent alone, or use the default"
                    ));
                    return Some(Listen::Tcp(address));
                }
            }
            _ => {}
        }
        self.error(format!(
            "SOCKET_PROXY_LISTEN={}: must be unix:// with an absolute path, or tcp:// with an IP address and a port; the default is {DEFAULT_LISTEN}",
            without_secrets(value)
        ));
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(vars: &[(&str, &str)]) -> Result<(SocketProxyConfig, Vec<String>), ConfigErrors> {
        SocketProxyConfig::from_vars(vars.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())))
    }

    #[test]
    fn nothing_needs_to_be_set_and_neither_master_nor_key_are_asked_for() {
        let (config, warnings) = load(&[]).unwrap();
        assert_eq!(config.listen, Listen::Unix("/run/dockflare/docker.sock".into()));
        assert_eq!(config.docker_host, DockerHost::Unix("/var/run/docker.sock".into()));
        assert_eq!(config.tunnel.container_name, "dockflare-agent-tunnel");
        assert!(warnings.is_empty(), "{warnings:?}");
    }

    #[test]
    fn a_tcp_listener_is_possible_and_warned_of() {
        let (config, warnings) = load(&[("SOCKET_PROXY_LISTEN", "tcp://127.0.0.1:2375")]).unwrap();
        assert_eq!(config.listen.to_string(), "tcp://127.0.0.1:2375");
        assert_eq!(warnings.len(), 1);
    }

    #[test]
    fn all_errors_come_at_once_and_name_the_variable_and_the_remedy() {
        let wrong = [
            ("SOCKET_PROXY_LISTEN", "tcp://me:s3cret@host:1"),
            ("SOCKET_PROXY_DOCKER_HOST", "ssh://host"),
            ("CLOUDFLARED_IMAGE", "Cloudflared:1"),
            ("CLOUDFLARED_NETWORK_NAME", "host"),
            ("CLOUDFLARED_METRICS_NETWORK", "bridge"),
            ("TUNNEL_CONTAINER_NAME", "-x"),
            ("LOG_LEVEL", "LOUD=VERY"),
        ];
        let ConfigErrors(errors) = load(&wrong).unwrap_err();
        for (name, _) in wrong {
            assert!(errors.iter().any(|error| error.starts_with(name)), "nothing is said of {name}: {errors:#?}");
        }
        assert_eq!(errors.len(), wrong.len(), "{errors:#?}");
        assert!(!errors.join("").contains("s3cret"), "{errors:#?}");
        for listen in ["", "unix://", "unix://relative", "unix:///folder/", "tcp://host:2375", "tcp://1.2.3.4", "/x"] {
            let loaded = load(&[("SOCKET_PROXY_LISTEN", listen)]);
            assert_eq!(loaded.is_ok(), listen.is_empty(), "{listen}: {loaded:?}");
        }
        let same = load(&[("SOCKET_PROXY_LISTEN", "unix:///var/run/docker.sock")]).unwrap_err();
        assert!(same.to_string().contains("Docker's own socket"), "{same}");
    }
}
