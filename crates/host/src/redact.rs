//! Keeps secrets out of a document that will be shown: removes the known words from all its texts.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use secrecy::{ExposeSecret, SecretString};
use serde_json::Value;

/// Shorter secrets occur in too many other words, and no key or token is that short.
const LEAST_SECRET_CHARS: usize = 6;

/// The words to remove: these secrets, each also in base64.
pub fn words(mut secrets: Vec<SecretString>) -> Vec<SecretString> {
    let encoded: Vec<SecretString> =
        secrets.iter().map(|secret| STANDARD.encode(secret.expose_secret()).into()).collect();
    secrets.extend(encoded);
    secrets.retain(|secret| secret.expose_secret().len() >= LEAST_SECRET_CHARS);
    // Remove a token before the secret that is part of it.
    secrets.sort_by_key(|secret| std::cmp::Reverse(secret.expose_secret().len()));
    secrets
}

/// Removes the words from every text of the document, keys included.
pub fn redact(value: &mut Value, words: &[SecretString]) {
    const HIDDEN: &str = "<redacted>";
    let clean =
        |text: &str| words.iter().fold(text.to_owned(), |text, word| text.replace(word.expose_secret(), HIDDEN));
    match value {
        Value::String(text) => *text = clean(text),
        Value::Array(values) => values.iter_mut().for_each(|value| redact(value, words)),
        Value::Object(members) => {
            let old = std::mem::take(members);
            for (key, mut value) in old {
                redact(&mut value, words);
                members.insert(clean(&key), value);
            }
        }
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_secret_is_taken_out_wherever_it_is_and_a_short_one_is_left() {
        let words = words(vec!["the-agent-key".into(), "abc".into(), "the-agent-key-and-more".into()]);
        let base64 = STANDARD.encode("the-agent-key");
        let mut document = json!({
            "log": ["abc", format!("key the-agent-key, {base64}"), "xthe-agent-key-and-morey"],
            "the-agent-key": { "n": 1 },
        });
        redact(&mut document, &words);
        let clean = json!({ "log": ["abc", "key <redacted>, <redacted>", "x<redacted>y"], "<redacted>": { "n": 1 } });
        assert_eq!(document, clean);
    }
}
