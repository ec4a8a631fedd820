//! From the outcome to where it is applied, or parked.

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
        // What was finished here may have left something in the store all the same: another
        // instance's branch, or what was stored after its prepare was given up.
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
    /// Whether this instance can tell that `finish` is applied, where it holds nothing of the
    /// transaction any more. Without a store it knows only of what it made itself.
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
            // It has just failed as often as it was to be tried.
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

    /// Does what the outcome means for what this instance holds.
    pub(super) fn apply(&mut self, cx: &mut InstanceContext<'_>) -> AfterEvent {
        let Some(Finisher { worker, finish, .. }) = self.finishers.first() else {
            return AfterEvent::Held;
        };
        let Some(held) = &self.held else { return AfterEvent::Held };
        // What a failed prepare has left is undone whatever the store says.
        let may_be_finished =
            matches!(held, HeldBranch::Prepared(_)) && self.asked_by.as_ref() != Some(worker);
        let has_store = cx.settings().has_store;
        let own = held.branch();
        let outcome = match finish.outcome {
            _ if has_store && may_be_finished => None,
            Outcome::Committed if finish.branch.as_ref() == Some(own) => Some(Outcome::Committed),
            // Another branch is the one that commits, and its holder may be gone: what the store says
            // of both comes first.
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

    /// Everything that the outcome means here is done.
    fn applied(&mut self, is_unknown: bool, cx: &mut InstanceContext<'_>) -> AfterEvent {
        let Some(outcome) = self.finishers.first().map(|it| it.finish.outcome) else {
            return AfterEvent::Held;
        };
        if is_unknown {
            return self.commits_unknown(cx);
        }
        self.conclude(PastOutcome::Cancelled, &VoteKind::Finished(outcome), cx)
    }

    /// The service's code could not do it. Workers get the error, and send the command again when
    /// it is time; what is parked is tried again until it succeeds.
    fn not_applied(
        &mut self,
        failed: Branch,
        error: &Arc<str>,
        cx: &mut InstanceContext<'_>,
    ) -> AfterEvent {
        self.failures = self.failures.saturating_add(1);
        // When the finish comes again, others may have it too: what is parked goes to any instance.
        self.asked_by = None;
        let (parked, told): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.finishers).into_iter().partition(|it| it.delivery.is_some());
        let is_parked = !parked.is_empty();
        self.finishers = parked;
        let fate = if is_parked {
            self.try_parked_later(cx);
            AfterEvent::Yielded
        } else if self.has_slot() {
            // What was found in the store is held like an own one: asked about, and tried again.
            self.held.get_or_insert(HeldBranch::Prepared(failed));
            self.progress = Progress::InDoubt;
            self.inquire_later(cx);
            AfterEvent::Yielded
        } else {
            // The store still holds it, and the next look through it will ask again.
            AfterEvent::Over
        };
        for finisher in told {
            cx.done(finisher, Err(Arc::clone(error)));
        }
        fate
    }

    /// The store does not know the branch that is to be committed, so this instance can't do it, and
    /// must not say that it is done. It holds nothing of the transaction any more.
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
