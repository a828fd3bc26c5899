//! Replies, before any fault damages them.

use hyper::StatusCode;
use serde_json::{Value, json};

/// The page with which a proxy in front of a master answers instead of JSON.
pub(crate) const HTML: &str = "<!doctype html><html><head><title>Sign in - Cloudflare Access</title></head>\
<body><h1>This is not the answer of a master</h1></body></html>\n";

/// One reply: status, headers beyond the usual ones, and body.
#[derive(Clone, Debug)]
pub(crate) struct Reply {
    pub(crate) status: StatusCode,
    pub(crate) headers: Vec<(&'static str, String)>,
    pub(crate) content_type: &'static str,
    pub(crate) body: String,
    /// The `code` of a version 2 reply, for the journal.
    pub(crate) code: Option<String>,
}

impl Reply {
    /// A JSON body. Its `code`, if any, is kept for the journal.
    pub(crate) fn json(status: StatusCode, body: &Value) -> Self {
        Self {
            status,
            headers: Vec::new(),
            content_type: "application/json",
            body: body.to_string(),
            code: body["code"].as_str().map(str::to_owned),
        }
    }

    /// The HTML of a proxy in between, or of a master that failed before it reached its own code.
    pub(crate) fn html(status: StatusCode) -> Self {
        Self { content_type: "text/html; charset=utf-8", body: HTML.to_owned(), ..Self::text(status, String::new()) }
    }

    /// Plain text, for people.
    pub(crate) fn text(status: StatusCode, body: String) -> Self {
        Self { status, headers: Vec::new(), content_type: "text/plain; charset=utf-8", body, code: None }
    }

    /// The redirect of Cloudflare Access to its login page.
    pub(crate) fn login() -> Self {
        let mut reply = Self::html(StatusCode::FOUND);
        let login = "https://team.cloudflareaccess.com/cdn-cgi/access/login";
        reply.headers.push(("location", login.to_owned()));
        reply
    }

    /// The version 1 form of a refusal: a message for people and no code.
    pub(crate) fn message(status: StatusCode, message: &str) -> Self {
        Self::json(status, &json!({ "status": "error", "message": message }))
    }

    /// The version 2 form of a success or a refusal: the code says everything.
    pub(crate) fn code(status: StatusCode, code: &str) -> Self {
        Self::json(status, &json!({ "status": outcome(status), "code": code }))
    }
}

/// The `status` member that a version 2 master sends with an HTTP status.
pub(crate) fn outcome(status: StatusCode) -> &'static str {
    if status.as_u16() < 400 { "success" } else { "error" }
}
