//! Reports for the health page whether each task is still at work.
//!
//! A task waits with a time limit, and shows itself every 30 s during a long wait. If its turn has not come for longer
//! than its deadline, it hangs: it waits for a lock, a channel or a disk that does not come back. The pulse detects
//! this from outside, by recording when the runtime last polled the task.

use std::future::poll_fn;
use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::time::{Instant, sleep};

/// How often a task shows itself during a longer wait, at least.
pub const BEAT: Duration = Duration::from_secs(30);

/// Records when a task last worked.
#[derive(Debug, Clone)]
pub struct Pulse {
    /// The task's name.
    pub name: &'static str,
    deadline: Duration,
    last: Arc<Mutex<Last>>,
}

#[derive(Debug, Clone, Copy)]
enum Last {
    Turn(Instant),
    Ended,
}

/// The state of a task, according to its pulse.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Life {
    /// The task works.
    AtWork,
    /// The task has not had its turn for this long, which is longer than its deadline.
    Hangs(Duration),
    /// The task has ended.
    Ended,
}

impl Pulse {
    /// Creates the pulse of a task that has not started. `deadline` is the longest time that it may wait in one piece.
    pub fn new(name: &'static str, deadline: Duration) -> Self {
        Self { name, deadline, last: Arc::new(Mutex::new(Last::Turn(Instant::now()))) }
    }

    /// The state of the task.
    pub fn life(&self) -> Life {
        let last = *self.last.lock().unwrap_or_else(PoisonError::into_inner);
        match last {
            Last::Ended => Life::Ended,
            Last::Turn(at) if at.elapsed() > self.deadline => Life::Hangs(at.elapsed()),
            Last::Turn(_) => Life::AtWork,
        }
    }

    /// Runs `work` and records each of its turns.
    pub async fn watch<T>(self, work: impl Future<Output = T>) -> T {
        // Records the end even if `work` panics or is dropped.
        let ended = Ended(self.last.clone());
        let mut work = pin!(work);
        poll_fn(|context| {
            ended.note(Last::Turn(Instant::now()));
            work.as_mut().poll(context)
        })
        .await
    }
}

/// Records the end of a task, however it comes.
struct Ended(Arc<Mutex<Last>>);

impl Ended {
    fn note(&self, last: Last) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = last;
    }
}

impl Drop for Ended {
    fn drop(&mut self) {
        self.note(Last::Ended);
    }
}

/// Sleeps for this long, and shows every [`BEAT`] that nothing hangs. Cancel-safe, like a sleep.
pub async fn rest(mut left: Duration) {
    while !left.is_zero() {
        let step = left.min(BEAT);
        sleep(step).await;
        left -= step;
    }
}

/// Waits for something that others may hold for long, and shows every [`BEAT`] that nothing hangs.
pub async fn rest_until<T>(mut something: impl Future<Output = T> + Unpin) -> T {
    loop {
        tokio::select! {
            biased;
            it = &mut something => return it,
            () = sleep(BEAT) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::pending;

    use super::*;

    async fn after(seconds: u64, work: impl Future<Output = ()> + Send + 'static) -> Life {
        let pulse = Pulse::new("test", Duration::from_secs(180));
        tokio::spawn(pulse.clone().watch(work));
        sleep(Duration::from_secs(seconds)).await;
        pulse.life()
    }

    #[tokio::test(start_paused = true)]
    async fn a_task_that_rests_is_at_work_and_one_that_waits_in_vain_hangs() {
        assert_eq!(after(3000, rest(Duration::from_secs(7200))).await, Life::AtWork);
        assert_eq!(after(3000, rest_until(Box::pin(pending()))).await, Life::AtWork);
        assert_eq!(after(170, pending()).await, Life::AtWork);
        assert_eq!(after(200, pending()).await, Life::Hangs(Duration::from_secs(200)));
    }

    #[tokio::test(start_paused = true)]
    async fn a_task_that_returns_is_dropped_or_panics_has_ended() {
        assert_eq!(after(100, async {}).await, Life::Ended);
        assert_eq!(after(100, async { panic!("a mistake") }).await, Life::Ended);
        let pulse = Pulse::new("test", Duration::from_secs(180));
        let task = tokio::spawn(pulse.clone().watch(pending::<()>()));
        sleep(Duration::from_secs(1)).await;
        task.abort();
        let _ = task.await;
        assert_eq!(pulse.life(), Life::Ended);
    }

    #[tokio::test(start_paused = true)]
    async fn a_rest_is_as_long_as_it_was_asked_to_be() {
        for seconds in [0, 1, 30, 31, 3600] {
            let began = Instant::now();
            rest(Duration::from_secs(seconds)).await;
            assert_eq!(began.elapsed(), Duration::from_secs(seconds));
        }
    }
}
