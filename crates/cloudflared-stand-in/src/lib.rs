//! A stand-in for `cloudflared`: its command line, its environment, and, played from recordings of the real program,
//! its log, its metrics and its readiness; with no tunnel behind them but to a double of the edge.
//!
//! Tests and the demo put it into an image that looks like the real one, so the agent cannot tell the
//! difference by anything it may look at. Figures made with it name it.
//!
//! # How it plays
//!
//! `recordings/` holds what 2025.4.0, 2025.9.0 and 2026.8.2 wrote, counted and answered in each failure, second by
//! second (its README tells how that was recorded and thinned). [`player`] plays one of them at its own pace. A recorded
//! *try* to connect is a real question: the words below answer it, or the [`edge`] does. The answer decides what goes
//! on: the same recording where it expected that answer, and otherwise the one that shows what such an answer looks
//! like ([`scene`] is the table). So an edge that goes away, comes back, refuses and takes back a refusal meets the
//! real program's lines, counters and pauses. Real connections carry visitors' requests all the while.
//!
//! # Parts
//!
//! | module | holds |
//! |---|---|
//! | [`cli`] | the command line and the `TUNNEL_*` environment, both checked as the original does |
//! | [`token`] | the tunnel token, read and (for tests) made |
//! | [`script`] | the behaviours below, from wherever they were asked for |
//! | [`recording`] | the recordings, read |
//! | [`scene`] | which recording plays from where: a table |
//! | [`player`] | plays it: lines, counters, readiness, tries, the drain |
//! | [`connector`] | what is known of the tunnel and shown by the metrics server |
//! | [`transport`] | quic or http2, chosen or by default |
//! | [`uplink`] | the connections to a double of the edge: dial, answer, unregister |
//! | [`edge`] | the double of the edge, for the tests' own process |
//! | [`wire`] | the lines between the two |
//! | [`metrics`] | the HTTP server: `/ready`, `/metrics`, `/healthcheck`, `/config`, `/diag/tunnel`, `/stand-in` |
//! | [`run`] | `tunnel run`: what ends it at once, and signals |
//! | [`log`] | the lines, as text |
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
//! | `speed` | 0.1 to 1000, default 1 | recordings are played so many times as fast. Ask for it where a real pause (up to 64 s) is not what is tested | any time |
//! | `version` | text, default 2025.9.0 | the version it claims, and behaves as: up to 2025.8.0 as 2025.4.0, in 2025 as 2025.9.0, later as 2026.8.2 | any time |
//! | `unauthorized` | flag | the edge refuses each try, and drops what is connected: in words over http2 alone | any time |
//! | `edge-error` | flag | the same with an error of the edge's own in the place of the refusal | any time |
//! | `unanswered` | flag | the same with no answer to a registration | any time |
//! | `unreachable` | flag | the edge is away, nothing listens there | any time |
//! | `swallowed` | flag | the edge is away, packets get no answer (http2: not noticed for 148 s) | any time |
//! | `udp-blocked` | flag | over QUIC as `unreachable`; where no protocol was chosen http2 follows after 135 s | any time |
//! | `clock-wrong` | flag | the edge's certificate is not valid at this time | any time |
//! | `no-dns`, `dns-silent` | flag | names are not resolved: the server says so, or nothing. Exit 1 after 20 s, or 60 s | at start |
//! | `invalid-token` | flag | as a token that is none: exit 255 | at start |
//! | `token-file-missing` | flag | as where the token's file is not there: exit 255 | at start |
//! | `metrics-port-taken` | flag | as where the metrics server's port is taken: exit 1 | at start |
//! | `origin-refuses` | flag | each request of an edge is answered 502, and said | any time |
//! | `edge` | `host:port`, default none | the connections are real ones to an [`edge::Edge`]: see below | when connecting |
//! | `connections` | default 4 | how many are registered | when connecting |
//! | `drain` | ms | how long after its last answer a drained connection is closed, in the place of the recorded second | at SIGTERM |
//! | `config-version` | default 1 | the remote configuration's version once connected (-1 before) | any time |
//! | `requests`, `errors` | default 0 | the request counters in `/metrics`; those of an edge are added | any time |
//! | `eat` | MiB, default none | so much memory is taken and written to, and kept for good | any time |
//!
//! Not recorded, for tests that need no more than the effect:
//!
//! | word | value | what happens | when it is read |
//! |---|---|---|---|
//! | `unready` | flag | nothing is tried and nothing connected, without a line; taken back, it connects at once | any time |
//! | `ready-after` | ms, default 0 | so long before the first try, or after the end of `unready` | any time |
//! | `hang` | flag | the metrics server accepts and does not answer (but for `/stand-in`), nor are an edge's requests answered, until it is taken back | any time |
//! | `exit` | code | the process ends with that code | any time |
//! | `exit-after` | ms, default 0 | so long after `exit` was said | with `exit` |
//! | `ignore-sigterm` | flag | SIGTERM and SIGINT are ignored | at SIGTERM |
//!
//! A flag is on when it is bare (in a token), `1` or `true`. An unknown word, or a value that does not
//! parse, is an error wherever it stands: a typing mistake must not look like a healthy tunnel.
//!
//! # With an edge
//!
//! With the word `edge` each recorded try dials, and each `Registered tunnel connection` line is a real connection. A
//! request is answered with `hello from <connector id>`, and `/slow?ms=N` so much later. What the edge is told to do is
//! what connectors meet (`e` is an [`edge::Edge`], which tests may change at any time):
//!
//! | wanted | ask |
//! |---|---|
//! | the edge refuses, at the start or while connected | `e.refuse(Whose::Tunnel(id))`, `Whose::Token(text)` or `Whose::All`; `e.accept(…)` takes it back. Over QUIC no words, counters grow; over http2 `Unauthorized` (2 s after a first try, 10 to 18 s after a drop). The protocol is the connector's `TUNNEL_TRANSPORT_PROTOCOL` |
//! | only QUIC fails, http2 serves | `e.block(Protocol::Quic)`, `e.unblock(…)`; with an answer: `e.refuse(Whose::Over(Protocol::Quic))` |
//! | the edge is away for a while | `e.leave()` or `e.swallow()`, then `e.come_back()`. A connector that was connected finds out at its next recorded try, a fresh one at once. Over QUIC a dial that is under way (5 s) is answered as well |
//! | an edge's error, no answer | `e.fail(…)`, `e.leave_unanswered(…)` |
//! | who tried when | `e.tries()` |
//! | a drain that takes the whole grace period | `e.keep_drained(true)` and `TUNNEL_GRACE_PERIOD` |
//!
//! A stop unregisters first and answers what is in flight; the edge closes each connection a second after its last
//! answer, and the process ends with the last one. What is not answered by the end of the grace period is cut, exit 0
//! (this end was not recorded). A second signal, `exit`, and whatever takes the connections away cut at once.
//!
//! # Left out, and only believed
//!
//! No edge but that double, no ingress, no DNS, no autoupdate, no JSON log, no other command of cloudflared. `t` in
//! a token may be any text, where the original wants a UUID. An unknown `TUNNEL_LOGLEVEL` is an error. Composed from
//! several recordings, since nobody recorded them as one: `udp-blocked` under `auto` (the tries of an edge that is
//! away, the line and lines after a fallback; that it takes 114 to 164 s was measured), an edge's error at a first start (a refusal
//! with other words), and a lasting fault beyond its recording (its last 40 s and more, again).

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
