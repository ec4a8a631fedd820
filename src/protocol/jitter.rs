//! Scatter without randomness.

use std::time::Duration;

use crate::protocol::{ids::TransactionKey, time::Time};

/// A duration below `bound` that differs from process to process (by `seed`), from transaction to
/// transaction and from moment to moment, so that what collided once doesn't collide again.
pub(crate) fn jitter(seed: u64, now: Time, key: &TransactionKey, bound: Duration) -> Duration {
    let words = [seed, now.as_millis(), key.requested_at.as_millis()];
    let bytes = words.iter().flat_map(|word| word.to_le_bytes()).chain(key.id.as_str().bytes());
    // FNV-1a: no quality is needed but that near keys scatter.
    let hash = bytes.fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    let bound = u64::try_from(bound.as_millis()).unwrap_or(u64::MAX);
    Duration::from_millis(hash.checked_rem(bound).unwrap_or(0))
}
