//! From a prepare to the vote.

use std::sync::Arc;

use crate::protocol::{
    ids::{Branch, RequestHash, TransactionKey, WorkerId},
    message::{Ballot, Outcome, Prepare, Reason, ReasonCode},
    participant::{
        Effect, Instance, Verdict,
        memory::{Remembered, has_namesake},
        transaction::{Finisher, Holding, Slot, Stage, Waiting},
    },
    time::Time,
};

impl Instance {
    pub(in super::super) fn prepare_received(
        &mut self,
        now: Time,
        it: Waiting,
        effects: &mut Vec<Effect>,
    ) {
        let key = it.prepare.key.clone();
        if self.holdings.contains_key(&key) {
            return self.prepare_again(it, effects);
        }
        // What the store holds is held, however late the prepare is and whatever was cancelled.
        let look = self.settings.has_store && (it.prepare.repeated || it.redelivered);
        let ballot = match look {
            true => self.ballot_from_memory(&it.prepare),
            false => self.ballot_without_code(now, &it.prepare),
        };
        if let Some(ballot) = ballot {
            self.vote(it.worker, &key, it.prepare.request_hash, ballot, effects);
            return effects.push(Effect::Ack(it.delivery));
        }
        if self.slots_used >= self.settings.max_concurrency {
            return self.waiting.push_back(it);
        }
        self.slots_used += 1;
        let mut holding = Holding {
            slot: Slot::Held(it.delivery),
            redelivered: it.redelivered,
            asked_by: (!look).then(|| it.worker.clone()),
            voters: vec![(it.worker, it.prepare.request_hash)],
            ..Holding::visiting(Some(it.prepare.request_hash), it.prepare.deadline)
        };
        if look {
            effects.push(Effect::ReadStore(key.clone()));
            holding.prepare = Some(it.prepare);
        } else {
            self.call_prepare(&mut holding, it.prepare, effects);
        }
        self.holdings.insert(&key, Box::new(holding));
    }

    /// What was said before to this prepare, or came of it.
    pub(in super::super) fn ballot_from_memory(&self, prepare: &Prepare) -> Option<Ballot> {
        match self.memory.of(&prepare.key)? {
            Remembered::Finished { outcome, .. } => Some(Ballot::Finished(*outcome)),
            Remembered::ReadOnly(seen) if *seen == prepare.request_hash => Some(Ballot::ReadOnly),
            Remembered::ReadOnly(_) => Some(self.refused(ReasonCode::IdReused)),
            Remembered::Refused(reason) => Some(Ballot::Refused(reason.clone())),
            Remembered::Cancelled => None,
        }
    }

    /// What can be said to a prepare without asking the service's code, where nothing is held.
    pub(in super::super) fn ballot_without_code(
        &self,
        now: Time,
        prepare: &Prepare,
    ) -> Option<Ballot> {
        if let Some(ballot) = self.ballot_from_memory(prepare) {
            return Some(ballot);
        }
        let key = &prepare.key;
        if self.memory.of(key).is_some() {
            Some(self.refused(ReasonCode::Cancelled))
        } else if self.memory.has_namesake(key) || has_namesake(&self.holdings, key) {
            Some(self.refused(ReasonCode::IdReused))
        } else if now > prepare.deadline {
            Some(self.refused(ReasonCode::Deadline))
        } else {
            None
        }
    }

    pub(in super::super) fn refused(&self, code: ReasonCode) -> Ballot {
        Ballot::Refused(Reason::at(&self.settings.service, code))
    }

    /// A prepare of what this instance has to do with already.
    pub(in super::super) fn prepare_again(&mut self, it: Waiting, effects: &mut Vec<Effect>) {
        let key = it.prepare.key.clone();
        let Some(holding) = self.holdings.get_mut(&key) else { return };
        match holding.slot {
            // It is only being looked into, on behalf of others: that comes first.
            Slot::None => return self.waiting.push_back(it),
            Slot::Detached if holding.is_about(it.prepare.request_hash) => {
                holding.slot = Slot::Held(it.delivery);
            }
            Slot::Detached | Slot::Held(_) => effects.push(Effect::Ack(it.delivery)),
        }
        self.vote_on_held(it.worker, &key, it.prepare.request_hash, effects);
    }

    /// Votes again on what is held, or once it can be told.
    pub(in super::super) fn vote_on_held(
        &mut self,
        to: WorkerId,
        key: &TransactionKey,
        request_hash: RequestHash,
        effects: &mut Vec<Effect>,
    ) {
        let Some(holding) = self.holdings.get_mut(key) else { return };
        if !holding.is_about(request_hash) {
            let reused = Reason::at(&self.settings.service, ReasonCode::IdReused);
            return self.vote(to, key, request_hash, Ballot::Refused(reused), effects);
        }
        holding.asked_by.take_if(|worker| *worker != to);
        match holding.stage {
            Stage::Prepared | Stage::Failed => self.vote_again(to, key, request_hash, effects),
            Stage::Recalling | Stage::Preparing | Stage::Finishing | Stage::BackingOff => {
                if !holding.voters.contains(&(to.clone(), request_hash)) {
                    holding.voters.push((to, request_hash));
                }
            }
        }
    }

    pub(in super::super) fn call_prepare(
        &mut self,
        holding: &mut Holding,
        prepare: Prepare,
        effects: &mut Vec<Effect>,
    ) {
        self.branches += 1;
        let branch = Branch::of(&self.settings.instance, self.branches);
        holding.stage = Stage::Preparing;
        holding.branch = Some(branch.clone());
        effects.push(Effect::CallPrepare {
            key: prepare.key,
            branch,
            request_hash: prepare.request_hash,
            data: prepare.data,
            deadline: prepare.deadline,
        });
    }

    pub(in super::super) fn prepare_ended(
        &mut self,
        now: Time,
        key: &TransactionKey,
        branch: &Branch,
        verdict: Verdict,
        effects: &mut Vec<Effect>,
    ) {
        let service = self.settings.service.clone();
        let Some(holding) = self.holdings.get_mut(key) else { return };
        if holding.stage != Stage::Preparing || holding.branch.as_ref() != Some(branch) {
            return;
        }
        let holds_nothing = matches!(verdict, Verdict::ReadOnly | Verdict::Refused(_));
        let commits =
            |it: &Finisher| it.finish.outcome == Outcome::Committed && it.finish.branch.is_some();
        if holds_nothing && self.settings.has_store && holding.finishers.iter().any(commits) {
            // Another run's branch is the one that commits, and whoever holds it may be gone.
            holding.branch = None;
            holding.stage = Stage::Recalling;
            return effects.push(Effect::ReadStore(key.clone()));
        }
        match verdict {
            Verdict::Prepared => holding.stage = Stage::Prepared,
            Verdict::Failed(why) => {
                holding.stage = Stage::Failed;
                holding.why_failed = Some(why);
            }
            Verdict::ReadOnly => {
                let seen = holding.request_hash;
                let remembered = seen.map_or(Remembered::Cancelled, Remembered::ReadOnly);
                return self.nothing_held(now, key, remembered, Ballot::ReadOnly, effects);
            }
            Verdict::Refused(message) => {
                let code = ReasonCode::Refused;
                let reason = Reason { code, service: Some(service), message };
                let ballot = Ballot::Refused(reason.clone());
                return self.nothing_held(now, key, Remembered::Refused(reason), ballot, effects);
            }
        }
        if holding.finishers.is_empty() {
            for (worker, request_hash) in std::mem::take(&mut holding.voters) {
                self.vote_again(worker, key, request_hash, effects);
            }
            self.inquire_later(now, key);
        } else {
            self.apply(now, key, effects);
        }
    }

    /// The transaction is none of this instance's business any more: say so, and free the slot.
    pub(in super::super) fn nothing_held(
        &mut self,
        now: Time,
        key: &TransactionKey,
        remembered: Remembered,
        ballot: Ballot,
        effects: &mut Vec<Effect>,
    ) {
        let Some(holding) = self.remove(key) else { return };
        match holding.finishers.first() {
            Some(Finisher { finish, .. }) => {
                let is_applied = self.can_answer_for(finish).is_ok();
                self.memory.remember(key, Remembered::finished(finish, is_applied));
            }
            None => self.memory.remember(key, remembered),
        }
        for (worker, request_hash) in holding.voters {
            self.vote(worker, key, request_hash, ballot.clone(), effects);
        }
        for finisher in holding.finishers {
            let applied = self.can_answer_for(&finisher.finish);
            self.done(finisher, applied, effects);
        }
        if let Slot::Held(delivery) = holding.slot {
            effects.push(Effect::Ack(delivery));
        }
        self.admit_waiting(now, effects);
    }

    pub(in super::super) fn vote_again(
        &self,
        to: WorkerId,
        key: &TransactionKey,
        request_hash: RequestHash,
        effects: &mut Vec<Effect>,
    ) {
        let Some(holding) = self.holdings.get(key) else { return };
        let Some(branch) = holding.branch.clone() else { return };
        let ballot = match &holding.why_failed {
            None => Ballot::Prepared { branch },
            Some(why) => {
                let service = Some(self.settings.service.clone());
                let message = Some(Arc::clone(why));
                let reason = Reason { code: ReasonCode::Failed, service, message };
                Ballot::Failed { branch, reason }
            }
        };
        self.vote(to, key, request_hash, ballot, effects);
    }
}
