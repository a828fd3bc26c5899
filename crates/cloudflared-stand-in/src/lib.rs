//! A stand-in for `cloudflared`: its command line, its environment, its log, its metrics server and
//! its ways to stop and to fail, with no tunnel behind them but to a double of the edge.
//!
//! Tests and the demo put it into an image that looks like the real one, so the agent cannot tell the
//! difference by anything it may look at. What the real program does was read in its source (2025.9)
//! and seen at run time; where the two differ on purpose it says `stand-in`.
//!
//! # Parts
//!
//! | module | holds |
//! |---|---|
//! | [`cli`] | the command line and the `TUNNEL_*` environment, both checked as the original does |
//! | [`token`] | the tunnel token, read and (for tests) made |
//! | [`script`] | the behaviours below, from wherever they were asked for |
//! | [`connector`] | what is known of the tunnel: connections, counters, configuration version |
//! | [`transport`] | quic or http2, chosen or by default |
//! | [`tunnel`] | the life of the connections: register, be refused, fall back, crash |
//! | `events` | what happens to a connection, as the state and the log have it |
//! | [`uplink`] | the connections to a double of the edge: dial, answer, unregister, dial again |
//! | [`edge`] | the double of the edge, for the tests' own process |
//! | `wire` | the lines between the two |
//! | [`metrics`] | the HTTP server: `/ready`, `/metrics`, `/healthcheck`, `/config`, `/diag/tunnel`, `/stand-in` |
//! | [`run`] | `tunnel run`: the order of start, signals and drain |
//! | [`log`] | lines in cloudflared's format, text or JSON |
//! | [`http`] | one HTTP request, for `tunnel ready` and for tests |
//!
//! # Behaviours
//!
//! Each word can be said in three places. A later place overrides an earlier one, word by word:
//!
//! 1. the environment: `STAND_IN_READY_AFTER=500`, for an image or a container;
//! 2. the token: its secret `s` is the base64 of `stand-in: ready-after=500 connections=2`, so that
//!    whoever can choose a token chooses the behaviour ([`token::Token::scripted`] makes one);
//! 3. `POST /stand-in` on the metrics server with `{"ready_after": 500}`, at run time; `null` takes a
//!    word back. `GET /stand-in` shows the words in force.
//!
//! | word | value | what happens | when it is read |
//! |---|---|---|---|
//! | `unready` | flag | no connection: `/ready` says 503 and 0 connections | any time |
//! | `ready-after` | ms, default 200 | so long from start, or from the end of `unready`, to the connections | any time |
//! | `connections` | default 4 | how many are registered | when connecting |
//! | `unauthorized` | flag | never ready; logs `Register tunnel error from server side error="Unauthorized: …"`, ever less often | any time |
//! | `unreachable` | flag | never ready; logs that the edge cannot be dialled with the protocol in use, ever less often | any time |
//! | `udp-blocked` | flag | with quic chosen as `unreachable`; with no protocol chosen one such line, then http2 for good; with http2 nothing | any time |
//! | `edge` | `host:port`, default none | the connections are real ones to an [`edge::Edge`]: see below | when connecting |
//! | `hang` | flag | the metrics server accepts and does not answer (but for `/stand-in`), nor are an edge's requests answered, until it is taken back | any time |
//! | `exit` | code | the process ends with that code | any time |
//! | `exit-after` | ms, default 0 | so long after `exit` was said | with `exit` |
//! | `invalid-token` | flag | exit 255 at once, `Provided Tunnel token is not valid.` | at start |
//! | `no-dns` | flag | exit 1, `Could not lookup srv records on …` | at start |
//! | `drain` | ms, default `TUNNEL_GRACE_PERIOD` | how long a stop takes while there are connections; requests in flight must end in it | at SIGTERM |
//! | `ignore-sigterm` | flag | SIGTERM and SIGINT are logged and ignored | at SIGTERM |
//! | `version` | text, default 2025.9.0 | the version it claims in `--version`, the log and `build_info` | any time |
//! | `config-version` | default 1 | the remote configuration's version once connected (-1 before) | when connecting |
//! | `requests`, `errors` | default 0 | the request counters in `/metrics`; those of an edge are added | any time |
//! | `eat` | MiB, default none | so much memory is taken and written to, and kept for good | any time |
//!
//! A flag is on when it is bare (in a token), `1` or `true`. An unknown word, or a value that does not
//! parse, is an error wherever it stands: a typing mistake must not look like a healthy tunnel.
//!
//! # With an edge
//!
//! With the word `edge` each connection is dialled once `ready-after` is over, is registered when the
//! edge says so, and is dialled again a second after it was cut or refused. A request is answered with
//! `hello from <connector id>`, and `/slow?ms=N` so much later. A stop unregisters first and answers
//! what is in flight during the drain; what is not answered by its end is cut. A second signal, `exit`
//! and whatever takes the connections away (`unready` and the like) cut at once.
//!
//! # Left out
//!
//! No edge but that double, no ingress, no DNS, no autoupdate, no other command of cloudflared. `t` in
//! a token may be any text, where the original wants a UUID. `unreachable` alone never falls back to
//! http2, and an unknown `TUNNEL_LOGLEVEL` is an error.

pub mod cli;
pub mod connector;
pub mod edge;
mod events;
pub mod http;
pub mod log;
pub mod metrics;
pub mod run;
pub mod script;
pub mod token;
pub mod transport;
pub mod tunnel;
pub mod uplink;
mod wire;
