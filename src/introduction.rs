//! Chooses the agent's name at its master: the configured name, else the name of the host, else the agent's id.
//!
//! A host's name serves if it tells hosts apart. Many hosts share the names that installers set by default
//! (`raspberrypi`), so the start of the id follows such a name. A new agent has no id before its first registration. If
//! its name needs the id, it registers a second time at once.

use std::path::Path;
use std::time::Duration;

use dockflare_host::aside::Aside;
use dockflare_host::disk;
use tokio::time::timeout;
use tracing::debug;

use crate::docker::{Docker, silent};
use crate::state::AgentId;

/// How the agent introduces itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Introduction {
    /// By this name.
    Named(String),
    /// By this name, which other hosts may share, and the start of the agent's id.
    WithId(String),
    /// By the start of its id.
    ById,
}

/// Time limit for Docker to name its host. A busy Docker takes seconds.
const ASK_LIMIT: Duration = Duration::from_secs(5);
/// Longest name. No host's name is longer, and a master shows it in a column.
const MOST_LETTERS: usize = 64;
/// Letters of the id in a name.
const ID_LETTERS: usize = 8;
const FILE: &str = "/etc/hostname";
const MOST_BYTES: u64 = 1024;
/// The name of a new agent while nothing is known about it.
const NOBODY: &str = "dockflare-agent";

/// Names that installers and images give to every host.
const COMMON: [&str; 25] = [
    "alpine",
    "archlinux",
    "armbian",
    "boot2docker",
    "centos",
    "colima",
    "debian",
    "default",
    "dietpi",
    "docker-desktop",
    "fedora",
    "homeassistant",
    "lima-default",
    "localhost",
    "minikube",
    "nixos",
    "openmediavault",
    "openwrt",
    "orbstack",
    "photon",
    "raspberrypi",
    "rockylinux",
    "truenas",
    "ubuntu",
    "unraid",
];

impl Introduction {
    /// Returns the name for this id, and whether it is final.
    pub(crate) fn name(&self, id: Option<&AgentId>) -> (String, bool) {
        let start = id.map(|id| id.as_str().chars().take(ID_LETTERS).collect::<String>());
        match (self, start) {
            (Self::Named(name), _) => (name.clone(), true),
            (Self::WithId(name), Some(start)) => (format!("{name}-{start}"), true),
            (Self::WithId(name), None) => (name.clone(), false),
            (Self::ById, Some(start)) => (format!("agent-{start}"), true),
            (Self::ById, None) => (NOBODY.to_owned(), false),
        }
    }

    /// Returns the introduction for a host with this name, if the name is usable.
    fn of_host(name: &str) -> Option<Self> {
        let name = name.lines().next().unwrap_or_default().trim();
        let name: String = name.chars().filter(|c| !c.is_control()).take(MOST_LETTERS).collect();
        let first = name.split('.').next().unwrap_or_default().to_ascii_lowercase();
        match first.as_str() {
            "" => None,
            // Docker gives a container such a host name, which tells people nothing.
            _ if is_id(&first) => None,
            _ if COMMON.contains(&first.as_str()) => Some(Self::WithId(name)),
            _ => Some(Self::Named(name)),
        }
    }
}

/// Finds out the Docker host's name, else reads `/etc/hostname`, which holds the host's name if that file is mounted.
/// Returns `None` while Docker is away and a later call may find a name.
pub(crate) async fn of_host(docker: &Docker) -> Option<Introduction> {
    let told = timeout(ASK_LIMIT, docker.host_name()).await.unwrap_or_else(|_| Err(silent()));
    let is_away = match told {
        Ok(name) => match Introduction::of_host(&name) {
            Some(introduction) => return Some(introduction),
            None => false,
        },
        Err(error) => {
            debug!("the name of the host is not known: Docker {error}");
            error.is_away()
        }
    };
    match Introduction::of_host(&read(Path::new(FILE)).await) {
        Some(introduction) => Some(introduction),
        None if is_away => None,
        None => Some(Introduction::ById),
    }
}

async fn read(path: &'static Path) -> String {
    let read = Aside::default().or_earlier(disk::LIMIT, move || disk::read(path, MOST_BYTES)).await;
    read.and_then(Result::ok).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
}

/// Whether a name is a container's id or the start of one.
fn is_id(name: &str) -> bool {
    (12..=64).contains(&name.len()) && name.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hosts_own_name_is_taken_as_it_is_and_one_that_many_have_gets_the_id() {
        use Introduction::{ById, Named, WithId};
        let id = AgentId::try_from("b438a4d6-a6ff-47c3-81f7-0a5e02305b0b".to_owned()).unwrap();
        for (host, expected, before, after) in [
            ("kitchen\n", Some(Named("kitchen".into())), "kitchen", "kitchen"),
            (" web1.example.com ", Some(Named("web1.example.com".into())), "web1.example.com", "web1.example.com"),
            ("raspberrypi", Some(WithId("raspberrypi".into())), "raspberrypi", "raspberrypi-b438a4d6"),
            ("Ubuntu.local", Some(WithId("Ubuntu.local".into())), "Ubuntu.local", "Ubuntu.local-b438a4d6"),
            ("", None, "dockflare-agent", "agent-b438a4d6"),
            ("dd20cdfc46bb", None, "dockflare-agent", "agent-b438a4d6"),
        ] {
            let introduction = Introduction::of_host(host);
            assert_eq!(introduction, expected, "{host}");
            let introduction = introduction.unwrap_or(ById);
            let is_named = matches!(introduction, Named(_));
            assert_eq!(introduction.name(None), (before.to_owned(), is_named), "{host}");
            assert_eq!(introduction.name(Some(&id)), (after.to_owned(), true), "{host}");
        }
    }

    #[test]
    fn a_name_is_one_line_of_bounded_length() {
        let long = format!("{}\u{7}x", "a-".repeat(100));
        let Some(Introduction::Named(name)) = Introduction::of_host(&long) else { panic!("no name") };
        assert_eq!((name.len(), name.contains(char::is_control)), (MOST_LETTERS, false));
    }
}
