//! What the files hold: identity, desired state, tombstone. Names and keys are the Python agent's.

use std::fmt;

use base64::Engine as _;
use base64::engine::DecodePaddingMode;
use base64::engine::general_purpose::{GeneralPurpose, GeneralPurposeConfig};
use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// The agent's id at its master: 1 to 128 letters, digits, `_`, `.` or `-`, safe in a URL path.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct AgentId(String);

impl AgentId {
    /// The id as sent to the master.
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

/// The form of every id: safe in a path, a label and a log, and short enough for everything that receives it.
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

/// Id of a Cloudflare tunnel. In practice a UUID, and cloudflared accepts nothing else. The agent only checks the form
/// of an id: wrongly refusing a token would be worse than passing on one that cloudflared refuses.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct TunnelId(pub String);

impl TunnelId {
    /// Reads an id and trims it.
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
        // Keep what an earlier version stored, whatever its form.
        Ok(Self(String::deserialize(deserializer)?.trim().to_owned()))
    }
}

impl fmt::Display for TunnelId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A connector token. Anyone who has it can serve the tunnel's hostnames. Hidden from `Debug`.
#[derive(Debug, Clone)]
pub struct Token(SecretString);

/// Maximum length in bytes, several times that of Cloudflare's tokens.
const MOST_TOKEN: usize = 4096;

/// What a token says about itself, without its secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenClaims {
    /// Cloudflare account that owns the tunnel.
    pub account: String,
    /// The tunnel.
    pub tunnel: TunnelId,
}

impl Token {
    /// Takes a token as received and trims it; [`Token::claims`] validates it.
    pub fn new(text: impl AsRef<str>) -> Self {
        Self(SecretString::from(text.as_ref().trim()))
    }

    /// The token itself. Use it only for the container's environment and the state file.
    pub fn expose(&self) -> &str {
        self.0.expose_secret()
    }

    /// The secret inside the token, to search for where it must not appear; `None` if the token cannot be decoded.
    pub(crate) fn secret(&self) -> Option<SecretString> {
        self.decode().ok().map(|(_, secret)| secret)
    }

    /// Decodes the token: base64 of a JSON object with the strings `a` (account), `t` (tunnel) and `s` (secret). This
    /// is the only validation of tokens, used for those a master sends and for those the socket proxy lets through.
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
        // Invisible in an editor, and `trim` does not remove it.
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

/// The tunnel state that the master asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DesiredState {
    /// A connector runs.
    Running,
    /// No connector runs.
    Stopped,
    /// The master has not said yet: leave what runs alone.
    #[default]
    Unknown,
}

/// `tunnel_state.json`: the desired state of the tunnel, and what remains to be done for it.
///
/// `token`, `id`, `name` and `desired_state` are the Python agent's keys; it ignores the others.
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
    /// The state that the master asks for.
    #[serde(default)]
    pub desired_state: DesiredState,
    /// How many times the master asked for a new container. Each container carries the number it was created for, so a
    /// crash in between neither skips nor repeats a redeploy.
    #[serde(default)]
    pub redeploys: u64,
    /// When last asked, the master did not know this agent, and it has assigned no tunnel since. One of the two signs
    /// that the host was removed.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub unclaimed: bool,
    /// The ids under which this agent was assigned tunnels, the current one last. The agent's containers are labelled
    /// with them, so it still recognizes them after it gets a new id.
    #[serde(default, skip_serializing_if = "Vec::is_empty", deserialize_with = "known_ids")]
    pub owners: Vec<AgentId>,
    /// Ingress rules that the master delivered and Cloudflare has not accepted yet, as the master sent them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pending_ingress: Option<serde_json::Value>,
    /// Unknown keys, kept as they are.
    #[serde(flatten)]
    pub other: serde_json::Map<String, serde_json::Value>,
}

impl TunnelState {
    /// What remains once the tunnel is forgotten: desired state stopped, and everything that is not about the tunnel.
    pub(crate) fn forgotten(&self) -> Self {
        let (redeploys, owners, other) = (self.redeploys, self.owners.clone(), self.other.clone());
        Self { desired_state: DesiredState::Stopped, redeploys, owners, other, ..Self::default() }
    }

    /// Makes this the id that new containers are labelled with.
    pub(crate) fn be(&mut self, id: &AgentId) {
        self.owners.retain(|known| known != id);
        self.owners.push(id.clone());
        let surplus = self.owners.len().saturating_sub(MOST_OWNERS);
        self.owners.drain(..surplus);
    }
}

/// Maximum number of ids to remember. A new id comes only with a new key.
const MOST_OWNERS: usize = 16;

/// Skips an invalid id. An error would discard the whole file.
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

/// The phase of a decommission.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// The tunnel is stopped; the master decides whether to go on.
    Prepared,
    /// The agent no longer belongs to the master.
    Finalized,
}

/// `decommission.json`: the master decommissioned this agent, by which operation, and how far that got.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Tombstone {
    /// Always 1.
    pub schema_version: u32,
    /// The id of the master's operation.
    pub operation_id: String,
    /// The agent that was decommissioned.
    pub agent_id: AgentId,
    /// How far the operation got.
    pub phase: Phase,
    /// Always `stop`.
    pub requested_self_action: String,
    /// When the first phase was recorded, RFC 3339.
    pub prepared_at: Option<String>,
    /// When the second phase was recorded.
    pub finalized_at: Option<String>,
    /// Whether the master has accepted the last acknowledgement. The Python agent's files lack this key and count as
    /// acknowledged.
    #[serde(default = "yes")]
    pub acknowledged: bool,
}

/// `reported.json`: the containers that the master may believe run here. Kept only while a report may be incomplete,
/// since the master removes the rules of containers that a report leaves out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reported {
    /// The agent that reported them.
    pub agent_id: String,
    /// Ids of the containers, with their names.
    pub containers: std::collections::BTreeMap<String, String>,
}

fn yes() -> bool {
    true
}
