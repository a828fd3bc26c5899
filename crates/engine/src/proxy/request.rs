//! Reads the head of a request strictly: there is one way to write each thing, and anything else is refused.
//!
//! None of the bytes read here are passed on, so what is refused is less a danger than an ambiguity: a request that two
//! programs could read in two ways gets no service.

use std::collections::BTreeMap;

/// Why a request is refused. The names are stable and hold nothing that the client sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Refusal {
    /// HTTP status of the answer.
    pub status: u16,
    /// Template of the route, or `-` if it is unknown.
    pub route: &'static str,
    /// Name of the rule.
    pub rule: &'static str,
}

impl Refusal {
    /// A refusal of a request that is not proper HTTP.
    pub const fn http(rule: &'static str) -> Self {
        Self { status: 400, route: "-", rule }
    }
}

/// The HTTP method.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    /// `GET`
    Get,
    /// `HEAD`
    Head,
    /// `POST`
    Post,
    /// `DELETE`
    Delete,
}

/// A request without its body.
#[derive(Debug, PartialEq, Eq)]
pub struct Head {
    /// The HTTP method.
    pub method: Method,
    /// The path without its version: at least one segment, none of them empty, plain bytes only.
    pub path: Vec<String>,
    /// The query, decoded. No key occurs twice.
    pub query: BTreeMap<String, String>,
    /// Length of the body in bytes.
    pub length: usize,
}

/// Most bytes of a head. One with the filters of a listing has a few hundred.
pub const MOST_HEAD: usize = 16 << 10;
/// Most bytes of a body. A create call with a token has about two thousand.
pub const MOST_BODY: usize = 64 << 10;
const MOST_HEADERS: usize = 32;

/// Headers that would change the meaning of the request, or how to read it.
const REFUSED_HEADERS: [(&str, &str); 11] = [
    ("transfer-encoding", "header_transfer_encoding"),
    ("expect", "header_expect"),
    ("upgrade", "header_upgrade"),
    ("http2-settings", "header_upgrade"),
    ("te", "header_te"),
    ("trailer", "header_trailer"),
    ("content-encoding", "header_content_encoding"),
    ("range", "header_range"),
    ("x-http-method-override", "header_method_override"),
    ("x-registry-auth", "header_registry_auth"),
    ("x-registry-config", "header_registry_auth"),
];

impl Head {
    /// Reads a head, from its first byte to the empty line that ends it.
    ///
    /// # Errors
    /// The rule that the head breaks.
    pub fn read(bytes: &[u8]) -> Result<Self, Refusal> {
        plain(bytes)?;
        let mut headers = [httparse::EMPTY_HEADER; MOST_HEADERS];
        let mut request = httparse::Request::new(&mut headers);
        match request.parse(bytes) {
            Ok(httparse::Status::Complete(length)) if length == bytes.len() => {}
            Err(httparse::Error::TooManyHeaders) => {
                return Err(Refusal { status: 431, ..Refusal::http("head_length") });
            }
            Err(httparse::Error::Version) => return Err(Refusal { status: 505, ..Refusal::http("http_version") }),
            _ => return Err(Refusal::http("head_malformed")),
        }
        if request.version != Some(1) {
            return Err(Refusal { status: 505, ..Refusal::http("http_version") });
        }
        let method = match request.method {
            Some("GET") => Method::Get,
            Some("HEAD") => Method::Head,
            Some("POST") => Method::Post,
            Some("DELETE") => Method::Delete,
            _ => return Err(Refusal { status: 403, ..Refusal::http("method") }),
        };
        let length = body_length(request.headers)?;
        let (path, query) = target(request.path.unwrap_or_default())?;
        Ok(Self { method, path, query, length })
    }
}

/// Accepts only printable characters, in lines that each end in CR LF. The first line begins with a method.
fn plain(bytes: &[u8]) -> Result<(), Refusal> {
    let odd = Err(Refusal::http("head_bytes"));
    if !bytes.first().is_some_and(u8::is_ascii_uppercase) {
        return odd;
    }
    let mut last = b' ';
    for &byte in bytes {
        let fits = match byte {
            b'\n' => last == b'\r',
            _ if last == b'\r' => false,
            b'\r' | b'\t' | b' '..=b'~' => true,
            _ => false,
        };
        if !fits {
            return odd;
        }
        last = byte;
    }
    Ok(())
}

fn body_length(headers: &[httparse::Header<'_>]) -> Result<usize, Refusal> {
    let (mut hosts, mut types, mut lengths) = (0, 0, Vec::new());
    for header in headers {
        let name = header.name.to_ascii_lowercase();
        let value = std::str::from_utf8(header.value).map_err(|_| Refusal::http("head_bytes"))?;
        if let Some((_, rule)) = REFUSED_HEADERS.iter().find(|(refused, _)| *refused == name) {
            return Err(Refusal::http(rule));
        }
        match name.as_str() {
            "host" => hosts += 1,
            "connection" if !["close", "keep-alive"].iter().any(|word| word.eq_ignore_ascii_case(value)) => {
                return Err(Refusal::http("header_connection"));
            }
            "content-type" => {
                types += 1;
                if value != "application/json" {
                    return Err(Refusal::http("header_content_type"));
                }
            }
            "content-length" => lengths.push(value),
            _ => {}
        }
    }
    if hosts != 1 {
        return Err(Refusal::http("header_host"));
    }
    let length = match lengths[..] {
        [] => 0,
        [text] => {
            let fits = text == "0" || (text.bytes().all(|byte| byte.is_ascii_digit()) && !text.starts_with('0'));
            let length = text.parse::<usize>().ok().filter(|_| fits);
            length.ok_or(Refusal::http("header_content_length"))?
        }
        _ => return Err(Refusal::http("header_content_length")),
    };
    if length > MOST_BODY {
        return Err(Refusal { status: 413, ..Refusal::http("body_length") });
    }
    match types {
        0 if length > 0 => Err(Refusal::http("header_content_type")),
        0 | 1 => Ok(length),
        _ => Err(Refusal::http("header_content_type")),
    }
}

fn target(target: &str) -> Result<(Vec<String>, BTreeMap<String, String>), Refusal> {
    if !target.starts_with('/') {
        return Err(Refusal::http("target_form"));
    }
    let (path, query) = target.split_once('?').map_or((target, None), |(path, query)| (path, Some(query)));
    if !path.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_.:@/-".contains(&byte)) {
        return Err(Refusal::http("path_bytes"));
    }
    let mut segments: Vec<_> = path.split('/').skip(1).map(str::to_owned).collect();
    if segments.iter().any(|segment| ["", ".", ".."].contains(&segment.as_str())) {
        return Err(Refusal::http("path_segments"));
    }
    if segments.first().is_some_and(|first| is_like_version(first)) {
        if !is_version(&segments.remove(0)) {
            return Err(Refusal::http("api_version"));
        }
        if segments.is_empty() {
            return Err(Refusal::http("path_segments"));
        }
    }
    Ok((segments, query.map_or_else(|| Ok(BTreeMap::new()), read_query)?))
}

fn is_like_version(segment: &str) -> bool {
    let mut bytes = segment.bytes();
    matches!(bytes.next(), Some(b'v' | b'V')) && bytes.next().is_none_or(|byte| !byte.is_ascii_alphabetic())
}

/// Versions before 1.24 read a body where none belongs.
fn is_version(segment: &str) -> bool {
    let minor = segment.strip_prefix("v1.").filter(|minor| minor.len() == 2);
    minor.is_some_and(|minor| minor.bytes().all(|byte| byte.is_ascii_digit()) && minor >= "24")
}

/// `key=value` pairs, the values form-encoded, the keys plain.
fn read_query(text: &str) -> Result<BTreeMap<String, String>, Refusal> {
    let odd = Refusal::http("query_malformed");
    let mut query = BTreeMap::new();
    // The agent's Docker client may send a bare question mark.
    for pair in text.split('&').filter(|_| !text.is_empty()) {
        let (key, value) = pair.split_once('=').ok_or(odd)?;
        if key.is_empty() || !key.bytes().all(|byte| byte.is_ascii_alphabetic()) {
            return Err(odd);
        }
        let value = decode(value).ok_or(odd)?;
        if query.insert(key.to_owned(), value).is_some() {
            return Err(Refusal::http("query_duplicate"));
        }
    }
    Ok(query)
}

/// Decodes a form-encoded value of printable characters.
fn decode(value: &str) -> Option<String> {
    let mut bytes = value.bytes();
    let mut text = String::new();
    while let Some(byte) = bytes.next() {
        let byte = match byte {
            b'+' => b' ',
            b'%' => {
                let digits = [bytes.next()?, bytes.next()?];
                if !digits.iter().all(u8::is_ascii_hexdigit) {
                    return None;
                }
                u8::from_str_radix(std::str::from_utf8(&digits).ok()?, 16).ok()?
            }
            // Delimiters, and characters that an encoder would have encoded.
            b'=' | b'?' | b'#' | b';' => return None,
            other => other,
        };
        if !(b' '..=b'~').contains(&byte) {
            return None;
        }
        text.push(char::from(byte));
    }
    Some(text)
}
