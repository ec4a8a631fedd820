//! That the oracle sees what it is there for.

/// Every check, and its name. They panic if they fail.
pub(crate) const ALL: &[(&str, fn())] = &[];
