//! From the outcome to where it is applied, or parked; and cancels.

use std::{collections::VecDeque, sync::Arc};

use crate::protocol::{
    ids::{Branch, TransactionKey},
    jitter::jitter,
    message::{Ballot, Finish, Outcome},
    participant::{
        Effect, Instance, Settings,
        memory::Remembered,
        transaction::{Finisher, Holding, Slot, Stage},
    },
    time::Time,
};

/// What a worker is told of a commit that this instance's store can't have prepared.
const UNKNOWN_BRANCH: &str = "the instance's store has neither prepared nor committed this branch: \
    do all instances of the service share one store?";

impl Instance {
    /// A cancel never touches what is prepared: it only keeps a prepare from being started.
    pub(in super::super) fn cancel_received(&mut self, key: &TransactionKey) {
        let has_started =
            self.holdings.get(key).is_some_and(|it| it.slot != Slot::None && it.prepare.is_none());
        if !has_started && self.memory.of(key).is_none() {
            self.memory.remember(key, Remembered::Cancelled);
        }
    }

    pub(in super::super) fn finish_received(
        &mut self,
        now: Time,
        finisher: Finisher,
        effects: &mut Vec<Effect>,
    ) {
        let key = finisher.finish.key.clone();
        if let Some(holding) = self.holdings.get_mut(&key) {
            let is_parked = finisher.delivery.is_some();
            holding.is_parked |= is_parked;
            holding.finishers.push(finisher);
            return match holding.stage {
                // It has just failed as often as it was to be tried.
                Stage::Prepared | Stage::Failed if is_parked && holding.failures > 0 => {
                    self.try_parked_later(now, &key);
                }
                Stage::Prepared | Stage::Failed | Stage::BackingOff => {
                    self.apply(now, &key, effects)
                }
                Stage::Recalling | Stage::Preparing | Stage::Finishing => {}
            };
        }
        let finish = &finisher.finish;
        // What was finished here may have left something in the store all the same: another
        // instance's branch, or what was stored after its prepare was given up.
        let is_seen_held = self.doubted.keys().any(|(doubted, _)| *doubted == key);
        let is_applied = match self.memory.of(&key) {
            _ if is_seen_held => false,
            Some(Remembered::Finished { applied, .. }) => {
                finish.branch.is_none() || *applied == finish.branch
            }
            Some(Remembered::ReadOnly(_) | Remembered::Refused(_) | Remembered::Cancelled)
            | None => false,
        };
        if is_applied || !self.settings.has_store {
            let applied = self.can_answer_for(finish);
            self.memory.remember(&key, Remembered::finished(finish, applied.is_ok()));
            return self.done(finisher, applied, effects);
        }
        let mut visiting = Holding::visiting(None, Time::EPOCH);
        visiting.is_parked = finisher.delivery.is_some();
        visiting.finishers.push(finisher);
        self.look_up(&key, visiting, effects);
    }

    /// Whether this instance can tell that `finish` is applied, where it holds nothing of the
    /// transaction any more. Without a store it knows only of what it made itself.
    pub(in super::super) fn can_answer_for(&self, finish: &Finish) -> Result<(), Arc<str>> {
        let own = &self.settings.instance;
        match &finish.branch {
            Some(branch)
                if finish.outcome == Outcome::Committed
                    && !self.settings.has_store
                    && branch.instance() != own =>
            {
                let maker = branch.instance();
                Err(format!("{maker} prepared it, and {own} has no store to find it in").into())
            }
            Some(_) | None => Ok(()),
        }
    }

    /// Does what the outcome means for what this instance holds.
    pub(in super::super) fn apply(
        &mut self,
        now: Time,
        key: &TransactionKey,
        effects: &mut Vec<Effect>,
    ) {
        let Some(holding) = self.holdings.get_mut(key) else { return };
        let Some(Finisher { worker, finish, .. }) = holding.finishers.first() else { return };
        let Some(own) = holding.branch.clone() else { return };
        // What a failed prepare has left is undone whatever the store says.
        let may_be_finished =
            holding.why_failed.is_none() && holding.asked_by.as_ref() != Some(worker);
        if self.settings.has_store && may_be_finished {
            holding.stage = Stage::Recalling;
            return effects.push(Effect::ReadStore(key.clone()));
        }
        let outcome = match finish.outcome {
            Outcome::Committed if finish.branch.as_ref() == Some(&own) => Outcome::Committed,
            // Another branch is the one that commits. Whoever holds it may be gone: what the store
            // says of both comes first.
            Outcome::Committed if self.settings.has_store && finish.branch.is_some() => {
                holding.stage = Stage::Recalling;
                return effects.push(Effect::ReadStore(key.clone()));
            }
            Outcome::Committed | Outcome::Aborted => Outcome::Aborted,
        };
        holding.calls = VecDeque::from([(own, outcome)]);
        self.call_next(now, key, effects);
    }

    pub(in super::super) fn call_next(
        &mut self,
        now: Time,
        key: &TransactionKey,
        effects: &mut Vec<Effect>,
    ) {
        let Some(holding) = self.holdings.get_mut(key) else { return };
        let Some((branch, outcome)) = holding.calls.front().cloned() else {
            return self.applied(now, key, effects);
        };
        holding.stage = Stage::Finishing;
        let key = key.clone();
        effects.push(match outcome {
            Outcome::Committed => Effect::CallCommit { key, branch },
            Outcome::Aborted => Effect::CallAbort { key, branch },
        });
    }

    pub(in super::super) fn finish_ended(
        &mut self,
        now: Time,
        key: &TransactionKey,
        branch: &Branch,
        applied: Result<(), Arc<str>>,
        effects: &mut Vec<Effect>,
    ) {
        let Some(holding) = self.holdings.get_mut(key) else { return };
        let is_running = holding.calls.front().is_some_and(|(running, _)| running == branch);
        if holding.stage != Stage::Finishing || !is_running {
            return;
        }
        match applied {
            Ok(()) => {
                holding.calls.pop_front();
                self.call_next(now, key, effects);
            }
            Err(error) => self.not_applied(now, key, &error, effects),
        }
    }

    /// Everything that the outcome means here is done.
    pub(in super::super) fn applied(
        &mut self,
        now: Time,
        key: &TransactionKey,
        effects: &mut Vec<Effect>,
    ) {
        let Some(holding) = self.holdings.get(key) else { return };
        let Some(outcome) = holding.finishers.first().map(|it| it.finish.outcome) else { return };
        if holding.is_unknown {
            return self.commits_unknown(now, key, effects);
        }
        self.nothing_held(now, key, Remembered::Cancelled, Ballot::Finished(outcome), effects);
    }

    /// The service's code could not do it. Workers are told, and will say when to try again; what
    /// is parked is tried again until it succeeds.
    pub(in super::super) fn not_applied(
        &mut self,
        now: Time,
        key: &TransactionKey,
        error: &Arc<str>,
        effects: &mut Vec<Effect>,
    ) {
        let Some(holding) = self.holdings.get_mut(key) else { return };
        let failed = std::mem::take(&mut holding.calls).pop_front().map(|(branch, _)| branch);
        holding.failures = holding.failures.saturating_add(1);
        // When it is told again, others may have been told too: what is parked goes to any instance.
        holding.asked_by = None;
        holding.is_unknown = false;
        let (parked, told): (Vec<_>, Vec<_>) = std::mem::take(&mut holding.finishers)
            .into_iter()
            .partition(|it| it.delivery.is_some());
        let is_parked = !parked.is_empty();
        holding.finishers = parked;
        if is_parked {
            self.try_parked_later(now, key);
        } else if holding.slot == Slot::None {
            // The store still holds it, and the next look through it will ask again.
            self.remove(key);
        } else {
            // What was found in the store is held like an own one: asked about, and tried again.
            holding.branch = holding.branch.take().or(failed);
            holding.stage = match holding.why_failed {
                None => Stage::Prepared,
                Some(_) => Stage::Failed,
            };
            self.inquire_later(now, key);
        }
        for finisher in told {
            self.done(finisher, Err(Arc::clone(error)), effects);
        }
        self.admit_waiting(now, effects);
    }

    /// The store does not know the branch that is to be committed, so this instance can't do it, and
    /// must not say that it is done. It holds nothing of the transaction any more.
    pub(in super::super) fn commits_unknown(
        &mut self,
        now: Time,
        key: &TransactionKey,
        effects: &mut Vec<Effect>,
    ) {
        let Some(holding) = self.remove(key) else { return };
        if let Some(Finisher { finish, .. }) = holding.finishers.first() {
            let outcome = finish.outcome;
            self.memory.remember(key, Remembered::finished(finish, false));
            for (worker, request_hash) in holding.voters {
                self.vote(worker, key, request_hash, Ballot::Finished(outcome), effects);
            }
        }
        if let Slot::Held(delivery) = holding.slot {
            effects.push(Effect::Ack(delivery));
        }
        let (parked, told): (Vec<_>, Vec<_>) =
            holding.finishers.into_iter().partition(|it| it.delivery.is_some());
        for finisher in told {
            let error = UNKNOWN_BRANCH.into();
            self.done(finisher, Err(error), effects);
        }
        if !parked.is_empty() {
            let mut visiting = Holding::visiting(None, Time::EPOCH);
            visiting.finishers = parked;
            visiting.is_parked = true;
            visiting.failures = holding.failures.saturating_add(1);
            self.holdings.insert(key, Box::new(visiting));
            self.try_parked_later(now, key);
        }
        self.admit_waiting(now, effects);
    }

    pub(in super::super) fn try_parked_later(&mut self, now: Time, key: &TransactionKey) {
        let Settings { retry_parked_every: pause, seed, .. } = self.settings;
        if let Some(holding) = self.holdings.get_mut(key) {
            holding.stage = Stage::BackingOff;
        }
        self.wake_at(key, now + (pause - jitter(seed, now, key, pause / 4)));
    }
}
