//! Extracts one stage of a Dockerfile and makes it build from local files.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

/// A stage that builds from its context alone.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Stage {
    pub(crate) dockerfile: String,
    /// Path in the context, local file or folder, and the mode if the instruction sets one.
    pub(crate) copies: Vec<(String, PathBuf, Option<u32>)>,
}

/// Takes the stage `FROM scratch AS <name>`, or the last `FROM scratch` stage. Rewrites each `COPY --from=` to copy the
/// matching file of `sources` from the context. A source matches by the whole path or by its last part.
pub(crate) fn stage(text: &str, name: Option<&str>, sources: &[(&str, &Path)]) -> Result<Stage> {
    let lines = logical_lines(text);
    let start = lines.iter().rposition(|line| {
        let line = line.to_lowercase();
        name.map_or_else(|| line.starts_with("from scratch"), |name| line == format!("from scratch as {name}"))
    });
    let start = start.with_context(|| format!("no FROM scratch line for {name:?}"))?;
    let mut stage = Stage { dockerfile: "FROM scratch\n".into(), copies: Vec::new() };
    for line in lines[start + 1..].iter().take_while(|line| !line.to_lowercase().starts_with("from ")) {
        let line = match line.split_once(char::is_whitespace) {
            Some((word, rest)) if word.eq_ignore_ascii_case("COPY") && rest.contains("--from=") => {
                stage.copy(rest, sources).with_context(|| line.clone())?
            }
            _ => line.clone(),
        };
        stage.dockerfile.push_str(&line);
        stage.dockerfile.push('\n');
    }
    Ok(stage)
}

impl Stage {
    fn copy(&mut self, rest: &str, sources: &[(&str, &Path)]) -> Result<String> {
        let (flags, paths): (Vec<_>, Vec<_>) = rest.split_whitespace().partition(|word| word.starts_with("--"));
        let mode = flags.iter().find_map(|flag| flag.strip_prefix("--chmod="));
        let mode = mode.map(|mode| u32::from_str_radix(mode, 8)).transpose().context("--chmod")?;
        // The classic builder knows neither `--chmod` nor `--link`. The files in the context get the mode instead.
        let keep: Vec<_> = flags.into_iter().filter(|flag| flag.starts_with("--chown=")).collect();
        let [froms @ .., to] = &paths[..] else { bail!("no destination") };
        let mut instruction = format!("COPY {}", keep.join(" "));
        for from in froms {
            let (_, local) = sources.iter().find(|(source, _)| is_same(source, from)).with_context(|| {
                let known: Vec<_> = sources.iter().map(|(source, _)| source).collect();
                format!("no local file for {from}, only for {known:?}")
            })?;
            let name = last_part(from);
            let path = format!("files/{}/{name}", self.copies.len());
            instruction.push_str(&format!(" {path}"));
            self.copies.push((path, local.to_path_buf(), mode));
        }
        Ok(format!("{instruction} {to}"))
    }
}

fn is_same(source: &str, from: &str) -> bool {
    source == from || (!source.contains('/') && source == last_part(from))
}

fn last_part(path: &str) -> &str {
    path.trim_end_matches('/').rsplit('/').next().unwrap_or(path)
}

/// Joins continued lines, and drops comments and empty lines.
fn logical_lines(text: &str) -> Vec<String> {
    let mut lines = Vec::new();
    let mut open = String::new();
    for line in text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#')) {
        match line.strip_suffix('\\') {
            Some(part) => open.push_str(part),
            None => lines.push(std::mem::take(&mut open) + line),
        }
    }
    if !open.is_empty() {
        lines.push(open);
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str = r#"
# syntax=docker/dockerfile:1
FROM rust AS build
RUN cargo build
FROM scratch AS unused
COPY --from=build /x /x
# The agent alone.
FROM scratch
COPY --from=build --chmod=0755 --link /src/target/dockflare-agent /usr/local/bin/dockflare-agent
COPY --from=build --chown=65532:65532 /out/data/ /app/data
USER 65532:65532
ENV A=1 \
    B=2
ENTRYPOINT ["/usr/local/bin/dockflare-agent"]
"#;

    #[test]
    fn takes_the_last_stage_and_maps_what_it_copies() {
        let sources = [("dockflare-agent", Path::new("/here/agent")), ("/out/data/", Path::new("/here/empty"))];
        let stage = stage(FILE, None, &sources).expect("stage");
        let expected = "FROM scratch\n\
            COPY  files/0/dockflare-agent /usr/local/bin/dockflare-agent\n\
            COPY --chown=65532:65532 files/1/data /app/data\n\
            USER 65532:65532\n\
            ENV A=1 B=2\n\
            ENTRYPOINT [\"/usr/local/bin/dockflare-agent\"]\n";
        assert_eq!(stage.dockerfile, expected);
        let copies = [
            ("files/0/dockflare-agent".to_owned(), PathBuf::from("/here/agent"), Some(0o755)),
            ("files/1/data".to_owned(), PathBuf::from("/here/empty"), None),
        ];
        assert_eq!(stage.copies, copies);
        let named = stage_named("unused", &[("x", Path::new("/here/x"))]);
        assert_eq!(named.dockerfile, "FROM scratch\nCOPY  files/0/x /x\n", "up to the next stage");
    }

    fn stage_named(name: &str, sources: &[(&str, &Path)]) -> Stage {
        stage(FILE, Some(name), sources).expect("a stage")
    }

    #[test]
    fn names_what_it_has_no_file_for() {
        let error = format!("{:#}", stage(FILE, None, &[("data", Path::new("/e"))]).expect_err("no agent"));
        assert!(error.contains("dockflare-agent") && error.contains("data"), "{error}");
        assert!(stage("FROM debian\n", None, &[]).is_err());
    }
}
