//! What the files hold: identity, desired state, tombstone. Names and keys are the Python agent's.

use std::fmt;

use base64::Engine as _;
use base64::engine::DecodePaddingMode;
use base64::engine::general_purpose::{GeneralPurpose, GeneralPurposeConfig};
use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Name of this agent at its master: 1 to 128 letters, digits, `_`, `.` or `-`, safe in a URL path.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct AgentId(String);

impl AgentId {
    /// The id as it is written on the wire.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for AgentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl TryFrom<String> for AgentId {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        if is_id(&text) { Ok(Self(text)) } else { Err("is not 1 to 128 letters, digits, '_', '.' or '-'") }
    }
}

/// The shape of all ids: safe in a path, a label and a log, and of a length that all who are told it take.
fn is_id(text: &str) -> bool {
    (1..=128).contains(&text.len())
        && text.starts_with(|c: char| c.is_ascii_alphanumeric())
        && text.chars().all(|c| c.is_ascii_alphanumeric() || "_.-".contains(c))
}

impl<'de> Deserialize<'de> for AgentId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::try_from(String::deserialize(deserializer)?).map_err(serde::de::Error::custom)
    }
}

/// Id of a Cloudflare tunnel. A UUID in practice, and cloudflared takes nothing else; here it only must have the shape
/// of an id, since a token that is refused for nothing is worse than one that cloudflared refuses.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct TunnelId(pub String);

impl TunnelId {
    /// Reads an id, without the white space around it.
    ///
    /// # Errors
    /// What is wrong with it, without its content.
    pub fn read(text: &str) -> Result<Self, &'static str> {
        let text = text.trim();
        if is_id(text) { Ok(Self(text.to_owned())) } else { Err("is not 1 to 128 letters, digits, '_', '.' or '-'") }
    }
}

impl<'de> Deserialize<'de> for TunnelId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        // What an earlier version stored is not thrown away for its shape.
        Ok(Self(String::deserialize(deserializer)?.trim().to_owned()))
    }
}

impl fmt::Display for TunnelId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A connector token: whoever has it can serve the tunnel's hostnames. Hidden from `Debug`.
#[derive(Debug, Clone)]
pub struct Token(SecretString);

/// Several times as long as Cloudflare's.
const MOST_TOKEN: usize = 4096;

/// What a token says of itself, without its secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenClaims {
    /// Cloudflare account that owns the tunnel.
    pub account: String,
    /// The tunnel.
    pub tunnel: TunnelId,
}

impl Token {
    /// Takes a token as it came, without the white space around it; [`Token::claims`] tells whether it is one.
    pub fn new(text: impl AsRef<str>) -> Self {
        Self(SecretString::from(text.as_ref().trim()))
    }

    /// The token itself, for the container's environment and the state file only.
    pub fn expose(&self) -> &str {
        self.0.expose_secret()
    }

    /// The secret inside the token, to look for where it must not be; `None` when it cannot be decoded.
    pub(crate) fn secret(&self) -> Option<SecretString> {
        self.decode().ok().map(|(_, secret)| secret)
    }

    /// Decodes the token: base64 of a JSON object with the strings `a` (account), `t` (tunnel) and `s` (secret). The
    /// one check of a token, for what a master sends as for what the socket proxy lets through.
    ///
    /// # Errors
    /// What is wrong, without any of the content.
    pub fn claims(&self) -> Result<TokenClaims, &'static str> {
        self.decode().map(|(claims, _)| claims)
    }

    fn decode(&self) -> Result<(TokenClaims, SecretString), &'static str> {
        #[derive(Deserialize)]
        struct Claims {
            a: String,
            t: String,
            s: String,
        }
        const BASE64: GeneralPurpose = GeneralPurpose::new(
            &base64::alphabet::STANDARD,
            GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
        );
        if self.expose().len() > MOST_TOKEN {
            return Err("the token is longer than 4096 bytes");
        }
        // No eye sees it, and it is no white space.
        if self.expose().contains('\u{feff}') {
            return Err("the token has a byte order mark (U+FEFF, which no editor shows) in it");
        }
        let json = BASE64.decode(self.expose()).map_err(|_| "the token is not base64")?;
        let claims: Claims = serde_json::from_slice(&json)
            .map_err(|_| "the token does not hold the three strings a (account), t (tunnel) and s (secret)")?;
        let secret = SecretString::from(claims.s);
        if claims.a.is_empty() || claims.t.is_empty() || secret.expose_secret().is_empty() {
            return Err("the token has an empty account, tunnel or secret");
        }
        if !is_id(&claims.a) || !is_id(&claims.t) {
            return Err("the token's account or tunnel is not 1 to 128 letters, digits, '_', '.' or '-'");
        }
        Ok((TokenClaims { account: claims.a, tunnel: TunnelId(claims.t) }, secret))
    }
}

impl PartialEq for Token {
    fn eq(&self, other: &Self) -> bool {
        self.expose() == other.expose()
    }
}

/// What the master wants of the tunnel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DesiredState {
    /// A connector runs.
    Running,
    /// No connector runs.
    Stopped,
    /// Nothing was said yet: what runs is left alone.
    #[default]
    Unknown,
}

/// `tunnel_state.json`: the desired state of the tunnel, and what of it is still to be done.
///
/// `token`, `id`, `name` and `desired_state` are the Python agent's; it ignores the rest.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct TunnelState {
    /// The connector's token.
    #[serde(default, serialize_with = "expose_token", deserialize_with = "take_token")]
    pub token: Option<Token>,
    /// The tunnel's id.
    #[serde(default)]
    pub id: Option<TunnelId>,
    /// The tunnel's name, for people.
    #[serde(default)]
    pub name: Option<String>,
    /// What the master wants.
    #[serde(default)]
    pub desired_state: DesiredState,
    /// How many times the master asked for a new container. The container carries the number it was made for,
    /// so that a crash between asking and doing neither skips nor repeats it.
    #[serde(default)]
    pub redeploys: u64,
    /// The master did not know this agent when it was last asked, and has given it no tunnel since: one of the two
    /// signs that the host was removed.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub unclaimed: bool,
    /// The ids that this agent had at its masters when it was given tunnels, the present one last: what its containers
    /// are marked with, and know it by after it got another one.
    #[serde(default, skip_serializing_if = "Vec::is_empty", deserialize_with = "known_ids")]
    pub owners: Vec<AgentId>,
    /// Ingress rules that were delivered and not yet accepted by Cloudflare, as the master sent them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pending_ingress: Option<serde_json::Value>,
    /// Keys of others, kept as they are.
    #[serde(flatten)]
    pub other: serde_json::Map<String, serde_json::Value>,
}

impl TunnelState {
    /// What is left when the tunnel is forgotten: that there is none, and what is not about it.
    pub(crate) fn forgotten(&self) -> Self {
        let (redeploys, owners, other) = (self.redeploys, self.owners.clone(), self.other.clone());
        Self { desired_state: DesiredState::Stopped, redeploys, owners, other, ..Self::default() }
    }

    /// Makes this the id that containers are marked with from now on.
    pub(crate) fn be(&mut self, id: &AgentId) {
        self.owners.retain(|known| known != id);
        self.owners.push(id.clone());
        let surplus = self.owners.len().saturating_sub(MOST_OWNERS);
        self.owners.drain(..surplus);
    }
}

/// Ids that are remembered: a new one comes with a new key.
const MOST_OWNERS: usize = 16;

/// One that is none is left out: it would take the whole file with it.
fn known_ids<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<AgentId>, D::Error> {
    let given = serde_json::Value::deserialize(deserializer)?;
    let given = given.as_array().into_iter().flatten().filter_map(|id| id.as_str());
    Ok(given.filter_map(|id| AgentId::try_from(id.to_owned()).ok()).collect())
}

fn expose_token<S: Serializer>(token: &Option<Token>, serializer: S) -> Result<S::Ok, S::Error> {
    token.as_ref().map(Token::expose).serialize(serializer)
}

fn take_token<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Token>, D::Error> {
    Ok(Option::<String>::deserialize(deserializer)?.filter(|text| !text.is_empty()).map(Token::new))
}

/// How far a decommission has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// The tunnel is stopped; the master decides whether to go on.
    Prepared,
    /// The agent is no longer one of the master's.
    Finalized,
}

/// `decommission.json`: this agent was told to leave, by which operation, and how far that came.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Tombstone {
    /// Always 1.
    pub schema_version: u32,
    /// The master's operation.
    pub operation_id: String,
    /// The agent that was told.
    pub agent_id: AgentId,
    /// How far it came.
    pub phase: Phase,
    /// Always `stop`.
    pub requested_self_action: String,
    /// When the first phase was written, RFC 3339.
    pub prepared_at: Option<String>,
    /// When the second was.
    pub finalized_at: Option<String>,
    /// Whether the master has taken the last acknowledgement. Absent in files of the Python agent, which then
    /// count as acknowledged.
    #[serde(default = "yes")]
    pub acknowledged: bool,
}

/// `reported.json`: what the master may believe to run here. Kept only while a report may go without something, since
/// the rules of what is missing in one are removed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reported {
    /// The agent that told it.
    pub agent_id: String,
    /// Ids of the containers, with their names.
    pub containers: std::collections::BTreeMap<String, String>,
}

fn yes() -> bool {
    true
}
