//! Stores what the master knows, for the next start. A task of its own writes the file, because a slow disk must not
//! delay a report, and retries until the disk takes it. An outdated file would be worse than none.

use std::time::Duration;

use tokio::sync::watch;
use tokio::time::sleep;

use crate::retry::{Backoff, Trouble};
use crate::state::{Reported, Store};

/// Write the file at most this often.
const EVERY: Duration = Duration::from_secs(5);
const FIRST_WAIT: Duration = Duration::from_secs(2);
const LONGEST_WAIT: Duration = Duration::from_secs(30);

/// The document that the file should hold.
#[derive(Debug)]
pub(super) struct Kept {
    /// The id under which the master knows it. The reporter sets it; it is written only with a document.
    pub(super) agent_id: Option<String>,
    /// `None` if there should be no file.
    document: watch::Sender<Option<Reported>>,
}

impl Kept {
    /// Starts the task, which ends once this is dropped and written. `found` is the file of an earlier run.
    pub(super) fn new(store: Store, found: Option<Reported>) -> Self {
        let agent_id = found.as_ref().map(|reported| reported.agent_id.clone());
        let (document, wanted) = watch::channel(found);
        tokio::spawn(keep(store, wanted));
        Self { agent_id, document }
    }

    /// Sets the document that the file should hold from now on.
    pub(super) fn set(&self, document: Option<Reported>) {
        self.document.send_if_modified(|known| std::mem::replace(known, document.clone()) != document);
    }
}

async fn keep(store: Store, mut wanted: watch::Receiver<Option<Reported>>) {
    let mut trouble = Trouble::new("what the master knows");
    let mut waits = Backoff::new(FIRST_WAIT, LONGEST_WAIT);
    // Starts with the file that was found. `None` after a failed write: what it left on disk is unknown.
    let mut on_disk = Some(wanted.borrow_and_update().clone());
    loop {
        if on_disk.is_some() && wanted.changed().await.is_err() {
            return;
        }
        let document = wanted.borrow_and_update().clone();
        if on_disk.as_ref() == Some(&document) {
            continue;
        }
        match store.save_reported(document.as_ref()).await {
            Ok(()) => {
                trouble.ended();
                waits.reset();
                on_disk = Some(document);
                tokio::select! {
                    () = sleep(EVERY) => {}
                    // Remove the file at once when it is no longer needed.
                    _ = wanted.wait_for(Option::is_none) => {}
                }
                wanted.mark_changed();
            }
            Err(error) => {
                on_disk = None;
                trouble.failed(
                    &format!("cannot be stored: {}", crate::error_chain(&error)),
                    "trying again, reports go on; an agent that is started again meanwhile calls nothing complete until that is known; make room or mend the permissions of the data folder",
                );
                if wanted.has_changed().is_err() {
                    return;
                }
                sleep(waits.next(None)).await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::*;

    fn reported(container: &str) -> Reported {
        Reported { agent_id: "0f9c".to_owned(), containers: [(container.to_owned(), container.to_owned())].into() }
    }

    /// Blocks the path with something that can be neither replaced nor removed as a file.
    fn block(path: &Path) {
        fs::create_dir(path).unwrap();
        fs::write(path.join("in the way"), "").unwrap();
    }

    async fn until(what: &str, reached: impl Fn() -> bool) {
        let reached = testkit::wait_until(what, Duration::from_secs(40), async || reached().then_some(()));
        reached.await.unwrap();
    }

    #[tokio::test]
    async fn what_the_disk_refuses_is_written_or_removed_as_soon_as_it_can_be() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("reported.json");
        let kept = Kept::new(Store::open(dir.path()).unwrap(), None);
        block(&path);
        kept.set(Some(reported("a")));
        tokio::time::sleep(Duration::from_millis(300)).await;
        kept.set(Some(reported("b")));
        fs::remove_dir_all(&path).unwrap();
        until("the newest to be written", || fs::read_to_string(&path).is_ok_and(|text| text.contains("\"b\""))).await;

        fs::remove_file(&path).unwrap();
        block(&path);
        kept.set(None);
        tokio::time::sleep(Duration::from_millis(300)).await;
        assert!(path.exists());
        fs::remove_dir_all(&path).unwrap();
        fs::write(&path, serde_json::to_vec(&reported("old")).unwrap()).unwrap();
        until("the old one to be removed", || !path.exists()).await;
    }
}
