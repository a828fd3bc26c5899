//! Chooses the protocol of the connections, and whether they may fall back to the other one.

use std::fmt;

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use crate::recording::Chosen;

/// Starts like the original's list.
const AVAILABLE: &str = "Available protocols: 'auto', the default; 'quic', over UDP; 'http2', over TCP";

/// A protocol. `Display` gives its name in the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// Over UDP.
    Quic,
    /// Over TCP.
    Http2,
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Quic => "quic",
            Self::Http2 => "http2",
        })
    }
}

/// The protocol chosen at start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Transport {
    /// With no choice, HTTP/2 may replace QUIC.
    pub chosen: Chosen,
}

impl Transport {
    /// Combines `TUNNEL_TRANSPORT_PROTOCOL` and `TUNNEL_POST_QUANTUM`.
    ///
    /// # Errors
    /// The original's errors: an unknown protocol, not a boolean, or a protocol without post-quantum.
    pub fn choose(protocol: Option<&str>, post_quantum: Option<&str>) -> Result<Self> {
        let post_quantum = post_quantum.map_or(Ok(false), go_bool).context("TUNNEL_POST_QUANTUM")?;
        let protocol = protocol.unwrap_or("auto");
        if post_quantum {
            ensure!(matches!(protocol, "auto" | "quic"), "post-quantum is only supported with the quic transport");
            return Ok(Self { chosen: Chosen::Only(Protocol::Quic) });
        }
        match protocol {
            "auto" => Ok(Self { chosen: Chosen::Auto }),
            "quic" => Ok(Self { chosen: Chosen::Only(Protocol::Quic) }),
            "http2" => Ok(Self { chosen: Chosen::Only(Protocol::Http2) }),
            other => bail!("unknown protocol {other}, {AVAILABLE}"),
        }
    }

    /// The protocol to begin with.
    #[must_use]
    pub fn first(self) -> Protocol {
        match self.chosen {
            Chosen::Auto => Protocol::Quic,
            Chosen::Only(protocol) => protocol,
        }
    }
}

/// Parses a boolean as Go's flags do.
fn go_bool(text: &str) -> Result<bool> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(false),
        other => bail!("could not parse {other:?} as bool value"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_protocol_that_nobody_chose_may_change() {
        let chosen = |protocol, post_quantum| {
            let transport = Transport::choose(protocol, post_quantum).expect("known");
            (transport.first(), transport.chosen == Chosen::Auto)
        };
        assert_eq!(chosen(None, None), (Protocol::Quic, true));
        assert_eq!(chosen(Some("auto"), Some("false")), (Protocol::Quic, true));
        assert_eq!(chosen(Some("quic"), None), (Protocol::Quic, false));
        assert_eq!(chosen(Some("http2"), Some("0")), (Protocol::Http2, false));
        assert_eq!(chosen(Some("auto"), Some("true")), (Protocol::Quic, false));
        assert_eq!(chosen(None, Some("1")), (Protocol::Quic, false));
    }

    #[test]
    fn refuses_what_the_original_refuses() {
        let refusal = |protocol, post_quantum| {
            format!("{:#}", Transport::choose(Some(protocol), post_quantum).expect_err("refused"))
        };
        assert!(refusal("h3", None).starts_with("unknown protocol h3, Available protocols: 'auto'"));
        assert_eq!(refusal("http2", Some("true")), "post-quantum is only supported with the quic transport");
        assert!(refusal("quic", Some("perhaps")).contains("could not parse"));
    }
}
