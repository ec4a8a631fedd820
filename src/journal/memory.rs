//! The journal in memory.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
};

use crate::protocol::{ids::TransactionKey, message::Decision};

/// How many records are kept although nothing in flight needs them: they answer a request that
/// comes twice.
const RECENT_MAX: usize = 1024;

/// An append-only log of decisions for as long as the process lives.
///
/// It forgets, since nobody else reads it: of a transaction whose request has been acked only the
/// most recent records remain, of every other one all do. So whoever asks for a transaction that is
/// not acked finds its first record, however long ago that was made.
#[derive(Debug, Default)]
pub struct MemoryJournal {
    next: u64,
    recent: VecDeque<(u64, Arc<Decision>)>,
    /// What is no longer recent and still in flight.
    kept: BTreeMap<TransactionKey, Vec<(u64, Arc<Decision>)>>,
}

impl MemoryJournal {
    /// Appends a record. `is_in_flight` tells whose records must be kept.
    pub fn append(
        &mut self,
        decision: Arc<Decision>,
        is_in_flight: impl Fn(&TransactionKey) -> bool,
    ) {
        let offset = self.next;
        self.next += 1;
        self.recent.push_back((offset, decision));
        if self.recent.len() > RECENT_MAX
            && let Some((offset, oldest)) = self.recent.pop_front()
            && is_in_flight(&oldest.key)
        {
            self.kept.entry(oldest.key.clone()).or_default().push((offset, oldest));
        }
    }

    /// The transaction's request has been acked: its records may go.
    pub fn release(&mut self, key: &TransactionKey) {
        if !self.kept.is_empty() {
            self.kept.remove(key);
        }
    }

    /// Everything that is kept, in the order in which it was appended.
    pub fn replay(&self) -> Vec<Arc<Decision>> {
        let kept = self.kept.values().flatten();
        let mut records: Vec<_> = kept.chain(&self.recent).cloned().collect();
        records.sort_by_key(|(offset, _)| *offset);
        records.into_iter().map(|(_, decision)| decision).collect()
    }
}
