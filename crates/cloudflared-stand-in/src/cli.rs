//! The command line and the environment, as far as a supervisor uses them.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::{Parser, Subcommand};
use jiff::SignedDuration;
use serde::Deserialize;

/// The original refuses a longer drain.
const LONGEST_GRACE: Duration = Duration::from_secs(180);

/// `cloudflared …`. The original takes `--no-autoupdate` at every level, and so do we.
#[derive(Debug, Parser)]
#[command(name = "cloudflared", disable_version_flag = true, disable_help_subcommand = true)]
pub struct Cli {
    /// Accepted and without effect: the stand-in never updates itself.
    #[arg(long)]
    pub no_autoupdate: bool,
    /// Print the version.
    #[arg(long, short = 'v')]
    pub version: bool,
    /// What to do.
    #[command(subcommand)]
    pub command: Option<Command>,
}

/// The commands that exist here.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Print the version.
    Version,
    /// Everything about tunnels.
    Tunnel {
        /// As above.
        #[arg(long)]
        no_autoupdate: bool,
        /// Address of the metrics server, to listen on (`run`) or to ask (`ready`).
        #[arg(long)]
        metrics: Option<String>,
        /// What to do.
        #[command(subcommand)]
        command: TunnelCommand,
    },
}

/// `cloudflared tunnel …`
#[derive(Debug, Subcommand)]
pub enum TunnelCommand {
    /// Run a remotely managed tunnel.
    Run {
        /// The tunnel's token; wins over the environment.
        #[arg(long)]
        token: Option<String>,
        /// A file with the token in it.
        #[arg(long)]
        token_file: Option<String>,
    },
    /// Ask a running cloudflared whether it has a connection: exit 0 or 1.
    Ready,
}

/// The `TUNNEL_*` variables that have an effect here; others are ignored as by the original.
#[derive(Debug, Clone, Default, Deserialize)]
pub struct TunnelEnv {
    /// `TUNNEL_TOKEN`; wins over the file.
    pub token: Option<String>,
    /// `TUNNEL_TOKEN_FILE`.
    pub token_file: Option<String>,
    /// `TUNNEL_METRICS`, `host:port`.
    pub metrics: Option<String>,
    /// `TUNNEL_GRACE_PERIOD`, a Go duration such as `30s` or `1m30s`.
    pub grace_period: Option<String>,
    /// `TUNNEL_LOG_OUTPUT`: `json` or the default text.
    pub log_output: Option<String>,
    /// `TUNNEL_TRANSPORT_PROTOCOL`: only shown in the log.
    pub transport_protocol: Option<String>,
}

impl TunnelEnv {
    /// Reads the variables out of `vars`.
    ///
    /// # Errors
    /// Never in practice: every field is an optional text.
    pub fn from_vars(vars: impl Iterator<Item = (String, String)>) -> Result<Self> {
        let env: Self = envy::prefixed("TUNNEL_").from_iter(vars)?;
        Ok(env)
    }

    /// How long a stop may take, 30 s unless said otherwise.
    ///
    /// # Errors
    /// When the text is no duration, or above three minutes.
    pub fn grace_period(&self) -> Result<Duration> {
        let text = self.grace_period.as_deref().unwrap_or("30s");
        let span: SignedDuration = text.parse().with_context(|| format!("invalid grace period {text:?}"))?;
        let period = Duration::try_from(span).with_context(|| format!("invalid grace period {text:?}"))?;
        ensure!(period <= LONGEST_GRACE, "grace-period must be equal or less than 3m0s");
        Ok(period)
    }

    /// Whether the log is JSON.
    #[must_use]
    pub fn json_log(&self) -> bool {
        self.log_output.as_deref() == Some("json")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Cli {
        Cli::try_parse_from(line.split(' ')).expect(line)
    }

    #[test]
    fn accepts_no_autoupdate_at_both_levels_as_the_real_image_gives_it() {
        let cli = parse("cloudflared --no-autoupdate tunnel --no-autoupdate --metrics 127.0.0.1:1 run --token abc");
        let Some(Command::Tunnel { metrics, command: TunnelCommand::Run { token, .. }, .. }) = cli.command else {
            panic!("not a tunnel run")
        };
        assert_eq!(metrics.as_deref(), Some("127.0.0.1:1"));
        assert_eq!(token.as_deref(), Some("abc"));
    }

    #[test]
    fn grace_period_is_a_go_duration_of_at_most_three_minutes() {
        let period = |text: &str| TunnelEnv { grace_period: Some(text.into()), ..TunnelEnv::default() }.grace_period();
        assert_eq!(TunnelEnv::default().grace_period().expect("default"), Duration::from_secs(30));
        assert_eq!(period("1m30s").expect("1m30s"), Duration::from_secs(90));
        assert_eq!(period("500ms").expect("500ms"), Duration::from_millis(500));
        for wrong in ["4m", "30", "-5s", "soon"] {
            assert!(period(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn reads_its_variables_and_no_others() {
        let vars = [("TUNNEL_METRICS", "0.0.0.0:20241"), ("TUNNEL_URL", "x"), ("PATH", "/bin")];
        let env = TunnelEnv::from_vars(vars.map(|(k, v)| (k.into(), v.into())).into_iter()).expect("vars");
        assert_eq!(env.metrics.as_deref(), Some("0.0.0.0:20241"));
        assert!(env.token.is_none());
    }
}
