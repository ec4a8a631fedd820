//! From a prepare to the vote; and how a transaction ends when nothing is held.

use crate::protocol::{
    ids::{Branch, RequestHash, TransactionKey, WorkerId},
    message::{Outcome, Prepare, Reason, ReasonCode, VoteKind},
    participant::{
        DeliveredPrepare, Effect, Holdings, InstanceContext, Verdict,
        memory::{PastOutcome, has_namesake},
        transaction::{AfterEvent, Finisher, HeldBranch, HeldTransaction, Progress, Slot},
    },
};

impl Holdings {
    pub(in super::super) fn prepare_received(
        &mut self,
        it: DeliveredPrepare,
        cx: &mut InstanceContext<'_>,
    ) {
        let key = &it.prepare.key;
        if let Some(held) = self.transactions.get_mut(key) {
            return held.prepare_again(it, cx);
        }
        // What the store holds is held, even if the prepare is late or was cancelled.
        let look = cx.settings().has_store && (it.prepare.repeated || it.redelivered);
        let kind = match look {
            true => cx.vote_from_memory(&it.prepare),
            false => cx.vote_without_code(&it.prepare, self.has_namesake(key)),
        };
        if let Some(kind) = kind {
            cx.vote(it.worker, key, it.prepare.request_hash, kind);
            return cx.effects.push(Effect::Ack(it.delivery));
        }
        if cx.resources.slots_used >= cx.settings().max_concurrency {
            return cx.resources.waiting.push_back(it);
        }
        cx.resources.slots_used += 1;
        let key = key.clone();
        let mut transaction = HeldTransaction {
            slot: Slot::Held(it.delivery),
            redelivered: it.redelivered,
            asked_by: (!look).then(|| it.worker.clone()),
            voters: vec![(it.worker, it.prepare.request_hash)],
            ..HeldTransaction::visiting(
                key.clone(),
                Some(it.prepare.request_hash),
                it.prepare.deadline,
            )
        };
        if look {
            transaction.progress = Progress::Recalling(Some(it.prepare));
            cx.effects.push(Effect::ReadStore(key.clone()));
        } else {
            transaction.call_prepare(it.prepare, cx);
        }
        self.transactions.insert(&key, Box::new(transaction));
    }

    /// Whether this instance has another transaction with this id.
    pub(super) fn has_namesake(&self, key: &TransactionKey) -> bool {
        has_namesake(&self.transactions, key)
    }

    /// Handles a cancel: it only prevents a prepare from starting, and never undoes one.
    pub(in super::super) fn cancel_received(
        &self,
        key: &TransactionKey,
        cx: &mut InstanceContext<'_>,
    ) {
        let has_started = self.transactions.get(key).is_some_and(|it| it.has_started());
        if !has_started && cx.resources.memory.of(key).is_none() {
            cx.resources.memory.remember(key, PastOutcome::Cancelled);
        }
    }
}

impl InstanceContext<'_> {
    /// The vote that follows from how the transaction ended before, if that is remembered.
    fn vote_from_memory(&self, prepare: &Prepare) -> Option<VoteKind> {
        match self.resources.memory.of(&prepare.key)? {
            PastOutcome::Finished { outcome, .. } => Some(VoteKind::Finished(*outcome)),
            PastOutcome::ReadOnly(seen) if *seen == prepare.request_hash => {
                Some(VoteKind::ReadOnly)
            }
            PastOutcome::ReadOnly(_) => Some(self.refused(ReasonCode::IdReused)),
            PastOutcome::Refused(reason) => Some(VoteKind::Refused(reason.clone())),
            PastOutcome::Cancelled => None,
        }
    }

    /// The vote on a prepare that needs no call of the service's code, if nothing is held.
    pub(super) fn vote_without_code(
        &self,
        prepare: &Prepare,
        has_namesake: bool,
    ) -> Option<VoteKind> {
        if let Some(kind) = self.vote_from_memory(prepare) {
            return Some(kind);
        }
        let (key, memory) = (&prepare.key, &self.resources.memory);
        if memory.of(key).is_some() {
            Some(self.refused(ReasonCode::Cancelled))
        } else if memory.has_namesake(key) || has_namesake {
            Some(self.refused(ReasonCode::IdReused))
        } else if self.now > prepare.deadline {
            Some(self.refused(ReasonCode::Deadline))
        } else {
            None
        }
    }
}

impl HeldTransaction {
    /// Whether its prepare has started here, so that a cancel comes too late.
    fn has_started(&self) -> bool {
        self.has_slot() && !matches!(self.progress, Progress::Recalling(Some(_)))
    }

    /// Handles another prepare of this transaction.
    fn prepare_again(&mut self, it: DeliveredPrepare, cx: &mut InstanceContext<'_>) {
        match self.slot {
            // The lookup for other workers comes first.
            Slot::None => return cx.resources.waiting.push_back(it),
            Slot::Detached if self.is_about(it.prepare.request_hash) => {
                self.slot = Slot::Held(it.delivery);
            }
            Slot::Detached | Slot::Held(_) => cx.effects.push(Effect::Ack(it.delivery)),
        }
        self.vote_on_held(it.worker, it.prepare.request_hash, cx);
    }

    /// Votes again, now or as soon as the vote is known.
    pub(super) fn vote_on_held(
        &mut self,
        to: WorkerId,
        request_hash: RequestHash,
        cx: &mut InstanceContext<'_>,
    ) {
        if !self.is_about(request_hash) {
            return cx.vote(to, &self.key, request_hash, cx.refused(ReasonCode::IdReused));
        }
        self.asked_by.take_if(|worker| *worker != to);
        match self.progress {
            Progress::InDoubt => self.vote_again(to, request_hash, cx),
            Progress::Recalling(_)
            | Progress::LookingUp { .. }
            | Progress::Preparing(_)
            | Progress::Finishing { .. }
            | Progress::BackingOff => {
                if !self.voters.contains(&(to.clone(), request_hash)) {
                    self.voters.push((to, request_hash));
                }
            }
        }
    }

    pub(super) fn call_prepare(&mut self, prepare: Prepare, cx: &mut InstanceContext<'_>) {
        cx.resources.branches += 1;
        let branch = Branch::of(&cx.settings().instance, cx.resources.branches);
        self.progress = Progress::Preparing(branch.clone());
        cx.effects.push(Effect::CallPrepare {
            key: prepare.key,
            branch,
            request_hash: prepare.request_hash,
            data: prepare.data,
            deadline: prepare.deadline,
        });
    }

    pub(in super::super) fn prepare_ended(
        &mut self,
        branch: Branch,
        verdict: Verdict,
        cx: &mut InstanceContext<'_>,
    ) -> AfterEvent {
        if !matches!(&self.progress, Progress::Preparing(running) if *running == branch) {
            return AfterEvent::Held;
        }
        let holds_nothing = matches!(verdict, Verdict::ReadOnly | Verdict::Refused(_));
        let commits =
            |it: &Finisher| it.finish.outcome == Outcome::Committed && it.finish.branch.is_some();
        if holds_nothing && cx.settings().has_store && self.finishers.iter().any(commits) {
            // The decision commits another branch, whose holder may be gone.
            self.ask_store(cx);
            return AfterEvent::Held;
        }
        match verdict {
            Verdict::Prepared => self.hold(HeldBranch::Prepared(branch), cx),
            Verdict::Failed(why) => self.hold(HeldBranch::Failed { branch, why }, cx),
            Verdict::ReadOnly => {
                let seen = self.request_hash;
                let remembered = seen.map_or(PastOutcome::Cancelled, PastOutcome::ReadOnly);
                self.conclude(remembered, &VoteKind::ReadOnly, cx)
            }
            Verdict::Refused(message) => {
                let service = Some(cx.settings().service.clone());
                let reason = Reason { code: ReasonCode::Refused, service, message };
                let kind = VoteKind::Refused(reason.clone());
                self.conclude(PastOutcome::Refused(reason), &kind, cx)
            }
        }
    }

    /// Something is or may be stored: applies the outcome if it is known, and waits for it otherwise.
    fn hold(&mut self, held: HeldBranch, cx: &mut InstanceContext<'_>) -> AfterEvent {
        self.held = Some(held);
        self.progress = Progress::InDoubt;
        if !self.finishers.is_empty() {
            return self.apply(cx);
        }
        self.vote_to_all(cx);
        self.inquire_later(cx);
        AfterEvent::Held
    }

    /// Sends the vote to all workers that wait for it.
    pub(super) fn vote_to_all(&mut self, cx: &mut InstanceContext<'_>) {
        for (worker, request_hash) in std::mem::take(&mut self.voters) {
            self.vote_again(worker, request_hash, cx);
        }
    }

    fn vote_again(&self, to: WorkerId, request_hash: RequestHash, cx: &mut InstanceContext<'_>) {
        let Some(held) = &self.held else { return };
        let kind = match held.clone() {
            HeldBranch::Prepared(branch) => VoteKind::Prepared { branch },
            HeldBranch::Failed { branch, why } => {
                let (service, message) = (Some(cx.settings().service.clone()), Some(why));
                let reason = Reason { code: ReasonCode::Failed, service, message };
                VoteKind::Failed { branch, reason }
            }
        };
        cx.vote(to, &self.key, request_hash, kind);
    }

    /// Ends the transaction: sends all answers, and frees the slot.
    pub(super) fn conclude(
        &mut self,
        remembered: PastOutcome,
        kind: &VoteKind,
        cx: &mut InstanceContext<'_>,
    ) -> AfterEvent {
        let delivery = self.free_slot(cx);
        let remembered = match self.finishers.first() {
            Some(Finisher { finish, .. }) => {
                PastOutcome::finished(finish, cx.can_answer_for(finish).is_ok())
            }
            None => remembered,
        };
        cx.resources.memory.remember(&self.key, remembered);
        self.answer_voters(kind, cx);
        for finisher in std::mem::take(&mut self.finishers) {
            let applied = cx.can_answer_for(&finisher.finish);
            cx.done(finisher, applied);
        }
        cx.effects.extend(delivery.map(Effect::Ack));
        AfterEvent::Over
    }

    /// Sends this vote to all workers that wait for one.
    pub(super) fn answer_voters(&mut self, kind: &VoteKind, cx: &mut InstanceContext<'_>) {
        for (worker, request_hash) in std::mem::take(&mut self.voters) {
            cx.vote(worker, &self.key, request_hash, kind.clone());
        }
    }
}
