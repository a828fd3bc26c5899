//! Prints what happens as it happens, one line each, including the agent's own log. No line is prepared in advance.

use std::fmt::Display;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use jiff::Timestamp;
use testkit::{Docker, wait_until};

use super::scene::AGENT;

/// How long any one step may take. On a busy machine containers take seconds to start.
const LIMIT: Duration = Duration::from_secs(90);

/// The story so far.
pub(crate) struct Story {
    docker: Docker,
    began: Instant,
    /// The moment of `began`, as a timestamp like those of the log.
    began_at: Timestamp,
    /// The lines of the agent's log, all of which are already printed.
    lines: Vec<String>,
}

impl Story {
    pub(crate) fn begin(docker: Docker) -> Self {
        Self { docker, began: Instant::now(), began_at: Timestamp::now(), lines: Vec::new() }
    }

    /// Prints a line of the story.
    pub(crate) fn say(&self, who: &str, what: impl Display) {
        print(self.began.elapsed().as_secs_f64(), who, what);
    }

    /// Prints what the agent logs until `look` returns a value.
    pub(crate) async fn wait<T>(&mut self, what: &str, mut look: impl AsyncFnMut() -> Option<T>) -> Result<T> {
        let found = wait_until(what, LIMIT, async || {
            let runs = self.listen().await;
            match look().await {
                Some(found) => Some(Some(found)),
                None => (runs == Some(false)).then_some(None),
            }
        });
        match found.await? {
            Some(found) => Ok(found),
            None => bail!("the agent has ended; waited for {what}"),
        }
    }

    /// Prints what the agent logs until its log contains this text, now or before.
    pub(crate) async fn wait_for_agent(&mut self, text: &str) -> Result<()> {
        let deadline = Instant::now() + LIMIT;
        loop {
            // Print first, so that the awaited line is the last one.
            self.wait("the agent", async || Some(())).await?;
            if self.lines.iter().any(|line| line.contains(text)) {
                return Ok(());
            }
            if Instant::now() > deadline {
                bail!("waited {LIMIT:?} in vain for the agent to say {text:?}");
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Prints what is new in the agent's log. Returns whether the agent runs, or `None` if it does not exist yet.
    async fn listen(&mut self) -> Option<bool> {
        let state = self.docker.inspect_container(AGENT, None).await.ok()?.state?;
        let log = testkit::logs(&self.docker, AGENT, "all").await.ok()?;
        for line in log.lines().skip(self.lines.len()) {
            let (at, text) = split(line);
            let at = at.map_or(self.began.elapsed(), |at| at.duration_since(self.began_at).unsigned_abs());
            print(at.as_secs_f64(), "agent", text);
            self.lines.push(line.to_owned());
        }
        // A container that has not started yet has not ended either.
        Some(state.running == Some(true) || state.finished_at.is_none_or(|at| at.starts_with("0001")))
    }
}

fn print(seconds: f64, who: &str, what: impl Display) {
    println!("{seconds:7.1} s  {who:<7} {what}");
}

/// Splits a line of the agent's log into time and text. Keeps the level if it is a warning or worse.
fn split(line: &str) -> (Option<Timestamp>, &str) {
    let Some((at, text)) = line.split_once(' ') else { return (None, line) };
    let text = text.trim_start();
    match at.parse() {
        Ok(at) => (Some(at), text.strip_prefix("INFO ").unwrap_or(text)),
        Err(_) => (None, line),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn splits_time_and_level_off_the_agents_lines() {
        let at: Timestamp = "2026-01-31T09:00:00.25Z".parse().expect("time");
        let line = "2026-01-31T10:00:00.250+01:00  INFO tunnel ready name=demo connections=4";
        assert_eq!(split(line), (Some(at), "tunnel ready name=demo connections=4"));
        let line = "2026-01-31T10:00:00.250+01:00  WARN no contact";
        assert_eq!(split(line), (Some(at), "WARN no contact"));
        for line in ["dockflare-agent: the configuration has 1 error(s):", "panicked", ""] {
            assert_eq!(split(line), (None, line));
        }
    }
}
