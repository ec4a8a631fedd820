//! The journal as one reader sees it: the first record of each transaction, and the moment since which
//! no record is missing.
//!
//! An offset names a message. A message holds any number of records, and is read as a whole.
//!
//! **Invariant:** the answer is [`Recall::Absent`] only if any record of the transaction would lie in the
//! part that was read without a gap. Otherwise it is [`Recall::OutOfSight`], and the caller reads an older
//! part, or parks the transaction.
//!
//! A view may keep digests of the transactions that it evicts. So it still knows, for a long time, that
//! most transactions have no record. Only one that has a record, or shares its digest with one, must be
//! looked up.
//!
//! Clocks decide whether a record can lie before the part that was read: no record is made earlier than
//! `requested_at` − `clock_margin` of its transaction, since no two clocks of the system differ by more
//! than `clock_margin`.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use crate::protocol::{
    evicted_digests::EvictedDigests, ids::TransactionKey, keymap::KeyMap, message::Decision,
    time::Time,
};

/// What the journal, as far as it was read, says of a transaction.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Recall {
    /// Its first record.
    Found(Arc<Decision>),
    /// It has no record.
    Absent,
    /// Unknown: the part that was read begins too late, or the record was evicted.
    OutOfSight,
}

/// The part of the journal that was read without a gap, and is remembered.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct JournalView {
    records_max: usize,
    window: Duration,
    /// Every record that was made at this moment or later, up to `next`, was read and is remembered.
    since: Option<Time>,
    /// The offset of the oldest message of which all records are remembered.
    oldest: u64,
    /// The offset of the next message.
    next: u64,
    first: KeyMap<Arc<Decision>>,
    /// The records in `first`, in journal order.
    order: VecDeque<(u64, Arc<Decision>)>,
    /// The records that were removed from `first`.
    evicted: EvictedDigests,
}

impl JournalView {
    /// A view that has read nothing. It remembers at most `records_max` transactions, and none that was
    /// decided longer ago than `window`.
    pub fn new(records_max: usize, window: Duration) -> Self {
        Self {
            records_max,
            window,
            since: None,
            oldest: 0,
            next: 0,
            first: KeyMap::new(),
            order: VecDeque::new(),
            evicted: EvictedDigests::new(0, Time::EPOCH),
        }
    }

    /// Keeps digests of the last `digests_max` transactions that the view evicts. The oldest digests are
    /// dropped first, at most an eighth of them at a time.
    pub fn with_digests(mut self, digests_max: usize) -> Self {
        self.evicted = EvictedDigests::new(digests_max, self.evicted.since());
        self
    }

    /// Starts again at offset `next`: every record that was made at `since` or later has that offset or a
    /// higher one.
    pub fn attach(&mut self, next: u64, since: Time) {
        *self = Self {
            next,
            oldest: next,
            since: Some(since),
            evicted: EvictedDigests::new(self.evicted.max(), since),
            ..Self::new(self.records_max, self.window)
        };
    }

    /// The offset to continue from after a break.
    pub fn next_offset(&self) -> u64 {
        self.next
    }

    /// The offset of the oldest message of which all records are remembered: a search of older parts ends
    /// before it.
    pub fn oldest_offset(&self) -> u64 {
        self.oldest
    }

    /// Since when no record is missing; `None` before [`JournalView::attach`].
    pub fn since(&self) -> Option<Time> {
        self.since
    }

    /// How many transactions it remembers.
    pub fn len(&self) -> usize {
        self.first.len()
    }

    /// Whether it remembers none.
    pub fn is_empty(&self) -> bool {
        self.first.is_empty()
    }

    /// Takes in the message at `offset`, and returns those of its records that are the first of their
    /// transaction in the part that was read: the others are void. If the message was read before, as
    /// after a reconnect, it returns none.
    ///
    /// Offsets are consecutive: a jump means that records are lost. Then records may be missing up to
    /// `now`.
    pub fn read(
        &mut self,
        now: Time,
        offset: u64,
        mut decisions: Vec<Arc<Decision>>,
    ) -> Vec<Arc<Decision>> {
        if offset < self.next {
            return Vec::new();
        }
        if offset > self.next || self.since.is_none() {
            let gap_ends = now + Duration::from_millis(1);
            self.attach(offset, gap_ends);
        }
        self.next = offset + 1;
        decisions.retain(|decision| self.read_one(now, offset, decision));
        decisions
    }

    /// What the journal says of `key`, if no two clocks differ by more than `clock_margin`.
    pub fn recall(&self, key: &TransactionKey, clock_margin: Duration) -> Recall {
        if !self.sees(key, clock_margin) {
            return Recall::OutOfSight;
        }
        self.first.get(key).map_or(Recall::Absent, |decision| Recall::Found(Arc::clone(decision)))
    }

    /// The first record that was read for `key`, even if an earlier one may be out of sight.
    pub fn earliest_seen(&self, key: &TransactionKey) -> Option<&Arc<Decision>> {
        self.first.get(key)
    }

    /// What the journal says of `key`; and if that is [`Recall::Absent`], the first record of another
    /// transaction with the same `id`.
    pub fn recall_or_namesake(
        &self,
        key: &TransactionKey,
        clock_margin: Duration,
    ) -> (Recall, Option<Arc<Decision>>) {
        if !self.sees(key, clock_margin) {
            return (Recall::OutOfSight, None);
        }
        let mut namesake = None;
        for (requested_at, decision) in self.first.of_id(&key.id) {
            if requested_at == key.requested_at {
                return (Recall::Found(Arc::clone(decision)), None);
            } else if namesake.is_none() && self.sees(&decision.key, clock_margin) {
                namesake = Some(decision);
            }
        }
        (Recall::Absent, namesake.cloned())
    }

    /// Whether `first` has the first record of `key`, if there is one: because the remembered part reaches
    /// back to where the transaction began; or because the part that was read does, and the record was not
    /// evicted.
    fn sees(&self, key: &TransactionKey, clock_margin: Duration) -> bool {
        let began = key.requested_at - clock_margin;
        self.since.is_some_and(|since| since <= began)
            || self.since.is_some() && self.evicted.since() <= began && !self.evicted.contains(key)
    }

    /// Whether the record is the first of its transaction.
    fn read_one(&mut self, now: Time, offset: u64, decision: &Arc<Decision>) -> bool {
        if self.first.contains_key(&decision.key) {
            return false;
        }
        self.first.insert(&decision.key, Arc::clone(decision));
        self.order.push_back((offset, Arc::clone(decision)));
        self.forget_the_oldest(now);
        true
    }

    fn forget_the_oldest(&mut self, now: Time) {
        while let Some((offset, oldest)) = self.order.front() {
            let made_at = oldest.decided_at;
            if self.order.len() <= self.records_max && made_at + self.window >= now {
                return;
            }
            self.oldest = offset + 1;
            self.since = self.since.max(Some(made_at + Duration::from_millis(1)));
            self.first.remove(&oldest.key);
            self.evicted.insert(&oldest.key, made_at);
            self.order.pop_front();
        }
    }
}
