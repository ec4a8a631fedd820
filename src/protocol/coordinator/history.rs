//! Handles records of the journal, and searches older parts of it for transactions that are out of view.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use crate::protocol::{
    coordinator::{
        Anomaly, CoordinatorContext, Effect, Phase, Work, inquiries::Inquiries,
        transaction::CoordinatedTransaction,
    },
    ids::TransactionKey,
    journal_view::JournalView,
    message::Decision,
    time::Time,
};

/// The search of older parts of the journal. There is one search at a time, for many transactions.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Default)]
pub(super) struct HistorySearch {
    /// The transactions that the current search is for. It begins early enough for all of them.
    serving: BTreeSet<TransactionKey>,
    /// The first record that it has found of each.
    found: BTreeMap<TransactionKey, Arc<Decision>>,
    /// The first record of each that was in view since the search began: the view may evict it meanwhile.
    in_view: BTreeMap<TransactionKey, Arc<Decision>>,
    /// The transactions that the next search is for.
    next: BTreeSet<TransactionKey>,
}

impl HistorySearch {
    /// Adds `key` to the next search, which begins at once if there is no current one.
    pub(super) fn look_for(
        &mut self,
        key: &TransactionKey,
        view: &JournalView,
        cx: &mut CoordinatorContext<'_>,
    ) {
        self.next.insert(key.clone());
        self.begin(view, cx);
    }

    fn begin(&mut self, view: &JournalView, cx: &mut CoordinatorContext<'_>) {
        if !self.serving.is_empty() {
            return;
        }
        let Some(earliest) = self.next.iter().map(|key| key.requested_at).min() else { return };
        self.serving = std::mem::take(&mut self.next);
        let seen = |key| Some((TransactionKey::clone(key), view.earliest_seen(key)?.clone()));
        self.in_view = self.serving.iter().filter_map(seen).collect();
        let from = earliest - cx.settings().clock_margin;
        cx.effects.push(Effect::ReadHistory { from, until: view.oldest_offset() });
    }

    /// The current search has read a record.
    pub(super) fn read(&mut self, decision: Arc<Decision>) {
        if self.serving.contains(&decision.key) {
            self.found.entry(decision.key.clone()).or_insert(decision);
        }
    }

    /// A record was read at the journal's end.
    fn seen(&mut self, decision: &Arc<Decision>) {
        if self.serving.contains(&decision.key) {
            self.in_view.entry(decision.key.clone()).or_insert_with(|| Arc::clone(decision));
        }
    }

    /// The journal has a gap after the part that the current search reads: its transactions must be searched
    /// for again.
    fn look_again(&mut self) {
        self.next.extend(self.serving.iter().cloned());
    }
}

impl Work {
    pub(super) fn records_read(
        &mut self,
        offset: u64,
        decisions: Vec<Arc<Decision>>,
        cx: &mut CoordinatorContext<'_>,
    ) {
        if offset > self.view.next_offset() {
            cx.effects.push(Effect::Report(Anomaly::JournalGap(offset)));
            self.view.attach(offset, cx.now + Duration::from_millis(1));
            self.recall_undecided(cx);
        }
        for first in self.view.read(cx.now, offset, decisions) {
            self.first_read(&first, cx);
        }
    }

    fn first_read(&mut self, first: &Arc<Decision>, cx: &mut CoordinatorContext<'_>) {
        self.history.seen(first);
        self.inquiries.first_read(first, cx);
        self.with(&first.key, cx, |it, cx| {
            if it.is_undecided() && it.phase() != Phase::Recalling {
                it.adopt(first, cx);
            }
        });
    }

    /// Records are lost: a transaction that seems undecided may have been decided.
    fn recall_undecided(&mut self, cx: &mut CoordinatorContext<'_>) {
        let is_undecided =
            |it: &CoordinatedTransaction| it.is_undecided() && it.phase() != Phase::Recalling;
        let mut keys = self.transactions.keys();
        keys.retain(|key| self.transactions.get(key).is_some_and(|it| is_undecided(it)));
        self.history.look_again();
        for key in keys {
            self.with(&key, cx, CoordinatedTransaction::recall_again);
            self.history.look_for(&key, &self.view, cx);
        }
        // The instances will inquire again.
        self.inquiries = Inquiries::default();
    }

    pub(super) fn history_ended(&mut self, reaches: Option<Time>, cx: &mut CoordinatorContext<'_>) {
        let found = std::mem::take(&mut self.history.found);
        let in_view = std::mem::take(&mut self.history.in_view);
        let margin = cx.settings().clock_margin;
        for key in std::mem::take(&mut self.history.serving) {
            if self.history.next.contains(&key) {
                continue;
            }
            let first = found.get(&key).or_else(|| in_view.get(&key)).cloned();
            let is_complete = reaches.is_some_and(|reaches| reaches <= key.requested_at - margin);
            self.recalled(&key, first.filter(|_| is_complete), is_complete, cx);
        }
        self.history.begin(&self.view, cx);
    }

    fn recalled(
        &mut self,
        key: &TransactionKey,
        first: Option<Arc<Decision>>,
        is_complete: bool,
        cx: &mut CoordinatorContext<'_>,
    ) {
        self.inquiries.recalled(key, first.as_deref(), is_complete, cx);
        self.with(key, cx, |it, cx| match first {
            _ if it.phase() != Phase::Recalling => {}
            Some(first) => it.adopt(&first, cx),
            None if is_complete => it.start(cx),
            None => it.park(cx),
        });
    }
}
