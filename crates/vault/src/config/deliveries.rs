//! `deliveries`: which workload gets which files.

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};

use super::reader::{Reader, Section, nearest};
use crate::delivery::{
    ContainerName, Content, DEFAULT_MODE, Delivery, FileName, FileSpec, OnChange, Template, TemplateError, Workload,
};
use crate::secret::SecretName;

/// Required and allowed permissions. The owner, which is the vault, must read what it compares later; nobody else
/// writes.
const MUST: u32 = 0o400;
const MAY: u32 = 0o755;

/// Returns the valid deliveries, sorted by workload. Problems with the others go to the reader.
pub(super) fn read(reader: &mut Reader<'_>, top: &mut Section) -> Vec<Delivery> {
    let mut deliveries: BTreeMap<Workload, Delivery> = BTreeMap::new();
    let mut directories: Vec<(PathBuf, String)> = vec![];
    for mut row in reader.rows(top, "deliveries") {
        let workload = parsed::<Workload>(reader, &mut row, "workload");
        let directory = directory(reader, &mut row);
        let allow_disk = reader.flag(&mut row, "allow_disk").unwrap_or(false);
        let [uid, gid] = ["uid", "gid"].map(|key| {
            let id = reader.number(&mut row, key, 0, u64::from(u32::MAX) - 1)?;
            u32::try_from(id).ok()
        });
        let mode = mode(reader, &mut row).unwrap_or(DEFAULT_MODE);
        let files = files(reader, &mut row, mode);
        let containers = containers(reader, &mut row);
        let on_change = on_change(reader, &mut row);
        if on_change != OnChange::None && containers.is_empty() {
            let place = row.at("containers");
            reader.problem(&format!("{place} is missing: name the containers that on_change is about"));
        }
        let place = row.at("directory");
        reader.end(row);
        if let Some(directory) = &directory {
            for (other, there) in &directories {
                if directory.starts_with(other) || other.starts_with(directory) {
                    reader.problem(&format!(
                        "{there} and {place} are one directory, or one lies in the other ({}): give each workload a directory of its own",
                        directory.display()
                    ));
                }
            }
            directories.push((directory.clone(), place.clone()));
        }
        let (Some(workload), Some(directory)) = (workload, directory) else { continue };
        let delivery =
            Delivery { workload: workload.clone(), directory, allow_disk, uid, gid, files, on_change, containers };
        if deliveries.insert(workload.clone(), delivery).is_some() {
            let row = place.trim_end_matches(".directory");
            reader.problem(&format!("{row}.workload: there is another delivery for {workload}: make one row of them"));
        }
    }
    deliveries.into_values().collect()
}

fn parsed<T: std::str::FromStr<Err: std::fmt::Display>>(
    reader: &mut Reader<'_>,
    row: &mut Section,
    key: &'static str,
) -> Option<T> {
    let text = reader.required(row, key)?;
    text.parse().map_err(|error| reader.problem(&format!("{}: {error}", row.at(key)))).ok()
}

fn directory(reader: &mut Reader<'_>, row: &mut Section) -> Option<PathBuf> {
    let text = reader.required(row, "directory")?;
    let path = Path::new(&text);
    let is_plain = path.is_absolute()
        && path.file_name().is_some()
        && path.components().all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
    if !is_plain {
        let place = row.at("directory");
        reader.problem(&format!(
            "{place}: {text:?} is no place for a workload's files: write an absolute path without \"..\", such as /run/deliver/app"
        ));
    }
    // Drop redundant slashes.
    is_plain.then(|| path.components().collect())
}

/// Reads a mode as `chmod` takes it: octal digits. YAML turns them into a number with the same decimal digits, and into
/// one with a fraction if they start with a zero.
fn mode(reader: &mut Reader<'_>, row: &mut Section) -> Option<u32> {
    let text = reader.text(row, "mode")?;
    let text = text.strip_suffix(".0").unwrap_or(&text);
    let mode = u32::from_str_radix(text, 8).ok().filter(|mode| mode & MUST == MUST && mode & !MAY == 0);
    if mode.is_none() {
        let place = row.at("mode");
        reader.problem(&format!(
            "{place}: {text:?} is no mode of a delivered file: write 0440 or another one, with which the owner reads and nobody else writes"
        ));
    }
    mode
}

fn files(reader: &mut Reader<'_>, row: &mut Section, default: u32) -> BTreeMap<FileName, FileSpec> {
    let mut files = BTreeMap::new();
    let place = row.at("files");
    let rows = reader.rows(row, "files");
    if rows.is_empty() {
        reader.problem(&format!("{place} is missing or empty: write a row with name and secret for each file"));
    }
    for mut file in rows {
        let name = parsed::<FileName>(reader, &mut file, "name");
        let mode = mode(reader, &mut file).unwrap_or(default);
        let content = content(reader, &mut file);
        let place = file.at("name");
        reader.end(file);
        let (Some(name), Some(content)) = (name, content) else { continue };
        if files.insert(name.clone(), FileSpec { mode, content }).is_some() {
            reader.problem(&format!("{place}: there is another file {name} in this directory"));
        }
    }
    files
}

fn content(reader: &mut Reader<'_>, file: &mut Section) -> Option<Content> {
    let secret = reader.text(file, "secret");
    let text = reader.text(file, "template");
    let has_secrets = reader.has(file, "secrets");
    let pairs = reader.pairs(file, "secrets");
    match (secret, text) {
        (Some(secret), None) if !has_secrets => {
            let name = secret.parse::<SecretName>();
            name.map_err(|error| reader.problem(&format!("{}: {error}", file.at("secret")))).ok().map(Content::Secret)
        }
        (Some(_), None) => {
            reader.problem(&format!("{} is for a template: leave it out, or write one", file.at("secrets")));
            None
        }
        (None, Some(text)) => template(reader, file, &text, pairs),
        (Some(_), Some(_)) => {
            reader.problem(&format!(
                "{} and {} are both there: leave one of them out",
                file.at("secret"),
                file.at("template")
            ));
            None
        }
        (None, None) => {
            reader.problem(&format!("{} is missing: name a secret, or write a template", file.at("secret")));
            None
        }
    }
}

fn template(reader: &mut Reader<'_>, file: &Section, text: &str, pairs: Vec<(String, String)>) -> Option<Content> {
    let mut secrets = BTreeMap::new();
    let mut words = vec![];
    for (word, name) in pairs {
        let place = format!("{}.{word}", file.at("secrets"));
        words.push(word.clone());
        let is_word = word.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
            && word.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
        if !is_word {
            reader.problem(&format!("{place}: a template knows no such word: letters, digits and '_', no digit first"));
            continue;
        }
        match name.parse::<SecretName>() {
            Ok(name) => {
                secrets.insert(word, name);
            }
            Err(error) => reader.problem(&format!("{place}: {error}")),
        }
    }
    let checked = Template::new(text, words.iter().map(String::as_str));
    let place = file.at("template");
    let problem = match checked {
        Ok(_) if secrets.is_empty() => {
            format!("{} is missing or empty: name the secrets that the template is made of", file.at("secrets"))
        }
        Ok(template) => return Some(Content::Template { template, secrets }),
        Err(error @ TemplateError::Unknown(_)) => {
            let TemplateError::Unknown(word) = &error else { return None };
            match nearest(word, words.iter().map(String::as_str)) {
                Some(near) => format!("{place}: {error}: is {near} meant?"),
                None => format!("{place}: {error}: add a line {word}: NAME to {}", file.at("secrets")),
            }
        }
        Err(error) => format!("{place}: {error}"),
    };
    reader.problem(&problem);
    None
}

fn containers(reader: &mut Reader<'_>, row: &mut Section) -> Vec<ContainerName> {
    let place = row.at("containers");
    let mut containers: Vec<ContainerName> = vec![];
    for word in reader.words_if_any(row, "containers") {
        match word.parse() {
            Ok(name) if containers.contains(&name) => reader.problem(&format!("{place}: {name} is there twice")),
            Ok(name) => containers.push(name),
            Err(error) => reader.problem(&format!("{place}: {error}")),
        }
    }
    containers
}

/// Reads `none`, `restart`, or a mapping with `signal`.
fn on_change(reader: &mut Reader<'_>, row: &mut Section) -> OnChange {
    let place = row.at("on_change");
    match reader.text_or_section(row, "on_change") {
        (_, Some(mut inner)) => {
            let signal = parsed(reader, &mut inner, "signal");
            reader.end(inner);
            signal.map_or(OnChange::None, OnChange::Signal)
        }
        (None, None) => OnChange::None,
        (Some(text), None) => match text.as_str() {
            "none" => OnChange::None,
            "restart" => OnChange::Restart,
            _ => {
                reader.problem(&format!("{place}: {text:?} is unknown: write none, restart, or {{signal: HUP}}"));
                OnChange::None
            }
        },
    }
}
