//! Collects a root file system in memory.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

/// User and group 0.
const ROOT: (u64, u64) = (0, 0);

/// The files of an image or of a build context. A later file replaces an earlier one of the same path.
#[derive(Debug, Clone, Default)]
pub struct Files {
    /// Keyed by path without the leading slash.
    entries: BTreeMap<String, Entry>,
}

#[derive(Debug, Clone)]
struct Entry {
    /// `None` means a folder.
    content: Option<Vec<u8>>,
    mode: u32,
    owner: (u64, u64),
}

impl Files {
    /// Starts without files.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a file with this content, mode (`0o644`) and owner (user id, group id).
    #[must_use]
    pub fn bytes(self, path: &str, content: impl Into<Vec<u8>>, mode: u32, owner: (u64, u64)) -> Self {
        self.entry(path, Entry { content: Some(content.into()), mode, owner })
    }

    /// Adds a folder. Parent folders need no entry: they are made with mode 0755 and belong to root.
    #[must_use]
    pub fn folder(self, path: &str, mode: u32, owner: (u64, u64)) -> Self {
        self.entry(path, Entry { content: None, mode, owner })
    }

    /// Adds a copy of a file on this machine; follows a symbolic link.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn copy(self, path: &str, from: &Path, mode: u32, owner: (u64, u64)) -> Result<Self> {
        let content = fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
        Ok(self.bytes(path, content, mode, owner))
    }

    /// Adds a copy of a file with its mode, or of a whole folder. The copies belong to root.
    ///
    /// # Errors
    /// When anything in it cannot be read.
    pub fn copy_all(mut self, path: &str, from: &Path) -> Result<Self> {
        let found = fs::metadata(from).with_context(|| format!("cannot read {}", from.display()))?;
        let mode = std::os::unix::fs::PermissionsExt::mode(&found.permissions()) & 0o7777;
        if !found.is_dir() {
            return self.copy(path, from, mode, ROOT);
        }
        self = self.folder(path, mode, ROOT);
        for entry in fs::read_dir(from)? {
            let entry = entry?;
            self = self.copy_all(&format!("{path}/{}", entry.file_name().to_string_lossy()), &entry.path())?;
        }
        Ok(self)
    }

    fn entry(mut self, path: &str, entry: Entry) -> Self {
        self.entries.insert(path.trim_matches('/').to_owned(), entry);
        self
    }

    /// Packs all files into a tar archive.
    pub(crate) fn tar(&self) -> Result<Vec<u8>> {
        let mut archive = tar::Builder::new(Vec::new());
        for (path, entry) in &self.with_folders() {
            let mut header = tar::Header::new_gnu();
            header.set_mode(entry.mode);
            header.set_uid(entry.owner.0);
            header.set_gid(entry.owner.1);
            let content = entry.content.as_deref();
            header.set_entry_type(content.map_or(tar::EntryType::Directory, |_| tar::EntryType::Regular));
            let content = content.unwrap_or_default();
            header.set_size(content.len() as u64);
            archive.append_data(&mut header, path, content).with_context(|| format!("cannot pack {path}"))?;
        }
        Ok(archive.into_inner()?)
    }

    /// Adds the parent folders, which Docker would otherwise make for root alone. The entries are sorted, so a folder
    /// comes before its content.
    fn with_folders(&self) -> BTreeMap<String, Entry> {
        let mut all = self.entries.clone();
        for path in self.entries.keys() {
            for (slash, _) in path.match_indices('/') {
                let folder = Entry { content: None, mode: 0o755, owner: ROOT };
                all.entry(path[..slash].to_owned()).or_insert(folder);
            }
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use super::*;

    #[test]
    fn packs_files_with_mode_owner_and_the_folders_on_the_way() {
        let files = Files::new().bytes("/usr/local/bin/tool", "content", 0o755, ROOT).folder(
            "/app/data",
            0o700,
            (65532, 65532),
        );
        let tar = files.tar().expect("tar");
        let mut archive = tar::Archive::new(&tar[..]);
        let mut seen = Vec::new();
        for entry in archive.entries().expect("entries") {
            let mut entry = entry.expect("entry");
            let mut content = String::new();
            entry.read_to_string(&mut content).expect("content");
            let header = entry.header();
            let path = entry.path().expect("path").display().to_string();
            seen.push((path, header.mode().expect("mode"), header.uid().expect("uid"), content));
        }
        let row = |path: &str, mode, uid, content: &str| (path.to_owned(), mode, uid, content.to_owned());
        let expected = [
            row("app", 0o755, 0, ""),
            row("app/data", 0o700, 65532, ""),
            row("usr", 0o755, 0, ""),
            row("usr/local", 0o755, 0, ""),
            row("usr/local/bin", 0o755, 0, ""),
            row("usr/local/bin/tool", 0o755, 0, "content"),
        ];
        assert_eq!(seen, expected);
    }

    #[test]
    fn copies_a_folder_with_what_is_in_it() {
        let folder = tempfile::tempdir().expect("folder");
        fs::create_dir(folder.path().join("in")).expect("in");
        fs::write(folder.path().join("in/file"), "x").expect("file");
        let files = Files::new().copy_all("ctx", folder.path()).expect("copy");
        assert_eq!(files.entries.keys().collect::<Vec<_>>(), ["ctx", "ctx/in", "ctx/in/file"]);
    }
}
