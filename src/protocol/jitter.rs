//! Jitter without random numbers: the state machines are deterministic, so they can use neither the
//! system's random source nor a crate that does.

use std::time::Duration;

use crate::protocol::{
    ids::{TransactionKey, fnv1a},
    time::Time,
};

/// A duration below `bound`, which depends on the process (by `seed`), the transaction and the moment: two
/// that have collided are unlikely to collide again.
pub(crate) fn jitter(seed: u64, now: Time, key: &TransactionKey, bound: Duration) -> Duration {
    let words = [seed, now.as_millis(), key.requested_at.as_millis()];
    let bytes = words.iter().flat_map(|word| word.to_le_bytes()).chain(key.id.as_str().bytes());
    let hash = fnv1a(bytes);
    let bound = u64::try_from(bound.as_millis()).unwrap_or(u64::MAX);
    Duration::from_millis(hash.checked_rem(bound).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, time::Duration};

    use super::jitter;
    use crate::protocol::{
        ids::{TransactionId, TransactionKey},
        time::Time,
    };

    fn of(seed: u64, millis: u64, id: &str, bound: u64) -> Duration {
        let id = TransactionId::parse(id).unwrap();
        let key = TransactionKey { id, requested_at: Time::EPOCH };
        jitter(seed, Time::from_millis(millis), &key, Duration::from_millis(bound))
    }

    #[test]
    fn it_stays_below_its_bound() {
        for millis in 0..1000 {
            assert!(of(0, millis, "t1", 7) < Duration::from_millis(7));
        }
        assert_eq!(of(0, 1, "t1", 0), Duration::ZERO);
    }

    #[test]
    fn seeds_moments_and_transactions_are_scattered() {
        let scattered =
            |of: &dyn Fn(u64) -> Duration| (0..100).map(of).collect::<BTreeSet<_>>().len() > 80;
        assert!(scattered(&|seed| of(seed, 0, "t1", 10_000)));
        assert!(scattered(&|millis| of(0, millis, "t1", 10_000)));
        assert!(scattered(&|number| of(0, 0, &format!("t{number}"), 10_000)));
        assert_eq!(of(1, 2, "t3", 10_000), of(1, 2, "t3", 10_000));
    }
}
