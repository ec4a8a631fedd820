//! Where a process may be killed on purpose, to show that nothing is lost by it.
//!
//! The code that keeps a journal file, and what acts on it, has *fault points*: before and after
//! each thing that a crash could tear apart. They are counted as they are passed, and with the
//! environment variable `DTC_FAULT_POINT=n` the `dtc` command aborts at the `n`th, as by `kill -9`:
//! nothing is flushed, and nothing is dropped. A run that ends by itself has passed fewer.
//!
//! It is for the tests of the command. In any other program that keeps a journal, and unless that
//! variable is set, it is off, and each point costs a load.

use std::sync::{
    OnceLock,
    atomic::{AtomicU64, Ordering},
};

static PASSED: AtomicU64 = AtomicU64::new(0);
static FATAL: OnceLock<u64> = OnceLock::new();

/// From now on the process is to end where the environment says.
#[cfg(feature = "cli")]
pub(crate) fn arm() {
    let fatal = std::env::var("DTC_FAULT_POINT").ok().and_then(|point| point.parse().ok());
    if let Some(fatal) = fatal {
        let _ = FATAL.set(fatal);
    }
}

/// Whether this is the fault point at which the process is to end.
pub(crate) fn is_fatal() -> bool {
    FATAL.get().is_some_and(|fatal| PASSED.fetch_add(1, Ordering::Relaxed) + 1 == *fatal)
}

/// A fault point.
pub(crate) fn point() {
    if is_fatal() {
        std::process::abort();
    }
}
