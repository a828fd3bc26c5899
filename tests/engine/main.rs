//! The agent as people run it: the real binary, a real Docker Engine, a master in both protocols.

#[path = "../support/mod.rs"]
mod support;

mod containers;
mod decommission;
mod events;
mod proxy;
mod shutdown;
mod story;

fn main() -> std::process::ExitCode {
    let files = [
        story::cases(),
        containers::cases(),
        events::cases(),
        decommission::cases(),
        proxy::cases(),
        shutdown::cases(),
    ];
    testkit::main(files.into_iter().flatten().collect())
}
