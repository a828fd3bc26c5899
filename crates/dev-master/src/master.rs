//! The library's handle: plays the double's operator, and waits for what it sees.

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

/// A running double. Dropped, it closes its listener and all connections.
///
/// Its methods take any agent id and any key as text; those that speak of an agent fail when the
/// double does not know it.
pub struct DevMaster {
    shared: Arc<Shared>,
    address: SocketAddr,
    runtime: Handle,
    server: Mutex<Server>,
}

enum Server {
    Up(JoinHandle<()>),
    /// The port is kept, but nothing listens: connections are refused and nobody else gets it.
    Paused(TcpSocket),
    /// On the way from one to the other, or failed there.
    Neither,
}

impl DevMaster {
    /// Where every double begins.
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

    /// The address listened on.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Makes a new agent key.
    pub fn generate_key(&self, owner: &str) -> String {
        self.shared.change(|state| operate::generate_key(state, owner))
    }

    /// Makes an agent key known; one that is known already becomes as new.
    pub fn add_key(&self, key: &str, owner: &str) {
        self.shared.change(|state| operate::add_key(state, key, owner));
    }

    /// Assigns the tunnel of this name, which is made up on first use and the same ever after, and
    /// queues `start_tunnel`.
    pub fn enroll(&self, agent: &str, tunnel_name: &str) -> anyhow::Result<Command> {
        Ok(self.shared.change(|state| operate::enroll(state, agent, tunnel_name))?)
    }

    /// Assigns a tunnel that is given in full, right or wrong, and queues `start_tunnel`.
    pub fn enroll_with(&self, agent: &str, name: &str, id: &str, token: &str) -> anyhow::Result<Command> {
        Ok(self.shared.change(|state| operate::enroll_with(state, agent, name, id, token))?)
    }

    /// Queues `restart_tunnel` for the assigned tunnel.
    pub fn redeploy(&self, agent: &str) -> anyhow::Result<Command> {
        Ok(self.shared.change(|state| operate::redeploy(state, agent))?)
    }

    /// Gives the agent a new key, which is returned; the old one is revoked at once.
    pub fn roll_key(&self, agent: &str) -> anyhow::Result<String> {
        Ok(self.shared.change(|state| operate::roll_key(state, agent))?)
    }

    /// Revokes a key and returns the agents that had it.
    pub fn revoke_key(&self, key: &str) -> anyhow::Result<Vec<String>> {
        Ok(self.shared.change(|state| operate::revoke_key(state, key))?)
    }

    /// Says what Cloudflare reports of a tunnel (`healthy`, `degraded`, `down`, `inactive`): masters of version 1 show
    /// that over the agent's own status. None takes it out of the master's list.
    pub fn cloudflare_says(&self, tunnel: &str, status: Option<&str>) {
        self.shared.change(|state| operate::list(state, tunnel, status));
    }

    /// Names the agent; its own name no longer counts.
    pub fn rename(&self, agent: &str, name: &str) -> anyhow::Result<()> {
        Ok(self.shared.change(|state| operate::rename(state, agent, name))?)
    }

    /// Removes the agent as the present protocol does it: version 2 begins its decommission and
    /// returns the id of the operation; version 1 forgets it, and its key stays good.
    pub fn remove(&self, agent: &str) -> anyhow::Result<Option<String>> {
        Ok(self.shared.change(|state| operate::remove(state, agent))?)
    }

    /// Loses the agent without revoking its key: version 1 takes it as new when it registers again,
    /// version 2 refuses the key for good, which is bound to an agent that is no more.
    pub fn forget(&self, agent: &str) -> anyhow::Result<()> {
        Ok(self.shared.change(|state| operate::forget(state, agent))?)
    }

    /// Ends the agent's session: version 2 answers its next event 409 `registration_required`.
    pub fn end_session(&self, agent: &str) -> anyhow::Result<()> {
        Ok(self.shared.change(|state| operate::end_session(state, agent))?)
    }

    /// Queues commands as they are.
    pub fn push_commands(&self, agent: &str, commands: Vec<Value>) -> anyhow::Result<()> {
        Ok(self.shared.change(|state| operate::push_commands(state, agent, commands))?)
    }

    /// Speaks another protocol from now on, as after an upgrade or its reversal. Agents, keys and
    /// sessions stay.
    pub fn set_protocol(&self, protocol: Protocol) {
        self.shared.change(|state| state.rules.protocol = protocol);
    }

    /// See [`Builder::highest_version`]; holds from the next registration on.
    pub fn set_highest_version(&self, version: u8) {
        self.shared.change(|state| state.rules.at_most = version.clamp(1, 2));
    }

    /// Changes what a version 2 double takes at most.
    pub fn set_limits(&self, limits: Limits) {
        self.shared.change(|state| state.rules.limits = limits);
    }

    /// Switches the `/accounts` routes on, for this account, or off.
    pub fn set_account(&self, account: Option<&str>) {
        self.shared.change(|state| state.rules.account = account.map(str::to_owned));
    }

    /// Sets a fault: `times` is a number or [`Times::UntilCleared`]. On each request the oldest fault
    /// that concerns its route acts, and no other.
    pub fn fault(&self, route: Route, fault: Fault, times: impl Into<Times>) {
        self.shared.change(|state| state.faults.add(route, None, fault, times.into()));
    }

    /// As [`DevMaster::fault`], on the requests whose body has this text.
    pub fn fault_on(&self, route: Route, containing: &str, fault: Fault, times: impl Into<Times>) {
        self.shared.change(|state| state.faults.add(route, Some(containing.to_owned()), fault, times.into()));
    }

    /// What stands before the master takes bodies of so many bytes, and answers 413 to larger ones without the master
    /// having seen them, as nginx does beyond 1 MiB.
    pub fn front_takes(&self, bytes: usize) {
        self.shared.change(|state| state.rules.front_bytes = bytes);
    }

    /// Takes all faults back and lets the requests go that are held.
    pub fn clear_faults(&self) {
        self.shared.change(|state| state.faults.clear());
    }

    /// Requests of agents so far, oldest first; the operator's own are not among them.
    pub fn requests(&self) -> Vec<Arc<Request>> {
        self.shared.look().journal.requests()
    }

    /// What agents sent that they should not have, whether or not it was refused.
    pub fn violations(&self) -> Vec<String> {
        self.shared.look().journal.violations()
    }

    /// The picture now.
    pub fn snapshot(&self) -> Snapshot {
        self.shared.look().snapshot()
    }

    /// The picture and the last requests as text, with keys and tokens hidden.
    pub fn report(&self) -> String {
        page::text(&self.shared.look())
    }

    /// Waits until `seen` finds what it looks for in the picture, and returns it. It is asked now and
    /// after each change, an agent's going offline included.
    ///
    /// # Errors
    /// Nothing was found within `timeout`; the error says `what` was waited for and has the
    /// [report](Self::report) in it.
    pub async fn wait_for<T>(
        &self,
        what: &str,
        timeout: Duration,
        mut seen: impl FnMut(&Snapshot) -> Option<T>,
    ) -> anyhow::Result<T> {
        self.wait(what, timeout, || seen(&self.snapshot())).await
    }

    /// Waits until `seen` finds what it looks for in a request, past or to come; the oldest are asked
    /// first.
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

    /// Stops to serve, as a master that is restarted: open connections are cut and new ones refused
    /// until [`resume`](Self::resume). The port stays reserved and nothing is forgotten.
    ///
    /// # Errors
    /// The port could not be kept.
    pub async fn pause(&self) -> anyhow::Result<()> {
        let server = std::mem::replace(&mut *self.server(), Server::Neither);
        match server {
            Server::Up(task) => {
                task.abort();
                // The only way for it to end is the abort just made.
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
    /// The port cannot be listened on.
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

/// Holds a port without listening on it. Somebody's outgoing connection may have it for a moment.
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

/// Ten seconds of tries.
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
