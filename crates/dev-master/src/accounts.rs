//! Cloudflare API calls that go through the master. Released masters have neither route; the double
//! serves them only when switched on.

use hyper::StatusCode;
use serde_json::{Value, json};

use crate::reply::Reply;
use crate::request::{Call, Route};
use crate::snapshot::PushedConfig;
use crate::state::State;

/// `GET /accounts`.
pub(crate) fn accounts(state: &State, call: &Call) -> Reply {
    match permitted(state, call) {
        Ok(account) => Reply::json(StatusCode::OK, &json!({ "success": true, "result": [{ "id": account }] })),
        Err(refusal) => refusal,
    }
}

/// `PUT /accounts/{account}/cfd_tunnel/{tunnel}/configurations`: stores the configuration as pushed.
pub(crate) fn configurations(state: &mut State, call: &Call, account: &str, tunnel: &str) -> Reply {
    match permitted(state, call) {
        Ok(known) if known == account => {}
        Ok(_) => return Reply::html(StatusCode::NOT_FOUND),
        Err(refusal) => return refusal,
    }
    let config = call.object().and_then(|body| body.get("config")).cloned().unwrap_or_default();
    if let Some(what) = flaw(&config) {
        state.journal.violation(Route::Accounts, tunnel, what);
        let errors = json!({ "success": false, "errors": [{ "code": 1056, "message": what }], "result": null });
        return Reply::json(StatusCode::BAD_REQUEST, &errors);
    }
    tracing::info!(tunnel, "tunnel configuration pushed");
    state.pushed.push(PushedConfig { account: account.to_owned(), tunnel: tunnel.to_owned(), config });
    Reply::json(StatusCode::OK, &json!({ "success": true, "result": { "tunnel_id": tunnel } }))
}

/// Returns the account if the routes are switched on and the key is active.
fn permitted(state: &State, call: &Call) -> Result<String, Reply> {
    let account = state.rules.account.clone().ok_or_else(|| Reply::html(StatusCode::NOT_FOUND))?;
    match state.active_key(call) {
        Some(_) => Ok(account),
        None => Err(Reply::message(StatusCode::UNAUTHORIZED, "unauthorized")),
    }
}

/// Returns why Cloudflare would refuse this configuration.
fn flaw(config: &Value) -> Option<&'static str> {
    let Some((last, rules)) = config["ingress"].as_array().and_then(|ingress| ingress.split_last()) else {
        return Some("config.ingress is not a list of rules");
    };
    let matches = |rule: &Value| rule["hostname"].is_string() || rule["path"].is_string();
    if !rules.iter().all(matches) {
        return Some("a rule before the last has neither hostname nor path");
    }
    if matches(last) {
        return Some("the last rule does not match everything");
    }
    rules.iter().chain([last]).any(|rule| !rule["service"].is_string()).then_some("a rule has no service")
}
