//! Logs what to do next while nobody has enrolled this agent: one line, repeated each hour.

use std::sync::Arc;
use std::time::Duration;

use reqwest::Url;
use tokio::sync::watch;
use tokio::time::timeout;
use tracing::info;

use crate::channels::Wanted;
use crate::registration::Session;

/// Wait this long before the first line: a command that is pending at the master comes with the first reply.
const FIRST_REPLY: Duration = Duration::from_secs(3);
/// Time between two lines.
const AGAIN: Duration = Duration::from_secs(3600);

/// Returns the page of a master where agents are enrolled.
pub(crate) fn agents_page(master: &Url) -> Url {
    let mut page = master.clone();
    if let Ok(mut segments) = page.path_segments_mut() {
        segments.pop_if_empty().push("agents");
    }
    page
}

/// Whether the agent waits to be enrolled: it has neither received nor refused a tunnel.
fn is_pending(wanted: &Wanted) -> bool {
    wanted.id.is_none() && wanted.refusal.is_none() && wanted.decommission.is_none()
}

/// Logs the line after each registration, until there is a tunnel. Ends when one of the channels closes.
pub(crate) async fn remind(
    master: Url,
    session: watch::Receiver<Option<Arc<Session>>>,
    wanted: watch::Receiver<Wanted>,
) {
    let page = agents_page(&master);
    let say = || {
        info!(
            %page,
            "this agent waits to be enrolled: choose a tunnel for it on the master's Agents page, and it starts by itself"
        );
    };
    remind_by(say, session, wanted).await;
}

async fn remind_by(
    say: impl Fn(),
    mut session: watch::Receiver<Option<Arc<Session>>>,
    mut wanted: watch::Receiver<Wanted>,
) {
    while session.wait_for(Option::is_some).await.is_ok() && wanted.wait_for(is_pending).await.is_ok() {
        let mut wait = FIRST_REPLY;
        loop {
            match timeout(wait, wanted.wait_for(|wanted| !is_pending(wanted))).await {
                Ok(Ok(_)) => break,
                Ok(Err(_)) => return,
                Err(_) => say(),
            }
            wait = AGAIN;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use tokio::time::sleep;

    use super::*;
    use crate::cause::Cause;
    use crate::channels::Refusal;
    use crate::registration::Protocol;
    use crate::state::{AgentId, Phase, TunnelId};

    #[test]
    fn the_page_is_below_the_path_of_the_master() {
        for (master, page) in [
            ("https://dockflare.example.com", "https://dockflare.example.com/agents"),
            ("http://master:5000/", "http://master:5000/agents"),
            ("https://example.com/flare/", "https://example.com/flare/agents"),
        ] {
            assert_eq!(agents_page(&Url::parse(master).unwrap()).as_str(), page);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn it_is_said_after_registering_and_each_hour_until_there_is_a_tunnel() {
        const SECOND: Duration = Duration::from_secs(1);
        let lines = Arc::new(AtomicUsize::new(0));
        let said = || lines.load(Ordering::Relaxed);
        let (session_tx, session) = watch::channel(None);
        let (wanted_tx, wanted) = watch::channel(Wanted::default());
        let count = lines.clone();
        let task = tokio::spawn(remind_by(move || _ = count.fetch_add(1, Ordering::Relaxed), session, wanted));
        sleep(2 * AGAIN).await;
        assert_eq!(said(), 0, "not registered yet");
        session_tx.send_replace(Some(Arc::new(Session {
            agent_id: AgentId::try_from("a".to_owned()).unwrap(),
            protocol: Protocol::V1,
            number: 1,
            assignment: None,
            is_new: true,
            is_first: true,
        })));
        sleep(FIRST_REPLY - SECOND).await;
        assert_eq!(said(), 0, "a command may wait at the master");
        sleep(2 * SECOND).await;
        assert_eq!(said(), 1);
        sleep(AGAIN - 2 * SECOND).await;
        assert_eq!(said(), 1);
        sleep(2 * SECOND).await;
        assert_eq!(said(), 2);
        for enrolled in [
            Wanted { id: Some(TunnelId("t".into())), ..Wanted::default() },
            Wanted { decommission: Some(Phase::Prepared), ..Wanted::default() },
            Wanted {
                refusal: Some(Refusal { name: None, cause: Cause::TokenMalformed, problem: String::new() }),
                ..Wanted::default()
            },
        ] {
            let before = said();
            wanted_tx.send_replace(enrolled);
            sleep(3 * AGAIN).await;
            assert_eq!(said(), before, "nothing is to be done");
            // The host was removed and added again.
            wanted_tx.send_replace(Wanted::default());
            sleep(FIRST_REPLY + SECOND).await;
            assert_eq!(said(), before + 1);
        }
        drop((session_tx, wanted_tx));
        task.await.unwrap();
    }
}
