//! Tests the agent as people run it: the real binary, a real Docker Engine, and a master in both protocols.

#![allow(clippy::disallowed_methods, clippy::disallowed_types, clippy::disallowed_macros, reason = "tests may block")]

#[path = "../support/mod.rs"]
mod support;

mod boot;
mod causes;
mod check;
mod containers;
mod containers_commands;
mod containers_scene;
mod containers_status;
mod daemon;
mod decommission;
mod drains;
mod enrolment;
mod events;
mod host_name;
mod metrics_network;
mod neighbours;
mod newcomer;
mod outage;
mod payloads;
mod podman;
mod proxy;
mod pull;
mod replacement;
mod shutdown;
mod shutdown_container;
mod socket_proxy;
mod story;
mod strangers;
mod tls;
mod visitors;

fn main() -> std::process::ExitCode {
    let files = [
        story::cases(),
        boot::cases(),
        causes::cases(),
        check::cases(),
        containers::cases(),
        containers_commands::cases(),
        containers_status::cases(),
        daemon::cases(),
        enrolment::cases(),
        events::cases(),
        decommission::cases(),
        drains::cases(),
        host_name::cases(),
        metrics_network::cases(),
        neighbours::cases(),
        newcomer::cases(),
        outage::cases(),
        payloads::cases(),
        podman::cases(),
        proxy::cases(),
        pull::cases(),
        replacement::cases(),
        shutdown::cases(),
        shutdown_container::cases(),
        socket_proxy::cases(),
        strangers::cases(),
        tls::cases(),
    ];
    testkit::main(files.into_iter().flatten().collect())
}
