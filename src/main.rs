//! The `dtc` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    dtc::cli::main()
}
