//! Fault points: where tests abort the process, to show that a crash there loses nothing.
//!
//! The code that writes a journal file, and the code that acts on it, have *fault points*: before
//! and after each step that a crash could tear apart. They are counted as they are passed. With the
//! environment variable `DTC_FAULT_POINT=n` the `dtc` command aborts at the `n`th, as by `kill -9`:
//! nothing is flushed, and nothing is dropped. A run that ends by itself has passed fewer.
//!
//! They are for the tests of the command. In any other program with a journal, and without that
//! variable, they are off, and each costs one load.

use std::sync::{
    OnceLock,
    atomic::{AtomicU64, Ordering},
};

static PASSED: AtomicU64 = AtomicU64::new(0);
static FATAL: OnceLock<u64> = OnceLock::new();

/// Enables the fault point that the environment names.
#[cfg(feature = "cli")]
pub(crate) fn arm() {
    let fatal = std::env::var("DTC_FAULT_POINT").ok().and_then(|point| point.parse().ok());
    if let Some(fatal) = fatal {
        let _ = FATAL.set(fatal);
    }
}

/// Whether this is the fault point at which the process must abort.
pub(crate) fn is_fatal() -> bool {
    FATAL.get().is_some_and(|fatal| PASSED.fetch_add(1, Ordering::Relaxed) + 1 == *fatal)
}

/// A fault point.
pub(crate) fn point() {
    if is_fatal() {
        std::process::abort();
    }
}
