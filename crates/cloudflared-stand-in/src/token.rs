//! The tunnel token: base64 of `{"a": account, "t": tunnel, "s": secret}`.

use anyhow::{Context, Result, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};

/// Prefix of the behavior words in a secret.
const MARKER: &str = "stand-in:";

/// A token's content. `Debug` hides the secret.
#[derive(Clone, Serialize, Deserialize)]
pub struct Token {
    #[serde(rename = "a")]
    account: String,
    #[serde(rename = "t")]
    tunnel: String,
    #[serde(rename = "s")]
    secret: String,
}

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Token").field("tunnel", &self.tunnel).finish_non_exhaustive()
    }
}

impl Token {
    /// Parses the value of `TUNNEL_TOKEN`.
    ///
    /// # Errors
    /// When it is not base64 of a JSON object with the three texts, none of them empty. The error does not repeat the
    /// token.
    pub fn parse(text: &str) -> Result<Self> {
        let json = STANDARD.decode(text.trim()).ok().context("not base64")?;
        let token: Self = serde_json::from_slice(&json).ok().context("not the expected JSON")?;
        ensure!(!token.account.is_empty() && !token.tunnel.is_empty() && !token.secret.is_empty(), "an empty part");
        Ok(token)
    }

    /// Makes the text of a token whose bearer behaves as `words` say (see the crate's table): for example `unready`, or
    /// `ready-after=500 connections=2`. Without words, the tunnel is healthy.
    #[must_use]
    pub fn scripted(tunnel: &str, words: &str) -> String {
        let token = Self {
            account: format!("{:032x}", fastrand::u128(..)),
            tunnel: tunnel.to_owned(),
            // The nonce makes two tokens with the same words differ, as real tokens do.
            secret: STANDARD.encode(format!("{MARKER} {words} nonce={:016x}", fastrand::u64(..))),
        };
        STANDARD.encode(serde_json::json!(token).to_string())
    }

    /// The tunnel's id; the only part that may be shown.
    #[must_use]
    pub fn tunnel(&self) -> &str {
        &self.tunnel
    }

    /// The behavior words in the secret, as pairs for [`Script`](crate::script::Script). Empty for a token without
    /// words for the stand-in.
    #[must_use]
    pub fn words(&self) -> Vec<(String, String)> {
        let secret = STANDARD.decode(&self.secret).ok().and_then(|bytes| String::from_utf8(bytes).ok());
        let words = secret.as_deref().and_then(|text| text.strip_prefix(MARKER)).unwrap_or_default();
        words
            .split_whitespace()
            .map(|word| word.split_once('=').unwrap_or((word, "true")))
            .filter(|(word, _)| *word != "nonce")
            .map(|(word, value)| (word.to_owned(), value.to_owned()))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scripted_token_is_read_back() {
        let token = Token::parse(&Token::scripted("edge-1", "unready drain=50")).expect("token");
        assert_eq!(token.tunnel(), "edge-1");
        assert_eq!(token.words(), [("unready".into(), "true".into()), ("drain".into(), "50".into())]);
        assert_ne!(Token::scripted("edge-1", ""), Token::scripted("edge-1", ""));
    }

    #[test]
    fn an_ordinary_secret_holds_no_words() {
        let json = r#"{"a":"acc","t":"tun","s":"c29tZSBzZWNyZXQgYnl0ZXM="}"#;
        assert!(Token::parse(&STANDARD.encode(json)).expect("token").words().is_empty());
    }

    #[test]
    fn refuses_what_is_no_token_without_repeating_it() {
        let not_tokens = ["", "hunter2", "e30=", &STANDARD.encode(r#"{"a":"x","t":"y","s":7}"#)];
        for text in not_tokens {
            let error = format!("{:#}", Token::parse(text).expect_err(text));
            assert!(text.is_empty() || !error.contains(text), "{error}");
        }
    }
}
