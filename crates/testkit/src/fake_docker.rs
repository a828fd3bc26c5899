//! A fake Docker Engine on a unix socket. It serves the part of the API that the agent reads, and fails on demand.
//!
//! It has containers, which the test starts and stops, their events with `since` and filters, and a listing. It reveals
//! no more than a real Engine: it keeps the last 256 events for `since`, and does not repeat an event that nobody
//! received. Clients cannot create anything. It serves paths with and without a `/v1.NN` prefix.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::convert::Infallible;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Result;
use axum::extract::Query;
use futures_util::stream;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Bytes, Frame, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode, Uri};
use hyper_util::rt::TokioIo;
use jiff::Timestamp;
use serde_json::{Value, json};
use tokio::net::UnixListener;
use tokio::sync::mpsc;
use tokio::task::{JoinHandle, JoinSet};

/// The newest API version that the double serves.
const NEWEST: u32 = 51;
/// How many events an Engine keeps.
const KEPT: usize = 256;

/// A running double. Dropping it cuts all connections and removes its socket.
pub struct FakeDocker {
    engine: Arc<Mutex<Engine>>,
    folder: tempfile::TempDir,
    server: Mutex<Option<JoinHandle<()>>>,
}

/// How the double answers a listing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Listing {
    /// In full.
    #[default]
    Whole,
    /// With status 200 and half of the body.
    Truncated,
    /// With this status.
    Status(u16),
}

type Line = io::Result<Bytes>;
type Body = UnsyncBoxBody<Bytes, io::Error>;

#[derive(Default)]
struct Engine {
    containers: BTreeMap<String, Container>,
    made: u64,
    /// The time of the last event in Unix nanoseconds. `kept` holds the events since the start of the Engine.
    told: i64,
    kept: VecDeque<(i64, Value)>,
    streams: Vec<Stream>,
    subscriptions: u64,
    /// Streams that stay open and receive nothing.
    deaf: Vec<Stream>,
    is_mute: bool,
    lag: Duration,
    slowness: Duration,
    listing: Listing,
    oldest: u32,
}

struct Stream {
    lines: mpsc::UnboundedSender<Line>,
    filters: Filters,
}

struct Container {
    labels: BTreeMap<String, String>,
    now: View,
    /// What the listing shows until `until`.
    before: View,
    until: Instant,
}

#[derive(Clone, Default)]
struct View {
    name: String,
    runs: bool,
}

impl FakeDocker {
    /// Starts a double without containers.
    ///
    /// # Errors
    /// When the socket cannot be made.
    pub fn start() -> Result<Self> {
        let folder = tempfile::Builder::new().prefix("dockflare-docker-").tempdir()?;
        let fake = Self { engine: Arc::default(), folder, server: Mutex::default() };
        fake.up()?;
        Ok(fake)
    }

    /// Returns the agent's value for `DOCKER_HOST`.
    #[must_use]
    pub fn host_url(&self) -> String {
        format!("unix://{}", self.socket().display())
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("docker.sock")
    }

    /// Starts a new container with `dockflare.enable=true` and returns its id.
    #[must_use]
    pub fn run(&self, name: &str) -> String {
        self.run_with(name, &[("dockflare.enable", "true")])
    }

    /// Like [`FakeDocker::run`], with these labels.
    #[must_use]
    pub fn run_with(&self, name: &str, labels: &[(&str, &str)]) -> String {
        let mut engine = self.engine();
        engine.made += 1;
        let id = format!("{:064x}", engine.made);
        let labels = labels.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        let view = View { name: name.to_owned(), runs: false };
        let container = Container { labels, now: view.clone(), before: view, until: Instant::now() };
        engine.containers.insert(id.clone(), container);
        engine.change(&id, "start", |view| view.runs = true);
        id
    }

    /// Starts a stopped container again.
    pub fn begin(&self, id: &str) {
        self.engine().change(id, "start", |view| view.runs = true);
    }

    /// Ends a container with the events of `docker stop`: `die`, then `stop`.
    pub fn stop(&self, id: &str) {
        let mut engine = self.engine();
        engine.change(id, "die", |view| view.runs = false);
        engine.change(id, "stop", |_| {});
    }

    /// Renames a container.
    pub fn rename(&self, id: &str, name: &str) {
        self.engine().change(id, "rename", |view| name.clone_into(&mut view.name));
    }

    /// Returns the running containers: id and name.
    #[must_use]
    pub fn running(&self) -> BTreeMap<String, String> {
        let engine = self.engine();
        let running = engine.containers.iter().filter(|(_, container)| container.now.runs);
        running.map(|(id, container)| (id.clone(), container.now.name.clone())).collect()
    }

    /// Returns the number of open event streams that receive events.
    #[must_use]
    pub fn listeners(&self) -> usize {
        let mut engine = self.engine();
        engine.streams.retain(|stream| !stream.lines.is_closed());
        engine.streams.len()
    }

    /// Returns the number of event streams requested so far.
    #[must_use]
    pub fn subscriptions(&self) -> u64 {
        self.engine().subscriptions
    }

    /// Cuts all event streams.
    pub fn cut(&self) {
        for stream in self.engine().streams.drain(..) {
            // The send fails if the client has left, which is fine.
            drop(stream.lines.send(Err(io::ErrorKind::ConnectionReset.into())));
        }
    }

    /// Ends all event streams cleanly.
    pub fn end_streams(&self) {
        self.engine().streams.clear();
    }

    /// Stops sending events to the streams that are open now, but keeps them open. New streams receive events.
    pub fn deafen(&self) {
        let mut engine = self.engine();
        let now_deaf = std::mem::take(&mut engine.streams);
        engine.deaf.extend(now_deaf);
    }

    /// While set, drops events: neither sends nor keeps them.
    pub fn mute(&self, is_mute: bool) {
        self.engine().is_mute = is_mute;
    }

    /// Makes the listing show a change only this long after its event, as Engine 20.10 does.
    pub fn lag(&self, lag: Duration) {
        self.engine().lag = lag;
    }

    /// Delays each listing by this long after its content is fixed.
    pub fn slow_down(&self, slowness: Duration) {
        self.engine().slowness = slowness;
    }

    /// Sets how the double answers listings from now on.
    pub fn answer_listings(&self, listing: Listing) {
        self.engine().listing = listing;
    }

    /// Refuses API versions older than `1.<minor>`, as Engine 29 refuses those older than 1.44.
    pub fn insist_on(&self, minor: u32) {
        self.engine().oldest = minor;
    }

    /// Undoes `mute`, `lag`, `slow_down` and `answer_listings`. Deaf streams stay deaf, and a double that is down stays
    /// down.
    pub fn heal(&self) {
        let mut engine = self.engine();
        engine.is_mute = false;
        engine.lag = Duration::ZERO;
        engine.slowness = Duration::ZERO;
        engine.listing = Listing::Whole;
        for container in engine.containers.values_mut() {
            container.until = Instant::now();
        }
    }

    /// Ends the double like a killed Engine: cuts the connections, forgets the events, and removes the socket. Running
    /// containers keep running.
    pub fn down(&self) {
        if let Some(server) = self.server().take() {
            server.abort();
        }
        // The socket does not exist if the double was down.
        drop(std::fs::remove_file(self.socket()));
        let mut engine = self.engine();
        engine.streams.clear();
        engine.deaf.clear();
        engine.kept.clear();
    }

    /// Serves again. Does nothing if the double is up.
    ///
    /// # Errors
    /// When the socket cannot be made.
    pub fn up(&self) -> Result<()> {
        let mut server = self.server();
        if server.is_none() {
            let listener = UnixListener::bind(self.socket())?;
            *server = Some(tokio::spawn(serve(listener, self.engine.clone())));
        }
        Ok(())
    }

    fn engine(&self) -> MutexGuard<'_, Engine> {
        lock(&self.engine)
    }

    fn server(&self) -> MutexGuard<'_, Option<JoinHandle<()>>> {
        lock(&self.server)
    }
}

impl Drop for FakeDocker {
    fn drop(&mut self) {
        self.down();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn serve(listener: UnixListener, engine: Arc<Mutex<Engine>>) {
    // The end of this task drops the connections, which cuts them.
    let mut connections = JoinSet::new();
    while let Ok((stream, _)) = listener.accept().await {
        let engine = engine.clone();
        let service = service_fn(move |request| {
            let engine = engine.clone();
            async move { Ok::<_, Infallible>(answer(&request, &engine).await) }
        });
        connections.spawn(http1::Builder::new().serve_connection(TokioIo::new(stream), service));
        while connections.try_join_next().is_some() {}
    }
}

async fn answer(request: &Request<Incoming>, engine: &Mutex<Engine>) -> Response<Body> {
    let uri = request.uri();
    let path = match versionless(uri.path(), lock(engine).oldest) {
        Ok(path) => path,
        Err(message) => return problem(StatusCode::BAD_REQUEST, &message),
    };
    match path.trim_matches('/').split('/').collect::<Vec<_>>()[..] {
        ["_ping"] => reply(StatusCode::OK, "OK".to_owned()),
        ["version"] => {
            let oldest = lock(engine).oldest.max(24);
            let version = json!({ "Version": "double", "ApiVersion": format!("1.{NEWEST}"),
                "MinAPIVersion": format!("1.{oldest}"), "Platform": { "Name": "double" } });
            reply(StatusCode::OK, version.to_string())
        }
        ["containers", "json"] => {
            let (text, answered, slowness) = {
                let engine = lock(engine);
                (engine.list(&Filters::of(uri)).to_string(), engine.listing, engine.slowness)
            };
            tokio::time::sleep(slowness).await;
            match answered {
                Listing::Whole => reply(StatusCode::OK, text),
                Listing::Truncated => {
                    let half = Bytes::copy_from_slice(&text.as_bytes()[..text.len() / 2]);
                    // Pause before the cut: otherwise the client would lose the head of the answer too.
                    let lines = stream::unfold(Some(half), |half| async {
                        match half {
                            Some(half) => Some((Ok(Frame::data(half)), None)),
                            None => {
                                tokio::time::sleep(Duration::from_millis(5)).await;
                                Some((Err(io::ErrorKind::ConnectionReset.into()), None))
                            }
                        }
                    });
                    Response::new(StreamBody::new(lines).boxed_unsync())
                }
                Listing::Status(status) => {
                    problem(StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR), "as told")
                }
            }
        }
        ["containers", name, "json"] => match lock(engine).inspect(name) {
            Some(found) => reply(StatusCode::OK, found.to_string()),
            None => problem(StatusCode::NOT_FOUND, &format!("No such container: {name}")),
        },
        ["events"] => {
            let lines = lock(engine).subscribe(since(uri), Filters::of(uri));
            let lines = stream::unfold(lines, async |mut lines| Some((lines.recv().await?.map(Frame::data), lines)));
            Response::new(StreamBody::new(lines).boxed_unsync())
        }
        ["networks" | "images", ..] => problem(StatusCode::NOT_FOUND, "there is none in this double"),
        _ => problem(StatusCode::NOT_FOUND, "page not found"),
    }
}

/// Returns the path without its `/v1.NN`, or an Engine's error message for that version.
fn versionless(path: &str, oldest: u32) -> Result<&str, String> {
    let Some((minor, rest)) = path.strip_prefix("/v1.").and_then(|rest| rest.split_once('/')) else { return Ok(path) };
    let Ok(minor) = minor.parse::<u32>() else { return Ok(path) };
    if minor < oldest {
        return Err(format!(
            "client version 1.{minor} is too old. Minimum supported API version is 1.{oldest}, please upgrade your client to a newer version"
        ));
    }
    if minor > NEWEST {
        return Err(format!("client version 1.{minor} is too new. Maximum supported API version is 1.{NEWEST}"));
    }
    Ok(&path[path.len() - rest.len() - 1..])
}

fn reply(status: StatusCode, text: String) -> Response<Body> {
    let mut reply = Response::new(Full::from(text).map_err(|never| match never {}).boxed_unsync());
    *reply.status_mut() = status;
    reply.headers_mut().insert("content-type", hyper::header::HeaderValue::from_static("application/json"));
    reply
}

fn problem(status: StatusCode, message: &str) -> Response<Body> {
    reply(status, json!({ "message": message }).to_string())
}

fn parameters(uri: &Uri) -> HashMap<String, String> {
    Query::try_from_uri(uri).map(|Query(found)| found).unwrap_or_default()
}

/// Parses `since` into nanoseconds. The parameter holds seconds, with an optional fraction of up to nine digits.
fn since(uri: &Uri) -> Option<i64> {
    let text = parameters(uri).remove("since")?;
    let (seconds, fraction) = text.split_once('.').unwrap_or((&text, ""));
    let nanoseconds = format!("{fraction:0<9}").parse::<i64>().ok()?;
    Some(seconds.parse::<i64>().ok()?.saturating_mul(1_000_000_000).saturating_add(nanoseconds))
}

/// Filters by kind. One value of each kind must match; for labels, all values must match.
#[derive(Default)]
struct Filters(HashMap<String, Vec<String>>);

impl Filters {
    fn of(uri: &Uri) -> Self {
        let text = parameters(uri).remove("filters").unwrap_or_default();
        Self(serde_json::from_str(&text).unwrap_or_default())
    }

    fn allows(&self, kind: &str, value: &str) -> bool {
        self.0.get(kind).is_none_or(|allowed| allowed.iter().any(|one| one == value))
    }

    fn labels_allow(&self, labels: &BTreeMap<String, String>) -> bool {
        let wanted = self.0.get("label").map(Vec::as_slice).unwrap_or_default();
        wanted.iter().all(|wanted| match wanted.split_once('=') {
            Some((key, value)) => labels.get(key).is_some_and(|has| has == value),
            None => labels.contains_key(wanted),
        })
    }

    fn allow_event(&self, event: &Value) -> bool {
        let text = |name: &str| event[name].as_str().unwrap_or_default();
        self.allows("type", text("Type")) && self.allows("event", text("Action"))
    }
}

impl Engine {
    /// Changes a container and sends the event. The listing shows the old state for as long as it lags.
    fn change(&mut self, id: &str, action: &str, change: impl FnOnce(&mut View)) {
        let lag = self.lag;
        let Some(container) = self.containers.get_mut(id) else { return };
        container.before = container.shown().clone();
        container.until = Instant::now() + lag;
        change(&mut container.now);
        let mut attributes = container.labels.clone();
        attributes.insert("name".to_owned(), container.now.name.clone());
        attributes.insert("image".to_owned(), "web:1".to_owned());
        if action == "die" {
            attributes.insert("exitCode".to_owned(), "137".to_owned());
        }
        if self.is_mute {
            return;
        }
        // Give each event a distinct time, however fast the events follow each other.
        let now = i64::try_from(Timestamp::now().as_nanosecond()).unwrap_or(i64::MAX);
        self.told = now.max(self.told + 1);
        let actor = json!({ "ID": id, "Attributes": attributes });
        let event = json!({ "Type": "container", "Action": action, "Actor": actor, "scope": "local",
            "time": self.told / 1_000_000_000, "timeNano": self.told });
        self.streams.retain(|stream| {
            !stream.filters.allow_event(&event) && !stream.lines.is_closed()
                || stream.lines.send(Ok(line(&event))).is_ok()
        });
        self.kept.push_back((self.told, event));
        if self.kept.len() > KEPT {
            self.kept.pop_front();
        }
    }

    fn subscribe(&mut self, since: Option<i64>, filters: Filters) -> mpsc::UnboundedReceiver<Line> {
        let (lines, receiver) = mpsc::unbounded_channel();
        let missed = self
            .kept
            .iter()
            .filter(|(at, event)| since.is_some_and(|since| *at >= since) && filters.allow_event(event));
        for (_, event) in missed {
            // This cannot fail: the receiver is in this function.
            drop(lines.send(Ok(line(event))));
        }
        self.streams.push(Stream { lines, filters });
        self.subscriptions += 1;
        receiver
    }

    fn list(&self, filters: &Filters) -> Value {
        let listed = self.containers.iter().filter_map(|(id, container)| {
            let view = container.shown();
            (view.runs && filters.labels_allow(&container.labels)).then(|| {
                json!({ "Id": id, "Names": [format!("/{}", view.name)], "Image": "web:1",
                    "Labels": container.labels, "State": "running", "Status": "Up" })
            })
        });
        listed.collect()
    }

    fn inspect(&self, name: &str) -> Option<Value> {
        let (id, container) =
            self.containers.iter().find(|(id, container)| *id == name || container.now.name == name)?;
        let status = if container.now.runs { "running" } else { "exited" };
        Some(json!({ "Id": id, "Name": format!("/{}", container.now.name),
            "State": { "Status": status, "Running": container.now.runs, "StartedAt": "2026-01-01T00:00:00Z" },
            "Config": { "Image": "web:1", "Labels": container.labels },
            "HostConfig": { "NetworkMode": "bridge" }, "NetworkSettings": { "Networks": {} } }))
    }
}

impl Container {
    fn shown(&self) -> &View {
        if Instant::now() < self.until { &self.before } else { &self.now }
    }
}

fn line(event: &Value) -> Bytes {
    Bytes::from(format!("{event}\n"))
}

#[cfg(test)]
mod tests {
    use bollard::Docker;
    use bollard::query_parameters::EventsOptions;
    use futures_util::StreamExt;

    use super::*;

    fn client(fake: &FakeDocker) -> Docker {
        Docker::connect_with_unix(&fake.host_url(), 5, bollard::API_DEFAULT_VERSION).unwrap()
    }

    #[tokio::test]
    async fn a_client_hears_what_was_missed_since_and_what_happens_then() {
        let fake = FakeDocker::start().unwrap();
        let (first, second) = (fake.run("a"), fake.run("b"));
        let at = fake.engine().kept[1].0;
        let since = format!("{}.{:09}", at / 1_000_000_000, at % 1_000_000_000);
        let filters = HashMap::from([("event".to_owned(), vec!["start".to_owned(), "die".to_owned()])]);
        let options = EventsOptions { since: Some(since), until: None, filters: Some(filters) };
        let docker = client(&fake);
        let mut events = std::pin::pin!(docker.events(Some(options)));
        let missed = events.next().await.unwrap().unwrap();
        assert_eq!(missed.actor.unwrap().id, Some(second));
        fake.stop(&first);
        let ended = events.next().await.unwrap().unwrap();
        assert_eq!((ended.action.as_deref(), ended.actor.unwrap().id), (Some("die"), Some(first)));
        fake.cut();
        assert!(events.next().await.unwrap().is_err());
    }

    #[tokio::test]
    async fn a_listing_lags_lies_and_fails_as_told() {
        let fake = FakeDocker::start().unwrap();
        let docker = client(&fake);
        let listed = async || docker.list_containers(None).await.map(|listed| listed.len());
        drop(fake.run("a"));
        assert_eq!(listed().await.unwrap(), 1);
        fake.lag(Duration::from_secs(3600));
        drop(fake.run("b"));
        assert_eq!(listed().await.unwrap(), 1);
        fake.answer_listings(Listing::Truncated);
        assert!(listed().await.is_err());
        fake.answer_listings(Listing::Status(403));
        assert!(listed().await.is_err());
        fake.heal();
        assert_eq!(listed().await.unwrap(), 2);
        fake.down();
        assert!(listed().await.is_err());
        fake.up().unwrap();
        assert_eq!(listed().await.unwrap(), 2);
    }

    #[test]
    fn an_api_that_is_too_old_or_too_new_is_refused_as_an_engine_does() {
        assert_eq!(versionless("/v1.44/events", 44), Ok("/events"));
        assert_eq!(versionless("/events", 44), Ok("/events"));
        assert!(versionless("/v1.41/_ping", 44).unwrap_err().contains("Minimum supported API version is 1.44"));
        assert!(versionless("/v1.99/_ping", 44).unwrap_err().contains("too new"));
    }
}
