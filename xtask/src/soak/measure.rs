//! Measures a process, the agent's or its proxy's, through the kernel, and checks that it does not grow.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

/// How much resident memory may grow: by this share or by this many KiB, whichever is more.
const MEMORY_SHARE: f64 = 0.25;
const MEMORY_KIB: f64 = 3.0 * 1024.0;
/// How many open file descriptors may be added: one more connection to the master, and some to Docker.
const DESCRIPTORS: f64 = 4.0;
/// A process younger than this is not measured, because it has not done anything yet.
const GROWN_UP: Duration = Duration::from_secs(5);
/// A process that lives at least this long is also checked on its own.
const LONG_LIFE: Duration = Duration::from_secs(300);

/// One measurement.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sample {
    /// Time since the soak began.
    pub(crate) at: Duration,
    /// The process id.
    pub(crate) pid: u32,
    pub(crate) memory_kib: u64,
    pub(crate) descriptors: usize,
    /// Whether the soak was calm at that time, with nothing wrong.
    pub(crate) calm: bool,
}

impl Sample {
    pub(crate) fn take(pid: u32, at: Duration, calm: bool) -> Result<Self> {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).context("its process is gone")?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
        let memory_kib = line.trim().trim_end_matches(" kB").trim().parse().context("VmRSS")?;
        let descriptors = fs::read_dir(format!("/proc/{pid}/fd"))?.count();
        Ok(Self { at, pid, memory_kib, descriptors, calm })
    }
}

/// The children of a process, each with its state. The agent starts none, so a child would be a zombie or become one.
pub(crate) fn children(pid: u32) -> Vec<String> {
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let stats = processes.filter_map(|entry| fs::read_to_string(entry.path().join("stat")).ok());
    stats.filter(|stat| parent(stat) == Some(pid)).map(|stat| stat.chars().take(60).collect()).collect()
}

/// The parent in a line of `/proc/<pid>/stat`. The second field is a name in parentheses that may contain anything.
fn parent(stat: &str) -> Option<u32> {
    stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()
}

/// A process that others may replace, with the measurements of all of them.
#[derive(Debug, Default)]
pub(crate) struct Watched {
    /// The current process, and when it was first seen.
    present: Option<(u32, Duration)>,
    pub(crate) samples: Vec<Sample>,
}

impl Watched {
    /// Measures the current process, unless it is too young to have done anything.
    pub(crate) fn look(&mut self, pid: u32, at: Duration, calm: bool) -> Result<()> {
        let since = match self.present {
            Some((known, since)) if known == pid => since,
            _ => at,
        };
        self.present = Some((pid, since));
        if at - since >= GROWN_UP {
            self.samples.push(Sample::take(pid, at, calm)?);
        }
        Ok(())
    }
}

/// The medians of the first and the last third of some values.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Trend {
    pub(crate) first: f64,
    pub(crate) last: f64,
}

impl Trend {
    /// `None` for fewer than three values.
    fn of(mut values: Vec<f64>) -> Option<Self> {
        let third = values.len() / 3;
        let late = values.split_off(values.len() - third);
        values.truncate(third);
        Some(Self { first: median(values)?, last: median(late)? })
    }

    fn grows_by_more_than(self, allowed: f64) -> bool {
        self.last > self.first + allowed
    }
}

fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}

/// The trends of memory and descriptors over the whole soak. Fails if one of them grows, or if the memory of a
/// long-lived process does.
pub(crate) fn flat(samples: &[Sample]) -> Result<(Trend, Trend)> {
    let memory = |samples: &[Sample]| Trend::of(samples.iter().map(|sample| sample.memory_kib as f64).collect());
    let judge = |what: &str, trend: Trend| {
        let allowed = (trend.first * MEMORY_SHARE).max(MEMORY_KIB);
        ensure!(
            !trend.grows_by_more_than(allowed),
            "its memory grows {what}: {} KiB, then {} KiB",
            trend.first,
            trend.last
        );
        Ok(trend)
    };
    let all = judge("over the soak", memory(samples).context("too few looks at its memory")?)?;
    for life in samples.chunk_by(|one, next| one.pid == next.pid) {
        let (first, last) = (life[0], life[life.len() - 1]);
        if last.at - first.at >= LONG_LIFE
            && let Some(trend) = memory(life)
        {
            judge(&format!("as process {}", first.pid), trend)?;
        }
    }
    let calm = samples.iter().filter(|sample| sample.calm).map(|sample| sample.descriptors as f64);
    let descriptors = Trend::of(calm.collect()).context("too few looks at its descriptors")?;
    ensure!(
        !descriptors.grows_by_more_than(DESCRIPTORS),
        "its open file descriptors grow: {}, then {}",
        descriptors.first,
        descriptors.last
    );
    Ok((all, descriptors))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples(memory: impl Fn(u64) -> u64, descriptors: impl Fn(u64) -> usize) -> Vec<Sample> {
        let sample = |second| Sample {
            at: Duration::from_secs(second),
            pid: 1,
            memory_kib: memory(second),
            descriptors: descriptors(second),
            calm: second % 60 >= 50,
        };
        (0..600).map(sample).collect()
    }

    #[test]
    fn what_swings_is_flat_and_what_climbs_is_not() {
        assert!(flat(&samples(|second| 10_000 + second % 7 * 100, |second| 12 + second as usize % 3)).is_ok());
        let memory = flat(&samples(|second| 10_000 + second * 20, |_| 12)).unwrap_err();
        assert!(memory.to_string().contains("memory grows"), "{memory}");
        let descriptors = flat(&samples(|_| 10_000, |second| 12 + second as usize / 60)).unwrap_err();
        assert!(descriptors.to_string().contains("descriptors grow"), "{descriptors}");
    }

    #[test]
    fn this_process_can_be_looked_at() {
        let sample = Sample::take(std::process::id(), Duration::ZERO, true).unwrap();
        assert!(sample.memory_kib > 100 && sample.descriptors >= 3, "{sample:?}");
        assert_eq!(parent("7 (a ) b) S 42 1"), Some(42));
    }
}
