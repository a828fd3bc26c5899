//! Reads a YAML document key by key and collects the problems. A key that no code asked for is misspelled.

use std::collections::BTreeMap;
use std::path::PathBuf;

pub(super) use dockflare_host::words::nearest;
use serde_json::{Map, Value};
use zeroize::Zeroizing;

use super::ENV_PREFIX;

/// A mapping, and the keys that were asked for.
pub(super) struct Section {
    /// Path with dots; `""` for the whole document.
    path: String,
    values: Map<String, Value>,
    known: Vec<&'static str>,
}

/// Reads one configuration and collects its problems.
pub(super) struct Reader<'a> {
    env: &'a BTreeMap<String, String>,
    /// Environment variables that belong to a key.
    variables: Vec<String>,
    problems: Vec<String>,
}

impl<'a> Reader<'a> {
    pub(super) fn new(env: &'a BTreeMap<String, String>) -> Self {
        Self { env, variables: vec![], problems: vec![] }
    }

    /// Parses the whole document; empty if it is not a mapping.
    pub(super) fn parse(&mut self, text: &str) -> Section {
        let text = text.trim_start_matches('\u{feff}');
        let is_empty = text.lines().all(|line| line.trim().is_empty() || line.trim_start().starts_with('#'));
        let parsed = if is_empty { Ok(Value::Null) } else { serde_saphyr::from_str(text) };
        let values = match parsed {
            Ok(Value::Object(values)) => values,
            Ok(Value::Null) => Map::new(),
            Ok(_) => {
                self.problem("the configuration is no mapping: write key: value");
                Map::new()
            }
            Err(error) => {
                // Report only the place: the library's message shows the line, which may contain a password.
                let place = error.location().map(|at| format!(" at line {}, column {}", at.line(), at.column()));
                self.problem(&format!("the configuration is no YAML{}", place.unwrap_or_default()));
                Map::new()
            }
        };
        Section { path: String::new(), values, known: vec![] }
    }

    pub(super) fn problem(&mut self, problem: &str) {
        self.problems.push(problem.to_owned());
    }

    pub(super) fn has(&self, section: &Section, key: &str) -> bool {
        let prefix = variable(&section.at(key));
        section.values.contains_key(key) || self.env.keys().any(|name| name.starts_with(&format!("{prefix}_")))
    }

    /// Returns the mapping under a key; empty if there is none.
    pub(super) fn section(&mut self, section: &mut Section, key: &'static str) -> Section {
        section.known.push(key);
        let path = section.at(key);
        let values = match section.values.remove(key) {
            None | Some(Value::Null) => Map::new(),
            Some(Value::Object(values)) => values,
            Some(_) => {
                self.problem(&format!("{path} is no mapping: write its settings below it, indented"));
                Map::new()
            }
        };
        Section { path, values, known: vec![] }
    }

    /// Returns the mappings in the list under a key.
    pub(super) fn rows(&mut self, section: &mut Section, key: &'static str) -> Vec<Section> {
        section.known.push(key);
        let path = section.at(key);
        let rows = match section.values.remove(key) {
            None | Some(Value::Null) => vec![],
            Some(Value::Array(rows)) => rows,
            Some(_) => {
                self.problem(&format!("{path} is no list: begin each row with a dash"));
                vec![]
            }
        };
        let mut sections = vec![];
        for (at, row) in rows.into_iter().enumerate() {
            let path = format!("{path}[{at}]");
            match row {
                Value::Object(values) => sections.push(Section { path, values, known: vec![] }),
                _ => self.problem(&format!("{path} is no mapping: write its keys after the dash")),
            }
        }
        sections
    }

    /// Returns a single value, from the environment first. An empty variable counts as unset, as in compose files.
    fn scalar(&mut self, section: &mut Section, key: &'static str) -> Option<String> {
        section.known.push(key);
        let name = variable(&section.at(key));
        let given = section.values.remove(key);
        let from_env = if section.path.contains('[') { None } else { self.env.get(&name).filter(|v| !v.is_empty()) };
        self.variables.push(name);
        if let Some(value) = from_env {
            return Some(value.clone());
        }
        match given? {
            Value::String(text) => Some(text),
            Value::Number(number) => Some(number.to_string()),
            Value::Bool(bool) => Some(bool.to_string()),
            Value::Null => None,
            Value::Array(_) | Value::Object(_) => {
                self.problem(&format!("{} is no single value", section.at(key)));
                None
            }
        }
    }

    pub(super) fn text(&mut self, section: &mut Section, key: &'static str) -> Option<String> {
        self.scalar(section, key)
    }

    pub(super) fn secret(&mut self, section: &mut Section, key: &'static str) -> Option<Zeroizing<String>> {
        self.scalar(section, key).map(Zeroizing::new)
    }

    pub(super) fn required(&mut self, section: &mut Section, key: &'static str) -> Option<String> {
        let text = self.scalar(section, key);
        if text.is_none() {
            self.problem(&format!("{} is missing", section.at(key)));
        }
        text
    }

    pub(super) fn path(&mut self, section: &mut Section, key: &'static str) -> Option<PathBuf> {
        let text = self.scalar(section, key)?;
        if !text.starts_with('/') {
            // Do not show the text: it may be the key or the password itself.
            self.problem(&format!("{} is no absolute path: begin it with a slash", section.at(key)));
        }
        Some(text.into())
    }

    pub(super) fn number(&mut self, section: &mut Section, key: &'static str, least: u64, most: u64) -> Option<u64> {
        let text = self.scalar(section, key)?;
        let number = text.parse().ok().filter(|number| (least..=most).contains(number));
        if number.is_none() {
            self.problem(&format!("{}: {text:?} is no whole number from {least} to {most}", section.at(key)));
        }
        number
    }

    pub(super) fn flag(&mut self, section: &mut Section, key: &'static str) -> Option<bool> {
        let text = self.scalar(section, key)?;
        let flag = text.parse().ok();
        if flag.is_none() {
            self.problem(&format!("{}: {text:?} is neither true nor false", section.at(key)));
        }
        flag
    }

    /// Returns a single value or a mapping, whichever is there.
    pub(super) fn text_or_section(
        &mut self,
        section: &mut Section,
        key: &'static str,
    ) -> (Option<String>, Option<Section>) {
        match section.values.get(key) {
            Some(Value::Object(_)) => (None, Some(self.section(section, key))),
            _ => (self.scalar(section, key), None),
        }
    }

    /// Returns the words and their values from the mapping under a key.
    pub(super) fn pairs(&mut self, section: &mut Section, key: &'static str) -> Vec<(String, String)> {
        let inner = self.section(section, key);
        let mut pairs = vec![];
        for (word, value) in &inner.values {
            match value {
                Value::String(text) => pairs.push((word.clone(), text.clone())),
                _ => self.problem(&format!("{} is no word", inner.at(word))),
            }
        }
        pairs
    }

    /// Returns the list of words under a key; empty if there is none.
    pub(super) fn words_if_any(&mut self, section: &mut Section, key: &'static str) -> Vec<String> {
        match section.values.get(key) {
            Some(value) if !value.is_null() && value.as_array().is_none_or(|words| !words.is_empty()) => {
                self.words(section, key)
            }
            _ => {
                section.known.push(key);
                section.values.remove(key);
                vec![]
            }
        }
    }

    /// Returns the list of words under a key, which must not be empty.
    pub(super) fn words(&mut self, section: &mut Section, key: &'static str) -> Vec<String> {
        section.known.push(key);
        let path = section.at(key);
        let words = match section.values.remove(key) {
            Some(Value::Array(words)) if !words.is_empty() => words,
            _ => {
                self.problem(&format!("{path} is missing or no list: write it as [get, set]"));
                vec![]
            }
        };
        let mut texts = vec![];
        for word in words {
            match word {
                Value::String(text) => texts.push(text),
                other => self.problem(&format!("{path}: {other} is no word")),
            }
        }
        texts
    }

    /// Reports the keys that are left: no code asked for them.
    pub(super) fn end(&mut self, section: Section) {
        for key in section.values.keys() {
            let path = section.at(key);
            let near = nearest(key, section.known.iter().copied());
            self.problems.push(match near {
                Some(near) => format!("{path} is no setting: is {} meant?", section.at(near)),
                None => format!("{path} is no setting: there are {}", section.known.join(", ")),
            });
        }
    }

    /// Returns all problems. A variable with our prefix that belongs to no key is misspelled too.
    pub(super) fn finish(mut self) -> Vec<String> {
        let ours = self.env.keys().filter(|name| name.starts_with(ENV_PREFIX) && !self.variables.contains(name));
        for name in ours {
            let near = nearest(name, self.variables.iter().map(String::as_str));
            self.problems.push(match near {
                Some(near) => format!("{name} is no setting: is {near} meant?"),
                None => format!("{name} is no setting"),
            });
        }
        self.problems
    }
}

impl Section {
    pub(super) fn at(&self, key: &str) -> String {
        if self.path.is_empty() { key.to_owned() } else { format!("{}.{key}", self.path) }
    }
}

fn variable(path: &str) -> String {
    format!("{ENV_PREFIX}{}", path.replace('.', "_").to_uppercase())
}
