//! Configures a double before it starts.

use std::net::{Ipv4Addr, SocketAddr};

use crate::master::DevMaster;
use crate::operate;
use crate::state::{Limits, Protocol, Rules, Settings, State};

/// Configures a double. The default is a version 2 master on a free port of 127.0.0.1.
pub struct Builder {
    listen: SocketAddr,
    prefix: String,
    master_key: String,
    access: Option<(String, String)>,
    keys: Vec<(String, String)>,
    rules: Rules,
}

impl Default for Builder {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            prefix: String::new(),
            master_key: "dev-master-key".to_owned(),
            access: None,
            keys: Vec::new(),
            rules: Rules {
                protocol: Protocol::V2,
                at_most: 2,
                limits: Limits::default(),
                front_bytes: usize::MAX,
                enroll_new: None,
                account: None,
            },
        }
    }
}

impl Builder {
    /// Sets the protocol the double speaks at first.
    #[must_use]
    pub fn protocol(mut self, protocol: Protocol) -> Self {
        self.rules.protocol = protocol;
        self
    }

    /// Sets the highest version a version 2 double agrees to: 1, to test an agent's fallback, or 2. Values are
    /// clamped to that range.
    #[must_use]
    pub fn highest_version(mut self, version: u8) -> Self {
        self.rules.at_most = version.clamp(1, 2);
        self
    }

    /// Sets the listen address; port 0 picks a free port.
    #[must_use]
    pub fn listen(mut self, address: SocketAddr) -> Self {
        self.listen = address;
        self
    }

    /// Sets the key of the operator's routes. The default is `dev-master-key`.
    #[must_use]
    pub fn master_key(mut self, key: impl Into<String>) -> Self {
        self.master_key = key.into();
        self
    }

    /// Sets the limits of a version 2 double.
    #[must_use]
    pub fn limits(mut self, limits: Limits) -> Self {
        self.rules.limits = limits;
        self
    }

    /// Serves all routes under this path, as behind a proxy. Requests outside it get 404.
    #[must_use]
    pub fn prefix(mut self, prefix: &str) -> Self {
        let inner = prefix.trim_matches('/');
        self.prefix = if inner.is_empty() { String::new() } else { format!("/{inner}") };
        self
    }

    /// Adds an agent key from the start.
    #[must_use]
    pub fn key(mut self, key: impl Into<String>, owner: impl Into<String>) -> Self {
        self.keys.push((key.into(), owner.into()));
        self
    }

    /// Enrolls each new agent with the tunnel of this name as soon as it registers.
    #[must_use]
    pub fn enroll_new(mut self, tunnel_name: impl Into<String>) -> Self {
        self.rules.enroll_new = Some(tunnel_name.into());
        self
    }

    /// Puts the double behind an imaginary Cloudflare Access, which redirects an agent's request without this
    /// service token to a login page.
    #[must_use]
    pub fn access(mut self, client_id: impl Into<String>, client_secret: impl Into<String>) -> Self {
        self.access = Some((client_id.into(), client_secret.into()));
        self
    }

    /// Serves the `/accounts` routes, for this account.
    #[must_use]
    pub fn account(mut self, account: impl Into<String>) -> Self {
        self.rules.account = Some(account.into());
        self
    }

    /// Starts the double on the current runtime.
    ///
    /// # Errors
    /// Fails if the double cannot listen on the address.
    pub async fn start(self) -> anyhow::Result<DevMaster> {
        let mut state = State::new(self.rules);
        for (key, owner) in &self.keys {
            operate::add_key(&mut state, key, owner);
        }
        let settings = Settings { prefix: self.prefix, master_key: self.master_key, access: self.access };
        DevMaster::serve(self.listen, state, settings).await
    }
}
