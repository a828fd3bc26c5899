//! Finds labelled containers that share a hostname. Pure.

use std::collections::{BTreeMap, BTreeSet};

use super::way::hostnames;
use crate::docker::Container;

/// Returns the hostnames, with their paths, that more than one container has, and the names of those containers.
pub(super) fn replicas<'a>(labelled: impl Iterator<Item = &'a Container>) -> BTreeMap<String, BTreeSet<String>> {
    let mut known = BTreeMap::<String, BTreeSet<String>>::new();
    for container in labelled {
        for (key, hostname) in hostnames(&container.labels) {
            // A hostname with two paths makes two rules.
            let path = key.strip_suffix("hostname").and_then(|begin| container.labels.get(&format!("{begin}path")));
            let path = path.map(|path| path.trim().trim_matches('/')).filter(|path| !path.is_empty());
            let place =
                path.map_or(hostname.to_ascii_lowercase(), |path| format!("{}/{path}", hostname.to_ascii_lowercase()));
            known.entry(place).or_default().insert(container.name.clone());
        }
    }
    known.retain(|_, names| names.len() > 1);
    known
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn containers_share_a_hostname_whatever_its_case_and_not_with_another_path() {
        let container = |name: &str, labels: &[(&str, &str)]| Container {
            id: name.into(),
            name: name.into(),
            labels: labels.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect(),
            status: "running".into(),
            image: String::new(),
        };
        let all = [
            container("a", &[("dockflare.hostname", "Shop.example")]),
            container("b", &[("dockflare.0.hostname", "shop.example "), ("dockflare.1.hostname", "b.example")]),
            container("c", &[("cloudflare.tunnel.hostname", "shop.example"), ("cloudflare.tunnel.path", "/api")]),
            container("d", &[("dockflare.hostname", "shop.example"), ("dockflare.path", "api/")]),
            container("e", &[("dockflare.0.hostname", "e.example"), ("dockflare.1.hostname", "e.example")]),
        ];
        let names = |names: [&str; 2]| names.map(str::to_owned).into();
        let expected = BTreeMap::from([
            ("shop.example".into(), names(["a", "b"])),
            ("shop.example/api".into(), names(["c", "d"])),
        ]);
        assert_eq!(replicas(all.iter()), expected);
    }
}
