//! A master with an untrusted certificate: the agent logs the reason and the remedy once, and keeps retrying.

use std::net::SocketAddr;
use std::sync::Arc;

use dockflare_dev_master::{DevMaster, Protocol};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair, date_time_ymd};
use rustls::ServerConfig;
use rustls::pki_types::PrivateKeyDer;
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};
use tokio_rustls::TlsAcceptor;

use crate::desk::{Desk, stop};
use crate::support::SOON;

/// A certificate authority and a TLS front for a master. The test can change the certificate that the front shows.
pub(crate) struct Front {
    pub(crate) authority: CertifiedIssuer<'static, KeyPair>,
    pub(crate) port: u16,
    shown: watch::Sender<Arc<ServerConfig>>,
    /// How many connections arrived.
    knocks: watch::Receiver<u32>,
    server: JoinHandle<()>,
}

/// The name and the time for which a certificate is valid.
#[derive(Clone, Copy)]
pub(crate) struct Good {
    pub(crate) name: &'static str,
    pub(crate) from: i32,
    pub(crate) until: i32,
}

pub(crate) const NOW: Good = Good { name: "localhost", from: 2000, until: 4000 };

impl Front {
    pub(crate) async fn start(master: &DevMaster, shows: Good) -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        // The client would take two authorities with one name for one authority with wrong signatures.
        params.distinguished_name.push(DnType::CommonName, format!("authority {}", master.address()));
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let authority = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let listener = TcpListener::bind("localhost:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (shown, shows_now) = watch::channel(config(&authority, shows));
        let (knocked, knocks) = watch::channel(0);
        let behind = master.address();
        let server = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((client, _)) = listener.accept().await {
                knocked.send_modify(|count| *count += 1);
                let acceptor = TlsAcceptor::from(shows_now.borrow().clone());
                connections.spawn(serve(acceptor, client, behind));
            }
        });
        Self { authority, port, shown, knocks, server }
    }

    fn show(&self, good: Good) {
        self.shown.send_replace(config(&self.authority, good));
    }

    /// Shows a certificate that is valid until the beginning of this day.
    pub(crate) fn show_until(&self, day: (i32, u8, u8)) {
        self.shown.send_replace(config_until(&self.authority, NOW, day));
    }

    fn knocks(&self) -> u32 {
        *self.knocks.borrow()
    }
}

impl Drop for Front {
    fn drop(&mut self) {
        self.server.abort();
    }
}

async fn serve(acceptor: TlsAcceptor, client: TcpStream, behind: SocketAddr) -> std::io::Result<()> {
    let mut client = acceptor.accept(client).await?;
    copy_bidirectional(&mut client, &mut TcpStream::connect(behind).await?).await?;
    Ok(())
}

fn config(authority: &CertifiedIssuer<'static, KeyPair>, good: Good) -> Arc<ServerConfig> {
    config_until(authority, good, (good.until, 1, 1))
}

fn config_until(
    authority: &CertifiedIssuer<'static, KeyPair>,
    good: Good,
    (year, month, day): (i32, u8, u8),
) -> Arc<ServerConfig> {
    let mut params = CertificateParams::new([good.name.to_owned()]).unwrap();
    params.not_before = date_time_ymd(good.from, 1, 1);
    params.not_after = date_time_ymd(year, month, day);
    let key = KeyPair::generate().unwrap();
    let certificate = params.signed_by(&key, authority).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
    Arc::new(config.with_no_client_auth().with_single_cert(vec![certificate.der().clone()], key).unwrap())
}

#[tokio::test]
async fn a_certificate_that_is_no_good_is_named_once_with_the_remedy_and_a_new_one_needs_no_restart() {
    // The certificate shown, whether the agent knows its authority, and the words in the log line.
    let table: [(Good, bool, [&str; 2]); 4] = [
        (Good { until: 2001, ..NOW }, true, ["expired at 2001-01-01", "renew the certificate"]),
        (Good { from: 3999, ..NOW }, true, ["not valid before 3999-01-01", "set the clock"]),
        (
            Good { name: "elsewhere.example", ..NOW },
            true,
            ["another name: elsewhere.example;", "set DOCKFLARE_MASTER_URL"],
        ),
        (NOW, false, ["authority that is not known", "SSL_CERT_FILE"]),
    ];
    let rows = table.map(async |(shown, known, parts)| {
        let mut desk = Desk::new(Protocol::V2).await.unwrap();
        let front = Front::start(&desk.master, shown).await;
        let file = desk.path("authority.pem");
        let other_desk = Desk::new(Protocol::V2).await.unwrap();
        let another = Front::start(&other_desk.master, NOW).await;
        let trusted = if known { &front } else { &another };
        std::fs::write(&file, trusted.authority.pem()).unwrap();
        desk.set("SSL_CERT_FILE", file.display().to_string());
        desk.set("DOCKFLARE_MASTER_URL", format!("https://localhost:{}", front.port));
        let mut agent = desk.agent().unwrap();
        let line = agent.wait_for_log("the master has a certificate", SOON).await.unwrap();
        for part in ["WARN", "the tunnel is not touched", parts[0], parts[1]] {
            assert!(line.contains(part), "{part} is not in: {line}");
        }
        // Each try happens at another second. The agent must not log it as a new problem.
        let tries = async || (front.knocks() >= 5).then_some(());
        testkit::wait_until("five tries", SOON, tries).await.unwrap();
        let log = agent.log();
        assert_eq!(log.lines().filter(|line| line.contains("WARN the master ")).count(), 1, "{log}");
        assert_eq!(desk.master.snapshot().registrations, 0);
        if known {
            front.show(NOW);
            desk.registered(1).await.unwrap();
            agent.wait_for_log("the master works again", SOON).await.unwrap();
        }
        stop(&mut agent).await.unwrap();
        desk.assert_no_violations();
    });
    futures_util::future::join_all(rows).await;
}

#[tokio::test]
async fn a_certificate_that_expires_while_the_agent_runs_is_named_and_a_new_one_needs_no_restart() {
    let mut desk = Desk::new(Protocol::V2).await.unwrap();
    let front = Front::start(&desk.master, NOW).await;
    let file = desk.path("authority.pem");
    std::fs::write(&file, front.authority.pem()).unwrap();
    desk.set("SSL_CERT_FILE", file.display().to_string());
    desk.set("DOCKFLARE_MASTER_URL", format!("https://localhost:{}", front.port));
    let mut agent = desk.agent().unwrap();
    desk.registered(1).await.unwrap();
    front.show(Good { until: 2001, ..NOW });
    // Cut the connections, so that the agent reconnects and sees the certificate.
    desk.master.pause().await.unwrap();
    desk.master.resume().await.unwrap();
    agent.wait_for_log("expired at 2001-01-01", SOON).await.unwrap();
    front.show(NOW);
    agent.wait_for_log("the master works again", SOON).await.unwrap();
    stop(&mut agent).await.unwrap();
    desk.assert_no_violations();
}
