//! The looks through the whole store, for what it holds and this instance doesn't.

use std::{collections::BTreeMap, time::Duration};

use crate::protocol::{
    ids::{Branch, TransactionKey},
    participant::{Effect, Holdings, InDoubt, InstanceContext, Settings},
    time::Time,
};

/// When to look through the store again, and what the last look has left in doubt.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(super) struct StoreScans {
    /// `None`: there is no store, or a look is under way.
    next_at: Option<Time>,
    /// What the store was seen to hold that isn't held here, and since when.
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

    /// Whether the store was last seen to hold something of the transaction that isn't held here.
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
        // Who is in doubt is asked about when it is time, and not first at the next round.
        let soonest = seen.values().min().map(|since| *since + inquire_after);
        let usual = cx.now + scan_every;
        self.scans.next_at = Some(soonest.map_or(usual, |at| at.min(usual)));
        self.scans.doubted = seen;
    }
}
