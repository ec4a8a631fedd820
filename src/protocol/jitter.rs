//! Scatter without randomness.

use std::time::Duration;

use crate::protocol::{
    ids::{TransactionKey, fnv1a},
    time::Time,
};

/// A duration below `bound` that differs from process to process (by `seed`), from transaction to
/// transaction and from moment to moment, so that what collided once doesn't collide again.
pub(crate) fn jitter(seed: u64, now: Time, key: &TransactionKey, bound: Duration) -> Duration {
    let words = [seed, now.as_millis(), key.requested_at.as_millis()];
    let bytes = words.iter().flat_map(|word| word.to_le_bytes()).chain(key.id.as_str().bytes());
    let hash = fnv1a(bytes);
    let bound = u64::try_from(bound.as_millis()).unwrap_or(u64::MAX);
    Duration::from_millis(hash.checked_rem(bound).unwrap_or(0))
}
