//! Writes output without making the writer wait. A writer leaves a record and goes on, and a dedicated thread hands the
//! records to the reader. A reader that stalls costs records and nothing else; when it reads again, it gets their
//! number.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, ThreadId};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use crate::logging::NO_THREAD;

/// Most bytes that wait for a reader: some 1,500 lines. Further records are dropped and counted.
const MOST_WAITING: usize = 256 << 10;
/// Bytes that each record costs besides its text.
const RECORD_COST: usize = 64;
/// Pause while the reader accepts nothing, as on a pipe that somebody made non-blocking.
const PAUSE: Duration = Duration::from_millis(50);

/// Accepts whole records and never waits. Shared by all clones.
#[derive(Debug, Clone, Default)]
pub(crate) struct Outlet(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    waiting: Mutex<Waiting>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Waiting {
    records: VecDeque<Vec<u8>>,
    bytes: usize,
    /// The thread holds a record that is not written yet.
    writing: bool,
    /// Records that found no room or that the system refused to write, since the reader last got their number.
    dropped: u64,
    /// Accept no records until the reader knows how many are missing.
    gap: bool,
    /// The thread whose records are accepted despite a gap: its message closes the gap.
    own: Option<ThreadId>,
}

impl Outlet {
    /// Starts the thread that writes into `to`. After a loss, it writes everything from before and then calls `missing`
    /// with the number of dropped records. The record that `missing` leaves is accepted even if the outlet is full.
    ///
    /// # Errors
    /// When the system starts no thread.
    pub(crate) fn start(to: impl Write + Send + 'static, missing: impl Fn(u64) + Send + 'static) -> io::Result<Self> {
        let outlet = Self::default();
        let shared = outlet.0.clone();
        thread::Builder::new().name("log".to_owned()).spawn(move || shared.run(to, missing))?;
        Ok(outlet)
    }

    /// Waits until everything is written, for `limit` at most: a process that ends must not wait for a reader.
    #[expect(clippy::disallowed_methods, reason = "the process ends, and the wait has a limit")]
    pub(crate) fn flush(&self, limit: Duration) {
        let deadline = Instant::now() + limit;
        let mut waiting = self.0.lock();
        while waiting.writing || !waiting.records.is_empty() || waiting.gap {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            waiting = self.0.changed.wait_timeout(waiting, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Write for Outlet {
    /// Accepts a whole record, or drops it.
    fn write(&mut self, record: &[u8]) -> io::Result<usize> {
        let mut waiting = self.0.lock();
        let closes = waiting.own == Some(thread::current().id());
        if !closes && (waiting.gap || waiting.bytes + record.len() + RECORD_COST > MOST_WAITING) {
            waiting.dropped += 1;
            waiting.gap = true;
        } else {
            waiting.bytes += record.len() + RECORD_COST;
            waiting.records.push_back(record.to_vec());
        }
        self.0.changed.notify_all();
        Ok(record.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self, mut to: impl Write, missing: impl Fn(u64)) {
        self.lock().own = Some(thread::current().id());
        loop {
            let Some(record) = self.next(&missing) else { continue };
            let written = write_whole(&mut to, &record);
            let mut waiting = self.lock();
            waiting.writing = false;
            if written.is_err() {
                // The reader is gone, or the disk under a file is full. A later record that can be written reports the
                // loss.
                waiting.dropped += 1;
            } else if waiting.dropped > 0 {
                waiting.gap = true;
            }
            self.changed.notify_all();
        }
    }

    /// The next record. `None` after reporting a gap, which leaves a record.
    #[expect(clippy::disallowed_methods, reason = "runs on the log's own thread")]
    fn next(&self, missing: &impl Fn(u64)) -> Option<Vec<u8>> {
        let mut waiting = self.lock();
        loop {
            if let Some(record) = waiting.records.pop_front() {
                waiting.bytes -= record.len() + RECORD_COST;
                waiting.writing = true;
                return Some(record);
            }
            if waiting.gap {
                let dropped = waiting.dropped;
                drop(waiting);
                missing(dropped);
                waiting = self.lock();
                waiting.dropped -= dropped;
                // Report what was dropped in this moment, too, before accepting records.
                waiting.gap = waiting.dropped > 0;
                self.changed.notify_all();
                return None;
            }
            waiting = self.changed.wait(waiting).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// Writes all bytes, however long the reader takes.
#[expect(clippy::disallowed_methods, reason = "runs on threads of its own")]
fn write_whole(to: &mut impl Write, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match to.write(bytes) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => bytes = &bytes[written..],
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => thread::sleep(PAUSE),
            Err(error) => return Err(error),
        }
    }
    to.flush()
}

/// Writes a text on its own thread. Resolves when the text is written or cannot be. If the system starts no thread,
/// writes it here and adds the reason: a program that is about to end must not end in silence.
pub(crate) fn hand_over<W: Write + Send + 'static>(mut to: impl FnMut() -> W, text: &str) -> oneshot::Receiver<()> {
    let (done, written) = oneshot::channel();
    let (mut from_thread, bytes) = (to(), text.as_bytes().to_vec());
    let started = thread::Builder::new().spawn(move || {
        // The reader may close early.
        let _ = write_whole(&mut from_thread, &bytes);
        let _ = done.send(());
    });
    if let Err(error) = started {
        let _ = write_whole(&mut to(), format!("{text}{NO_THREAD} ({error})\n").as_bytes());
    }
    written
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Read};

    use super::*;

    /// An outlet that reports each gap as a line of its own.
    fn outlet(to: impl Write + Send + 'static) -> Outlet {
        let own = Arc::new(Mutex::new(None::<Outlet>));
        let known = own.clone();
        let outlet = Outlet::start(to, move |dropped| {
            let mut outlet = known.lock().unwrap().clone().unwrap();
            outlet.write_all(format!("{dropped} missing\n").as_bytes()).unwrap();
        });
        let outlet = outlet.unwrap();
        *own.lock().unwrap() = Some(outlet.clone());
        outlet
    }

    #[test]
    fn a_reader_that_stands_still_costs_lines_and_is_told_how_many_once_it_reads_again() {
        let (reader, writer) = io::pipe().unwrap();
        let mut outlet = outlet(writer);
        let (total, length) = (20_000, 100);
        let began = Instant::now();
        for number in 0..total {
            outlet.write_all(format!("{number:0length$}\n").as_bytes()).unwrap();
        }
        outlet.flush(Duration::from_millis(50));
        assert!(began.elapsed() < Duration::from_secs(5), "nobody waits for the reader");
        assert!(outlet.0.lock().bytes <= MOST_WAITING);
        let mut lines = BufReader::new(reader).lines().map(Result::unwrap);
        let mut kept = 0;
        let dropped = loop {
            let line = lines.next().unwrap();
            match line.strip_suffix(" missing") {
                Some(count) => break count.parse::<usize>().unwrap(),
                None => assert_eq!(line.parse::<usize>().unwrap(), kept),
            }
            kept += 1;
        };
        assert!(dropped > total / 2 && kept + dropped == total, "{kept} kept, {dropped} dropped");
        outlet.write_all(b"after\n").unwrap();
        assert_eq!(lines.next().unwrap(), "after", "and then all is as before");
    }

    #[test]
    fn no_line_is_lost_or_moved_but_those_that_are_counted() {
        let (reader, writer) = io::pipe().unwrap();
        let mut outlet = outlet(writer);
        let counted = thread::spawn(move || {
            let (mut next, mut missing) = (0, 0);
            for line in BufReader::new(reader).lines() {
                let line = line.unwrap();
                match line.strip_suffix(" missing") {
                    Some(count) => {
                        missing += count.parse::<u64>().unwrap();
                        next += count.parse::<u64>().unwrap();
                    }
                    None if line == "end" => break,
                    None => {
                        assert_eq!(line.parse::<u64>().unwrap(), next, "in order, and what is missing was told");
                        next += 1;
                    }
                }
            }
            (next, missing)
        });
        let total = 100_000_u64;
        for number in 0..total {
            outlet.write_all(format!("{number:080}\n").as_bytes()).unwrap();
        }
        outlet.flush(Duration::from_secs(20));
        outlet.write_all(b"end\n").unwrap();
        let (seen, missing) = counted.join().unwrap();
        assert_eq!(seen, total, "{missing} were dropped");
    }

    #[tokio::test]
    async fn a_text_is_handed_over_while_somebody_reads_and_nobody_is_blocked_by_one_who_does_not() {
        let (mut reader, writer) = io::pipe().unwrap();
        let mut writer = Some(writer);
        let mut written = hand_over(move || writer.take().unwrap(), &"x".repeat(1 << 20));
        assert!(tokio::time::timeout(Duration::from_millis(50), &mut written).await.is_err());
        let mut all = String::new();
        reader.read_to_string(&mut all).unwrap();
        assert_eq!(all.len(), 1 << 20);
        written.await.unwrap();
    }
}
