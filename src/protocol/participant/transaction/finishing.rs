//! Applies the outcome, and tries again if the service's code fails.

use std::{collections::VecDeque, sync::Arc};

use crate::protocol::{
    ids::Branch,
    message::{Finish, Outcome, VoteKind},
    participant::{
        Effect, Holdings, InstanceContext,
        memory::PastOutcome,
        transaction::{AfterEvent, Finisher, HeldBranch, HeldTransaction, PendingCalls, Progress},
    },
    time::Time,
};

/// The answer to a commit that this instance's store can't have prepared.
const UNKNOWN_BRANCH: &str = "the instance's store has neither prepared nor committed this branch: \
    do all instances of the service share one store?";

impl Holdings {
    pub(in super::super) fn finish_received(
        &mut self,
        finisher: Finisher,
        cx: &mut InstanceContext<'_>,
    ) {
        let key = finisher.finish.key.clone();
        if self.transactions.contains_key(&key) {
            return self.with(&key, cx, |it, cx| it.finish_received(finisher, cx));
        }
        let finish = &finisher.finish;
        // After a finish there may still be a branch in the store: of another instance, or of a prepare that
        // has stored it after its time-out.
        let is_applied = match cx.resources.memory.of(&key) {
            _ if self.scans.has_in_doubt(&key) => false,
            Some(PastOutcome::Finished { applied, .. }) => {
                finish.branch.is_none() || *applied == finish.branch
            }
            Some(PastOutcome::ReadOnly(_) | PastOutcome::Refused(_) | PastOutcome::Cancelled)
            | None => false,
        };
        if is_applied || !cx.settings().has_store {
            let applied = cx.can_answer_for(finish);
            cx.resources.memory.remember(&key, PastOutcome::finished(finish, applied.is_ok()));
            return cx.done(finisher, applied);
        }
        let mut visiting = HeldTransaction::visiting(key, None, Time::EPOCH);
        visiting.is_parked = finisher.delivery.is_some();
        visiting.finishers.push(finisher);
        self.look_up(visiting, cx);
    }
}

impl InstanceContext<'_> {
    /// Whether this instance can answer that `finish` is applied although it holds nothing of the
    /// transaction. Without a store it knows only its own branches.
    pub(super) fn can_answer_for(&self, finish: &Finish) -> Result<(), Arc<str>> {
        let own = &self.settings().instance;
        match &finish.branch {
            Some(branch)
                if finish.outcome == Outcome::Committed
                    && !self.settings().has_store
                    && branch.instance() != own =>
            {
                let maker = branch.instance();
                Err(format!("{maker} prepared it, and {own} has no store to find it in").into())
            }
            Some(_) | None => Ok(()),
        }
    }
}

impl HeldTransaction {
    fn finish_received(&mut self, finisher: Finisher, cx: &mut InstanceContext<'_>) -> AfterEvent {
        let is_parked = finisher.delivery.is_some();
        self.is_parked |= is_parked;
        self.finishers.push(finisher);
        match self.progress {
            // It has just failed several times.
            Progress::InDoubt if is_parked && self.failures > 0 => {
                self.try_parked_later(cx);
                AfterEvent::Held
            }
            Progress::InDoubt | Progress::BackingOff => self.apply(cx),
            Progress::Recalling(_)
            | Progress::LookingUp { .. }
            | Progress::Preparing(_)
            | Progress::Finishing { .. } => AfterEvent::Held,
        }
    }

    /// Applies the outcome to the branch that this instance holds.
    pub(super) fn apply(&mut self, cx: &mut InstanceContext<'_>) -> AfterEvent {
        let Some(Finisher { worker, finish, .. }) = self.finishers.first() else {
            return AfterEvent::Held;
        };
        let Some(held) = &self.held else { return AfterEvent::Held };
        // What a failed prepare has left is undone in any case.
        let may_be_finished =
            matches!(held, HeldBranch::Prepared(_)) && self.asked_by.as_ref() != Some(worker);
        let has_store = cx.settings().has_store;
        let own = held.branch();
        let outcome = match finish.outcome {
            _ if has_store && may_be_finished => None,
            Outcome::Committed if finish.branch.as_ref() == Some(own) => Some(Outcome::Committed),
            // The decision commits another branch, whose holder may be gone: first look up both in the
            // store.
            Outcome::Committed if has_store && finish.branch.is_some() => None,
            Outcome::Committed | Outcome::Aborted => Some(Outcome::Aborted),
        };
        let Some(outcome) = outcome else {
            self.ask_store(cx);
            return AfterEvent::Held;
        };
        let calls = VecDeque::from([(own.clone(), outcome)]);
        self.call_next(calls, false, cx)
    }

    /// Calls the service's code for the first of `calls`.
    pub(super) fn call_next(
        &mut self,
        calls: PendingCalls,
        is_unknown: bool,
        cx: &mut InstanceContext<'_>,
    ) -> AfterEvent {
        let Some((branch, outcome)) = calls.front().cloned() else {
            return self.applied(is_unknown, cx);
        };
        self.progress = Progress::Finishing { calls, is_unknown };
        let key = self.key.clone();
        cx.effects.push(match outcome {
            Outcome::Committed => Effect::CallCommit { key, branch },
            Outcome::Aborted => Effect::CallAbort { key, branch },
        });
        AfterEvent::Held
    }

    pub(in super::super) fn finish_ended(
        &mut self,
        branch: Branch,
        applied: Result<(), Arc<str>>,
        cx: &mut InstanceContext<'_>,
    ) -> AfterEvent {
        let Progress::Finishing { calls, is_unknown } = &mut self.progress else {
            return AfterEvent::Held;
        };
        if calls.front().is_none_or(|(running, _)| *running != branch) {
            return AfterEvent::Held;
        }
        match applied {
            Ok(()) => {
                calls.pop_front();
                let (rest, is_unknown) = (std::mem::take(calls), *is_unknown);
                self.call_next(rest, is_unknown, cx)
            }
            Err(error) => self.not_applied(branch, &error, cx),
        }
    }

    /// The outcome is applied.
    fn applied(&mut self, is_unknown: bool, cx: &mut InstanceContext<'_>) -> AfterEvent {
        let Some(outcome) = self.finishers.first().map(|it| it.finish.outcome) else {
            return AfterEvent::Held;
        };
        if is_unknown {
            return self.commits_unknown(cx);
        }
        self.conclude(PastOutcome::Cancelled, &VoteKind::Finished(outcome), cx)
    }

    /// The service's code has failed. Workers get the error, and send the command again later. A parked
    /// commit is tried again until it succeeds.
    fn not_applied(
        &mut self,
        failed: Branch,
        error: &Arc<str>,
        cx: &mut InstanceContext<'_>,
    ) -> AfterEvent {
        self.failures = self.failures.saturating_add(1);
        // When the finish comes again, another instance may have it too: a parked one goes to any instance.
        self.asked_by = None;
        let (parked, told): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.finishers).into_iter().partition(|it| it.delivery.is_some());
        let is_parked = !parked.is_empty();
        self.finishers = parked;
        let fate = if is_parked {
            self.try_parked_later(cx);
            AfterEvent::Yielded
        } else if self.has_slot() {
            // A branch from the store is handled like this instance's own.
            self.held.get_or_insert(HeldBranch::Prepared(failed));
            self.progress = Progress::InDoubt;
            self.inquire_later(cx);
            AfterEvent::Yielded
        } else {
            // The store still holds it, and the next scan will inquire about it.
            AfterEvent::Over
        };
        for finisher in told {
            cx.done(finisher, Err(Arc::clone(error)));
        }
        fate
    }

    /// The store doesn't know the branch that must be committed, so this instance can't commit it, and must
    /// not answer that it is done. It holds nothing of the transaction any more.
    fn commits_unknown(&mut self, cx: &mut InstanceContext<'_>) -> AfterEvent {
        let delivery = self.free_slot(cx);
        if let Some(Finisher { finish, .. }) = self.finishers.first() {
            let outcome = finish.outcome;
            cx.resources.memory.remember(&self.key, PastOutcome::finished(finish, false));
            self.answer_voters(&VoteKind::Finished(outcome), cx);
        }
        cx.effects.extend(delivery.map(Effect::Ack));
        let (parked, told): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.finishers).into_iter().partition(|it| it.delivery.is_some());
        for finisher in told {
            cx.done(finisher, Err(UNKNOWN_BRANCH.into()));
        }
        if parked.is_empty() {
            return AfterEvent::Over;
        }
        self.disarm(cx);
        *self = Self {
            finishers: parked,
            is_parked: true,
            failures: self.failures.saturating_add(1),
            ..Self::visiting(self.key.clone(), None, Time::EPOCH)
        };
        self.try_parked_later(cx);
        AfterEvent::Yielded
    }
}
