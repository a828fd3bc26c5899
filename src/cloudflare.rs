//! Pushes ingress rules to Cloudflare through the master, in cloudflared's terms and order, as the tunnel's
//! configuration.
//!
//! Released masters update the ingress themselves and have no such route. The agent logs that once; it is no failure.

use serde_json::{Map, Value, json};

use crate::master::{Master, MasterError};
use crate::state::TunnelId;

/// A master's rule fields and their names in `originRequest`.
const ORIGIN_REQUEST: [(&str, &str); 6] = [
    ("no_tls_verify", "noTLSVerify"),
    ("origin_server_name", "originServerName"),
    ("http_host_header", "httpHostHeader"),
    ("http2_origin", "http2Origin"),
    ("disable_chunked_encoding", "disableChunkedEncoding"),
    ("match_sni_to_host", "matchSNItoHost"),
];

/// The outcome of a push.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pushed {
    /// Cloudflare has the configuration, with this many rules before the last one.
    Accepted(usize),
    /// This master has no such route and updates the ingress itself.
    MasterDoesIt,
}

/// Converts the master's rules to a tunnel's ingress.
///
/// Only rules with `status: "active"` count. cloudflared takes the first rule that matches. So exact hosts come
/// before wildcards, longer wildcards before shorter ones, and on one host longer paths before shorter ones. The
/// rest of the order is alphabetical, so the same rules always make the same document. The last rule answers 404 to
/// everything else, because cloudflared requires a last rule without a hostname.
pub fn ingress(rules: &Map<String, Value>) -> Value {
    let mut active: Vec<&Map<String, Value>> = rules
        .values()
        .filter_map(Value::as_object)
        .filter(|rule| rule.get("status").and_then(Value::as_str) == Some("active"))
        .filter(|rule| !text(rule, "service").is_empty() && !text(rule, "hostname").is_empty())
        .collect();
    active.sort_by_key(|rule| {
        let (host, path) = (text(rule, "hostname"), text(rule, "path"));
        let (specific, length) = (!host.starts_with('*'), host.len());
        // Reversed where the larger value comes first.
        (
            !specific,
            if specific { 0 } else { usize::MAX - length },
            host,
            usize::MAX - path.len(),
            path,
            text(rule, "service"),
        )
    });
    let mut list: Vec<Value> = active
        .into_iter()
        .map(|rule| {
            let mut entry = json!({ "hostname": text(rule, "hostname"), "service": text(rule, "service") });
            if !text(rule, "path").is_empty() {
                entry["path"] = json!(text(rule, "path"));
            }
            let origin: Map<String, Value> = ORIGIN_REQUEST
                .iter()
                .filter_map(|(ours, theirs)| Some(((*theirs).to_owned(), rule.get(*ours)?.clone())))
                .filter(|(_, value)| !matches!(value, Value::Null | Value::Bool(false)) && *value != "")
                .collect();
            if !origin.is_empty() {
                entry["originRequest"] = Value::Object(origin);
            }
            entry
        })
        .collect();
    list.push(json!({ "service": "http_status:404" }));
    Value::Array(list)
}

fn text<'a>(rule: &'a Map<String, Value>, key: &str) -> &'a str {
    rule.get(key).and_then(Value::as_str).unwrap_or_default()
}

/// Pushes the rules as the configuration of `tunnel`, in the token's `account` if the master has several.
///
/// # Errors
/// Those of any request to the master. An empty list of accounts is [`MasterError::Unusable`]. A 404 is no error but
/// [`Pushed::MasterDoesIt`].
pub async fn push(
    master: &Master,
    account: Option<&str>,
    tunnel: &TunnelId,
    rules: &Map<String, Value>,
) -> Result<Pushed, MasterError> {
    let pushed = async {
        let accounts = master.accounts().await?;
        let listed = accounts.result.iter().filter(|_| accounts.success).map(|account| account.id.as_str());
        // Prefer the account in the token. A master with a single account has no choice anyway.
        let account = listed.clone().find(|id| Some(*id) == account).or_else(|| listed.clone().next());
        let nobody = || MasterError::Unusable { problem: "names no Cloudflare account".to_owned() };
        let account = account.ok_or_else(nobody)?;
        let ingress = ingress(rules);
        let count = ingress.as_array().map_or(0, |list| list.len().saturating_sub(1));
        master.put_configuration(account, &tunnel.0, &json!({ "config": { "ingress": ingress } })).await?;
        Ok::<_, MasterError>(Pushed::Accepted(count))
    };
    match pushed.await {
        Err(error) if error.status() == Some(404) => Ok(Pushed::MasterDoesIt),
        result => result,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(rules: Value) -> Value {
        ingress(rules.as_object().unwrap())
    }

    #[test]
    fn more_specific_rules_come_first_and_the_catch_all_last() {
        let rule =
            |host: &str, path: &str| json!({"hostname": host, "path": path, "service": "http://x", "status": "active"});
        let list = of(json!({
            "1": rule("*.example.com", ""), "2": rule("b.example.com", ""), "3": rule("a.example.com", "/long/path"),
            "4": rule("a.example.com", ""), "5": rule("*.dev.example.com", ""), "6": rule("a.example.com", "/l"),
        }));
        let order: Vec<_> = list
            .as_array()
            .unwrap()
            .iter()
            .map(|entry| {
                format!("{}{}", entry["hostname"].as_str().unwrap_or("-"), entry["path"].as_str().unwrap_or(""))
            })
            .collect();
        assert_eq!(
            order,
            [
                "a.example.com/long/path",
                "a.example.com/l",
                "a.example.com",
                "b.example.com",
                "*.dev.example.com",
                "*.example.com",
                "-"
            ]
        );
        assert_eq!(list[6], json!({"service": "http_status:404"}));
    }

    #[test]
    fn only_active_rules_count() {
        let list = of(json!({
            "a": {"hostname": "a", "service": "http://a", "status": "pending_deletion"},
            "b": {"hostname": "b", "service": "http://b", "status": "active"},
            "c": {"hostname": "c", "status": "active"}, "d": "nonsense",
        }));
        assert_eq!(list, json!([{"hostname": "b", "service": "http://b"}, {"service": "http_status:404"}]));
    }

    #[test]
    fn origin_settings_take_cloudflared_names_where_the_rule_says_so() {
        let list = of(json!({"a": {
            "hostname": "a", "service": "https://a", "status": "active", "no_tls_verify": true, "http2_origin": false,
            "origin_server_name": "inner", "http_host_header": "", "disable_chunked_encoding": null, "match_sni_to_host": true,
        }}));
        let origin = json!({"noTLSVerify": true, "originServerName": "inner", "matchSNItoHost": true});
        assert_eq!(list[0]["originRequest"], origin);
    }

    #[test]
    fn the_order_does_not_depend_on_the_names_of_the_rules() {
        let one = json!({"hostname": "a", "service": "http://1", "status": "active"});
        let two = json!({"hostname": "b", "service": "http://2", "status": "active"});
        assert_eq!(of(json!({"x": one, "y": two})), of(json!({"x": two, "y": one})));
    }
}
