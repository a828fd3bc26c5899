//! `cargo xtask classify DIR`: the agent's verdict on a recording of the real cloudflared, second by second.
//!
//! A recording is a folder with `log.txt`, as `docker logs --timestamps` prints it, and `samples.jsonl`. Each line of
//! `samples.jsonl` is a JSON object with `t`, the seconds since the recording began, and what has changed in the
//! container (as Docker inspects it), in `/ready` and in `/metrics`. `metrics` is merged, and is `null` while the page
//! does not answer. A second connector has `log-b.txt`, and `"box":"-b"` in its samples. The rules are the agent's own.

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

/// Docker may timestamp a log line up to this many seconds before the start of the process that wrote it.
const EARLY: f64 = 0.05;
/// The longest recording, in seconds: one day. `classify` refuses a longer one.
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
            // A reader such as `head` may close the pipe early.
            if writeln!(out, "{second} {}{name}", verdict.as_str()).is_err() {
                return ExitCode::SUCCESS;
            }
        }
    }
    ExitCode::SUCCESS
}

/// The recording of one connector. Times are in seconds since 1970, unless they are since the recording began.
struct Connector {
    name: Option<&'static str>,
    began: f64,
    /// Seconds from the beginning of the recording to its last sample.
    length: f64,
    samples: Vec<Sample>,
    log: Vec<(f64, Line)>,
}

#[derive(Clone)]
struct Sample {
    /// Seconds since the recording began.
    at: f64,
    state: Option<RunState>,
    exit_code: Option<i64>,
    out_of_memory: bool,
    started_at: f64,
    page: Page,
    tries: Option<Tries>,
}

/// Reads a folder: the connector, and the second one if there is one.
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

/// When the recording began. The recorder took the first sample as soon as the first container had started.
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
    // Standard output and standard error are separate streams, so their lines may be out of order.
    lines.sort_by(|(one, _), (other, _)| one.total_cmp(other));
    Ok(lines)
}

/// Turns the recorded changes into the full state at each sample.
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
    /// The verdict at each second, from 0 to the end.
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

    /// Whether cloudflared was configured to use only QUIC, which it logs when it starts.
    fn only_quic(&self) -> bool {
        self.log.iter().any(|(_, line)| line.said == Said::Options { only_quic: true })
    }

    /// Classifies a run that ended between two samples. Only the log tells how such a run ended.
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

    /// Classifies a sample at a time since the recording began, with the log up to that time.
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
