//! Generates broken, hostile and future input, for the tests of everything that reads it.
//!
//! The most telling input is nearly right, so that it passes the first checks: a good document with one part missing
//! or replaced by anything.

use proptest::collection::{hash_map, vec};
use proptest::option;
use proptest::prelude::*;
use serde_json::Value;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;

/// Planted where a secret belongs; no error text may hold it.
pub(crate) const SECRET: &str = "s3cret-of-the-test";

/// Any text: most of it short, some with control characters, some long.
pub(crate) fn text() -> impl Strategy<Value = String> {
    prop_oneof![
        4 => "\\PC{0,12}",
        3 => any::<String>(),
        1 => Just(String::new()),
        1 => Just("line\nERROR forged\u{1b}[31m".to_owned()),
        1 => Just("x".repeat(10_000)),
    ]
}

fn number() -> impl Strategy<Value = Value> {
    prop_oneof![
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        proptest::sample::select(vec![u64::MAX, i64::MAX as u64, u64::from(u32::MAX) + 1, 0]).prop_map(Value::from),
        proptest::sample::select(vec![i64::MIN, -1]).prop_map(Value::from),
        proptest::sample::select(vec![f64::MAX, f64::MIN_POSITIVE, -0.0, 1e19]).prop_map(Value::from),
    ]
}

/// Any JSON, a few levels deep.
pub(crate) fn json() -> impl Strategy<Value = Value> {
    let leaf =
        prop_oneof![Just(Value::Null), any::<bool>().prop_map(Value::from), number(), text().prop_map(Value::from)];
    leaf.prop_recursive(4, 24, 4, |inner| {
        prop_oneof![
            vec(inner.clone(), 0..4).prop_map(Value::from),
            hash_map(text(), inner, 0..4).prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

/// `good` unchanged, or with some of its parts replaced by anything or left out.
pub(crate) fn near(good: Value) -> impl Strategy<Value = Value> {
    let parts = count(&good);
    vec((0..parts, option::of(json())), 0..3).prop_map(move |changes| {
        let mut value = good.clone();
        for (at, part) in changes {
            replace(&mut value, &mut { at }, &part);
        }
        value
    })
}

/// A body: nearly good, any JSON, cut off, nested deeper than a stack can hold, with numbers that fit no type, or no
/// JSON at all.
pub(crate) fn body(good: Value) -> impl Strategy<Value = Vec<u8>> {
    let nearly = near(good.clone()).prop_map(|value| value.to_string().into_bytes());
    let cut = (near(good), any::<prop::sample::Index>()).prop_map(|(value, at)| {
        let mut text = value.to_string().into_bytes();
        text.truncate(at.index(text.len() + 1));
        text
    });
    let opening = proptest::sample::select(vec!["[", "{\"a\":", "{\"commands\":[", "{\"agent\":{\"x\":[["]);
    let deep = (opening, 0_usize..50_000).prop_map(|(opening, levels)| opening.repeat(levels).into_bytes());
    let huge = proptest::sample::select(vec!["1e999", "-1e999", "99999999999999999999999999", "0.0e-99999999", "-0"]);
    let huge = huge.prop_map(|number| format!("{{\"protocol_version\":{number},\"redeploys\":{number}}}").into_bytes());
    prop_oneof![
        8 => nearly,
        2 => json().prop_map(|value| value.to_string().into_bytes()),
        2 => cut,
        1 => deep,
        1 => huge,
        2 => vec(any::<u8>(), 0..300),
    ]
}

/// Returns the number of parts of a document, including itself.
fn count(value: &Value) -> usize {
    1 + match value {
        Value::Array(items) => items.iter().map(count).sum(),
        Value::Object(map) => map.values().map(count).sum(),
        _ => 0,
    }
}

/// Replaces or removes the part with this number. Returns whether the parent must remove `value`.
fn replace(value: &mut Value, at: &mut usize, part: &Option<Value>) -> bool {
    if *at == 0 {
        *at = usize::MAX;
        match part {
            Some(part) => value.clone_from(part),
            None => return true,
        }
        return false;
    }
    *at -= 1;
    match value {
        Value::Array(items) => items.retain_mut(|item| *at == usize::MAX || !replace(item, at, part)),
        Value::Object(map) => map.retain(|_, item| *at == usize::MAX || !replace(item, at, part)),
        _ => {}
    }
    false
}

/// Whether a text fits into one log line: no control characters, and limited in length.
pub(crate) fn is_one_line(text: &str) -> bool {
    !text.contains(char::is_control) && text.chars().count() <= 1000
}

/// The most that the buffers of both sockets hold beyond what was read.
pub(crate) const BUFFERS: usize = 12 << 20;

/// Answers each request with `head` and an endless body. Returns how much of it each client took before it hung up.
pub(crate) async fn endless(listener: TcpListener, head: &'static str, requests: usize) -> Vec<usize> {
    // One chunk of a chunked body. It also serves as a header, or as a body with a length.
    let chunk = format!("10000\r\n{}\r\n", "a".repeat(0x10000));
    let mut taken = Vec::new();
    for _ in 0..requests {
        let (mut stream, _) = listener.accept().await.unwrap();
        // The client would not read an answer that comes before its request.
        let _ = stream.read(&mut [0; 4096]).await.unwrap();
        stream.write_all(head.as_bytes()).await.unwrap();
        let mut sent = 0;
        while stream.write_all(chunk.as_bytes()).await.is_ok() {
            sent += chunk.len();
        }
        taken.push(sent);
    }
    taken
}

mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn each_part_of_a_document_can_be_replaced_or_left_out() {
        let good = json!({"a": [1, {"b": 2}], "c": "d"});
        assert_eq!(count(&good), 6);
        let changed = |at: usize, part: Option<Value>| {
            let mut value = good.clone();
            replace(&mut value, &mut { at }, &part);
            value
        };
        assert_eq!(changed(0, Some(json!(0))), json!(0));
        assert_eq!(changed(2, Some(json!(0))), json!({"a": [0, {"b": 2}], "c": "d"}));
        assert_eq!(changed(4, None), json!({"a": [1, {}], "c": "d"}));
        assert_eq!(changed(5, None), json!({"a": [1, {"b": 2}]}));
    }
}
