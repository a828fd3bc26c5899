//! Finds out about the container that a program runs in.

use std::path::Path;

/// Whether this is a container with its own network, in which `localhost` is only the container itself.
pub fn has_own_network() -> bool {
    own_network(Path::new("/"))
}

/// Whether this is a container.
pub fn is_inside() -> bool {
    is_container(Path::new("/"))
}

/// The full id of the container from its list of mounts, whatever its host name. Docker and Podman mount files of their
/// own into it, from a folder named after the id.
pub fn own_id() -> Option<String> {
    mounts().and_then(|mounts| id_in(&mounts).map(str::to_owned))
}

/// Whether data under this path is lost with the container, because the path is on none of its mounts, or in memory.
/// `false` for the folder for temporary files, where this is expected.
pub fn dies_with_container(path: &Path) -> bool {
    !path.starts_with(std::env::temp_dir())
        && is_container(Path::new("/"))
        && mounts().is_some_and(|mounts| is_lost(&mounts, path))
}

#[expect(clippy::disallowed_methods, reason = "the kernel itself answers")]
fn mounts() -> Option<String> {
    std::fs::read_to_string("/proc/self/mountinfo").ok()
}

/// Docker and Podman each leave a marker file.
#[expect(clippy::disallowed_methods, reason = "in the container's own root")]
fn is_container(root: &Path) -> bool {
    ["", "run"]
        .into_iter()
        .zip([".dockerenv", ".containerenv"])
        .any(|(folder, mark)| root.join(folder).join(mark).exists())
}

/// The host's network has at least one interface that is not one end of a pair whose other end is elsewhere.
#[expect(clippy::disallowed_methods, reason = "the kernel itself answers")]
fn own_network(root: &Path) -> bool {
    let Ok(interfaces) = std::fs::read_dir(root.join("sys/class/net")) else { return false };
    let number = |interface: &Path, file: &str| std::fs::read_to_string(interface.join(file)).ok();
    let is_end_of_pair =
        |interface: &Path| interface.ends_with("lo") || number(interface, "ifindex") != number(interface, "iflink");
    is_container(root) && interfaces.flatten().all(|interface| is_end_of_pair(&interface.path()))
}

/// From the list of mounts, proc(5): whether the innermost mount that holds the path is the container's own root, or in
/// memory.
fn is_lost(mounts: &str, path: &Path) -> bool {
    let innermost = mounts
        .lines()
        .filter_map(|line| {
            let (fields, kind) = line.split_once(" - ")?;
            let at = fields.split(' ').nth(4)?.replace("\\040", " ");
            path.starts_with(&at).then(|| (at.len(), kind.split(' ').next().unwrap_or_default().to_owned()))
        })
        // Of several mounts at the same place, the last one is on top.
        .max_by_key(|(length, _)| *length);
    innermost.is_some_and(|(length, kind)| length == 1 || kind == "tmpfs" || kind == "ramfs")
}

/// Files that the runtime mounts into every container.
const RUNTIMES_OWN: [&str; 3] = ["/etc/hostname", "/etc/hosts", "/etc/resolv.conf"];

/// From the list of mounts, proc(5): the fourth field is the path on the host's file system, the fifth the path here.
fn id_in(mounts: &str) -> Option<&str> {
    let is_id = |part: &&str| part.len() == 64 && part.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    mounts.lines().find_map(|line| {
        let mut fields = line.split(' ').skip(3);
        let (root, at) = (fields.next()?, fields.next()?);
        RUNTIMES_OWN.contains(&at).then(|| root.split('/').rev().find(is_id)).flatten()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_without_a_volume_or_in_memory_is_lost_with_the_container() {
        let mounts = "600 500 0:50 / / rw,relatime - overlay overlay rw,lowerdir=/x\n\
            601 600 0:55 / /proc rw - proc proc rw\n\
            602 600 254:1 /var/lib/docker/volumes/d/_data /app/data rw - ext4 /dev/vda1 rw\n\
            603 600 254:1 /srv/my\\040data /my\\040data rw - ext4 /dev/vda1 rw\n\
            604 600 0:60 / /tmp rw - tmpfs tmpfs rw\n";
        for (path, lost) in [
            ("/app/data", false),
            ("/app/data/inner", false),
            ("/app", true),
            ("/app/database", true),
            ("/my data", false),
            ("/tmp/data", true),
        ] {
            assert_eq!(is_lost(mounts, Path::new(path)), lost, "{path}");
        }
        assert!(!is_lost("", Path::new("/app/data")), "what is not known is not said");
    }

    #[test]
    fn the_id_of_a_container_is_read_from_where_its_runtime_mounts_its_own_files_from() {
        let id = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08";
        let docker = format!(
            "600 500 0:50 / / rw,relatime - overlay overlay rw,lowerdir=/var/lib/docker/overlay2/{0}/diff\n\
            601 600 254:1 /var/lib/docker/volumes/{0}/_data /app/data rw - ext4 /dev/vda1 rw\n\
            602 600 254:1 /srv/hostname /etc/hostname ro - ext4 /dev/vda1 rw\n\
            603 600 254:1 /var/lib/docker/containers/{id}/hosts /etc/hosts rw - ext4 /dev/vda1 rw\n",
            "0".repeat(64)
        );
        let podman = format!(
            "603 600 0:25 /containers/overlay-containers/{id}/userdata/resolv.conf /etc/resolv.conf rw - tmpfs tmpfs rw\n"
        );
        for mounts in [docker, podman] {
            assert_eq!(id_in(&mounts), Some(id), "{mounts}");
        }
        for mounts in
            ["", "25 1 254:1 / / rw - ext4 /dev/vda1 rw\n", "603 600 254:1 /etc/hosts /etc/hosts rw - ext4 x rw"]
        {
            assert_eq!(id_in(mounts), None, "{mounts}");
        }
    }

    #[test]
    fn a_network_is_the_containers_own_where_all_its_interfaces_lead_out_of_it() {
        let dir = tempfile::tempdir().unwrap();
        let interface = |name: &str, index: u8, link: u8| {
            let path = dir.path().join("sys/class/net").join(name);
            std::fs::create_dir_all(&path).unwrap();
            std::fs::write(path.join("ifindex"), index.to_string()).unwrap();
            std::fs::write(path.join("iflink"), link.to_string()).unwrap();
        };
        interface("lo", 1, 1);
        interface("eth0", 7, 8);
        assert!(!own_network(dir.path()), "not in a container");
        std::fs::write(dir.path().join(".dockerenv"), "").unwrap();
        assert!(own_network(dir.path()));
        interface("docker0", 3, 3);
        assert!(!own_network(dir.path()), "the host's");
    }
}
