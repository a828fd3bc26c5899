//! What the kernel says of a process, the agent's or its proxy's, and whether it stays the same.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

/// What resident memory may grow by, whichever is more.
const MEMORY_SHARE: f64 = 0.25;
const MEMORY_KIB: f64 = 3.0 * 1024.0;
/// What open file descriptors may grow by: a connection more to the master and some to Docker.
const DESCRIPTORS: f64 = 4.0;
/// A process this young is not looked at: it has not done anything yet.
const GROWN_UP: Duration = Duration::from_secs(5);
/// A life this long is looked at for itself as well.
const LONG_LIFE: Duration = Duration::from_secs(300);

/// One look.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sample {
    /// Since the beginning of the soak.
    pub(crate) at: Duration,
    /// The process.
    pub(crate) pid: u32,
    pub(crate) memory_kib: u64,
    pub(crate) descriptors: usize,
    /// Whether nothing was wrong at that time.
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

/// The children of a process, each with its state: the agent has none, so one would be a zombie, or become one.
pub(crate) fn children(pid: u32) -> Vec<String> {
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let stats = processes.filter_map(|entry| fs::read_to_string(entry.path().join("stat")).ok());
    stats.filter(|stat| parent(stat) == Some(pid)).map(|stat| stat.chars().take(60).collect()).collect()
}

/// The parent in a line of `/proc/<pid>/stat`: the second field is a name in brackets and may hold anything.
fn parent(stat: &str) -> Option<u32> {
    stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()
}

/// A process that others may follow in its place, and what was seen of all of them.
#[derive(Debug, Default)]
pub(crate) struct Watched {
    /// The present one, and when it was first seen.
    present: Option<(u32, Duration)>,
    pub(crate) samples: Vec<Sample>,
}

impl Watched {
    /// Looks at the process of the moment, unless it is too young to have done anything.
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

/// The medians of the first and the last third.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Trend {
    pub(crate) first: f64,
    pub(crate) last: f64,
}

impl Trend {
    /// None of fewer than three values.
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

/// Memory and descriptors over the whole soak, if neither grows; of each long life memory as well.
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
