//! The library's handle: acts as the double's operator, and waits for what the double sees.

use std::future::Future;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, bail};
use serde_json::Value;
use tokio::net::{TcpListener, TcpSocket};
use tokio::runtime::Handle;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::builder::Builder;
use crate::fault::{Fault, Times};
use crate::journal::Request;
use crate::operate::{self, Command};
use crate::request::Route;
use crate::snapshot::Snapshot;
use crate::state::{Limits, Protocol, Settings, Shared, State};
use crate::{page, server};

fn serve(runtime: &Handle, listener: TcpListener, shared: &Arc<Shared>) -> JoinHandle<()> {
    let shared = Arc::clone(shared);
    runtime.spawn(async move { match server::run(listener, shared).await {} })
}

/// A running double. Dropping it closes its listener and all connections.
///
/// Its methods take any agent id and any key as text. A method that names an agent fails if the double
/// does not know that agent.
pub struct DevMaster {
    shared: Arc<Shared>,
    address: SocketAddr,
    runtime: Handle,
    server: Mutex<Server>,
}

enum Server {
    Up(JoinHandle<()>),
    /// The socket holds the port without listening: connections are refused, and no other process gets the port.
    Paused(TcpSocket),
    /// In transition between the two, or failed in transition.
    Neither,
}

impl DevMaster {
    /// Starts building a double.
    pub fn builder() -> Builder {
        Builder::default()
    }

    /// Serves `state` on `listen` from now on.
    pub(crate) async fn serve(listen: SocketAddr, state: State, settings: Settings) -> anyhow::Result<Self> {
        let listener = TcpListener::bind(listen).await.with_context(|| format!("cannot listen on {listen}"))?;
        let address = listener.local_addr().context("the listener has no address")?;
        let shared = Arc::new(Shared::new(state, settings));
        let runtime = Handle::current();
        let server = Mutex::new(Server::Up(serve(&runtime, listener, &shared)));
        Ok(Self { shared, address, runtime, server })
    }

    /// The base URL for agents, with the prefix and without a trailing slash.
    pub fn url(&self) -> String {
        format!("http://{}{}", self.address, self.shared.settings.prefix)
    }

    /// The address the double listens on.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Makes a new agent key.
    pub fn generate_key(&self, owner: &str) -> String {
        self.shared.change(|state| operate::generate_key(state, owner))
    }

    /// Adds an agent key. A key that is already known is reset to a new one.
    pub fn add_key(&self, key: &str, owner: &str) {
        self.shared.change(|state| operate::add_key(state, key, owner));
    }

    /// Assigns the tunnel of this name and queues `start_tunnel`. The double makes the tunnel up on first use
    /// and keeps it from then on.
    pub fn enroll(&self, agent: &str, tunnel_name: &str) -> anyhow::Result<Command> {
        Ok(self.shared.change(|state| operate::enroll(state, agent, tunnel_name))?)
    }

    /// Assigns the tunnel exactly as given, valid or not, and queues `start_tunnel`.
    pub fn enroll_with(&self, agent: &str, name: &str, id: &str, token: &str) -> anyhow::Result<Command> {
        Ok(self.shared.change(|state| operate::enroll_with(state, agent, name, id, token))?)
    }

    /// Queues `restart_tunnel` for the assigned tunnel.
    pub fn redeploy(&self, agent: &str) -> anyhow::Result<Command> {
        Ok(self.shared.change(|state| operate::redeploy(state, agent))?)
    }

    /// Gives the agent a new key and returns it. The old key is revoked at once.
    pub fn roll_key(&self, agent: &str) -> anyhow::Result<String> {
        Ok(self.shared.change(|state| operate::roll_key(state, agent))?)
    }

    /// Revokes a key and returns the agents that were bound to it.
    pub fn revoke_key(&self, key: &str) -> anyhow::Result<Vec<String>> {
        Ok(self.shared.change(|state| operate::revoke_key(state, key))?)
    }

    /// Sets the status that Cloudflare reports for a tunnel (`healthy`, `degraded`, `down`, `inactive`). Version 1
    /// masters show it instead of the agent's own status. `None` takes the tunnel off the master's list.
    pub fn cloudflare_says(&self, tunnel: &str, status: Option<&str>) {
        self.shared.change(|state| operate::list(state, tunnel, status));
    }

    /// Names the agent. The name it registers with no longer counts.
    pub fn rename(&self, agent: &str, name: &str) -> anyhow::Result<()> {
        Ok(self.shared.change(|state| operate::rename(state, agent, name))?)
    }

    /// Removes the agent the way the current protocol does. Version 2 begins its decommission and returns the
    /// operation id. Version 1 forgets it, and its key stays active.
    pub fn remove(&self, agent: &str) -> anyhow::Result<Option<String>> {
        Ok(self.shared.change(|state| operate::remove(state, agent))?)
    }

    /// Forgets the agent without revoking its key. When the agent registers again, version 1 takes it as new.
    /// Version 2 refuses the key for good, because the key stays bound to the forgotten agent.
    pub fn forget(&self, agent: &str) -> anyhow::Result<()> {
        Ok(self.shared.change(|state| operate::forget(state, agent))?)
    }

    /// Ends the agent's session: version 2 answers its next event 409 `registration_required`.
    pub fn end_session(&self, agent: &str) -> anyhow::Result<()> {
        Ok(self.shared.change(|state| operate::end_session(state, agent))?)
    }

    /// Queues commands exactly as given.
    pub fn push_commands(&self, agent: &str, commands: Vec<Value>) -> anyhow::Result<()> {
        Ok(self.shared.change(|state| operate::push_commands(state, agent, commands))?)
    }

    /// Switches the protocol, as an upgrade or a downgrade would. Agents, keys and sessions stay.
    pub fn set_protocol(&self, protocol: Protocol) {
        self.shared.change(|state| state.rules.protocol = protocol);
    }

    /// Works as [`Builder::highest_version`], from the next registration on.
    pub fn set_highest_version(&self, version: u8) {
        self.shared.change(|state| state.rules.at_most = version.clamp(1, 2));
    }

    /// Changes the limits of a version 2 double.
    pub fn set_limits(&self, limits: Limits) {
        self.shared.change(|state| state.rules.limits = limits);
    }

    /// Switches the `/accounts` routes on for this account, or off.
    pub fn set_account(&self, account: Option<&str>) {
        self.shared.change(|state| state.rules.account = account.map(str::to_owned));
    }

    /// Sets a fault. `times` is a number or [`Times::UntilCleared`]. Only the oldest fault that matches a
    /// request acts on it.
    pub fn fault(&self, route: Route, fault: Fault, times: impl Into<Times>) {
        self.shared.change(|state| state.faults.add(route, None, fault, times.into()));
    }

    /// Works as [`DevMaster::fault`], on requests whose body contains this text.
    pub fn fault_on(&self, route: Route, containing: &str, fault: Fault, times: impl Into<Times>) {
        self.shared.change(|state| state.faults.add(route, Some(containing.to_owned()), fault, times.into()));
    }

    /// Limits request bodies to this many bytes, as a proxy in front of the master would. Larger ones get 413 and never
    /// reach the master. nginx does this beyond 1 MiB.
    pub fn front_takes(&self, bytes: usize) {
        self.shared.change(|state| state.rules.front_bytes = bytes);
    }

    /// Removes all faults and releases held requests.
    pub fn clear_faults(&self) {
        self.shared.change(|state| state.faults.clear());
    }

    /// The agents' requests so far, oldest first. The operator's requests are not included.
    pub fn requests(&self) -> Vec<Arc<Request>> {
        self.shared.look().journal.requests()
    }

    /// The protocol violations so far, whether or not the double refused the requests.
    pub fn violations(&self) -> Vec<String> {
        self.shared.look().journal.violations()
    }

    /// The current snapshot.
    pub fn snapshot(&self) -> Snapshot {
        self.shared.look().snapshot()
    }

    /// The snapshot and the last requests as text, with keys and tokens hidden.
    pub fn report(&self) -> String {
        page::text(&self.shared.look())
    }

    /// Waits until `seen` returns a value for the snapshot, and returns that value. Calls `seen` now and after
    /// each change, including an agent going offline.
    ///
    /// # Errors
    /// Fails if `seen` returned nothing within `timeout`. The error names `what` and includes the
    /// [report](Self::report).
    pub async fn wait_for<T>(
        &self,
        what: &str,
        timeout: Duration,
        mut seen: impl FnMut(&Snapshot) -> Option<T>,
    ) -> anyhow::Result<T> {
        self.wait(what, timeout, || seen(&self.snapshot())).await
    }

    /// Waits until `seen` returns a value for a request, past or future, oldest first.
    ///
    /// # Errors
    /// As for [`wait_for`](Self::wait_for).
    pub async fn wait_for_request<T>(
        &self,
        what: &str,
        timeout: Duration,
        mut seen: impl FnMut(&Request) -> Option<T>,
    ) -> anyhow::Result<T> {
        self.wait(what, timeout, || self.requests().iter().find_map(|request| seen(request))).await
    }

    async fn wait<T>(&self, what: &str, timeout: Duration, mut look: impl FnMut() -> Option<T>) -> anyhow::Result<T> {
        let deadline = Instant::now() + timeout;
        let mut news = self.shared.subscribe();
        loop {
            news.mark_unchanged();
            if let Some(found) = look() {
                return Ok(found);
            }
            if Instant::now() >= deadline {
                bail!("waited {timeout:?} in vain for {what}\n{}", self.report());
            }
            let offline = self.shared.look().next_offline();
            let wake = offline.map_or(deadline, |at| at.min(deadline));
            // Both arms are cancel-safe, and whichever ends, the next round looks again.
            tokio::select! {
                _ = news.changed() => {}
                () = tokio::time::sleep_until(wake) => {}
            }
        }
    }

    /// Stops serving, like a master that is being restarted. Cuts open connections and refuses new ones until
    /// [`resume`](Self::resume). The port stays reserved and the state is kept.
    ///
    /// # Errors
    /// Fails if the double cannot keep the port.
    pub async fn pause(&self) -> anyhow::Result<()> {
        let server = std::mem::replace(&mut *self.server(), Server::Neither);
        match server {
            Server::Up(task) => {
                task.abort();
                // The task ends only through this abort.
                let _ = task.await;
                let kept = keep(self.address).await.context("cannot keep the port")?;
                *self.server() = Server::Paused(kept);
            }
            other => *self.server() = other,
        }
        Ok(())
    }

    /// Serves again, on the same port.
    ///
    /// # Errors
    /// Fails if the double cannot listen on the port.
    pub async fn resume(&self) -> anyhow::Result<()> {
        let server = std::mem::replace(&mut *self.server(), Server::Neither);
        let listener = match server {
            Server::Up(task) => {
                *self.server() = Server::Up(task);
                return Ok(());
            }
            Server::Paused(socket) => socket.listen(1024),
            Server::Neither => TcpListener::bind(self.address).await,
        };
        let listener = listener.with_context(|| format!("cannot listen on {} again", self.address))?;
        *self.server() = Server::Up(serve(&self.runtime, listener, &self.shared));
        Ok(())
    }

    /// Runs `work` while the double is [paused](Self::pause).
    ///
    /// # Errors
    /// As for `pause` and `resume`.
    pub async fn while_paused<T>(&self, work: impl Future<Output = T>) -> anyhow::Result<T> {
        self.pause().await?;
        let result = work.await;
        self.resume().await?;
        Ok(result)
    }

    fn server(&self) -> MutexGuard<'_, Server> {
        self.server.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Holds a port without listening on it. Retries, because an outgoing connection of another process may use the port
/// for a moment.
async fn keep(address: SocketAddr) -> std::io::Result<TcpSocket> {
    let mut tries = 0;
    loop {
        match bind(address) {
            Err(error) if error.kind() == std::io::ErrorKind::AddrInUse && tries < KEEP_TRIES => tries += 1,
            kept => return kept,
        }
        tokio::time::sleep(KEEP_PAUSE).await;
    }
}

/// With [`KEEP_PAUSE`], ten seconds of retries.
const KEEP_TRIES: u32 = 200;
const KEEP_PAUSE: Duration = Duration::from_millis(50);

fn bind(address: SocketAddr) -> std::io::Result<TcpSocket> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    Ok(socket)
}

impl Drop for DevMaster {
    fn drop(&mut self) {
        if let Server::Up(task) = &*self.server() {
            task.abort();
        }
    }
}
