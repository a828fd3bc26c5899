//! `cargo xtask classify DIR`: what the agent makes of a recording of the real cloudflared, second by second.
//!
//! A recording is a folder with `log.txt`, as `docker logs --timestamps` prints it, and `samples.jsonl`: one JSON
//! object a line with `t`, seconds since the recording began, and what has changed of the container (as Docker
//! inspects it), of `/ready` and of `/metrics`. `metrics` is merged, and `null` while the page does not answer. A second
//! connector has `log-b.txt`, and `"box":"-b"` in its samples. The rules are the agent's own.

use std::collections::HashMap;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::Args;
use dockflare_agent::docker::RunState;
use dockflare_agent::health::classify::{Memory, Page, Seen, Tries, Verdict, seconds};
use dockflare_agent::health::log::{Line, Said};
use serde_json::{Map, Value};

/// Docker may note a line just before it notes the start of who wrote it.
const EARLY: f64 = 0.05;
/// A recording says nothing while nothing changes, at most for a day.
const MOST_SECONDS: f64 = 86_400.0;

#[derive(Args)]
pub(crate) struct Arguments {
    /// Folder with `log.txt` and `samples.jsonl`
    dir: PathBuf,
}

/// Prints `seconds verdict` for each second, and `seconds verdict b` for a second connector.
pub(crate) fn run(arguments: &Arguments) -> ExitCode {
    let connectors = match read(&arguments.dir) {
        Ok(connectors) => connectors,
        Err(error) => {
            eprintln!("{error:#}");
            return ExitCode::FAILURE;
        }
    };
    let mut out = io::BufWriter::new(io::stdout().lock());
    for connector in &connectors {
        for (second, verdict) in connector.verdicts().into_iter().enumerate() {
            let name = connector.name.map(|name| format!(" {name}")).unwrap_or_default();
            // Whoever reads may have seen enough.
            if writeln!(out, "{second} {}{name}", verdict.as_str()).is_err() {
                return ExitCode::SUCCESS;
            }
        }
    }
    ExitCode::SUCCESS
}

/// What was recorded of one connector. Times are seconds since 1970, except where they are since the beginning.
struct Connector {
    name: Option<&'static str>,
    began: f64,
    /// Seconds from the beginning to the last sample of the recording.
    length: f64,
    samples: Vec<Sample>,
    log: Vec<(f64, Line)>,
}

#[derive(Clone)]
struct Sample {
    /// Since the beginning.
    at: f64,
    state: Option<RunState>,
    exit_code: Option<i64>,
    out_of_memory: bool,
    started_at: f64,
    page: Page,
    tries: Option<Tries>,
}

/// Reads a folder: the connector, and the second one where there is one.
fn read(dir: &Path) -> Result<Vec<Connector>> {
    let path = dir.join("samples.jsonl");
    let samples = fs::read_to_string(&path).with_context(|| format!("{}", path.display()))?;
    let mut rows = Vec::new();
    for (number, line) in samples.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let row: Map<String, Value> =
            serde_json::from_str(line).with_context(|| format!("{} line {}", path.display(), number + 1))?;
        rows.push(row);
    }
    let at = |row: &Map<String, Value>| row.get("t").and_then(Value::as_f64);
    let length = rows.iter().filter_map(at).fold(0.0, f64::max);
    if length > MOST_SECONDS {
        bail!("{} is of more than a day", path.display());
    }
    let mut connectors = Vec::new();
    for (name, suffix) in [(None, ""), (Some("b"), "-b")] {
        let of_it = |row: &&Map<String, Value>| row.get("box").and_then(Value::as_str).unwrap_or_default() == suffix;
        let samples = follow(rows.iter().filter(of_it));
        let log = log(&dir.join(format!("log{suffix}.txt")))?;
        if name.is_none() || !samples.is_empty() || !log.is_empty() {
            connectors.push(Connector { name, began: 0.0, length, samples, log });
        }
    }
    let began = beginning(&connectors);
    connectors.iter_mut().for_each(|connector| connector.began = began);
    Ok(connectors)
}

/// When the recording began: the first sample was taken as soon as the first container had been started.
fn beginning(connectors: &[Connector]) -> f64 {
    let mut samples = connectors.iter().flat_map(|connector| &connector.samples);
    let started = samples.find(|sample| sample.started_at > 0.0).map(|sample| sample.started_at - sample.at);
    let said = connectors.iter().flat_map(|connector| connector.log.first()).map(|(at, _)| *at);
    started.or(said.reduce(f64::min)).unwrap_or_default()
}

fn log(path: &Path) -> Result<Vec<(f64, Line)>> {
    let text = match fs::read(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(vec![]),
        Err(error) => return Err(error).with_context(|| format!("{}", path.display())),
    };
    let text = String::from_utf8_lossy(&text);
    let line = |text: &str| {
        let (time, text) = text.split_once(' ').unwrap_or((text, ""));
        let at = seconds(time)?;
        Some((at, Line { at: Some(at), ..Line::parse(text) }))
    };
    let mut lines: Vec<_> = text.lines().filter_map(line).collect();
    // Standard output and standard error are two streams.
    lines.sort_by(|(one, _), (other, _)| one.total_cmp(other));
    Ok(lines)
}

/// From changes to what was there at each sample.
fn follow<'a>(rows: impl Iterator<Item = &'a Map<String, Value>>) -> Vec<Sample> {
    let (mut known, mut metrics) = (Map::new(), None::<HashMap<String, f64>>);
    let mut samples = Vec::new();
    for row in rows {
        for (key, value) in row.iter().filter(|(key, _)| *key != "metrics") {
            known.insert(key.clone(), value.clone());
        }
        match row.get("metrics") {
            Some(Value::Object(changes)) => {
                let metrics = metrics.get_or_insert_default();
                for (name, value) in changes {
                    match value.as_f64() {
                        Some(value) => metrics.insert(name.clone(), value),
                        None => metrics.remove(name),
                    };
                }
            }
            Some(_) => metrics = None,
            None => {}
        }
        let Some(at) = known.get("t").and_then(Value::as_f64).filter(|at| *at >= 0.0) else { continue };
        let text = |key: &str| known.get(key).and_then(Value::as_str).unwrap_or_default();
        samples.push(Sample {
            at,
            state: state(text("state")),
            exit_code: known.get("exit_code").and_then(Value::as_i64),
            out_of_memory: known.get("oom_killed").and_then(Value::as_bool).unwrap_or_default(),
            started_at: seconds(text("started_at")).unwrap_or_default(),
            page: match known.get("ready_status").and_then(Value::as_i64) {
                Some(200) => Page::Ready,
                Some(503) => Page::NotReady,
                _ => Page::Silent,
            },
            tries: metrics
                .as_ref()
                .map(|metrics| Tries::of(metrics.iter().map(|(name, value)| (name.as_str(), *value)))),
        });
    }
    samples
}

fn state(word: &str) -> Option<RunState> {
    Some(match word {
        "created" => RunState::Created,
        "running" => RunState::Running,
        "paused" => RunState::Paused,
        "restarting" => RunState::Restarting,
        "exited" => RunState::Exited,
        "removing" | "dead" => RunState::Dead,
        _ => return None,
    })
}

impl Connector {
    /// One for each second, from 0 to the end.
    fn verdicts(&self) -> Vec<Verdict> {
        let only_quic = self.only_quic();
        let mut memory = Memory::default();
        let mut samples = self.samples.iter().peekable();
        let mut last: Option<&Sample> = None;
        let mut verdicts = Vec::new();
        for second in 0..=self.length as u32 {
            let second = f64::from(second);
            while let Some(sample) = samples.next_if(|sample| sample.at <= second) {
                if let Some(before) = last.filter(|before| before.started_at != sample.started_at) {
                    self.end_between(before, sample, only_quic, &mut memory);
                }
                self.classify(sample, sample.at, only_quic, &mut memory);
                last = Some(sample);
            }
            verdicts.push(match last {
                Some(sample) => self.classify(sample, second, only_quic, &mut memory),
                None if self.name.is_none() => Verdict::Starting,
                None => Verdict::Unknown,
            });
        }
        verdicts
    }

    /// Whether it was set up to use nothing else, which it logs when it starts.
    fn only_quic(&self) -> bool {
        self.log.iter().any(|(_, line)| line.said == Said::Options { only_quic: true })
    }

    /// Nothing is known of how a start ended that was over between two samples, but what was logged.
    fn end_between(&self, before: &Sample, after: &Sample, only_quic: bool, memory: &mut Memory) {
        if before.state == Some(RunState::Running) && before.started_at > 0.0 {
            let ended = Sample {
                state: Some(RunState::Restarting),
                exit_code: None,
                out_of_memory: after.out_of_memory,
                page: Page::Silent,
                tries: None,
                ..before.clone()
            };
            self.classify(&ended, after.started_at - self.began - EARLY, only_quic, memory);
        }
    }

    /// What a sample means at a time since the beginning, with what was logged until then.
    fn classify(&self, sample: &Sample, at: f64, only_quic: bool, memory: &mut Memory) -> Verdict {
        let now = self.began + at;
        let started_at = if sample.started_at > 0.0 { sample.started_at } else { self.began };
        let first = self.log.partition_point(|(at, _)| *at < started_at - EARLY);
        let end = self.log.partition_point(|(at, _)| *at <= now).max(first);
        let log: Vec<Line> = self.log[first..end].iter().map(|(_, line)| line.clone()).collect();
        let answers = sample.page != Page::Silent;
        let Some(state) = sample.state.or(answers.then_some(RunState::Running)) else { return Verdict::Unknown };
        memory.classify(&Seen {
            now,
            state,
            exit_code: sample.exit_code,
            out_of_memory: sample.out_of_memory,
            started_at,
            page: sample.page,
            tries: sample.tries,
            log: &log,
            only_quic,
        })
    }
}

#[cfg(test)]
mod tests;
