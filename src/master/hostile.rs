//! Replies that no honest master sends.

use std::net::Ipv4Addr;

use proptest::prelude::*;
use reqwest::StatusCode;
use serde_json::json;
use tokio::net::TcpListener;

use super::*;
use crate::config::MasterConfig;
use crate::hostile::{BUFFERS, SECRET, body, endless, is_one_line, text};

proptest! {
    #[test]
    fn any_reply_to_a_registration_is_read_or_refused(body in body(json!({
        "status": "success", "agent_id": "a1", "protocol_version": 2, "agent_session_id": SECRET,
        "agent": {
            "status": "enrolled", "assigned_tunnel_id": "t1", "assigned_tunnel_name": "edge",
            "assigned_tunnel_token": SECRET,
        },
    }))) {
        match read::<wire::Registered>(&body) {
            Ok(reply) => drop(reply.agent.and_then(wire::AgentRecord::assignment)),
            Err(error) => {
                let text = error.to_string();
                prop_assert!(is_one_line(&text) && !text.contains(SECRET), "{}", text);
            }
        }
    }

    #[test]
    fn any_reply_with_commands_is_read_or_refused(body in body(json!({
        "status": "success",
        "commands": [{"action": "start_tunnel", "tunnel_id": "t1", "token": SECRET}, {"action": "stop_tunnel"}],
    }))) {
        if let Err(error) = read::<wire::Commands>(&body) {
            let text = error.to_string();
            prop_assert!(is_one_line(&text) && !text.contains(SECRET), "{}", text);
        }
    }

    #[test]
    fn any_reply_with_accounts_is_read_or_refused(
        body in body(json!({"success": true, "result": [{"id": "account"}]})),
    ) {
        if let Err(error) = read::<wire::Accounts>(&body) {
            prop_assert!(is_one_line(&error.to_string()), "{}", error);
        }
    }

    #[test]
    fn any_refusal_is_sorted_and_makes_one_line(
        status in 300_u16..600,
        retry_after in text(),
        seconds in any::<u64>(),
        body in body(json!({"code": "registration_required", "message": "register", "error": "x"})),
    ) {
        for retry_after in [retry_after, seconds.to_string()] {
            let mut headers = HeaderMap::new();
            if let Ok(value) = HeaderValue::from_str(&retry_after) {
                headers.insert("retry-after", value.clone());
                headers.insert("location", value);
            }
            let error = sort(&Url::parse("https://m/x").unwrap(), StatusCode::from_u16(status).unwrap(), &headers, &body);
            prop_assert!(is_one_line(&error.to_string()), "{}", error);
            let _ = (error.remedy(), error.code(), error.status());
            // Wait as callers do.
            let wait = crate::retry::Backoff::new(Duration::from_secs(1), Duration::from_secs(60));
            let _ = Instant::now() + { wait }.next(error.retry_after());
        }
    }
}

#[tokio::test]
async fn a_reply_without_end_is_dropped_soon_after_4_mib() {
    for (head, expected) in [
        ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", "more than 4 MiB"),
        ("HTTP/1.1 200 OK\r\nContent-Length: 1099511627776\r\n\r\n", "more than 4 MiB"),
        ("HTTP/1.1 500 No\r\nTransfer-Encoding: chunked\r\n\r\n", "more than 4 MiB"),
        ("HTTP/1.1 200 OK\r\nX-Endless: ", "cut the connection"),
    ] {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let config = MasterConfig {
            url: format!("http://{}", listener.local_addr().unwrap()).parse().unwrap(),
            key: Secret { value: SECRET.into(), file: None },
            access: None,
        };
        let master = Master::new(config, Metrics::default()).unwrap();
        let server = tokio::spawn(endless(listener, head, 1));
        let agent = AgentId::try_from("a1".to_owned()).unwrap();
        let answered = tokio::time::timeout(Duration::from_secs(30), master.commands(&agent)).await;
        let error = answered.expect("it reads on and on").unwrap_err().to_string();
        assert!(error.contains(expected) && !error.contains(SECRET), "{head:?}: {error}");
        let taken = tokio::time::timeout(Duration::from_secs(30), server).await.expect("the connection stays").unwrap();
        assert!(taken[0] <= (4 << 20) + BUFFERS, "{head:?}: {taken:?} bytes were taken");
    }
}
