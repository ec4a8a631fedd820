//! Looks up one transaction in the store, and handles what it holds.

use std::collections::BTreeSet;

use crate::protocol::{
    ids::{Branch, TransactionKey, WorkerId},
    message::{Outcome, Prepare, Query, ReasonCode, VoteKind},
    participant::{
        Effect, Holdings, InDoubt, InstanceContext,
        memory::PastOutcome,
        transaction::{AfterEvent, Finisher, HeldBranch, HeldTransaction, PendingCalls, Progress},
    },
    time::Time,
};

impl Holdings {
    pub(in super::super) fn query_received(
        &mut self,
        worker: WorkerId,
        query: Query,
        cx: &mut InstanceContext<'_>,
    ) {
        let Query { key, request_hash } = query;
        if let Some(held) = self.transactions.get_mut(&key) {
            return held.vote_on_held(worker, request_hash, cx);
        }
        let kind = match cx.resources.memory.of(&key) {
            Some(PastOutcome::Finished { outcome, .. }) => VoteKind::Finished(*outcome),
            Some(PastOutcome::ReadOnly(seen)) if *seen == request_hash => VoteKind::ReadOnly,
            Some(PastOutcome::ReadOnly(_)) => cx.refused(ReasonCode::IdReused),
            Some(PastOutcome::Refused(reason)) => VoteKind::Refused(reason.clone()),
            // This instance holds nothing, but the store may.
            Some(PastOutcome::Cancelled) | None => {
                let mut visiting = HeldTransaction::visiting(key, Some(request_hash), Time::EPOCH);
                visiting.voters.push((worker, request_hash));
                return self.look_up(visiting, cx);
            }
        };
        cx.vote(worker, &key, request_hash, kind);
    }

    /// Looks up a transaction that takes no slot here.
    pub(super) fn look_up(&mut self, mut visiting: HeldTransaction, cx: &mut InstanceContext<'_>) {
        let slots_used = cx.resources.slots_used as usize;
        let visitors = self.transactions.len().saturating_sub(slots_used);
        // A finish from the service's durable queue isn't sent again, so it is never dropped. The transport
        // limits how many of them are delivered at once.
        let is_owed = visiting.finishers.iter().any(|finisher| finisher.delivery.is_some());
        let settings = cx.settings();
        if settings.has_store && (is_owed || visitors < settings.visitors_max) {
            visiting.ask_store(cx);
            let key = visiting.key.clone();
            self.transactions.insert(&key, Box::new(visiting));
        }
    }

    pub(in super::super) fn store_read(
        &mut self,
        key: &TransactionKey,
        held: Vec<InDoubt>,
        cx: &mut InstanceContext<'_>,
    ) {
        let has_namesake = self.has_namesake(key);
        self.with(key, cx, |it, cx| it.store_read(held, has_namesake, cx));
    }
}

impl HeldTransaction {
    fn store_read(
        &mut self,
        held: Vec<InDoubt>,
        has_namesake: bool,
        cx: &mut InstanceContext<'_>,
    ) -> AfterEvent {
        let prepare = match &mut self.progress {
            Progress::Recalling(prepare) => prepare.take(),
            Progress::LookingUp { .. } => None,
            Progress::Preparing(_)
            | Progress::InDoubt
            | Progress::Finishing { .. }
            | Progress::BackingOff => return AfterEvent::Held,
        };
        if !self.finishers.is_empty() {
            return self.apply_to_store(held, cx);
        }
        let holds_some = !held.is_empty();
        let found = held.into_iter().find(|it| self.is_about(it.request_hash));
        match (found, prepare) {
            (None, _) if holds_some => self.end_visit(&cx.refused(ReasonCode::IdReused), cx),
            (Some(found), Some(_)) if self.redelivered => {
                self.held = Some(HeldBranch::Prepared(found.branch));
                self.progress = Progress::InDoubt;
                self.vote_to_all(cx);
                self.inquire_later(cx);
                AfterEvent::Held
            }
            // Another instance holds it, or did and is gone: this one votes from the store.
            (Some(found), _) => self.end_visit(&VoteKind::Prepared { branch: found.branch }, cx),
            (None, Some(prepare)) => self.prepare_after_look(prepare, has_namesake, cx),
            (None, None) => AfterEvent::Over,
        }
    }

    /// Ends the transaction here with a vote from the store.
    fn end_visit(&mut self, kind: &VoteKind, cx: &mut InstanceContext<'_>) -> AfterEvent {
        let delivery = self.free_slot(cx);
        self.answer_voters(kind, cx);
        cx.effects.extend(delivery.map(Effect::Ack));
        AfterEvent::Over
    }

    fn prepare_after_look(
        &mut self,
        prepare: Prepare,
        has_namesake: bool,
        cx: &mut InstanceContext<'_>,
    ) -> AfterEvent {
        let Some(kind) = cx.vote_without_code(&prepare, has_namesake) else {
            self.call_prepare(prepare, cx);
            return AfterEvent::Held;
        };
        let remembered = cx.resources.memory.of(&self.key).cloned();
        self.conclude(remembered.unwrap_or(PastOutcome::Cancelled), &kind, cx)
    }

    /// Applies the outcome to all branches that the store holds.
    fn apply_to_store(&mut self, held: Vec<InDoubt>, cx: &mut InstanceContext<'_>) -> AfterEvent {
        let Some(Finisher { finish, .. }) = self.finishers.first() else { return AfterEvent::Held };
        let mut branches: BTreeSet<Branch> = held.into_iter().map(|it| it.branch).collect();
        if let Some(HeldBranch::Failed { branch, .. }) = &self.held {
            branches.insert(branch.clone());
        }
        let outcome_of = |branch: &Branch| match finish.outcome {
            Outcome::Committed if finish.branch.as_ref() == Some(branch) => Outcome::Committed,
            Outcome::Committed | Outcome::Aborted => Outcome::Aborted,
        };
        let wanted = finish.branch.clone().filter(|_| finish.outcome == Outcome::Committed);
        let not_seen = wanted.filter(|it| !branches.contains(it));
        let calls: PendingCalls =
            branches.into_iter().map(|it| (it.clone(), outcome_of(&it))).collect();
        match not_seen {
            // It was committed before, or was prepared in another store.
            Some(branch) if cx.settings().remembers_commits => {
                self.progress = Progress::LookingUp { branch: branch.clone(), calls };
                cx.effects.push(Effect::LookUpCommit { key: self.key.clone(), branch });
                AfterEvent::Held
            }
            Some(_) | None => self.call_next(calls, false, cx),
        }
    }

    pub(in super::super) fn commit_looked_up(
        &mut self,
        branch: &Branch,
        is_known: bool,
        cx: &mut InstanceContext<'_>,
    ) -> AfterEvent {
        match &mut self.progress {
            Progress::LookingUp { branch: awaited, calls } if awaited == branch => {
                let calls = std::mem::take(calls);
                self.call_next(calls, !is_known, cx)
            }
            Progress::Recalling(_)
            | Progress::LookingUp { .. }
            | Progress::Preparing(_)
            | Progress::InDoubt
            | Progress::Finishing { .. }
            | Progress::BackingOff => AfterEvent::Held,
        }
    }
}
