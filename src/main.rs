//! The `dtc` command.

use std::process::ExitCode;

/// Requests are allocated by one thread and freed by another, which glibc's allocator is slow at.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    dtc::cli::main()
}
