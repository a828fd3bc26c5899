//! The file that says after a restart what the master knows: written by a task of its own, since a slow disk must not
//! hold up a report, and again until the disk takes it. An old one would be worse than none.

use std::time::Duration;

use tokio::sync::watch;
use tokio::time::sleep;

use crate::retry::{Backoff, Trouble};
use crate::state::{Reported, Store};

/// The file is written again at most this often.
const EVERY: Duration = Duration::from_secs(5);
const FIRST_WAIT: Duration = Duration::from_secs(2);
const LONGEST_WAIT: Duration = Duration::from_secs(30);

/// What the file is to say.
#[derive(Debug)]
pub(super) struct Kept {
    /// Whose knowledge it is; the reporter's own, and not written without a document.
    pub(super) agent_id: Option<String>,
    /// `None` where there is to be no such file.
    document: watch::Sender<Option<Reported>>,
}

impl Kept {
    /// `found` is what the file of an earlier life says. Ends with this.
    pub(super) fn new(store: Store, found: Option<Reported>) -> Self {
        let agent_id = found.as_ref().map(|reported| reported.agent_id.clone());
        let (document, wanted) = watch::channel(found);
        tokio::spawn(keep(store, wanted));
        Self { agent_id, document }
    }

    /// The file is to say this from now on.
    pub(super) fn set(&self, document: Option<Reported>) {
        self.document.send_if_modified(|known| std::mem::replace(known, document.clone()) != document);
    }
}

async fn keep(store: Store, mut wanted: watch::Receiver<Option<Reported>>) {
    let mut trouble = Trouble::new("what the master knows");
    let mut waits = Backoff::new(FIRST_WAIT, LONGEST_WAIT);
    // The first is what was found there. What a write has left that failed is not known.
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
                    // That there is to be none is never late.
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

    /// Something that can be neither replaced nor removed as a file.
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
