//! Tests what the `TUNNEL_*` variables change, and which values end the process at once.

use super::*;

#[tokio::test]
async fn shows_its_settings_without_the_token() -> Result<()> {
    let env = [
        ("TUNNEL_REGION", "us"),
        ("TUNNEL_EDGE_IP_VERSION", "6"),
        ("TUNNEL_TRANSPORT_PROTOCOL", "http2"),
        ("TUNNEL_POST_QUANTUM", "false"),
    ];
    // The token is planted: the test fails if the process prints it.
    let process = run("", &env);
    let shown = "INF Environmental variables map[TUNNEL_EDGE_IP_VERSION:6 TUNNEL_METRICS:127.0.0.1:0 \
        TUNNEL_POST_QUANTUM:false TUNNEL_REGION:us TUNNEL_TRANSPORT_PROTOCOL:http2]";
    process.wait_for_log(shown, SOON).await?;
    process.wait_for_log("INF Initial protocol http2", SOON).await?;
    Ok(())
}

#[tokio::test]
async fn logs_from_the_level_that_is_wanted() -> Result<()> {
    let process = run("unreachable speed=50", &[("TUNNEL_LOGLEVEL", "error")]);
    process.wait_for_log("ERR Failed to dial a quic connection", SOON).await?;
    assert!(!process.log().contains(" INF "), "{}", process.log());
    let silent = run("exit=5 exit-after=50", &[("TUNNEL_LOGLEVEL", "fatal")]);
    silent.wait_for_log("", SOON).await.expect_err("not a line until its end");
    assert_eq!(exit_code(silent).await, Some(5));
    Ok(())
}

#[tokio::test]
async fn values_that_the_original_refuses_end_it() -> Result<()> {
    let refused: [(&[(&str, &str)], &str); 5] = [
        (&[("TUNNEL_LOGLEVEL", "loud")], "ERR not a valid log level: \"loud\""),
        (&[("TUNNEL_TRANSPORT_PROTOCOL", "h3")], "ERR unknown protocol h3, Available protocols: "),
        (&[("TUNNEL_TRANSPORT_PROTOCOL", "")], "ERR unknown protocol "),
        (
            &[("TUNNEL_TRANSPORT_PROTOCOL", "http2"), ("TUNNEL_POST_QUANTUM", "true")],
            "ERR post-quantum is only supported with the quic transport",
        ),
        (&[("TUNNEL_POST_QUANTUM", "perhaps")], "ERR TUNNEL_POST_QUANTUM: could not parse"),
    ];
    for (env, error) in refused {
        let process = run("", env);
        process.wait_for_log(error, SOON).await?;
        assert_eq!(exit_code(process).await, Some(1), "{error}");
    }
    Ok(())
}
