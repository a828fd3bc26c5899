//! The lines between a connector and the double of the edge: one JSON object each, of bounded length.

use anyhow::{Result, ensure};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader};

/// No line is longer, without its end: whoever reads keeps at most this much.
const LONGEST: usize = 64 * 1024;

/// What a connector says.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub(crate) enum FromConnector {
    /// `{"register":{…}}`: the first line.
    Register { register: Registration },
    /// `{"id":1,"body":"…"}`: the answer to the request of that number.
    Answer { id: u64, body: String },
    /// `{"unregister":true}`: no more requests, please; those that were sent are still answered.
    Unregister { unregister: bool },
}

/// Who registers.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Registration {
    pub(crate) tunnel: String,
    pub(crate) connector: String,
}

/// What the edge says.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub(crate) enum FromEdge {
    /// `{"registered":true}`: the first line.
    Registered { registered: bool },
    /// `{"id":1,"path":"/x"}`: a visitor's request.
    Request { id: u64, path: String },
}

/// A message as a line, with its end.
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
pub(crate) struct Lines<R> {
    stream: BufReader<R>,
    /// What has come of the next line.
    begun: Vec<u8>,
}

impl<R: AsyncRead + Unpin> Lines<R> {
    pub(crate) fn new(stream: R) -> Self {
        Self { stream: BufReader::new(stream), begun: Vec::new() }
    }

    /// The next message; none at the end. Cancel-safe: nothing that was taken from the stream is lost.
    ///
    /// # Errors
    /// When the stream breaks, within a line or between two, or a line is too long or no such message.
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
        let text = b"{\"register\":{\"tunnel\":\"t\",\"connector\":\"c\"}}\n{\"id\":1,\"body\":\"x\"}\n{\"unregister\":true}\n";
        let mut lines = Lines::new(&text[..]);
        let register = Registration { tunnel: "t".into(), connector: "c".into() };
        assert_eq!(lines.next().await.expect("1"), Some(FromConnector::Register { register }));
        assert_eq!(lines.next().await.expect("2"), Some(FromConnector::Answer { id: 1, body: "x".into() }));
        assert_eq!(lines.next().await.expect("3"), Some(FromConnector::Unregister { unregister: true }));
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
        assert!(Lines::new(&br#"{"registered":true}"#[..]).next::<FromEdge>().await.is_err());
        assert!(Lines::new(&b"GET / HTTP/1.1\n"[..]).next::<FromConnector>().await.is_err());
    }
}
