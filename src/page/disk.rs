//! Whether the data folder can be written, looked at no more often than makes sense and never waited for for long.

use std::time::Duration;

use tokio::sync::Mutex;
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};

use crate::state::Store;

/// An answer is good for so long: asking makes a file and removes it.
const GOOD_FOR: Duration = Duration::from_secs(60);
/// A disk that takes longer hangs.
const LIMIT: Duration = Duration::from_secs(2);

/// Looks at the data folder.
#[derive(Debug)]
pub(crate) struct Disk {
    store: Store,
    known: Mutex<Known>,
}

#[derive(Debug, Default)]
struct Known {
    answer: Option<(Instant, Option<String>)>,
    /// A look that has not come back: another one would only hang as well.
    under_way: Option<JoinHandle<Result<(), String>>>,
}

impl Disk {
    pub(crate) fn new(store: Store) -> Self {
        Self { store, known: Mutex::default() }
    }

    /// What keeps the agent from writing its state.
    pub(super) async fn problem(&self) -> Option<String> {
        let mut known = self.known.lock().await;
        if let Some((at, problem)) = &known.answer
            && at.elapsed() < GOOD_FOR
        {
            return problem.clone();
        }
        let mut look = known.under_way.take().unwrap_or_else(|| {
            let store = self.store.clone();
            tokio::spawn(async move { store.try_out().await })
        });
        match timeout(LIMIT, &mut look).await {
            Ok(looked) => {
                // The look itself does not panic.
                let problem = looked.unwrap_or(Ok(())).err();
                // A folder that was mended is to be seen at once.
                known.answer = problem.is_none().then(|| (Instant::now(), None));
                problem
            }
            Err(_) => {
                known.under_way = Some(look);
                let dir = self.store.dir().display();
                Some(format!("the data folder {dir} does not answer: see to the disk or the network file system"))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_folder_that_is_gone_is_a_problem_until_it_is_back() {
        let dir = tempfile::tempdir().unwrap();
        let data = dir.path().join("data");
        let disk = Disk::new(Store::open(&data).unwrap());
        std::fs::remove_dir_all(&data).unwrap();
        let problem = disk.problem().await.unwrap();
        assert!(problem.contains(data.to_str().unwrap()) && problem.contains("cannot be written"), "{problem}");
        std::fs::create_dir(&data).unwrap();
        assert_eq!(disk.problem().await, None);
        assert_eq!(std::fs::read_dir(&data).unwrap().count(), 0, "nothing is left of the look");
        std::fs::remove_dir(&data).unwrap();
        assert_eq!(disk.problem().await, None, "asked again a minute later");
    }
}
