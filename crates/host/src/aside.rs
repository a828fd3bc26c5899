//! Runs blocking work outside the one thread that everything else runs on. A disk or a network file system may hang
//! forever. That costs one thread and nothing more: the caller gets an answer after its time limit, and no second
//! thread starts while the first one hangs.

use std::time::Duration;

use tokio::sync::Mutex;
use tokio::task::{JoinHandle, spawn_blocking};
use tokio::time::{Instant, timeout_at};

/// Runs blocking work of one kind, one piece at a time.
#[derive(Debug)]
pub struct Aside<T>(Mutex<Option<JoinHandle<T>>>);

impl<T> Default for Aside<T> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<T: Send + 'static> Aside<T> {
    /// Runs `work` after any earlier piece has ended, so that pieces run in order. Returns `None` if one of the two has
    /// not ended within `limit`: if it is the earlier one, `work` is never started; if it is `work`, it goes on.
    /// Cancel-safe in the same sense.
    pub async fn after_earlier(&self, limit: Duration, work: impl FnOnce() -> T + Send + 'static) -> Option<T> {
        let deadline = Instant::now() + limit;
        let mut under_way = timeout_at(deadline, self.0.lock()).await.ok()?;
        if let Some(earlier) = under_way.as_mut() {
            let _ = timeout_at(deadline, earlier).await.ok()?;
        }
        let done = timeout_at(deadline, under_way.insert(spawn_blocking(work))).await.ok()?;
        *under_way = None;
        // The panic hook has already ended the process after a panic.
        done.ok()
    }

    /// Runs `work`, or waits for a piece that is already running and returns its result. Returns `None` if that has not
    /// ended within `limit`.
    pub async fn or_earlier(&self, limit: Duration, work: impl FnOnce() -> T + Send + 'static) -> Option<T> {
        let deadline = Instant::now() + limit;
        let mut under_way = timeout_at(deadline, self.0.lock()).await.ok()?;
        let work = under_way.get_or_insert_with(|| spawn_blocking(work));
        let done = timeout_at(deadline, work).await.ok()?;
        *under_way = None;
        done.ok()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    const LIMIT: Duration = Duration::from_millis(50);

    #[tokio::test]
    async fn what_hangs_is_given_up_on_and_nothing_is_begun_before_it_ends() {
        let aside = Aside::default();
        let (release, released) = channel::<()>();
        let slow = move || {
            let _ = released.recv();
            1
        };
        assert_eq!(aside.after_earlier(LIMIT, slow).await, None);
        assert_eq!(aside.after_earlier(LIMIT, || panic!("begun before the first ended")).await, None);
        assert_eq!(aside.or_earlier(LIMIT, || panic!("begun beside the first")).await, None);
        release.send(()).unwrap();
        let long = Duration::from_secs(30);
        assert_eq!(aside.or_earlier(long, || 2).await, Some(1), "what the first one found");
        assert_eq!(aside.after_earlier(long, || 3).await, Some(3));
    }

    #[tokio::test]
    async fn whoever_stops_waiting_leaves_the_work_to_the_next() {
        let aside = Aside::default();
        let (release, released) = channel::<()>();
        {
            let first = aside.or_earlier(Duration::from_secs(30), move || released.recv().is_ok());
            assert!(tokio::time::timeout(LIMIT, first).await.is_err());
        }
        release.send(()).unwrap();
        assert_eq!(aside.or_earlier(Duration::from_secs(30), || false).await, Some(true));
    }
}
