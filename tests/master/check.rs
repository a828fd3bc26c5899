//! `dockflare-agent check` and the master: the check names each thing that can go wrong on the way to the master. It
//! takes, leaves and changes nothing there.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, TcpListener};
use std::path::Path;

use dockflare_dev_master::{DevMaster, Fault, Protocol, Route};
use serde_json::json;

use crate::certificates::{Front, Good, NOW};
use crate::desk::{BOTH, Desk, stop};
use crate::program::free_port;
use crate::support::SOON;
use crate::support::checked::{Checked, run};

impl Desk {
    async fn check(&self) -> Checked {
        Checked::new(&self.env, self.data.path(), &[&self.key]).await.unwrap()
    }
}

/// The name, content and modification time of each file.
fn content(dir: &Path) -> BTreeMap<String, (Vec<u8>, std::time::SystemTime)> {
    let entries = std::fs::read_dir(dir).unwrap().map(Result::unwrap);
    let read = |entry: std::fs::DirEntry| {
        let facts = (std::fs::read(entry.path()).unwrap(), entry.metadata().unwrap().modified().unwrap());
        (entry.file_name().into_string().unwrap(), facts)
    };
    entries.map(read).collect()
}

#[tokio::test]
async fn a_check_takes_no_command_registers_nobody_and_changes_nothing() {
    for protocol in BOTH {
        let desk = Desk::new(protocol).await.unwrap();
        // Before the first start, the check registers nothing and writes nothing.
        let first = desk.check().await;
        first.is("master.key", "pass").unwrap();
        assert_eq!(first.ids("fail"), ["docker.answer"], "{first:?}");
        assert_eq!(desk.master.snapshot().registrations, 0);
        assert!(content(desk.data.path()).is_empty());

        let mut agent = desk.agent().unwrap();
        let known = desk.registered(1).await.unwrap();
        // The master knows the agent a moment before the agent has read the answer and stored its id.
        agent.wait_for_log("registered at the master", SOON).await.unwrap();
        stop(&mut agent).await.unwrap();
        desk.master.enroll(&known.id, "edge").unwrap();
        let before = (json!(desk.master.snapshot()), content(desk.data.path()));
        for _ in 0..2 {
            let checked = desk.check().await;
            let answer = checked.is("master.answer", "pass").unwrap();
            let speaks = if protocol == Protocol::V1 { "protocol 1" } else { "protocol 2" };
            assert!(answer.contains(speaks), "{answer}");
            for id in ["config", "folder.writable", "folder.room", "master.tcp", "master.clock", "master.key"] {
                checked.is(id, "pass").unwrap();
            }
            let documents = checked.is("folder.documents", "pass").unwrap();
            assert!(documents.contains(&known.id), "{documents}");
            checked.is("master.access", "skip").unwrap();
            checked.is("master.dns", "skip").unwrap();
            assert!(checked.is("master.tls", "skip").unwrap().contains("http://"));
        }
        assert_eq!(json!(desk.master.snapshot()), before.0, "queued, polls, last seen and all else are as before");
        assert_eq!(content(desk.data.path()), before.1);
        assert_eq!(desk.master.snapshot().only_agent().unwrap().queued, 1);
        let asked: Vec<_> = desk.master.requests().iter().rev().take(2).map(|request| request.route).collect();
        assert_eq!(asked, [Route::Events, Route::Events]);
        desk.assert_no_violations();
    }
}

#[tokio::test]
async fn a_check_beside_a_running_agent_sees_it_and_leaves_it_alone() {
    let desk = Desk::new(Protocol::V2).await.unwrap();
    let mut agent = desk.agent().unwrap();
    desk.registered(1).await.unwrap();
    let checked = desk.check().await;
    let holder = checked.is("folder.holder", "pass").unwrap();
    assert!(holder.contains(&format!("pid {}", agent.pid())), "{holder}");
    assert!(agent.is_running().unwrap());
    stop(&mut agent).await.unwrap();
    desk.check().await.is("folder.holder", "skip").unwrap();
    assert_eq!(desk.master.snapshot().registrations, 1);
    desk.assert_no_violations();
}

#[tokio::test]
async fn a_key_that_is_not_accepted_is_told_from_a_master_that_is_none() {
    for protocol in BOTH {
        let mut desk = Desk::new(protocol).await.unwrap();
        let good = desk.key.clone();
        desk.set("DOCKFLARE_API_KEY", "wr0ng-key-of-somebody");
        let checked = Checked::new(&desk.env, desk.data.path(), &["wr0ng-key-of-somebody"]).await.unwrap();
        checked.is("master.answer", "pass").unwrap();
        let told = checked.is("master.key", "fail").unwrap();
        assert!(told.contains("401") && told.contains("DOCKFLARE_API_KEY") && !told.contains("trying again"), "{told}");
        desk.set("DOCKFLARE_API_KEY", good);
        for (fault, outcomes, words) in [
            (Fault::LoginRedirect, ["skip", "fail", "skip"], "CF_ACCESS_CLIENT_ID"),
            (Fault::status(403), ["fail", "skip", "skip"], "/api/v2/agents"),
            (Fault::NotJson, ["fail", "skip", "skip"], "DOCKFLARE_MASTER_URL"),
            (Fault::status(404), ["fail", "skip", "skip"], "DOCKFLARE_MASTER_URL"),
            (Fault::status(401), ["fail", "skip", "skip"], "/api/v2/agents"),
            (Fault::status(502), ["fail", "skip", "skip"], "502"),
            (Fault::CutBefore, ["fail", "skip", "skip"], "see to the master"),
        ] {
            desk.master.fault(Route::Any, fault.clone(), 1);
            let checked = desk.check().await;
            let ids = ["master.answer", "master.access", "master.key"];
            let texts = ids.into_iter().zip(outcomes).map(|(id, outcome)| checked.is(id, outcome).unwrap());
            let texts = texts.collect::<Vec<_>>().join("\n");
            assert!(texts.contains(words), "{fault:?}: {texts}");
        }
        desk.check().await.is("master.key", "pass").unwrap();
        desk.assert_no_violations();
    }
}

#[tokio::test]
async fn cloudflare_access_lets_the_right_service_token_through() {
    let mut desk = Desk::with(DevMaster::builder().access("an-id.access", "s3cret-of-access")).await.unwrap();
    let told = desk.check().await.is("master.access", "fail").unwrap();
    assert!(told.contains("set CF_ACCESS_CLIENT_ID and CF_ACCESS_CLIENT_SECRET"), "{told}");
    desk.set("CF_ACCESS_CLIENT_ID", "an-id.access");
    desk.set("CF_ACCESS_CLIENT_SECRET", "another-secret");
    let told = desk.check().await.is("master.access", "fail").unwrap();
    assert!(told.contains("let the Access policy admit"), "{told}");
    desk.set("CF_ACCESS_CLIENT_SECRET", "s3cret-of-access");
    let checked = desk.check().await;
    checked.is("master.access", "pass").unwrap();
    checked.is("master.key", "pass").unwrap();
}

#[tokio::test]
async fn what_cannot_be_reached_is_named_and_what_rests_on_it_is_not_tried() {
    let mut desk = Desk::new(Protocol::V2).await.unwrap();
    let rest = ["master.answer", "master.clock", "master.access", "master.key"];
    desk.set("DOCKFLARE_MASTER_URL", "http://nowhere.invalid");
    let checked = desk.check().await;
    assert!(checked.is("master.dns", "fail").unwrap().contains("nowhere.invalid"));
    for id in ["master.tcp", "master.tls"].iter().chain(&rest) {
        checked.is(id, "skip").unwrap();
    }

    let closed = free_port();
    desk.set("DOCKFLARE_MASTER_URL", format!("http://localhost:{closed}"));
    let checked = desk.check().await;
    assert!(checked.is("master.dns", "pass").unwrap().contains("127.0.0.1"));
    assert!(checked.is("master.tcp", "fail").unwrap().contains(&closed.to_string()));
    for id in rest {
        checked.is(id, "skip").unwrap();
    }

    // With a proxy set, the check must look for the proxy instead.
    desk.set("HTTP_PROXY", format!("http://me:pr0xy-word@localhost:{closed}"));
    let checked = Checked::new(&desk.env, desk.data.path(), &["pr0xy-word"]).await.unwrap();
    assert!(checked.is("master.dns", "pass").unwrap().contains("HTTP proxy"));
    checked.is("master.tcp", "fail").unwrap();
    desk.set("HTTP_PROXY", "");

    // A plain HTTP port behind an https URL, and a port that accepts connections but never answers.
    desk.set("DOCKFLARE_MASTER_URL", format!("https://{}", desk.master.address()));
    assert!(desk.check().await.is("master.tls", "fail").unwrap().contains("https"));
    let silent = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    desk.set("DOCKFLARE_MASTER_URL", format!("https://{}", silent.local_addr().unwrap()));
    desk.check().await.is("master.tls", "fail").unwrap();
    assert_eq!(desk.master.snapshot().registrations, 0);
}

#[tokio::test]
async fn a_certificate_is_told_with_its_issuer_and_days_also_when_it_is_not_accepted() {
    let mut desk = Desk::new(Protocol::V2).await.unwrap();
    let front = Front::start(&desk.master, NOW).await;
    std::fs::write(desk.path("authority.pem"), front.authority.pem()).unwrap();
    desk.set("SSL_CERT_FILE", desk.path("authority.pem").display().to_string());
    desk.set("DOCKFLARE_MASTER_URL", format!("https://localhost:{}", front.port));
    let issuer = format!("issued by authority {}", desk.master.address());
    let checked = desk.check().await;
    let told = checked.is("master.tls", "pass").unwrap();
    assert!(told.contains(&issuer) && told.contains("days left"), "{told}");
    checked.is("master.key", "pass").unwrap();

    let soon = jiff::Zoned::now().with_time_zone(jiff::tz::TimeZone::UTC).date() + jiff::ToSpan::days(5);
    let number = |n: i8| u8::try_from(n).unwrap();
    front.show_until((soon.year().into(), number(soon.month()), number(soon.day())));
    let checked = desk.check().await;
    let told = checked.is("master.tls", "warn").unwrap();
    assert!(told.contains("4 days left") && told.contains("renew"), "{told}");
    checked.is("master.key", "pass").unwrap();

    for (shown, words) in [
        (Good { until: 2001, ..NOW }, ["expired at 2001-01-01", "renew the certificate"]),
        (Good { from: 3999, ..NOW }, ["not valid before 3999-01-01", "set the clock"]),
        (Good { name: "elsewhere.example", ..NOW }, ["another name: elsewhere.example", "set DOCKFLARE_MASTER_URL"]),
    ] {
        let front = Front::start(&desk.master, shown).await;
        std::fs::write(desk.path("authority.pem"), front.authority.pem()).unwrap();
        desk.set("DOCKFLARE_MASTER_URL", format!("https://localhost:{}", front.port));
        let checked = desk.check().await;
        let told = checked.is("master.tls", "fail").unwrap();
        assert!(words.iter().all(|words| told.contains(words)) && told.contains(&issuer), "{told}");
        assert!(!told.contains("trying again"), "{told}");
        checked.is("master.key", "skip").unwrap();
    }
    let other = Desk::new(Protocol::V2).await.unwrap();
    let stranger = Front::start(&other.master, NOW).await;
    desk.set("DOCKFLARE_MASTER_URL", format!("https://localhost:{}", stranger.port));
    let told = desk.check().await.is("master.tls", "fail").unwrap();
    assert!(told.contains("authority that is not known") && told.contains("SSL_CERT_FILE"), "{told}");
    assert_eq!((desk.master.snapshot().registrations, other.master.snapshot().registrations), (0, 0));
    desk.assert_no_violations();
}

#[tokio::test]
async fn where_nobody_looks_on_the_list_is_plain_and_ends_with_the_sums() {
    let mut desk = Desk::new(Protocol::V2).await.unwrap();
    let (code, text) = run(&["check"], &desk.env, desk.data.path(), &[&desk.key]).await.unwrap();
    assert_eq!(code, Some(1), "{text}");
    assert!(text.is_ascii() && !text.contains('\x1b'), "{text}");
    for part in
        ["configuration\n", "\nmaster\n", "\n  ok   key accepted", "\n  FAIL answers", "\n       -> check DOCKER_HOST"]
    {
        assert!(text.contains(part), "{part:?} is not in: {text}");
    }
    let sums = text.lines().last().unwrap();
    assert!(sums.contains(" passed, 1 failed, ") && sums.ends_with(" not tried, 0 warnings"), "{sums}");

    desk.set("DOCKFLARE_MASTER_URL", "ftp://master");
    desk.set("TZ", "Mars/Olympus");
    let (code, text) = run(&["check"], &desk.env, desk.data.path(), &[&desk.key]).await.unwrap();
    assert!(code == Some(1) && text.matches("FAIL settings").count() == 2, "{code:?} {text}");
    let (code, text) = run(&["check", "--yaml"], &desk.env, desk.data.path(), &[]).await.unwrap();
    assert!(code == Some(64) && text.contains("Usage"), "{code:?} {text}");
}
