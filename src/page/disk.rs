//! Whether the data folder can be written. Tested at most once a minute while all is well, and never waited for long.

use std::time::Duration;

use dockflare_host::aside::Aside;
use tokio::sync::Mutex;
use tokio::time::Instant;

use crate::state::Store;

/// How long a good answer is reused: each test creates a file and removes it.
const GOOD_FOR: Duration = Duration::from_secs(60);
/// A disk that takes longer counts as hanging.
const LIMIT: Duration = Duration::from_secs(2);

/// Tests the data folder.
#[derive(Debug)]
pub(crate) struct Disk {
    store: Store,
    looks: Aside<Result<(), String>>,
    known: Mutex<Option<(Instant, Option<String>)>>,
}

impl Disk {
    pub(crate) fn new(store: Store) -> Self {
        Self { store, looks: Aside::default(), known: Mutex::default() }
    }

    /// Why the agent cannot write its state; `None` if it can.
    pub(super) async fn problem(&self) -> Option<String> {
        let mut known = self.known.lock().await;
        if let Some((at, problem)) = &*known
            && at.elapsed() < GOOD_FOR
        {
            return problem.clone();
        }
        let store = self.store.clone();
        let Some(looked) = self.looks.or_earlier(LIMIT, move || store.try_out()).await else {
            let dir = self.store.dir().display();
            return Some(format!("the data folder {dir} does not answer: see to the disk or the network file system"));
        };
        let problem = looked.err();
        // Remember only a good answer, so that a repaired folder shows at once.
        *known = problem.is_none().then(|| (Instant::now(), None));
        problem
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
