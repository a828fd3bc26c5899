//! The operator's routes: a real master's, under `/api/v2/agents` and `/api/v2/overview`, and the double's
//! own, under `/_dev`. All but the page require the master key.

use hyper::{Method, StatusCode};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::fault::{Fault, Times};
use crate::operate::{self, Refusal};
use crate::page;
use crate::reply::Reply;
use crate::request::{Call, Payload, Route};
use crate::state::{Protocol, Shared, State};

/// Answers an operator's request.
pub(crate) fn handle(shared: &Shared, call: &Call, segments: &[String]) -> Reply {
    let segments: Vec<&str> = segments.iter().map(String::as_str).collect();
    if segments == [""] {
        return page::page(&shared.look());
    }
    if call.key.as_deref() != Some(&shared.settings.master_key) {
        return Reply::message(StatusCode::UNAUTHORIZED, "unauthorized");
    }
    let answered = shared.change(|state| match segments.as_slice() {
        ["_dev", rest @ ..] => development(state, call, rest),
        ["api", "v2", "agents"] => Ok(list(state)),
        ["api", "v2", "overview"] => Ok(overview(state)),
        ["api", "v2", "agents", "generate-key"] => generate_key(state, call),
        ["api", "v2", "agents", "revoke-key"] => revoke_key(state, call),
        ["api", "v2", "agents", agent, act] => on_agent(state, call, agent, act),
        _ => Err(Reply::message(StatusCode::NOT_FOUND, "not found")),
    });
    answered.unwrap_or_else(|refusal| refusal)
}

/// `GET /api/v2/agents`.
fn list(state: &State) -> Reply {
    let keys = state.keys.values().map(|key| {
        json!({
            "owner": key.owner,
            "created_at": key.created_at,
            "status": if key.revoked { "revoked" } else { "active" },
            "bound_agent_id": key.agent,
        })
    });
    let keys: Vec<Value> = keys.collect();
    Reply::json(StatusCode::OK, &json!({ "agents": state.snapshot().agents, "agent_keys": keys }))
}

/// `GET /api/v2/overview`: what the Agents page reads. A tunnel status carries the status, the name and the version.
/// Cloudflare's status replaces the agent's once the master knows it.
fn overview(state: &State) -> Reply {
    let agents = state.snapshot().agents.into_iter().map(|(id, agent)| {
        let own = agent.tunnel_status.as_ref();
        let status = json!({
            "status": agent.page_state(),
            "name": own.and_then(|own| own.name.as_deref()),
            "version": own.and_then(|own| own.version.as_deref()),
        });
        let (name, tunnel, online) = (&agent.display_name, &agent.tunnel, agent.online);
        let shown = json!({ "display_name": name, "status": agent.status, "online": online, "tunnel": tunnel,
            "tunnel_status": if agent.page_state().is_some() { status } else { Value::Null } });
        (id, shown)
    });
    Reply::json(StatusCode::OK, &json!({ "agents": agents.collect::<serde_json::Map<_, _>>() }))
}

/// `POST /api/v2/agents/generate-key {"owner"}`.
fn generate_key(state: &mut State, call: &Call) -> Result<Reply, Reply> {
    #[derive(Deserialize)]
    struct Wish {
        #[serde(default)]
        owner: Option<String>,
    }
    let owner = body::<Wish>(call)?.owner.unwrap_or_default();
    let key = operate::generate_key(state, &owner);
    let meta = json!({ "owner": owner, "status": "active", "last_used_at": null, "bound_agent_id": null });
    Ok(Reply::json(StatusCode::CREATED, &json!({ "status": "success", "key": key, "meta": meta })))
}

/// `POST /api/v2/agents/revoke-key {"key"}`.
fn revoke_key(state: &mut State, call: &Call) -> Result<Reply, Reply> {
    #[derive(Deserialize)]
    struct Wish {
        key: String,
    }
    let affected = operate::revoke_key(state, &body::<Wish>(call)?.key).map_err(refused)?;
    Ok(done(json!({ "message": "Key revoked.", "affected_agents": affected })))
}

/// `POST /api/v2/agents/{id}/…`.
fn on_agent(state: &mut State, call: &Call, agent: &str, act: &str) -> Result<Reply, Reply> {
    #[derive(Deserialize)]
    struct Enroll {
        tunnel_name: String,
    }
    #[derive(Deserialize)]
    struct Rename {
        display_name: String,
    }
    match act {
        "enroll" => {
            let name = body::<Enroll>(call)?.tunnel_name;
            let command = operate::enroll(state, agent, &name).map_err(refused)?;
            Ok(done(json!({ "message": "Agent enrolled and command queued.", "command": command.to_json() })))
        }
        "redeploy-tunnel" => {
            operate::redeploy(state, agent).map_err(refused)?;
            Ok(done(json!({ "message": "Tunnel redeploy command queued successfully." })))
        }
        "roll-key" => {
            let key = operate::roll_key(state, agent).map_err(refused)?;
            Ok(done(json!({ "new_key": key })))
        }
        "rename" => {
            operate::rename(state, agent, &body::<Rename>(call)?.display_name).map_err(refused)?;
            Ok(done(json!({ "message": "Agent renamed successfully." })))
        }
        "remove" => match operate::remove(state, agent).map_err(refused)? {
            None => Ok(done(json!({ "message": format!("Agent {agent} removed successfully.") }))),
            Some(operation) => {
                let reply = json!({ "status": "accepted", "operation_id": operation });
                Ok(Reply::json(StatusCode::ACCEPTED, &reply))
            }
        },
        _ => Err(Reply::message(StatusCode::NOT_FOUND, "not found")),
    }
}

/// `/_dev/…`: routes that no real master has.
fn development(state: &mut State, call: &Call, rest: &[&str]) -> Result<Reply, Reply> {
    #[derive(Deserialize)]
    struct NewFault {
        route: Route,
        fault: Fault,
        /// Acts only on bodies that contain this text.
        containing: Option<String>,
        /// How many requests the fault acts on; if absent, every request until the faults are cleared.
        times: Option<u32>,
    }
    #[derive(Deserialize)]
    struct Commands {
        commands: Vec<Value>,
    }
    #[derive(Deserialize)]
    struct Change {
        protocol: Option<Protocol>,
        highest_version: Option<u8>,
    }
    #[derive(Deserialize)]
    struct Listed {
        tunnel: String,
        /// `None` takes the tunnel off the list.
        status: Option<String>,
    }
    #[derive(Deserialize)]
    struct Accounts {
        account: Option<String>,
    }
    match (&call.method, rest) {
        (&Method::GET, ["requests"]) => {
            let text = json!({ "requests": state.journal.requests().iter().map(|r| json!(**r)).collect::<Vec<_>>() });
            let mut reply = Reply::json(StatusCode::OK, &text);
            reply.body = state.redact(reply.body);
            return Ok(reply);
        }
        (&Method::GET, ["violations"]) => return Ok(done(json!({ "violations": state.journal.violations() }))),
        (&Method::GET, ["snapshot"]) => return Ok(Reply::json(StatusCode::OK, &json!(state.snapshot()))),
        (&Method::POST, ["faults"]) => {
            let NewFault { route, fault, containing, times } = body(call)?;
            state.faults.add(route, containing, fault, times.map_or(Times::UntilCleared, Times::Count));
        }
        (&Method::DELETE, ["faults"]) => state.faults.clear(),
        (&Method::POST, ["protocol"]) => {
            let Change { protocol, highest_version } = body(call)?;
            state.rules.protocol = protocol.unwrap_or(state.rules.protocol);
            state.rules.at_most = highest_version.unwrap_or(state.rules.at_most).clamp(1, 2);
            tracing::info!("the master speaks {} now", state.rules.protocol);
        }
        (&Method::POST, ["cloudflare"]) => {
            let Listed { tunnel, status } = body(call)?;
            operate::list(state, &tunnel, status.as_deref());
        }
        (&Method::POST, ["accounts"]) => state.rules.account = body::<Accounts>(call)?.account,
        (&Method::POST, ["agents", agent, "commands"]) => {
            operate::push_commands(state, agent, body::<Commands>(call)?.commands).map_err(refused)?;
        }
        (&Method::POST, ["agents", agent, "forget"]) => operate::forget(state, agent).map_err(refused)?,
        (&Method::POST, ["agents", agent, "end-session"]) => operate::end_session(state, agent).map_err(refused)?,
        _ => return Err(Reply::message(StatusCode::NOT_FOUND, "not found")),
    }
    Ok(done(json!({})))
}

/// A 200 with `status: success` and these members.
fn done(mut members: Value) -> Reply {
    members["status"] = json!("success");
    Reply::json(StatusCode::OK, &members)
}

fn refused(refusal: Refusal) -> Reply {
    let status = match refusal {
        Refusal::UnknownAgent | Refusal::UnknownKey => StatusCode::NOT_FOUND,
        Refusal::NotEnrolled => StatusCode::BAD_REQUEST,
        Refusal::Leaving => StatusCode::CONFLICT,
    };
    Reply::message(status, &refusal.to_string())
}

/// Parses the body as the type the route expects; an empty body counts as an empty object.
fn body<T: DeserializeOwned>(call: &Call) -> Result<T, Reply> {
    let body = match &call.payload {
        Payload::Empty => json!({}),
        Payload::Json(body) => body.clone(),
        Payload::WrongType | Payload::Broken => {
            return Err(Reply::message(StatusCode::BAD_REQUEST, "The body is not JSON."));
        }
    };
    serde_json::from_value(body).map_err(|error| Reply::message(StatusCode::BAD_REQUEST, &error.to_string()))
}
