//! What is read of the journal, and the look further back in it for what the view does not reach.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use crate::protocol::{
    coordinator::{
        Anomaly, Coordinator, Effect, Phase, inquiries::Inquest, transaction::Transaction,
    },
    deadlines::Deadlines,
    ids::TransactionKey,
    message::Decision,
    time::Time,
};

/// The look further back in the journal: one at a time serves all who wait for it.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Default)]
pub(super) struct History {
    /// Whom the look under way serves; it has begun early enough for all of them.
    serving: BTreeSet<TransactionKey>,
    /// The first record it has found of each.
    found: BTreeMap<TransactionKey, Arc<Decision>>,
    /// The first record of each that was in view since it began: the view may forget it meanwhile.
    in_view: BTreeMap<TransactionKey, Arc<Decision>>,
    /// Whom the next one serves.
    next: BTreeSet<TransactionKey>,
}

impl Coordinator {
    pub(super) fn records_read(
        &mut self,
        now: Time,
        offset: u64,
        decisions: Vec<Arc<Decision>>,
        effects: &mut Vec<Effect>,
    ) {
        if offset > self.view.next_offset() {
            effects.push(Effect::Report(Anomaly::JournalGap(offset)));
            self.view.attach(offset, now + Duration::from_millis(1));
            self.recall_undecided(now, effects);
        }
        for first in self.view.read(now, offset, decisions) {
            self.first_read(now, &first, effects);
        }
    }

    fn first_read(&mut self, now: Time, first: &Arc<Decision>, effects: &mut Vec<Effect>) {
        self.history.seen(first);
        // Until it has been looked up, an earlier record may be the outcome.
        let is_looked_up = |it: &Inquest| it.propose_at.is_some();
        if self.inquests.get(&first.key).is_some_and(is_looked_up) {
            self.answer_inquest(now, first, effects);
        }
        self.with(now, &first.key, effects, |it, cx| {
            if it.is_undecided() && it.phase() != Phase::Recalling {
                it.adopt(first, cx);
            }
        });
    }

    /// Records are lost: what was not seen to be decided may have been.
    fn recall_undecided(&mut self, now: Time, effects: &mut Vec<Effect>) {
        let is_undecided = |it: &Transaction| it.is_undecided() && it.phase() != Phase::Recalling;
        let mut keys = self.transactions.keys();
        keys.retain(|key| self.transactions.get(key).is_some_and(|it| is_undecided(it)));
        // A look under way ends before the gap, and the view begins after it.
        self.history.next.extend(self.history.serving.iter().cloned());
        for key in keys {
            self.with(now, &key, effects, Transaction::recall_again);
            self.look_further_back(&key, effects);
        }
        // Who has asked will ask again.
        self.inquests.clear();
        self.shared.inquest_deadlines = Deadlines::default();
    }

    pub(super) fn look_further_back(&mut self, key: &TransactionKey, effects: &mut Vec<Effect>) {
        self.history.next.insert(key.clone());
        self.begin_look(effects);
    }

    fn begin_look(&mut self, effects: &mut Vec<Effect>) {
        if !self.history.serving.is_empty() {
            return;
        }
        let Some(earliest) = self.history.next.iter().map(|key| key.requested_at).min() else {
            return;
        };
        self.history.serving = std::mem::take(&mut self.history.next);
        let seen = |key| Some((TransactionKey::clone(key), self.view.earliest_seen(key)?.clone()));
        self.history.in_view = self.history.serving.iter().filter_map(seen).collect();
        let from = earliest - self.shared.settings.clock_margin;
        effects.push(Effect::ReadHistory { from, until: self.view.oldest_offset() });
    }

    pub(super) fn history_ended(
        &mut self,
        now: Time,
        reaches: Option<Time>,
        effects: &mut Vec<Effect>,
    ) {
        let found = std::mem::take(&mut self.history.found);
        let in_view = std::mem::take(&mut self.history.in_view);
        let margin = self.shared.settings.clock_margin;
        for key in std::mem::take(&mut self.history.serving) {
            if self.history.next.contains(&key) {
                continue;
            }
            let first = found.get(&key).or_else(|| in_view.get(&key)).cloned();
            let is_complete = reaches.is_some_and(|reaches| reaches <= key.requested_at - margin);
            self.recalled(now, &key, first.filter(|_| is_complete), is_complete, effects);
        }
        self.begin_look(effects);
    }

    fn recalled(
        &mut self,
        now: Time,
        key: &TransactionKey,
        first: Option<Arc<Decision>>,
        is_complete: bool,
        effects: &mut Vec<Effect>,
    ) {
        if let Some(inquest) = self.inquests.get(key).filter(|it| it.propose_at.is_none()) {
            let is_due = inquest.deadline < now;
            match &first {
                Some(first) => self.answer_inquest(now, first, effects),
                None if is_complete && is_due => self.propose_abort(now, key, effects),
                None => drop(self.drop_inquest(key)),
            }
        }
        self.with(now, key, effects, |it, cx| match first {
            _ if it.phase() != Phase::Recalling => {}
            Some(first) => it.adopt(&first, cx),
            None if is_complete => it.start(cx),
            None => it.park(cx),
        });
    }
}

impl History {
    fn seen(&mut self, decision: &Arc<Decision>) {
        if self.serving.contains(&decision.key) {
            self.in_view.entry(decision.key.clone()).or_insert_with(|| Arc::clone(decision));
        }
    }

    pub(super) fn read(&mut self, decision: Arc<Decision>) {
        if self.serving.contains(&decision.key) {
            self.found.entry(decision.key.clone()).or_insert(decision);
        }
    }
}
