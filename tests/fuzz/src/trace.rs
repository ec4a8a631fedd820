//! What went on in a world, for who looks into a finding.

use std::{env, sync::LazyLock};

static IS_WANTED: LazyLock<bool> = LazyLock::new(|| env::var_os("DTC_FUZZ_TRACE").is_some());

/// Says `what` on standard error if `DTC_FUZZ_TRACE` is set.
pub fn trace(what: impl FnOnce() -> String) {
    if *IS_WANTED {
        eprintln!("{}", what());
    }
}
