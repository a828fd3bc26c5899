//! The part of the command line and the environment that a supervisor uses.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::{Parser, Subcommand};
use jiff::SignedDuration;
use serde::Deserialize;

use crate::log::{Level, Log};
use crate::transport::Transport;

/// The original refuses a longer grace period.
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

/// The `TUNNEL_*` variables that have an effect here. Like the original, the stand-in ignores the others.
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
    /// `TUNNEL_LOGLEVEL`: `debug`, `info`, `warn`, `error` or `fatal`.
    pub loglevel: Option<String>,
    /// `TUNNEL_TRANSPORT_PROTOCOL`: `auto`, `quic` or `http2`.
    pub transport_protocol: Option<String>,
    /// `TUNNEL_POST_QUANTUM`, a boolean. It allows QUIC only.
    pub post_quantum: Option<String>,
    /// `TUNNEL_REGION`: only shown in the log.
    pub region: Option<String>,
    /// `TUNNEL_EDGE_IP_VERSION`: only shown in the log.
    pub edge_ip_version: Option<String>,
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

    /// How long a stop may take; 30 s by default.
    ///
    /// # Errors
    /// When the text is not a duration, or is above three minutes.
    pub fn grace_period(&self) -> Result<Duration> {
        let text = self.grace_period.as_deref().unwrap_or("30s");
        let span: SignedDuration = text.parse().with_context(|| format!("invalid grace period {text:?}"))?;
        let period = Duration::try_from(span).with_context(|| format!("invalid grace period {text:?}"))?;
        ensure!(period <= LONGEST_GRACE, "grace-period must be equal or less than 3m0s");
        Ok(period)
    }

    /// A log with the level of `TUNNEL_LOGLEVEL`.
    ///
    /// # Errors
    /// At an unknown level.
    pub fn log(&self) -> Result<Log> {
        let least = self.loglevel.as_deref().map_or(Ok(Level::default()), Level::parse)?;
        Ok(Log::new(least))
    }

    /// The protocol that the variables choose.
    ///
    /// # Errors
    /// As [`Transport::choose`].
    pub fn transport(&self) -> Result<Transport> {
        Transport::choose(self.transport_protocol.as_deref(), self.post_quantum.as_deref())
    }

    /// Formats the variables as the original logs them, without the token: `map[TUNNEL_METRICS:…
    /// TUNNEL_TRANSPORT_PROTOCOL:quic]`.
    #[must_use]
    pub fn shown(&self) -> String {
        let variables = [
            ("TUNNEL_EDGE_IP_VERSION", self.edge_ip_version.as_deref()),
            ("TUNNEL_GRACE_PERIOD", self.grace_period.as_deref()),
            ("TUNNEL_LOGLEVEL", self.loglevel.as_deref()),
            ("TUNNEL_METRICS", self.metrics.as_deref()),
            ("TUNNEL_POST_QUANTUM", self.post_quantum.as_deref()),
            ("TUNNEL_REGION", self.region.as_deref()),
            ("TUNNEL_TOKEN_FILE", self.token_file.as_deref()),
            ("TUNNEL_TRANSPORT_PROTOCOL", self.transport_protocol.as_deref()),
        ];
        let set = variables.iter().filter_map(|(name, value)| Some(format!("{name}:{}", (*value)?)));
        format!("map[{}]", set.collect::<Vec<_>>().join(" "))
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
    fn shows_its_settings_and_never_the_token() {
        let env = TunnelEnv {
            token: Some("hunter2".into()),
            region: Some("us".into()),
            edge_ip_version: Some("6".into()),
            ..TunnelEnv::default()
        };
        assert_eq!(env.shown(), "map[TUNNEL_EDGE_IP_VERSION:6 TUNNEL_REGION:us]");
        assert_eq!(TunnelEnv::default().shown(), "map[]");
    }

    #[test]
    fn an_unknown_log_level_is_an_error() {
        assert!(TunnelEnv { loglevel: Some("loud".into()), ..TunnelEnv::default() }.log().is_err());
        assert!(TunnelEnv { loglevel: Some("warn".into()), ..TunnelEnv::default() }.log().is_ok());
    }

    #[test]
    fn reads_its_variables_and_no_others() {
        let vars = [("TUNNEL_METRICS", "0.0.0.0:20241"), ("TUNNEL_URL", "x"), ("PATH", "/bin")];
        let env = TunnelEnv::from_vars(vars.map(|(k, v)| (k.into(), v.into())).into_iter()).expect("vars");
        assert_eq!(env.metrics.as_deref(), Some("0.0.0.0:20241"));
        assert!(env.token.is_none());
    }
}
