//! Tests the edge with connectors that are bare sockets, and so checks its protocol to the letter.

use std::net::Ipv4Addr;

use testkit::wait_until;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::time::timeout;

use super::*;

const SOON: Duration = Duration::from_secs(10);

async fn edge(takes: Duration) -> Edge {
    Edge::start((Ipv4Addr::LOCALHOST, 0).into(), takes).await.expect("edge")
}

struct Socket(BufReader<TcpStream>);

impl Socket {
    async fn registered(edge: &Edge, tunnel: &str, connector: &str) -> Self {
        let mut socket = Self(BufReader::new(TcpStream::connect(edge.address()).await.expect("dialled")));
        socket
            .say(&format!(r#"{{"register":{{"tunnel":"{tunnel}","connector":"{connector}","protocol":"quic"}}}}"#))
            .await;
        assert_eq!(socket.hear().await, r#"{"verdict":"registered"}"#);
        socket
    }

    async fn say(&mut self, line: &str) {
        self.0.get_mut().write_all(format!("{line}\n").as_bytes()).await.expect("said");
    }

    /// Reads the next line; empty at the end.
    async fn hear(&mut self) -> String {
        let mut line = String::new();
        timeout(SOON, self.0.read_line(&mut line)).await.expect("in time").expect("heard");
        line.trim_end().to_owned()
    }
}

/// Waits until exactly these connectors of the tunnel are usable.
async fn wait_for_connectors(edge: &Edge, tunnel: &str, connectors: &[&str]) {
    let change = wait_until("the connectors", SOON, async || (edge.connectors(tunnel) == connectors).then_some(()));
    change.await.expect("the connectors");
}

#[tokio::test]
async fn a_request_goes_to_a_connection_of_its_tunnel_and_the_answer_comes_back() {
    let edge = edge(Duration::ZERO).await;
    let mut one = Socket::registered(&edge, "t-1", "c-1").await;
    let _other = Socket::registered(&edge, "t-2", "c-2").await;
    wait_for_connectors(&edge, "t-1", &["c-1"]).await;
    let connector = async {
        assert_eq!(one.hear().await, r#"{"id":1,"path":"/x"}"#);
        assert_eq!(one.hear().await, r#"{"id":2,"path":"/y"}"#);
        one.say(r#"{"id":2,"body":"second"}"#).await;
        one.say(r#"{"id":1,"body":"first"}"#).await;
    };
    let (x, y, ()) = tokio::join!(edge.ask("t-1", "/x"), edge.ask("t-1", "/y"), connector);
    assert_eq!((x.expect("x"), y.expect("y")), ("first".into(), "second".into()));
    assert!(edge.ask("t-3", "/").await.is_err(), "nobody serves that tunnel");
}

#[tokio::test]
async fn a_new_connection_is_used_only_when_its_time_has_come() {
    let takes = Duration::from_millis(300);
    let edge = edge(takes).await;
    let before = Instant::now();
    let _socket = Socket::registered(&edge, "t-1", "c-1").await;
    assert!(edge.ask("t-1", "/").await.is_err());
    wait_for_connectors(&edge, "t-1", &["c-1"]).await;
    assert!(before.elapsed() >= takes);
}

#[tokio::test]
async fn who_unregisters_is_not_chosen_again_and_still_answers() {
    let edge = edge(Duration::ZERO).await;
    let mut socket = Socket::registered(&edge, "t-1", "c-1").await;
    wait_for_connectors(&edge, "t-1", &["c-1"]).await;
    let connector = async {
        socket.hear().await;
        socket.say(r#"{"unregister":true}"#).await;
        wait_for_connectors(&edge, "t-1", &[]).await;
        assert!(edge.ask("t-1", "/too-late").await.is_err());
        socket.say(r#"{"id":1,"body":"in time"}"#).await;
    };
    let (answer, ()) = tokio::join!(edge.ask("t-1", "/"), connector);
    assert_eq!(answer.expect("answer"), "in time");
}

#[tokio::test]
async fn a_connection_that_breaks_fails_its_requests_and_is_not_chosen_again() {
    let edge = edge(Duration::ZERO).await;
    for last_words in ["", "nonsense", r#"{"id":99,"body":"not asked"}"#] {
        let mut socket = Socket::registered(&edge, "t-1", "c-1").await;
        wait_for_connectors(&edge, "t-1", &["c-1"]).await;
        let connector = async {
            socket.hear().await;
            if last_words.is_empty() {
                drop(socket);
                return None;
            }
            socket.say(last_words).await;
            Some(socket)
        };
        let (answer, _socket) = tokio::join!(edge.ask("t-1", "/"), connector);
        assert!(format!("{:#}", answer.expect_err("broken")).contains("in flight"), "{last_words}");
        assert!(edge.connectors("t-1").is_empty(), "{last_words}");
    }
}

#[tokio::test]
async fn who_does_not_register_first_is_cut() {
    let edge = edge(Duration::ZERO).await;
    for line in [r#"{"unregister":true}"#, "GET / HTTP/1.1"] {
        let mut socket = Socket(BufReader::new(TcpStream::connect(edge.address()).await.expect("dialled")));
        socket.say(line).await;
        assert_eq!(socket.hear().await, "", "{line}");
    }
}

#[tokio::test]
async fn who_is_refused_is_dropped_and_told_why_and_the_others_stay() {
    let edge = edge(Duration::ZERO).await;
    let mut refused = Socket::registered(&edge, "t-1", "c-1").await;
    let _other = Socket::registered(&edge, "t-2", "c-2").await;
    edge.refuse(Whose::Tunnel("t-1".into()));
    assert_eq!(refused.hear().await, r#"{"closing":"dropped"}"#);
    let mut again = Socket(BufReader::new(TcpStream::connect(edge.address()).await.expect("dialled")));
    again.say(r#"{"register":{"tunnel":"t-1","connector":"c-1","protocol":"http2"}}"#).await;
    assert_eq!(again.hear().await, r#"{"verdict":{"refused":"Unauthorized: Invalid tunnel secret"}}"#);
    assert_eq!((edge.connectors("t-1").len(), edge.connectors("t-2").len()), (0, 1));
    edge.accept(Whose::Tunnel("t-1".into()));
    Socket::registered(&edge, "t-1", "c-1").await;
    assert_eq!(edge.tries().len(), 4);
}

#[tokio::test]
async fn one_protocol_may_find_nobody_there_and_an_edge_that_is_away_serves_none() {
    let edge = edge(Duration::ZERO).await;
    edge.block(Protocol::Quic);
    let hear = async |protocol: &str| {
        let mut socket = Socket(BufReader::new(TcpStream::connect(edge.address()).await.expect("dialled")));
        socket.say(&format!(r#"{{"register":{{"tunnel":"t","connector":"c","protocol":"{protocol}"}}}}"#)).await;
        socket.hear().await
    };
    assert_eq!(hear("quic").await, r#"{"verdict":"away"}"#);
    assert_eq!(hear("http2").await, r#"{"verdict":"registered"}"#);
    edge.unblock(Protocol::Quic);
    edge.swallow();
    assert_eq!(hear("http2").await, r#"{"verdict":"swallowed"}"#);
    edge.come_back();
    assert_eq!(hear("quic").await, r#"{"verdict":"registered"}"#);
}

#[tokio::test]
async fn a_drained_connection_is_closed_after_its_last_answer() {
    let edge = edge(Duration::ZERO).await;
    let mut socket = Socket::registered(&edge, "t-1", "c-1").await;
    wait_for_connectors(&edge, "t-1", &["c-1"]).await;
    let connector = async {
        socket.hear().await;
        socket.say(r#"{"unregister":true,"linger":1}"#).await;
        socket.say(r#"{"id":1,"body":"last"}"#).await;
        socket.hear().await
    };
    let (answer, end) = tokio::join!(edge.ask("t-1", "/"), connector);
    assert_eq!((answer.expect("answer").as_str(), end.as_str()), ("last", ""));
}

#[tokio::test]
async fn dropping_it_closes_every_connection_and_frees_its_address() {
    let edge = edge(Duration::ZERO).await;
    let address = edge.address();
    let mut socket = Socket::registered(&edge, "t-1", "c-1").await;
    drop(edge);
    assert_eq!(socket.hear().await, "");
    Edge::start(address, Duration::ZERO).await.expect("the same address");
}
