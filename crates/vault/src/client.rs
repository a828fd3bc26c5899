//! The command line's way to the store: the admin socket of the vault that runs here, or the store itself if none runs.

#![allow(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "a command does one thing and has nothing else to serve"
)]

use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use zeroize::Zeroizing;

use crate::config::Config;
use crate::doors::admin::{Answer, Around, Request, answer};
use crate::start::{self, Opened};

/// Longest wait for an answer. A rotation of a large store may delay it for a moment.
const LIMIT: Duration = Duration::from_secs(60);
/// How long to wait for a store that is locked and has no socket. A vault with 100,000 secrets starts in a second.
const START_LIMIT: Duration = Duration::from_secs(10);
/// Largest answer, in bytes: a list of 100,000 names of the longest kind.
const MAX_ANSWER_BYTES: u64 = 64 << 20;

/// Asks whoever has the store open. A starting vault has it open already, and opens its socket in a moment.
pub fn ask(config: &Config, request: Request) -> Answer {
    let until = Instant::now() + START_LIMIT;
    loop {
        match UnixStream::connect(&config.admin_socket) {
            Ok(stream) => {
                return over(stream, &request).unwrap_or_else(|error| {
                    Answer::error("unavailable", &format!("the vault that runs here does not answer: {error}"), 74)
                });
            }
            // Nobody listens: then nobody has the store open either, or its lock says who does.
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused) => {
                match start::open(config, false, Duration::ZERO) {
                    Ok(opened) => return directly(&opened, request),
                    Err(error) if error.is_taken() && Instant::now() < until => std::thread::sleep(start::PAUSE),
                    Err(error) => return Answer::error("unavailable", &error.to_string(), error.exit_code()),
                }
            }
            Err(error) => {
                let at = config.admin_socket.display();
                return Answer::error(
                    "unavailable",
                    &format!(
                        "the admin socket {at} cannot be used: {error}; run this as the vault's own user, with docker exec"
                    ),
                    73,
                );
            }
        }
    }
}

fn over(mut stream: UnixStream, request: &Request) -> io::Result<Answer> {
    stream.set_read_timeout(Some(LIMIT))?;
    stream.set_write_timeout(Some(LIMIT))?;
    let mut line = Zeroizing::new(serde_json::to_vec(request)?);
    line.push(b'\n');
    stream.write_all(&line)?;
    let mut line = Zeroizing::new(Vec::new());
    BufReader::new(stream.take(MAX_ANSWER_BYTES)).read_until(b'\n', &mut line)?;
    serde_json::from_slice(&line).map_err(|_| io::Error::other("its answer is cut off"))
}

fn directly(opened: &Opened, request: Request) -> Answer {
    let answer = answer(&opened.vault, request, &Around::default());
    // Finish a rotation that has begun: nobody else would.
    while let Ok(true) = opened.vault.reseal() {}
    answer
}
