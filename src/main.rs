//! The `dtc` command.

use std::process::ExitCode;

/// Requests are allocated by one thread and freed by another, which is slow with glibc's allocator.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    dtc::cli::main()
}
