//! The lines between a connector and the double of the edge: one JSON object each, of bounded length.

use anyhow::{Result, ensure};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader};

use crate::transport::Protocol;

/// Most bytes of a line, without its end: a reader buffers at most this much.
const LONGEST: usize = 64 * 1024;

/// What a connector says.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub(crate) enum FromConnector {
    /// `{"register":{…}}`: the first line.
    Register { register: Registration },
    /// `{"id":1,"body":"…"}`: the answer to the request with that id.
    Answer { id: u64, body: String },
    /// `{"unregister":true}`: send no more requests; those already sent still get an answer. `linger`: how many
    /// milliseconds after the last answer to close the connection.
    Unregister {
        unregister: bool,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        linger: Option<u64>,
    },
}

/// The connector that registers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Registration {
    pub(crate) tunnel: String,
    pub(crate) connector: String,
    #[serde(default)]
    pub(crate) token: String,
    pub(crate) protocol: Protocol,
}

/// What the edge says.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub(crate) enum FromEdge {
    /// `{"verdict":"registered"}`: the first line. After any other verdict the edge closes the connection.
    Verdict { verdict: Verdict },
    /// `{"id":1,"path":"/x"}`: a visitor's request.
    Request { id: u64, path: String },
    /// `{"closing":"dropped"}`: the last line, unless the edge vanishes.
    Closing { closing: Loss },
}

/// The result of a try to connect.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// The edge has registered the connection.
    Registered,
    /// The edge refuses the connection, in these words: `Unauthorized: …`.
    Refused(String),
    /// The edge has an internal error, in these words.
    Failed(String),
    /// The edge accepts the connection and never answers the registration.
    Unanswered,
    /// Nothing listens: TCP is reset, UDP unreachable.
    Away,
    /// Packets get no answer of any kind.
    Swallowed,
    /// The edge's certificate is not valid at this time.
    Untrusted,
    /// The edge's name cannot be resolved.
    Unresolved,
}

impl Verdict {
    /// Whether the two look the same from outside, except for the words.
    #[must_use]
    pub fn is_like(&self, other: &Self) -> bool {
        std::mem::discriminant(self) == std::mem::discriminant(other)
    }
}

/// How a connection ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Loss {
    /// The edge closed it.
    Dropped,
    /// The edge vanished.
    Away,
    /// Packets get no answer any more.
    Swallowed,
}

/// Encodes a message as a line, with its line end.
///
/// # Errors
/// When it is too long.
pub(crate) fn line(message: &impl Serialize) -> Result<String> {
    let mut line = serde_json::to_string(message)?;
    ensure!(line.len() <= LONGEST, "a line of {} bytes is too long", line.len());
    line.push('\n');
    Ok(line)
}

/// The lines of a stream.
#[derive(Debug)]
pub(crate) struct Lines<R> {
    stream: BufReader<R>,
    /// The part of the next line that has arrived.
    begun: Vec<u8>,
}

impl<R: AsyncRead + Unpin> Lines<R> {
    pub(crate) fn new(stream: R) -> Self {
        Self { stream: BufReader::new(stream), begun: Vec::new() }
    }

    /// The next message; `None` at the end. Cancel-safe: no byte that was read is lost.
    ///
    /// # Errors
    /// When the stream breaks, ends within a line, or a line is too long or not such a message.
    pub(crate) async fn next<T: DeserializeOwned>(&mut self) -> Result<Option<T>> {
        loop {
            let chunk = self.stream.fill_buf().await?;
            if chunk.is_empty() {
                ensure!(self.begun.is_empty(), "ended within a line");
                return Ok(None);
            }
            let end = chunk.iter().position(|byte| *byte == b'\n');
            let part = end.unwrap_or(chunk.len());
            ensure!(self.begun.len() + part <= LONGEST, "a line is too long");
            self.begun.extend_from_slice(&chunk[..part]);
            self.stream.consume(part + usize::from(end.is_some()));
            if end.is_some() {
                let line = std::mem::take(&mut self.begun);
                return Ok(Some(serde_json::from_slice(&line)?));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn reads_line_by_line_to_the_end() {
        let text = r#"{"register":{"tunnel":"t","connector":"c","protocol":"quic"}}
{"id":1,"body":"x"}
{"unregister":true}
"#;
        let mut lines = Lines::new(text.as_bytes());
        let (tunnel, connector, token) = ("t".into(), "c".into(), String::new());
        let register = Registration { tunnel, connector, token, protocol: Protocol::Quic };
        assert_eq!(lines.next().await.expect("1"), Some(FromConnector::Register { register }));
        assert_eq!(lines.next().await.expect("2"), Some(FromConnector::Answer { id: 1, body: "x".into() }));
        assert_eq!(lines.next().await.expect("3"), Some(FromConnector::Unregister { unregister: true, linger: None }));
        assert_eq!(lines.next::<FromConnector>().await.expect("end"), None);
    }

    #[tokio::test]
    async fn what_is_written_is_read_back() {
        let request = FromEdge::Request { id: 7, path: "/a\nb".into() };
        let line = line(&request).expect("line");
        assert_eq!(Lines::new(line.as_bytes()).next().await.expect("read"), Some(request));
    }

    #[tokio::test]
    async fn refuses_a_line_without_end_and_one_cut_short() {
        let longest = "1".repeat(LONGEST);
        assert!(line(&longest).is_err(), "two quotes too long");
        assert!(Lines::new(format!("{longest}1\n").as_bytes()).next::<FromEdge>().await.is_err());
        assert!(Lines::new(&br#"{"verdict":"registered"}"#[..]).next::<FromEdge>().await.is_err());
        assert!(Lines::new(&b"GET / HTTP/1.1\n"[..]).next::<FromConnector>().await.is_err());
    }
}
