//! What the store is asked about one transaction, and what follows from its answer.

use std::collections::BTreeSet;

use crate::protocol::{
    ids::{Branch, TransactionKey, WorkerId},
    message::{Ballot, Outcome, Prepare, Query, Reason, ReasonCode},
    participant::{
        Effect, InDoubt, Instance,
        memory::Remembered,
        transaction::{Finisher, Holding, Slot, Stage},
    },
    time::Time,
};

impl Instance {
    pub(in super::super) fn query_received(
        &mut self,
        worker: WorkerId,
        query: Query,
        effects: &mut Vec<Effect>,
    ) {
        let Query { key, request_hash } = query;
        if self.holdings.contains_key(&key) {
            return self.vote_on_held(worker, &key, request_hash, effects);
        }
        let ballot = match self.memory.of(&key) {
            Some(Remembered::Finished { outcome, .. }) => Ballot::Finished(*outcome),
            Some(Remembered::ReadOnly(seen)) if *seen == request_hash => Ballot::ReadOnly,
            Some(Remembered::ReadOnly(_)) => {
                Ballot::Refused(Reason::at(&self.settings.service, ReasonCode::IdReused))
            }
            Some(Remembered::Refused(reason)) => Ballot::Refused(reason.clone()),
            // It holds nothing, but others may.
            Some(Remembered::Cancelled) | None => {
                let mut visiting = Holding::visiting(Some(request_hash), Time::EPOCH);
                visiting.voters.push((worker, request_hash));
                return self.look_up(&key, visiting, effects);
            }
        };
        self.vote(worker, &key, request_hash, ballot, effects);
    }

    /// Asks the store on behalf of somebody who takes no slot here.
    pub(in super::super) fn look_up(
        &mut self,
        key: &TransactionKey,
        visiting: Holding,
        effects: &mut Vec<Effect>,
    ) {
        let visitors = self.holdings.len().saturating_sub(self.slots_used as usize);
        // Nobody says again what waits in the service's durable queue, and how much of it is
        // delivered at once is the transport's to bound.
        let is_owed = visiting.finishers.iter().any(|finisher| finisher.delivery.is_some());
        if self.settings.has_store && (is_owed || visitors < self.settings.visitors_max) {
            self.holdings.insert(key, Box::new(visiting));
            effects.push(Effect::ReadStore(key.clone()));
        }
    }

    pub(in super::super) fn store_read(
        &mut self,
        now: Time,
        key: &TransactionKey,
        held: Vec<InDoubt>,
        effects: &mut Vec<Effect>,
    ) {
        let Some(holding) = self.holdings.get_mut(key) else { return };
        if holding.stage != Stage::Recalling {
            return;
        }
        if !holding.finishers.is_empty() {
            return self.apply_to_store(now, key, held, effects);
        }
        let holds_some = !held.is_empty();
        let found = held.into_iter().find(|it| holding.is_about(it.request_hash));
        match (found, holding.prepare.take()) {
            (None, _) if holds_some => {
                let reused = Reason::at(&self.settings.service, ReasonCode::IdReused);
                self.end_visit(now, key, &Ballot::Refused(reused), effects);
            }
            (Some(found), Some(_)) if holding.redelivered => {
                holding.stage = Stage::Prepared;
                holding.branch = Some(found.branch);
                for (worker, request_hash) in std::mem::take(&mut holding.voters) {
                    self.vote_again(worker, key, request_hash, effects);
                }
                self.inquire_later(now, key);
            }
            // Another instance holds it, or held it and is gone: voted on from the store.
            (Some(found), _) => {
                self.end_visit(now, key, &Ballot::Prepared { branch: found.branch }, effects);
            }
            (None, Some(prepare)) => self.prepare_after_look(now, prepare, effects),
            (None, None) => {
                self.remove(key);
                self.admit_waiting(now, effects);
            }
        }
    }

    /// What the store says is all that this instance has to say.
    pub(in super::super) fn end_visit(
        &mut self,
        now: Time,
        key: &TransactionKey,
        ballot: &Ballot,
        effects: &mut Vec<Effect>,
    ) {
        let Some(holding) = self.remove(key) else { return };
        for (worker, request_hash) in holding.voters {
            self.vote(worker, key, request_hash, ballot.clone(), effects);
        }
        if let Slot::Held(delivery) = holding.slot {
            effects.push(Effect::Ack(delivery));
        }
        self.admit_waiting(now, effects);
    }

    pub(in super::super) fn prepare_after_look(
        &mut self,
        now: Time,
        prepare: Prepare,
        effects: &mut Vec<Effect>,
    ) {
        let key = prepare.key.clone();
        let Some(mut holding) = self.holdings.remove(&key) else { return };
        let ballot = self.ballot_without_code(now, &prepare);
        if ballot.is_none() {
            self.call_prepare(&mut holding, prepare, effects);
        }
        self.holdings.insert(&key, holding);
        if let Some(ballot) = ballot {
            let remembered = self.memory.of(&key).cloned();
            let cancelled = remembered.unwrap_or(Remembered::Cancelled);
            self.nothing_held(now, &key, cancelled, ballot, effects);
        }
    }

    /// Does what the outcome means for all that the store holds of the transaction.
    pub(in super::super) fn apply_to_store(
        &mut self,
        now: Time,
        key: &TransactionKey,
        held: Vec<InDoubt>,
        effects: &mut Vec<Effect>,
    ) {
        let Some(holding) = self.holdings.get_mut(key) else { return };
        let Some(Finisher { finish, .. }) = holding.finishers.first() else { return };
        let mut branches: BTreeSet<Branch> = held.into_iter().map(|it| it.branch).collect();
        if holding.why_failed.is_some() {
            branches.extend(holding.branch.clone());
        }
        let outcome_of = |branch: &Branch| match finish.outcome {
            Outcome::Committed if finish.branch.as_ref() == Some(branch) => Outcome::Committed,
            Outcome::Committed | Outcome::Aborted => Outcome::Aborted,
        };
        holding.prepare = None;
        holding.is_unknown = false;
        let wanted = finish.branch.clone().filter(|_| finish.outcome == Outcome::Committed);
        let not_seen = wanted.filter(|it| !branches.contains(it));
        holding.calls = branches.into_iter().map(|it| (it.clone(), outcome_of(&it))).collect();
        match not_seen {
            // It was committed before, or this is not the store that it was prepared in.
            Some(branch) if self.settings.remembers_commits => {
                holding.looked_up = Some(branch.clone());
                effects.push(Effect::LookUpCommit { key: key.clone(), branch });
            }
            Some(_) | None => self.call_next(now, key, effects),
        }
    }

    pub(in super::super) fn commit_looked_up(
        &mut self,
        now: Time,
        key: &TransactionKey,
        branch: &Branch,
        is_known: bool,
        effects: &mut Vec<Effect>,
    ) {
        let Some(holding) = self.holdings.get_mut(key) else { return };
        let is_awaited = holding.looked_up.take_if(|it| it == branch).is_some();
        if holding.stage != Stage::Recalling || !is_awaited {
            return;
        }
        holding.is_unknown = !is_known;
        self.call_next(now, key, effects);
    }
}
