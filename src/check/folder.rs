//! The data folder: whether an agent could use it, and its content.

use super::Section;
use crate::config::Config;
use crate::state::{Folder, Phase};

/// A document is a few kilobytes, and each is written beside the old one.
const LEAST_FREE_BYTES: u64 = 1 << 20;

pub(super) fn look(config: &Config, folder: &Folder, to: &mut Section) {
    let dir = config.data_dir.display();
    let title = "can be written";
    match &folder.writable {
        Ok(()) if folder.exists => to.pass("folder.writable", title, dir.to_string()),
        Ok(()) => to.pass("folder.writable", title, format!("{dir} is made at the first start")),
        Err(unusable) => to.fail("folder.writable", title, &unusable.problem, &unusable.remedy),
    }
    if folder.is_lost {
        to.warn("folder.volume", "volume", crate::NO_VOLUME, "mount a volume or a folder of the host there");
    }
    if !folder.answers {
        for (id, title) in [("folder.room", "room"), ("folder.documents", "documents"), ("folder.holder", "held by")] {
            to.skip(id, title, "the folder does not answer");
        }
        return;
    }
    let (id, title) = ("folder.room", "room");
    match folder.free {
        Some((bytes, true)) if bytes >= LEAST_FREE_BYTES => to.pass(id, title, format!("{} MiB free", bytes >> 20)),
        Some((bytes, true)) => to.fail(id, title, format!("{} KiB free", bytes >> 10), "make room on its disk"),
        Some((_, false)) => to.fail(id, title, "no further file can be made there", "make room on its disk"),
        None => to.skip(id, title, "the system does not tell"),
    }
    documents(folder, to);
    let (id, title) = ("folder.holder", "held by");
    match &folder.holder {
        Some(holder) => to.pass(id, title, format!("an agent that runs: {holder}")),
        None => to.skip(id, title, "no agent that can be seen from here"),
    }
}

fn documents(folder: &Folder, to: &mut Section) {
    let (id, title) = ("folder.documents", "documents");
    let problems = [folder.agent_id.as_ref().err(), folder.tunnel.as_ref().err(), folder.tombstone.as_ref().err()];
    for problem in problems.iter().flatten() {
        let remedy = "mend it or move it away; at its next start the agent moves it aside and goes on without it";
        to.fail(id, title, *problem, remedy);
    }
    if problems.iter().any(Option::is_some) {
        return;
    }
    match (&folder.agent_id, &folder.tombstone) {
        (_, Ok(Some(stone))) => {
            let phase = match stone.phase {
                Phase::Prepared => "is being decommissioned",
                Phase::Finalized => "was decommissioned",
            };
            let detail = format!("this agent {phase} (operation {})", stone.operation_id);
            to.warn(id, title, detail, "to enrol it again, delete decommission.json and set a new key");
        }
        (Ok(Some(agent)), _) => to.pass(id, title, format!("can be read; this is agent {agent}")),
        _ => to.pass(id, title, "none yet; the agent has not registered so far"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::{FOLDER, Outcome};
    use super::*;
    use crate::config::Config;
    use crate::state;

    fn outcomes(dir: &std::path::Path) -> Vec<(String, Outcome, String)> {
        let vars = [
            ("DOCKFLARE_MASTER_URL", "http://m"),
            ("DOCKFLARE_API_KEY", "k"),
            ("DOCKFLARE_DATA_DIR", dir.to_str().unwrap()),
        ];
        let config = Config::from_vars(vars.map(|(n, v)| (n.to_owned(), v.to_owned()))).unwrap().config;
        let mut section = Section::default();
        section.begin(FOLDER);
        look(&config, &state::peek(dir), &mut section);
        section.findings.into_iter().map(|finding| (finding.id, finding.outcome, finding.detail)).collect()
    }

    #[test]
    fn an_empty_folder_and_a_missing_one_will_do() {
        let dir = tempfile::tempdir().unwrap();
        for place in [dir.path().to_owned(), dir.path().join("missing")] {
            let found = outcomes(&place);
            assert!(found.iter().all(|(_, outcome, _)| *outcome != Outcome::Fail), "{found:#?}");
        }
        assert!(!dir.path().join("missing").exists());
    }

    #[test]
    fn a_document_that_cannot_be_read_fails_and_a_tombstone_warns() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("tunnel_state.json"), "{").unwrap();
        let found = outcomes(dir.path());
        assert!(
            found.iter().any(|(id, outcome, _)| id == "folder.documents" && *outcome == Outcome::Fail),
            "{found:#?}"
        );
        std::fs::write(dir.path().join("tunnel_state.json"), "{}").unwrap();
        let stone = r#"{"schema_version":1,"operation_id":"op","agent_id":"a","phase":"finalized","requested_self_action":"stop","prepared_at":null,"finalized_at":null}"#;
        std::fs::write(dir.path().join("decommission.json"), stone).unwrap();
        let found = outcomes(dir.path());
        assert!(
            found.iter().any(|(_, outcome, detail)| *outcome == Outcome::Warn && detail.contains("op")),
            "{found:#?}"
        );
    }
}
