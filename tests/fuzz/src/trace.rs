//! A trace of what happens, for the analysis of a finding.

use std::{env, sync::LazyLock};

static IS_WANTED: LazyLock<bool> = LazyLock::new(|| env::var_os("DTC_FUZZ_TRACE").is_some());

/// Prints `what` to standard error if `DTC_FUZZ_TRACE` is set.
pub fn trace(what: impl FnOnce() -> String) {
    if *IS_WANTED {
        eprintln!("{}", what());
    }
}
