//! The agent key and the Access token.

use dockflare_dev_master::{DevMaster, Route};

use crate::desk::{BOTH, Desk};
use crate::support::SOON;

#[tokio::test]
async fn a_key_rolled_in_its_file_needs_no_restart() {
    for protocol in BOTH {
        let mut desk = Desk::new(protocol).await.unwrap();
        let file = desk.path("key");
        std::fs::write(&file, format!("{}\n", desk.key)).unwrap();
        desk.set("DOCKFLARE_API_KEY", "");
        desk.set("DOCKFLARE_API_KEY_FILE", file.display().to_string());
        let mut agent = desk.agent().unwrap();
        let id = desk.registered(1).await.unwrap().id;
        let new = desk.master.roll_key(&id).unwrap();
        agent.plant(&new);
        // The agent meets the revoked key before the operator replaces it.
        desk.answered(Route::Commands, 401).await.unwrap();
        std::fs::write(&file, format!("{new}\n")).unwrap();
        agent.wait_for_log("the key file holds a new agent key", SOON).await.unwrap();
        let polls = desk.master.snapshot().agents[&id].polls;
        let goes_on = desk
            .master
            .wait_for("polls with the new key", SOON, |known| (known.agents[&id].polls > polls + 1).then_some(()));
        goes_on.await.unwrap();
        assert!(agent.is_running().unwrap());
        desk.assert_no_violations();
    }
}

#[tokio::test]
async fn behind_access_the_service_token_goes_with_every_request() {
    let desk = DevMaster::builder().access("client-id.access", "s3cret-of-access").prefix("/behind/proxy");
    let mut desk = Desk::with(desk).await.unwrap();
    desk.set("CF_ACCESS_CLIENT_ID", "client-id.access");
    desk.set("CF_ACCESS_CLIENT_SECRET", "s3cret-of-access");
    let mut agent = desk.agent().unwrap();
    agent.plant("s3cret-of-access");
    desk.answered(Route::Events, 202).await.unwrap();
    desk.answered(Route::Commands, 200).await.unwrap();
    for request in desk.master.requests() {
        assert_eq!(request.access_client_id.as_deref(), Some("client-id.access"), "{request}");
        assert!(request.access_client_secret, "{request}");
    }
    desk.assert_no_violations();
}

#[tokio::test]
async fn a_login_page_in_the_way_is_named_as_cloudflare_access_and_not_followed() {
    let mut desk = Desk::with(DevMaster::builder().access("client-id.access", "s3cret-of-access")).await.unwrap();
    for wrong in [false, true] {
        if wrong {
            desk.set("CF_ACCESS_CLIENT_ID", "client-id.access");
            desk.set("CF_ACCESS_CLIENT_SECRET", "s0me-other");
        }
        let mut agent = desk.agent().unwrap();
        agent.plant("s0me-other");
        let line = agent.wait_for_log("Cloudflare Access", SOON).await.unwrap();
        for part in ["WARN", "302", "CF_ACCESS_CLIENT_ID", "CF_ACCESS_CLIENT_SECRET"] {
            assert!(line.contains(part), "{part} is not in: {line}");
        }
        assert!(agent.is_running().unwrap());
        assert_eq!(desk.master.snapshot().registrations, 0);
    }
    assert!(desk.master.requests().iter().all(|request| request.route == Route::Register));
}
