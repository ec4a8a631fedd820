//! Digests of the transactions that a view of the journal has evicted. They distinguish a transaction
//! without a record from one whose record is out of view.
//!
//! The digests don't say what the record was, and two transactions may share a digest: so one that is
//! found here may be another one. A transaction that is not found has no evicted record that was made at
//! [`EvictedDigests::since`] or later.
//!
//! A digest takes 8 bytes, in tables that are at most three quarters full. The oldest digests are dropped
//! a table at a time, at most an eighth of all.

use std::{
    collections::VecDeque,
    fmt,
    hash::{Hash, Hasher},
    time::Duration,
};

use crate::protocol::{ids::TransactionKey, time::Time};

/// The latest digests, at most `max`.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(crate) struct EvictedDigests {
    max: usize,
    since: Time,
    /// Oldest first. The last one is being filled.
    blocks: VecDeque<Block>,
}

/// A hash table whose size never changes.
#[derive(Clone, PartialEq, Eq)]
struct Block {
    /// A power of two of them. Zero: vacant. A digest is in the first slot, from its own on, that was
    /// vacant when it was inserted.
    slots: Vec<u64>,
    len: usize,
    /// When the latest record in it was made.
    newest: Time,
}

impl EvictedDigests {
    /// An empty set, in which no record that was made at `since` or later is missing.
    pub(crate) fn new(max: usize, since: Time) -> Self {
        Self { max, since, blocks: VecDeque::new() }
    }

    pub(crate) fn max(&self) -> usize {
        self.max
    }

    /// Since when no record is missing.
    pub(crate) fn since(&self) -> Time {
        self.since
    }

    /// Inserts the transaction of a record that was made at `made_at`.
    pub(crate) fn insert(&mut self, key: &TransactionKey, made_at: Time) {
        if self.max == 0 {
            return self.miss(made_at);
        }
        let (size, max_len) = self.block_size();
        if self.blocks.back().is_none_or(|last| last.len >= max_len) {
            while (self.blocks.len() + 1) * max_len > self.max {
                let Some(oldest) = self.blocks.pop_front() else { break };
                self.miss(oldest.newest);
            }
            self.blocks.push_back(Block { slots: vec![0; size], len: 0, newest: made_at });
        }
        if let Some(last) = self.blocks.back_mut() {
            last.insert(digest(key));
            last.newest = last.newest.max(made_at);
        }
    }

    /// Whether it has the transaction, or one with the same digest.
    pub(crate) fn contains(&self, key: &TransactionKey) -> bool {
        let digest = digest(key);
        self.blocks.iter().any(|block| block.contains(digest))
    }

    /// A record that was made at `made_at` is missing from now on.
    fn miss(&mut self, made_at: Time) {
        self.since = self.since.max(made_at + Duration::from_millis(1));
    }

    /// How many slots a table has, a power of two; and how many of them are used: at most three quarters,
    /// and at most an eighth of all digests.
    fn block_size(&self) -> (usize, usize) {
        let eighth = (self.max / 8).max(1);
        let wanted = eighth.saturating_mul(4) / 3;
        let size = wanted.checked_next_power_of_two().unwrap_or(1 << 20).max(4);
        let size = if size / 4 * 3 > eighth { (size / 2).max(4) } else { size };
        (size, eighth.min(size / 4 * 3))
    }
}

impl Block {
    fn insert(&mut self, digest: u64) {
        let at = self.place(digest);
        if let Some(slot) = self.slots.get_mut(at).filter(|slot| **slot == 0) {
            *slot = digest;
            self.len += 1;
        }
    }

    fn contains(&self, digest: u64) -> bool {
        self.slots.get(self.place(digest)) == Some(&digest)
    }

    /// The slot of the digest, or the vacant slot where it would be; there is always one.
    fn place(&self, digest: u64) -> usize {
        let mask = self.slots.len() - 1;
        let mut at = digest as usize & mask;
        while self.slots.get(at).is_some_and(|slot| *slot != 0 && *slot != digest) {
            at = (at + 1) & mask;
        }
        at
    }
}

/// The digest of a transaction, never zero. It spreads the bits of the id's own digest.
fn digest(key: &TransactionKey) -> u64 {
    let at = key.requested_at.as_millis().wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mut word = key.id.digest() ^ at;
    word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (word ^ (word >> 31)).max(1)
}

/// Equal sets have equal hashes, in whatever order they were filled.
impl Hash for Block {
    fn hash<H: Hasher>(&self, state: &mut H) {
        let sum = self.slots.iter().fold(0, |sum: u64, digest| sum.wrapping_add(*digest));
        (self.len, self.newest, sum).hash(state);
    }
}

impl fmt::Debug for Block {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} digests up to {:?}", self.len, self.newest)
    }
}

#[cfg(test)]
mod tests {
    use super::EvictedDigests;
    use crate::protocol::{
        ids::{TransactionId, TransactionKey},
        time::Time,
    };

    fn key(number: u64) -> TransactionKey {
        let id = TransactionId::parse(&format!("tx-{number}")).unwrap();
        TransactionKey { id, requested_at: Time::from_millis(number / 7) }
    }

    #[test]
    fn nothing_made_since_is_missing_and_no_more_than_the_maximum_is_kept() {
        for max in [0, 1, 2, 3, 7, 8, 9, 31, 100, 1_000, 12_345] {
            let mut evicted = EvictedDigests::new(max, Time::EPOCH);
            for number in 0..30_000 {
                evicted.insert(&key(number), Time::from_millis(number));
            }
            let since = evicted.since().as_millis();
            assert!((since..30_000).all(|number| evicted.contains(&key(number))));
            let kept: usize = evicted.blocks.iter().map(|block| block.len).sum();
            assert!(kept <= max, "{kept} of {max}");
            assert!(kept >= max - max / 2, "{kept} of {max}");
            let strangers = (0..since).filter(|number| evicted.contains(&key(*number)));
            assert_eq!(strangers.count(), 0, "digests are rarely alike");
        }
    }

    #[test]
    fn the_default_takes_less_than_sixteen_bytes_each() {
        let evicted = EvictedDigests::new(8_000_000, Time::EPOCH);
        let (size, max_len) = evicted.block_size();
        let blocks = 8_000_000 / max_len;
        assert!(size * blocks * 8 < 8_000_000 * 12, "{blocks} tables of {size}");
        assert!(max_len * blocks > 7_500_000, "{blocks} tables of {max_len}");
    }
}
