//! The journal as one reader sees it: the first record of each transaction, and from when on
//! nothing is missing.
//!
//! What has an offset is a message: it holds several records, or none, and is read and vouched for
//! as a whole.
//!
//! **Invariant:** [`Recall::Absent`] is said only of a transaction whose every record, were there
//! one, lies in the part that was read without a gap. Where that isn't so the answer is
//! [`Recall::OutOfSight`], and the caller reads further back or hands the matter to a person.
//!
//! Of what it forgets a view keeps a digest, if it is set to. So it still knows for long that most
//! of what it is asked about has no record, and only what has one, or shares its digest with one,
//! must be looked for.
//!
//! Clocks say whether a record can lie before that part: no record is made earlier than
//! `requested_at` − `clock_margin` of its transaction, since `clock_margin` bounds how far any two
//! clocks of the system differ.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use crate::protocol::{
    evicted_digests::EvictedDigests, ids::TransactionKey, keymap::KeyMap, message::Decision,
    time::Time,
};

/// What the read part of the journal says of a transaction.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Recall {
    /// Its first record.
    Found(Arc<Decision>),
    /// It has none.
    Absent,
    /// It is not known: the read part begins too late, or the record is forgotten.
    OutOfSight,
}

/// The part of the journal that was read without a gap, as far as memory goes.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct JournalView {
    records_max: usize,
    window: Duration,
    /// Every record made at this moment or later, up to `next`, was read and is remembered.
    since: Option<Time>,
    /// The offset of the oldest message that `since` vouches for.
    oldest: u64,
    /// The offset that comes next.
    next: u64,
    first: KeyMap<Arc<Decision>>,
    /// What is in `first`, in journal order.
    order: VecDeque<(u64, Arc<Decision>)>,
    /// What was in `first` and is no more.
    evicted: EvictedDigests,
}

impl JournalView {
    /// A view that has read nothing. It remembers `records_max` transactions at most, and none
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

    /// Keeps digests of the last `digests_max` transactions that it forgets. They are dropped the
    /// oldest first, an eighth of them or less at a time.
    pub fn with_digests(mut self, digests_max: usize) -> Self {
        self.evicted = EvictedDigests::new(digests_max, self.evicted.since());
        self
    }

    /// Starts again at offset `next`: every record made at `since` or later has that offset or a
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

    /// The offset to go on from after a break.
    pub fn next_offset(&self) -> u64 {
        self.next
    }

    /// The offset of the oldest message this view vouches for: a look further back ends before it.
    /// A message of which any record is forgotten isn't vouched for, and the look includes it.
    pub fn oldest_offset(&self) -> u64 {
        self.oldest
    }

    /// From when on nothing is missing; `None` before [`JournalView::attach`].
    pub fn since(&self) -> Option<Time> {
        self.since
    }

    /// How many transactions are remembered.
    pub fn len(&self) -> usize {
        self.first.len()
    }

    /// Whether none is.
    pub fn is_empty(&self) -> bool {
        self.first.is_empty()
    }

    /// Takes in the message at `offset`, and gives back those of its records that are the first of
    /// their transaction in the part that was read: the others are void. Of a message that was read
    /// before it gives back none: the stream repeats itself after a reconnect.
    ///
    /// Offsets are consecutive: a jump means that records are lost, and then nothing before `now`
    /// is vouched for any more.
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

    /// What is known of `key`, if `clock_margin` bounds how far any two clocks differ.
    pub fn recall(&self, key: &TransactionKey, clock_margin: Duration) -> Recall {
        if !self.sees(key, clock_margin) {
            return Recall::OutOfSight;
        }
        self.first.get(key).map_or(Recall::Absent, |decision| Recall::Found(Arc::clone(decision)))
    }

    /// The first record read for `key`, whether or not an earlier one may be out of sight.
    pub fn earliest_seen(&self, key: &TransactionKey) -> Option<&Arc<Decision>> {
        self.first.get(key)
    }

    /// What is known of `key`, and if it is [`Recall::Absent`], the first record of a transaction
    /// with the same `id` that was requested at another time.
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

    /// Whether the first record of `key` is in `first`, if it has any: because the remembered part
    /// reaches back to where it began; or because the read part does, and it isn't forgotten.
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
