//! Image references, as far as the agent must understand them: to pull, to compare, to report.

use std::fmt;
use std::str::FromStr;

/// `repository:tag`, `repository@sha256:…` or both, checked against Docker's grammar for references.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageRef {
    repository: String,
    tag: Option<String>,
    digest: Option<String>,
    tag_was_added: bool,
}

impl ImageRef {
    /// The pull's `fromImage` parameter.
    pub fn repository(&self) -> &str {
        &self.repository
    }

    /// The pull's `tag` parameter: the digest if there is one, since it is more precise.
    pub fn tag_or_digest(&self) -> &str {
        self.digest.as_deref().or(self.tag.as_deref()).unwrap_or("latest")
    }

    /// The version of cloudflared, if the tag shows one: `2025.9.0`.
    pub(crate) fn version(&self) -> Option<String> {
        let tag = self.tag_or_digest();
        let numbers: Vec<_> = tag.split('.').collect();
        let is_number = |part: &&str| !part.is_empty() && part.len() <= 4 && part.bytes().all(|b| b.is_ascii_digit());
        (numbers.len() == 3 && numbers.iter().all(is_number)).then(|| tag.to_owned())
    }

    /// Whether it has a digest, so that its content never changes.
    pub(crate) fn is_pinned(&self) -> bool {
        self.digest.is_some()
    }

    /// Whether the operator named neither tag nor digest, so `latest` was added.
    pub fn tag_was_added(&self) -> bool {
        self.tag_was_added
    }
}

impl fmt::Display for ImageRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.repository)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        if let Some(digest) = &self.digest {
            write!(f, "@{digest}")?;
        }
        Ok(())
    }
}

impl FromStr for ImageRef {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        // Also the longest that a master accepts in an acknowledgement.
        if text.len() > 255 {
            return Err("is longer than 255 characters");
        }
        let (name, digest) = match text.split_once('@') {
            Some((name, digest)) => (name, Some(digest)),
            None => (text, None),
        };
        if let Some(digest) = digest {
            let hex = digest.strip_prefix("sha256:").ok_or("has a digest that does not begin with sha256:")?;
            if hex.len() != 64 || !hex.chars().all(|c| matches!(c, '0'..='9' | 'a'..='f')) {
                return Err("has a digest that is not 64 lower-case hex digits");
            }
        }
        // A colon before the last slash belongs to a registry's port.
        let last = name.rfind('/').map_or(0, |slash| slash + 1);
        let (repository, tag) = match name[last..].split_once(':') {
            Some((_, tag)) => (&name[..name.len() - tag.len() - 1], Some(tag)),
            None => (name, None),
        };
        if let Some(tag) = tag {
            let fits = (1..=128).contains(&tag.len())
                && !tag.starts_with(['.', '-'])
                && tag.chars().all(|c| c.is_ascii_alphanumeric() || "_.-".contains(c));
            if !fits {
                return Err("has a tag that is not 1 to 128 letters, digits, '_', '.' or '-'");
            }
        }
        let mut components = repository.split('/');
        let first = components.next().unwrap_or_default();
        let is_registry = repository.contains('/') && (first.contains(['.', ':']) || first == "localhost");
        let registry_fits = |host: &str| {
            let (host, port) = host.split_once(':').unwrap_or((host, "1"));
            !host.is_empty()
                && host.chars().all(|c| c.is_ascii_alphanumeric() || ".-".contains(c))
                && port.parse::<u16>().is_ok()
        };
        let path_fits = |part: &str| {
            let edge = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
            part.starts_with(edge) && part.ends_with(edge) && part.chars().all(|c| edge(c) || "_.-".contains(c))
        };
        let first_fits = if is_registry { registry_fits(first) } else { path_fits(first) };
        if !first_fits || !components.all(path_fits) {
            return Err("has a repository name that is not lower-case letters, digits, '_', '.', '-' between slashes");
        }
        let tag_was_added = tag.is_none() && digest.is_none();
        Ok(Self {
            repository: repository.to_owned(),
            tag: tag.map(str::to_owned).or_else(|| tag_was_added.then(|| "latest".to_owned())),
            digest: digest.map(str::to_owned),
            tag_was_added,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tag_that_is_a_version_tells_it() {
        let version = |text: &str| text.parse::<ImageRef>().unwrap().version();
        assert_eq!(version("cloudflare/cloudflared:2025.9.0"), Some("2025.9.0".into()));
        for other in ["cloudflared", "cloudflared:latest", "cloudflared:1", "cloudflared:2025.9.0-amd64", "a:1.2.3.4"] {
            assert_eq!(version(other), None, "{other}");
        }
    }

    #[test]
    fn references_in_use_are_taken_apart() {
        let digest = format!("sha256:{}", "a1".repeat(32));
        for (text, repository, pulled) in [
            ("cloudflare/cloudflared:2025.9.0", "cloudflare/cloudflared", "2025.9.0"),
            ("cloudflared:latest", "cloudflared", "latest"),
            ("registry.local:5000/cf/cloudflared:1", "registry.local:5000/cf/cloudflared", "1"),
            ("localhost/x_y/z-1:T_1.2", "localhost/x_y/z-1", "T_1.2"),
            (&format!("cloudflare/cloudflared@{digest}"), "cloudflare/cloudflared", &digest),
            (&format!("ghcr.io/a/b:1@{digest}"), "ghcr.io/a/b", &digest),
        ] {
            let image: ImageRef = text.parse().unwrap_or_else(|problem| panic!("{text}: {problem}"));
            assert_eq!((image.repository(), image.tag_or_digest()), (repository, pulled), "{text}");
            assert_eq!(image.to_string(), text);
        }
    }

    #[test]
    fn a_missing_tag_becomes_latest() {
        let image: ImageRef = "cloudflare/cloudflared".parse().unwrap();
        assert!(image.tag_was_added());
        assert_eq!(image.to_string(), "cloudflare/cloudflared:latest");
    }

    #[test]
    fn what_docker_would_refuse_is_refused() {
        for text in [
            "",
            ":1",
            "a:",
            "a:-1",
            "A/b:1",
            "a//b:1",
            "/a:1",
            "a/:1",
            "a b:1",
            "a@sha256:12",
            "a:1 ",
            "-a:1",
            "a@md5:0123",
            &format!("a@sha256:{}", "A1".repeat(32)),
            &format!("a@sha256:{}", "a1".repeat(33)),
            "host:port/x:1",
            &format!("a:{}", "1".repeat(129)),
            &"a".repeat(256),
            "a:1:2",
            "a@sha256:x@y",
        ] {
            assert!(text.parse::<ImageRef>().is_err(), "{text:?} was taken");
        }
    }
}
