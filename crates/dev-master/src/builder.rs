//! What a double is like when it starts.

use std::net::{Ipv4Addr, SocketAddr};

use crate::master::DevMaster;
use crate::operate;
use crate::state::{Limits, Protocol, Rules, Settings, State};

/// How the double shall be: a version 2 master on a free port of 127.0.0.1, unless told otherwise.
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
    /// Which protocol it speaks at first.
    #[must_use]
    pub fn protocol(mut self, protocol: Protocol) -> Self {
        self.rules.protocol = protocol;
        self
    }

    /// Makes a version 2 double agree to this version at most: 1 to try an agent's way back. Other
    /// values count as 2.
    #[must_use]
    pub fn highest_version(mut self, version: u8) -> Self {
        self.rules.at_most = version.clamp(1, 2);
        self
    }

    /// Where it listens; port 0 finds a free one.
    #[must_use]
    pub fn listen(mut self, address: SocketAddr) -> Self {
        self.listen = address;
        self
    }

    /// The key of the operator's routes; `dev-master-key` unless set.
    #[must_use]
    pub fn master_key(mut self, key: impl Into<String>) -> Self {
        self.master_key = key.into();
        self
    }

    /// What a version 2 double takes at most.
    #[must_use]
    pub fn limits(mut self, limits: Limits) -> Self {
        self.rules.limits = limits;
        self
    }

    /// A path under which all routes lie, as behind a proxy; what is outside is 404.
    #[must_use]
    pub fn prefix(mut self, prefix: &str) -> Self {
        let inner = prefix.trim_matches('/');
        self.prefix = if inner.is_empty() { String::new() } else { format!("/{inner}") };
        self
    }

    /// Makes an agent key known from the start.
    #[must_use]
    pub fn key(mut self, key: impl Into<String>, owner: impl Into<String>) -> Self {
        self.keys.push((key.into(), owner.into()));
        self
    }

    /// Gives each new agent the tunnel of this name at once.
    #[must_use]
    pub fn enroll_new(mut self, tunnel_name: impl Into<String>) -> Self {
        self.rules.enroll_new = Some(tunnel_name.into());
        self
    }

    /// Puts the double behind an imaginary Cloudflare Access: a request of an agent without this
    /// service token is sent to a login page.
    #[must_use]
    pub fn access(mut self, client_id: impl Into<String>, client_secret: impl Into<String>) -> Self {
        self.access = Some((client_id.into(), client_secret.into()));
        self
    }

    /// Gives the double the `/accounts` routes, for this account.
    #[must_use]
    pub fn account(mut self, account: impl Into<String>) -> Self {
        self.rules.account = Some(account.into());
        self
    }

    /// Starts to serve, on the current runtime.
    ///
    /// # Errors
    /// The address cannot be listened on.
    pub async fn start(self) -> anyhow::Result<DevMaster> {
        let mut state = State::new(self.rules);
        for (key, owner) in &self.keys {
            operate::add_key(&mut state, key, owner);
        }
        let settings = Settings { prefix: self.prefix, master_key: self.master_key, access: self.access };
        DevMaster::serve(self.listen, state, settings).await
    }
}
