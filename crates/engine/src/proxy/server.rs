//! Serves one connection with one request and one answer. It reads the head and the body within their limits, has the
//! [`Proxy`] plan and make the call, writes the answer, and closes.
//!
//! It keeps reading from the client throughout, so that a stream or a long call ends when the client disconnects.

use std::time::Duration;

use futures_util::StreamExt;
use serde_json::json;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf, split};
use tokio::time::timeout;

use super::refusals::Refusals;
use super::request::{Head, MOST_HEAD, Method, Refusal};
use super::{Answer, Failure, Planned, Proxy, REFUSES};

/// Serves the connections of a proxy.
#[derive(Debug)]
pub struct Service<P> {
    /// The calls that are let through.
    pub proxy: P,
    /// The log of refusals.
    pub refusals: Refusals,
}

/// Time limit for the head, and then again for the body.
const READ_LIMIT: Duration = Duration::from_secs(5);
/// Time limit for the client to take an answer, or one piece of a stream.
const WRITE_LIMIT: Duration = Duration::from_secs(30);

/// How long a refused client has to read its answer and close, however much it still sends.
const REST_LIMIT: Duration = Duration::from_millis(500);

/// How reading a request ended.
enum Unread {
    /// The client disconnected before it sent a request.
    Gone,
    Refused(Refusal),
}

impl From<Refusal> for Unread {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

impl<P: Proxy> Service<P> {
    /// Serves the only request of a connection.
    ///
    /// # Errors
    /// When the client disconnects.
    pub async fn serve(&self, stream: impl AsyncRead + AsyncWrite + Send) -> std::io::Result<()> {
        let (mut from, mut to) = split(stream);
        let (head, body) = match read(&self.proxy, &mut from).await {
            Ok(read) => read,
            Err(Unread::Gone) => return Ok(()),
            Err(Unread::Refused(refusal)) => return self.refuse(&mut from, &mut to, refusal).await,
        };
        let Planned { route, call } = match self.proxy.plan(&head, &body) {
            Ok(planned) => planned,
            Err(refusal) => return self.refuse(&mut from, &mut to, refusal).await,
        };
        drop(body);
        // Held until this connection ends.
        let _held = self.proxy.hold(&call).await;
        let answer = tokio::select! {
            answer = self.proxy.perform(call) => answer,
            () = gone(&mut from) => return Ok(()),
        };
        let answer = match answer {
            Ok(answer) => {
                self.refusals.docker_answered();
                answer
            }
            Err(Failure::Refused(rule)) => {
                return self.refuse(&mut from, &mut to, Refusal { status: 403, route, rule }).await;
            }
            Err(Failure::Absent(name)) => {
                self.refusals.docker_answered();
                Answer::Json(404, json!({ "message": format!("No such container: {name}") }))
            }
            Err(Failure::Docker(error)) => {
                self.refusals.docker_failed(&error);
                let (status, message) = error.answer();
                Answer::Json(status, json!({ "message": message }))
            }
        };
        tokio::select! {
            written = write::<P, _>(&mut to, answer, head.method == Method::Head) => written,
            () = gone(&mut from) => Ok(()),
        }
    }

    async fn refuse<S: AsyncRead + AsyncWrite>(
        &self,
        from: &mut ReadHalf<S>,
        to: &mut WriteHalf<S>,
        refusal: Refusal,
    ) -> std::io::Result<()> {
        self.refusals.tell(refusal);
        let message = format!("{}{REFUSES}: {}", P::PROGRAM, refusal.rule);
        write::<P, _>(to, Answer::Json(refusal.status, json!({ "message": message })), false).await?;
        // A close with unread bytes would lose the answer on its way.
        let rest = async { while from.read(&mut [0; 4096]).await.is_ok_and(|read| read > 0) {} };
        let _ = timeout(REST_LIMIT, rest).await;
        Ok(())
    }
}

/// Reads the head and the body.
async fn read<S: AsyncRead>(proxy: &impl Proxy, from: &mut ReadHalf<S>) -> Result<(Head, Vec<u8>), Unread> {
    let slow = |rule| Unread::Refused(Refusal { status: 408, ..Refusal::http(rule) });
    let (head, mut body) = timeout(READ_LIMIT, read_head(from)).await.map_err(|_| slow("head_slow"))??;
    proxy.admits(&head)?;
    let rest = async {
        while body.len() < head.length {
            if from.read_buf(&mut body).await.unwrap_or_default() == 0 {
                return Err(Unread::Refused(Refusal::http("body_short")));
            }
        }
        Ok(())
    };
    timeout(READ_LIMIT, rest).await.map_err(|_| slow("body_slow"))??;
    if body.len() > head.length {
        return Err(Refusal::http("bytes_after_request").into());
    }
    Ok((head, body))
}

/// Reads up to the empty line. Returns the head, and the part of the body that came with it.
async fn read_head<S: AsyncRead>(from: &mut ReadHalf<S>) -> Result<(Head, Vec<u8>), Unread> {
    const END: &[u8] = b"\r\n\r\n";
    let mut bytes = Vec::with_capacity(4096);
    loop {
        let seen = bytes.len().saturating_sub(END.len() - 1);
        match from.read_buf(&mut bytes).await {
            Ok(0) | Err(_) if bytes.is_empty() => return Err(Unread::Gone),
            Ok(0) | Err(_) => return Err(Refusal::http("head_short").into()),
            Ok(_) => {}
        }
        if let Some(at) = bytes[seen..].windows(END.len()).position(|window| window == END) {
            let end = seen + at + END.len();
            if end <= MOST_HEAD {
                return Ok((Head::read(&bytes[..end])?, bytes.split_off(end)));
            }
        }
        if bytes.len() > MOST_HEAD {
            return Err(Refusal { status: 431, ..Refusal::http("head_length") }.into());
        }
    }
}

/// Returns when the client disconnects, or sends bytes that must not follow its request.
async fn gone<S: AsyncRead>(from: &mut ReadHalf<S>) {
    let _ = from.read(&mut [0]).await;
}

async fn write<P: Proxy, S: AsyncWrite>(to: &mut WriteHalf<S>, answer: Answer, head_only: bool) -> std::io::Result<()> {
    let (status, kind, body) = match answer {
        Answer::Json(status, body) => (status, "application/json", body.to_string().into_bytes()),
        Answer::Done => (204, "", vec![]),
        Answer::Bytes(kind, body) => (200, kind, body),
        Answer::Stream(mut values) => {
            in_time(to, head::<P>(200, "application/json", "Transfer-Encoding: chunked\r\n").as_bytes()).await?;
            while let Some(value) = values.next().await {
                // Without the last chunk, the client sees that the stream was cut.
                let Ok(value) = value else { return Ok(()) };
                let line = format!("{value}\n");
                // A stream may be silent for days, but a client that does not read keeps Docker from serving others.
                in_time(to, format!("{:x}\r\n{line}\r\n", line.len()).as_bytes()).await?;
            }
            in_time(to, b"0\r\n\r\n").await?;
            return to.shutdown().await;
        }
    };
    // A 204 has no body, and no length.
    let length = if status == 204 { String::new() } else { format!("Content-Length: {}\r\n", body.len()) };
    let mut bytes = head::<P>(status, kind, &length).into_bytes();
    if !head_only {
        bytes.extend(body);
    }
    in_time(to, &bytes).await?;
    to.shutdown().await
}

async fn in_time<S: AsyncWrite>(to: &mut WriteHalf<S>, bytes: &[u8]) -> std::io::Result<()> {
    let written = async {
        to.write_all(bytes).await?;
        to.flush().await
    };
    timeout(WRITE_LIMIT, written).await.unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into()))
}

fn head<P: Proxy>(status: u16, kind: &str, more: &str) -> String {
    let reason = match status {
        200 => "OK",
        201 => "Created",
        204 => "No Content",
        400 => "Bad Request",
        403 => "Forbidden",
        404 => "Not Found",
        409 => "Conflict",
        502 => "Bad Gateway",
        504 => "Gateway Timeout",
        _ => "Refused",
    };
    let kind = if kind.is_empty() { String::new() } else { format!("Content-Type: {kind}\r\n") };
    // A `check` recognizes this proxy by `Server`, and need not try each call.
    format!("HTTP/1.1 {status} {reason}\r\nServer: {}\r\n{kind}{more}Connection: close\r\n\r\n", P::SERVER)
}

#[cfg(test)]
mod tests {
    use futures_util::stream;
    use tokio::io::duplex;

    use super::*;

    struct Nothing;

    impl Proxy for Nothing {
        const PROGRAM: &str = "nothing";
        const SERVER: &str = "nothing";
        type Call = ();
        type Held = ();

        fn admits(&self, _: &Head) -> Result<(), Refusal> {
            Err(Refusal::http("route"))
        }

        fn plan(&self, _: &Head, _: &[u8]) -> Result<Planned<()>, Refusal> {
            Err(Refusal::http("route"))
        }

        async fn hold(&self, (): &()) {}

        async fn perform(&self, (): ()) -> Result<Answer, Failure> {
            Err(Failure::Refused("route"))
        }
    }

    #[tokio::test(start_paused = true)]
    async fn who_does_not_read_a_stream_is_not_waited_for() {
        let (_client, server) = duplex(64);
        let (_from, mut to) = split(server);
        let endless = Answer::Stream(Box::pin(stream::repeat_with(|| Ok(json!({ "status": "more" })))));
        let error = write::<Nothing, _>(&mut to, endless, false).await.unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::TimedOut);
    }
}
