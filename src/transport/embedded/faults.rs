//! Where a process may be killed on purpose, to show that nothing is lost by it.
//!
//! The code that keeps a journal file, and what acts on it, has *fault points*: before and after
//! each thing that a crash could tear apart. They are counted as they are passed, and with the
//! environment variable `DTC_FAULT_POINT=n` the process aborts at the `n`th, as by `kill -9`:
//! nothing is flushed, and nothing is dropped. A run that ends by itself has passed fewer.
//!
//! It is for the tests, and off unless that variable is set; then each point costs a load.

use std::sync::{
    OnceLock,
    atomic::{AtomicU64, Ordering},
};

static PASSED: AtomicU64 = AtomicU64::new(0);
static FATAL: OnceLock<Option<u64>> = OnceLock::new();

/// Whether this is the fault point at which the process is to end.
pub(crate) fn is_fatal() -> bool {
    let fatal = FATAL.get_or_init(|| std::env::var("DTC_FAULT_POINT").ok()?.parse().ok());
    fatal.is_some_and(|fatal| PASSED.fetch_add(1, Ordering::Relaxed) + 1 == fatal)
}

/// A fault point.
pub(crate) fn point() {
    if is_fatal() {
        std::process::abort();
    }
}
