//! Scans the whole store for branches that this instance doesn't hold.

use std::{collections::BTreeMap, time::Duration};

use crate::protocol::{
    ids::{Branch, TransactionKey},
    participant::{Effect, Holdings, InDoubt, InstanceContext, Settings},
    time::Time,
};

/// When to scan the store again, and what the last scan has left in doubt.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(super) struct StoreScans {
    /// `None`: there is no store, or a scan is under way.
    next_at: Option<Time>,
    /// The branches that the store holds and this instance doesn't, and since when that is known.
    doubted: BTreeMap<(TransactionKey, Branch), Time>,
}

impl StoreScans {
    pub(super) fn new(next_at: Option<Time>) -> Self {
        Self { next_at, doubted: BTreeMap::new() }
    }

    pub(super) fn clock_set_back(&mut self, by: Duration) {
        self.next_at = self.next_at.map(|at| at - by);
        self.doubted.values_mut().for_each(|since| *since = *since - by);
    }

    pub(super) fn next_deadline(&self) -> Option<Time> {
        self.next_at
    }

    pub(super) fn begin_if_due(&mut self, cx: &mut InstanceContext<'_>) {
        if self.next_at.is_some_and(|at| at <= cx.now) {
            self.next_at = None;
            cx.effects.push(Effect::ScanStore);
        }
    }

    /// Whether the last scan has found a branch of the transaction that this instance doesn't hold.
    pub(super) fn has_in_doubt(&self, key: &TransactionKey) -> bool {
        self.doubted.keys().any(|(doubted, _)| doubted == key)
    }
}

impl Holdings {
    pub(super) fn store_scanned(&mut self, held: Vec<InDoubt>, cx: &mut InstanceContext<'_>) {
        let Settings { inquire_after, scan_every, .. } = *cx.settings();
        let mut seen = BTreeMap::new();
        for it in held {
            let own = self.transactions.get(&it.key).and_then(|own| own.branch());
            if own == Some(&it.branch) {
                continue;
            }
            let name = (it.key.clone(), it.branch.clone());
            let since = self.scans.doubted.get(&name).copied().unwrap_or(cx.now);
            if cx.now.since(since) < inquire_after {
                seen.insert(name, since);
            } else {
                seen.insert(name, cx.now);
                cx.inquire(it);
            }
        }
        // A branch in doubt is inquired about when it is time, even if that is before the next usual scan.
        let soonest = seen.values().min().map(|since| *since + inquire_after);
        let usual = cx.now + scan_every;
        self.scans.next_at = Some(soonest.map_or(usual, |at| at.min(usual)));
        self.scans.doubted = seen;
    }
}
