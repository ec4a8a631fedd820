//! The journal in memory.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
};

use crate::protocol::{ids::TransactionKey, message::Decision};

/// How many records are kept although nothing in flight needs them: they answer a repeated request.
const RECENT_MAX: usize = 1024;

/// An append-only log of decisions that lives as long as the process.
///
/// It forgets records, since nobody else reads it. Of transactions whose request has been acked,
/// only the most recent records are kept; of all others, all are. So the first record of a
/// transaction that is not acked can always be found, however old it is.
#[derive(Debug, Default)]
pub struct MemoryJournal {
    next: u64,
    recent: VecDeque<(u64, Arc<Decision>)>,
    /// Records that are no longer recent, of transactions in flight.
    kept: BTreeMap<TransactionKey, Vec<(u64, Arc<Decision>)>>,
}

impl MemoryJournal {
    /// Appends a record. `is_in_flight` returns whether a transaction's records must be kept.
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

    /// The transaction's request has been acked: its records may be dropped.
    pub fn release(&mut self, key: &TransactionKey) {
        if !self.kept.is_empty() {
            self.kept.remove(key);
        }
    }

    /// All records that are kept, in the order in which they were appended.
    pub fn replay(&self) -> Vec<Arc<Decision>> {
        let kept = self.kept.values().flatten();
        let mut records: Vec<_> = kept.chain(&self.recent).cloned().collect();
        records.sort_by_key(|(offset, _)| *offset);
        records.into_iter().map(|(_, decision)| decision).collect()
    }
}
