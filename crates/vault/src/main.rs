//! The program: arguments, signals, exit codes.

use std::process::ExitCode;

fn main() -> ExitCode {
    dockflare_vault::cli::main()
}
