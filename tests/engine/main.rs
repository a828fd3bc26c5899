//! The agent as people run it: the real binary, a real Docker Engine, a master in both protocols.

#[path = "../support/mod.rs"]
mod support;

mod containers;
mod containers_commands;
mod containers_scene;
mod containers_status;
mod decommission;
mod events;
mod neighbours;
mod proxy;
mod pull;
mod shutdown;
mod shutdown_container;
mod story;

fn main() -> std::process::ExitCode {
    let files = [
        story::cases(),
        containers::cases(),
        containers_commands::cases(),
        containers_status::cases(),
        events::cases(),
        decommission::cases(),
        neighbours::cases(),
        proxy::cases(),
        pull::cases(),
        shutdown::cases(),
        shutdown_container::cases(),
    ];
    testkit::main(files.into_iter().flatten().collect())
}
