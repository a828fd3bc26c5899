//! How Podman's API differs from Docker's where it matters to the agent. All other calls were tried on Podman 4.3.1 and
//! behave the same.
//!
//! | | Docker | Podman |
//! |---|---|---|
//! | the end of a container, as a filter | `die`, `destroy` | `died` and `remove`; before 4.4 `die` matches nothing |
//! | the same, as reported | `die`, `destroy` | `die` or `died`, `remove` |
//! | an event of a network | has the network's id and name | has the container's |
//! | a health check | run by the daemon | run by systemd; without systemd there is never a verdict |
//! | an image's name | as requested | prefixed with its registry |

use super::Action;

/// The events that the agent subscribes to, under all their names. Not `exec_*`, which the container's own health check
/// would send all day. `kill` reports each signal: a container that is stopped by hand takes no new requests from then
/// on, and ends only when its drain is over.
pub(crate) const EVENT_ACTIONS: [&str; 13] = [
    "start",
    "kill",
    "die",
    "died",
    "stop",
    "destroy",
    "remove",
    "rename",
    "pause",
    "unpause",
    "health_status",
    "connect",
    "disconnect",
];

/// The action that an event of a container reports.
pub(super) fn action(name: &str) -> Action {
    match name {
        "start" => Action::Start,
        "die" | "died" | "stop" | "destroy" | "remove" => Action::End,
        "rename" => Action::Rename,
        _ => Action::Container,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_a_container_is_asked_for_and_understood_by_both_names() {
        for name in ["die", "died", "stop", "destroy", "remove"] {
            assert!(EVENT_ACTIONS.contains(&name) && action(name) == Action::End, "{name}");
        }
        assert!(EVENT_ACTIONS.contains(&"kill") && action("kill") == Action::Container, "it has not ended by that");
        assert_eq!(action("cleanup"), Action::Container);
    }
}
