//! A stand-in for `cloudflared`. It has the command line and the environment of the real program, and plays its log,
//! metrics and readiness from recordings. Its only tunnel is one to a double of the edge.
//!
//! Tests and the demo put it into an image that looks like the real one, so that nothing the agent looks at tells the
//! two apart. Figures that were measured with the stand-in must say so.
//!
//! # How it plays recordings
//!
//! `recordings/` holds what 2025.4.0, 2025.9.0 and 2026.8.2 wrote, counted and answered in each failure, second by
//! second. Its README says how they were recorded and thinned. [`player`] plays one of them at its own pace. At a
//! recorded *try* to connect it asks the words below, or the [`edge`]. If the answer is the one that the recording
//! expected, the same recording goes on. Otherwise the player switches to the one that shows such an answer
//! ([`scene`] is the table). So when the edge goes away, comes back, refuses or accepts again, the stand-in shows the
//! real program's lines, counters and pauses. Real connections carry visitors' requests meanwhile.
//!
//! # Parts
//!
//! | module | holds |
//! |---|---|
//! | [`cli`] | the command line and the `TUNNEL_*` environment, checked as the original checks them |
//! | [`token`] | reads the tunnel token and, for tests, makes one |
//! | [`script`] | collects the behavior words below from all three places |
//! | [`recording`] | reads the recordings |
//! | [`scene`] | the table of which recording plays, and from where |
//! | [`player`] | plays it: lines, counters, readiness, tries, the drain |
//! | [`connector`] | the state of the tunnel that the metrics server shows |
//! | [`transport`] | QUIC or HTTP/2, chosen or by default |
//! | [`uplink`] | the connections to a double of the edge: dial, answer, unregister |
//! | [`edge`] | the double of the edge, for the tests' own process |
//! | [`wire`] | the lines that connector and edge exchange |
//! | [`metrics`] | the HTTP server: `/ready`, `/metrics`, `/healthcheck`, `/config`, `/diag/tunnel`, `/stand-in` |
//! | [`run`] | `tunnel run`: errors that end it at once, and signals |
//! | [`log`] | writes the log lines |
//! | [`http`] | one HTTP request, for `tunnel ready` and for tests |
//!
//! # Behavior words
//!
//! You can set each word in three places. A later place overrides an earlier one, word by word:
//!
//! 1. the environment: `STAND_IN_READY_AFTER=500`, for an image or a container;
//! 2. the token: its secret `s` is the base64 of `stand-in: ready-after=500 connections=2`, so whoever chooses a token
//!    chooses the behavior ([`token::Token::scripted`] makes one);
//! 3. `POST /stand-in` on the metrics server with `{"ready_after": 500}`, at run time; `null` removes the word. `GET
//!    /stand-in` shows the words in force.
//!
//! | word | value | what happens | when it is read |
//! |---|---|---|---|
//! | `speed` | 0.1 to 1000, default 1 | plays recordings this many times as fast. Use it where the real pause (up to 64 s) is not under test | any time |
//! | `version` | text, default 2025.9.0 | the version it claims, and behaves as: up to 2025.8.0 as 2025.4.0, later in 2025 as 2025.9.0, after that as 2026.8.2 | any time |
//! | `unauthorized` | flag | the edge refuses each try and drops the connections. Only HTTP/2 gets the reason in words | any time |
//! | `edge-error` | flag | as `unauthorized`, with an internal error of the edge instead of the refusal | any time |
//! | `unanswered` | flag | as `unauthorized`, but the edge never answers a registration | any time |
//! | `unreachable` | flag | the edge is away and nothing listens there | any time |
//! | `swallowed` | flag | the edge is away and packets get no answer (HTTP/2 takes 148 s to notice) | any time |
//! | `udp-blocked` | flag | over QUIC as `unreachable`; falls back to HTTP/2 after 135 s if no protocol was chosen | any time |
//! | `clock-wrong` | flag | the edge's certificate is not valid at this time | any time |
//! | `no-dns`, `dns-silent` | flag | names do not resolve: the DNS server fails, or does not answer. Exit 1 after 20 s, or 60 s | at start |
//! | `invalid-token` | flag | as with a malformed token: exit 255 | at start |
//! | `token-file-missing` | flag | as when the token file is missing: exit 255 | at start |
//! | `metrics-port-taken` | flag | as when the metrics server's port is taken: exit 1 | at start |
//! | `origin-refuses` | flag | answers each request from an edge with 502, and logs it | any time |
//! | `edge` | `host:port`, default none | makes real connections to an [`edge::Edge`]: see below | when connecting |
//! | `connections` | default 4 | how many connections it registers | when connecting |
//! | `drain` | ms | how long after its last answer a drained connection closes, instead of the recorded second | at SIGTERM |
//! | `config-version` | default 1 | the remote configuration's version once connected (-1 before) | any time |
//! | `requests`, `errors` | default 0 | the request counters in `/metrics`; requests from an edge are added | any time |
//! | `eat` | MiB, default none | allocates and writes this much memory, and never frees it | any time |
//!
//! These have no recording. They are for tests that only need the effect:
//!
//! | word | value | what happens | when it is read |
//! |---|---|---|---|
//! | `unready` | flag | drops all connections and tries none, without a log line; connects at once when the word is removed | any time |
//! | `ready-after` | ms, default 0 | waits this long before the first try, or after the end of `unready` | any time |
//! | `hang` | flag | the metrics server accepts connections and does not answer (except for `/stand-in`), and requests from an edge get no answer, until the word is removed | any time |
//! | `exit` | code | the process exits with that code | any time |
//! | `exit-after` | ms, default 0 | how long after `exit` was set the process exits | with `exit` |
//! | `ignore-sigterm` | flag | SIGTERM and SIGINT are ignored | at SIGTERM |
//!
//! A flag is on when it is bare (in a token), `1` or `true`. An unknown word, or a value that does not parse, is an
//! error in every place: a typing mistake must not look like a healthy tunnel.
//!
//! # With an edge
//!
//! With the word `edge`, each recorded try dials and each `Registered tunnel connection` line is a real connection. The
//! stand-in answers a request with `hello from <connector id>`, and `/slow?ms=N` that many milliseconds later. A test
//! can change at any time how the edge behaves toward connectors (`e` is an [`edge::Edge`]):
//!
//! | to get | call |
//! |---|---|
//! | the edge refuses, at the start or while connected | `e.refuse(Whose::Tunnel(id))`, `Whose::Token(text)` or `Whose::All`; `e.accept(…)` ends it. Over QUIC no words, only growing counters; over HTTP/2 `Unauthorized` (2 s after a first try, 10 to 18 s after a drop). `TUNNEL_TRANSPORT_PROTOCOL` of the connector sets the protocol |
//! | only QUIC fails, HTTP/2 works | `e.block(Protocol::Quic)`, `e.unblock(…)`; with an answer: `e.refuse(Whose::Over(Protocol::Quic))` |
//! | the edge is away for a while | `e.leave()` or `e.swallow()`, then `e.come_back()`. A connector that was connected notices at its next recorded try, a new one at once. Over QUIC, a dial that is under way (5 s) gets an answer too |
//! | an error of the edge, or no answer | `e.fail(…)`, `e.leave_unanswered(…)` |
//! | who tried, and when | `e.tries()` |
//! | a drain that takes the whole grace period | `e.keep_drained(true)` and `TUNNEL_GRACE_PERIOD` |
//!
//! A stop unregisters first and answers the requests in flight. The edge closes each connection a second after its last
//! answer, and the process exits with the last one. At the end of the grace period the process cuts what is unanswered
//! and exits 0 (no recording shows this end). A second signal, `exit`, or losing the connections cuts at once.
//!
//! # What is left out, and what is only believed
//!
//! The stand-in has no edge but that double, no ingress, no DNS, no autoupdate, no JSON log, and no other command of
//! cloudflared. `t` in a token may be any text; the original wants a UUID. An unknown `TUNNEL_LOGLEVEL` is an error.
//! Three cases are composed from several recordings, since nobody recorded them whole:
//!
//! - `udp-blocked` under `auto`: the tries of an edge that is away, the fallback line, and the lines after a fallback.
//!   The 114 to 164 s until the fallback were measured.
//! - An edge's error at a first start: a refusal with other words.
//! - A fault that lasts longer than its recording: the last 40 s or more, again.

#![allow(clippy::disallowed_methods, clippy::disallowed_types, clippy::disallowed_macros, reason = "for development")]

pub mod cli;
pub mod connector;
pub mod edge;
pub mod http;
pub mod log;
pub mod metrics;
pub mod player;
pub mod recording;
pub mod run;
pub mod scene;
pub mod script;
pub mod token;
pub mod transport;
pub mod uplink;
pub mod wire;
