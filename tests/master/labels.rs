//! Labels that are too long, too many, or both, on a Docker that passes them on unchanged. Also a workload that
//! crashes.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Result;
use dockflare_dev_master::{Protocol, Route};
use serde_json::Value;
use testkit::{AgentProcess, FakeDocker, http};

use crate::desk::{BOTH, Desk, stop};
use crate::program::free_port;
use crate::support::SOON;
use crate::support::checked::Checked;

/// The agent's highest permitted peak memory.
const MOST_MEMORY: u64 = 32 << 20;

struct Host {
    desk: Desk,
    docker: FakeDocker,
    port: u16,
}

impl Host {
    async fn new(protocol: Protocol) -> Result<Self> {
        let (mut desk, docker, port) = (Desk::new(protocol).await?, FakeDocker::start()?, free_port());
        desk.set("DOCKER_HOST", docker.host_url());
        desk.set("HEALTH_CHECK_PORT", port.to_string());
        desk.set("LOG_LEVEL", "INFO");
        Ok(Self { desk, docker, port })
    }

    async fn concerns(&self) -> Vec<Value> {
        let Ok(answer) = http::get(&format!("127.0.0.1:{}", self.port), "/health").await else { return Vec::new() };
        let page: Value = serde_json::from_str(&answer.body).unwrap_or_default();
        page["concerns"].as_array().cloned().unwrap_or_default()
    }

    async fn concern(&self, id: &str, about: &str) -> Value {
        let found = async || self.concerns().await.into_iter().find(|one| one["id"] == id && one["about"] == about);
        testkit::wait_until(&format!("{id} of {about}"), SOON, found).await.unwrap()
    }

    /// Waits until the master believes that exactly these run.
    async fn known(&self, names: &[&str]) {
        let mut expected = names.to_vec();
        expected.sort_unstable();
        let what = format!("{names:?}");
        let seen = self.desk.master.wait_for(&what, 2 * SOON, |known| {
            let agent = known.only_agent()?;
            let mut known: Vec<_> = agent.containers.values().map(|container| container.name.as_str()).collect();
            known.sort_unstable();
            (known == expected).then_some(())
        });
        seen.await.unwrap_or_else(|error| panic!("{error}"));
    }
}

/// A memory figure of a process from the kernel, such as `VmHWM`, in bytes.
fn memory(agent: &AgentProcess, what: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", agent.pid())).unwrap();
    let line = status.lines().find(|line| line.starts_with(what)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10
}

/// Processor time of a process, in seconds.
fn processor_time(agent: &AgentProcess) -> f64 {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", agent.pid())).unwrap();
    let after_name = stat.rsplit_once(") ").unwrap().1;
    let ticks: Vec<u64> = after_name.split(' ').skip(11).take(2).map(|ticks| ticks.parse().unwrap()).collect();
    (ticks[0] + ticks[1]) as f64 / 100.0
}

/// A Docker that serves only a container with a large label and the start of a second one. It makes the answers once,
/// and sends them on every request from its own threads.
struct Huge {
    socket: std::path::PathBuf,
    _folder: tempfile::TempDir,
    /// Whether the second container has started.
    tells: Arc<AtomicBool>,
}

impl Huge {
    fn start(label: &str) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let socket = folder.path().join("docker.sock");
        let listener = UnixListener::bind(&socket)?;
        let labels =
            format!(r#""dockflare.enable":"true","dockflare.hostname":"a.example","dockflare.service":"{label}""#);
        let [one, other] = ["1", "2"].map(|digit| digit.repeat(64));
        let of_list = |id: &str, name: &str| {
            format!(r#"{{"Id":"{id}","Names":["/{name}"],"Image":"web:1","State":"running","Labels":{{{labels}}}}}"#)
        };
        let before = Arc::new(format!("[{}]", of_list(&one, "there")));
        let after = Arc::new(format!("[{},{}]", of_list(&one, "there"), of_list(&other, "comes")));
        let event = format!(
            r#"{{"Type":"container","Action":"start","Actor":{{"ID":"{other}","Attributes":{{{labels},"image":"web:1","name":"comes"}}}},"time":1,"timeNano":1000000000}}"#
        );
        let (event, tells) = (Arc::new(event + "\n"), Arc::new(AtomicBool::new(false)));
        let flag = tells.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let (before, after, event, tells) = (before.clone(), after.clone(), event.clone(), flag.clone());
                // Ignore clients that hang up.
                std::thread::spawn(move || drop(serve(stream, &before, &after, &event, &tells)));
            }
        });
        Ok(Self { socket, _folder: folder, tells })
    }
}

fn serve(mut stream: UnixStream, before: &str, after: &str, event: &str, tells: &AtomicBool) -> std::io::Result<()> {
    let mut line = String::new();
    BufReader::new(stream.try_clone()?).read_line(&mut line)?;
    let head = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\n\r\n";
    if line.starts_with("GET /events") {
        stream.write_all(head.as_bytes())?;
        while !tells.load(Ordering::Relaxed) {
            std::thread::sleep(Duration::from_millis(20));
        }
        stream.write_all(event.as_bytes())?;
        std::thread::sleep(4 * SOON);
        return Ok(());
    }
    let is_listing = line.starts_with("GET /containers/json") && !line.contains("cloudflare.tunnel");
    let body = match is_listing && !line.contains("com.dockflare") {
        true if tells.load(Ordering::Relaxed) => after,
        true => before,
        false if line.contains("/containers/json") => "[]",
        false => "{}",
    };
    stream.write_all(head.as_bytes())?;
    stream.write_all(body.as_bytes())
}

#[tokio::test]
async fn a_label_of_100_mb_is_left_out_said_and_kept_in_nobodys_memory() {
    let mut host = Host::new(Protocol::V2).await.unwrap();
    let docker = Huge::start(&"x".repeat(100_000_000)).unwrap();
    host.desk.set("DOCKER_HOST", format!("unix://{}", docker.socket.display()));
    // One container is there at the start and one comes later, to cover a listing and an event.
    let mut agent = host.desk.agent().unwrap();
    host.known(&["there"]).await;
    docker.tells.store(true, Ordering::Relaxed);
    host.known(&["there", "comes"]).await;
    for name in ["there", "comes"] {
        let listed = host.concern("labels", name).await;
        let words = "its label dockflare.service is left out: its value is longer than 4096 bytes";
        assert!(listed["problem"].as_str().unwrap().contains(words), "{listed}");
        let said = format!("{words}; use fewer or shorter dockflare.* labels name={name}");
        assert!(agent.wait_for_log(&said, SOON).await.unwrap().contains("WARN"));
    }
    let checked = Checked::new(&host.desk.env, host.desk.data.path(), &[&host.desk.key]).await.unwrap();
    assert_eq!(checked.findings("container.left_out").len(), 2, "{:#}", checked.document);
    let known = host.desk.master.snapshot().only_agent().unwrap().clone();
    for container in known.containers.values() {
        assert_eq!(container.labels["dockflare.hostname"], "a.example");
        assert!(!container.labels.contains_key("dockflare.service"));
    }
    let most = memory(&agent, "VmHWM");
    println!(
        "at most {:.1} MiB resident, {:.1} now",
        most as f64 / 1048576.0,
        memory(&agent, "VmRSS") as f64 / 1048576.0
    );
    assert!(most < MOST_MEMORY, "{most} bytes");
    stop(&mut agent).await.unwrap();
    host.desk.assert_no_violations();
}

#[tokio::test]
async fn twenty_thousand_labels_cost_little() {
    let host = Host::new(Protocol::V2).await.unwrap();
    let keys: Vec<_> = (0..20_000).map(|number| format!("dockflare.{number}.service")).collect();
    let mut labels: Vec<_> = keys.iter().map(|key| (key.as_str(), "http://web:8080")).collect();
    labels.push(("dockflare.enable", "true"));
    let _web = host.docker.run("web");
    let mut agent = host.desk.agent().unwrap();
    host.known(&["web"]).await;
    let before = processor_time(&agent);
    let _many = host.docker.run_with("many", &labels);
    // The master refuses a container with this many labels. The agent still reports all others.
    host.concern("container_refused", "many").await;
    let _later = host.docker.run("later");
    host.known(&["web", "later"]).await;
    let listed = host.concern("labels", "many").await;
    assert!(listed["problem"].as_str().unwrap().contains("more than 256 such labels"), "{listed}");
    let spent = processor_time(&agent) - before;
    println!("{spent:.2} s of the processor, at most {} KiB resident", memory(&agent, "VmHWM") >> 10);
    assert!(spent < 2.0, "{spent} s, in a build without optimization");
    assert!(memory(&agent, "VmHWM") < MOST_MEMORY);
    stop(&mut agent).await.unwrap();
    host.desk.assert_no_violations();
}

#[tokio::test]
async fn a_container_that_is_refused_keeps_no_removed_one_published_after_a_restart_of_agent_or_master() {
    let host = Host::new(Protocol::V2).await.unwrap();
    let first = host.docker.run("first");
    let mut agent = host.desk.agent().unwrap();
    host.known(&["first"]).await;
    let many: Vec<_> = (0..200).map(|number| format!("dockflare.{number}.service")).collect();
    let mut labels: Vec<_> = many.iter().map(|key| (key.as_str(), "http://web:8080")).collect();
    labels.push(("dockflare.enable", "true"));
    let _bad = host.docker.run_with("bad", &labels);
    host.concern("container_refused", "bad").await;
    let second = host.docker.run("second");
    host.known(&["first", "second"]).await;
    let checked = Checked::new(&host.desk.env, host.desk.data.path(), &[&host.desk.key]).await.unwrap();
    let told = checked.is("agent.container_refused", "warn").unwrap();
    assert!(told.contains("bad") && told.contains("its longest label is dockflare."), "{told}");

    // Remove a container while the agent is down, right after a kill.
    agent.sigkill().unwrap();
    agent.wait_exit(SOON).await.unwrap();
    host.docker.stop(&first);
    let mut agent = host.desk.agent().unwrap();
    host.known(&["second"]).await;
    host.concern("container_refused", "bad").await;

    // End the session at the master, and remove a container meanwhile.
    let id = host.desk.master.snapshot().only_agent().unwrap().id.clone();
    host.desk.master.pause().await.unwrap();
    agent.wait_for_log("the master cannot be reached", SOON).await.unwrap();
    host.docker.stop(&second);
    let _third = host.docker.run("third");
    host.desk.master.end_session(&id).unwrap();
    host.desk.master.resume().await.unwrap();
    host.known(&["third"]).await;
    stop(&mut agent).await.unwrap();
    host.desk.assert_no_violations();
}

#[tokio::test]
async fn a_workload_that_crashes_again_and_again_is_said_once_and_told_every_five_seconds() {
    for protocol in BOTH {
        let host = Host::new(protocol).await.unwrap();
        let web = host.docker.run("web");
        let mut agent = host.desk.agent().unwrap();
        host.known(&["web"]).await;
        let before = host.desk.master.requests().len();
        let began = tokio::time::Instant::now();
        for _ in 0..20 {
            host.docker.stop(&web);
            tokio::time::sleep(Duration::from_millis(200)).await;
            host.docker.begin(&web);
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
        let took = began.elapsed().as_secs() as usize;
        let listed = host.concern("flapping", "web").await;
        assert!(
            listed["problem"].as_str().unwrap().contains("ends again and again, last with exit code 137"),
            "{listed}"
        );
        let asked = host.desk.master.requests()[before..].to_vec();
        let changes = |request: &&Arc<dockflare_dev_master::Request>| {
            request.route == Route::Events && request.event().is_some_and(|kind| kind.starts_with("container_"))
        };
        let told = asked.iter().filter(changes).count();
        println!("{protocol}: 40 changes in {took} s, {told} told");
        assert!((5..=5 + took / 5 + 2).contains(&told), "{told} in {took} s");
        // The container runs at last, and the master knows.
        host.known(&["web"]).await;
        let log = agent.log();
        assert_eq!(log.matches("the container ends again and again").count(), 1, "{log}");
        assert!(log.matches("container started").count() + log.matches("container stopped").count() <= 6, "{log}");
        stop(&mut agent).await.unwrap();
        host.desk.assert_no_violations();
    }
}
