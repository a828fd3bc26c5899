//! Takes samples from the messages to a master, normalizes what differs between runs, and compares them with the files.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use dockflare_dev_master::{DevMaster, Protocol, Request, Route};
use serde_json::{Value, json};

use crate::support::{SOON, Stage};

/// If set, the test writes the files instead of comparing them.
const UPDATE: &str = "UPDATE_PAYLOADS";
/// The tunnel's id in all samples.
pub(super) const TUNNEL: &str = "7d3f1a52-0c8e-4b6d-9a71-5e2c40f8b913";
const TIME: &str = "2026-01-02T03:04:05.678901234Z";

/// The placeholder for an id, by its member. It replaces only a text of the same form.
const IDS: [(&str, &str); 7] = [
    ("agent_id", "3f2504e0-4f89-41d3-9a0c-0305e82c3301"),
    ("agent_session_id", "9b2d7c66-1e0f-4a53-8d24-6c1b0a97e5f4"),
    ("command_id", "c56a4180-65aa-42ec-a945-5fd21dec0538"),
    ("connector_id", "e4eaaaf2-d142-11e1-b3e4-080027620cdd"),
    ("id", "4a6f0c1d2e3b5a798877665544332211ffeeddccbbaa00998877665544332211"),
    ("operation_id", "1b4e28ba-2fa1-41d2-883f-0016d3cca427"),
    ("tunnel_id", TUNNEL),
];

/// The samples taken so far.
pub(super) struct Samples {
    version: &'static str,
    /// Samples by file name.
    taken: BTreeMap<String, Sample>,
    /// The type of each message sent.
    sent: BTreeSet<String>,
    /// The names of all headers that came with the samples.
    headers: BTreeSet<String>,
}

struct Sample {
    kind: String,
    text: String,
    /// Method and path, with names instead of ids.
    line: String,
}

impl Samples {
    pub(super) fn new(protocol: Protocol) -> Self {
        let version = if protocol == Protocol::V1 { "v1" } else { "v2" };
        Self { version, taken: BTreeMap::new(), sent: BTreeSet::new(), headers: BTreeSet::new() }
    }

    /// Waits until the stage's master receives a message that `is_it` accepts, and keeps it as the sample `name`.
    pub(super) async fn take(&mut self, name: &str, stage: &Stage, is_it: impl Fn(&str, &Value) -> bool) -> Result<()> {
        self.take_from(name, &stage.master, stage.scope.suffix(), is_it).await
    }

    /// Like [`Samples::take`], from any master, where names end in `suffix`.
    pub(super) async fn take_from(
        &mut self,
        name: &str,
        master: &DevMaster,
        suffix: &str,
        is_it: impl Fn(&str, &Value) -> bool,
    ) -> Result<()> {
        let found = master.wait_for_request(name, 2 * SOON, |request| {
            let kind = kind(request).filter(|kind| is_it(kind, &request.body))?;
            Some((kind, request.clone()))
        });
        let (kind, request) = found.await?;
        let mut body = request.body.clone();
        normalise(&mut body, "", suffix);
        let text = format!("{body:#}\n");
        let sample = Sample { kind, text, line: line(&request) };
        self.headers.extend(request.headers);
        self.taken.insert(format!("{name}.json"), sample);
        Ok(())
    }

    /// Records the type of each message that this master received.
    pub(super) fn all_sent_to(&mut self, master: &DevMaster) -> Result<()> {
        for request in master.requests().iter().filter(|request| !request.body.is_null()) {
            self.sent.insert(kind(request).with_context(|| format!("what is this: {request}"))?);
        }
        Ok(())
    }

    /// Compares the files with the samples, or writes them.
    pub(super) fn check(&self) -> Result<()> {
        let payloads = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/payloads");
        let folder = payloads.join(self.version);
        if std::env::var_os(UPDATE).is_some() {
            self.write(&folder)?;
        }
        let mut problems = String::new();
        let mut complain = |problem: String| writeln!(problems, "{problem}").context("no memory");
        for (name, sample) in &self.taken {
            match fs::read_to_string(folder.join(name)) {
                Err(error) => complain(format!("{}/{name}: {error}", self.version))?,
                Ok(text) if text != sample.text => {
                    let lines = difference(&text, &sample.text);
                    complain(format!("{}/{name}: - says the file, + is sent\n{lines}", self.version))?;
                }
                Ok(_) => {}
            }
        }
        for name in files(&folder)?.iter().filter(|name| !self.taken.contains_key(*name)) {
            complain(format!("{}/{name}: nothing sends this", self.version))?;
        }
        let known: BTreeSet<_> = self.taken.values().map(|sample| &sample.kind).collect();
        for kind in self.sent.iter().filter(|kind| !known.contains(kind)) {
            complain(format!("{kind} was sent to a master of {} and has no sample", self.version))?;
        }
        let readme = fs::read_to_string(payloads.join("README.md")).context("no docs/payloads/README.md")?;
        let headers = headers_in(&readme);
        for (name, sample) in &self.taken {
            let (link, line) = (format!("({}/{name})", self.version), format!("`{}`", sample.line));
            if !readme.lines().any(|row| row.contains(&link) && row.contains(&line)) {
                complain(format!("README.md has no row with {link} and {line}"))?;
            }
        }
        if self.headers != headers {
            complain(format!("README.md has the headers {headers:?}, sent are {:?}", self.headers))?;
        }
        ensure!(problems.is_empty(), "docs/payloads is not what the agent sends ({UPDATE}=1 mends files)\n{problems}");
        Ok(())
    }

    fn write(&self, folder: &Path) -> Result<()> {
        fs::create_dir_all(folder)?;
        for name in files(folder)?.iter().filter(|name| !self.taken.contains_key(*name)) {
            fs::remove_file(folder.join(name))?;
        }
        for (name, sample) in &self.taken {
            fs::write(folder.join(name), &sample.text)?;
        }
        Ok(())
    }
}

/// Returns the type of a message, which begins its sample's name; `None` for an empty or unknown message.
fn kind(request: &Request) -> Option<String> {
    let word = |member: &str| request.body[member].as_str();
    match request.route {
        Route::Register => Some("register".to_owned()),
        Route::Events => word("type").map(str::to_owned),
        Route::Ack => word("phase").map(|phase| format!("decommission_{phase}")),
        Route::Accounts if request.method == "PUT" => Some("configuration".to_owned()),
        _ => None,
    }
}

/// Returns the request line, with names instead of the ids in its path.
fn line(request: &Request) -> String {
    let mut before = "";
    let path = request.path.split('/').map(|part| {
        let name = match (std::mem::replace(&mut before, part), part) {
            ("agents", "register") => part,
            ("agents", _) => "{agent_id}",
            ("decommission", _) => "{operation_id}",
            ("accounts", _) => "{account_id}",
            ("cfd_tunnel", _) => "{tunnel_id}",
            _ => part,
        };
        name.to_owned()
    });
    format!("{} {}", request.method, path.collect::<Vec<_>>().join("/"))
}

/// Replaces everything that differs between runs by a placeholder of the same form, and leaves out the containers of
/// other tests. `member` is the name of the member that holds `value`.
fn normalise(value: &mut Value, member: &str, suffix: &str) {
    match value {
        Value::Object(members) => members.iter_mut().for_each(|(member, value)| normalise(value, member, suffix)),
        Value::Array(items) => {
            let is_ours = |item: &Value| item["name"].as_str().is_some_and(|name| name.ends_with(suffix));
            items.retain(|item| member != "containers" || is_ours(item));
            items.iter_mut().for_each(|item| normalise(item, "", suffix));
        }
        Value::String(text) => {
            if let Some(other) = stand_in(member, text, suffix) {
                *text = other;
            }
        }
        // Counts of earlier messages.
        Value::Number(_) => match member {
            "event_sequence" => *value = json!(7),
            "report_sequence" => *value = json!(3),
            _ => {}
        },
        Value::Null | Value::Bool(_) => {}
    }
}

/// Returns the placeholder for a text, if that text differs between runs.
fn stand_in(member: &str, text: &str, suffix: &str) -> Option<String> {
    let other = match member {
        "timestamp" | "since" if text.parse::<jiff::Timestamp>().is_ok() && text.ends_with('Z') => TIME,
        "name" => text.strip_suffix(suffix)?.trim_end_matches('-'),
        "version" | "agent_version" if text == env!("CARGO_PKG_VERSION") => "0.1.0",
        "agent_image" => "dockflare-agent:0.1.0",
        "cloudflared_image" => "cloudflare/cloudflared:2025.9.0",
        _ => IDS.iter().find(|(known, id)| *known == member && have_same_form(text, id))?.1,
    };
    Some(other.to_owned())
}

/// Whether two texts differ only in hexadecimal digits.
fn have_same_form(one: &str, other: &str) -> bool {
    let is_hex = |c: u8| matches!(c, b'0'..=b'9' | b'a'..=b'f');
    let alike = |(a, b): (u8, u8)| a == b || is_hex(a) && is_hex(b);
    one.len() == other.len() && one.bytes().zip(other.bytes()).all(alike)
}

/// Returns the names of the files in a folder; none if the folder does not exist.
fn files(folder: &Path) -> Result<BTreeSet<String>> {
    let Ok(entries) = fs::read_dir(folder) else { return Ok(BTreeSet::new()) };
    entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
}

/// Returns the names of the headers in the page's example of a request.
fn headers_in(readme: &str) -> BTreeSet<String> {
    let example = readme.split("```http\n").nth(1).and_then(|rest| rest.split("```").next()).unwrap_or_default();
    example.lines().filter_map(|line| line.split_once(": ")).map(|(name, _)| name.to_lowercase()).collect()
}

/// Returns the lines in which two texts differ. Leaves out their common beginning and end, except for the lines next to
/// the difference.
fn difference(old: &str, new: &str) -> String {
    let (old, new): (Vec<_>, Vec<_>) = (old.lines().collect(), new.lines().collect());
    let begin = old.iter().zip(&new).take_while(|(a, b)| a == b).count();
    let (old_rest, new_rest) = (&old[begin..], &new[begin..]);
    let end = old_rest.iter().rev().zip(new_rest.iter().rev()).take_while(|(a, b)| a == b).count();
    let before = old[..begin].iter().rev().take(2).rev().map(|line| format!("  {line}"));
    let gone = old_rest[..old_rest.len() - end].iter().map(|line| format!("- {line}"));
    let come = new_rest[..new_rest.len() - end].iter().map(|line| format!("+ {line}"));
    let after = old_rest[old_rest.len() - end..].iter().take(2).map(|line| format!("  {line}"));
    before.chain(gone).chain(come).chain(after).collect::<Vec<_>>().join("\n")
}
