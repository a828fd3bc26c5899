//! Tests Docker over mutual TLS: the real Engine behind a TLS endpoint that requires the agent's certificate.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Result, ensure};
use dockflare_dev_master::Protocol;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, ExtendedKeyUsagePurpose, IsCa, KeyPair};
use rustls::pki_types::PrivateKeyDer;
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};
use testkit::{AgentProcess, Case};
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, UnixStream};
use tokio::task::{JoinHandle, JoinSet};
use tokio_rustls::TlsAcceptor;

use crate::support::checked::Checked;
use crate::support::{SOON, Stage, agent_binary};

pub(crate) fn cases() -> Vec<Case> {
    testkit::cases![
        an_agent_on_a_docker_over_tls_does_all_its_work,
        a_socket_proxy_before_a_docker_over_tls_serves_its_agent,
        what_is_wrong_with_tls_is_named,
    ]
}

type Authority = CertifiedIssuer<'static, KeyPair>;

/// The TLS endpoint in front of the Engine.
struct Front {
    authority: Authority,
    port: u16,
    server: JoinHandle<()>,
}

impl Front {
    async fn start() -> Result<Self> {
        let authority = authority()?;
        let (chain, key) = signed(&authority, ExtendedKeyUsagePurpose::ServerAuth)?;
        let mut roots = RootCertStore::empty();
        roots.add(authority.der().clone())?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let clients = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone()).build()?;
        let key = PrivateKeyDer::try_from(key.serialize_der()).map_err(anyhow::Error::msg)?;
        let config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_client_cert_verifier(clients)
            .with_single_cert(vec![chain.der().clone()], key)?;
        let listener = TcpListener::bind("localhost:0").await?;
        let port = listener.local_addr()?.port();
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let server = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((client, _)) = listener.accept().await {
                let acceptor = acceptor.clone();
                connections.spawn(async move {
                    let mut client = acceptor.accept(client).await?;
                    let mut engine = UnixStream::connect("/var/run/docker.sock").await?;
                    copy_bidirectional(&mut client, &mut engine).await
                });
            }
        });
        Ok(Self { authority, port, server })
    }

    fn host_url(&self) -> String {
        format!("tcp://localhost:{}", self.port)
    }

    /// Writes a folder as Docker's client uses it. It trusts the authority `trusts` and holds a client certificate that
    /// `signed_by` has signed.
    fn folder(&self, at: &Path, trusts: &Authority, signed_by: &Authority) -> Result<PathBuf> {
        std::fs::create_dir_all(at)?;
        let (certificate, key) = signed(signed_by, ExtendedKeyUsagePurpose::ClientAuth)?;
        std::fs::write(at.join("ca.pem"), trusts.pem())?;
        std::fs::write(at.join("cert.pem"), certificate.pem())?;
        std::fs::write(at.join("key.pem"), key.serialize_pem())?;
        Ok(at.to_owned())
    }
}

impl Drop for Front {
    fn drop(&mut self) {
        self.server.abort();
    }
}

fn authority() -> Result<Authority> {
    let mut params = CertificateParams::new(Vec::new())?;
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    // Use a random name: TLS mistakes two authorities of one name for one with wrong signatures.
    params.distinguished_name.push(rcgen::DnType::CommonName, format!("authority {:016x}", fastrand::u64(..)));
    Ok(CertifiedIssuer::self_signed(params, KeyPair::generate()?)?)
}

fn signed(authority: &Authority, purpose: ExtendedKeyUsagePurpose) -> Result<(rcgen::Certificate, KeyPair)> {
    let mut params = CertificateParams::new(["localhost".to_owned()])?;
    params.extended_key_usages.push(purpose);
    let key = KeyPair::generate()?;
    Ok((params.signed_by(&key, authority)?, key))
}

/// Makes a stage whose agents reach the Engine through TLS.
async fn stage(front: &Front) -> Result<Stage> {
    let mut stage = Stage::new(Protocol::V2).await?;
    let folder = front.folder(&stage.data.path().join("certificates"), &front.authority, &front.authority)?;
    stage.set("DOCKER_HOST", front.host_url());
    stage.set("DOCKER_TLS_VERIFY", "1");
    stage.set("DOCKER_CERT_PATH", folder.display().to_string());
    Ok(stage)
}

async fn an_agent_on_a_docker_over_tls_does_all_its_work() -> Result<()> {
    let front = Front::start().await?;
    let stage = stage(&front).await?;
    let mut agent = stage.agent()?;
    let known = stage.enrolled_agent("over-tls").await?;
    stage.tunnel_is("running").await?;
    let first = stage.scope.status(&stage.tunnel).await?;
    ensure!(first == "running", "{first}");
    stage.master.redeploy(&known.id)?;
    agent.wait_for_log("command restart_tunnel", SOON).await?;
    let checked = Checked::new(&stage.env, stage.data.path(), &[&stage.key]).await?;
    ensure!(checked.ids("fail").is_empty(), "{:#}", checked.document);
    checked.is("docker.version", "pass")?;
    agent.sigterm()?;
    ensure!(agent.wait_exit(SOON).await?.code() == Some(0), "it did not end in order");
    ensure!(stage.scope.status(&stage.tunnel).await? == "gone");
    stage.assert_no_violations();
    Ok(())
}

async fn a_socket_proxy_before_a_docker_over_tls_serves_its_agent() -> Result<()> {
    let front = Front::start().await?;
    let mut stage = stage(&front).await?;
    let socket = stage.data.path().join("docker.sock").display().to_string();
    let mut env: Vec<_> = stage
        .env
        .iter()
        .filter(|(name, _)| name.contains("CLOUDFLARED_") || name.starts_with("TUNNEL_") || name.starts_with("DOCKER_"))
        .cloned()
        .collect();
    env.push(("SOCKET_PROXY_LISTEN".to_owned(), format!("unix://{socket}")));
    env.push(("SOCKET_PROXY_DOCKER_HOST".to_owned(), front.host_url()));
    let proxy = AgentProcess::spawn_with(&agent_binary(), &["socket-proxy"], &env, stage.data.path())?;
    proxy.wait_for_log("socket-proxy starts", SOON).await?;
    stage.set("DOCKER_HOST", format!("unix://{socket}"));
    stage.set("DOCKER_TLS_VERIFY", "");
    stage.set("DOCKER_CERT_PATH", "");
    let mut agent = stage.agent()?;
    stage.enrolled_agent("over-tls").await?;
    stage.tunnel_is("running").await?;
    agent.sigterm()?;
    ensure!(agent.wait_exit(SOON).await?.code() == Some(0), "it did not end in order");
    Ok(())
}

async fn what_is_wrong_with_tls_is_named() -> Result<()> {
    let front = Front::start().await?;
    let mut stage = stage(&front).await?;
    let another = authority()?;
    let at = |name: &str| stage.data.path().join(name);
    let stranger = front.folder(&at("stranger"), &front.authority, &another)?;
    let distrusts = front.folder(&at("distrusts"), &another, &front.authority)?;
    let plain = plain_port().await?;
    for (host, folder, words) in [
        (front.host_url(), Some(stranger), "does not accept the certificate cert.pem"),
        (front.host_url(), Some(distrusts.clone()), "is not signed by the ca.pem"),
        (format!("tcp://localhost:{plain}"), Some(distrusts), "there is no TLS at this port"),
    ] {
        stage.set("DOCKER_HOST", host);
        stage.set("DOCKER_CERT_PATH", folder.map(|folder| folder.display().to_string()).unwrap_or_default());
        let checked = Checked::new(&stage.env, stage.data.path(), &[&stage.key]).await?;
        let text = checked.document.to_string();
        ensure!(text.contains(words), "{words}: {:#}", checked.document);
        let agent = stage.agent()?;
        agent.wait_for_log(words, SOON).await?;
    }
    Ok(())
}

/// Opens a port that speaks plain HTTP.
async fn plain_port() -> Result<u16> {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let listener = TcpListener::bind("localhost:0").await?;
    let port = listener.local_addr()?.port();
    tokio::spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            tokio::spawn(async move {
                let _ = client.read(&mut [0; 1024]).await;
                let _ = client.write_all(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n").await;
            });
        }
    });
    Ok(port)
}
